use clap::Subcommand;

use super::{Desk, operator};
use crate::cli::{CliError, json};

#[derive(Subcommand)]
pub enum Audit {
    /// Changes of tenants, keys, limits, prices and money, the newest first
    List {
        #[arg(long, default_value_t = 50)]
        limit: usize,
        /// Only those before this record
        #[arg(long, value_name = "ID")]
        before: Option<String>,
    },
}

const COLUMNS: &[&str] = &["id", "unix_ms", "actor", "action", "target", "detail"];

pub async fn run(desk: &Desk<'_>, command: Audit) -> Result<(), CliError> {
    let Audit::List { limit, before } = command;
    let records = desk.accounts.audit_log().list(before.as_deref(), limit).await.map_err(operator)?;
    desk.print_list(&json(&records)?, COLUMNS)
}
