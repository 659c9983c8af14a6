//! Ends requests: money first, then the claim, then the last event.
//!
//! Promises that a finished request is settled before its client hears of the end, that a failed one is
//! free, and that both are tried again while the store is away, in tasks that a drain waits for. What waits
//! is bounded: a landing keeps its place in the table, and a full table claims nothing. Never settles a
//! request whose claim was lost.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    confirm::Confirmations,
    flights::{Allowed, Flights, Landing, Outcome},
    station::{Station, WORKER_LOST},
};
use crate::{
    domain::{Claim, EventBody, FailureCode, FinishReason, FundsEnd, Job, NanoUsd, RequestId, TokenEvent, Usage},
    journal::{Ended, Journal},
    ledger::{EndReason, Extended, Ledger, LedgerError, ReleaseReason, Settled, Settlement, TakenOver},
    queue::{GivenUp, Outgoing, Outlet, Queue},
    telemetry::{Metrics, unix_ms},
};

/// A store that was lost holds back what it had answered for about so long before.
const GAP_MARGIN: Duration = Duration::from_secs(3);
/// Longer, nobody waits for a note.
const NOTE_MAX: Duration = Duration::from_millis(500);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// A store that is away for longer has let every hold expire.
const TRY_MAX: Duration = Duration::from_secs(600);

/// Cheap to clone.
#[derive(Clone)]
pub struct Cashier {
    queue: Queue,
    ledger: Ledger,
    outlet: Outlet,
    /// Absent where nothing is run.
    journal: Option<Arc<Journal>>,
    confirmations: Option<Arc<Confirmations>>,
    metrics: Arc<Metrics>,
    /// Older than this, a lease is confirmed before money moves.
    lease_fresh: Duration,
    tasks: TaskTracker,
    give_up: CancellationToken,
}

impl Cashier {
    pub fn new(
        queue: Queue,
        ledger: Ledger,
        outlet: Outlet,
        journal: Option<Arc<Journal>>,
        metrics: Arc<Metrics>,
        claim_lease: Duration,
    ) -> Self {
        let (tasks, give_up) = (TaskTracker::new(), CancellationToken::new());
        let confirmations = journal
            .as_ref()
            .map(|journal| Arc::new(Confirmations::new(Arc::clone(journal), ledger.clone(), Arc::clone(&metrics))));
        let lease_fresh = claim_lease * 2 / 3;
        Self { queue, ledger, outlet, journal, confirmations, metrics, lease_fresh, tasks, give_up }
    }

    /// What the store may still lose of what it has settled.
    pub fn confirmations(&self) -> Option<Arc<Confirmations>> {
        self.confirmations.clone()
    }

    /// Has the hold of a request grow, and lets the engine know in the background: by `allow`, of how many tokens more
    /// are paid for, and why there will be no others.
    pub fn extend(
        &self,
        claim: Arc<Claim>,
        wanted: u32,
        flights: &Arc<Flights>,
        allow: impl FnOnce(u32, Option<FundsEnd>) + Send + 'static,
    ) {
        let (this, flights) = (self.clone(), Arc::clone(flights));
        self.tasks.spawn(async move {
            let extending = this.extended(&claim, wanted, &flights);
            if let Some(Some(Extended { tokens, limited_by })) = this.give_up.run_until_cancelled(extending).await {
                allow(tokens, limited_by);
            }
        });
    }

    /// Nothing where the request has ended meanwhile.
    async fn extended(&self, claim: &Claim, wanted: u32, flights: &Flights) -> Option<Extended> {
        let job = &claim.job;
        let mut tries = Tries::new();
        while flights.is_cancelled(&job.request) == Some(false) {
            let known = flights.hold(&job.request)?;
            match self.ledger.extend(&job.tenant, &job.request, wanted, known).await {
                Ok(extended) => {
                    flights.hold_more(&job.request, extended.tokens);
                    return Some(extended);
                }
                Err(LedgerError::Store(error)) if error.is_transient() => {
                    if !tries.again(&error).await {
                        break;
                    }
                }
                Err(error) => {
                    tracing::error!(request = %job.request, %error, "a hold cannot be extended");
                    break;
                }
            }
        }
        // Without money there are no more tokens, whatever the reason.
        flights.holds(&job.request).then_some(Extended { tokens: 0, limited_by: Some(FundsEnd::Balance) })
    }

