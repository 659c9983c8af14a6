//! The requests that this node has claimed for one model and not yet ended.
//!
//! Promises that each ends once: whoever moves it to its landing is the only one, be it the engine's last
//! event, the worker's death, a lost edge or the drain. Lives outside the actors, so that it outlives their
//! panics. Never does I/O.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

use crate::{
    domain::{
        Claim, EventBody, FailureCode, FinishReason, FundsEnd, NanoUsd, NodeId, RequestId, StoppedBy, TenantId,
        TokenEvent, Usage,
    },
    engine::{EngineEvent, EngineEventBody},
    queue::Outgoing,
};

#[derive(Default)]
pub struct Flights {
    table: Mutex<HashMap<RequestId, Flight>>,
    /// Told whenever a flight lands or leaves.
    pub changed: Notify,
}

struct Flight {
    claim: Arc<Claim>,
    /// What is set aside for it, as far as is known here.
    hold: NanoUsd,
    /// Which incarnation of the worker has it.
    generation: u64,
    seq_next: u32,
    cancelled: bool,
    /// Something of the prompt was told, which is paid for.
    has_told: bool,
    begun: Instant,
    /// When its lease was last known to be good.
    renewed: Instant,
    state: State,
    /// Choices that have ended, what they used together, and how.
    ended: u32,
    usage: Usage,
    reason: FinishReason,
    /// What kept it from going on, if that was money.
    funds: Option<FundsEnd>,
    /// Tokens of all choices that were told of.
    decoded: u32,
    /// Of each choice that has ended, in no order.
    digests: Vec<(u32, [u8; 32])>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Flying,
    /// Being settled or released.
    Landing,
}

/// How a flight ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Finished {
        reason: FinishReason,
        /// What kept it from going on, if that was money.
        funds: Option<FundsEnd>,
        usage: Usage,
        /// SHA-256 of the digests of all choices, in their order.
        digest: Option<[u8; 32]>,
    },
    Failed {
        code: FailureCode,
        message: String,
    },
    /// The client went away before the first token.
    Withdrawn,
}

/// A flight on its way out of the table. Its holder settles or releases it, then calls [`Flights::left`].
#[must_use = "a landing must be settled or released"]
#[derive(Debug)]
pub struct Landing {
    pub claim: Arc<Claim>,
    pub seq: u32,
    pub outcome: Outcome,
}

/// What one engine step comes to.
#[derive(Default)]
pub struct Advanced {
    pub events: Vec<Outgoing>,
    pub landings: Vec<Landing>,
    /// Requests that ended while the engine still has choices of them.
    pub unwanted: Vec<RequestId>,
    /// Tokens decoded so far of the requests that got some.
    pub decoded: Vec<(RequestId, u32)>,
    /// Requests that could use so many tokens more than are paid for.
    pub needs: Vec<(Arc<Claim>, u32)>,
}

impl Flights {
    /// What is set aside for a request, as far as is known here.
    pub fn hold(&self, request: &RequestId) -> Option<NanoUsd> {
        self.table.lock().get(request).map(|flight| flight.hold)
    }

    /// So many output tokens more are.
    pub fn hold_more(&self, request: &RequestId, tokens: u32) {
        if let Some(flight) = self.table.lock().get_mut(request) {
            let more = flight.claim.job.price.output.checked_mul(tokens.into());
            // It was set aside, so that it is an amount.
            flight.hold = more.and_then(|more| flight.hold.checked_add(more)).unwrap_or(flight.hold);
        }
    }

    /// Those that are not in the air already. A store that lost a claim and kept its request gives it out again: the
    /// flight goes on, under the claim that holds now.
    pub fn new_ones(&self, claims: Vec<Claim>) -> Vec<Claim> {
        let mut table = self.table.lock();
        let is_new = |claim: &Claim| match table.get_mut(&claim.job.request) {
            Some(flight) if flight.claim.attempt >= claim.attempt => {
                tracing::warn!(request = %claim.job.request, "the store had lost a claim of a request that runs here");
                (flight.claim, flight.renewed) = (Arc::new(claim.clone()), Instant::now());
                false
            }
            _ => true,
        };
        let mut claims = claims;
        claims.retain(is_new);
        claims
    }

    /// Takes claims in and answers with their first events.
    pub fn take_in(&self, claims: &[Arc<Claim>], generation: u64) -> Vec<Outgoing> {
        let mut table = self.table.lock();
        let mut events = Vec::with_capacity(claims.len());
        for claim in claims {
            let request = claim.job.request.clone();
            table.insert(request.clone(), Flight::new(Arc::clone(claim), generation));
            let event = TokenEvent { request, seq: 0, body: EventBody::Accepted };
            events.push(Outgoing { claim: Arc::clone(claim), event });
        }
        events
    }

