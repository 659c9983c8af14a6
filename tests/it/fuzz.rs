//! Requests of every kind of wrong against a whole node with a real, small model: none is answered with a 5xx, none
//! hangs, and none touches a neighbour's stream.
//!
//! `LIGHTCONE_FUZZ_CASES=100000` for a long run, `LIGHTCONE_FUZZ_SEED` for another one, `LIGHTCONE_FUZZ_FIRST` to
//! begin at one number (with one case, to see it again).

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::Value;

use crate::support::{
    gguf::{self, small_model},
    process::{Home, Node},
    requests::{Case, Requests},
};

const CASES: u64 = 2_000;
const AT_ONCE: usize = 8;
const ANSWER_MAX: Duration = Duration::from_secs(20);
const TEMPLATE: &str = "{% for m in messages %}<|a|>{{ m.role }}\n{{ m.content }}<|b|>{% endfor %}\
                        {% if add_generation_prompt %}<|a|>assistant\n{% endif %}";

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// A node with a model of one small layer: everything real but its wits.
fn node() -> (Home, Node, String) {
    let model = "engine = \"onnx\"\nfile = \"small.gguf\"\ncontext_tokens_max = 1024\n\
                 output_tokens_max = 48\nsequences_max = 12\nkv_memory_mib = 64\n";
    let home = Home::of_model(model, "[limits]\nrequests_per_minute = 0\ntokens_per_minute = 0\n");
    let mut draft = small_model(3);
    for (name, value) in &mut draft.keys {
        match name.bytes.as_slice() {
            b"llama.context_length" => *value = gguf::Value::U32(1024),
            b"tokenizer.chat_template" => *value = gguf::Value::Text(TEMPLATE.into()),
            _ => {}
        }
    }
    std::fs::write(home.data_dir().join("models/small.gguf"), draft.encode()).expect("a file");
    let node = home.start(&[]);
    let key = home.key();
    (home, node, key)
}

/// The fields of every body, out of the node's own document. Without those of operators, to whom this key is nobody.
async fn bodies(node: &Node) -> Vec<(String, Vec<String>)> {
    let answer = reqwest::get(format!("{}/openapi.json", node.url)).await.expect("an answer");
    let document: Value = answer.json().await.expect("JSON");
    let mut bodies = Vec::new();
    let paths = document["paths"].as_object().expect("paths").iter();
    for (path, operations) in paths.filter(|(path, _)| !path.starts_with("/v1/admin/")) {
        let schema = &operations["post"]["requestBody"]["content"]["application/json"]["schema"];
        let Some(name) = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) else { continue };
        let properties = document["components"]["schemas"][name]["properties"].as_object().expect("properties");
        let names: Vec<String> = properties.keys().cloned().collect();
        assert!(names.len() > 1, "{path}");
        bodies.push((path.clone(), names));
    }
    assert!(bodies.len() >= 5, "{bodies:?}");
    bodies
}

/// What is wrong with the answer, if anything is, and its status.
async fn faults(http: &reqwest::Client, url: &str, key: &str, case: &Case) -> (u16, Option<String>) {
    let method = Method::from_bytes(case.method.as_bytes()).expect("a method");
    let mut request = http.request(method, format!("{url}{}", case.path)).body(case.body.clone());
    for (name, value) in &case.headers {
        request = request.header(*name, value);
    }
    if case.has_key {
        request = request.bearer_auth(key);
    }
    // A header that is none is refused on this side already.
    let Ok(request) = request.build() else { return (0, None) };
    let asked = async {
        let answer = http.execute(request).await?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        Ok::<_, reqwest::Error>((status, headers, answer.bytes().await?))
    };
    let (status, headers, body) = match tokio::time::timeout(ANSWER_MAX, asked).await {
        Err(_) => return (0, Some(format!("no answer within {ANSWER_MAX:?}"))),
        Ok(Err(error)) => return (0, Some(format!("{error:?}"))),
        Ok(Ok(answer)) => answer,
    };
    let text = String::from_utf8_lossy(&body);
    let kind = headers.get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let is_encoded = headers.get("content-encoding").is_some_and(|encoding| encoding != "identity");
    let wrong = if status >= 500 {
        Some("a 5xx")
    } else if !headers.contains_key("x-request-id") && case.method != "OPTIONS" {
        Some("no x-request-id")
    } else if is_encoded || case.method == "HEAD" || case.method == "OPTIONS" {
        None
    } else if kind == "text/event-stream" {
        let is_whole = text.ends_with("data: [DONE]\n\n") || text.contains("event: response.") || text.is_empty();
        if text.contains("server_error") || text.contains("service_unavailable") {
            Some("a stream that failed")
        } else if !is_whole && !case.headers.iter().any(|(name, _)| *name == "last-event-id") {
            Some("a stream without an end")
        } else {
            None
        }
    } else {
        match serde_json::from_str::<Value>(&text) {
            Err(_) => Some("no JSON"),
            Ok(json) if status >= 400 && kind == "application/json" => {
                let error = &json["error"];
                let is_sound = error["message"].is_string() && error["type"].is_string() && error["code"].is_string();
                (!is_sound).then_some("no error object")
            }
            Ok(_) => None,
        }
    };
    (status, wrong.map(|wrong| format!("{wrong}: {status} {text:.600}")))
}

