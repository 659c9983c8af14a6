//! What operators do: tenants, keys, credits, limits, prices, webhooks, usage, statements, the ledger, the record of
//! changes, the cluster. A file for each noun.

mod access;
mod arguments;
mod audit;
mod cluster;
mod credits;
mod keys;
mod ledger;
mod limits;
mod prices;
mod statement;
mod tenants;
mod usage;
mod webhooks;

use std::time::Duration;

use clap::Subcommand;
use nix::unistd::{Uid, User};
use serde_json::Value;

pub use access::Access;

use super::{CliError, Output, json, print};
use crate::{
    admission::Tiers,
    config::Config,
    domain::TenantId,
    ledger::{Ledger, LedgerError},
    node::{self, NodeError},
    operator::{Accounts, OperatorError},
};

#[derive(Subcommand)]
pub enum Command {
    /// API keys
    #[command(subcommand)]
    Keys(keys::Keys),
    /// Who pays
    #[command(subcommand)]
    Tenants(tenants::Tenants),
    /// A tenant's money
    Balance {
        #[arg(long, value_name = "ID")]
        tenant: String,
    },
    /// Money that persons move: prepaid, put right, given back, lent
    #[command(subcommand)]
    Credits(credits::Credits),
    /// What a tenant or a key may ask for
    #[command(subcommand)]
    Limits(limits::Limits),
    /// What tokens cost, and from when on
    #[command(subcommand)]
    Prices(prices::Prices),
    /// Where tenants are told what happens to their accounts
    #[command(subcommand)]
    Webhooks(webhooks::Webhooks),
    /// What was charged for, in buckets of time
    Usage(usage::Usage),
    /// A tenant's month
    Statement(statement::Statement),
    /// The record of every change of money
    #[command(subcommand)]
    Ledger(ledger::Ledger),
    /// Who changed what
    #[command(subcommand)]
    Audit(audit::Audit),
    /// Who is in the cluster, and what each has to do
    Nodes,
    /// How the actors of each node are
    Actors {
        /// Only those of this node, by its id or its host
        #[arg(long, value_name = "ID")]
        node: Option<String>,
    },
}

pub async fn run(config: Config, command: Command, output: Output) -> Result<(), CliError> {
    let access = Access::open(&config).await?;
    let desk = Desk::new(&access, &config, output);
    let result = match command {
        Command::Keys(command) => keys::run(&desk, command).await,
        Command::Tenants(command) => tenants::run(&desk, command).await,
        Command::Balance { tenant } => desk.balance(&TenantId::from(tenant)).await,
        Command::Credits(command) => credits::run(&desk, command).await,
        Command::Limits(command) => limits::run(&desk, command).await,
        Command::Prices(command) => prices::run(&desk, command).await,
        Command::Webhooks(command) => webhooks::run(&desk, command).await,
        Command::Usage(asked) => usage::run(&desk, asked).await,
        Command::Statement(asked) => statement::run(&desk, asked).await,
        Command::Ledger(command) => ledger::run(&desk, command).await,
        Command::Audit(command) => audit::run(&desk, command).await,
        Command::Nodes => cluster::nodes(&desk).await,
        Command::Actors { node } => cluster::actors(&desk, node.as_deref()).await,
    };
    drop(desk);
    access.close().await;
    result
}

/// What a command works with.
struct Desk<'a> {
    access: &'a Access,
    config: &'a Config,
    ledger: Ledger,
    accounts: Accounts,
    output: Output,
}

impl<'a> Desk<'a> {
    fn new(access: &'a Access, config: &'a Config, output: Output) -> Self {
        let lease = Duration::from_millis(config.ledger.hold_lease_ms);
        let ledger = Ledger::new(access.store.clone(), lease).with_archive(config.archive_dir());
        let accounts = Accounts::new(access.store.clone(), ledger.clone()).acting_as(actor());
        Self { access, config, ledger, accounts, output }
    }

    fn tiers(&self) -> Result<Tiers, CliError> {
        Ok(node::tiers(self.config)?)
    }

    async fn balance(&self, tenant: &TenantId) -> Result<(), CliError> {
        let balance = self.ledger.balance(tenant).await.map_err(money)?;
        print(self.output, &json(&balance)?)
    }

    /// A list: all of it as JSON, as a table what people look for.
    fn print_list(&self, list: &Value, columns: &[&str]) -> Result<(), CliError> {
        match self.output {
            Output::Json => print(self.output, list),
            Output::Table => print(self.output, &chosen(list, columns)),
        }
    }
}

/// Of each row the cells that have these names, in this order.
fn chosen(list: &Value, columns: &[&str]) -> Value {
    let row = |row: &Value| columns.iter().map(|name| ((*name).to_owned(), row[*name].clone())).collect();
    list.as_array().into_iter().flatten().map(row).map(Value::Object).collect()
}

/// As the audit log names whoever runs this.
fn actor() -> String {
    let uid = Uid::current();
    match User::from_uid(uid) {
        Ok(Some(user)) => format!("cli {}", user.name),
        _ => format!("cli uid {uid}"),
    }
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

fn operator(error: OperatorError) -> CliError {
    match error {
        OperatorError::Store(error) => NodeError::from(error).into(),
        error @ (OperatorError::KeyFile { .. } | OperatorError::Random(_)) => NodeError::from(error).into(),
        error => CliError::Usage(error.to_string()),
    }
}

fn money(error: LedgerError) -> CliError {
    operator(error.into())
}
