//! Verification finds what was tampered with.

use lightcone::{
    domain::NanoUsd,
    ledger::{Refund, ReleaseReason, Report},
    store::keys,
};

use crate::support::{
    aging::{rewrite, set},
    house::{House, settlement},
};

/// One grant, one posted, one released and one open request: entries 1 to 6.
async fn furnished() -> House {
    let house = House::with_balance(1_000_000).await;
    let posted = house.admit(10, 10).await.unwrap();
    house.ledger.settle(&settlement(&posted, 4)).await.unwrap();
    let released = house.admit(20, 10).await.unwrap();
    house.ledger.release(&house.tenant, released.request(), ReleaseReason::Draining).await.unwrap();
    let _open = house.admit(30, 10).await.unwrap();
    house.assert_balanced().await;
    house
}

async fn report(house: &House) -> Report {
    house.ledger.verify().await.unwrap()
}

async fn account_add(house: &House, field: &str, nano: i64) {
    let mut raw = house.valkey.raw().await;
    let key = keys::account(&house.tenant);
    redis::cmd("HINCRBY").arg(key).arg(field).arg(nano).exec_async(&mut raw).await.unwrap();
}

#[tokio::test]
async fn verify_reports_zero_for_a_store_without_tenants() {
    let valkey = crate::support::valkey::Valkey::start();
    let ledger = lightcone::ledger::Ledger::new(valkey.store().await, crate::support::house::LEASE);
    let report = ledger.verify().await.unwrap();
    assert!(report.is_balanced());
    assert_eq!((report.tenants, report.entries), (0, 0));
    assert_eq!(serde_json::to_value(&report).unwrap()["imbalance_nano_usd"], 0);
}

#[tokio::test]
async fn verify_detects_a_changed_account() {
    for (field, imbalance) in [("balance", -5), ("held", 0), ("charged", 0), ("granted", 0), ("refunded", 5)] {
        let house = furnished().await;
        account_add(&house, field, 5).await;
        let found = report(&house).await;
        assert!(!found.is_balanced() && found.faults[0].contains(field), "{field}: {found:#?}");
        assert_eq!(found.imbalance_nano_usd, imbalance, "{field}");
    }
}

#[tokio::test]
async fn verify_detects_what_was_changed_of_an_open_request_and_of_what_may_be_given_back() {
    let house = furnished().await;
    let (ledger, tenant) = (&house.ledger, &house.tenant);
    let charged = house.admit(10, 10).await.unwrap();
    ledger.settle(&settlement(&charged, 4)).await.unwrap();
    let (request, amount) = (charged.request().clone(), NanoUsd::new(100));
    let refund = Refund { request, amount, reference: "some".to_owned(), note: String::new() };
    ledger.refund(tenant, &refund).await.unwrap();
    house.assert_balanced().await;
    let mut raw = house.valkey.raw().await;
    let terms: Vec<(String, String)> =
        redis::cmd("HGETALL").arg(keys::hold_terms(tenant)).query_async(&mut raw).await.unwrap();
    let [(open, terms)] = &terms[..] else { panic!("{terms:?}") };
    // Key, model, three prices, version, day.
    for at in 0..7 {
        let mut changed: Vec<String> = terms.split('\x1f').map(str::to_owned).collect();
        changed[at] += "1";
        let place = keys::hold_terms(tenant);
        let set = async |raw: &mut _, text: &str| {
            redis::cmd("HSET").arg(&place).arg(open).arg(text).exec_async(raw).await.unwrap();
        };
        set(&mut raw, &changed.join("\x1f")).await;
        assert_eq!(report(&house).await.faults_total, 1, "{changed:?}");
        set(&mut raw, terms).await;
    }
    house.assert_balanced().await;
    let left = format!("refundable {}", charged.request());
    let ended = keys::ended(tenant);
    redis::cmd("HINCRBY").arg(&ended).arg(&left).arg(1000).exec_async(&mut raw).await.unwrap();
    assert_eq!(report(&house).await.faults_total, 1);
    redis::cmd("HINCRBY").arg(&ended).arg(&left).arg(-1000).exec_async(&mut raw).await.unwrap();
    redis::cmd("ZADD").arg(keys::hold_leases(tenant)).arg(1).arg("nobody").exec_async(&mut raw).await.unwrap();
    assert_eq!(report(&house).await.faults_total, 1);
    redis::cmd("ZREM").arg(keys::hold_leases(tenant)).arg("nobody").exec_async(&mut raw).await.unwrap();
    account_add(&house, "at", 864_000_000).await;
    assert_eq!(report(&house).await.faults_total, 1);
}

#[tokio::test]
async fn verify_detects_money_moved_between_two_accounts() {
    let house = furnished().await;
    let other = house.another(50).await;
    account_add(&house, "balance", -50).await;
    let mut raw = house.valkey.raw().await;
    let key = keys::account(&other.tenant);
    redis::cmd("HINCRBY").arg(key).arg("balance").arg(50).exec_async(&mut raw).await.unwrap();
    let found = report(&house).await;
    assert_eq!((found.imbalance_nano_usd, found.faults_total), (0, 2), "{found:#?}");
    assert!(!found.is_balanced());
}

