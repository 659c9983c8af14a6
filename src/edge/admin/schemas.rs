//! The schemas of what operators send and are answered, by name. Bodies are held against their readers by the lists of
//! fields that both have, answers by tests.

use serde_json::{Map, Value, json};

use super::bodies;
use crate::{
    admission::{LIMIT_MAX, LimitKind, Scope},
    edge::wire::schema::Limits,
    ledger::TEXT_CHARACTERS_MAX,
    operator::{GRACE_MAX, LABELS_MAX, MODELS_MAX, NAME_CHARACTERS_MAX, TenantStatus, UNIX_MS_MAX},
    webhooks::{Kind, URL_BYTES_MAX},
};

/// A line that says something.
const FILLED: &str = r"^[^\u0000-\u001F\u007F-\u009F]*[^\s\u0000-\u001F\u007F-\u009F][^\u0000-\u001F\u007F-\u009F]*$";
/// A line.
const LINE: &str = r"^[^\u0000-\u001F\u007F-\u009F]*$";

/// Of bodies.
pub fn bodies(limits: &Limits) -> Map<String, Value> {
    let all = [
        ("AdminTenantRequest", object(bodies::TENANT, &["name"], limits)),
        ("AdminTenantChanges", object(bodies::TENANT_CHANGES, &[], limits)),
        ("AdminKeyRequest", object(bodies::KEY, &[], limits)),
        ("AdminKeyChanges", object(bodies::KEY, &[], limits)),
        ("AdminRotation", object(bodies::ROTATION, &[], limits)),
        ("AdminCreditRequest", credit(limits)),
        ("AdminPriceListRequest", object(bodies::PRICES, &["version", "prices"], limits)),
        ("AdminWebhookRequest", object(bodies::WEBHOOK, &[], limits)),
        ("AdminDeadLetterRequest", object(bodies::DEAD_LETTERS, &[], limits)),
    ];
    all.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect()
}

fn object(names: &[&str], required: &[&str], limits: &Limits) -> Value {
    let property = |name: &&str| {
        let schema = field(name, limits);
        ((*name).to_owned(), if required.contains(name) { schema } else { or_null(schema) })
    };
    let properties: Map<String, Value> = names.iter().map(property).collect();
    let mut object = json!({ "type": "object", "additionalProperties": false, "properties": properties });
    if !required.is_empty() {
        object["required"] = json!(required);
    }
    object
}

/// One of the three ways to move money.
fn credit(limits: &Limits) -> Value {
    let way = |kind: &str, least: i64, required: &[&str], is_of_request: bool| {
        let mut way = object(bodies::CREDIT, required, limits);
        way["properties"]["kind"] = json!({ "const": kind });
        let amount = described(amount(least, i64::MAX), "Nano-dollars.");
        way["properties"]["amount_nano_usd"] =
            if required.contains(&"amount_nano_usd") { amount } else { or_null(amount) };
        if !is_of_request {
            way["properties"]["request"] = json!({ "type": "null" });
        }
        way
    };
    let mut adjust = way("adjust", -i64::MAX, &["kind", "amount_nano_usd", "reference"], false);
    adjust["properties"]["amount_nano_usd"]["not"] = json!({ "const": 0 });
    json!({ "anyOf": [
        way("grant", 1, &["kind", "amount_nano_usd", "reference"], false),
        adjust,
        way("refund", 1, &["kind", "reference", "request"], true),
    ] })
}

