//! Every key and channel name. Nobody else spells one.
//!
//! All keys of a tenant share the hash tag `{t:…}` and all keys of a model's queue `{m:…}`, so that each of
//! our functions touches one slot of a Redis Cluster only.

use crate::domain::{KeyId, ModelId, NodeId, TenantId};

/// Identifiers of all tenants, scored by time of creation. A tenant exists once it is listed here.
pub const TENANTS: &str = "lc:tenants";

/// Secret by which the nodes of one store know each other, where none is configured.
pub const RELAY_SECRET: &str = "lc:relay-secret";

/// Secret half of the key that signs receipts, where none is configured.
pub const RECEIPT_KEY: &str = "lc:receipt-key";

/// Record of one API key, by the SHA-256 of its secret.
pub fn api_key(secret_sha256: &str) -> String {
    format!("lc:key:{secret_sha256}")
}

/// From a key's identifier to the SHA-256 of its secret.
pub fn api_key_id(key: &KeyId) -> String {
    format!("lc:keyid:{key}")
}

/// API keys of a tenant: identifier to SHA-256 of the secret.
pub fn tenant_api_keys(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:keys")
}

/// Money of a tenant: hash of balance, held, charged, granted, refunded, seq, name, created.
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

/// What a tenant was admitted within the last minute.
pub(crate) fn rates(tenant: &TenantId) -> String {
    format!("lc:{{t:{tenant}}}:rates")
}

/// The keys of a tenant's ledger in the order in which `functions/ledger.lua` takes them.
pub(crate) fn ledger(tenant: &TenantId) -> [String; 7] {
    [
        account(tenant),
        holds(tenant),
        hold_terms(tenant),
        hold_leases(tenant),
        ended(tenant),
        entries(tenant),
        rates(tenant),
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
pub(crate) fn queue(model: &ModelId) -> [String; 9] {
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
    ]
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

/// Told whenever a request was added to a model's queue.
pub(crate) fn queue_channel(model: &ModelId) -> String {
    format!("lc:{{m:{model}}}:published")
}