    /// Runs what the end of requests does not wait for, but a drain does.
    pub fn background(&self, work: impl Future<Output = ()> + Send + 'static) {
        let give_up = self.give_up.clone();
        self.tasks.spawn(async move {
            let _ = give_up.run_until_cancelled(work).await;
        });
    }

    /// Notes in the queue what is tried out, if that can be done at once.
    pub async fn note_trial(&self, station: &Station, request: Option<&RequestId>) {
        match timeout(NOTE_MAX, self.queue.try_out(&station.model, &station.node, request)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(model = %station.model, %error, "cannot note what is tried out"),
            Err(_) => tracing::warn!(model = %station.model, "cannot note in time what is tried out"),
        }
    }

    /// Makes this node the only one that may settle a request which others had begun, then asks its edge where to go on.
    pub fn take_over(&self, station: Arc<Station>, claim: Arc<Claim>) {
        let this = self.clone();
        self.metrics.takeovers.with_label_values(&[claim.job.model.as_str()]).inc();
        self.tasks.spawn(async move {
            let taking = this.taken_over(&station, &claim);
            let _ = this.give_up.run_until_cancelled(taking).await;
        });
    }

    async fn taken_over(&self, station: &Arc<Station>, claim: &Arc<Claim>) {
        let (job, flights) = (&claim.job, &station.flights);
        let mut tries = Tries::new();
        while flights.attempt(&job.request) == Some(claim.attempt) {
            let allowed = match self.ledger.take_over(&job.tenant, &job.request, claim.attempt).await {
                Ok(TakenOver::Held(hold)) => Allowed { tokens: tokens_of(job, hold), is_all: false },
                // Decoded once more, for a client that has not heard of all that is paid for.
                Ok(TakenOver::Settled { completion_tokens }) => Allowed { tokens: completion_tokens, is_all: true },
                Ok(TakenOver::Unheld) => {
                    tracing::warn!(request = %job.request, "the store had lost a hold; the balance will be charged");
                    Allowed { tokens: job.output_tokens_max.saturating_mul(job.choices), is_all: true }
                }
                Ok(TakenOver::Ended) => {
                    let (code, message) = (FailureCode::WorkerFailed, WORKER_LOST.to_owned());
                    return station.end(&job.request, Outcome::Failed { code, message });
                }
                Err(LedgerError::Superseded(_)) => return station.lose(&job.request),
                Err(LedgerError::Store(error)) if error.is_transient() => {
                    if tries.again(&error).await {
                        continue;
                    }
                    return station.lose(&job.request);
                }
                Err(error) => {
                    tracing::error!(request = %job.request, %error, "a request cannot be taken over");
                    let (code, message) = (FailureCode::WorkerFailed, WORKER_LOST.to_owned());
                    return station.end(&job.request, Outcome::Failed { code, message });
                }
            };
            if flights.allow(&job.request, allowed) {
                station.ask_for_told(claim);
            }
            return;
        }
    }

    /// Leaves requests to others, then forgets them here.
    pub fn give_up(&self, station: Arc<Station>, claims: Vec<Arc<Claim>>, how: GivenUp) {
        let this = self.clone();
        self.tasks.spawn(async move {
            let names: Vec<_> = claims.iter().map(|claim| (claim.job.request.clone(), claim.attempt)).collect();
            let mut tries = Tries::new();
            let giving = async {
                while let Err(error) = this.queue.give_up(&station.model, &station.node, &how, &names).await {
                    if !error.is_transient() || !tries.again(&error).await {
                        tracing::warn!(model = %station.model, %error, "cannot give claims up; they will run out");
                        break;
                    }
                }
            };
            let _ = this.give_up.run_until_cancelled(giving).await;
            // What a node that goes away has begun is looked at by the next process on this machine.
            if how != GivenUp::HandedOver {
                claims.iter().for_each(|claim| this.close_in_journal(claim));
            }
        });
    }

