use std::{fs, path::Path};

use super::{
    check::examine,
    volume::{Manifest, Writer},
};
use crate::{
    domain::{Month, NanoUsd, Price, TenantId, Usage},
    ledger::{
        audit::Audit,
        books::{Books, Checkpoint},
        entry::{Entry, EntryKind, NO_LINK},
    },
};

const DAY_MS: u64 = 86_400_000;

fn blank(seq: u64, kind: EntryKind, unix_ms: u64) -> Entry {
    Entry {
        seq,
        kind,
        request: String::new(),
        reference: String::new(),
        tenant: tenant(),
        key: "".into(),
        model: "".into(),
        usage: Usage::default(),
        price: Price::flat(NanoUsd::ZERO, NanoUsd::ZERO),
        price_version: String::new(),
        amount: NanoUsd::ZERO,
        hold: NanoUsd::ZERO,
        balance: NanoUsd::ZERO,
        held: NanoUsd::ZERO,
        note: String::new(),
        digest: String::new(),
        unix_ms,
        link: NO_LINK.to_owned(),
    }
}

fn tenant() -> TenantId {
    "ten_1".into()
}

/// A grant; a request that is charged in the month after it was admitted.
fn ledger() -> Vec<Entry> {
    let price = Price::flat(NanoUsd::new(2), NanoUsd::new(3));
    let nano = NanoUsd::new;
    let (january, february) = (20 * DAY_MS, 40 * DAY_MS);
    let of_request = |seq, kind, unix_ms, completion_tokens| Entry {
        request: "chatcmpl-1".to_owned(),
        key: "key_1".into(),
        model: "m".into(),
        usage: Usage { prompt_tokens: 10, completion_tokens, cached_tokens: 0 },
        price,
        price_version: "1".to_owned(),
        ..blank(seq, kind, unix_ms)
    };
    let grant = Entry {
        reference: "a".to_owned(),
        amount: nano(1000),
        balance: nano(1000),
        ..blank(1, EntryKind::Grant, january)
    };
    let hold =
        Entry { amount: nano(50), balance: nano(950), held: nano(50), ..of_request(2, EntryKind::Hold, january, 10) };
    let post =
        Entry { amount: nano(29), hold: nano(50), balance: nano(971), ..of_request(3, EntryKind::Post, february, 3) };
    let mut link = NO_LINK.to_owned();
    let mut entries = vec![grant, hold, post];
    for entry in &mut entries {
        link = entry.link_after(&link);
        entry.link.clone_from(&link);
    }
    entries
}

/// Two months of it; answers what the store has of the end.
fn write(folder: &Path) -> Checkpoint {
    let mut manifest = Manifest::load(folder, &tenant()).unwrap();
    for entries in ledger().chunk_by(|a, b| Month::of(a.unix_ms) == Month::of(b.unix_ms)) {
        let (before, month) = (manifest.books(), Month::of(entries[0].unix_ms));
        let mut audit = Audit::after(before.clone());
        entries.iter().for_each(|entry| audit.take(entry));
        assert_eq!(audit.faults(), [] as [&str; 0]);
        let mut writer = Writer::create(folder, manifest.name_for(month, entries[0].seq)).unwrap();
        writer.add(entries).unwrap();
        let volume = writer.finish(month, &before, audit.books(), manifest.last_sha256().to_owned()).unwrap();
        volume.read_back(folder, before).unwrap();
        manifest.push(volume);
    }
    manifest.save(folder).unwrap();
    Checkpoint { books: manifest.books(), volume_sha256: manifest.last_sha256().to_owned() }
}

fn files(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn entries_come_back_as_they_were_written() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("ten_1"));
    assert_eq!(files(&folder.path().join("ten_1")), ["1970-01.jsonl.gz", "1970-02.jsonl.gz", "manifest.json"]);
    let read = |month: &str| -> Vec<Entry> {
        super::read(folder.path(), &tenant(), month.parse().unwrap()).unwrap().map(Result::unwrap).collect()
    };
    let all = ledger();
    assert_eq!((read("1970-01"), read("1970-02"), read("1970-03")), (all[..2].to_vec(), all[2..].to_vec(), Vec::new()));
}

#[test]
fn every_single_flipped_bit_is_a_fault_that_names_its_file() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("ten_1");
    let checkpoint = write(&folder);
    let faults = || examine(root.path(), &tenant(), Some(&checkpoint)).faults;
    assert_eq!(faults(), [] as [&str; 0]);
    let mut flips = 0;
    for name in files(&folder) {
        let path = folder.join(&name);
        let whole = fs::read(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &flipped).unwrap();
            let found = faults();
            assert!(found.iter().any(|fault| fault.contains(&name)), "bit {bit} of {name}: {found:?}");
            flips += 1;
        }
        fs::write(&path, &whole).unwrap();
    }
    assert_eq!(faults(), [] as [&str; 0]);
    assert!(flips > 10_000, "{flips}");
}

#[test]
fn what_is_missing_cut_off_or_longer_is_a_fault() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("ten_1");
    let checkpoint = write(&folder);
    for name in files(&folder) {
        let path = folder.join(&name);
        let whole = fs::read(&path).unwrap();
        let longer = [whole.as_slice(), b"\n"].concat();
        for content in [None, Some(&whole[..whole.len() / 2]), Some(&[][..]), Some(&longer)] {
            match content {
                Some(content) => fs::write(&path, content).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            let found = examine(root.path(), &tenant(), Some(&checkpoint));
            assert!(found.faults.iter().any(|fault| fault.contains(&name)), "{name}: {:?}", found.faults);
            assert!(found.audit.is_none());
        }
        fs::write(&path, &whole).unwrap();
    }
}

/// Somebody who rewrites files and manifest alike is found out by what the store has of them.
#[test]
fn an_archive_that_is_sound_but_another_one_is_a_fault() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = write(&root.path().join("ten_1"));
    let of_books = |change: fn(&mut Books)| {
        let mut checkpoint = checkpoint.clone();
        change(&mut checkpoint.books);
        checkpoint
    };
    let others = [
        of_books(|books| books.charged += 1),
        of_books(|books| books.references += 1),
        Checkpoint { volume_sha256: "0".repeat(64), ..checkpoint.clone() },
    ];
    for other in others {
        assert!(!examine(root.path(), &tenant(), Some(&other)).faults.is_empty());
    }
    // Of the first file half is still in the store.
    let mut audit = Audit::of(tenant());
    audit.take(&ledger()[0]);
    let manifest = Manifest::load(&root.path().join("ten_1"), &tenant()).unwrap();
    let half = Checkpoint { books: audit.books(), volume_sha256: manifest.volumes[0].sha256() };
    let examined = examine(root.path(), &tenant(), Some(&half));
    assert_eq!(examined.faults, [] as [&str; 0]);
    assert_eq!(examined.audit.expect("an audit").seq(), 1);
}
