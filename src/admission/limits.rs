use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::AdmitError;
use crate::{
    domain::{NanoUsd, Priority},
    store::{Reply, StoreError},
};

/// What can be limited. 0 is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitKind {
    RequestsPerMinute,
    /// Of prompts and answers. A request counts with the most that it may use until it is settled.
    TokensPerMinute,
    /// Days are those of UTC, by the store's clock, and so are months.
    RequestsPerDay,
    TokensPerDay,
    RequestsAtOnce,
    /// Nano-dollars, what is on hold included; like that of the month.
    SpendPerDay,
    SpendPerMonth,
}

impl LimitKind {
    /// In the order in which the store's functions take them.
    pub const ALL: [Self; 7] = [
        Self::RequestsPerMinute,
        Self::TokensPerMinute,
        Self::RequestsPerDay,
        Self::TokensPerDay,
        Self::RequestsAtOnce,
        Self::SpendPerDay,
        Self::SpendPerMonth,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::RequestsPerMinute => "requests_per_minute",
            Self::TokensPerMinute => "tokens_per_minute",
            Self::RequestsPerDay => "requests_per_day",
            Self::TokensPerDay => "tokens_per_day",
            Self::RequestsAtOnce => "requests_at_once",
            Self::SpendPerDay => "spend_per_day",
            Self::SpendPerMonth => "spend_per_month",
        }
    }

    pub fn is_spend(self) -> bool {
        matches!(self, Self::SpendPerDay | Self::SpendPerMonth)
    }

    /// The field of an account or a key's record that has it.
    pub(crate) fn field(self) -> String {
        format!("limit:{}", self.as_str())
    }
}

impl fmt::Display for LimitKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for LimitKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|kind| kind.as_str() == text);
        known.ok_or_else(|| {
            let all = Self::ALL.map(Self::as_str).join(", ");
            format!("`{text}` is no limit; there are {all}")
        })
    }
}

/// Limits by kind: those that are set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Limits(BTreeMap<LimitKind, u64>);

/// Largest value of any limit: below 2^53, so that the store compares it exactly.
pub const LIMIT_MAX: u64 = 9_000_000_000_000_000;

impl Limits {
    pub fn get(&self, kind: LimitKind) -> Option<u64> {
        self.0.get(&kind).copied()
    }

    pub fn with(mut self, kind: LimitKind, value: u64) -> Self {
        self.0.insert(kind, value.min(LIMIT_MAX));
        self
    }

    pub fn with_spend(self, kind: LimitKind, value: NanoUsd) -> Self {
        self.with(kind, u64::try_from(value.nano()).unwrap_or(0))
    }

    pub fn iter(&self) -> impl Iterator<Item = (LimitKind, u64)> {
        self.0.iter().map(|(kind, value)| (*kind, *value))
    }

    /// As the store's functions take them.
    pub(super) fn arguments(&self) -> [String; LimitKind::ALL.len()] {
        LimitKind::ALL.map(|kind| self.get(kind).unwrap_or(0).to_string())
    }
}

impl FromIterator<(LimitKind, u64)> for Limits {
    fn from_iter<I: IntoIterator<Item = (LimitKind, u64)>>(limits: I) -> Self {
        limits.into_iter().fold(Self::default(), |all, (kind, value)| all.with(kind, value))
    }
}

/// What tenants of one sort may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tier {
    pub limits: Limits,
    /// The highest class that a request gets, whatever it asks for.
    pub priority_max: Priority,
}

/// What persons call the tier without a name.
const STANDARD: &str = "standard";

/// Tiers by name. The one without a name is that of all who were given no other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tiers {
    pub standard: Tier,
    pub named: BTreeMap<String, Tier>,
}

impl Tiers {
    /// What tenants of the tier that a person calls `name` have written down: nothing for the standard one.
    pub fn find(&self, name: &str) -> Option<&str> {
        match self.named.get_key_value(name) {
            Some((name, _)) => Some(name),
            None => ["", STANDARD].contains(&name).then_some(""),
        }
    }

    /// All of them, by what persons call them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tier)> {
        let standard = if self.named.contains_key(STANDARD) { "" } else { STANDARD };
        let named = self.named.iter().map(|(name, tier)| (name.as_str(), tier));
        std::iter::once((standard, &self.standard)).chain(named)
    }

    pub fn get(&self, name: &str) -> Option<&Tier> {
        if name.is_empty() { Some(&self.standard) } else { self.named.get(name) }
    }
}

/// A limit and what is left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub limit: u64,
    pub remaining: u64,
    /// Until nothing is counted any more, if nothing else is asked.
    pub reset_ms: u64,
}

/// Where who asked stood when admitted or refused: of its limits of requests and of tokens the tightest; nothing where
/// there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    pub requests: Option<Rate>,
    pub tokens: Option<Rate>,
}

/// Whose limit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Party {
    Tenant,
    Key,
}

impl Rates {
    /// The rest of an answer that tells them.
    pub(super) fn told(reply: &mut Reply) -> Result<Self, StoreError> {
        let mut rate = || {
            let (limit, remaining, reset_ms) = (reply.next("limit")?, reply.next("rest")?, reply.next("time")?);
            Ok::<_, StoreError>((limit > 0).then_some(Rate { limit, remaining, reset_ms }))
        };
        Ok(Self { requests: rate()?, tokens: rate()? })
    }
}

pub(super) fn refused(reply: &mut Reply) -> Result<AdmitError, StoreError> {
    let damaged = |what: &str, text: &str| StoreError::Damaged(format!("`{text}` is no {what}"));
    let kind: String = reply.next("limit")?;
    let kind = kind.parse().map_err(|_| damaged("limit", &kind))?;
    let of = match reply.next::<String>("whose limit")?.as_str() {
        "tenant" => Party::Tenant,
        "key" => Party::Key,
        other => return Err(damaged("party", other)),
    };
    let wait_ms: u64 = reply.next("time to wait")?;
    let limit = reply.next("limit's value")?;
    let rates = Rates::told(reply)?;
    Ok(AdmitError::Limited { kind, of, limit, wait_ms: (wait_ms > 0).then_some(wait_ms), rates })
}