    /// Ends requests in the background.
    pub fn land(&self, landings: Vec<Landing>, flights: &Arc<Flights>) {
        for landing in landings {
            let (this, flights) = (self.clone(), Arc::clone(flights));
            self.tasks.spawn(async move {
                let place = Place { request: landing.claim.job.request.clone(), flights };
                let done = this.end(landing, &place.flights);
                if this.give_up.run_until_cancelled(done).await.is_none() {
                    let request = &place.request;
                    tracing::error!(%request, "gave up ending a request; its hold will expire by itself");
                }
            });
        }
    }

    /// Ends a request whose worker or deadline is gone, found by the sweeper.
    pub fn bury(&self, claim: Claim) {
        let (this, losses_max) = (self.clone(), self.queue.losses_max());
        self.tasks.spawn(async move {
            let claim = Arc::new(claim);
            let (code, message, why) = match claim.attempt {
                0 => (
                    FailureCode::DeadlineExceeded,
                    "no worker could take the request in time",
                    ReleaseReason::DeadlineExceeded,
                ),
                _ if claim.losses >= losses_max => (
                    FailureCode::AttemptsExhausted,
                    "every worker that had the request was lost",
                    ReleaseReason::AttemptsExhausted,
                ),
                _ => (FailureCode::WorkerLost, "the worker that had the request is gone", ReleaseReason::WorkerLost),
            };
            tracing::warn!(request = %claim.job.request, model = %claim.job.model, attempt = claim.attempt, message);
            // Whatever its stream has seen so far, a failure ends it.
            this.send(&claim, u32::MAX, EventBody::Failed { code, message: message.to_owned() });
            let _ = this.give_up.run_until_cancelled(this.release(&claim, why)).await;
        });
    }

    /// Waits for everything that is being ended; gives up on what is not done by then.
    pub async fn close(&self, limit: Duration) {
        self.tasks.close();
        if timeout(limit, self.tasks.wait()).await.is_err() {
            self.give_up.cancel();
            self.tasks.wait().await;
        }
    }

    async fn end(&self, landing: Landing, flights: &Flights) {
        let Landing { claim, seq, outcome } = landing;
        match outcome {
            Outcome::Finished { reason, funds, usage, digest } => {
                let settlement = settlement(&claim, EndReason::of(reason, funds), usage, digest);
                let Some(last) = self.settle(&claim, reason, &settlement, flights).await else { return };
                // Until its edge has the end, the request is there to be taken over: what was charged is delivered.
                let heard = flights.until_heard(&claim.job.request);
                self.send(&claim, seq, last);
                if let Some(heard) = heard {
                    let _ = heard.await;
                }
                // One that was lost meanwhile is another's to acknowledge.
                if flights.holds(&claim.job.request) {
                    self.acknowledge(&claim, usage.completion_tokens).await;
                }
            }
            Outcome::Withdrawn => {
                self.release(&claim, ReleaseReason::Withdrawn).await;
                self.close_in_journal(&claim);
                self.acknowledge(&claim, 0).await;
                // For a client that cancelled and waits to hear of it; others are gone.
                let (reason, usage) = (FinishReason::Cancelled, Usage::default());
                self.send(&claim, seq, EventBody::Finished { reason, usage });
            }
            Outcome::Failed { code, message } => {
                // Nobody has to wait for a release to hear of a failure.
                self.send(&claim, seq, EventBody::Failed { code, message });
                let why = match code {
                    FailureCode::Draining => ReleaseReason::Draining,
                    FailureCode::DeadlineExceeded => ReleaseReason::DeadlineExceeded,
                    FailureCode::AttemptsExhausted => ReleaseReason::AttemptsExhausted,
                    FailureCode::WorkerFailed | FailureCode::WorkerLost | FailureCode::SlowConsumer => {
                        ReleaseReason::WorkerFailed
                    }
                };
                // Free, whatever becomes of this process from here on.
                self.close_in_journal(&claim);
                self.release(&claim, why).await;
                self.acknowledge(&claim, 0).await;
            }
        }
    }

