//! A tenant's books as its entries make them, up to one of them: what an archive ends with and verification goes on
//! from.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::entry::{Entry, NO_LINK};
use crate::domain::{KeyId, ModelId, Price, TenantId};

/// A request whose hold was given up is charged late only within this time; as `functions/holds.lua` says.
pub(super) const LATE_MS_MAX: u64 = 30 * 86_400_000;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Books {
    pub tenant: TenantId,
    /// Of the last entry; 0 before the first.
    pub seq: u64,
    pub link: String,
    pub unix_ms: u64,
    pub balance: i128,
    pub held: i128,
    pub charged: i128,
    pub granted: i128,
    pub refunded: i128,
    pub adjusted: i128,
    pub credit: i128,
    /// Names that persons gave to grants, refunds and adjustments: remembered for ever.
    pub references: u64,
    pub open: BTreeMap<String, OpenHold>,
    /// Requests that may still be charged late.
    pub expired: BTreeMap<String, Expired>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenHold {
    pub amount: i64,
    /// When it was made: it counts for that day.
    pub unix_ms: u64,
    pub terms: Terms,
}

/// A request whose hold was given up before it was known what it used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expired {
    pub unix_ms: u64,
    pub terms: Terms,
}

/// What a hold, its extensions, and its end have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    pub key: KeyId,
    pub model: ModelId,
    pub price: Price,
    pub price_version: String,
}

impl Terms {
    pub(super) fn of(entry: &Entry) -> Self {
        let Entry { key, model, price, price_version, .. } = entry.clone();
        Self { key, model, price, price_version }
    }

    /// Whether the store's `text` has these, of a request that counts for `day`.
    pub(super) fn are(&self, text: &str, day: &str) -> bool {
        let Price { input, output, cached_input } = self.price;
        let [input, output, cached_input] = [input, output, cached_input].map(|price| price.nano().to_string());
        let own = [self.key.as_str(), self.model.as_str(), &input, &output, &cached_input, &self.price_version, day];
        let mut parts = text.split('\x1f');
        own.iter().all(|own| parts.next() == Some(own))
    }
}

impl Books {
    pub(super) fn new(tenant: TenantId) -> Self {
        Self {
            tenant,
            seq: 0,
            link: NO_LINK.to_owned(),
            unix_ms: 0,
            balance: 0,
            held: 0,
            charged: 0,
            granted: 0,
            refunded: 0,
            adjusted: 0,
            credit: 0,
            references: 0,
            open: BTreeMap::new(),
            expired: BTreeMap::new(),
        }
    }

    /// Whether a request that had its hold given up then may be charged now.
    pub(super) fn may_be_late(released_unix_ms: u64, unix_ms: u64) -> bool {
        unix_ms.saturating_sub(released_unix_ms) <= LATE_MS_MAX
    }

    /// Without what nobody can be charged for any more, so that they stay small.
    pub(super) fn pruned(mut self) -> Self {
        self.expired.retain(|_, expired| Self::may_be_late(expired.unix_ms, self.unix_ms));
        self
    }
}

/// Where the store's part of a ledger begins: kept beside the account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Checkpoint {
    /// Up to the last entry that was taken out of the store.
    pub books: Books,
    /// SHA-256 of what the manifest says of the archive's file that this entry lies in.
    pub volume_sha256: String,
}
