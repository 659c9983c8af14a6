//! Answers that outlive their connection: stored completions and responses, and what was asked under an idempotency
//! key.
//!
//! Promises that a record belongs to one tenant and is found by nobody else, that it is gone after its time, and that
//! of several requests under one key exactly one runs, wherever they arrive. Never looks into an answer.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    domain::{FundsEnd, NodeId, RequestId, TenantId},
    store::{Function, Reply, Store, StoreError, keys},
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
const RECORD_FORMAT: u8 = 2;
/// Ids of a tenant's records that are read at once.
const LIST_MAX: usize = 100;
/// Records that one page looks at, whether it wants them or not.
const LOOKED_MAX: usize = 500;

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

/// A page of a list.
#[derive(Clone, Debug)]
pub struct Listed<T> {
    pub found: Vec<T>,
    /// The last record that was looked at: the next page begins behind it.
    pub last: Option<String>,
    pub has_more: bool,
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
    /// Nobody who could still answer: the caller runs it. Whoever asked before may have run a request in vain.
    First(Option<RequestId>),
    /// The same question.
    Again,
    /// Another question.
    Other,
}

/// What was asked under an idempotency key, and by whom.
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
    /// What there was not enough of for a longer answer.
    pub limited_by: Option<FundsEnd>,
    pub body: Vec<u8>,
}

/// A tenant's idempotency key and the request under it, as digests.
#[derive(Clone, Debug)]
pub struct Key {
    tenant: TenantId,
    key_sha256: String,
    asked: Asked,
}

impl Key {
    /// `path` and `body` are the question; `request` would answer it, on the edge at `node`.
    pub fn new(tenant: TenantId, key: &str, path: &str, body: &[u8], request: &RequestId, node: &NodeId) -> Self {
        let mut question = Sha256::new();
        question.update(path.as_bytes());
        question.update([0]);
        question.update(body);
        let key_sha256 = hex::encode(Sha256::digest(key.as_bytes()));
        let body_sha256 = question.finalize().into();
        Self { tenant, key_sha256, asked: Asked { body_sha256, request: request.clone(), node: node.clone() } }
    }

    /// What local tables know it by.
    pub fn name(&self) -> String {
        format!("{} {}", self.tenant, self.key_sha256)
    }

    pub fn tenant(&self) -> &TenantId {
        &self.tenant
    }

    fn places(&self) -> [String; 3] {
        let (tenant, key) = (&self.tenant, &self.key_sha256);
        [keys::idempotency(tenant, key), keys::idempotent_answer(tenant, key), keys::idempotent_request(tenant, key)]
    }
}

impl Records {
    pub fn new(store: Store, retention: Retention, lease: Duration) -> Self {
        Self { store, retention, lease }
    }

