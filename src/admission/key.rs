use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    str::FromStr,
    sync::Arc,
};

use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};

use super::limits::{LimitKind, Limits};
use crate::{
    domain::{KeyId, ModelId, TenantId},
    store::{Store, StoreError, keys},
};

/// Every secret begins with it.
pub const SECRET_PREFIX: &str = "sk_";
/// Longer texts are no keys of ours and are not even hashed.
const SECRET_BYTES_MAX: usize = 256;

/// What a key may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Ask models for completions, which costs money.
    Chat,
    /// See models, usage and the ledger of its own tenant.
    Read,
    /// Act for the operator.
    Admin,
}

impl Scope {
    pub const ALL: [Self; 3] = [Self::Chat, Self::Read, Self::Admin];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Read => "read",
            Self::Admin => "admin",
        }
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let scope = Self::ALL.into_iter().find(|scope| scope.as_str() == text);
        scope.ok_or_else(|| format!("`{text}` is no scope; there are chat, read and admin"))
    }
}

/// A set of scopes; written `chat,read`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Scopes(u8);

impl Scopes {
    pub fn contains(self, scope: Scope) -> bool {
        self.0 & (1 << scope as u8) != 0
    }

    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.contains(*scope))
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |set, scope| set | (1 << scope as u8)))
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.iter().map(Scope::as_str).collect::<Vec<_>>().join(","))
    }
}

impl FromStr for Scopes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').filter(|part| !part.is_empty()).map(Scope::from_str).collect()
    }
}

impl Serialize for Scopes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyStatus {
    Active,
    Revoked,
}

impl KeyStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Revoked => "revoked",
        }
    }
}

/// SHA-256 of a secret, all that we keep of it. The secrets are random and long, so that a slow hash with
/// salt would add nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// `None` for a text that cannot be a key.
    pub fn of(secret: &str) -> Option<Self> {
        let plausible = secret.starts_with(SECRET_PREFIX) && secret.len() <= SECRET_BYTES_MAX;
        plausible.then(|| Self(Sha256::digest(secret.as_bytes()).into()))
    }

    pub fn to_hex(self) -> String {
        hex::encode(self.0)
    }
}

/// An API key as it is stored and listed: everything but the secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeyRecord {
    pub id: KeyId,
    pub tenant: TenantId,
    pub label: String,
    /// Whatever else its owner wants to know of it.
    pub labels: BTreeMap<String, String>,
    /// First characters of the secret, to tell keys apart.
    pub prefix: String,
    pub scopes: Scopes,
    /// The models that it may ask; nothing is all of them.
    pub models: Option<Arc<BTreeSet<ModelId>>>,
    /// Its own, beside those of its tenant.
    pub limits: Limits,
    pub status: KeyStatus,
    pub created_unix_ms: u64,
    pub expires_unix_ms: Option<u64>,
    pub rotated_unix_ms: Option<u64>,
    pub revoked_unix_ms: Option<u64>,
}

