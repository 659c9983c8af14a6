use std::{
    collections::{HashMap, HashSet},
    path::Path,
    time::Duration,
};

use redis::FromRedisValue;
use serde::Serialize;

use super::{
    Ledger, LedgerError,
    archive::{self, Examined},
    audit::{Audit, Stored},
    counters::{Counted, HOUR_MS, Hash},
    entry,
};
use crate::{
    domain::{NodeId, TenantId},
    store::{Function, StoreError, keys},
};

/// Entries read at a time.
const PAGE: usize = 1000;
/// Counters of hours read in one round trip.
const HOURS_PER_CALL: usize = 512;
/// They are kept for a day longer.
const HOURS_KEPT: u64 = 399 * 24;
/// How often a tenant is looked at again that is being archived, and how long after.
const TRIES: usize = 50;
const PAUSE: Duration = Duration::from_millis(50);
/// Faults that a report names; further ones are only counted.
const FAULTS_MAX: usize = 1000;

/// What [`Ledger::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub tenants: usize,
    pub entries: u64,
    pub open_holds: usize,
    /// grants + adjustments − balance − open holds − charges + refunds, over all tenants.
    pub imbalance_nano_usd: i128,
    /// Each names its tenant and what contradicts what.
    pub faults: Vec<String>,
    /// Also those that `faults` had no room for.
    pub faults_total: usize,
}

impl Report {
    pub fn is_balanced(&self) -> bool {
        self.imbalance_nano_usd == 0 && self.faults_total == 0
    }
}

/// What was found of one tenant.
struct Verdict {
    entries: u64,
    open_holds: usize,
    imbalance: i128,
    faults: Vec<String>,
}

impl Ledger {
    /// Re-adds every entry of every tenant that the store has and compares the result with the stored accounts, holds,
    /// leases and counters; what is archived is taken for what the store has of its end. Safe beside live traffic:
    /// each tenant is judged as of one instant. Needs memory for the request identifiers of one tenant at a time.
    pub async fn verify(&self) -> Result<Report, LedgerError> {
        self.verify_tenants(&self.tenants().await?, None).await
    }

    /// The same from the first entry on, with all files of an archive.
    pub async fn verify_with(&self, archive: &Path) -> Result<Report, LedgerError> {
        self.verify_tenants(&self.tenants().await?, Some(archive)).await
    }

    /// The same for some tenants only.
    pub async fn verify_tenants(&self, tenants: &[TenantId], archive: Option<&Path>) -> Result<Report, LedgerError> {
        let mut report = Report::default();
        for tenant in tenants {
            report.tenants += 1;
            let Verdict { entries, open_holds, imbalance, faults } = match self.judge(tenant, archive).await {
                Ok(verdict) => verdict,
                Err(StoreError::Damaged(fault)) => Verdict::unreadable(tenant, &fault),
                Err(error) => return Err(error.into()),
            };
            report.entries += entries;
            report.open_holds += open_holds;
            report.imbalance_nano_usd = report.imbalance_nano_usd.saturating_add(imbalance);
            report.faults_total += faults.len();
            let room = FAULTS_MAX - report.faults.len();
            report.faults.extend(faults.into_iter().take(room));
        }
        Ok(report)
    }

    /// Whether a node is the one that verifies, for as long as `lease` from now: each lets all others rest. Two may both
    /// be for a moment, which costs nothing but their time.
    pub(crate) async fn is_verifier(&self, node: &NodeId, lease: Duration) -> Result<bool, StoreError> {
        let lease_ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        let mut question = redis::pipe();
        question.cmd("SET").arg(keys::VERIFIER).arg(node.as_str()).arg("NX").arg("PX").arg(lease_ms);
        question.cmd("GET").arg(keys::VERIFIER);
        let answers = self.store.query_all(&question).await?;
        type Answers = (Option<String>, Option<String>);
        let answers = Answers::from_redis_value(redis::Value::Array(answers));
        let (_, owner) = answers.map_err(|error| StoreError::Damaged(format!("{}: {error}", keys::VERIFIER)))?;
        let is_own = owner.as_deref() == Some(node.as_str());
        if is_own {
            let _: i64 = self.store.query(redis::cmd("PEXPIRE").arg(keys::VERIFIER).arg(lease_ms)).await?;
        }
        Ok(is_own)
    }

