//! What operators do: tenants, keys, credits, the ledger.

use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{CliError, Output, json, print};
use crate::{
    admission::Scopes,
    config::Config,
    domain::{KeyId, MoneyError, NanoUsd, TenantId},
    ledger::{Ledger, LedgerError},
    node::{self, DataDir, DataDirError, NodeError},
    operator::{Accounts, OperatorError},
    store::{Store, embedded::EmbeddedServer},
};

#[derive(Subcommand)]
pub enum Command {
    /// API keys
    #[command(subcommand)]
    Keys(Keys),
    /// Who pays
    #[command(subcommand)]
    Tenants(Tenants),
    /// A tenant's money
    Balance {
        #[arg(long)]
        tenant: String,
    },
    /// Prepaid money
    #[command(subcommand)]
    Credits(Credits),
    /// The record of every change of money
    #[command(subcommand)]
    Ledger(LedgerCommand),
}

#[derive(Subcommand)]
pub enum Keys {
    /// Make the development tenant and the two key files where the store has no tenant yet
    Bootstrap,
    /// Make a key; its secret is shown this once
    Create {
        #[arg(long)]
        tenant: String,
        /// What the key is for
        #[arg(long, default_value = "key")]
        label: String,
        /// Of chat, read and admin, separated by commas
        #[arg(long, default_value = "chat,read")]
        scopes: String,
    },
    List {
        #[arg(long)]
        tenant: Option<String>,
    },
    /// End a key for good
    Revoke { key: String },
}

#[derive(Subcommand)]
pub enum Tenants {
    Create {
        name: String,
        /// Opening balance in dollars
        #[arg(long, value_name = "USD", default_value = "0")]
        balance: String,
    },
    List,
}

#[derive(Subcommand)]
pub enum Credits {
    /// Add prepaid money
    Grant {
        #[arg(long)]
        tenant: String,
        /// Dollars, such as 25 or 0.50
        amount: String,
        /// Names the grant; the same one is granted once (a new one by default)
        #[arg(long)]
        reference: Option<String>,
        #[arg(long, default_value = "")]
        note: String,
    },
}

#[derive(Subcommand)]
pub enum LedgerCommand {
    /// Re-add every entry of every tenant; fails unless all of it balances
    Verify,
    /// The last entries of a tenant
    List {
        #[arg(long)]
        tenant: String,
        #[arg(long, default_value_t = 50)]
        limit: usize,
    },
}

pub async fn run(config: Config, command: Command, output: Output) -> Result<(), CliError> {
    let access = Access::open(&config).await?;
    let result = execute(&access, &config, command, output).await;
    access.close().await;
    result
}

