//! What may be asked of usage, costs and statements.

use serde_json::{Value, json};

use crate::edge::account::{
    organization::{COST_DAYS_MAX, COST_GROUPS, LIMIT_MAX, TIME_MAX, USAGE_GROUPS},
    statements::FORMATS,
};

/// The components, by name. Where two have one name in the query, they differ in their bounds.
pub fn parameters() -> Vec<(&'static str, Value)> {
    let one = |name: &str, about: &str, schema: Value| json!({ "name": name, "in": "query", "description": about, "schema": schema });
    let list = |name: &str, about: &str, items: Value| {
        let about = format!("{about} Also as `{name}[]`.");
        json!({ "name": name, "in": "query", "description": about, "style": "form", "explode": true,
            "schema": { "type": "array", "items": items, "maxItems": 100 } })
    };
    let words = || json!({ "type": "string" });
    let time = || json!({ "type": "integer", "minimum": 0, "maximum": TIME_MAX });
    let limit =
        |most: u64, about: &str| one("limit", about, json!({ "type": "integer", "minimum": 1, "maximum": most }));
    let mut start = one("start_time", "Unix seconds; the bucket that has it is the first.", time());
    start["required"] = json!(true);
    // Long before the first request of anybody.
    start["example"] = json!(1_767_225_600);
    vec![
        ("start_time", start),
        ("end_time", one("end_time", "Unix seconds, excluded; after `start_time`. By default now.", time())),
        (
            "bucket_width",
            one(
                "bucket_width",
                "Minutes are kept for two days, hours and days for 400. What is not kept any more is refused.",
                json!({ "type": "string", "enum": ["1m", "1h", "1d"], "default": "1d" }),
            ),
        ),
        ("group_by", list("group_by", "What is told apart. A project is a tenant.", json!({ "enum": USAGE_GROUPS }))),
        (
            "cost_group_by",
            list(
                "group_by",
                "What is told apart. A project is a tenant, a line item a model.",
                json!({ "enum": COST_GROUPS }),
            ),
        ),
        ("project_ids", list("project_ids", "Only of these tenants.", words())),
        ("api_key_ids", list("api_key_ids", "Only of these keys.", words())),
        ("models", list("models", "Only of these models.", words())),
        (
            "limit",
            limit(
                LIMIT_MAX,
                "Buckets on one page: of `1d` 7, at most 31; of `1h` 24, at most 168; of `1m` 60, at most 1440.",
            ),
        ),
        (
            "cost_limit",
            limit(
                LIMIT_MAX.max(COST_DAYS_MAX),
                "Buckets on one page: of `1d` 7, at most 180; of `1h` 24, at most 168; of `1m` 60, at most 1440.",
            ),
        ),
        (
            "page",
            one(
                "page",
                "The `next_page` of the page before, with the same parameters.",
                json!({ "type": "string", "pattern": "^page_[0-9]{1,12}$" }),
            ),
        ),
        ("format", one("format", "Of the answer.", json!({ "type": "string", "enum": FORMATS, "default": "json" }))),
    ]
}

/// The month of a path.
pub fn month() -> Value {
    json!({
        "name": "month", "in": "path", "required": true, "description": "A month of UTC.",
        "schema": { "type": "string", "pattern": "^(19[7-9][0-9]|[2-9][0-9]{3})-(0[1-9]|1[0-2])$" }, "example": "2026-11",
    })
}
