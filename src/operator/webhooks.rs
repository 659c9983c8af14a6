use super::{
    accounts::{Accounts, OperatorError},
    audit_log::Change,
};
use crate::{
    domain::TenantId,
    webhooks::{EndpointChange, EndpointWish, Endpoints, WebhookError},
};

impl Accounts {
    /// Where tenants are told of events. What is only looked at needs no record.
    pub fn webhooks(&self) -> Endpoints {
        Endpoints::new(self.store.clone())
    }

    /// Makes a tenant's endpoint, or changes it.
    pub async fn set_webhook(&self, tenant: &TenantId, wish: &EndpointWish) -> Result<EndpointChange, OperatorError> {
        self.must_exist(tenant).await?;
        let change = Change::of("webhook.set", tenant)
            .with("url", &wish.url)
            .with("kinds", &wish.kinds)
            .with("enabled", wish.enabled)
            .with("rotate_secret", wish.rotate);
        let setting = async { Ok(self.webhooks().set(tenant, wish).await?) };
        self.recorded(change, setting, |_| true).await
    }

    /// Ends a tenant's endpoint, with all that waits for it.
    pub async fn remove_webhook(&self, tenant: &TenantId) -> Result<(), OperatorError> {
        let removing = async { Ok(self.webhooks().remove(tenant).await?) };
        self.recorded(Change::of("webhook.remove", tenant), removing, |()| true).await
    }

    /// Has dead letters delivered after all: one, or all of them. Answers how many.
    pub async fn retry_dead_letters(&self, tenant: &TenantId, id: Option<&str>) -> Result<u64, OperatorError> {
        let change = Change::of("webhook.dead.retry", tenant).with("event", id);
        self.must_exist(tenant).await?;
        let retrying = async { found(id, self.webhooks().retry_dead_letters(tenant, id).await) };
        self.recorded(change, retrying, |count| *count > 0).await
    }

    /// Forgets dead letters: one, or all of them. Answers how many.
    pub async fn drop_dead_letters(&self, tenant: &TenantId, id: Option<&str>) -> Result<u64, OperatorError> {
        let change = Change::of("webhook.dead.drop", tenant).with("event", id);
        self.must_exist(tenant).await?;
        let dropping = async { found(id, self.webhooks().drop_dead_letters(tenant, id).await) };
        self.recorded(change, dropping, |count| *count > 0).await
    }
}

/// Who names one means one. Without an endpoint there are none.
fn found(id: Option<&str>, taken: Result<u64, WebhookError>) -> Result<u64, OperatorError> {
    let count = match taken {
        Err(WebhookError::NoEndpoint(_)) => 0,
        taken => taken?,
    };
    match (id, count) {
        (Some(id), 0) => Err(OperatorError::wish("id", format!("there is no dead letter {id}"))),
        (_, count) => Ok(count),
    }
}
