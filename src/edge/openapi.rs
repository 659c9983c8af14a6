//! `/openapi.json`, made of the same tables and types that read requests and write answers, and `/docs`, a page that
//! shows it.

use std::{fmt::Write, sync::OnceLock};

use actix_web::{HttpResponse, http::header};
use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{
    dialect::openai::Completion,
    error::Envelope,
    models,
    wire::{
        fields::{self, Table},
        schema,
    },
};

/// One way to ask something.
struct Operation {
    path: &'static str,
    method: &'static str,
    summary: &'static str,
    /// The name of its body's schema, among the components.
    body: Option<&'static str>,
    /// The same of its answer.
    answer: Option<&'static str>,
    streams: bool,
    is_open: bool,
}

impl Operation {
    const fn new(path: &'static str, method: &'static str, summary: &'static str) -> Self {
        Self { path, method, summary, body: None, answer: None, streams: false, is_open: false }
    }

    const fn body(self, name: &'static str) -> Self {
        Self { body: Some(name), ..self }
    }

    const fn answer(self, name: &'static str) -> Self {
        Self { answer: Some(name), ..self }
    }

    const fn streams(self) -> Self {
        Self { streams: true, ..self }
    }

    const fn open(self) -> Self {
        Self { is_open: true, ..self }
    }
}

const OPERATIONS: &[Operation] = &[
    Operation::new("/v1/chat/completions", "post", "Answer a conversation")
        .body("ChatRequest")
        .answer("ChatCompletion")
        .streams(),
    Operation::new("/v1/chat/completions", "get", "List stored completions"),
    Operation::new("/v1/chat/completions/{id}", "get", "A stored completion").answer("ChatCompletion"),
    Operation::new("/v1/chat/completions/{id}", "delete", "Delete a stored completion"),
    Operation::new("/v1/chat/completions/{id}/cancel", "post", "End an answer before its time"),
    Operation::new("/v1/responses", "post", "Answer items with items").body("ResponsesRequest").streams(),
    Operation::new("/v1/responses/{id}", "get", "A stored response"),
    Operation::new("/v1/responses/{id}", "delete", "Delete a stored response"),
    Operation::new("/v1/responses/{id}/cancel", "post", "End a response before its time"),
    Operation::new("/v1/completions", "post", "Continue a text").body("CompletionsRequest").streams(),
    Operation::new("/v1/completions/{id}/cancel", "post", "End a completion before its time"),
    Operation::new("/v1/tokenize", "post", "The tokens of a text, free of charge").body("TokenizeRequest"),
    Operation::new("/v1/detokenize", "post", "The text of tokens, free of charge").body("DetokenizeRequest"),
    Operation::new("/v1/models", "get", "The models that are served").answer("ModelList"),
    Operation::new("/v1/models/{id}", "get", "One model").answer("Model"),
    Operation::new("/healthz", "get", "Whether the process answers").open(),
    Operation::new("/readyz", "get", "Whether a request sent now would be served").open(),
];

const BODIES: &[(&str, Table, &[&str], bool)] = &[
    ("ChatRequest", fields::CHAT, &["messages"], false),
    ("CompletionsRequest", fields::COMPLETIONS, &["prompt"], false),
    ("ResponsesRequest", fields::RESPONSES, &["input"], true),
    ("TokenizeRequest", fields::TOKENIZE, &[], false),
    ("DetokenizeRequest", fields::DETOKENIZE, &["tokens"], false),
];

fn document() -> Value {
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = described(operation);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Lightcone",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Chat completions by OpenAI's contract. Every path under /v1 is served without /v1 as well.",
        },
        "components": {
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer", "description": "sk_…" } },
            "schemas": components(),
        },
        "security": [{ "key": [] }],
        "paths": paths,
    })
}

