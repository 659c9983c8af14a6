//! Old months leave the store for files, and everything still adds up, whatever interrupts it.

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Command,
};

use lightcone::{
    domain::{Month, NanoUsd},
    ledger::{ArchiveError, LedgerError, read_archive},
    store::keys,
};

use crate::support::{
    aging::{age, rewrite, set},
    house::settlement,
    old::{Old, refund},
};

#[tokio::test]
async fn months_that_are_over_leave_the_store_and_come_back_from_their_files() {
    let old = Old::furnished(3).await;
    let (house, month) = (&old.house, old.month().await);
    let before = house.balance().await;
    let archived = old.archive(month).await;
    assert_eq!(archived.faults, [] as [&str; 0]);
    let old_entries = old.old(month);
    assert_eq!((archived.entries, archived.taken_out), (old_entries.len() as u64, old_entries.len() as u64));
    assert_eq!(archived.files, old.files().len() - 1);
    assert!(archived.files >= 3, "{archived:?}");
    // Entry by entry, link by link.
    let mut read = Vec::new();
    for back in (0..5).rev() {
        let entries = read_archive(old.folder.path(), &house.tenant, month.before(back)).unwrap();
        read.extend(entries.map(Result::unwrap));
    }
    assert_eq!(read, old_entries);
    let live = house.ledger.entries(&house.tenant, 0, 1000).await.unwrap();
    assert_eq!(live, old.entries[old_entries.len()..]);
    assert_eq!(house.balance().await, before);
    old.assert_balanced().await;
    // A second time there is nothing to do.
    let again = old.archive(month).await;
    assert_eq!((again.files, again.taken_out, again.faults.len()), (0, 0, 0));
    old.assert_balanced().await;
}

#[tokio::test]
async fn what_was_archived_is_over_and_what_was_open_goes_on() {
    let old = Old::furnished(0).await;
    let (house, month) = (&old.house, old.month().await);
    assert_eq!(old.archive(month).await.faults, [] as [&str; 0]);
    let ledger = &house.ledger;
    // A hold from before the border is charged at its terms.
    let settled = ledger.settle(&settlement(&old.open, 3)).await.unwrap();
    assert_eq!((settled.repeated, settled.late), (false, false));
    let refused = ledger.refund(&house.tenant, &refund(&old.charged, 1, "late")).await.unwrap_err();
    assert!(matches!(refused, LedgerError::NotCharged(_)), "{refused}");
    assert!(refused.to_string().contains("archived"), "{refused}");
    // References are for ever.
    let again = ledger.grant(&house.tenant, NanoUsd::new(500), "invoice 7", "wire").await.unwrap();
    assert!(again.repeated);
    let other = ledger.grant(&house.tenant, NanoUsd::new(501), "invoice 7", "wire").await;
    assert!(matches!(other, Err(LedgerError::OtherReference(_))));
    let again = ledger.refund(&house.tenant, &refund(&old.charged, 100, "sorry")).await.unwrap();
    assert!(again.repeated);
    // Also for whoever says that it began the request: it was forgotten on purpose.
    for answer in
        [ledger.settle(&settlement(&old.expired, 1)).await, ledger.settle_begun(&settlement(&old.expired, 1)).await]
    {
        assert!(matches!(answer, Err(LedgerError::Unknown(_) | LedgerError::HoldGone(_))), "{answer:?}");
    }
    old.assert_balanced().await;
}

#[tokio::test]
async fn a_charge_and_a_refund_that_came_across_the_border_before_it_was_archived_are_no_faults() {
    let old = Old::furnished(0).await;
    let (house, month) = (&old.house, old.month().await);
    // Too long ago, or late: by the day of the month.
    let late = house.ledger.settle(&settlement(&old.expired, 3)).await;
    assert!(
        late.as_ref().is_ok_and(|settled| settled.late) || matches!(late, Err(LedgerError::HoldGone(_))),
        "{late:?}"
    );
    house.ledger.refund(&house.tenant, &refund(&old.charged, 50, "again")).await.unwrap();
    house.assert_balanced().await;
    for before in [month.before(2), month.before(1), month] {
        assert_eq!(old.archive(before).await.faults, [] as [&str; 0]);
        old.assert_balanced().await;
    }
    assert!(!old.old(month).is_empty());
}

#[tokio::test]
async fn an_archive_that_is_interrupted_anywhere_is_gone_on_with() {
    // More than one call takes out at a time.
    let old = Old::furnished(300).await;
    let (house, month) = (&old.house, old.month().await);
    let statements = old.statements(&house.ledger).await;
    let reader = house.ledger.clone().with_archive(old.folder.path().to_owned());
    for point in [
        "ledger.volume.begun",
        "ledger.volume.written",
        "ledger.manifest.written",
        "ledger.volume.written:2",
        "ledger.trim.asked",
        "ledger.trim.answered",
        "ledger.trim.asked:2",
        "ledger.trim.answered",
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lightcone"));
        command.args([
            "ledger",
            "archive",
            "--before",
            &month.to_string(),
            "--redis-url",
            &house.valkey.url(),
            "--dir",
        ]);
        let killed = command.arg(old.folder.path()).env("LIGHTCONE_FAULT", point).output().unwrap();
        assert_eq!(killed.status.signal(), Some(9), "{point}: {killed:?}");
        old.assert_balanced().await;
        // Life goes on in between.
        house.ledger.settle(&settlement(&house.admit(5, 5).await.unwrap(), 2)).await.unwrap();
        old.assert_balanced().await;
        assert_eq!(old.statements(&reader).await, statements, "{point}");
    }
    let archived = old.archive(month).await;
    assert_eq!(archived.faults, [] as [&str; 0]);
    assert!(archived.taken_out > 0 && archived.taken_out < old.old(month).len() as u64, "{archived:?}");
    let first = house.ledger.entries(&house.tenant, 0, 1).await.unwrap().remove(0);
    assert_eq!(first.seq, old.old(month).len() as u64 + 1);
    old.assert_balanced().await;
    let parts: Vec<_> = std::fs::read_dir(old.tenant_folder()).unwrap().flatten().collect();
    assert!(!parts.iter().any(|file| file.file_name().to_string_lossy().ends_with(".part")), "{parts:?}");
}

