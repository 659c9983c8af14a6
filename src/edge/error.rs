//! The only mapping of failures to HTTP.
//!
//! A client sees the external message; the cause goes to the log. Never says more about the inside than
//! whether the client or we are at fault.

use std::time::Duration;

use actix_web::{
    HttpResponse, HttpResponseBuilder, ResponseError,
    body::BoxBody,
    http::{StatusCode, header},
};
use schemars::JsonSchema;
use serde::Serialize;

use crate::{
    admission::{LimitKind, Party, Rates},
    domain::{FailureCode, NanoUsd},
    prompt::PromptError,
};

/// An error as the wire contract has it. Boxed, so that whatever may fail stays cheap to return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError(Box<Fault>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Fault {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_after_ms: Option<u64>,
    never_retry: bool,
    allow: Option<String>,
    close: bool,
    rates: Rates,
    /// Why it was refused, as the metrics name it.
    reason: &'static str,
}

#[derive(JsonSchema, Serialize)]
pub struct Envelope<'a> {
    error: Body<'a>,
}

#[derive(JsonSchema, Serialize)]
struct Body<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

/// An error in the form of RFC 9457.
#[derive(JsonSchema, Serialize)]
pub struct Problem<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    title: &'a str,
    status: u16,
    detail: &'a str,
    /// The request's id.
    instance: &'a str,
    code: Option<&'a str>,
    param: Option<&'a str>,
}

const INVALID_REQUEST: &str = "invalid_request_error";

