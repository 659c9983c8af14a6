//! Everything that a client can get wrong, and everything that can be in the way: each has its own clear
//! answer, and costs nothing.

use std::time::{Duration, Instant};

use lightcone::admission::Scope;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::front::{Front, assert_error, assert_named, hello, settings};

/// A body, and the error that it gets.
struct Bad {
    body: Vec<u8>,
    status: u16,
    code: &'static str,
    param: Option<&'static str>,
}

fn bad(body: impl Into<Vec<u8>>, code: &'static str, param: Option<&'static str>) -> Bad {
    Bad { body: body.into(), status: 400, code, param }
}

/// `hello` with `field` set.
fn with(field: &str, value: Value) -> String {
    let mut body = hello();
    body[field] = value;
    body.to_string()
}

fn messages(messages: Value) -> String {
    json!({ "messages": messages }).to_string()
}

fn user(content: Value) -> String {
    messages(json!([{ "role": "user", "content": content }]))
}

#[rustfmt::skip]
fn bad_bodies() -> Vec<Bad> {
    let deep = format!("{{\"messages\":{}", "[".repeat(30_000));
    let deep_object = format!("{{\"metadata\":{}1{}}}", "{\"a\":".repeat(3_000), "}".repeat(3_000));
    let text = |text: &str| json!({ "type": "text", "text": text });
    vec![
        // Not JSON, or not a request.
        bad("", "invalid_json", None),
        bad("{", "invalid_json", None),
        bad("not json", "invalid_json", None),
        bad("[]", "invalid_json", None),
        bad("null", "invalid_json", None),
        bad("\"text\"", "invalid_json", None),
        bad(r#"{"messages": [}"#, "invalid_json", None),
        bad(r#"{"messages": []} trailing"#, "invalid_json", None),
        bad(r#"{"stream": true, "stream": false}"#, "invalid_json", None),
        bad(r#"{"temperature": NaN}"#, "invalid_json", None),
        bad(r#"{"temperature": 1e999}"#, "invalid_json", None),
        bad(r#"{"model": "\ud800"}"#, "invalid_json", None),
        bad(b"{\"model\": \"\xff\xfe\"}".to_vec(), "invalid_json", None),
        bad(deep, "invalid_json", None),
        bad(deep_object, "invalid_json", None),
        // The model.
        bad(with("model", json!("")), "invalid_value", Some("model")),
        bad(with("model", json!(7)), "invalid_type", Some("model")),
        Bad { status: 404, ..bad(with("model", json!("gpt-9")), "model_not_found", Some("model")) },
        Bad { status: 404, ..bad(with("model", json!("x".repeat(10_000))), "model_not_found", Some("model")) },
        // Messages.
        bad("{}", "missing_required_parameter", Some("messages")),
        bad(messages(json!(null)), "missing_required_parameter", Some("messages")),
        bad(messages(json!([])), "empty_array", Some("messages")),
        bad(messages(json!({})), "invalid_type", Some("messages")),
        bad(messages(json!("hi")), "invalid_type", Some("messages")),
        bad(messages(json!(["hi"])), "invalid_type", Some("messages[0]")),
        bad(messages(json!(vec![hello()["messages"][0].clone(); 9])), "array_above_max_length", Some("messages")),
        bad(messages(json!([{"content": "x"}])), "missing_required_parameter", Some("messages[0].role")),
        bad(messages(json!([{"role": 1, "content": "x"}])), "invalid_type", Some("messages[0].role")),
        bad(messages(json!([{"role": "pope", "content": "x"}])), "invalid_value", Some("messages[0].role")),
        bad(messages(json!([{"role": "tool", "content": "x", "tool_call_id": "1"}])), "invalid_value", Some("messages[0].tool_call_id")),
        bad(messages(json!([{"role": "user"}])), "missing_required_parameter", Some("messages[0].content")),
        bad(user(json!(null)), "missing_required_parameter", Some("messages[0].content")),
        bad(user(json!(5)), "invalid_type", Some("messages[0].content")),
        bad(user(json!({})), "invalid_type", Some("messages[0].content")),
        bad(user(json!([])), "empty_array", Some("messages[0].content")),
        bad(user(json!(["x"])), "invalid_type", Some("messages[0].content[0]")),
        bad(user(json!([{"text": "x"}])), "missing_required_parameter", Some("messages[0].content[0].type")),
        bad(user(json!([{"type": 1}])), "invalid_type", Some("messages[0].content[0].type")),
        bad(user(json!([{"type": "smell"}])), "invalid_value", Some("messages[0].content[0].type")),
        bad(user(json!([text("a"), {"type": "text"}])), "missing_required_parameter", Some("messages[0].content[1].text")),
        bad(user(json!([text("a"), {"type": "text", "text": 1}])), "invalid_type", Some("messages[0].content[1].text")),
        bad(user(json!([{"type": "image_url", "image_url": {"url": "x"}}])), "unsupported_value", Some("messages[0].content[0].type")),
        bad(user(json!([{"type": "input_audio"}])), "unsupported_value", Some("messages[0].content[0].type")),
        bad(messages(json!([hello()["messages"][0], {"role": "user", "content": 1}])), "invalid_type", Some("messages[1].content")),
        bad(messages(json!([{"role": "user", "content": "x", "name": 1}])), "invalid_type", Some("messages[0].name")),
        bad(messages(json!([{"role": "user", "content": "x", "name": "n".repeat(300)}])), "string_above_max_length", Some("messages[0].name")),
        bad(messages(json!([{"role": "assistant", "content": null, "tool_calls": [{}]}])), "missing_required_parameter", Some("messages[0].tool_calls[0].id")),
        bad(user(json!("word ".repeat(200))), "context_length_exceeded", Some("messages")),
        bad(user(json!("word ".repeat(10_000))), "context_length_exceeded", Some("messages")),
        // Parameters.
        bad(with("max_tokens", json!(0)), "integer_below_min_value", Some("max_tokens")),
        bad(with("max_tokens", json!(-1)), "integer_below_min_value", Some("max_tokens")),
        bad(with("max_tokens", json!(1.5)), "invalid_type", Some("max_tokens")),
        bad(with("max_tokens", json!(513)), "context_length_exceeded", Some("max_tokens")),
        bad(with("max_completion_tokens", json!(u64::MAX)), "context_length_exceeded", Some("max_completion_tokens")),
        bad(with("max_completion_tokens", json!("9")), "invalid_type", Some("max_completion_tokens")),
        bad(with("temperature", json!(2.1)), "out_of_range", Some("temperature")),
        bad(with("temperature", json!(-0.1)), "out_of_range", Some("temperature")),
        bad(with("temperature", json!("hot")), "invalid_type", Some("temperature")),
        bad(with("temperature", json!(true)), "invalid_type", Some("temperature")),
        bad(with("top_p", json!(1.01)), "out_of_range", Some("top_p")),
        bad(with("top_k", json!(-2)), "out_of_range", Some("top_k")),
        bad(with("top_k", json!(0.5)), "invalid_type", Some("top_k")),
        bad(with("min_p", json!(-1)), "out_of_range", Some("min_p")),
        bad(with("seed", json!("lucky")), "invalid_type", Some("seed")),
        bad(with("seed", json!(18_446_744_073_709_551_615_u64)), "out_of_range", Some("seed")),
        bad(with("stop", json!(1)), "invalid_type", Some("stop")),
        bad(with("stop", json!("")), "invalid_value", Some("stop")),
        bad(with("stop", json!("x".repeat(2_000))), "invalid_value", Some("stop")),
        bad(with("stop", json!(["a", 1])), "invalid_type", Some("stop[1]")),
        bad(with("stop", json!(["a", ""])), "invalid_value", Some("stop[1]")),
        bad(with("stop", json!(["a", "b", "c", "d", "e"])), "array_above_max_length", Some("stop")),
        bad(with("stop", json!(vec!["x"; 10_000])), "array_above_max_length", Some("stop")),
        bad(with("cache_salt", json!(1)), "invalid_type", Some("cache_salt")),
        bad(with("cache_salt", json!("x".repeat(300))), "string_above_max_length", Some("cache_salt")),
        bad(with("stream", json!("yes")), "invalid_type", Some("stream")),
        bad(with("stream_options", json!({"include_usage": true})), "invalid_value", Some("stream_options")),
        bad(with("ignore_eos", json!(1)), "invalid_type", Some("ignore_eos")),
        bad(json!({"stream": true, "stream_options": true, "messages": []}).to_string(), "invalid_type", Some("stream_options")),
        bad(json!({"stream": true, "stream_options": {"include_usage": 1}, "messages": []}).to_string(), "invalid_type", Some("stream_options.include_usage")),
        bad(json!({"stream": true, "stream_options": {"continuous_usage_stats": 1}, "messages": []}).to_string(), "invalid_type", Some("stream_options.continuous_usage_stats")),
        // Known and not there.
        bad(with("n", json!(5)), "out_of_range", Some("n")),
        bad(with("n", json!(0)), "out_of_range", Some("n")),
        bad(with("n", json!("2")), "invalid_type", Some("n")),
        bad(with("presence_penalty", json!(2.5)), "out_of_range", Some("presence_penalty")),
        bad(with("frequency_penalty", json!("x")), "invalid_type", Some("frequency_penalty")),
        bad(with("repetition_penalty", json!(0)), "out_of_range", Some("repetition_penalty")),
        bad(with("logit_bias", json!({"1": 101})), "out_of_range", Some("logit_bias.1")),
        bad(with("logit_bias", json!({"x": 1})), "invalid_value", Some("logit_bias")),
        bad(with("logit_bias", json!({"1001": 1})), "out_of_range", Some("logit_bias")),
        bad(with("logit_bias", json!([1])), "invalid_type", Some("logit_bias")),
        bad(with("logit_bias", json!({"+5": 1})), "invalid_value", Some("logit_bias")),
        bad(with("logit_bias", json!({"x": null})), "invalid_value", Some("logit_bias")),
        bad(with("logit_bias", json!({"998944234531687957660": 1})), "out_of_range", Some("logit_bias")),
        bad(json!({"max_completion_tokens": 5, "max_tokens": 0, "messages": []}).to_string(), "integer_below_min_value", Some("max_tokens")),
        bad(with("seed", json!(1.5)), "invalid_type", Some("seed")),
        bad(with("documents", json!([1])), "invalid_type", Some("documents[0]")),
        bad(with("structured_outputs", json!({"disable_any_whitespace": 1})), "invalid_type", Some("structured_outputs.disable_any_whitespace")),
        bad(with("function_call", json!({"name": "f"})), "invalid_value", Some("function_call")),
        bad(with("logprobs", json!(1)), "invalid_type", Some("logprobs")),
        bad(with("top_logprobs", json!(2)), "invalid_value", Some("top_logprobs")),
        bad(with("top_logprobs", json!(21)), "out_of_range", Some("top_logprobs")),
        bad(with("prompt_logprobs", json!(-1)), "out_of_range", Some("prompt_logprobs")),
        bad(json!({"stream": true, "prompt_logprobs": 1, "messages": []}).to_string(), "unsupported_value", Some("prompt_logprobs")),
        bad(with("min_tokens", json!(-1)), "out_of_range", Some("min_tokens")),
        bad(json!({"min_tokens": 9, "max_tokens": 8, "messages": []}).to_string(), "out_of_range", Some("min_tokens")),
        bad(with("stop_token_ids", json!([1001])), "out_of_range", Some("stop_token_ids[0]")),
        bad(with("stop_token_ids", json!(["1"])), "invalid_type", Some("stop_token_ids[0]")),
        bad(with("allowed_token_ids", json!([])), "empty_array", Some("allowed_token_ids")),
        bad(with("allowed_token_ids", json!([1, -1])), "out_of_range", Some("allowed_token_ids[1]")),
        bad(with("bad_words", json!("x")), "invalid_type", Some("bad_words")),
        bad(with("bad_words", json!([""])), "invalid_value", Some("bad_words[0]")),
        bad(with("truncate_prompt_tokens", json!(0)), "out_of_range", Some("truncate_prompt_tokens")),
        bad(with("request_id", json!("a b")), "invalid_value", Some("request_id")),
        bad(with("service_tier", json!("gold")), "invalid_value", Some("service_tier")),
        bad(with("echo", json!("yes")), "invalid_type", Some("echo")),
        bad(with("documents", json!({})), "invalid_type", Some("documents")),
        bad(with("chat_template_kwargs", json!([])), "invalid_type", Some("chat_template_kwargs")),
        // Tools.
        bad(with("tools", json!({})), "invalid_type", Some("tools")),
        bad(with("tools", json!([1])), "invalid_type", Some("tools[0]")),
        bad(with("tools", json!([{}])), "missing_required_parameter", Some("tools[0].type")),
        bad(with("tools", json!([{"type": "custom"}])), "unsupported_value", Some("tools[0].type")),
        bad(with("tools", json!([{"type": "function"}])), "missing_required_parameter", Some("tools[0].function")),
        bad(with("tools", json!([{"type": "function", "function": {}}])), "missing_required_parameter", Some("tools[0].function.name")),
        bad(with("tools", json!([{"type": "function", "function": {"name": "a b"}}])), "invalid_value", Some("tools[0].function.name")),
        bad(with("tools", json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}])), "invalid_schema", Some("tools[0].function.parameters")),
        bad(with("tools", json!([{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}])), "invalid_schema", Some("tools[0].function.parameters")),
        bad(with("tools", json!(vec![json!({"type": "function", "function": {"name": "f"}}); 2])), "invalid_value", Some("tools[1].function.name")),
        bad(with("tools", json!(vec![1; 129])), "array_above_max_length", Some("tools")),
        bad(with("tool_choice", json!("required")), "invalid_value", Some("tool_choice")),
        bad(with("functions", json!([{"name": ""}])), "invalid_value", Some("functions[0].name")),
        // The form of the answer.
        bad(with("response_format", json!("json")), "invalid_type", Some("response_format")),
        bad(with("response_format", json!({})), "missing_required_parameter", Some("response_format.type")),
        bad(with("response_format", json!({"type": "xml"})), "invalid_value", Some("response_format.type")),
        bad(with("response_format", json!({"type": "json_schema"})), "missing_required_parameter", Some("response_format.json_schema")),
        bad(with("response_format", json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}})), "invalid_schema", Some("response_format.json_schema.schema")),
        bad(with("response_format", json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}})), "invalid_schema", Some("response_format.json_schema.schema")),
        bad(with("structured_outputs", json!({"regex": "a", "choice": ["b"]})), "invalid_value", Some("structured_outputs")),
        bad(with("structured_outputs", json!({"choice": []})), "empty_array", Some("structured_outputs.choice")),
        bad(with("structured_outputs", json!({"regex": "("})), "invalid_schema", Some("structured_outputs.regex")),
        bad(with("structured_outputs", json!({"grammar": "root ::= x"})), "unsupported_value", Some("structured_outputs.grammar")),
        bad(with("structured_outputs", json!({"json": "{"})), "invalid_schema", Some("structured_outputs.json")),
        // Calls and their answers.
        bad(messages(json!([{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}])), "invalid_value", Some("messages[0].tool_calls")),
        bad(messages(json!([{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "b", "content": "x"}])), "invalid_value", Some("messages[1].tool_call_id")),
        bad(messages(json!([{"role": "function", "name": "f", "content": "x"}])), "invalid_value", Some("messages[0].name")),
        bad(messages(json!([{"role": "tool", "content": "x"}])), "missing_required_parameter", Some("messages[0].tool_call_id")),
        bad(with("audio", json!({"voice": "x"})), "unsupported_value", Some("audio")),
        bad(with("chat_template", json!("{{ 1 }}")), "unsupported_value", Some("chat_template")),
        bad(with("user", json!(["me"])), "invalid_type", Some("user")),
        bad(with("metadata", json!({"k": 1})), "invalid_type", Some("metadata")),
        // Too much.
        Bad { status: 413, ..bad(user(json!("x".repeat(70_000))), "request_too_large", None) },
        Bad { status: 413, ..bad(user(json!("x".repeat(5_000_000))), "request_too_large", None) },
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_body_gets_its_own_clear_error_and_costs_nothing() {
    let front = Front::start().await;
    for (i, case) in bad_bodies().into_iter().enumerate() {
        let start: String = String::from_utf8_lossy(&case.body).chars().take(120).collect();
        let context = format!("case {i}: {start}");
        let answer = front.post(case.body).send().await.unwrap_or_else(|error| panic!("{context}: {error:?}"));
        let message = assert_error(answer, case.status, case.code, case.param, &context).await;
        assert!(!message.is_empty() && message.len() < 400, "{context}: {message}");
        if case.code == "context_length_exceeded" {
            assert!(message.contains("512 tokens") && message.matches("tokens").count() == 2, "{message}");
            assert!(message.contains("maximum context length is 512 tokens"), "{message}");
        }
    }
    front.assert_nothing_happened("after all of them").await;
    let refused = front.metrics.render();
    assert!(refused.contains(r#"lightcone_refusals_total{reason="invalid_json"}"#), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_json_is_refused_with_its_place() {
    let front = Front::start().await;
    let answer = front.post("{\n  \"messages\": [}\n").send().await.unwrap();
    let message = assert_error(answer, 400, "invalid_json", None, "malformed").await;
    assert!(message.contains("line 2 column 16"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_needed_for_all_that_costs_or_tells() {
    let front = Front::start().await;
    let admin = [Scope::Admin].into_iter().collect();
    let admin = front.house.accounts.create_key(&front.house.tenant, "admin", admin).await.unwrap().secret;
    let chat = || front.http.post(format!("{}/chat/completions", front.url)).json(&hello());
    let list = || front.http.get(format!("{}/v1/models", front.url));
    let big = || chat().body("x".repeat(3_000_000));
    for (context, request, status, code) in [
        ("no key", chat(), 401, "invalid_api_key"),
        ("no key, large body", big(), 401, "invalid_api_key"),
        ("wrong scheme", chat().basic_auth("sk_1", None::<&str>), 401, "invalid_api_key"),
        ("empty key", chat().header("authorization", "Bearer "), 401, "invalid_api_key"),
        ("bad key", chat().bearer_auth("sk_bad"), 401, "invalid_api_key"),
        ("not a key of ours", chat().bearer_auth("xyz"), 401, "invalid_api_key"),
        ("not ASCII", chat().header("authorization", b"Bearer sk_\xff".as_slice()), 401, "invalid_api_key"),
        ("two keys", chat().bearer_auth(&front.house.secret).bearer_auth("sk_1"), 401, "invalid_api_key"),
        ("operator's key", chat().bearer_auth(&admin), 403, "permission_denied"),
        ("models, no key", list(), 401, "invalid_api_key"),
        ("models, bad key", list().bearer_auth("sk_bad"), 401, "invalid_api_key"),
    ] {
        let answer = request.send().await.unwrap_or_else(|error| panic!("{context}: {error:?}"));
        let message = assert_error(answer, status, code, None, context).await;
        assert!(!message.contains("sk_bad"), "a key is never repeated: {message}");
    }
    front.assert_nothing_happened("without a key").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_paths_methods_and_content_types_are_told_apart() {
    let front = Front::start().await;
    let url = |path: &str| format!("{}{path}", front.url);
    for path in ["/", "/v1", "/v1/chat", "/v1/chat/completions/x/y", "/v2/models", "/%ff"] {
        let answer = front.http.get(url(path)).send().await.unwrap();
        let message = assert_error(answer, 404, "not_found", None, path).await;
        assert!(message.contains("GET"), "{message}");
    }
    for (method, path, allow) in [
        ("PUT", "/v1/chat/completions", "GET, POST"),
        ("PUT", "/chat/completions", "GET, POST"),
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/models/x", "GET"),
        ("POST", "/metrics", "GET, HEAD"),
    ] {
        let answer = front.http.request(method.parse().unwrap(), url(path)).send().await.unwrap();
        assert_eq!(answer.headers()["allow"], allow);
        assert_error(answer, 405, "method_not_allowed", None, path).await;
    }
    for (header, value) in [
        ("content-type", "text/plain"),
        ("content-type", "application/x-www-form-urlencoded"),
        ("content-type", "application/jsonx"),
        ("content-encoding", "gzip"),
    ] {
        let request = front.http.post(url("/v1/chat/completions")).bearer_auth(&front.house.secret);
        let answer = request.header(header, value).body(hello().to_string()).send().await.unwrap();
        assert_error(answer, 415, "unsupported_media_type", None, value).await;
    }
    front.assert_nothing_happened("wrong doors").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_half_sent_bodies_hold_nobody_up_and_end_by_themselves() {
    let front = Front::with(lightcone::config::Edge { body_ms_max: 300, ..settings() }, 8, 1_000_000_000).await;
    let address = front.edge.as_ref().unwrap().address;
    let mut halves = Vec::new();
    for _ in 0..30 {
        let mut half = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: 1000\r\n\r\n{{\"messages\":",
            front.house.secret
        );
        half.write_all(head.as_bytes()).await.unwrap();
        halves.push(half);
    }
    let answer = front.get("/v1/models").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    for mut half in halves {
        let mut answer = Vec::new();
        tokio::time::timeout(Duration::from_secs(10), half.read_to_end(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!(answer.contains("request_timeout") && answer.contains("x-request-id"), "{answer}");
    }
    // One that breaks off is not worth an answer, and leaves nothing behind.
    let mut broken = TcpStream::connect(address).await.unwrap();
    broken.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{").await.unwrap();
    drop(broken);
    front.assert_nothing_happened("half-sent bodies").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_pay_is_told_not_to_try_again() {
    // Less than five tokens of the prompt.
    let front = Front::with(settings(), 8, 999).await;
    let answer = front.ask(&hello()).send().await.unwrap();
    assert_eq!(answer.headers()["x-should-retry"], "false");
    assert_error(answer, 402, "insufficient_quota", None, "poor").await;
    front.assert_nothing_happened("poor").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_a_429_that_says_when_to_come_back() {
    // A queue keeps a part of its depth for other tenants, so how many fit is its own affair.
    let front = Front::with(settings(), 3, 1_000_000_000).await;
    let waiting: Vec<_> = (0..4).map(|_| front.asking(&hello())).collect();
    // One of them finds the queue full, whichever comes last.
    let (refused, _, waiting) = futures::future::select_all(waiting).await;
    let refused = refused.unwrap();
    assert!(refused.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    assert!(refused.headers()["retry-after-ms"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    assert_error(refused, 429, "overloaded", None, "full").await;
    for task in waiting {
        task.abort();
    }
    front.nothing_held().await;
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tokeniser_that_panics_is_our_fault_and_the_next_request_is_served() {
    let front = Front::start().await;
    let body = json!({ "messages": [{ "role": "user", "content": "<<panic in the tokeniser>>" }] });
    let answer = front.ask(&body).send().await.unwrap();
    let message = assert_error(answer, 500, "server_error", None, "panic").await;
    assert!(!message.contains("panic"), "the client learns no inside story: {message}");
    front.assert_nothing_happened("panic").await;
    assert_error(front.post("{").send().await.unwrap(), 400, "invalid_json", None, "next").await;
    let waiting = front.asking(&hello());
    let claim = front.claim().await;
    front.answer(&claim, &["ok"], lightcone::domain::FinishReason::Stop).await;
    assert_eq!(waiting.await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_store_the_edge_refuses_and_says_so_and_recovers() {
    let mut front = Front::start().await;
    assert_eq!(front.get("/readyz").send().await.unwrap().status(), 200);
    front.house.valkey.kill();
    // The key may still be known for a moment; either way nothing is let through.
    let answer = front.ask(&hello()).send().await.unwrap();
    assert!(answer.headers().contains_key("retry-after"));
    assert_error(answer, 503, "service_unavailable", None, "store away").await;
    let ready = front.get("/readyz").send().await.unwrap();
    assert_named(&ready, "readyz");
    assert_eq!(ready.status(), 503);
    assert_eq!(ready.json::<Value>().await.unwrap()["reasons"], json!(["store away"]));
    assert_eq!(front.get("/healthz").send().await.unwrap().status(), 200);
    assert_eq!(front.get("/metrics").send().await.unwrap().status(), 200);
    front.house.valkey.restart();
    let started = Instant::now();
    while front.get("/readyz").send().await.unwrap().status() != 200 {
        assert!(started.elapsed() < Duration::from_secs(20), "never ready again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    front.assert_nothing_happened("outage").await;
}
