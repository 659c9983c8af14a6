//! A tenant's month: what came in, what was charged for, what is left.

mod csv;
mod page;

use std::{collections::BTreeMap, time::Duration};

use schemars::JsonSchema;
use serde::Serialize;

use super::{Account, ArchiveError, Books, Entry, EntryKind, Ledger, LedgerError, UsageSums, entry};
use crate::{
    domain::{Day, ModelId, MoneyError, Month, NanoUsd, TenantId},
    store::{StoreError, keys},
};

/// Entries read at a time.
const PAGE: usize = 1000;
/// Lines of one statement: what persons moved, and the models of each day.
const LINES_MAX: usize = 100_000;
/// How often a month is looked at again that is being archived.
const TRIES: usize = 20;
const PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum StatementError {
    #[error("there is no tenant {0}")]
    UnknownTenant(TenantId),
    #[error("there is no statement of {month}; the account has them from {first} to {last}")]
    NoSuchMonth { month: Month, first: Month, last: Month },
    /// And not in a folder that this process knows.
    #[error("the entries of {0} are archived")]
    Archived(Month),
    #[error("archive: {0}")]
    Archive(#[from] ArchiveError),
    #[error("the statement of {0} would have more than {LINES_MAX} lines")]
    TooLong(Month),
    /// The entries contradict each other or the account.
    #[error("the ledger of {tenant} does not add up at entry {seq}: {what}")]
    Unbalanced { tenant: TenantId, seq: u64, what: String },
    #[error(transparent)]
    Money(#[from] MoneyError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Money of a tenant at the beginning or the end of a month.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema, Serialize)]
pub struct Position {
    /// Free to be spent.
    #[serde(rename = "balance_nano_usd")]
    #[schemars(with = "i64")]
    pub balance: NanoUsd,
    /// Set aside for requests under way.
    #[serde(rename = "held_nano_usd")]
    #[schemars(with = "i64")]
    pub held: NanoUsd,
}

/// What one entry moved that is not a request's.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema, Serialize)]
pub struct Line {
    /// The entry's number.
    pub entry: u64,
    pub unix_ms: u64,
    /// What the person who moved it called it.
    pub reference: String,
    /// The request of a refund or a write-off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    pub note: String,
    /// Of an adjustment with its sign; of a credit line how far below zero the balance may go.
    #[serde(rename = "amount_nano_usd")]
    #[schemars(with = "i64")]
    pub amount: NanoUsd,
}

/// Requests of one day and model that were charged.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema, Serialize)]
pub struct Charge {
    #[schemars(with = "String")]
    pub day: Day,
    #[schemars(with = "String")]
    pub model: ModelId,
    #[serde(flatten)]
    pub sums: UsageSums,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema, Serialize)]
pub struct StatementTotals {
    #[serde(rename = "granted_nano_usd")]
    #[schemars(with = "i64")]
    pub granted: NanoUsd,
    #[serde(rename = "charged_nano_usd")]
    #[schemars(with = "i64")]
    pub charged: NanoUsd,
    #[serde(rename = "refunded_nano_usd")]
    #[schemars(with = "i64")]
    pub refunded: NanoUsd,
    #[serde(rename = "adjusted_nano_usd")]
    #[schemars(with = "i64")]
    pub adjusted: NanoUsd,
    /// What could not be collected of charges.
    #[serde(rename = "written_off_nano_usd")]
    #[schemars(with = "i64")]
    pub written_off: NanoUsd,
    pub requests: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub cached_tokens: u64,
}

/// opening balance + granted − charged + refunded + adjusted + written off − (held at the end − held at the beginning)
/// = closing balance. None exists for which this does not hold.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema, Serialize)]
pub struct Statement {
    #[schemars(extend("const" = "statement"))]
    pub object: &'static str,
    #[schemars(with = "String")]
    pub tenant: TenantId,
    pub name: String,
    /// Of UTC, `2026-11`.
    #[schemars(with = "String")]
    pub month: Month,
    /// The month is over. Otherwise it is the statement so far.
    pub is_complete: bool,
    pub opening: Position,
    pub closing: Position,
    pub totals: StatementTotals,
    pub grants: Vec<Line>,
    pub charges: Vec<Charge>,
    pub refunds: Vec<Line>,
    pub adjustments: Vec<Line>,
    pub write_offs: Vec<Line>,
    /// Changes of the credit line, which move no money.
    pub credit_lines: Vec<Line>,
    pub first_entry: Option<u64>,
    pub last_entry: Option<u64>,
    /// Of the last entry: covers it and, by the entries before it, all of them.
    pub link: Option<String>,
}

/// Takes a month's entries in order, wherever they lie, and makes a statement of them.
pub struct StatementDraft {
    statement: Statement,
    charges: BTreeMap<(Day, ModelId), UsageSums>,
    lines: usize,
}

impl StatementDraft {
    pub fn new(tenant: TenantId, name: String, month: Month) -> Self {
        let statement = Statement {
            object: "statement",
            tenant,
            name,
            month,
            is_complete: false,
            opening: Position::default(),
            closing: Position::default(),
            totals: StatementTotals::default(),
            grants: Vec::new(),
            charges: Vec::new(),
            refunds: Vec::new(),
            adjustments: Vec::new(),
            write_offs: Vec::new(),
            credit_lines: Vec::new(),
            first_entry: None,
            last_entry: None,
            link: None,
        };
        Self { statement, charges: BTreeMap::new(), lines: 0 }
    }

    /// The next entry. It must follow from the one before.
    pub fn take(&mut self, entry: &Entry) -> Result<(), StatementError> {
        let statement = &mut self.statement;
        match (statement.last_entry, &statement.link) {
            (Some(last), Some(link)) => {
                let expected = last + 1;
                if entry.seq != expected {
                    return Err(contradiction(entry, format!("it stands where entry {expected} should")));
                }
                if entry.link != entry.link_after(link) {
                    return Err(contradiction(entry, "its link does not fit it and what went before".to_owned()));
                }
            }
            _ => {
                statement.opening = before(entry)?;
                statement.closing = statement.opening;
                statement.first_entry = Some(entry.seq);
            }
        }
        if entry.tenant != statement.tenant || Month::of(entry.unix_ms) != statement.month {
            return Err(contradiction(entry, "it is of another tenant or month".to_owned()));
        }
        let closing = &mut statement.closing;
        closing.balance = closing.balance.checked_add(entry.moved(Account::Balance)?)?;
        closing.held = closing.held.checked_add(entry.moved(Account::Held)?)?;
        if (closing.balance, closing.held) != (entry.balance, entry.held) {
            let (says, makes) = (entry.balance, closing.balance);
            let what = format!(
                "it says {says} and {} on hold where the entries make it {makes} and {}",
                entry.held, closing.held
            );
            return Err(contradiction(entry, what));
        }
        statement.last_entry = Some(entry.seq);
        statement.link = Some(entry.link.clone());
        self.book(entry)
    }

    fn book(&mut self, entry: &Entry) -> Result<(), StatementError> {
        let statement = &mut self.statement;
        let totals = &mut statement.totals;
        let (sum, lines) = match entry.kind {
            EntryKind::Grant => (Some(&mut totals.granted), &mut statement.grants),
            EntryKind::Refund => (Some(&mut totals.refunded), &mut statement.refunds),
            EntryKind::Adjust if entry.is_write_off() => (Some(&mut totals.written_off), &mut statement.write_offs),
            EntryKind::Adjust => (Some(&mut totals.adjusted), &mut statement.adjustments),
            EntryKind::Credit => (None, &mut statement.credit_lines),
            // What was set aside and went back shows in the positions.
            EntryKind::Hold | EntryKind::Release => return Ok(()),
            EntryKind::Post => {
                let charged = UsageSums {
                    requests: 1,
                    prompt_tokens: entry.usage.prompt_tokens.into(),
                    completion_tokens: entry.usage.completion_tokens.into(),
                    cached_tokens: entry.usage.cached_tokens.into(),
                    amount: entry.amount,
                };
                totals.charged = totals.charged.checked_add(entry.amount)?;
                let sums = self.charges.entry((Day::of(entry.unix_ms), entry.model.clone())).or_default();
                *sums = sums.checked_add(&charged)?;
                return self.bound();
            }
        };
        if let Some(sum) = sum {
            *sum = sum.checked_add(entry.amount)?;
        }
        let request = Some(entry.request.clone()).filter(|request| !request.is_empty());
        lines.push(Line {
            entry: entry.seq,
            unix_ms: entry.unix_ms,
            reference: entry.reference.clone(),
            request,
            note: entry.note.clone(),
            amount: entry.amount,
        });
        self.lines += 1;
        self.bound()
    }

    fn bound(&self) -> Result<(), StatementError> {
        let fits = self.lines + self.charges.len() <= LINES_MAX;
        if fits { Ok(()) } else { Err(StatementError::TooLong(self.statement.month)) }
    }

    /// `otherwise`: what there was in a month without entries. `is_complete`: the month is over.
    pub fn finish(self, otherwise: Position, is_complete: bool) -> Result<Statement, StatementError> {
        let Self { mut statement, charges, .. } = self;
        if statement.last_entry.is_none() {
            (statement.opening, statement.closing) = (otherwise, otherwise);
        }
        statement.is_complete = is_complete;
        let charge = |((day, model), sums)| Charge { day, model, sums };
        statement.charges = charges.into_iter().map(charge).collect();
        let totals = &mut statement.totals;
        for Charge { sums, .. } in &statement.charges {
            totals.requests += sums.requests;
            totals.prompt_tokens += sums.prompt_tokens;
            totals.completion_tokens += sums.completion_tokens;
            totals.cached_tokens += sums.cached_tokens;
        }
        statement.check()?;
        Ok(statement)
    }
}

impl Statement {
    /// Adds up what is listed, which must lead from the opening to the closing balance.
    fn check(&self) -> Result<(), StatementError> {
        let StatementTotals { granted, charged, refunded, adjusted, written_off, .. } = self.totals;
        let mut listed = NanoUsd::ZERO;
        let lines = [&self.grants, &self.refunds, &self.adjustments, &self.write_offs];
        for line in lines.into_iter().flatten() {
            listed = listed.checked_add(line.amount)?;
        }
        for charge in &self.charges {
            listed = listed.checked_sub(charge.sums.amount)?;
        }
        let total = granted.checked_sub(charged)?.checked_add(refunded)?.checked_add(adjusted)?;
        let total = total.checked_add(written_off)?;
        let more_held = self.closing.held.checked_sub(self.opening.held)?;
        let closing = self.opening.balance.checked_add(listed)?.checked_sub(more_held)?;
        if (closing, total) == (self.closing.balance, listed) {
            return Ok(());
        }
        let what = format!("the statement of {} leads to {closing}, not to {}", self.month, self.closing.balance);
        let (tenant, seq) = (self.tenant.clone(), self.last_entry.unwrap_or_default());
        Err(StatementError::Unbalanced { tenant, seq, what })
    }

    /// One table: RFC 4180, and nothing in it that a spreadsheet would run.
    pub fn to_csv(&self) -> String {
        csv::render(self)
    }

    /// To be read in a browser, or printed on A4.
    pub fn to_page(&self) -> String {
        page::render(self)
    }
}

fn contradiction(entry: &Entry, what: String) -> StatementError {
    StatementError::Unbalanced { tenant: entry.tenant.clone(), seq: entry.seq, what }
}

/// What there was before an entry.
fn before(entry: &Entry) -> Result<Position, MoneyError> {
    Ok(Position {
        balance: entry.balance.checked_sub(entry.moved(Account::Balance)?)?,
        held: entry.held.checked_sub(entry.moved(Account::Held)?)?,
    })
}

fn position(books: &Books) -> Result<Position, MoneyError> {
    let nano = |amount: i128| i64::try_from(amount).map(NanoUsd::new).map_err(|_| MoneyError::Overflow);
    Ok(Position { balance: nano(books.balance)?, held: nano(books.held)? })
}

/// An account as it was at one instant.
struct Standing {
    name: String,
    created_unix_ms: u64,
    position: Position,
    seq: u64,
    /// The last entry that is not in the store any more.
    archived: u64,
    now: u64,
}

impl Ledger {
    /// A tenant's statement of a month; of the current one, so far. What is archived comes from the files, and
    /// [`StatementError::Archived`] where those are not here.
    pub async fn statement(&self, tenant: &TenantId, month: Month) -> Result<Statement, StatementError> {
        for _ in 0..TRIES {
            if let Some(statement) = self.statement_as_of(tenant, month, &self.standing_of(tenant).await?).await? {
                return Ok(statement);
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(StatementError::Archived(month))
    }

    /// Nothing where its entries were archived meanwhile.
    async fn statement_as_of(
        &self,
        tenant: &TenantId,
        month: Month,
        standing: &Standing,
    ) -> Result<Option<Statement>, StatementError> {
        let (first, last) = (Month::of(standing.created_unix_ms), Month::of(standing.now));
        if month < first || month > last {
            return Err(StatementError::NoSuchMonth { month, first, last });
        }
        let mut draft = StatementDraft::new(tenant.clone(), standing.name.clone(), month);
        let (mut after, mut otherwise) = (None, standing.position);
        if standing.archived > 0 {
            let checkpoint = self.archived(tenant).await?;
            let Some(checkpoint) = checkpoint.filter(|found| found.books.seq == standing.archived) else {
                return Ok(None);
            };
            let archived = Month::of(checkpoint.books.unix_ms);
            if month <= archived {
                let archive = self.archive.as_ref().ok_or(StatementError::Archived(month))?;
                let taken = archive.read(tenant, &checkpoint, move |archive| {
                    for entry in archive.entries(month) {
                        draft.take(&entry?)?;
                    }
                    let before = archive.books_before(month).map(position).transpose()?;
                    Ok::<_, StatementError>((draft, before.unwrap_or_default()))
                });
                let taken = taken.await?.ok_or(StatementError::Archived(month))?;
                draft = taken.0;
                if month < archived {
                    return draft.finish(taken.1, true).map(Some);
                }
                // The rest of a month that has only begun to leave the store.
                after = Some(standing.archived);
            }
        }
        let mut after = match after {
            Some(after) => after,
            None => self.last_before(tenant, standing, month.begins_unix_ms()).await?,
        };
        'reading: while after < standing.seq {
            let page = self.entries(tenant, after, PAGE).await.map_err(of_store)?;
            if page.first().is_none_or(|first| first.seq != after + 1) {
                let is_archived = self.archived(tenant).await?.is_some_and(|found| found.books.seq > after);
                let (seq, what) = (after + 1, "it is gone".to_owned());
                let gone = StatementError::Unbalanced { tenant: tenant.clone(), seq, what };
                return if is_archived { Ok(None) } else { Err(gone) };
            }
            for entry in &page {
                if entry.seq > standing.seq {
                    break 'reading;
                }
                if entry.unix_ms >= month.ends_unix_ms() {
                    otherwise = before(entry)?;
                    break 'reading;
                }
                draft.take(entry)?;
                after = entry.seq;
            }
        }
        let statement = draft.finish(otherwise, month < last)?;
        if statement.last_entry == Some(standing.seq) && statement.closing != standing.position {
            let what = "the account has another balance than its last entry".to_owned();
            return Err(StatementError::Unbalanced { tenant: tenant.clone(), seq: standing.seq, what });
        }
        Ok(Some(statement))
    }

    /// The number of the last entry from before a time: times never fall, so it is found by halving.
    async fn last_before(&self, tenant: &TenantId, standing: &Standing, unix_ms: u64) -> Result<u64, StatementError> {
        let (mut before, mut end) = (standing.archived, standing.seq);
        while before < end {
            let middle = before + (end - before) / 2;
            let entry = self.entry_after(tenant, middle).await?;
            match entry {
                Some(entry) if entry.unix_ms < unix_ms => before = entry.seq.min(end),
                _ => end = middle,
            }
        }
        Ok(before)
    }

    async fn entry_after(&self, tenant: &TenantId, seq: u64) -> Result<Option<Entry>, StatementError> {
        Ok(self.entries(tenant, seq, 1).await.map_err(of_store)?.pop())
    }

    async fn standing_of(&self, tenant: &TenantId) -> Result<Standing, StatementError> {
        const FIELDS: [&str; 6] = ["name", "created", "balance", "held", "seq", "archived"];
        let mut question = redis::cmd("HMGET");
        question.arg(keys::account(tenant)).arg(&FIELDS);
        let fields: [Option<String>; FIELDS.len()] = self.store.query(&question).await?;
        if fields.iter().all(Option::is_none) {
            return Err(StatementError::UnknownTenant(tenant.clone()));
        }
        let text = |index: usize| {
            let lacks = || StoreError::Damaged(format!("account of {tenant} lacks {}", FIELDS[index]));
            fields[index].as_deref().ok_or_else(lacks)
        };
        let count = |index: usize| entry::whole(text(index)?, FIELDS[index]).map_err(StoreError::Damaged);
        Ok(Standing {
            name: text(0)?.to_owned(),
            created_unix_ms: count(1)?,
            position: Position { balance: entry::nano(text(2)?, "balance")?, held: entry::nano(text(3)?, "held")? },
            seq: count(4)?,
            archived: count(5)?,
            now: self.store.now_unix_ms().await?,
        })
    }
}

fn of_store(error: LedgerError) -> StatementError {
    match error {
        LedgerError::Store(error) => error.into(),
        other => StoreError::Damaged(other.to_string()).into(),
    }
}
