//! Holds and settlements, against everything that tries to make them lie.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use lightcone::{
    admission::{Admission, AdmitError, AdmittedRequest},
    domain::{MoneyError, NanoUsd, Price, RequestId},
    ledger::{EntryKind, Ledger, LedgerError, ReleaseReason},
    store::keys,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::support::house::{House, LEASE, PRICE, ask, at_once, settlement};

fn nano(nano: i64) -> NanoUsd {
    NanoUsd::new(nano)
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_admissions_on_many_edges_admit_exactly_what_the_balance_covers() {
    // Ten tokens in and ten out are 5,000; the balance covers 137 of them and almost a 138th.
    let house = House::with_balance(137 * 5_000 + 4_999).await;
    let mut edges = Vec::new();
    for _ in 0..4 {
        edges.push(Admission::new(house.valkey.store().await, LEASE));
    }
    let outcomes = at_once(400, |index| {
        let (edge, principal) = (edges[index % edges.len()].clone(), house.principal.clone());
        async move { edge.admit(&principal, ask(10, 10)).await }
    })
    .await;
    let admitted = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!(admitted, 138);
    // The last one gets what is left: nine tokens out, and 299 are too little for a tenth.
    let mut allowed: Vec<_> = outcomes.iter().flatten().map(AdmittedRequest::allowed_tokens).collect();
    allowed.sort_unstable();
    assert_eq!((allowed[0], allowed[1]), (9, 10));
    for refused in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        assert!(matches!(refused, AdmitError::InsufficientBalance { balance, needed, .. }
            if *needed == nano(2_300) && *balance >= NanoUsd::ZERO && balance < needed));
    }
    let money = house.balance().await;
    assert_eq!((money.balance, money.held), (nano(299), nano(137 * 5_000 + 4_700)));
    house.assert_balanced().await;
}

#[tokio::test]
async fn a_refusal_costs_nothing_and_leaves_no_trace() {
    let house = House::with_balance(999).await;
    let before = house.balance().await;
    let refusal = house.admit(5, 0).await.unwrap_err();
    assert!(matches!(refusal, AdmitError::InsufficientBalance { balance, needed, .. }
        if balance == nano(999) && needed == nano(1_000)));
    assert_eq!(house.balance().await, before);
    let entries = house.ledger.entries(&house.tenant, 0, 10).await.unwrap();
    assert_eq!(entries.iter().map(|entry| entry.kind).collect::<Vec<_>>(), [EntryKind::Grant]);
    house.assert_balanced().await;
}

