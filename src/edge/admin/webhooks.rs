use actix_web::{HttpResponse, web};
use serde_json::json;

use super::{Desk, Few, Sorted, answer, bodies, faults};
use crate::{
    domain::TenantId,
    edge::error::ApiError,
    webhooks::{DeadLetter, EndpointChange},
};

pub async fn get_webhook(desk: Desk, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let endpoint = desk.accounts.webhooks().one(&id.as_str().into()).await;
    let endpoint = endpoint.map_err(|error| faults::of_look(error.into()))?;
    Ok(answer(&Sorted { object: "webhook", thing: endpoint }))
}

pub async fn set_webhook(desk: Desk, payload: web::Payload, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let body = desk.body(payload).await?;
    let wish = bodies::webhook(&body.fields(), desk.state.private_webhooks)?;
    let (accounts, tenant) = (desk.accounts.clone(), TenantId::from(id.as_str()));
    let change: EndpointChange = desk.change(async move { accounts.set_webhook(&tenant, &wish).await }).await?;
    Ok(answer(&Sorted { object: "webhook", thing: change }))
}

pub async fn remove_webhook(desk: Desk, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let (accounts, tenant) = (desk.accounts.clone(), TenantId::from(id.as_str()));
    let removing = async move { accounts.remove_webhook(&tenant).await };
    desk.change(removing).await?;
    Ok(answer(&json!({ "object": "webhook.removed", "tenant": id.as_str() })))
}

pub async fn list_dead_letters(desk: Desk, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let letters = desk.accounts.webhooks().dead_letters(&id.as_str().into()).await;
    let letters: Vec<DeadLetter> = letters.map_err(|error| faults::of_look(error.into()))?;
    Ok(answer(&Few::of(letters, "webhook.dead_letter")))
}

pub async fn retry_dead_letters(
    desk: Desk,
    payload: web::Payload,
    id: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let body = desk.body(payload).await?;
    let event = bodies::dead_letters(&body.fields())?;
    let (accounts, tenant) = (desk.accounts.clone(), TenantId::from(id.as_str()));
    let count = desk.change(async move { accounts.retry_dead_letters(&tenant, event.as_deref()).await }).await?;
    Ok(answer(&json!({ "object": "webhook.retried", "tenant": id.as_str(), "retried": count })))
}
