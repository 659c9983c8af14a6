//! What lost answers, clocks that jump, a full store and damage do to money: nothing that the books do not show.

use std::{collections::HashMap, time::Duration};

use lightcone::{
    admission::{AdmitError, Ask, LimitKind},
    domain::{NanoUsd, Price, RequestId},
    ledger::{Ledger, LedgerError, Refund, ReleaseReason, Settlement},
    operator::TenantChanges,
    store::keys,
};

use crate::support::house::{House, LEASE, ask, settlement};

fn nano(nano: i64) -> NanoUsd {
    NanoUsd::new(nano)
}

#[tokio::test]
async fn an_extension_whose_answer_was_lost_is_told_again_and_not_made_twice() {
    let house = House::with_balance(1_000_000).await;
    let admitted = house.admission.clone().with_step(10).admit(&house.principal, ask(10, 100)).await.unwrap();
    let (tenant, request, hold) = (&house.tenant, admitted.request(), admitted.hold());
    assert_eq!((hold, admitted.allowed_tokens()), (nano(5_000), 10));
    assert_eq!(house.ledger.extend(tenant, request, 20, hold).await.unwrap().tokens, 20);
    // As if nobody had heard of it.
    for wanted in [20, 5] {
        assert_eq!(house.ledger.extend(tenant, request, wanted, hold).await.unwrap().tokens, 20);
    }
    assert_eq!(house.balance().await.held, nano(11_000));
    assert_eq!(house.ledger.extend(tenant, request, 20, nano(11_000)).await.unwrap().tokens, 20);
    assert_eq!(house.balance().await.held, nano(17_000));
    house.assert_balanced().await;
}

#[tokio::test]
async fn a_crowded_admission_gives_up_no_hold_whose_owner_only_could_not_renew_it() {
    let house = House::with_balance(1_000_000).await;
    let one_at_once = vec![(LimitKind::RequestsAtOnce, Some(1))];
    let changes = TenantChanges { limits: one_at_once, ..TenantChanges::default() };
    house.accounts.change_tenant(&house.tenant, &changes).await.unwrap();
    let running = house.admit(10, 10).await.unwrap();
    house.let_lease_run_out(running.request()).await;
    assert!(matches!(house.admit(10, 10).await, Err(AdmitError::Limited { kind: LimitKind::RequestsAtOnce, .. })));
    assert!(!house.ledger.settle(&settlement(&running, 3)).await.unwrap().late);
    let _open = house.admit(10, 10).await.unwrap();
    house.assert_balanced().await;
}

#[tokio::test]
async fn a_request_that_was_asked_again_is_free_however_far_it_had_come() {
    let house = House::with_balance(1_000_000).await;
    let (ledger, tenant) = (&house.ledger, &house.tenant);
    let requests: Vec<_> = futures::future::join_all((0..4).map(|_| house.admit(10, 10))).await;
    let [open, charged, given_back, lost] = requests.try_into().expect("four");
    let (open, charged, given_back, lost) = (open.unwrap(), charged.unwrap(), given_back.unwrap(), lost.unwrap());
    ledger.settle(&settlement(&charged, 3)).await.unwrap();
    ledger.settle(&settlement(&given_back, 3)).await.unwrap();
    let some = Refund {
        request: given_back.request().clone(),
        amount: nano(900),
        reference: "sorry".to_owned(),
        note: String::new(),
    };
    ledger.refund(tenant, &some).await.unwrap();
    ledger.release(tenant, lost.request(), ReleaseReason::WorkerLost).await.unwrap();
    let unknown = RequestId::generate();
    for _ in 0..2 {
        for request in [open.request(), charged.request(), given_back.request(), lost.request(), &unknown] {
            ledger.forgive(tenant, request).await.unwrap();
        }
    }
    // Whoever had them comes too late.
    for admitted in [&open, &lost] {
        assert!(matches!(ledger.settle(&settlement(admitted, 3)).await, Err(LedgerError::HoldGone(_))));
    }
    let begun = Settlement { request: unknown.clone(), ..settlement(&open, 3) };
    assert!(matches!(ledger.settle_begun(&begun).await, Err(LedgerError::Unknown(_))));
    let after = house.balance().await;
    assert_eq!((after.balance, after.held, after.charged), (nano(1_000_000), nano(0), nano(2 * 2_900)));
    assert_eq!(after.refunded, after.charged);
    house.assert_balanced().await;
}

#[tokio::test]
async fn what_is_free_needs_no_money_of_somebody_who_owes_some() {
    let house = House::with_balance(5_000).await;
    house.accounts.set_credit(&house.tenant, nano(10_000), "").await.unwrap();
    let owing = house.admit(10, 30).await.unwrap();
    house.ledger.settle(&settlement(&owing, 30)).await.unwrap();
    house.accounts.set_credit(&house.tenant, NanoUsd::ZERO, "").await.unwrap();
    assert!(house.balance().await.balance < NanoUsd::ZERO);
    assert!(matches!(house.admit(1, 1).await, Err(AdmitError::InsufficientBalance { .. })));
    let free = Ask { price: Price::flat(NanoUsd::ZERO, NanoUsd::ZERO), ..ask(10, 30) };
    let admitted = house.admission.clone().with_step(10).admit(&house.principal, free).await.unwrap();
    let more = house.ledger.extend(&house.tenant, admitted.request(), 20, admitted.hold()).await.unwrap();
    assert_eq!((admitted.allowed_tokens(), more.tokens, more.limited_by), (10, 20, None));
    house.ledger.settle(&settlement(&admitted, 30)).await.unwrap();
    house.assert_balanced().await;
}

