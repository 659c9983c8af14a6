//! Limits per minute, against many edges at once and against time.

use lightcone::{
    admission::{Admission, AdmitError, LimitKind, Limits, Rate, Tier, Tiers},
    domain::NanoUsd,
    ledger::ReleaseReason,
    store::keys,
};

use crate::support::house::{House, LEASE, ask, at_once, settlement};

const MINUTE_MS: u64 = 60_000;

fn limits(requests_per_minute: u64, tokens_per_minute: u64) -> Limits {
    let limits = Limits::default().with(LimitKind::RequestsPerMinute, requests_per_minute);
    limits.with(LimitKind::TokensPerMinute, tokens_per_minute)
}

async fn limited(house: &House, limits: Limits) -> Admission {
    let standard = Tier { limits, ..Tier::default() };
    Admission::new(house.valkey.store().await, LEASE).with_tiers(Tiers { standard, ..Tiers::default() })
}

/// Makes everything that was counted look `seconds` older.
async fn let_time_pass(house: &House, seconds: i64) {
    let key = format!("lc:{{t:{}}}:rates", house.tenant);
    let mut raw = house.valkey.raw().await;
    let fields: Vec<(String, String)> = redis::cmd("HGETALL").arg(&key).query_async(&mut raw).await.expect("HGETALL");
    assert!(!fields.is_empty(), "nothing was counted");
    for (field, value) in fields {
        let earlier = |text: &str| text.parse::<i64>().map(|second| (second - seconds).to_string()).expect("a second");
        let moved = match field.rsplit_once(':').expect("a name") {
            (_, "sum") => continue,
            (_, "seen") => (field.clone(), earlier(&value)),
            ("of", _) => {
                let mut words = value.split(' ');
                let mut moved = words.next().expect("a count").to_owned();
                for window in words {
                    let (name, second) = window.split_once('=').expect("a window");
                    moved += &format!(" {name}={}", earlier(second));
                }
                (field.clone(), moved)
            }
            (name, second) => (format!("{name}:{}", earlier(second)), value),
        };
        redis::cmd("HDEL").arg(&key).arg(&field).exec_async(&mut raw).await.expect("HDEL");
        redis::cmd("HSET").arg(&key).arg(moved.0).arg(moved.1).exec_async(&mut raw).await.expect("HSET");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_admissions_on_many_edges_never_exceed_the_requests_of_a_minute() {
    let house = House::with_balance(1_000_000_000).await;
    let mut edges = Vec::new();
    for _ in 0..3 {
        edges.push(limited(&house, limits(50, 0)).await);
    }
    let outcomes = at_once(200, |index| {
        let (edge, principal) = (edges[index % edges.len()].clone(), house.principal.clone());
        async move { edge.admit(&principal, ask(10, 10)).await }
    })
    .await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 50);
    for refused in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        let AdmitError::Limited { kind: LimitKind::RequestsPerMinute, wait_ms: Some(wait), rates, .. } = refused else {
            panic!("{refused}");
        };
        assert!((1..=MINUTE_MS + 1000).contains(wait), "{wait}");
        assert!(matches!(rates.requests, Some(Rate { limit: 50, remaining: 0, .. })), "{rates:?}");
        assert_eq!(rates.tokens, None);
    }
    // Who is refused has nothing on hold.
    assert_eq!(house.balance().await.held, NanoUsd::new(50 * 5_000));
    // Another tenant has its own minute.
    let other = house.another(1_000_000).await;
    let admitted = edges[0].admit(&other, ask(1, 1)).await.expect("admitted");
    assert!(matches!(admitted.rates().requests, Some(Rate { limit: 50, remaining: 49, .. })));
    house.assert_balanced().await;
}

