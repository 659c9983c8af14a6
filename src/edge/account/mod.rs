//! What a tenant sees of its money: balance, limits, usage, one request, statements; and of everybody's usage the operator.
//!
//! Only ever reads. Amounts are whole nano-dollars, and beside them dollars as exact decimal text.

pub mod balance;
pub mod generations;
pub mod limits;
mod operations;
pub mod organization;
mod query;
pub mod statements;

pub(super) use operations::OPERATIONS;

use actix_web::HttpRequest;

use super::{auth::authenticate, error::ApiError, state::EdgeState, stored::store_failed};
use crate::{
    admission::{Principal, Scope},
    ledger::{LedgerError, UsageError},
};

/// The bearer of a key that may see its tenant's money.
async fn reader(http: &HttpRequest, state: &EdgeState) -> Result<Principal, ApiError> {
    let principal = authenticate(http, state).await?;
    if !principal.may(Scope::Read) {
        return Err(ApiError::permission_denied(
            "This API key may not see usage and money: it lacks the scope `read`.",
        ));
    }
    Ok(principal)
}

fn ledger_failed(error: LedgerError) -> ApiError {
    match error {
        LedgerError::Store(error) => store_failed(error),
        error => {
            tracing::error!(%error, "the ledger could not be read");
            ApiError::internal()
        }
    }
}

fn usage_failed(error: UsageError) -> ApiError {
    match error {
        UsageError::Backwards { .. } => {
            ApiError::field("out_of_range", "end_time", "Invalid 'end_time': it must lie after 'start_time'.")
        }
        UsageError::TooLong { .. } => {
            ApiError::field("out_of_range", "end_time", format!("Invalid 'end_time': {error}."))
        }
        UsageError::Forgotten { .. } => {
            ApiError::field("out_of_range", "start_time", format!("Invalid 'start_time': {error}."))
        }
        UsageError::Store(error) => store_failed(error),
        error @ UsageError::Money(_) => {
            tracing::error!(%error, "usage could not be added up");
            ApiError::internal()
        }
    }
}
