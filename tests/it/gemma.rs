//! The second architecture, on the real file: Gemma 3 270M.

use std::sync::Arc;

use lightcone::{
    engine::{
        Batch, BatchSequence, Forward,
        onnx::{OnnxModel, reference::Reference},
    },
    model::{Activation, RopePairs, TokenKind},
    prompt::Tokenizer,
};

use crate::support::model::{gemma, runtime};

#[test]
fn the_file_says_what_the_architecture_is() {
    let p = &gemma().params;
    assert_eq!((p.layers, p.width, p.ffn_width, p.vocabulary), (18, 640, 2048, 262_144));
    assert_eq!((p.heads, p.kv_heads, p.head_size, p.query_width(), p.kv_width()), (4, 1, 256, 1024, 256));
    assert_eq!((p.activation, p.rope_pairs), (Activation::Gelu, RopePairs::Halves));
    assert!(p.has_head_norms && p.has_post_norms);
    assert_eq!((p.query_factor, p.embedding_factor), (1.0 / 16.0, 640f32.sqrt()));
    for layer in 0..18 {
        let sees_all = [5, 11, 17].contains(&layer);
        assert_eq!(p.window(layer), if sees_all { None } else { Some(512) });
        assert_eq!(p.rope_base_of(layer), if sees_all { 1e6 } else { 1e4 });
    }
}

#[test]
fn texts_become_the_tokens_that_llama_cpp_makes_of_them_and_the_tokens_become_the_texts() {
    let vocabulary = Arc::clone(&gemma().vocabulary);
    let tokenizer = Tokenizer::new(Arc::clone(&vocabulary)).unwrap();
    let fixture: Vec<(String, Vec<u32>)> = serde_json::from_str(include_str!("../data/gemma_tokens.json")).unwrap();
    assert!(fixture.len() >= 500);
    for (text, expected) in &fixture {
        let tokens = tokenizer.encode(text, false).unwrap();
        assert_eq!(&tokens, expected, "{text:?}");
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| vocabulary.bytes(*token)).copied().collect();
        // SentencePiece spells a space like this very character.
        assert_eq!(String::from_utf8(bytes).unwrap(), text.replace('▁', " "));
    }
}

#[test]
fn a_control_token_comes_out_of_a_text_only_where_that_is_asked_for() {
    let vocabulary = Arc::clone(&gemma().vocabulary);
    let tokenizer = Tokenizer::new(Arc::clone(&vocabulary)).unwrap();
    assert!(vocabulary.begins_with_bos);
    assert_eq!((vocabulary.bos, &vocabulary.eos[..]), (Some(2), &[1, 106][..]));
    for (token, id) in vocabulary.tokens.iter().zip(0u32..).filter(|(_, id)| *id % 61 == 2 || *id < 300) {
        if vocabulary.kinds[id as usize] != TokenKind::Control {
            continue;
        }
        assert_eq!(tokenizer.encode(&format!("a{token} b"), true).unwrap()[1], id, "{token}");
        let plain = tokenizer.encode(&format!("a{token} b"), false).unwrap();
        assert!(plain.iter().all(|id| vocabulary.kinds[*id as usize] != TokenKind::Control), "{token}");
    }
}

/// What llama.cpp predicts after each of these tokens from `first` on: how its file was made stands beside it.
#[derive(serde::Deserialize)]
struct Predictions {
    first: usize,
    tokens: Vec<u32>,
    best: Vec<usize>,
    log_probabilities: Vec<f64>,
}

fn predictions() -> Predictions {
    serde_json::from_str(include_str!("../data/gemma_logits.json")).unwrap()
}

/// How near some logits are to llama.cpp's.
struct Nearness {
    perplexity: f64,
    expected: f64,
    /// Share of positions with the same best token.
    top1: f64,
    /// Mean difference of the true next token's log probabilities.
    off: f64,
}

impl Nearness {
    fn of(predictions: &Predictions, logits: &[f32], vocabulary: usize) -> Self {
        let n = predictions.best.len() as f64;
        let (mut found, mut agreed, mut off) = (0.0, 0.0, 0.0);
        for (i, row) in logits.chunks_exact(vocabulary).take(predictions.best.len()).enumerate() {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
            let following = predictions.tokens[predictions.first + i + 1] as usize;
            let log_probability = f64::from(row[following] - largest) - total.ln();
            found += log_probability;
            off += (log_probability - predictions.log_probabilities[i]).abs();
            agreed += f64::from(u8::from(row[predictions.best[i]] == largest));
        }
        let expected = predictions.log_probabilities.iter().sum::<f64>();
        let nearness =
            Self { perplexity: (-found / n).exp(), expected: (-expected / n).exp(), top1: agreed / n, off: off / n };
        let Self { perplexity, expected, top1, off } = nearness;
        println!("{n} positions: perplexity {perplexity:.3} against {expected:.3}, top-1 {top1:.4}, off by {off:.4}");
        nearness
    }
}