fn described(operation: &Operation) -> Value {
    let reference = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    let mut content = Map::new();
    let answer = operation.answer.map_or(json!({ "type": "object" }), reference);
    content.insert("application/json".to_owned(), json!({ "schema": answer }));
    if operation.streams {
        content.insert("text/event-stream".to_owned(), json!({ "schema": { "type": "string" } }));
    }
    let mut answers = Map::new();
    answers.insert("200".to_owned(), json!({ "description": "As asked", "content": content }));
    let failed = json!({
        "description": "An error object",
        "content": { "application/json": { "schema": reference("Error") } },
    });
    let mut statuses = vec!["503"];
    if !operation.is_open {
        statuses.extend(["400", "401", "403", "404", "429", "500"]);
    }
    if operation.body.is_some() {
        statuses.extend(["402", "408", "413", "415", "422"]);
    }
    statuses.sort_unstable();
    if operation.is_open {
        answers.insert("503".to_owned(), json!({ "description": "Not now" }));
    } else {
        answers.extend(statuses.into_iter().map(|status| (status.to_owned(), failed.clone())));
    }
    let mut described = json!({ "summary": operation.summary, "responses": answers });
    if operation.is_open {
        described["security"] = json!([]);
    }
    let mut parameters = Vec::new();
    if operation.path.contains("{id}") {
        let schema = json!({ "type": "string", "pattern": "^[A-Za-z0-9_.-]+$", "minLength": 1 });
        parameters.push(json!({ "name": "id", "in": "path", "required": true, "schema": schema }));
    }
    if operation.path == "/v1/chat/completions" && operation.method == "get" {
        parameters.push(json!({ "name": "after", "in": "query", "schema": { "type": "string" } }));
        let limit = json!({ "type": "integer", "minimum": 1, "maximum": 100 });
        parameters.push(json!({ "name": "limit", "in": "query", "schema": limit }));
    }
    if !parameters.is_empty() {
        described["parameters"] = json!(parameters);
    }
    if let Some(body) = operation.body {
        described["requestBody"] =
            json!({ "required": true, "content": { "application/json": { "schema": reference(body) } } });
    }
    described
}

fn components() -> Map<String, Value> {
    let mut all: Map<String, Value> = BODIES
        .iter()
        .map(|(name, table, required, of_responses)| ((*name).to_owned(), schema::body(table, required, *of_responses)))
        .collect();
    all.extend(schema::shared().into_iter().map(|(name, schema)| (name.to_owned(), schema)));
    answer::<Completion>("ChatCompletion", &mut all);
    answer::<models::List>("ModelList", &mut all);
    answer::<models::Model>("Model", &mut all);
    answer::<Envelope>("Error", &mut all);
    all
}

/// The schema of an answer's type, with the types that it is made of in line.
fn answer<T: JsonSchema>(name: &str, all: &mut Map<String, Value>) {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    all.insert(name.to_owned(), settings.for_serialize().into_generator().into_root_schema_for::<T>().to_value());
}

pub async fn json() -> HttpResponse {
    static DOCUMENT: OnceLock<String> = OnceLock::new();
    let text = DOCUMENT.get_or_init(|| document().to_string());
    HttpResponse::Ok().content_type("application/json").body(text.as_str())
}

pub async fn page() -> HttpResponse {
    static PAGE: OnceLock<String> = OnceLock::new();
    let page = PAGE.get_or_init(|| render(&document()));
    HttpResponse::Ok()
        .content_type("text/html; charset=utf-8")
        .insert_header((header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'"))
        .body(page.as_str())
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}\
    h2{margin:2.5rem 0 .3rem;font-size:1.1rem}code{font:13px ui-monospace,monospace}\
    .m{display:inline-block;min-width:4.5em;font-weight:700;text-transform:uppercase}\
    table{border-collapse:collapse;width:100%;margin:.5rem 0}td{border-top:1px solid #ddd;padding:.25rem .5rem;\
    vertical-align:top}td:first-child{white-space:nowrap}pre{white-space:pre-wrap;margin:0}";

/// A page without scripts: every operation, and the fields of its body.
fn render(document: &Value) -> String {
    let mut page = String::new();
    let title = escaped(document["info"]["title"].as_str().unwrap_or_default());
    let about = escaped(document["info"]["description"].as_str().unwrap_or_default());
    let _ = write!(
        page,
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p>{about} Machine-readable: \
         <a href=/openapi.json>/openapi.json</a>.</p>"
    );
    for operation in OPERATIONS {
        let (method, path, summary) = (operation.method, escaped(operation.path), escaped(operation.summary));
        let _ = write!(page, "<h2><span class=m>{method}</span> <code>{path}</code></h2><p>{summary}.</p>");
        let Some(body) = operation.body else { continue };
        let schema = &document["components"]["schemas"][body];
        page.push_str("<table>");
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let required = schema["required"].as_array().is_some_and(|all| all.iter().any(|other| other == name));
            let mark = if required { " *" } else { "" };
            let text = escaped(&field.to_string());
            let _ = write!(page, "<tr><td><code>{}{mark}</code><td><pre><code>{text}</code></pre>", escaped(name));
        }
        page.push_str("</table>");
    }
    page.push_str("</html>");
    page
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
