//! Real nodes tell a tenant's server what happens to its account, also when one dies over it.

use std::time::Duration;

use lightcone::{
    admission::LimitKind,
    domain::{NanoUsd, TenantId},
    ledger::Ledger,
    operator::Accounts,
    store::Store,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{
    changes,
    house::LEASE,
    process::{Home, Node, Redis, SOON},
    receiver::{Arrival, Receiver},
};

const TENANT: &str = "ten_development";

struct Site {
    home: Home,
    redis: Redis,
    accounts: Accounts,
    receiver: Receiver,
    secret: String,
}

impl Site {
    async fn new() -> Self {
        let extra = "[webhooks]\nallow_private = true\ntimeout_ms = 1000\n";
        let (home, redis) = (Home::with_leases(2000, "step_tokens = 8\n", extra), Redis::start());
        home.run(&["keys", "bootstrap", "--redis-url", &redis.url]);
        let store = Store::connect(&redis.url, Duration::from_secs(5)).await.expect("the store is up");
        let accounts = Accounts::new(store.clone(), Ledger::new(store, LEASE));
        let mut site = Self { home, redis, accounts, receiver: Receiver::start(), secret: String::new() };
        let made = site.webhooks("set", &["--url", &site.receiver.url()]);
        site.secret = made["secret"].as_str().expect("a secret").to_owned();
        site
    }

    fn webhooks(&self, command: &str, arguments: &[&str]) -> Value {
        let words = ["webhooks"].into_iter().chain(command.split(' '));
        let all = words.chain(["--tenant", TENANT, "--redis-url", &self.redis.url]).chain(arguments.iter().copied());
        self.home.run(&all.collect::<Vec<_>>())
    }

    fn node(&self, role: &str, fault: &str) -> Node {
        self.home.start_armed(&["--role", role, "--redis-url", &self.redis.url], fault)
    }

    async fn low_balance(&self, below: i64) {
        let below = Some(NanoUsd::new(below));
        self.accounts.change_tenant(&TenantId::from(TENANT), &changes::of_low_balance(below)).await.expect("a mark");
    }

    async fn arrival(&self, count: usize) -> Arrival {
        let arrival = self.receiver.wait_for(count).await.pop().expect("one at least");
        assert!(arrival.is_signed_with(&self.secret), "{arrival:?}");
        arrival
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_hears_that_its_money_runs_low_that_a_limit_is_reached_and_that_nothing_is_left() {
    let site = Site::new().await;
    let (mut edge, _worker) = (site.node("edge", ""), site.node("worker", ""));
    let (key, tenant) = (site.home.key(), TenantId::from(TENANT));
    let money = site.accounts.tenant(&tenant).await.unwrap().money.balance.nano();

    site.low_balance(money).await;
    assert!(edge.ask(&key, "hello", 4).await.rest().await.done);
    let low = site.arrival(1).await.payload();
    assert_eq!((&low["type"], &low["data"]["threshold_nano_usd"]), (&json!("balance.low"), &json!(money)));

    let limit = async |limit| {
        let changes = changes::of_limits(vec![(LimitKind::SpendPerDay, limit)]);
        site.accounts.change_tenant(&tenant, &changes).await.unwrap()
    };
    limit(Some(1)).await;
    for _ in 0..2 {
        assert!(edge.ask(&key, "hello", 4).await.rest().await.error.is_some());
    }
    let reached = site.arrival(2).await.payload();
    let data = &reached["data"];
    assert_eq!((&reached["type"], &data["limit"]), (&json!("limit.reached"), &json!("spend_per_day")));
    assert_eq!((&data["limit_value"], &data["scope"]), (&json!(1), &json!("tenant")));
    limit(None).await;

    // Enough for the prompt and some of the answer.
    let left = site.accounts.tenant(&tenant).await.unwrap().money.balance.nano();
    site.accounts.adjust(&tenant, NanoUsd::new(20_000 - left), "nearly all", "").await.unwrap();
    let told = edge.ask(&key, "hello", 400).await.rest().await;
    assert_eq!((told.done, told.stop_reason.as_deref()), (true, Some("balance_exhausted")), "{told:?}");
    let exhausted = site.arrival(3).await.payload();
    assert_eq!((&exhausted["type"], &exhausted["tenant"]), (&json!("balance.exhausted"), &json!(TENANT)));

    let test = site.webhooks("test", &[]);
    assert_eq!((&test["taken"], site.arrival(4).await.id()), (&json!(true), test["id"].as_str().unwrap()));
    let shown = site.webhooks("show", &[]);
    assert_eq!((&shown["waiting"], &shown["dead_letters"], &shown["secret"]), (&json!(0), &json!(0), &Value::Null));
    edge.signal(Signal::SIGTERM);
    assert_eq!(edge.ended(), Some(0));
    assert_eq!(site.webhooks("dead list", &[]), json!([]));
    assert_eq!(site.webhooks("remove", &[])["removed"], true);
    assert_eq!(site.receiver.arrivals().len(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_between_delivery_and_removal_leaves_the_event_to_the_next_under_the_same_id() {
    let site = Site::new().await;
    let mut edge = site.node("edge", "webhooks.deliver.answered");
    site.low_balance(i64::MAX).await;
    let first = site.arrival(1).await;
    let begun = std::time::Instant::now();
    while edge.is_running() {
        assert!(begun.elapsed() < SOON, "the node did not die");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(site.webhooks("show", &[])["waiting"], 1);
    let _next = site.node("edge", "");
    let second = site.arrival(2).await;
    assert_eq!((second.id(), &second.body), (first.id(), &first.body));
    let begun = std::time::Instant::now();
    while site.webhooks("show", &[])["waiting"] != 0 {
        assert!(begun.elapsed() < SOON, "the event was not removed");
    }
    assert_eq!(site.receiver.arrivals().len(), 2);
}
