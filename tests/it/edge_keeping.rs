//! Answers that outlive their connection: asked twice under one key, taken up again, stored, cancelled.

use std::time::Duration;

use lightcone::{
    domain::{Claim, EventBody, FailureCode, FinishReason, NanoUsd},
    queue::Feedback,
};
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::front::{Front, assert_error, hello};

fn streamed() -> Value {
    let mut body = hello();
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    body
}

fn sending(request: RequestBuilder) -> JoinHandle<Response> {
    tokio::spawn(async move { request.send().await.expect("an answer") })
}

async fn text(answer: Response) -> String {
    assert_eq!(answer.status(), 200);
    answer.text().await.expect("a whole body")
}

/// Waits until `answer` has brought `wanted`; answers what came up to then.
async fn heard(answer: &mut Response, wanted: &str) -> String {
    let mut text = String::new();
    while !text.contains(wanted) {
        let chunk = tokio::time::timeout(Duration::from_secs(10), answer.chunk()).await.expect("in time");
        text.push_str(std::str::from_utf8(&chunk.expect("a chunk").expect("not the end")).expect("UTF-8"));
    }
    text
}

async fn finish(front: &Front, claim: &Claim, seq: u32, reason: FinishReason) {
    let usage = front.settle(claim, seq - 1, reason).await;
    let mut bodies = vec![EventBody::Finished { reason, usage }];
    if reason != FinishReason::Cancelled {
        bodies.insert(0, EventBody::ChoiceEnded { choice: 0, reason, stopped_by: None });
    }
    let _ = front.deliver(claim, seq, bodies);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_is_one_generation_whenever_it_is_asked_again() {
    for body in [hello(), streamed()] {
        let front = Front::start().await;
        let ask = || front.ask(&body).header("idempotency-key", "once");
        let first = sending(ask());
        let claim = front.claim().await;
        let _ = front.deliver(&claim, 0, vec![EventBody::Accepted, EventBody::text("Hi", 1)]);
        // While it runs, and with the first one gone.
        let (second, third) = (sending(ask()), sending(ask()));
        tokio::time::sleep(Duration::from_millis(100)).await;
        first.abort();
        assert_eq!(front.depth().await, 0, "the second was queued");
        let _ = front.deliver(&claim, 2, vec![EventBody::text(" there", 1)]);
        finish(&front, &claim, 3, FinishReason::Stop).await;
        let told = text(second.await.expect("a task")).await;
        assert!(told.contains("Hi") && told.contains(" there"), "{told}");
        assert_eq!(text(third.await.expect("a task")).await, told);
        // And afterwards, out of the store.
        assert_eq!(text(ask().send().await.expect("an answer")).await, told);
        let prompt = i64::try_from(claim.job.prompt.len()).expect("short");
        assert_eq!(front.house.balance().await.charged, NanoUsd::new(prompt * 200 + 2 * 300));
        // Another question under the key, or the same at another path.
        let mut other = body.clone();
        other["max_tokens"] = json!(3);
        let answer = front.ask(&other).header("idempotency-key", "once").send().await.expect("an answer");
        assert_error(answer, 422, "idempotency_key_reused", Some("Idempotency-Key"), "another body").await;
        let mut raw = front.house.valkey.raw().await;
        let kept: Vec<String> = redis::cmd("KEYS").arg("lc:*:once:*").query_async(&mut raw).await.expect("KEYS");
        assert_eq!(kept.len(), 3, "the question, its request and its answer: {kept:?}");
        for key in kept {
            let ttl: i64 = redis::cmd("PTTL").arg(&key).query_async(&mut raw).await.expect("PTTL");
            assert!((1..=86_400_000).contains(&ttl), "{key}: {ttl}");
        }
        assert_eq!(front.depth().await, 0);
        front.house.assert_balanced().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_taken_up_again_behind_the_last_event_that_was_heard() {
    let front = Front::start().await;
    let body = streamed();
    let ask = || front.ask(&body).header("idempotency-key", "broken");
    let waiting = sending(ask());
    let claim = front.claim().await;
    let _ = front.deliver(&claim, 0, vec![EventBody::Accepted, EventBody::text("Hi", 1)]);
    let mut broken = waiting.await.expect("a task");
    let begun = heard(&mut broken, "Hi").await;
    drop(broken);
    let last = begun.lines().filter_map(|line| line.strip_prefix("id: ")).next_back().expect("an id").to_owned();
    let again = sending(ask().header("last-event-id", &last));
    // Ahead of what there is so far: the last event of all.
    let ahead = sending(ask().header("last-event-id", "5"));
    let mut ahead = ahead.await.expect("a task");
    let _ = front.deliver(&claim, 2, vec![EventBody::text(" there", 1)]);
    finish(&front, &claim, 3, FinishReason::Stop).await;
    let rest = text(again.await.expect("a task")).await;
    assert!(!rest.contains("\"Hi\"") && rest.contains(" there") && rest.ends_with("data: [DONE]\n\n"), "{rest}");
    let whole = text(ask().send().await.expect("an answer")).await;
    assert_eq!(format!("{begun}{rest}"), whole);
    let last = heard(&mut ahead, "[DONE]").await;
    assert!(whole.ends_with(&last) && last.starts_with("id: 6"), "{last}");
    // From every event on, out of the store too.
    let events: Vec<&str> = whole.split_inclusive("\n\n").collect();
    for heard in 0..=events.len() {
        let answer = ask().header("last-event-id", heard.to_string()).send().await.expect("an answer");
        let rest = text(answer).await;
        let rest: String = rest.split_inclusive("\n\n").filter(|event| !event.starts_with(':')).collect();
        assert_eq!(rest, events[heard..].concat(), "behind {heard}");
    }
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_of_another_answer_is_never_told_as_the_rest_of_the_first() {
    let front = Front::start().await;
    let body = streamed();
    let ask = |after: &str| front.ask(&body).header("idempotency-key", "gone").header("last-event-id", after);
    // The key is nobody's, because the first answer failed or was forgotten.
    let answer = ask("3").send().await.expect("an answer");
    assert_error(answer, 400, "invalid_value", Some("Last-Event-ID"), "nothing there").await;
    front.assert_nothing_happened("nothing to take up").await;
    let waiting = sending(ask("0"));
    let claim = front.claim().await;
    front.answer(&claim, &["ok"], FinishReason::Stop).await;
    let whole = text(waiting.await.expect("a task")).await;
    let events = whole.matches("id: ").count();
    let beyond = text(ask(&(events + 1).to_string()).send().await.expect("an answer")).await;
    assert!(beyond.contains("Last-Event-ID") && !beyond.contains("[DONE]"), "{beyond}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_refused_or_failed_under_a_key_may_be_asked_again() {
    let front = Front::start().await;
    let ask = |body: &Value| front.ask(body).header("idempotency-key", "again");
    let mut bad = hello();
    bad["n"] = json!(0);
    assert_eq!(ask(&bad).send().await.expect("an answer").status().as_u16(), 400);
    for body in [hello(), streamed()] {
        let waiting = sending(ask(&body));
        let claim = front.claim().await;
        let _ = front.deliver(&claim, 0, vec![EventBody::Accepted]);
        front.fail(&claim, 1, FailureCode::WorkerFailed).await;
        assert_error(waiting.await.expect("a task"), 500, "server_error", None, "failed").await;
    }
    let waiting = sending(ask(&hello()));
    let claim = front.claim().await;
    front.answer(&claim, &["ok"], FinishReason::Stop).await;
    assert!(text(waiting.await.expect("a task")).await.contains("ok"));
    assert_eq!(front.house.balance().await.held, NanoUsd::ZERO);
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_words_about_asking_again_are_refused() {
    let front = Front::start().await;
    for (key, after, param) in [
        (Some("".to_owned()), None, "Idempotency-Key"),
        (Some("k".repeat(256)), None, "Idempotency-Key"),
        (Some("k".to_owned()), Some("x"), "Last-Event-ID"),
        (Some("k".to_owned()), Some("-1"), "Last-Event-ID"),
        (None, Some("3"), "Idempotency-Key"),
    ] {
        let mut request = front.ask(&hello());
        if let Some(key) = &key {
            request = request.header("idempotency-key", key);
        }
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        let answer = request.send().await.expect("an answer");
        let code = if key.is_none() { "missing_required_parameter" } else { "invalid_value" };
        assert_error(answer, 400, code, Some(param), &format!("{key:?} {after:?}")).await;
    }
    front.assert_nothing_happened("refused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_stream_ends_with_what_was_used_and_done() {
    let mut front = Front::start().await;
    let waiting = front.asking(&streamed());
    let claim = front.claim().await;
    let _ = front.deliver(&claim, 0, vec![EventBody::Accepted, EventBody::text("Hi", 1)]);
    let mut answer = waiting.await.expect("a task");
    let begun = heard(&mut answer, "Hi").await;
    let id = claim.job.request.to_string();
    // Nobody else may.
    let other = front.house.another(1_000_000).await;
    let secret = front.house.accounts.create_key(&other.tenant, "other", "chat".parse().expect("scopes")).await;
    let path = format!("{}/v1/chat/completions/{id}/cancel", front.url);
    let foreign = front.http.post(&path).bearer_auth(secret.expect("a key").secret).send().await.expect("an answer");
    assert_error(foreign, 404, "not_found", Some("id"), "another tenant's").await;
    let cancelled = front.http.post(&path).bearer_auth(&front.house.secret).send().await.expect("an answer");
    assert_eq!(cancelled.status(), 200);
    let told = tokio::time::timeout(Duration::from_secs(5), front.feedbacks.next()).await.expect("in time");
    assert_eq!(told, [Feedback::Cancel(claim.job.request.clone())]);
    finish(&front, &claim, 2, FinishReason::Cancelled).await;
    let rest = begun + &answer.text().await.expect("the rest");
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
    let events: Vec<Value> = rest
        .split_terminator("\n\n")
        .filter_map(|event| serde_json::from_str(event.strip_prefix("data: ")?).ok())
        .collect();
    let last = events.last().expect("events");
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(1)));
    let prompt = i64::try_from(claim.job.prompt.len()).expect("short");
    assert_eq!(front.house.balance().await.charged, NanoUsd::new(prompt * 200 + 300));
    let again = front.http.post(&path).bearer_auth(&front.house.secret).send().await.expect("an answer");
    assert_error(again, 404, "not_found", Some("id"), "it is over").await;
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cancelled_in_the_queue_is_free_and_ends_in_good_order() {
    let front = Front::start().await;
    for (mut body, own) in [(hello(), "mine"), (streamed(), "mine.2")] {
        // A client without an answer knows its request only by the name that it gave it itself.
        body["request_id"] = json!(own);
        let waiting = front.asking(&body);
        while front.depth().await == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let path = format!("{}/chat/completions/{own}/cancel", front.url);
        let cancelled = front.http.post(&path).bearer_auth(&front.house.secret).send().await.expect("an answer");
        assert_eq!(cancelled.status(), 200, "{own}");
        let told = text(waiting.await.expect("a task")).await;
        assert!(told.contains("\"completion_tokens\":0"), "{told}");
        assert!(told.contains("\"finish_reason\":\"stop\""), "{told}");
        front.nothing_held().await;
        assert_eq!(front.depth().await, 0);
    }
    assert_eq!(front.house.balance().await.charged, NanoUsd::ZERO);
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_answers_are_listed_page_by_page_and_only_to_their_tenant() {
    let front = Front::start().await;
    let mut ids = Vec::new();
    for number in 0..5 {
        let mut body = if number % 2 == 0 { hello() } else { streamed() };
        body["store"] = json!(number != 3);
        body["metadata"] = json!({ "number": number.to_string() });
        let waiting = front.asking(&body);
        let claim = front.claim().await;
        front.answer(&claim, &["ok ", &number.to_string()], FinishReason::Stop).await;
        text(waiting.await.expect("a task")).await;
        if number != 3 {
            ids.push(claim.job.request.to_string());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let page = async |query: &str| -> Value {
        let answer = front.get(&format!("/v1/chat/completions{query}")).send().await.expect("an answer");
        assert_eq!(answer.status(), 200, "{query}");
        answer.json().await.expect("JSON")
    };
    let named = |page: &Value| -> Vec<String> {
        let listed = page["data"].as_array().expect("a list").iter();
        listed.map(|answer| answer["id"].as_str().expect("an id").to_owned()).collect()
    };
    // Nothing that is kept is kept for ever.
    let mut raw = front.house.valkey.raw().await;
    let kept: Vec<String> = redis::cmd("KEYS").arg("lc:*:record*").query_async(&mut raw).await.expect("KEYS");
    assert_eq!(kept.len(), ids.len() + 1, "{kept:?}");
    for key in kept {
        let ttl: i64 = redis::cmd("PTTL").arg(&key).query_async(&mut raw).await.expect("PTTL");
        assert!((1..=30 * 86_400_000).contains(&ttl), "{key}: {ttl}");
    }
    let all = page("").await;
    assert_eq!((named(&all), &all["has_more"]), (ids.clone(), &json!(false)));
    assert_eq!(all["data"][3]["metadata"], json!({ "number": "4" }));
    assert_eq!(all["data"][3]["choices"][0]["message"]["content"], "ok 4");
    let backwards: Vec<String> = ids.iter().rev().cloned().collect();
    assert_eq!(named(&page("?order=desc").await), backwards);
    assert_eq!(named(&page("?metadata[number]=2").await), ids[2..3]);
    assert_eq!(named(&page("?metadata%5Bnumber%5D=2&model=tzafon.sm-1").await), ids[2..3]);
    assert_eq!(named(&page("?model=other").await), Vec::<String>::new());
    assert_eq!(all["data"][1]["object"], "chat.completion");
    let first = page("?limit=3").await;
    assert_eq!((named(&first), &first["has_more"]), (ids[..3].to_vec(), &json!(true)));
    let second = page(&format!("?limit=3&after={}", first["last_id"].as_str().expect("an id"))).await;
    assert_eq!((named(&second), &second["has_more"]), (ids[3..].to_vec(), &json!(false)));
    for (query, param) in
        [("?limit=0", "limit"), ("?limit=101", "limit"), ("?limit=x", "limit"), ("?order=up", "order")]
    {
        let answer = front.get(&format!("/v1/chat/completions{query}")).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 400, "{query}");
        let error: Value = answer.json().await.expect("JSON");
        assert_eq!(error["error"]["param"], param, "{query}");
    }
    let other = front.house.another(1_000_000).await;
    let key = front.house.accounts.create_key(&other.tenant, "other", "chat".parse().expect("scopes")).await;
    let secret = key.expect("a key").secret;
    let url = format!("{}/v1/chat/completions", front.url);
    let theirs: Value =
        front.http.get(&url).bearer_auth(&secret).send().await.expect("an answer").json().await.expect("JSON");
    assert_eq!(theirs["data"], json!([]));
    for request in [front.http.get(format!("{url}/{}", ids[0])), front.http.delete(format!("{url}/{}", ids[0]))] {
        let answer = request.bearer_auth(&secret).send().await.expect("an answer");
        assert_error(answer, 404, "not_found", Some("id"), "another tenant's").await;
    }
    let gone = front.http.delete(format!("{url}/{}", ids[0])).bearer_auth(&front.house.secret).send().await;
    let gone: Value = gone.expect("an answer").json().await.expect("JSON");
    assert_eq!(gone, json!({ "id": ids[0], "object": "chat.completion.deleted", "deleted": true }));
    assert_eq!(named(&page("").await), ids[1..]);
    front.house.assert_balanced().await;
}
