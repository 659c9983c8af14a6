//! What the actors and tasks of one pool share, and what must outlive the panic of any of them.
//!
//! Promises that a claim is taken in only while a worker can take it, and that when a worker is retired
//! nothing that it had in the air is forgotten.

use std::sync::Arc;

use parking_lot::Mutex;
use ractor::ActorRef;
use tokio::sync::watch;

use super::{
    PoolSpec,
    cashier::Cashier,
    flights::{Flights, Outcome},
    worker::WorkerMessage,
};
use crate::{
    domain::{Claim, FailureCode, FundsEnd, ModelId, NodeId, RequestId},
    engine::{EngineEvent, EngineHandle},
    grammar::Grammars,
    journal::{Begun, Journal},
    queue::Outlet,
};

/// What a model's pool is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolStatus {
    Loading,
    Ready,
    /// Failed, and started again soon.
    Restarting(String),
    /// Failed too often; slow attempts go on.
    Unavailable(String),
}

impl PoolStatus {
    /// Whether new requests for the model make sense.
    pub fn is_available(&self) -> bool {
        matches!(self, Self::Ready | Self::Restarting(_))
    }
}

pub struct Station {
    pub node: NodeId,
    pub model: ModelId,
    pub sequences_max: usize,
    /// See [`super::PoolSpec`].
    pub step_tokens: u32,
    pub grammars: Arc<Grammars>,
    pub flights: Arc<Flights>,
    pub cashier: Cashier,
    pub journal: Arc<Journal>,
    pub outlet: Outlet,
    pub status: watch::Sender<PoolStatus>,
    bench: Mutex<Option<Bench>>,
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
            sequences_max: spec.sequences_max,
            step_tokens: spec.step_tokens,
            grammars: Arc::clone(&spec.grammars),
            flights,
            cashier,
            journal,
            outlet,
            status,
            bench: Mutex::default(),
        }
    }

    pub fn open(&self, generation: u64, engine: EngineHandle, worker: ActorRef<WorkerMessage>) {
        *self.bench.lock() = Some(Bench { generation, engine, worker });
        self.status.send_replace(PoolStatus::Ready);
        self.flights.changed.notify_waiters();
    }

    /// How many claims the worker has room for. Landings that wait for the store take room as well, so that
    /// they stay bounded.
    pub fn room(&self) -> usize {
        // What cannot be written down must not be run up.
        if self.bench.lock().is_none() || self.journal.fault().is_some() {
            return 0;
        }
        let (flying, all) = self.flights.count();
        self.sequences_max.saturating_sub(flying).min((4 * self.sequences_max).saturating_sub(all))
    }

    /// Takes claims in and hands them to the worker; gives them back where there is none.
    pub fn take_in(&self, claims: Vec<Claim>) -> Result<(), Vec<Claim>> {
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
        // Under the bench's lock: a worker that is retired now will find these flights and fail them.
        let accepted = self.flights.take_in(&claims, ready.generation);
        self.outlet.send(accepted);
        // A worker that has just died does not read it; its supervisor fails the flights.
        let _ = ready.worker.cast(WorkerMessage::Submit(claims));
        Ok(())
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

    /// Its clients are gone with it: as if each had hung up.
    pub fn edge_lost(&self, edge: &NodeId) {
        for request in self.flights.of_edge(edge) {
            self.cancel(&request);
        }
    }

    /// Fails what flies and is chosen: free of charge, and stopped in the engine.
    pub fn fail(&self, which: impl Fn(u64, &NodeId) -> bool, code: FailureCode, message: &str) {
        let landings = self.flights.fail(which, code, message);
        for landing in &landings {
            self.cancel_in_engine(&landing.claim.job.request);
        }
        self.cashier.land(landings, &self.flights);
    }

    /// Ends a request before it reached the engine.
    pub fn end(&self, request: &RequestId, outcome: Outcome) {
        self.cashier.land(self.flights.land(request, outcome).into_iter().collect(), &self.flights);
    }

    /// A worker of this generation or an older one is gone: so are its engine and all that it had.
    pub fn retire(&self, generation: u64, why: &str) {
        let mut bench = self.bench.lock();
        if bench.as_ref().is_some_and(|bench| bench.generation <= generation)
            && let Some(bench) = bench.take()
        {
            bench.engine.shutdown();
        }
        drop(bench);
        let landings = self.flights.fail(|of, _| of <= generation, FailureCode::WorkerFailed, why);
        if !landings.is_empty() {
            tracing::warn!(model = %self.model, requests = landings.len(), why, "failed the requests of a lost worker");
        }
        self.cashier.land(landings, &self.flights);
    }

    /// The engine's count of steps; `None` while there is no engine.
    pub fn steps(&self) -> Option<(u64, u64)> {
        self.bench.lock().as_ref().map(|bench| (bench.generation, bench.engine.load().steps))
    }
}

fn begun(claim: &Claim) -> Begun {
    let Claim { job, owner, attempt } = claim;
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

/// What a client may hear of a worker's end; the log has the rest.
pub const WORKER_LOST: &str = "the worker that had the request failed; it was not charged";
