use std::{collections::HashMap, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    Kinds, Outcome, Postman, Secret, Target, WebhookError,
    event::{Message, message_id, number_of},
};
use crate::{
    domain::{NanoUsd, TenantId},
    store::{Function, Reply, Store, StoreError, keys},
};

/// A secret that was replaced signs for so long as well, so that a receiver can change over.
const GRACE: Duration = Duration::from_secs(24 * 3600);

/// Where a tenant is told of events. Never has the secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    pub tenant: TenantId,
    pub url: String,
    pub kinds: Kinds,
    pub enabled: bool,
    pub created_unix_ms: u64,
    pub changed_unix_ms: u64,
    /// Events that wait.
    pub waiting: u64,
    pub dead_letters: u64,
    /// Attempts so far of the event that is next.
    pub attempts: u64,
    pub next_attempt_unix_ms: Option<u64>,
    pub delivered_unix_ms: Option<u64>,
    /// Of the last attempt, if it failed.
    pub failed_unix_ms: Option<u64>,
    pub why: Option<String>,
}

/// What an endpoint is to be like; what is `None` stays as it is, or is what suits most: all kinds, enabled.
#[derive(Clone, Debug, Default)]
pub struct EndpointWish {
    pub url: Option<String>,
    pub kinds: Option<Kinds>,
    pub enabled: Option<bool>,
    /// Give it a new secret.
    pub rotate: bool,
    /// Whether its address may be private.
    pub allow_private: bool,
}

/// An endpoint as it is now, and its secret if it is a new one: the only time that it is to be had.
#[derive(Clone, Serialize)]
pub struct EndpointChange {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    #[serde(flatten)]
    pub endpoint: Endpoint,
}

/// An event that was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeadLetter {
    pub id: String,
    pub attempts: u64,
    pub died_unix_ms: u64,
    pub why: String,
    /// As it would be sent.
    pub message: String,
}

/// What tenants have said of their endpoints. Cheap to clone.
#[derive(Clone)]
pub struct Endpoints {
    store: Store,
}

impl Endpoints {
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    pub async fn set(&self, tenant: &TenantId, wish: &EndpointWish) -> Result<EndpointChange, WebhookError> {
        if let Some(url) = &wish.url {
            Target::parse(url, wish.allow_private)?;
        }
        let known = self.get(tenant).await?;
        let secret = Secret::generate()?.reveal();
        let flag = |flag: bool| if flag { "1" } else { "0" };
        // An endpoint that there is keeps the kinds that it has.
        let kinds = wish.kinds.clone().or_else(|| known.is_none().then(Kinds::all));
        let kinds = kinds.map(|kinds| kinds.to_string()).unwrap_or_default();
        let grace = GRACE.as_millis().to_string();
        // Listed first: one that is not listed would not be looked after when a notice is lost.
        if known.is_some() || wish.url.is_some() {
            let mut command = redis::cmd("SADD");
            self.store.query::<u64>(command.arg(keys::WEBHOOKS).arg(tenant.as_str())).await?;
        }
        let arguments = [
            wish.url.as_deref().unwrap_or_default(),
            &kinds,
            wish.enabled.map(flag).unwrap_or_default(),
            &secret,
            flag(wish.rotate),
            &grace,
        ];
        let reply = self.call(Function::WebhookSet, tenant, &arguments).await?;
        let secret = match reply.word() {
            "made" | "rotated" => Some(secret),
            "kept" => None,
            "absent" => return Err(WebhookError::NoEndpoint(tenant.clone())),
            "unknown_tenant" => return Err(WebhookError::UnknownTenant(tenant.clone())),
            _ => return Err(reply.unexpected("webhook_set").into()),
        };
        Ok(EndpointChange { secret, endpoint: self.one(tenant).await? })
    }

    pub async fn get(&self, tenant: &TenantId) -> Result<Option<Endpoint>, WebhookError> {
        let mut reply = self.call(Function::WebhookShow, tenant, &[]).await?;
        if reply.word() != "shown" {
            return Err(reply.unexpected("webhook_show").into());
        }
        let fields: HashMap<String, String> = reply.next("an endpoint")?;
        if fields.is_empty() {
            return Ok(None);
        }
        let damaged = |name: &str| StoreError::Damaged(format!("the endpoint of {tenant} has no sound {name}"));
        let text = |name: &str| fields.get(name).cloned().ok_or_else(|| damaged(name));
        let time = |name: &str| fields.get(name).map(|text| text.parse().map_err(|_| damaged(name))).transpose();
        Ok(Some(Endpoint {
            tenant: tenant.clone(),
            url: text("url")?,
            kinds: Kinds::from_str(&text("kinds")?).map_err(|_| damaged("kinds"))?,
            enabled: text("enabled")? == "1",
            created_unix_ms: time("created")?.ok_or_else(|| damaged("created"))?,
            changed_unix_ms: time("changed")?.ok_or_else(|| damaged("changed"))?,
            waiting: reply.next("a count")?,
            dead_letters: reply.next("a count")?,
            attempts: time("attempts")?.unwrap_or(0),
            next_attempt_unix_ms: time("next_at")?,
            delivered_unix_ms: time("delivered_at")?,
            failed_unix_ms: time("failed_at")?,
            why: fields.get("why").cloned(),
        }))
    }

