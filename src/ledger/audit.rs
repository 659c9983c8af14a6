//! Re-adds a tenant's ledger from its entries alone. Pure: knows no store.

use std::collections::{HashMap, HashSet};

use super::{
    books::{Books, Expired, OpenHold, Terms},
    counters::{Counted, Counters, admitted_unix_ms},
    entry::{Entry, EntryKind},
};
use crate::domain::{Day, NanoUsd, TenantId};

/// What the store says about a tenant at one instant.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Stored {
    pub balance: i64,
    pub available: i64,
    pub held: i64,
    pub charged: i64,
    pub granted: i64,
    pub refunded: i64,
    pub adjusted: i64,
    pub credit: i64,
    pub seq: u64,
    /// The last entry that lies in an archive and not in the store.
    pub archived: u64,
    /// When the last entry was written.
    pub at: u64,
    pub link: String,
    /// Open holds.
    pub holds: HashMap<String, i64>,
    /// Requests whose hold has a lease.
    pub leases: HashSet<String>,
    /// What each open hold was made for, as the store has it.
    pub terms: HashMap<String, String>,
    /// Open requests of each key.
    pub open: HashMap<String, i64>,
    /// Grants, settlements and so on that must not happen again.
    pub ended: u64,
    /// What the archive ended with.
    pub checkpoint: Option<String>,
    pub counted: Counted,
}

/// Takes entries in order, then [`finish`](Self::finish)es against the account. Sums are kept in 128 bits, so
/// that no ledger, however wrong, makes them wrap.
#[derive(Clone)]
pub(super) struct Audit {
    books: Books,
    /// The last entry before the first that was taken.
    began: u64,
    /// Entries up to this one lie in an archive only: the store has forgotten how their requests ended.
    archived: u64,
    /// When that was written, if there is one.
    archived_unix_ms: Option<u64>,
    /// How each request ended, and what happened under each reference, of the entries that were taken.
    ends: HashMap<String, End>,
    /// What may still be given back of a request that something was given back of.
    refundable: HashMap<String, i128>,
    /// References of before, which the store remembers beside those in `ends`.
    references_before: u64,
    /// What might have been spent before the part of a charge that could not be paid was written off.
    before_write_off: Option<i128>,
    /// Of the entries that the store has.
    pub counters: Counters,
    faults: Vec<String>,
}

#[derive(Clone)]
struct End {
    seq: u64,
    /// As the store should.
    remembered: String,
    /// Of a request; nothing of a reference.
    charged: Option<i128>,
}

impl Audit {
    pub fn of(tenant: TenantId) -> Self {
        Self::after(Books::new(tenant))
    }

    /// Goes on from where an archive ended.
    pub fn after(books: Books) -> Self {
        let (references_before, began) = (books.references, books.seq);
        let mut audit = Self {
            books,
            began,
            archived: 0,
            archived_unix_ms: None,
            ends: HashMap::new(),
            refundable: HashMap::new(),
            references_before,
            before_write_off: None,
            counters: Counters::default(),
            faults: Vec::new(),
        };
        audit.leave_archive();
        audit
    }

    /// What was taken until now lies in an archive; what follows is in the store.
    pub fn leave_archive(&mut self) {
        self.archived = self.books.seq;
        self.archived_unix_ms = (self.books.seq > 0).then_some(self.books.unix_ms);
        self.counters = Counters::default();
    }

    pub fn books(&self) -> Books {
        self.books.clone().pruned()
    }

    pub fn seq(&self) -> u64 {
        self.books.seq
    }

    pub fn faults(&self) -> &[String] {
        &self.faults
    }

    pub fn take_faults(&mut self) -> Vec<String> {
        std::mem::take(&mut self.faults)
    }

    /// Until when everything lies in an archive.
    pub fn archived_unix_ms(&self) -> Option<u64> {
        self.archived_unix_ms
    }

    /// An entry that could not be read stands in its place in the sequence.
    pub fn unreadable(&mut self, fault: String) {
        self.books.seq += 1;
        self.fault(fault);
    }

    /// Fields and values that the store should remember, but for what came after the last entry.
    pub fn remembered(&self) -> impl Iterator<Item = (&str, &str)> {
        let ends = self.ends.iter().filter(|(_, end)| self.is_remembered(end));
        ends.map(|(name, end)| (name.as_str(), end.remembered.as_str()))
    }

    /// The same of what may still be given back.
    pub fn left_to_refund(&self) -> impl Iterator<Item = (String, String)> {
        let is_remembered = |request: &String| self.ends.get(request).is_none_or(|end| self.is_remembered(end));
        let left = self.refundable.iter().filter(move |(request, _)| is_remembered(request));
        left.map(|(request, left)| (format!("refundable {request}"), left.to_string()))
    }

