//! Re-adds a tenant's ledger from its entries alone. Pure: knows no store.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::entry::{Entry, EntryKind};
use crate::domain::{KeyId, ModelId, NanoUsd, Price, TenantId};

/// What the store says about a tenant at one instant.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Stored {
    pub balance: i64,
    pub held: i64,
    pub charged: i64,
    pub granted: i64,
    pub refunded: i64,
    pub seq: u64,
    /// Open holds.
    pub holds: HashMap<String, i64>,
    /// Requests whose hold has a lease.
    pub leases: HashSet<String>,
    /// Grants, settlements and releases that must not happen again.
    pub ended: u64,
}

struct OpenHold {
    amount: i64,
    key: KeyId,
    model: ModelId,
    price: Price,
    price_version: String,
}

/// Takes entries in order, then [`finish`](Self::finish)es against the account. Sums are kept in 128 bits, so
/// that no ledger, however wrong, makes them wrap.
pub(super) struct Audit {
    tenant: TenantId,
    next_seq: u64,
    balance: i128,
    held: i128,
    charged: i128,
    granted: i128,
    open: BTreeMap<String, OpenHold>,
    /// Requests posted or released, and references granted (apart by kind).
    ended: HashSet<(bool, String)>,
    faults: Vec<String>,
}

impl Audit {
    pub fn of(tenant: TenantId) -> Self {
        Self {
            tenant,
            next_seq: 1,
            balance: 0,
            held: 0,
            charged: 0,
            granted: 0,
            open: BTreeMap::new(),
            ended: HashSet::new(),
            faults: Vec::new(),
        }
    }

    /// An entry that could not be read stands in its place in the sequence.
    pub fn unreadable(&mut self, fault: String) {
        self.next_seq += 1;
        self.fault(fault);
    }

    /// What must be remembered of an entry, so that what it did never happens again: field and value among
    /// the ends.
    pub fn end_of(entry: &Entry) -> Option<(String, String)> {
        match entry.kind {
            EntryKind::Grant => Some((format!("grant {}", entry.request), entry.amount.nano().to_string())),
            EntryKind::Hold => None,
            EntryKind::Post => Some((entry.request.clone(), format!("post {}", entry.amount.nano()))),
            EntryKind::Release => Some((entry.request.clone(), format!("release {}", entry.note))),
        }
    }

    pub fn remembered(&mut self, entry: &Entry, expected: &str, remembered: Option<&str>) {
        if remembered != Some(expected) {
            let remembered = remembered.unwrap_or("nothing");
            self.fault(format!("the end by entry {} is remembered as `{remembered}`, not `{expected}`", entry.seq));
        }
    }

    pub fn take(&mut self, entry: &Entry) {
        let seq = entry.seq;
        if seq != self.next_seq {
            self.fault(format!("entry {seq} stands where entry {} should", self.next_seq));
        }
        self.next_seq = seq.saturating_add(1);
        if entry.tenant != self.tenant {
            self.fault(format!("entry {seq} names tenant {}", entry.tenant));
        }
        if entry.amount < NanoUsd::ZERO {
            self.fault(format!("entry {seq} has the negative amount {}", entry.amount));
        }
        let amount = i128::from(entry.amount.nano());
        match entry.kind {
            EntryKind::Grant => {
                self.end_once(entry, true);
                self.granted += amount;
                self.balance += amount;
            }
            EntryKind::Hold => {
                self.check_cost(entry);
                self.balance -= amount;
                self.held += amount;
                let hold = OpenHold {
                    amount: entry.amount.nano(),
                    key: entry.key.clone(),
                    model: entry.model.clone(),
                    price: entry.price,
                    price_version: entry.price_version.clone(),
                };
                let again = self.ended.contains(&(false, entry.request.clone()));
                if self.open.insert(entry.request.clone(), hold).is_some() || again {
                    self.fault(format!("entry {seq} holds a second time for {}", entry.request));
                }
            }
            EntryKind::Post => {
                self.check_cost(entry);
                if let Some(hold) = self.close(entry) {
                    if entry.amount.nano() > hold.amount {
                        self.fault(format!("entry {seq} charges more than was on hold"));
                    }
                    self.balance += i128::from(hold.amount) - amount;
                    self.held -= i128::from(hold.amount);
                    self.charged += amount;
                } else {
                    // Money was taken that nothing had set aside: count it, so that it shows in the sums.
                    self.charged += amount;
                    self.balance -= amount;
                }
            }
            EntryKind::Release => {
                if let Some(hold) = self.close(entry) {
                    if entry.amount.nano() != hold.amount {
                        self.fault(format!("entry {seq} releases another amount than was on hold"));
                    }
                    self.held -= i128::from(hold.amount);
                }
                self.balance += amount;
            }
        }
        if i128::from(entry.balance.nano()) != self.balance {
            self.fault(format!(
                "entry {seq} says that the balance is {} where the entries make it {}",
                entry.balance.nano(),
                self.balance
            ));
        }
        if self.balance < 0 {
            self.fault(format!("the balance is below zero after entry {seq}"));
        }
    }

