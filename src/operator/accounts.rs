use std::collections::HashMap;

use rand::TryRng;
use serde::Serialize;

use crate::{
    admission::{KeyRecord, KeyStatus, Scopes, SecretHash, key},
    domain::{KeyId, NanoUsd, TenantId},
    ledger::{Balance, Ledger, LedgerError},
    store::{Function, Reply, Store, StoreError, keys},
};

/// Random bytes of a secret.
const SECRET_BYTES: usize = 32;
/// Characters of a secret that are kept for display: the prefix and eight digits.
const SHOWN_CHARACTERS: usize = 11;
const TEXT_BYTES_MAX: usize = 128;
/// The reference under which a tenant's first credit is granted.
pub(super) const OPENING: &str = "opening";

#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    #[error("there is no tenant {0}")]
    UnknownTenant(TenantId),
    #[error("there is no key {0}")]
    UnknownKey(KeyId),
    #[error("a {0} must have 1 to {TEXT_BYTES_MAX} printable characters")]
    BadText(&'static str),
    #[error("an opening balance cannot be {0}")]
    BadBalance(NanoUsd),
    #[error("the system gives no random numbers: {0}")]
    Random(String),
    #[error("{}: {source}", path.display())]
    KeyFile {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} does not hold a key; move it away to have a new one made", .0.display())]
    KeyFileContent(std::path::PathBuf),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tenant {
    pub id: TenantId,
    pub name: String,
    pub created_unix_ms: u64,
    #[serde(flatten)]
    pub money: Balance,
}

/// A key just made. The only time that its secret is to be had.
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

#[derive(Clone)]
pub struct Accounts {
    pub(super) store: Store,
    ledger: Ledger,
}

impl Accounts {
    pub fn new(store: Store, ledger: Ledger) -> Self {
        Self { store, ledger }
    }

    /// Makes a tenant with prepaid credit.
    pub async fn create_tenant(&self, name: &str, balance: NanoUsd) -> Result<Tenant, OperatorError> {
        let tenant = TenantId::generate();
        self.open_tenant(&tenant, name, balance).await?;
        self.list(&[&tenant]).await?;
        self.tenant(&tenant).await
    }

    /// All tenants, in order of creation.
    pub async fn list_tenants(&self) -> Result<Vec<Tenant>, OperatorError> {
        let mut tenants = Vec::new();
        for id in self.ledger.tenants().await? {
            tenants.push(self.tenant(&id).await?);
        }
        Ok(tenants)
    }

    pub async fn tenant(&self, id: &TenantId) -> Result<Tenant, OperatorError> {
        let command = &mut redis::cmd("HMGET");
        let (name, created): (Option<String>, Option<u64>) =
            self.store.query(command.arg(keys::account(id)).arg("name").arg("created")).await?;
        match (name, created) {
            (Some(name), Some(created_unix_ms)) => {
                let money = self.ledger.balance(id).await?;
                Ok(Tenant { id: id.clone(), name, created_unix_ms, money })
            }
            _ => Err(OperatorError::UnknownTenant(id.clone())),
        }
    }

    /// Makes a key for a tenant.
    pub async fn create_key(&self, tenant: &TenantId, label: &str, scopes: Scopes) -> Result<NewKey, OperatorError> {
        check_text("label", label)?;
        self.tenant(tenant).await?;
        let secret = new_secret()?;
        let record = self.store_key(tenant, &secret, label, scopes).await?;
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
            let hashes: HashMap<String, String> =
                self.store.query(redis::cmd("HGETALL").arg(keys::tenant_api_keys(&tenant))).await?;
            for hash in hashes.values() {
                // Listed and without a record: its making was interrupted, and the secret opens nothing.
                records.extend(key::load_by_hex(&self.store, hash).await?);
            }
        }
        records.sort_by(|a, b| (a.created_unix_ms, &a.id).cmp(&(b.created_unix_ms, &b.id)));
        Ok(records)
    }

    /// Ends a key for good. Every edge refuses it within a second; requests under way end as they would.
    pub async fn revoke_key(&self, id: &KeyId) -> Result<KeyRecord, OperatorError> {
        let unknown = || OperatorError::UnknownKey(id.clone());
        let hash: Option<String> = self.store.query(redis::cmd("GET").arg(keys::api_key_id(id))).await?;
        let hash = hash.ok_or_else(unknown)?;
        let record = key::load_by_hex(&self.store, &hash).await?.ok_or_else(unknown)?;
        if record.status == KeyStatus::Revoked {
            return Ok(record);
        }
        let now = self.store.now_unix_ms().await?;
        let mut command = redis::cmd("HSET");
        command.arg(keys::api_key(&hash)).arg("status").arg(KeyStatus::Revoked.as_str()).arg("revoked").arg(now);
        self.store.query::<u64>(&command).await?;
        Ok(KeyRecord { status: KeyStatus::Revoked, revoked_unix_ms: Some(now), ..record })
    }

    /// Opens the account and grants its first credit. May be repeated. The tenant is not listed by this.
    pub(super) async fn open_tenant(
        &self,
        tenant: &TenantId,
        name: &str,
        balance: NanoUsd,
    ) -> Result<(), OperatorError> {
        check_text("name", name)?;
        if balance < NanoUsd::ZERO {
            return Err(OperatorError::BadBalance(balance));
        }
        let reply: Reply = self.store.call(Function::AccountOpen, &keys::ledger(tenant), &[name.as_bytes()]).await?;
        if !matches!(reply.word(), "opened" | "exists") {
            return Err(reply.unexpected("account_open").into());
        }
        if balance > NanoUsd::ZERO {
            self.ledger.grant(tenant, balance, OPENING, "opening balance").await?;
        }
        Ok(())
    }

    /// The step that makes tenants exist, after everything that belongs to them; all of them at once.
    pub(super) async fn list(&self, tenants: &[&TenantId]) -> Result<(), OperatorError> {
        let now = self.store.now_unix_ms().await?;
        let mut command = redis::cmd("ZADD");
        command.arg(keys::TENANTS).arg("NX");
        for tenant in tenants {
            command.arg(now).arg(tenant.as_str());
        }
        self.store.query::<u64>(&command).await?;
        Ok(())
    }

    /// Stores what is kept of a key. May be repeated with the same secret. The record comes last: a key that
    /// works can always be listed and revoked.
    pub(super) async fn store_key(
        &self,
        tenant: &TenantId,
        secret: &str,
        label: &str,
        scopes: Scopes,
    ) -> Result<KeyRecord, OperatorError> {
        let hash = SecretHash::of(secret).ok_or(OperatorError::BadText("secret"))?;
        if let Some(record) = key::load(&self.store, &hash).await? {
            return Ok(record);
        }
        let hash = hash.to_hex();
        let id = KeyId::generate();
        let created = self.store.now_unix_ms().await?;
        let prefix: String = secret.chars().take(SHOWN_CHARACTERS).collect();
        self.store.query::<String>(redis::cmd("SET").arg(keys::api_key_id(&id)).arg(&hash)).await?;
        let listing = &mut redis::cmd("HSET");
        self.store.query::<u64>(listing.arg(keys::tenant_api_keys(tenant)).arg(id.as_str()).arg(&hash)).await?;
        let mut record = redis::cmd("HSET");
        record.arg(keys::api_key(&hash));
        for (field, value) in [
            ("id", id.as_str()),
            ("tenant", tenant.as_str()),
            ("label", label),
            ("prefix", &prefix),
            ("scopes", &scopes.to_string()),
            ("status", KeyStatus::Active.as_str()),
            ("created", &created.to_string()),
        ] {
            record.arg(field).arg(value);
        }
        self.store.query::<u64>(&record).await?;
        Ok(KeyRecord {
            id,
            tenant: tenant.clone(),
            label: label.to_owned(),
            prefix,
            scopes,
            status: KeyStatus::Active,
            created_unix_ms: created,
            revoked_unix_ms: None,
        })
    }
}

/// `sk_` and 64 hexadecimal digits, straight from the system's random numbers.
pub(super) fn new_secret() -> Result<String, OperatorError> {
    let mut bytes = [0_u8; SECRET_BYTES];
    rand::rngs::SysRng.try_fill_bytes(&mut bytes).map_err(|error| OperatorError::Random(error.to_string()))?;
    Ok(format!("{}{}", key::SECRET_PREFIX, hex::encode(bytes)))
}

fn check_text(what: &'static str, text: &str) -> Result<(), OperatorError> {
    let good = !text.trim().is_empty() && text.len() <= TEXT_BYTES_MAX && !text.chars().any(char::is_control);
    if good { Ok(()) } else { Err(OperatorError::BadText(what)) }
}
