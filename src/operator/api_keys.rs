use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use rand::TryRng;
use serde::Serialize;

use super::{
    accounts::{Accounts, LimitChanges, NAME_CHARACTERS_MAX, OperatorError, Page, check_text, limit_fields},
    audit_log::Change,
};
use crate::{
    admission::{KeyRecord, KeyStatus, Limits, Scope, Scopes, SecretHash, key},
    domain::{KeyId, ModelId, TenantId},
    store::{Function, Reply, StoreError, keys},
};

/// Random bytes of a secret.
const SECRET_BYTES: usize = 32;
/// Characters of a secret that are kept for display: the prefix and eight digits.
const SHOWN_CHARACTERS: usize = 11;
pub const LABELS_MAX: usize = 16;
/// On a key's list.
pub const MODELS_MAX: usize = 256;
/// For how long a secret that was replaced may still be valid.
pub const GRACE_MAX: Duration = Duration::from_secs(30 * 86_400);
/// A secret that was replaced is forgotten so long after it was last good for anything.
const FORGOTTEN_AFTER_MS: u64 = 86_400_000;
/// The last millisecond of the year 9999, beyond which a time cannot be written down.
pub const UNIX_MS_MAX: u64 = 253_402_300_799_999;
/// Keys whose records are read in one round trip.
const PAGE: usize = 256;

/// A key just made, or the same with a new secret. The only time that its secret is to be had.
#[derive(Clone, Serialize)]
pub struct NewKey {
    #[serde(rename = "key")]
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
        check_scopes(self.scopes)?;
        self.models.as_ref().map_or(Ok(()), check_models)
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

impl KeyChanges {
    /// As the store takes them: an empty one takes the field away.
    fn fields(&self) -> Result<Vec<(String, String)>, OperatorError> {
        let mut fields = Vec::new();
        let mut set = |name: &str, value: String| fields.push((name.to_owned(), value));
        if let Some(label) = &self.label {
            check_text("label", label)?;
            set("label", label.clone());
        }
        if let Some(labels) = &self.labels {
            check_labels(labels)?;
            set("labels", key::json(labels));
        }
        if let Some(scopes) = self.scopes {
            check_scopes(scopes)?;
            set("scopes", scopes.to_string());
        }
        if let Some(models) = &self.models {
            models.as_ref().map_or(Ok(()), check_models)?;
            set("models", models.as_ref().map(key::json).unwrap_or_default());
        }
        if let Some(expires) = self.expires_unix_ms {
            set("expires", expires.map(|ms| ms.to_string()).unwrap_or_default());
        }
        fields.extend(limit_fields(&self.limits)?);
        Ok(fields)
    }
}

impl Accounts {
    /// Makes a key for a tenant.
    pub async fn create_key(&self, tenant: &TenantId, label: &str, scopes: Scopes) -> Result<NewKey, OperatorError> {
        self.create_key_like(tenant, KeyWish::new(label, scopes)).await
    }

    pub async fn create_key_like(&self, tenant: &TenantId, wish: KeyWish) -> Result<NewKey, OperatorError> {
        wish.check()?;
        self.check_expiry(wish.expires_unix_ms).await?;
        self.must_exist(tenant).await?;
        let secret = new_secret()?;
        let id = KeyId::generate();
        let change = Change::of("key.create", &id).with("tenant", tenant).with("label", &wish.label);
        let change = change.with("scopes", wish.scopes).with("models", &wish.models).with("limits", &wish.limits);
        let change = change.with("expires_unix_ms", wish.expires_unix_ms);
        let making = self.store_key(tenant, id, &secret, wish);
        let record = self.recorded(change, making, |_| true).await?;
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
            let mut after = None;
            loop {
                let (page, last) = self.keys_behind(&tenant, after.as_ref(), PAGE).await?;
                records.extend(page.items);
                after = last;
                if !page.has_more {
                    break;
                }
            }
        }
        records.sort_by(|a, b| (a.created_unix_ms, &a.id).cmp(&(b.created_unix_ms, &b.id)));
        Ok(records)
    }

    /// At most `limit` keys of a tenant behind `after`, or from the first on, in order of creation.
    pub async fn keys_after(
        &self,
        tenant: &TenantId,
        after: Option<&KeyId>,
        limit: usize,
    ) -> Result<Page<KeyRecord>, OperatorError> {
        self.must_exist(tenant).await?;
        Ok(self.keys_behind(tenant, after, limit).await?.0)
    }