async fn execute(access: &Access, config: &Config, command: Command, output: Output) -> Result<(), CliError> {
    let ledger = Ledger::new(access.store.clone(), Duration::from_millis(config.ledger.hold_lease_ms));
    let accounts = Accounts::new(access.store.clone(), ledger.clone());
    match command {
        Command::Keys(Keys::Bootstrap) => {
            let done = node::bootstrap(config, &access.store, &ledger).await?;
            print(output, &json(&done)?)
        }
        Command::Keys(Keys::Create { tenant, label, scopes }) => {
            let scopes: Scopes = scopes.parse().map_err(CliError::Usage)?;
            let key = accounts.create_key(&TenantId::from(tenant), &label, scopes).await.map_err(operator)?;
            let mut shown = json!({ "key": key.secret });
            merge(&mut shown, json(&key.record)?);
            print(output, &shown)
        }
        Command::Keys(Keys::List { tenant }) => {
            let tenant = tenant.map(TenantId::from);
            print(output, &json(&accounts.list_keys(tenant.as_ref()).await.map_err(operator)?)?)
        }
        Command::Keys(Keys::Revoke { key }) => {
            print(output, &json(&accounts.revoke_key(&KeyId::from(key)).await.map_err(operator)?)?)
        }
        Command::Tenants(Tenants::Create { name, balance }) => {
            let tenant = accounts.create_tenant(&name, usd(&balance)?).await.map_err(operator)?;
            print(output, &json(&tenant)?)
        }
        Command::Tenants(Tenants::List) => print(output, &json(&accounts.list_tenants().await.map_err(operator)?)?),
        Command::Balance { tenant } => {
            print(output, &json(&ledger.balance(&TenantId::from(tenant)).await.map_err(money)?)?)
        }
        Command::Credits(Credits::Grant { tenant, amount, reference, note }) => {
            let reference = reference.unwrap_or_else(|| format!("grant-{}", uuid::Uuid::now_v7().simple()));
            let tenant = TenantId::from(tenant);
            let granted = ledger.grant(&tenant, usd(&amount)?, &reference, &note).await.map_err(money)?;
            let mut shown = json!({ "tenant": tenant, "reference": reference });
            merge(&mut shown, json(&granted)?);
            print(output, &shown)
        }
        Command::Ledger(LedgerCommand::Verify) => {
            let report = ledger.verify().await.map_err(money)?;
            print(output, &json(&report)?)?;
            if report.is_balanced() { Ok(()) } else { Err(CliError::Imbalance) }
        }
        Command::Ledger(LedgerCommand::List { tenant, limit }) => {
            let entries = ledger.last_entries(&TenantId::from(tenant), limit).await.map_err(money)?;
            print(output, &json(&entries)?)
        }
    }
}

/// A way to the store: the configured one, the one that a running node has, or one of our own for as long as
/// the command takes.
pub(super) struct Access {
    pub(super) store: Store,
    own: Option<(EmbeddedServer, DataDir)>,
}

/// A node that starts or stops holds the folder for a moment without a store that answers.
const NODE_PATIENCE: Duration = Duration::from_secs(10);

impl Access {
    pub(super) async fn open(config: &Config) -> Result<Self, CliError> {
        let limit = Duration::from_millis(config.store.command_ms_max);
        let connect = |url: String| async move { Store::connect(&url, limit).await.map_err(NodeError::from) };
        if !config.store.redis_url.is_empty() {
            return Ok(Self { store: connect(config.store.redis_url.clone()).await?, own: None });
        }
        let data_dir = &config.node.data_dir;
        let begun = Instant::now();
        loop {
            match DataDir::lock(data_dir) {
                Ok(lock) => {
                    let server = node::embedded(config).await?;
                    let store = connect(server.url().to_owned()).await?;
                    return Ok(Self { store, own: Some((server, lock)) });
                }
                Err(locked @ DataDirError::Locked { .. }) => {
                    if let Some(url) = EmbeddedServer::running(data_dir) {
                        return Ok(Self { store: connect(url).await?, own: None });
                    }
                    if begun.elapsed() > NODE_PATIENCE {
                        return Err(NodeError::from(locked).into());
                    }
                    sleep(Duration::from_millis(100)).await;
                }
                Err(error) => return Err(NodeError::from(error).into()),
            }
        }
    }

    pub(super) async fn close(self) {
        drop(self.store);
        if let Some((server, lock)) = self.own {
            let _ = tokio::task::spawn_blocking(move || server.stop()).await;
            drop(lock);
        }
    }
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

fn usd(text: &str) -> Result<NanoUsd, CliError> {
    text.parse().map_err(|error: MoneyError| CliError::Usage(error.to_string()))
}

fn operator(error: OperatorError) -> CliError {
    match error {
        OperatorError::Store(error) => NodeError::from(error).into(),
        error @ (OperatorError::KeyFile { .. } | OperatorError::Ledger(_)) => NodeError::from(error).into(),
        error => CliError::Usage(error.to_string()),
    }
}

fn money(error: LedgerError) -> CliError {
    match error {
        LedgerError::Store(error) => NodeError::from(error).into(),
        error => CliError::Usage(error.to_string()),
    }
}
