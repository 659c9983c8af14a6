//! What the actors and tasks of one pool share, and what must outlive the panic of any of them.
//!
//! Promises that a claim is taken in only while a worker can take it, and that when a worker is retired
//! nothing that it had in the air is forgotten: others go on with it.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;
use ractor::ActorRef;
use tokio::sync::watch;

use super::{
    PoolSpec,
    cashier::Cashier,
    flights::{Flights, Outcome, Resumption, Stranded},
    worker::{Start, WorkerMessage},
};
use crate::{
    directory::Mailbox,
    domain::{Claim, FailureCode, FundsEnd, ModelId, NodeId, RequestId, Told},
    engine::{EngineEvent, EngineHandle, EngineLoad},
    grammar::Grammars,
    journal::{Begun, Journal},
    queue::{GivenUp, Outlet, Room},
};

/// What a model's pool is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolStatus {
    Loading,
    Ready,
    /// Has work, and has made no step for so long that none is expected. It may yet go on; otherwise it is started anew.
    Stalled,
    /// Failed, and started again soon.
    Restarting(String),
    /// Failed too often; slow attempts go on.
    Unavailable(String),
}

impl PoolStatus {
    /// Whether new requests for the model make sense: who asks here now would have to wait at most.
    pub fn is_available(&self) -> bool {
        matches!(self, Self::Ready | Self::Restarting(_))
    }

    /// Why it does not run anything now; nothing where it does, however much it has to do.
    pub fn fault(&self) -> Option<&'static str> {
        match self {
            Self::Ready => None,
            Self::Loading => Some("is loading"),
            Self::Stalled => Some("makes no step"),
            Self::Restarting(_) => Some("is starting anew"),
            Self::Unavailable(_) => Some("is not available"),
        }
    }
}

pub struct Station {
    pub node: NodeId,
    pub model: ModelId,
    pub device: String,
    pub sequences_max: usize,
    /// See [`super::PoolSpec`].
    pub step_tokens: u32,
    pub grammars: Arc<Grammars>,
    pub flights: Arc<Flights>,
    pub cashier: Cashier,
    pub journal: Arc<Journal>,
    pub outlet: Outlet,
    pub status: watch::Sender<PoolStatus>,
    /// Of the worker.
    pub mailbox: Arc<Mailbox>,
    bench: Mutex<Option<Bench>>,
    trials: Mutex<Trials>,
}

/// What other workers were lost with: each is to decode a token before the next one is begun. If one of them takes this
/// worker down as well, it is known which.
#[derive(Default)]
struct Trials {
    waiting: VecDeque<Start>,
    now: Option<RequestId>,
    are_under_way: bool,
}

impl Trials {
    fn next(&mut self) -> Option<Start> {
        let next = self.waiting.pop_front();
        self.now = next.as_ref().map(|start| start.claim.job.request.clone());
        next
    }
}

/// The worker that is ready now.
struct Bench {
    generation: u64,
    engine: EngineHandle,
    worker: ActorRef<WorkerMessage>,
}

impl Station {
    pub fn new(node: NodeId, spec: &PoolSpec, cashier: Cashier, journal: Arc<Journal>, outlet: Outlet) -> Self {
        let status = watch::Sender::new(PoolStatus::Loading);
        let flights = Arc::default();
        Self {
            node,
            model: spec.model.clone(),
            device: spec.device.clone(),
            sequences_max: spec.sequences_max,
            step_tokens: spec.step_tokens,
            grammars: Arc::clone(&spec.grammars),
            flights,
            cashier,
            journal,
            outlet,
            status,
            mailbox: Mailbox::new(CLAIMS_PER_SEQUENCE * spec.sequences_max),
            bench: Mutex::default(),
            trials: Mutex::default(),
        }
    }

    pub fn open(&self, generation: u64, engine: EngineHandle, worker: ActorRef<WorkerMessage>) {
        *self.bench.lock() = Some(Bench { generation, engine, worker });
        self.status.send_replace(PoolStatus::Ready);
        self.flights.changed.notify_waiters();
    }

