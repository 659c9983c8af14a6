//! Addresses that send too many wrong keys are blocked for a while, at every edge, and nobody else is.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use lightcone::{
    admission::{Address, Guard, GuardLimits},
    config,
};
use reqwest::{Client, Response};

use crate::support::{
    front::{Front, assert_error, hello, settings},
    house::{House, at_once},
};

/// Every client of these tests comes through the same gateway.
fn guarded() -> config::Edge {
    config::Edge { trusted_proxies: vec!["127.0.0.0/8".into()], auth_failures_max: 10, ..settings() }
}

/// Without a gateway: all come from one address.
fn bare() -> config::Edge {
    config::Edge { trusted_proxies: Vec::new(), ..guarded() }
}

async fn asked(url: &str, key: &str, forwarded_for: &str) -> Response {
    let request = Client::new().get(format!("{url}/v1/models")).bearer_auth(key);
    request.header("x-forwarded-for", forwarded_for).send().await.expect("an answer")
}

async fn status(url: &str, key: &str, forwarded_for: &str) -> u16 {
    asked(url, key, forwarded_for).await.status().as_u16()
}

/// Fails `count` times, each with a key of its own.
async fn fail(url: &str, count: usize, forwarded_for: &str) {
    for index in 0..count {
        assert_eq!(status(url, &format!("sk_wrong{index}"), forwarded_for).await, 401, "{index}");
    }
}

