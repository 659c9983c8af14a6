//! The engine on the real model.

use std::{collections::HashMap, sync::Arc};

use lightcone::{
    domain::{FinishReason, ModelId, RequestId, SamplingParams, Usage},
    engine::{
        self, Backend, Batch, BatchSequence, EngineEventBody, EngineHandle, EngineMessage, EngineRequest, EngineSpec,
        Forward,
        onnx::{OnnxModel, reference::Reference},
    },
    prompt::Tokenizer,
    telemetry::Metrics,
};
use tokio::sync::mpsc;

use crate::support::model::{model, runtime};

const TEXT: &str = include_str!("../data/alice.txt");

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
    row.iter().map(|x| f64::from(x - largest) - total.ln()).collect()
}

fn largest(row: &[f32]) -> usize {
    row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(i, _)| i)
}

#[test]
fn the_served_graph_is_as_good_as_the_dequantised_fp32_weights() {
    let file = model();
    let tokens = Tokenizer::new(Arc::clone(&file.vocabulary)).unwrap().encode(TEXT, false).unwrap();
    assert!(tokens.len() >= 1100, "{} tokens", tokens.len());
    let mut served = OnnxModel::load(&runtime(), &file, 100, 16, 2048).unwrap();
    let mut reference = Reference::load(&runtime(), &file, 512).unwrap();
    let blocks: Vec<u32> = (0..100).collect();
    let (mut positions, mut agreed, mut divergence) = (0u32, 0u32, 0.0);
    let (mut nll_served, mut nll_reference) = (0.0, 0.0);
    let vocabulary = served.vocabulary();
    for piece in tokens.chunks(400) {
        let expected = reference.logits(piece).unwrap();
        for (at, expected) in expected.chunks_exact(vocabulary).enumerate().take(piece.len() - 1) {
            let sequence = BatchSequence {
                tokens: &piece[..=at],
                prompt_tokens: at + 1,
                computed: at,
                rows: 1,
                logits_rows: 1,
                blocks: &blocks,
            };
            let got = served.forward(&Batch { sequences: vec![sequence] }).unwrap();
            let (p, q) = (log_softmax(expected), log_softmax(got));
            divergence += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            agreed += u32::from(largest(expected) == largest(got));
            positions += 1;
            nll_reference -= p[piece[at + 1] as usize];
            nll_served -= q[piece[at + 1] as usize];
        }
    }
    let n = f64::from(positions);
    let (kl, top1) = (divergence / n, f64::from(agreed) / n);
    let (perplexity, expected) = ((nll_served / n).exp(), (nll_reference / n).exp());
    println!(
        "{positions} positions: mean KL {kl:.5}, top-1 {top1:.4}, perplexity {perplexity:.3} against {expected:.3}"
    );
    assert!(positions >= 1000);
    assert!(kl <= 0.02, "mean KL {kl}");
    assert!(top1 >= 0.93, "top-1 agreement {top1}");
    assert!((perplexity / expected - 1.0).abs() < 0.02, "perplexity {perplexity} against {expected}");
}

#[test]
fn the_tokeniser_agrees_with_llama_cpp() {
    let tokenizer = Tokenizer::new(Arc::clone(&model().vocabulary)).unwrap();
    // What llama.cpp answers for this text and this file.
    let text = "Hello wörld 1234 it's 3.14\n\n  tabs\t🦀 naïve";
    let expected = [
        19556, 267, 29989, 400, 216, 33, 34, 35, 36, 357, 506, 216, 35, 30, 33, 36, 8866, 29416, 197, 10813, 116, 218,
        15486, 46494,
    ];
    assert_eq!(tokenizer.encode(text, false).unwrap(), expected);
    assert_eq!(tokenizer.encode("<|im_end|>", true).unwrap(), [2]);
    assert!(tokenizer.encode("<|im_end|>", false).unwrap().len() > 1);
}

/// A running engine and the events of its requests.
struct Served {
    handle: EngineHandle,
    events: mpsc::Receiver<EngineMessage>,
}

fn spawn(sequences_max: usize, step_tokens_max: usize, kv_mib: usize) -> Served {
    let (sink, events) = mpsc::channel(64);
    let spec = EngineSpec {
        model: ModelId::from("test"),
        file: model(),
        backend: Backend::Onnx(runtime()),
        context_tokens_max: 1024,
        sequences_max,
        step_tokens_max,
        kv_block_tokens: 16,
        kv_memory_bytes: kv_mib << 20,
    };
    Served { handle: engine::spawn(spec, sink, Arc::new(Metrics::new())).unwrap(), events }
}

fn request(id: &str, text: &str, output_tokens_max: u32) -> EngineRequest {
    let tokenizer = Tokenizer::new(Arc::clone(&model().vocabulary)).unwrap();
    let prompt = format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
    EngineRequest {
        request: RequestId::from(id),
        prompt: tokenizer.encode(&prompt, true).unwrap(),
        output_tokens_max,
        sampling: SamplingParams { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0 },
        stop: vec![],
        ignore_eos: false,
    }
}

type Answers = HashMap<String, (String, FinishReason, Usage)>;