    /// References are for ever.
    fn is_remembered(&self, end: &End) -> bool {
        end.charged.is_none() || end.seq > self.archived
    }

    pub fn check_remembered(&mut self, name: &str, expected: &str, remembered: Option<&str>) {
        // Given back again behind the last entry.
        let is_less = |text: &str| {
            let [left, expected] = [text, expected].map(|amount| amount.parse::<i128>().ok());
            name.starts_with("refundable ") && left.zip(expected).is_some_and(|(left, expected)| left < expected)
        };
        let later = |text: &str| {
            let seq = text.strip_prefix("post ").and_then(|rest| rest.split(' ').nth(1)?.parse::<u64>().ok());
            seq.is_some_and(|seq| seq > self.books.seq)
                && (expected.starts_with("release expired ") || expected.starts_with("release worker_lost "))
        };
        if remembered != Some(expected) && !remembered.is_some_and(|text| later(text) || is_less(text)) {
            let remembered = remembered.unwrap_or("nothing");
            self.fault(format!("of `{name}` is remembered `{remembered}`, not `{expected}`"));
        }
    }

    pub fn take(&mut self, entry: &Entry) {
        let seq = entry.seq;
        if seq != self.books.seq + 1 {
            self.fault(format!("entry {seq} stands where entry {} should", self.books.seq + 1));
        }
        self.books.seq = seq;
        if entry.link != entry.link_after(&self.books.link) {
            self.fault(format!("the link of entry {seq} does not fit what it says and what went before"));
        }
        self.books.link.clone_from(&entry.link);
        if entry.unix_ms < self.books.unix_ms {
            self.fault(format!("entry {seq} is older than the one before"));
        }
        self.books.unix_ms = entry.unix_ms;
        if entry.tenant != self.books.tenant {
            self.fault(format!("entry {seq} names tenant {}", entry.tenant));
        }
        if entry.amount < NanoUsd::ZERO && entry.kind != EntryKind::Adjust {
            self.fault(format!("entry {seq} has the negative amount {}", entry.amount));
        }
        let before = self.before_write_off.take().unwrap_or(self.books.balance + self.books.credit);
        self.book(entry);
        for (name, says, makes) in
            [("balance", entry.balance, self.books.balance), ("amount on hold", entry.held, self.books.held)]
        {
            if i128::from(says.nano()) != makes {
                self.fault(format!(
                    "entry {seq} says that the {name} is {} where the entries make it {makes}",
                    says.nano()
                ));
            }
        }
        // A charge that comes late takes no more than there is; that there was less than nothing is not its doing.
        let least = if is_late(entry) { before.min(0) } else { 0 };
        if takes_from_balance(entry) && self.books.balance + self.books.credit < least {
            self.fault(format!("the balance is below what may be spent after entry {seq}"));
        }
        self.before_write_off = entry.is_write_off().then_some(before);
    }

    fn book(&mut self, entry: &Entry) {
        let amount = i128::from(entry.amount.nano());
        let note = sha1_hex(&entry.note);
        match entry.kind {
            EntryKind::Grant => {
                self.name_once(format!("grant {}", entry.reference), format!("{amount} {note}"), entry);
                self.books.granted += amount;
                self.books.balance += amount;
            }
            EntryKind::Adjust => {
                // By nobody, with the charge that follows.
                if !entry.is_write_off() {
                    self.name_once(format!("adjust {}", entry.reference), format!("{amount} {note}"), entry);
                }
                self.books.adjusted += amount;
                self.books.balance += amount;
            }
            EntryKind::Refund => {
                let what = format!("{amount} {} {note}", entry.request);
                self.name_once(format!("refund {}", entry.reference), what, entry);
                let charged = self.ends.get(&entry.request).map(|end| end.charged.unwrap_or(0));
                // What a request of before was charged is not known here; see `Ledger::verify` with an archive.
                if self.began == 0 || charged.is_some() {
                    let left = self.refundable.entry(entry.request.clone()).or_insert(charged.unwrap_or(0));
                    *left -= amount;
                    if *left < 0 {
                        let request = &entry.request;
                        self.fault(format!("entry {} gives back more of {request} than it was charged", entry.seq));
                    }
                }
                self.books.refunded += amount;
                self.books.balance += amount;
            }
            EntryKind::Credit => self.books.credit = amount,
            EntryKind::Hold => self.hold(entry),
            EntryKind::Post => self.post(entry),
            EntryKind::Release => {
                let hold = self.close(entry);
                let held = hold.as_ref().map_or(0, |hold| hold.amount);
                if entry.amount.nano() != held || entry.hold.nano() != held {
                    self.fault(format!("entry {} releases another amount than was on hold", entry.seq));
                }
                self.books.held -= i128::from(held);
                self.books.balance += amount;
                if matches!(entry.note.as_str(), "expired" | "worker_lost") {
                    let expired = Expired { unix_ms: entry.unix_ms, terms: Terms::of(entry) };
                    self.books.expired.insert(entry.request.clone(), expired);
                }
                self.end_once(entry, format!("release {} {}", entry.note, entry.seq), 0);
            }
        }
    }