    /// How many claims the worker has room for. Landings that wait for the store take room as well, so that
    /// they stay bounded. What others have begun may wait in the engine, so as not to wait anywhere else.
    pub fn room(&self) -> Room {
        // What cannot be written down must not be run up.
        if self.bench.lock().is_none() || self.journal.fault().is_some() {
            return Room::default();
        }
        let (flying, all) = self.flights.count();
        let left = (CLAIMS_PER_SEQUENCE * self.sequences_max).saturating_sub(all);
        Room {
            to_take_over: (2 * self.sequences_max).saturating_sub(flying).min(left),
            to_begin: self.sequences_max.saturating_sub(flying).min(left),
        }
    }

    /// Takes claims in and hands them to the worker; gives them back where there is none.
    pub fn take_in(self: &Arc<Self>, claims: Vec<Claim>) -> Result<(), Vec<Claim>> {
        let bench = self.bench.lock();
        let Some(ready) = bench.as_ref() else { return Err(claims) };
        let claims = self.flights.new_ones(claims);
        for claim in &claims {
            if let Err(error) = self.journal.begin(&begun(claim)) {
                tracing::error!(%error, "the journal does not take requests");
                return Err(claims);
            }
        }
        let claims: Vec<_> = claims.into_iter().map(Arc::new).collect();
        // Under the bench's lock: a worker that is retired now will find these flights and give them up.
        let accepted = self.flights.take_in(&claims, ready.generation);
        self.outlet.send(accepted);
        let (fresh, begun): (Vec<_>, Vec<_>) = claims.into_iter().partition(|claim| claim.attempt == 1);
        drop(bench);
        self.submit(fresh.into_iter().map(Start::fresh).collect());
        for claim in begun {
            self.cashier.take_over(Arc::clone(self), claim);
        }
        Ok(())
    }

    /// A request is this attempt's alone from now on: its edge is asked what the client knows.
    pub fn ask_for_told(&self, claim: &Arc<Claim>) {
        self.outlet.send(self.flights.accept(claim).into_iter().collect());
    }

    /// Goes on with a request behind what its client knows.
    pub fn resume(self: &Arc<Self>, request: &RequestId, attempt: u32, told: Told) {
        let Some(Resumption { claim, told, allowed, landing }) = self.flights.resume(request, attempt, told) else {
            return;
        };
        if let Err(error) = self.journal.progress(&[(request.clone(), told.tokens())]) {
            tracing::error!(%error, "the journal does not take what was decoded");
        }
        tracing::info!(%request, attempt, tokens = told.tokens(), "going on with a request that lost its worker");
        if let Some(landing) = landing {
            return self.cashier.land(vec![landing], &self.flights);
        }
        let is_suspect = claim.losses > 0;
        let start = Start { claim, told, allowed };
        if !is_suspect {
            return self.submit(vec![start]);
        }
        let mut trials = self.trials.lock();
        trials.waiting.push_back(start);
        if !std::mem::replace(&mut trials.are_under_way, true) {
            let station = Arc::clone(self);
            self.cashier.background(async move { station.try_out().await });
        }
    }

    async fn try_out(self: &Arc<Self>) {
        while let Some(start) = self.next_trial().await {
            let request = start.claim.job.request.clone();
            let Some(tried) = self.flights.until_tried(&request, start.claim.attempt) else { continue };
            self.cashier.note_trial(self, Some(&request)).await;
            self.submit(vec![start]);
            let _ = tried.await;
        }
    }

    async fn next_trial(&self) -> Option<Start> {
        let next = self.trials.lock().next();
        if next.is_some() {
            return next;
        }
        self.cashier.note_trial(self, None).await;
        // Some may have come meanwhile.
        let mut trials = self.trials.lock();
        let next = trials.next();
        trials.are_under_way = next.is_some();
        next
    }