/// How long a client should wait where we cannot know better.
const RETRY_STORE_MS: u64 = 1_000;
const RETRY_WORKER_MS: u64 = 1_000;
const RETRY_DRAIN_MS: u64 = 2_000;
const RETRY_PROMPT_MS: u64 = 250;
const RETRY_STATEMENT_MS: u64 = 1_000;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        Self(Box::new(Fault {
            status,
            kind,
            code: Some(code),
            param: None,
            message: message.into(),
            retry_after_ms: None,
            never_retry: false,
            allow: None,
            close: false,
            rates: Rates::default(),
            reason: code,
        }))
    }

    fn retry_after(mut self, ms: u64) -> Self {
        self.0.retry_after_ms = Some(ms);
        self
    }

    // -- shape of the request --------------------------------------------------------------------------

    /// A 400 that names the field.
    pub fn field(code: &'static str, param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, code, message);
        error.0.param = Some(param.into());
        error
    }

    pub fn malformed_json(message: impl Into<String>) -> Self {
        let why = format!("We could not parse the JSON body of your request: {}", message.into());
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, "invalid_json", why)
    }

    pub fn malformed_query() -> Self {
        let why = "We could not parse the query of your request: expected name=value pairs.";
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, "invalid_query", why)
    }

    /// 400 for a body that broke off or is not HTTP.
    pub fn broken_body() -> Self {
        let mut error = Self::new(
            StatusCode::BAD_REQUEST,
            INVALID_REQUEST,
            "incomplete_body",
            "The request body ended before it was complete.",
        );
        error.0.close = true;
        error
    }

    pub fn body_too_late(limit_ms: u64) -> Self {
        let why = format!("The request body did not arrive within {limit_ms} ms.");
        let mut error = Self::new(StatusCode::REQUEST_TIMEOUT, INVALID_REQUEST, "request_timeout", why);
        error.0.close = true;
        error
    }

    pub fn body_too_large(limit: usize) -> Self {
        let why = format!("The request body is larger than {limit} bytes.");
        let mut error = Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID_REQUEST, "request_too_large", why);
        error.0.close = true;
        error
    }

    pub fn unsupported_media_type(message: impl Into<String>) -> Self {
        let mut error =
            Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID_REQUEST, "unsupported_media_type", message);
        error.0.close = true;
        error
    }

    pub fn method_not_allowed(method: &str, path: &str, allow: impl Into<String>) -> Self {
        let why = format!("Not allowed to {} on {}.", shorten(method), shorten(path));
        let mut error = Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID_REQUEST, "method_not_allowed", why);
        error.0.allow = Some(allow.into());
        error
    }

    pub fn unknown_path(method: &str, path: &str) -> Self {
        let why = format!("Unknown request URL: {} {}.", shorten(method), shorten(path));
        Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, "not_found", why)
    }

    pub fn model_not_found(model: &str) -> Self {
        let why = format!("The model `{}` does not exist or you do not have access to it.", shorten(model));
        let mut error = Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, "model_not_found", why);
        error.0.param = Some("model".into());
        error
    }

    // -- who asks, and with what money -----------------------------------------------------------------

    pub fn no_key() -> Self {
        Self::unauthorized(
            "You didn't provide an API key. Provide it in an Authorization header: `Authorization: Bearer YOUR_KEY`.",
        )
    }

    pub fn bad_key() -> Self {
        Self::unauthorized("Incorrect API key provided.")
    }

    fn unauthorized(why: &str) -> Self {
        let mut error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", "invalid_api_key", why);
        error.0.close = true;
        error
    }

    pub fn permission_denied(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", "permission_denied", message)
    }

    pub fn suspended() -> Self {
        let mut error = Self::permission_denied("This account is suspended. Contact whoever runs the service.");
        error.0.reason = "suspended";
        error
    }

    pub fn insufficient_balance(rates: Rates) -> Self {
        let why = "Your balance does not cover this request: its prompt and one token of output. Add credit.";
        let mut error = Self::new(StatusCode::PAYMENT_REQUIRED, "insufficient_quota", "insufficient_quota", why);
        error.0.never_retry = true;
        error.0.rates = rates;
        error
    }

    // -- too much, or not now --------------------------------------------------------------------------

    /// `wait_ms`: until it fits; nothing where it never does.
    pub fn limited(kind: LimitKind, of: Party, limit: u64, wait_ms: Option<u64>, rates: Rates) -> Self {
        let whose = match of {
            Party::Tenant => "your account",
            Party::Key => "this API key",
        };
        let what = limit_in_words(kind, limit);
        let wait = wait_ms.map(super::rates::duration);
        if kind.is_spend() {
            let wait = wait.unwrap_or_default();
            let why = format!("The spend limit of {whose} is reached: {what}. It starts anew in {wait}.");
            let mut error = Self::new(StatusCode::PAYMENT_REQUIRED, "insufficient_quota", "insufficient_quota", why);
            error.0.never_retry = true;
            error.0.reason = "spend_limit_reached";
            error.0.rates = rates;
            return error;
        }
        let why = match wait {
            Some(wait) => format!("Rate limit of {whose} reached: {what}. Please try again in {wait}."),
            None => format!(
                "Request too large: its prompt and the most that it may put out exceed the limit of {whose}: {what}. \
                 Ask for fewer tokens with max_completion_tokens."
            ),
        };
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded", why);
        error.0.retry_after_ms = wait_ms;
        error.0.never_retry = wait_ms.is_none();
        error.0.rates = rates;
        error
    }

    /// Too many wrong keys came from where this request came from. Its own was not looked at.
    pub fn address_blocked(left: Duration) -> Self {
        let ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1);
        let why = format!(
            "Too many failed authentications from your address. Please try again in {}.",
            super::rates::duration(ms)
        );
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "address_blocked", why);
        error.0.close = true;
        error.retry_after(ms)
    }

    pub fn queue_full(retry_after_ms: u64) -> Self {
        let why = "Too many requests wait for this model. Try again shortly.";
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "overloaded", why)
            .retry_after(retry_after_ms.max(1));
        error.0.reason = "queue_full";
        error
    }

    fn prompt_pool_full() -> Self {
        let why = "Too many prompts are being read. Try again shortly.";
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "overloaded", why)
            .retry_after(RETRY_PROMPT_MS);
        error.0.reason = "prompt_pool_full";
        error
    }

    pub fn too_many_recordings() -> Self {
        let why = "Too many requests with an idempotency key are under way. Try again shortly.";
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "overloaded", why)
            .retry_after(RETRY_PROMPT_MS);
        error.0.reason = "recordings_full";
        error
    }

    pub fn too_many_statements() -> Self {
        let why = "Too many statements are being made. Try again shortly.";
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "overloaded", why)
            .retry_after(RETRY_STATEMENT_MS);
        error.0.reason = "statements_full";
        error
    }

    /// The same idempotency key with another question.
    pub fn key_reused() -> Self {
        let why = "This Idempotency-Key was used for another request. Use a new key for every request.";
        let status = StatusCode::UNPROCESSABLE_ENTITY;
        let mut error = Self::new(status, INVALID_REQUEST, "idempotency_key_reused", why);
        error.0.param = Some("Idempotency-Key".into());
        error
    }

    /// What a `Last-Event-ID` points at is not there.
    pub fn nothing_to_resume() -> Self {
        let why = "There is no stream under this Idempotency-Key that has the event of 'Last-Event-ID'. \
                   Ask again without that header.";
        Self::field("invalid_value", "Last-Event-ID", why)
    }

    /// No such thing of the tenant's.
    pub fn not_found(what: &str, id: &str) -> Self {
        let why = format!("No {what} found with id '{}'.", shorten(id));
        let mut error = Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, "not_found", why);
        error.0.param = Some("id".into());
        error
    }

    /// What is asked for is not in the store any more.
    pub fn archived(param: &str, what: impl std::fmt::Display) -> Self {
        let why = format!("{what} lies in the archive. Ask whoever runs the service for it.");
        let mut error = Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, "archived", why);
        error.0.param = Some(param.into());
        error
    }

    pub fn no_statement(why: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, "not_found", why);
        error.0.param = Some("month".into());
        error
    }

    /// What is asked for goes against what is there; `param` names the field that does.
    pub fn conflict(code: &'static str, param: Option<&'static str>, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::CONFLICT, INVALID_REQUEST, code, message);
        error.0.param = param.map(str::to_owned);
        // The clients' libraries repeat a 409.
        error.0.never_retry = true;
        error
    }

    fn unavailable(reason: &'static str, message: &str, retry_after_ms: u64) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let mut error =
            Self::new(status, "service_unavailable", "service_unavailable", message).retry_after(retry_after_ms);
        error.0.reason = reason;
        error
    }

    pub fn store_away() -> Self {
        Self::unavailable("store_away", "The service cannot reach its store. Nothing was charged.", RETRY_STORE_MS)
    }

    /// The store went away in the middle of an operator's change.
    pub fn change_unknown() -> Self {
        let why = "The service cannot reach its store, and whether the change was made is not known. \
                   Look, or ask again: the same reference never moves money twice.";
        Self::unavailable("store_away", why, RETRY_STORE_MS)
    }

    pub fn draining() -> Self {
        Self::unavailable("draining", "This node is shutting down. Try again.", RETRY_DRAIN_MS)
    }

    /// A non-streamed answer that took longer than we keep a client waiting. What was decoded is charged, so
    /// clients must not repeat it by themselves.
    pub fn too_slow() -> Self {
        let why = "The answer took too long and was cut off; what was decoded is charged. \
                   Stream it, or ask for fewer tokens.";
        let mut error = Self::unavailable("too_slow", why, RETRY_WORKER_MS);
        error.0.retry_after_ms = None;
        error.0.never_retry = true;
        error
    }

    /// Nobody has taken the request, or whoever had it has fallen silent.
    pub fn silent() -> Self {
        Self::unavailable("silent", "No worker answered in time. Try again.", RETRY_WORKER_MS)
    }

    /// Our fault. The client learns no more; the caller has logged why.
    pub fn internal() -> Self {
        let why = "The server had an error while processing your request. Nothing was charged.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "server_error", why)
    }

    /// A request that the worker's side failed.
    pub fn failed(code: FailureCode) -> Self {
        match code {
            FailureCode::WorkerFailed => {
                let why = "The worker that ran your request failed. Nothing was charged. Try again.";
                let mut error = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "server_error", why);
                error.0.reason = "worker_failed";
                error
            }
            FailureCode::WorkerLost => {
                let why = "The worker that ran your request was lost. What it had decoded may be charged. Try again.";
                let mut error = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "server_error", why);
                error.0.reason = "worker_lost";
                error
            }
            FailureCode::AttemptsExhausted => {
                let why = "Every worker that ran your request was lost. It is not tried again. Nothing was charged.";
                let mut error = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "attempts_exhausted", why);
                error.0.never_retry = true;
                error
            }
            FailureCode::DeadlineExceeded => Self::unavailable(
                "deadline_exceeded",
                "No worker was free in time. Nothing was charged. Try again.",
                RETRY_WORKER_MS,
            ),
            FailureCode::Draining => Self::unavailable(
                "draining",
                "This node is shutting down and could not finish your request. Nothing was charged. Try again.",
                RETRY_DRAIN_MS,
            ),
            FailureCode::SlowConsumer => {
                let why = "The answer was read too slowly and its buffer overflowed. The stream was cut.";
                let status = StatusCode::SERVICE_UNAVAILABLE;
                let mut error = Self::new(status, "service_unavailable", "slow_consumer", why);
                error.0.never_retry = true;
                error
            }
        }
    }

    /// Where the tenant stood, if it is refused for that.
    pub fn rates(&self) -> Rates {
        self.0.rates
    }

    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    /// A bounded set of words, for metrics.
    pub fn reason(&self) -> &'static str {
        self.0.reason
    }

    #[cfg(test)]
    pub(super) fn code(&self) -> Option<&'static str> {
        self.0.code
    }

    #[cfg(test)]
    pub(super) fn param(&self) -> Option<&str> {
        self.0.param.as_deref()
    }

    pub(super) fn message(&self) -> &str {
        &self.0.message
    }

    /// The same in the form of RFC 9457.
    pub fn problem(&self, request_id: &str) -> Vec<u8> {
        let problem = Problem {
            kind: "about:blank",
            title: self.0.status.canonical_reason().unwrap_or("Error"),
            status: self.0.status.as_u16(),
            detail: &self.0.message,
            instance: request_id,
            code: self.0.code,
            param: self.0.param.as_deref(),
        };
        serde_json::to_vec(&problem).expect("strings serialise")
    }

    /// `{"error": {…}}`, also what a stream that has begun ends with.
    pub fn json(&self) -> Vec<u8> {
        let error =
            Body { message: &self.0.message, kind: self.0.kind, param: self.0.param.as_deref(), code: self.0.code };
        serde_json::to_vec(&Envelope { error }).expect("strings serialise")
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: {}", self.0.status.as_u16(), self.0.reason, self.0.message)
    }
}

