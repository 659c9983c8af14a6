use actix_web::{HttpResponse, web};

use super::{Desk, List, Sorted, Wanted, answer, bodies, faults};
use crate::{domain::TenantId, edge::error::ApiError, operator::TenantStatus};

pub async fn list_tenants(desk: Desk) -> Result<HttpResponse, ApiError> {
    let wanted = Wanted::read(&desk.http)?;
    let after = wanted.after.as_deref().map(TenantId::from);
    let page = desk.accounts.tenants_after(after.as_ref(), wanted.limit).await.map_err(faults::of_look)?;
    Ok(answer(&List::of(page, "tenant", |tenant| tenant.id.to_string())))
}

pub async fn create_tenant(desk: Desk, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let body = desk.body(payload).await?;
    let wish = bodies::tenant(&body.fields(), desk.state.admission.tiers())?;
    let accounts = desk.accounts.clone();
    let tenant = desk.change(async move { accounts.create_tenant_like(wish).await }).await?;
    Ok(answer(&Sorted::tenant(tenant)))
}

pub async fn get_tenant(desk: Desk, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let tenant = desk.accounts.tenant(&id.as_str().into()).await.map_err(faults::of_look)?;
    Ok(answer(&Sorted::tenant(tenant)))
}

pub async fn change_tenant(desk: Desk, payload: web::Payload, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let body = desk.body(payload).await?;
    let (changes, credit) = bodies::tenant_changes(&body.fields(), desk.state.admission.tiers())?;
    let id = TenantId::from(id.as_str());
    if changes.status == Some(TenantStatus::Suspended) && id == desk.principal.tenant {
        let why = "Invalid 'status': it is the tenant of the key that asks, which could not undo it.";
        return Err(ApiError::field("unsupported_value", "status", why));
    }
    let accounts = desk.accounts.clone();
    let changing = async move {
        // What may be refused comes first, so that a refusal has changed nothing.
        if let Some(credit) = credit {
            accounts.set_credit(&id, credit, "").await?;
        }
        accounts.change_tenant(&id, &changes).await
    };
    Ok(answer(&Sorted::tenant(desk.change(changing).await?)))
}
