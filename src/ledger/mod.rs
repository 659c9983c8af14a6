//! A tenant's money: grants, holds, settlements, refunds, and the proof that they add up.
//!
//! Promises, per tenant and at every instant: grants + adjustments = balance + open holds + charges − refunds; the
//! balance is never below what the credit line allows; one settlement per request, ever; every change appends one
//! entry to a ledger, linked to the one before, from which [`Ledger::verify`] can re-add everything. Holds are
//! leases: what nobody renews is released. Never computes with floats, never charges more than was held, and never
//! takes an amount that it cannot read for zero.

mod archive;
mod audit;
mod books;
mod counters;
mod entry;
pub(crate) mod funds;
mod generation;
mod prices;
mod receipt;
mod receipt_key;
mod statement;
mod usage;
mod verify;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

pub use archive::{ArchiveError, Archived, Volume, read as read_archive};
pub use books::{Books, Terms};
pub use entry::{Account, Entry, EntryKind, EntryWithMovements, Movement, NO_LINK};
pub use funds::{Moved, Refund, TEXT_CHARACTERS_MAX};
pub use generation::{Generation, GenerationState};
pub use prices::{Prices, PricesError};
pub use receipt::{RECEIPT_VERSION, Receipt, ReceiptError, ReceiptSignature, ReceiptStatement};
pub use receipt_key::{RECEIPT_KEY_FILE, ReceiptKey, ReceiptKeyError, Receipts};
pub use statement::{Charge, Line, Position, Statement, StatementDraft, StatementError, StatementTotals};
pub use usage::{UsageBucket, UsageError, UsageRange, UsageRow, UsageSums, UsageWidth, UsageWish};
pub use verify::Report;

use crate::{
    domain::{FinishReason, FundsEnd, KeyId, ModelId, MoneyError, NanoUsd, Price, RequestId, TenantId, Usage},
    fault,
    store::{ClockWatch, Function, Reply, Store, StoreError, keys},
};

/// Calls to the store that one operation over many tenants has under way at a time.
pub(crate) const CALLS_AT_ONCE: usize = 32;
/// Holds of one tenant that one call sweeps or renews.
const HOLDS_PER_CALL: usize = 256;
/// Of so many sweeps one looks for leases that are too long.
const SWEEPS_PER_LOOK_AHEAD: u64 = 8;
/// Hardly a lease is longer. Those that end later are looked at by their own length.
const LEASE_MS_USUAL: u64 = 60_000;
/// Tenants asked about expired holds in one round trip.
const TENANTS_PER_ROUND: usize = 512;

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// There is nothing to charge the request to: it was released.
    #[error("the hold of {0} is gone; the request is free of charge")]
    HoldGone(RequestId),
    /// The store has no trace of the request.
    #[error("nothing is known of {0}")]
    Unknown(RequestId),
    #[error("{request} would cost {amount}, more than the {held} on hold for it")]
    ExceedsHold { request: RequestId, amount: NanoUsd, held: NanoUsd },
    /// Another worker has it by now.
    #[error("{0} was taken over; it is not this attempt's to settle")]
    Superseded(RequestId),
    #[error("{0} was admitted for another key, model or price than it is settled with")]
    OtherTerms(RequestId),
    #[error("there is no tenant {0}")]
    UnknownTenant(TenantId),
    #[error("{0} is not an amount that can be moved so")]
    BadAmount(NanoUsd),
    #[error("the balance of {balance} does not cover {amount}")]
    Insufficient { balance: NanoUsd, amount: NanoUsd },
    #[error("`{0}` stands for something else already")]
    OtherReference(String),
    #[error("{0} was not charged, or so long ago that it is archived; use an adjustment")]
    NotCharged(RequestId),
    /// And not in a folder that this process knows.
    #[error("what became of {0} is archived")]
    Archived(RequestId),
    #[error("archive: {0}")]
    Archive(#[from] ArchiveError),
    #[error("of {request} only {left} is left to be given back")]
    ExceedsCharge { request: RequestId, left: NanoUsd },
    #[error(
        "a note may have at most {TEXT_CHARACTERS_MAX} characters, a reference 1 to {TEXT_CHARACTERS_MAX}, none of them \
         control characters"
    )]
    BadText,
    #[error(transparent)]
    Money(#[from] MoneyError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a request that has ended is billed for. The terms are those of its admission.
#[derive(Clone, Debug, PartialEq)]
pub struct Settlement {
    pub request: RequestId,
    pub tenant: TenantId,
    pub key: KeyId,
    pub model: ModelId,
    pub usage: Usage,
    pub price: Price,
    pub price_version: String,
    pub reason: EndReason,
    /// SHA-256 of the ids of the tokens that were put out, where they are known.
    pub digest: Option<[u8; 32]>,
    /// Of the claim under which it ran.
    pub attempt: u32,
}

/// What a request that is taken over may decode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TakenOver {
    /// So much is on hold for it.
    Held(NanoUsd),
    /// Its last worker has settled it, with so many tokens, and then was lost: what is decoded again costs nothing.
    Settled { completion_tokens: u32 },
    /// The store has lost its hold, or has let it expire: the balance will be charged.
    Unheld,
    /// It was ended free of charge.
    Ended,
}