    /// Again where its entries were archived meanwhile.
    async fn judge(&self, tenant: &TenantId, archive: Option<&Path>) -> Result<Verdict, StoreError> {
        for _ in 0..TRIES {
            let Some(stored) = self.snapshot(tenant).await? else {
                return Ok(Verdict::unreadable(tenant, "is listed and has no account"));
            };
            let verdict = self.judge_as_of(tenant, &stored, archive).await?;
            let archived: Option<u64> =
                self.store.query(redis::cmd("HGET").arg(keys::account(tenant)).arg("archived")).await?;
            if archived == Some(stored.archived) {
                return Ok(verdict);
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(Verdict::unreadable(tenant, "was being archived all the while; verify it again"))
    }

    async fn judge_as_of(
        &self,
        tenant: &TenantId,
        stored: &Stored,
        archive: Option<&Path>,
    ) -> Result<Verdict, StoreError> {
        let checkpoint = archive::checkpoint(stored)?;
        let examined = match archive {
            Some(folder) => {
                let (folder, tenant, checkpoint) = (folder.to_owned(), tenant.clone(), checkpoint.clone());
                let examine = move || archive::examine(&folder, &tenant, checkpoint.as_ref());
                let examined = tokio::task::spawn_blocking(examine).await;
                examined.map_err(|error| StoreError::Damaged(format!("the archive could not be examined: {error}")))?
            }
            None => Examined { faults: Vec::new(), audit: None },
        };
        let begin = || checkpoint.map_or_else(|| Audit::of(tenant.clone()), |found| Audit::after(found.books));
        let mut audit = examined.audit.unwrap_or_else(begin);
        self.audit(tenant, &mut audit, stored).await?;
        let (imbalance, found) = audit.finish(stored);
        let mut faults: Vec<String> = examined.faults.iter().map(|fault| format!("{tenant}: {fault}")).collect();
        faults.extend(found);
        Ok(Verdict { entries: stored.seq, open_holds: stored.holds.len(), imbalance, faults })
    }

    async fn audit(&self, tenant: &TenantId, audit: &mut Audit, stored: &Stored) -> Result<(), StoreError> {
        let mut after = stored.archived;
        while after < stored.seq {
            let page = self.raw_entries(tenant, after, PAGE).await?;
            if page.is_empty() {
                break;
            }
            for (id, fields) in page {
                let seq = id.split('-').next().and_then(|seq| seq.parse().ok());
                after = seq.ok_or_else(|| StoreError::Damaged(format!("{tenant}: entry number {id}")))?;
                if after > stored.seq {
                    break;
                }
                match entry::parse(&id, &fields) {
                    Ok(entry) => audit.take(&entry),
                    Err(fault) => audit.unreadable(fault),
                }
            }
        }
        self.check_ends(tenant, audit).await?;
        self.check_hours(tenant, audit, stored).await
    }

    /// Usage counters of every hour that is kept, and of which all entries are in the store.
    async fn check_hours(&self, tenant: &TenantId, audit: &mut Audit, stored: &Stored) -> Result<(), StoreError> {
        let first = match audit.archived_unix_ms() {
            Some(archived) => archived / HOUR_MS + 1,
            None => audit.counters.first_hour().unwrap_or(u64::MAX),
        };
        let kept = (stored.counted.unix_ms / HOUR_MS).saturating_sub(HOURS_KEPT);
        let last = stored.at / HOUR_MS;
        let mut faults = Vec::new();
        if first <= last && kept < last {
            faults.extend(audit.counters.check_hour(last, &stored.counted.hour));
        }
        let hours: Vec<u64> = (first.max(kept + 1)..last).collect();
        for hours in hours.chunks(HOURS_PER_CALL) {
            let mut question = redis::pipe();
            for hour in hours {
                question.cmd("HGETALL").arg(keys::usage_hour(tenant, *hour));
            }
            for (hour, counted) in hours.iter().zip(self.store.query_all(&question).await?) {
                let counted = Hash::from_redis_value(counted);
                let counted = counted.map_err(|error| StoreError::Damaged(format!("usage counters: {error}")))?;
                faults.extend(audit.counters.check_hour(*hour, &counted));
            }
        }
        faults.into_iter().for_each(|fault| audit.fault(fault));
        Ok(())
    }

    /// Whether the store remembers the ends that the entries record, which is what keeps a settlement from
    /// being repeated.
    async fn check_ends(&self, tenant: &TenantId, audit: &mut Audit) -> Result<(), StoreError> {
        let expected: Vec<(String, String)> = audit
            .remembered()
            .map(|(name, what)| (name.to_owned(), what.to_owned()))
            .chain(audit.left_to_refund())
            .collect();
        for ends in expected.chunks(PAGE) {
            let mut command = redis::cmd("HMGET");
            command.arg(keys::ended(tenant));
            for (name, _) in ends {
                command.arg(name);
            }
            let remembered: Vec<Option<String>> = self.store.query(&command).await?;
            for ((name, what), remembered) in ends.iter().zip(remembered) {
                audit.check_remembered(name, what, remembered.as_deref());
            }
        }
        Ok(())
    }

    pub(super) async fn snapshot(&self, tenant: &TenantId) -> Result<Option<Stored>, StoreError> {
        type Open = HashMap<String, i64>;
        type Snapshot = (Hash, Hash, HashSet<String>, Hash, Open, u64, u64, Option<String>, u64, Hash, Hash, Hash);
        let (account, holds, leases, terms, open, ended, entries, checkpoint, unix_ms, hour, day, month): Snapshot =
            self.store.call(Function::Snapshot, &keys::ledger(tenant), &[]).await?;
        if account.is_empty() && entries == 0 && holds.is_empty() {
            return Ok(None);
        }
        let text =
            |name: &str| account.get(name).cloned().ok_or_else(|| StoreError::Damaged(format!("account lacks {name}")));
        let field = |name: &str| entry::whole(&text(name)?, name).map_err(StoreError::Damaged);
        let count =
            |name: &str| u64::try_from(field(name)?).map_err(|_| StoreError::Damaged(format!("negative {name}")));
        let holds = holds
            .into_iter()
            .map(|(request, amount)| Ok((request, entry::whole(&amount, "open hold").map_err(StoreError::Damaged)?)))
            .collect::<Result<_, StoreError>>()?;
        Ok(Some(Stored {
            balance: field("balance")?,
            available: field("available")?,
            held: field("held")?,
            charged: field("charged")?,
            granted: field("granted")?,
            refunded: field("refunded")?,
            adjusted: field("adjusted")?,
            credit: field("credit")?,
            seq: count("seq")?,
            archived: count("archived")?,
            at: count("at")?,
            link: text("link")?,
            holds,
            leases,
            terms,
            open,
            ended,
            checkpoint,
            counted: Counted { unix_ms, hour, day, month },
        }))
    }
}

impl Verdict {
    fn unreadable(tenant: &TenantId, fault: &str) -> Self {
        Self { entries: 0, open_holds: 0, imbalance: 0, faults: vec![format!("{tenant}: {fault}")] }
    }
}
