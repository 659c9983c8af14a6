//! Who may ask, and whether they can pay: the one gate in front of the queue.
//!
//! Promises that an [`AdmittedRequest`] exists only where the whole price that a request could reach is on
//! hold, that a refusal costs nothing, and that a revoked key is refused by every edge within a second.
//! Secrets are compared and stored only as SHA-256. Never speaks HTTP, never admits while the store is away.

mod guard;
pub(crate) mod key;
mod key_cache;
mod limits;
mod standing;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

pub use guard::{Address, Guard, GuardLimits};
pub(crate) use key::limits_in;
pub use key::{KeyRecord, KeyStatus, Scope, Scopes, SecretHash};
pub use limits::{LIMIT_MAX, LimitKind, Limits, Party, Rate, Rates, Tier, Tiers};
pub use standing::{LimitUse, Standing};

use crate::{
    domain::{KeyId, ModelId, MoneyError, NanoUsd, Price, Priority, RequestId, TenantId},
    fault,
    store::{Function, Reply, Store, StoreError, keys},
};
use key_cache::KeyCache;

/// Who asks: what a valid key says about its bearer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    pub tenant: TenantId,
    pub key: KeyId,
    pub scopes: Scopes,
    /// Which of the configured sets of limits its tenant has.
    pub tier: String,
    /// The models that the key may ask; nothing is all of them.
    pub models: Option<Arc<BTreeSet<ModelId>>>,
}

impl Principal {
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.contains(scope)
    }

    pub fn may_ask(&self, model: &ModelId) -> bool {
        self.models.as_ref().is_none_or(|models| models.contains(model))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("no such API key")]
    Unknown,
    #[error("API key {0} has been revoked")]
    Revoked(KeyId),
    #[error("API key {0} has expired, or this secret of it was replaced")]
    Expired(KeyId),
    #[error("tenant {0} is suspended")]
    Suspended(TenantId),
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Debug, thiserror::Error)]
pub enum AdmitError {
    #[error("the balance of {balance} does not cover the {needed} that the request may cost")]
    InsufficientBalance { balance: NanoUsd, needed: NanoUsd, rates: Rates },
    /// `wait_ms`: until it fits if nothing else comes; nothing where it never does.
    #[error("the limit of {limit} {kind} is in the way")]
    Limited { kind: LimitKind, of: Party, limit: u64, wait_ms: Option<u64>, rates: Rates },
    #[error("tenant {0} is suspended")]
    Suspended(TenantId),
    #[error("API key {0} has ended")]
    KeyEnded(KeyId),
    #[error("there is no tier `{0}` in this node's configuration")]
    UnknownTier(String),
    #[error("request {0} has been admitted before")]
    Repeated(RequestId),
    #[error("there is no tenant {0}")]
    UnknownTenant(TenantId),
    #[error("the price of the request cannot be computed: {0}")]
    Money(#[from] MoneyError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is asked for, and the most that it may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    pub request: RequestId,
    pub model: ModelId,
    pub price: Price,
    pub price_version: String,
    pub prompt_tokens: u32,
    /// Of all choices together.
    pub output_tokens_max: u32,
    pub choices: u32,
}

/// A request whose money is on hold. It must be settled or released; should its process die, the hold
/// expires by itself.
#[must_use = "its hold must be settled or released"]
#[derive(Debug, PartialEq)]
pub struct AdmittedRequest {
    ask: Ask,
    tenant: TenantId,
    key: KeyId,
    hold: NanoUsd,
    allowed_tokens: u32,
    rates: Rates,
}

impl AdmittedRequest {
    pub fn request(&self) -> &RequestId {
        &self.ask.request
    }

    pub fn tenant(&self) -> &TenantId {
        &self.tenant
    }

    pub fn key(&self) -> &KeyId {
        &self.key
    }

    pub fn model(&self) -> &ModelId {
        &self.ask.model
    }

    pub fn price(&self) -> Price {
        self.ask.price
    }

    pub fn price_version(&self) -> &str {
        &self.ask.price_version
    }

    pub fn prompt_tokens(&self) -> u32 {
        self.ask.prompt_tokens
    }

