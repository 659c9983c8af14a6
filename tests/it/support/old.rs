//! A tenant with a past that can be archived.

use std::{path::PathBuf, time::Duration};

use lightcone::{
    admission::AdmittedRequest,
    domain::{Month, NanoUsd, RequestId},
    ledger::{Archived, Entry, Ledger, Refund, ReleaseReason, Report, Statement},
    store::keys,
};
use tempfile::TempDir;
use uuid::{ContextV7, Timestamp, Uuid};

use super::{
    aging::age,
    house::{House, settlement},
};

/// A tenant with some months behind it: entries of each kind, holds that stay open across borders, one that expired.
pub struct Old {
    pub house: House,
    pub folder: TempDir,
    /// Charged in the first month.
    pub charged: RequestId,
    /// Given back in the month before this one.
    pub released: RequestId,
    /// Still open, since the first month.
    pub open: AdmittedRequest,
    /// Expired in the month before this one.
    pub expired: AdmittedRequest,
    pub entries: Vec<Entry>,
}

impl Old {
    pub async fn furnished(charges: usize) -> Self {
        let house = House::with_balance(1_000_000_000).await;
        let charged = house.admit_as(named_days_ago(115), 10, 10).await.unwrap();
        house.ledger.settle(&settlement(&charged, 4)).await.unwrap();
        let open = house.admit(20, 10).await.unwrap();
        for _ in 0..charges {
            let admitted = house.admit(1, 1).await.unwrap();
            house.ledger.settle(&settlement(&admitted, 1)).await.unwrap();
        }
        house.ledger.grant(&house.tenant, NanoUsd::new(500), "invoice 7", "wire").await.unwrap();
        age(&house, &house.tenant, 40).await;
        let refund = refund(charged.request(), 100, "sorry");
        house.ledger.refund(&house.tenant, &refund).await.unwrap();
        house.ledger.set_credit(&house.tenant, NanoUsd::new(1_000), "line").await.unwrap();
        age(&house, &house.tenant, 40).await;
        let released = house.admit_as(named_days_ago(33), 20, 10).await.unwrap();
        house.ledger.release(&house.tenant, released.request(), ReleaseReason::Draining).await.unwrap();
        let expired = house.admit_as(named_days_ago(33), 7, 10).await.unwrap();
        house.let_lease_run_out(expired.request()).await;
        // One whose own lease is short, so that it trusts its connection at once.
        let sweeper = Ledger::new(house.store.clone(), Duration::from_millis(1));
        assert_eq!(sweeper.sweep_expired_holds().await.unwrap(), 1);
        age(&house, &house.tenant, 1).await;
        let month = Month::of(house.ledger.now_unix_ms().await.unwrap());
        let last = house.ledger.last_entries(&house.tenant, 1).await.unwrap().remove(0).unix_ms;
        // So that the month before this one ends with them, whatever day it is.
        let days = (last.saturating_sub(month.begins_unix_ms())).div_ceil(86_400_000);
        age(&house, &house.tenant, days).await;
        house.ledger.settle(&settlement(&house.admit(5, 5).await.unwrap(), 2)).await.unwrap();
        let entries = house.ledger.entries(&house.tenant, 0, 100_000).await.unwrap();
        house.assert_balanced().await;
        let mut raw = house.valkey.raw().await;
        let (account, created) = (keys::account(&house.tenant), entries[0].unix_ms);
        redis::cmd("HSET").arg(account).arg("created").arg(created).exec_async(&mut raw).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let [charged, released] = [charged, released].map(|admitted| admitted.request().clone());
        Self { house, folder, charged, released, open, expired, entries }
    }

    pub async fn month(&self) -> Month {
        Month::of(self.house.ledger.now_unix_ms().await.unwrap())
    }

    pub async fn archive(&self, before: Month) -> Archived {
        self.house.ledger.archive(self.folder.path(), before).await.unwrap()
    }

    /// Of before this month.
    pub fn old(&self, month: Month) -> Vec<Entry> {
        self.entries.iter().filter(|entry| entry.unix_ms < month.begins_unix_ms()).cloned().collect()
    }

    pub async fn report(&self) -> Report {
        self.house.ledger.verify_with(self.folder.path()).await.unwrap()
    }

    pub async fn assert_balanced(&self) {
        self.house.assert_balanced().await;
        let report = self.report().await;
        assert!(report.is_balanced(), "{report:#?}");
    }

    /// Of all months that are over, oldest first.
    pub async fn statements(&self, ledger: &Ledger) -> Vec<Statement> {
        let (mut month, last) = (Month::of(self.entries[0].unix_ms), self.month().await);
        let mut statements = Vec::new();
        while month < last {
            statements.push(ledger.statement(&self.house.tenant, month).await.unwrap());
            month = Month::of(month.ends_unix_ms());
        }
        statements
    }

    pub fn tenant_folder(&self) -> PathBuf {
        self.folder.path().join(self.house.tenant.as_str())
    }

    pub fn files(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.tenant_folder()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| !path.file_name().unwrap().to_string_lossy().starts_with('.')).collect()
    }
}

pub fn refund(request: &RequestId, nano: i64, reference: &str) -> Refund {
    Refund {
        request: request.clone(),
        amount: NanoUsd::new(nano),
        reference: reference.to_owned(),
        note: String::new(),
    }
}

/// As an edge would have named a request then.
fn named_days_ago(days: u64) -> RequestId {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let then = Timestamp::from_unix(ContextV7::new(), now.as_secs() - days * 86_400, 0);
    RequestId::from(format!("chatcmpl-{}", Uuid::new_v7(then).simple()))
}
