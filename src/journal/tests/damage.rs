//! Files that are torn, damaged or of another version.

use std::fs;

use tempfile::tempdir;

use super::{
    super::{
        book::Book,
        frame::{HEADER_BYTES, Reading, Record, header, push, read},
        *,
    },
    Op, begun, file, model, name, only, open, sample, write_all,
};

/// The file that the operations make, and where each frame of it begins. Every operation is one frame.
async fn written(ops: &[Op]) -> (Vec<u8>, Vec<usize>) {
    let folder = tempdir().unwrap();
    let journal = open(folder.path());
    let (mut begins, path) = (Vec::new(), file(folder.path()));
    for op in ops {
        begins.push(fs::metadata(&path).unwrap().len() as usize);
        op.write(&journal).await.unwrap();
    }
    (fs::read(&path).unwrap(), begins)
}

fn records(bytes: &[u8]) -> (Vec<Record>, Reading) {
    let mut records = Vec::new();
    let reading = read(bytes, |record| records.push(record));
    (records, reading)
}

fn unfinished(bytes: &[u8]) -> (Vec<Unsettled>, Reading) {
    let mut book = Book::default();
    let reading = read(bytes, |record| book.apply(record));
    (book.unfinished(), reading)
}

#[tokio::test]
async fn a_file_cut_off_anywhere_says_what_was_written_before() {
    let ops = sample();
    let (bytes, begins) = written(&ops).await;
    for cut in 0..=bytes.len() {
        let whole = begins.iter().chain([&bytes.len()]).skip(1).filter(|end| **end <= cut).count();
        let expected = if cut < HEADER_BYTES { 0 } else { begins.get(whole).copied().unwrap_or(bytes.len()) };
        let (left, reading) = unfinished(&bytes[..cut]);
        assert_eq!(reading, Reading::Sound { whole_bytes: expected }, "cut at {cut}");
        assert_eq!(left, model(&ops[..whole]), "cut at {cut}");
    }
}

/// The size of a file may reach the disk before its content.
#[tokio::test]
async fn a_tail_of_zeros_was_never_written() {
    let ops = sample();
    let (mut bytes, begins) = written(&ops).await;
    let (last, end) = (begins[ops.len() - 1], bytes.len());
    for zeros in [1, 7, 8, 9, 4096] {
        let padded = [&bytes[..], &vec![0; zeros]].concat();
        assert_eq!(unfinished(&padded), (model(&ops), Reading::Sound { whole_bytes: end }));
    }
    for at in (last..end).rev() {
        bytes[at] = 0;
        let (left, reading) = unfinished(&bytes);
        // The frame may end in a zero.
        if reading != (Reading::Sound { whole_bytes: end }) {
            assert_eq!(reading, Reading::Sound { whole_bytes: last }, "zero from {at}");
            assert_eq!(left, model(&ops[..ops.len() - 1]));
        }
    }
    assert_eq!(unfinished(&[0; 5000]), (Vec::new(), Reading::Sound { whole_bytes: 0 }));
}

#[tokio::test]
async fn a_torn_tail_is_cut_off_and_the_file_is_written_on() {
    let ops = sample();
    let (bytes, begins) = written(&ops).await;
    let last = begins[ops.len() - 1];
    for cut in last..bytes.len() {
        let folder = tempdir().unwrap();
        fs::write(file(folder.path()), &bytes[..cut]).unwrap();
        let mut orphan = only(Journal::take_over(folder.path()).unwrap());
        assert!(orphan.fault().is_none());
        assert_eq!(orphan.unfinished(), model(&ops[..ops.len() - 1]));
        orphan.closed(&name(0)).unwrap();
        drop(orphan);
        let expected = model(&[&ops[..ops.len() - 1], &[Op::Close(0)]].concat());
        assert_eq!(only(Journal::take_over(folder.path()).unwrap()).unfinished(), expected, "cut at {cut}");
    }
}

