use super::AdmitError;
use crate::store::{Reply, StoreError};

/// What each tenant may ask for within any minute; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    pub requests_per_minute: u64,
    /// Of prompts and answers. A request counts with the most that it may use until it is settled.
    pub tokens_per_minute: u64,
}

/// A limit and what is left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub limit: u64,
    pub remaining: u64,
    /// Until nothing is counted any more, if nothing else is asked.
    pub reset_ms: u64,
}

/// Where a tenant stood when it was admitted or refused; nothing where there is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    pub requests: Option<Rate>,
    pub tokens: Option<Rate>,
}

/// Which of the limits was in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RateKind {
    Requests,
    Tokens,
}

impl RateKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
        }
    }
}

impl RateLimits {
    /// The rest of an answer that tells them.
    pub(super) fn told(&self, reply: &mut Reply) -> Result<Rates, StoreError> {
        let mut rate = |limit: u64, name: &str| {
            let (remaining, reset_ms) = (reply.next(name)?, reply.next(name)?);
            Ok::<_, StoreError>((limit > 0).then_some(Rate { limit, remaining, reset_ms }))
        };
        Ok(Rates {
            requests: rate(self.requests_per_minute, "requests left")?,
            tokens: rate(self.tokens_per_minute, "tokens left")?,
        })
    }

    pub(super) fn refused(&self, reply: &mut Reply) -> Result<AdmitError, StoreError> {
        let name: String = reply.next("limit")?;
        let wait_ms: u64 = reply.next("time to wait")?;
        let kind = match name.as_str() {
            "requests" => RateKind::Requests,
            "tokens" => RateKind::Tokens,
            _ => return Err(StoreError::Damaged(format!("there is no limit `{name}`"))),
        };
        let rates = self.told(reply)?;
        Ok(AdmitError::RateLimited { kind, wait_ms: (wait_ms > 0).then_some(wait_ms), rates })
    }
}