/// Why a request that is charged came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    Stop,
    Length,
    /// There was no money for another token.
    BalanceExhausted,
    SpendLimitReached,
    /// By its client, or because its client was gone.
    Cancelled,
    /// The process that ran it died; charged is what its journal says.
    WorkerLost,
}

impl EndReason {
    pub const ALL: [Self; 6] =
        [Self::Stop, Self::Length, Self::BalanceExhausted, Self::SpendLimitReached, Self::Cancelled, Self::WorkerLost];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::BalanceExhausted => "balance_exhausted",
            Self::SpendLimitReached => "spend_limit_reached",
            Self::Cancelled => "cancelled",
            Self::WorkerLost => "worker_lost",
        }
    }
}

impl EndReason {
    /// Of an answer that ended so, where money may have been what ended it.
    pub fn of(reason: FinishReason, funds: Option<FundsEnd>) -> Self {
        match (reason, funds) {
            (FinishReason::Cancelled, _) => Self::Cancelled,
            (_, Some(FundsEnd::Balance)) => Self::BalanceExhausted,
            (_, Some(FundsEnd::SpendLimit)) => Self::SpendLimitReached,
            (FinishReason::Stop, None) => Self::Stop,
            (FinishReason::Length, None) => Self::Length,
        }
    }
}

impl std::str::FromStr for EndReason {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|reason| reason.as_str() == text);
        known.ok_or_else(|| format!("`{text}` is no reason of an end"))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// What the request was charged, by this call or by an earlier one.
    pub amount: NanoUsd,
    /// An earlier call had settled it; this one changed nothing.
    pub repeated: bool,
    /// Its hold had expired, so that the balance was charged.
    pub late: bool,
}

/// More output tokens for a request under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extended {
    pub tokens: u32,
    /// Why there are not as many as were wanted; there is no use in asking again.
    pub limited_by: Option<FundsEnd>,
}

/// Why a hold was given up without a charge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseReason {
    /// Admitted, and then not accepted by the queue.
    NotQueued,
    /// The client went away before any work was done.
    Withdrawn,
    WorkerFailed,
    /// The process that had it died. If its journal is found and says that tokens were decoded, they are charged late.
    WorkerLost,
    DeadlineExceeded,
    /// Too many workers were lost with it.
    AttemptsExhausted,
    Draining,
}

impl ReleaseReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotQueued => "not_queued",
            Self::Withdrawn => "withdrawn",
            Self::WorkerFailed => "worker_failed",
            Self::WorkerLost => "worker_lost",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::AttemptsExhausted => "attempts_exhausted",
            Self::Draining => "draining",
        }
    }
}

/// Money of a tenant at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Balance {
    /// Free to be spent; below zero where a credit line is in use.
    #[serde(rename = "balance_nano_usd")]
    pub balance: NanoUsd,
    /// Set aside for requests under way.
    #[serde(rename = "held_nano_usd")]
    pub held: NanoUsd,
    #[serde(rename = "charged_nano_usd")]
    pub charged: NanoUsd,
    #[serde(rename = "granted_nano_usd")]
    pub granted: NanoUsd,
    #[serde(rename = "refunded_nano_usd")]
    pub refunded: NanoUsd,
    #[serde(rename = "adjusted_nano_usd")]
    pub adjusted: NanoUsd,
    /// How far below zero the balance may go.
    #[serde(rename = "credit_nano_usd")]
    pub credit: NanoUsd,
    /// What may be spent: balance and credit line.
    #[serde(rename = "available_nano_usd")]
    pub available: NanoUsd,
}

