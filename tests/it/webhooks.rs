//! What tenants are told of, and how it is delivered: a real store, and a server that takes the messages.

use std::{sync::Arc, time::Duration};

use lightcone::{
    admission::{AdmitError, LimitKind},
    domain::{NanoUsd, TenantId},
    ledger::ReleaseReason,
    operator::{KeyChanges, OperatorError},
    store::Store,
    telemetry::Metrics,
    webhooks::{
        DeadLetter, Dispatcher, Endpoint, EndpointWish, Kinds, Outcome, Postman, Settings, TargetError, WebhookError,
    },
};
use serde_json::{Value, json};

use crate::support::{
    changes,
    house::{House, ask as ask_for, settlement},
    receiver::{Answer, Arrival, Receiver, url_of},
};

const SOON: Duration = Duration::from_secs(20);
const BALANCE: i64 = 1_000_000;

/// Quick ones, so that tests need not wait.
fn settings() -> Settings {
    let settings = Settings::new(true, 3, Duration::from_secs(5));
    Settings { pauses: vec![Duration::from_millis(20)], scan: Duration::from_millis(300), ..settings }
}

/// A tenant with an endpoint.
struct Site {
    house: House,
    secret: String,
    metrics: Arc<Metrics>,
}

impl Site {
    async fn with(url: &str) -> Self {
        let house = House::with_balance(BALANCE).await;
        let secret = set(&house, &house.tenant, url).await;
        Self { house, secret, metrics: Arc::new(Metrics::new()) }
    }

    fn dispatcher(&self, settings: Settings) -> Dispatcher {
        Dispatcher::start(self.house.store.clone(), settings, Arc::clone(&self.metrics))
    }

    /// Makes so many events, each a fall below the mark.
    async fn make_events(&self, count: usize) {
        make_events(&self.house, &self.house.tenant, count).await;
    }

    async fn endpoint(&self) -> Endpoint {
        self.house.accounts.webhooks().one(&self.house.tenant).await.expect("an endpoint")
    }

    async fn dead_letters(&self) -> Vec<DeadLetter> {
        self.house.accounts.webhooks().dead_letters(&self.house.tenant).await.expect("dead letters")
    }