impl std::error::Error for ApiError {}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.0.status
    }

    fn error_response(&self) -> HttpResponse<BoxBody> {
        let mut answer = HttpResponseBuilder::new(self.0.status);
        answer.content_type("application/json");
        answer.extensions_mut().insert(self.clone());
        if let Some(ms) = self.0.retry_after_ms {
            answer.insert_header((header::RETRY_AFTER, ms.div_ceil(1000).max(1).to_string()));
            answer.insert_header(("retry-after-ms", ms.to_string()));
        }
        if self.0.never_retry {
            answer.insert_header(("x-should-retry", "false"));
        }
        if let Some(allow) = &self.0.allow {
            answer.insert_header((header::ALLOW, allow.as_str()));
        }
        if self.0.status == StatusCode::UNAUTHORIZED {
            answer.insert_header((header::WWW_AUTHENTICATE, "Bearer"));
        }
        if self.0.close {
            // The rest of the body, if there is one, is not worth reading.
            answer.force_close();
        }
        answer.body(self.json())
    }
}

impl From<PromptError> for ApiError {
    fn from(error: PromptError) -> Self {
        match error {
            PromptError::TooLong { tokens, at_least, context } => {
                let at_least = if at_least { "at least " } else { "" };
                let why = format!(
                    "This model's maximum context length is {context} tokens. However, your messages resulted in \
                     {at_least}{tokens} tokens, and the answer needs one more. Please shorten the messages."
                );
                Self::field("context_length_exceeded", "messages", why)
            }
            PromptError::Refused(why) => {
                let why = format!("This model's chat template refused the messages: {}", shorten(&why));
                Self::field("invalid_value", "messages", why)
            }
            PromptError::Variables(why) => {
                let why = format!("This model's chat template cannot use what it was given: {}", shorten(&why));
                Self::field("invalid_value", "chat_template_kwargs", why)
            }
            PromptError::Grammar { why, .. } => Self::field("invalid_schema", "response_format", shorten_to(&why, 400)),
            PromptError::Full => Self::prompt_pool_full(),
            error @ (PromptError::NoTemplate
            | PromptError::Template(_)
            | PromptError::ControlToken(_)
            | PromptError::Render(_)
            | PromptError::Encode(_)
            | PromptError::UnknownModel(_)
            | PromptError::Pool(_)) => {
                tracing::error!(%error, "prompt failed");
                Self::internal()
            }
        }
    }
}

