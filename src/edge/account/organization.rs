//! `GET /organization/usage/completions` and `/organization/costs`: everybody's usage, in the shapes that OpenAI's clients
//! know. A project is a tenant.

use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use super::{ledger_failed, query::Query, usage_failed};
use crate::{
    admission::Scope,
    domain::{KeyId, ModelId, NanoUsd, TenantId},
    edge::{auth::authenticate, error::ApiError, state::EdgeState},
    ledger::{UsageBucket, UsageRange, UsageRow, UsageWidth, UsageWish},
};

/// The last second of the year 9999.
pub const TIME_MAX: u64 = 253_402_300_799;
/// What both may be asked with.
pub const PARAMETERS: &[&str] =
    &["start_time", "end_time", "bucket_width", "group_by", "project_ids", "api_key_ids", "models", "limit", "page"];
pub const USAGE_GROUPS: &[&str] = &["project_id", "api_key_id", "model"];
/// A line item is a model: neither tells input from output.
pub const COST_GROUPS: &[&str] = &["project_id", "api_key_id", "model", "line_item"];
/// Days of costs on one page; of everything else see `limit_of`.
pub const COST_DAYS_MAX: u64 = 180;
pub const LIMIT_MAX: u64 = 1440;
const PAGE_PREFIX: &str = "page_";

#[derive(JsonSchema, Serialize)]
pub struct Page<T> {
    #[schemars(extend("const" = "page"))]
    object: &'static str,
    data: Vec<Bucket<T>>,
    has_more: bool,
    next_page: Option<String>,
}

#[derive(JsonSchema, Serialize)]
struct Bucket<T> {
    #[schemars(extend("const" = "bucket"))]
    object: &'static str,
    /// Unix seconds; a multiple of the width.
    start_time: u64,
    /// Excluded.
    end_time: u64,
    /// One for each group that has used anything.
    results: Vec<T>,
}

/// What was not asked to be told apart is null.
#[derive(JsonSchema, Serialize)]
pub struct CompletionsResult {
    #[schemars(extend("const" = "organization.usage.completions.result"))]
    object: &'static str,
    /// Cached ones included.
    input_tokens: u64,
    output_tokens: u64,
    input_cached_tokens: u64,
    input_audio_tokens: u64,
    output_audio_tokens: u64,
    num_model_requests: u64,
    #[schemars(with = "Option<String>")]
    project_id: Option<TenantId>,
    #[schemars(with = "Option<String>")]
    api_key_id: Option<KeyId>,
    #[schemars(with = "Option<String>")]
    model: Option<ModelId>,
    user_id: Option<&'static str>,
    batch: Option<bool>,
}

#[derive(JsonSchema, Serialize)]
pub struct CostsResult {
    #[schemars(extend("const" = "organization.costs.result"))]
    object: &'static str,
    amount: Amount,
    #[schemars(with = "Option<String>")]
    project_id: Option<TenantId>,
    #[schemars(with = "Option<String>")]
    api_key_id: Option<KeyId>,
    #[schemars(with = "Option<String>")]
    line_item: Option<ModelId>,
    #[schemars(with = "Option<String>")]
    model: Option<ModelId>,
}

#[derive(JsonSchema, Serialize)]
struct Amount {
    /// Dollars, exact to the nano-dollar as it is written.
    #[schemars(with = "f64")]
    value: Box<RawValue>,
    #[schemars(extend("const" = "usd"))]
    currency: &'static str,
    value_nano_usd: i64,
}

pub async fn completions(http: HttpRequest, state: web::Data<EdgeState>) -> Result<HttpResponse, ApiError> {
    let asked = asked(&http, &state, USAGE_GROUPS, limit_of).await?;
    answer(&state, asked, |UsageRow { tenant, key, model, sums }| CompletionsResult {
        object: "organization.usage.completions.result",
        input_tokens: sums.prompt_tokens,
        output_tokens: sums.completion_tokens,
        input_cached_tokens: sums.cached_tokens,
        input_audio_tokens: 0,
        output_audio_tokens: 0,
        num_model_requests: sums.requests,
        project_id: tenant,
        api_key_id: key,
        model,
        user_id: None,
        batch: None,
    })
    .await
}

pub async fn costs(http: HttpRequest, state: web::Data<EdgeState>) -> Result<HttpResponse, ApiError> {
    let limit = |width| match width {
        UsageWidth::Day => (7, COST_DAYS_MAX),
        width => limit_of(width),
    };
    let asked = asked(&http, &state, COST_GROUPS, limit).await?;
    answer(&state, asked, |UsageRow { tenant, key, model, sums }| CostsResult {
        object: "organization.costs.result",
        amount: Amount { value: dollars(sums.amount), currency: "usd", value_nano_usd: sums.amount.nano() },
        project_id: tenant,
        api_key_id: key,
        line_item: model.clone(),
        model,
    })
    .await
}