    fn hold(&mut self, entry: &Entry) {
        self.check_cost(entry);
        let terms = Terms::of(entry);
        self.books.balance -= i128::from(entry.amount.nano());
        self.books.held += i128::from(entry.amount.nano());
        let extends = entry.note == "extended";
        let fault = match self.books.open.get_mut(&entry.request) {
            Some(hold) => {
                let fits = extends && hold.terms == terms;
                hold.amount = hold.amount.saturating_add(entry.amount.nano());
                (!fits).then_some("holds a second time")
            }
            None => {
                let again = self.ends.contains_key(&entry.request);
                let hold = OpenHold { amount: entry.amount.nano(), unix_ms: admitted_unix_ms(entry), terms };
                self.books.open.insert(entry.request.clone(), hold);
                self.counters.admit(entry);
                (extends || again).then_some("extends or repeats a hold that is not open")
            }
        };
        if let Some(fault) = fault {
            self.fault(format!("entry {} {fault}: {}", entry.seq, entry.request));
        }
    }

    fn post(&mut self, entry: &Entry) {
        self.check_cost(entry);
        let amount = i128::from(entry.amount.nano());
        self.books.charged += amount;
        let remembered = format!("post {amount} {}", entry.seq);
        let is_open = self.books.open.contains_key(&entry.request);
        if let Some(expired) = self.books.expired.remove(&entry.request).filter(|_| !is_open) {
            let in_time = Books::may_be_late(expired.unix_ms, entry.unix_ms);
            if expired.terms != Terms::of(entry) || entry.hold != NanoUsd::ZERO || !in_time {
                self.fault(format!("entry {} has other terms than the hold that expired, or is too late", entry.seq));
            }
            self.books.balance -= amount;
            self.counters.charge(entry, entry.unix_ms);
            let end = End { seq: entry.seq, remembered, charged: Some(amount) };
            self.ends.insert(entry.request.clone(), end);
            return;
        }
        // The store had lost its hold.
        let is_unheld = entry.reference == "unheld" && entry.hold == NanoUsd::ZERO;
        if is_unheld && !is_open {
            self.books.balance -= amount;
            self.counters.charge(entry, entry.unix_ms);
            return self.end_once(entry, remembered, amount);
        }
        match self.close(entry) {
            Some(hold) => {
                if entry.amount.nano() > hold.amount || entry.hold.nano() != hold.amount {
                    self.fault(format!("entry {} charges more than was on hold, or misstates it", entry.seq));
                }
                self.books.balance += i128::from(hold.amount) - amount;
                self.books.held -= i128::from(hold.amount);
                self.counters.charge(entry, hold.unix_ms);
            }
            // Money was taken that nothing had set aside: count it, so that it shows in the sums.
            None => {
                self.books.balance -= amount;
                self.counters.charge(entry, entry.unix_ms);
            }
        }
        self.end_once(entry, remembered, amount);
    }