    /// With the last key that was looked at.
    async fn keys_behind(
        &self,
        tenant: &TenantId,
        after: Option<&KeyId>,
        limit: usize,
    ) -> Result<(Page<KeyRecord>, Option<KeyId>), OperatorError> {
        let set = keys::tenant_api_keys(tenant);
        let Page { items, has_more } = self.members(&set, after.map(KeyId::as_str), limit).await?;
        let ids: Vec<KeyId> = items.into_iter().map(KeyId::from).collect();
        let mut question = redis::pipe();
        for id in &ids {
            question.cmd("HGETALL").arg(keys::api_key(tenant, id));
        }
        let answers = if ids.is_empty() { Vec::new() } else { self.store.query_all(&question).await? };
        let mut records = Vec::with_capacity(answers.len());
        for answer in answers {
            let fields = redis::FromRedisValue::from_redis_value(answer);
            let fields = fields.map_err(|error| StoreError::Damaged(format!("API key record: {error}")))?;
            // Listed and without a record: its making was interrupted, and the secret opens nothing.
            records.extend(key::read(&fields)?);
        }
        Ok((Page { items: records, has_more }, ids.last().cloned()))
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
        let fields = fields([("status", KeyStatus::Revoked.as_str().to_owned()), ("revoked", now.to_string())]);
        let change = Change::of("key.revoke", id).with("tenant", &record.tenant);
        match self.recorded(change, self.set_key(&record, "", &fields), |_| true).await {
            // By somebody else, just now.
            Err(OperatorError::KeyEnded(id)) => self.key(&id).await,
            done => done,
        }
    }

    pub async fn change_key(&self, id: &KeyId, changes: &KeyChanges) -> Result<KeyRecord, OperatorError> {
        let fields = changes.fields()?;
        self.check_expiry(changes.expires_unix_ms.flatten()).await?;
        let record = self.living_key(id).await?;
        if fields.is_empty() {
            return Ok(record);
        }
        let change = Change::of("key.change", id).with("tenant", &record.tenant).with_all(&fields);
        self.recorded(change, self.set_key(&record, "", &fields), |_| true).await
    }