    /// Turns one step of the engine into events and landings. Events of requests that are not (any more) of
    /// this generation's come to nothing.
    pub fn advance(&self, events: Vec<EngineEvent>, generation: u64) -> Advanced {
        let mut advanced = Advanced::default();
        let mut table = self.table.lock();
        for EngineEvent { request, choice, body } in events {
            let flying = |flight: &&mut Flight| flight.generation == generation && flight.state == State::Flying;
            let Some(flight) = table.get_mut(&request).filter(flying) else { continue };
            let body = match body {
                EngineEventBody::Prompt { tokens } => {
                    flight.has_told = true;
                    EventBody::Prompt { tokens }
                }
                EngineEventBody::Delta { text, tokens, details } => {
                    flight.decoded += tokens;
                    advanced.decoded.push((request, flight.decoded));
                    EventBody::Delta { choice, text, tokens, details }
                }
                EngineEventBody::NeedsTokens { wanted } => {
                    advanced.needs.push((Arc::clone(&flight.claim), wanted));
                    continue;
                }
                EngineEventBody::Finished { reason, stopped_by, usage, digest } => {
                    flight.digests.push((choice, digest));
                    if let Some(StoppedBy::Funds(funds)) = stopped_by {
                        flight.funds = Some(funds);
                    }
                    if let Some(outcome) = flight.choice_ended(choice, reason, &usage) {
                        if outcome != Outcome::Withdrawn {
                            advanced.events.push(flight.event(EventBody::ChoiceEnded { choice, reason, stopped_by }));
                        }
                        advanced.landings.push(flight.land(outcome));
                        continue;
                    }
                    EventBody::ChoiceEnded { choice, reason, stopped_by }
                }
                EngineEventBody::Failed { message } => {
                    tracing::warn!(%request, choice, message, "the engine cannot serve this request");
                    advanced.landings.push(flight.land(Outcome::Failed { code: FailureCode::WorkerFailed, message }));
                    if flight.claim.job.choices > 1 {
                        advanced.unwanted.push(request);
                    }
                    continue;
                }
            };
            advanced.events.push(flight.event(body));
        }
        drop(table);
        if !advanced.landings.is_empty() {
            self.changed.notify_waiters();
        }
        advanced
    }

    /// Lands one flight, if it still flies.
    pub fn land(&self, request: &RequestId, outcome: Outcome) -> Option<Landing> {
        let mut table = self.table.lock();
        let flight = table.get_mut(request).filter(|flight| flight.state == State::Flying)?;
        let landing = flight.land(outcome);
        drop(table);
        self.changed.notify_waiters();
        Some(landing)
    }

    /// Fails everything that flies and that `which` chooses by generation and edge.
    pub fn fail(&self, which: impl Fn(u64, &NodeId) -> bool, code: FailureCode, message: &str) -> Vec<Landing> {
        let mut table = self.table.lock();
        let chosen = table.values_mut().filter(|flight| {
            flight.state == State::Flying && which(flight.generation, &flight.claim.job.reply_to.node)
        });
        let landings =
            chosen.map(|flight| flight.land(Outcome::Failed { code, message: message.to_owned() })).collect();
        drop(table);
        self.changed.notify_waiters();
        landings
    }

    /// Notes that the client has gone. `false`: not here.
    pub fn cancel(&self, request: &RequestId) -> bool {
        self.table.lock().get_mut(request).map(|flight| flight.cancelled = true).is_some()
    }

    /// Those in the air of an edge that is gone, and their clients with it.
    pub fn of_edge(&self, edge: &NodeId) -> Vec<RequestId> {
        let table = self.table.lock();
        let theirs = table.iter().filter(|(_, flight)| flight.claim.job.reply_to.node == *edge);
        theirs.map(|(request, _)| request.clone()).collect()
    }

    /// Whether the client has gone; `None` when the flight is no longer in the air.
    pub fn is_cancelled(&self, request: &RequestId) -> Option<bool> {
        let table = self.table.lock();
        table.get(request).filter(|flight| flight.state == State::Flying).map(|flight| flight.cancelled)
    }

    /// The claim is somebody else's now: forget it, whatever its state.
    pub fn lose(&self, request: &RequestId) {
        self.table.lock().remove(request);
        self.changed.notify_waiters();
    }

