//! What the handlers of one edge share, and the requests that it has open.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use crate::{
    admission::Admission,
    config,
    domain::{ModelId, Price, RequestId, TenantId},
    ledger::{Ledger, ReleaseReason},
    prompt::{PromptModel, PromptPool},
    queue::{Queue, ReplyHub},
    telemetry::Metrics,
};

/// What keeps the node from serving, in words; nothing when it is ready. Asked at every `/readyz`.
pub type Readiness = Arc<dyn Fn() -> BoxFuture<'static, Vec<String>> + Send + Sync>;

/// A model as clients see it.
#[derive(Clone, Debug)]
pub struct ServedModel {
    pub description: String,
    pub owned_by: String,
    pub created: u64,
    pub context_tokens_max: u32,
    pub output_tokens_max: u32,
    pub price: Price,
}

impl ServedModel {
    pub fn new(model: &config::Model, price: Price) -> Self {
        Self {
            description: model.description.clone(),
            owned_by: model.owned_by.clone(),
            created: model.created,
            context_tokens_max: u32::try_from(model.context_tokens_max).unwrap_or(u32::MAX),
            output_tokens_max: model.output_tokens_max,
            price,
        }
    }
}

/// Everything that an edge is made of.
pub struct EdgeSpec {
    pub settings: config::Edge,
    pub models: BTreeMap<ModelId, ServedModel>,
    /// Of the same models.
    pub prompts: BTreeMap<ModelId, PromptModel>,
    pub price_version: String,
    /// How long a request may wait for a worker.
    pub wait_max: Duration,
    pub admission: Admission,
    pub ledger: Ledger,
    pub queue: Queue,
    pub hub: ReplyHub,
    pub metrics: Arc<Metrics>,
    pub readiness: Readiness,
    /// For what must go on when a client's connection is gone.
    pub runtime: tokio::runtime::Handle,
}

pub(super) struct EdgeState {
    pub settings: config::Edge,
    pub models: BTreeMap<ModelId, ServedModel>,
    pub pool: PromptPool,
    /// Models whose template has no place for a message's name.
    nameless: BTreeSet<ModelId>,
    pub price_version: String,
    pub wait_max: Duration,
    pub admission: Admission,
    pub ledger: Ledger,
    pub queue: Queue,
    pub hub: ReplyHub,
    pub metrics: Arc<Metrics>,
    pub readiness: Readiness,
    pub runtime: tokio::runtime::Handle,
    /// Work that outlives its request: admissions under way, and giving up what nobody reads.
    pub tasks: TaskTracker,
    draining: AtomicBool,
    open: Mutex<HashMap<RequestId, TenantId>>,
    closed_one: Notify,
}

impl EdgeState {
    /// Must be called inside an actix system, where the prompt pool starts.
    pub(super) fn start(spec: EdgeSpec) -> Self {
        let EdgeSpec { settings, models, prompts, price_version, wait_max, .. } = spec;
        let nameless = prompts.iter().filter(|(_, prompt)| !prompt.template.knows_names());
        let nameless = nameless.map(|(model, _)| model.clone()).collect();
        let pool = PromptPool::start(Arc::new(prompts), settings.prompt_threads, settings.prompt_queue_max);
        Self {
            settings,
            models,
            pool,
            nameless,
            price_version,
            wait_max,
            admission: spec.admission,
            ledger: spec.ledger,
            queue: spec.queue,
            hub: spec.hub,
            metrics: spec.metrics,
            readiness: spec.readiness,
            runtime: spec.runtime,
            tasks: TaskTracker::new(),
            draining: AtomicBool::new(false),
            open: Mutex::default(),
            closed_one: Notify::new(),
        }
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether a message's name reaches the model.
    pub(super) fn knows_names(&self, model: &ModelId) -> bool {
        !self.nameless.contains(model)
    }

    /// From now on, new requests are refused.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// How long a request may go without a word of any worker: it waits in the queue, then its claim must
    /// have lapsed and been swept.
    pub(super) fn patience(&self) -> Duration {
        self.wait_max + 3 * self.ledger.hold_lease()
    }

    /// How long a claimed request may go without a token.
    pub(super) fn silence_max(&self) -> Duration {
        Duration::from_millis(self.settings.request_ms_max)
    }

    /// Releases a hold that there may be, in the background.
    pub(super) fn release_later(self: &Arc<Self>, tenant: TenantId, request: RequestId, why: ReleaseReason) {
        let state = Arc::clone(self);
        let releasing = async move { release(&state, &tenant, &request, why).await };
        self.tasks.spawn_on(releasing, &self.runtime);
    }

    pub(super) fn open_count(&self) -> usize {
        self.open.lock().len()
    }

    /// Waits until no request is open. Cancel-safe.
    pub(super) async fn all_closed(&self) {
        loop {
            let closed = self.closed_one.notified();
            if self.open.lock().is_empty() {
                return;
            }
            closed.await;
        }
    }

    /// Renews the holds of all open requests, for as long as somebody polls it.
    pub(super) async fn renew_holds(&self) {
        let mut ticks = tokio::time::interval((self.ledger.hold_lease() / 3).max(Duration::from_millis(10)));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let holds: Vec<_> = self.open.lock().iter().map(|(r, t)| (t.clone(), r.clone())).collect();
            if holds.is_empty() {
                continue;
            }
            if let Err(error) = self.ledger.renew_holds(&holds).await {
                tracing::warn!(%error, holds = holds.len(), "holds were not renewed");
            }
        }
    }
}