impl Balance {
    const FIELDS: [&str; 8] = ["balance", "held", "charged", "granted", "refunded", "adjusted", "credit", "available"];

    /// Of an account that was read whole.
    pub(crate) fn of(tenant: &TenantId, account: &HashMap<String, String>) -> Result<Self, StoreError> {
        Self::read(tenant, |_, name| account.get(name).map(String::as_str))
    }

    fn read<'a>(tenant: &TenantId, field: impl Fn(usize, &'static str) -> Option<&'a str>) -> Result<Self, StoreError> {
        let mut amounts = [NanoUsd::ZERO; Self::FIELDS.len()];
        for (index, name) in Self::FIELDS.into_iter().enumerate() {
            let text = field(index, name);
            let text = text.ok_or_else(|| StoreError::Damaged(format!("account of {tenant} lacks {name}")))?;
            amounts[index] = entry::nano(text, name)?;
        }
        let [balance, held, charged, granted, refunded, adjusted, credit, available] = amounts;
        Ok(Self { balance, held, charged, granted, refunded, adjusted, credit, available })
    }
}

#[derive(Clone)]
pub struct Ledger {
    pub(crate) store: Store,
    hold_lease: Duration,
    clock: Arc<ClockWatch>,
    /// Made so far.
    sweeps: Arc<AtomicU64>,
    archive: Option<Arc<archive::Shelf>>,
}

impl Ledger {
    /// `hold_lease`: a hold that nobody has renewed for this long is released.
    pub fn new(store: Store, hold_lease: Duration) -> Self {
        Self { store, hold_lease, clock: Arc::default(), sweeps: Arc::default(), archive: None }
    }

    /// Answers what is not in the store any more from the archive in a folder.
    pub fn with_archive(self, folder: PathBuf) -> Self {
        Self { archive: Some(Arc::new(archive::Shelf::new(folder))), ..self }
    }

    /// See [`Store::connected_for`].
    pub(crate) fn store_connected_for(&self) -> Duration {
        self.store.connected_for()
    }

    pub fn hold_lease(&self) -> Duration {
        self.hold_lease
    }

    /// Sets more output tokens aside for an open request, at its own price: as many of `wanted` as there is money
    /// for. `known` is on hold as far as the caller knows; what an earlier call, whose answer was lost, has set aside
    /// beyond it is told instead.
    pub async fn extend(
        &self,
        tenant: &TenantId,
        request: &RequestId,
        wanted: u32,
        known: NanoUsd,
    ) -> Result<Extended, LedgerError> {
        let (wanted, known) = (wanted.to_string(), known.nano().to_string());
        let arguments = [tenant.as_str(), request.as_str(), &wanted, &known];
        fault::point("ledger.extend.asked");
        let mut reply = self.call(Function::Extend, tenant, &arguments).await?;
        fault::point("ledger.extend.answered");
        match reply.word() {
            "extended" => {
                let tokens = reply.next("tokens")?;
                let limited_by = reply.funds_end()?;
                Ok(Extended { tokens, limited_by })
            }
            "absent" => Err(LedgerError::HoldGone(request.clone())),
            "overflow" => Err(MoneyError::Overflow.into()),
            "unknown_tenant" => Err(LedgerError::UnknownTenant(tenant.clone())),
            _ => Err(reply.unexpected("extend").into()),
        }
    }

    /// Makes the worker of this attempt the only one that may settle a request.
    ///
    /// # Errors
    /// [`LedgerError::Superseded`] where a later attempt has.
    pub async fn take_over(
        &self,
        tenant: &TenantId,
        request: &RequestId,
        attempt: u32,
    ) -> Result<TakenOver, LedgerError> {
        let arguments = [tenant.as_str(), request.as_str(), &attempt.to_string()];
        let mut reply = self.call(Function::TakeOver, tenant, &arguments).await?;
        match reply.word() {
            "held" => Ok(TakenOver::Held(entry::nano(&reply.next::<String>("hold")?, "hold")?)),
            "posted" => Ok(TakenOver::Settled { completion_tokens: reply.next("tokens")? }),
            "unheld" => match reply.next::<String>("end of the request")?.as_str() {
                "" => Ok(TakenOver::Unheld),
                ended if ended.starts_with("release expired ") => Ok(TakenOver::Unheld),
                _ => Ok(TakenOver::Ended),
            },
            "superseded" => Err(LedgerError::Superseded(request.clone())),
            "unknown_tenant" => Err(LedgerError::UnknownTenant(tenant.clone())),
            _ => Err(reply.unexpected("take over").into()),
        }
    }

