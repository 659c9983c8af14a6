use std::collections::HashMap;

use serde::Serialize;

use super::audit_log::{AuditLog, Change};
use crate::{
    admission::{LimitKind, Limits, limits_in},
    domain::{KeyId, NanoUsd, TenantId},
    ledger::{Balance, Ledger, LedgerError, Moved, Refund},
    store::{Function, Reply, Store, StoreError, keys},
};

pub(super) const TEXT_BYTES_MAX: usize = 128;
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
    #[error("{0}")]
    BadWish(String),
    #[error("{0} belongs to another tenant, or is revoked")]
    KeyEnded(KeyId),
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
    pub status: TenantStatus,
    /// Empty for the standard one.
    pub tier: String,
    /// Its own, which go before those of its tier.
    pub limits: Limits,
    /// It is told when less than this may be spent.
    #[serde(rename = "low_balance_nano_usd")]
    pub low_balance: Option<NanoUsd>,
    #[serde(flatten)]
    pub money: Balance,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TenantStatus {
    Active,
    /// Nothing new is admitted, and its keys open nothing; what runs goes on.
    Suspended,
}

impl TenantStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Suspended => "suspended",
        }
    }
}

/// What a person wants to have changed of limits: nothing takes one's own away.
pub type LimitChanges = Vec<(LimitKind, Option<u64>)>;

/// Cheap to clone.
#[derive(Clone)]
pub struct Accounts {
    pub(super) store: Store,
    pub(super) ledger: Ledger,
    pub(super) log: AuditLog,
}

impl Accounts {
    pub fn new(store: Store, ledger: Ledger) -> Self {
        let log = AuditLog::new(store.clone());
        Self { store, ledger, log }
    }

    /// The same for changes by somebody whom the audit log shall name.
    pub fn acting_as(&self, actor: impl Into<String>) -> Self {
        Self { log: self.log.acting_as(actor), ..self.clone() }
    }

    pub fn audit_log(&self) -> &AuditLog {
        &self.log
    }

    /// Makes a tenant with prepaid credit.
    pub async fn create_tenant(&self, name: &str, balance: NanoUsd) -> Result<Tenant, OperatorError> {
        let tenant = TenantId::generate();
        check_text("name", name)?;
        if balance < NanoUsd::ZERO {
            return Err(OperatorError::BadBalance(balance));
        }
        let change = Change::of("tenant.create", &tenant).with("name", name).with("balance_nano_usd", balance);
        self.log.write(change).await?;
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
        let fields: HashMap<String, String> = self.store.query(redis::cmd("HGETALL").arg(keys::account(id))).await?;
        if fields.is_empty() {
            return Err(OperatorError::UnknownTenant(id.clone()));
        }
        let damaged = |what: &str| StoreError::Damaged(format!("account of {id} has no sound {what}"));
        let text = |name: &str| fields.get(name).map(String::as_str).ok_or_else(|| damaged(name));
        let low = fields.get("low").filter(|text| !text.is_empty());
        Ok(Tenant {
            id: id.clone(),
            name: text("name")?.to_owned(),
            created_unix_ms: text("created")?.parse().map_err(|_| damaged("created"))?,
            status: match text("status")? {
                "active" => TenantStatus::Active,
                "suspended" => TenantStatus::Suspended,
                _ => return Err(damaged("status").into()),
            },
            tier: text("tier")?.to_owned(),
            limits: limits_in(&fields).map_err(|_| damaged("limit"))?,
            low_balance: low.map(|text| text.parse().map(NanoUsd::new).map_err(|_| damaged("low"))).transpose()?,
            money: self.ledger.balance(id).await?,
        })
    }

    /// Stops a tenant, or lets it go on; effective with the next request.
    pub async fn set_status(&self, id: &TenantId, status: TenantStatus) -> Result<Tenant, OperatorError> {
        self.change(id, "tenant.status", vec![("status".to_owned(), status.as_str().to_owned())]).await
    }

    /// Gives a tenant the limits of a tier. That there is such a tier is for the caller to know.
    pub async fn set_tier(&self, id: &TenantId, tier: &str) -> Result<Tenant, OperatorError> {
        self.change(id, "tenant.tier", vec![("tier".to_owned(), tier.to_owned())]).await
    }

