//! The second architecture, on the real file: Gemma 3 270M.

use std::sync::Arc;

use lightcone::{
    model::{Activation, RopePairs, TokenKind},
    prompt::Tokenizer,
};

use crate::support::model::gemma;

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
    assert!(fixture.len() >= 400);
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
