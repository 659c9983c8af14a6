use clap::{Args, Subcommand};
use serde_json::json;

use super::{Desk, arguments, merge, money, operator};
use crate::{
    cli::{CliError, json as told, print},
    domain::{NanoUsd, RequestId, TenantId},
    ledger::{Moved, Refund},
};

#[derive(Subcommand)]
pub enum Credits {
    /// Add prepaid money
    Grant {
        #[command(flatten)]
        whose: Whose,
        /// Dollars, such as 25 or 0.50
        #[arg(value_name = "USD", allow_negative_numbers = true)]
        amount: String,
    },
    /// Put a balance right, up or down
    Adjust {
        #[command(flatten)]
        whose: Whose,
        /// Dollars, such as 0.50 or -0.50
        #[arg(value_name = "USD", allow_negative_numbers = true)]
        amount: String,
    },
    /// Give a charge back, or a part of it
    Refund {
        #[command(flatten)]
        whose: Whose,
        /// The request that was charged
        #[arg(long, value_name = "ID")]
        request: String,
        /// Dollars
        #[arg(value_name = "USD", allow_negative_numbers = true, required_unless_present = "all")]
        amount: Option<String>,
        /// All that is left of the charge
        #[arg(long, conflicts_with = "amount")]
        all: bool,
    },
    /// Set how far below zero a balance may go
    Line {
        #[arg(long, value_name = "ID")]
        tenant: String,
        /// Dollars; 0 for not at all
        #[arg(value_name = "USD", allow_negative_numbers = true)]
        amount: String,
        #[arg(long, default_value = "")]
        note: String,
    },
}

#[derive(Args)]
pub struct Whose {
    #[arg(long, value_name = "ID")]
    tenant: String,
    /// Names the change; the same one is made once (a new one by default)
    #[arg(long)]
    reference: Option<String>,
    /// Why, for whoever reads the ledger
    #[arg(long, default_value = "")]
    note: String,
}

pub async fn run(desk: &Desk<'_>, command: Credits) -> Result<(), CliError> {
    let accounts = &desk.accounts;
    match command {
        Credits::Grant { whose, amount } => {
            let (tenant, reference) = (TenantId::from(whose.tenant), arguments::reference(whose.reference, "grant"));
            let amount = arguments::usd("USD", &amount)?;
            let moved = accounts.grant(&tenant, amount, &reference, &whose.note).await.map_err(operator)?;
            show(desk, &tenant, &reference, amount, &moved)
        }
        Credits::Adjust { whose, amount } => {
            let (tenant, reference) = (TenantId::from(whose.tenant), arguments::reference(whose.reference, "adjust"));
            let amount = arguments::usd("USD", &amount)?;
            let moved = accounts.adjust(&tenant, amount, &reference, &whose.note).await.map_err(operator)?;
            show(desk, &tenant, &reference, amount, &moved)
        }
        Credits::Refund { whose, request, amount, all: _ } => {
            let (tenant, reference) = (TenantId::from(whose.tenant), arguments::reference(whose.reference, "refund"));
            let request = RequestId::from(request);
            let amount = match amount {
                Some(amount) => arguments::usd("USD", &amount)?,
                None => desk.ledger.refundable(&tenant, &request, &reference).await.map_err(money)?,
            };
            let refund = Refund { request, amount, reference, note: whose.note };
            let moved = accounts.refund(&tenant, &refund).await.map_err(operator)?;
            show(desk, &tenant, &refund.reference, amount, &moved)
        }
        Credits::Line { tenant, amount, note } => {
            let tenant = TenantId::from(tenant);
            let amount = arguments::usd("USD", &amount)?;
            let moved = accounts.set_credit(&tenant, amount, &note).await.map_err(operator)?;
            let mut shown = json!({ "tenant": tenant, "credit_nano_usd": amount });
            merge(&mut shown, told(&moved)?);
            print(desk.output, &shown)
        }
    }
}

fn show(desk: &Desk<'_>, tenant: &TenantId, reference: &str, amount: NanoUsd, moved: &Moved) -> Result<(), CliError> {
    let mut shown = json!({ "tenant": tenant, "reference": reference, "amount_nano_usd": amount });
    merge(&mut shown, told(moved)?);
    print(desk.output, &shown)
}
