//! What the handlers of one edge share, and the requests that it has open.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio_util::task::TaskTracker;

use super::{account::statements, recording::Recordings};
use crate::{
    admission::{Admission, Guard},
    config,
    directory::Directory,
    domain::{ModelId, RequestId, TenantId},
    ledger::{Ledger, Prices, Receipts, ReleaseReason},
    model::Vocabulary,
    operator::Accounts,
    prompt::{PromptModel, PromptPool},
    queue::{Queue, ReplyHub},
    records::Records,
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
}

impl ServedModel {
    pub fn new(model: &config::Model) -> Self {
        Self {
            description: model.description.clone(),
            owned_by: model.owned_by.clone(),
            created: model.created,
            context_tokens_max: u32::try_from(model.context_tokens_max).unwrap_or(u32::MAX),
            output_tokens_max: model.output_tokens_max,
        }
    }
}

/// One of the open requests.
struct Open {
    tenant: TenantId,
    model: ModelId,
    /// The client's own name for it.
    own_id: Option<String>,
    /// By its client, who waits for the end.
    is_cancelled: bool,
}

/// What the edge knows of a model's file.
pub(super) struct Known {
    pub vocabulary: Arc<Vocabulary>,
    /// Whether a message's name reaches the model.
    pub has_names: bool,
    pub has_documents: bool,
}

impl Known {
    fn of(prompt: &PromptModel) -> Self {
        Self {
            vocabulary: Arc::clone(prompt.grammars.vocabulary()),
            has_names: prompt.template.knows_names(),
            has_documents: prompt.template.knows_documents(),
        }
    }
}

/// Everything that an edge is made of.
pub struct EdgeSpec {
    pub settings: config::Edge,
    pub models: BTreeMap<ModelId, ServedModel>,
    /// Of the same models.
    pub prompts: BTreeMap<ModelId, PromptModel>,
    pub prices: Prices,
    /// How long a request may wait for a worker.
    pub wait_max: Duration,
    pub admission: Admission,
    pub guard: Guard,
    pub receipts: Receipts,
    pub directory: Directory,
    pub accounts: Accounts,
    /// Whether webhooks may go to private addresses.
    pub private_webhooks: bool,
    pub ledger: Ledger,
    pub queue: Queue,
    pub records: Records,
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
    known: BTreeMap<ModelId, Known>,
    pub prices: Prices,
    pub wait_max: Duration,
    pub admission: Admission,
    pub guard: Guard,
    pub receipts: Receipts,
    pub directory: Directory,
    pub trusted_proxies: Vec<IpNet>,
    pub accounts: Accounts,
    pub private_webhooks: bool,
    pub ledger: Ledger,
    pub queue: Queue,
    pub records: Records,
    pub recordings: Recordings,
    pub hub: ReplyHub,
    pub metrics: Arc<Metrics>,
    pub readiness: Readiness,
    pub runtime: tokio::runtime::Handle,
    /// Work that outlives its request: admissions under way, and giving up what nobody reads.
    pub tasks: TaskTracker,
    /// Statements that may be in the making besides those that are.
    pub statements: Semaphore,
    draining: AtomicBool,
    open: Mutex<HashMap<RequestId, Open>>,
    closed_one: Notify,
}

impl EdgeState {
    /// Must be called inside an actix system, where the prompt pool starts.
    pub(super) fn start(spec: EdgeSpec) -> Self {
        let EdgeSpec { settings, models, prompts, prices, wait_max, .. } = spec;
        let trusted_proxies = settings.trusted_networks();
        let known = prompts.iter().map(|(model, prompt)| (model.clone(), Known::of(prompt))).collect();
        let pool = PromptPool::start(Arc::new(prompts), settings.prompt_threads, settings.prompt_queue_max);
        Self {
            settings,
            models,
            pool,
            known,
            prices,
            wait_max,
            admission: spec.admission,
            guard: spec.guard,
            receipts: spec.receipts,
            directory: spec.directory,
            trusted_proxies,
            accounts: spec.accounts,
            private_webhooks: spec.private_webhooks,
            ledger: spec.ledger,
            queue: spec.queue,
            records: spec.records,
            recordings: Recordings::default(),
            hub: spec.hub,
            metrics: spec.metrics,
            readiness: spec.readiness,
            runtime: spec.runtime,
            tasks: TaskTracker::new(),
            statements: Semaphore::new(statements::AT_ONCE),
            draining: AtomicBool::new(false),
            open: Mutex::default(),
            closed_one: Notify::new(),
        }
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// # Panics
    /// If the model is none of those that are served.
    pub(super) fn known(&self, model: &ModelId) -> &Known {
        &self.known[model]
    }

    /// From now on, new requests are refused.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// A stream is never silent for longer, and no client would miss the headers sooner.
    pub(super) fn keep_alive(&self) -> Duration {
        Duration::from_millis(self.settings.keep_alive_ms.max(1))
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

    /// A tenant's open request by what it is called: its own number, or the name that its client gave it.
    pub(super) fn find_open(&self, tenant: &TenantId, name: &str) -> Option<(RequestId, ModelId)> {
        let open = self.open.lock();
        let is_meant = |(request, open): &(&RequestId, &Open)| {
            open.tenant == *tenant
                && (open.own_id.as_deref() == Some(name)
                    || open.own_id.is_none() && request.as_str().strip_prefix("chatcmpl-") == Some(name))
        };
        open.iter().find(is_meant).map(|(request, open)| (request.clone(), open.model.clone()))
    }

    pub(super) fn open_of(&self, request: &RequestId) -> Option<(TenantId, ModelId)> {
        self.open.lock().get(request).map(|open| (open.tenant.clone(), open.model.clone()))
    }

    /// Its end will be what the client wanted.
    pub(super) fn mark_cancelled(&self, request: &RequestId) {
        if let Some(open) = self.open.lock().get_mut(request) {
            open.is_cancelled = true;
        }
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
            let holds: Vec<_> = self.open.lock().iter().map(|(r, open)| (open.tenant.clone(), r.clone())).collect();
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
        own_id: Option<String>,
        arrived: Instant,
    ) -> Self {
        let open = Open { tenant: tenant.clone(), model: model.clone(), own_id, is_cancelled: false };
        state.open.lock().insert(request.clone(), open);
        Self { state, request, tenant, model, arrived, ended: false, counted: false }
    }

    pub(super) fn state(&self) -> &Arc<EdgeState> {
        &self.state
    }

    /// Whether its client has cancelled it and waits for the end.
    pub(super) fn is_cancelled(&self) -> bool {
        self.state.open.lock().get(&self.request).is_some_and(|open| open.is_cancelled)
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