#[tokio::test]
async fn tokens_count_with_the_most_that_they_may_be_and_then_with_what_they_were() {
    let house = House::with_balance(1_000_000_000).await;
    let edge = limited(&house, limits(0, 100)).await;
    let left = |admitted: &lightcone::admission::AdmittedRequest| admitted.rates().tokens.expect("a limit").remaining;
    let first = edge.admit(&house.principal, ask(10, 50)).await.expect("admitted");
    assert_eq!(left(&first), 40);
    let refused = edge.admit(&house.principal, ask(10, 31)).await.unwrap_err();
    let AdmitError::Limited { kind: LimitKind::TokensPerMinute, wait_ms: Some(_), rates, .. } = refused else {
        panic!("{refused}");
    };
    assert_eq!(rates.tokens.expect("a limit").remaining, 40);
    house.ledger.settle(&settlement(&first, 5)).await.expect("settled");
    // 15 were used; a second settlement gives nothing back again.
    house.ledger.settle(&settlement(&first, 5)).await.expect("settled before");
    let second = edge.admit(&house.principal, ask(10, 31)).await.expect("admitted");
    assert_eq!(left(&second), 100 - 15 - 41);
    let (tenant, request) = (second.tenant(), second.request());
    assert!(house.ledger.release(tenant, request, ReleaseReason::WorkerFailed).await.expect("released"));
    let third = edge.admit(&house.principal, ask(1, 1)).await.expect("admitted");
    assert_eq!(left(&third), 100 - 15 - 2);
    house.assert_balanced().await;
}

#[tokio::test]
async fn what_can_never_fit_is_told_so() {
    let house = House::with_balance(1_000_000_000).await;
    let edge = limited(&house, limits(0, 100)).await;
    let refused = edge.admit(&house.principal, ask(50, 51)).await.unwrap_err();
    assert!(
        matches!(refused, AdmitError::Limited { kind: LimitKind::TokensPerMinute, wait_ms: None, .. }),
        "{refused}"
    );
    assert_eq!(house.balance().await.held, NanoUsd::ZERO);
}

#[tokio::test]
async fn the_minute_slides_and_is_never_shorter_than_one() {
    let house = House::with_balance(1_000_000_000).await;
    let edge = limited(&house, limits(3, 0)).await;
    let admit = async || edge.admit(&house.principal, ask(1, 1)).await;
    drop(admit().await.expect("admitted"));
    let_time_pass(&house, 30).await;
    drop(admit().await.expect("admitted"));
    drop(admit().await.expect("admitted"));
    let refused = admit().await.unwrap_err();
    // The first leaves the window 60 to 61 seconds after it came.
    let AdmitError::Limited { wait_ms: Some(wait), .. } = refused else { panic!("{refused}") };
    assert!((28_000..=31_000).contains(&wait), "{wait}");
    let_time_pass(&house, 29).await;
    admit().await.expect_err("a minute has not passed");
    let_time_pass(&house, 2).await;
    let admitted = admit().await.expect("admitted");
    assert_eq!(admitted.rates().requests.expect("a limit").remaining, 0);
    let_time_pass(&house, 600).await;
    assert_eq!(admit().await.expect("admitted").rates().requests.expect("a limit").remaining, 2);
}

#[tokio::test]
async fn a_request_that_ends_after_its_minute_gives_nothing_back() {
    let house = House::with_balance(1_000_000_000).await;
    let edge = limited(&house, limits(0, 100)).await;
    let long = edge.admit(&house.principal, ask(10, 80)).await.expect("admitted");
    let_time_pass(&house, 90).await;
    let next = edge.admit(&house.principal, ask(10, 40)).await.expect("admitted");
    assert_eq!(next.rates().tokens.expect("a limit").remaining, 50);
    house.ledger.settle(&settlement(&long, 1)).await.expect("settled");
    let last = edge.admit(&house.principal, ask(1, 1)).await.expect("admitted");
    assert_eq!(last.rates().tokens.expect("a limit").remaining, 48);
    // Nothing is left for ever of a tenant that asks no more.
    let mut raw = house.valkey.raw().await;
    let key = format!("lc:{{t:{}}}:rates", house.tenant);
    let ttl: i64 = redis::cmd("PTTL").arg(&key).query_async(&mut raw).await.expect("PTTL");
    assert!((1..=120_000).contains(&ttl), "{ttl}");
    let leases: i64 =
        redis::cmd("ZCARD").arg(keys::hold_leases(&house.tenant)).query_async(&mut raw).await.expect("ZCARD");
    assert_eq!(leases, 2);
}