#[tokio::test]
async fn one_wrong_bit_is_a_named_fault_and_never_a_wrong_record() {
    let ops = sample();
    let (bytes, begins) = written(&ops).await;
    let (all, _) = records(&bytes);
    let last = begins[ops.len() - 1];
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << bit;
            let (read, reading) = records(&bytes);
            // The frame that has the bit is lost, and no other.
            let lost = begins.iter().rposition(|begin| *begin <= at);
            let expected = all.iter().enumerate().filter(|(index, _)| Some(*index) != lost);
            assert!(read.iter().eq(expected.map(|(_, record)| record)), "bit {bit} of byte {at}");
            match reading {
                Reading::Damaged { offset, .. } => assert_eq!(offset, lost.map_or(0, |index| begins[index])),
                Reading::Sound { whole_bytes } => assert!(at >= last && whole_bytes == last, "bit {bit} of byte {at}"),
                Reading::UnknownVersion(_) => panic!("bit {bit} of byte {at} is not a version"),
            }
        }
    }
}

#[tokio::test]
async fn a_damaged_file_says_what_can_be_read_and_is_kept() {
    let (ops, folder) = (sample(), tempdir().unwrap());
    let path = file(folder.path());
    let (mut bytes, begins) = written(&ops).await;
    // The second request, which is closed later, is lost.
    bytes[begins[1] + 20] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let take = || only(Journal::take_over(folder.path()).unwrap());
    let mut orphan = take();
    let fault = orphan.fault().unwrap().to_string();
    let expected =
        format!("{} is damaged at byte {}: the checksum of a frame does not match", path.display(), begins[1]);
    assert_eq!(fault, expected);
    assert_eq!(orphan.unfinished(), model(&ops));
    orphan.closed(&name(0)).unwrap();
    drop(orphan);
    let mut orphan = take();
    assert!(orphan.fault().is_some());
    assert_eq!(orphan.unfinished().len(), 1);
    orphan.closed(&name(2)).unwrap();
    orphan.remove().unwrap();
    assert!(Journal::take_over(folder.path()).unwrap().is_empty());
    assert!(fs::read(folder.path().join("node_1.journal.damaged")).unwrap().starts_with(&bytes));
}

#[tokio::test]
async fn a_damaged_tail_does_not_hide_what_a_recovery_adds() {
    let (ops, folder) = (sample(), tempdir().unwrap());
    let (mut bytes, begins) = written(&ops).await;
    bytes[begins[1] + 20] ^= 1;
    // And torn, in a frame that says how long it would have been.
    bytes.truncate(begins[6] + 10);
    fs::write(file(folder.path()), &bytes).unwrap();
    let mut orphan = only(Journal::take_over(folder.path()).unwrap());
    orphan.closed(&name(0)).unwrap();
    drop(orphan);
    let left = only(Journal::take_over(folder.path()).unwrap()).unfinished();
    assert_eq!(left.iter().map(|open| open.begun.request.clone()).collect::<Vec<_>>(), [name(2)]);
}

#[test]
fn frames_that_cannot_be_are_named() {
    let mut absurd = header().to_vec();
    push(&mut absurd, &Record::Begun { index: 0, begun: begun("chatcmpl-0", 1) }).unwrap();
    let end = absurd.len();
    absurd.extend(u32::MAX.to_le_bytes());
    let (records_read, reading) = records(&absurd);
    assert_eq!(records_read.len(), 1);
    // Fewer bytes than the head of a frame are a torn one, whatever they say.
    assert_eq!(reading, Reading::Sound { whole_bytes: end });
    absurd.extend([0; 4]);
    assert_eq!(records(&absurd).1, Reading::Damaged { offset: end, damage: Damage::Length(u32::MAX) });
}

/// Written by a later program, which may come back.
#[test]
fn a_file_of_another_version_is_left_alone() {
    let folder = tempdir().unwrap();
    let mut bytes = b"lcjournl".to_vec();
    bytes.extend(9_u32.to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes.extend(b"whatever this is");
    fs::write(file(folder.path()), &bytes).unwrap();
    let orphan = only(Journal::take_over(folder.path()).unwrap());
    assert!(matches!(orphan.fault(), Some(JournalError::UnknownVersion { version: 9, .. })));
    orphan.remove().unwrap();
    assert_eq!(fs::read(file(folder.path())).unwrap(), bytes);
}

#[tokio::test]
async fn a_file_that_has_not_even_a_header_owes_nothing() {
    for bytes in [0, 5] {
        let folder = tempdir().unwrap();
        fs::write(file(folder.path()), &header()[..bytes]).unwrap();
        let orphan = only(Journal::take_over(folder.path()).unwrap());
        assert!(orphan.fault().is_none() && orphan.unfinished().is_empty());
        orphan.remove().unwrap();
        write_all(&open(folder.path()), &sample()).await;
    }
}