    /// Makes a request free, whether it has ended or not: it was asked again before it had answered.
    pub async fn forgive(&self, tenant: &TenantId, request: &RequestId) -> Result<(), LedgerError> {
        let reply = self.call(Function::Forgive, tenant, &[tenant.as_str(), request.as_str()]).await?;
        match reply.word() {
            "released" | "refunded" | "repeated" | "free" => Ok(()),
            "unknown_tenant" => Err(LedgerError::UnknownTenant(tenant.clone())),
            _ => Err(reply.unexpected("forgive").into()),
        }
    }

    /// Charges what was used and gives the rest of the hold back. Safe to repeat until it answers: a request
    /// is settled once, ever. One whose hold has expired is charged to the balance; what that cannot pay is
    /// written off.
    pub async fn settle(&self, settlement: &Settlement) -> Result<Settled, LedgerError> {
        self.post(settlement, "").await
    }

    /// The same for whoever took the request out of the queue and began it: also where the store has no trace of it,
    /// because it died and lost its last second.
    pub async fn settle_begun(&self, settlement: &Settlement) -> Result<Settled, LedgerError> {
        self.post(settlement, "1").await
    }

    async fn post(&self, settlement: &Settlement, begun: &str) -> Result<Settled, LedgerError> {
        let Settlement { request, tenant, key, model, usage, price, price_version, reason, digest, attempt } =
            settlement;
        let amount = price.cost(usage)?;
        let numbers = [
            amount.nano().to_string(),
            usage.prompt_tokens.to_string(),
            usage.completion_tokens.to_string(),
            usage.cached_tokens.to_string(),
            price.input.nano().to_string(),
            price.output.nano().to_string(),
            price.cached_input.nano().to_string(),
            attempt.to_string(),
        ];
        let [cost, prompt, completion, cached, input, output, cached_input, attempt] = &numbers;
        let digest = digest.map(hex::encode).unwrap_or_default();
        let arguments = [
            tenant.as_str(),
            request.as_str(),
            cost,
            key.as_str(),
            model.as_str(),
            prompt,
            completion,
            cached,
            input,
            output,
            cached_input,
            price_version,
            reason.as_str(),
            &digest,
            begun,
            attempt,
        ];
        fault::point("ledger.settle.asked");
        let mut reply = self.call(Function::Settle, tenant, &arguments).await?;
        fault::point("ledger.settle.answered");
        match reply.word() {
            "posted" => {
                let late = reply.next::<String>("way")? == "late";
                Ok(Settled { amount, repeated: false, late })
            }
            "ended" => {
                let how: String = reply.next("end of the request")?;
                match how.strip_prefix("post ").and_then(|rest| rest.split(' ').next()) {
                    Some(posted) => {
                        Ok(Settled { amount: entry::nano(posted, "posted amount")?, repeated: true, late: false })
                    }
                    None => Err(LedgerError::HoldGone(request.clone())),
                }
            }
            "absent" => Err(LedgerError::Unknown(request.clone())),
            "exceeds_hold" => {
                let held = entry::nano(&reply.next::<String>("hold")?, "hold")?;
                Err(LedgerError::ExceedsHold { request: request.clone(), amount, held })
            }
            "superseded" => Err(LedgerError::Superseded(request.clone())),
            "other_terms" => Err(LedgerError::OtherTerms(request.clone())),
            "overflow" => Err(MoneyError::Overflow.into()),
            "unknown_tenant" => Err(LedgerError::UnknownTenant(tenant.clone())),
            _ => Err(reply.unexpected("settle").into()),
        }
    }

    /// Gives a hold back without a charge. `false`: it had ended before, one way or the other.
    pub async fn release(
        &self,
        tenant: &TenantId,
        request: &RequestId,
        why: ReleaseReason,
    ) -> Result<bool, LedgerError> {
        let arguments = [tenant.as_str(), request.as_str(), why.as_str()];
        fault::point("ledger.release.asked");
        let reply = self.call(Function::Release, tenant, &arguments).await?;
        fault::point("ledger.release.answered");
        match reply.word() {
            "released" => Ok(true),
            "absent" => Ok(false),
            _ => Err(reply.unexpected("release").into()),
        }
    }

