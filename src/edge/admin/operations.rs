//! What operators may ask, and what may come of it.

use super::{
    credits::{audit, ledger, move_credit},
    keys::{change_key, create_key, get_key, list_keys, revoke_key, rotate_key},
    nodes::{list_actors, list_nodes},
    prices::{list_prices, list_tiers, set_prices},
    tenants::{change_tenant, create_tenant, get_tenant, list_tenants},
    webhooks::{get_webhook, list_dead_letters, remove_webhook, retry_dead_letters, set_webhook},
};
use crate::edge::operations::{
    Answer::Json,
    Method::{Delete, Get, Post},
    Operation,
};

const MANAGES: &[u16] = &[400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503];
const MANAGES_NEW: &[u16] = &[400, 401, 403, 408, 409, 413, 415, 429, 500, 503];
const MANAGES_LISTS: &[u16] = &[400, 401, 403, 404, 429, 500, 503];
const MANAGES_SHOWS: &[u16] = &[401, 403, 429, 500, 503];
const MANAGES_ENDS: &[u16] = &[401, 403, 404, 409, 429, 500, 503];

pub const OPERATIONS: &[Operation] = &[
    Operation::new(Get, "/v1/admin/tenants", "adminListTenants", "All tenants", |route| route.to(list_tenants))
        .answer(Json("AdminTenantList"))
        .parameters(&["limit", "after"])
        .refusals(MANAGES_LISTS),
    Operation::new(Post, "/v1/admin/tenants", "adminCreateTenant", "Make a tenant", |route| route.to(create_tenant))
        .body("AdminTenantRequest")
        .answer(Json("AdminTenant"))
        .refusals(MANAGES_NEW),
    Operation::new(Get, "/v1/admin/tenants/{id}", "adminGetTenant", "One tenant", |route| route.to(get_tenant))
        .answer(Json("AdminTenant"))
        .refusals(MANAGES_LISTS),
    Operation::new(
        Post,
        "/v1/admin/tenants/{id}",
        "adminChangeTenant",
        "Change, suspend or resume a tenant",
        |route| route.to(change_tenant),
    )
    .body("AdminTenantChanges")
    .answer(Json("AdminTenant"))
    .refusals(MANAGES),
    Operation::new(Get, "/v1/admin/tenants/{id}/keys", "adminListKeys", "A tenant's keys", |route| route.to(list_keys))
        .answer(Json("AdminKeyList"))
        .parameters(&["limit", "after"])
        .refusals(MANAGES_LISTS),
    Operation::new(
        Post,
        "/v1/admin/tenants/{id}/keys",
        "adminCreateKey",
        "Make a key, and see its secret this once",
        |route| route.to(create_key),
    )
    .body("AdminKeyRequest")
    .answer(Json("AdminNewKey"))
    .refusals(MANAGES),
    Operation::new(
        Post,
        "/v1/admin/tenants/{id}/credits",
        "adminMoveCredit",
        "Grant, adjust or refund, once for each reference",
        |route| route.to(move_credit),
    )
    .body("AdminCreditRequest")
    .answer(Json("AdminCredit"))
    .refusals(MANAGES),
    Operation::new(Get, "/v1/admin/tenants/{id}/ledger", "adminListLedger", "Entries of a tenant's ledger", |route| {
        route.to(ledger)
    })
    .answer(Json("AdminLedger"))
    .parameters(&["limit", "after-entry", "order"])
    .refusals(MANAGES_LISTS),
    Operation::new(Get, "/v1/admin/tenants/{id}/webhook", "adminGetWebhook", "Where a tenant is told", |route| {
        route.to(get_webhook)
    })
    .answer(Json("AdminWebhook"))
    .refusals(MANAGES_LISTS),
    Operation::new(
        Post,
        "/v1/admin/tenants/{id}/webhook",
        "adminSetWebhook",
        "Make or change where a tenant is told; a new secret is shown this once",
        |route| route.to(set_webhook),
    )
    .body("AdminWebhookRequest")
    .answer(Json("AdminNewWebhook"))
    .refusals(MANAGES),
    Operation::new(
        Delete,
        "/v1/admin/tenants/{id}/webhook",
        "adminRemoveWebhook",
        "Tell a tenant nothing more, and forget what waits",
        |route| route.to(remove_webhook),
    )
    .answer(Json("AdminWebhookRemoved"))
    .refusals(MANAGES_ENDS),
    Operation::new(
        Get,
        "/v1/admin/tenants/{id}/webhook/dead-letters",
        "adminListDeadLetters",
        "Events that the endpoint never took",
        |route| route.to(list_dead_letters),
    )
    .answer(Json("AdminDeadLetterList"))
    .refusals(MANAGES_LISTS),
    Operation::new(
        Post,
        "/v1/admin/tenants/{id}/webhook/dead-letters/retry",
        "adminRetryDeadLetters",
        "Deliver one of them after all, or all of them",
        |route| route.to(retry_dead_letters),
    )
    .body("AdminDeadLetterRequest")
    .answer(Json("AdminDeadLettersRetried"))
    .refusals(MANAGES),
    Operation::new(Get, "/v1/admin/keys/{id}", "adminGetKey", "One key", |route| route.to(get_key))
        .answer(Json("AdminKey"))
        .refusals(MANAGES_LISTS),
    Operation::new(Post, "/v1/admin/keys/{id}", "adminChangeKey", "Change what a key may do", |route| {
        route.to(change_key)
    })
    .body("AdminKeyChanges")
    .answer(Json("AdminKey"))
    .refusals(MANAGES),
    Operation::new(Delete, "/v1/admin/keys/{id}", "adminRevokeKey", "End a key for good", |route| route.to(revoke_key))
        .answer(Json("AdminKey"))
        .refusals(MANAGES_ENDS),
    Operation::new(
        Post,
        "/v1/admin/keys/{id}/rotate",
        "adminRotateKey",
        "Give a key a new secret, and see it this once",
        |route| route.to(rotate_key),
    )
    .body("AdminRotation")
    .answer(Json("AdminNewKey"))
    .refusals(MANAGES),
    Operation::new(Get, "/v1/admin/prices", "adminListPrices", "All price lists in order of time", |route| {
        route.to(list_prices)
    })
    .answer(Json("AdminPriceBook"))
    .refusals(MANAGES_SHOWS),
    Operation::new(Post, "/v1/admin/prices", "adminSetPrices", "Publish a price list", |route| route.to(set_prices))
        .body("AdminPriceListRequest")
        .answer(Json("AdminPriceList"))
        .refusals(MANAGES_NEW),
    Operation::new(Get, "/v1/admin/tiers", "adminListTiers", "The configured sets of limits", |route| {
        route.to(list_tiers)
    })
    .answer(Json("AdminTierList"))
    .refusals(MANAGES_SHOWS),
    Operation::new(Get, "/v1/admin/audit", "adminListAudit", "Who changed what, the newest first", |route| {
        route.to(audit)
    })
    .answer(Json("AdminAudit"))
    .parameters(&["limit", "before"])
    .refusals(MANAGES_LISTS),
    Operation::new(Get, "/v1/admin/nodes", "adminListNodes", "Who is in the cluster", |route| route.to(list_nodes))
        .answer(Json("AdminNodeList"))
        .refusals(MANAGES_SHOWS),
    Operation::new(Get, "/v1/admin/actors", "adminListActors", "How the actors of each node are", |route| {
        route.to(list_actors)
    })
    .answer(Json("AdminActorList"))
    .refusals(MANAGES_SHOWS),
];
