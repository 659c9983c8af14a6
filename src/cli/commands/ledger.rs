use std::path::PathBuf;

use clap::Subcommand;

use super::{Desk, money};
use crate::{
    cli::{CliError, json, print},
    domain::{Month, TenantId},
    ledger::{ArchiveError, Entry, EntryWithMovements},
    node::NodeError,
};

#[derive(Subcommand)]
pub enum Ledger {
    /// Re-add every entry of every tenant; fails unless all of it balances
    Verify {
        /// With all files of this archive (by default `ledger.archive_dir`, if there is one)
        #[arg(long, value_name = "FOLDER")]
        archive: Option<PathBuf>,
    },
    /// Move the months before one out of the store into compressed files; may be interrupted and repeated
    Archive {
        /// Such as 2026-09, which is the first month that stays (by default as `ledger.archive_months` says, and at
        /// least the month that was over last)
        #[arg(long, value_name = "MONTH")]
        before: Option<String>,
        /// `ledger.archive_dir` by default
        #[arg(long, value_name = "FOLDER")]
        dir: Option<PathBuf>,
    },
    /// Entries of a tenant, as far as they are in the store: the last ones, unless `--after` or `--request` says otherwise
    List {
        #[arg(long, value_name = "ID")]
        tenant: String,
        #[arg(long, default_value_t = 50)]
        limit: usize,
        /// Begin behind the entry of this number
        #[arg(long, value_name = "SEQ")]
        after: Option<u64>,
        /// Only those of one request
        #[arg(long, value_name = "ID")]
        request: Option<String>,
    },
}

/// Entries that are read at a time when looking for those of a request.
const PAGE: usize = 1000;

const COLUMNS: &[&str] = &[
    "seq",
    "unix_ms",
    "kind",
    "amount_nano_usd",
    "hold_nano_usd",
    "balance_nano_usd",
    "held_nano_usd",
    "request",
    "reference",
    "note",
];

pub async fn run(desk: &Desk<'_>, command: Ledger) -> Result<(), CliError> {
    match command {
        Ledger::Verify { archive } => verify(desk, archive).await,
        Ledger::Archive { before, dir } => archive(desk, before, dir).await,
        Ledger::List { tenant, limit, after, request } => {
            let tenant = TenantId::from(tenant);
            let last = desk.ledger.last_seq(&tenant).await.map_err(money)?;
            let entries = match (after, request) {
                (after, Some(request)) => of_request(desk, &tenant, after.unwrap_or(0), &request, limit).await?,
                (Some(after), None) => desk.ledger.entries(&tenant, after, limit).await.map_err(money)?,
                (None, None) => {
                    let after = last.saturating_sub(limit as u64);
                    desk.ledger.entries(&tenant, after, limit).await.map_err(money)?
                }
            };
            let entries: Vec<EntryWithMovements> = entries.into_iter().map(Into::into).collect();
            desk.print_list(&json(&entries)?, COLUMNS)
        }
    }
}

/// With the archive that is given, or with the configured one, if there is one.
async fn verify(desk: &Desk<'_>, archive: Option<PathBuf>) -> Result<(), CliError> {
    let folder = archive.clone().unwrap_or_else(|| desk.config.archive_dir());
    let report = match archive.is_some() || folder.exists() {
        true => desk.ledger.verify_with(&folder).await,
        false => desk.ledger.verify().await,
    };
    let report = report.map_err(money)?;
    print(desk.output, &json(&report)?)?;
    if report.is_balanced() { Ok(()) } else { Err(CliError::Imbalance) }
}

async fn archive(desk: &Desk<'_>, before: Option<String>, dir: Option<PathBuf>) -> Result<(), CliError> {
    let before: Month = match before {
        Some(month) => month.parse().map_err(|error| CliError::Usage(format!("--before: {error}")))?,
        None => {
            let now = desk.ledger.now_unix_ms().await.map_err(money)?;
            Month::of(now).before(desk.config.ledger.archive_months.max(1))
        }
    };
    let folder = dir.unwrap_or_else(|| desk.config.archive_dir());
    let archived = desk.ledger.archive(&folder, before).await.map_err(archiving)?;
    print(desk.output, &json(&archived)?)?;
    if archived.faults.is_empty() { Ok(()) } else { Err(CliError::Imbalance) }
}

fn archiving(error: ArchiveError) -> CliError {
    match error {
        ArchiveError::Store(error) => NodeError::from(error).into(),
        error @ ArchiveError::NotOver(_) => CliError::Usage(error.to_string()),
        error => CliError::Archive(error),
    }
}

async fn of_request(
    desk: &Desk<'_>,
    tenant: &TenantId,
    mut after: u64,
    request: &str,
    limit: usize,
) -> Result<Vec<Entry>, CliError> {
    let mut found = Vec::new();
    loop {
        let page = desk.ledger.entries(tenant, after, PAGE).await.map_err(money)?;
        let Some(last) = page.last() else { return Ok(found) };
        after = last.seq;
        found.extend(page.into_iter().filter(|entry| entry.request == request).take(limit - found.len()));
        if found.len() >= limit {
            return Ok(found);
        }
    }
}
