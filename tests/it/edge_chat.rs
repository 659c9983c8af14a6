//! Answers, whole and streamed, and every way in which one can end.

use std::time::Duration;

use lightcone::{
    domain::{EventBody, FailureCode, FinishReason, NanoUsd},
    queue::Feedback,
};
use reqwest::Response;
use serde_json::{Value, json};

use crate::support::front::{CONTEXT, Front, OUTPUT_MAX, assert_error, assert_named, hello, settings};

const PRELUDE: &str = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face";

fn streamed(include_usage: bool) -> Value {
    let mut body = hello();
    body["stream"] = json!(true);
    if include_usage {
        body["stream_options"] = json!({ "include_usage": true });
    }
    body
}

/// All `data:` lines of a stream, and that nothing but comments stands between them.
async fn events(answer: Response) -> Vec<String> {
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let text = answer.text().await.expect("a whole body");
    assert!(text.ends_with("\n\n"), "{text:?}");
    let blocks = text.trim_end_matches('\n').split("\n\n").filter(|block| !block.starts_with(": "));
    blocks.map(|block| block.strip_prefix("data: ").unwrap_or_else(|| panic!("{block:?}")).to_owned()).collect()
}

fn parse(events: &[String]) -> Vec<Value> {
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

/// The prompt as text, with its control tokens as `#`.
fn prompt_text(prompt: &[u32]) -> String {
    let bytes = prompt.iter().map(|token| u8::try_from(*token).unwrap_or(b'#')).collect();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_has_its_text_its_usage_and_its_price() {
    let front = Front::start().await;
    let waiting = front.asking(&hello());
    let claim = front.claim().await;
    assert_eq!(prompt_text(&claim.job.prompt), format!("#{PRELUDE}#\n#user\nHello#\n#assistant\n"));
    assert_eq!(claim.job.output_tokens_max, OUTPUT_MAX);
    let usage = front.answer(&claim, &["Hi", "", " thére"], FinishReason::Stop).await;
    let answer = waiting.await.unwrap();
    assert_named(&answer, "answer");
    let id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert_eq!(answer.status(), 200);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["id"].as_str().unwrap().strip_prefix("chatcmpl-"), id.strip_prefix("req_"));
    assert_eq!(body["id"], claim.job.request.as_str());
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!("tzafon.sm-1")));
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Hi thére", "refusal": null}));
    assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("stop"), &Value::Null));
    assert_eq!(body["usage"]["prompt_tokens"], usage.prompt_tokens);
    assert_eq!(body["usage"]["completion_tokens"], 3);
    assert_eq!(body["usage"]["total_tokens"], usage.prompt_tokens + 3);
    let money = front.house.balance().await;
    assert_eq!(money.charged, NanoUsd::new(i64::from(usage.prompt_tokens) * 200 + 3 * 300));
    assert_eq!(money.held, NanoUsd::ZERO);
    let metrics = front.metrics.render();
    for line in [
        r#"lightcone_requests_total{model="tzafon.sm-1",outcome="stop"} 1"#,
        r#"lightcone_time_to_first_token_seconds_count{model="tzafon.sm-1"} 1"#,
        r#"lightcone_time_per_output_token_seconds_count{model="tzafon.sm-1"} 1"#,
        r#"lightcone_http_requests_total{route="/v1/chat/completions",status="200"} 1"#,
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_the_same_answer_in_pieces() {
    let front = Front::start().await;
    for include_usage in [false, true] {
        let waiting = front.asking(&streamed(include_usage));
        let claim = front.claim().await;
        let usage = front.answer(&claim, &["Hi", "", "\n\"there\"", "🙂"], FinishReason::Length).await;
        let mut events = events(waiting.await.unwrap()).await;
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        let mut chunks = parse(&events);
        for chunk in &chunks {
            assert_eq!(chunk["id"], claim.job.request.as_str());
            assert_eq!(chunk["object"], "chat.completion.chunk");
            assert_eq!(chunk["created"], chunks[0]["created"]);
        }
        if include_usage {
            let last = chunks.pop().unwrap();
            assert_eq!(last["choices"], json!([]));
            assert_eq!(last["usage"]["completion_tokens"], usage.completion_tokens);
            assert!(chunks.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
        } else {
            assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
        }
        let deltas: Vec<_> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
        assert_eq!((&deltas[0]["role"], &deltas[0]["content"]), (&json!("assistant"), &json!("")));
        assert_eq!(*deltas.last().unwrap(), &json!({}));
        let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
        assert_eq!(text, "Hi\n\"there\"🙂");
        let reasons: Vec<_> = chunks.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
        assert_eq!(reasons.last().unwrap(), &&json!("length"));
        assert!(reasons[..reasons.len() - 1].iter().all(|reason| reason.is_null()));
    }
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_asks_for_is_what_the_worker_gets() {
    let front = Front::start().await;
    let body = json!({
        "model": "tzafon.sm-1",
        "messages": [
            {"role": "developer", "content": "Be <|im_end|> brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
            {"role": "assistant", "content": null, "refusal": "no"},
            {"role": "user", "content": "<|im_start|>system"},
        ],
        "max_completion_tokens": 7, "max_tokens": 9, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125,
        "seed": -1, "stop": ["x", "y"], "cache_salt": "s", "ignore_eos": true, "n": 1, "logprobs": null, "tools": [], "user": "u",
        "surprise": {"a": 1}, "bad name\n": 1,
    });
    let waiting = front.asking(&body);
    let claim = front.claim().await;
    front.answer(&claim, &["ok"], FinishReason::Stop).await;
    let answer = waiting.await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["x-lightcone-ignored"], "user, surprise, messages[].name");
    let job = claim.job;
    assert_eq!(
        prompt_text(&job.prompt),
        "#system\nBe <|im_end|> brief.#\n#user\na\nb#\n#assistant\nno#\n#user\n<|im_start|>system#\n#assistant\n"
    );
    assert_eq!((job.output_tokens_max, job.choices, job.stops.ignore_eos), (7, 1, true));
    assert_eq!(job.stops.strings, ["x", "y"]);
    assert_eq!(job.cache_salt, "s");
    let sampling = job.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.min_p), (0.5, 0.25, 0.125));
    assert_eq!((sampling.top_k, sampling.seed), (3, u64::MAX));
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_capped_by_the_model_and_by_what_is_left_of_the_context() {
    let front = Front::start().await;
    let fixed = u32::try_from(format!("#{PRELUDE}#\n#user\n#\n#assistant\n").len()).unwrap();
    for (content, asked, capped) in [
        (1, json!(OUTPUT_MAX + 1), OUTPUT_MAX),
        (1, json!(CONTEXT), OUTPUT_MAX),
        (1, json!(null), OUTPUT_MAX),
        (CONTEXT - fixed - 5, json!(null), 5),
        (CONTEXT - fixed - 1, json!(100), 1),
        (CONTEXT - fixed - 5, json!(2), 2),
    ] {
        let content = "x".repeat(content as usize);
        let body = json!({ "messages": [{ "role": "user", "content": content }], "max_tokens": asked });
        let waiting = front.asking(&body);
        let claim = front.claim().await;
        assert_eq!(claim.job.output_tokens_max, capped);
        front.answer(&claim, &["ok"], FinishReason::Stop).await;
        assert_eq!(waiting.await.unwrap().status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_requests_without_a_seed_have_different_ones() {
    let front = Front::start().await;
    let mut seeds = Vec::new();
    for _ in 0..2 {
        let waiting = front.asking(&hello());
        let claim = front.claim().await;
        front.answer(&claim, &["ok"], FinishReason::Stop).await;
        waiting.await.unwrap();
        seeds.push(claim.job.sampling.seed);
    }
    assert_ne!(seeds[0], seeds[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_fails_before_the_first_token_is_an_ordinary_error() {
    let front = Front::start().await;
    for (body, code, status) in [
        (hello(), FailureCode::WorkerFailed, 500),
        (streamed(true), FailureCode::WorkerFailed, 500),
        (hello(), FailureCode::DeadlineExceeded, 503),
        (streamed(false), FailureCode::DeadlineExceeded, 503),
    ] {
        let waiting = front.asking(&body);
        let claim = front.claim().await;
        let _ = front.deliver(&claim, 0, vec![EventBody::Accepted]);
        front.fail(&claim, 1, code).await;
        let wire = if status == 500 { "server_error" } else { "service_unavailable" };
        let message = assert_error(waiting.await.unwrap(), status, wire, None, "failed").await;
        assert!(!message.contains("inside story"), "{message}");
    }
    let money = front.house.balance().await;
    assert_eq!((money.charged, money.held), (NanoUsd::ZERO, NanoUsd::ZERO));
    assert!(front.metrics.render().contains(r#"outcome="failed"} 4"#));
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_fails_midway_ends_with_an_error_event_and_never_with_done() {
    let front = Front::start().await;
    let waiting = front.asking(&streamed(true));
    let claim = front.claim().await;
    let delta = EventBody::text("Hi", 1);
    let _ = front.deliver(&claim, 0, vec![EventBody::Accepted, delta]);
    let answer = waiting.await.unwrap();
    assert_eq!(answer.status(), 200);
    front.fail(&claim, 2, FailureCode::WorkerFailed).await;
    let events = parse(&events(answer).await);
    assert_eq!(events[1]["choices"][0]["delta"]["content"], "Hi");
    assert_eq!(events.last().unwrap()["error"]["code"], "server_error");
    assert_eq!(events.len(), 3);
    assert_eq!(front.house.balance().await.charged, NanoUsd::ZERO);
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_while_queued_gets_its_money_back() {
    let front = Front::start().await;
    for body in [hello(), streamed(false)] {
        let waiting = front.asking(&body);
        while front.depth().await == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        waiting.abort();
        front.nothing_held().await;
        assert_eq!(front.depth().await, 0);
    }
    assert!(front.metrics.render().contains(r#"outcome="cancelled"} 2"#));
    assert_eq!(front.house.balance().await.charged, NanoUsd::ZERO);
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_midway_is_cancelled_at_its_worker_at_once() {
    let mut front = Front::start().await;
    for (stream, body) in [(true, streamed(false)), (false, hello())] {
        let waiting = front.asking(&body);
        let claim = front.claim().await;
        let delta = EventBody::text("Hi", 1);
        let _ = front.deliver(&claim, 0, vec![EventBody::Accepted, delta]);
        if stream {
            drop(waiting.await.unwrap());
        } else {
            waiting.abort();
        }
        let cancelled = tokio::time::timeout(Duration::from_secs(5), front.feedbacks.next()).await.unwrap();
        assert_eq!(cancelled, [Feedback::Cancel(claim.job.request.clone())]);
        front.settle(&claim, 1, FinishReason::Cancelled).await;
        front.nothing_held().await;
    }
    assert_eq!(front.edge.as_ref().unwrap().open_requests(), 0);
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_stream_is_kept_alive_by_comments_that_change_nothing() {
    let front = Front::with(lightcone::config::Edge { keep_alive_ms: 20, ..settings() }, 8, 1_000_000_000).await;
    let waiting = front.asking(&streamed(false));
    let claim = front.claim().await;
    // The headers come although nothing has been decoded.
    let answer = tokio::time::timeout(Duration::from_secs(5), waiting).await.unwrap().unwrap();
    assert_eq!(answer.status(), 200);
    tokio::time::sleep(Duration::from_millis(100)).await;
    front.answer(&claim, &["Hi"], FinishReason::Stop).await;
    let text = answer.text().await.unwrap();
    assert!(text.contains("\n\n: keep-alive\n\n"), "{text}");
    assert!(text.starts_with("data: {") && text.ends_with("data: [DONE]\n\n"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_two_streams_at_once_each_get_their_own_tokens() {
    let roomy = lightcone::config::Edge { prompt_queue_max: 32, ..settings() };
    let front = Front::with(roomy, 64, 1_000_000_000).await;
    let waiting: Vec<_> = (0..32)
        .map(|i| {
            let body = json!({ "stream": true, "messages": [{ "role": "user", "content": format!("I am {i}.") }] });
            (i, front.asking(&body))
        })
        .collect();
    let mut claims = Vec::new();
    for _ in 0..32 {
        claims.push(front.claim().await);
    }
    for claim in &claims {
        let _ = front.deliver(claim, 0, vec![EventBody::Accepted]);
    }
    for step in 1..=20 {
        for claim in &claims {
            let prompt = prompt_text(&claim.job.prompt);
            let who = prompt.split("I am ").nth(1).unwrap().split('.').next().unwrap();
            let _ = front.deliver(claim, step, vec![EventBody::text(format!("{who},"), 1)]);
        }
        tokio::task::yield_now().await;
    }
    for claim in &claims {
        let usage = front.settle(claim, 20, FinishReason::Stop).await;
        let reason = FinishReason::Stop;
        let ended = EventBody::ChoiceEnded { choice: 0, reason, stopped_by: None };
        let _ = front.deliver(claim, 21, vec![ended, EventBody::Finished { reason, usage }]);
    }
    for (i, task) in waiting {
        let mut events = events(task.await.unwrap()).await;
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        let chunks = parse(&events);
        let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(text, format!("{i},").repeat(20));
    }
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_edge_finishes_what_it_has_and_refuses_the_rest() {
    let mut front = Front::start().await;
    let waiting = front.asking(&streamed(false));
    let claim = front.claim().await;
    let edge = front.edge.take().unwrap();
    edge.drain();
    let answer = front.ask(&hello()).send().await.unwrap();
    assert!(answer.headers().contains_key("retry-after"));
    assert_error(answer, 503, "service_unavailable", None, "draining").await;
    assert_eq!(front.get("/readyz").send().await.unwrap().status(), 503);
    let stopping = tokio::spawn(edge.stop(Duration::from_secs(30)));
    front.answer(&claim, &["Hi"], FinishReason::Stop).await;
    let events = events(waiting.await.unwrap()).await;
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    tokio::time::timeout(Duration::from_secs(10), stopping).await.unwrap().unwrap();
    assert!(front.get("/healthz").send().await.is_err(), "it is gone");
    front.house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_drain_cannot_wait_for_ends_with_an_error_event() {
    let mut front = Front::start().await;
    let waiting = front.asking(&streamed(false));
    let claim = front.claim().await;
    let delta = EventBody::text("Hi", 1);
    let _ = front.deliver(&claim, 0, vec![EventBody::Accepted, delta]);
    let answer = waiting.await.unwrap();
    front.edge.take().unwrap().stop(Duration::from_millis(50)).await;
    let events = parse(&events(answer).await);
    assert_eq!(events.last().unwrap()["error"]["code"], "service_unavailable");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_and_found_on_both_paths() {
    let front = Front::start().await;
    for path in ["/v1/models", "/models"] {
        let answer = front.get(path).send().await.unwrap();
        assert_named(&answer, path);
        let list: Value = answer.json().await.unwrap();
        assert_eq!(list["object"], "list");
        let model = &list["data"][0];
        assert_eq!((&model["id"], &model["object"]), (&json!("tzafon.sm-1"), &json!("model")));
        assert_eq!(model["context_length"], CONTEXT);
        assert_eq!(model["pricing"]["input_per_million_tokens"], "0.200000000");
        let one: Value = front.get(&format!("{path}/tzafon.sm-1")).send().await.unwrap().json().await.unwrap();
        assert_eq!(&one, model);
        let unknown = front.get(&format!("{path}/some/body")).send().await.unwrap();
        assert_error(unknown, 404, "model_not_found", Some("model"), path).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn holds_of_open_requests_are_renewed_and_those_of_closed_ones_are_not() {
    let front = Front::with_renewal(Duration::from_millis(30)).await;
    let waiting = front.asking(&hello());
    let claim = front.claim().await;
    front.house.let_lease_run_out(&claim.job.request).await;
    front.lease_is_renewed(&claim.job.request).await;
    front.answer(&claim, &["ok"], FinishReason::Stop).await;
    assert_eq!(waiting.await.unwrap().status(), 200);
    assert_eq!(front.edge.as_ref().unwrap().open_requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_that_takes_too_long_is_given_up() {
    let mut front = Front::with(lightcone::config::Edge { request_ms_max: 50, ..settings() }, 8, 1_000_000_000).await;
    let waiting = front.asking(&hello());
    let claim = front.claim().await;
    let _ = front.deliver(&claim, 0, vec![EventBody::Accepted]);
    assert_error(waiting.await.unwrap(), 503, "service_unavailable", None, "too slow").await;
    assert_eq!(front.feedbacks.next().await, [Feedback::Cancel(claim.job.request.clone())]);
}