    /// Extends the leases of open holds by one lease from now. Those that have ended are passed over.
    pub async fn renew_holds(&self, holds: &[(TenantId, RequestId)]) -> Result<(), LedgerError> {
        let mut by_tenant = std::collections::BTreeMap::<&TenantId, Vec<&RequestId>>::new();
        for (tenant, request) in holds {
            by_tenant.entry(tenant).or_default().push(request);
        }
        let lease_ms = &self.hold_lease.as_millis().to_string();
        let calls = by_tenant.iter().flat_map(|(tenant, requests)| {
            requests.chunks(HOLDS_PER_CALL).map(move |requests| async move {
                let mut arguments = vec![lease_ms.as_str()];
                arguments.extend(requests.iter().map(|request| request.as_str()));
                let reply = self.call(Function::Renew, tenant, &arguments).await?;
                match reply.word() {
                    "renewed" => Ok(()),
                    _ => Err(LedgerError::from(reply.unexpected("renew"))),
                }
            })
        });
        stream::iter(calls.collect::<Vec<_>>()).buffer_unordered(CALLS_AT_ONCE).try_collect::<Vec<()>>().await?;
        Ok(())
    }

    /// Releases holds whose lease ran out; answers how many. Within one lease after the store was away, or after
    /// its clock jumped, it releases none, because their owners could not renew them in time either.
    pub async fn sweep_expired_holds(&self) -> Result<usize, LedgerError> {
        // The question also finds out whether the store was away, which is only known once it has answered.
        let now = self.store.now_unix_ms().await?;
        if self.store.connected_for() < self.hold_lease || !self.clock.is_steady(now, self.hold_lease) {
            return Ok(0);
        }
        // A clock that was far ahead has made leases that end then. They are rare, and are looked for now and then.
        let looks_ahead = self.sweeps.fetch_add(1, Ordering::Relaxed).is_multiple_of(SWEEPS_PER_LOOK_AHEAD);
        let bound = now.saturating_add(LEASE_MS_USUAL).to_string();
        let arguments: &[&str] = if looks_ahead { &["0", &bound] } else { &["0"] };
        let mut swept = 0;
        for round in self.tenants().await?.chunks(TENANTS_PER_ROUND) {
            let mut question = redis::pipe();
            for tenant in round {
                let leases = keys::hold_leases(tenant);
                question.cmd("ZCOUNT").arg(&leases).arg("-inf").arg(now);
                if looks_ahead {
                    question.cmd("ZCOUNT").arg(&leases).arg(&bound).arg("+inf");
                }
            }
            let counts = self.store.query_all(&question).await?;
            for (tenant, counts) in round.iter().zip(counts.chunks(1 + usize::from(looks_ahead))) {
                if counts.iter().all(|count| *count == redis::Value::Int(0)) {
                    continue;
                }
                swept += spared(tenant, self.sweep_tenant(tenant, arguments).await)?.unwrap_or(0);
            }
        }
        Ok(swept)
    }

    /// Releases every open hold, whatever its lease says: for a node that knows that all who used this store
    /// before it are dead. Answers with how many there were.
    pub async fn release_left_over_holds(&self) -> Result<usize, LedgerError> {
        let mut released = 0;
        for tenant in &self.tenants().await? {
            released += spared(tenant, self.sweep_tenant(tenant, &["1"]).await)?.unwrap_or(0);
        }
        Ok(released)
    }

    /// What time it is by the clock that dates every entry.
    pub async fn now_unix_ms(&self) -> Result<u64, LedgerError> {
        Ok(self.store.now_unix_ms().await?)
    }

    pub async fn balance(&self, tenant: &TenantId) -> Result<Balance, LedgerError> {
        let mut command = redis::cmd("HMGET");
        command.arg(keys::account(tenant)).arg(&Balance::FIELDS);
        let fields: Vec<Option<String>> = self.store.query(&command).await?;
        if fields.iter().all(Option::is_none) {
            return Err(LedgerError::UnknownTenant(tenant.clone()));
        }
        Ok(Balance::read(tenant, |index, _| fields.get(index)?.as_deref())?)
    }

