//! What was used and what it cost: the operator's view of a tenant's months.

use std::{collections::BTreeSet, io::Write, time::Duration};

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::{CliError, Output, commands::Access, json, print};
use crate::{
    config::Config,
    domain::{Month, TenantId},
    ledger::{Ledger, LedgerError, StatementError, UsageBucket, UsageError, UsageRange, UsageWidth, UsageWish},
    node::NodeError,
    store::StoreError,
};

/// By default, usage is that of a week.
const WEEK_SECONDS: u64 = 7 * 86_400;

#[derive(Subcommand)]
pub enum Command {
    /// What was charged for, in buckets of time
    Usage {
        /// All of them by default
        #[arg(long)]
        tenant: Option<String>,
        /// Unix seconds, a day (2026-11-23) or a month (2026-11); a week before the end by default
        #[arg(long, value_name = "TIME")]
        from: Option<String>,
        /// The same, excluded; now by default
        #[arg(long, value_name = "TIME")]
        to: Option<String>,
        /// 1m, 1h or 1d, of UTC
        #[arg(long, default_value = "1d")]
        width: String,
        /// Of tenant, key and model, separated by commas
        #[arg(long, value_name = "WHAT", value_delimiter = ',')]
        group_by: Vec<Group>,
    },
    /// A tenant's month
    Statement {
        #[arg(long)]
        tenant: String,
        /// Such as 2026-11
        #[arg(long)]
        month: String,
        #[arg(long, value_enum, default_value_t = Format::Json)]
        format: Format,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Group {
    Tenant,
    Key,
    Model,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Json,
    Csv,
    Html,
}

pub async fn run(config: Config, command: Command, output: Output) -> Result<(), CliError> {
    let access = Access::open(&config).await?;
    let ledger = Ledger::new(access.store.clone(), Duration::from_millis(config.ledger.hold_lease_ms))
        .with_archive(config.archive_dir());
    let result = match command {
        Command::Usage { tenant, from, to, width, group_by } => {
            let width = width.parse().map_err(CliError::Usage);
            match width {
                Ok(width) => show_usage(&ledger, Asked { tenant, from, to, width, group_by }, output).await,
                Err(error) => Err(error),
            }
        }
        Command::Statement { tenant, month, format } => show_statement(&ledger, &tenant, &month, format).await,
    };
    drop(ledger);
    access.close().await;
    result
}

struct Asked {
    tenant: Option<String>,
    from: Option<String>,
    to: Option<String>,
    width: UsageWidth,
    group_by: Vec<Group>,
}

async fn show_usage(ledger: &Ledger, asked: Asked, output: Output) -> Result<(), CliError> {
    let tenants = asked.tenant.map(|tenant| BTreeSet::from([TenantId::from(tenant)]));
    for tenant in tenants.iter().flatten() {
        // Names the one that there is not.
        ledger.balance(tenant).await.map_err(of_ledger)?;
    }
    let to = match &asked.to {
        Some(to) => time(to)?,
        None => ledger.now_unix_ms().await.map_err(of_ledger)? / 1000 + 1,
    };
    let from = asked.from.as_deref().map(time).transpose()?.unwrap_or_else(|| to.saturating_sub(WEEK_SECONDS));
    let by = |group| asked.group_by.contains(&group);
    let (by_tenant, by_key, by_model) = (by(Group::Tenant), by(Group::Key), by(Group::Model));
    let wish = UsageWish { tenants, by_tenant, by_key, by_model, ..UsageWish::default() };
    let mut range = UsageRange::new(from, to, asked.width).map_err(of_usage)?;
    let mut rows = Vec::new();
    loop {
        let buckets = ledger.usage(range, &wish).await.map_err(of_usage)?;
        let behind = buckets.last().map_or(range.to(), |bucket| bucket.to);
        for bucket in &buckets {
            rows.extend(rows_of(bucket)?);
        }
        if behind >= range.to() {
            return print(output, &Value::Array(rows));
        }
        range = UsageRange::new(behind, range.to(), asked.width).map_err(of_usage)?;
    }
}

/// One for each group of the bucket.
fn rows_of(bucket: &UsageBucket) -> Result<Vec<Value>, CliError> {
    let row = |row| {
        let mut shown =
            json!({ "from": crate::domain::utc_text(bucket.from * 1000), "seconds": bucket.to - bucket.from });
        if let (Value::Object(shown), Value::Object(row)) = (&mut shown, json(row)?) {
            shown.extend(row);
        }
        Ok(shown)
    };
    bucket.rows.iter().map(row).collect()
}

async fn show_statement(ledger: &Ledger, tenant: &str, month: &str, format: Format) -> Result<(), CliError> {
    let month = month.parse::<Month>().map_err(|error| CliError::Usage(error.to_string()))?;
    let statement = ledger.statement(&TenantId::from(tenant), month).await.map_err(|error| match error {
        StatementError::Store(error) => of_store(error),
        StatementError::Archive(error) => CliError::Archive(error),
        error => CliError::Usage(error.to_string()),
    })?;
    let text = match format {
        Format::Json => format!("{:#}\n", json(&statement)?),
        Format::Csv => statement.to_csv(),
        Format::Html => statement.to_page(),
    };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

/// Unix seconds of a time as people write it.
fn time(text: &str) -> Result<u64, CliError> {
    if let Ok(seconds) = text.parse() {
        return Ok(seconds);
    }
    let unknown = || CliError::Usage(format!("`{text}` is no time: give unix seconds, 2026-11-23 or 2026-11"));
    if let Ok(month) = text.parse::<Month>() {
        return Ok(month.begins_unix_ms() / 1000);
    }
    let (month, day) = text.rsplit_once('-').ok_or_else(unknown)?;
    let month: Month = month.parse().map_err(|_| unknown())?;
    let day = day.parse::<u64>().ok().filter(|number| day.len() == 2 && *number >= 1).ok_or_else(unknown)?;
    let begin = month.begins_unix_ms() / 1000 + (day - 1) * 86_400;
    if begin * 1000 < month.ends_unix_ms() { Ok(begin) } else { Err(unknown()) }
}

fn of_usage(error: UsageError) -> CliError {
    match error {
        UsageError::Store(error) => of_store(error),
        error => CliError::Usage(error.to_string()),
    }
}

fn of_ledger(error: LedgerError) -> CliError {
    match error {
        LedgerError::Store(error) => of_store(error),
        error => CliError::Usage(error.to_string()),
    }
}

fn of_store(error: StoreError) -> CliError {
    NodeError::from(error).into()
}

#[cfg(test)]
mod tests {
    use super::time;

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, seconds) in
            [("1700000000", 1_700_000_000), ("2024-02", 1_706_745_600), ("2024-02-29", 1_709_164_800)]
        {
            assert_eq!(time(text).unwrap(), seconds);
        }
        for bad in ["", "yesterday", "2023-02-29", "2024-02-00", "2024-2-1", "-1", "2024-02-1"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
