//! Edge and worker as processes of their own, on an ordinary Redis, with tokens coming back over TCP.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::process::{Home, Node, Redis, SOON};

struct Split {
    home: Home,
    redis: Redis,
    key: String,
    edge: Node,
}

impl Split {
    fn start() -> Self {
        Self::of(Home::new(""), |_| ())
    }

    fn of(home: Home, configure: impl FnOnce(&Home)) -> Self {
        configure(&home);
        let redis = Redis::start();
        let made = home.run(&["keys", "bootstrap", "--redis-url", &redis.url]);
        assert_eq!(made["created"], true);
        let key = home.key();
        let edge = home.start(&["--role", "edge", "--redis-url", &redis.url]);
        Self { home, redis, key, edge }
    }

    fn worker(&self) -> Node {
        self.home.start(&["--role", "worker", "--redis-url", &self.redis.url])
    }

    /// What was charged, in order.
    fn posts(&self) -> Vec<serde_json::Value> {
        self.home.posts(&["--redis-url", &self.redis.url])
    }

    fn charged(&self) -> i64 {
        let money = self.home.assert_settled(&["--redis-url", &self.redis.url]);
        money["charged_nano_usd"].as_i64().expect("a number")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_come_back_from_a_worker_of_another_process() {
    let split = Split::start();
    let _worker = split.worker();
    let asked = (0..8).map(|_| async { split.edge.ask(&split.key, "hello", 30).await.rest().await });
    let told = futures::future::join_all(asked).await;
    for one in &told {
        assert_eq!((one.finish.as_deref(), one.done), (Some("length"), true), "{one:?}");
        assert_eq!(one.text, told[0].text);
    }
    let usage = told[0].usage.as_ref().expect("usage");
    let price = usage["prompt_tokens"].as_i64().unwrap() * 200 + 30 * 300;
    assert_eq!(split.charged(), 8 * price);
}

/// A request that is disturbed after it has begun: whether what its client got is what it gets undisturbed, and how long
/// it heard nothing at most.
async fn undisturbed_by(split: &Split, text: &str, disturb: impl AsyncFnOnce()) -> Duration {
    let whole = split.edge.ask(&split.key, text, 200).await.rest().await;
    let mut answer = split.edge.ask(&split.key, text, 200).await;
    let mut got = answer.begun().await;
    disturb().await;
    let (mut gap, mut before) = (Duration::ZERO, Instant::now());
    let mut is_done = false;
    while let Some(data) = answer.next().await {
        gap = gap.max(before.elapsed());
        before = Instant::now();
        is_done = data == "[DONE]";
        if !is_done {
            let chunk: Value = serde_json::from_str(&data).expect("JSON");
            assert!(chunk["error"].is_null(), "{chunk}");
            got += chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            if !chunk["usage"].is_null() {
                assert_eq!(Some(&chunk["usage"]), whole.usage.as_ref());
            }
        }
    }
    assert_eq!((got, is_done), (whole.text, true));
    let price = whole.usage.expect("usage")["prompt_tokens"].as_i64().expect("a number") * 200 + 200 * 300;
    assert_eq!(split.charged(), 2 * price);
    let posts = split.posts();
    assert!(posts.len() == 2 && posts.iter().all(|post| post["note"] == "length"), "{posts:#?}");
    gap
}

/// Within which another worker goes on.
const TAKEN_OVER: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_when_its_worker_is_killed() {
    let split = Split::start();
    let first = split.worker();
    let mut second = None;
    let gap = undisturbed_by(&split, "slowly <<slow:5>>", async || {
        second = Some(split.worker());
        first.kill();
    });
    let gap = gap.await;
    assert!(gap < TAKEN_OVER, "{gap:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_waits_for_a_worker_when_the_only_one_is_killed() {
    let split = Split::start();
    let first = split.worker();
    let mut second = None;
    undisturbed_by(&split, "slowly <<slow:5>>", async || {
        first.kill();
        tokio::time::sleep(Duration::from_secs(2)).await;
        second = Some(split.worker());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_when_its_worker_is_frozen_which_changes_nothing_when_it_thaws() {
    let split = Split::start();
    let first = split.worker();
    let mut second = None;
    let gap = undisturbed_by(&split, "slowly <<slow:10>>", async || {
        second = Some(split.worker());
        first.signal(Signal::SIGSTOP);
    });
    let gap = gap.await;
    assert!(gap < TAKEN_OVER, "{gap:?}");
    drop(second);
    let before = split.posts();
    first.signal(Signal::SIGCONT);
    // It takes new requests, which it can only do after it has dealt with the old one.
    let told = split.edge.ask(&split.key, "well", 5).await.rest().await;
    assert_eq!(told.finish.as_deref(), Some("length"), "{told:?}");
    split.charged();
    let posts = split.posts();
    assert_eq!((posts.len(), &posts[..2]), (3, &before[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_when_its_worker_is_stopped_and_cannot_end_it_in_time() {
    let split = Split::start();
    let mut first = split.worker();
    let mut second = None;
    let gap = undisturbed_by(&split, "slowly <<slow:40>>", async || {
        second = Some(split.worker());
        first.signal(Signal::SIGTERM);
    });
    let gap = gap.await;
    assert!(gap < TAKEN_OVER, "{gap:?}");
    assert_eq!(first.ended(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_when_the_store_is_killed() {
    let mut split = Split::start();
    let _worker = split.worker();
    let mut answers = Vec::new();
    for _ in 0..3 {
        let mut answer = split.edge.ask(&split.key, "slowly <<slow:10>>", 300).await;
        answer.begun().await;
        answers.push(answer);
    }
    split.redis.kill();
    tokio::time::sleep(Duration::from_secs(1)).await;
    split.redis.restart();
    for answer in answers {
        let told = answer.rest().await;
        assert_eq!((told.finish.as_deref(), told.done), (Some("length"), true), "{told:?}");
    }
    split.charged();
    assert_eq!(split.posts().len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_nobody_takes_over_fails_and_its_journal_is_charged() {
    let split = Split::of(Home::new(""), |home| {
        home.configure("wait_ms_max = 30000", "wait_ms_max = 30000\ntakeover_ms_max = 1000")
    });
    let worker = split.worker();
    let mut answer = split.edge.ask(&split.key, "slowly <<slow:20>>", 400).await;
    answer.begun().await;
    worker.kill();
    let told = answer.rest().await;
    let error = told.error.expect("an error")["message"].to_string();
    assert!(error.contains("What it had decoded may be charged"), "{error}");
    // Nobody knows what it had decoded but its journal, which the next worker on this machine reads.
    assert_eq!(split.charged(), 0);
    let (_worker, next) =
        tokio::join!(async { split.worker() }, async { split.edge.ask(&split.key, "well", 5).await.rest().await });
    assert_eq!(next.finish.as_deref(), Some("length"), "{next:?}");
    split.charged();
    let posts = split.posts();
    assert_eq!(posts.len(), 2, "{posts:#?}");
    let (lost, well) = (&posts[0], &posts[1]);
    assert_eq!((&lost["note"], &well["note"]), (&"worker_lost".into(), &"length".into()), "{posts:#?}");
    let decoded = lost["usage"]["completion_tokens"].as_u64().expect("a number");
    assert!(decoded >= told.chunks && decoded < 400, "{decoded} of which {} were delivered", told.chunks);
    assert!(lost["usage"]["prompt_tokens"].as_u64().expect("a number") > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_is_killed_costs_its_clients_what_was_decoded_until_then() {
    let split = Split::start();
    let _worker = split.worker();
    let mut answer = split.edge.ask(&split.key, "slowly <<slow:20>>", 400).await;
    answer.begun().await;
    let Split { home, redis, key, edge } = split;
    edge.kill();
    assert!(!answer.rest().await.done);
    let edge = home.start(&["--role", "edge", "--redis-url", &redis.url]);
    let split = Split { home, redis, key, edge };
    let charged = split.charged();
    assert!(charged > 0 && charged < 400 * 300, "{charged}");
    assert_eq!(split.posts()[0]["note"], "cancelled");
    let told = split.edge.ask(&split.key, "well", 5).await.rest().await;
    assert_eq!(told.finish.as_deref(), Some("length"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_is_cancelled_at_a_worker_of_another_process() {
    let split = Split::start();
    let _worker = split.worker();
    let mut answer = split.edge.ask(&split.key, "slowly <<slow:20>>", 400).await;
    answer.begun().await;
    drop(answer);
    let charged = split.charged();
    assert!(charged > 0 && charged < 400 * 300, "{charged}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_is_cancelled_from_another_edge_and_ends_with_what_was_used() {
    let split = Split::start();
    let other = split.home.start(&["--role", "edge", "--redis-url", &split.redis.url]);
    let _worker = split.worker();
    let mut answer = split.edge.ask(&split.key, "slowly <<slow:20>>", 400).await;
    let first = answer.next().await.expect("an event");
    let first: serde_json::Value = serde_json::from_str(&first).expect("JSON");
    let id = first["id"].as_str().expect("an id").to_owned();
    answer.begun().await;
    let http = reqwest::Client::new();
    let cancel = |id: String| {
        let request = http.post(format!("{}/v1/chat/completions/{id}/cancel", other.url)).bearer_auth(&split.key);
        async move { request.send().await.expect("an answer").status().as_u16() }
    };
    assert_eq!(cancel("chatcmpl-unknown".to_owned()).await, 404);
    assert_eq!(cancel(id.clone()).await, 200);
    let told = answer.rest().await;
    assert!(told.done && told.error.is_none(), "{told:?}");
    let usage = told.usage.expect("usage");
    let tokens = usage["completion_tokens"].as_i64().expect("a number");
    assert!((1..400).contains(&tokens), "{usage}");
    assert_eq!(split.charged(), usage["prompt_tokens"].as_i64().expect("a number") * 200 + tokens * 300);
    assert_eq!(cancel(id).await, 404);
    // By the name that its client gave it.
    let body = serde_json::json!({
        "messages": [{ "role": "user", "content": "slowly <<slow:20>>" }], "max_tokens": 400, "ignore_eos": true,
        "request_id": "cmpl-7",
    });
    let request = http.post(format!("{}/v1/chat/completions", split.edge.url)).bearer_auth(&split.key);
    let request = request.header("content-type", "application/json").body(body.to_string());
    let waiting = tokio::spawn(async move { request.send().await.expect("an answer").text().await.expect("a body") });
    let mut status = 404;
    for _ in 0..200 {
        status = cancel("chatcmpl-cmpl-7".to_owned()).await;
        if status == 200 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(status, 200);
    let told = waiting.await.expect("a task");
    assert!(told.contains("\"finish_reason\":\"stop\""), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_key_is_one_generation_on_two_edges() {
    let split = Split::start();
    let other = split.home.start(&["--role", "edge", "--redis-url", &split.redis.url]);
    let _worker = split.worker();
    let body = serde_json::json!({
        "messages": [{ "role": "user", "content": "slowly <<slow:10>>" }], "max_tokens": 60, "ignore_eos": true,
        "stream": true, "stream_options": { "include_usage": true },
    });
    let http = reqwest::Client::new();
    let ask = |url: &str, after: usize| {
        let request = http.post(format!("{url}/v1/chat/completions")).bearer_auth(&split.key);
        let request = request.header("content-type", "application/json").header("idempotency-key", "twice");
        let request = request.header("last-event-id", after.to_string()).body(body.to_string());
        async move {
            let text = request.send().await.expect("an answer").text().await.expect("a body");
            text.split_inclusive("\n\n").filter(|event| !event.starts_with(':')).collect::<String>()
        }
    };
    let later = async {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        ask(&other.url, 0).await
    };
    let (first, second) = tokio::join!(ask(&split.edge.url, 0), later);
    assert!(first.ends_with("data: [DONE]\n\n"), "{first}");
    assert_eq!(first, second);
    let events: Vec<&str> = first.split_inclusive("\n\n").collect();
    assert_eq!(ask(&other.url, 7).await, events[7..].concat());
    let usage: serde_json::Value = serde_json::from_str(
        events[events.len() - 2].lines().find_map(|line| line.strip_prefix("data: ")).expect("data"),
    )
    .expect("JSON");
    let prompt = usage["usage"]["prompt_tokens"].as_i64().expect("a number");
    assert_eq!(split.charged(), prompt * 200 + 60 * 300);
}

impl Split {
    fn run(&self, arguments: &[&str]) -> Value {
        self.home.run(&[arguments, &["--redis-url", &self.redis.url]].concat())
    }

    /// Waits until the nodes of this role are in these states.
    async fn until_nodes_are(&self, role: &str, states: &[&str]) -> Vec<Value> {
        let begun = Instant::now();
        loop {
            let nodes = self.run(&["nodes"]);
            let nodes: Vec<_> = nodes.as_array().expect("a list").iter().filter(|node| node["role"] == role).collect();
            let mut found: Vec<_> = nodes.iter().map(|node| node["state"].as_str().expect("a state")).collect();
            found.sort_unstable();
            if found == states {
                return nodes.into_iter().cloned().collect();
            }
            assert!(begun.elapsed() < SOON, "{found:?} and not {states:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_and_actors_are_listed_and_a_lost_one_shows_as_lost() {
    let split = Split::of(Home::new(""), |home| {
        home.configure("[node]\n", "[node]\nstatus_listen = \"127.0.0.1:0\"\n");
    });
    let (first, mut second) = (split.worker(), split.worker());
    let mut answer = split.edge.ask(&split.key, "slowly <<slow:20>>", 400).await;
    answer.begun().await;
    let workers = split.until_nodes_are("worker", &["ready", "ready"]).await;
    assert!(workers.iter().all(|node| node["models"][0]["sequences_max"] == 4), "{workers:#?}");
    let begun = Instant::now();
    while split
        .until_nodes_are("worker", &["ready", "ready"])
        .await
        .iter()
        .all(|node| node["models"][0]["running"] == 0)
    {
        assert!(begun.elapsed() < SOON, "nobody says that it has something to do");
    }
    let edges = split.until_nodes_are("edge", &["ready"]).await;
    assert!(edges[0]["relay"].is_string() && edges[0]["models"] == json!([]), "{edges:#?}");
    // A worker says by itself how it is.
    let look = async |path: &str| {
        let answer = reqwest::get(format!("{}{path}", first.url)).await.expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("a body"))
    };
    assert_eq!(look("/healthz").await.0, 200);
    assert_eq!(look("/readyz").await, (200, "{\"status\":\"ready\"}".to_owned()));
    let (status, metrics) = look("/metrics").await;
    assert!(status == 200 && metrics.contains("lightcone_step_seconds_count{model=\"tzafon.sm-1\"}"), "{metrics}");
    assert_eq!(look("/v1/models").await.0, 404);
    let actors = split.run(&["actors"]);
    let of = |node: &Value| {
        let mine = actors.as_array().expect("a list").iter().filter(|actor| actor["node"] == node["node"]);
        mine.map(|actor| actor["actor"].as_str().expect("a name")).collect::<Vec<_>>()
    };
    let below_root = [
        "claim-reconciler",
        "confirmer",
        "courier",
        "directory",
        "hold-reconciler",
        "journal-checker",
        "recoverer",
        "tzafon.sm-1",
        "tzafon.sm-1/claimer",
        "tzafon.sm-1/renewer",
        "tzafon.sm-1/worker",
        "verifier",
    ];
    let tree = std::iter::once("root".to_owned()).chain(below_root.map(|name| format!("root/{name}")));
    assert_eq!(of(&workers[0]), tree.collect::<Vec<_>>());
    assert!(actors.as_array().expect("a list").iter().all(|actor| actor["state"] == "ready"), "{actors:#}");
    // One goes in order, the other does not.
    second.signal(Signal::SIGTERM);
    assert_eq!(second.ended(), Some(0));
    split.until_nodes_are("worker", &["ready"]).await;
    first.kill();
    split.until_nodes_are("worker", &["lost"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_model_freezes_is_not_ready_until_it_is_another_and_a_busy_one_is() {
    let split = Split::of(Home::new(""), |home| {
        home.configure("[node]\n", "[node]\nstatus_listen = \"127.0.0.1:0\"\n");
        home.configure("stall_ms_max = 1500", "stall_ms_max = 3000");
    });
    let worker = split.worker();
    // More than it has room for, each step of which takes long.
    let asked = (0..12).map(|_| async { split.edge.ask(&split.key, "slowly <<slow:50>>", 20).await.rest().await });
    let busy = async {
        for _ in 0..10 {
            assert_eq!(worker.ready().await, 200);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let (told, ()) = tokio::join!(futures::future::join_all(asked), busy);
    assert!(told.iter().all(|told| told.done));
    let freezing = split.edge.ask(&split.key, "now <<freeze:3>>", 50).await;
    let (begun, mut statuses) = (Instant::now(), vec![200]);
    while begun.elapsed() < SOON && (statuses.len() < 3 || statuses.last() != Some(&200)) {
        let status = worker.ready().await;
        if statuses.last() != Some(&status) {
            statuses.push(status);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(statuses, [200, 503, 200]);
    assert!(freezing.rest().await.error.is_some(), "two workers were lost with it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_ten_times_the_capacity_what_is_let_in_begins_in_time_and_the_rest_hears_when_to_come_back() {
    const OBJECTIVE_MS: u64 = 1000;
    let split = Split::of(Home::new(""), |home| {
        home.configure("[queue]\n", &format!("[queue]\nstart_ms_max = {OBJECTIVE_MS}\n"));
    });
    let _worker = split.worker();
    let http = reqwest::Client::new();
    // Four at a time take 5 steps of 80 ms: ten a second.
    let body = json!({
        "messages": [{ "role": "user", "content": "slowly <<slow:20>>" }], "max_tokens": 5, "ignore_eos": true,
        "stream": true,
    });
    let ask = async || {
        let request = http.post(format!("{}/v1/chat/completions", split.edge.url)).bearer_auth(&split.key);
        let asked = Instant::now();
        let mut answer = request.json(&body).send().await.expect("an answer");
        if answer.status() != 200 {
            let retry = answer.headers()["retry-after-ms"].to_str().expect("ASCII").parse::<u64>().expect("a number");
            return Err((answer.status().as_u16(), retry));
        }
        let mut text = String::new();
        while !text.contains("\"content\":\"s") {
            text += std::str::from_utf8(&answer.chunk().await.expect("more").expect("more")).expect("UTF-8");
        }
        let first = asked.elapsed();
        while answer.chunk().await.expect("more").is_some() {}
        Ok(first)
    };
    // So that there is a pace to go by.
    let warm = futures::future::join_all((0..20).map(|_| ask())).await;
    assert!(warm.iter().any(Result::is_ok));
    let told = futures::future::join_all((0..400).map(|index| {
        let ask = &ask;
        async move {
            tokio::time::sleep(Duration::from_millis(10 * index)).await;
            ask().await
        }
    }))
    .await;
    let (let_in, refused): (Vec<_>, Vec<_>) = told.into_iter().partition(Result::is_ok);
    let mut first: Vec<_> = let_in.into_iter().flatten().collect();
    first.sort_unstable();
    let refused: Vec<_> = refused.into_iter().filter_map(Result::err).collect();
    assert!(first.len() >= 30 && refused.len() >= 200, "{} let in, {} refused", first.len(), refused.len());
    assert!(refused.iter().all(|(status, retry)| *status == 429 && (1..=60_000).contains(retry)), "{refused:?}");
    let late = first[first.len() * 95 / 100];
    assert!(late < Duration::from_millis(OBJECTIVE_MS * 3 / 2), "{late:?} of {first:?}");
    split.charged();
}
