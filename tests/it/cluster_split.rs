//! Edge and worker as processes of their own, on an ordinary Redis, with tokens coming back over TCP.

use nix::sys::signal::Signal;

use crate::support::process::{Home, Node, Redis};

struct Split {
    home: Home,
    redis: Redis,
    key: String,
    edge: Node,
}

impl Split {
    fn start() -> Self {
        let (home, redis) = (Home::new(""), Redis::start());
        let made = home.run(&["keys", "bootstrap", "--redis-url", &redis.url]);
        assert_eq!(made["created"], true);
        let key = home.key();
        let edge = home.start(&["--role", "edge", "--redis-url", &redis.url]);
        Self { home, redis, key, edge }
    }

    fn worker(&self) -> Node {
        self.home.start(&["--role", "worker", "--redis-url", &self.redis.url])
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_killed_fails_its_streams_at_once_and_another_takes_over_the_queue() {
    let split = Split::start();
    let worker = split.worker();
    let mut answer = split.edge.ask(&split.key, "slowly <<slow:20>>", 400).await;
    answer.begun().await;
    worker.kill();
    let told = answer.rest().await;
    assert!(told.error.is_some(), "{told:?}");
    assert_eq!(split.charged(), 0);
    let (_worker, told) =
        tokio::join!(async { split.worker() }, async { split.edge.ask(&split.key, "well", 5).await.rest().await });
    assert_eq!(told.finish.as_deref(), Some("length"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_frozen_fails_its_streams_and_settles_nothing_when_it_thaws() {
    let split = Split::start();
    let worker = split.worker();
    let mut answer = split.edge.ask(&split.key, "slowly <<slow:20>>", 100).await;
    answer.begun().await;
    worker.signal(Signal::SIGSTOP);
    let told = answer.rest().await;
    assert!(told.error.is_some(), "{told:?}");
    assert_eq!(split.charged(), 0);
    worker.signal(Signal::SIGCONT);
    // It takes new requests, which it can only do after it has dealt with the old one.
    let told = split.edge.ask(&split.key, "well", 5).await.rest().await;
    assert_eq!(told.finish.as_deref(), Some("length"), "{told:?}");
    let usage = told.usage.unwrap();
    assert_eq!(split.charged(), usage["prompt_tokens"].as_i64().unwrap() * 200 + 5 * 300);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_is_killed_costs_its_clients_nothing() {
    let split = Split::start();
    let _worker = split.worker();
    let mut answer = split.edge.ask(&split.key, "slowly <<slow:20>>", 400).await;
    answer.begun().await;
    let Split { home, redis, key, edge } = split;
    edge.kill();
    assert!(!answer.rest().await.done);
    let edge = home.start(&["--role", "edge", "--redis-url", &redis.url]);
    let split = Split { home, redis, key, edge };
    assert_eq!(split.charged(), 0);
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
