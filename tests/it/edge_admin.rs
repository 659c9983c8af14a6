//! What operators do over HTTP: each answer as the document says, each change effective at once on every edge, and each
//! with its record.

use std::time::{Duration, Instant};

use lightcone::{
    admission::Scope,
    directory::{ActorState, Board, Directory, Mailbox, ModelCard, NodeCard},
};
use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::store_nodes::card;
use crate::support::{
    front::{Front, assert_error, hello},
    house::MODEL,
    process::{Home, Redis},
};

/// What a tenant may begin with, or owe.
const FUNDS_MAX: i64 = i64::MAX / 2;

/// An edge, and a key of its operator.
struct Office {
    front: Front,
    secret: String,
    key: String,
    document: Value,
}

impl Office {
    async fn open() -> Self {
        let front = Front::start().await;
        let operator = front.house.accounts.create_tenant("operator", lightcone::domain::NanoUsd::ZERO).await.unwrap();
        let scopes = [Scope::Admin].into_iter().collect();
        let new = front.house.accounts.create_key(&operator.id, "operator", scopes).await.expect("a key");
        let document = front.get("/openapi.json").send().await.expect("an answer").text().await.expect("a body");
        let document = serde_json::from_str(&document).expect("JSON");
        Self { front, secret: new.secret, key: new.record.id.to_string(), document }
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Response {
        let request = self.front.http.request(method, format!("{}/v1/admin/{path}", self.front.url));
        let request = request.bearer_auth(&self.secret);
        let request = match body {
            Some(body) => request.header("content-type", "application/json").body(body.to_string()),
            None => request,
        };
        request.send().await.expect("an answer")
    }

    /// An answer of the kind that is documented, which nobody may keep.
    async fn sound(&self, answer: Response, schema: &str) -> Value {
        let (status, kept) = (answer.status().as_u16(), answer.headers().get("cache-control").cloned());
        let text = answer.text().await.expect("a body");
        assert_eq!(status, 200, "{schema}: {text}");
        assert_eq!(kept.expect("cache-control"), "no-store");
        let value: Value = serde_json::from_str(&text).expect("JSON");
        let whole =
            json!({ "$ref": format!("#/components/schemas/{schema}"), "components": self.document["components"] });
        let faults: Vec<String> = jsonschema::validator_for(&whole)
            .expect("a schema")
            .iter_errors(&value)
            .map(|fault| format!("{}: {fault}", fault.instance_path()))
            .collect();
        assert!(faults.is_empty(), "{schema}: {faults:?} in {value:#}");
        value
    }

    async fn get(&self, path: &str, schema: &str) -> Value {
        self.sound(self.send(Method::GET, path, None).await, schema).await
    }

    async fn post(&self, path: &str, body: Value, schema: &str) -> Value {
        self.sound(self.send(Method::POST, path, Some(&body)).await, schema).await
    }

    async fn refused(&self, path: &str, body: Value, status: u16, code: &str, param: Option<&str>) -> String {
        let answer = self.send(Method::POST, path, Some(&body)).await;
        assert_error(answer, status, code, param, &format!("{path} {body}")).await
    }

    /// Actions on a thing, the oldest first; all of them by this office's key.
    async fn changes_of(&self, target: &str) -> Vec<String> {
        let audit = self.get("audit?limit=100", "AdminAudit").await;
        let mut changes = Vec::new();
        for record in audit["data"].as_array().expect("records").iter().rev() {
            if record["target"] == *target {
                assert_eq!(record["actor"], format!("key {}", self.key), "{record}");
                changes.push(record["action"].as_str().expect("a word").to_owned());
            }
        }
        changes
    }

    /// What a key may see of the models, for want of a question that costs nothing.
    async fn status_of(&self, secret: &str) -> u16 {
        let asking = self.front.http.get(format!("{}/v1/models", self.front.url)).bearer_auth(secret);
        asking.send().await.expect("an answer").status().as_u16()
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_are_made_listed_page_by_page_and_changed() {
    let office = Office::open().await;
    let made = office
        .post(
            "tenants",
            json!({ "name": "Acme", "balance_nano_usd": 25, "credit_nano_usd": 5, "tier": "standard",
                "low_balance_nano_usd": 3, "limits": { "requests_per_day": 9, "spend_per_day": null } }),
            "AdminTenant",
        )
        .await;
    let id = text(&made["id"]);
    assert_eq!((&made["balance_nano_usd"], &made["available_nano_usd"]), (&json!(25), &json!(30)));
    assert_eq!((&made["limits"], &made["low_balance_nano_usd"]), (&json!({ "requests_per_day": 9 }), &json!(3)));
    for index in 0..4 {
        office.post("tenants", json!({ "name": format!("tenant {index}") }), "AdminTenant").await;
    }
    let all = office.get("tenants", "AdminTenantList").await;
    let ids: Vec<String> = all["data"].as_array().unwrap().iter().map(|tenant| text(&tenant["id"])).collect();
    assert_eq!((ids.len(), &all["has_more"]), (7, &json!(false)));
    let (mut paged, mut path) = (Vec::new(), "tenants?limit=3".to_owned());
    loop {
        let page = office.get(&path, "AdminTenantList").await;
        let data = page["data"].as_array().unwrap();
        assert!(data.len() <= 3 && page["first_id"] == data[0]["id"], "{page}");
        paged.extend(data.iter().map(|tenant| text(&tenant["id"])));
        if page["has_more"] == false {
            break;
        }
        path = format!("tenants?limit=3&after={}", text(&page["last_id"]));
    }
    assert_eq!(paged, ids);

    let path = format!("tenants/{id}");
    let changed = office
        .post(
            &path,
            json!({ "low_balance_nano_usd": null, "credit_nano_usd": 0, "limits": { "requests_per_day": null,
                "tokens_per_minute": 0, "spend_per_month": 9_000_000_000_000_000_u64 } }),
            "AdminTenant",
        )
        .await;
    assert_eq!((&changed["low_balance_nano_usd"], &changed["credit_nano_usd"]), (&Value::Null, &json!(0)));
    assert_eq!(changed["limits"], json!({ "tokens_per_minute": 0, "spend_per_month": 9_000_000_000_000_000_u64 }));
    let same = office.post(&path, json!({}), "AdminTenant").await;
    assert_eq!((&same, &office.get(&path, "AdminTenant").await), (&changed, &changed));
    let suspended = office.post(&path, json!({ "status": "suspended" }), "AdminTenant").await;
    assert_eq!((&suspended["status"], &suspended["limits"]), (&json!("suspended"), &changed["limits"]));
    assert_eq!(office.changes_of(&id).await, ["tenant.create", "credits.line", "tenant.change", "tenant.change"]);
    let tiers = office.get("tiers", "AdminTierList").await;
    assert_eq!((&tiers["data"][0]["name"], tiers["data"].as_array().map(Vec::len)), (&json!("standard"), Some(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_of_an_operators_request_is_named_and_changes_nothing() {
    let office = Office::open().await;
    let tenant = office.front.house.tenant.to_string();
    let key = office.front.house.principal.key.to_string();
    let (one, its_key) = (format!("tenants/{tenant}"), format!("keys/{key}"));
    let (keys, credits) = (format!("{one}/keys"), format!("{one}/credits"));
    // What is refused in the end has changed nothing in the beginning, and names a field that was written.
    let rich = office.post("tenants", json!({ "name": "rich", "balance_nano_usd": FUNDS_MAX }), "AdminTenant").await;
    let rich = format!("tenants/{}", rich["id"].as_str().expect("an id"));
    let two = json!({ "kind": "grant", "amount_nano_usd": 2, "reference": "r" });
    office.post(&format!("{rich}/credits"), two, "AdminCredit").await;
    let too_much = json!({ "credit_nano_usd": FUNDS_MAX, "low_balance_nano_usd": 7 });
    office.refused(&rich, too_much, 409, "amount_overflow", None).await;
    assert_eq!(office.get(&rich, "AdminTenant").await["low_balance_nano_usd"], json!(null));
    let beyond = json!({ "credit_nano_usd": FUNDS_MAX + 1, "low_balance_nano_usd": 7 });
    office.refused(&one, beyond, 400, "out_of_range", Some("credit_nano_usd")).await;
    assert_eq!(office.get(&one, "AdminTenant").await["low_balance_nano_usd"], json!(null));
    let tenants = office.get("tenants", "AdminTenantList").await;
    let too_rich = json!({ "name": "x", "balance_nano_usd": FUNDS_MAX + 1, "credit_nano_usd": 1 });
    office.refused("tenants", too_rich, 400, "out_of_range", Some("balance_nano_usd")).await;
    assert_eq!(office.get("tenants", "AdminTenantList").await, tenants);
    let before = office.get("audit", "AdminAudit").await;
    let long = "x".repeat(129);
    let grant = |amount: &str| {
        let amount: Value = serde_json::from_str(amount).expect("JSON");
        json!({ "kind": "grant", "reference": "r", "amount_nano_usd": amount })
    };
    let price = |price: Value| json!({ "version": "v", "prices": { MODEL: price } });
    #[rustfmt::skip]
    let faults = [
        ("tenants", json!({}), "missing_required_parameter", "name"),
        ("tenants", json!({ "name": 7 }), "invalid_type", "name"),
        ("tenants", json!({ "name": " " }), "invalid_value", "name"),
        ("tenants", json!({ "name": "a\nb" }), "invalid_value", "name"),
        ("tenants", json!({ "name": long }), "string_above_max_length", "name"),
        ("tenants", json!({ "name": "x", "ballance_nano_usd": 1 }), "unknown_parameter", "ballance_nano_usd"),
        ("tenants", json!({ "name": "x", "balance_nano_usd": -1 }), "out_of_range", "balance_nano_usd"),
        ("tenants", json!({ "name": "x", "balance_nano_usd": 1.5 }), "invalid_type", "balance_nano_usd"),
        ("tenants", json!({ "name": "x", "balance_nano_usd": 2.0 }), "invalid_type", "balance_nano_usd"),
        ("tenants", json!({ "name": "x", "balance_nano_usd": "1" }), "invalid_type", "balance_nano_usd"),
        ("tenants", json!({ "name": "x", "balance_nano_usd": u64::MAX }), "out_of_range", "balance_nano_usd"),
        ("tenants", json!({ "name": "x", "tier": "lead" }), "invalid_value", "tier"),
        ("tenants", json!({ "name": "x", "limits": { "joy": 1 } }), "unknown_parameter", "limits.joy"),
        ("tenants", json!({ "name": "x", "limits": { "spend_per_day": 9_000_000_000_000_001_u64 } }), "out_of_range", "limits.spend_per_day"),
        ("tenants", json!({ "name": "x", "limits": [] }), "invalid_type", "limits"),
        (&one, json!({ "status": "gone" }), "invalid_value", "status"),
        (&one, json!({ "name": "other" }), "unknown_parameter", "name"),
        (&one, json!({ "low_balance_nano_usd": -5 }), "out_of_range", "low_balance_nano_usd"),
        (&one, json!({ "limits": { "requests_at_once": -1 } }), "out_of_range", "limits.requests_at_once"),
        (&keys, json!({ "scopes": [] }), "invalid_value", "scopes"),
        (&keys, json!({ "scopes": ["root"] }), "invalid_value", "scopes[0]"),
        (&keys, json!({ "scopes": "chat" }), "invalid_type", "scopes"),
        (&keys, json!({ "models": [] }), "invalid_value", "models"),
        (&keys, json!({ "models": [""] }), "invalid_value", "models[0]"),
        (&keys, json!({ "labels": { "a": 1 } }), "invalid_type", "labels.a"),
        (&keys, json!({ "labels": { "": "x" } }), "invalid_value", "labels"),
        (&keys, json!({ "expires_unix_ms": 1 }), "invalid_value", "expires_unix_ms"),
        (&keys, json!({ "expires_unix_ms": 1e17 }), "out_of_range", "expires_unix_ms"),
        (&keys, json!({ "secret": "sk_mine" }), "unknown_parameter", "secret"),
        (&its_key, json!({ "label": "" }), "invalid_value", "label"),
        (&its_key, json!({ "status": "revoked" }), "unknown_parameter", "status"),
        (&credits, json!({ "kind": "gift" }), "invalid_value", "kind"),
        (&credits, json!({ "kind": "grant", "reference": "r" }), "missing_required_parameter", "amount_nano_usd"),
        (&credits, json!({ "kind": "grant", "amount_nano_usd": 1 }), "missing_required_parameter", "reference"),
        (&credits, json!({ "kind": "grant", "amount_nano_usd": 1, "reference": "" }), "missing_required_parameter", "reference"),
        (&credits, json!({ "kind": "grant", "amount_nano_usd": 1, "reference": "a\u{1f}b" }), "invalid_value", "reference"),
        (&credits, json!({ "kind": "grant", "amount_nano_usd": 1, "reference": "r", "request": "q" }), "unsupported_value", "request"),
        (&credits, json!({ "kind": "adjust", "amount_nano_usd": 0, "reference": "r" }), "out_of_range", "amount_nano_usd"),
        (&credits, json!({ "kind": "refund", "amount_nano_usd": 1, "reference": "r" }), "missing_required_parameter", "request"),
        (&credits, grant("0"), "out_of_range", "amount_nano_usd"),
        (&credits, grant("-1"), "out_of_range", "amount_nano_usd"),
        (&credits, grant("1e3"), "invalid_type", "amount_nano_usd"),
        (&credits, grant("9223372036854775808"), "out_of_range", "amount_nano_usd"),
        (&credits, grant("123456789012345678901234567890"), "out_of_range", "amount_nano_usd"),
        ("prices", json!({ "version": "v" }), "missing_required_parameter", "prices"),
        ("prices", json!({ "version": "v", "prices": {} }), "invalid_value", "prices"),
        ("prices", json!({ "version": "a b", "prices": { MODEL: { "input_nano_usd": 1, "output_nano_usd": 1 } } }), "invalid_value", "version"),
        ("prices", json!({ "version": "v", "prices": { "gpt-9": { "input_nano_usd": 1, "output_nano_usd": 1 } } }), "invalid_value", "prices"),
        ("prices", json!({ "version": "v", "from_unix_ms": 5, "prices": { MODEL: { "input_nano_usd": 1, "output_nano_usd": 1 } } }), "invalid_value", "from_unix_ms"),
        ("prices", price(json!({ "input_nano_usd": 1 })), "missing_required_parameter", "prices.tzafon.sm-1.output_nano_usd"),
        ("prices", price(json!({ "input_nano_usd": 0, "output_nano_usd": 1 })), "invalid_value", "prices.tzafon.sm-1"),
        ("prices", price(json!({ "input_nano_usd": 1, "output_nano_usd": 1, "cached_input_nano_usd": 2 })), "invalid_value", "prices.tzafon.sm-1"),
        ("prices", price(json!({ "input_nano_usd": 0.5, "output_nano_usd": 1 })), "invalid_type", "prices.tzafon.sm-1.input_nano_usd"),
    ];
    for (path, body, code, param) in faults {
        office.refused(path, body, 400, code, Some(param)).await;
    }
    let rotation = format!("{its_key}/rotate");
    office.refused(&rotation, json!({ "grace_seconds": 2_592_001 }), 400, "out_of_range", Some("grace_seconds")).await;
    for path in ["tenants/x", "keys/x", "keys/x/rotate", "tenants/x/keys"] {
        office.refused(path, json!({}), 404, "not_found", Some("id")).await;
    }
    let unknown = json!({ "kind": "grant", "amount_nano_usd": 1, "reference": "r" });
    office.refused("tenants/x/credits", unknown, 404, "not_found", Some("id")).await;
    for (path, status, code, param) in [
        ("tenants/x", 404, "not_found", "id"),
        ("tenants/x/keys", 404, "not_found", "id"),
        ("tenants/x/ledger", 404, "not_found", "id"),
        ("keys/x", 404, "not_found", "id"),
        ("tenants?limit=101", 400, "out_of_range", "limit"),
        ("tenants?after=x", 400, "invalid_value", "after"),
        (&format!("{one}/ledger?after=-1"), 400, "invalid_value", "after"),
        (&format!("{one}/ledger?order=up"), 400, "invalid_value", "order"),
        ("audit?before=now", 400, "invalid_value", "before"),
        ("audit?before=0-0", 400, "invalid_value", "before"),
    ] {
        assert_error(office.send(Method::GET, path, None).await, status, code, Some(param), path).await;
    }
    let gone = office.send(Method::DELETE, "keys/x", None).await;
    assert_error(gone, 404, "not_found", Some("id"), "revoke").await;
    let huge = json!({ "name": "x".repeat(70 << 10) });
    office.refused("tenants", huge, 413, "request_too_large", None).await;
    // The operator's own tenant stays open.
    let own = office.front.house.accounts.key(&office.key.as_str().into()).await.expect("a key").tenant;
    let suspended = json!({ "status": "suspended" });
    office.refused(&format!("tenants/{own}"), suspended, 400, "unsupported_value", Some("status")).await;
    assert_eq!(office.get("audit", "AdminAudit").await, before);
    office.front.assert_nothing_happened("refused").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_keys_with_the_scope_admin_are_let_in() {
    let office = Office::open().await;
    for (path, item) in office.document["paths"].as_object().unwrap() {
        let Some(rest) = path.strip_prefix("/v1/admin/") else { continue };
        for method in ["get", "post", "delete"].iter().filter(|method| !item[**method].is_null()) {
            let method = Method::from_bytes(method.to_ascii_uppercase().as_bytes()).unwrap();
            let url = format!("{}/v1/admin/{}", office.front.url, rest.replace("{id}", "x"));
            let asking = office.front.http.request(method.clone(), &url).bearer_auth(&office.front.house.secret);
            let answer = asking.send().await.expect("an answer");
            assert_error(answer, 403, "permission_denied", None, &format!("{method} {path}")).await;
            let nobody = office.front.http.request(method, &url).send().await.expect("an answer");
            assert_eq!(nobody.status().as_u16(), 401, "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn money_moves_once_for_each_reference_and_the_ledger_tells_it() {
    let office = Office::open().await;
    let house = &office.front.house;
    let one = format!("tenants/{}", house.tenant);
    let credits = format!("{one}/credits");
    let grant = json!({ "kind": "grant", "amount_nano_usd": 500, "reference": "invoice é", "note": "paid" });
    for repeated in [false, true] {
        let done = office.post(&credits, grant.clone(), "AdminCredit").await;
        assert_eq!((&done["balance_nano_usd"], &done["repeated"]), (&json!(1_000_000_500), &json!(repeated)));
    }
    let other = json!({ "kind": "grant", "amount_nano_usd": 501, "reference": "invoice é", "note": "paid" });
    office.refused(&credits, other, 409, "reference_reused", Some("reference")).await;
    let too_much = json!({ "kind": "grant", "amount_nano_usd": i64::MAX, "reference": "r1" });
    office.refused(&credits, too_much, 409, "amount_overflow", None).await;
    let down = json!({ "kind": "adjust", "amount_nano_usd": -1_000_000_501, "reference": "r2" });
    office.refused(&credits, down, 409, "insufficient_balance", Some("amount_nano_usd")).await;
    let adjusted = json!({ "kind": "adjust", "amount_nano_usd": -1, "reference": "r2" });
    assert_eq!(office.post(&credits, adjusted, "AdminCredit").await["balance_nano_usd"], 1_000_000_499);
    let never = json!({ "kind": "refund", "request": "chatcmpl-x", "reference": "r3" });
    office.refused(&credits, never, 409, "not_charged", Some("request")).await;

    let admitted = house.admit(10, 20).await.expect("money enough");
    house.ledger.settle(&crate::support::house::settlement(&admitted, 5)).await.expect("a settlement");
    let request = admitted.request().as_str();
    let charged = 10 * 200 + 5 * 300;
    let part = json!({ "kind": "refund", "request": request, "amount_nano_usd": 100, "reference": "r4" });
    office.post(&credits, part, "AdminCredit").await;
    let more = json!({ "kind": "refund", "request": request, "amount_nano_usd": charged, "reference": "r5" });
    office.refused(&credits, more, 409, "exceeds_charge", Some("amount_nano_usd")).await;
    let rest = json!({ "kind": "refund", "request": request, "reference": "r5" });
    for repeated in [false, true] {
        let done = office.post(&credits, rest.clone(), "AdminCredit").await;
        assert_eq!((&done["amount_nano_usd"], &done["repeated"]), (&json!(charged - 100), &json!(repeated)));
    }

    let kinds = |page: &Value| -> Vec<String> {
        page["data"].as_array().unwrap().iter().map(|entry| text(&entry["kind"])).collect()
    };
    let all = office.get(&format!("{one}/ledger"), "AdminLedger").await;
    assert_eq!(kinds(&all), ["grant", "grant", "adjust", "hold", "post", "refund", "refund"]);
    assert_eq!(all["data"][4]["movements"][0], json!({ "from": "held", "to": "charges", "amount_nano_usd": charged }));
    let (mut forth, mut back) = (Vec::new(), Vec::new());
    for (order, seen) in [("asc", &mut forth), ("desc", &mut back)] {
        let mut path = format!("{one}/ledger?limit=3&order={order}");
        loop {
            let page = office.get(&path, "AdminLedger").await;
            seen.extend(kinds(&page));
            if page["has_more"] == false {
                break;
            }
            path = format!("{one}/ledger?limit=3&order={order}&after={}", text(&page["last_id"]));
        }
    }
    back.reverse();
    assert_eq!((&forth, &back), (&kinds(&all), &kinds(&all)));
    house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_keeps_its_id_when_it_is_rotated_and_both_secrets_work_for_as_long_as_was_said() {
    let office = Office::open().await;
    let tenant = office.front.house.tenant.to_string();
    let keys = format!("tenants/{tenant}/keys");
    let wish =
        json!({ "label": "laptop", "labels": { "team": "blue" }, "models": [MODEL], "limits": { "spend_per_day": 7 } });
    let made = office.post(&keys, wish, "AdminNewKey").await;
    let (id, first) = (text(&made["id"]), text(&made["key"]));
    assert_eq!((&made["scopes"], &made["labels"]), (&json!(["chat", "read"]), &json!({ "team": "blue" })));
    assert_eq!(office.status_of(&first).await, 200);

    let path = format!("keys/{id}");
    let rotated = office.post(&format!("{path}/rotate"), json!({ "grace_seconds": 2 }), "AdminNewKey").await;
    let (begun, second) = (Instant::now(), text(&rotated["key"]));
    assert_eq!((&rotated["id"], &rotated["labels"]), (&made["id"], &made["labels"]));
    assert!(rotated["rotated_unix_ms"].is_u64() && second != first);
    assert_eq!((office.status_of(&first).await, office.status_of(&second).await), (200, 200));
    while office.status_of(&first).await == 200 {
        assert!(begun.elapsed() < Duration::from_secs(3));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(begun.elapsed() > Duration::from_millis(1900), "{:?}", begun.elapsed());
    assert_eq!(office.status_of(&second).await, 200);

    // A third secret ends the first for good, and the second at once if it is to be so.
    let third =
        text(&office.post(&format!("{path}/rotate"), json!({ "grace_seconds": 0 }), "AdminNewKey").await["key"]);
    tokio::time::sleep(Duration::from_millis(600)).await;
    let statuses = [office.status_of(&first).await, office.status_of(&second).await, office.status_of(&third).await];
    assert_eq!(statuses, [401, 401, 200]);

    let changed = office
        .post(
            &path,
            json!({ "label": "desk", "labels": null, "models": null, "limits": { "spend_per_day": null } }),
            "AdminKey",
        )
        .await;
    assert_eq!((&changed["label"], &changed["labels"], &changed["models"]), (&json!("desk"), &json!({}), &Value::Null));
    assert_eq!(
        (&changed["limits"], &changed["rotated_unix_ms"]),
        (&json!({}), &office.get(&path, "AdminKey").await["rotated_unix_ms"])
    );
    let revoked = office.sound(office.send(Method::DELETE, &path, None).await, "AdminKey").await;
    assert_eq!(revoked["status"], "revoked");
    assert_eq!(office.get(&path, "AdminKey").await, revoked);
    for (to, body) in [(&path, json!({ "label": "x" })), (&format!("{path}/rotate"), json!({}))] {
        office.refused(to, body, 409, "key_revoked", None).await;
    }
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(office.status_of(&third).await, 401);

    let expected = ["key.create", "key.rotate", "key.rotate", "key.change", "key.revoke"];
    assert_eq!(office.changes_of(&id).await, expected);
    let listed = office.get(&format!("{keys}?limit=1"), "AdminKeyList").await;
    assert_eq!((listed["data"].as_array().map(Vec::len), &listed["has_more"]), (Some(1), &json!(true)));
    let behind = format!("{keys}?after={}", text(&listed["last_id"]));
    let everything =
        format!("{}{}", office.get(&behind, "AdminKeyList").await, office.get("audit", "AdminAudit").await);
    assert!(everything.contains(&id));
    for secret in [&first, &second, &third] {
        assert!(!everything.contains(&secret[11..]), "a secret was told again");
        assert!(!office.front.house.valkey.has_written(&secret[11..]), "a secret was stored");
    }
    assert!(office.front.house.valkey.has_written(&id), "the append-only file was searched");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn of_keys_that_are_changed_rotated_and_revoked_at_the_same_time_none_comes_back_to_life() {
    let office = Office::open().await;
    let keys = format!("tenants/{}/keys", office.front.house.tenant);
    for _ in 0..8 {
        let made = office.post(&keys, json!({}), "AdminNewKey").await;
        let path = format!("keys/{}", text(&made["id"]));
        let rotation = format!("{path}/rotate");
        let rotate = || async {
            let answer = office.send(Method::POST, &rotation, Some(&json!({ "grace_seconds": 60 }))).await;
            let status = answer.status().as_u16();
            assert!([200, 409].contains(&status), "{status}");
            let told: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
            told["key"].as_str().map(str::to_owned)
        };
        let change = || async {
            let answer = office.send(Method::POST, &path, Some(&json!({ "label": "changed" }))).await;
            assert!([200, 409].contains(&answer.status().as_u16()));
        };
        // Whoever rotates at the same time as others and is told a secret has one that works until it is replaced.
        let (a, b, c, (), ()) = tokio::join!(rotate(), rotate(), rotate(), change(), change());
        let told: Vec<String> = [a, b, c].into_iter().flatten().collect();
        assert!(!told.is_empty());
        let prefix = office.get(&path, "AdminKey").await["prefix"].clone();
        assert_eq!(told.iter().filter(|secret| secret[..11] == *prefix.as_str().unwrap()).count(), 1);
        let ((), (), _, revoked) = tokio::join!(change(), change(), rotate(), office.send(Method::DELETE, &path, None));
        assert_eq!(revoked.status().as_u16(), 200);
        let record = office.get(&path, "AdminKey").await;
        assert_eq!((&record["status"], record["revoked_unix_ms"].is_u64()), (&json!("revoked"), true));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_expires_or_may_not_ask_a_model_is_refused() {
    let office = Office::open().await;
    let keys = format!("tenants/{}/keys", office.front.house.tenant);
    let now = office.front.house.store.now_unix_ms().await.expect("a time");
    let brief = office.post(&keys, json!({ "expires_unix_ms": now + 1_000 }), "AdminNewKey").await;
    let begun = Instant::now();
    assert_eq!(office.status_of(&text(&brief["key"])).await, 200);
    while office.status_of(&text(&brief["key"])).await == 200 {
        assert!(begun.elapsed() < Duration::from_secs(2));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let other = office.post(&keys, json!({ "models": ["other"] }), "AdminNewKey").await;
    for path in ["chat/completions", "tokenize"] {
        let asking = office.front.http.post(format!("{}/v1/{path}", office.front.url)).bearer_auth(text(&other["key"]));
        let body = json!({ "messages": hello()["messages"] });
        let asking = asking.header("content-type", "application/json").body(body.to_string());
        let answer = asking.send().await.expect("an answer");
        assert_error(answer, 403, "permission_denied", None, path).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prices_hold_from_their_date_on() {
    let office = Office::open().await;
    let price = json!({ "input_nano_usd": 400, "output_nano_usd": 600, "cached_input_nano_usd": 0 });
    let now = json!({ "version": "2027-01", "prices": { MODEL: price } });
    let list = office.post("prices", now.clone(), "AdminPriceList").await;
    assert_eq!((&list["version"], &list["prices"][MODEL]), (&json!("2027-01"), &price));
    office.refused("prices", now, 409, "version_taken", Some("version")).await;
    let later = json!({ "version": "gift", "from_unix_ms": 7_226_582_400_000_u64,
        "prices": { MODEL: { "input_nano_usd": 0, "output_nano_usd": 0, "free": true } } });
    office.post("prices", later, "AdminPriceList").await;
    let book = office.get("prices", "AdminPriceBook").await;
    let versions: Vec<&Value> = book["data"].as_array().unwrap().iter().map(|list| &list["version"]).collect();
    assert_eq!(versions.len(), 3);
    assert_eq!((versions[1], versions[2]), (&json!("2027-01"), &json!("gift")));
    // When everybody has heard of it.
    tokio::time::sleep(std::time::Duration::from_millis(1600)).await;
    let model = office.front.get(&format!("/v1/models/{MODEL}")).send().await.expect("an answer");
    let model: Value = serde_json::from_str(&model.text().await.unwrap()).unwrap();
    assert_eq!(
        (&model["pricing"]["version"], &model["pricing"]["input_per_million_tokens"]),
        (&json!("2027-01"), &json!("0.400000000"))
    );
    assert_eq!(office.changes_of("2027-01").await, ["prices.set"]);
}

// --- processes --------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_edge_is_told_holds_for_the_next_request_at_another() {
    let (home, redis) = (Home::new("[tiers.small]\nrequests_per_minute = 1\n"), Redis::start());
    let url = ["--redis-url", &redis.url];
    home.run(&[&["keys", "bootstrap"], url.as_slice()].concat());
    let admin = std::fs::read_to_string(home.data_dir().join("admin-key")).expect("the operator's key");
    let edge = || home.start(&[&["--role", "edge"], url.as_slice()].concat());
    let (here, there) = (edge(), edge());
    let _worker = home.start(&[&["--role", "worker"], url.as_slice()].concat());
    let http = reqwest::Client::new();
    let told = async |path: &str, body: Value| {
        let request = http.post(format!("{}/v1/admin/{path}", here.url)).bearer_auth(admin.trim());
        let answer = request.header("content-type", "application/json").body(body.to_string()).send().await.unwrap();
        let (status, text) = (answer.status().as_u16(), answer.text().await.unwrap());
        assert_eq!(status, 200, "{path} {body}: {text}");
        serde_json::from_str::<Value>(&text).expect("JSON")
    };
    let tenant = text(&told("tenants", json!({ "name": "Acme", "balance_nano_usd": 1_000_000_000 })).await["id"]);
    let one = format!("tenants/{tenant}");
    let key = told(&format!("{one}/keys"), json!({})).await;
    let (secret, its_key) = (text(&key["key"]), format!("keys/{}", text(&key["id"])));
    let asked = async || {
        let request = http.post(format!("{}/v1/chat/completions", there.url)).bearer_auth(&secret);
        let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 2 }).to_string();
        let answer = request.header("content-type", "application/json").body(body).send().await.expect("an answer");
        let status = answer.status().as_u16();
        let answer: Value = serde_json::from_str(&answer.text().await.unwrap()).expect("JSON");
        (status, answer["error"]["code"].as_str().unwrap_or_default().to_owned())
    };
    let refused = |status: u16, code: &str| (status, code.to_owned());
    let fine = refused(200, "");
    assert_eq!(asked().await, fine);
    told(&one, json!({ "limits": { "requests_per_day": 1 } })).await;
    assert_eq!(asked().await, refused(429, "rate_limit_exceeded"));
    told(&one, json!({ "limits": { "requests_per_day": null } })).await;
    assert_eq!(asked().await, fine);
    told(&its_key, json!({ "limits": { "spend_per_day": 1 } })).await;
    assert_eq!(asked().await, refused(402, "insufficient_quota"));
    told(&its_key, json!({ "limits": { "spend_per_day": null } })).await;
    assert_eq!(asked().await, fine);
    told(&one, json!({ "tier": "small" })).await;
    assert_eq!(asked().await, refused(429, "rate_limit_exceeded"));
    told(&one, json!({ "tier": null })).await;
    assert_eq!(asked().await, fine);
    told(&one, json!({ "status": "suspended" })).await;
    assert_eq!(asked().await, refused(403, "permission_denied"));
    told(&one, json!({ "status": "active" })).await;
    assert_eq!(asked().await, fine);
    let gone = http.delete(format!("{}/v1/admin/{its_key}", here.url)).bearer_auth(admin.trim()).send().await.unwrap();
    assert_eq!(gone.status().as_u16(), 200);
    assert_eq!(asked().await, refused(401, "invalid_api_key"));
    let verified = home.run(&[&["ledger", "verify"], url.as_slice()].concat());
    assert_eq!(verified["imbalance_nano_usd"], 0);
    assert!(!home.log_text().contains(&secret[11..]), "a secret was logged");
}

#[tokio::test]
async fn a_tenants_endpoint_is_made_changed_looked_at_and_ended() {
    let office = Office::open().await;
    let at = format!("tenants/{}/webhook", office.front.house.tenant);
    let refused = async |method: Method, path: &str, body: Option<Value>, status: u16, code: &str, param| {
        let context = format!("{method} {path} {body:?}");
        assert_error(office.send(method, path, body.as_ref()).await, status, code, param, &context).await
    };
    refused(Method::GET, &at, None, 404, "not_found", Some("id")).await;
    refused(Method::POST, &at, Some(json!({ "enabled": true })), 404, "not_found", Some("id")).await;
    for url in ["ftp://example.com", "http://", "https://user:word@example.com/"] {
        refused(Method::POST, &at, Some(json!({ "url": url })), 400, "invalid_value", Some("url")).await;
    }
    let (letters, url) = (format!("{at}/dead-letters"), "https://example.com/told");
    let retry = format!("{letters}/retry");
    assert_eq!(office.post(&retry, json!({}), "AdminDeadLettersRetried").await["retried"], 0);
    let nobodys = "tenants/ten_none/webhook/dead-letters/retry";
    refused(Method::POST, nobodys, Some(json!({})), 404, "not_found", Some("id")).await;
    refused(Method::POST, &at, Some(json!({ "url": url, "kinds": [] })), 400, "empty_array", Some("kinds")).await;
    refused(Method::POST, "tenants/ten_none/webhook", Some(json!({ "url": url })), 404, "not_found", Some("id")).await;

    let made = office.post(&at, json!({ "url": url, "kinds": ["limit.reached"] }), "AdminNewWebhook").await;
    assert!(made["secret"].as_str().expect("a secret").starts_with("whsec_"), "{made}");
    let shown = office.get(&at, "AdminWebhook").await;
    assert_eq!(
        (&shown["url"], &shown["kinds"], &shown["secret"]),
        (&json!(url), &json!(["limit.reached"]), &Value::Null)
    );
    let kept = office.post(&at, json!({ "enabled": false }), "AdminNewWebhook").await;
    assert_eq!((&kept["secret"], &kept["enabled"]), (&Value::Null, &json!(false)));
    let rotated = office.post(&at, json!({ "rotate_secret": true }), "AdminNewWebhook").await;
    assert_ne!(rotated["secret"], made["secret"]);

    assert_eq!(office.get(&letters, "AdminDeadLetterList").await["data"], json!([]));
    assert_eq!(office.post(&retry, json!({}), "AdminDeadLettersRetried").await["retried"], 0);
    refused(Method::POST, &retry, Some(json!({ "id": "evt_none" })), 400, "invalid_value", Some("id")).await;
    let ended = office.send(Method::DELETE, &at, None).await;
    office.sound(ended, "AdminWebhookRemoved").await;
    refused(Method::DELETE, &at, None, 404, "not_found", Some("id")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_sees_every_node_and_every_actor() {
    let office = Office::open().await;
    assert_eq!(office.get("nodes", "AdminNodeList").await["data"], json!([]));
    let board = Board::default();
    board.actor("root").is(ActorState::Ready);
    board.with_mailbox("root/model/worker", Some(Mailbox::new(8))).failed("it broke", true);
    let model = ModelCard {
        model: MODEL.into(),
        state: ActorState::Restarting,
        device: "cpu".to_owned(),
        sequences_max: 8,
        claimed: 3,
        running: 2,
        waiting: 1,
        kv_blocks_used: 10,
        kv_blocks_total: 100,
    };
    let card = NodeCard { models: vec![model], actors: board.cards(), ..card("node_1") };
    let directory = Directory::new(office.front.house.store.clone(), Duration::from_secs(60));
    directory.announce(&card).await.unwrap();
    let nodes = office.get("nodes", "AdminNodeList").await;
    let node = &nodes["data"][0];
    assert_eq!(
        (&node["node"], &node["models"][0]["running"], &node["actors"]),
        (&json!("node_1"), &json!(2), &json!(null))
    );
    let actors = office.get("actors", "AdminActorList").await;
    assert_eq!(actors["data"][0]["actor"], "root");
    let worker = &actors["data"][1];
    assert_eq!((&worker["state"], &worker["last_fault"]), (&json!("restarting"), &json!("it broke")));
    assert_eq!(worker["mailbox"], json!({ "waiting": 0, "max": 8, "refused": 0 }));
    // Without the prefix as well.
    let bare = office.front.http.get(format!("{}/admin/actors", office.front.url)).bearer_auth(&office.secret);
    assert_eq!(bare.send().await.unwrap().json::<Value>().await.unwrap(), actors);
}
