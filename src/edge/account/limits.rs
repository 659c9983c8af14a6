//! `GET /usage`: where the bearer's tenant and key stand against their limits, and what was used today and this month.

use std::collections::BTreeSet;

use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;

use super::{reader, usage_failed};
use crate::{
    admission::{LimitKind, LimitUse, Standing},
    domain::Month,
    edge::{error::ApiError, generation, state::EdgeState},
    ledger::{UsageBucket, UsageRange, UsageSums, UsageWidth, UsageWish},
};

#[derive(JsonSchema, Serialize)]
pub struct Usage<'a> {
    #[schemars(extend("const" = "usage"))]
    object: &'static str,
    tenant: &'a str,
    key: &'a str,
    /// The set of limits that the tenant has; empty for the standard one.
    tier: &'a str,
    /// The tenant's, then the key's own.
    limits: Vec<Limit>,
    /// Of UTC, like the month. What was charged for requests that have ended.
    today: Used,
    month: Used,
}

#[derive(JsonSchema, Serialize)]
struct Limit {
    #[schemars(extend("enum" = ["tenant", "key"]))]
    of: &'static str,
    #[schemars(extend("enum" = [
        "requests_per_minute", "tokens_per_minute", "requests_per_day", "tokens_per_day", "requests_at_once",
        "spend_per_day", "spend_per_month",
    ]))]
    name: &'static str,
    #[schemars(extend("enum" = ["requests", "tokens", "nano_usd"]))]
    unit: &'static str,
    /// Null where there is none.
    limit: Option<u64>,
    /// Requests under way count with the most that they may use.
    used: u64,
    left: Option<u64>,
    /// Unix seconds. When nothing is counted any more: of a minute if nothing else is asked, of a day or a month when it
    /// is over. Null for requests at once.
    resets_at: Option<u64>,
    reset_ms: Option<u64>,
}

#[derive(JsonSchema, Serialize)]
struct Used {
    /// Unix seconds.
    from: u64,
    /// Excluded.
    to: u64,
    requests: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    /// Counted in `prompt_tokens` too.
    cached_tokens: u64,
    amount_nano_usd: i64,
    amount_usd: String,
}

pub async fn get(http: HttpRequest, state: web::Data<EdgeState>) -> Result<HttpResponse, ApiError> {
    let principal = reader(&http, &state).await?;
    let standing = state.admission.standing(&principal).await.map_err(generation::refused)?;
    let begin = Month::of(standing.unix_ms).begins_unix_ms() / 1000;
    let now = standing.unix_ms / 1000;
    let range = UsageRange::new(begin, now + 1, UsageWidth::Day).map_err(usage_failed)?;
    let tenants = Some(BTreeSet::from([principal.tenant.clone()]));
    let days = state.ledger.usage(range, &UsageWish { tenants, ..UsageWish::default() }).await.map_err(usage_failed)?;
    // The range ends with today.
    let today = &days[days.len().saturating_sub(1)..];
    let (tomorrow, end) = (range.to(), Month::of(standing.unix_ms).ends_unix_ms() / 1000);
    Ok(HttpResponse::Ok().json(Usage {
        object: "usage",
        tenant: principal.tenant.as_str(),
        key: principal.key.as_str(),
        tier: &standing.tier,
        limits: limits(&standing),
        today: used(today, tomorrow - UsageWidth::Day.seconds(), tomorrow)?,
        month: used(&days, begin, end)?,
    }))
}

fn limits(standing: &Standing) -> Vec<Limit> {
    let limit = |of: &'static str, one: &LimitUse| Limit {
        of,
        name: one.kind.as_str(),
        unit: unit(one.kind),
        limit: one.limit,
        used: one.used,
        left: one.left(),
        resets_at: one.reset_ms.map(|ms| (standing.unix_ms + ms).div_ceil(1000)),
        reset_ms: one.reset_ms,
    };
    let of_tenant = standing.tenant.iter().map(|one| limit("tenant", one));
    of_tenant.chain(standing.key.iter().map(|one| limit("key", one))).collect()
}

fn unit(kind: LimitKind) -> &'static str {
    match kind {
        LimitKind::RequestsPerMinute | LimitKind::RequestsPerDay | LimitKind::RequestsAtOnce => "requests",
        LimitKind::TokensPerMinute | LimitKind::TokensPerDay => "tokens",
        LimitKind::SpendPerDay | LimitKind::SpendPerMonth => "nano_usd",
    }
}

fn used(days: &[UsageBucket], from: u64, to: u64) -> Result<Used, ApiError> {
    let rows = days.iter().flat_map(|day| &day.rows);
    let sums = rows.map(|row| row.sums).try_fold(UsageSums::default(), |sum, sums| sum.checked_add(&sums));
    let UsageSums { requests, prompt_tokens, completion_tokens, cached_tokens, amount } =
        sums.map_err(|error| usage_failed(error.into()))?;
    let (amount_nano_usd, amount_usd) = (amount.nano(), amount.to_string());
    Ok(Used { from, to, requests, prompt_tokens, completion_tokens, cached_tokens, amount_nano_usd, amount_usd })
}
