//! `/openapi.json`, made of the same tables and types that bind paths, read requests and write answers, and `/docs`, a
//! page that shows it. Never says what the server does not do: its bounds are those of the configuration.

mod answers;
mod page;
mod reports;

use actix_web::{HttpResponse, http::header, web};
use serde_json::{Map, Value, json};

use super::{
    admin,
    operations::{self, Answer, Method, Operation},
    state::EdgeState,
    wire::schema::{self, Kind, Limits},
};

/// The document of one edge, written out.
pub struct Document {
    json: String,
    page: String,
}

impl Document {
    pub(super) fn of(state: &EdgeState) -> Self {
        let vocabularies = state.models.keys().map(|model| state.known(model).vocabulary.len());
        let limits = Limits {
            models: state.models.keys().map(ToString::to_string).collect(),
            tiers: state.admission.tiers().iter().map(|(name, _)| name.to_owned()).collect(),
            messages_max: state.settings.messages_max,
            choices_max: state.settings.choices_max,
            context_tokens_max: state.models.values().map(|model| model.context_tokens_max).max().unwrap_or_default(),
            vocabulary: vocabularies.max().unwrap_or_default(),
        };
        let document = document(&limits, state.settings.default_model.as_str());
        Self { json: document.to_string(), page: page::render(&document) }
    }
}

pub async fn json(document: web::Data<Document>) -> HttpResponse {
    HttpResponse::Ok().content_type("application/json").body(document.json.clone())
}

pub async fn page(document: web::Data<Document>) -> HttpResponse {
    HttpResponse::Ok()
        .content_type("text/html; charset=utf-8")
        .insert_header((header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'"))
        .body(document.page.clone())
}

const ABOUT: &str = "Chat completions by OpenAI's contract. Every path under /v1 is served without /v1 as well. Another \
    method than those of a path is answered with 405 and `allow`. Errors are `{\"error\": {…}}`, or by RFC 9457 where \
    `accept` names application/problem+json. A field that is null has its default; one that nobody knows is ignored and \
    named in `x-lightcone-ignored`, but refused under /v1/admin, which is for keys with the scope `admin`. Amounts there \
    are whole nano-dollars.";

fn document(limits: &Limits, model: &str) -> Value {
    let mut paths = Map::new();
    for operation in operations::all() {
        let path = paths.entry(operation.documented_path()).or_insert_with(|| {
            let allowed = operations::allowed(operation.path);
            json!({ "description": format!("Allows {allowed}.") })
        });
        path[operation.method.as_str().to_ascii_lowercase()] = described(operation, model);
    }
    let mut schemas: Map<String, Value> =
        Kind::ALL.into_iter().map(|kind| (kind.name().to_owned(), schema::body(kind, limits))).collect();
    schemas.extend(schema::shared().into_iter().map(|(name, schema)| (name.to_owned(), schema)));
    schemas.extend(answers::all());
    schemas.extend(admin::schemas::bodies(limits));
    schemas.extend(admin::schemas::answers());
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Lightcone", "version": env!("CARGO_PKG_VERSION"), "description": ABOUT },
        "servers": [{ "url": "/" }],
        "security": [{ "key": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": { "type": "http", "scheme": "bearer", "description": "An API key, which begins with `sk_`." },
            },
            "parameters": parameters(),
            "headers": headers(),
            "responses": responses(),
            "schemas": schemas,
        },
    })
}

fn component(kind: &str, name: &str) -> Value {
    json!({ "$ref": format!("#/components/{kind}/{name}") })
}

