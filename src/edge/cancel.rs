//! Ending an answer before its time: `POST /v1/chat/completions/{id}/cancel`, whichever edge has its client.

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;

use super::{auth::authenticate, error::ApiError, state::EdgeState, stored::store_failed};
use crate::{
    admission::Scope,
    domain::{ModelId, RequestId, TenantId},
    ledger::ReleaseReason,
};

#[derive(JsonSchema, Serialize)]
pub struct Cancellation<'a> {
    id: &'a str,
    #[schemars(extend("const" = "cancellation"))]
    object: &'static str,
    #[schemars(extend("const" = "cancelling"))]
    status: &'static str,
}

/// Of a chat completion, a completion or a response: what distinguishes them is in front of what names them.
pub async fn cancel(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let state = state.into_inner();
    let principal = authenticate(&http, &state).await?;
    if !principal.may(Scope::Chat) {
        return Err(ApiError::permission_denied("This API key may not cancel completions."));
    }
    let name = ["chatcmpl-", "cmpl-", "resp_"].iter().find_map(|prefix| id.strip_prefix(prefix)).unwrap_or(&id);
    let is_found = match state.find_open(&principal.tenant, name) {
        Some((request, model)) => {
            here(&state, &principal.tenant, &model, &request).await;
            true
        }
        None => elsewhere(&state, &principal.tenant, &RequestId::from(format!("chatcmpl-{name}"))).await?,
    };
    if !is_found {
        return Err(ApiError::not_found("completion in progress", &id));
    }
    Ok(HttpResponse::Ok().json(Cancellation { id: &id, object: "cancellation", status: "cancelling" }))
}

/// A request whose client this edge has. The stream ends with what was used.
async fn here(state: &Arc<EdgeState>, tenant: &TenantId, model: &ModelId, request: &RequestId) {
    state.mark_cancelled(request);
    match state.queue.withdraw(model, tenant, request).await {
        Ok(true) => {
            state.release_later(tenant.clone(), request.clone(), ReleaseReason::Withdrawn);
            state.hub.withdrawn(request);
        }
        // A worker has it.
        Ok(false) => drop(state.hub.cancel(request)),
        Err(error) => {
            tracing::warn!(%error, %request, "a cancelled request was not looked for in the queue");
            state.hub.cancel(request);
        }
    }
}

async fn elsewhere(state: &EdgeState, tenant: &TenantId, request: &RequestId) -> Result<bool, ApiError> {
    for model in state.models.keys() {
        let job = state.queue.find(model, request).await.map_err(store_failed)?;
        if let Some(job) = job.filter(|job| job.tenant == *tenant) {
            state.queue.ask_to_cancel(&job.reply_to.node, request).await.map_err(store_failed)?;
            return Ok(true);
        }
    }
    Ok(false)
}

/// Does what other edges ask for, for as long as somebody polls it.
pub async fn obey(state: Arc<EdgeState>) {
    let mut notices = state.queue.cancellation_notices(state.hub.node());
    loop {
        notices.changed().await;
        loop {
            let requests = match state.queue.cancellations(state.hub.node()).await {
                Ok(requests) if requests.is_empty() => break,
                Ok(requests) => requests,
                Err(error) => {
                    tracing::warn!(%error, "cancellations were not read");
                    break;
                }
            };
            for request in requests {
                if let Some((tenant, model)) = state.open_of(&request) {
                    here(&state, &tenant, &model, &request).await;
                }
            }
        }
    }
}
