//! The requests that this node has claimed for one model and not yet ended.
//!
//! Promises that each ends once: whoever moves it to its landing, or out of the table for others to go on with, is the
//! only one, be it the engine's last event, the worker's death, a lost edge or the drain. Lives outside the actors, so
//! that it outlives their panics. Never does I/O.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, oneshot};

use crate::{
    domain::{
        Claim, EventBody, FailureCode, FinishReason, FundsEnd, NanoUsd, NodeId, RequestId, StoppedBy, TenantId,
        TokenEvent, Told, Usage,
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
    /// What its client knew when it was taken over.
    told: Told,
    allowed: Allowed,
    /// Since when its edge has been out of reach. Until it is known whether somebody takes it over, nothing is settled.
    parked: Option<Instant>,
    /// How it would have ended meanwhile.
    withheld: Option<Outcome>,
    /// Told when its edge has its last event.
    heard: Option<oneshot::Sender<()>>,
    /// Told when the engine has made its first step with it.
    tried: Option<oneshot::Sender<()>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Taken over: its edge has yet to say what the client knows.
    Waiting,
    Flying,
    /// Being settled or released.
    Landing,
}

/// What the table knows of a lost edge's requests.
#[derive(Default)]
pub struct Stranded {
    /// Of these the client has heard nothing from here: somebody else may reach the edge.
    pub unbegun: Vec<Arc<Claim>>,
    /// These stand still until it is known whether somebody else goes on with them.
    pub parked: Vec<RequestId>,
}

/// How much of a request may be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// By all choices together.
    pub tokens: u32,
    /// And no more will be.
    pub is_all: bool,
}

/// A request that is to be gone on with.
pub struct Resumption {
    pub claim: Arc<Claim>,
    pub told: Told,
    /// What may be decoded beside that.
    pub allowed: Allowed,
    /// Where nothing is left to be decoded.
    pub landing: Option<Landing>,
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

    /// Takes claims in and answers with the first events of those that nobody has begun before.
    pub fn take_in(&self, claims: &[Arc<Claim>], generation: u64) -> Vec<Outgoing> {
        let mut table = self.table.lock();
        for claim in claims {
            table.insert(claim.job.request.clone(), Flight::new(Arc::clone(claim), generation));
        }
        claims.iter().filter(|claim| claim.attempt == 1).map(accepted).collect()
    }

    /// The first event of one that is taken over, if it is still here.
    pub fn accept(&self, claim: &Arc<Claim>) -> Option<Outgoing> {
        let table = self.table.lock();
        let is_here = table.get(&claim.job.request).is_some_and(|flight| flight.waits(claim.attempt));
        is_here.then(|| accepted(claim))
    }

    /// One that is taken over may decode so much in all, and so much is set aside for it. `false`: it is not here.
    pub fn allow(&self, request: &RequestId, allowed: Allowed) -> bool {
        let mut table = self.table.lock();
        table.get_mut(request).map(|flight| flight.allowed = allowed).is_some()
    }

    /// Its edge has said what the client knows.
    pub fn resume(&self, request: &RequestId, attempt: u32, told: Told) -> Option<Resumption> {
        let mut table = self.table.lock();
        let flight = table.get_mut(request).filter(|flight| flight.waits(attempt))?;
        flight.state = State::Flying;
        let outcome = flight.take_up(told);
        let landing = outcome.map(|outcome| flight.land(outcome));
        let left = flight.allowed.tokens.saturating_sub(flight.told.tokens());
        let allowed = Allowed { tokens: left, ..flight.allowed };
        Some(Resumption { claim: Arc::clone(&flight.claim), told: flight.told.clone(), allowed, landing })
    }

    /// Lands a request whose client went away before this node began with it: what others had decoded is paid for.
    pub fn withdraw(&self, request: &RequestId) -> Option<Landing> {
        let mut table = self.table.lock();
        let flight = table.get_mut(request).filter(|flight| flight.state == State::Flying)?;
        let outcome = flight.withdrawn();
        let landing = flight.land(outcome);
        drop(table);
        self.changed.notify_waiters();
        Some(landing)
    }

    /// Takes out those that wait for their edges, for as long as `patience` already.
    pub fn unanswered(&self, patience: Duration) -> Vec<Arc<Claim>> {
        let mut table = self.table.lock();
        let waits = |flight: &Flight| flight.state == State::Waiting && flight.begun.elapsed() > patience;
        let taken = table.extract_if(|_, flight| waits(flight)).map(|(_, flight)| flight.claim).collect();
        drop(table);
        self.changed.notify_waiters();
        taken
    }

