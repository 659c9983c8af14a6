use std::time::Duration;

use clap::Subcommand;
use serde_json::json;

use super::{Desk, operator};
use crate::{
    cli::{CliError, json as told, print},
    domain::TenantId,
    webhooks::{EndpointWish, Outcome, Postman, WebhookError},
};

#[derive(Subcommand)]
pub enum Webhooks {
    /// Make a tenant's endpoint, or change it; what is not said stays. A new secret is shown this once
    Set {
        #[arg(long)]
        tenant: String,
        /// Where events are sent by POST
        #[arg(long)]
        url: Option<String>,
        /// Of balance.low, balance.exhausted and limit.reached, separated by commas [default: all of them]
        #[arg(long)]
        kinds: Option<String>,
        /// Whether anything happens that is to be told; what waits is kept
        #[arg(long, value_name = "true|false")]
        enabled: Option<bool>,
        /// Make a new secret; for a day messages are signed with the one before as well
        #[arg(long)]
        rotate_secret: bool,
    },
    /// The endpoint, what waits for it, and how the last attempt went
    Show {
        #[arg(long)]
        tenant: String,
    },
    /// End the endpoint, with all that waits for it and all dead letters
    Remove {
        #[arg(long)]
        tenant: String,
    },
    /// Send a message that says nothing, from here and now
    Test {
        #[arg(long)]
        tenant: String,
    },
    /// Events that the endpoint never took
    #[command(subcommand)]
    Dead(Dead),
}

#[derive(Subcommand)]
pub enum Dead {
    List {
        #[arg(long)]
        tenant: String,
    },
    /// Deliver them after all
    Retry(Chosen),
    /// Forget them
    Drop(Chosen),
}

#[derive(clap::Args)]
pub struct Chosen {
    #[arg(long)]
    tenant: String,
    /// Only the one with this id [default: all of them]
    #[arg(long)]
    id: Option<String>,
}

pub async fn run(desk: &Desk<'_>, command: Webhooks) -> Result<(), CliError> {
    let (accounts, settings, output) = (&desk.accounts, &desk.config.webhooks, desk.output);
    let webhooks = accounts.webhooks();
    match command {
        Webhooks::Set { tenant, url, kinds, enabled, rotate_secret } => {
            let kinds = kinds.map(|kinds| kinds.parse().map_err(CliError::Usage)).transpose()?;
            let wish =
                EndpointWish { url, kinds, enabled, rotate: rotate_secret, allow_private: settings.allow_private };
            print(output, &told(&accounts.set_webhook(&TenantId::from(tenant), &wish).await.map_err(operator)?)?)
        }
        Webhooks::Show { tenant } => {
            let endpoint = webhooks.one(&TenantId::from(tenant)).await.map_err(failed)?;
            print(output, &told(&endpoint)?)
        }
        Webhooks::Remove { tenant } => {
            accounts.remove_webhook(&TenantId::from(tenant.as_str())).await.map_err(operator)?;
            print(output, &json!({ "tenant": tenant, "removed": true }))
        }
        Webhooks::Test { tenant } => {
            let postman = Postman::new(settings.allow_private, Duration::from_millis(settings.timeout_ms));
            let (id, outcome) = webhooks.test(&TenantId::from(tenant), &postman).await.map_err(failed)?;
            match outcome {
                Outcome::Accepted(status) => print(output, &json!({ "id": id, "taken": true, "status": status })),
                Outcome::Failed(why) => {
                    print(output, &json!({ "id": id, "taken": false, "why": why }))?;
                    Err(CliError::NotTaken(why))
                }
            }
        }
        Webhooks::Dead(Dead::List { tenant }) => {
            let letters = webhooks.dead_letters(&TenantId::from(tenant)).await.map_err(failed)?;
            print(output, &told(&letters)?)
        }
        Webhooks::Dead(Dead::Retry(Chosen { tenant, id })) => {
            let tenant = TenantId::from(tenant);
            let count = accounts.retry_dead_letters(&tenant, id.as_deref()).await.map_err(operator)?;
            print(output, &json!({ "tenant": tenant, "retried": count }))
        }
        Webhooks::Dead(Dead::Drop(Chosen { tenant, id })) => {
            let tenant = TenantId::from(tenant);
            let count = accounts.drop_dead_letters(&tenant, id.as_deref()).await.map_err(operator)?;
            print(output, &json!({ "tenant": tenant, "dropped": count }))
        }
    }
}

fn failed(error: WebhookError) -> CliError {
    operator(error.into())
}