fn limit_in_words(kind: LimitKind, limit: u64) -> String {
    let usd = || NanoUsd::new(i64::try_from(limit).unwrap_or(i64::MAX));
    match kind {
        LimitKind::RequestsPerMinute => format!("{limit} requests per minute"),
        LimitKind::TokensPerMinute => format!("{limit} tokens per minute"),
        LimitKind::RequestsPerDay => format!("{limit} requests per day"),
        LimitKind::TokensPerDay => format!("{limit} tokens per day"),
        LimitKind::RequestsAtOnce => format!("{limit} requests at once"),
        LimitKind::SpendPerDay => format!("${} per day", usd()),
        LimitKind::SpendPerMonth => format!("${} per month", usd()),
    }
}

/// A client's own words in an error: short, on one line.
pub fn shorten(text: &str) -> String {
    shorten_to(text, 80)
}

pub(super) fn shorten_to(text: &str, characters: usize) -> String {
    let clean = |c: char| if c.is_control() { '\u{FFFD}' } else { c };
    let mut short: String = text.chars().take(characters).map(clean).collect();
    if text.chars().nth(characters).is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_is_an_openai_error_object_with_a_string_code() {
        let errors = [
            ApiError::no_key(),
            ApiError::insufficient_balance(Rates::default()),
            ApiError::queue_full(250),
            ApiError::store_away(),
            ApiError::draining(),
            ApiError::internal(),
            ApiError::model_not_found("x"),
            ApiError::failed(FailureCode::WorkerFailed),
            PromptError::TooLong { tokens: 9000, at_least: false, context: 8192 }.into(),
        ];
        for error in errors {
            let json: serde_json::Value = serde_json::from_slice(&error.json()).unwrap();
            let body = json["error"].as_object().unwrap();
            assert_eq!(body.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
            assert!(body["message"].is_string() && body["type"].is_string() && body["code"].is_string());
            assert!(body["param"].is_string() || body["param"].is_null());
        }
    }

    #[test]
    fn retry_headers_say_what_is_worth_retrying() {
        let header = |error: &ApiError, name: &str| {
            error.error_response().headers().get(name).map(|value| value.to_str().unwrap().to_owned())
        };
        let full = ApiError::queue_full(1250);
        assert_eq!(header(&full, "retry-after").as_deref(), Some("2"));
        assert_eq!(header(&full, "retry-after-ms").as_deref(), Some("1250"));
        let poor = ApiError::insufficient_balance(Rates::default());
        assert_eq!(header(&poor, "x-should-retry").as_deref(), Some("false"));
        assert!(header(&ApiError::store_away(), "retry-after").is_some());
        let get = ApiError::method_not_allowed("GET", "/", "POST");
        assert_eq!(header(&get, "allow").as_deref(), Some("POST"));
    }

    #[test]
    fn a_clients_words_are_shortened_and_kept_on_one_line() {
        assert_eq!(shorten("a\nb"), "a\u{FFFD}b");
        assert_eq!(shorten(&"é".repeat(81)).chars().count(), 81);
        assert_eq!(shorten(&"é".repeat(80)).chars().count(), 80);
    }
}
