//! `/openapi.json` says what the server does: paths, methods, bounds and the forms of errors are tried out as they stand
//! in the document, so that a wrong word in either fails. tests/openapi does the same at random.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::front::{CONTEXT, Front, settings};

const METHODS: [&str; 6] = ["GET", "HEAD", "POST", "DELETE", "PUT", "PATCH"];

async fn document(front: &Front) -> Value {
    let answer = front.http.get(format!("{}/openapi.json", front.url)).send().await.expect("an answer");
    assert_eq!(answer.headers()["content-type"], "application/json");
    serde_json::from_str(&answer.text().await.expect("a body")).expect("JSON")
}

fn schema(document: &Value, name: &str) -> jsonschema::Validator {
    let reference = format!("#/components/schemas/{name}");
    let whole = json!({ "$ref": reference, "components": document["components"] });
    jsonschema::validator_for(&whole).expect("a schema")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_documented_path_is_served_with_its_methods_and_no_others() {
    let front = Front::start().await;
    let document = document(&front).await;
    let paths = document["paths"].as_object().expect("paths");
    assert!(paths.len() >= 16, "{}", paths.len());
    for (path, item) in paths {
        let documented: Vec<&str> =
            METHODS.into_iter().filter(|method| item.get(method.to_ascii_lowercase()).is_some()).collect();
        let bare = path.strip_prefix("/v1");
        for at in std::iter::once(path.as_str()).chain(bare) {
            for method in METHODS {
                let url = format!("{}{}", front.url, at.replace("{id}", "x"));
                let request = front.http.request(Method::from_bytes(method.as_bytes()).expect("a method"), url);
                let answer = request.bearer_auth(&front.house.secret).send().await.expect("an answer");
                let (status, allow) = (answer.status().as_u16(), answer.headers().get("allow").cloned());
                let text = answer.text().await.expect("a body");
                if documented.contains(&method) {
                    assert_ne!(status, 405, "{method} {at}");
                    assert!(!text.contains("Unknown request URL"), "{method} {at}: {text}");
                    let known = item[method.to_ascii_lowercase()]["responses"].get(status.to_string());
                    assert!(known.is_some(), "{method} {at}: {status} is not documented");
                } else {
                    assert_eq!(status, 405, "{method} {at}: {text}");
                    assert_eq!(allow.expect("allow"), documented.join(", "), "{at}");
                }
            }
        }
    }
    for unknown in ["/", "/v1", "/v1/healthz", "/v1/files", "/docs/x"] {
        let answer = front.get(unknown).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 404, "{unknown}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_have_the_documented_form_or_that_of_rfc_9457_where_it_is_accepted() {
    let front = Front::start().await;
    let document = document(&front).await;
    let (error, problem) = (schema(&document, "Error"), schema(&document, "Problem"));
    let post = |path: &str, body: &'static str| front.http.post(format!("{}{path}", front.url)).body(body);
    let key = &front.house.secret;
    let requests = [
        (400, post("/v1/chat/completions", "{}").bearer_auth(key)),
        (400, front.get("/v1/chat/completions?limit=x")),
        (400, front.get("/v1/chat/completions?limit=101")),
        (401, post("/v1/responses", "{}")),
        (404, front.get("/v1/models/x")),
        (405, post("/v1/models", "")),
        (415, post("/v1/tokenize", "{}").bearer_auth(key).header("content-type", "text/plain")),
    ];
    for (status, request) in requests {
        let plain = request.try_clone().expect("a request").send().await.expect("an answer");
        assert_eq!(
            (plain.status().as_u16(), &plain.headers()["content-type"].as_bytes()[..16]),
            (status, &b"application/json"[..])
        );
        assert_eq!(plain.headers().contains_key("www-authenticate"), status == 401);
        let plain: Value = serde_json::from_str(&plain.text().await.expect("a body")).expect("JSON");
        assert!(error.is_valid(&plain), "{plain}");
        let other = request.header("accept", "application/problem+json").send().await.expect("an answer");
        assert_eq!(
            (other.status().as_u16(), other.headers()["content-type"].as_bytes()),
            (status, &b"application/problem+json"[..])
        );
        let other: Value = serde_json::from_str(&other.text().await.expect("a body")).expect("JSON");
        assert!(problem.is_valid(&other) && other["status"] == status, "{other}");
        assert_eq!((&other["detail"], &other["code"]), (&plain["error"]["message"], &plain["error"]["code"]));
    }
}

/// A value at a bound, and one just beyond it, as JSON.
struct Edge {
    within: String,
    beyond: String,
}

/// Every bound that a schema states, tried from both sides. What it refers to is not followed.
fn edges(schema: &Value) -> Vec<Edge> {
    let mut all = Vec::new();
    let mut edge = |within: String, beyond: String| all.push(Edge { within, beyond });
    let whole =
        schema["type"] == "integer" || schema["type"].as_array().is_some_and(|all| all.contains(&json!("integer")));
    let next = |bound: &Value, up: bool| match (bound.as_i64().filter(|_| whole), up) {
        (Some(bound), true) => (i128::from(bound) + 1).to_string(),
        (Some(bound), false) => (i128::from(bound) - 1).to_string(),
        (None, true) => format!("{:e}", bound.as_f64().expect("a number").next_up()),
        (None, false) => format!("{:e}", bound.as_f64().expect("a number").next_down()),
    };
    let given = |name: &str| Some(&schema[name]).filter(|bound| !bound.is_null());
    let count = |name: &str| given(name).and_then(Value::as_u64).map(|count| usize::try_from(count).expect("small"));
    if let Some(bound) = given("minimum") {
        edge(bound.to_string(), next(bound, false));
    }
    if let Some(bound) = given("exclusiveMinimum") {
        edge(next(bound, true), bound.to_string());
    }
    if let Some(bound) = given("maximum") {
        edge(bound.to_string(), next(bound, true));
    }
    if let Some(value) = schema["not"].get("const") {
        edge((value.as_i64().expect("an integer") + 1).to_string(), value.to_string());
    }
    // Characters of more than a byte, for it is characters that count.
    let text = |count: usize| json!("é".repeat(count)).to_string();
    if let Some(least) = count("minLength") {
        edge(text(least), text(least - 1));
    }
    if let Some(most) = count("maxLength") {
        edge(text(most), text(most + 1));
    }
    let items =
        |count: usize| format!("[{}]", (0..count).map(|i| sample(&schema["items"], i)).collect::<Vec<_>>().join(","));
    if let Some(least) = count("minItems") {
        edge(items(least), items(least - 1));
    }
    if let Some(most) = count("maxItems") {
        edge(items(most), items(most + 1));
    }
    let inner = &schema["additionalProperties"];
    let pairs = |count: usize| {
        // With zeros in front, there are as many names as one likes for few tokens.
        let pair = |i: usize| format!("\"{:0width$}\":{}", i % 100, sample(inner, i), width = 2 + i / 100);
        format!("{{{}}}", (0..count).map(pair).collect::<Vec<_>>().join(","))
    };
    if let Some(most) = count("maxProperties") {
        edge(pairs(most), pairs(most + 1));
    }
    if let Some(most) = schema["propertyNames"]["maxLength"].as_u64() {
        let named = |length: u64| format!("{{{}:\"\"}}", text(usize::try_from(length).expect("small")));
        edge(named(most), named(most + 1));
    }
    let wrapped = |edges: Vec<Edge>, left: &str, right: &str| -> Vec<Edge> {
        let wrap = |value: String| format!("{left}{value}{right}");
        edges.into_iter().map(|Edge { within, beyond }| Edge { within: wrap(within), beyond: wrap(beyond) }).collect()
    };
    all.extend(wrapped(edges_of(&schema["items"]), "[", "]"));
    all.extend(wrapped(edges_of(inner), "{\"7\":", "}"));
    all.extend(schema["anyOf"].as_array().into_iter().flatten().flat_map(edges));
    all
}

fn edges_of(schema: &Value) -> Vec<Edge> {
    if schema.is_object() { edges(schema) } else { Vec::new() }
}

/// Something that the schema allows; the `i`-th of several that must differ.
fn sample(schema: &Value, i: usize) -> String {
    match schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) {
        Some("Message") => return json!({ "role": "user", "content": "x" }).to_string(),
        Some("Tool") => return json!({ "type": "function", "function": { "name": format!("f{i}") } }).to_string(),
        Some("Function") => return json!({ "name": format!("f{i}") }).to_string(),
        Some(other) => panic!("no sample of {other}"),
        None => {}
    }
    if !schema["const"].is_null() {
        return schema["const"].to_string();
    }
    let kind = schema["type"].as_array().map_or(&schema["type"], |kinds| &kinds[0]);
    match kind.as_str() {
        Some("integer" | "number") => "1".to_owned(),
        Some("string") => "\"x\"".to_owned(),
        Some("object") => "{}".to_owned(),
        // Of no type: anything will do.
        None => "1".to_owned(),
        other => panic!("no sample of {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_bound_of_a_chat_request_holds_on_both_sides() {
    let settings = lightcone::config::Edge { body_bytes_max: 1 << 20, ..settings() };
    // Whoever can pay for nothing learns that his request is a good one, and no worker is needed.
    let front = Front::with(settings, 8, 1).await;
    let document = document(&front).await;
    let fields = &document["components"]["schemas"]["ChatRequest"]["properties"];
    let mut tried = Vec::new();
    for (name, schema) in fields.as_object().expect("fields") {
        for Edge { within, beyond } in edges(schema) {
            let body = |value: &str| {
                let messages = if name == "messages" { "" } else { r#""messages":[{"role":"user","content":"x"}],"# };
                // What this one needs beside it.
                let beside = match name.as_str() {
                    "top_logprobs" => r#""logprobs":true,"#,
                    // So that the model is not told of as many as there may be.
                    "tools" => r#""tool_choice":"none","#,
                    "functions" => r#""function_call":"none","#,
                    _ => "",
                };
                format!("{{{messages}{beside}\"{name}\":{value}}}")
            };
            let good = front.post(body(&within)).send().await.expect("an answer");
            let (status, text) = (good.status().as_u16(), good.text().await.expect("a body"));
            assert_eq!(status, 402, "{name} at its bound, {within:.80}: {text}");
            let bad = front.post(body(&beyond)).send().await.expect("an answer");
            let (status, text) = (bad.status().as_u16(), bad.text().await.expect("a body"));
            assert_eq!(status, 400, "{name} beyond its bound, {beyond:.80}: {text}");
            let error: Value = serde_json::from_str(&text).expect("JSON");
            let param = error["error"]["param"].as_str().expect("a param");
            assert!(param.starts_with(name.as_str()), "{name}: {text}");
            tried.push(name.as_str());
        }
    }
    for (name, bounds) in [
        ("temperature", 2),
        ("top_p", 2),
        ("min_p", 2),
        ("top_k", 2),
        ("n", 2),
        ("seed", 2),
        ("priority", 2),
        ("frequency_penalty", 2),
        ("presence_penalty", 2),
        ("repetition_penalty", 2),
        ("max_tokens", 2),
        ("max_completion_tokens", 2),
        ("min_tokens", 2),
        ("top_logprobs", 2),
        ("prompt_logprobs", 2),
        ("truncate_prompt_tokens", 3),
        ("messages", 2),
        ("tools", 1),
        ("functions", 1),
        ("stop", 5),
        ("stop_token_ids", 3),
        ("allowed_token_ids", 4),
        ("bad_words", 3),
        ("logit_bias", 3),
        ("metadata", 3),
        ("cache_salt", 1),
        ("documents", 1),
        ("modalities", 1),
    ] {
        assert_eq!(tried.iter().filter(|field| **field == name).count(), bounds, "bounds of {name}");
    }
    assert_eq!(fields["max_tokens"]["maximum"], CONTEXT);
    front.assert_nothing_happened("refused").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_document_allows_is_taken_however_it_is_spelled() {
    let front = Front::with(settings(), 8, 1).await;
    let document = document(&front).await;
    let request = schema(&document, "ChatRequest");
    let user = json!({ "role": "user", "content": "x" });
    let call = json!({ "name": "f", "arguments": "" });
    for body in [
        json!({ "messages": [user], "max_tokens": 16.0, "seed": 1e3, "stop_token_ids": [7.0] }),
        json!({ "messages": [user], "repetition_penalty": 5e-324 }),
        json!({ "messages": [user], "logit_bias": { "7": null, "007": 1 } }),
        json!({ "messages": [user], "cache_salt": "é".repeat(256), "stop": "é".repeat(1024) }),
        json!({ "messages": [
            { "role": "assistant", "function_call": call, "tool_calls": [], "content": null },
            { "role": "function", "name": "f", "content": "x" },
        ] }),
    ] {
        assert!(request.is_valid(&body), "{body}");
        let answer = front.ask(&body).send().await.expect("an answer");
        let (status, text) = (answer.status().as_u16(), answer.text().await.expect("a body"));
        assert_eq!(status, 402, "{body}: {text}");
    }
}