    /// The last event to send; `None` when the request is no longer ours.
    async fn settle(
        &self,
        claim: &Claim,
        reason: FinishReason,
        settlement: &Settlement,
        flights: &Flights,
    ) -> Option<EventBody> {
        let (job, usage) = (&claim.job, settlement.usage);
        // First on our own disk: if the store is away for longer than this process lives, the next one settles it.
        if let Some(journal) = &self.journal
            && let Err(error) = journal.ended(&ended(settlement)).await
        {
            tracing::error!(request = %job.request, %error, "a settlement is not in the journal");
        }
        let free =
            |message: &str| Some(EventBody::Failed { code: FailureCode::WorkerFailed, message: message.to_owned() });
        let mut tries = Tries::new();
        loop {
            if !self.still_ours(claim, flights).await {
                tracing::warn!(request = %job.request, "lost the claim before it was settled");
                return None;
            }
            match self.post(settlement, flights).await {
                Ok(settled) => {
                    if let Some(confirmations) = &self.confirmations {
                        confirmations.add(settlement.clone());
                    }
                    if settled.late {
                        self.metrics.late_settlements.inc();
                    }
                    if !settled.repeated {
                        let model = [job.model.as_str()];
                        self.metrics.prompt_tokens.with_label_values(&model).inc_by(usage.prompt_tokens.into());
                        self.metrics.completion_tokens.with_label_values(&model).inc_by(usage.completion_tokens.into());
                        let nano = u64::try_from(settled.amount.nano()).unwrap_or_default();
                        self.metrics.spend_nano_usd.with_label_values(&model).inc_by(nano);
                    }
                    return Some(EventBody::Finished { reason, usage });
                }
                Err(LedgerError::HoldGone(_) | LedgerError::Unknown(_)) => {
                    tracing::warn!(request = %job.request, "the hold was gone before it was settled; free of charge");
                    self.close_in_journal(claim);
                    return free("the request could not be settled and was not charged");
                }
                Err(LedgerError::Superseded(_)) => {
                    tracing::warn!(request = %job.request, "another worker has a request of ours; it is not settled here");
                    flights.lose(&job.request);
                    self.close_in_journal(claim);
                    return None;
                }
                Err(LedgerError::Store(error)) if error.is_transient() => {
                    if !tries.again(&error).await {
                        return free("the store was away for too long");
                    }
                }
                Err(error) => {
                    // Needs a person; the customer is not charged for it.
                    tracing::error!(request = %job.request, %error, ?usage, "cannot settle");
                    self.close_in_journal(claim);
                    self.release(claim, ReleaseReason::WorkerFailed).await;
                    return free("the request could not be settled and was not charged");
                }
            }
        }
    }

    /// A store that died since the request was begun may have lost its hold, or what that had grown by.
    async fn post(&self, settlement: &Settlement, flights: &Flights) -> Result<Settled, LedgerError> {
        let posted = self.ledger.settle(settlement).await;
        let had_gap = || {
            let age = flights.age(&settlement.request).unwrap_or_default();
            self.ledger.store_connected_for() < age + GAP_MARGIN
        };
        match posted {
            Err(LedgerError::Unknown(_) | LedgerError::ExceedsHold { .. }) if had_gap() => {
                tracing::warn!(request = %settlement.request, "the store had lost a hold; the balance is charged");
                self.ledger.settle_begun(settlement).await
            }
            posted => posted,
        }
    }

    /// A node that was stopped for a while may have lost the claim without having heard of it.
    async fn still_ours(&self, claim: &Claim, flights: &Flights) -> bool {
        let request = &claim.job.request;
        match flights.lease_age(request) {
            None => return false,
            Some(age) if age < self.lease_fresh => return true,
            Some(_) => {}
        }
        let renewal = [(request.clone(), claim.attempt)];
        match self.queue.renew(&claim.job.model, &claim.owner, &renewal).await {
            // What the store has lost is still this node's, as long as nobody has taken it over: the ledger knows.
            Ok(renewed) if renewed.lost.is_empty() => true,
            Ok(_) => {
                flights.lose(request);
                false
            }
            // The store is away; the settlement will fail as well and come back here.
            Err(_) => flights.holds(request),
        }
    }