    /// An edge is out of reach.
    pub fn strand(&self, edge: &NodeId) -> Stranded {
        let mut stranded = Stranded::default();
        let mut table = self.table.lock();
        for (_, flight) in table.extract_if(|_, flight| flight.goes_to(edge) && flight.is_unbegun()) {
            stranded.unbegun.push(flight.claim);
        }
        for (request, flight) in table.iter_mut().filter(|(_, flight)| flight.goes_to(edge)) {
            flight.parked.get_or_insert_with(Instant::now);
            stranded.parked.push(request.clone());
        }
        drop(table);
        self.changed.notify_waiters();
        stranded
    }

    /// Lands what has been parked for so long: nobody has taken it over, so its edge is gone, and its client with it.
    pub fn unpark(&self, patience: Duration) -> Vec<Landing> {
        let mut table = self.table.lock();
        let mut landings = Vec::new();
        for flight in table.values_mut() {
            if flight.parked.is_none_or(|since| since.elapsed() <= patience) {
                continue;
            }
            if let Some(heard) = flight.heard.take() {
                let _ = heard.send(());
            }
            if let Some(outcome) = flight.withheld.take() {
                flight.parked = None;
                landings.push(flight.land(outcome));
            }
        }
        drop(table);
        self.changed.notify_waiters();
        landings
    }

    /// What becomes true once the edge of a request that lands has its last event, or is gone.
    pub fn until_heard(&self, request: &RequestId) -> Option<oneshot::Receiver<()>> {
        let mut table = self.table.lock();
        let flight = table.get_mut(request)?;
        let (sender, receiver) = oneshot::channel();
        flight.heard = Some(sender);
        Some(receiver)
    }

    /// What becomes true once the engine has made a step with the request, or has it no more.
    pub fn until_tried(&self, request: &RequestId, attempt: u32) -> Option<oneshot::Receiver<()>> {
        let mut table = self.table.lock();
        let flight = table.get_mut(request).filter(|flight| flight.claim.attempt == attempt)?;
        let (sender, receiver) = oneshot::channel();
        flight.tried = Some(sender);
        Some(receiver)
    }

    /// Its edge has its last event.
    pub fn heard(&self, request: &RequestId) {
        if let Some(heard) = self.table.lock().get_mut(request).and_then(|flight| flight.heard.take()) {
            let _ = heard.send(());
        }
    }

    /// Takes out what flies and is chosen, for others to go on with.
    pub fn give_up(&self, which: impl Fn(u64, &NodeId) -> bool) -> Vec<Arc<Claim>> {
        let mut table = self.table.lock();
        let chosen = table.extract_if(|_, flight| {
            flight.state != State::Landing && which(flight.generation, &flight.claim.job.reply_to.node)
        });
        let claims = chosen.map(|(_, flight)| flight.claim).collect();
        drop(table);
        self.changed.notify_waiters();
        claims
    }