    async fn wait_until(&self, what: &str, is_so: impl Fn(&Endpoint) -> bool) -> Endpoint {
        let begun = std::time::Instant::now();
        loop {
            let endpoint = self.endpoint().await;
            if is_so(&endpoint) {
                return endpoint;
            }
            assert!(begun.elapsed() < SOON, "{what}: {endpoint:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn counted(&self, outcome: &str) -> u64 {
        self.metrics.webhooks.with_label_values(&[outcome]).get()
    }

    /// What waits, without a dispatcher.
    async fn outbox(&self) -> Vec<Value> {
        let mut raw = self.house.valkey.raw().await;
        let key = format!("lc:{{t:{}}}:outbox", self.house.tenant);
        let events: Vec<String> =
            redis::cmd("LRANGE").arg(key).arg(0).arg(-1).query_async(&mut raw).await.expect("a list");
        events.iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }

    async fn kinds_told(&self) -> Vec<String> {
        self.outbox().await.iter().map(|event| event["kind"].as_str().expect("a kind").to_owned()).collect()
    }
}

async fn set(house: &House, tenant: &TenantId, url: &str) -> String {
    let wish = EndpointWish { url: Some(url.to_owned()), allow_private: true, ..EndpointWish::default() };
    let made = house.accounts.set_webhook(tenant, &wish).await.expect("an endpoint");
    made.secret.expect("the secret of a new one")
}

async fn make_events(house: &House, tenant: &TenantId, count: usize) {
    let accounts = &house.accounts;
    accounts.change_tenant(tenant, &changes::of_low_balance(Some(NanoUsd::new(BALANCE)))).await.expect("a mark");
    for index in 0..count {
        for (step, amount) in [("down", -1), ("up", 1)] {
            let reference = format!("{step} {index}");
            accounts.adjust(tenant, NanoUsd::new(amount), &reference, "").await.expect("an adjustment");
        }
    }
}

fn ids(arrivals: &[Arrival]) -> Vec<&str> {
    arrivals.iter().map(Arrival::id).collect()
}

fn expected_ids(tenant: &TenantId, count: usize) -> Vec<String> {
    let name = tenant.as_str().trim_start_matches("ten_");
    (1..=count).map(|number| format!("evt_{name}_{number}")).collect()
}

// -- what is told ------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_low_balance_is_told_once_for_each_fall_below_the_mark_and_open_holds_do_not_matter() {
    let site = Site::with("https://example.com").await;
    let House { accounts, tenant, .. } = &site.house;
    accounts.change_tenant(tenant, &changes::of_low_balance(Some(NanoUsd::new(900_000)))).await.unwrap();
    // Half of the million is on hold for a moment, again and again.
    for _ in 0..3 {
        let admitted = site.house.admit(1000, 1000).await.unwrap();
        site.house.ledger.release(tenant, admitted.request(), ReleaseReason::Withdrawn).await.unwrap();
    }
    assert_eq!(site.kinds_told().await, [""; 0]);
    let charge = async |completion| {
        let admitted = site.house.admit(100, 500).await.unwrap();
        site.house.ledger.settle(&settlement(&admitted, completion)).await.unwrap();
    };
    charge(200).await;
    assert_eq!(site.kinds_told().await, [""; 0], "920,000 are left");
    charge(50).await;
    charge(50).await;
    assert_eq!(site.kinds_told().await, ["balance.low"; 1]);
    accounts.grant(tenant, NanoUsd::new(100_000), "more", "").await.unwrap();
    charge(500).await;
    assert_eq!(site.kinds_told().await, ["balance.low"; 2]);
    let events = site.outbox().await;
    assert_eq!((&events[1]["threshold"], &events[1]["balance"]), (&json!("900000"), &json!("780000")));
    site.house.assert_balanced().await;
}

#[tokio::test]
async fn who_has_no_endpoint_has_no_outbox_and_a_new_endpoint_hears_of_what_still_holds() {
    let house = House::with_balance(BALANCE).await;
    make_events(&house, &house.tenant, 3).await;
    house.accounts.adjust(&house.tenant, NanoUsd::new(-10), "for good", "").await.unwrap();
    let mut raw = house.valkey.raw().await;
    let keys: Vec<String> = redis::cmd("KEYS").arg("*:outbox").query_async(&mut raw).await.unwrap();
    assert_eq!(keys, [""; 0]);
    let secret = set(&house, &house.tenant, "https://example.com").await;
    let site = Site { house, secret, metrics: Arc::new(Metrics::new()) };
    assert_eq!(site.kinds_told().await, ["balance.low"]);
    assert_eq!(site.outbox().await[0]["balance"], (BALANCE - 10).to_string());
}

#[tokio::test]
async fn only_the_kinds_that_an_endpoint_wants_are_written_down_and_none_while_it_is_disabled() {
    let site = Site::with("https://example.com").await;
    let change = async |kinds: Option<&str>, enabled| {
        let kinds = kinds.map(|kinds| kinds.parse::<Kinds>().unwrap());
        let wish = EndpointWish { kinds, enabled, ..EndpointWish::default() };
        site.house.accounts.set_webhook(&site.house.tenant, &wish).await.unwrap().endpoint
    };
    let changed = change(Some("limit.reached"), None).await;
    assert_eq!((changed.kinds.names(), changed.enabled), (vec!["limit.reached"], true));
    site.make_events(2).await;
    change(Some("limit.reached,balance.low"), Some(false)).await;
    make_events(&site.house, &site.house.tenant, 0).await;
    assert_eq!(site.kinds_told().await, [""; 0]);
    change(None, Some(true)).await;
    site.house.accounts.adjust(&site.house.tenant, NanoUsd::new(-1), "one", "").await.unwrap();
    assert_eq!(site.kinds_told().await, ["balance.low"]);
}

#[tokio::test]
async fn an_empty_balance_is_told_once_until_more_is_granted() {
    let site = Site::with("https://example.com").await;
    let House { accounts, admission, principal, ledger, tenant, .. } = &site.house;
    let admission = admission.clone().with_step(10);
    let ask = |prompt, output| admission.admit(principal, ask_for(prompt, output));
    let first = ask(4_990, 100).await.unwrap();
    assert_eq!(site.kinds_told().await, ["balance.exhausted"; 1], "the step of ten tokens was cut to six");
    for _ in 0..3 {
        assert!(matches!(ask(10, 10).await, Err(AdmitError::InsufficientBalance { .. })));
        let more = ledger.extend(tenant, first.request(), 10, first.hold()).await.unwrap();
        assert_eq!(more.tokens, 0);
    }
    assert_eq!(site.kinds_told().await, ["balance.exhausted"; 1]);
    accounts.grant(tenant, NanoUsd::new(3_000), "more", "").await.unwrap();
    assert_eq!(ledger.extend(tenant, first.request(), 10, first.hold()).await.unwrap().tokens, 10);
    let held = ledger.balance(tenant).await.unwrap().held;
    assert_eq!(site.kinds_told().await, ["balance.exhausted"; 1]);
    // Cut while it decodes, not refused.
    assert_eq!(ledger.extend(tenant, first.request(), 10, held).await.unwrap().tokens, 0);
    assert_eq!(site.kinds_told().await, ["balance.exhausted"; 2]);
}

#[tokio::test]
async fn a_limit_of_a_day_is_told_once_for_each_party_and_again_when_it_was_changed() {
    let site = Site::with("https://example.com").await;
    let House { accounts, tenant, principal, .. } = &site.house;
    let limits = async |changes: &[(LimitKind, Option<u64>)]| {
        accounts.change_tenant(tenant, &changes::of_limits(changes.to_vec())).await.unwrap();
    };
    let refused = async || {
        for _ in 0..3 {
            assert!(matches!(site.house.admit(10, 10).await, Err(AdmitError::Limited { .. })));
        }
        site.outbox().await.last().cloned().unwrap_or_default()
    };
    // Normal flow control.
    limits(&[(LimitKind::RequestsAtOnce, Some(1)), (LimitKind::RequestsPerMinute, Some(2))]).await;
    let open = site.house.admit(10, 10).await.unwrap();
    assert_eq!(refused().await, Value::Null);
    limits(&[(LimitKind::RequestsAtOnce, None), (LimitKind::RequestsPerMinute, Some(1))]).await;
    assert_eq!(refused().await, Value::Null);
    limits(&[(LimitKind::RequestsPerMinute, None), (LimitKind::RequestsPerDay, Some(1))]).await;
    let told = refused().await;
    assert_eq!(
        (&told["limit"], &told["limit_value"], &told["scope"]),
        (&json!("requests_per_day"), &json!("1"), &json!("tenant"))
    );
    // One request that would never fit says nothing of the day.
    limits(&[(LimitKind::RequestsPerDay, None), (LimitKind::TokensPerDay, Some(19))]).await;
    assert_eq!(refused().await["id"], "1");
    limits(&[(LimitKind::TokensPerDay, Some(25))]).await;
    assert_eq!(refused().await["limit"], "tokens_per_day");
    limits(&[(LimitKind::TokensPerDay, None), (LimitKind::SpendPerMonth, Some(6_000))]).await;
    let told = refused().await;
    assert_eq!((&told["limit"], told["period"].as_str().map(str::len)), (&json!("spend_per_month"), Some(6)));
    limits(&[(LimitKind::SpendPerMonth, Some(6_001))]).await;
    assert_eq!((refused().await["id"].as_str(), refused().await["id"].as_str()), (Some("4"), Some("4")));
    // An open request that may not grow any more.
    limits(&[(LimitKind::SpendPerMonth, None), (LimitKind::SpendPerDay, Some(5_300))]).await;
    assert_eq!(site.house.ledger.extend(tenant, open.request(), 5, open.hold()).await.unwrap().tokens, 1);
    assert_eq!(site.outbox().await.last().unwrap()["limit"], "spend_per_day");
    limits(&[(LimitKind::SpendPerDay, None)]).await;
    let of_key = KeyChanges { limits: vec![(LimitKind::RequestsPerDay, Some(1))], ..KeyChanges::default() };
    accounts.change_key(&principal.key, &of_key).await.unwrap();
    let told = refused().await;
    assert_eq!((&told["scope"], &told["key"]), (&json!("key"), &json!(principal.key.as_str())));
    assert_eq!(site.outbox().await.len(), 6);
}

#[tokio::test]
async fn an_outbox_that_nobody_empties_is_bounded_and_gives_up_what_is_oldest() {
    let site = Site::with("https://example.com").await;
    let mut events = redis::pipe();
    for number in 0..1000 {
        let event = json!({ "id": format!("of {number}"), "kind": "odd" });
        events.cmd("RPUSH").arg(format!("lc:{{t:{}}}:outbox", site.house.tenant)).arg(event.to_string());
    }
    events.exec_async(&mut site.house.valkey.raw().await).await.unwrap();
    site.make_events(3).await;
    let endpoint = site.endpoint().await;
    assert_eq!((endpoint.waiting, endpoint.dead_letters), (1000, 3));
    assert_eq!(site.outbox().await[0]["id"], "of 3");
    assert_eq!(site.dead_letters().await[0].why, "too many events waited");
    site.house.accounts.remove_webhook(&site.house.tenant).await.unwrap();
    assert_eq!(site.outbox().await, [Value::Null; 0]);
    site.house.assert_balanced().await;
}

// -- how it is delivered -----------------------------------------------------------------------------------

#[tokio::test]
async fn events_arrive_in_order_once_and_signed() {
    let receiver = Receiver::start();
    let site = Site::with(&receiver.url()).await;
    site.make_events(3).await;
    let dispatcher = site.dispatcher(settings());
    receiver.wait_for(3).await;
    site.make_events(0).await;
    site.house.accounts.adjust(&site.house.tenant, NanoUsd::new(-7), "another", "").await.unwrap();
    receiver.wait_for(4).await;
    let endpoint = site.wait_until("all is delivered", |endpoint| endpoint.waiting == 0).await;
    assert_eq!((endpoint.attempts, endpoint.why, endpoint.dead_letters), (0, None, 0));
    assert!(endpoint.delivered_unix_ms.is_some());
    dispatcher.stop(SOON).await;
    let arrivals = receiver.arrivals();
    assert_eq!(ids(&arrivals), expected_ids(&site.house.tenant, 4));
    for arrival in &arrivals {
        assert!(arrival.is_signed_with(&site.secret), "{arrival:?}");
        assert_eq!(arrival.headers["content-type"], "application/json");
        let sent: u64 = arrival.headers["webhook-timestamp"].parse().unwrap();
        assert!(sent.abs_diff(arrival.payload()["created"].as_u64().unwrap()) < 60);
        assert_eq!(arrival.payload()["id"], arrival.id());
    }
    let last = arrivals[3].payload();
    let data = json!({ "threshold_nano_usd": BALANCE, "balance_nano_usd": BALANCE - 7, "held_nano_usd": 0 });
    assert_eq!(
        (&last["type"], &last["tenant"], &last["data"]),
        (&json!("balance.low"), &json!(site.house.tenant), &data)
    );
    assert_eq!((site.counted("delivered"), site.counted("failed"), site.counted("dead")), (4, 0, 0));
}

#[tokio::test]
async fn a_failed_attempt_is_repeated_under_the_same_id_and_those_behind_it_wait() {
    let receiver = Receiver::start();
    let site = Site::with(&receiver.url()).await;
    receiver.answer([Answer::Status(500), Answer::Redirect, Answer::Status(200)]);
    site.make_events(2).await;
    let _dispatcher = site.dispatcher(settings());
    let arrivals = receiver.wait_for(4).await;
    let expected = expected_ids(&site.house.tenant, 2);
    assert_eq!(ids(&arrivals), [&expected[0], &expected[0], &expected[0], &expected[1]]);
    assert!(arrivals[..3].iter().all(|arrival| arrival.body == arrivals[0].body));
    assert!(arrivals.iter().all(|arrival| arrival.is_signed_with(&site.secret)));
    site.wait_until("all is delivered", |endpoint| endpoint.waiting == 0).await;
    assert_eq!((site.counted("delivered"), site.counted("failed"), site.counted("dead")), (2, 2, 0));
}

#[tokio::test]
async fn an_endpoint_that_was_not_there_gets_its_events_when_it_is() {
    let address = Receiver::nowhere();
    let site = Site::with(&url_of(address)).await;
    site.make_events(2).await;
    let _dispatcher = site.dispatcher(Settings { attempts_max: 1000, ..settings() });
    let failed = site.wait_until("an attempt has failed", |endpoint| endpoint.failed_unix_ms.is_some()).await;
    assert!(failed.attempts > 0 && failed.waiting == 2 && failed.why.is_some(), "{failed:?}");
    let receiver = Receiver::on(address);
    assert_eq!(ids(&receiver.wait_for(2).await), expected_ids(&site.house.tenant, 2));
}

#[tokio::test]
async fn what_is_never_taken_goes_to_the_dead_letters_and_comes_back_when_asked_for() {
    let receiver = Receiver::start();
    let site = Site::with(&receiver.url()).await;
    let House { accounts, tenant, .. } = &site.house;
    receiver.answer([Answer::Status(500); 6]);
    site.make_events(2).await;
    let _dispatcher = site.dispatcher(settings());
    site.wait_until("both are dead", |endpoint| endpoint.dead_letters == 2).await;
    let letters = site.dead_letters().await;
    let expected = expected_ids(tenant, 2);
    assert_eq!(letters.iter().map(|letter| &letter.id).collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
    assert!(letters.iter().all(|letter| letter.attempts == 3 && letter.why == "answered 500"), "{letters:?}");
    assert_eq!((site.counted("failed"), site.counted("dead")), (6, 2));
    assert_eq!(accounts.retry_dead_letters(tenant, Some(&expected[1])).await.unwrap(), 1);
    let arrivals = receiver.wait_for(7).await;
    assert_eq!((arrivals[6].id(), &arrivals[6].body), (expected[1].as_str(), &letters[1].message));
    assert!(accounts.drop_dead_letters(tenant, Some("evt_other_1")).await.is_err());
    assert_eq!(accounts.drop_dead_letters(tenant, None).await.unwrap(), 1);
    assert_eq!(site.endpoint().await.dead_letters, 0);
}

#[tokio::test]
async fn two_dispatchers_on_one_store_deliver_each_event_once() {
    let receiver = Receiver::start();
    let site = Site::with(&receiver.url()).await;
    let _dispatchers = [site.dispatcher(settings()), site.dispatcher(settings())];
    site.make_events(40).await;
    receiver.wait_for(40).await;
    site.wait_until("all is delivered", |endpoint| endpoint.waiting == 0).await;
    assert_eq!(ids(&receiver.arrivals()), expected_ids(&site.house.tenant, 40));
}

#[tokio::test]
async fn an_endpoint_that_answers_nothing_delays_nobody_else_and_fails_by_itself() {
    let (slow, quick) = (Receiver::start(), Receiver::start());
    let site = Site::with(&slow.url()).await;
    let another = site.house.another(BALANCE).await.tenant;
    set(&site.house, &another, &quick.url()).await;
    slow.answer([Answer::Held]);
    let _dispatcher = site.dispatcher(Settings { attempts_max: 1, ..settings() });
    site.make_events(1).await;
    slow.wait_for(1).await;
    make_events(&site.house, &another, 5).await;
    assert_eq!(ids(&quick.wait_for(5).await), expected_ids(&another, 5));
    assert_eq!(site.endpoint().await.failed_unix_ms, None, "the attempt was to be under way all the time");
    site.wait_until("the attempt has failed", |endpoint| endpoint.dead_letters == 1).await;
    assert!(site.dead_letters().await[0].why.contains("timeout"), "{:?}", site.dead_letters().await);
}

#[tokio::test]
async fn private_addresses_are_refused_when_they_are_named_and_when_they_are_looked_up() {
    let receiver = Receiver::start();
    let house = House::with_balance(BALANCE).await;
    let wish = |url: &str| EndpointWish { url: Some(url.to_owned()), ..EndpointWish::default() };
    for (url, expected) in [
        ("https://127.0.0.1/", TargetError::Private([127, 0, 0, 1].into())),
        ("https://169.254.169.254/latest", TargetError::Private([169, 254, 169, 254].into())),
        ("http://example.com/", TargetError::NotSecure),
    ] {
        match house.accounts.set_webhook(&house.tenant, &wish(url)).await {
            Err(OperatorError::Webhook(WebhookError::Target(error))) => assert_eq!(error, expected),
            _ => panic!("{url} was accepted"),
        }
    }
    let named = format!("https://localhost:{}/", receiver.port());
    let secret = house.accounts.set_webhook(&house.tenant, &wish(&named)).await.unwrap().secret.unwrap();
    let site = Site { house, secret, metrics: Arc::new(Metrics::new()) };
    let _dispatcher = site.dispatcher(Settings { allow_private: false, attempts_max: 1, ..settings() });
    site.make_events(1).await;
    site.wait_until("it is given up", |endpoint| endpoint.dead_letters == 1).await;
    let why = &site.dead_letters().await[0].why;
    assert!(why.ends_with("is not a public address"), "{why}");
    // The configuration of whoever delivers counts, not of whoever made the endpoint.
    set_url(&site, &receiver.url()).await;
    site.house.accounts.retry_dead_letters(&site.house.tenant, None).await.unwrap();
    site.wait_until("it is given up again", |endpoint| endpoint.dead_letters == 1 && endpoint.waiting == 0).await;
    assert_eq!(receiver.arrivals().len(), 0);
}

async fn set_url(site: &Site, url: &str) {
    let wish = EndpointWish { url: Some(url.to_owned()), allow_private: true, ..EndpointWish::default() };
    let changed = site.house.accounts.set_webhook(&site.house.tenant, &wish).await.unwrap();
    assert_eq!((changed.secret, changed.endpoint.url.as_str()), (None, url));
}

#[tokio::test]
async fn an_event_whose_notice_was_lost_is_found() {
    let receiver = Receiver::start();
    let site = Site::with(&receiver.url()).await;
    let _dispatcher = site.dispatcher(settings());
    site.make_events(1).await;
    receiver.wait_for(1).await;
    let mut raw = site.house.valkey.raw().await;
    let event = json!({ "id": "77", "kind": "balance.exhausted", "at": "1795451544730", "balance": "0", "held": "0" });
    let key = format!("lc:{{t:{}}}:outbox", site.house.tenant);
    redis::cmd("RPUSH").arg(key).arg(event.to_string()).exec_async(&mut raw).await.unwrap();
    assert_eq!(receiver.wait_for(2).await[1].payload()["type"], "balance.exhausted");
}

#[tokio::test]
async fn an_event_that_cannot_be_read_does_not_stop_those_behind_it() {
    let receiver = Receiver::start();
    let site = Site::with(&receiver.url()).await;
    let mut raw = site.house.valkey.raw().await;
    let key = format!("lc:{{t:{}}}:outbox", site.house.tenant);
    redis::cmd("RPUSH").arg(key).arg(r#"{"id":"0","kind":"odd"}"#).exec_async(&mut raw).await.unwrap();
    site.make_events(1).await;
    let _dispatcher = site.dispatcher(settings());
    receiver.wait_for(1).await;
    let letters = site.dead_letters().await;
    assert_eq!(letters.len(), 1);
    assert!(letters[0].why.starts_with("the event cannot be read"), "{letters:?}");
}

#[tokio::test]
async fn a_store_that_was_away_delays_and_loses_nothing() {
    let receiver = Receiver::start();
    let mut site = Site::with(&receiver.url()).await;
    let _dispatcher = site.dispatcher(settings());
    site.make_events(1).await;
    receiver.wait_for(1).await;
    // A store that goes away in between has the event delivered twice.
    site.wait_until("the first is done with", |endpoint| endpoint.waiting == 0).await;
    site.house.valkey.restart();
    wait_for_store(&site.house.store).await;
    let House { accounts, tenant, .. } = &site.house;
    accounts.adjust(tenant, NanoUsd::new(-1), "after", "").await.unwrap();
    assert_eq!(ids(&receiver.wait_for(2).await), expected_ids(&site.house.tenant, 2));
}

async fn wait_for_store(store: &Store) {
    let begun = std::time::Instant::now();
    while let Err(error) = store.ping().await {
        assert!(begun.elapsed() < SOON, "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_new_secret_signs_at_once_and_the_one_before_signs_as_well_for_a_while() {
    let receiver = Receiver::start();
    let site = Site::with(&receiver.url()).await;
    let rotate = EndpointWish { rotate: true, ..EndpointWish::default() };
    let changed = site.house.accounts.set_webhook(&site.house.tenant, &rotate).await.unwrap();
    let fresh = changed.secret.unwrap();
    assert_ne!(fresh, site.secret);
    site.make_events(1).await;
    let _dispatcher = site.dispatcher(settings());
    let arrival = &receiver.wait_for(1).await[0];
    assert!(arrival.is_signed_with(&fresh) && arrival.is_signed_with(&site.secret));
    // And so is a test.
    let postman = Postman::new(true, Duration::from_secs(5));
    site.house.accounts.webhooks().test(&site.house.tenant, &postman).await.unwrap();
    let test = &receiver.wait_for(2).await[1];
    assert!(test.is_signed_with(&fresh) && test.is_signed_with(&site.secret));
}

#[tokio::test]
async fn a_test_is_sent_at_once_and_says_how_it_went_and_secrets_stay_out_of_the_audit_log() {
    let receiver = Receiver::start();
    let site = Site::with(&receiver.url()).await;
    let House { accounts, tenant, .. } = &site.house;
    let postman = Postman::new(true, Duration::from_secs(5));
    receiver.answer([Answer::Status(202), Answer::Status(401)]);
    let (id, outcome) = accounts.webhooks().test(tenant, &postman).await.unwrap();
    assert_eq!(outcome, Outcome::Accepted(202));
    let arrival = &receiver.arrivals()[0];
    assert!(arrival.is_signed_with(&site.secret));
    assert_eq!((arrival.id(), &arrival.payload()["type"]), (id.as_str(), &json!("webhook.test")));
    let (_, outcome) = accounts.webhooks().test(tenant, &postman).await.unwrap();
    assert_eq!(outcome, Outcome::Failed("answered 401".to_owned()));
    let log = serde_json::to_string(&accounts.audit_log().list(None, 100).await.unwrap()).unwrap();
    assert!(log.contains("webhook.set") && !log.contains(&site.secret[6..]), "{log}");
    assert!(!serde_json::to_string(&site.endpoint().await).unwrap().contains(&site.secret[6..]));
}
