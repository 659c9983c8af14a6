//! One request, and what it cost.

use uuid::Uuid;

use super::{
    Entry, EntryKind, Ledger, LedgerError,
    archive::{CLOCKS_OFF_MS, Found},
    books::Terms,
    entry,
};
use crate::{
    domain::{NanoUsd, Price, RequestId, TenantId},
    store::{StoreError, keys},
};

/// What the ledger knows of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub request: RequestId,
    /// Of its admission, by the clock of the edge that named it.
    pub created_unix_ms: Option<u64>,
    /// For whom, of what, and at which price.
    pub terms: Terms,
    pub state: GenerationState,
}

#[derive(Clone, Debug, PartialEq)]
pub enum GenerationState {
    Running {
        held: NanoUsd,
    },
    /// `entry` is all that a receipt needs.
    Charged {
        entry: Box<Entry>,
        /// Given back so far.
        refunded: NanoUsd,
        /// Of a request that was charged late: what the balance could not pay.
        written_off: NanoUsd,
    },
    /// Its hold was given back whole; the entry says why.
    Released {
        entry: Box<Entry>,
    },
}

/// Entries read at a time.
const PAGE: usize = 1000;

impl Ledger {
    /// A request of a tenant's; nothing where there is none. One that ended in an archived month is looked for in the
    /// files, and [`LedgerError::Archived`] where those are not here.
    pub async fn generation(&self, tenant: &TenantId, request: &RequestId) -> Result<Option<Generation>, LedgerError> {
        match self.generation_in_store(tenant, request).await {
            // Nothing is known of it any more, or it was archived between two questions.
            Ok(None) | Err(LedgerError::Archived(_)) => self.generation_in_archive(tenant, request).await,
            found => found,
        }
    }

    async fn generation_in_archive(
        &self,
        tenant: &TenantId,
        request: &RequestId,
    ) -> Result<Option<Generation>, LedgerError> {
        let Some(came) = named_at(request) else { return Ok(None) };
        let Some(checkpoint) = self.archived(tenant).await? else { return Ok(None) };
        if came > checkpoint.books.unix_ms.saturating_add(CLOCKS_OFF_MS) {
            return Ok(None);
        }
        let is_elsewhere = || LedgerError::Archived(request.clone());
        let archive = self.archive.as_ref().ok_or_else(is_elsewhere)?;
        let of = request.clone();
        let found = archive.read(tenant, &checkpoint, move |archive| archive.find(&of, came)).await?;
        let Some(Found { entry, mut refunded, written_off }) = found.ok_or_else(is_elsewhere)? else { return Ok(None) };
        let terms = Terms::of(&entry);
        let entry = Box::new(entry);
        let state = match entry.kind {
            EntryKind::Release => GenerationState::Released { entry },
            _ => {
                let since = self.refunded_since(tenant, request, checkpoint.books.seq, checkpoint.books.refunded);
                refunded = refunded.checked_add(since.await?)?;
                GenerationState::Charged { entry, refunded, written_off }
            }
        };
        Ok(Some(Generation { request: request.clone(), created_unix_ms: Some(came), terms, state }))
    }

    /// What was given back of a request after the last entry that is archived.
    async fn refunded_since(
        &self,
        tenant: &TenantId,
        request: &RequestId,
        mut after: u64,
        refunded: i128,
    ) -> Result<NanoUsd, LedgerError> {
        let mut sum = NanoUsd::ZERO;
        if i128::from(self.balance(tenant).await?.refunded.nano()) == refunded {
            return Ok(sum);
        }
        loop {
            let page = self.entries(tenant, after, PAGE).await?;
            let Some(last) = page.last() else { return Ok(sum) };
            after = last.seq;
            let is_refund = |entry: &&Entry| entry.kind == EntryKind::Refund && entry.request == request.as_str();
            for refund in page.iter().filter(is_refund) {
                sum = sum.checked_add(refund.amount)?;
            }
        }
    }

