use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use rand::TryRng;
use serde::Serialize;

use super::{
    accounts::{Accounts, LimitChanges, OperatorError, check_text, limit_fields},
    audit_log::Change,
};
use crate::{
    admission::{KeyRecord, KeyStatus, Limits, Scope, Scopes, SecretHash, key},
    domain::{KeyId, ModelId, TenantId},
    store::{Function, Reply, keys},
};

/// Random bytes of a secret.
const SECRET_BYTES: usize = 32;
/// Characters of a secret that are kept for display: the prefix and eight digits.
const SHOWN_CHARACTERS: usize = 11;
const LABELS_MAX: usize = 16;
/// For how long a secret that was replaced may still be valid.
const GRACE_MAX: Duration = Duration::from_secs(30 * 86_400);

/// A key just made, or the same with a new secret. The only time that its secret is to be had.
#[derive(Clone, Serialize)]
pub struct NewKey {
    pub secret: String,
    #[serde(flatten)]
    pub record: KeyRecord,
}

/// Without the secret, which must not end up in a log.
impl std::fmt::Debug for NewKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewKey").field("record", &self.record).finish_non_exhaustive()
    }
}

/// What a key is to be like.
#[derive(Clone, Debug, Default)]
pub struct KeyWish {
    pub label: String,
    pub labels: BTreeMap<String, String>,
    pub scopes: Scopes,
    /// The models that it may ask; nothing is all of them.
    pub models: Option<BTreeSet<ModelId>>,
    pub limits: Limits,
    pub expires_unix_ms: Option<u64>,
}

impl KeyWish {
    pub fn new(label: &str, scopes: Scopes) -> Self {
        Self { label: label.to_owned(), scopes, ..Self::default() }
    }

    fn check(&self) -> Result<(), OperatorError> {
        check_text("label", &self.label)?;
        check_labels(&self.labels)?;
        if self.scopes.iter().next().is_none() {
            let all = Scope::ALL.map(Scope::as_str).join(", ");
            return Err(OperatorError::BadWish(format!("a key needs at least one scope of {all}")));
        }
        if self.models.as_ref().is_some_and(BTreeSet::is_empty) {
            return Err(OperatorError::BadWish("a list of models must not be empty".to_owned()));
        }
        Ok(())
    }
}

/// What is to be changed of a key; what is `None` stays.
#[derive(Clone, Debug, Default)]
pub struct KeyChanges {
    pub label: Option<String>,
    pub labels: Option<BTreeMap<String, String>>,
    pub scopes: Option<Scopes>,
    /// Within: `None` for all models.
    pub models: Option<Option<BTreeSet<ModelId>>>,
    /// Within: `None` for never.
    pub expires_unix_ms: Option<Option<u64>>,
    pub limits: LimitChanges,
}

impl Accounts {
    /// Makes a key for a tenant.
    pub async fn create_key(&self, tenant: &TenantId, label: &str, scopes: Scopes) -> Result<NewKey, OperatorError> {
        self.create_key_like(tenant, KeyWish::new(label, scopes)).await
    }

    pub async fn create_key_like(&self, tenant: &TenantId, wish: KeyWish) -> Result<NewKey, OperatorError> {
        wish.check()?;
        self.tenant(tenant).await?;
        let secret = new_secret()?;
        let id = KeyId::generate();
        let change = Change::of("key.create", &id).with("tenant", tenant).with("scopes", wish.scopes);
        self.log.write(change.with("label", &wish.label)).await?;
        let record = self.store_key(tenant, id, &secret, wish).await?;
        Ok(NewKey { secret, record })
    }

    /// Keys of one tenant, or of all, in order of creation.
    pub async fn list_keys(&self, tenant: Option<&TenantId>) -> Result<Vec<KeyRecord>, OperatorError> {
        let tenants = match tenant {
            Some(tenant) => vec![self.tenant(tenant).await?.id],
            None => self.ledger.tenants().await?,
        };
        let mut records = Vec::new();
        for tenant in tenants {
            let listing = &mut redis::cmd("ZRANGE");
            let ids: Vec<String> = self.store.query(listing.arg(keys::tenant_api_keys(&tenant)).arg(0).arg(-1)).await?;
            for id in ids {
                // Listed and without a record: its making was interrupted, and the secret opens nothing.
                records.extend(key::load(&self.store, &tenant, &KeyId::from(id)).await?);
            }
        }
        records.sort_by(|a, b| (a.created_unix_ms, &a.id).cmp(&(b.created_unix_ms, &b.id)));
        Ok(records)
    }

