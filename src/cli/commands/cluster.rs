use serde_json::{Value, json};

use super::{Desk, operator};
use crate::{
    cli::{CliError, Output, json, print},
    directory::{Directory, Listed, ModelCard},
};

pub async fn nodes(desk: &Desk<'_>) -> Result<(), CliError> {
    let mut nodes = listed(desk).await?;
    nodes.iter_mut().for_each(|node| node.card.actors.clear());
    match desk.output {
        Output::Json => print(desk.output, &json(&nodes)?),
        Output::Table => print(desk.output, &nodes.iter().map(row).collect::<Value>()),
    }
}

fn row(Listed { card, lease_left_ms }: &Listed) -> Value {
    let model = |model: &ModelCard| {
        let ModelCard { model, device, running, sequences_max, waiting, .. } = model;
        format!("{model} on {device}: {running} of {sequences_max}, {waiting} wait")
    };
    json!({
        "node": card.node, "host": card.host, "role": card.role, "state": card.state, "version": card.version,
        "started_unix_ms": card.started_unix_ms, "lease_left_ms": lease_left_ms, "streams": card.open_streams,
        "models": card.models.iter().map(model).collect::<Vec<_>>().join("; "),
    })
}

pub async fn actors(desk: &Desk<'_>, of: Option<&str>) -> Result<(), CliError> {
    let mut actors = Vec::new();
    for Listed { card, .. } in listed(desk).await? {
        if of.is_some_and(|of| card.node.as_str() != of && card.host != of) {
            continue;
        }
        for actor in &card.actors {
            let mut row = json(actor)?;
            row["node"] = json!(card.node);
            row["host"] = json!(card.host);
            if desk.output == Output::Table {
                let mailbox = actor.mailbox.map(|mailbox| format!("{} of {}", mailbox.waiting, mailbox.max));
                row["mailbox"] = json!(mailbox.unwrap_or_default());
            }
            actors.push(row);
        }
    }
    desk.print_list(&Value::Array(actors), COLUMNS)
}

const COLUMNS: &[&str] =
    &["node", "actor", "state", "since_unix_ms", "beat_unix_ms", "restarts", "mailbox", "last_fault"];

async fn listed(desk: &Desk<'_>) -> Result<Vec<Listed>, CliError> {
    // To look takes no lease.
    let directory = Directory::new(desk.access.store.clone(), std::time::Duration::ZERO);
    directory.list().await.map_err(|error| operator(error.into()))
}