fn described(operation: &Operation, model: &str) -> Value {
    let mut answers = Map::from_iter([("200".to_owned(), success(operation))]);
    for status in operation.refusals {
        let answer = match operation.method {
            _ if !operation.is_open() => component("responses", refusal(*status).0),
            Method::Head => json!({ "description": "Not now.", "headers": carried(&["retry-after"]) }),
            _ => json!({
                "description": "Not now.", "headers": carried(&["retry-after"]),
                "content": { "application/json": { "schema": component("schemas", "Readiness") } },
            }),
        };
        answers.insert(status.to_string(), answer);
    }
    let mut described = json!({ "operationId": operation.id, "summary": operation.summary, "responses": answers });
    if operation.is_open() {
        described["security"] = json!([]);
    }
    let parameters = parameters_of(operation, model);
    if !parameters.is_empty() {
        described["parameters"] = json!(parameters);
    }
    if let Some(body) = operation.body {
        let examples: Map<String, Value> = examples(body, model)
            .into_iter()
            .map(|(name, value)| (name.to_owned(), json!({ "value": value })))
            .collect();
        let media = json!({ "schema": component("schemas", body), "examples": examples });
        described["requestBody"] = json!({ "required": true, "content": { "application/json": media } });
    }
    described
}

/// A 200.
fn success(operation: &Operation) -> Value {
    let mut named: Vec<&str> = Vec::new();
    if operation.events.is_some() {
        named.extend(["x-lightcone-ignored", "x-lightcone-limited-by"]);
        named.extend(LIMITS);
    }
    if operation.is_admin() {
        named.push("cache-control");
    }
    let mut content = Map::new();
    let text = json!({ "schema": { "type": "string" } });
    match operation.answer {
        Answer::Json(name) => {
            content.insert("application/json".to_owned(), json!({ "schema": component("schemas", name) }));
        }
        Answer::Text => drop(content.insert("text/plain".to_owned(), text)),
        Answer::Html => drop(content.insert("text/html".to_owned(), text)),
        Answer::Nothing => {}
    }
    for kind in operation.also {
        content.insert((*kind).to_owned(), json!({ "schema": { "type": "string" } }));
    }
    if let Some(name) = operation.events {
        content.insert("text/event-stream".to_owned(), json!({ "schema": event(name) }));
    }
    let mut answer = json!({ "description": "As asked.", "headers": carried(&named) });
    if !content.is_empty() {
        answer["content"] = json!(content);
    }
    let kept = match operation.id {
        "createChatCompletion" => Some(("getChatCompletion", "Where `store` is true.")),
        "createResponse" => Some(("getResponse", "Where `store` is true.")),
        "adminCreateTenant" => Some(("adminGetTenant", "The tenant.")),
        "adminCreateKey" => Some(("adminGetKey", "The key, without its secret.")),
        _ => None,
    };
    if let Some((kept, about)) = kept {
        answer["links"] = json!({ "stored": {
            "operationId": kept, "parameters": { "id": "$response.body#/id" }, "description": about,
        } });
    }
    answer
}

/// One event of a stream. What stands for the whole stream would be its text.
fn event(name: &str) -> Value {
    json!({
        "type": "object", "required": ["data"],
        "description": "An event. Its data is JSON, at the end of a completion's stream `[DONE]`, or, where the answer \
            fails in mid-stream, an Error.",
        "properties": {
            "id": { "type": "string", "description": "Its number, where the request had an Idempotency-Key." },
            "event": { "type": "string", "description": "As `type` says, in the stream of a response." },
            "data": { "anyOf": [{ "const": "[DONE]" }, {
                "type": "string", "contentMediaType": "application/json",
                "contentSchema": { "anyOf": [component("schemas", name), component("schemas", "Error")] },
            }] },
        },
    })
}

// --- what is asked ----------------------------------------------------------------------------------

