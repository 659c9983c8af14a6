//! The store goes away and comes back: nothing fails open, nothing is lost, nobody is robbed of a lease.

use std::time::{Duration, Instant};

use lightcone::{
    admission::{Admission, AdmitError, AuthError},
    domain::NanoUsd,
    ledger::{Ledger, LedgerError, ReleaseReason},
    queue::{Queue, QueueLimits},
    store::{Store, StoreError},
};

use crate::support::house::{House, LEASE, ask, settlement};

const COMMAND_MAX: Duration = Duration::from_millis(1_000);
/// Far beyond what three commands take, also on a machine that is busy with other things.
const BOUND: Duration = Duration::from_secs(15);

/// Asks until the store answers again, as every part of the house does in its own way.
async fn until_it_answers(store: &Store) {
    let started = Instant::now();
    while let Err(error) = store.ping().await {
        assert!(error.is_transient(), "{error}");
        assert!(started.elapsed() < Duration::from_secs(20), "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_store_is_away_everything_is_refused_in_bounded_time() {
    let mut house = House::with_balance(1_000_000).await;
    let store = Store::connect(&house.valkey.url(), COMMAND_MAX).await.unwrap();
    let admission = Admission::new(store.clone(), LEASE);
    let ledger = Ledger::new(store.clone(), LEASE);
    let admitted = admission.admit(&house.principal, ask(10, 10)).await.unwrap();
    house.valkey.kill();
    for _ in 0..5 {
        let started = Instant::now();
        let refused = admission.admit(&house.principal, ask(10, 10)).await;
        assert!(matches!(refused, Err(AdmitError::Store(_))), "{refused:?}");
        let refused = admission.authenticate(&house.secret).await;
        assert!(matches!(refused, Err(AuthError::Store(_))), "{refused:?}");
        let refused = ledger.settle(&settlement(&admitted, 1)).await;
        assert!(matches!(&refused, Err(LedgerError::Store(error)) if error.is_transient()), "{refused:?}");
        assert!(started.elapsed() < BOUND);
    }
    assert_eq!(store.connected_for(), Duration::ZERO);
    let refused = Store::connect(&house.valkey.url(), COMMAND_MAX).await.map(drop);
    assert!(matches!(refused, Err(StoreError::Connect { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_before_a_crash_of_the_store_still_holds_after_it() {
    let mut house = House::with_balance(1_000_000).await;
    let settled = house.admit(10, 10).await.unwrap();
    house.ledger.settle(&settlement(&settled, 4)).await.unwrap();
    let open = house.admit(10, 10).await.unwrap();
    let before = house.balance().await;
    house.valkey.restart();
    until_it_answers(&house.store).await;
    assert_eq!(house.balance().await, before);
    assert!(house.ledger.settle(&settlement(&settled, 4)).await.unwrap().repeated);
    assert!(!house.ledger.settle(&settlement(&open, 4)).await.unwrap().repeated);
    house.assert_balanced().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_sweeps_within_a_lease_of_an_outage_so_that_owners_can_renew() {
    let lease = Duration::from_millis(1_500);
    let mut house = House::with_balance(1_000_000).await;
    let store = Store::connect(&house.valkey.url(), COMMAND_MAX).await.unwrap();
    let (admission, ledger) = (Admission::new(store.clone(), lease), Ledger::new(store.clone(), lease));
    let queue = Queue::new(
        store.clone(),
        QueueLimits {
            depth_max: 10,
            claim_lease: lease,
            takeover_max: lease,
            start_max: Duration::from_secs(600),
            losses_max: 1,
        },
    );
    let owned = admission.admit(&house.principal, ask(10, 10)).await.unwrap();
    let abandoned = admission.admit(&house.principal, ask(10, 10)).await.unwrap();
    house.valkey.kill();
    // The outage is longer than the lease.
    let away = Instant::now();
    while away.elapsed() < lease {
        assert!(ledger.sweep_expired_holds().await.is_err());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let back = Instant::now();
    house.valkey.restart();
    until_it_answers(&store).await;
    assert_eq!(ledger.sweep_expired_holds().await.unwrap(), 0);
    assert!(queue.expired(&"m".into()).await.unwrap().is_empty());
    let owner = [(house.tenant.clone(), owned.request().clone())];
    ledger.renew_holds(&owner).await.unwrap();
    while ledger.sweep_expired_holds().await.unwrap() == 0 {
        assert!(back.elapsed() < BOUND, "the abandoned hold was never swept");
        ledger.renew_holds(&owner).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(back.elapsed() >= lease, "swept {:?} after the outage", back.elapsed());
    assert!(!ledger.settle(&settlement(&owned, 4)).await.unwrap().repeated);
    assert!(ledger.settle(&settlement(&abandoned, 4)).await.unwrap().late);
    assert!(ledger.verify().await.unwrap().is_balanced());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_a_frozen_store_ran_late_leaves_sound_books() {
    let house = House::with_balance(1_000_000).await;
    let impatient = Duration::from_millis(200);
    let store = Store::connect(&house.valkey.url(), impatient).await.unwrap();
    let (admission, ledger) = (Admission::new(store.clone(), LEASE), Ledger::new(store.clone(), LEASE));
    let admitted = admission.admit(&house.principal, ask(10, 10)).await.unwrap();
    let bill = settlement(&admitted, 4);
    house.valkey.freeze();
    let started = Instant::now();
    assert!(matches!(admission.admit(&house.principal, ask(10, 10)).await, Err(AdmitError::Store(_))));
    assert!(matches!(ledger.settle(&bill).await, Err(LedgerError::Store(_))));
    assert!(started.elapsed() < BOUND);
    house.valkey.thaw();
    until_it_answers(&store).await;
    assert!(store.connected_for() < started.elapsed() - 2 * impatient);
    // Whether the first try took effect or not: the second says what was charged, and it was charged once.
    assert_eq!(ledger.settle(&bill).await.unwrap().amount.nano(), 3_200);
    assert_eq!(house.balance().await.charged.nano(), 3_200);
    house.assert_balanced().await;
}

#[tokio::test]
async fn functions_that_were_lost_are_loaded_again_by_the_next_call() {
    let house = House::with_balance(1_000_000).await;
    let mut raw = house.valkey.raw().await;
    redis::cmd("FUNCTION").arg("FLUSH").exec_async(&mut raw).await.unwrap();
    let admitted = house.admit(10, 10).await.unwrap();
    redis::cmd("FUNCTION").arg("FLUSH").exec_async(&mut raw).await.unwrap();
    house.assert_balanced().await;
    house.ledger.settle(&settlement(&admitted, 1)).await.unwrap();
}

#[tokio::test]
async fn a_store_out_of_memory_refuses_what_is_new_and_ends_what_is_open() {
    let house = House::with_balance(1_000_000).await;
    let (admitted, released) = (house.admit(10, 10).await.unwrap(), house.admit(10, 10).await.unwrap());
    let mut raw = house.valkey.raw().await;
    redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(1).exec_async(&mut raw).await.unwrap();
    let refused = house.admit(10, 10).await;
    assert!(matches!(refused, Err(AdmitError::Store(StoreError::Refused(_)))), "{refused:?}");
    assert_eq!(house.store.connected_for(), Duration::ZERO);
    house.ledger.settle(&settlement(&admitted, 1)).await.unwrap();
    house.ledger.release(&house.tenant, released.request(), ReleaseReason::Withdrawn).await.unwrap();
    assert_eq!(house.balance().await.held, NanoUsd::ZERO);
    redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(0).exec_async(&mut raw).await.unwrap();
    house.assert_balanced().await;
}

#[tokio::test]
async fn a_wrong_address_is_one_clear_line() {
    for address in ["", "localhost:6379", "http://localhost", "redis://:x"] {
        let error = Store::connect(address, COMMAND_MAX).await.map(drop).unwrap_err();
        assert!(matches!(error, StoreError::Address { .. }), "{address}: {error}");
        assert!(!error.is_transient());
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    for address in ["unix:///nowhere/at-all", "redis://user:secret@127.0.0.1:1/0"] {
        let started = Instant::now();
        let error = Store::connect(address, COMMAND_MAX).await.map(drop).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, StoreError::Connect { .. }) && error.is_transient(), "{error}");
        assert!(started.elapsed() < BOUND && !text.contains('\n') && !text.contains("secret"), "{text}");
    }
}
