//! From a request that is understood to the events of its answer: admission, the queue, and the clock.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::timeout_at;

use super::{
    error::ApiError,
    state::{EdgeState, OpenRequest, Outcome},
};
use crate::{
    admission::{self, AdmitError, Principal, Rates},
    domain::{
        EventBody, FailureCode, FinishReason, GrammarSource, Job, ModelId, Priority, RequestId, SamplingParams,
        StoppedBy, Stops, Telling, TokenDetail, Usage,
    },
    ledger::{PricesError, ReleaseReason},
    queue::{PublishError, ReplyStream},
    store::StoreError,
    telemetry::unix_ms,
};

/// How long other edges know a request by the name that its client gave it.
const NAME_KEPT: Duration = Duration::from_secs(6 * 3600);

/// Everything of a job that does not depend on who asks.
pub struct Wanted {
    pub request: RequestId,
    pub model: ModelId,
    pub prompt: Vec<u32>,
    /// Of each choice.
    pub output_tokens_max: u32,
    pub choices: u32,
    pub sampling: SamplingParams,
    pub stops: Stops,
    pub telling: Telling,
    pub grammar: Option<GrammarSource>,
    pub cache_salt: String,
    pub priority: Priority,
    /// The client's own name for the request.
    pub own_id: Option<String>,
}

/// A request in the queue, its money on hold and its stream open. Declared so that a drop first tells the
/// worker, then the queue.
pub struct Opened {
    reply: ReplyStream,
    open: OpenRequest,
    /// What the tenant may still ask for.
    pub rates: Rates,
}

/// Admits and publishes, or leaves nothing behind. To be run as a task of its own: should the client go away in the
/// middle, what was taken on is still given up in good order when the task's result is dropped.
pub async fn open(
    state: Arc<EdgeState>,
    principal: Principal,
    wanted: Wanted,
    arrived: Instant,
) -> Result<Opened, ApiError> {
    let (price, price_version) = state.prices.current(&wanted.model).await.map_err(no_price)?;
    let ask = admission::Ask {
        request: wanted.request.clone(),
        model: wanted.model.clone(),
        price,
        price_version,
        prompt_tokens: u32::try_from(wanted.prompt.len()).unwrap_or(u32::MAX),
        output_tokens_max: wanted.output_tokens_max.saturating_mul(wanted.choices),
        choices: wanted.choices,
    };
    let admitted = match state.admission.admit(&principal, ask).await {
        Ok(admitted) => admitted,
        Err(error) => {
            if matches!(error, AdmitError::Store(_)) {
                // The answer may have been lost and not the question: then there is a hold.
                state.release_later(principal.tenant.clone(), wanted.request, ReleaseReason::NotQueued);
            }
            return Err(refused(error));
        }
    };
    let (tenant, rates) = (admitted.tenant().clone(), admitted.rates());
    let (request, model) = (wanted.request.clone(), wanted.model.clone());
    if let Some(own_id) = &wanted.own_id
        && let Err(error) = state.records.name(&tenant, own_id, &request, NAME_KEPT).await
    {
        tracing::warn!(%error, "other edges will not know a request by the name that its client gave it");
    }
    let open = OpenRequest::new(Arc::clone(&state), request, tenant, model, wanted.own_id, arrived);
    let reply = state.hub.open(&wanted.request, &wanted.model);
    let now = unix_ms();
    let job = Job {
        request: wanted.request,
        tenant: admitted.tenant().clone(),
        key: admitted.key().clone(),
        model: wanted.model,
        prompt: wanted.prompt,
        output_tokens_max: wanted.output_tokens_max,
        choices: wanted.choices,
        sampling: wanted.sampling,
        stops: wanted.stops,
        telling: wanted.telling,
        grammar: wanted.grammar,
        cache_salt: wanted.cache_salt,
        priority: wanted.priority,
        price: admitted.price(),
        price_version: admitted.price_version().to_owned(),
        hold: admitted.hold(),
        allowed_tokens: admitted.allowed_tokens(),
        reply_to: state.hub.reply_to(),
        enqueued_unix_ms: now,
        deadline_unix_ms: now.saturating_add(u64::try_from(state.wait_max.as_millis()).unwrap_or(u64::MAX)),
    };
    match state.queue.publish(&job).await {
        Ok(()) => {
            state.hub.published(job);
            Ok(Opened { reply, open, rates })
        }
        // After a lost answer the job may stand in the queue, or even be done.
        Err(error) => match open.refuse(!matches!(error, PublishError::Store(_))).await {
            None => Err(not_queued(error)),
            Some(open) => Ok(Opened { reply, open, rates }),
        },
    }
}

pub(super) fn refused(error: AdmitError) -> ApiError {
    match error {
        AdmitError::InsufficientBalance { rates, .. } => ApiError::insufficient_balance(rates),
        AdmitError::Limited { kind, of, limit, wait_ms, rates } => ApiError::limited(kind, of, limit, wait_ms, rates),
        AdmitError::Suspended(tenant) => {
            tracing::info!(%tenant, "a suspended tenant asked");
            ApiError::suspended()
        }
        AdmitError::KeyEnded(key) => {
            tracing::info!(%key, "a key that has ended was used");
            ApiError::bad_key()
        }
        AdmitError::UnknownTenant(tenant) => {
            tracing::warn!(%tenant, "a key's tenant is gone");
            ApiError::bad_key()
        }
        AdmitError::Store(error @ StoreError::Damaged(_)) => {
            tracing::error!(%error, "admission failed");
            ApiError::internal()
        }
        AdmitError::Store(error) => {
            tracing::warn!(%error, "admission failed");
            ApiError::store_away()
        }
        error @ (AdmitError::Repeated(_) | AdmitError::Money(_) | AdmitError::UnknownTier(_)) => {
            tracing::error!(%error, "admission failed");
            ApiError::internal()
        }
    }
}

