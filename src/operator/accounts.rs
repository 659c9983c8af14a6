use std::time::Duration;

use super::audit_log::{AuditLog, Change};
use crate::{
    admission::{LIMIT_MAX, LimitKind},
    config::PriceFault,
    domain::{KeyId, ModelId, NanoUsd, TenantId},
    ledger::{Ledger, LedgerError, PricesError},
    store::{Store, StoreError, keys},
    webhooks::WebhookError,
};

/// Of a name or a label.
pub const NAME_CHARACTERS_MAX: usize = 128;

#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    #[error("there is no tenant {0}")]
    UnknownTenant(TenantId),
    #[error("there is no key {0}")]
    UnknownKey(KeyId),
    #[error("a {0} must have 1 to {NAME_CHARACTERS_MAX} printable characters")]
    BadText(&'static str),
    #[error("{why}")]
    BadWish { field: &'static str, why: String },
    #[error("{0} is revoked, and stays as it is")]
    KeyEnded(KeyId),
    #[error("{0} was given another secret at the same time; that one holds")]
    RotatedMeanwhile(KeyId),
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
    #[error("price of {model}: {fault}")]
    Price { model: ModelId, fault: PriceFault },
    #[error(transparent)]
    Prices(PricesError),
    #[error(transparent)]
    Ledger(LedgerError),
    #[error(transparent)]
    Webhook(WebhookError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl OperatorError {
    pub(crate) fn wish(field: &'static str, why: impl Into<String>) -> Self {
        Self::BadWish { field, why: why.into() }
    }

    /// Whether it is unknown if the change was made.
    fn is_uncertain(&self) -> bool {
        matches!(self, Self::Store(_))
    }
}

/// What the store cannot do is the store's fault wherever it is noticed.
impl From<LedgerError> for OperatorError {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Store(error) => Self::Store(error),
            LedgerError::UnknownTenant(tenant) => Self::UnknownTenant(tenant),
            error => Self::Ledger(error),
        }
    }
}

impl From<PricesError> for OperatorError {
    fn from(error: PricesError) -> Self {
        match error {
            PricesError::Store(error) => Self::Store(error),
            error => Self::Prices(error),
        }
    }
}

impl From<WebhookError> for OperatorError {
    fn from(error: WebhookError) -> Self {
        match error {
            WebhookError::Store(error) => Self::Store(error),
            WebhookError::UnknownTenant(tenant) => Self::UnknownTenant(tenant),
            error => Self::Webhook(error),
        }
    }
}

/// What a person wants to have changed of limits: nothing takes one's own away.
pub type LimitChanges = Vec<(LimitKind, Option<u64>)>;

/// A part of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub has_more: bool,
}

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

    /// When it will be so much later, by the store's clock.
    pub async fn time_in(&self, later: Duration) -> Result<u64, OperatorError> {
        let later = u64::try_from(later.as_millis()).unwrap_or(u64::MAX);
        Ok(self.store.now_unix_ms().await?.saturating_add(later))
    }

    /// Writes down what is about to be changed, changes it, and, where nothing was changed after all, writes that down.
    pub(super) async fn recorded<T>(
        &self,
        change: Change,
        doing: impl Future<Output = Result<T, OperatorError>>,
        is_change: impl Fn(&T) -> bool,
    ) -> Result<T, OperatorError> {
        let record = self.log.write(&change).await?;
        let done = doing.await;
        let outcome = match &done {
            Ok(done) if is_change(done) => None,
            Ok(_) => Some("had been done before".to_owned()),
            Err(error) if error.is_uncertain() => None,
            Err(error) => Some(format!("refused: {error}")),
        };
        let Some(outcome) = outcome else { return done };
        if let Err(error) = self.log.write(&change.without_effect(&record, &outcome)).await {
            tracing::warn!(%error, record, outcome, "the audit log lacks that nothing was changed");
        }
        done
    }

    pub(super) async fn must_exist(&self, tenant: &TenantId) -> Result<(), OperatorError> {
        let listed: Option<f64> =
            self.store.query(redis::cmd("ZSCORE").arg(keys::TENANTS).arg(tenant.as_str())).await?;
        if listed.is_some() { Ok(()) } else { Err(OperatorError::UnknownTenant(tenant.clone())) }
    }

    /// At most `limit` members of a set that is ordered by time, behind the member `after`, or from the first on.
    /// Nothing ever leaves such a set, so that pages neither repeat nor skip.
    pub(super) async fn members(
        &self,
        set: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, OperatorError> {
        let from = match after {
            None => 0,
            Some(after) => {
                let rank: Option<u64> = self.store.query(redis::cmd("ZRANK").arg(set).arg(after)).await?;
                rank.ok_or_else(|| OperatorError::wish("after", "there is no such id in this list"))? + 1
            }
        };
        let one_more = from + limit as u64;
        let mut items: Vec<String> = self.store.query(redis::cmd("ZRANGE").arg(set).arg(from).arg(one_more)).await?;
        let has_more = items.len() > limit;
        items.truncate(limit);
        Ok(Page { items, has_more })
    }
}

/// As the store takes them.
pub(super) fn limit_fields(changes: &LimitChanges) -> Result<Vec<(String, String)>, OperatorError> {
    let field = |(kind, limit): &(LimitKind, Option<u64>)| match limit {
        Some(limit) if *limit > LIMIT_MAX => {
            Err(OperatorError::wish("limits", format!("{kind} can be limited to {LIMIT_MAX} at most")))
        }
        limit => Ok((kind.field(), limit.map(|limit| limit.to_string()).unwrap_or_default())),
    };
    changes.iter().map(field).collect()
}

pub(super) fn check_text(what: &'static str, text: &str) -> Result<(), OperatorError> {
    let is_short = text.chars().count() <= NAME_CHARACTERS_MAX;
    let good = !text.trim().is_empty() && is_short && !text.chars().any(char::is_control);
    if good { Ok(()) } else { Err(OperatorError::BadText(what)) }
}
