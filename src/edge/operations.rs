//! Every path that is served: what answers there, and what may come of it. The server binds this table and
//! `/openapi.json` describes it, so that neither has a path that the other lacks.

use std::collections::BTreeSet;

use actix_web::{
    HttpRequest, HttpResponse, Resource, ResponseError, Route, http,
    web::{self, ServiceConfig},
};

use super::{
    account, admin, cancel,
    dialect::{chat::Chat, completions::Completions, responses::Responses},
    endpoint,
    error::ApiError,
    models, openapi, status, stored, tokens,
};

/// One way to ask something.
pub struct Operation {
    /// As the server matches it. Whatever is under `/v1` is served without it as well.
    pub path: &'static str,
    pub method: Method,
    /// Its name in generated clients.
    pub id: &'static str,
    pub summary: &'static str,
    handler: fn(Route) -> Route,
    /// The schema of its body, by its name among the components.
    pub body: Option<&'static str>,
    pub answer: Answer,
    /// The schema of the data of its events, where the answer may be a stream.
    pub events: Option<&'static str>,
    /// Media types of a 200 that may be asked for instead.
    pub also: &'static [&'static str],
    /// What its query may have, by their names among the components.
    pub parameters: &'static [&'static str],
    /// Statuses other than 200.
    pub refusals: &'static [u16],
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    Get,
    Head,
    Post,
    Delete,
}

/// What a 200 has as its body.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// JSON of a schema, by its name among the components.
    Json(&'static str),
    Text,
    Html,
    Nothing,
}

use Answer::{Html, Json, Nothing, Text};
use Method::{Delete, Get, Head, Post};

const GENERATES: &[u16] = &[400, 401, 402, 403, 404, 408, 413, 415, 422, 429, 500, 503];
const COUNTS: &[u16] = &[400, 401, 403, 404, 408, 413, 415, 429, 500, 503];
pub const FINDS: &[u16] = &[401, 403, 404, 429, 500, 503];
pub const LISTS: &[u16] = &[400, 401, 403, 429, 500, 503];
pub const SHOWS: &[u16] = &[401, 429, 500, 503];
const SHOWS_ONE: &[u16] = &[401, 404, 429, 500, 503];

/// All of them, in the order in which documents list them.
pub fn all() -> impl Iterator<Item = &'static Operation> + Clone {
    [OPERATIONS, account::OPERATIONS, admin::OPERATIONS, OF_THE_NODE].into_iter().flatten()
}

const OPERATIONS: &[Operation] = &[
    Operation::new(Post, "/v1/chat/completions", "createChatCompletion", "Answer a conversation", |route| {
        route.to(endpoint::create::<Chat>)
    })
    .body("ChatRequest")
    .answer(Json("ChatCompletion"))
    .events("ChatCompletionChunk")
    .refusals(GENERATES),
    Operation::new(Get, "/v1/chat/completions", "listChatCompletions", "List stored completions", |route| {
        route.to(stored::list_chat)
    })
    .answer(Json("ChatCompletionList"))
    .parameters(&["limit", "after", "order", "model", "metadata"])
    .refusals(LISTS),
    Operation::new(Get, "/v1/chat/completions/{id}", "getChatCompletion", "A stored completion", |route| {
        route.to(stored::get_chat)
    })
    .answer(Json("StoredChatCompletion"))
    .refusals(FINDS),
    Operation::new(
        Delete,
        "/v1/chat/completions/{id}",
        "deleteChatCompletion",
        "Delete a stored completion",
        |route| route.to(stored::delete_chat),
    )
    .answer(Json("Deleted"))
    .refusals(FINDS),
    Operation::new(
        Post,
        "/v1/chat/completions/{id}/cancel",
        "cancelChatCompletion",
        "End a chat completion before its time",
        |route| route.to(cancel::cancel),
    )
    .answer(Json("Cancellation"))
    .refusals(FINDS),
    Operation::new(Post, "/v1/responses", "createResponse", "Answer items with items", |route| {
        route.to(endpoint::create::<Responses>)
    })
    .body("ResponsesRequest")
    .answer(Json("Response"))
    .events("ResponseEvent")
    .refusals(GENERATES),
    Operation::new(Get, "/v1/responses/{id}", "getResponse", "A stored response", |route| {
        route.to(stored::get_response)
    })
    .answer(Json("Response"))
    .refusals(FINDS),
    Operation::new(Delete, "/v1/responses/{id}", "deleteResponse", "Delete a stored response", |route| {
        route.to(stored::delete_response)
    })
    .answer(Json("Deleted"))
    .refusals(FINDS),
    Operation::new(Post, "/v1/responses/{id}/cancel", "cancelResponse", "End a response before its time", |route| {
        route.to(cancel::cancel)
    })
    .answer(Json("Cancellation"))
    .refusals(FINDS),
    Operation::new(Post, "/v1/completions", "createCompletion", "Continue a text", |route| {
        route.to(endpoint::create::<Completions>)
    })
    .body("CompletionsRequest")
    .answer(Json("Completion"))
    .events("CompletionChunk")
    .refusals(GENERATES),
    Operation::new(
        Post,
        "/v1/completions/{id}/cancel",
        "cancelCompletion",
        "End a completion before its time",
        |route| route.to(cancel::cancel),
    )
    .answer(Json("Cancellation"))
    .refusals(FINDS),
    Operation::new(Post, "/v1/tokenize", "tokenize", "The tokens of a text, free of charge", |route| {
        route.to(tokens::tokenize)
    })
    .body("TokenizeRequest")
    .answer(Json("Tokens"))
    .refusals(COUNTS),
    Operation::new(Post, "/v1/detokenize", "detokenize", "The text of tokens, free of charge", |route| {
        route.to(tokens::detokenize)
    })
    .body("DetokenizeRequest")
    .answer(Json("Text"))
    .refusals(COUNTS),
    Operation::new(Get, "/v1/models", "listModels", "The models that are served", |route| route.to(models::list))
        .answer(Json("ModelList"))
        .refusals(SHOWS),
    // Names of models may contain slashes.
    Operation::new(Get, "/v1/models/{id:.+}", "getModel", "One model", |route| route.to(models::one))
        .answer(Json("Model"))
        .refusals(SHOWS_ONE),
];