fn parameters() -> Value {
    let mut all = json!({
        "limit": {
            "name": "limit", "in": "query", "description": "How many on one page.",
            "schema": { "type": "integer", "minimum": 1, "maximum": 100, "default": 20 },
        },
        "after": {
            "name": "after", "in": "query", "description": "The id of the last one on the page before.",
            "schema": { "type": "string" },
        },
        "before": {
            "name": "before", "in": "query", "description": "The id of the last one on the page before, which is newer.",
            "schema": { "type": "string" },
        },
        "after-entry": {
            "name": "after", "in": "query", "description": "The number of the last entry on the page before.",
            "schema": { "type": "integer", "minimum": 0 },
        },
        "order": {
            "name": "order", "in": "query", "description": "The oldest first, or the newest.",
            "schema": { "type": "string", "enum": ["asc", "desc"], "default": "asc" },
        },
        "model": {
            "name": "model", "in": "query", "description": "Only completions of this model.",
            "schema": { "type": "string" },
        },
        "metadata": {
            "name": "metadata", "in": "query", "description": "Only completions with these: `metadata[key]=value`.",
            "style": "deepObject", "explode": true,
            "schema": { "type": "object" },
        },
        "idempotency-key": {
            "name": "Idempotency-Key", "in": "header",
            "description": "The same key and body again get the same answer, which is made and paid for once.",
            "schema": { "type": "string", "pattern": "^[!-~]([ -~]{0,253}[!-~])?$" },
        },
        "last-event-id": {
            "name": "Last-Event-ID", "in": "header",
            "description": "With the Idempotency-Key of a stream: its events behind this one.",
            "schema": { "type": "string", "pattern": "^[0-9]{0,9}$" },
        },
    });
    for (name, parameter) in reports::parameters() {
        all[name] = parameter;
    }
    all
}

fn parameters_of(operation: &Operation, model: &str) -> Vec<Value> {
    let mut parameters = Vec::new();
    if operation.path.contains("{id") {
        let example = match operation.id {
            "getModel" => model,
            "getResponse" | "deleteResponse" | "cancelResponse" => "resp_01a2084343c174828840b629153c69e0",
            "cancelCompletion" => "cmpl-01a2084343c174828840b629153c69e0",
            _ if operation.path.starts_with("/v1/admin/tenants/") => "ten_development",
            _ if operation.path.starts_with("/v1/admin/keys/") => "key_01a2084343c174828840b629153c69e0",
            _ => "chatcmpl-01a2084343c174828840b629153c69e0",
        };
        let schema = json!({ "type": "string", "minLength": 1 });
        parameters.push(json!({ "name": "id", "in": "path", "required": true, "schema": schema, "example": example }));
    }
    if operation.path.contains("{month}") {
        parameters.push(reports::month());
    }
    parameters.extend(operation.parameters.iter().map(|name| component("parameters", name)));
    if operation.events.is_some() {
        parameters.extend(["idempotency-key", "last-event-id"].map(|name| component("parameters", name)));
    }
    parameters
}

fn examples(body: &str, model: &str) -> Vec<(&'static str, Value)> {
    let asks = || json!([{ "role": "user", "content": "Say hello to the lighthouse keeper." }]);
    match body {
        "ChatRequest" => vec![
            ("plain", json!({ "model": model, "messages": asks(), "max_completion_tokens": 64 })),
            (
                "stream",
                json!({
                    "model": model, "messages": asks(), "max_completion_tokens": 64, "stream": true,
                    "stream_options": { "include_usage": true },
                }),
            ),
            (
                "tool",
                json!({
                    "model": model, "messages": asks(), "max_completion_tokens": 64, "stream": true, "tool_choice": "required",
                    "tools": [{ "type": "function", "function": {
                        "name": "greet", "description": "Greets somebody",
                        "parameters": { "type": "object", "properties": { "name": { "type": "string" } },
                            "required": ["name"], "additionalProperties": false },
                    } }],
                }),
            ),
        ],
        "CompletionsRequest" => {
            vec![("plain", json!({ "model": model, "prompt": "A lighthouse is", "max_tokens": 32 }))]
        }
        "ResponsesRequest" => vec![
            ("plain", json!({ "model": model, "input": "Say hello.", "max_output_tokens": 64 })),
            ("stream", json!({ "model": model, "input": asks(), "max_output_tokens": 64, "stream": true })),
        ],
        "TokenizeRequest" => vec![
            ("text", json!({ "model": model, "prompt": "A lighthouse" })),
            ("messages", json!({ "model": model, "messages": asks() })),
        ],
        "AdminTenantRequest" => {
            vec![("prepaid", json!({ "name": "Acme", "balance_nano_usd": 25_000_000_000_u64 }))]
        }
        "AdminTenantChanges" => vec![
            ("limits", json!({ "limits": { "requests_per_minute": 60, "spend_per_day": 5_000_000_000_u64 } })),
            ("resume", json!({ "status": "active" })),
        ],
        "AdminKeyRequest" => vec![("plain", json!({ "label": "laptop", "scopes": ["chat"], "models": [model] }))],
        "AdminKeyChanges" => vec![("relabel", json!({ "label": "desk", "limits": { "requests_at_once": 4 } }))],
        "AdminRotation" => vec![("an hour", json!({ "grace_seconds": 3600 }))],
        "AdminCreditRequest" => vec![
            ("grant", json!({ "kind": "grant", "amount_nano_usd": 1_000_000_000, "reference": "invoice-1" })),
            ("adjust", json!({ "kind": "adjust", "amount_nano_usd": -1, "reference": "correction-1" })),
        ],
        "AdminPriceListRequest" => {
            let price = json!({ "input_nano_usd": 200, "output_nano_usd": 300, "cached_input_nano_usd": 50 });
            vec![("now", json!({ "version": "2027-01", "prices": { model: price } }))]
        }
        _ => vec![("plain", json!({ "model": model, "tokens": [65, 66] }))],
    }
}