    pub async fn key(&self, id: &KeyId) -> Result<KeyRecord, OperatorError> {
        let unknown = || OperatorError::UnknownKey(id.clone());
        let tenant: Option<String> = self.store.query(redis::cmd("GET").arg(keys::key_tenant(id))).await?;
        let tenant = TenantId::from(tenant.ok_or_else(unknown)?);
        key::load(&self.store, &tenant, id).await?.ok_or_else(unknown)
    }

    /// Ends a key for good. Nothing more is admitted with it from now on, and every edge refuses it within a second;
    /// requests under way end as they would.
    pub async fn revoke_key(&self, id: &KeyId) -> Result<KeyRecord, OperatorError> {
        let record = self.key(id).await?;
        if record.status == KeyStatus::Revoked {
            return Ok(record);
        }
        let now = self.store.now_unix_ms().await?;
        self.log.write(Change::of("key.revoke", id).with("tenant", &record.tenant)).await?;
        let fields = [("status", KeyStatus::Revoked.as_str().to_owned()), ("revoked", now.to_string())];
        self.set_key(&record, fields.map(|(name, value)| (name.to_owned(), value)).into()).await
    }

    pub async fn change_key(&self, id: &KeyId, changes: KeyChanges) -> Result<KeyRecord, OperatorError> {
        let record = self.key(id).await?;
        if record.status == KeyStatus::Revoked {
            return Err(OperatorError::KeyEnded(id.clone()));
        }
        let KeyChanges { label, labels, scopes, models, expires_unix_ms, limits } = changes;
        let wish = KeyWish {
            label: label.unwrap_or_else(|| record.label.clone()),
            labels: labels.unwrap_or_else(|| record.labels.clone()),
            scopes: scopes.unwrap_or(record.scopes),
            models: models.unwrap_or_else(|| record.models.as_deref().cloned()),
            limits: record.limits.clone(),
            expires_unix_ms: expires_unix_ms.unwrap_or(record.expires_unix_ms),
        };
        wish.check()?;
        let changed = record_of(&record, wish);
        // What a field of the record had and the changed one has not is taken away.
        let mut fields: BTreeMap<String, String> =
            record.fields().into_iter().map(|(name, _)| (name, String::new())).collect();
        fields.extend(changed.fields());
        fields.extend(limit_fields(&limits));
        let log = Change::of("key.change", id).with("tenant", &record.tenant).with("fields", &fields);
        self.log.write(log).await?;
        self.set_key(&record, fields.into_iter().collect()).await
    }