    async fn generation_in_store(
        &self,
        tenant: &TenantId,
        request: &RequestId,
    ) -> Result<Option<Generation>, LedgerError> {
        // Other names of the same table: those of grants, refunds and so on.
        if request.as_str().contains(' ') {
            return Ok(None);
        }
        let created_unix_ms = named_at(request);
        // In this order: what ends between two of the questions is known to have ended by the last.
        let mut question = redis::pipe();
        question.cmd("HGET").arg(keys::holds(tenant)).arg(request.as_str());
        question.cmd("HGET").arg(keys::hold_terms(tenant)).arg(request.as_str());
        question.cmd("HMGET").arg(keys::ended(tenant)).arg(request.as_str()).arg(format!("refundable {request}"));
        type Answers = (Option<String>, Option<String>, (Option<String>, Option<String>));
        let answers = self.store.query_all(&question).await?;
        let damaged = |error: redis::ParsingError| StoreError::Damaged(format!("{request}: {error}"));
        let (held, terms, (ended, refundable)): Answers =
            redis::FromRedisValue::from_redis_value(redis::Value::Array(answers)).map_err(damaged)?;
        if let Some(ended) = ended {
            let state = self.ended(tenant, request, &ended, refundable.as_deref()).await?;
            let (GenerationState::Charged { entry, .. } | GenerationState::Released { entry }) = &state else {
                return Err(StoreError::Damaged(format!("{request} has ended and has not")).into());
            };
            let terms = Terms::of(entry);
            return Ok(Some(Generation { request: request.clone(), created_unix_ms, terms, state }));
        }
        let (Some(held), Some(terms)) = (held, terms) else { return Ok(None) };
        let state = GenerationState::Running { held: entry::nano(&held, "open hold")? };
        let terms = read_terms(&terms).map_err(StoreError::Damaged)?;
        Ok(Some(Generation { request: request.clone(), created_unix_ms, terms, state }))
    }

    async fn ended(
        &self,
        tenant: &TenantId,
        request: &RequestId,
        how: &str,
        refundable: Option<&str>,
    ) -> Result<GenerationState, LedgerError> {
        let seq = how.rsplit(' ').next().and_then(|seq| seq.parse::<u64>().ok());
        let seq = seq.ok_or_else(|| StoreError::Damaged(format!("{request} ended as `{how}`")))?;
        // With the one before, which may be of the same request.
        let mut entries = self.entries(tenant, seq.saturating_sub(2), 2).await?;
        let entry = entries.iter().position(|entry| entry.seq == seq);
        let entry = entry.map(|at| entries.remove(at)).ok_or_else(|| LedgerError::Archived(request.clone()))?;
        match entry.kind {
            EntryKind::Release => Ok(GenerationState::Released { entry: Box::new(entry) }),
            EntryKind::Post => {
                let left = refundable.map(|left| entry::nano(left, "refundable")).transpose()?;
                let refunded = entry.amount.checked_sub(left.unwrap_or(entry.amount))?;
                let of_it = |other: &&Entry| other.is_write_off() && other.request == entry.request;
                let written_off = entries.iter().find(of_it).map_or(NanoUsd::ZERO, |entry| entry.amount);
                Ok(GenerationState::Charged { entry: Box::new(entry), refunded, written_off })
            }
            kind => Err(StoreError::Damaged(format!("{request} ended with a {}", kind.as_str())).into()),
        }
    }
}

/// As the store keeps them with an open hold.
fn read_terms(text: &str) -> Result<Terms, String> {
    let mut parts = text.split('\x1f');
    let mut part = |what: &str| parts.next().ok_or_else(|| format!("the terms of a hold lack {what}"));
    let (key, model) = (part("key")?.into(), part("model")?.into());
    let mut amount = |what: &str| entry::whole(part(what)?, what).map(NanoUsd::new);
    let price = Price { input: amount("input")?, output: amount("output")?, cached_input: amount("cached_input")? };
    Ok(Terms { key, model, price, price_version: part("version")?.to_owned() })
}

/// Requests are named by number, and the number begins with the time.
fn named_at(request: &RequestId) -> Option<u64> {
    let number = Uuid::try_parse(request.as_str().strip_prefix("chatcmpl-")?).ok()?;
    let (seconds, nanos) = number.get_timestamp()?.to_unix();
    seconds.checked_mul(1000)?.checked_add(u64::from(nanos) / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requests_name_says_when_it_came() {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
        let named = named_at(&RequestId::generate()).unwrap();
        assert!(named.abs_diff(now) < 60_000, "{named}");
        assert_eq!(named_at(&"chatcmpl-x".into()), None);
        assert_eq!(named_at(&"x".into()), None);
    }

    #[test]
    fn terms_that_lack_something_are_damage() {
        let whole = "k\x1fm\x1f1\x1f2\x1f3\x1fv1\x1f20261123\x1f90";
        let terms = read_terms(whole).unwrap();
        assert_eq!(
            (terms.key.as_str(), terms.price.output, terms.price_version.as_str()),
            ("k", NanoUsd::new(2), "v1")
        );
        for bad in ["", "k\x1fm", "k\x1fm\x1fx\x1f2\x1f3\x1fv1", "k\x1fm\x1f1\x1f2\x1f3"] {
            assert!(read_terms(bad).is_err(), "{bad:?}");
        }
    }
}