    async fn release(&self, claim: &Claim, why: ReleaseReason) {
        let mut tries = Tries::new();
        loop {
            match self.ledger.release(&claim.job.tenant, &claim.job.request, why).await {
                Ok(_) => return,
                Err(LedgerError::Store(error)) if error.is_transient() => {
                    if !tries.again(&error).await {
                        return;
                    }
                }
                Err(error) => {
                    tracing::error!(request = %claim.job.request, %error, "cannot release a hold; it will expire");
                    return;
                }
            }
        }
    }

    async fn acknowledge(&self, claim: &Claim, completion_tokens: u32) {
        let job = &claim.job;
        let mut tries = Tries::new();
        loop {
            let done = self.queue.acknowledge(&job.model, &claim.owner, &job.request, claim.attempt, completion_tokens);
            match done.await {
                Ok(true) => return,
                Ok(false) => {
                    tracing::info!(request = %job.request, "the claim had been taken back before it was acknowledged");
                    return;
                }
                Err(error) if error.is_transient() => {
                    if !tries.again(&error).await {
                        return;
                    }
                }
                Err(error) => {
                    tracing::error!(request = %job.request, %error, "cannot acknowledge a claim; it will expire");
                    return;
                }
            }
        }
    }

    fn close_in_journal(&self, claim: &Claim) {
        if let Some(journal) = &self.journal
            && let Err(error) = journal.closed(&claim.job.request)
        {
            tracing::error!(request = %claim.job.request, %error, "a request stays open in the journal");
        }
    }

    fn send(&self, claim: &Arc<Claim>, seq: u32, body: EventBody) {
        let event = TokenEvent { request: claim.job.request.clone(), attempt: claim.attempt, seq, body };
        self.outlet.send(vec![Outgoing { claim: Arc::clone(claim), event }]);
    }
}

/// Output tokens that a hold pays for.
fn tokens_of(job: &Job, hold: NanoUsd) -> u32 {
    let most = job.output_tokens_max.saturating_mul(job.choices);
    let of_prompt = job.price.input.nano().saturating_mul(job.prompt.len() as i64);
    match job.price.output.nano() {
        0 => most,
        price => u32::try_from(hold.nano().saturating_sub(of_prompt) / price).unwrap_or(0).min(most),
    }
}

fn settlement(claim: &Claim, reason: EndReason, usage: Usage, digest: Option<[u8; 32]>) -> Settlement {
    let job = &claim.job;
    Settlement {
        request: job.request.clone(),
        tenant: job.tenant.clone(),
        key: job.key.clone(),
        model: job.model.clone(),
        usage,
        price: job.price,
        price_version: job.price_version.clone(),
        reason,
        digest,
        attempt: claim.attempt,
    }
}

fn ended(settlement: &Settlement) -> Ended {
    Ended {
        request: settlement.request.clone(),
        usage: settlement.usage,
        reason: settlement.reason.as_str().to_owned(),
        digest: settlement.digest,
        unix_ms: unix_ms(),
    }
}

/// Leaves the table however the landing goes.
struct Place {
    request: RequestId,
    flights: Arc<Flights>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.flights.left(&self.request);
    }
}

/// Pauses that double, for as long as trying again makes sense.
struct Tries {
    begun: Instant,
    pause: Duration,
}

impl Tries {
    fn new() -> Self {
        Self { begun: Instant::now(), pause: PAUSE_MIN }
    }

    async fn again(&mut self, error: &crate::store::StoreError) -> bool {
        if self.begun.elapsed() > TRY_MAX {
            tracing::error!(%error, "the store was away for too long");
            return false;
        }
        tracing::debug!(%error, pause = ?self.pause, "the store is away; trying again");
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        true
    }
}