// --- what is answered -------------------------------------------------------------------------------

/// What is left of a key's limits.
const LIMITS: [&str; 6] = [
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
];

fn headers() -> Value {
    let header = |about: &str, schema: Value| json!({ "description": about, "schema": schema });
    let required = |about: &str, schema: Value| json!({ "description": about, "schema": schema, "required": true });
    let count = || json!({ "type": "integer", "minimum": 0 });
    let mut all = json!({
        "x-request-id": required("Names the request in our logs.", json!({ "type": "string", "pattern": "^req_[0-9a-f]{32}$" })),
        "openai-processing-ms": required("Until the answer began.", count()),
        "x-lightcone-ignored": header("Fields of the request that had no effect.", json!({ "type": "string" })),
        "x-lightcone-limited-by": header(
            "What there was not enough of for a longer answer; of answers that are no streams.",
            json!({ "enum": ["balance", "spend_limit"] }),
        ),
        "cache-control": required("Nobody on the way may keep it.", json!({ "const": "no-store" })),
        "x-should-retry": header("Whether sending the same again can help.", json!({ "enum": ["true", "false"] })),
        "retry-after": header("Seconds after which to try again.", json!({ "type": "integer", "minimum": 1 })),
        "retry-after-ms": header("The same in milliseconds.", json!({ "type": "integer", "minimum": 1 })),
        "www-authenticate": required("How to say who asks.", json!({ "const": "Bearer" })),
        "allow": required("Methods that this path has.", json!({ "type": "string" })),
    });
    for name in LIMITS {
        let about = if name.contains("-reset-") { "Until the limit is whole again." } else { "Of the key's limit." };
        let duration = json!({ "type": "string", "pattern": "^([0-9]+m)?[0-9.]+m?s$", "examples": ["6.25s"] });
        let schema = if name.contains("-reset-") { duration } else { count() };
        all[name] = header(about, schema);
    }
    all
}

/// The headers of one answer: those that every answer has, and these.
fn carried(names: &[&str]) -> Value {
    let all = ["x-request-id", "openai-processing-ms"].iter().chain(names);
    Value::Object(all.map(|name| ((*name).to_owned(), component("headers", name))).collect())
}

