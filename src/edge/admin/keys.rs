use actix_web::{HttpResponse, web};

use super::{Desk, List, Sorted, Wanted, answer, bodies, faults};
use crate::{
    domain::{KeyId, TenantId},
    edge::error::ApiError,
};

pub async fn list_keys(desk: Desk, tenant: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let wanted = Wanted::read(&desk.http)?;
    let after = wanted.after.as_deref().map(KeyId::from);
    let tenant = TenantId::from(tenant.as_str());
    let page = desk.accounts.keys_after(&tenant, after.as_ref(), wanted.limit).await.map_err(faults::of_look)?;
    Ok(answer(&List::of(page, "key", |key| key.id.to_string())))
}

/// The answer is the only one that ever has the key's secret.
pub async fn create_key(
    desk: Desk,
    payload: web::Payload,
    tenant: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let body = desk.body(payload).await?;
    let wish = bodies::key(&body.fields())?;
    let (accounts, tenant) = (desk.accounts.clone(), TenantId::from(tenant.as_str()));
    let key = desk.change(async move { accounts.create_key_like(&tenant, wish).await }).await?;
    Ok(answer(&Sorted::key(key)))
}

pub async fn get_key(desk: Desk, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    Ok(answer(&Sorted::key(desk.accounts.key(&id.as_str().into()).await.map_err(faults::of_look)?)))
}

pub async fn change_key(desk: Desk, payload: web::Payload, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let body = desk.body(payload).await?;
    let changes = bodies::key_changes(&body.fields())?;
    let (accounts, id) = (desk.accounts.clone(), KeyId::from(id.as_str()));
    let key = desk.change(async move { accounts.change_key(&id, &changes).await }).await?;
    Ok(answer(&Sorted::key(key)))
}

/// The answer is the only one that ever has the new secret.
pub async fn rotate_key(desk: Desk, payload: web::Payload, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let body = desk.body(payload).await?;
    let grace = bodies::grace(&body.fields())?;
    let (accounts, id) = (desk.accounts.clone(), KeyId::from(id.as_str()));
    let key = desk.change(async move { accounts.rotate_key(&id, grace).await }).await?;
    Ok(answer(&Sorted::key(key)))
}

/// What is revoked stays on the list.
pub async fn revoke_key(desk: Desk, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let (accounts, id) = (desk.accounts.clone(), KeyId::from(id.as_str()));
    let key = desk.change(async move { accounts.revoke_key(&id).await }).await?;
    Ok(answer(&Sorted::key(key)))
}
