//! Whatever the scheduler does for speed, on the real model: the answers stay what they are.

use std::collections::HashMap;

use lightcone::{
    domain::{FinishReason, Priority},
    engine::{EngineEventBody, EngineMessage, EngineRequest, EngineSpec, Speculation},
};

use crate::support::engine::{Answers, Served, TEXT, request, spec};

const PROMPTS: usize = 200;

/// 200 short requests: half of them greedy, half with a seed; every fourth has much to copy, every fifth a
/// stop string, and lengths differ.
fn requests() -> Vec<EngineRequest> {
    let words: Vec<&str> = TEXT.split_whitespace().collect();
    (0..PROMPTS)
        .map(|i| {
            let some = words[i * 3..][..4 + i * 7 % 17].join(" ");
            let text = match i % 4 {
                0 => format!("{some}, {some}, {some}, {some}"),
                1 => format!("Say: {some}"),
                _ => some,
            };
            let much = if i % 4 == 0 { 12 } else { 0 };
            let mut request = request(&i.to_string(), &text, 4 + i as u32 % 5 + much);
            request.stops.ignore_eos = i % 3 > 0;
            if i % 2 == 1 {
                request.sampling.temperature = 0.4 + (i % 7) as f32 * 0.1;
                request.sampling.top_p = if i % 3 == 0 { 0.9 } else { 1.0 };
                request.sampling.top_k = if i % 5 == 0 { 40 } else { 0 };
                request.sampling.seed = i as u64;
            }
            if i % 5 == 0 {
                request.stops.strings = vec!["e".into(), "\n".into()];
            }
            request.priority = [Priority::Low, Priority::Normal, Priority::High][i % 3];
            request
        })
        .collect()
}

/// In another order, with other neighbours, for each `seed`.
fn shuffled(mut requests: Vec<EngineRequest>, mut seed: u64) -> Vec<EngineRequest> {
    for i in (1..requests.len()).rev() {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        requests.swap(i, (seed >> 33) as usize % (i + 1));
    }
    requests
}

fn told(answers: &Answers) -> HashMap<&str, (&str, FinishReason, u32, u32)> {
    answers
        .iter()
        .map(|(id, (text, reason, usage))| {
            (id.as_str(), (text.as_str(), *reason, usage.prompt_tokens, usage.completion_tokens))
        })
        .collect()
}

fn counted(served: &Served, name: &str) -> u64 {
    let text = served.metrics.render();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("lightcone_{name}_total{{model=\"test\"}} ")));
    line.map_or(0, |number| number.parse().unwrap())
}

#[test]
fn an_answer_is_the_same_alone_in_company_in_any_chunks_with_and_without_cache_and_guesses() {
    let plain = |sequences_max, step_tokens_max, speculation| EngineSpec {
        prefix_cache: false,
        speculation,
        ..spec(sequences_max, step_tokens_max, 64)
    };
    let alone = Served::spawn(plain(1, 64, Speculation::Off)).answers(requests());
    let expected = told(&alone);
    assert_eq!(expected.len(), PROMPTS);
    assert!(alone.values().all(|(_, _, usage)| usage.cached_tokens == 0));
    let stopped = alone.values().filter(|(_, reason, _)| *reason == FinishReason::Stop).count();
    assert!(stopped > 10 && stopped < PROMPTS - 10, "{stopped} stopped by themselves");

    // In small chunks, two at a time, which guess whenever neither of them catches up.
    let mut guessing = Served::spawn(plain(2, 17, Speculation::Always));
    let answers = guessing.answers(shuffled(requests(), 1));
    assert_eq!(told(&answers), expected);
    let (drafted, accepted) = (counted(&guessing, "drafted_tokens"), counted(&guessing, "accepted_draft_tokens"));
    assert!(accepted > 0 && accepted < drafted, "{accepted} of {drafted} guesses were right");

    // Among 31 others, twice: the second time most of each prompt is there.
    let mut company = Served::spawn(spec(32, 48, 256));
    for round in 2..4 {
        let answers = company.answers(shuffled(requests(), round));
        assert_eq!(told(&answers), expected);
        let cached: u32 = answers.values().map(|(_, _, usage)| usage.cached_tokens).sum();
        let most: u32 = answers.values().map(|(_, _, usage)| (usage.prompt_tokens - 1) / 16 * 16).sum();
        assert!(round == 2 || cached == most, "{cached} of {most} tokens were there");
    }
    assert_eq!(company.handle.load().kv_blocks_used, 0);
    // All of it together, and paid for in pieces that are used up before the next one comes.
    let in_pieces = |(request, tokens)| EngineRequest { allowed_tokens: tokens, step_tokens: 4, ..request };
    let mut all = Served::spawn(EngineSpec { speculation: Speculation::Always, ..spec(16, 33, 64) });
    for round in 4..6 {
        let requests = shuffled(requests(), round).into_iter().zip((0..4).cycle()).map(in_pieces);
        assert_eq!(told(&all.answers(requests.collect())), expected);
    }
}