#[test]
fn the_fp32_reference_predicts_what_llama_cpp_predicts_beyond_the_sliding_window() {
    let predictions = predictions();
    let file = gemma();
    let mut reference = Reference::load(&runtime(), &file, 1024).unwrap();
    let logits = reference.logits_from(&predictions.tokens, predictions.first).unwrap();
    let near = Nearness::of(&predictions, &logits, file.params.vocabulary);
    assert!((near.perplexity / near.expected - 1.0).abs() < 0.001);
    assert!(near.top1 >= 0.995 && near.off < 0.005);
    adhoc(&logits);
}

fn adhoc(logits: &[f32]) {
    if let Ok(path) = std::env::var("KLD") {
        let data = std::fs::read(path).unwrap();
        let row = 262144 * 2 + 8;
        let start = 20 + 4 * 1024;
        let mut kl = 0.0f64;
        for i in 0..511 {
            let r = &data[start + i * row..][..row];
            let s = f32::from_le_bytes(r[..4].try_into().unwrap());
            let m = f32::from_le_bytes(r[4..8].try_into().unwrap());
            let l = &logits[i * 262144..][..262144];
            let largest = l.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = l.iter().map(|x| f64::from(x - largest).exp()).sum();
            for (j, x) in l.iter().enumerate() {
                let p = f64::from(x - largest) - total.ln();
                let q = f64::from(s * u16::from_le_bytes([r[8 + 2 * j], r[9 + 2 * j]]) as f32 + m);
                if q > -14.0 {
                    kl += q.exp() * (q - p);
                }
            }
        }
        println!("KL {}", kl / 511.0);
    }
}

/// Logits of one sequence's tokens from `first` on, computed `chunk` rows at a time beside `neighbour`.
fn served(model: &mut OnnxModel, tokens: &[u32], first: usize, chunk: usize, neighbour: &[u32]) -> Vec<f32> {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(16) as u32).rev().collect();
    let beside: Vec<u32> = (0..neighbour.len().div_ceil(16) as u32).map(|i| i + blocks.len() as u32).collect();
    let mut logits = Vec::new();
    let mut computed = 0;
    while computed < tokens.len() {
        let rows = chunk.min(tokens.len() - computed);
        let wanted = (computed + rows).saturating_sub(first.max(computed));
        let sequence = |tokens, computed, rows, logits_rows, blocks| BatchSequence {
            tokens,
            prompt_tokens: 1,
            computed,
            rows,
            logits_rows,
            blocks,
        };
        let mut sequences = vec![sequence(tokens, computed, rows, wanted, &blocks[..])];
        if !neighbour.is_empty() {
            sequences.insert(0, sequence(neighbour, 0, neighbour.len(), 0, &beside[..]));
        }
        logits.extend_from_slice(model.forward(&Batch { sequences }).unwrap());
        computed += rows;
    }
    logits
}

#[test]
fn the_served_graph_predicts_it_too_whatever_the_chunks_and_the_company() {
    let predictions = predictions();
    let (tokens, first) = (&predictions.tokens, predictions.first);
    let file = gemma();
    let mut model = OnnxModel::load(&runtime(), &file, 80, 16, 1024).unwrap();
    let logits = served(&mut model, tokens, first, 128, &[]);
    let vocabulary = file.params.vocabulary;
    let near = Nearness::of(&predictions, &logits, vocabulary);
    adhoc(&logits);
    assert!((near.perplexity / near.expected - 1.0).abs() < 0.01);
    assert!(near.top1 >= 0.93 && near.off < 0.12);
    // Windows begin at another token in each row, so tiles of other rows would show.
    let last = tokens.len() - 40;
    for (chunk, neighbour) in [(47, &tokens[100..180]), (301, &tokens[..1])] {
        let other = served(&mut model, tokens, last, chunk, neighbour);
        assert!(other == logits[(last - first) * vocabulary..], "chunks of {chunk}");
    }
}