/// The name of an error's answer, when it comes, and what an error says then: type, code, param, message.
type Refusal = (&'static str, &'static str, [&'static str; 2], Option<&'static str>, &'static str);

fn refusal(status: u16) -> Refusal {
    const INVALID: &str = "invalid_request_error";
    match status {
        400 => (
            "BadRequest",
            "A field has a wrong shape or a value that is not served.",
            [INVALID, "out_of_range"],
            Some("temperature"),
            "Invalid 'temperature': expected a value from 0 to 2, but got 3.",
        ),
        401 => (
            "Unauthorized",
            "No key, or one that nobody knows.",
            ["authentication_error", "invalid_api_key"],
            None,
            "Incorrect API key provided.",
        ),
        402 => (
            "PaymentRequired",
            "The balance does not cover the longest answer that was asked for.",
            ["insufficient_quota", "insufficient_quota"],
            None,
            "Your balance does not cover this request.",
        ),
        403 => (
            "Forbidden",
            "The key may not do this.",
            ["permission_error", "permission_denied"],
            None,
            "This API key may not ask for completions.",
        ),
        404 => (
            "NotFound",
            "There is no such model or thing.",
            [INVALID, "model_not_found"],
            Some("model"),
            "The model `x` does not exist or you do not have access to it.",
        ),
        405 => (
            "MethodNotAllowed",
            "The path has other methods. Comes of every path.",
            [INVALID, "method_not_allowed"],
            None,
            "Not allowed to PUT on /v1/models.",
        ),
        409 => (
            "Conflict",
            "It goes against what is there: a reference that was used for something else, a key that is revoked, money \
                that is not there.",
            [INVALID, "reference_reused"],
            Some("reference"),
            "`invoice-1` stands for something else already.",
        ),
        408 => (
            "RequestTimeout",
            "The body did not arrive in time.",
            [INVALID, "request_timeout"],
            None,
            "The request body did not arrive within 10000 ms.",
        ),
        413 => (
            "ContentTooLarge",
            "The body is too large.",
            [INVALID, "request_too_large"],
            None,
            "The request body is larger than 4194304 bytes.",
        ),
        415 => (
            "UnsupportedMediaType",
            "The body is not JSON, or is compressed.",
            [INVALID, "unsupported_media_type"],
            None,
            "Unsupported content type `text/plain`: send `application/json`.",
        ),
        422 => (
            "UnprocessableContent",
            "The Idempotency-Key was used for another request.",
            [INVALID, "idempotency_key_reused"],
            Some("Idempotency-Key"),
            "This Idempotency-Key was used for another request. Use a new key for every request.",
        ),
        429 => (
            "TooManyRequests",
            "Too much at once: of this key, or of everybody; or too many wrong keys from this address.",
            ["rate_limit_error", "overloaded"],
            None,
            "Too many requests wait for this model. Try again shortly.",
        ),
        500 => (
            "ServerError",
            "Our fault, and never charged.",
            ["server_error", "server_error"],
            None,
            "The server had an error while processing your request. Nothing was charged.",
        ),
        _ => (
            "ServiceUnavailable",
            "Not now: no worker, no store, or shutting down.",
            ["service_unavailable", "service_unavailable"],
            None,
            "This node is shutting down. Try again.",
        ),
    }
}

const REFUSALS: [u16; 14] = [400, 401, 402, 403, 404, 405, 408, 409, 413, 415, 422, 429, 500, 503];

fn responses() -> Map<String, Value> {
    let described = |status| {
        let (name, about, [kind, code], param, message) = refusal(status);
        let mut named: Vec<&str> = match status {
            401 => vec!["www-authenticate"],
            402 | 409 => vec!["x-should-retry"],
            405 => vec!["allow"],
            429 | 503 => vec!["retry-after", "retry-after-ms", "x-should-retry"],
            _ => Vec::new(),
        };
        if status == 429 {
            named.extend(LIMITS);
        }
        let error = json!({ "error": { "message": message, "type": kind, "param": param, "code": code } });
        let answer = json!({ "description": about, "headers": carried(&named), "content": {
            "application/json": { "schema": component("schemas", "Error"), "example": error },
            "application/problem+json": { "schema": component("schemas", "Problem") },
        } });
        (name.to_owned(), answer)
    };
    REFUSALS.into_iter().map(described).collect()
}