#[tokio::test]
async fn a_clock_that_was_far_ahead_keeps_no_hold_and_no_limit_longer_than_it_should() {
    let house = House::with_balance(1_000_000).await;
    let two = |kind| (kind, Some(2));
    let limits = vec![two(LimitKind::RequestsPerMinute), two(LimitKind::RequestsPerDay)];
    let changes = TenantChanges { limits, ..TenantChanges::default() };
    house.accounts.change_tenant(&house.tenant, &changes).await.unwrap();
    let dead = house.admit(10, 10).await.unwrap();
    let _open = house.admit(10, 10).await.unwrap();
    // All of it was a year from now; now it is now.
    let mut raw = house.valkey.raw().await;
    let now = house.store.now_unix_ms().await.unwrap();
    let year_ms = 365 * 86_400_000;
    let (account, leases) = (keys::account(&house.tenant), keys::hold_leases(&house.tenant));
    let of = |part: &str| format!("lc:{{t:{}}}:{part}", house.tenant);
    redis::cmd("ZADD").arg(&leases).arg(now + year_ms).arg(dead.request().as_str()).exec_async(&mut raw).await.unwrap();
    redis::cmd("HSET").arg(&account).arg("at").arg(now + year_ms).exec_async(&mut raw).await.unwrap();
    let rates: HashMap<String, String> = redis::cmd("HGETALL").arg(of("rates")).query_async(&mut raw).await.unwrap();
    redis::cmd("DEL").arg(of("rates")).exec_async(&mut raw).await.unwrap();
    for (field, value) in rates {
        let later =
            |text: &str| text.parse::<u64>().map_or_else(|_| text.to_owned(), |at| (at + year_ms / 1000).to_string());
        let (field, value) = match field.rsplit_once(':') {
            Some((_, "sum")) => (field, value),
            Some((_, "seen")) => (field, later(&value)),
            Some((name, bucket)) => (format!("{name}:{}", later(bucket)), value),
            None => (field, value),
        };
        redis::cmd("HSET").arg(of("rates")).arg(field).arg(value).exec_async(&mut raw).await.unwrap();
    }
    // The requests of a day are those of the day that it is.
    assert!(matches!(house.admit(10, 10).await, Err(AdmitError::Limited { kind: LimitKind::RequestsPerDay, .. })));
    let changes = TenantChanges { limits: vec![(LimitKind::RequestsPerDay, Some(3))], ..TenantChanges::default() };
    house.accounts.change_tenant(&house.tenant, &changes).await.unwrap();
    let after = house.admit(10, 10).await.unwrap();
    let entry = house.ledger.last_entries(&house.tenant, 1).await.unwrap().remove(0);
    assert!(entry.unix_ms >= now + year_ms && entry.note.starts_with("day "), "{entry:?}");
    // Leases are no longer than they are from now on.
    let sweeper = Ledger::new(house.store.clone(), Duration::from_millis(1));
    sweeper.sweep_expired_holds().await.unwrap();
    let lease: f64 =
        redis::cmd("ZSCORE").arg(&leases).arg(dead.request().as_str()).query_async(&mut raw).await.unwrap();
    assert!(lease <= (now + LEASE.as_millis() as u64 + 60_000) as f64, "{lease}");
    house.ledger.settle(&settlement(&after, 3)).await.unwrap();
    let faults = house.ledger.verify().await.unwrap().faults;
    assert_eq!(faults, [] as [String; 0]);
}

#[tokio::test]
async fn a_damaged_account_stops_nobody_else() {
    let house = House::with_balance(1_000_000).await;
    let other = house.another(1_000_000).await;
    let _open = house.admit(10, 10).await.unwrap();
    let _of_other = house.admission.admit(&other, ask(10, 10)).await.unwrap();
    let mut raw = house.valkey.raw().await;
    let account = keys::account(&house.tenant);
    redis::cmd("HSET").arg(account).arg("refunded").arg("0x").exec_async(&mut raw).await.unwrap();
    assert_eq!(house.ledger.release_left_over_holds().await.unwrap(), 1);
    assert_eq!(house.ledger.imbalance().await.unwrap(), (NanoUsd::ZERO, 1));
    assert_eq!(house.ledger.balance(&other.tenant).await.unwrap().held, NanoUsd::ZERO);
}

#[tokio::test]
async fn functions_are_written_into_the_store_once_and_not_by_everyone_who_connects() {
    let house = House::with_balance(1_000).await;
    let mut raw = house.valkey.raw().await;
    let loaded = async |raw: &mut redis::aio::MultiplexedConnection| -> u64 {
        let stats: String = redis::cmd("INFO").arg("commandstats").query_async(raw).await.unwrap();
        let line = stats.lines().find(|line| line.starts_with("cmdstat_function|load:")).expect("a line").to_owned();
        let number = |name: &str| {
            let (_, rest) = line.split_once(&format!("{name}=")).expect("a field");
            rest.split(',').next().and_then(|number| number.trim().parse::<u64>().ok()).expect("a number")
        };
        number("calls") - number("failed_calls")
    };
    assert_eq!(loaded(&mut raw).await, 1);
    for _ in 0..3 {
        house.valkey.store().await.ping().await.unwrap();
    }
    assert_eq!(loaded(&mut raw).await, 1);
}