    pub fn output_tokens_max(&self) -> u32 {
        self.ask.output_tokens_max
    }

    /// What the tenant may still ask for.
    pub fn rates(&self) -> Rates {
        self.rates
    }

    /// Set aside: the prompt and the first tokens that may be put out.
    pub fn hold(&self) -> NanoUsd {
        self.hold
    }

    /// The output tokens that the hold pays for, of all choices together; at least one for each. For more, it must be
    /// extended.
    pub fn allowed_tokens(&self) -> u32 {
        self.allowed_tokens
    }
}

#[derive(Clone)]
pub struct Admission {
    store: Store,
    hold_lease: Duration,
    keys: Arc<KeyCache>,
    tiers: Arc<Tiers>,
    step_tokens: u32,
}

impl Admission {
    /// `hold_lease`: how long a hold lasts until its first renewal is due. Holds pay for all that was asked for, and
    /// nothing is limited.
    pub fn new(store: Store, hold_lease: Duration) -> Self {
        Self { store, hold_lease, keys: Arc::default(), tiers: Arc::default(), step_tokens: 0 }
    }

    /// The same with limits on what tenants may ask for.
    pub fn with_tiers(self, tiers: Tiers) -> Self {
        Self { tiers: Arc::new(tiers), ..self }
    }

    /// The same with holds that pay for so many output tokens at first; 0 is all of them.
    pub fn with_step(self, step_tokens: u32) -> Self {
        Self { step_tokens, ..self }
    }

    /// The highest class that a tenant's requests get.
    pub fn priority_max(&self, principal: &Principal) -> Priority {
        self.tiers.get(&principal.tier).map_or(Priority::Low, |tier| tier.priority_max)
    }

    pub fn tiers(&self) -> &Tiers {
        &self.tiers
    }

    /// Whose key this is. Asks the store unless it was asked about the same key a moment ago.
    pub async fn authenticate(&self, secret: &str) -> Result<Principal, AuthError> {
        let hash = SecretHash::of(secret).ok_or(AuthError::Unknown)?;
        // Before the question: what is cached must not be older than it says.
        let asked = std::time::Instant::now();
        if let Some(principal) = self.keys.get(&hash, asked) {
            return Ok(principal);
        }
        let secret = key::secret(&self.store, &hash).await?.ok_or(AuthError::Unknown)?;
        let mut question = redis::pipe();
        question.cmd("HGETALL").arg(keys::api_key(&secret.tenant, &secret.key));
        question.cmd("HMGET").arg(keys::account(&secret.tenant)).arg("status").arg("tier");
        question.cmd("TIME");
        let answers = self.store.query_all(&question).await?;
        let (record, account, (seconds, micros)) = read_answers(answers)?;
        let now = seconds * 1000 + micros / 1000;
        let is_opened = key::is_opened_by(&record, &hash, now)?;
        let record = key::read(&record)?.ok_or(AuthError::Unknown)?;
        let is_over = |end: Option<u64>| end.is_some_and(|end| end <= now);
        if record.status == KeyStatus::Revoked {
            return Err(AuthError::Revoked(record.id));
        }
        if !is_opened || is_over(record.expires_unix_ms) {
            return Err(AuthError::Expired(record.id));
        }
        match account {
            (Some(status), Some(tier)) if status == "active" => {
                let KeyRecord { tenant, id, scopes, models, .. } = record;
                let principal = Principal { tenant, key: id, scopes, tier, models };
                self.keys.put(hash, asked, principal.clone());
                Ok(principal)
            }
            (Some(_), Some(_)) => Err(AuthError::Suspended(record.tenant)),
            _ => Err(AuthError::Unknown),
        }
    }

    /// Puts the price of the prompt and of the first tokens of the answer on hold, or changes nothing.
    pub async fn admit(&self, principal: &Principal, ask: Ask) -> Result<AdmittedRequest, AdmitError> {
        let mut tier = principal.tier.clone();
        loop {
            match self.hold(principal, &ask, &tier).await? {
                // Was given another tier since its key was looked up.
                Held::OtherTier(other) if other != tier => tier = other,
                Held::OtherTier(other) => return Err(AdmitError::UnknownTier(other)),
                Held::Done { hold, allowed_tokens, rates } => {
                    let (tenant, key) = (principal.tenant.clone(), principal.key.clone());
                    return Ok(AdmittedRequest { ask, tenant, key, hold, allowed_tokens, rates });
                }
            }
        }
    }