#[tokio::test]
async fn verify_detects_every_changed_field_of_every_entry() {
    let house = furnished().await;
    let mut originals = Vec::new();
    rewrite(&house, &house.tenant, |entries| originals = entries.clone()).await;
    house.assert_balanced().await;
    for (index, (id, fields)) in originals.iter().enumerate() {
        let kind = &fields.iter().find(|(name, _)| name == "kind").expect("a kind").1;
        for (name, value) in fields {
            let changed = match value.parse::<i64>() {
                Ok(number) => (number + 1).to_string(),
                Err(_) => format!("{value}x"),
            };
            rewrite(&house, &house.tenant, |entries| set(&mut entries[index].1, name, &changed)).await;
            let found = report(&house).await;
            assert!(!found.is_balanced(), "{kind} {id}: {name} {value} -> {changed}");
            rewrite(&house, &house.tenant, |entries| entries.clone_from(&originals)).await;
        }
    }
    house.assert_balanced().await;
}

#[tokio::test]
async fn verify_detects_missing_added_and_reordered_entries() {
    for index in 0..6 {
        let house = furnished().await;
        rewrite(&house, &house.tenant, |entries| drop(entries.remove(index))).await;
        assert!(!report(&house).await.is_balanced(), "without entry {}", index + 1);
    }
    let house = furnished().await;
    rewrite(&house, &house.tenant, |entries| {
        let (first, second) = (entries[1].1.clone(), entries[3].1.clone());
        entries[1].1 = second;
        entries[3].1 = first;
    })
    .await;
    assert!(!report(&house).await.is_balanced());
    // A second settlement of the same request, with an account that agrees with it.
    let house = furnished().await;
    rewrite(&house, &house.tenant, |entries| {
        let mut again = entries[2].1.clone();
        set(&mut again, "balance", "988700");
        entries.push(("7-0".to_owned(), again));
    })
    .await;
    account_add(&house, "seq", 1).await;
    account_add(&house, "charged", 3_200).await;
    account_add(&house, "balance", -3_200).await;
    let found = report(&house).await;
    assert!(found.faults.iter().any(|fault| fault.contains("a second time")), "{found:#?}");
}

#[tokio::test]
async fn verify_detects_lost_and_invented_holds_and_leases() {
    let house = furnished().await;
    let mut raw = house.valkey.raw().await;
    let key = keys::hold_leases(&house.tenant);
    redis::cmd("DEL").arg(key).exec_async(&mut raw).await.unwrap();
    let found = report(&house).await;
    assert!(found.faults[0].contains("no lease"), "{found:#?}");

    let house = furnished().await;
    let mut raw = house.valkey.raw().await;
    redis::cmd("DEL").arg(keys::holds(&house.tenant)).exec_async(&mut raw).await.unwrap();
    let found = report(&house).await;
    assert_eq!(found.imbalance_nano_usd, 30 * 200 + 10 * 300);

    let house = furnished().await;
    let mut raw = house.valkey.raw().await;
    let invented = redis::cmd("HSET").arg(keys::holds(&house.tenant)).arg("chatcmpl-x").arg(9).to_owned();
    invented.exec_async(&mut raw).await.unwrap();
    let found = report(&house).await;
    assert!(found.faults[0].contains("without an entry"), "{found:#?}");
    assert_eq!(found.imbalance_nano_usd, -9);

    // A forgotten settlement could be repeated.
    let house = furnished().await;
    let mut raw = house.valkey.raw().await;
    redis::cmd("DEL").arg(keys::ended(&house.tenant)).exec_async(&mut raw).await.unwrap();
    assert!(!report(&house).await.is_balanced());
}

#[tokio::test]
async fn verify_reads_ledgers_longer_than_one_page() {
    let house = House::with_balance(1_000_000_000).await;
    for _ in 0..600 {
        let admitted = house.admit(1, 1).await.unwrap();
        house.ledger.settle(&settlement(&admitted, 1)).await.unwrap();
    }
    let found = report(&house).await;
    assert!(found.is_balanced(), "{found:#?}");
    assert_eq!(found.entries, 1201);
    assert_eq!(house.balance().await.charged, NanoUsd::new(600 * 500));
    let page = house.ledger.entries(&house.tenant, 1199, 10).await.unwrap();
    assert_eq!(page.iter().map(|entry| entry.seq).collect::<Vec<_>>(), [1200, 1201]);
}

#[tokio::test]
async fn the_imbalance_of_the_accounts_is_zero_until_somebody_changes_one() {
    let house = furnished().await;
    assert_eq!(house.ledger.imbalance().await.unwrap(), (NanoUsd::ZERO, 0));
    account_add(&house, "balance", -70).await;
    assert_eq!(house.ledger.imbalance().await.unwrap(), (NanoUsd::new(70), 0));
    account_add(&house, "balance", 100).await;
    assert_eq!(house.ledger.imbalance().await.unwrap(), (NanoUsd::new(30), 0));
}
