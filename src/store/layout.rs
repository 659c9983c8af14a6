//! Which layout the stored data have, so that no version reads another's as its own.

use super::{Store, StoreError, keys};
use crate::domain::TenantId;

/// Counts up whenever keys or fields change their meaning.
const LAYOUT: &str = "3";
/// Stores of before there was a mark; their accounts do not say what is available.
const UNMARKED: &str = "1";

/// Marks an empty store; refuses one whose data mean something else here.
pub(super) async fn check(store: &Store) -> Result<(), StoreError> {
    let found: Option<String> = store.query(redis::cmd("GET").arg(keys::LAYOUT)).await?;
    let found = match found {
        Some(found) => found,
        None if is_unmarked(store).await? => UNMARKED.to_owned(),
        None => store.made_once(keys::LAYOUT, LAYOUT.to_owned()).await?,
    };
    if found == LAYOUT { Ok(()) } else { Err(StoreError::Layout { found, known: LAYOUT }) }
}

async fn is_unmarked(store: &Store) -> Result<bool, StoreError> {
    let first: Vec<TenantId> = store
        .query::<Vec<String>>(redis::cmd("ZRANGE").arg(keys::TENANTS).arg(0).arg(0))
        .await?
        .into_iter()
        .map(TenantId::from)
        .collect();
    let Some(tenant) = first.first() else { return Ok(false) };
    let says: bool = store.query(redis::cmd("HEXISTS").arg(keys::account(tenant)).arg("available")).await?;
    Ok(!says)
}