    /// Gives a key a new secret. It stays the same key, with the same id; the secret before is valid for `grace`
    /// longer, any earlier one no more. Of two who do it at the same time one is refused.
    pub async fn rotate_key(&self, id: &KeyId, grace: Duration) -> Result<NewKey, OperatorError> {
        if grace > GRACE_MAX {
            let days = GRACE_MAX.as_secs() / 86_400;
            let why = format!("a replaced secret may be valid for {days} days at most");
            return Err(OperatorError::wish("grace_seconds", why));
        }
        let record = self.living_key(id).await?;
        let mut question = redis::cmd("HMGET");
        question.arg(keys::api_key(&record.tenant, id)).arg("secret").arg("secret_before");
        let (current, earlier): (Option<String>, Option<String>) = self.store.query(&question).await?;
        let damaged = || StoreError::Damaged(format!("API key record of {id} has no secret"));
        let current = current.ok_or_else(damaged)?;
        let now = self.store.now_unix_ms().await?;
        let until = now.saturating_add(u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
        let secret = new_secret()?;
        let hash = SecretHash::of(&secret).ok_or(OperatorError::BadText("secret"))?.to_hex();
        let fields = fields([
            ("secret", hash.clone()),
            ("secret_before", current.clone()),
            ("before_until", until.to_string()),
            ("prefix", shown(&secret)),
            ("rotated", now.to_string()),
        ]);
        let change = Change::of("key.rotate", id).with("tenant", &record.tenant);
        let change = change.with("grace_seconds", grace.as_secs());
        let rotating = async {
            // It opens nothing until the key's record names it, and neither does one that the record no longer names.
            self.store_secret(&record.tenant, id, &hash).await?;
            self.set_key(&record, &current, &fields).await
        };
        let record = self.recorded(change, rotating, |_| true).await?;
        self.forget(&current, until.saturating_add(FORGOTTEN_AFTER_MS)).await;
        if let Some(earlier) = earlier {
            self.forget(&earlier, now).await;
        }
        Ok(NewKey { secret, record })
    }

    /// Best effort: what is forgotten opens nothing anyway.
    async fn forget(&self, hash: &str, at_unix_ms: u64) {
        let forgetting = &mut redis::cmd("PEXPIREAT");
        if let Err(error) = self.store.query::<u64>(forgetting.arg(keys::secret(hash)).arg(at_unix_ms)).await {
            tracing::warn!(%error, "a replaced secret is remembered for longer");
        }
    }

    async fn living_key(&self, id: &KeyId) -> Result<KeyRecord, OperatorError> {
        let record = self.key(id).await?;
        match record.status {
            KeyStatus::Active => Ok(record),
            KeyStatus::Revoked => Err(OperatorError::KeyEnded(id.clone())),
        }
    }

    async fn check_expiry(&self, expires_unix_ms: Option<u64>) -> Result<(), OperatorError> {
        let Some(expires) = expires_unix_ms else { return Ok(()) };
        let now = self.store.now_unix_ms().await?;
        if expires > now && expires <= UNIX_MS_MAX {
            return Ok(());
        }
        let why =
            format!("a key cannot expire at {expires}: it is {now} now, and {UNIX_MS_MAX} is the last time of all");
        Err(OperatorError::wish("expires_unix_ms", why))
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

    /// Changes a key that has not ended and, where `secret` is not empty, still has it.
    async fn set_key(
        &self,
        record: &KeyRecord,
        secret: &str,
        fields: &[(String, String)],
    ) -> Result<KeyRecord, OperatorError> {
        let KeyRecord { id, tenant, .. } = record;
        let mut arguments = vec![id.as_str().as_bytes(), secret.as_bytes()];
        arguments.extend(fields.iter().flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]));
        let reply: Reply = self.store.call(Function::KeySet, &keys::ledger(tenant), &arguments).await?;
        match reply.word() {
            "set" => self.key(id).await,
            "ended" => Err(OperatorError::KeyEnded(id.clone())),
            "other_secret" => Err(OperatorError::RotatedMeanwhile(id.clone())),
            "unknown_key" => Err(OperatorError::UnknownKey(id.clone())),
            _ => Err(reply.unexpected("key_set").into()),
        }
    }
}

fn fields<const COUNT: usize>(fields: [(&str, String); COUNT]) -> Vec<(String, String)> {
    fields.map(|(name, value)| (name.to_owned(), value)).into()
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
        return Err(OperatorError::wish("labels", format!("there may be {LABELS_MAX} labels at most")));
    }
    let texts = labels.iter().flat_map(|(name, value)| [name.as_str(), value.as_str()]);
    check_texts("labels", "name and value of a label", texts)
}

fn check_scopes(scopes: Scopes) -> Result<(), OperatorError> {
    if scopes.iter().next().is_none() {
        let all = Scope::ALL.map(Scope::as_str).join(", ");
        return Err(OperatorError::wish("scopes", format!("a key needs at least one scope of {all}")));
    }
    Ok(())
}

fn check_models(models: &BTreeSet<ModelId>) -> Result<(), OperatorError> {
    if !(1..=MODELS_MAX).contains(&models.len()) {
        return Err(OperatorError::wish("models", format!("a list of models has 1 to {MODELS_MAX} of them")));
    }
    check_texts("models", "name of a model", models.iter().map(ModelId::as_str))
}

fn check_texts<'a>(
    field: &'static str,
    what: &str,
    mut texts: impl Iterator<Item = &'a str>,
) -> Result<(), OperatorError> {
    let why = || format!("each {what} must have 1 to {NAME_CHARACTERS_MAX} printable characters");
    texts.try_for_each(|text| check_text(field, text).map_err(|_| OperatorError::wish(field, why())))
}

/// `sk_` and 64 hexadecimal digits, straight from the system's random numbers.
pub(super) fn new_secret() -> Result<String, OperatorError> {
    let mut bytes = [0_u8; SECRET_BYTES];
    rand::rngs::SysRng.try_fill_bytes(&mut bytes).map_err(|error| OperatorError::Random(error.to_string()))?;
    Ok(format!("{}{}", key::SECRET_PREFIX, hex::encode(bytes)))
}
