//! A node that looks after its ledger while it serves.

use std::time::{Duration, Instant};

use lightcone::{
    admission::Scope,
    domain::{Day, Month},
    ledger::Receipt,
    store::keys,
};
use serde_json::Value;

use crate::support::{
    house::{House, MODEL, settlement},
    old::Old,
    process::{Home, Node, SOON},
};

async fn gauge(node: &Node, name: &str) -> Option<i64> {
    let metrics = reqwest::get(format!("{}/metrics", node.url)).await.unwrap().text().await.unwrap();
    let line = metrics.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
}

async fn faults(node: &Node) -> Option<i64> {
    gauge(node, "lightcone_ledger_faults").await
}

async fn unbalanced(node: &Node) -> Option<i64> {
    gauge(node, "lightcone_ledger_unbalanced_tenants").await
}

async fn count(house: &House, key: String, field: &str, by: i64) {
    let mut raw = house.valkey.raw().await;
    redis::cmd("HINCRBY").arg(key).arg(field).arg(by).exec_async(&mut raw).await.unwrap();
}

#[tokio::test]
async fn a_node_finds_what_was_tampered_with_logs_it_once_and_sees_that_it_was_put_right() {
    let house = House::with_balance(1_000_000).await;
    house.ledger.settle(&settlement(&house.admit(10, 10).await.unwrap(), 4)).await.unwrap();
    let home = Home::with_leases(1000, "verify_seconds = 1\n", "");
    let node = home.start(&["--redis-url", &house.valkey.url()]);
    let see = async |expected: i64| {
        let begun = Instant::now();
        while faults(&node).await != Some(expected) {
            assert!(begun.elapsed() < SOON, "{:?} faults, not {expected}", faults(&node).await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    see(0).await;
    let change = async |by: i64| count(&house, keys::account(&house.tenant), "charged", by).await;
    change(5).await;
    see(1).await;
    assert_eq!(unbalanced(&node).await, Some(1));
    // Another pass or two.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(faults(&node).await, Some(1));
    assert_eq!(home.log_text().matches("charged is 3205 where the entries make it 3200").count(), 1);
    assert!(home.log_text().contains(&format!("tenant={}", house.tenant)), "{}", home.log_text());
    change(-5).await;
    see(0).await;
    assert_eq!(unbalanced(&node).await, Some(0));
    // Once more, it is news.
    change(5).await;
    see(1).await;
    assert_eq!(home.log_text().matches("charged is 3205 where the entries make it 3200").count(), 2);
    node.kill();
}

#[tokio::test]
async fn every_counter_that_the_entries_make_is_compared_with_them() {
    let house = House::with_balance(1_000_000).await;
    house.ledger.settle(&settlement(&house.admit(10, 10).await.unwrap(), 4)).await.unwrap();
    let open = house.admit(10, 10).await.unwrap();
    house.assert_balanced().await;
    let (now, tenant) = (house.ledger.now_unix_ms().await.unwrap(), &house.tenant);
    let (month, day) = (Month::of(now).to_string().replace('-', ""), Day::of(now).to_string().replace('-', ""));
    let of = |name: &str| format!("lc:{{t:{tenant}}}:{name}");
    let hour = house.ledger.last_entries(tenant, 2).await.unwrap()[0].unix_ms / 3_600_000;
    let usage = |what: &str| format!("{MODEL}\x1f{}\x1f{what}", open.key());
    let key = open.key();
    for (name, field, said) in [
        (format!("usage:hour:{hour}"), usage("requests"), "usage of hour"),
        (format!("usage:hour:{hour}"), usage("prompt"), "usage of hour"),
        (format!("usage:hour:{hour}"), usage("completion"), "usage of hour"),
        (format!("usage:hour:{hour}"), usage("amount"), "usage of hour"),
        (format!("period:{day}"), "t:spend".to_owned(), "day"),
        (format!("period:{day}"), format!("k:{key}:requests"), "day"),
        (format!("period:{month}"), format!("k:{key}:spend"), "month"),
        ("account".to_owned(), "refunded".to_owned(), "refunded"),
        ("account".to_owned(), "granted".to_owned(), "granted"),
        ("holds".to_owned(), open.request().to_string(), "on hold"),
        ("open".to_owned(), key.to_string(), "open requests"),
    ] {
        count(&house, of(&name), &field, 1).await;
        let report = house.ledger.verify().await.unwrap();
        let named = report.faults.iter().any(|fault| fault.contains(said) && fault.contains(tenant.as_str()));
        assert!(named, "{name} {field}: {report:#?}");
        count(&house, of(&name), &field, -1).await;
    }
    house.assert_balanced().await;
}

#[tokio::test]
async fn one_node_verifies_and_another_goes_on_when_it_is_dead() {
    let house = House::with_balance(1_000_000).await;
    count(&house, keys::account(&house.tenant), "charged", 5).await;
    let homes = [(); 2].map(|()| Home::with_leases(1000, "verify_seconds = 1\n", ""));
    let mut nodes = Vec::new();
    for home in &homes {
        nodes.push(home.start(&["--redis-url", &house.valkey.url()]));
    }
    let begun = Instant::now();
    let first = loop {
        assert!(begun.elapsed() < SOON, "{}", homes[0].log_text());
        match [unbalanced(&nodes[0]).await, unbalanced(&nodes[1]).await] {
            [Some(1), _] => break 0,
            [_, Some(1)] => break 1,
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    // For some passes, and for longer than either waits for its turn.
    for _ in 0..50 {
        assert_eq!(unbalanced(&nodes[1 - first]).await, Some(0));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    nodes.remove(first).kill();
    let begun = Instant::now();
    while unbalanced(&nodes[0]).await != Some(1) {
        assert!(begun.elapsed() < SOON, "{}", homes[1 - first].log_text());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    nodes.remove(0).kill();
}

#[tokio::test]
async fn a_node_archives_old_months_by_itself_and_answers_from_them() {
    let old = Old::furnished(2).await;
    let house = &old.house;
    let before = old.statements(&house.ledger).await;
    let key = house.accounts.create_key(&house.tenant, "reader", [Scope::Read].into_iter().collect()).await.unwrap();
    let home = Home::with_leases(1000, "archive_months = 1\n", "");
    let url = house.valkey.url();
    let node = home.start(&["--redis-url", &url]);
    let begun = Instant::now();
    // All but the last month that is over, and those hold two months at least.
    let first = Month::of(house.ledger.now_unix_ms().await.unwrap()).before(1);
    let archived = async || house.ledger.entries(&house.tenant, 0, 1).await.unwrap()[0].unix_ms;
    while archived().await < first.begins_unix_ms() {
        assert!(begun.elapsed() < SOON, "{}", home.log_text());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let ask = async |path: &str| {
        let http = reqwest::Client::new();
        let answer = http.get(format!("{}/v1/{path}", node.url)).bearer_auth(&key.secret).send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let (statement, generation) = (format!("statements/{}", before[0].month), format!("generations/{}", old.charged));
    let receipt = format!("{generation}/receipt");
    assert_eq!(ask(&statement).await, (200, serde_json::to_value(&before[0]).unwrap()));
    let (status, shown) = ask(&generation).await;
    assert_eq!((status, &shown["status"], &shown["refunded_nano_usd"]), (200, &"charged".into(), &100.into()));
    let (status, signed) = ask(&receipt).await;
    assert_eq!((status, &signed["amount_nano_usd"]), (200, &shown["amount_nano_usd"]), "{signed}");
    let signed: Receipt = signed.to_string().parse().unwrap();
    assert_eq!(signed.verify(&house.receipts.public_key()), Ok(()));

    let report = home.run(&["ledger", "verify", "--redis-url", &url]);
    assert_eq!((&report["faults_total"], &report["imbalance_nano_usd"]), (&0.into(), &0.into()), "{report}");
    // Without a month it is what the node does.
    let again = home.run(&["ledger", "archive", "--redis-url", &url]);
    assert_eq!((&again["files"], &again["taken_out"]), (&0.into(), &0.into()), "{again}");

    // The files of the data folder are looked at without being asked for.
    let folder = home.data_dir().join("archive").join(house.tenant.as_str());
    let file = folder.join(format!("{}.jsonl.gz", before[0].month));
    let whole = std::fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    std::fs::write(&file, flipped).unwrap();
    let failed = home.fails(&["ledger", "verify", "--redis-url", &url]);
    assert!(failed.contains(&format!("{}.jsonl.gz: its SHA-256 is", before[0].month)), "{failed}");
    for path in [&statement, &generation, &receipt] {
        assert_eq!(ask(path).await.0, 500, "{path}");
    }
    std::fs::write(&file, whole).unwrap();
    assert_eq!(ask(&statement).await.0, 200);
    std::fs::remove_file(folder.join("manifest.json")).unwrap();
    let failed = home.fails(&["ledger", "verify", "--redis-url", &url]);
    assert!(failed.contains("manifest.json: is missing"), "{failed}");
    for path in [&statement, &generation, &receipt] {
        let (status, error) = ask(path).await;
        assert_eq!((status, &error["error"]["code"]), (404, &"archived".into()), "{path}");
    }
    node.kill();
}