impl KeyRecord {
    /// As the store has it.
    pub(crate) fn fields(&self) -> Vec<(String, String)> {
        let time = |time: Option<u64>| time.map(|ms| ms.to_string()).unwrap_or_default();
        let mut fields: Vec<(String, String)> = [
            ("id", self.id.to_string()),
            ("tenant", self.tenant.to_string()),
            ("label", self.label.clone()),
            ("labels", json(&self.labels)),
            ("prefix", self.prefix.clone()),
            ("scopes", self.scopes.to_string()),
            ("models", self.models.as_ref().map(|models| json(&**models)).unwrap_or_default()),
            ("status", self.status.as_str().to_owned()),
            ("created", self.created_unix_ms.to_string()),
            ("expires", time(self.expires_unix_ms)),
            ("rotated", time(self.rotated_unix_ms)),
            ("revoked", time(self.revoked_unix_ms)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        fields.extend(self.limits.iter().map(|(kind, value)| (kind.field(), value.to_string())));
        fields.retain(|(_, value)| !value.is_empty());
        fields
    }
}

pub(crate) fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("texts serialise")
}

/// The limits among the fields of a key's record or of an account.
pub(crate) fn limits_in(fields: &HashMap<String, String>) -> Result<Limits, String> {
    let limit = |kind: LimitKind| {
        let text = fields.get(&kind.field())?;
        Some(text.parse().map(|value| (kind, value)).map_err(|_| format!("`{text}` is no limit")))
    };
    LimitKind::ALL.into_iter().filter_map(limit).collect()
}

/// The key that a secret is, or once was, of.
pub(crate) struct Secret {
    pub tenant: TenantId,
    pub key: KeyId,
}

pub(crate) async fn secret(store: &Store, hash: &SecretHash) -> Result<Option<Secret>, StoreError> {
    let fields: HashMap<String, String> = store.query(redis::cmd("HGETALL").arg(keys::secret(&hash.to_hex()))).await?;
    if fields.is_empty() {
        return Ok(None);
    }
    let damaged = |what: &str| StoreError::Damaged(format!("the record of a secret lacks {what}"));
    let text = |name: &str| fields.get(name).map(String::as_str).ok_or_else(|| damaged(name));
    Ok(Some(Secret { tenant: text("tenant")?.into(), key: text("key")?.into() }))
}

/// Whether a key with this record is opened by the secret: the one that it has, or the one before while that is
/// still good. The record alone decides, so that no secret that was lost sight of opens anything.
pub(super) fn is_opened_by(
    fields: &HashMap<String, String>,
    hash: &SecretHash,
    now_unix_ms: u64,
) -> Result<bool, StoreError> {
    let (hash, has) = (hash.to_hex(), |name: &str| fields.get(name).map(String::as_str));
    if has("secret") == Some(&*hash) {
        return Ok(true);
    }
    if has("secret_before") != Some(&*hash) {
        return Ok(false);
    }
    let until = has("before_until").and_then(|text| text.parse::<u64>().ok());
    let until = until.ok_or_else(|| StoreError::Damaged("API key record: no sound `before_until`".to_owned()))?;
    Ok(now_unix_ms < until)
}

pub(crate) async fn load(store: &Store, tenant: &TenantId, key: &KeyId) -> Result<Option<KeyRecord>, StoreError> {
    let fields: HashMap<String, String> = store.query(redis::cmd("HGETALL").arg(keys::api_key(tenant, key))).await?;
    read(&fields)
}

pub(crate) fn read(fields: &HashMap<String, String>) -> Result<Option<KeyRecord>, StoreError> {
    if fields.is_empty() {
        return Ok(None);
    }
    // A record that lacks anything opens no door.
    parse(fields).map(Some).map_err(|fault| StoreError::Damaged(format!("API key record: {fault}")))
}

fn parse(fields: &HashMap<String, String>) -> Result<KeyRecord, String> {
    let text = |name: &str| fields.get(name).map(String::as_str).ok_or_else(|| format!("`{name}` is missing"));
    let time = |text: &str| text.parse().map_err(|_| format!("`{text}` is no time"));
    let maybe_time = |name: &str| fields.get(name).map(|text| time(text)).transpose();
    let odd = |name: &str, error: serde_json::Error| format!("`{name}` cannot be read: {error}");
    let models = fields.get("models").map(|text| serde_json::from_str(text).map_err(|error| odd("models", error)));
    Ok(KeyRecord {
        id: text("id")?.into(),
        tenant: text("tenant")?.into(),
        label: text("label")?.to_owned(),
        labels: serde_json::from_str(text("labels")?).map_err(|error| odd("labels", error))?,
        prefix: text("prefix")?.to_owned(),
        scopes: text("scopes")?.parse()?,
        models: models.transpose()?.map(Arc::new),
        limits: limits_in(fields)?,
        status: match text("status")? {
            "active" => KeyStatus::Active,
            "revoked" => KeyStatus::Revoked,
            other => return Err(format!("`{other}` is no status")),
        },
        created_unix_ms: time(text("created")?)?,
        expires_unix_ms: maybe_time("expires")?,
        rotated_unix_ms: maybe_time("rotated")?,
        revoked_unix_ms: maybe_time("revoked")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_read_as_they_are_written() {
        let scopes: Scopes = [Scope::Admin, Scope::Chat].into_iter().collect();
        assert_eq!(scopes.to_string(), "chat,admin");
        assert_eq!("chat,admin".parse(), Ok(scopes));
        assert!(scopes.contains(Scope::Chat) && !scopes.contains(Scope::Read));
        assert!("chat,root".parse::<Scopes>().is_err());
        assert_eq!("".parse(), Ok(Scopes::default()));
    }

    #[test]
    fn what_cannot_be_a_key_is_not_hashed() {
        assert!(SecretHash::of("").is_none());
        assert!(SecretHash::of("Bearer sk_1").is_none());
        assert!(SecretHash::of(&format!("sk_{}", "a".repeat(300))).is_none());
        assert!(SecretHash::of("sk_1").is_some());
    }

    #[test]
    fn a_key_record_that_lacks_a_field_opens_no_door() {
        let whole: HashMap<String, String> = [
            ("id", "key_1"),
            ("tenant", "ten_1"),
            ("label", ""),
            ("labels", "{}"),
            ("prefix", "sk_abc"),
            ("scopes", "chat"),
            ("status", "active"),
            ("created", "1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        assert!(parse(&whole).is_ok());
        for name in whole.keys() {
            let mut partial = whole.clone();
            partial.remove(name);
            assert!(parse(&partial).is_err(), "{name}");
        }
    }
}