/// Asks for the same stream again and again; answers how often, or what was different.
async fn neighbour(node: &Node, key: &str, over: Arc<AtomicBool>) -> usize {
    let ask = || async { node.ask(key, "Who keeps the light?", 40).await.rest().await };
    let undisturbed = ask().await;
    assert!(undisturbed.done && undisturbed.error.is_none(), "{undisturbed:?}");
    let mut rounds = 0;
    while !over.load(Ordering::Relaxed) {
        let told = tokio::time::timeout(ANSWER_MAX, ask()).await.expect("the neighbour's stream hangs");
        assert!(told.done && told.error.is_none(), "{told:?}");
        assert_eq!((&told.text, &told.finish), (&undisturbed.text, &undisturbed.finish), "after {rounds} rounds");
        rounds += 1;
    }
    rounds
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_answered_with_a_5xx_or_hangs_or_touches_its_neighbour() {
    let (home, node, key) = node();
    let (cases, first) = (number("LIGHTCONE_FUZZ_CASES", CASES), number("LIGHTCONE_FUZZ_FIRST", 0));
    let requests = Requests::new(number("LIGHTCONE_FUZZ_SEED", 4), bodies(&node).await);
    let (next, over) = (AtomicU64::new(first), Arc::new(AtomicBool::new(false)));
    let http = reqwest::Client::new();
    let begun = Instant::now();
    let sender = || async {
        let (mut statuses, mut found) = (BTreeMap::<u16, u64>::new(), Vec::new());
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= first + cases || found.len() >= 5 {
                return (statuses, found);
            }
            let case = requests.case(number);
            let (status, fault) = faults(&http, &node.url, &key, &case).await;
            *statuses.entry(status).or_default() += 1;
            if let Some(fault) = fault {
                found.push(format!(
                    "case {number}: {fault}\n  {} {} {:?}\n  {:.2000}",
                    case.method,
                    case.path,
                    case.headers,
                    String::from_utf8_lossy(&case.body)
                ));
            }
        }
    };
    let senders = async {
        let done = futures::future::join_all((0..AT_ONCE).map(|_| sender())).await;
        over.store(true, Ordering::Relaxed);
        done
    };
    let (done, rounds) = tokio::join!(senders, neighbour(&node, &key, Arc::clone(&over)));
    let (mut statuses, mut found) = (BTreeMap::<u16, u64>::new(), Vec::new());
    for (some, faults) in done {
        some.into_iter().for_each(|(status, count)| *statuses.entry(status).or_default() += count);
        found.extend(faults);
    }
    println!("{cases} cases in {:.0?}, {rounds} rounds of the neighbour: {statuses:?}", begun.elapsed());
    assert!(found.is_empty(), "{}", found.join("\n"));
    assert!(rounds > 0);
    // The generator reaches both sides.
    assert!(cases < CASES || (statuses[&200] * 10 > cases && statuses[&400] * 10 > cases), "{statuses:?}");
    assert_eq!(node.ready().await, 200);
    let log = home.log_text();
    assert!(!log.contains("panicked") && !log.contains(" ERROR "), "the log has errors");
    home.assert_settled(&[]);
}
