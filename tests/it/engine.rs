//! The engine on the real model.

use std::sync::Arc;

use lightcone::{
    domain::{FinishReason, RequestId, SamplingParams},
    engine::{
        EngineEventBody, EngineMessage,
        quality::{self, Bounds, Passage},
    },
    prompt::Tokenizer,
};

use crate::support::{
    engine::{Served, TEXT, request, spec},
    model::{model, runtime},
};

#[test]
fn the_served_graph_is_as_good_as_the_dequantised_fp32_weights() {
    let file = model();
    let tokens = Tokenizer::new(Arc::clone(&file.vocabulary)).unwrap().encode(TEXT, false).unwrap();
    let passage = Passage { tokens: &tokens, bos: None };
    let mut heard = 0;
    let quality = quality::measure(&runtime(), &file, &passage, |done| heard = done).unwrap();
    println!("{quality:?}");
    assert_eq!((quality.positions, heard), (tokens.len() - 1, tokens.len() - 1));
    assert!(quality.positions >= 1000);
    let bounds = Bounds { perplexity_off_max: 0.02, kl_mean_max: 0.02 };
    assert_eq!(quality.fault(bounds), None, "{quality:?}");
    assert!(quality.top1_agreement >= 0.93, "{quality:?}");
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

const QUESTIONS: [&str; 4] = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Count from one to twenty.",
    "Why is the sky blue?",
];

#[test]
fn sequences_preempted_for_want_of_blocks_end_with_the_same_text() {
    let mut roomy = Served::spawn(spec(4, 64, 64));
    let requests = || {
        (0..4)
            .map(|i| {
                let mut r = request(&i.to_string(), &TEXT[i * 100..i * 100 + 800], 200);
                r.stops.ignore_eos = true;
                r.output_tokens_max = 200;
                r
            })
            .collect::<Vec<_>>()
    };
    let expected = roomy.answers(requests());
    // 1024 tokens of context need 65 blocks of 360 KiB; four sequences of 400 tokens want 100.
    let mut tight = Served::spawn(spec(4, 64, 23));
    // Sent back to waiting, a sequence finds what it had computed, as far as that has not been overwritten.
    for (id, (text, reason, usage)) in tight.answers(requests()) {
        let (expected_text, expected_reason, expected_usage) = &expected[&id];
        assert_eq!((&text, reason), (expected_text, *expected_reason));
        assert_eq!(usage.completion_tokens, expected_usage.completion_tokens);
    }
    assert_eq!(tight.handle.load().kv_blocks_used, 0);
}

#[test]
fn stop_strings_lengths_and_seeds_hold() {
    let mut served = Served::spawn(spec(8, 64, 64));
    let mut stop = request("stop", QUESTIONS[0], 100);
    stop.stops.strings = vec!["nowhere".into(), "tal of Fr".into()];
    let length = request("length", QUESTIONS[1], 5);
    let sampled = |id: &str, seed| {
        let mut r = request(id, QUESTIONS[1], 24);
        r.sampling = SamplingParams { top_p: 0.95, top_k: 50, min_p: 0.01, seed, ..SamplingParams::default() };
        r.stops.ignore_eos = true;
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
    let mut served = Served::spawn(spec(2, 64, 64));
    let mut endless = request("endless", QUESTIONS[2], 900);
    endless.stops.ignore_eos = true;
    served.handle.submit(vec![endless]).unwrap();
    let mut steps_after_cancel = 0;
    let mut cancelled = false;
    loop {
        let EngineMessage::Step(events) = served.events.blocking_recv().unwrap() else { panic!("died") };
        if let Some(EngineEventBody::Finished { reason, usage, .. }) = events.into_iter().map(|e| e.body).next_back() {
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
