//! Answers that outlive their connection: stored completions and responses, and what was asked under an idempotency
//! key.
//!
//! Promises that a record belongs to one tenant and is found by nobody else, that it is gone after its time, and that
//! of several requests under one key exactly one runs, wherever they arrive. Never looks into an answer.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    domain::{NodeId, RequestId, TenantId},
    store::{Store, StoreError, keys},
};

/// A stored answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// As the client knows it.
    pub id: String,
    /// Which endpoint made it.
    pub kind: String,
    pub created_unix_ms: u64,
    /// JSON, as the client got it.
    pub answer: Vec<u8>,
    /// JSON of the conversation up to and with the answer, for whoever goes on with it.
    pub conversation: Vec<u8>,
}

/// First byte of a stored record.
const RECORD_FORMAT: u8 = 1;
/// Records of one tenant that a list looks through at once.
const LIST_MAX: usize = 100;

/// Cheap to clone.
#[derive(Clone)]
pub struct Records {
    store: Store,
    retention: Retention,
    /// How long a key without an answer is somebody's, unless that somebody says so again.
    lease: Duration,
}

/// How long things are kept.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    pub records: Duration,
    /// Keys and what was answered under them.
    pub once: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self { records: Duration::from_secs(30 * 86_400), once: Duration::from_secs(86_400) }
    }
}

/// By the time at which they were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    OldestFirst,
    NewestFirst,
}

/// Who else has asked under the same key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Once {
    /// Nobody: the caller runs it.
    First,
    /// The same question, which the edge at this node runs or has run.
    Again { request: RequestId, node: NodeId },
    /// Another question.
    Other,
}

/// What was asked under an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Asked {
    body_sha256: [u8; 32],
    request: RequestId,
    node: NodeId,
}

/// The answer to it, as it went over the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    pub content_type: String,
    /// Names of fields that had no effect.
    pub ignored: Vec<String>,
    pub body: Vec<u8>,
}

/// A tenant's idempotency key and the request under it, as digests.
#[derive(Clone, Debug)]
pub struct Key {
    pub tenant: TenantId,
    key_sha256: String,
    body_sha256: [u8; 32],
}

impl Key {
    /// `path` and `body` are the question.
    pub fn new(tenant: TenantId, key: &str, path: &str, body: &[u8]) -> Self {
        let mut question = Sha256::new();
        question.update(path.as_bytes());
        question.update([0]);
        question.update(body);
        let key_sha256 = hex::encode(Sha256::digest(key.as_bytes()));
        Self { tenant, key_sha256, body_sha256: question.finalize().into() }
    }

    /// What local tables know it by.
    pub fn name(&self) -> String {
        format!("{} {}", self.tenant, self.key_sha256)
    }
}

impl Records {
    pub fn new(store: Store, retention: Retention, lease: Duration) -> Self {
        Self { store, retention, lease }
    }

    pub async fn put(&self, tenant: &TenantId, record: &Record) -> Result<(), StoreError> {
        let (key, list) = (keys::record(tenant, &record.id), keys::records(tenant));
        let retention = self.retention.records.as_millis() as u64;
        let expired = record.created_unix_ms.saturating_sub(retention);
        let mut commands = redis::pipe();
        commands.cmd("SET").arg(key).arg(encode(record)?).arg("PX").arg(retention.max(1));
        commands.cmd("ZADD").arg(&list).arg(record.created_unix_ms).arg(&record.id);
        commands.cmd("ZREMRANGEBYSCORE").arg(&list).arg("-inf").arg(format!("({expired}"));
        commands.cmd("PEXPIRE").arg(&list).arg(retention.max(1));
        self.store.query_all(&commands).await.map(drop)
    }

    pub async fn get(&self, tenant: &TenantId, id: &str) -> Result<Option<Record>, StoreError> {
        let stored: Option<Vec<u8>> = self.store.query(redis::cmd("GET").arg(keys::record(tenant, id))).await?;
        stored.map(|bytes| decode(&bytes)).transpose()
    }

    /// `false`: there was none.
    pub async fn delete(&self, tenant: &TenantId, id: &str) -> Result<bool, StoreError> {
        let deleted: u64 = self.store.query(redis::cmd("DEL").arg(keys::record(tenant, id))).await?;
        let _: u64 = self.store.query(redis::cmd("ZREM").arg(keys::records(tenant)).arg(id)).await?;
        Ok(deleted > 0)
    }

