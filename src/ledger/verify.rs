use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::{
    Ledger, LedgerError,
    audit::{Audit, Stored},
    entry,
};
use crate::{
    domain::TenantId,
    store::{Function, StoreError, keys},
};

/// Entries read at a time.
const PAGE: usize = 1000;
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

impl Ledger {
    /// Re-adds every entry of every tenant and compares the result with the stored accounts, holds and
    /// leases. Safe beside live traffic: each tenant is judged as of one instant. Needs memory for the
    /// request identifiers of one tenant at a time.
    pub async fn verify(&self) -> Result<Report, LedgerError> {
        let mut report = Report::default();
        for tenant in self.tenants().await? {
            report.tenants += 1;
            let (imbalance, faults) = match self.snapshot(&tenant).await {
                Ok(Some(stored)) => {
                    report.entries += stored.seq;
                    report.open_holds += stored.holds.len();
                    self.audit(&tenant, &stored).await?.finish(&stored)
                }
                Ok(None) => (0, vec![format!("{tenant}: is listed and has no account")]),
                Err(StoreError::Damaged(fault)) => (0, vec![format!("{tenant}: {fault}")]),
                Err(error) => return Err(error.into()),
            };
            report.imbalance_nano_usd = report.imbalance_nano_usd.saturating_add(imbalance);
            report.faults_total += faults.len();
            let room = FAULTS_MAX - report.faults.len();
            report.faults.extend(faults.into_iter().take(room));
        }
        Ok(report)
    }

    async fn audit(&self, tenant: &TenantId, stored: &Stored) -> Result<Audit, StoreError> {
        let mut audit = Audit::of(tenant.clone());
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
        self.check_ends(tenant, &mut audit).await?;
        Ok(audit)
    }

    /// Whether the store remembers the ends that the entries record, which is what keeps a settlement from
    /// being repeated.
    async fn check_ends(&self, tenant: &TenantId, audit: &mut Audit) -> Result<(), StoreError> {
        let expected: Vec<(String, String)> =
            audit.remembered().map(|(name, what)| (name.to_owned(), what.to_owned())).collect();
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

    async fn snapshot(&self, tenant: &TenantId) -> Result<Option<Stored>, StoreError> {
        type Texts = HashMap<String, String>;
        type Snapshot = (Texts, Texts, HashSet<String>, Texts, HashMap<String, i64>, u64, u64);
        let (account, holds, leases, terms, open, ended, entries): Snapshot =
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
        let key_of = |terms: String| terms.split('\x1f').next().unwrap_or_default().to_owned();
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
            link: text("link")?,
            holds,
            leases,
            keys: terms.into_iter().map(|(request, terms)| (request, key_of(terms))).collect(),
            open,
            ended,
        }))
    }
}