    /// The same, where there must be one.
    pub async fn one(&self, tenant: &TenantId) -> Result<Endpoint, WebhookError> {
        self.get(tenant).await?.ok_or_else(|| WebhookError::NoEndpoint(tenant.clone()))
    }

    /// With all that waits for it and all that it never took.
    pub async fn remove(&self, tenant: &TenantId) -> Result<(), WebhookError> {
        let reply = self.call(Function::WebhookRemove, tenant, &[]).await?;
        self.store.query::<u64>(redis::cmd("SREM").arg(keys::WEBHOOKS).arg(tenant.as_str())).await?;
        match reply.word() {
            "removed" => Ok(()),
            "absent" => Err(WebhookError::NoEndpoint(tenant.clone())),
            _ => Err(reply.unexpected("webhook_remove").into()),
        }
    }

    /// Sends a message that says nothing, now and once.
    pub async fn test(&self, tenant: &TenantId, postman: &Postman) -> Result<(String, Outcome), WebhookError> {
        let endpoint = self.one(tenant).await?;
        let damaged = |what: &str| StoreError::Damaged(format!("{what} of {tenant}"));
        let now = self.store.now_unix_ms().await?;
        let mut question = redis::cmd("HMGET");
        question.arg(keys::webhook(tenant)).arg("secret").arg("secret_before").arg("secret_until");
        let [secret, before, until]: [Option<String>; 3] = self.store.query(&question).await?;
        let parsed = |text: String| Secret::parse(&text).ok_or_else(|| damaged("the webhook secret"));
        let mut secrets = vec![parsed(secret.unwrap_or_default())?];
        // As in events: while one is being replaced, both sign.
        let signs = until.and_then(|until| until.parse::<u64>().ok()).is_some_and(|until| until > now);
        if let Some(before) = before.filter(|before| signs && !before.is_empty()) {
            secrets.push(parsed(before)?);
        }
        let mut command = redis::cmd("HMGET");
        let money: Vec<Option<i64>> =
            self.store.query(command.arg(keys::account(tenant)).arg("balance").arg("held")).await?;
        let [Some(balance), Some(held)] = money[..] else { return Err(damaged("the balance").into()) };
        let message = Message::test(tenant, now, NanoUsd::new(balance), NanoUsd::new(held));
        let outcome = postman.send(&endpoint.url, &secrets, now, &message).await;
        Ok((message.id, outcome))
    }

    /// Oldest first.
    pub async fn dead_letters(&self, tenant: &TenantId) -> Result<Vec<DeadLetter>, WebhookError> {
        #[derive(Deserialize)]
        struct Buried {
            event: String,
            attempts: String,
            why: String,
            at: String,
        }
        #[derive(Deserialize)]
        struct Numbered {
            id: String,
        }
        let mut command = redis::cmd("LRANGE");
        let letters: Vec<String> = self.store.query(command.arg(keys::dead_letters(tenant)).arg(0).arg(-1)).await?;
        let read = |letter: String| {
            let damaged = || StoreError::Damaged(format!("a dead letter of {tenant}"));
            let buried: Buried = serde_json::from_str(&letter).map_err(|_| damaged())?;
            let numbered: Numbered = serde_json::from_str(&buried.event).map_err(|_| damaged())?;
            Ok(DeadLetter {
                id: message_id(tenant, &numbered.id),
                attempts: buried.attempts.parse().map_err(|_| damaged())?,
                died_unix_ms: buried.at.parse().map_err(|_| damaged())?,
                why: buried.why,
                message: Message::of(tenant, &buried.event).map_or(buried.event, |message| message.body),
            })
        };
        letters.into_iter().map(read).collect()
    }

    /// Has them delivered after all, behind whatever waits; the one with this id, or all of them. Answers how many.
    pub async fn retry_dead_letters(&self, tenant: &TenantId, id: Option<&str>) -> Result<u64, WebhookError> {
        self.take_dead_letters(tenant, "retry", id).await
    }

    /// Forgets them.
    pub async fn drop_dead_letters(&self, tenant: &TenantId, id: Option<&str>) -> Result<u64, WebhookError> {
        self.take_dead_letters(tenant, "drop", id).await
    }

    async fn take_dead_letters(&self, tenant: &TenantId, what: &str, id: Option<&str>) -> Result<u64, WebhookError> {
        let number = match id {
            None => "",
            Some(id) => match number_of(tenant, id).filter(|number| !number.is_empty()) {
                Some(number) => number,
                None => return Ok(0),
            },
        };
        let mut reply = self.call(Function::WebhookDead, tenant, &[what, number]).await?;
        match reply.word() {
            "taken" => Ok(reply.next("a count")?),
            "absent" => Err(WebhookError::NoEndpoint(tenant.clone())),
            _ => Err(reply.unexpected("webhook_dead").into()),
        }
    }

    async fn call(&self, function: Function, tenant: &TenantId, arguments: &[&str]) -> Result<Reply, StoreError> {
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.as_bytes()).collect();
        self.store.call(function, &keys::ledger(tenant), &arguments).await
    }
}