    pub async fn put(&self, tenant: &TenantId, record: &Record) -> Result<(), StoreError> {
        let (key, list) = (keys::record(tenant, &record.id), keys::records(tenant, &record.kind));
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
    pub async fn delete(&self, tenant: &TenantId, kind: &str, id: &str) -> Result<bool, StoreError> {
        let deleted: u64 = self.store.query(redis::cmd("DEL").arg(keys::record(tenant, id))).await?;
        let _: u64 = self.store.query(redis::cmd("ZREM").arg(keys::records(tenant, kind)).arg(id)).await?;
        Ok(deleted > 0)
    }

    /// What `choose` makes of the records of a kind that it wants, behind the one called `after`; at most `limit`. Looks
    /// at so many and no more.
    pub async fn list<T>(
        &self,
        tenant: &TenantId,
        kind: &str,
        order: Order,
        after: Option<&str>,
        limit: usize,
        choose: impl Fn(Record) -> Option<T>,
    ) -> Result<Listed<T>, StoreError> {
        let (rank, range) = match order {
            Order::OldestFirst => ("ZRANK", "ZRANGE"),
            Order::NewestFirst => ("ZREVRANK", "ZREVRANGE"),
        };
        let list = keys::records(tenant, kind);
        let mut listed = Listed { found: Vec::new(), last: None, has_more: false };
        let mut from = 0usize;
        if let Some(after) = after {
            let rank: Option<usize> = self.store.query(redis::cmd(rank).arg(&list).arg(after)).await?;
            let Some(rank) = rank else { return Ok(listed) };
            from = rank + 1;
        }
        let mut looked = 0;
        loop {
            let mut range = redis::cmd(range);
            let ids: Vec<String> = self.store.query(range.arg(&list).arg(from).arg(from + LIST_MAX - 1)).await?;
            for id in &ids {
                if listed.found.len() == limit || looked == LOOKED_MAX {
                    listed.has_more = true;
                    return Ok(listed);
                }
                looked += 1;
                listed.found.extend(self.get(tenant, id).await?.and_then(&choose));
                listed.last = Some(id.clone());
            }
            if ids.len() < LIST_MAX {
                return Ok(listed);
            }
            from += LIST_MAX;
        }
    }

    // -- once -----------------------------------------------------------------------------------------------

    /// Asks to run what is under `key`.
    pub async fn begin(&self, key: &Key) -> Result<Once, StoreError> {
        let (lease, retention) =
            (self.lease.as_millis().to_string(), self.retention.once.as_millis().max(1).to_string());
        let arguments = [lease.as_bytes(), key.asked.request.as_str().as_bytes(), retention.as_bytes()];
        let mut reply = self.once(Function::OnceBegin, key, &arguments).await?;
        match reply.word() {
            "first" => {
                let before: String = reply.next("request before")?;
                Ok(Once::First((!before.is_empty()).then(|| before.into())))
            }
            "asked" => {
                let before: Asked = decode(&reply.next::<Vec<u8>>("question")?)?;
                // A question whose answer was lost on the way to us is our own.
                if before == key.asked {
                    return Ok(Once::First(None));
                }
                Ok(if before.body_sha256 == key.asked.body_sha256 { Once::Again } else { Once::Other })
            }
            _ => Err(reply.unexpected("once_begin")),
        }
    }

    /// Says that it still runs. `false`: somebody else has asked meanwhile.
    pub async fn renew(&self, key: &Key) -> Result<bool, StoreError> {
        let lease = self.lease.as_millis().to_string();
        let reply = self.once(Function::OnceRenew, key, &[lease.as_bytes()]).await?;
        done(&reply, "renewed", "once_renew")
    }

    /// Keeps the answer for whoever asks again. `false`: somebody else has asked meanwhile.
    pub async fn answered(&self, key: &Key, answered: &Answered) -> Result<bool, StoreError> {
        let retention = self.retention.once.as_millis().max(1).to_string();
        let answer = encode(answered)?;
        let reply = self.once(Function::OnceAnswer, key, &[&answer, retention.as_bytes()]).await?;
        done(&reply, "answered", "once_answer")
    }

    /// It came to nothing: whoever asks again is the first.
    pub async fn forget(&self, key: &Key) -> Result<(), StoreError> {
        let reply = self.once(Function::OnceForget, key, &[]).await?;
        done(&reply, "forgotten", "once_forget").map(drop)
    }

    async fn once(&self, function: Function, key: &Key, arguments: &[&[u8]]) -> Result<Reply, StoreError> {
        let question = encode(&key.asked)?;
        let arguments: Vec<&[u8]> = std::iter::once(&question[..]).chain(arguments.iter().copied()).collect();
        self.store.call(function, &key.places(), &arguments).await
    }

    /// Whether somebody has asked under the key, not too long ago.
    pub async fn is_asked(&self, key: &Key) -> Result<bool, StoreError> {
        self.store.query(redis::cmd("EXISTS").arg(&key.places()[0])).await
    }

    pub async fn answer(&self, key: &Key) -> Result<Option<Answered>, StoreError> {
        let stored: Option<Vec<u8>> = self.store.query(redis::cmd("GET").arg(&key.places()[1])).await?;
        stored.map(|bytes| decode(&bytes)).transpose()
    }

    // -- names ----------------------------------------------------------------------------------------------

    /// Remembers what a client calls its request, for `time`.
    pub async fn name(
        &self,
        tenant: &TenantId,
        own_id: &str,
        request: &RequestId,
        time: Duration,
    ) -> Result<(), StoreError> {
        let mut set = redis::cmd("SET");
        set.arg(keys::own_request(tenant, own_id)).arg(request.as_str()).arg("PX").arg(time.as_millis().max(1) as u64);
        self.store.query::<String>(&set).await.map(drop)
    }

    pub async fn named(&self, tenant: &TenantId, own_id: &str) -> Result<Option<RequestId>, StoreError> {
        let name: Option<String> = self.store.query(redis::cmd("GET").arg(keys::own_request(tenant, own_id))).await?;
        Ok(name.map(RequestId::from))
    }

    pub fn lease(&self) -> Duration {
        self.lease
    }
}

fn done(reply: &Reply, word: &str, function: &str) -> Result<bool, StoreError> {
    match reply.word() {
        "lost" => Ok(false),
        other if other == word => Ok(true),
        _ => Err(reply.unexpected(function)),
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