    async fn hold(&self, principal: &Principal, ask: &Ask, tier_name: &str) -> Result<Held, AdmitError> {
        let (tenant, key) = (&principal.tenant, &principal.key);
        let tier = self.tiers.get(tier_name).ok_or_else(|| AdmitError::UnknownTier(tier_name.to_owned()))?;
        let step = if self.step_tokens == 0 { u32::MAX } else { self.step_tokens };
        let choices = ask.choices.min(ask.output_tokens_max);
        let wanted = step.max(choices).min(ask.output_tokens_max);
        let numbers = [
            self.hold_lease.as_millis().to_string(),
            ask.prompt_tokens.to_string(),
            wanted.to_string(),
            ask.output_tokens_max.to_string(),
            choices.to_string(),
            ask.price.input.nano().to_string(),
            ask.price.output.nano().to_string(),
            ask.price.cached_input.nano().to_string(),
        ];
        let [lease, prompt, wanted_text, output_max, choices_text, input, output, cached_input] = &numbers;
        let limits = tier.limits.arguments();
        let mut arguments = vec![
            tenant.as_str().as_bytes(),
            ask.request.as_str().as_bytes(),
            lease.as_bytes(),
            key.as_str().as_bytes(),
            ask.model.as_str().as_bytes(),
            prompt.as_bytes(),
            wanted_text.as_bytes(),
            output_max.as_bytes(),
            choices_text.as_bytes(),
            input.as_bytes(),
            output.as_bytes(),
            cached_input.as_bytes(),
            ask.price_version.as_bytes(),
            tier_name.as_bytes(),
        ];
        arguments.extend(limits.iter().map(String::as_bytes));
        fault::point("admission.hold.asked");
        let mut reply: Reply = self.store.call(Function::Hold, &keys::ledger(tenant), &arguments).await?;
        fault::point("admission.hold.answered");
        match reply.word() {
            "held" => {
                let hold = NanoUsd::new(reply.next("hold")?);
                let allowed_tokens = reply.next("tokens")?;
                // Told again when it is extended.
                reply.funds_end()?;
                Ok(Held::Done { hold, allowed_tokens, rates: Rates::told(&mut reply)? })
            }
            "tier" => Ok(Held::OtherTier(reply.next("tier")?)),
            "limit" => Err(limits::refused(&mut reply)?),
            "insufficient" => {
                let balance = NanoUsd::new(reply.next("balance")?);
                let least = ask.price.output.checked_mul(choices.into())?;
                let needed = ask.price.input.checked_mul(ask.prompt_tokens.into())?.checked_add(least)?;
                Err(AdmitError::InsufficientBalance { balance, needed, rates: Rates::told(&mut reply)? })
            }
            "overflow" => Err(MoneyError::Overflow.into()),
            "suspended" => Err(AdmitError::Suspended(tenant.clone())),
            "key_ended" => Err(AdmitError::KeyEnded(key.clone())),
            "repeated" => Err(AdmitError::Repeated(ask.request.clone())),
            "unknown_tenant" => Err(AdmitError::UnknownTenant(tenant.clone())),
            _ => Err(reply.unexpected("hold").into()),
        }
    }
}

enum Held {
    Done { hold: NanoUsd, allowed_tokens: u32, rates: Rates },
    OtherTier(String),
}

type AuthAnswers = (HashMap<String, String>, (Option<String>, Option<String>), (u64, u64));

fn read_answers(answers: Vec<redis::Value>) -> Result<AuthAnswers, StoreError> {
    let damaged = |error: redis::ParsingError| StoreError::Damaged(format!("API key: {error}"));
    redis::FromRedisValue::from_redis_value(redis::Value::Array(answers)).map_err(damaged)
}