#[tokio::test]
async fn a_damaged_archive_is_named_file_by_file() {
    let old = Old::furnished(2).await;
    let month = old.month().await;
    old.archive(month).await;
    for path in old.files() {
        let (whole, name) = (std::fs::read(&path).unwrap(), path.file_name().unwrap().to_string_lossy().into_owned());
        let find = async |what: &str| {
            let report = old.report().await;
            let named = report.faults.iter().any(|fault| fault.contains(&name));
            assert!(!report.is_balanced() && named, "{name} {what}: {report:#?}");
            // Without the files it is not looked at.
            old.house.assert_balanced().await;
        };
        for part in 1..12 {
            let mut flipped = whole.clone();
            flipped[(whole.len() - 1) * part / 12] ^= 1 << (part % 8);
            std::fs::write(&path, flipped).unwrap();
            find("flipped").await;
        }
        std::fs::remove_file(&path).unwrap();
        find("missing").await;
        std::fs::write(&path, &whole).unwrap();
    }
    // One in the place of another.
    let mut months: Vec<PathBuf> = old.files().into_iter().filter(|path| !path.ends_with("manifest.json")).collect();
    months.sort();
    let [first, second] = [&months[0], &months[1]].map(|path| std::fs::read(path).unwrap());
    std::fs::write(&months[0], &second).unwrap();
    std::fs::write(&months[1], &first).unwrap();
    let report = old.report().await;
    for month in &months[..2] {
        let name = month.file_name().unwrap().to_string_lossy().into_owned();
        assert!(report.faults.iter().any(|fault| fault.contains(&name) && fault.contains("SHA-256")), "{report:#?}");
    }
    std::fs::write(&months[0], &first).unwrap();
    std::fs::write(&months[1], &second).unwrap();
    old.assert_balanced().await;
    let empty = tempfile::tempdir().unwrap();
    let report = old.house.ledger.verify_with(empty.path()).await.unwrap();
    assert!(report.faults.iter().any(|fault| fault.contains("is missing")), "{report:#?}");
    // Another folder must not begin where this one ended.
    let elsewhere = old.house.ledger.archive(empty.path(), month).await.unwrap();
    assert!(elsewhere.faults[0].contains("use the archive that has them"), "{elsewhere:?}");
}

#[tokio::test]
async fn the_end_of_an_archive_cannot_be_changed_in_the_store() {
    let old = Old::furnished(0).await;
    old.archive(old.month().await).await;
    let key = keys::checkpoint(&old.house.tenant);
    let mut raw = old.house.valkey.raw().await;
    let text: String = redis::cmd("GET").arg(&key).query_async(&mut raw).await.unwrap();
    for (from, to) in
        [("\"balance\":", "\"balance\":1"), ("\"references\":", "\"references\":1"), ("\"link\":\"", "\"link\":\"x")]
    {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text);
        redis::cmd("SET").arg(&key).arg(changed).exec_async(&mut raw).await.unwrap();
        assert!(!old.report().await.is_balanced(), "{from}");
        assert!(!old.house.ledger.verify().await.unwrap().is_balanced(), "{from}");
    }
    redis::cmd("DEL").arg(&key).exec_async(&mut raw).await.unwrap();
    let report = old.house.ledger.verify().await.unwrap();
    assert!(report.faults[0].contains("checkpoint"), "{report:#?}");
    redis::cmd("SET").arg(&key).arg(&text).exec_async(&mut raw).await.unwrap();
    old.assert_balanced().await;
}

#[tokio::test]
async fn a_ledger_that_does_not_add_up_is_not_archived_and_does_not_keep_the_others() {
    let old = Old::furnished(0).await;
    let (house, month) = (&old.house, old.month().await);
    let other = house.another(1_000).await;
    age(house, &other.tenant, 40).await;
    rewrite(house, &house.tenant, |entries| set(&mut entries[0].1, "amount", "2000000000")).await;
    let archived = old.archive(month).await;
    assert_eq!((archived.tenants, archived.entries, archived.faults.len()), (2, 1, 1), "{archived:?}");
    assert!(archived.faults[0].contains("does not add up"), "{archived:?}");
    assert!(!Path::new(&old.tenant_folder()).join("manifest.json").exists());
    assert_eq!(house.ledger.entries(&house.tenant, 0, 1).await.unwrap()[0].seq, 1);
}

#[tokio::test]
async fn only_months_that_are_over_are_archived_and_by_one_at_a_time() {
    let old = Old::furnished(0).await;
    let month = old.month().await;
    let next = Month::of(month.ends_unix_ms());
    let refused = old.house.ledger.archive(old.folder.path(), next).await;
    assert!(matches!(refused, Err(ArchiveError::NotOver(_))), "{refused:?}");
    let (one, other) = tokio::join!(
        old.house.ledger.archive(old.folder.path(), month),
        old.house.ledger.archive(old.folder.path(), month)
    );
    let busy = [one, other].into_iter().filter(|run| matches!(run, Err(ArchiveError::Busy(_)))).count();
    assert!(busy <= 1);
    old.archive(month).await;
    old.assert_balanced().await;
}
