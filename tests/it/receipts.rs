//! Receipts from the operator's side to the tenant's: a node's key, and the program that checks without it.

use std::{
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use lightcone::{
    domain::{NanoUsd, Price, Usage},
    ledger::{RECEIPT_VERSION, Receipt, ReceiptKey, ReceiptStatement, Receipts},
    store::{Store, embedded::EmbeddedServer},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{house::House, process::Home};

fn statement() -> ReceiptStatement {
    let [input, output, cached_input] = [200, 300, 50].map(NanoUsd::new);
    ReceiptStatement {
        version: RECEIPT_VERSION,
        request: "chatcmpl-1".into(),
        tenant: "ten_1".into(),
        key: "key_1".into(),
        model: "tzafon.sm-1".into(),
        usage: Usage { prompt_tokens: 10, completion_tokens: 4, cached_tokens: 2 },
        price: Price { input, output, cached_input },
        price_version: "2026-11".into(),
        amount: NanoUsd::new(8 * 200 + 2 * 50 + 4 * 300),
        reason: "stop".into(),
        token_digest: None,
        settled_unix_ms: 1_763_769_600_000,
        ledger_seq: 3,
        ledger_link: "0f".repeat(20),
    }
}

fn text(receipt: &Receipt) -> String {
    serde_json::to_string_pretty(receipt).expect("JSON")
}

/// The program as a tenant has it: no configuration, no store, and `folder` as its data folder.
fn tenant(folder: &Path, arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lightcone"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LIGHTCONE_")) {
        command.env_remove(name);
    }
    command.arg("receipt").args(arguments).arg("--data-dir").arg(folder).current_dir(folder);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program runs");
    // One that does not read its input has closed it.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    child.wait_with_output().expect("an output")
}

fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_signs_a_tenant_can_check_with_the_file_that_it_left() {
    let home = Home::new("");
    let mut node = home.start(&[]);
    let file = home.data_dir().join("receipt-key.pub");
    let key = ReceiptKey::read(&file).expect("a public key");
    assert_eq!(home.run(&["receipt", "key"]), json!({ "public_key": key.to_string(), "key_id": key.id() }));
    let url = EmbeddedServer::running(&home.data_dir()).expect("the node's store");
    let store = Store::connect(&url, Duration::from_secs(5)).await.expect("a store");
    let receipts = Receipts::open(&store, None).await.expect("a key");
    let receipt = receipts.sign(statement()).expect("a receipt");
    std::fs::write(home.data_dir().join("receipt.json"), text(&receipt)).expect("a file");
    node.signal(Signal::SIGTERM);
    assert_eq!(node.ended(), Some(0));
    // Without the node, and without starting anything.
    let (code, shown, errors) = told(&tenant(&home.data_dir(), &["verify", "receipt.json", "--output", "json"], ""));
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!((&shown["valid"], &shown["amount_nano_usd"]), (&json!(true), &json!(2900)));
    assert_eq!((&shown["request"], &shown["key_id"]), (&json!("chatcmpl-1"), &json!(key.id())));
    // The key outlives the node, also when its public half was lost.
    std::fs::remove_file(&file).expect("a file");
    let _node = home.start(&[]);
    assert_eq!(ReceiptKey::read(&file).expect("a public key"), key);
}

#[tokio::test]
async fn all_who_use_a_store_sign_with_one_key() {
    let house = House::with_balance(0).await;
    let receipts = [(); 8].map(|()| Receipts::open(&house.store, None));
    let receipts = futures::future::try_join_all(receipts).await.expect("keys");
    let key = receipts[0].public_key();
    assert!(receipts.iter().all(|receipts| receipts.public_key() == key));
    for receipts in receipts {
        assert_eq!(receipts.sign(statement()).expect("a receipt").verify(&key), Ok(()));
    }
    let mut raw = house.valkey.raw().await;
    let damage = lightcone::store::keys::RECEIPT_KEY;
    redis::cmd("SET").arg(damage).arg("secret").exec_async(&mut raw).await.expect("SET");
    let error = Receipts::open(&house.store, None).await.expect_err("damage").to_string();
    assert!(error.contains("damaged") && !error.contains("secret"), "{error}");
}

#[test]
fn the_program_believes_only_what_adds_up_and_says_why_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        std::process::Command::new("chmod").arg("600").arg(&path).status().expect("chmod");
        path
    };
    let receipts = Receipts::read(&write("key", &"07".repeat(32))).expect("a key");
    let other = Receipts::read(&write("other", &"08".repeat(32))).expect("a key").public_key().to_string();
    let key = receipts.public_key().to_string();
    write("key.pub", &format!("{key}\n"));
    let good = text(&receipts.sign(statement()).expect("a receipt"));
    let changed = good.replace("\"amount_nano_usd\": 2900", "\"amount_nano_usd\": 2901");
    assert_ne!(good, changed);
    for (input, key, code, why) in [
        (good.as_str(), key.as_str(), 0, ""),
        (&good, "key.pub", 0, ""),
        (&changed, &key, 1, "bad_signature"),
        (&good, &other, 1, "other_key"),
        (&good.replace("\"version\": 1", "\"version\": 2"), &key, 1, "unknown_version"),
        ("", &key, 1, "malformed"),
        (&format!("{good}{good}"), &key, 1, "malformed"),
        (&"x".repeat(100_000), &key, 1, "malformed"),
    ] {
        let asked = ["verify", "-", "--public-key", key, "--output", "json"];
        let (got, shown, errors) = told(&tenant(folder.path(), &asked, input));
        let shown: Value = serde_json::from_str(&shown).expect("JSON");
        assert_eq!((got, &shown["valid"]), (Some(code), &json!(code == 0)), "{shown} {errors}");
        assert_eq!(shown["code"].as_str().unwrap_or_default(), why);
        assert_eq!(errors.lines().count(), usize::from(code != 0), "{errors}");
    }
    let (code, shown, _) = told(&tenant(folder.path(), &["verify", "-", "--public-key", "key.pub"], &good));
    assert!(code == Some(0) && shown.starts_with("valid              true\n"), "{shown}");
    for (asked, expected) in [
        (vec!["verify", "-"], "name the operator's public key with --public-key"),
        (vec!["verify", "nowhere", "--public-key", &key], "nowhere: No such file"),
        (vec!["verify", "-", "--public-key", "nowhere"], "`nowhere` is no file, and that is no public key"),
        (vec!["verify", "-", "--public-key", "/dev/null"], "/dev/null does not hold a key"),
    ] {
        let (code, shown, errors) = told(&tenant(folder.path(), &asked, &good));
        assert_eq!((code, shown.as_str()), (Some(2), ""), "{errors}");
        assert!(errors.contains(expected) && errors.lines().count() == 1, "{errors}");
    }
}

#[test]
fn a_key_file_that_others_can_read_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("key"), "07".repeat(32)).expect("a file");
    std::fs::write(folder.path().join("c.toml"), "[ledger]\nreceipt_key_file = \"key\"").expect("a file");
    let chmod = |mode: &str| Command::new("chmod").arg(mode).arg(folder.path().join("key")).status().expect("chmod");
    chmod("640");
    let (code, shown, errors) = told(&tenant(folder.path(), &["key", "--config", "c.toml"], ""));
    assert_eq!((code, shown.as_str()), (Some(4), ""));
    assert!(errors.contains("key has mode 0640") && errors.lines().count() == 1, "{errors}");
    chmod("600");
    let (code, shown, _) = told(&tenant(folder.path(), &["key", "--config", "c.toml", "--output", "json"], ""));
    let public = "ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c";
    assert!(code == Some(0) && shown.contains(public), "{shown}");
}
