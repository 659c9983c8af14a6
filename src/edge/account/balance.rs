//! `GET /balance`.

use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;

use super::{ledger_failed, reader};
use crate::edge::{error::ApiError, state::EdgeState};

/// granted + adjusted = balance + held + charged − refunded.
#[derive(JsonSchema, Serialize)]
pub struct Balance<'a> {
    #[schemars(extend("const" = "balance"))]
    object: &'static str,
    tenant: &'a str,
    /// Below zero where a credit line is in use.
    balance_nano_usd: i64,
    balance_usd: String,
    /// What may be spent: balance and credit line.
    available_nano_usd: i64,
    available_usd: String,
    /// Set aside for requests under way.
    held_nano_usd: i64,
    held_usd: String,
    charged_nano_usd: i64,
    charged_usd: String,
    granted_nano_usd: i64,
    granted_usd: String,
    refunded_nano_usd: i64,
    refunded_usd: String,
    adjusted_nano_usd: i64,
    adjusted_usd: String,
    /// How far below zero the balance may go.
    credit_nano_usd: i64,
    credit_usd: String,
}

pub async fn get(http: HttpRequest, state: web::Data<EdgeState>) -> Result<HttpResponse, ApiError> {
    let principal = reader(&http, &state).await?;
    let money = state.ledger.balance(&principal.tenant).await.map_err(ledger_failed)?;
    Ok(HttpResponse::Ok().json(Balance {
        object: "balance",
        tenant: principal.tenant.as_str(),
        balance_nano_usd: money.balance.nano(),
        balance_usd: money.balance.to_string(),
        available_nano_usd: money.available.nano(),
        available_usd: money.available.to_string(),
        held_nano_usd: money.held.nano(),
        held_usd: money.held.to_string(),
        charged_nano_usd: money.charged.nano(),
        charged_usd: money.charged.to_string(),
        granted_nano_usd: money.granted.nano(),
        granted_usd: money.granted.to_string(),
        refunded_nano_usd: money.refunded.nano(),
        refunded_usd: money.refunded.to_string(),
        adjusted_nano_usd: money.adjusted.nano(),
        adjusted_usd: money.adjusted.to_string(),
        credit_nano_usd: money.credit.nano(),
        credit_usd: money.credit.to_string(),
    }))
}
