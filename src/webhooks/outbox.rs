use std::time::Duration;

use super::{Secret, Settings, event::Message};
use crate::{
    domain::TenantId,
    store::{Function, Reply, Store, StoreError, keys},
};

/// Between an attempt's end at the latest and that of its lease: time to tell the store.
const LEASE_MARGIN: Duration = Duration::from_secs(5);
/// An event that was tried for so long is given up, however many attempts are left.
const AGE_MAX: Duration = Duration::from_secs(24 * 3600);
const WHY_CHARACTERS_MAX: usize = 200;

/// The events of tenants, one at a time: see `functions/webhooks.lua`.
#[derive(Clone)]
pub struct Outbox {
    store: Store,
    lease_ms: String,
}

/// An event that is ours for the time of the lease.
pub struct Delivery {
    fence: String,
    number: String,
    /// Of this attempt, from 1 on.
    pub attempt: u32,
    /// By the store's clock.
    pub now_unix_ms: u64,
    pub url: String,
    /// The endpoint's, and the one that it had until lately.
    pub secrets: Vec<Secret>,
    /// Or what is wrong with what was stored.
    pub message: Result<Message, String>,
}

pub enum Taken {
    /// Nothing waits, or nobody wants it.
    Nothing,
    /// Another node is at it, or the next attempt is not due yet.
    Later(Duration),
    Event(Box<Delivery>),
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Delivered,
    /// Tried again after this.
    Later(Duration),
    Dead,
    /// Somebody else's by now: the lease was over, or the endpoint is gone.
    Lost,
}

impl Outbox {
    pub fn new(store: Store, settings: &Settings) -> Self {
        let lease_ms = (settings.timeout + LEASE_MARGIN).as_millis().to_string();
        Self { store, lease_ms }
    }

    pub async fn take(&self, tenant: &TenantId) -> Result<Taken, StoreError> {
        let mut reply = self.call(Function::WebhookTake, tenant, &[&self.lease_ms]).await?;
        match reply.word() {
            "idle" => Ok(Taken::Nothing),
            "later" => Ok(Taken::Later(Duration::from_millis(reply.next("a time")?))),
            "event" => {
                let (fence, number) = (reply.next("a lease")?, reply.next("an event's number")?);
                let event: String = reply.next("an event")?;
                let attempt = reply.next("a count of attempts")?;
                let now_unix_ms = reply.next("a time")?;
                let url = reply.next("a URL")?;
                let secrets: [String; 2] = [reply.next("a secret")?, reply.next("a secret")?];
                let secrets = secrets.iter().filter(|text| !text.is_empty());
                let secrets = secrets.map(|text| {
                    Secret::parse(text).ok_or_else(|| StoreError::Damaged(format!("a webhook secret of {tenant}")))
                });
                Ok(Taken::Event(Box::new(Delivery {
                    fence,
                    number,
                    attempt,
                    now_unix_ms,
                    url,
                    secrets: secrets.collect::<Result<_, _>>()?,
                    message: Message::of(tenant, &event),
                })))
            }
            _ => Err(reply.unexpected("webhook_take")),
        }
    }

    pub async fn delivered(&self, tenant: &TenantId, delivery: &Delivery) -> Result<Fate, StoreError> {
        let arguments = [delivery.fence.as_str(), &delivery.number];
        let reply = self.call(Function::WebhookDone, tenant, &arguments).await?;
        match reply.word() {
            "done" => Ok(Fate::Delivered),
            "lost" => Ok(Fate::Lost),
            _ => Err(reply.unexpected("webhook_done")),
        }
    }

    /// `pause`: until the next attempt, of which there are `attempts_max` in all.
    pub async fn failed(
        &self,
        tenant: &TenantId,
        delivery: &Delivery,
        why: &str,
        pause: Duration,
        attempts_max: u32,
    ) -> Result<Fate, StoreError> {
        let why: String = why.chars().take(WHY_CHARACTERS_MAX).collect();
        let numbers = [pause.as_millis(), attempts_max.into(), AGE_MAX.as_millis()].map(|number| number.to_string());
        let [pause, attempts_max, age_max] = &numbers;
        let arguments = [delivery.fence.as_str(), &delivery.number, &why, pause, attempts_max, age_max];
        let mut reply = self.call(Function::WebhookFailed, tenant, &arguments).await?;
        match reply.word() {
            "later" => Ok(Fate::Later(Duration::from_millis(reply.next("a time")?))),
            "dead" => Ok(Fate::Dead),
            "lost" => Ok(Fate::Lost),
            _ => Err(reply.unexpected("webhook_failed")),
        }
    }

    async fn call(&self, function: Function, tenant: &TenantId, arguments: &[&str]) -> Result<Reply, StoreError> {
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.as_bytes()).collect();
        self.store.call(function, &keys::ledger(tenant), &arguments).await
    }
}