    /// Turns one step of the engine into events and landings. Events of requests that are not (any more) of
    /// this generation's come to nothing.
    pub fn advance(&self, events: Vec<EngineEvent>, generation: u64) -> Advanced {
        let mut advanced = Advanced::default();
        let mut table = self.table.lock();
        for EngineEvent { request, choice, body } in events {
            let flying = |flight: &&mut Flight| flight.generation == generation && flight.state == State::Flying;
            let Some(flight) = table.get_mut(&request).filter(flying) else { continue };
            if let Some(tried) = flight.tried.take() {
                let _ = tried.send(());
            }
            let body = match body {
                EngineEventBody::Prompt { tokens } => {
                    flight.has_told = true;
                    EventBody::Prompt { tokens }
                }
                EngineEventBody::Delta { text, ids, details } => {
                    flight.decoded += ids.len() as u32;
                    advanced.decoded.push((request, flight.decoded));
                    EventBody::Delta { choice, text, ids, details }
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
                        match flight.parked {
                            None => advanced.landings.push(flight.land(outcome)),
                            Some(_) => flight.withheld = Some(outcome),
                        }
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

    /// Lands one flight, if it has not landed.
    pub fn land(&self, request: &RequestId, outcome: Outcome) -> Option<Landing> {
        let mut table = self.table.lock();
        let flight = table.get_mut(request).filter(|flight| flight.state != State::Landing)?;
        let landing = flight.land(outcome);
        drop(table);
        self.changed.notify_waiters();
        Some(landing)
    }

    /// Fails everything that is in the air and that `which` chooses by generation and edge.
    pub fn fail(&self, which: impl Fn(u64, &NodeId) -> bool, code: FailureCode, message: &str) -> Vec<Landing> {
        let mut table = self.table.lock();
        let chosen = table.values_mut().filter(|flight| {
            flight.state != State::Landing && which(flight.generation, &flight.claim.job.reply_to.node)
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

    pub fn claim(&self, request: &RequestId) -> Option<Arc<Claim>> {
        self.table.lock().get(request).map(|flight| Arc::clone(&flight.claim))
    }

    /// Under which attempt it is here.
    pub fn attempt(&self, request: &RequestId) -> Option<u32> {
        self.table.lock().get(request).map(|flight| flight.claim.attempt)
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

    /// How many the engine has to work on.
    pub fn working(&self) -> usize {
        let works = |flight: &&Flight| flight.state == State::Flying && flight.parked.is_none();
        self.table.lock().values().filter(works).count()
    }

    /// (in the air, all)
    pub fn count(&self) -> (usize, usize) {
        let table = self.table.lock();
        (table.values().filter(|flight| flight.state != State::Landing).count(), table.len())
    }
}

impl Flight {
    fn new(claim: Arc<Claim>, generation: u64) -> Self {
        Self {
            hold: claim.job.hold,
            generation,
            seq_next: 1,
            cancelled: false,
            has_told: false,
            begun: Instant::now(),
            renewed: Instant::now(),
            state: if claim.attempt == 1 { State::Flying } else { State::Waiting },
            claim,
            ended: 0,
            usage: Usage::default(),
            reason: FinishReason::Stop,
            funds: None,
            decoded: 0,
            digests: Vec::new(),
            told: Told::default(),
            allowed: Allowed::default(),
            parked: None,
            withheld: None,
            heard: None,
            tried: None,
        }
    }

    fn waits(&self, attempt: u32) -> bool {
        self.state == State::Waiting && self.claim.attempt == attempt
    }

    fn goes_to(&self, edge: &NodeId) -> bool {
        self.claim.job.reply_to.node == *edge
    }

    /// Whether its client has heard nothing from here.
    fn is_unbegun(&self) -> bool {
        let has_told = self.decoded > self.told.tokens() || self.has_told && self.told.prompt_tokens == 0;
        self.state == State::Waiting || self.state == State::Flying && !has_told && self.ended == 0
    }

    /// Counts what others have decoded. How the request ends, where nothing is left.
    fn take_up(&mut self, told: Told) -> Option<Outcome> {
        self.has_told = told.prompt_tokens > 0;
        self.decoded = told.tokens();
        let mut outcome = None;
        for (choice, known) in (0..).zip(&told.choices) {
            if let Some((reason, stopped_by)) = &known.ended {
                self.digests.push((choice, digest(&known.ids)));
                if let Some(StoppedBy::Funds(funds)) = stopped_by {
                    self.funds = Some(*funds);
                }
                let usage = self.usage_of(known.ids.len() as u32);
                outcome = outcome.or(self.choice_ended(choice, *reason, &usage));
            }
        }
        self.told = told;
        outcome
    }

    fn usage_of(&self, completion_tokens: u32) -> Usage {
        Usage { prompt_tokens: self.claim.job.prompt.len() as u32, completion_tokens, cached_tokens: 0 }
    }

    /// As if it had been cancelled where it was taken over.
    fn withdrawn(&mut self) -> Outcome {
        if self.decoded == 0 && !self.has_told {
            return Outcome::Withdrawn;
        }
        let (reason, usage) = (FinishReason::Cancelled, self.usage_of(self.decoded));
        self.digests.clear();
        for choice in 0..self.claim.job.choices {
            let ids = self.told.choices.get(choice as usize).map_or(&[][..], |known| &known.ids);
            self.digests.push((choice, digest(ids)));
        }
        Outcome::Finished { reason, funds: None, usage, digest: self.digest() }
    }

    /// The next event of its stream.
    fn event(&mut self, body: EventBody) -> Outgoing {
        let (request, attempt) = (self.claim.job.request.clone(), self.claim.attempt);
        let event = TokenEvent { request, attempt, seq: self.seq_next, body };
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

fn accepted(claim: &Arc<Claim>) -> Outgoing {
    let (request, attempt) = (claim.job.request.clone(), claim.attempt);
    let event = TokenEvent { request, attempt, seq: 0, body: EventBody::Accepted };
    Outgoing { claim: Arc::clone(claim), event }
}

/// As the engine has it of a choice's tokens.
fn digest(ids: &[u32]) -> [u8; 32] {
    let mut digest = Sha256::new();
    ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
    digest.finalize().into()
}

#[cfg(test)]
mod tests;
