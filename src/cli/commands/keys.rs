use std::collections::BTreeSet;

use clap::Subcommand;

use super::{Desk, arguments, operator};
use crate::{
    admission::Scopes,
    cli::{CliError, json, print},
    domain::{KeyId, ModelId, TenantId},
    node,
    operator::{KeyChanges, KeyWish},
};

#[derive(Subcommand)]
pub enum Keys {
    /// Make the development tenant and the two key files where the store has no tenant yet
    Bootstrap,
    /// Make a key; its secret is shown this once
    Create {
        #[arg(long, value_name = "ID")]
        tenant: String,
        /// What the key is for
        #[arg(long, default_value = "key")]
        label: String,
        /// Of chat, read and admin, separated by commas
        #[arg(long, default_value = "chat,read")]
        scopes: String,
        /// The models that it may ask, separated by commas, or `all`
        #[arg(long, default_value = "all")]
        models: String,
        /// When it ends: a time such as 2026-12-31T23:59:59Z, one from now such as 30d, or `never`
        #[arg(long, value_name = "WHEN", default_value = "never")]
        expires: String,
        /// Whatever else there is to know of it: name=value, separated by commas
        #[arg(long, default_value = "")]
        labels: String,
        /// One of its limits, as for `limits set`; may be repeated
        #[arg(long = "limit", value_name = "NAME=VALUE")]
        limits: Vec<String>,
    },
    /// Keys of a tenant, or of all
    List {
        #[arg(long, value_name = "ID")]
        tenant: Option<String>,
    },
    /// One key
    Show {
        #[arg(value_name = "ID")]
        key: String,
    },
    /// Change what a key may do; what is not named stays
    Change {
        #[arg(value_name = "ID")]
        key: String,
        #[arg(long)]
        label: Option<String>,
        /// Of chat, read and admin, separated by commas
        #[arg(long)]
        scopes: Option<String>,
        /// The models that it may ask, separated by commas, or `all`
        #[arg(long)]
        models: Option<String>,
        /// A time, one from now such as 30d, or `never`
        #[arg(long, value_name = "WHEN")]
        expires: Option<String>,
        /// All of its labels: name=value, separated by commas
        #[arg(long)]
        labels: Option<String>,
        /// One of its limits, as for `limits set`; may be repeated
        #[arg(long = "limit", value_name = "NAME=VALUE")]
        limits: Vec<String>,
    },
    /// Give a key a new secret, which is shown this once; the key and its id stay
    Rotate {
        #[arg(value_name = "ID")]
        key: String,
        /// For how long the secret before is still good; 0s ends it now
        #[arg(long, value_name = "TIME", default_value = "24h")]
        grace: String,
    },
    /// End a key for good
    Revoke {
        #[arg(value_name = "ID")]
        key: String,
    },
}

const COLUMNS: &[&str] =
    &["id", "tenant", "label", "prefix", "scopes", "models", "status", "created_unix_ms", "expires_unix_ms"];

pub async fn run(desk: &Desk<'_>, command: Keys) -> Result<(), CliError> {
    let accounts = &desk.accounts;
    match command {
        Keys::Bootstrap => print(desk.output, &json(&node::bootstrap(desk.config, accounts).await?)?),
        Keys::Create { tenant, label, scopes, models, expires, labels, limits } => {
            let wish = KeyWish {
                label,
                labels: arguments::labels("--labels", &labels)?,
                scopes: scopes_of(&scopes)?,
                models: models_of(&models),
                limits: arguments::limits("--limit", &limits)?,
                expires_unix_ms: arguments::end(desk, "--expires", &expires).await?,
            };
            let key = accounts.create_key_like(&TenantId::from(tenant), wish).await.map_err(operator)?;
            print(desk.output, &json(&key)?)
        }
        Keys::List { tenant } => {
            let tenant = tenant.map(TenantId::from);
            let keys = json(&accounts.list_keys(tenant.as_ref()).await.map_err(operator)?)?;
            desk.print_list(&keys, COLUMNS)
        }
        Keys::Show { key } => print(desk.output, &json(&accounts.key(&KeyId::from(key)).await.map_err(operator)?)?),
        Keys::Change { key, label, scopes, models, expires, labels, limits } => {
            let expires_unix_ms = match expires {
                Some(expires) => Some(arguments::end(desk, "--expires", &expires).await?),
                None => None,
            };
            let changes = KeyChanges {
                label,
                labels: labels.map(|labels| arguments::labels("--labels", &labels)).transpose()?,
                scopes: scopes.map(|scopes| scopes_of(&scopes)).transpose()?,
                models: models.map(|models| models_of(&models)),
                expires_unix_ms,
                limits: arguments::limit_changes("--limit", &limits)?,
            };
            print(desk.output, &json(&accounts.change_key(&KeyId::from(key), &changes).await.map_err(operator)?)?)
        }
        Keys::Rotate { key, grace } => {
            let grace = arguments::duration("--grace", &grace)?;
            print(desk.output, &json(&accounts.rotate_key(&KeyId::from(key), grace).await.map_err(operator)?)?)
        }
        Keys::Revoke { key } => {
            print(desk.output, &json(&accounts.revoke_key(&KeyId::from(key)).await.map_err(operator)?)?)
        }
    }
}

fn scopes_of(text: &str) -> Result<Scopes, CliError> {
    text.parse().map_err(|error| CliError::Usage(format!("--scopes: {error}")))
}

fn models_of(text: &str) -> Option<BTreeSet<ModelId>> {
    let models = || text.split(',').map(str::trim).filter(|model| !model.is_empty()).map(ModelId::from).collect();
    (text != "all").then(models)
}