    /// Gives a key a new secret. It stays the same key, with the same id; the secret before is valid for `grace`
    /// longer, any earlier one no more.
    pub async fn rotate_key(&self, id: &KeyId, grace: Duration) -> Result<NewKey, OperatorError> {
        if grace > GRACE_MAX {
            let days = GRACE_MAX.as_secs() / 86_400;
            return Err(OperatorError::BadWish(format!("a replaced secret may be valid for {days} days at most")));
        }
        let record = self.key(id).await?;
        if record.status == KeyStatus::Revoked {
            return Err(OperatorError::KeyEnded(id.clone()));
        }
        self.log.write(Change::of("key.rotate", id).with("grace_seconds", grace.as_secs())).await?;
        let secret = new_secret()?;
        let hash = SecretHash::of(&secret).ok_or(OperatorError::BadText("secret"))?.to_hex();
        let key = keys::api_key(&record.tenant, id);
        let before: (Option<String>, Option<String>) =
            self.store.query(redis::cmd("HMGET").arg(&key).arg("secret").arg("secret_before")).await?;
        let (now, (current, earlier)) = (self.store.now_unix_ms().await?, before);
        if let Some(earlier) = earlier {
            self.store.query::<u64>(redis::cmd("DEL").arg(keys::secret(&earlier))).await?;
        }
        // The new one first: a rotation that is interrupted leaves a key that works.
        self.store_secret(&record.tenant, id, &hash).await?;
        let fields = [
            ("secret", hash),
            ("secret_before", current.clone().unwrap_or_default()),
            ("prefix", shown(&secret)),
            ("rotated", now.to_string()),
        ];
        let record = self.set_key(&record, fields.map(|(name, value)| (name.to_owned(), value)).into()).await?;
        if let Some(current) = current {
            let until = now.saturating_add(u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
            let ending = &mut redis::cmd("HSET");
            self.store.query::<u64>(ending.arg(keys::secret(&current)).arg("until").arg(until)).await?;
            // Of its own accord, long after it was last good for anything.
            let forgetting = &mut redis::cmd("PEXPIREAT");
            let forgotten = until.saturating_add(86_400_000);
            self.store.query::<u64>(forgetting.arg(keys::secret(&current)).arg(forgotten)).await?;
        }
        Ok(NewKey { secret, record })
    }

    /// Stores what is kept of a key. May be repeated with the same secret. What makes the secret open something comes
    /// last: a key that works can always be listed and revoked.
    pub(super) async fn store_key(
        &self,
        tenant: &TenantId,
        id: KeyId,
        secret: &str,
        wish: KeyWish,
    ) -> Result<KeyRecord, OperatorError> {
        let hash = SecretHash::of(secret).ok_or(OperatorError::BadText("secret"))?;
        if let Some(known) = key::secret(&self.store, &hash).await? {
            return self.key(&known.key).await;
        }
        let hash = hash.to_hex();
        let created = self.store.now_unix_ms().await?;
        let fresh = KeyRecord {
            id: id.clone(),
            tenant: tenant.clone(),
            label: String::new(),
            labels: BTreeMap::new(),
            prefix: shown(secret),
            scopes: Scopes::default(),
            models: None,
            limits: Limits::default(),
            status: KeyStatus::Active,
            created_unix_ms: created,
            expires_unix_ms: None,
            rotated_unix_ms: None,
            revoked_unix_ms: None,
        };
        let record = record_of(&fresh, wish);
        self.store.query::<String>(redis::cmd("SET").arg(keys::key_tenant(&id)).arg(tenant.as_str())).await?;
        let listing = &mut redis::cmd("ZADD");
        self.store.query::<u64>(listing.arg(keys::tenant_api_keys(tenant)).arg(created).arg(id.as_str())).await?;
        let mut command = redis::cmd("HSET");
        command.arg(keys::api_key(tenant, &id)).arg("secret").arg(&hash);
        for (name, value) in record.fields() {
            command.arg(name).arg(value);
        }
        self.store.query::<u64>(&command).await?;
        self.store_secret(tenant, &id, &hash).await?;
        Ok(record)
    }

    async fn store_secret(&self, tenant: &TenantId, key: &KeyId, hash: &str) -> Result<(), OperatorError> {
        let mut command = redis::cmd("HSET");
        command.arg(keys::secret(hash)).arg("tenant").arg(tenant.as_str()).arg("key").arg(key.as_str());
        self.store.query::<u64>(&command).await?;
        Ok(())
    }

    async fn set_key(&self, record: &KeyRecord, fields: Vec<(String, String)>) -> Result<KeyRecord, OperatorError> {
        let KeyRecord { id, tenant, .. } = record;
        let mut arguments = vec![id.as_str().as_bytes()];
        arguments.extend(fields.iter().flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]));
        let reply: Reply = self.store.call(Function::KeySet, &keys::ledger(tenant), &arguments).await?;
        match reply.word() {
            "set" => self.key(id).await,
            "unknown_key" => Err(OperatorError::UnknownKey(id.clone())),
            _ => Err(reply.unexpected("key_set").into()),
        }
    }
}

fn record_of(record: &KeyRecord, wish: KeyWish) -> KeyRecord {
    let KeyWish { label, labels, scopes, models, limits, expires_unix_ms } = wish;
    let models = models.map(Arc::new);
    KeyRecord { label, labels, scopes, models, limits, expires_unix_ms, ..record.clone() }
}

fn shown(secret: &str) -> String {
    secret.chars().take(SHOWN_CHARACTERS).collect()
}

fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), OperatorError> {
    if labels.len() > LABELS_MAX {
        return Err(OperatorError::BadWish(format!("there may be {LABELS_MAX} labels at most")));
    }
    labels.iter().try_for_each(|(name, value)| check_text("label", name).and_then(|()| check_text("label", value)))
}

/// `sk_` and 64 hexadecimal digits, straight from the system's random numbers.
pub(super) fn new_secret() -> Result<String, OperatorError> {
    let mut bytes = [0_u8; SECRET_BYTES];
    rand::rngs::SysRng.try_fill_bytes(&mut bytes).map_err(|error| OperatorError::Random(error.to_string()))?;
    Ok(format!("{}{}", key::SECRET_PREFIX, hex::encode(bytes)))
}
