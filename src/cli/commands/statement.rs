use std::io::Write;

use clap::{Args, ValueEnum};

use super::Desk;
use crate::{
    cli::{CliError, json},
    domain::{Month, TenantId},
    ledger::StatementError,
    node::NodeError,
};

#[derive(Args)]
pub struct Statement {
    #[arg(long, value_name = "ID")]
    tenant: String,
    /// Such as 2026-11
    #[arg(long)]
    month: String,
    #[arg(long, value_enum, default_value_t = Format::Json)]
    format: Format,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Json,
    Csv,
    Html,
}

pub async fn run(desk: &Desk<'_>, asked: Statement) -> Result<(), CliError> {
    let Statement { tenant, month, format } = asked;
    let month: Month = month.parse().map_err(|error| CliError::Usage(format!("--month: {error}")))?;
    let statement = desk.ledger.statement(&TenantId::from(tenant), month).await.map_err(unstated)?;
    let text = match format {
        Format::Json => format!("{:#}\n", json(&statement)?),
        Format::Csv => statement.to_csv(),
        Format::Html => statement.to_page(),
    };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

fn unstated(error: StatementError) -> CliError {
    match error {
        StatementError::Store(error) => NodeError::from(error).into(),
        StatementError::Archive(error) => CliError::Archive(error),
        error => CliError::Usage(error.to_string()),
    }
}