fn field(name: &str, limits: &Limits) -> Value {
    match name {
        "name" | "label" => text(NAME_CHARACTERS_MAX),
        "balance_nano_usd" => described(amount(0, bodies::FUNDS_MAX), "Prepaid, in nano-dollars."),
        "credit_nano_usd" => described(amount(0, bodies::FUNDS_MAX), "How far below zero the balance may go."),
        "low_balance_nano_usd" => described(
            amount(0, i64::MAX),
            "The tenant is told when less is left, what is on hold included; null for never.",
        ),
        "tier" => json!({ "type": "string", "enum": limits.tiers, "description": "One of the configuration's." }),
        "limits" => described(
            limits_of(or_null(amount(0, LIMIT_MAX.cast_signed()))),
            "Of its own; 0 is no limit, null takes one's own away. Of spend: nano-dollars.",
        ),
        "status" => json!({ "type": "string", "enum": TenantStatus::ALL.map(TenantStatus::as_str) }),
        "labels" => json!({
            "type": "object", "maxProperties": LABELS_MAX, "additionalProperties": text(NAME_CHARACTERS_MAX),
            "propertyNames": text(NAME_CHARACTERS_MAX),
        }),
        "scopes" => json!({
            "type": "array", "minItems": 1, "maxItems": Scope::ALL.len(),
            "items": { "type": "string", "enum": Scope::ALL.map(Scope::as_str) },
        }),
        "models" => json!({
            "type": "array", "minItems": 1, "maxItems": MODELS_MAX, "items": text(NAME_CHARACTERS_MAX),
            "description": "That it may ask; null for all.",
        }),
        "expires_unix_ms" => described(amount(0, UNIX_MS_MAX.cast_signed()), "Not in the past; null for never."),
        "from_unix_ms" => described(amount(0, UNIX_MS_MAX.cast_signed()), "Not in the past; null for now."),
        "grace_seconds" => json!({
            "type": "integer", "minimum": 0, "maximum": GRACE_MAX.as_secs(), "default": bodies::GRACE_SECONDS,
            "description": "For how long the secret before is still good.",
        }),
        "reference" => json!({
            "type": "string", "minLength": 1, "maxLength": TEXT_CHARACTERS_MAX, "pattern": LINE,
            "description": "The same one moves money once.",
        }),
        "note" => json!({ "type": "string", "maxLength": TEXT_CHARACTERS_MAX, "pattern": LINE }),
        "request" => json!({ "type": "string", "maxLength": TEXT_CHARACTERS_MAX }),
        "version" => json!({ "type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$" }),
        "prices" => {
            let price = |free: Value, least: i64| {
                let mut price = object(bodies::PRICE, &["input_nano_usd", "output_nano_usd", "free"], limits);
                price["properties"]["free"] = free;
                for name in ["input_nano_usd", "output_nano_usd"] {
                    price["properties"][name] = amount(least, bodies::PRICE_MAX);
                }
                price
            };
            let mut paid = price(json!({ "enum": [false, null] }), 1);
            paid["required"] = json!(["input_nano_usd", "output_nano_usd"]);
            json!({
                "type": "object", "minProperties": 1,
                "additionalProperties": { "anyOf": [paid, price(json!({ "const": true }), 0)] },
                "propertyNames": { "enum": limits.models }, "description": "Of one token, by model.",
            })
        }
        "url" => json!({
            "type": "string", "format": "uri", "minLength": 1, "maxLength": URL_BYTES_MAX,
            "description": "https, and a public address, unless the configuration allows others.",
        }),
        "kinds" => json!({
            "type": "array", "minItems": 1, "maxItems": Kind::ALL.len(),
            "items": { "type": "string", "enum": Kind::ALL.map(Kind::as_str) },
        }),
        "enabled" | "rotate_secret" => json!({ "type": "boolean" }),
        "id" => {
            described(json!({ "type": "string", "minLength": 1, "maxLength": TEXT_CHARACTERS_MAX }), "null for all.")
        }
        "free" => json!({ "type": "boolean" }),
        // Of one token.
        _ => amount(0, bodies::PRICE_MAX),
    }
}

fn text(characters_max: usize) -> Value {
    json!({ "type": "string", "minLength": 1, "maxLength": characters_max, "pattern": FILLED })
}

fn amount(min: i64, max: i64) -> Value {
    json!({ "type": "integer", "minimum": min, "maximum": max })
}

fn described(mut schema: Value, about: &str) -> Value {
    schema["description"] = json!(about);
    schema
}

fn or_null(mut schema: Value) -> Value {
    let kind = schema["type"].take();
    schema["type"] = json!([kind, "null"]);
    if let Some(Value::Array(words)) = schema.get_mut("enum") {
        words.push(Value::Null);
    }
    schema
}

fn limits_of(limit: Value) -> Value {
    let kinds = LimitKind::ALL.into_iter().map(|kind| (kind.as_str().to_owned(), limit.clone()));
    json!({ "type": "object", "additionalProperties": false, "properties": kinds.collect::<Map<String, Value>>() })
}

// --- answers ----------------------------------------------------------------------------------------

