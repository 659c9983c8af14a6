//! One chat request, from its bytes to its last token.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use actix_web::{
    HttpMessage, HttpRequest, HttpResponse, HttpResponseBuilder, ResponseError,
    http::header,
    web::{self, Bytes, BytesMut, Payload},
};
use futures::{FutureExt, Stream, stream};
use tokio::time::{timeout, timeout_at};

use super::{
    auth::authenticate,
    body,
    error::ApiError,
    openai::Completion,
    request::{self, ChatRequest},
    server::Arrival,
    sse::{self, Chunks},
    state::{EdgeState, OpenRequest, Outcome},
};
use crate::{
    admission::{AdmitError, Ask, Principal, Scope},
    domain::{EventBody, FailureCode, FinishReason, Job, ModelId, Priority, RequestId, SamplingParams, Usage},
    ledger::ReleaseReason,
    queue::{PublishError, ReplyStream},
    store::StoreError,
};

/// Bytes of several events that wait, written to the client together.
const WRITE_BYTES_MAX: usize = 16 << 10;
/// Names in `x-lightcone-ignored`.
const IGNORED_NAMES_MAX: usize = 32;

pub(super) async fn create(http: HttpRequest, mut payload: Payload, state: web::Data<EdgeState>) -> HttpResponse {
    let state = state.into_inner();
    let arrival = http.extensions().get::<Arrival>().copied().unwrap_or_else(Arrival::now);
    let mut model = None;
    match serve(&http, &mut payload, &state, arrival, &mut model).await {
        Ok(answer) => answer,
        Err(Refusal::Ended(error)) => error.error_response(),
        Err(Refusal::Refused(error)) => {
            let model = model.as_ref().map_or("none", ModelId::as_str);
            state.metrics.refusals.with_label_values(&[error.reason()]).inc();
            state.metrics.requests.with_label_values(&[model, Outcome::Refused.as_str()]).inc();
            tracing::debug!(%error, "refused");
            body::discard(payload).await;
            error.error_response()
        }
    }
}

/// Why there is no answer.
enum Refusal {
    /// Not taken on: nothing was published and nothing is on hold.
    Refused(ApiError),
    /// Taken on, and counted where it ended.
    Ended(ApiError),
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self::Refused(error)
    }
}

async fn serve(
    http: &HttpRequest,
    payload: &mut Payload,
    state: &Arc<EdgeState>,
    arrival: Arrival,
    model_label: &mut Option<ModelId>,
) -> Result<HttpResponse, Refusal> {
    if state.is_draining() {
        return Err(ApiError::draining().into());
    }
    let principal = authenticate(http, state).await?;
    if !principal.may(Scope::Chat) {
        return Err(ApiError::permission_denied("This API key may not ask for completions.").into());
    }
    let settings = &state.settings;
    let body = body::read(http, payload, settings.body_bytes_max, settings.body_ms_max).await?;
    let mut request = request::parse(&body, settings.messages_max)?;
    drop(body);

    let name = request.model.as_deref().unwrap_or(settings.default_model.as_str());
    let (model, served) = state.models.get_key_value(name).ok_or_else(|| ApiError::model_not_found(name))?;
    *model_label = Some(model.clone());
    if let Some(asked) = request.output_tokens_max {
        asked.fits(served.context_tokens_max)?;
    }
    let messages = std::mem::take(&mut request.messages);
    if messages.iter().any(|message| message.name.is_some()) && !state.knows_names(model) {
        request.ignored.push("messages[].name".to_owned());
    }
    let prompt = state.pool.tokens(model.clone(), messages).await.map_err(ApiError::from)?;
    let room = served.context_tokens_max.saturating_sub(u32::try_from(prompt.len()).unwrap_or(u32::MAX));
    let cap = served.output_tokens_max.min(room);
    let output_tokens_max = request.output_tokens_max.map_or(cap, |asked| asked.capped(cap));

    let wanted = Wanted {
        request: arrival.request_id(),
        model: model.clone(),
        prompt,
        output_tokens_max,
        sampling: request.sampling.clone(),
        stop: std::mem::take(&mut request.stop),
        ignore_eos: request.ignore_eos,
        cache_salt: std::mem::take(&mut request.cache_salt),
    };
    // The body and the prompt took their time, in which a drain may have begun.
    if state.is_draining() {
        return Err(ApiError::draining().into());
    }
    // A task of its own: should the client go away in the middle, what was taken on is still given up in
    // good order when the task's result is dropped.
    let opening = state.tasks.spawn_on(open(Arc::clone(state), principal, wanted, arrival.at), &state.runtime);
    let opened = opening.await.map_err(|error| {
        tracing::error!(%error, "admission panicked");
        ApiError::internal()
    })??;
    answer(opened, &request, settings).await
}