    /// Hands requests to the worker. One that has just died does not read it; its supervisor gives the flights up.
    fn submit(self: &Arc<Self>, starts: Vec<Start>) {
        if starts.is_empty() {
            return;
        }
        let bench = self.bench.lock();
        let Some(ready) = bench.as_ref() else { return };
        if !self.mailbox.enter() {
            drop(bench);
            // There are never more of them than were claimed, so that it is full of what its worker does not read.
            let claims: Vec<_> = starts.into_iter().map(|start| start.claim).collect();
            claims.iter().for_each(|claim| self.flights.lose(&claim.job.request));
            return self.give_up(claims, GivenUp::Unreached(Duration::ZERO));
        }
        let _ = ready.worker.cast(WorkerMessage::Submit(starts));
    }

    /// Leaves requests to others. Whoever loses them hears of it here alone.
    pub fn give_up(self: &Arc<Self>, claims: Vec<Arc<Claim>>, how: GivenUp) {
        if claims.is_empty() {
            return;
        }
        for claim in &claims {
            self.cancel_in_engine(&claim.job.request);
        }
        self.cashier.give_up(Arc::clone(self), claims, how);
    }

    /// One step of the engine. Never waits.
    pub fn advance(self: &Arc<Self>, events: Vec<EngineEvent>, generation: u64) {
        let advanced = self.flights.advance(events, generation);
        // Before anybody hears of them: what was delivered is always known to have been decoded.
        if !advanced.decoded.is_empty()
            && let Err(error) = self.journal.progress(&advanced.decoded)
        {
            tracing::error!(%error, "the journal does not take what was decoded");
        }
        if !advanced.events.is_empty() {
            self.outlet.send(advanced.events);
        }
        advanced.unwanted.iter().for_each(|request| self.cancel_in_engine(request));
        for (claim, wanted) in advanced.needs {
            let station = Arc::clone(self);
            let request = claim.job.request.clone();
            let allow = move |tokens, last| station.allow(&request, tokens, last);
            self.cashier.extend(claim, wanted, &self.flights, allow);
        }
        self.cashier.land(advanced.landings, &self.flights);
    }

    /// The client went away. `false`: the request is not here.
    pub fn cancel(&self, request: &RequestId) -> bool {
        let here = self.flights.cancel(request);
        if here {
            self.cancel_in_engine(request);
        }
        here
    }

    pub fn cancel_in_engine(&self, request: &RequestId) {
        if let Some(bench) = &*self.bench.lock() {
            bench.engine.cancel(request);
        }
    }

    /// So many tokens more of a request are paid for. See [`EngineHandle::allow`].
    pub fn allow(&self, request: &RequestId, tokens: u32, last: Option<FundsEnd>) {
        if let Some(bench) = &*self.bench.lock() {
            bench.engine.allow(request, tokens, last);
        }
    }

    /// The claim is another's: stop, and settle nothing.
    pub fn lose(&self, request: &RequestId) {
        self.flights.lose(request);
        if let Err(error) = self.journal.closed(request) {
            tracing::error!(%request, %error, "a request stays open in the journal");
        }
        self.cancel_in_engine(request);
    }

    /// The claim is another attempt's.
    pub fn superseded(&self, request: &RequestId, attempt: u32) {
        if self.flights.attempt(request) == Some(attempt) {
            tracing::warn!(%request, attempt, model = %self.model, "another worker has a request of ours; stopping it");
            self.lose(request);
        }
    }

    /// An edge is out of reach. What its clients have heard nothing of from here, others may be able to tell them. What
    /// they have stands still, until it is known whether somebody goes on with it.
    pub fn edge_lost(self: &Arc<Self>, edge: &NodeId) {
        let Stranded { unbegun, parked } = self.flights.strand(edge);
        parked.iter().for_each(|request| self.cancel_in_engine(request));
        self.give_up(unbegun, GivenUp::Unreached(SHUNNED));
    }

