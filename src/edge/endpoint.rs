//! One request for text, from its bytes to its last token, in whatever [`Dialect`] it was asked.

use std::{sync::Arc, time::Duration};

use actix_web::{
    HttpMessage, HttpRequest, HttpResponse, HttpResponseBuilder, ResponseError,
    http::header,
    web::{self, Bytes, Payload},
};
use tokio::time::timeout;

use super::{
    answer::{Form, Teller, Whole},
    auth::authenticate,
    body,
    dialect::{About, Dialect},
    error::ApiError,
    generation::{self, Answering, Wanted},
    recording::{self, EVENT_STREAM, JSON, Recording},
    server::Arrival,
    state::{EdgeState, Known, Outcome},
    stored::{self, Keeping},
    telling::{Streaming, Telling, Told},
    wire::{Body, Bounds, Request},
};
use crate::{
    admission::{Principal, Rates, Scope},
    domain::ModelId,
    prompt::{Asked, CALL_OPEN, TextShape},
    records::{Key, Once},
    telemetry::unix_ms,
};

/// Names in `x-lightcone-ignored`.
const IGNORED_NAMES_MAX: usize = 32;
const KEY_BYTES_MAX: usize = 255;

pub async fn create<D: Dialect>(http: HttpRequest, mut payload: Payload, state: web::Data<EdgeState>) -> HttpResponse {
    let state = state.into_inner();
    let arrival = http.extensions().get::<Arrival>().copied().unwrap_or_else(Arrival::now);
    let mut model = None;
    match answer::<D>(&http, &mut payload, &state, arrival, &mut model).await {
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

async fn answer<D: Dialect>(
    http: &HttpRequest,
    payload: &mut Payload,
    state: &Arc<EdgeState>,
    arrival: Arrival,
    model: &mut Option<ModelId>,
) -> Result<HttpResponse, Refusal> {
    if state.is_draining() {
        return Err(ApiError::draining().into());
    }
    let principal = authenticate(http, state).await?;
    if !principal.may(Scope::Chat) {
        return Err(ApiError::permission_denied("This API key may not ask for completions.").into());
    }
    let once = Again::of(http)?;
    let settings = &state.settings;
    let bytes = body::read(http, payload, settings.body_bytes_max, settings.body_ms_max).await?;
    let Some(Again { key, after }) = once else {
        let Run { mut telling, is_stream, ignored, rates } = run::<D>(&bytes, state, principal, arrival, model).await?;
        http.extensions_mut().insert(rates);
        drop(bytes);
        if is_stream {
            let streaming = Streaming::begin(telling).await.map_err(Refusal::Ended)?;
            return Ok(streamed(&ignored, streaming.bytes()));
        }
        let limit = Duration::from_millis(settings.request_ms_max);
        let whole = timeout(limit, telling.whole()).await;
        let told = whole.map_err(|_| Refusal::Ended(ApiError::too_slow()))?.map_err(Refusal::Ended)?;
        return Ok(plain(&ignored, told));
    };
    let (path, request) = (http.path().trim_start_matches("/v1"), arrival.request_id());
    let key = Key::new(principal.tenant.clone(), &key, path, &bytes, &request, state.hub.node());
    let once =
        Recorded { state: Arc::clone(state), key, bytes: bytes.clone(), principal, arrival, is_resumed: after > 0 };
    // In a task of its own: a client that hangs up in the middle must not leave a key behind that nobody serves.
    let asked = state.tasks.spawn_on(once.ask::<D>(), &state.runtime).await.map_err(|error| {
        tracing::error!(%error, "a request under an idempotency key panicked");
        ApiError::internal()
    })?;
    *model = asked.model;
    let (recording, rates) = asked.recording?;
    if let Some(rates) = rates {
        http.extensions_mut().insert(rates);
    }
    drop(bytes);
    replayed(state, recording, after).await
}

/// A request under an idempotency key, on its way to a recording.
struct Recorded {
    state: Arc<EdgeState>,
    key: Key,
    bytes: Bytes,
    principal: Principal,
    arrival: Arrival,
    /// The client has a part of the answer already.
    is_resumed: bool,
}

/// What became of it.
struct AskedOnce {
    recording: Result<(Arc<Recording>, Option<Rates>), Refusal>,
    /// Known as soon as the request was read.
    model: Option<ModelId>,
}

impl Recorded {
    async fn ask<D: Dialect>(self) -> AskedOnce {
        let mut model = None;
        let recording = self.recording::<D>(&mut model).await;
        AskedOnce { recording, model }
    }

    async fn recording<D: Dialect>(
        self,
        model: &mut Option<ModelId>,
    ) -> Result<(Arc<Recording>, Option<Rates>), Refusal> {
        let Self { state, key, bytes, principal, arrival, is_resumed } = self;
        match state.records.begin(&key).await {
            Ok(Once::First(None)) => {}
            // Its edge died before it had answered. Under one key, one answer is paid for.
            Ok(Once::First(Some(before))) => {
                if let Err(error) = state.ledger.forgive(key.tenant(), &before).await {
                    forget(&state, &key).await;
                    return Err(stored::ledger_failed(error).into());
                }
            }
            Ok(Once::Other) => return Err(ApiError::key_reused().into()),
            Ok(Once::Again) => {
                let known = state.recordings.find(&key);
                let recording = known.unwrap_or_else(|| recording::follow(&state, key, wants_stream(&bytes)));
                return Ok((recording, None));
            }
            Err(error) => {
                // The answer may have been lost and not the question.
                forget(&state, &key).await;
                return Err(stored::store_failed(error).into());
            }
        }
        let recorded = if is_resumed {
            // What it has a part of is gone, and the rest of another answer would not fit.
            Err(ApiError::nothing_to_resume().into())
        } else {
            let running = run::<D>(&bytes, &state, principal, arrival, model);
            match recording::renewing(&state, &key, running).await {
                Ok(Run { telling, is_stream, ignored, rates }) => {
                    let recording = recording::record(&state, key.clone(), telling, is_stream, ignored);
                    recording.map(|recording| (recording, Some(rates))).map_err(Refusal::from)
                }
                Err(refusal) => Err(refusal),
            }
        };
        // A refusal is no answer: the same request may be sent again, corrected or not.
        if recorded.is_err() {
            forget(&state, &key).await;
        }
        recorded
    }
}

async fn forget(state: &EdgeState, key: &Key) {
    if let Err(error) = state.records.forget(key).await {
        tracing::warn!(%error, "an idempotency key was not given back");
    }
}

/// What a client says about asking again.
struct Again {
    key: String,
    /// Events of the answer that it has already.
    after: usize,
}

impl Again {
    fn of(http: &HttpRequest) -> Result<Option<Self>, ApiError> {
        // Within: `None` for what is not text.
        let header = |name: &str| http.headers().get(name).map(|value| value.to_str().ok().map(str::trim));
        let after = match header("last-event-id") {
            None | Some(Some("")) => 0,
            Some(text) => {
                let digits = text.filter(|text| text.len() <= 9 && !text.starts_with('+'));
                digits.and_then(|text| text.parse().ok()).ok_or_else(|| {
                    let why = "Invalid 'Last-Event-ID': expected the number that the last event had as its id.";
                    ApiError::field("invalid_value", "Last-Event-ID", why)
                })?
            }
        };
        match header("idempotency-key") {
            Some(Some(key)) if (1..=KEY_BYTES_MAX).contains(&key.len()) => {
                Ok(Some(Self { key: key.to_owned(), after }))
            }
            Some(_) => {
                let why = format!("Invalid 'Idempotency-Key': expected 1 to {KEY_BYTES_MAX} printable characters.");
                Err(ApiError::field("invalid_value", "Idempotency-Key", why))
            }
            None if after > 0 => {
                let why = "A stream is taken up again by its 'Idempotency-Key', which is missing.";
                Err(ApiError::field("missing_required_parameter", "Idempotency-Key", why))
            }
            None => Ok(None),
        }
    }
}

/// Of a body that was answered before.
fn wants_stream(bytes: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(bytes).is_ok_and(|body| body["stream"] == true)
}

async fn replayed(state: &EdgeState, recording: Arc<Recording>, after: usize) -> Result<HttpResponse, Refusal> {
    let (content_type, ignored) = recording.opening(state.keep_alive()).await.map_err(Refusal::Ended)?;
    if content_type == EVENT_STREAM {
        return Ok(streamed(&ignored, recording.listen(after, state.keep_alive())));
    }
    let told = recording.told().await.map_err(Refusal::Ended)?;
    Ok(plain(&ignored, told))
}

fn plain(ignored: &[String], Told { body, limited_by }: Told) -> HttpResponse {
    let mut answer = with_ignored(HttpResponse::Ok(), ignored);
    if let Some(why) = limited_by {
        answer.insert_header(("x-lightcone-limited-by", why.as_str()));
    }
    answer.content_type(JSON).body(body)
}

fn streamed(ignored: &[String], bytes: impl futures::Stream<Item = Result<Bytes, ApiError>> + 'static) -> HttpResponse {
    with_ignored(HttpResponse::Ok(), ignored)
        .content_type(EVENT_STREAM)
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        // Compressing would hold events back.
        .insert_header((header::CONTENT_ENCODING, "identity"))
        .insert_header(("x-accel-buffering", "no"))
        .streaming(Box::pin(bytes))
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

/// A request whose answer is on its way.
struct Run {
    telling: Telling,
    is_stream: bool,
    ignored: Vec<String>,
    rates: Rates,
}

async fn run<D: Dialect>(
    bytes: &Bytes,
    state: &Arc<EdgeState>,
    principal: Principal,
    arrival: Arrival,
    model_label: &mut Option<ModelId>,
) -> Result<Run, Refusal> {
    let settings = &state.settings;
    let body = Body::read(bytes)?;
    let name = body.model()?.unwrap_or(settings.default_model.as_str());
    let (model, served) = state.models.get_key_value(name).ok_or_else(|| ApiError::model_not_found(name))?;
    *model_label = Some(model.clone());
    if !principal.may_ask(model) {
        return Err(ApiError::permission_denied(format!("This API key may not ask the model `{model}`.")).into());
    }
    let known = state.known(model);
    let bounds = Bounds {
        messages_max: settings.messages_max,
        choices_max: settings.choices_max,
        context_tokens_max: served.context_tokens_max,
        vocabulary: known.vocabulary.len(),
    };
    let before = D::before(&body, state, &principal).await?;
    let (mut request, dialect) = D::read(body, bounds, before)?;
    note_what_the_template_lacks(&mut request, known);
    request.priority = request.priority.min(state.admission.priority_max(&principal));

    let has_tools = !request.ask.shape.calls.tools.is_empty();
    let has_shape = request.ask.shape.text != TextShape::Any;
    request.ask.lane = principal.tenant.to_string();
    free_the_form_of_stops(&mut request);
    let prepared = state.pool.prepare(model.clone(), request.ask.clone()).await;
    let prepared = prepared.map_err(|error| request.refused(error))?;
    let room = served.context_tokens_max.saturating_sub(u32::try_from(prepared.tokens.len()).unwrap_or(u32::MAX));
    let cap = served.output_tokens_max.min(room);
    let mut wanted = Wanted {
        request: arrival.request_id(),
        model: model.clone(),
        prompt: prepared.tokens,
        output_tokens_max: request.output_tokens_max.map_or(cap, |asked| asked.capped(cap)),
        choices: request.choices,
        sampling: request.sampling.clone(),
        stops: std::mem::take(&mut request.stops),
        telling: request.telling,
        grammar: prepared.grammar,
        cache_salt: std::mem::take(&mut request.cache_salt),
        priority: request.priority,
        own_id: request.own_id.clone(),
    };
    wanted.sampling.bad_words = prepared.bad_words;
    // What cannot be reached must not keep the answer from its end.
    wanted.sampling.min_tokens = wanted.sampling.min_tokens.min(wanted.output_tokens_max);
    let form = Form {
        choices: request.choices,
        vocabulary: Arc::clone(&known.vocabulary),
        has_tools,
        has_shape,
        is_legacy: request.tools.is_legacy,
        echo: std::mem::take(&mut request.echo),
        logprobs: request.telling.logprobs.is_some(),
        token_ids: request.telling.token_ids,
        tokens_as_ids: request.tokens_as_ids,
    };
    let unique = wanted.request.as_str().strip_prefix("chatcmpl-").unwrap_or(wanted.request.as_str());
    let about = About {
        id: format!("{}{}", D::ID_PREFIX, request.own_id.as_deref().unwrap_or(unique)),
        created: unix_ms() / 1000,
        model: model.clone(),
        priority: request.priority,
    };
    let prompt_tokens = wanted.prompt.len() as u32;
    let prompt = if request.telling.token_ids { wanted.prompt.clone() } else { Vec::new() };
    // The body and the prompt took their time, in which a drain may have begun.
    if state.is_draining() {
        return Err(ApiError::draining().into());
    }
    let keeping = D::KEPT_AS.filter(|_| request.store).map(|kind| (principal.tenant.clone(), kind));
    let conversation = match &request.ask.prompt {
        Asked::Conversation(conversation) if keeping.is_some() => {
            conversation.messages.iter().skip(request.instructions).cloned().collect()
        }
        _ => Vec::new(),
    };
    let opening = generation::open(Arc::clone(state), principal, wanted, arrival.at);
    let opened = state.tasks.spawn_on(opening, &state.runtime).await.map_err(|error| {
        tracing::error!(%error, "admission panicked");
        ApiError::internal()
    })??;
    let rates = opened.rates;
    let answering = Answering::new(opened);
    let teller = Teller::new(answering.open.request.clone(), form.clone());
    let keeping = keeping.map(|(tenant, kind)| Keeping {
        tenant,
        id: about.id.clone(),
        kind,
        metadata: std::mem::take(&mut request.metadata),
        conversation,
        whole: Whole::of(form.choices),
    });
    let writer = dialect.writer(about, form, prompt);
    let telling =
        Telling { state: Arc::clone(state), answering, teller, writer, prompt_tokens, keeping, failure: None };
    Ok(Run { telling, is_stream: request.stream, ignored: request.ignored, rates })
}

/// What would end an answer in the middle of its form has no effect there.
fn free_the_form_of_stops(request: &mut Request) {
    let (shape, stops) = (&request.ask.shape, &mut request.stops);
    if shape.is_free() {
        return;
    }
    if std::mem::take(&mut stops.ignore_eos) {
        request.ignored.push("ignore_eos".to_owned());
    }
    if shape.calls.tools.is_empty() {
        return;
    }
    stops.until = CALL_OPEN.to_owned();
    if shape.calls.are_required {
        if !std::mem::take(&mut stops.strings).is_empty() {
            request.ignored.push("stop".to_owned());
        }
        if !std::mem::take(&mut stops.tokens).is_empty() {
            request.ignored.push("stop_token_ids".to_owned());
        }
    }
}

/// Fields that only some templates have a place for.
fn note_what_the_template_lacks(request: &mut Request, known: &Known) {
    let Asked::Conversation(conversation) = &request.ask.prompt else { return };
    if conversation.messages.iter().any(|message| message.name.is_some()) && !known.has_names {
        request.ignored.push("messages[].name".to_owned());
    }
    if !conversation.documents.is_empty() && !known.has_documents {
        request.ignored.push("documents".to_owned());
    }
}

/// Names the fields that had no effect. The names are the client's own: only what is plain goes into a header.
pub fn with_ignored(mut answer: HttpResponseBuilder, ignored: &[String]) -> HttpResponseBuilder {
    let plain = |name: &&String| {
        name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.[]".contains(&byte))
    };
    let names: Vec<&str> = ignored.iter().filter(plain).take(IGNORED_NAMES_MAX).map(String::as_str).collect();
    if !names.is_empty() {
        answer.insert_header(("x-lightcone-ignored", names.join(", ")));
    }
    answer
}
