//! What tenants and the operator see of money over HTTP, against the ledger itself.

use lightcone::{
    admission::{LimitKind, Limits, Scope},
    domain::{FinishReason, NanoUsd, TenantId},
    ledger::{Refund, ReleaseReason},
    operator::KeyWish,
};
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};

use crate::support::{
    front::{Front, Furniture, assert_error, hello},
    house::{MODEL, ask, settlement},
    past::{born, date_entries, month_before, used_at},
};

const DAY: u64 = 86_400;

/// A front with a key for each scope that its tenant may have.
struct Keys {
    front: Front,
    read: String,
    admin: String,
}

impl Keys {
    async fn of(front: Front) -> Self {
        let accounts = &front.house.accounts;
        let mut secrets = Vec::new();
        for scope in [Scope::Read, Scope::Admin] {
            let key = accounts.create_key(&front.house.tenant, scope.as_str(), [scope].into_iter().collect()).await;
            secrets.push(key.expect("a key").secret);
        }
        let [read, admin] = secrets.try_into().expect("two");
        Self { front, read, admin }
    }

    fn request(&self, path: &str, secret: &str) -> RequestBuilder {
        self.front.http.get(format!("{}{path}", self.front.url)).bearer_auth(secret)
    }

    /// The answer to whoever may read, held against its schema.
    async fn read(&self, path: &str, schema: &str) -> Value {
        self.json(self.request(path, &self.read), schema).await
    }

    async fn admin(&self, path: &str, schema: &str) -> Value {
        self.json(self.request(path, &self.admin), schema).await
    }

    async fn json(&self, request: RequestBuilder, schema: &str) -> Value {
        let answer = request.send().await.expect("an answer");
        let (status, text) = (answer.status().as_u16(), answer.text().await.expect("a body"));
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).expect("JSON");
        let document = self.front.http.get(format!("{}/openapi.json", self.front.url)).send().await;
        let document: Value = document.expect("an answer").json().await.expect("JSON");
        let reference = format!("#/components/schemas/{schema}");
        let whole = json!({ "$ref": reference, "components": document["components"] });
        let faults: Vec<String> = jsonschema::validator_for(&whole)
            .expect("a schema")
            .iter_errors(&answer)
            .map(|fault| format!("{}: {fault}", fault.instance_path()))
            .collect();
        assert!(faults.is_empty(), "{faults:?} in {text}");
        answer
    }

    async fn refused(&self, path: &str, secret: &str) -> Response {
        self.request(path, secret).send().await.expect("an answer")
    }
}

