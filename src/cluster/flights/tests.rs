use super::*;
use crate::{cluster::testing::claim, domain::Job};

fn delta(request: &str) -> EngineEvent {
    let body = EngineEventBody::Delta { text: "a".into(), ids: vec![7], details: Vec::new() };
    EngineEvent { request: request.into(), choice: 0, body }
}

fn finished(request: &str) -> EngineEvent {
    let (reason, usage) = (FinishReason::Stop, Usage::default());
    let body = EngineEventBody::Finished { reason, stopped_by: None, usage, digest: [7; 32] };
    EngineEvent { request: request.into(), choice: 0, body }
}

#[test]
fn events_are_numbered_without_gaps_and_a_request_lands_once() {
    let flights = Flights::default();
    let accepted = flights.take_in(&[claim("a", "edge")], 1);
    assert_eq!(accepted[0].event.seq, 0);
    let step = flights.advance(vec![delta("a"), delta("a"), finished("a"), delta("a")], 1);
    assert_eq!(step.events.iter().map(|out| out.event.seq).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(step.landings.len(), 1);
    assert_eq!(step.landings[0].seq, 4);
    assert!(flights.fail(|_, _| true, FailureCode::WorkerFailed, "late").is_empty());
    assert_eq!(flights.count(), (0, 1));
    flights.left(&"a".into());
    assert_eq!(flights.count(), (0, 0));
}

#[test]
fn who_leaves_before_the_first_token_pays_nothing() {
    let flights = Flights::default();
    flights.take_in(&[claim("a", "edge"), claim("b", "edge")], 1);
    let cancelled = |request: &str, completion_tokens| EngineEvent {
        request: request.into(),
        choice: 0,
        body: EngineEventBody::Finished {
            reason: FinishReason::Cancelled,
            stopped_by: None,
            usage: Usage { prompt_tokens: 100, completion_tokens, cached_tokens: 0 },
            digest: [0; 32],
        },
    };
    let landings = flights.advance(vec![cancelled("a", 0), cancelled("b", 1)], 1).landings;
    assert_eq!(landings[0].outcome, Outcome::Withdrawn);
    assert!(matches!(landings[1].outcome, Outcome::Finished { reason: FinishReason::Cancelled, .. }));
}

#[test]
fn the_digest_of_a_request_is_that_of_its_choices_in_their_order_whichever_ends_first() {
    let flights = Flights::default();
    let two = |request: &str| {
        let claim = claim(request, "edge");
        Arc::new(Claim { job: Job { choices: 2, ..claim.job.clone() }, ..Claim::clone(&claim) })
    };
    flights.take_in(&[claim("one", "edge"), two("two"), two("twice")], 1);
    let ended = |request: &str, choice: u32| {
        let (reason, usage) = (FinishReason::Stop, Usage::default());
        let digest = [choice as u8; 32];
        let body = EngineEventBody::Finished { reason, stopped_by: None, usage, digest };
        EngineEvent { request: request.into(), choice, body }
    };
    let events = vec![ended("two", 1), ended("twice", 1), ended("one", 0), ended("two", 0), ended("twice", 1)];
    let landings = flights.advance(events, 1).landings;
    let digests = landings.iter().map(|landing| match landing.outcome {
        Outcome::Finished { digest, .. } => digest,
        _ => panic!("{landing:?}"),
    });
    let sha = |bytes: &[u8]| Some(Sha256::digest(bytes).into());
    assert!(digests.eq([sha(&[0; 32]), sha(&[[0; 32], [1; 32]].concat()), None]));
}

#[test]
fn what_a_request_needs_is_no_event_of_its_stream() {
    let flights = Flights::default();
    flights.take_in(&[claim("a", "edge")], 1);
    let needs = |wanted| EngineEvent { request: "a".into(), choice: 0, body: EngineEventBody::NeedsTokens { wanted } };
    let step = flights.advance(vec![delta("a"), needs(3), delta("a")], 1);
    assert_eq!(step.events.iter().map(|out| out.event.seq).collect::<Vec<_>>(), [1, 2]);
    let needs = step.needs.iter().map(|(claim, wanted)| (claim.job.request.as_str(), *wanted));
    assert!(needs.eq([("a", 3)]));
}

#[test]
fn a_worker_that_was_replaced_is_not_heard() {
    let flights = Flights::default();
    flights.take_in(&[claim("a", "edge")], 2);
    let step = flights.advance(vec![delta("a"), finished("a")], 1);
    assert!(step.events.is_empty() && step.landings.is_empty());
}

#[test]
fn a_lost_edge_fails_its_own_requests_only() {
    let flights = Flights::default();
    flights.take_in(&[claim("a", "edge-1"), claim("b", "edge-2")], 1);
    let lost = NodeId::from("edge-1");
    let landings = flights.fail(|_, edge| *edge == lost, FailureCode::WorkerFailed, "the edge is gone");
    assert_eq!(landings.len(), 1);
    assert_eq!(landings[0].claim.job.request.as_str(), "a");
}

#[test]
fn a_lost_claim_is_forgotten_even_while_it_lands() {
    let flights = Flights::default();
    flights.take_in(&[claim("a", "edge")], 1);
    let _landing = flights.land(&"a".into(), Outcome::Failed { code: FailureCode::Draining, message: "x".into() });
    flights.lose(&"a".into());
    assert!(!flights.holds(&"a".into()));
}