    /// Compares with the account. Answers the imbalance (grants + adjustments − balance − open holds − charges +
    /// refunds, grants, adjustments and charges as re-added, the others as stored) and every fault.
    pub fn finish(mut self, stored: &Stored) -> (i128, Vec<String>) {
        if self.books.seq != stored.seq {
            self.fault(format!("{} entries were written and {} are there", stored.seq, self.books.seq));
        }
        if self.books.unix_ms != stored.at && self.books.seq > 0 {
            let last = self.books.unix_ms;
            self.fault(format!("the account's last entry is of {} where the entries have {last}", stored.at));
        }
        if self.books.link != stored.link {
            self.fault(format!("the account's link is {} where the entries make it {}", stored.link, self.books.link));
        }
        let Books { balance, held, charged, granted, refunded, adjusted, credit, .. } = self.books;
        for (name, stored, readded) in [
            ("balance", stored.balance, balance),
            ("available", stored.available, balance + credit),
            ("held", stored.held, held),
            ("charged", stored.charged, charged),
            ("granted", stored.granted, granted),
            ("refunded", stored.refunded, refunded),
            ("adjusted", stored.adjusted, adjusted),
            ("credit", stored.credit, credit),
        ] {
            if i128::from(stored) != readded {
                self.fault(format!("the account's {name} is {stored} where the entries make it {readded}"));
            }
        }
        for fault in self.counters.check_periods(&self.books, &stored.counted, self.archived_unix_ms) {
            self.fault(fault);
        }
        self.check_open(stored);
        let refundable = self.left_to_refund().count() as u64;
        let ended = self.remembered().count() as u64 + refundable + self.references_before;
        if stored.ended != ended {
            self.fault(format!("{} ends are remembered where the entries have {ended}", stored.ended));
        }
        let open_holds: i128 = stored.holds.values().map(|amount| i128::from(*amount)).sum();
        let explained = i128::from(stored.balance) + open_holds + charged - i128::from(stored.refunded);
        (granted + adjusted - explained, self.faults)
    }

    fn check_open(&mut self, stored: &Stored) {
        let open = std::mem::take(&mut self.books.open);
        let mut by_key = HashMap::<String, i64>::new();
        for (request, hold) in &open {
            *by_key.entry(hold.terms.key.to_string()).or_default() += 1;
            match stored.holds.get(request) {
                Some(amount) if *amount == hold.amount => {}
                Some(amount) => {
                    self.fault(format!("{request} has {amount} on hold where its entries say {}", hold.amount));
                }
                None => self.fault(format!("{request} was held and never ended, but is not among the open holds")),
            }
            if !stored.leases.contains(request) {
                self.fault(format!("the hold of {request} has no lease and would never expire"));
            }
            let day = Day::of(hold.unix_ms).digits();
            if !stored.terms.get(request).is_some_and(|terms| hold.terms.are(terms, &day)) {
                self.fault(format!("the terms of the hold of {request} are not those of its entry"));
            }
        }
        for request in stored.holds.keys().filter(|request| !open.contains_key(*request)) {
            self.fault(format!("{request} is among the open holds without an entry that opened it"));
        }
        for request in stored.leases.iter().filter(|request| !stored.holds.contains_key(*request)) {
            self.fault(format!("{request} has a lease and no hold"));
        }
        if stored.open != by_key {
            self.fault(format!("open requests are counted as {:?} where there are {by_key:?}", stored.open));
        }
    }

    fn close(&mut self, entry: &Entry) -> Option<OpenHold> {
        let Some(hold) = self.books.open.remove(&entry.request) else {
            self.fault(format!("entry {} ends {} which has no open hold", entry.seq, entry.request));
            return None;
        };
        if hold.terms != Terms::of(entry) {
            self.fault(format!("entry {} has other terms than the hold of {}", entry.seq, entry.request));
        }
        Some(hold)
    }

    fn end_once(&mut self, entry: &Entry, remembered: String, charged: i128) {
        let end = End { seq: entry.seq, remembered, charged: Some(charged) };
        if self.ends.insert(entry.request.clone(), end).is_some() {
            self.fault(format!("entry {} ends {} a second time", entry.seq, entry.request));
        }
    }

    fn name_once(&mut self, name: String, what: String, entry: &Entry) {
        self.books.references += 1;
        if self.ends.insert(name, End { seq: entry.seq, remembered: what, charged: None }).is_some() {
            self.fault(format!("entry {} happens a second time under the name {}", entry.seq, entry.reference));
        }
    }

    fn check_cost(&mut self, entry: &Entry) {
        if entry.price.cost(&entry.usage) != Ok(entry.amount) {
            self.fault(format!("the amount of entry {} is not tokens times price", entry.seq));
        }
    }

    pub fn fault(&mut self, fault: String) {
        self.faults.push(format!("{}: {fault}", self.books.tenant));
    }
}

/// Whether it may only be as much as may be spent.
fn takes_from_balance(entry: &Entry) -> bool {
    match entry.kind {
        EntryKind::Hold => entry.amount > NanoUsd::ZERO,
        EntryKind::Adjust => entry.amount < NanoUsd::ZERO,
        _ => is_late(entry),
    }
}

/// The charge of a request whose hold had expired.
fn is_late(entry: &Entry) -> bool {
    entry.kind == EntryKind::Post && entry.hold == NanoUsd::ZERO && entry.amount > NanoUsd::ZERO
}

fn sha1_hex(text: &str) -> String {
    use sha1::{Digest, Sha1};
    hex::encode(Sha1::digest(text.as_bytes()))
}