    /// What has waited for too long is decided: an edge that has not answered is out of reach, and one that was lost,
    /// and had nobody go on with its requests, is gone with its clients.
    pub fn look_after_waiting(self: &Arc<Self>) {
        self.give_up(self.flights.unanswered(UNANSWERED_MAX), GivenUp::Unreached(SHUNNED));
        self.cashier.land(self.flights.unpark(PARKED_MAX), &self.flights);
    }

    /// Leaves what flies and is chosen to other nodes.
    pub fn hand_over(self: &Arc<Self>, which: impl Fn(u64, &NodeId) -> bool) {
        self.give_up(self.flights.give_up(which), GivenUp::HandedOver);
    }

    /// Fails what flies and is chosen: free of charge, and stopped in the engine.
    pub fn fail(self: &Arc<Self>, which: impl Fn(u64, &NodeId) -> bool, code: FailureCode, message: &str) {
        let landings = self.flights.fail(which, code, message);
        for landing in &landings {
            self.cancel_in_engine(&landing.claim.job.request);
        }
        self.cashier.land(landings, &self.flights);
    }

    /// Ends a request before it reached the engine.
    pub fn end(self: &Arc<Self>, request: &RequestId, outcome: Outcome) {
        self.cashier.land(self.flights.land(request, outcome).into_iter().collect(), &self.flights);
    }

    /// The same for one whose client went away meanwhile.
    pub fn withdraw(self: &Arc<Self>, request: &RequestId) {
        self.cashier.land(self.flights.withdraw(request).into_iter().collect(), &self.flights);
    }

    /// A worker of this generation or an older one is gone, and its engine with it: others go on with all that it had,
    /// its successor among them.
    pub fn retire(self: &Arc<Self>, generation: u64) {
        let mut bench = self.bench.lock();
        if bench.as_ref().is_some_and(|bench| bench.generation <= generation)
            && let Some(bench) = bench.take()
        {
            bench.engine.shutdown();
        }
        drop(bench);
        // Of what is tried out, the end will not be seen any more.
        let trial = self.trials.lock().now.clone();
        let claims = self.flights.give_up(|of, _| of <= generation);
        if !claims.is_empty() {
            tracing::warn!(model = %self.model, requests = claims.len(), "a lost worker's requests are to be gone on with");
        }
        self.give_up(claims, GivenUp::Lost { trial });
    }

    /// What the engine has to do; `None` while there is none.
    pub fn load(&self) -> Option<EngineLoad> {
        self.bench.lock().as_ref().map(|bench| bench.engine.load())
    }

    /// The engine's count of steps; `None` while there is no engine.
    pub fn steps(&self) -> Option<(u64, u64)> {
        self.bench.lock().as_ref().map(|bench| (bench.generation, bench.engine.load().steps))
    }
}

fn begun(claim: &Claim) -> Begun {
    let Claim { job, owner, attempt, .. } = claim;
    Begun {
        request: job.request.clone(),
        tenant: job.tenant.clone(),
        key: job.key.clone(),
        model: job.model.clone(),
        price: job.price,
        price_version: job.price_version.clone(),
        prompt_tokens: u32::try_from(job.prompt.len()).unwrap_or(u32::MAX),
        attempt: *attempt,
        owner: owner.clone(),
    }
}

/// Claims beyond those that run are landings that wait for the store, and what others have begun.
const CLAIMS_PER_SEQUENCE: usize = 4;

/// What a client may hear of a worker's end; the log has the rest.
pub const WORKER_LOST: &str = "the worker that had the request failed; it was not charged";

/// An edge that has not said by then what a client knows cannot be reached.
const UNANSWERED_MAX: Duration = Duration::from_secs(2);
/// For so long, requests of an edge that could not be reached go to others, if there are any.
const SHUNNED: Duration = Duration::from_secs(2);
/// An edge that lives has had somebody else go on with its requests by then.
const PARKED_MAX: Duration = Duration::from_secs(5);
