//! Where a tenant and a key stand against their limits, for whoever wants to know before asking.

use super::{Admission, AdmitError, LimitKind, Limits, Principal};
use crate::store::{Function, StoreError, keys};

/// A limit, or what is counted without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitUse {
    pub kind: LimitKind,
    pub limit: Option<u64>,
    /// Open requests with the most that they may use.
    pub used: u64,
    /// Until nothing is counted any more: of a minute if nothing else is asked, of a day and a month by the calendar.
    /// Nothing for requests at once.
    pub reset_ms: Option<u64>,
}

impl LimitUse {
    /// Nothing where there is no limit.
    pub fn left(&self) -> Option<u64> {
        self.limit.map(|limit| limit.saturating_sub(self.used))
    }
}

/// As of one instant. What is counted within a minute is there only where it has a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// By the store's clock.
    pub unix_ms: u64,
    pub tier: String,
    pub tenant: Vec<LimitUse>,
    pub key: Vec<LimitUse>,
}

/// As the function `standing` tells it: the account's tier and own limits, the key's limits, the day with ms left of it and
/// of its month and the time, and what the tenant and the key have used.
type Answer = (Vec<Option<String>>, Vec<Option<String>>, (String, u64, u64, u64), Vec<u64>, Vec<u64>);

struct Times {
    left_of_day_ms: u64,
    left_of_month_ms: u64,
}

impl Admission {
    pub async fn standing(&self, principal: &Principal) -> Result<Standing, AdmitError> {
        let tenant = &principal.tenant;
        let key = principal.key.as_str().as_bytes();
        let answer: Answer = self.store.call(Function::Standing, &keys::ledger(tenant), &[key]).await?;
        let (account, of_key, (_, left_of_day_ms, left_of_month_ms, unix_ms), by_tenant, by_key) = answer;
        let damaged = |what: &str| StoreError::Damaged(format!("the {what} of {tenant}"));
        let [tier, of_tenant @ ..] = account.as_slice() else { return Err(damaged("standing").into()) };
        let Some(tier) = tier else { return Err(AdmitError::UnknownTenant(tenant.clone())) };
        let of_tier = &self.tiers.get(tier).ok_or_else(|| AdmitError::UnknownTier(tier.clone()))?.limits;
        let times = Times { left_of_day_ms, left_of_month_ms };
        let uses = |own: &[Option<String>], of_tier: &Limits, used: &[u64]| {
            uses(own, of_tier, used, &times).ok_or_else(|| damaged("limits"))
        };
        Ok(Standing {
            unix_ms,
            tier: tier.clone(),
            tenant: uses(of_tenant, of_tier, &by_tenant)?,
            key: uses(&of_key, &Limits::default(), &by_key)?,
        })
    }
}

/// `own` in the order of `LimitKind::ALL`, `used` in that of the function; nothing if either is something else.
fn uses(own: &[Option<String>], of_tier: &Limits, used: &[u64], times: &Times) -> Option<Vec<LimitUse>> {
    let own: &[Option<String>; LimitKind::ALL.len()] = own.try_into().ok()?;
    let [open, requests, tokens, spend_day, spend_month, requests_minute, no_requests, tokens_minute, no_tokens] =
        *used
    else {
        return None;
    };
    let (day, month) = (Some(times.left_of_day_ms), Some(times.left_of_month_ms));
    let mut all = Vec::with_capacity(own.len());
    for (kind, own) in LimitKind::ALL.into_iter().zip(own) {
        let own: Option<u64> = own.as_ref().map(|text| text.parse()).transpose().ok()?;
        let limit = own.or_else(|| of_tier.get(kind)).filter(|limit| *limit > 0);
        let (used, reset_ms) = match kind {
            LimitKind::RequestsPerMinute => (requests_minute, Some(no_requests)),
            LimitKind::TokensPerMinute => (tokens_minute, Some(no_tokens)),
            LimitKind::RequestsPerDay => (requests, day),
            LimitKind::TokensPerDay => (tokens, day),
            LimitKind::RequestsAtOnce => (open, None),
            LimitKind::SpendPerDay => (spend_day, day),
            LimitKind::SpendPerMonth => (spend_month, month),
        };
        let is_minute = matches!(kind, LimitKind::RequestsPerMinute | LimitKind::TokensPerMinute);
        if limit.is_some() || !is_minute {
            all.push(LimitUse { kind, limit, used, reset_ms });
        }
    }
    Some(all)
}