    /// Limits of a tenant's own; effective with the next request.
    pub async fn set_tenant_limits(&self, id: &TenantId, changes: &LimitChanges) -> Result<Tenant, OperatorError> {
        self.change(id, "tenant.limits", limit_fields(changes)).await
    }

    /// From where on a tenant is told that little is left; nothing for never.
    pub async fn set_low_balance(&self, id: &TenantId, below: Option<NanoUsd>) -> Result<Tenant, OperatorError> {
        if below.is_some_and(|below| below < NanoUsd::ZERO) {
            return Err(OperatorError::BadWish("a low balance cannot be negative".to_owned()));
        }
        let below = below.map(|below| below.nano().to_string()).unwrap_or_default();
        self.change(id, "tenant.low_balance", vec![("low".to_owned(), below)]).await
    }

    /// Adds prepaid money, once for each reference.
    pub async fn grant(
        &self,
        tenant: &TenantId,
        amount: NanoUsd,
        reference: &str,
        note: &str,
    ) -> Result<Moved, OperatorError> {
        self.log.write(of_money("credits.grant", tenant, amount, reference, note)).await?;
        Ok(self.ledger.grant(tenant, amount, reference, note).await?)
    }

    /// Puts a balance right.
    pub async fn adjust(
        &self,
        tenant: &TenantId,
        amount: NanoUsd,
        reference: &str,
        note: &str,
    ) -> Result<Moved, OperatorError> {
        self.log.write(of_money("credits.adjust", tenant, amount, reference, note)).await?;
        Ok(self.ledger.adjust(tenant, amount, reference, note).await?)
    }

    /// Gives a charge back.
    pub async fn refund(&self, tenant: &TenantId, refund: &Refund) -> Result<Moved, OperatorError> {
        let change = of_money("credits.refund", tenant, refund.amount, &refund.reference, &refund.note);
        self.log.write(change.with("request", refund.request.as_str())).await?;
        Ok(self.ledger.refund(tenant, refund).await?)
    }

    /// Sets how far below zero a balance may go.
    pub async fn set_credit(&self, tenant: &TenantId, amount: NanoUsd, note: &str) -> Result<Moved, OperatorError> {
        self.log.write(of_money("credits.line", tenant, amount, "", note)).await?;
        Ok(self.ledger.set_credit(tenant, amount, note).await?)
    }

    async fn change(
        &self,
        id: &TenantId,
        action: &'static str,
        fields: Vec<(String, String)>,
    ) -> Result<Tenant, OperatorError> {
        let change =
            fields.iter().fold(Change::of(action, id), |change, (name, value)| change.with(name, value.as_str()));
        self.log.write(change).await?;
        let arguments: Vec<&[u8]> =
            fields.iter().flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]).collect();
        let reply: Reply = self.store.call(Function::AccountSet, &keys::ledger(id), &arguments).await?;
        match reply.word() {
            "set" => self.tenant(id).await,
            "unknown_tenant" => Err(OperatorError::UnknownTenant(id.clone())),
            _ => Err(reply.unexpected("account_set").into()),
        }
    }

    /// Opens the account and grants its first credit. May be repeated. The tenant is not listed by this.
    pub(super) async fn open_tenant(
        &self,
        tenant: &TenantId,
        name: &str,
        balance: NanoUsd,
    ) -> Result<(), OperatorError> {
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
}

pub(super) fn limit_fields(changes: &LimitChanges) -> Vec<(String, String)> {
    let value = |value: &Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
    changes.iter().map(|(kind, limit)| (kind.field(), value(limit))).collect()
}

fn of_money(action: &'static str, tenant: &TenantId, amount: NanoUsd, reference: &str, note: &str) -> Change {
    Change::of(action, tenant).with("amount_nano_usd", amount).with("reference", reference).with("note", note)
}

pub(super) fn check_text(what: &'static str, text: &str) -> Result<(), OperatorError> {
    let good = !text.trim().is_empty() && text.len() <= TEXT_BYTES_MAX && !text.chars().any(char::is_control);
    if good { Ok(()) } else { Err(OperatorError::BadText(what)) }
}