const OF_THE_NODE: &[Operation] = &[
    Operation::new(Get, "/healthz", "healthz", "Whether the process answers", |route| route.to(status::healthz))
        .answer(Json("Health")),
    Operation::new(Head, "/healthz", "healthzHead", "The same without a body", |route| route.to(status::healthz)),
    Operation::new(Get, "/readyz", "readyz", "Whether a request sent now would be served", |route| {
        route.to(status::readyz)
    })
    .answer(Json("Readiness"))
    .refusals(&[503]),
    Operation::new(Head, "/readyz", "readyzHead", "The same without a body", |route| route.to(status::readyz))
        .refusals(&[503]),
    Operation::new(Get, "/metrics", "metrics", "What the node has done, for Prometheus", |route| {
        route.to(status::metrics)
    })
    .answer(Text),
    Operation::new(Head, "/metrics", "metricsHead", "The same without a body", |route| route.to(status::metrics)),
    Operation::new(Get, "/openapi.json", "openapi", "This document", |route| route.to(openapi::json))
        .answer(Json("Document")),
    Operation::new(Get, "/docs", "docs", "This document, to be read in a browser", |route| route.to(openapi::page))
        .answer(Html),
];

impl Operation {
    pub const fn new(
        method: Method,
        path: &'static str,
        id: &'static str,
        summary: &'static str,
        handler: fn(Route) -> Route,
    ) -> Self {
        Self {
            path,
            method,
            id,
            summary,
            handler,
            body: None,
            answer: Nothing,
            events: None,
            also: &[],
            parameters: &[],
            refusals: &[],
        }
    }

    pub const fn body(self, name: &'static str) -> Self {
        Self { body: Some(name), ..self }
    }

    pub const fn answer(self, answer: Answer) -> Self {
        Self { answer, ..self }
    }

    pub const fn events(self, name: &'static str) -> Self {
        Self { events: Some(name), ..self }
    }

    pub const fn also(self, kinds: &'static [&'static str]) -> Self {
        Self { also: kinds, ..self }
    }

    pub const fn parameters(self, names: &'static [&'static str]) -> Self {
        Self { parameters: names, ..self }
    }

    pub const fn refusals(self, refusals: &'static [u16]) -> Self {
        Self { refusals, ..self }
    }

    /// The path as documents write it.
    pub fn documented_path(&self) -> String {
        self.path.replace(":.+}", "}")
    }

    pub fn is_admin(&self) -> bool {
        self.path.starts_with("/v1/admin/")
    }

    /// Whether anybody may ask, without a key.
    pub fn is_open(&self) -> bool {
        !self.refusals.contains(&401)
    }
}

impl Method {
    pub fn as_str(self) -> &'static str {
        match self {
            Get => "GET",
            Head => "HEAD",
            Post => "POST",
            Delete => "DELETE",
        }
    }

    fn as_http(self) -> http::Method {
        match self {
            Get => http::Method::GET,
            Head => http::Method::HEAD,
            Post => http::Method::POST,
            Delete => http::Method::DELETE,
        }
    }
}

/// What may be done with a path.
pub fn allowed(path: &str) -> String {
    let here = all().filter(|operation| operation.path == path);
    let methods: BTreeSet<Method> = here.map(|operation| operation.method).collect();
    methods.into_iter().map(Method::as_str).collect::<Vec<_>>().join(", ")
}

/// Binds every path, with and without the version: the base URL of a client may or may not end in it.
pub fn bind(app: &mut ServiceConfig) {
    let mut bound: Vec<&str> = Vec::new();
    for Operation { path, .. } in all() {
        if bound.contains(path) {
            continue;
        }
        bound.push(path);
        app.service(resource(path, path));
        if let Some(bare) = path.strip_prefix("/v1") {
            app.service(resource(bare, path));
        }
    }
}

fn resource(at: &str, path: &'static str) -> Resource {
    let here = all().filter(|operation| operation.path == path);
    let routes = here.map(|operation| (operation.handler)(web::method(operation.method.as_http())));
    let allow = allowed(path);
    let refused = move |http: HttpRequest| {
        let error = ApiError::method_not_allowed(http.method().as_str(), http.path(), &*allow);
        async move { error.error_response() as HttpResponse }
    };
    routes.fold(web::resource(at), Resource::route).default_service(web::to(refused))
}
