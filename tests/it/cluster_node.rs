//! One node of role `all`, as a process of its own, with a scripted model that fails on demand.

use std::time::Duration;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::support::process::{Home, SOON, is_alive};

async fn until<F: Future<Output = bool>>(what: &str, mut look: impl FnMut() -> F) {
    let all = async {
        while !look().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(SOON, all).await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_panics_the_engine_ends_at_the_second_one_and_its_neighbours_go_on() {
    let home = Home::new("");
    let node = home.start(&[]);
    let key = home.key();
    let undisturbed = node.ask(&key, "slowly <<slow:15>>", 120).await.rest().await;
    let neighbours = (0..3).map(|_| async {
        let mut answer = node.ask(&key, "slowly <<slow:15>>", 120).await;
        let begun = answer.begun().await;
        (begun, answer)
    });
    let neighbours = futures::future::join_all(neighbours).await;
    let told = node.ask(&key, "now <<panic:5>>", 50).await.rest().await;
    let error = told.error.expect("an error");
    assert_eq!((&error["code"], &told.finish), (&json!("attempts_exhausted"), &None), "{error}");
    assert!(error["message"].as_str().expect("a text").contains("Nothing was charged"), "{error}");
    assert!(!error.to_string().contains("scripted"), "the inside story is for the log");
    for (begun, answer) in neighbours {
        let told = answer.rest().await;
        assert_eq!((told.finish.as_deref(), told.done), (Some("length"), true), "{told:?}");
        assert_eq!(begun + &told.text, undisturbed.text);
        assert_eq!(told.usage.expect("usage")["completion_tokens"], json!(120));
    }
    let told = node.ask(&key, "well", 8).await.rest().await;
    assert_eq!((told.finish.as_deref(), told.done), (Some("length"), true), "{told:?}");
    assert_eq!(told.usage.as_ref().map(|usage| &usage["completion_tokens"]), Some(&json!(8)));
    let cost = |usage: &serde_json::Value| {
        usage["prompt_tokens"].as_i64().unwrap() * 200 + usage["completion_tokens"].as_i64().unwrap() * 300
    };
    let price = 4 * cost(undisturbed.usage.as_ref().unwrap()) + cost(told.usage.as_ref().unwrap());
    assert_eq!(home.assert_settled(&[])["charged_nano_usd"], json!(price), "the one that failed was not charged");
    assert_eq!(home.log_text().matches("starting another").count(), 2);
    assert!(!home.log_text().contains("stack backtrace"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_freezes_is_replaced_and_its_requests_are_failed_free_of_charge() {
    let home = Home::new("");
    let node = home.start(&[]);
    let key = home.key();
    let told = node.ask(&key, "now <<freeze:3>>", 50).await.rest().await;
    assert!(told.error.is_some(), "{told:?}");
    assert_eq!(home.assert_settled(&[])["charged_nano_usd"], 0);
    let told = node.ask(&key, "well", 4).await.rest().await;
    assert_eq!(told.finish.as_deref(), Some("length"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_fails_too_often_makes_the_node_unready_until_it_works_again() {
    let home = Home::new("");
    let node = home.start(&[]);
    let key = home.key();
    // Each is tried twice.
    for _ in 0..3 {
        let begun = std::time::Instant::now();
        let told = node.ask(&key, "now <<panic:1>>", 5).await.rest().await;
        assert!(begun.elapsed() < SOON, "the queue waited for a worker that was back");
        assert!(told.error.is_some(), "{told:?}");
    }
    until("the node says that it is not ready", || async { node.ready().await == 503 }).await;
    until("the slow attempts go on", || async { node.ready().await == 200 }).await;
    home.assert_settled(&[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_is_charged_for_what_was_decoded_and_no_more() {
    let home = Home::new("");
    let node = home.start(&[]);
    let key = home.key();
    let mut answer = node.ask(&key, "slowly <<slow:20>>", 400).await;
    answer.begun().await;
    drop(answer);
    let money = home.assert_settled(&[]);
    let charged = money["charged_nano_usd"].as_i64().unwrap();
    assert!(charged > 0 && charged < 400 * 300, "{money}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_running_requests_end_and_leaves_no_process_behind() {
    let home = Home::new("");
    let mut node = home.start(&[]);
    let (key, children) = (home.key(), node.children());
    assert!(!children.is_empty());
    let mut answer = node.ask(&key, "slowly <<slow:10>>", 60).await;
    answer.begun().await;
    node.signal(Signal::SIGTERM);
    let told = answer.rest().await;
    assert_eq!((told.finish.as_deref(), told.done), (Some("length"), true), "{told:?}");
    assert_eq!(node.ended(), Some(0));
    assert!(children.iter().all(|&child| !is_alive(child)));
    home.assert_settled(&[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_runs_out_of_time_fails_the_rest_free_of_charge() {
    let home = Home::new("");
    let mut node = home.start(&[]);
    let mut answer = node.ask(&home.key(), "slowly <<slow:50>>", 500).await;
    answer.begun().await;
    node.signal(Signal::SIGTERM);
    let told = answer.rest().await;
    assert!(told.error.is_some(), "{told:?}");
    assert_eq!(node.ended(), Some(0));
    assert_eq!(home.assert_settled(&[])["charged_nano_usd"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_leaves_no_process_and_no_hold_and_nothing_is_settled_twice() {
    let home = Home::new("");
    let node = home.start(&[]);
    let (key, children) = (home.key(), node.children());
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(node.ask(&key, "slowly <<slow:5>>", 400).await);
    }
    for answer in &mut answers {
        answer.begun().await;
    }
    node.kill();
    let mut delivered = Vec::new();
    for answer in answers {
        let told = answer.rest().await;
        assert!(!told.done);
        // The first piece was read before.
        delivered.push(told.chunks + 1);
    }
    until("the store dies with its node", || async { children.iter().all(|&child| !is_alive(child)) }).await;
    let node = home.start(&[]);
    // Charged is what the journal of the dead node says was decoded, which is no less than what was delivered.
    home.assert_settled(&[]);
    let posts = home.posts(&[]);
    assert_eq!(posts.len(), 4, "{posts:#?}");
    assert!(posts.iter().all(|post| post["note"] == "worker_lost"), "{posts:#?}");
    let mut decoded: Vec<u64> =
        posts.iter().map(|post| post["usage"]["completion_tokens"].as_u64().expect("a number")).collect();
    decoded.sort_unstable();
    delivered.sort_unstable();
    assert!(
        decoded.iter().zip(&delivered).all(|(decoded, delivered)| decoded >= delivered),
        "{decoded:?} {delivered:?}"
    );
    let told = node.ask(&key, "well", 4).await.rest().await;
    assert_eq!(told.finish.as_deref(), Some("length"));
    home.assert_settled(&[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_dies_in_mid_stream_is_restarted_and_the_request_is_settled() {
    let home = Home::new("[store]\nappend_fsync = \"always\"\n");
    let node = home.start(&[]);
    let key = home.key();
    let mut answer = node.ask(&key, "slowly <<slow:10>>", 40).await;
    answer.begun().await;
    for child in node.children() {
        kill(Pid::from_raw(child.cast_signed()), Signal::SIGKILL).unwrap();
    }
    let told = answer.rest().await;
    assert_eq!((told.finish.as_deref(), told.done), (Some("length"), true), "{told:?}\n{}", home.log_text());
    let usage = told.usage.unwrap();
    let price = usage["prompt_tokens"].as_i64().unwrap() * 200 + 40 * 300;
    assert_eq!(home.assert_settled(&[])["charged_nano_usd"], json!(price));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_found_in_the_prefix_cache_are_told_and_cost_what_the_others_do() {
    let home = Home::new("");
    let node = home.start(&[]);
    let key = home.key();
    let mut prompt_tokens = 0;
    for round in 0..2 {
        let usage = node.ask(&key, &"the same words again ".repeat(20), 4).await.rest().await.usage.unwrap();
        prompt_tokens = usage["prompt_tokens"].as_i64().unwrap();
        let found = if round == 0 { 0 } else { (prompt_tokens - 1) / 16 * 16 };
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], found, "{usage}");
    }
    assert_eq!(home.assert_settled(&[])["charged_nano_usd"], json!(2 * (prompt_tokens * 200 + 4 * 300)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_requests_than_the_worker_has_places_wait_and_are_all_served() {
    let home = Home::new("");
    let node = home.start(&[]);
    let key = home.key();
    let asked = (0..16).map(|n| {
        let (node, key) = (&node, &key);
        async move { node.ask(key, &format!("request {n}"), 20).await.rest().await }
    });
    for told in futures::future::join_all(asked).await {
        assert_eq!((told.finish.as_deref(), told.done), (Some("length"), true), "{told:?}");
    }
    home.assert_settled(&[]);
}