    /// A landing is done.
    pub fn left(&self, request: &RequestId) {
        self.lose(request);
    }

    /// Whether the request is still this node's to settle.
    pub fn holds(&self, request: &RequestId) -> bool {
        self.table.lock().contains_key(request)
    }

    /// How long ago it was taken in.
    pub fn age(&self, request: &RequestId) -> Option<Duration> {
        self.table.lock().get(request).map(|flight| flight.begun.elapsed())
    }

    /// How long ago the lease was known to be good.
    pub fn lease_age(&self, request: &RequestId) -> Option<Duration> {
        self.table.lock().get(request).map(|flight| flight.renewed.elapsed())
    }

    pub fn renewed(&self, requests: impl IntoIterator<Item = RequestId>, at: Instant) {
        let mut table = self.table.lock();
        for request in requests {
            if let Some(flight) = table.get_mut(&request) {
                flight.renewed = at;
            }
        }
    }

    /// Everything whose lease and hold must be kept alive.
    pub fn leases(&self) -> Vec<(TenantId, RequestId, u32)> {
        let table = self.table.lock();
        let lease = |flight: &Flight| {
            let job = &flight.claim.job;
            (job.tenant.clone(), job.request.clone(), flight.claim.attempt)
        };
        table.values().map(lease).collect()
    }

    /// (in the air, all)
    pub fn count(&self) -> (usize, usize) {
        let table = self.table.lock();
        (table.values().filter(|flight| flight.state == State::Flying).count(), table.len())
    }
}

impl Flight {
    fn new(claim: Arc<Claim>, generation: u64) -> Self {
        Self {
            hold: claim.job.hold,
            claim,
            generation,
            seq_next: 1,
            cancelled: false,
            has_told: false,
            begun: Instant::now(),
            renewed: Instant::now(),
            state: State::Flying,
            ended: 0,
            usage: Usage::default(),
            reason: FinishReason::Stop,
            funds: None,
            decoded: 0,
            digests: Vec::new(),
        }
    }

    /// The next event of its stream.
    fn event(&mut self, body: EventBody) -> Outgoing {
        let event = TokenEvent { request: self.claim.job.request.clone(), seq: self.seq_next, body };
        self.seq_next += 1;
        Outgoing { claim: Arc::clone(&self.claim), event }
    }

    /// Counts a choice that has ended. How the request ends, when it was the last.
    fn choice_ended(&mut self, choice: u32, reason: FinishReason, usage: &Usage) -> Option<Outcome> {
        self.ended += 1;
        self.usage.prompt_tokens = usage.prompt_tokens;
        self.usage.completion_tokens += usage.completion_tokens;
        if choice == 0 {
            self.usage.cached_tokens = usage.cached_tokens;
        }
        self.reason = match (self.reason, reason) {
            (FinishReason::Cancelled, _) | (_, FinishReason::Cancelled) => FinishReason::Cancelled,
            (FinishReason::Length, _) | (_, FinishReason::Length) => FinishReason::Length,
            (FinishReason::Stop, FinishReason::Stop) => FinishReason::Stop,
        };
        if self.ended < self.claim.job.choices {
            return None;
        }
        // Who leaves before the first token has got nothing and pays nothing.
        let nothing = self.reason == FinishReason::Cancelled && self.usage.completion_tokens == 0 && !self.has_told;
        let (reason, funds, usage, digest) = (self.reason, self.funds, self.usage, self.digest());
        Some(if nothing { Outcome::Withdrawn } else { Outcome::Finished { reason, funds, usage, digest } })
    }

    /// `None` where not every choice has told of its own.
    fn digest(&mut self) -> Option<[u8; 32]> {
        self.digests.sort_unstable_by_key(|(choice, _)| *choice);
        let is_whole = self.digests.iter().map(|(choice, _)| *choice).eq(0..self.claim.job.choices);
        let mut all = Sha256::new();
        self.digests.iter().for_each(|(_, digest)| all.update(digest));
        is_whole.then(|| all.finalize().into())
    }

    fn land(&mut self, outcome: Outcome) -> Landing {
        self.state = State::Landing;
        Landing { claim: Arc::clone(&self.claim), seq: self.seq_next, outcome }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cluster::testing::claim, domain::Job};

    fn delta(request: &str) -> EngineEvent {
        let body = EngineEventBody::Delta { text: "a".into(), tokens: 1, details: Vec::new() };
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
        let needs =
            |wanted| EngineEvent { request: "a".into(), choice: 0, body: EngineEventBody::NeedsTokens { wanted } };
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
}