/// One chat completion from its question to its answer; the answer's id.
async fn served(front: &Front, body: &Value) -> String {
    let waiting = front.asking(body);
    let claim = front.claim().await;
    front.answer(&claim, &["a", "b"], FinishReason::Stop).await;
    let answer: Value = waiting.await.expect("an answer").json().await.expect("JSON");
    answer["id"].as_str().expect("an id").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_key_with_the_right_scope_sees_money() {
    let keys = Keys::of(Front::start().await).await;
    let month = month_before(&keys.front.house, 0).await;
    let (chat, read, admin) = (keys.front.house.secret.clone(), keys.read.clone(), keys.admin.clone());
    let own = ["/v1/balance", "/v1/usage", "/v1/generations/chatcmpl-x", &format!("/v1/statements/{month}")];
    let everybodys = ["/v1/organization/usage/completions?start_time=0", "/v1/organization/costs?start_time=0"];
    for path in own {
        for secret in [&chat, &admin] {
            assert_error(keys.refused(path, secret).await, 403, "permission_denied", None, path).await;
        }
        let status = keys.refused(path, &read).await.status().as_u16();
        assert_eq!(status, if path.contains("generations") { 404 } else { 200 }, "{path}");
    }
    for path in everybodys {
        for secret in [&chat, &read] {
            assert_error(keys.refused(path, secret).await, 403, "permission_denied", None, path).await;
        }
        assert_eq!(keys.refused(path, &admin).await.status().as_u16(), 200, "{path}");
        // As everything, also without the version.
        assert_eq!(keys.refused(path.trim_start_matches("/v1"), &admin).await.status().as_u16(), 200, "{path}");
    }
    for path in own.into_iter().chain(everybodys) {
        assert_error(keys.refused(path, "sk_wrong").await, 401, "invalid_api_key", None, path).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_balance_is_that_of_the_ledger_in_nano_dollars_and_in_dollars() {
    let keys = Keys::of(Front::start().await).await;
    let house = &keys.front.house;
    served(&keys.front, &hello()).await;
    house.ledger.set_credit(&house.tenant, NanoUsd::new(5), "").await.expect("set");
    let _open = house.admit(10, 10).await.expect("admitted");
    let told = keys.read("/v1/balance", "Balance").await;
    let money = serde_json::to_value(house.balance().await).expect("JSON");
    for (name, nano) in money.as_object().expect("an object") {
        assert_eq!(&told[name], nano, "{name}");
        let usd = told[name.replace("_nano_usd", "_usd")].as_str().expect("dollars");
        assert_eq!(usd, NanoUsd::new(nano.as_i64().expect("nano-dollars")).to_string(), "{name}");
    }
    assert_eq!((&told["tenant"], &told["credit_usd"]), (&json!(house.tenant.as_str()), &json!("0.000000005")));
    assert!(told["held_nano_usd"].as_i64() > Some(0) && told["charged_nano_usd"].as_i64() > Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_say_what_is_used_what_is_left_and_when_they_are_whole_again() {
    let limits = Limits::default()
        .with(LimitKind::RequestsPerMinute, 100)
        .with(LimitKind::TokensPerMinute, 100_000)
        .with(LimitKind::TokensPerDay, 1_000_000)
        .with_spend(LimitKind::SpendPerMonth, NanoUsd::new(700_000_000));
    let keys = Keys::of(Front::furnished(Furniture { limits, ..Furniture::default() }).await).await;
    let house = &keys.front.house;
    let wish = KeyWish {
        limits: Limits::default().with(LimitKind::RequestsPerDay, 10).with(LimitKind::RequestsPerMinute, 1),
        ..KeyWish::new("both", [Scope::Read, Scope::Chat].into_iter().collect())
    };
    let both = house.accounts.create_key_like(&house.tenant, wish).await.expect("a key");
    served(&keys.front, &hello()).await;
    let body = hello();
    let waiting = tokio::spawn(
        keys.front
            .http
            .post(format!("{}/v1/chat/completions", keys.front.url))
            .bearer_auth(&both.secret)
            .json(&body)
            .send(),
    );
    let claim = keys.front.claim().await;
    let told = keys.json(keys.request("/v1/usage", &both.secret), "Usage").await;
    let now = house.ledger.now_unix_ms().await.expect("a time") / 1000;
    let limit = |of: &str, name: &str| {
        let all = told["limits"].as_array().expect("limits");
        all.iter().find(|one| one["of"] == of && one["name"] == name).cloned()
    };
    let money = house.balance().await;
    let spent = (money.charged.nano() + money.held.nano()) as u64;
    let prompt = claim.job.prompt.len() as u64;
    // One has ended with two tokens, the other may still put out as many as there may be.
    let tokens = 2 * prompt + 2 + u64::from(crate::support::front::OUTPUT_MAX);
    for (of, name, most, used) in [
        ("tenant", "requests_per_minute", Some(100), 2),
        ("tenant", "tokens_per_minute", Some(100_000), tokens),
        ("tenant", "requests_per_day", None, 2),
        ("tenant", "tokens_per_day", Some(1_000_000), tokens),
        ("tenant", "requests_at_once", None, 1),
        ("tenant", "spend_per_day", None, spent),
        ("tenant", "spend_per_month", Some(700_000_000), spent),
        ("key", "requests_per_day", Some(10), 1),
        ("key", "requests_per_minute", Some(1), 1),
        ("key", "requests_at_once", None, 1),
        ("key", "spend_per_month", None, money.held.nano() as u64),
    ] {
        let one = limit(of, name).unwrap_or_else(|| panic!("{of} {name} in {told}"));
        assert_eq!((&one["limit"], &one["used"]), (&json!(most), &json!(used)), "{of} {name}");
        assert_eq!(one["left"], json!(most.map(|most| most - used)), "{of} {name}");
        let (at, ms) = (one["resets_at"].as_u64(), one["reset_ms"].as_u64());
        match name {
            "requests_at_once" => assert_eq!((at, ms), (None, None)),
            "requests_per_minute" | "tokens_per_minute" => {
                assert!((50_000..=61_000).contains(&ms.expect("a time")), "{one}");
                assert!((now + 50..=now + 62).contains(&at.expect("a time")), "{one}");
            }
            "spend_per_month" => {
                let month = month_before(house, 0).await;
                assert_eq!(at, Some(month.ends_unix_ms() / 1000));
            }
            _ => assert_eq!(at, Some((now / DAY + 1) * DAY), "{one}"),
        }
    }
    assert_eq!(limit("key", "tokens_per_minute"), None, "is not counted where it is not limited");
    // What was charged; the other is not yet.
    for period in ["today", "month"] {
        let used = &told[period];
        assert_eq!((&used["requests"], &used["completion_tokens"]), (&json!(1), &json!(2)), "{used}");
        assert_eq!(used["amount_nano_usd"], money.charged.nano());
        assert_eq!(used["amount_usd"], money.charged.to_string());
        assert!((used["from"].as_u64().expect("a time")..used["to"].as_u64().expect("a time")).contains(&now));
    }
    keys.front.answer(&claim, &["a"], FinishReason::Stop).await;
    assert_eq!(waiting.await.expect("no panic").expect("an answer").status(), 200);
}

/// Charges of so many prompt tokens, each for one completion token, at chosen times.
async fn charges(front: &Front, charges: &[(&lightcone::admission::Principal, u64, u32)]) {
    for (principal, time, prompt) in charges {
        let admitted = front.house.admission.admit(principal, ask(*prompt, 1)).await.expect("admitted");
        front.house.ledger.settle(&settlement(&admitted, 1)).await.expect("settled");
        used_at(&front.house, &principal.tenant, *time).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_sees_everybodys_usage_in_buckets_groups_and_pages() {
    let keys = Keys::of(Front::start().await).await;
    let house = &keys.front.house;
    let other = house.another(1_000_000_000).await;
    let now = house.ledger.now_unix_ms().await.expect("a time") / 1000;
    let midnight = now / DAY * DAY - DAY;
    for tenant in [&house.tenant, &other.tenant] {
        born(house, tenant, midnight - 5 * DAY).await;
    }
    let own = &house.principal;
    charges(
        &keys.front,
        &[(own, midnight - 1, 1), (own, midnight, 20), (&other, midnight, 300), (&other, midnight + DAY - 1, 4_000)],
    )
    .await;
    let verified = house.ledger.verify().await.expect("a report");
    assert_eq!(verified.imbalance_nano_usd, 0);
    let (start, end) = (midnight - 2 * DAY, midnight + DAY);
    let usage = |query: &str| format!("/v1/organization/usage/completions?start_time={start}&end_time={end}&{query}");
    let costs = |query: &str| format!("/v1/organization/costs?start_time={start}&end_time={end}&{query}");

    let page = keys.admin(&usage(""), "CompletionsUsage").await;
    assert_eq!((&page["object"], &page["has_more"], &page["next_page"]), (&json!("page"), &json!(false), &json!(null)));
    let days = page["data"].as_array().expect("buckets");
    let told = days.iter().map(|day| (day["start_time"].as_u64(), day["results"][0]["input_tokens"].as_u64()));
    let told: Vec<_> = told.collect();
    assert_eq!(told, [(Some(start), None), (Some(midnight - DAY), Some(1)), (Some(midnight), Some(4_320))]);
    assert_eq!(
        days[2]["results"][0],
        json!({
            "object": "organization.usage.completions.result", "input_tokens": 4_320, "output_tokens": 3,
            "input_cached_tokens": 0, "input_audio_tokens": 0, "output_audio_tokens": 0, "num_model_requests": 3,
            "project_id": null, "api_key_id": null, "model": null, "user_id": null, "batch": null,
        })
    );

    // Told apart, narrowed, and added up again.
    let grouped =
        keys.admin(&usage("group_by[]=project_id&group_by[]=model&group_by=api_key_id"), "CompletionsUsage").await;
    let results = grouped["data"][2]["results"].as_array().expect("results");
    let of_tenant =
        |tenant: &TenantId| results.iter().find(|result| result["project_id"] == tenant.as_str()).expect("one");
    assert_eq!(results.len(), 2);
    assert_eq!(
        (&of_tenant(&other.tenant)["input_tokens"], &of_tenant(&other.tenant)["model"]),
        (&json!(4_300), &json!(MODEL))
    );
    assert_eq!(of_tenant(&house.tenant)["api_key_id"], own.key.as_str());
    let narrow = keys
        .admin(&usage(&format!("project_ids={}&bucket_width=1h&limit=168", other.tenant)), "CompletionsUsage")
        .await;
    let hours: Vec<_> =
        narrow["data"].as_array().expect("buckets").iter().filter(|hour| hour["results"] != json!([])).collect();
    assert_eq!(hours.len(), 2);
    assert_eq!((&hours[0]["start_time"], &hours[1]["end_time"]), (&json!(midnight), &json!(midnight + DAY)));
    for (filter, tokens) in [
        (format!("api_key_ids[]={}", own.key), 21),
        (format!("models={MODEL}"), 4_321),
        ("models=another".to_owned(), 0),
        ("project_ids=ten_nobody".to_owned(), 0),
    ] {
        let page = keys.admin(&usage(&filter), "CompletionsUsage").await;
        let results = page["data"]
            .as_array()
            .expect("buckets")
            .iter()
            .flat_map(|day| day["results"].as_array().expect("results"));
        assert_eq!(
            results.map(|result| result["input_tokens"].as_u64().expect("a count")).sum::<u64>(),
            tokens,
            "{filter}"
        );
    }

    // Page by page it is the same as at once.
    for (path, schema) in [(usage("bucket_width=1h"), "CompletionsUsage"), (costs("bucket_width=1h"), "Costs")] {
        let whole = keys.admin(&format!("{path}&limit=168"), schema).await;
        let (mut pages, mut next) = (Vec::new(), String::new());
        loop {
            let page = keys.admin(&format!("{path}&limit=31{next}"), schema).await;
            pages.extend(page["data"].as_array().expect("buckets").clone());
            let Some(cursor) = page["next_page"].as_str() else { break };
            assert_eq!(page["has_more"], true);
            next = format!("&page={cursor}");
        }
        assert_eq!(json!(pages), whole["data"], "{path}");
        assert_eq!(pages.len(), 72);
    }

    // Costs are exact, and as many as the ledger has.
    let answer = keys.refused(&costs("group_by[]=project_id"), &keys.admin).await.text().await.expect("a body");
    let charged =
        [house.balance().await.charged, house.ledger.balance(&other.tenant).await.expect("a balance").charged];
    assert!(
        answer.contains(&format!("\"value\":{},\"currency\":\"usd\"", NanoUsd::new(4_300 * 200 + 2 * 300))),
        "{answer}"
    );
    let all = keys.admin(&costs("group_by=line_item"), "Costs").await;
    let results =
        all["data"].as_array().expect("buckets").iter().flat_map(|day| day["results"].as_array().expect("results"));
    let results: Vec<_> = results.collect();
    let sum: i64 = results.iter().map(|result| result["amount"]["value_nano_usd"].as_i64().expect("an amount")).sum();
    assert_eq!(sum, charged[0].nano() + charged[1].nano());
    assert!(results.iter().all(|result| result["line_item"] == MODEL && result["project_id"] == json!(null)));
    // The counters are at other times than the entries now; questions changed nothing.
    assert_eq!(house.ledger.verify().await.expect("a report"), verified);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_asked_of_usage_names_its_parameter() {
    let keys = Keys::of(Front::start().await).await;
    let now = keys.front.house.ledger.now_unix_ms().await.expect("a time") / 1000;
    let refused = [
        ("", "missing_required_parameter", "start_time"),
        ("start_time=yesterday", "invalid_type", "start_time"),
        ("start_time=-1", "out_of_range", "start_time"),
        ("start_time=1&start_time=2", "invalid_value", "start_time"),
        ("start_time=5&end_time=5", "out_of_range", "end_time"),
        ("start_time=5&end_time=4", "out_of_range", "end_time"),
        ("start_time=0&bucket_width=1w", "invalid_value", "bucket_width"),
        ("start_time=0&limit=0", "out_of_range", "limit"),
        ("start_time=0&bucket_width=1h&limit=169", "out_of_range", "limit"),
        ("start_time=0&group_by=user_id", "invalid_value", "group_by"),
        ("start_time=0&page=page_x", "invalid_value", "page"),
        ("start_time=0&page=page_7", "invalid_value", "page"),
        ("start_time=86400&page=page_0", "invalid_value", "page"),
        ("start_time=0&batch=true", "unknown_parameter", "batch"),
    ];
    for path in ["/v1/organization/usage/completions", "/v1/organization/costs"] {
        for (query, code, param) in refused {
            let path = format!("{path}?{query}");
            assert_error(keys.refused(&path, &keys.admin).await, 400, code, Some(param), &path).await;
        }
    }
    for (path, most) in [("usage/completions", 31), ("costs", 180)] {
        let path = |limit| format!("/v1/organization/{path}?start_time=0&limit={limit}");
        assert_eq!(keys.refused(&path(most), &keys.admin).await.status().as_u16(), 200);
        assert_error(
            keys.refused(&path(most + 1), &keys.admin).await,
            400,
            "out_of_range",
            Some("limit"),
            "a day more",
        )
        .await;
    }
    // Nothing is forgotten of whom there was not yet; of an old tenant, minutes of last week are.
    let minutes = format!("/v1/organization/usage/completions?start_time={}&bucket_width=1m", now - 7 * DAY);
    assert_eq!(keys.refused(&minutes, &keys.admin).await.status().as_u16(), 200);
    born(&keys.front.house, &keys.front.house.tenant, now - 30 * DAY).await;
    let why =
        assert_error(keys.refused(&minutes, &keys.admin).await, 400, "out_of_range", Some("start_time"), "old").await;
    assert!(why.contains("1m"), "{why}");
    // What is to come is empty.
    let page = keys.admin(&format!("/v1/organization/costs?start_time={}", now + DAY), "Costs").await;
    assert_eq!((&page["data"], &page["has_more"]), (&json!([]), &json!(false)));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_is_found_by_all_its_names_and_by_nobody_else() {
    let keys = Keys::of(Front::start().await).await;
    let house = &keys.front.house;
    let mut body = hello();
    body["request_id"] = json!("my-own-name");
    let waiting = keys.front.asking(&body);
    let claim = keys.front.claim().await;
    let request = claim.job.request.as_str().to_owned();
    let path = |id: &str| format!("/v1/generations/{id}");
    let running = keys.read(&path(&request), "Generation").await;
    assert_eq!(
        (&running["status"], &running["usage"], &running["entry"]),
        (&json!("running"), &json!(null), &json!(null))
    );
    assert_eq!(running["held_nano_usd"], house.balance().await.held.nano());
    assert_eq!((&running["model"], &running["key"]), (&json!(MODEL), &json!(house.principal.key.as_str())));
    keys.front.answer(&claim, &["a", "b"], FinishReason::Stop).await;
    let answer: Value = waiting.await.expect("an answer").json().await.expect("JSON");
    let bare = request.trim_start_matches("chatcmpl-");
    let refund = Refund {
        request: claim.job.request.clone(),
        amount: NanoUsd::new(100),
        reference: "sorry".into(),
        note: String::new(),
    };
    house.ledger.refund(&house.tenant, &refund).await.expect("refunded");
    let post = house.ledger.last_entries(&house.tenant, 2).await.expect("entries").remove(0);
    let wire_id = answer["id"].as_str().expect("an id");
    for id in [request.as_str(), bare, &format!("resp_{bare}"), &format!("cmpl-{bare}"), "my-own-name", wire_id] {
        let cost = keys.read(&path(id), "Generation").await;
        assert_eq!(
            (&cost["id"], &cost["status"], &cost["reason"]),
            (&json!(request), &json!("charged"), &json!("stop"))
        );
        let usage = &answer["usage"];
        assert_eq!(cost["usage"]["prompt_tokens"], usage["prompt_tokens"]);
        assert_eq!(cost["usage"]["completion_tokens"], 2);
        let prompt = usage["prompt_tokens"].as_i64().expect("a count");
        assert_eq!(cost["amount_nano_usd"], prompt * 200 + 2 * 300);
        assert_eq!(cost["amount_usd"], house.balance().await.charged.to_string());
        assert_eq!((&cost["refunded_nano_usd"], &cost["held_nano_usd"]), (&json!(100), &json!(0)));
        assert_eq!((&cost["price"]["output_nano_usd"], &cost["price_version"]), (&json!(300), &json!("2026-11")));
        assert_eq!(cost["entry"], json!({ "number": post.seq, "link": post.link }));
    }
    let free = house.admit(10, 10).await.expect("admitted");
    house.ledger.release(&house.tenant, free.request(), ReleaseReason::Draining).await.expect("released");
    let free = keys.read(&path(free.request().as_str()), "Generation").await;
    assert_eq!(
        (&free["status"], &free["reason"], &free["amount_nano_usd"]),
        (&json!("released"), &json!("draining"), &json!(0))
    );

    let other = house.another(1_000).await;
    let stranger =
        house.accounts.create_key(&other.tenant, "read", [Scope::Read].into_iter().collect()).await.expect("a key");
    for id in [request.as_str(), "my-own-name"] {
        assert_error(keys.refused(&path(id), &stranger.secret).await, 404, "not_found", Some("id"), "a stranger").await;
    }
    for id in ["chatcmpl-x", "grant%20opening", "%00", "refundable%20x"] {
        assert_error(keys.refused(&path(id), &keys.read).await, 404, "not_found", Some("id"), id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_comes_as_json_as_a_table_and_as_a_page() {
    let keys = Keys::of(Front::start().await).await;
    let house = &keys.front.house;
    served(&keys.front, &hello()).await;
    let (month, before) = (month_before(house, 0).await, month_before(house, 1).await);
    let at = |format: &str| format!("/v1/statements/{month}{format}");
    let whole = keys.read(&at(""), "Statement").await;
    assert_eq!(whole, keys.read(&at("?format=json"), "Statement").await);
    let money = house.balance().await;
    assert_eq!(whole["closing"]["balance_nano_usd"], money.balance.nano());
    assert_eq!(whole["totals"]["charged_nano_usd"], money.charged.nano());
    assert_eq!(
        (&whole["month"], &whole["is_complete"], &whole["last_entry"]),
        (&json!(month.to_string()), &json!(false), &json!(3))
    );

    let table = keys.refused(&at("?format=csv"), &keys.read).await;
    assert_eq!(table.headers()["content-type"], "text/csv; charset=utf-8");
    let name = format!("attachment; filename=\"statement-{month}.csv\"");
    assert_eq!(table.headers()["content-disposition"], name.as_str());
    assert!(table.text().await.expect("a body").starts_with("kind,date,entry,"));
    let page = keys.refused(&at("?format=html"), &keys.read).await;
    assert_eq!(page.headers()["content-type"], "text/html; charset=utf-8");
    assert!(page.headers()["content-security-policy"].to_str().expect("text").starts_with("default-src 'none'"));
    assert!(page.text().await.expect("a body").contains(&money.charged.to_string()));

    for bad in ["2026", "2026-13", "november", "1969-12", "2026-11-01"] {
        let path = format!("/v1/statements/{bad}");
        assert_error(keys.refused(&path, &keys.read).await, 400, "invalid_value", Some("month"), bad).await;
    }
    assert_error(keys.refused(&at("?format=pdf"), &keys.read).await, 400, "invalid_value", Some("format"), "pdf").await;
    assert_error(keys.refused(&at("?page=2"), &keys.read).await, 400, "unknown_parameter", Some("page"), "page").await;
    for none in [before.to_string(), "9999-12".to_owned()] {
        let path = format!("/v1/statements/{none}");
        let why = assert_error(keys.refused(&path, &keys.read).await, 404, "not_found", Some("month"), &none).await;
        assert!(why.contains(&month.to_string()), "{why}");
    }
    // As if the account were a month older.
    let times = [before.begins_unix_ms(), before.begins_unix_ms() + 1, month.begins_unix_ms()];
    date_entries(house, &house.tenant, &times).await;
    let first = keys.read(&format!("/v1/statements/{before}"), "Statement").await;
    let second = keys.read(&at(""), "Statement").await;
    assert_eq!((&first["closing"], &first["is_complete"]), (&second["opening"], &json!(true)));
    // Another tenant's month is its own.
    let other = house.another(1_000).await;
    let stranger =
        house.accounts.create_key(&other.tenant, "read", [Scope::Read].into_iter().collect()).await.expect("a key");
    let theirs = keys.json(keys.request(&at(""), &stranger.secret), "Statement").await;
    assert_eq!(
        (&theirs["tenant"], &theirs["closing"]["balance_nano_usd"]),
        (&json!(other.tenant.as_str()), &json!(1_000))
    );
}
