use std::collections::HashMap;

use serde::Serialize;
use serde_json::{Map, Value};

use super::accounts::OperatorError;
use crate::store::{Store, StoreError, keys};

/// Changes that are remembered; older ones go.
const CHANGES_MAX: usize = 1_000_000;

/// What somebody is about to change.
pub struct Change {
    action: &'static str,
    target: String,
    detail: Map<String, Value>,
}

impl Change {
    pub fn of(action: &'static str, target: &impl ToString) -> Self {
        Self { action, target: target.to_string(), detail: Map::new() }
    }

    pub fn with(mut self, name: &str, value: impl Serialize) -> Self {
        self.detail.insert(name.to_owned(), serde_json::to_value(value).unwrap_or(Value::Null));
        self
    }

    pub fn with_all(self, fields: &[(String, String)]) -> Self {
        fields.iter().fold(self, |change, (name, value)| change.with(name, value))
    }

    /// That it did not come to it.
    pub fn without_effect(&self, record: &str, outcome: &str) -> Self {
        Self::of(self.action, &self.target).with("record", record).with("outcome", outcome)
    }
}

/// What was changed, by whom.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AuditRecord {
    pub id: String,
    pub unix_ms: u64,
    /// The key by which it was asked for, or the command line's user.
    pub actor: String,
    pub action: String,
    pub target: String,
    pub detail: Value,
}

/// Who changed what. Written before the change is made, so that none is ever without its record. Where nothing was
/// changed after all, a second record names the first and says why.
#[derive(Clone)]
pub struct AuditLog {
    store: Store,
    actor: String,
}

impl AuditLog {
    pub(super) fn new(store: Store) -> Self {
        Self { store, actor: "unnamed".to_owned() }
    }

    pub(super) fn acting_as(&self, actor: impl Into<String>) -> Self {
        Self { actor: actor.into(), ..self.clone() }
    }

    /// Answers the record's id.
    pub(super) async fn write(&self, change: &Change) -> Result<String, StoreError> {
        let mut command = redis::cmd("XADD");
        command.arg(keys::AUDIT).arg("MAXLEN").arg("~").arg(CHANGES_MAX).arg("*");
        command.arg("actor").arg(&self.actor).arg("action").arg(change.action).arg("target").arg(&change.target);
        command.arg("detail").arg(Value::Object(change.detail.clone()).to_string());
        self.store.query(&command).await
    }

    /// The newest `limit` of those before the record `before`, or of all; newest first.
    pub async fn list(&self, before: Option<&str>, limit: usize) -> Result<Vec<AuditRecord>, OperatorError> {
        let odd = || OperatorError::wish("before", "expected the id of a record, such as 1763769600123-0");
        let end = match before {
            None => "+".to_owned(),
            Some(before) => format!("({}", position(before).ok_or_else(odd)?),
        };
        let mut command = redis::cmd("XREVRANGE");
        command.arg(keys::AUDIT).arg(end).arg("-").arg("COUNT").arg(limit);
        let records: Vec<(String, HashMap<String, String>)> = self.store.query(&command).await?;
        records.into_iter().map(|(id, fields)| Ok(read(id, &fields)?)).collect()
    }
}

/// A record's place in the stream, as the store wants it written.
fn position(id: &str) -> Option<String> {
    let (ms, seq) = id.split_once('-')?;
    let (ms, seq) = (ms.parse::<u64>().ok()?, seq.parse::<u64>().ok()?);
    // Before the very first there is nothing, and the store would not be asked that.
    ((ms, seq) != (0, 0)).then(|| format!("{ms}-{seq}"))
}

fn read(id: String, fields: &HashMap<String, String>) -> Result<AuditRecord, StoreError> {
    let damaged = || StoreError::Damaged(format!("record {id} of the audit log"));
    let text = |name: &str| fields.get(name).cloned().ok_or_else(damaged);
    Ok(AuditRecord {
        unix_ms: id.split('-').next().and_then(|ms| ms.parse().ok()).ok_or_else(damaged)?,
        actor: text("actor")?,
        action: text("action")?,
        target: text("target")?,
        detail: serde_json::from_str(&text("detail")?).map_err(|_| damaged())?,
        id,
    })
}
