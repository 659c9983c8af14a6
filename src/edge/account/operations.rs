//! What may be asked of money, and what may come of it.

use super::{balance, generations, limits, organization, statements};
use crate::edge::operations::{Answer::Json, FINDS, LISTS, Method::Get, Operation, SHOWS};

const READS: &[u16] = &[401, 403, 429, 500, 503];
const READS_ONE: &[u16] = &[400, 401, 403, 404, 429, 500, 503];

pub const OPERATIONS: &[Operation] = &[
    Operation::new(Get, "/v1/balance", "getBalance", "The tenant's money", |route| route.to(balance::get))
        .answer(Json("Balance"))
        .refusals(READS),
    Operation::new(Get, "/v1/usage", "getUsage", "Limits with what is left of them, and what was used", |route| {
        route.to(limits::get)
    })
    .answer(Json("Usage"))
    .refusals(READS),
    Operation::new(Get, "/v1/generations/{id}", "getGeneration", "One request, and what it cost", |route| {
        route.to(generations::get)
    })
    .answer(Json("Generation"))
    .refusals(FINDS),
    Operation::new(Get, "/v1/generations/{id}/receipt", "getReceipt", "The same, signed", |route| {
        route.to(generations::receipt)
    })
    .answer(Json("Receipt"))
    .refusals(FINDS),
    Operation::new(Get, "/v1/receipt-key", "getReceiptKey", "The key with which receipts are checked", |route| {
        route.to(generations::receipt_key)
    })
    .answer(Json("ReceiptKey"))
    .refusals(SHOWS),
    Operation::new(Get, "/v1/statements/{month}", "getStatement", "A month of the tenant's ledger", |route| {
        route.to(statements::get)
    })
    .answer(Json("Statement"))
    .also(&["text/csv", "text/html"])
    .parameters(&["format"])
    .refusals(READS_ONE),
    Operation::new(
        Get,
        "/v1/organization/usage/completions",
        "getCompletionsUsage",
        "What all tenants have used, for the operator",
        |route| route.to(organization::completions),
    )
    .answer(Json("CompletionsUsage"))
    .parameters(organization::PARAMETERS)
    .refusals(LISTS),
    Operation::new(
        Get,
        "/v1/organization/costs",
        "getCosts",
        "What all tenants were charged, for the operator",
        |route| route.to(organization::costs),
    )
    .answer(Json("Costs"))
    .parameters(&[
        "start_time",
        "end_time",
        "bucket_width",
        "cost_group_by",
        "project_ids",
        "api_key_ids",
        "models",
        "cost_limit",
        "page",
    ])
    .refusals(LISTS),
];