/// Everything of a job that does not depend on who asks.
struct Wanted {
    request: RequestId,
    model: ModelId,
    prompt: Vec<u32>,
    output_tokens_max: u32,
    sampling: SamplingParams,
    stop: Vec<String>,
    ignore_eos: bool,
    cache_salt: String,
}

/// A request in the queue, its money on hold and its stream open. Declared so that a drop first tells the
/// worker, then the queue.
struct Opened {
    reply: ReplyStream,
    open: OpenRequest,
}

/// Admits and publishes, or leaves nothing behind.
async fn open(
    state: Arc<EdgeState>,
    principal: Principal,
    wanted: Wanted,
    arrived: Instant,
) -> Result<Opened, ApiError> {
    let Some(served) = state.models.get(&wanted.model) else {
        return Err(ApiError::model_not_found(wanted.model.as_str()));
    };
    let ask = Ask {
        request: wanted.request.clone(),
        model: wanted.model.clone(),
        price: served.price,
        price_version: state.price_version.clone(),
        prompt_tokens: u32::try_from(wanted.prompt.len()).unwrap_or(u32::MAX),
        output_tokens_max: wanted.output_tokens_max,
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
    let tenant = admitted.tenant().clone();
    let open = OpenRequest::new(Arc::clone(&state), wanted.request.clone(), tenant, wanted.model.clone(), arrived);
    let reply = state.hub.open(&wanted.request);
    let now = unix_ms();
    let job = Job {
        request: wanted.request,
        tenant: admitted.tenant().clone(),
        key: admitted.key().clone(),
        model: wanted.model,
        prompt: wanted.prompt,
        output_tokens_max: admitted.output_tokens_max(),
        sampling: wanted.sampling,
        stop: wanted.stop,
        ignore_eos: wanted.ignore_eos,
        cache_salt: wanted.cache_salt,
        priority: Priority::default(),
        price: admitted.price(),
        price_version: admitted.price_version().to_owned(),
        hold: admitted.hold(),
        reply_to: state.hub.reply_to(),
        enqueued_unix_ms: now,
        deadline_unix_ms: now.saturating_add(u64::try_from(state.wait_max.as_millis()).unwrap_or(u64::MAX)),
    };
    match state.queue.publish(&job).await {
        Ok(()) => Ok(Opened { reply, open }),
        // After a lost answer the job may stand in the queue, or even be done.
        Err(error) => match open.refuse(!matches!(error, PublishError::Store(_))).await {
            None => Err(not_queued(error)),
            Some(open) => Ok(Opened { reply, open }),
        },
    }
}

fn refused(error: AdmitError) -> ApiError {
    match error {
        AdmitError::InsufficientBalance { .. } => ApiError::insufficient_balance(),
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
        error @ (AdmitError::Repeated(_) | AdmitError::Money(_)) => {
            tracing::error!(%error, "admission failed");
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

async fn answer(
    opened: Opened,
    request: &ChatRequest,
    settings: &crate::config::Edge,
) -> Result<HttpResponse, Refusal> {
    let mut answering = Answering::new(opened);
    let created = unix_ms() / 1000;
    if !request.stream {
        let limit = Duration::from_millis(settings.request_ms_max);
        let whole = timeout(limit, answering.collect()).await;
        let (text, reason, usage) = whole.map_err(|_| Refusal::Ended(ApiError::too_slow()))?.map_err(Refusal::Ended)?;
        let open = &answering.open;
        let body = Completion::new(&open.request, created, &open.model, &text, reason, &usage);
        return Ok(with_ignored(HttpResponse::Ok(), &request.ignored).json(body));
    }
    // The status stays open for as long as a client would not miss the headers, so that a failure before
    // the first token is an ordinary error, which clients know how to retry.
    let keep_alive = Duration::from_millis(settings.keep_alive_ms.max(1));
    let first = match timeout(keep_alive, answering.next()).await {
        Ok(News::Failed(error)) => return Err(Refusal::Ended(error)),
        Ok(news) => Some(news),
        Err(_) => None,
    };
    let chunks = Chunks::new(&answering.open.request, created, &answering.open.model, request.include_usage);
    let include_usage = request.include_usage;
    let streaming = Streaming { answering, chunks, include_usage, keep_alive, first, begun: false, over: false };
    Ok(with_ignored(HttpResponse::Ok(), &request.ignored)
        .content_type("text/event-stream")
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .insert_header(("x-accel-buffering", "no"))
        .streaming(Box::pin(streaming.bytes())))
}

/// What came back, with the clock and the books kept.
struct Answering {
    reply: ReplyStream,
    open: OpenRequest,
    first_token: Option<Instant>,
    tokens: u32,
    /// When the next event is overdue.
    overdue: tokio::time::Instant,
}

enum News {
    Text(String),
    Finished(FinishReason, Usage),
    Failed(ApiError),
}

impl Answering {
    fn new(Opened { reply, open }: Opened) -> Self {
        let overdue = tokio::time::Instant::now() + open.state().patience();
        Self { reply, open, first_token: None, tokens: 0, overdue }
    }

    /// The next thing that the client should know. Cancel-safe. Not to be asked again after the last.
    async fn next(&mut self) -> News {
        loop {
            // Every way of losing a request tells its stream. This clock is for the ways that nobody thought of.
            let Ok(event) = timeout_at(self.overdue, self.reply.next()).await else {
                tracing::error!(request = %self.open.request, "no worker was heard of in time");
                return News::Failed(ApiError::silent());
            };
            let Some(event) = event else {
                return self.failed(FailureCode::WorkerFailed, "stream ended without its last event");
            };
            self.overdue = tokio::time::Instant::now() + self.open.state().silence_max();
            match event.body {
                EventBody::Accepted => {}
                EventBody::Delta { text, tokens } => {
                    self.count(tokens);
                    if !text.is_empty() {
                        return News::Text(text);
                    }
                }
                EventBody::Finished { reason: FinishReason::Cancelled, .. } => {
                    return self.failed(FailureCode::Draining, "cancelled, but not by its client");
                }
                EventBody::Finished { reason, usage } => {
                    self.observe_rate();
                    self.open.end(if reason == FinishReason::Stop { Outcome::Stop } else { Outcome::Length });
                    return News::Finished(reason, usage);
                }
                EventBody::Failed { code, message } => return self.failed(code, &message),
            }
        }
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

    async fn collect(&mut self) -> Result<(String, FinishReason, Usage), ApiError> {
        let mut whole = String::new();
        loop {
            match self.next().await {
                News::Text(text) => whole.push_str(&text),
                News::Finished(reason, usage) => return Ok((whole, reason, usage)),
                News::Failed(error) => return Err(error),
            }
        }
    }
}

/// An answer on its way to the client as server-sent events.
struct Streaming {
    answering: Answering,
    chunks: Chunks,
    include_usage: bool,
    keep_alive: Duration,
    /// What was known before the headers went out.
    first: Option<News>,
    begun: bool,
    over: bool,
}

impl Streaming {
    fn bytes(self) -> impl Stream<Item = Result<Bytes, ApiError>> {
        let step = async |(mut streaming, mut buffer): (Self, BytesMut)| {
            if streaming.over {
                return None;
            }
            streaming.write(&mut buffer).await;
            let bytes = buffer.split().freeze();
            Some((Ok(bytes), (streaming, buffer)))
        };
        stream::unfold((self, BytesMut::with_capacity(4096)), step)
    }

    /// Writes what there is, after waiting for at least something.
    async fn write(&mut self, out: &mut BytesMut) {
        if !self.begun {
            self.begun = true;
            self.chunks.role(out);
            if self.first.is_none() {
                return; // the headers are late already
            }
        }
        let news = match self.first.take() {
            Some(news) => news,
            None => match timeout(self.keep_alive, self.answering.next()).await {
                Ok(news) => news,
                Err(_) => return out.extend_from_slice(sse::KEEP_ALIVE),
            },
        };
        self.put(news, out);
        while !self.over && out.len() < WRITE_BYTES_MAX {
            let Some(news) = self.answering.next().now_or_never() else { return };
            self.put(news, out);
        }
    }

    fn put(&mut self, news: News, out: &mut BytesMut) {
        match news {
            News::Text(text) => self.chunks.text(&text, out),
            News::Finished(reason, usage) => {
                self.chunks.finish(reason, out);
                if self.include_usage {
                    self.chunks.usage(&usage, out);
                }
                sse::done(out);
                self.over = true;
            }
            News::Failed(error) => {
                sse::error(&error, out);
                self.over = true;
            }
        }
    }
}

/// Names the fields that had no effect. The names are the client's own: only what is plain goes into a header.
fn with_ignored(mut answer: HttpResponseBuilder, ignored: &[String]) -> HttpResponseBuilder {
    let plain = |name: &&String| {
        name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.[]".contains(&byte))
    };
    let names: Vec<&str> = ignored.iter().filter(plain).take(IGNORED_NAMES_MAX).map(String::as_str).collect();
    if !names.is_empty() {
        answer.insert_header(("x-lightcone-ignored", names.join(", ")));
    }
    answer
}

fn unix_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