impl Served {
    /// Submits all and waits for all.
    fn answers(&mut self, requests: Vec<EngineRequest>) -> Answers {
        let count = requests.len();
        for request in requests {
            self.handle.submit(request).unwrap();
        }
        let mut texts: HashMap<String, (String, u32)> = HashMap::new();
        let mut answers = Answers::new();
        while answers.len() < count {
            let EngineMessage::Step(events) = self.events.blocking_recv().expect("the engine lives") else {
                panic!("the engine died");
            };
            for event in events {
                let id = event.request.to_string();
                match event.body {
                    EngineEventBody::Delta { text, tokens } => {
                        let entry = texts.entry(id).or_default();
                        entry.0 += &text;
                        entry.1 += tokens;
                    }
                    EngineEventBody::Finished { reason, usage } => {
                        let (text, counted) = texts.remove(&id).unwrap_or_default();
                        assert!(counted <= usage.completion_tokens);
                        answers.insert(id, (text, reason, usage));
                    }
                    EngineEventBody::Failed { message } => panic!("{id}: {message}"),
                }
            }
        }
        answers
    }
}

const QUESTIONS: [&str; 4] = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Count from one to twenty.",
    "Why is the sky blue?",
];

#[test]
fn a_greedy_answer_is_the_same_alone_in_company_and_in_any_chunking() {
    let mut alone = spawn(1, 64, 64);
    let expected: Vec<String> =
        QUESTIONS.iter().map(|q| alone.answers(vec![request("a", q, 48)]).remove("a").unwrap().0).collect();
    println!("{expected:#?}");
    assert!(expected[0].contains("Paris"), "{}", expected[0]);
    let mut company = spawn(32, 40, 256);
    let crowd = (0..32)
        .map(|i| {
            let mut r = request(&i.to_string(), QUESTIONS[i % 4], 48);
            if i >= 4 {
                // Neighbours of other lengths, of which some sample.
                let text = format!("{} {}", &TEXT[i * 20..i * 50], QUESTIONS[i % 4]);
                r = request(&i.to_string(), &text, 20 + i as u32);
                r.sampling.temperature = (i % 3) as f32 * 0.5;
            }
            r
        })
        .collect();
    let answers = company.answers(crowd);
    for (i, expected) in expected.iter().enumerate() {
        assert_eq!(&answers[&i.to_string()].0, expected);
    }
}

#[test]
fn sequences_preempted_for_want_of_blocks_end_with_the_same_text() {
    let mut roomy = spawn(4, 64, 64);
    let requests = || {
        (0..4)
            .map(|i| {
                let mut r = request(&i.to_string(), &TEXT[i * 100..i * 100 + 800], 200);
                r.ignore_eos = true;
                r.output_tokens_max = 200;
                r
            })
            .collect::<Vec<_>>()
    };
    let expected = roomy.answers(requests());
    // 1024 tokens of context need 65 blocks of 360 KiB; four sequences of 400 tokens want 100.
    let mut tight = spawn(4, 64, 23);
    assert_eq!(tight.answers(requests()), expected);
    assert_eq!(tight.handle.load().kv_blocks_used, 0);
}

#[test]
fn stop_strings_lengths_and_seeds_hold() {
    let mut served = spawn(8, 64, 64);
    let mut stop = request("stop", QUESTIONS[0], 100);
    stop.stop = vec!["nowhere".into(), "tal of Fr".into()];
    let length = request("length", QUESTIONS[1], 5);
    let sampled = |id: &str, seed| {
        let mut r = request(id, QUESTIONS[1], 24);
        r.sampling = SamplingParams { temperature: 1.0, top_p: 0.95, top_k: 50, min_p: 0.01, seed };
        r.ignore_eos = true;
        r
    };
    let all = vec![stop, length, sampled("s1", 1), sampled("s1 again", 1), sampled("s2", 2)];
    let answers = served.answers(all);
    let (text, reason, _) = &answers["stop"];
    assert_eq!((text.as_str(), *reason), ("The capi", FinishReason::Stop));
    assert_eq!((answers["length"].1, answers["length"].2.completion_tokens), (FinishReason::Length, 5));
    assert_eq!(answers["s1"], answers["s1 again"]);
    assert_ne!(answers["s1"].0, answers["s2"].0);
    assert_eq!(answers["s1"].2.completion_tokens, 24);
}

#[test]
fn a_cancelled_request_ends_within_a_step_and_gives_its_blocks_back() {
    let mut served = spawn(2, 64, 64);
    let mut endless = request("endless", QUESTIONS[2], 900);
    endless.ignore_eos = true;
    served.handle.submit(endless).unwrap();
    let mut steps_after_cancel = 0;
    let mut cancelled = false;
    loop {
        let EngineMessage::Step(events) = served.events.blocking_recv().unwrap() else { panic!("died") };
        if let Some(EngineEventBody::Finished { reason, usage }) = events.into_iter().map(|e| e.body).next_back() {
            assert_eq!(reason, FinishReason::Cancelled);
            assert!(usage.completion_tokens > 0 && usage.completion_tokens < 100);
            break;
        }
        if cancelled {
            steps_after_cancel += 1;
        } else {
            served.handle.cancel(&RequestId::from("endless"));
            cancelled = true;
        }
    }
    assert!(steps_after_cancel <= 2, "{steps_after_cancel}");
    assert_eq!(served.handle.load().kv_blocks_used, 0);
}
