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

/// How often, and after which pause, a store that is away is asked again.
const WITHDRAW_ATTEMPTS: usize = 5;
const WITHDRAW_PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

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
    let bare = ["chatcmpl-", "cmpl-", "resp_"].iter().find_map(|prefix| id.strip_prefix(prefix)).unwrap_or(&id);
    // What a client calls its request may begin like one of ours.
    let found = [id.as_str(), bare].iter().find_map(|name| state.find_open(&principal.tenant, name));
    let is_found = match found {
        Some((request, model)) => {
            let (state_, tenant) = (Arc::clone(&state), principal.tenant.clone());
            // In a task of its own: who asks may hang up in the middle.
            let ending = async move { here(&state_, &tenant, &model, &request).await };
            let _ = state.tasks.spawn_on(ending, &state.runtime).await;
            true
        }
        None => {
            let own = state.records.named(&principal.tenant, bare).await.map_err(store_failed)?;
            let request = own.unwrap_or_else(|| RequestId::from(format!("chatcmpl-{bare}")));
            elsewhere(&state, &principal.tenant, &request).await?
        }
    };
    if !is_found {
        return Err(ApiError::not_found("completion in progress", &id));
    }
    Ok(HttpResponse::Ok().json(Cancellation { id: &id, object: "cancellation", status: "cancelling" }))
}

/// A request whose client this edge has. The stream ends with what was used.
async fn here(state: &Arc<EdgeState>, tenant: &TenantId, model: &ModelId, request: &RequestId) {
    state.mark_cancelled(request);
    let mut is_unsure = false;
    for _ in 0..WITHDRAW_ATTEMPTS {
        let is_withdrawn = match state.queue.withdraw(model, tenant, request).await {
            Ok(is_withdrawn) => is_withdrawn,
            Err(error) => {
                tracing::warn!(%error, %request, "a cancelled request was not looked for in the queue");
                is_unsure = true;
                tokio::time::sleep(WITHDRAW_PAUSE).await;
                continue;
            }
        };
        // An earlier attempt may have withdrawn it, and its answer was lost: then there is no such job any more.
        let is_gone = is_unsure && matches!(state.queue.find(model, request).await, Ok(None));
        if is_withdrawn || is_gone {
            state.release_later(tenant.clone(), request.clone(), ReleaseReason::Withdrawn);
            state.hub.withdrawn(request);
            return;
        }
        break;
    }
    // A worker has it, or the store is away.
    state.hub.cancel(request);
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