/// A request whose money is on hold, while this edge waits for its answer.
///
/// Dropped before [`OpenRequest::end`], it withdraws the request from the queue and gives the hold back; a
/// worker that has it already learns from the dropped stream, and settles.
pub(super) struct OpenRequest {
    state: Arc<EdgeState>,
    pub request: RequestId,
    pub tenant: TenantId,
    pub model: ModelId,
    pub arrived: Instant,
    ended: bool,
    counted: bool,
}

/// How a request ended, as metrics name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Stop,
    Length,
    Cancelled,
    Failed,
    Refused,
}

impl Outcome {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }
}

impl OpenRequest {
    pub(super) fn new(
        state: Arc<EdgeState>,
        request: RequestId,
        tenant: TenantId,
        model: ModelId,
        arrived: Instant,
    ) -> Self {
        state.open.lock().insert(request.clone(), tenant.clone());
        Self { state, request, tenant, model, arrived, ended: false, counted: false }
    }

    pub(super) fn state(&self) -> &Arc<EdgeState> {
        &self.state
    }

    /// The worker's side has said its last word: nothing is left to give up.
    pub(super) fn end(&mut self, outcome: Outcome) {
        self.ended = true;
        self.count(outcome);
    }

    /// The edge gives it up: what the worker's side still has of it is withdrawn when this is dropped.
    pub(super) fn give_up(&mut self, outcome: Outcome) {
        self.count(outcome);
    }

    fn count(&mut self, outcome: Outcome) {
        if !std::mem::replace(&mut self.counted, true) {
            self.state.metrics.requests.with_label_values(&[self.model.as_str(), outcome.as_str()]).inc();
        }
    }

    /// The queue did not take it, or may not have. Given back where it did, and a worker has even settled it.
    pub(super) async fn refuse(mut self, certain: bool) -> Option<Self> {
        if !certain && let Err(error) = self.state.queue.withdraw(&self.model, &self.tenant, &self.request).await {
            tracing::warn!(%error, request = %self.request, "a request that may be queued was not withdrawn");
        }
        let released = release(&self.state, &self.tenant, &self.request, ReleaseReason::NotQueued).await;
        if !certain && released == Some(false) {
            return Some(self);
        }
        self.ended = true;
        None
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.state.open.lock().remove(&self.request);
        self.state.closed_one.notify_waiters();
        if self.ended {
            return;
        }
        self.count(Outcome::Cancelled);
        let state = Arc::clone(&self.state);
        let (model, tenant, request) = (self.model.clone(), self.tenant.clone(), self.request.clone());
        self.state.tasks.spawn_on(
            async move {
                match state.queue.withdraw(&model, &tenant, &request).await {
                    Ok(true) => {
                        release(&state, &tenant, &request, ReleaseReason::Withdrawn).await;
                    }
                    Ok(false) => {} // claimed; the worker settles it
                    Err(error) => tracing::warn!(%error, %request, "an abandoned request was not withdrawn"),
                }
            },
            &self.state.runtime,
        );
    }
}

/// Whether there was a hold to release. Best effort: one that cannot be released now expires.
async fn release(state: &EdgeState, tenant: &TenantId, request: &RequestId, why: ReleaseReason) -> Option<bool> {
    let released = state.ledger.release(tenant, request, why).await;
    released.inspect_err(|error| tracing::warn!(%error, %request, "a hold was not released; it will expire")).ok()
}
