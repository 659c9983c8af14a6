use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Desk, arguments, operator};
use crate::{
    admission::{KeyRecord, LimitKind},
    cli::{CliError, Output, json as told, print},
    domain::{KeyId, NanoUsd, TenantId},
    operator::{KeyChanges, Tenant, TenantChanges},
};

#[derive(Subcommand)]
pub enum Limits {
    /// What holds for a tenant, and from where; with a key, also what holds for that
    Show {
        #[arg(long, value_name = "ID")]
        tenant: String,
        #[arg(long, value_name = "ID")]
        key: Option<String>,
    },
    /// Limits of a tenant's or a key's own, effective with the next request
    Set {
        #[command(flatten)]
        whose: Whose,
        /// requests_per_minute, tokens_per_minute, requests_per_day, tokens_per_day, requests_at_once, spend_per_day
        /// or spend_per_month, and a number (of spend: dollars); 0 is no limit, and `none` takes one's own away
        #[arg(value_name = "NAME=VALUE", required = true)]
        limits: Vec<String>,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct Whose {
    #[arg(long, value_name = "ID")]
    tenant: Option<String>,
    #[arg(long, value_name = "ID")]
    key: Option<String>,
}

pub async fn run(desk: &Desk<'_>, command: Limits) -> Result<(), CliError> {
    let accounts = &desk.accounts;
    match command {
        Limits::Show { tenant, key } => {
            let tenant = accounts.tenant(&TenantId::from(tenant)).await.map_err(operator)?;
            let key = match key {
                Some(key) => Some(accounts.key(&KeyId::from(key)).await.map_err(operator)?),
                None => None,
            };
            if let Some(key) = key.as_ref().filter(|key| key.tenant != tenant.id) {
                return Err(CliError::Usage(format!("{} is a key of {}", key.id, key.tenant)));
            }
            show(desk, &tenant, key.as_ref())
        }
        Limits::Set { whose, limits } => {
            let limits = arguments::limit_changes("NAME=VALUE", &limits)?;
            let changed = match (whose.tenant, whose.key) {
                (Some(tenant), _) => {
                    let changes = TenantChanges { limits, ..TenantChanges::default() };
                    told(&accounts.change_tenant(&TenantId::from(tenant), &changes).await.map_err(operator)?)?
                }
                (None, key) => {
                    let changes = KeyChanges { limits, ..KeyChanges::default() };
                    let key = KeyId::from(key.unwrap_or_default());
                    told(&accounts.change_key(&key, &changes).await.map_err(operator)?)?
                }
            };
            print(desk.output, &json!({ "id": changed["id"], "limits": changed["limits"] }))
        }
    }
}

/// A row for each limit. The tenant's own goes before that of its tier; the key's holds beside it.
fn show(desk: &Desk<'_>, tenant: &Tenant, key: Option<&KeyRecord>) -> Result<(), CliError> {
    let tiers = desk.tiers()?;
    let tier = tiers.get(&tenant.tier).map(|tier| &tier.limits);
    let row = |kind: LimitKind| {
        let shown = |limit: Option<u64>| limit.map(|limit| value(desk.output, kind, limit)).unwrap_or_default();
        let (of_tier, own) = (tier.map(|limits| limits.get(kind).unwrap_or(0)), tenant.limits.get(kind));
        let mut row = json!({
            "limit": kind, "tier": shown(of_tier), "own": shown(own), "tenant": shown(own.or(of_tier)),
        });
        if let Some(key) = key {
            row["key"] = shown(key.limits.get(kind));
        }
        row
    };
    print(desk.output, &LimitKind::ALL.into_iter().map(row).collect::<Value>())
}

fn value(output: Output, kind: LimitKind, limit: u64) -> Value {
    match output {
        Output::Table if limit == 0 => json!("no limit"),
        Output::Table if kind.is_spend() => {
            json!(format!("${}", NanoUsd::new(i64::try_from(limit).unwrap_or(i64::MAX))))
        }
        _ => json!(limit),
    }
}