    /// How far the accounts are from `grants + adjustments = balance + holds + charges - refunds`, over all tenants
    /// and without regard to sign; and how many accounts cannot be read. Looks at the accounts only; [`Ledger::verify`]
    /// re-adds the entries.
    pub async fn imbalance(&self) -> Result<(NanoUsd, usize), LedgerError> {
        let (mut sum, mut unreadable) = (NanoUsd::ZERO, 0);
        for tenant in &self.tenants().await? {
            let Some(account) = spared(tenant, self.balance(tenant).await)? else {
                unreadable += 1;
                continue;
            };
            let Balance { balance, held, charged, granted, refunded, adjusted, .. } = account;
            let explained = balance.checked_add(held)?.checked_add(charged)?.checked_sub(refunded)?;
            let off = granted.checked_add(adjusted)?.checked_sub(explained)?;
            sum = if off < NanoUsd::ZERO { sum.checked_sub(off)? } else { sum.checked_add(off)? };
        }
        Ok((sum, unreadable))
    }

    /// Entries of a tenant after entry number `after` (0 for the first), at most `limit` of them.
    pub async fn entries(&self, tenant: &TenantId, after: u64, limit: usize) -> Result<Vec<Entry>, LedgerError> {
        let raw = self.raw_entries(tenant, after, limit).await?;
        raw.into_iter().map(|(id, fields)| Ok(entry::parse(&id, &fields).map_err(StoreError::Damaged)?)).collect()
    }

    /// The last `limit` entries of a tenant, oldest first.
    pub async fn last_entries(&self, tenant: &TenantId, limit: usize) -> Result<Vec<Entry>, LedgerError> {
        let written = self.last_seq(tenant).await?;
        self.entries(tenant, written.saturating_sub(limit as u64), limit).await
    }

    /// How many entries a tenant's ledger has.
    pub async fn last_seq(&self, tenant: &TenantId) -> Result<u64, LedgerError> {
        let written: Option<u64> = self.store.query(redis::cmd("HGET").arg(keys::account(tenant)).arg("seq")).await?;
        written.ok_or_else(|| LedgerError::UnknownTenant(tenant.clone()))
    }

    /// All tenants, in order of creation.
    pub(crate) async fn tenants(&self) -> Result<Vec<TenantId>, StoreError> {
        let ids: Vec<String> = self.store.query(redis::cmd("ZRANGE").arg(keys::TENANTS).arg(0).arg(-1)).await?;
        Ok(ids.into_iter().map(TenantId::from).collect())
    }

    async fn raw_entries(&self, tenant: &TenantId, after: u64, limit: usize) -> Result<Vec<entry::Raw>, StoreError> {
        let mut command = redis::cmd("XRANGE");
        command.arg(keys::entries(tenant)).arg(format!("({after}-0")).arg("+").arg("COUNT").arg(limit);
        self.store.query(&command).await
    }

    async fn sweep_tenant(&self, tenant: &TenantId, how: &[&str]) -> Result<usize, LedgerError> {
        let limit = HOLDS_PER_CALL.to_string();
        let arguments: Vec<&str> = [tenant.as_str(), &limit].into_iter().chain(how.iter().copied()).collect();
        let mut swept = 0;
        loop {
            let mut reply = self.call(Function::Sweep, tenant, &arguments).await?;
            if reply.word() != "swept" {
                return Err(reply.unexpected("sweep").into());
            }
            swept += reply.next::<usize>("holds swept")?;
            if reply.next::<usize>("leases seen")? < HOLDS_PER_CALL {
                return Ok(swept);
            }
        }
    }

    async fn call(&self, function: Function, tenant: &TenantId, arguments: &[&str]) -> Result<Reply, StoreError> {
        let arguments: Vec<&[u8]> = arguments.iter().map(|argument| argument.as_bytes()).collect();
        self.store.call(function, &keys::ledger(tenant), &arguments).await
    }
}

/// One damaged account must not keep all others from anything: nothing, where it is this one's.
fn spared<T>(tenant: &TenantId, done: Result<T, LedgerError>) -> Result<Option<T>, LedgerError> {
    match done {
        Ok(done) => Ok(Some(done)),
        Err(LedgerError::Store(StoreError::Damaged(fault))) => {
            tracing::error!(%tenant, fault, "an account is damaged");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
