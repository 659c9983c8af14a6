//! What answers carry besides their bodies: limits, origins, encodings, other forms of errors.

use std::io::Read;

use lightcone::{
    admission::{LimitKind, Limits},
    config,
    domain::{EventBody, FinishReason, FundsEnd, Priority, StoppedBy},
};
use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::support::front::{Front, Furniture, OUTPUT_MAX, assert_error, hello, settings};

fn header<'a>(answer: &'a Response, name: &str) -> Option<&'a str> {
    answer.headers().get(name).map(|value| value.to_str().expect("text"))
}

async fn served(front: &Front, body: &Value) -> Response {
    let waiting = front.asking(body);
    let claim = front.claim().await;
    front.answer(&claim, &["ok"], FinishReason::Stop).await;
    let answer = waiting.await.expect("an answer");
    assert_eq!(answer.status(), 200);
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn every_admitted_answer_says_what_is_left_and_the_first_beyond_it_is_a_429() {
    let limits = Limits::default().with(LimitKind::RequestsPerMinute, 3).with(LimitKind::TokensPerMinute, 10_000);
    let front = Front::furnished(Furniture { limits, ..Furniture::default() }).await;
    let mut used = 0;
    for (index, stream) in [false, true, false].into_iter().enumerate() {
        let mut body = hello();
        body["stream"] = json!(stream);
        let waiting = front.asking(&body);
        let claim = front.claim().await;
        let prompt = u64::try_from(claim.job.prompt.len()).expect("short");
        front.answer(&claim, &["ok"], FinishReason::Stop).await;
        let answer = waiting.await.expect("an answer");
        assert_eq!(header(&answer, "x-ratelimit-limit-requests"), Some("3"));
        assert_eq!(header(&answer, "x-ratelimit-remaining-requests"), Some((2 - index).to_string().as_str()));
        assert_eq!(header(&answer, "x-ratelimit-limit-tokens"), Some("10000"));
        let left = 10_000 - used - prompt - u64::from(OUTPUT_MAX);
        assert_eq!(header(&answer, "x-ratelimit-remaining-tokens"), Some(left.to_string().as_str()));
        let reset = header(&answer, "x-ratelimit-reset-requests").expect("a time");
        assert!(reset.starts_with("1m0") || reset.starts_with("59") || reset.starts_with("1m1"), "{reset}");
        used += prompt + 1;
    }
    let answer = front.ask(&hello()).send().await.expect("an answer");
    assert_eq!(header(&answer, "x-ratelimit-remaining-requests"), Some("0"));
    let ms: u64 = header(&answer, "retry-after-ms").expect("a time").parse().expect("a number");
    assert!((50_000..=61_000).contains(&ms), "{ms}");
    let seconds: u64 = header(&answer, "retry-after").expect("a time").parse().expect("a number");
    assert_eq!(seconds, ms.div_ceil(1000));
    let message = assert_error(answer, 429, "rate_limit_exceeded", None, "beyond the limit").await;
    assert!(message.contains("3 requests per minute"), "{message}");
    // What costs nothing is not counted and says nothing.
    let models = front.get("/v1/models").send().await.expect("an answer");
    assert_eq!((models.status().as_u16(), header(&models, "x-ratelimit-limit-requests")), (200, None));
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_for_which_the_money_ran_out_says_so() {
    let front = Front::start().await;
    for (why, limited_by, stop_reason) in [
        (FundsEnd::Balance, "balance", "balance_exhausted"),
        (FundsEnd::SpendLimit, "spend_limit", "spend_limit_reached"),
    ] {
        for path in ["chat/completions", "completions", "responses"] {
            for stream in [false, true] {
                let mut body = match path {
                    "completions" => json!({ "prompt": "Hello" }),
                    "responses" => json!({ "input": "Hello" }),
                    _ => hello(),
                };
                body["stream"] = json!(stream);
                let ask = || {
                    let request = front.http.post(format!("{}/v1/{path}", front.url)).bearer_auth(&front.house.secret);
                    // Told again, it is the same.
                    request.header("idempotency-key", format!("{path} {stream} {limited_by}")).json(&body).send()
                };
                let waiting = tokio::spawn(ask());
                let claim = front.claim().await;
                let _ = front.deliver(&claim, 0, vec![EventBody::Accepted, EventBody::text("Hi", 1)]);
                let reason = FinishReason::Length;
                let usage = front.settle(&claim, 1, reason).await;
                let ended = EventBody::ChoiceEnded { choice: 0, reason, stopped_by: Some(StoppedBy::Funds(why)) };
                let _ = front.deliver(&claim, 2, vec![ended, EventBody::Finished { reason, usage }]);
                for answer in [waiting.await.expect("no panic"), ask().await] {
                    let answer = answer.expect("an answer");
                    assert_eq!(answer.status(), 200);
                    assert_eq!(header(&answer, "x-lightcone-limited-by"), (!stream).then_some(limited_by), "{path}");
                    let text = answer.text().await.expect("a body");
                    match path {
                        "responses" => assert!(text.contains(r#""reason":"max_output_tokens""#), "{text}"),
                        _ => {
                            assert!(text.contains(&format!(r#""stop_reason":"{stop_reason}""#)), "{text}");
                            assert!(text.contains(r#""finish_reason":"length""#), "{text}");
                        }
                    }
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_exceeds_the_limit_by_itself_is_not_worth_another_try() {
    let limits = Limits::default().with(LimitKind::TokensPerMinute, 150);
    let front = Front::furnished(Furniture { limits, ..Furniture::default() }).await;
    let answer = front.ask(&hello()).send().await.expect("an answer");
    assert_eq!((header(&answer, "x-should-retry"), header(&answer, "retry-after")), (Some("false"), None));
    assert_eq!(header(&answer, "x-ratelimit-limit-requests"), None);
    let message = assert_error(answer, 429, "rate_limit_exceeded", None, "too large").await;
    assert!(message.contains("max_completion_tokens"), "{message}");
    front.assert_nothing_happened("too large").await;
    let mut small = hello();
    small["max_completion_tokens"] = json!(4);
    served(&front, &small).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_served_above_the_highest_tier_and_the_answer_says_which() {
    for (max, asked, got) in [
        (Priority::Normal, json!({ "service_tier": "priority" }), "default"),
        (Priority::Normal, json!({ "priority": -1 }), "default"),
        (Priority::Normal, json!({ "service_tier": "flex" }), "flex"),
        (Priority::High, json!({ "service_tier": "priority" }), "priority"),
        (Priority::Low, json!({}), "flex"),
    ] {
        let front = Front::furnished(Furniture { priority_max: max, ..Furniture::default() }).await;
        let mut body = hello();
        body.as_object_mut().expect("an object").extend(asked.as_object().expect("an object").clone());
        let waiting = front.asking(&body);
        let claim = front.claim().await;
        assert!(claim.job.priority <= max);
        front.answer(&claim, &["ok"], FinishReason::Stop).await;
        let answer: Value = waiting.await.expect("an answer").json().await.expect("JSON");
        assert_eq!(answer["service_tier"], got, "{asked} up to {max:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_another_site_may_call_if_its_site_is_named() {
    let named = config::Edge { cors_origins: vec!["https://a.example".into()], ..settings() };
    for (settings, origin, allowed) in [
        (settings(), "https://b.example", Some("*")),
        (named.clone(), "https://a.example", Some("https://a.example")),
        (named, "https://b.example", None),
    ] {
        let front = Front::with(settings, 8, 1_000_000_000).await;
        let url = format!("{}/v1/chat/completions", front.url);
        let asked = front.http.request(Method::OPTIONS, &url).header("origin", origin);
        let asked = asked.header("access-control-request-method", "POST");
        let asked = asked.header("access-control-request-headers", "authorization,content-type,idempotency-key");
        let answer = asked.send().await.expect("an answer");
        assert_eq!(header(&answer, "access-control-allow-origin"), allowed, "{origin}");
        if allowed.is_none() {
            continue;
        }
        assert_eq!(answer.status().as_u16(), 200);
        assert!(header(&answer, "access-control-allow-methods").expect("methods").contains("POST"));
        assert!(header(&answer, "access-control-allow-headers").expect("headers").contains("idempotency-key"));
        // Errors too: else a page could not tell a bad key from a broken network.
        let refused = front.http.post(&url).header("origin", origin).body("{}").send().await.expect("an answer");
        assert_eq!((refused.status().as_u16(), header(&refused, "access-control-allow-origin")), (401, allowed));
        let exposed = header(&refused, "access-control-expose-headers").expect("headers");
        assert!(exposed == "*" || exposed.contains("x-request-id"), "{exposed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_answers_are_compressed_for_who_wants_it_and_streams_never() {
    let front = Front::start().await;
    let plain: Value = front.get("/v1/models").send().await.expect("an answer").json().await.expect("JSON");
    for encoding in ["gzip", "zstd"] {
        let asked = front.get("/v1/models").header("accept-encoding", encoding);
        let answer = asked.send().await.expect("an answer");
        assert_eq!(header(&answer, "content-encoding"), Some(encoding));
        assert!(header(&answer, "vary").expect("vary").to_lowercase().contains("accept-encoding"));
        let bytes = answer.bytes().await.expect("a body");
        let mut text = String::new();
        match encoding {
            "gzip" => drop(flate2::read::GzDecoder::new(&*bytes).read_to_string(&mut text).expect("gzip")),
            _ => drop(zstd::Decoder::new(&*bytes).expect("zstd").read_to_string(&mut text).expect("zstd")),
        }
        assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON"), plain);
    }
    let mut body = hello();
    body["stream"] = json!(true);
    let waiting = tokio::spawn(front.ask(&body).header("accept-encoding", "gzip, zstd").send());
    let claim = front.claim().await;
    front.answer(&claim, &["ok"], FinishReason::Stop).await;
    let answer = waiting.await.expect("a task").expect("an answer");
    assert!(matches!(header(&answer, "content-encoding"), None | Some("identity")));
    assert!(answer.text().await.expect("text").ends_with("data: [DONE]\n\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_come_as_problems_to_who_asks_for_those() {
    let front = Front::start().await;
    for (accept, is_problem) in [
        ("application/problem+json", true),
        ("application/json;q=0.9, Application/Problem+JSON;q=1", true),
        ("application/json", false),
        ("*/*", false),
    ] {
        let mut body = hello();
        body["temperature"] = json!(3);
        let answer = front.ask(&body).header("accept", accept).send().await.expect("an answer");
        let id = header(&answer, "x-request-id").expect("an id").to_owned();
        assert_eq!(answer.status().as_u16(), 400);
        let kind = if is_problem { "application/problem+json" } else { "application/json" };
        assert_eq!(header(&answer, "content-type"), Some(kind), "{accept}");
        let error: Value = answer.json().await.expect("JSON");
        if is_problem {
            assert_eq!((&error["status"], &error["title"]), (&json!(400), &json!("Bad Request")));
            assert_eq!((&error["param"], &error["code"]), (&json!("temperature"), &json!("out_of_range")));
            assert_eq!(error["instance"].as_str(), Some(id.as_str()));
            assert!(error["detail"].as_str().expect("text").contains("temperature"));
        } else {
            assert_eq!(error["error"]["param"], "temperature");
        }
    }
}
