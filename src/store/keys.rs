//! Every key and channel name. Nobody else spells one.
//!
//! All keys of a tenant share the hash tag `{t:…}` and all keys of a model's queue `{m:…}`, so that each of
//! our functions touches one slot of a Redis Cluster only.

use crate::domain::{KeyId, ModelId, NodeId, TenantId};

/// Identifiers of all tenants, scored by time of creation. A tenant exists once it is listed here.
pub const TENANTS: &str = "lc:tenants";

/// Who changed what: a stream of changes to tenants, keys, limits, prices and money.
pub(crate) const AUDIT: &str = "lc:audit";

/// Price lists: version to list.
pub(crate) const PRICES: &str = "lc:prices";

/// Which layout the data have.
pub const LAYOUT: &str = "lc:layout";

/// Secret by which the nodes of one store know each other, where none is configured.
pub const RELAY_SECRET: &str = "lc:relay-secret";

/// Secret half of the key that signs receipts, where none is configured.
pub const RECEIPT_KEY: &str = "lc:receipt-key";

/// The node that verifies the ledgers at present; gone when it is.
pub(crate) const VERIFIER: &str = "lc:verifier";

/// Told whenever a tenant's outbox has one message more; says whose account it is.
pub(crate) const OUTBOX_CHANNEL: &str = "lc:outbox";

/// Tenants that have an endpoint for webhooks, and some that had one.
pub(crate) const WEBHOOKS: &str = "lc:webhooks";

/// Whose secret this is, by its SHA-256: tenant and key. Whether it is valid says the key's record.
pub fn secret(secret_sha256: &str) -> String {
    format!("lc:secret:{secret_sha256}")
}

/// From a key's identifier to its tenant.
pub fn key_tenant(key: &KeyId) -> String {
    format!("lc:keyid:{key}")
}

/// Record of one API key: hash of label, prefix, scopes, status, and so on; everything but the secret.
pub fn api_key(tenant: &TenantId, key: &KeyId) -> String {
    format!("lc:{{t:{tenant}}}:key:{key}")
}

/// Identifiers of a tenant's API keys by the time at which they were made.
pub fn tenant_api_keys(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:keys")
}

/// Money of a tenant: hash of balance, available, held, charged, granted, refunded, adjusted, credit, seq, link, and
/// what else there is to say of it: name, status, tier, limits.
pub fn account(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:account")
}

/// Open holds of a tenant: request to nano-dollars.
pub fn holds(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:holds")
}

/// What each open hold was made for: request to key, model and prices.
pub fn hold_terms(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:terms")
}

/// Open holds of a tenant by the time at which they expire.
pub fn hold_leases(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:leases")
}

/// How each request of a tenant ended; what makes a settlement, a release and a grant happen once.
pub fn ended(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:ended")
}

/// Ledger of a tenant: a stream whose entry numbers count 1, 2, 3 without a gap.
pub fn entries(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:entries")
}

/// Where the store's part of a ledger begins, behind what is archived: the books up to there.
pub fn checkpoint(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:checkpoint")
}

/// What a tenant was admitted within the last minute.
pub(crate) fn rates(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:rates")
}

/// How many requests of each key are open.
pub(crate) fn open(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:open")
}

/// What was used in an hour, counted since 1970, by model and key.
pub(crate) fn usage_hour(tenant: &TenantId, hour: u64) -> String {
    format!("lc:{{t:{tenant}}}:usage:hour:{hour}")
}

/// The same in a minute.
pub(crate) fn usage_minute(tenant: &TenantId, minute: u64) -> String {
    format!("lc:{{t:{tenant}}}:usage:minute:{minute}")
}

/// What a tenant is yet to be told of.
pub(crate) fn outbox(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:outbox")
}

/// Events that nobody took; see `functions/outbox.lua`.
pub(crate) fn dead_letters(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:dead")
}

/// Where a tenant's events go; see `functions/webhooks.lua`.
pub(crate) fn webhook(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:webhook")
}

/// Whose account this is.
pub(crate) fn tenant_of_account(account: &str) -> Option<TenantId> {
    Some(account.strip_prefix("lc:{t:")?.strip_suffix("}:account")?.into())
}

/// The keys of a tenant's ledger in the order in which the functions take them; they find the others beside these.
pub(crate) fn ledger(tenant: &TenantId) -> [String; 8] {
    [
        account(tenant),
        holds(tenant),
        hold_terms(tenant),
        hold_leases(tenant),
        ended(tenant),
        entries(tenant),
        rates(tenant),
        open(tenant),
    ]
}

/// Of an address that failed to authenticate: the times of its failures, and what is there while it is blocked.
pub(crate) fn failures(address: &str) -> [String; 2] {
    [format!("lc:{{a:{address}}}:failures"), format!("lc:{{a:{address}}}:blocked")]
}

/// All addresses that are blocked, and the revision of that list.
pub(crate) fn blocks() -> [String; 2] {
    ["lc:{blocked}".to_owned(), "lc:{blocked}:revision".to_owned()]
}

/// The keys of a model's queue in the order in which `functions/queue.lua` takes them.
pub(crate) fn queue(model: &ModelId) -> [String; 11] {
    let key = |part: &str| format!("lc:{{m:{model}}}:{part}");
    [
        key("jobs"),
        key("line"),
        key("places"),
        key("turns"),
        key("served"),
        key("deadlines"),
        key("claims"),
        key("owners"),
        key("meta"),
        key("orphans"),
        key("trials"),
    ]
}

/// The functions' keys of the directory of nodes.
pub(crate) fn nodes() -> [String; 2] {
    ["lc:{nodes}:leases".to_owned(), "lc:{nodes}:cards".to_owned()]
}

/// Requests that wait for a model, in order of tenant and arrival.
pub(crate) fn queue_line(model: &ModelId) -> String {
    format!("lc:{{m:{model}}}:line")
}

/// Requests that others asked the edge at `node` to cancel.
pub(crate) fn cancellations(node: &NodeId) -> String {
    format!("lc:{{n:{node}}}:cancellations")
}

/// Told whenever there is one more of these.
pub(crate) fn cancellation_channel(node: &NodeId) -> String {
    format!("lc:{{n:{node}}}:cancel")
}

/// An answer that its tenant wants to have again, by its id.
pub(crate) fn record(tenant: &TenantId, id: &str) -> String {
    format!("lc:{{t:{tenant}}}:record:{id}")
}

/// Ids of a tenant's stored answers of a kind by the time at which they were made.
pub(crate) fn records(tenant: &TenantId, kind: &str) -> String {
    format!("lc:{{t:{tenant}}}:records:{kind}")
}

/// The request that a tenant's client gave this name.
pub(crate) fn own_request(tenant: &TenantId, own_id: &str) -> String {
    format!("lc:{{t:{tenant}}}:own:{own_id}")
}

/// What was asked under an idempotency key, by the key's SHA-256.
pub(crate) fn idempotency(tenant: &TenantId, key_sha256: &str) -> String {
    format!("lc:{{t:{tenant}}}:once:{key_sha256}")
}

/// What was answered to it.
pub(crate) fn idempotent_answer(tenant: &TenantId, key_sha256: &str) -> String {
    format!("lc:{{t:{tenant}}}:once:{key_sha256}:answer")
}

/// The request that was run for it last.
pub(crate) fn idempotent_request(tenant: &TenantId, key_sha256: &str) -> String {
    format!("lc:{{t:{tenant}}}:once:{key_sha256}:request")
}

/// Told whenever a request was added to a model's queue.
pub(crate) fn queue_channel(model: &ModelId) -> String {
    format!("lc:{{m:{model}}}:published")
}
