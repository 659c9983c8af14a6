//! Tenants and keys: what an operator does, and what a thief of the store would find.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use lightcone::{
    admission::{Admission, AuthError, KeyStatus, Scope, Scopes},
    domain::NanoUsd,
    ledger::Ledger,
    operator::{Accounts, OperatorError},
    store::{Store, StoreError, keys},
};

use crate::support::{
    house::{House, LEASE, at_once},
    valkey::Valkey,
};

fn accounts_on(store: &Store) -> Accounts {
    Accounts::new(store.clone(), Ledger::new(store.clone(), LEASE))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

const HUNDRED: NanoUsd = NanoUsd::new(100_000_000_000);

#[tokio::test]
async fn bootstrap_makes_a_tenant_and_two_private_key_files_once() {
    let valkey = Valkey::start();
    let store = valkey.store().await;
    let accounts = accounts_on(&store);
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("not/yet/there");
    let first = accounts.bootstrap(&data, HUNDRED).await.unwrap();
    assert!(first.created);
    let (dev, admin) = (first.dev_key.unwrap(), first.admin_key.unwrap());
    assert_eq!((mode(&dev), mode(&admin)), (0o600, 0o600));
    let secrets = [fs::read_to_string(&dev).unwrap(), fs::read_to_string(&admin).unwrap()];
    assert_ne!(secrets[0], secrets[1]);

    let admission = Admission::new(store, LEASE);
    let developer = admission.authenticate(secrets[0].trim()).await.unwrap();
    assert!(developer.may(Scope::Chat) && !developer.may(Scope::Admin));
    let operator = admission.authenticate(secrets[1].trim()).await.unwrap();
    assert!(operator.may(Scope::Admin) && !operator.may(Scope::Chat));
    assert_ne!(developer.tenant, operator.tenant);

    let again = accounts.bootstrap(&data, HUNDRED).await.unwrap();
    assert!(!again.created);
    assert_eq!((again.dev_key.as_ref(), again.admin_key.as_ref()), (Some(&dev), Some(&admin)));
    assert_eq!(secrets, [fs::read_to_string(&dev).unwrap(), fs::read_to_string(&admin).unwrap()]);
    assert_eq!(accounts.tenant(&developer.tenant).await.unwrap().money.balance, HUNDRED);
    assert_eq!(accounts.list_tenants().await.unwrap().len(), 2);
    assert_eq!(accounts.list_keys(None).await.unwrap().len(), 2);
    let elsewhere = accounts.bootstrap(&home.path().join("elsewhere"), HUNDRED).await.unwrap();
    assert_eq!((elsewhere.created, elsewhere.dev_key, elsewhere.admin_key), (false, None, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_bootstrap_at_the_same_time_make_one_tenant_and_one_grant() {
    let valkey = Valkey::start();
    let store = valkey.store().await;
    let home = tempfile::tempdir().unwrap();
    at_once(8, |index| {
        let (accounts, data) = (accounts_on(&store), home.path().join(index.to_string()));
        async move { accounts.bootstrap(&data, HUNDRED).await.unwrap() }
    })
    .await;
    let tenants = accounts_on(&store).list_tenants().await.unwrap();
    let mut balances: Vec<_> = tenants.iter().map(|tenant| tenant.money.balance).collect();
    balances.sort();
    assert_eq!(balances, [NanoUsd::ZERO, HUNDRED]);
    // Whoever was told that it made the tenants holds a key that works.
    let admission = Admission::new(store.clone(), LEASE);
    for entry in fs::read_dir(home.path()).unwrap() {
        let secret = fs::read_to_string(entry.unwrap().path().join("dev-key")).unwrap();
        admission.authenticate(secret.trim()).await.unwrap();
    }
    assert!(Ledger::new(store, LEASE).verify().await.unwrap().is_balanced());
}

#[tokio::test]
async fn an_interrupted_bootstrap_is_completed_by_the_next() {
    let valkey = Valkey::start();
    let store = valkey.store().await;
    let accounts = accounts_on(&store);
    let data = tempfile::tempdir().unwrap();
    accounts.bootstrap(data.path(), HUNDRED).await.unwrap();
    // As if it had been killed before its last step, with one file made and the other not.
    let mut raw = valkey.raw().await;
    redis::cmd("DEL").arg(keys::TENANTS).exec_async(&mut raw).await.unwrap();
    fs::remove_file(data.path().join("admin-key")).unwrap();
    let dev_key = fs::read_to_string(data.path().join("dev-key")).unwrap();
    let completed = accounts.bootstrap(data.path(), HUNDRED).await.unwrap();
    assert!(completed.created);
    assert_eq!(fs::read_to_string(data.path().join("dev-key")).unwrap(), dev_key);
    let developer = Admission::new(store.clone(), LEASE).authenticate(dev_key.trim()).await.unwrap();
    assert_eq!(accounts.tenant(&developer.tenant).await.unwrap().money.granted, HUNDRED);
    assert!(Ledger::new(store, LEASE).verify().await.unwrap().is_balanced());
}

#[tokio::test]
async fn a_developers_key_survives_the_loss_of_the_store() {
    let data = tempfile::tempdir().unwrap();
    let mut secrets = HashSet::new();
    for _ in 0..2 {
        let valkey = Valkey::start();
        let store = valkey.store().await;
        assert!(accounts_on(&store).bootstrap(data.path(), HUNDRED).await.unwrap().created);
        let secret = fs::read_to_string(data.path().join("dev-key")).unwrap();
        Admission::new(store, LEASE).authenticate(secret.trim()).await.unwrap();
        secrets.insert(secret);
    }
    assert_eq!(secrets.len(), 1);
}

#[tokio::test]
async fn bootstrap_names_the_file_that_is_in_its_way() {
    let valkey = Valkey::start();
    let accounts = accounts_on(&valkey.store().await);
    let data = tempfile::tempdir().unwrap();
    fs::write(data.path().join("admin-key"), "my shopping list\n").unwrap();
    let fault = accounts.bootstrap(data.path(), HUNDRED).await.unwrap_err();
    assert!(matches!(fault, OperatorError::KeyFileContent(_)) && fault.to_string().contains("admin-key"), "{fault}");
    assert_eq!(accounts.list_tenants().await.unwrap(), []);
    let file = data.path().join("a file");
    fs::write(&file, "").unwrap();
    let fault = accounts.bootstrap(&file, HUNDRED).await.unwrap_err();
    assert!(matches!(fault, OperatorError::KeyFile { .. }) && fault.to_string().contains("a file"), "{fault}");
}

#[tokio::test]
async fn tenants_and_keys_are_made_listed_and_serialised_without_secrets() {
    let house = House::with_balance(5).await;
    let scopes: Scopes = "chat,read".parse().unwrap();
    let new = house.accounts.create_key(&house.tenant, "laptop", scopes).await.unwrap();
    assert!(new.secret.starts_with("sk_") && new.secret.len() == 3 + 64);
    assert!(!format!("{new:?}").contains(&new.secret));
    let listed = house.accounts.list_keys(Some(&house.tenant)).await.unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[1], new.record);
    let json = serde_json::to_value(&listed).unwrap();
    assert_eq!(json[1]["label"], "laptop");
    assert_eq!(json[1]["scopes"], serde_json::json!(["chat", "read"]));
    assert_eq!(json[1]["status"], "active");
    assert_eq!(json[1]["prefix"], new.secret[..11]);
    assert!(!json.to_string().contains(&new.secret));
    let tenants = serde_json::to_value(house.accounts.list_tenants().await.unwrap()).unwrap();
    assert_eq!((&tenants[0]["name"], &tenants[0]["balance_nano_usd"]), (&"first".into(), &5.into()));
    assert_eq!(tenants[0]["held_nano_usd"], 0);

    let nobody = "ten_nobody".into();
    let unknown = house.accounts.create_key(&nobody, "x", scopes).await;
    assert!(matches!(unknown, Err(OperatorError::UnknownTenant(_))));
    assert!(matches!(house.accounts.list_keys(Some(&nobody)).await, Err(OperatorError::UnknownTenant(_))));
    assert!(matches!(house.accounts.revoke_key(&"key_x".into()).await, Err(OperatorError::UnknownKey(_))));
    assert!(matches!(house.accounts.create_tenant(" ", HUNDRED).await, Err(OperatorError::BadText("name"))));
    let debt = house.accounts.create_tenant("debtor", NanoUsd::new(-1)).await;
    assert!(matches!(debt, Err(OperatorError::BadBalance(_))));
    assert_eq!(house.accounts.list_tenants().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_revoked_key_is_refused_by_every_edge_within_a_second() {
    let house = House::with_balance(5).await;
    let edges = [
        house.admission.clone(),
        Admission::new(house.valkey.store().await, LEASE),
        Admission::new(house.valkey.store().await, LEASE),
    ];
    for edge in &edges {
        edge.authenticate(&house.secret).await.unwrap();
    }
    let record = house.accounts.revoke_key(&house.principal.key).await.unwrap();
    let revoked = Instant::now();
    assert_eq!(record.status, KeyStatus::Revoked);
    for edge in &edges {
        while edge.authenticate(&house.secret).await.is_ok() {
            assert!(revoked.elapsed() < Duration::from_secs(1));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let refusal = edge.authenticate(&house.secret).await;
        assert!(matches!(refusal, Err(AuthError::Revoked(key)) if key == house.principal.key));
    }
    // To revoke it again keeps the first time.
    let again = house.accounts.revoke_key(&house.principal.key).await.unwrap();
    assert_eq!(again.revoked_unix_ms, record.revoked_unix_ms);
}

#[tokio::test]
async fn unknown_and_impossible_keys_are_refused() {
    let house = House::with_balance(5).await;
    let almost = format!("{}0", &house.secret[..house.secret.len() - 1]);
    let longer = format!("{}0", house.secret);
    for wrong in ["", "sk_", "sk_0", "Bearer x", &longer, &house.secret[3..], &house.secret.to_uppercase()] {
        assert!(matches!(house.admission.authenticate(wrong).await, Err(AuthError::Unknown)), "{wrong}");
    }
    if almost != house.secret {
        assert!(matches!(house.admission.authenticate(&almost).await, Err(AuthError::Unknown)));
    }
}

#[tokio::test]
async fn no_secret_is_ever_written_to_the_store() {
    let house = House::with_balance(5).await;
    house.valkey.store().await.ping().await.unwrap();
    assert!(!house.valkey.has_written(&house.secret[11..]));
    assert!(house.valkey.has_written(house.principal.key.as_str()), "the append-only file was searched");
}

#[tokio::test]
async fn data_of_another_layout_are_refused_by_name_and_left_as_they_are() {
    let house = House::with_balance(1_000).await;
    let mut raw = house.valkey.raw().await;
    let mark = async |raw: &mut redis::aio::MultiplexedConnection| {
        let mark: Option<String> = redis::cmd("GET").arg(keys::LAYOUT).query_async(raw).await.unwrap();
        mark
    };
    let here = mark(&mut raw).await.expect("a store is marked by the first who uses it");
    let url = house.valkey.url();
    let connect = || Store::connect(&url, Duration::from_secs(5));
    connect().await.expect("our own");

    redis::cmd("SET").arg(keys::LAYOUT).arg("97").exec_async(&mut raw).await.unwrap();
    let refused = connect().await.err().expect("a later version's");
    assert!(matches!(&refused, StoreError::Layout { found, .. } if found == "97"), "{refused}");
    assert!(!refused.is_transient());

    // Before there was a mark, accounts lacked a field without which nothing is ever admitted.
    redis::cmd("DEL").arg(keys::LAYOUT).exec_async(&mut raw).await.unwrap();
    connect().await.expect("our own, marked again");
    assert_eq!(mark(&mut raw).await.as_ref(), Some(&here));
    redis::cmd("DEL").arg(keys::LAYOUT).exec_async(&mut raw).await.unwrap();
    redis::cmd("HDEL").arg(keys::account(&house.tenant)).arg("available").exec_async(&mut raw).await.unwrap();
    let refused = connect().await.err().expect("an earlier version's");
    assert!(matches!(&refused, StoreError::Layout { found, .. } if found == "1"), "{refused}");
    assert_eq!(mark(&mut raw).await, None);
}
