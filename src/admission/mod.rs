//! Who may ask, and whether they can pay: the one gate in front of the queue.
//!
//! Promises that an [`AdmittedRequest`] exists only where the whole price that a request could reach is on
//! hold, that a refusal costs nothing, and that a revoked key is refused by every edge within a second.
//! Secrets are compared and stored only as SHA-256. Never speaks HTTP, never admits while the store is away.

mod guard;
pub(crate) mod key;
mod key_cache;
mod rates;

use std::{sync::Arc, time::Duration};

pub use guard::{Address, Guard, GuardLimits};
pub use key::{KeyRecord, KeyStatus, Scope, Scopes, SecretHash};
pub use rates::{Rate, RateKind, RateLimits, Rates};

use crate::{
    domain::{KeyId, ModelId, MoneyError, NanoUsd, Price, RequestId, TenantId, Usage},
    store::{Function, Reply, Store, StoreError, keys},
};
use key_cache::KeyCache;

/// Who asks: what a valid key says about its bearer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    pub tenant: TenantId,
    pub key: KeyId,
    pub scopes: Scopes,
}

impl Principal {
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.contains(scope)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("no such API key")]
    Unknown,
    #[error("API key {0} has been revoked")]
    Revoked(KeyId),
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Debug, thiserror::Error)]
pub enum AdmitError {
    #[error("the balance of {balance} does not cover the {needed} that the request may cost")]
    InsufficientBalance { balance: NanoUsd, needed: NanoUsd },
    /// `wait_ms`: until it fits if nothing else comes; nothing where it never does.
    #[error("the limit of {} per minute is in the way", kind.as_str())]
    RateLimited { kind: RateKind, wait_ms: Option<u64>, rates: Rates },
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
    pub output_tokens_max: u32,
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

    /// Set aside: the prompt plus the most that may be put out.
    pub fn hold(&self) -> NanoUsd {
        self.hold
    }
}

#[derive(Clone)]
pub struct Admission {
    store: Store,
    hold_lease: Duration,
    keys: Arc<KeyCache>,
    limits: RateLimits,
}

impl Admission {
    /// `hold_lease`: how long a hold lasts until its first renewal is due.
    pub fn new(store: Store, hold_lease: Duration) -> Self {
        Self { store, hold_lease, keys: Arc::default(), limits: RateLimits::default() }
    }

    /// The same with limits on what a tenant may ask for.
    pub fn with_limits(self, limits: RateLimits) -> Self {
        Self { limits, ..self }
    }

    /// Whose key this is. Asks the store unless it was asked about the same key a moment ago.
    pub async fn authenticate(&self, secret: &str) -> Result<Principal, AuthError> {
        let hash = SecretHash::of(secret).ok_or(AuthError::Unknown)?;
        // Before the question: what is cached must not be older than it says.
        let asked = std::time::Instant::now();
        if let Some(principal) = self.keys.get(&hash, asked) {
            return Ok(principal);
        }
        let record = key::load(&self.store, &hash).await?.ok_or(AuthError::Unknown)?;
        match record.status {
            KeyStatus::Revoked => Err(AuthError::Revoked(record.id)),
            KeyStatus::Active => {
                let principal = Principal { tenant: record.tenant, key: record.id, scopes: record.scopes };
                self.keys.put(hash, asked, principal.clone());
                Ok(principal)
            }
        }
    }

    /// Puts the most that the request may cost on hold, or changes nothing.
    pub async fn admit(&self, principal: &Principal, ask: Ask) -> Result<AdmittedRequest, AdmitError> {
        let most =
            Usage { prompt_tokens: ask.prompt_tokens, completion_tokens: ask.output_tokens_max, cached_tokens: 0 };
        let hold = ask.price.cost(&most)?;
        let numbers = [
            hold.nano().to_string(),
            self.hold_lease.as_millis().to_string(),
            most.prompt_tokens.to_string(),
            most.completion_tokens.to_string(),
            ask.price.input.nano().to_string(),
            ask.price.output.nano().to_string(),
            self.limits.requests_per_minute.to_string(),
            self.limits.tokens_per_minute.to_string(),
        ];
        let [amount, lease, prompt, completion, input, output, requests_max, tokens_max] = &numbers;
        let (tenant, key) = (&principal.tenant, &principal.key);
        let arguments = [
            tenant.as_str(),
            ask.request.as_str(),
            amount,
            lease,
            key.as_str(),
            ask.model.as_str(),
            prompt,
            completion,
            input,
            output,
            &ask.price_version,
            requests_max,
            tokens_max,
        ]
        .map(str::as_bytes);
        let mut reply: Reply = self.store.call(Function::Hold, &keys::ledger(tenant), &arguments).await?;
        match reply.word() {
            "held" => {
                let rates = self.limits.told(&mut reply)?;
                Ok(AdmittedRequest { ask, tenant: tenant.clone(), key: key.clone(), hold, rates })
            }
            "rate" => Err(self.limits.refused(&mut reply)?),
            "insufficient" => {
                let balance: i64 = reply.next("balance")?;
                Err(AdmitError::InsufficientBalance { balance: NanoUsd::new(balance), needed: hold })
            }
            "repeated" => Err(AdmitError::Repeated(ask.request)),
            "unknown_tenant" => Err(AdmitError::UnknownTenant(tenant.clone())),
            _ => Err(reply.unexpected("hold").into()),
        }
    }
}