#[test]
fn cached_tokens_are_told_to_the_block_and_shared_by_nobody_but_their_owner() {
    let mut served = Served::spawn(spec(4, 64, 64));
    let asked = |id: &str, text: &str| request(id, &format!("{} {text}", &TEXT[..1200]), 2);
    let mut cached = |request: EngineRequest| {
        let (tokens, id) = (request.prompt.len(), request.request.to_string());
        let usage = served.answers(vec![request])[&id].2;
        assert_eq!(usage.prompt_tokens as usize, tokens);
        usage.cached_tokens
    };
    let first = asked("first", "Who is tired?");
    let prompt = first.prompt.clone();
    assert_eq!(cached(first), 0);
    let second = asked("second", "What is a book for?");
    let common = prompt.iter().zip(&second.prompt).take_while(|(a, b)| a == b).count() as u32;
    assert!(common > 256);
    assert_eq!(cached(second), common / 16 * 16);
    let other = EngineRequest { lane: "another tenant".into(), ..asked("other", "Who is tired?") };
    assert_eq!(cached(other), 0);
    let hits = counted(&served, "prefix_hit_tokens");
    assert_eq!(hits, u64::from(common / 16 * 16));
}

#[test]
fn requests_that_come_together_share_a_prefix_that_is_still_being_computed() {
    let mut served = Served::spawn(spec(8, 64, 64));
    let requests: Vec<_> = (0..8).map(|i| request(&i.to_string(), &format!("{} {i}?", &TEXT[..1500]), 2)).collect();
    let prompt = requests[0].prompt.len() as u32;
    let answers = served.answers(requests);
    let mut cached: Vec<u32> = answers.values().map(|(_, _, usage)| usage.cached_tokens).collect();
    cached.sort_unstable();
    assert_eq!(cached[0], 0);
    assert!(cached[1..].iter().all(|tokens| *tokens + 32 > prompt), "{cached:?} of {prompt}");
}

#[test]
fn the_leader_of_a_common_prefix_may_go_and_the_others_get_their_answers() {
    let mut served = Served::spawn(spec(8, 16, 64));
    let asked = |id: &str| request(id, &TEXT[..1500], 3);
    let expected = served.answers(vec![EngineRequest { lane: "before".into(), ..asked("x") }])["x"].0.clone();
    served.handle.submit(vec![asked("leader")]).unwrap();
    served.handle.submit(vec![asked("follower")]).unwrap();
    // It has computed a part of its prompt by then, or all; it must make no difference.
    while served.handle.load().steps < 3 {
        std::thread::yield_now();
    }
    served.handle.cancel(&"leader".into());
    let (mut text, mut ended) = (String::new(), 0);
    while ended < 2 {
        let EngineMessage::Step(events) = served.events.blocking_recv().unwrap() else { panic!("died") };
        for event in events {
            match event.body {
                EngineEventBody::Delta { text: more, .. } if event.request.as_str() == "follower" => text += &more,
                EngineEventBody::Finished { .. } => ended += 1,
                EngineEventBody::Failed { message } => panic!("{message}"),
                _ => {}
            }
        }
    }
    assert_eq!(text, expected);
}
