//! What was used and what it cost.

use std::collections::BTreeSet;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{Desk, arguments, merge, money};
use crate::{
    cli::{CliError, json as told, print},
    domain::TenantId,
    ledger::{UsageBucket, UsageError, UsageRange, UsageWidth, UsageWish},
    node::NodeError,
};

/// By default, usage is that of a week.
const WEEK_SECONDS: u64 = 7 * 86_400;

#[derive(Args)]
pub struct Usage {
    /// All of them by default
    #[arg(long, value_name = "ID")]
    tenant: Option<String>,
    /// A day (2026-11-23), a month (2026-11), a time (2026-11-23T12:00:00Z) or Unix seconds; a week before the end by
    /// default
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// The same, excluded; now by default
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
    /// 1m, 1h or 1d, of UTC
    #[arg(long, default_value = "1d", value_parser = str::parse::<UsageWidth>)]
    width: UsageWidth,
    /// Of tenant, key and model, separated by commas
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    group_by: Vec<Group>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    Tenant,
    Key,
    Model,
}

pub async fn run(desk: &Desk<'_>, asked: Usage) -> Result<(), CliError> {
    let Usage { tenant, from, to, width, group_by } = asked;
    let tenants = tenant.map(|tenant| BTreeSet::from([TenantId::from(tenant)]));
    for tenant in tenants.iter().flatten() {
        // Names the one that there is not.
        desk.ledger.balance(tenant).await.map_err(money)?;
    }
    let seconds = |name, text: Option<&str>| {
        let time = text.map(|text| arguments::time(name, text)).transpose();
        time.map(|time| time.map(|unix_ms| unix_ms / 1000))
    };
    let to = match seconds("--to", to.as_deref())? {
        Some(to) => to,
        None => desk.ledger.now_unix_ms().await.map_err(money)? / 1000 + 1,
    };
    let from = seconds("--from", from.as_deref())?.unwrap_or_else(|| to.saturating_sub(WEEK_SECONDS));
    let by = |group| group_by.contains(&group);
    let (by_tenant, by_key, by_model) = (by(Group::Tenant), by(Group::Key), by(Group::Model));
    let wish = UsageWish { tenants, by_tenant, by_key, by_model, ..UsageWish::default() };
    let mut range = UsageRange::new(from, to, width).map_err(unusable)?;
    let mut rows = Vec::new();
    loop {
        let buckets = desk.ledger.usage(range, &wish).await.map_err(unusable)?;
        let behind = buckets.last().map_or(range.to(), |bucket| bucket.to);
        for bucket in &buckets {
            rows.extend(rows_of(bucket)?);
        }
        if behind >= range.to() {
            return print(desk.output, &Value::Array(rows));
        }
        range = UsageRange::new(behind, range.to(), width).map_err(unusable)?;
    }
}

/// One for each group of the bucket.
fn rows_of(bucket: &UsageBucket) -> Result<Vec<Value>, CliError> {
    let row = |row| {
        let mut shown =
            json!({ "from": crate::domain::utc_text(bucket.from * 1000), "seconds": bucket.to - bucket.from });
        merge(&mut shown, told(row)?);
        Ok(shown)
    };
    bucket.rows.iter().map(row).collect()
}

fn unusable(error: UsageError) -> CliError {
    match error {
        UsageError::Store(error) => NodeError::from(error).into(),
        error => CliError::Usage(error.to_string()),
    }
}