/// Of answers.
pub fn answers() -> Map<String, Value> {
    let all = [
        ("AdminTenant", tenant()),
        ("AdminTenantList", list("AdminTenant")),
        ("AdminKey", key(&[])),
        ("AdminNewKey", key(&["key"])),
        ("AdminKeyList", list("AdminKey")),
        (
            "AdminCredit",
            whole(json!({
                "object": { "const": "credit" }, "tenant": words(), "kind": { "enum": bodies::CreditKind::WORDS },
                "reference": words(), "amount_nano_usd": integer(), "balance_nano_usd": integer(),
                "repeated": { "type": "boolean", "description": "It had been done before; nothing was changed." },
            })),
        ),
        ("AdminLedgerEntry", entry()),
        ("AdminLedger", list("AdminLedgerEntry")),
        ("AdminPriceList", price_list()),
        ("AdminPriceBook", few("AdminPriceList")),
        (
            "AdminTier",
            whole(json!({
                "object": { "const": "tier" }, "name": words(), "limits": limits_of(count()),
                "service_tier_max": { "enum": ["flex", "default", "priority"] },
            })),
        ),
        ("AdminTierList", few("AdminTier")),
        (
            "AdminAuditRecord",
            whole(json!({
                "object": { "const": "audit.record" }, "id": words(), "unix_ms": count(), "actor": words(),
                "action": words(), "target": words(), "detail": { "type": "object" },
            })),
        ),
        ("AdminAudit", list("AdminAuditRecord")),
        ("AdminNode", node()),
        ("AdminNodeList", few("AdminNode")),
        ("AdminActor", actor()),
        ("AdminActorList", few("AdminActor")),
        ("AdminWebhook", webhook()),
        ("AdminNewWebhook", {
            let mut webhook = webhook();
            webhook["properties"]["secret"] =
                described(words(), "It signs what is sent, and is never shown again. Only where it is a new one.");
            webhook
        }),
        ("AdminWebhookRemoved", whole(json!({ "object": { "const": "webhook.removed" }, "tenant": words() }))),
        (
            "AdminDeadLetter",
            whole(json!({
                "object": { "const": "webhook.dead_letter" }, "id": words(), "attempts": count(),
                "died_unix_ms": count(), "why": words(), "message": described(words(), "As it would be sent."),
            })),
        ),
        ("AdminDeadLetterList", few("AdminDeadLetter")),
        (
            "AdminDeadLettersRetried",
            whole(json!({ "object": { "const": "webhook.retried" }, "tenant": words(), "retried": count() })),
        ),
    ];
    all.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect()
}

fn words() -> Value {
    json!({ "type": "string" })
}

fn integer() -> Value {
    json!({ "type": "integer" })
}

fn count() -> Value {
    json!({ "type": "integer", "minimum": 0 })
}

fn count_or_null() -> Value {
    json!({ "type": ["integer", "null"], "minimum": 0 })
}

