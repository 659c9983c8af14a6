use clap::Subcommand;
use serde_json::Value;

use super::{Desk, arguments, operator};
use crate::{
    cli::{CliError, json, print},
    domain::{NanoUsd, TenantId},
    operator::{Tenant, TenantChanges, TenantStatus, TenantWish},
};

#[derive(Subcommand)]
pub enum Tenants {
    /// Make a tenant
    Create {
        name: String,
        /// Opening balance in dollars
        #[arg(long, value_name = "USD", default_value = "0", allow_negative_numbers = true)]
        balance: String,
        /// One of the configuration's tiers
        #[arg(long, default_value = "")]
        tier: String,
        /// How far below zero the balance may go, in dollars
        #[arg(long, value_name = "USD", default_value = "0", allow_negative_numbers = true)]
        credit: String,
    },
    /// All tenants
    List,
    /// One tenant
    Show {
        #[arg(value_name = "ID")]
        tenant: String,
    },
    /// Admit nothing more of a tenant; what runs goes on
    Suspend {
        #[arg(value_name = "ID")]
        tenant: String,
    },
    /// Let a suspended tenant go on
    Resume {
        #[arg(value_name = "ID")]
        tenant: String,
    },
    /// Give a tenant the limits of a tier of the configuration; `standard` is that of all others
    Tier {
        #[arg(value_name = "ID")]
        tenant: String,
        tier: String,
    },
    /// Tell of a balance below so many dollars, or `none`
    LowBalance {
        #[arg(value_name = "ID")]
        tenant: String,
        #[arg(value_name = "USD", allow_negative_numbers = true)]
        below: String,
    },
}

const COLUMNS: &[&str] =
    &["id", "name", "status", "tier", "balance_nano_usd", "held_nano_usd", "credit_nano_usd", "created_unix_ms"];

pub async fn run(desk: &Desk<'_>, command: Tenants) -> Result<(), CliError> {
    match command {
        Tenants::Create { name, balance, tier, credit } => {
            let wish = TenantWish {
                name,
                balance: arguments::usd("--balance", &balance)?,
                credit: arguments::usd("--credit", &credit)?,
                tier: tier_of(desk, &tier)?,
                ..TenantWish::default()
            };
            show(desk, &desk.accounts.create_tenant_like(wish).await.map_err(operator)?)
        }
        Tenants::List => {
            let tenants = json(&desk.accounts.list_tenants().await.map_err(operator)?)?;
            desk.print_list(&tenants, COLUMNS)
        }
        Tenants::Show { tenant } => show(desk, &desk.accounts.tenant(&tenant.into()).await.map_err(operator)?),
        Tenants::Suspend { tenant } => set_status(desk, tenant, TenantStatus::Suspended).await,
        Tenants::Resume { tenant } => set_status(desk, tenant, TenantStatus::Active).await,
        Tenants::Tier { tenant, tier } => {
            let tier = Some(tier_of(desk, &tier)?);
            change(desk, tenant, TenantChanges { tier, ..TenantChanges::default() }).await
        }
        Tenants::LowBalance { tenant, below } => {
            let below: Option<NanoUsd> = arguments::usd_or_none("USD", &below)?;
            change(desk, tenant, TenantChanges { low_balance: Some(below), ..TenantChanges::default() }).await
        }
    }
}

async fn set_status(desk: &Desk<'_>, tenant: String, status: TenantStatus) -> Result<(), CliError> {
    change(desk, tenant, TenantChanges { status: Some(status), ..TenantChanges::default() }).await
}

async fn change(desk: &Desk<'_>, tenant: String, changes: TenantChanges) -> Result<(), CliError> {
    let tenant = TenantId::from(tenant);
    show(desk, &desk.accounts.change_tenant(&tenant, &changes).await.map_err(operator)?)
}

fn show(desk: &Desk<'_>, tenant: &Tenant) -> Result<(), CliError> {
    let shown: Value = json(tenant)?;
    print(desk.output, &shown)
}

/// A tenant of a tier that no edge knows would be refused everywhere.
fn tier_of(desk: &Desk<'_>, name: &str) -> Result<String, CliError> {
    let tiers = desk.tiers()?;
    let known = tiers.find(name).map(str::to_owned);
    known.ok_or_else(|| {
        let all: Vec<&str> = tiers.iter().map(|(name, _)| name).collect();
        CliError::Usage(format!("the configuration has no tier `{name}`; there are {}", all.join(", ")))
    })
}