pub(super) fn no_price(error: PricesError) -> ApiError {
    match error {
        PricesError::Store(error) if error.is_transient() => {
            tracing::warn!(%error, "the price book cannot be read");
            ApiError::store_away()
        }
        error => {
            tracing::error!(%error, "a request cannot be priced");
            ApiError::internal()
        }
    }
}

fn not_queued(error: PublishError) -> ApiError {
    match error {
        PublishError::Full { retry_after_ms } => ApiError::queue_full(retry_after_ms),
        PublishError::Store(error) => {
            tracing::warn!(%error, "publishing failed");
            ApiError::store_away()
        }
        PublishError::Encoding(error) => {
            tracing::error!(%error, "a job could not be encoded");
            ApiError::internal()
        }
    }
}

/// What came back, with the clock and the books kept.
pub struct Answering {
    reply: ReplyStream,
    pub open: OpenRequest,
    first_token: Option<Instant>,
    /// Tokens of the answer that were told of so far.
    tokens: u32,
    /// The last end of a choice, which waits for what comes behind it: of the last one the client shall not hear
    /// before the request is settled.
    ended: Option<News>,
    /// What came behind it.
    next: Option<EventBody>,
    /// When the next event is overdue.
    overdue: tokio::time::Instant,
}

/// The next thing that the client should know.
pub enum News {
    Prompt(Vec<TokenDetail>),
    Delta { choice: u32, text: String, details: Vec<TokenDetail> },
    ChoiceEnded { choice: u32, reason: FinishReason, stopped_by: Option<StoppedBy> },
    Finished(Usage),
    Failed(ApiError),
}

impl Answering {
    pub fn new(Opened { reply, open, .. }: Opened) -> Self {
        let overdue = tokio::time::Instant::now() + open.state().patience();
        Self { reply, open, first_token: None, tokens: 0, ended: None, next: None, overdue }
    }

    /// Tokens of all choices that were told of so far.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Cancel-safe. Not to be asked again after the last.
    pub async fn next(&mut self) -> News {
        loop {
            let body = match self.next.take() {
                Some(body) => body,
                None => match self.event().await {
                    Ok(body) => body,
                    Err(failed) => return failed,
                },
            };
            if !matches!(body, EventBody::Failed { .. })
                && let Some(ended) = self.ended.take()
            {
                self.next = Some(body);
                return ended;
            }
            match body {
                EventBody::Accepted => {}
                EventBody::Prompt { tokens } => return News::Prompt(tokens),
                EventBody::Delta { choice, text, ids, details } => {
                    self.count(ids.len() as u32);
                    if !text.is_empty() || !details.is_empty() {
                        return News::Delta { choice, text, details };
                    }
                }
                EventBody::ChoiceEnded { choice, reason, stopped_by } => {
                    self.ended = Some(News::ChoiceEnded { choice, reason, stopped_by });
                }
                EventBody::Finished { reason: FinishReason::Cancelled, usage } if self.open.is_cancelled() => {
                    self.open.end(Outcome::Cancelled);
                    return News::Finished(usage);
                }
                EventBody::Finished { reason: FinishReason::Cancelled, .. } => {
                    return self.failed(FailureCode::Draining, "cancelled, but not by its client");
                }
                EventBody::Finished { reason, usage } => {
                    self.observe_rate();
                    self.open.end(if reason == FinishReason::Stop { Outcome::Stop } else { Outcome::Length });
                    return News::Finished(usage);
                }
                EventBody::Failed { code, message } => return self.failed(code, &message),
            }
        }
    }

    async fn event(&mut self) -> Result<EventBody, News> {
        // Every way of losing a request tells its stream. This clock is for the ways that nobody thought of.
        let Ok(event) = timeout_at(self.overdue, self.reply.next()).await else {
            tracing::error!(request = %self.open.request, "no worker was heard of in time");
            return Err(News::Failed(ApiError::silent()));
        };
        let Some(event) = event else {
            return Err(self.failed(FailureCode::WorkerLost, "stream ended without its last event"));
        };
        self.overdue = tokio::time::Instant::now() + self.open.state().silence_max();
        Ok(event.body)
    }

    fn failed(&mut self, code: FailureCode, message: &str) -> News {
        tracing::warn!(request = %self.open.request, ?code, message, "request failed");
        if code == FailureCode::Draining {
            // Told by this node's own drain: the request may still stand in the queue, and is taken out.
            self.open.give_up(Outcome::Failed);
        } else {
            self.open.end(Outcome::Failed);
        }
        News::Failed(ApiError::failed(code))
    }

    fn count(&mut self, tokens: u32) {
        self.tokens += tokens;
        if self.first_token.is_none() {
            let now = Instant::now();
            self.first_token = Some(now);
            let seconds = now.duration_since(self.open.arrived).as_secs_f64();
            let metrics = &self.open.state().metrics;
            metrics.time_to_first_token.with_label_values(&[self.open.model.as_str()]).observe(seconds);
        }
    }

    fn observe_rate(&self) {
        if let Some(first) = self.first_token.filter(|_| self.tokens > 1) {
            let seconds = first.elapsed().as_secs_f64() / f64::from(self.tokens - 1);
            let metrics = &self.open.state().metrics;
            metrics.time_per_output_token.with_label_values(&[self.open.model.as_str()]).observe(seconds);
        }
    }
}
