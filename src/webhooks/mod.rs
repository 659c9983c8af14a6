//! Webhooks: a tenant's own server is told what happens to its account.
//!
//! Promises that an event which the store wrote down is delivered at least once, in the order of its tenant's events
//! and always under the same id, or ends among the tenant's dead letters; that one tenant's endpoint, however slow or
//! broken, delays nobody else's; that nothing is sent to an address that is not public, unless that is allowed; and
//! that every message is signed as the Standard Webhooks specification says. Never decides what is worth telling (that
//! is the ledger's business, in the store), never follows a redirect, and never reads what an endpoint answers beyond
//! its status.

mod address;
mod agenda;
mod dispatcher;
mod endpoint;
mod event;
mod outbox;
mod post;
mod signature;

use std::time::Duration;

pub use address::{Target, TargetError, URL_BYTES_MAX};
pub use dispatcher::Dispatcher;
pub use endpoint::{DeadLetter, Endpoint, EndpointChange, EndpointWish, Endpoints};
pub use event::{Kind, Kinds};
pub use post::{Outcome, Postman};
pub use signature::Secret;

use crate::{domain::TenantId, store::StoreError};

#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("there is no tenant {0}")]
    UnknownTenant(TenantId),
    #[error("{0} has no endpoint: name its URL")]
    NoEndpoint(TenantId),
    #[error("the system gives no random numbers: {0}")]
    Random(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How events are delivered.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Endpoints may have private addresses, and those need no TLS.
    pub allow_private: bool,
    /// After so many attempts an event is given up.
    pub attempts_max: u32,
    /// Of one attempt, from looking up the address to the status of the answer.
    pub timeout: Duration,
    /// Pauses after the first attempt, the second, and so on; the last one stays. Each is varied by a fifth.
    pub pauses: Vec<Duration>,
    /// How often it is looked for events whose notice was missed.
    pub scan: Duration,
}

impl Settings {
    pub fn new(allow_private: bool, attempts_max: u32, timeout: Duration) -> Self {
        const PAUSES_SECONDS: [u64; 8] = [1, 5, 30, 2 * 60, 10 * 60, 3600, 3 * 3600, 6 * 3600];
        let pauses = PAUSES_SECONDS.map(Duration::from_secs).to_vec();
        Self { allow_private, attempts_max, timeout, pauses, scan: Duration::from_secs(30) }
    }

    /// After the attempt of this number, from 1 on.
    fn pause(&self, attempt: u32) -> Duration {
        let index = (attempt.max(1) as usize - 1).min(self.pauses.len().saturating_sub(1));
        let pause = self.pauses.get(index).copied().unwrap_or_default();
        pause.mul_f64(rand::random_range(0.8..1.2))
    }
}
