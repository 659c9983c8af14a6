//! What an operator is told of what cannot be done.

use crate::{
    edge::error::{ApiError, shorten_to},
    ledger::{LedgerError, PricesError},
    operator::OperatorError,
    store::StoreError,
    webhooks::WebhookError,
};

/// Of a question.
pub fn of_look(error: OperatorError) -> ApiError {
    match error {
        OperatorError::Store(error) => of_store(&error, ApiError::store_away()),
        error => of(error),
    }
}

pub fn of_ledger(error: LedgerError) -> ApiError {
    of_look(error.into())
}

/// Of a change, which may have been made although the store did not say so.
pub fn of_change(error: OperatorError) -> ApiError {
    match error {
        OperatorError::Store(error) => of_store(&error, ApiError::change_unknown()),
        error => of(error),
    }
}

fn of_store(error: &StoreError, away: ApiError) -> ApiError {
    tracing::warn!(%error, "an operator's request failed");
    if error.is_transient() { away } else { ApiError::internal() }
}

fn of(error: OperatorError) -> ApiError {
    // The words of a person may be in it.
    let why = shorten_to(&format!("{error}."), 400);
    let field = |code, param: &str| ApiError::field(code, param, format!("Invalid '{param}': {why}"));
    match error {
        OperatorError::UnknownTenant(tenant) => ApiError::not_found("tenant", tenant.as_str()),
        OperatorError::UnknownKey(key) => ApiError::not_found("key", key.as_str()),
        OperatorError::BadText(param) => field("invalid_value", param),
        OperatorError::BadWish { field: param, .. } => field("invalid_value", param),
        OperatorError::BadBalance(_) => field("out_of_range", "balance_nano_usd"),
        OperatorError::KeyEnded(_) => ApiError::conflict("key_revoked", None, why),
        OperatorError::RotatedMeanwhile(_) => ApiError::conflict("conflict", None, why),
        OperatorError::Price { model, .. } => field("invalid_value", &format!("prices.{model}")),
        OperatorError::Prices(error) => match error {
            PricesError::VersionTaken(_) => ApiError::conflict("version_taken", Some("version"), why),
            PricesError::InThePast { .. } => field("invalid_value", "from_unix_ms"),
            PricesError::BadVersion => field("invalid_value", "version"),
            PricesError::NoPrice(_) | PricesError::Store(_) => unexpected(&why),
        },
        OperatorError::Ledger(error) => match error {
            LedgerError::BadAmount(_) => field("out_of_range", "amount_nano_usd"),
            // It is what the tenant has already that leaves no room for it.
            LedgerError::Money(_) => ApiError::conflict("amount_overflow", None, why),
            LedgerError::BadText => field("invalid_value", "reference"),
            LedgerError::OtherReference(_) => ApiError::conflict("reference_reused", Some("reference"), why),
            LedgerError::Insufficient { .. } => {
                ApiError::conflict("insufficient_balance", Some("amount_nano_usd"), why)
            }
            LedgerError::NotCharged(_) => ApiError::conflict("not_charged", Some("request"), why),
            LedgerError::ExceedsCharge { .. } => ApiError::conflict("exceeds_charge", Some("amount_nano_usd"), why),
            LedgerError::HoldGone(_)
            | LedgerError::Unknown(_)
            | LedgerError::Archived(_)
            | LedgerError::Archive(_)
            | LedgerError::ExceedsHold { .. }
            | LedgerError::Superseded(_)
            | LedgerError::OtherTerms(_)
            | LedgerError::UnknownTenant(_)
            | LedgerError::Store(_) => unexpected(&why),
        },
        OperatorError::Webhook(error) => match error {
            WebhookError::Target(_) => field("invalid_value", "url"),
            WebhookError::NoEndpoint(tenant) => ApiError::not_found("webhook", tenant.as_str()),
            WebhookError::UnknownTenant(_) | WebhookError::Random(_) | WebhookError::Store(_) => unexpected(&why),
        },
        OperatorError::Random(_)
        | OperatorError::KeyFile { .. }
        | OperatorError::KeyFileContent(_)
        | OperatorError::Store(_) => unexpected(&why),
    }
}

fn unexpected(why: &str) -> ApiError {
    tracing::error!(why, "an operator's request failed");
    ApiError::internal()
}