/// As a number that no float has touched.
fn dollars(amount: NanoUsd) -> Box<RawValue> {
    RawValue::from_string(amount.to_string()).expect("a decimal is JSON")
}

/// Buckets on one page: by default, and at most.
fn limit_of(width: UsageWidth) -> (u64, u64) {
    match width {
        UsageWidth::Minute => (60, LIMIT_MAX),
        UsageWidth::Hour => (24, 168),
        UsageWidth::Day => (7, 31),
    }
}

struct Asked {
    /// Of this page.
    from: u64,
    /// Of all pages, excluded.
    end: u64,
    width: UsageWidth,
    limit: u64,
    wish: UsageWish,
}

async fn asked(
    http: &HttpRequest,
    state: &EdgeState,
    groups: &[&'static str],
    limit_of: impl Fn(UsageWidth) -> (u64, u64),
) -> Result<Asked, ApiError> {
    let principal = authenticate(http, state).await?;
    if !principal.may(Scope::Admin) {
        let why = "This API key may not see the usage of all tenants: it lacks the scope `admin`.";
        return Err(ApiError::permission_denied(why));
    }
    let query = Query::read(http, PARAMETERS)?;
    let Some(start) = query.whole("start_time", 0..=TIME_MAX)? else {
        let why = "Missing required parameter: 'start_time'.";
        return Err(ApiError::field("missing_required_parameter", "start_time", why));
    };
    let widths = UsageWidth::ALL.map(UsageWidth::as_str);
    let width = query.word("bucket_width", &widths)?.and_then(|width| width.parse().ok()).unwrap_or_default();
    let (limit, limit_max) = limit_of(width);
    let limit = query.whole("limit", 1..=limit_max)?.unwrap_or(limit);
    let by = query.words("group_by", groups)?;
    let wish = UsageWish {
        tenants: query.set("project_ids")?,
        keys: query.set("api_key_ids")?,
        models: query.set("models")?,
        by_tenant: by.contains("project_id"),
        by_key: by.contains("api_key_id"),
        by_model: by.contains("model") || by.contains("line_item"),
    };
    let end = match query.whole("end_time", 0..=TIME_MAX)? {
        Some(end) if end <= start => {
            let why = "Invalid 'end_time': it must lie after 'start_time'.";
            return Err(ApiError::field("out_of_range", "end_time", why));
        }
        Some(end) => end,
        None => state.ledger.now_unix_ms().await.map_err(ledger_failed)? / 1000 + 1,
    };
    let from = match query.text("page")? {
        None => start,
        Some(page) => {
            let at = page.strip_prefix(PAGE_PREFIX).and_then(|at| at.parse::<u64>().ok());
            let is_ours = |at: &u64| *at % width.seconds() == 0 && (start..=TIME_MAX).contains(at);
            at.filter(is_ours).ok_or_else(|| {
                let why = "Invalid 'page': give the `next_page` of the page before, with the same parameters.";
                ApiError::field("invalid_value", "page", why)
            })?
        }
    };
    Ok(Asked { from, end, width, limit, wish })
}

async fn answer<T: Serialize>(
    state: &EdgeState,
    Asked { from, end, width, limit, wish }: Asked,
    result: impl Fn(UsageRow) -> T,
) -> Result<HttpResponse, ApiError> {
    let mut buckets = Vec::new();
    let mut behind = end;
    // A beginning in the future has nothing behind it.
    if from < end {
        let first_end = (from / width.seconds() + limit) * width.seconds();
        let range = UsageRange::new(from, end.min(first_end), width).map_err(usage_failed)?;
        buckets = state.ledger.usage(range, &wish).await.map_err(usage_failed)?;
        behind = buckets.last().map_or(end, |bucket| bucket.to);
    }
    let bucket = |UsageBucket { from, to, rows }| {
        let results = rows.into_iter().map(&result).collect();
        Bucket { object: "bucket", start_time: from, end_time: to, results }
    };
    let data = buckets.into_iter().map(bucket).collect();
    let next_page = (behind < end).then(|| format!("{PAGE_PREFIX}{behind}"));
    Ok(HttpResponse::Ok().json(Page { object: "page", data, has_more: next_page.is_some(), next_page }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dollars_are_numbers_with_all_their_digits() {
        for nano in [0, 1, -1, 300, 9_007_199_254_740_993, i64::MAX, i64::MIN] {
            let amount = NanoUsd::new(nano);
            let text = serde_json::to_string(&dollars(amount)).unwrap();
            assert_eq!(text, amount.to_string());
            assert!(serde_json::from_str::<serde_json::Value>(&text).unwrap().is_number(), "{text}");
        }
    }
}
