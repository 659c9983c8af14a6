//! Crowds of requests against one balance: on several edges at once, and with clients that leave.

use futures::StreamExt;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

use crate::support::process::{Home, Node, Redis};

const INPUT: i64 = 200;
const OUTPUT: i64 = 300;
const CROWD: usize = 1_000;

const MODEL: &str = "engine = \"scripted\"\ncontext_tokens_max = 256\noutput_tokens_max = 128\nsequences_max = 48\n\
                     step_tokens_max = 256\nkv_memory_mib = 1024\n";

/// The queue has room for all of them.
const QUEUE: &str = "[limits]\nrequests_per_minute = 0\ntokens_per_minute = 0\n";

/// `tokens` each, on a balance that pays for 300 of a crowd of 1,000; answers the tokens that were delivered.
async fn crowd(step: u32, tokens: u32) {
    let ledger = format!("step_tokens = {step}\n");
    let (home, redis) = (Home::of_crowd(&ledger, MODEL, QUEUE), Redis::start());
    let at = ["--redis-url", &redis.url];
    let run = |arguments: &[&str]| home.run(&[arguments, &at].concat());
    run(&["keys", "bootstrap"]);
    let edges: Vec<Node> = (0..3).map(|_| home.start(&["--role", "edge", at[0], at[1]])).collect();
    let _worker = home.start(&["--role", "worker", at[0], at[1]]);
    let told = edges[0].ask(&home.key(), "well", 1).await.rest().await;
    let prompt = told.usage.expect("usage")["prompt_tokens"].as_i64().expect("a number");

    let each = prompt * INPUT + i64::from(tokens) * OUTPUT;
    // And a little less than another token.
    let balance = 300 * each + OUTPUT - 1;
    let usd = format!("{}.{:09}", balance / 1_000_000_000, balance % 1_000_000_000);
    let tenant = run(&["tenants", "create", "crowd", "--balance", &usd])["id"].as_str().expect("an id").to_owned();
    let key = run(&["keys", "create", "--tenant", &tenant])["key"].as_str().expect("a key").to_owned();
    let answers = futures::stream::iter(0..CROWD).map(|index| {
        let (edge, key) = (&edges[index % edges.len()], &key);
        async move { edge.ask(key, "well", tokens).await.rest().await }
    });
    let told: Vec<_> = answers.buffer_unordered(CROWD).collect().await;

    let (mut decoded, mut prompts, mut refused) = (0, 0, 0);
    for told in &told {
        match &told.usage {
            Some(usage) => {
                assert!(told.done && told.error.is_none(), "{told:?}");
                prompts += 1;
                let completion = usage["completion_tokens"].as_i64().expect("a number");
                let is_cut = completion < i64::from(tokens);
                assert_eq!(told.stop_reason.as_deref() == Some("balance_exhausted"), is_cut, "{told:?}");
                decoded += completion;
            }
            None => {
                let error = told.error.as_ref().expect("an answer or an error");
                assert_eq!(error["code"], "insufficient_quota", "{error}");
                refused += 1;
            }
        }
    }
    assert_eq!(prompts + refused, CROWD as i64);
    let money = run(&["balance", "--tenant", &tenant]);
    let left = money["balance_nano_usd"].as_i64().expect("a number");
    assert_eq!(money["held_nano_usd"], 0, "{money}");
    // Every token that the balance paid for was decoded, and no other.
    assert_eq!(money["charged_nano_usd"], json!(prompts * prompt * INPUT + decoded * OUTPUT));
    assert_eq!(left, balance - prompts * prompt * INPUT - decoded * OUTPUT);
    assert!((0..OUTPUT).contains(&left) || step == 0 && left < prompt * INPUT + OUTPUT, "{left} are left");
    let report = run(&["ledger", "verify"]);
    assert_eq!((&report["imbalance_nano_usd"], &report["open_holds"]), (&json!(0), &json!(0)), "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_on_three_edges_get_exactly_the_tokens_that_the_balance_pays_for() {
    crowd(0, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_whose_holds_must_grow_get_exactly_the_tokens_that_the_balance_pays_for() {
    crowd(3, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_that_their_clients_cut_are_charged_exactly_what_was_decoded() {
    let home = Home::of_crowd("step_tokens = 16\n", MODEL, QUEUE);
    let node = home.start(&[]);
    let key = home.key();
    let mut random = StdRng::seed_from_u64(5);
    let cuts: Vec<(usize, u64)> =
        (0..CROWD).map(|_| (random.random_range(0..30), random.random_range(0..20))).collect();
    let streams = futures::stream::iter(cuts).map(|(after, pause)| {
        let (node, key) = (&node, &key);
        async move {
            let mut answer = node.ask(key, "slowly <<slow:1>>", 40).await;
            for _ in 0..after {
                if answer.next().await.is_none() {
                    break;
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(pause)).await;
        }
    });
    streams.buffer_unordered(64).collect::<Vec<()>>().await;
    home.assert_settled(&[]);
    let entries = home.run(&["ledger", "list", "--tenant", "ten_development", "--limit", "100000"]);
    let mut ends = std::collections::BTreeMap::<&str, u64>::new();
    let (mut charged, mut released) = (0, 0);
    for entry in entries.as_array().expect("a list") {
        match entry["kind"].as_str().expect("a kind") {
            "post" => charged += entry["usage"]["completion_tokens"].as_u64().expect("a number"),
            "release" => released += 1,
            _ => continue,
        }
        *ends.entry(entry["request"].as_str().expect("a request")).or_default() += 1;
    }
    assert_eq!(ends.len(), CROWD);
    assert!(ends.values().all(|ends| *ends == 1));
    // As the engine itself counted them.
    let metrics = reqwest::get(format!("{}/metrics", node.url)).await.unwrap().text().await.unwrap();
    let line = metrics.lines().find(|line| line.starts_with("lightcone_decoded_tokens_total")).expect("the metric");
    let decoded: u64 = line.rsplit(' ').next().unwrap().parse().expect("a number");
    assert_eq!(charged, decoded, "{released} were released");
}
