use std::collections::HashMap;

use serde::Serialize;

use super::{
    accounts::{Accounts, LimitChanges, OperatorError, Page, check_text, limit_fields},
    audit_log::Change,
};
use crate::{
    admission::{Limits, limits_in},
    domain::{NanoUsd, TenantId},
    fault,
    ledger::Balance,
    store::{Function, Reply, StoreError, keys},
};

/// The reference under which a tenant's first credit is granted.
const OPENING: &str = "opening";
/// Tenants whose accounts are read in one round trip.
const PAGE: usize = 256;

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
    /// It is told when less than this is left, what is on hold included.
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
    pub const ALL: [Self; 2] = [Self::Active, Self::Suspended];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Suspended => "suspended",
        }
    }
}

/// What a tenant is to be like.
#[derive(Clone, Debug, Default)]
pub struct TenantWish {
    pub name: String,
    /// Prepaid.
    pub balance: NanoUsd,
    /// How far below zero the balance may go.
    pub credit: NanoUsd,
    /// That there is such a tier is for the caller to know.
    pub tier: String,
    pub low_balance: Option<NanoUsd>,
    pub limits: Limits,
}

/// What is to be changed of a tenant; what is `None` stays. All of it is effective with the next request.
#[derive(Clone, Debug, Default)]
pub struct TenantChanges {
    pub status: Option<TenantStatus>,
    /// That there is such a tier is for the caller to know.
    pub tier: Option<String>,
    /// Within: `None` for never.
    pub low_balance: Option<Option<NanoUsd>>,
    pub limits: LimitChanges,
}

impl TenantChanges {
    fn fields(&self) -> Result<Vec<(String, String)>, OperatorError> {
        let mut fields = Vec::new();
        let mut set = |name: &str, value: String| fields.push((name.to_owned(), value));
        if let Some(status) = self.status {
            set("status", status.as_str().to_owned());
        }
        if let Some(tier) = &self.tier {
            set("tier", tier.clone());
        }
        if let Some(low) = self.low_balance {
            if low.is_some_and(|low| low < NanoUsd::ZERO) {
                return Err(OperatorError::wish("low_balance_nano_usd", "a low balance cannot be negative"));
            }
            set("low", low.map(|low| low.nano().to_string()).unwrap_or_default());
        }
        fields.extend(limit_fields(&self.limits)?);
        Ok(fields)
    }
}

impl Accounts {
    /// Makes a tenant with prepaid credit.
    pub async fn create_tenant(&self, name: &str, balance: NanoUsd) -> Result<Tenant, OperatorError> {
        self.create_tenant_like(TenantWish { name: name.to_owned(), balance, ..TenantWish::default() }).await
    }

    pub async fn create_tenant_like(&self, wish: TenantWish) -> Result<Tenant, OperatorError> {
        let TenantWish { name, balance, credit, tier, low_balance, limits } = wish;
        check_text("name", &name)?;
        if balance < NanoUsd::ZERO {
            return Err(OperatorError::BadBalance(balance));
        }
        if credit < NanoUsd::ZERO {
            return Err(OperatorError::wish("credit_nano_usd", "a credit line cannot be negative"));
        }
        // What could be refused later is refused now: a tenant is made whole or not at all.
        if balance.checked_add(credit).is_err() {
            return Err(OperatorError::wish("credit_nano_usd", "with the balance it is more than an amount can be"));
        }
        let own = TenantChanges {
            status: None,
            tier: Some(tier).filter(|tier| !tier.is_empty()),
            low_balance: low_balance.map(Some),
            limits: limits.iter().map(|(kind, limit)| (kind, Some(limit))).collect(),
        }
        .fields()?;
        let id = TenantId::generate();
        let change = Change::of("tenant.create", &id).with("name", &name).with("balance_nano_usd", balance);
        let change = change.with_all(&own).with("credit_nano_usd", credit);
        let making = async {
            self.open_tenant(&id, &name, NanoUsd::ZERO).await?;
            // Before any money comes in: where this breaks off, nobody has some whom nothing lists, sweeps or verifies.
            fault::point("operator.tenant.opened");
            self.list(&[&id]).await?;
            fault::point("operator.tenant.listed");
            self.open_tenant(&id, &name, balance).await?;
            if !own.is_empty() {
                self.set_account(&id, &own).await?;
            }
            if credit > NanoUsd::ZERO {
                self.ledger.set_credit(&id, credit, "").await?;
            }
            self.tenant(&id).await
        };
        self.recorded(change, making, |_| true).await
    }

