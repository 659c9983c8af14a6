use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::json;

use super::{Desk, Sorted, answer, bodies, faults};
use crate::{
    domain::TenantId,
    edge::{error::ApiError, state::EdgeState},
    webhooks::{DeadLetter, EndpointChange},
};

pub async fn get_webhook(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let desk = Desk::open(&http, state).await?;
    let endpoint = desk.accounts.webhooks().one(&id.as_str().into()).await;
    let endpoint = endpoint.map_err(|error| faults::of_look(error.into()))?;
    Ok(answer(&Sorted { object: "webhook", thing: endpoint }))
}

pub async fn set_webhook(
    http: HttpRequest,
    payload: web::Payload,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let desk = Desk::open(&http, state).await?;
    let body = desk.body(&http, payload).await?;
    let wish = bodies::webhook(&body.fields(), desk.state.private_webhooks)?;
    let (accounts, tenant) = (desk.accounts.clone(), TenantId::from(id.as_str()));
    let change: EndpointChange = desk.change(async move { accounts.set_webhook(&tenant, &wish).await }).await?;
    Ok(answer(&Sorted { object: "webhook", thing: change }))
}

pub async fn remove_webhook(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let desk = Desk::open(&http, state).await?;
    let (accounts, tenant) = (desk.accounts.clone(), TenantId::from(id.as_str()));
    let removing = async move { accounts.remove_webhook(&tenant).await };
    desk.change(removing).await?;
    Ok(answer(&json!({ "object": "webhook.removed", "tenant": id.as_str() })))
}

pub async fn list_dead_letters(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let desk = Desk::open(&http, state).await?;
    let letters = desk.accounts.webhooks().dead_letters(&id.as_str().into()).await;
    let letters: Vec<DeadLetter> = letters.map_err(|error| faults::of_look(error.into()))?;
    let data: Vec<_> = letters.into_iter().map(|thing| Sorted { object: "webhook.dead_letter", thing }).collect();
    Ok(answer(&json!({ "object": "list", "data": data })))
}

pub async fn retry_dead_letters(
    http: HttpRequest,
    payload: web::Payload,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let desk = Desk::open(&http, state).await?;
    let body = desk.body(&http, payload).await?;
    let event = bodies::dead_letters(&body.fields())?;
    let (accounts, tenant) = (desk.accounts.clone(), TenantId::from(id.as_str()));
    let count = desk.change(async move { accounts.retry_dead_letters(&tenant, event.as_deref()).await }).await?;
    Ok(answer(&json!({ "object": "webhook.retried", "tenant": id.as_str(), "retried": count })))
}