fn component(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// An object that has all of its fields.
fn whole(properties: Value) -> Value {
    let required: Vec<&String> = properties.as_object().into_iter().flat_map(Map::keys).collect();
    json!({ "type": "object", "required": required, "properties": properties })
}

fn list(item: &str) -> Value {
    let id = || json!({ "type": ["string", "null"] });
    whole(json!({
        "object": { "const": "list" }, "data": { "type": "array", "items": component(item) }, "first_id": id(),
        "last_id": id(), "has_more": { "type": "boolean" },
    }))
}

fn few(item: &str) -> Value {
    whole(json!({ "object": { "const": "list" }, "data": { "type": "array", "items": component(item) } }))
}

fn tenant() -> Value {
    whole(json!({
        "object": { "const": "tenant" }, "id": words(), "name": words(), "created_unix_ms": count(),
        "status": { "enum": TenantStatus::ALL.map(TenantStatus::as_str) },
        "tier": described(words(), "Empty for the standard one."),
        "limits": described(limits_of(count()), "Its own, which go before those of its tier."),
        "low_balance_nano_usd": count_or_null(),
        "balance_nano_usd": integer(), "held_nano_usd": integer(), "charged_nano_usd": integer(),
        "granted_nano_usd": integer(), "refunded_nano_usd": integer(), "adjusted_nano_usd": integer(),
        "credit_nano_usd": integer(), "available_nano_usd": integer(),
    }))
}

/// With its secret, where `first` names it.
fn key(first: &[&str]) -> Value {
    let mut properties = json!({
        "object": { "const": "key" }, "id": words(), "tenant": words(), "label": words(),
        "labels": { "type": "object", "additionalProperties": words() },
        "prefix": described(words(), "What the secret begins with."),
        "scopes": { "type": "array", "items": { "enum": Scope::ALL.map(Scope::as_str) } },
        "models": { "type": ["array", "null"], "items": words(), "description": "That it may ask; null for all." },
        "limits": limits_of(count()), "status": { "enum": ["active", "revoked"] },
        "created_unix_ms": count(), "expires_unix_ms": count_or_null(), "rotated_unix_ms": count_or_null(),
        "revoked_unix_ms": count_or_null(),
    });
    for name in first {
        properties[*name] =
            json!({ "type": "string", "pattern": "^sk_", "description": "The secret. It is never shown again." });
    }
    whole(properties)
}

fn webhook() -> Value {
    whole(json!({
        "object": { "const": "webhook" }, "tenant": words(), "url": words(),
        "kinds": { "type": "array", "items": { "enum": Kind::ALL.map(Kind::as_str) } },
        "enabled": { "type": "boolean" }, "created_unix_ms": count(), "changed_unix_ms": count(),
        "waiting": described(count(), "Events that are yet to be delivered."), "dead_letters": count(),
        "attempts": described(count(), "So far, of the event that is next."), "next_attempt_unix_ms": count_or_null(),
        "delivered_unix_ms": count_or_null(),
        "failed_unix_ms": described(count_or_null(), "Of the last attempt, if it failed."),
        "why": { "type": ["string", "null"] },
    }))
}

fn entry() -> Value {
    let accounts = || json!({ "enum": ["funding", "balance", "held", "charges", "refunds", "adjustments"] });
    let movement = whole(json!({ "from": accounts(), "to": accounts(), "amount_nano_usd": count() }));
    whole(json!({
        "object": { "const": "ledger.entry" }, "seq": count(),
        "kind": { "enum": crate::ledger::EntryKind::ALL.map(crate::ledger::EntryKind::as_str) },
        "request": words(), "reference": words(), "tenant": words(), "key": words(), "model": words(),
        "usage": whole(json!({
            "prompt_tokens": count(), "completion_tokens": count(), "cached_tokens": count(),
        })),
        "price": described(
            whole(json!({ "input": integer(), "output": integer(), "cached_input": integer() })),
            "Nano-dollars a token.",
        ),
        "price_version": words(), "amount_nano_usd": integer(), "hold_nano_usd": integer(),
        "balance_nano_usd": integer(), "held_nano_usd": integer(), "note": words(), "digest": words(),
        "unix_ms": count(), "link": words(), "movements": { "type": "array", "items": movement },
    }))
}

fn price_list() -> Value {
    let price = whole(json!({
        "input_nano_usd": count(), "output_nano_usd": count(), "cached_input_nano_usd": count(),
    }));
    whole(json!({
        "object": { "const": "price_list" }, "version": words(), "from_unix_ms": count(),
        "prices": { "type": "object", "additionalProperties": price, "description": "Of one token, by model." },
    }))
}

fn node() -> Value {
    let model = whole(json!({
        "model": words(), "state": actor_state(), "device": described(words(), "Execution providers, the preferred first."),
        "sequences_max": count(), "claimed": count(), "running": count(), "waiting": count(),
        "kv_blocks_used": count(), "kv_blocks_total": count(),
    }));
    whole(json!({
        "object": { "const": "node" }, "node": words(), "host": words(), "role": { "enum": ["all", "edge", "worker"] },
        "version": words(), "started_unix_ms": count(),
        "state": { "enum": ["ready", "degraded", "draining", "lost"] },
        "http": or_null(words()), "relay": or_null(words()), "open_streams": count(),
        "models": { "type": "array", "items": model },
        "lease_left_ms": described(integer(), "Below 0 since it ran out."),
    }))
}

fn actor() -> Value {
    let mailbox = whole(json!({ "waiting": count(), "max": count(), "refused": count() }));
    whole(json!({
        "object": { "const": "actor" }, "node": words(), "host": words(),
        "actor": described(words(), "The names from the root to it."), "state": actor_state(),
        "since_unix_ms": count(), "beat_unix_ms": described(count(), "When it last made progress."),
        "restarts": count(), "last_fault": or_null(words()), "mailbox": or_null(mailbox),
    }))
}

fn actor_state() -> Value {
    json!({ "enum": ["starting", "ready", "stalled", "restarting", "unavailable", "stopped"] })
}