    /// All tenants, in order of creation.
    pub async fn list_tenants(&self) -> Result<Vec<Tenant>, OperatorError> {
        let mut tenants: Vec<Tenant> = Vec::new();
        loop {
            let after = tenants.last().map(|tenant| tenant.id.clone());
            let Page { items, has_more } = self.tenants_after(after.as_ref(), PAGE).await?;
            tenants.extend(items);
            if !has_more {
                return Ok(tenants);
            }
        }
    }

    /// At most `limit` tenants behind `after`, or from the first on, in order of creation.
    pub async fn tenants_after(&self, after: Option<&TenantId>, limit: usize) -> Result<Page<Tenant>, OperatorError> {
        let Page { items, has_more } = self.members(keys::TENANTS, after.map(TenantId::as_str), limit).await?;
        if items.is_empty() {
            return Ok(Page { items: Vec::new(), has_more });
        }
        let ids: Vec<TenantId> = items.into_iter().map(TenantId::from).collect();
        let mut question = redis::pipe();
        for id in &ids {
            question.cmd("HGETALL").arg(keys::account(id));
        }
        let accounts = self.store.query_all(&question).await?;
        let read = |(id, account): (TenantId, redis::Value)| {
            let account = redis::FromRedisValue::from_redis_value(account);
            let account = account.map_err(|error| StoreError::Damaged(format!("account of {id}: {error}")))?;
            tenant_of(id, &account)
        };
        Ok(Page { items: ids.into_iter().zip(accounts).map(read).collect::<Result<_, _>>()?, has_more })
    }

    pub async fn tenant(&self, id: &TenantId) -> Result<Tenant, OperatorError> {
        let account: HashMap<String, String> = self.store.query(redis::cmd("HGETALL").arg(keys::account(id))).await?;
        tenant_of(id.clone(), &account)
    }

    pub async fn change_tenant(&self, id: &TenantId, changes: &TenantChanges) -> Result<Tenant, OperatorError> {
        let fields = changes.fields()?;
        self.must_exist(id).await?;
        if fields.is_empty() {
            return self.tenant(id).await;
        }
        let changing = async {
            self.set_account(id, &fields).await?;
            self.tenant(id).await
        };
        self.recorded(Change::of("tenant.change", id).with_all(&fields), changing, |_| true).await
    }

    async fn set_account(&self, id: &TenantId, fields: &[(String, String)]) -> Result<(), OperatorError> {
        let arguments: Vec<&[u8]> =
            fields.iter().flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]).collect();
        let reply: Reply = self.store.call(Function::AccountSet, &keys::ledger(id), &arguments).await?;
        match reply.word() {
            "set" => Ok(()),
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

fn tenant_of(id: TenantId, account: &HashMap<String, String>) -> Result<Tenant, OperatorError> {
    if account.is_empty() {
        return Err(OperatorError::UnknownTenant(id));
    }
    let damaged = |what: &str| StoreError::Damaged(format!("account of {id} has no sound {what}"));
    let text = |name: &str| account.get(name).map(String::as_str).ok_or_else(|| damaged(name));
    let low = account.get("low").filter(|text| !text.is_empty());
    Ok(Tenant {
        name: text("name")?.to_owned(),
        created_unix_ms: text("created")?.parse().map_err(|_| damaged("created"))?,
        status: match text("status")? {
            "active" => TenantStatus::Active,
            "suspended" => TenantStatus::Suspended,
            _ => return Err(damaged("status").into()),
        },
        tier: text("tier")?.to_owned(),
        limits: limits_in(account).map_err(|_| damaged("limit"))?,
        low_balance: low.map(|text| text.parse().map(NanoUsd::new).map_err(|_| damaged("low"))).transpose()?,
        money: Balance::of(&id, account)?,
        id,
    })
}