#[tokio::test]
async fn the_ledger_names_everything_about_a_request() {
    let house = House::with_balance(1_000_000).await;
    let admitted = house.admit(100, 50).await.unwrap();
    assert_eq!(admitted.hold(), nano(100 * 200 + 50 * 300));
    let mut bill = settlement(&admitted, 7);
    bill.usage.cached_tokens = 64;
    let settled = house.ledger.settle(&bill).await.unwrap();
    assert_eq!((settled.amount, settled.repeated), (nano(100 * 200 + 7 * 300), false));
    let post = house.ledger.last_entries(&house.tenant, 1).await.unwrap().remove(0);
    assert_eq!(post.kind, EntryKind::Post);
    assert_eq!(post.seq, 3);
    assert_eq!(post.request, admitted.request().as_str());
    assert_eq!((&post.tenant, &post.key, &post.model), (admitted.tenant(), admitted.key(), admitted.model()));
    assert_eq!((post.usage, post.price, post.price_version.as_str()), (bill.usage, PRICE, "2026-11"));
    assert_eq!((post.amount, post.balance), (settled.amount, nano(1_000_000 - 22_100)));
    assert_eq!(post.note, "stop");
    assert!(post.unix_ms > 1_700_000_000_000);
    house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_settled_once_however_often_and_however_parallel_it_is_tried() {
    let house = House::with_balance(1_000_000).await;
    let admitted = house.admit(10, 10).await.unwrap();
    let bill = settlement(&admitted, 4);
    let outcomes = at_once(64, |_| {
        let (ledger, bill) = (house.ledger.clone(), bill.clone());
        async move { ledger.settle(&bill).await.unwrap() }
    })
    .await;
    assert_eq!(outcomes.iter().filter(|settled| !settled.repeated).count(), 1);
    assert!(outcomes.iter().all(|settled| settled.amount == nano(3_200)));
    // Also a later call with other numbers hears what was charged then.
    let late = house.ledger.settle(&settlement(&admitted, 9)).await.unwrap();
    assert_eq!((late.amount, late.repeated), (nano(3_200), true));
    assert_eq!(house.balance().await.charged, nano(3_200));
    house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_settlement_and_a_release_at_the_same_time_one_wins() {
    let house = House::with_balance(10_000_000).await;
    for _ in 0..20 {
        let admitted = house.admit(10, 10).await.unwrap();
        let bill = settlement(&admitted, 4);
        let outcomes = at_once(8, |index| {
            let (ledger, bill) = (house.ledger.clone(), bill.clone());
            async move {
                if index % 2 == 0 {
                    matches!(ledger.settle(&bill).await, Ok(settled) if !settled.repeated)
                } else {
                    ledger.release(&bill.tenant, &bill.request, ReleaseReason::WorkerFailed).await.unwrap()
                }
            }
        })
        .await;
        assert_eq!(outcomes.iter().filter(|won| **won).count(), 1);
    }
    let money = house.balance().await;
    assert_eq!(money.held, NanoUsd::ZERO);
    house.assert_balanced().await;
}

#[tokio::test]
async fn the_same_request_is_admitted_once_also_after_it_ended() {
    let house = House::with_balance(1_000_000).await;
    let once = ask(10, 10);
    let admitted = house.admission.admit(&house.principal, once.clone()).await.unwrap();
    let again = house.admission.admit(&house.principal, once.clone()).await;
    assert!(matches!(again, Err(AdmitError::Repeated(_))));
    house.ledger.settle(&settlement(&admitted, 1)).await.unwrap();
    let again = house.admission.admit(&house.principal, once).await;
    assert!(matches!(again, Err(AdmitError::Repeated(_))));
    assert_eq!(house.balance().await.held, NanoUsd::ZERO);
    house.assert_balanced().await;
}

#[tokio::test]
async fn a_settlement_above_its_hold_or_on_other_terms_changes_nothing() {
    let house = House::with_balance(1_000_000).await;
    let admitted = house.admit(10, 10).await.unwrap();
    let before = house.balance().await;
    let above = house.ledger.settle(&settlement(&admitted, 11)).await;
    assert!(matches!(above, Err(LedgerError::ExceedsHold { amount, held, .. })
        if amount == nano(5_300) && held == nano(5_000)));
    let mut other_price = settlement(&admitted, 1);
    other_price.price = Price::flat(nano(1), nano(1));
    assert!(matches!(house.ledger.settle(&other_price).await, Err(LedgerError::OtherTerms(_))));
    let mut other_key = settlement(&admitted, 1);
    other_key.key = "key_other".into();
    assert!(matches!(house.ledger.settle(&other_key).await, Err(LedgerError::OtherTerms(_))));
    let mut other_tenant = settlement(&admitted, 1);
    other_tenant.tenant = house.another(1).await.tenant;
    assert!(matches!(house.ledger.settle(&other_tenant).await, Err(LedgerError::Unknown(_))));
    assert_eq!(house.balance().await, before);
    house.assert_balanced().await;
    assert_eq!(house.ledger.settle(&settlement(&admitted, 10)).await.unwrap().amount, nano(5_000));
    house.assert_balanced().await;
}

#[tokio::test]
async fn a_sweep_releases_only_holds_that_nobody_renewed() {
    let house = House::with_balance(1_000_000).await;
    let kept = house.admit(10, 10).await.unwrap();
    let renewed = house.admit(10, 10).await.unwrap();
    let dropped = house.admit(10, 10).await.unwrap();
    house.let_lease_run_out(renewed.request()).await;
    house.let_lease_run_out(dropped.request()).await;
    let gone = RequestId::generate();
    let owners: Vec<_> =
        [renewed.request(), &gone].map(|request| (house.tenant.clone(), request.clone())).into_iter().collect();
    house.ledger.renew_holds(&owners).await.unwrap();
    // A sweeper whose own lease is short, so that it trusts its connection at once.
    let sweeper = Ledger::new(house.store.clone(), Duration::from_millis(1));
    assert_eq!(sweeper.sweep_expired_holds().await.unwrap(), 1);
    assert_eq!(sweeper.sweep_expired_holds().await.unwrap(), 0);
    assert_eq!(house.balance().await.held, nano(10_000));
    let last = house.ledger.last_entries(&house.tenant, 1).await.unwrap().remove(0);
    assert_eq!((last.kind, last.note.as_str()), (EntryKind::Release, "expired"));
    assert_eq!(last.request, dropped.request().as_str());
    // What did not expire is settled as if nothing had been, and what did is charged to the balance.
    for (admitted, late) in [(&kept, false), (&renewed, false), (&dropped, true)] {
        let settled = house.ledger.settle(&settlement(admitted, 3)).await.unwrap();
        assert_eq!((settled.amount, settled.repeated, settled.late), (nano(2_900), false, late));
    }
    assert!(house.ledger.settle(&settlement(&dropped, 3)).await.unwrap().repeated);
    assert_eq!(house.balance().await.charged, nano(3 * 2_900));
    house.assert_balanced().await;
}

#[tokio::test]
async fn holds_of_a_node_that_is_surely_dead_need_not_wait_for_their_leases() {
    let house = House::with_balance(1_000_000).await;
    let left = house.admit(10, 10).await.unwrap();
    let settled = house.admit(10, 10).await.unwrap();
    house.ledger.settle(&settlement(&settled, 3)).await.unwrap();
    assert_eq!(house.ledger.sweep_expired_holds().await.unwrap(), 0, "no lease has run out");
    assert_eq!(house.ledger.release_left_over_holds().await.unwrap(), 1);
    assert_eq!(house.ledger.release_left_over_holds().await.unwrap(), 0);
    assert_eq!(house.balance().await.held, NanoUsd::ZERO);
    assert!(house.ledger.settle(&settlement(&left, 3)).await.unwrap().late);
    house.assert_balanced().await;
}

#[tokio::test]
async fn all_users_of_a_store_get_the_same_shared_secret() {
    let house = House::with_balance(1_000).await;
    let store = house.store.clone();
    let secrets = at_once(8, |_| {
        let store = store.clone();
        async move { store.shared_secret().await.unwrap() }
    })
    .await;
    assert!(secrets[0].len() >= 64 && secrets.iter().all(|secret| *secret == secrets[0]));
}

#[tokio::test]
async fn one_sweep_ends_thousands_of_holds_of_many_tenants() {
    let house = House::with_balance(1_000_000_000).await;
    let other = house.another(1_000_000_000).await;
    let short = Admission::new(house.store.clone(), Duration::from_millis(1));
    for index in 0..600 {
        let principal = if index % 3 == 0 { &other } else { &house.principal };
        let _left_to_expire = short.admit(principal, ask(10, 10)).await.unwrap();
    }
    let sweeper = Ledger::new(house.store.clone(), Duration::from_millis(1));
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(sweeper.sweep_expired_holds().await.unwrap(), 600);
    assert_eq!(house.balance().await.held, NanoUsd::ZERO);
    house.assert_balanced().await;
}

#[tokio::test]
async fn money_beyond_the_reach_of_doubles_is_exact_to_the_nano_dollar() {
    let house = House::with_balance(i64::MAX - 1).await;
    let grant = house.ledger.grant(&house.tenant, nano(1), "last", "").await.unwrap();
    assert_eq!((grant.balance, grant.repeated), (nano(i64::MAX), false));
    let beyond = house.ledger.grant(&house.tenant, nano(1), "beyond", "").await;
    assert!(matches!(beyond, Err(LedgerError::Money(MoneyError::Overflow))));
    let mut odd = ask(1, 1);
    odd.price = Price::flat(nano(8_999_999_999_999_993), nano(2));
    let admitted = house.admission.admit(&house.principal, odd).await.unwrap();
    let money = house.balance().await;
    assert_eq!(money.held, nano(8_999_999_999_999_995));
    assert_eq!(money.balance, nano(i64::MAX - 8_999_999_999_999_995));
    let settled = house.ledger.settle(&settlement(&admitted, 0)).await.unwrap();
    assert_eq!(settled.amount, nano(8_999_999_999_999_993));
    assert_eq!(house.balance().await.balance, nano(i64::MAX - 8_999_999_999_999_993));
    house.assert_balanced().await;
    let mut absurd = ask(u32::MAX, u32::MAX);
    absurd.price = Price::flat(nano(i64::MAX), nano(1));
    let refusal = house.admission.admit(&house.principal, absurd).await;
    assert!(matches!(refusal, Err(AdmitError::Money(MoneyError::Overflow))));
}

#[tokio::test]
async fn a_grant_is_booked_once_per_reference() {
    let house = House::with_balance(0).await;
    for repeated in [false, true] {
        let granted = house.ledger.grant(&house.tenant, nano(500), "invoice 7", "wire").await.unwrap();
        assert_eq!((granted.balance, granted.repeated), (nano(500), repeated));
    }
    for bad in [0, -1] {
        let refused = house.ledger.grant(&house.tenant, nano(bad), "bad", "").await;
        assert!(matches!(refused, Err(LedgerError::BadAmount(_))));
    }
    let stranger = house.ledger.grant(&"ten_nobody".into(), nano(1), "x", "").await;
    assert!(matches!(stranger, Err(LedgerError::UnknownTenant(_))));
    house.assert_balanced().await;
}

#[tokio::test]
async fn free_models_work_without_a_balance() {
    let house = House::with_balance(0).await;
    let mut free = ask(10, 10);
    free.price = Price::flat(NanoUsd::ZERO, NanoUsd::ZERO);
    let admitted = house.admission.admit(&house.principal, free).await.unwrap();
    assert_eq!(house.ledger.settle(&settlement(&admitted, 5)).await.unwrap().amount, NanoUsd::ZERO);
    house.assert_balanced().await;
}

#[tokio::test]
async fn a_damaged_account_is_an_error_and_never_zero() {
    for (field, value) in [("balance", None), ("balance", Some("1e9")), ("held", None), ("seq", Some("99"))] {
        let house = House::with_balance(1_000_000).await;
        let admitted = house.admit(10, 10).await.unwrap();
        let key = keys::account(&house.tenant);
        let mut raw = house.valkey.raw().await;
        match value {
            Some(value) => redis::cmd("HSET").arg(key).arg(field).arg(value).exec_async(&mut raw).await.unwrap(),
            None => redis::cmd("HDEL").arg(key).arg(field).exec_async(&mut raw).await.unwrap(),
        }
        let damaged = house.admit(10, 10).await.unwrap_err();
        assert!(damaged.to_string().contains("damaged"), "{field}: {damaged}");
        let damaged = house.ledger.settle(&settlement(&admitted, 1)).await.unwrap_err();
        assert!(damaged.to_string().contains("damaged"), "{field}: {damaged}");
        if field != "seq" {
            let damaged = house.ledger.balance(&house.tenant).await.unwrap_err();
            assert!(damaged.to_string().contains("damaged"), "{field}: {damaged}");
        }
        assert!(!house.ledger.verify().await.unwrap().is_balanced(), "{field}");
    }
}

#[tokio::test]
async fn a_damaged_account_does_not_keep_the_expired_holds_of_others() {
    let house = House::with_balance(1_000_000).await;
    let broken = house.another(1_000_000).await;
    let _theirs = house.admission.admit(&broken, ask(10, 10)).await.unwrap();
    let _ours = house.admit(10, 10).await.unwrap();
    let mut raw = house.valkey.raw().await;
    for tenant in [&broken.tenant, &house.tenant] {
        for request in house.ledger.entries(tenant, 1, 10).await.unwrap() {
            let lapsed = redis::cmd("ZADD").arg(keys::hold_leases(tenant)).arg(1).arg(request.request).to_owned();
            lapsed.exec_async(&mut raw).await.unwrap();
        }
    }
    redis::cmd("HDEL").arg(keys::account(&broken.tenant)).arg("held").exec_async(&mut raw).await.unwrap();
    let sweeper = Ledger::new(house.store.clone(), Duration::from_millis(1));
    assert_eq!(sweeper.sweep_expired_holds().await.unwrap(), 1);
    assert_eq!(house.balance().await.held, NanoUsd::ZERO);
}

/// What a tenant's account should be, kept in the plainest way.
#[derive(Default)]
struct Twin {
    balance: i64,
    charged: i64,
    open: HashMap<String, i64>,
}

#[tokio::test]
async fn random_traffic_agrees_with_a_plain_account_after_every_step() {
    let house = House::with_balance(300_000).await;
    let mut twin = Twin { balance: 300_000, ..Twin::default() };
    let mut open: Vec<AdmittedRequest> = Vec::new();
    let mut random = StdRng::seed_from_u64(7);
    for step in 0..400 {
        match random.random_range(0..10) {
            0..5 => {
                let (prompt, output) = (random.random_range(1..100), random.random_range(0..100));
                let cost = i64::from(prompt) * 200 + i64::from(output) * 300;
                match house.admit(prompt, output).await {
                    Ok(admitted) => {
                        let hold = admitted.hold().nano();
                        let paid_for = i64::from(admitted.allowed_tokens());
                        assert_eq!(hold, i64::from(prompt) * 200 + paid_for * 300, "step {step}");
                        // As much as was asked for, or as much as there is.
                        assert!(hold == cost || twin.balance - hold < 300 && hold < cost, "step {step}");
                        twin.balance -= hold;
                        twin.open.insert(admitted.request().to_string(), hold);
                        open.push(admitted);
                    }
                    Err(AdmitError::InsufficientBalance { .. }) => {
                        let least = i64::from(prompt) * 200 + i64::from(output.min(1)) * 300;
                        assert!(least > twin.balance, "step {step}");
                    }
                    Err(error) => panic!("step {step}: {error}"),
                }
            }
            5..8 if !open.is_empty() => {
                let admitted = open.swap_remove(random.random_range(0..open.len()));
                let used = random.random_range(0..=admitted.allowed_tokens());
                let settled = house.ledger.settle(&settlement(&admitted, used)).await.unwrap();
                let held = twin.open.remove(admitted.request().as_str()).unwrap();
                twin.charged += settled.amount.nano();
                twin.balance += held - settled.amount.nano();
            }
            8 if !open.is_empty() => {
                let admitted = open.swap_remove(random.random_range(0..open.len()));
                let why = ReleaseReason::Draining;
                assert!(house.ledger.release(&house.tenant, admitted.request(), why).await.unwrap());
                assert!(!house.ledger.release(&house.tenant, admitted.request(), why).await.unwrap());
                twin.balance += twin.open.remove(admitted.request().as_str()).unwrap();
            }
            _ => {
                let amount = random.random_range(1..20_000);
                house.ledger.grant(&house.tenant, nano(amount), &format!("step {step}"), "").await.unwrap();
                twin.balance += amount;
            }
        }
        let money = house.balance().await;
        let held: i64 = twin.open.values().sum();
        assert_eq!((money.balance.nano(), money.held.nano(), money.charged.nano()), (twin.balance, held, twin.charged));
    }
    house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_books_balance_at_every_instant_of_a_storm() {
    let house = House::with_balance(400_000).await;
    let storming = Arc::new(AtomicBool::new(true));
    let watcher = tokio::spawn({
        let (ledger, tenant, storming) = (house.ledger.clone(), house.tenant.clone(), storming.clone());
        async move {
            let mut looks = 0;
            while storming.load(Ordering::Relaxed) {
                let money = ledger.balance(&tenant).await.unwrap();
                assert!(money.balance >= NanoUsd::ZERO);
                let sum = money.balance.nano() + money.held.nano() + money.charged.nano();
                assert_eq!(money.granted.nano() + money.refunded.nano(), sum);
                let report = ledger.verify().await.unwrap();
                assert!(report.is_balanced(), "{report:#?}");
                looks += 1;
            }
            looks
        }
    });
    at_once(24, |index| {
        let (admission, ledger) = (house.admission.clone(), house.ledger.clone());
        let principal = house.principal.clone();
        async move {
            let mut random = StdRng::seed_from_u64(index as u64);
            for round in 0..20 {
                let Ok(admitted) = admission.admit(&principal, ask(random.random_range(1..50), 50)).await else {
                    let reference = format!("{index} {round}");
                    ledger.grant(&principal.tenant, nano(5_000), &reference, "").await.unwrap();
                    continue;
                };
                match random.random_range(0..3) {
                    0 => drop(
                        ledger
                            .settle(&settlement(&admitted, random.random_range(0..=admitted.allowed_tokens())))
                            .await
                            .unwrap(),
                    ),
                    1 => drop(ledger.release(&principal.tenant, admitted.request(), ReleaseReason::Withdrawn).await),
                    _ => drop(admitted),
                }
            }
        }
    })
    .await;
    storming.store(false, Ordering::Relaxed);
    assert!(watcher.await.unwrap() > 0);
    house.assert_balanced().await;
}
