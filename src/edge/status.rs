//! For those who run the node: is it alive, is it ready, what has it done.

use actix_web::{HttpResponse, http::header, web};
use schemars::JsonSchema;
use serde::Serialize;

use super::state::EdgeState;
use crate::telemetry::Metrics;

#[derive(JsonSchema, Serialize)]
pub(super) struct Health {
    #[schemars(extend("const" = "ok"))]
    status: &'static str,
}

#[derive(JsonSchema, Serialize)]
pub(super) struct Readiness {
    #[schemars(extend("enum" = ["ready", "not ready"]))]
    status: &'static str,
    /// Why not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<String>,
}

/// The process answers.
pub(super) async fn healthz() -> HttpResponse {
    HttpResponse::Ok().json(Health { status: "ok" })
}

/// A request sent now would be served.
pub(super) async fn readyz(state: web::Data<EdgeState>) -> HttpResponse {
    let mut reasons = Vec::new();
    if state.is_draining() {
        reasons.push("draining".to_owned());
    }
    if !state.pool.is_alive() {
        reasons.push("no prompt pool".to_owned());
    }
    reasons.extend((state.readiness)().await);
    readiness(reasons)
}

/// Ready where there is no reason why not.
pub(super) fn readiness(reasons: Vec<String>) -> HttpResponse {
    if reasons.is_empty() {
        return HttpResponse::Ok().json(Readiness { status: "ready", reasons });
    }
    HttpResponse::ServiceUnavailable()
        .insert_header((header::RETRY_AFTER, "1"))
        .json(Readiness { status: "not ready", reasons })
}

pub(super) async fn metrics(state: web::Data<EdgeState>) -> HttpResponse {
    rendered(&state.metrics)
}

pub(super) fn rendered(metrics: &Metrics) -> HttpResponse {
    HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(metrics.render())
}