    /// Compares with the account. Answers the imbalance (grants − balance − open holds − charges + refunds,
    /// grants and charges as re-added, balance and holds as stored) and every fault.
    pub fn finish(mut self, stored: &Stored) -> (i128, Vec<String>) {
        if self.next_seq != stored.seq.saturating_add(1) {
            self.fault(format!("{} entries were written and {} are there", stored.seq, self.next_seq - 1));
        }
        for (name, stored, readded) in [
            ("balance", stored.balance, self.balance),
            ("held", stored.held, self.held),
            ("charged", stored.charged, self.charged),
            ("granted", stored.granted, self.granted),
            ("refunded", stored.refunded, 0),
        ] {
            if i128::from(stored) != readded {
                self.fault(format!("the account's {name} is {stored} where the entries make it {readded}"));
            }
        }
        let open = std::mem::take(&mut self.open);
        for (request, hold) in &open {
            match stored.holds.get(request) {
                Some(amount) if *amount == hold.amount => {}
                Some(amount) => {
                    self.fault(format!("{request} has {amount} on hold where its entry says {}", hold.amount));
                }
                None => self.fault(format!("{request} was held and never ended, but is not among the open holds")),
            }
            if !stored.leases.contains(request) {
                self.fault(format!("the hold of {request} has no lease and would never expire"));
            }
        }
        for request in stored.holds.keys().filter(|request| !open.contains_key(*request)) {
            self.fault(format!("{request} is among the open holds without an entry that opened it"));
        }
        if stored.ended != self.ended.len() as u64 {
            self.fault(format!("{} ends are remembered where the entries have {}", stored.ended, self.ended.len()));
        }
        let open_holds: i128 = stored.holds.values().map(|amount| i128::from(*amount)).sum();
        let imbalance =
            self.granted - i128::from(stored.balance) - open_holds - self.charged + i128::from(stored.refunded);
        (imbalance, self.faults)
    }

    fn close(&mut self, entry: &Entry) -> Option<OpenHold> {
        self.end_once(entry, false);
        let Some(hold) = self.open.remove(&entry.request) else {
            self.fault(format!("entry {} ends {} which has no open hold", entry.seq, entry.request));
            return None;
        };
        if (&hold.key, &hold.model, &hold.price, &hold.price_version)
            != (&entry.key, &entry.model, &entry.price, &entry.price_version)
        {
            self.fault(format!("entry {} has other terms than the hold of {}", entry.seq, entry.request));
        }
        Some(hold)
    }

    fn end_once(&mut self, entry: &Entry, grant: bool) {
        if !self.ended.insert((grant, entry.request.clone())) {
            self.fault(format!("entry {} ends or grants {} a second time", entry.seq, entry.request));
        }
    }

    fn check_cost(&mut self, entry: &Entry) {
        if entry.price.cost(&entry.usage) != Ok(entry.amount) {
            self.fault(format!("the amount of entry {} is not tokens times price", entry.seq));
        }
    }

    fn fault(&mut self, fault: String) {
        self.faults.push(format!("{}: {fault}", self.tenant));
    }
}