    /// What `choose` makes of those that it wants, behind the record called `after`; at most `limit`, and whether there
    /// are more.
    pub async fn list<T>(
        &self,
        tenant: &TenantId,
        order: Order,
        after: Option<&str>,
        limit: usize,
        choose: impl Fn(Record) -> Option<T>,
    ) -> Result<(Vec<T>, bool), StoreError> {
        let (rank, range) = match order {
            Order::OldestFirst => ("ZRANK", "ZRANGE"),
            Order::NewestFirst => ("ZREVRANK", "ZREVRANGE"),
        };
        let list = keys::records(tenant);
        let mut from = 0usize;
        if let Some(after) = after {
            let rank: Option<usize> = self.store.query(redis::cmd(rank).arg(&list).arg(after)).await?;
            let Some(rank) = rank else { return Ok((Vec::new(), false)) };
            from = rank + 1;
        }
        let mut found = Vec::new();
        loop {
            let mut range = redis::cmd(range);
            let ids: Vec<String> = self.store.query(range.arg(&list).arg(from).arg(from + LIST_MAX - 1)).await?;
            for id in &ids {
                if let Some(chosen) = self.get(tenant, id).await?.and_then(&choose) {
                    if found.len() == limit {
                        return Ok((found, true));
                    }
                    found.push(chosen);
                }
            }
            if ids.len() < LIST_MAX {
                return Ok((found, false));
            }
            from += LIST_MAX;
        }
    }

    // -- once -----------------------------------------------------------------------------------------------

    /// Asks to run `request` under `key`.
    pub async fn begin(&self, key: &Key, request: &RequestId, node: &NodeId) -> Result<Once, StoreError> {
        let asked = Asked { body_sha256: key.body_sha256, request: request.clone(), node: node.clone() };
        let mut set = redis::cmd("SET");
        set.arg(keys::idempotency(&key.tenant, &key.key_sha256)).arg(encode(&asked)?);
        set.arg("PX").arg(self.lease.as_millis() as u64).arg("NX").arg("GET");
        let before: Option<Vec<u8>> = self.store.query(&set).await?;
        let Some(before) = before else { return Ok(Once::First) };
        let before: Asked = decode(&before)?;
        Ok(if before.body_sha256 == key.body_sha256 {
            Once::Again { request: before.request, node: before.node }
        } else {
            Once::Other
        })
    }

    /// Says that it still runs.
    pub async fn renew(&self, key: &Key) -> Result<(), StoreError> {
        let mut expire = redis::cmd("PEXPIRE");
        expire.arg(keys::idempotency(&key.tenant, &key.key_sha256)).arg(self.lease.as_millis() as u64);
        self.store.query::<u64>(&expire).await.map(drop)
    }

    /// Keeps the answer for whoever asks again.
    pub async fn answered(&self, key: &Key, answered: &Answered) -> Result<(), StoreError> {
        let retention = (self.retention.once.as_millis() as u64).max(1);
        let mut commands = redis::pipe();
        let answer = keys::idempotent_answer(&key.tenant, &key.key_sha256);
        commands.cmd("SET").arg(answer).arg(encode(answered)?).arg("PX").arg(retention);
        commands.cmd("PEXPIRE").arg(keys::idempotency(&key.tenant, &key.key_sha256)).arg(retention);
        self.store.query_all(&commands).await.map(drop)
    }

    /// Whether somebody has asked under the key, not too long ago.
    pub async fn is_asked(&self, key: &Key) -> Result<bool, StoreError> {
        self.store.query(redis::cmd("EXISTS").arg(keys::idempotency(&key.tenant, &key.key_sha256))).await
    }

    /// It came to nothing: whoever asks again is the first.
    pub async fn forget(&self, key: &Key) -> Result<(), StoreError> {
        self.store.query::<u64>(redis::cmd("DEL").arg(keys::idempotency(&key.tenant, &key.key_sha256))).await.map(drop)
    }

    pub async fn answer(&self, key: &Key) -> Result<Option<Answered>, StoreError> {
        let name = keys::idempotent_answer(&key.tenant, &key.key_sha256);
        let stored: Option<Vec<u8>> = self.store.query(redis::cmd("GET").arg(name)).await?;
        stored.map(|bytes| decode(&bytes)).transpose()
    }

    pub fn lease(&self) -> Duration {
        self.lease
    }
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![RECORD_FORMAT];
    let encoded = postcard::to_stdvec(value).map_err(|error| StoreError::Damaged(format!("a record: {error}")))?;
    bytes.extend_from_slice(&encoded);
    Ok(bytes)
}

fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    let damaged = |why: String| StoreError::Damaged(format!("a record: {why}"));
    match bytes.split_first() {
        Some((&RECORD_FORMAT, rest)) => postcard::from_bytes(rest).map_err(|error| damaged(error.to_string())),
        Some((format, _)) => Err(damaged(format!("format {format} is not known here"))),
        None => Err(damaged("it is empty".to_owned())),
    }
}
