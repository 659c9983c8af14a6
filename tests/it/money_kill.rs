//! Edge, worker and store killed at every point at which something is written: afterwards the books balance, nothing
//! is charged twice, nothing that was delivered is free, and no hold is left.

use std::{collections::BTreeMap, time::Duration};

use crate::support::process::{Home, Node, Redis, SOON, Told};

const STREAMS: usize = 4;
const TOKENS: u32 = 24;
/// Tokens that may be written down and not yet on their way when a worker dies.
const LAG: u64 = 4;

/// Points that a worker passes, and with which request.
const OF_WORKER: &[(&str, &str)] = &[
    ("queue.claim.answered", WELL),
    ("journal.begin.written", WELL),
    ("journal.progress.written:7", WELL),
    ("ledger.extend.asked", WELL),
    ("ledger.extend.answered", WELL),
    ("journal.ended.written", WELL),
    ("journal.ended.synced", WELL),
    ("ledger.settle.asked", WELL),
    ("ledger.settle.answered", WELL),
    ("journal.closed.written", WELL),
    ("queue.acknowledge.asked", WELL),
    ("queue.acknowledge.answered", WELL),
    ("ledger.release.asked", LEAVING),
    ("ledger.release.answered", LEAVING),
];
const OF_EDGE: &[&str] =
    &["admission.hold.asked:2", "admission.hold.answered:2", "queue.publish.asked:2", "queue.publish.answered:2"];

const WELL: &str = "slowly <<slow:4>>";
/// Its client goes away before it has got anything.
const LEAVING: &str = "slowly <<slow:300>>";

struct Site {
    home: Home,
    redis: Redis,
    key: String,
}

impl Site {
    fn new() -> Self {
        // Short leases, and steps so small that holds must grow.
        let (home, redis) = (Home::with_leases(1000, "step_tokens = 8\n", ""), Redis::start());
        home.run(&["keys", "bootstrap", "--redis-url", &redis.url]);
        let key = home.key();
        Self { home, redis, key }
    }

    fn node(&self, role: &str, fault: &str) -> Node {
        self.home.start_armed(&["--role", role, "--redis-url", &self.redis.url], fault)
    }

    async fn ask_all(&self, edge: &Node, text: &str) -> Vec<Told> {
        ask_all(&self.key, edge, text).await
    }

    /// Waits until everything is settled; then checks what was charged against what was delivered.
    /// `lag`: how many tokens more may be charged than were delivered.
    fn check(&self, point: &str, told: &[Told], lag: u64) {
        self.home.assert_settled(&["--redis-url", &self.redis.url]);
        let posts = self.home.posts(&["--redis-url", &self.redis.url]);
        let mut charged = BTreeMap::new();
        for post in &posts {
            let request = post["request"].as_str().expect("a request").to_owned();
            let tokens = post["usage"]["completion_tokens"].as_u64().expect("a number");
            assert!(charged.insert(request.clone(), tokens).is_none(), "{point}: {request} is charged twice");
        }
        for told in told {
            let Some(id) = &told.id else { continue };
            let is_free = told.error.as_ref().is_some_and(|error| error.to_string().contains("Nothing was charged"));
            match charged.get(id) {
                Some(tokens) => {
                    assert!(!is_free, "{point}: {id} was told that it is free and is charged {tokens}");
                    assert!(*tokens >= told.chunks, "{point}: {id} got {} and pays {tokens}", told.chunks);
                    assert!(*tokens <= told.chunks + lag, "{point}: {id} got {} and pays {tokens}", told.chunks);
                    if let Some(usage) = &told.usage {
                        assert_eq!(usage["completion_tokens"], *tokens, "{point}: {id}");
                    }
                }
                None => assert!(is_free || told.chunks == 0, "{point}: {id} got {} for nothing", told.chunks),
            }
        }
    }
}

async fn ask_all(key: &str, edge: &Node, text: &str) -> Vec<Told> {
    let ask = |_| async {
        let asking = async { edge.ask(key, text, TOKENS).await.rest().await };
        match text {
            LEAVING => tokio::time::timeout(Duration::from_millis(150), asking).await.ok(),
            _ => Some(asking.await),
        }
    };
    futures::future::join_all((0..STREAMS).map(ask)).await.into_iter().flatten().collect()
}

async fn died(what: &str, mut is_running: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while is_running() {
        assert!(begun.elapsed() < SOON, "{what} was never reached");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_killed_at_any_write_owes_what_it_decoded_and_no_more() {
    for (point, text) in OF_WORKER {
        let site = Site::new();
        let edge = site.node("edge", "");
        let mut worker = site.node("worker", point);
        let asking = async { site.ask_all(&edge, text).await };
        let reviving = async {
            died(point, || worker.is_running()).await;
            site.node("worker", "")
        };
        let (told, _worker) = tokio::join!(asking, reviving);
        site.check(point, &told, LAG);
        let cut: Vec<_> = told.iter().filter(|told| !told.done || told.error.is_some()).collect();
        assert!(cut.is_empty(), "{point}: {cut:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_is_killed_at_any_write_leaves_no_hold_and_no_request() {
    for point in OF_EDGE {
        let site = Site::new();
        let mut edge = site.node("edge", point);
        let _worker = site.node("worker", "");
        let ask = |_| async {
            // Some are refused by a connection that is gone.
            edge.try_ask(&site.key, WELL, TOKENS).await
        };
        let answers = futures::future::join_all((0..STREAMS).map(ask)).await;
        let mut told = Vec::new();
        for answer in answers.into_iter().flatten() {
            told.push(answer.rest().await);
        }
        died(point, || edge.is_running()).await;
        let edge = site.node("edge", "");
        site.check(point, &told, TOKENS.into());
        let after = site.ask_all(&edge, "well").await;
        assert!(after.iter().all(|told| told.done), "{point}: {after:?}");
        site.check(point, &after, LAG);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_killed_at_any_write_loses_and_doubles_nothing() {
    let of_edge = OF_EDGE.iter().map(|point| ("edge", *point, WELL));
    let of_worker = OF_WORKER.iter().map(|(point, text)| ("worker", *point, *text));
    for (role, point, text) in of_edge.chain(of_worker) {
        let mut site = Site::new();
        let fault = format!("{point}=kill={}", site.redis.pid());
        let armed = |of: &str| if of == role { fault.as_str() } else { "" };
        let edge = site.node("edge", armed("edge"));
        let _worker = site.node("worker", armed("worker"));
        let (key, begun) = (site.key.clone(), std::time::Instant::now());
        let asking = ask_all(&key, &edge, text);
        let redis = &mut site.redis;
        let reviving = async {
            died(point, || redis.is_running()).await;
            redis.restart();
        };
        let (told, ()) = tokio::join!(asking, reviving);
        assert!(begun.elapsed() < SOON, "{point}");
        site.check(point, &told, TOKENS.into());
    }
}