async fn open(url: &str, path: &str) -> u16 {
    reqwest::get(format!("{url}{path}")).await.expect("an answer").status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_wrong_keys_block_an_address_whatever_it_brings_next_and_no_other_address() {
    let front = Front::with(guarded(), 8, 1_000_000_000).await;
    let (url, good) = (front.url.as_str(), front.house.secret.as_str());
    // What succeeds between does not count, and neither does who brings no key.
    fail(url, 9, "203.0.113.7").await;
    assert_eq!(status(url, good, "203.0.113.7").await, 200);
    let keyless = front.http.get(format!("{url}/v1/models")).header("x-forwarded-for", "203.0.113.7");
    assert_eq!(keyless.send().await.expect("an answer").status().as_u16(), 401);
    fail(url, 1, "203.0.113.7").await;
    for key in [good, "sk_wrong", "no key at all"] {
        let answer = asked(url, key, "203.0.113.7").await;
        let header = |name: &str| answer.headers()[name].to_str().expect("text").parse::<u64>().expect("a number");
        let (seconds, ms) = (header("retry-after"), header("retry-after-ms"));
        assert!((290_000..=300_000).contains(&ms) && seconds == ms.div_ceil(1000), "{seconds} {ms}");
        let message = assert_error(answer, 429, "address_blocked", None, key).await;
        assert!(message.contains("failed authentications"), "{message}");
    }
    let generating = front.ask(&hello()).header("x-forwarded-for", "203.0.113.7").send().await.expect("an answer");
    assert_error(generating, 429, "address_blocked", None, "chat").await;
    // The same gateway, somebody else behind it; and the gateway itself.
    assert_eq!(status(url, good, "203.0.113.8").await, 200);
    assert_eq!(status(url, good, "unknown").await, 200);
    for path in ["/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"] {
        let asked = front.http.get(format!("{url}{path}")).header("x-forwarded-for", "203.0.113.7");
        assert_eq!(asked.send().await.expect("an answer").status().as_u16(), 200, "{path}");
    }
    let told = front.metrics.render();
    assert!(told.contains("lightcone_auth_failures_total 10\n"), "{told}");
    front.assert_nothing_happened("wrong keys").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_is_never_blocked_and_an_ipv6_network_counts_as_one_address() {
    let front = Front::with(guarded(), 8, 1_000_000_000).await;
    let (url, good) = (front.url.as_str(), front.house.secret.as_str());
    for forwarded_for in ["", "garbage", "127.0.0.9", "203.0.113.7, garbage"] {
        fail(url, 12, forwarded_for).await;
        assert_eq!(status(url, good, forwarded_for).await, 200, "{forwarded_for}");
    }
    for index in 0..10 {
        fail(url, 1, &format!("2001:db8:1:2::{index}")).await;
    }
    assert_eq!(status(url, good, "2001:db8:1:2:ffff::").await, 429);
    assert_eq!(status(url, good, "2001:db8:1:3::1").await, 200);
    // Written in another way, it is the same address.
    fail(url, 5, "203.0.113.7").await;
    fail(url, 5, "::ffff:203.0.113.7").await;
    assert_eq!(status(url, good, "203.0.113.7").await, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_that_nobody_trusts_says_of_its_address_is_ignored() {
    let front = Front::with(bare(), 8, 1_000_000_000).await;
    let (url, good) = (front.url.as_str(), front.house.secret.as_str());
    for index in 0..10 {
        fail(url, 1, &format!("203.0.113.{index}")).await;
    }
    assert_eq!(status(url, good, "198.51.100.1").await, 429);
    assert_eq!(open(url, "/readyz").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_edge_of_a_store_blocks_within_a_second() {
    let front = Front::with(guarded(), 8, 1_000_000_000).await;
    let other = front.beside(guarded());
    let elsewhere = format!("http://{}", other.address);
    let (url, good) = (front.url.as_str(), front.house.secret.as_str());
    // Both count together.
    fail(url, 5, "203.0.113.7").await;
    fail(&elsewhere, 5, "203.0.113.7").await;
    assert_eq!(status(&elsewhere, good, "203.0.113.7").await, 429);
    let begun = Instant::now();
    while status(url, good, "203.0.113.7").await != 429 {
        assert!(begun.elapsed() < Duration::from_secs(1), "still let in");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(status(url, good, "203.0.113.8").await, 200);
    let begun = Instant::now();
    while !front.metrics.render().contains("lightcone_addresses_blocked 1\n") {
        assert!(begun.elapsed() < Duration::from_secs(5), "{}", front.metrics.render());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // One that starts later knows as well.
    let late = front.beside(guarded());
    let begun = Instant::now();
    while status(&format!("http://{}", late.address), good, "203.0.113.7").await != 429 {
        assert!(begun.elapsed() < Duration::from_secs(1), "still let in");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_ends_and_the_count_begins_anew_and_nothing_stays_in_the_store() {
    let short = config::Edge { auth_block_seconds: 1, auth_failure_window_seconds: 3, ..guarded() };
    let front = Front::with(short, 8, 1_000_000_000).await;
    let (url, good) = (front.url.as_str(), front.house.secret.as_str());
    fail(url, 10, "203.0.113.7").await;
    let answer = asked(url, good, "203.0.113.7").await;
    let ms: u64 = answer.headers()["retry-after-ms"].to_str().expect("text").parse().expect("a number");
    assert_eq!(answer.status().as_u16(), 429);
    tokio::time::sleep(Duration::from_millis(ms + 5)).await;
    assert_eq!(status(url, good, "203.0.113.7").await, 200);
    fail(url, 9, "203.0.113.7").await;
    assert_eq!(status(url, good, "203.0.113.7").await, 200);
    // The window slides: what lies behind it does not count.
    tokio::time::sleep(Duration::from_millis(3_050)).await;
    fail(url, 9, "203.0.113.7").await;
    assert_eq!(status(url, good, "203.0.113.7").await, 200);
    tokio::time::sleep(Duration::from_millis(3_050)).await;
    let mut raw = front.house.valkey.raw().await;
    for pattern in ["lc:{a:*", "lc:{blocked}*"] {
        let left: Vec<String> = redis::cmd("KEYS").arg(pattern).query_async(&mut raw).await.expect("KEYS");
        assert!(left.is_empty(), "{left:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_lets_nobody_in_and_blocks_nobody() {
    let mut front = Front::with(guarded(), 8, 1_000_000_000).await;
    let url = front.url.clone();
    fail(&url, 9, "203.0.113.7").await;
    front.house.valkey.kill();
    for _ in 0..3 {
        assert_eq!(status(&url, "sk_wrong", "203.0.113.7").await, 503);
    }
    front.house.valkey.restart();
    let begun = Instant::now();
    while status(&url, &front.house.secret, "203.0.113.7").await != 200 {
        assert!(begun.elapsed() < Duration::from_secs(10), "the store did not come back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    fail(&url, 1, "203.0.113.7").await;
    assert_eq!(status(&url, &front.house.secret, "203.0.113.7").await, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nothing_is_counted_nobody_is_blocked() {
    let front = Front::with(config::Edge { auth_failures_max: 0, ..bare() }, 8, 1_000_000_000).await;
    fail(&front.url, 30, "203.0.113.7").await;
    assert_eq!(status(&front.url, &front.house.secret, "203.0.113.7").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_at_the_same_time_are_all_counted_and_a_full_list_stays_bounded() {
    const BLOCKS_MAX: usize = 10_000;
    let house = House::with_balance(0).await;
    let minutes = |count: u64| Duration::from_secs(60 * count);
    let guard = |failures_max, block| {
        Arc::new(Guard::new(house.store.clone(), GuardLimits { failures_max, window: minutes(10), block }))
    };
    let address = |index: usize| Address::from(IpAddr::from(u32::try_from(index).expect("small").to_be_bytes()));
    let (one, two) = (guard(10, minutes(5)), guard(10, minutes(5)));
    let failing = |count: usize| {
        let guards = [Arc::clone(&one), Arc::clone(&two)];
        at_once(count, move |index| {
            let guard = Arc::clone(&guards[index % 2]);
            async move { guard.failed(address(1)).await.expect("a count") }
        })
    };
    assert!(failing(9).await.into_iter().all(|blocks| !blocks));
    assert_eq!(one.blocked_for(address(1)), None);
    // Of all that are too many, one is the first.
    assert_eq!(failing(20).await.into_iter().filter(|blocks| *blocks).count(), 1);
    assert!(one.blocked_for(address(1)).is_some() && two.blocked_for(address(1)).is_some());
    // The block of the first address ends before those of all others, so it goes first.
    let many = guard(1, minutes(6));
    for begin in (2..BLOCKS_MAX + 2).step_by(500) {
        let many = Arc::clone(&many);
        let blocked = at_once(500, move |index| {
            let many = Arc::clone(&many);
            async move { many.failed(address(begin + index)).await.expect("a count") }
        });
        assert!(blocked.await.into_iter().all(|blocks| blocks));
    }
    let fresh = guard(1, minutes(6));
    assert_eq!(fresh.refresh().await.expect("a list"), BLOCKS_MAX);
    assert_eq!(fresh.blocked_for(address(1)), None);
    assert!(fresh.blocked_for(address(2)).is_some() && fresh.blocked_for(address(BLOCKS_MAX + 1)).is_some());
    assert_eq!(fresh.refresh().await.expect("a list"), BLOCKS_MAX);
}
