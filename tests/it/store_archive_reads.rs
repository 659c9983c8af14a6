//! What is asked about months that are not in the store any more.

use lightcone::{
    domain::{Month, RequestId},
    ledger::{Generation, GenerationState, Ledger, LedgerError, StatementError},
    store::keys,
};

use crate::support::{
    house::{House, settlement},
    old::Old,
};

async fn generation(ledger: &Ledger, house: &House, request: &RequestId) -> Generation {
    ledger.generation(&house.tenant, request).await.unwrap().expect("a generation")
}

#[tokio::test]
async fn statements_are_the_same_out_of_files_and_never_empty_without_them() {
    let old = Old::furnished(3).await;
    let (ledger, month) = (&old.house.ledger, old.month().await);
    let before = old.statements(ledger).await;
    assert!(before.len() >= 3 && before[0].totals.requests == 4, "{before:#?}");
    assert_eq!(old.archive(month).await.faults, [] as [&str; 0]);
    let reader = ledger.clone().with_archive(old.folder.path().to_owned());
    assert_eq!(old.statements(&reader).await, before);
    for statement in &before {
        let refused = ledger.statement(&old.house.tenant, statement.month).await;
        assert!(matches!(refused, Err(StatementError::Archived(of)) if of == statement.month), "{refused:?}");
    }
}

#[tokio::test]
async fn requests_are_the_same_out_of_files() {
    let old = Old::furnished(1).await;
    let (house, month) = (&old.house, old.month().await);
    // By the day of the month it is charged late, or was given up for good.
    let _ = house.ledger.settle(&settlement(&old.expired, 3)).await;
    let asked = [old.charged.clone(), old.released.clone(), old.expired.request().clone()];
    let mut before = Vec::new();
    for request in &asked {
        before.push(generation(&house.ledger, house, request).await);
    }
    assert!(matches!(&before[0].state, GenerationState::Charged { refunded, .. } if refunded.nano() == 100));
    assert!(matches!(&before[1].state, GenerationState::Released { .. }));
    let reader = house.ledger.clone().with_archive(old.folder.path().to_owned());
    // Its charge in a file and its refund still in the store; then all in files.
    for until in [Month::of(Month::of(old.entries[0].unix_ms).ends_unix_ms()), month] {
        assert_eq!(old.archive(until).await.faults, [] as [&str; 0]);
        let charged = generation(&reader, house, &old.charged).await;
        assert_eq!(charged, before[0], "before {until}");
        let elsewhere = house.ledger.generation(&house.tenant, &old.charged).await;
        assert!(matches!(&elsewhere, Err(LedgerError::Archived(of)) if *of == old.charged), "{elsewhere:?}");
    }
    for (request, before) in asked.iter().zip(&before) {
        assert_eq!(generation(&reader, house, request).await, *before);
    }
    let still_open = generation(&reader, house, old.open.request()).await;
    assert!(matches!(still_open.state, GenerationState::Running { .. }), "{still_open:?}");
}

#[tokio::test]
async fn what_was_never_asked_is_in_no_archive() {
    let old = Old::furnished(0).await;
    let house = &old.house;
    old.archive(old.month().await).await;
    let reader = house.ledger.clone().with_archive(old.folder.path().to_owned());
    // As if it had been asked long ago, by somebody else.
    let stranger = RequestId::from(format!("{}{}", &old.charged.as_str()[..22], "f".repeat(19)));
    assert_eq!(stranger.as_str().len(), old.charged.as_str().len());
    assert_eq!(reader.generation(&house.tenant, &stranger).await.unwrap(), None);
    // Nobody can say so who does not have the files.
    let unknown = house.ledger.generation(&house.tenant, &stranger).await;
    assert!(matches!(unknown, Err(LedgerError::Archived(_))), "{unknown:?}");
    for request in [RequestId::generate(), "chatcmpl-1".into(), "grant invoice 7".into()] {
        assert_eq!(house.ledger.generation(&house.tenant, &request).await.unwrap(), None, "{request}");
    }
}

#[tokio::test]
async fn a_damaged_file_is_named_and_nothing_is_answered_out_of_it() {
    let old = Old::furnished(2).await;
    let house = &old.house;
    old.archive(old.month().await).await;
    let reader = house.ledger.clone().with_archive(old.folder.path().to_owned());
    let month = Month::of(old.entries[0].unix_ms);
    for name in [format!("{month}.jsonl.gz"), "manifest.json".to_owned()] {
        let path = old.tenant_folder().join(&name);
        let whole = std::fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 4;
        std::fs::write(&path, flipped).unwrap();
        let statement = reader.statement(&house.tenant, month).await.unwrap_err();
        assert!(
            matches!(statement, StatementError::Archive(_)) && statement.to_string().contains(&name),
            "{statement}"
        );
        let request = reader.generation(&house.tenant, &old.charged).await.unwrap_err();
        assert!(matches!(request, LedgerError::Archive(_)) && request.to_string().contains(&name), "{request}");
        std::fs::write(&path, whole).unwrap();
    }
    old.statements(&reader).await;
}

/// Somebody who makes a whole archive anew cannot change what the store has of its end.
#[tokio::test]
async fn files_that_are_not_those_for_which_the_store_was_trimmed_are_not_believed() {
    let old = Old::furnished(0).await;
    let house = &old.house;
    old.archive(old.month().await).await;
    let reader = house.ledger.clone().with_archive(old.folder.path().to_owned());
    old.statements(&reader).await;
    let (key, mut raw) = (keys::checkpoint(&house.tenant), house.valkey.raw().await);
    let text: String = redis::cmd("GET").arg(&key).query_async(&mut raw).await.unwrap();
    let mut checkpoint: serde_json::Value = serde_json::from_str(&text).unwrap();
    checkpoint["volume_sha256"] = "0".repeat(64).into();
    redis::cmd("SET").arg(&key).arg(checkpoint.to_string()).exec_async(&mut raw).await.unwrap();
    let error = reader.statement(&house.tenant, Month::of(old.entries[0].unix_ms)).await.unwrap_err();
    assert!(error.to_string().contains("is not of the archive for which the store was trimmed"), "{error}");
    let error = reader.generation(&house.tenant, &old.charged).await.unwrap_err();
    assert!(matches!(error, LedgerError::Archive(_)), "{error}");
}
