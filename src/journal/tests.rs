//! A journal against a plain model of it, in one process; the model and its operations.

mod damage;
mod processes;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    sync::Barrier,
    thread,
};

use futures::future::join_all;
use proptest::prelude::*;
use tempfile::tempdir;

use super::{frame::Record, *};
use crate::domain::NanoUsd;

fn begun(request: &str, attempt: u32) -> Begun {
    Begun {
        request: request.into(),
        tenant: "ten_1".into(),
        key: "key_1".into(),
        model: "tzafon.sm-1".into(),
        price: Price::flat(NanoUsd::new(200), NanoUsd::new(300)),
        price_version: "2026-01".into(),
        prompt_tokens: 1000,
        attempt,
        owner: "node_1".into(),
    }
}

fn ended(request: &str, completion_tokens: u32) -> Ended {
    let usage = Usage { prompt_tokens: 1000, completion_tokens, cached_tokens: 16 };
    let digest = completion_tokens.is_multiple_of(2).then_some([7; 32]);
    Ended { request: request.into(), usage, reason: "stop".into(), digest, unix_ms: 1_790_000_000_000 }
}

#[derive(Clone, Debug)]
enum Op {
    Begin(u8, u32),
    Progress(Vec<(u8, u32)>),
    End(u8, u32),
    Close(u8),
}

fn name(number: u8) -> RequestId {
    format!("chatcmpl-{number}").into()
}

impl Op {
    async fn write(&self, journal: &Journal) -> Result<(), JournalError> {
        match self {
            Self::Begin(request, attempt) => journal.begin(&begun(name(*request).as_str(), *attempt)),
            Self::Progress(tokens) => {
                let tokens: Vec<_> = tokens.iter().map(|(request, tokens)| (name(*request), *tokens)).collect();
                journal.progress(&tokens)
            }
            Self::End(request, tokens) => journal.ended(&ended(name(*request).as_str(), *tokens)).await,
            Self::Close(request) => journal.closed(&name(*request)),
        }
    }
}

/// What is unfinished after some operations, obviously.
fn model(ops: &[Op]) -> Vec<Unsettled> {
    let mut open = Vec::<Unsettled>::new();
    for op in ops {
        let of = |request: &u8| {
            let request = name(*request);
            move |open: &Unsettled| open.begun.request == request
        };
        match op {
            Op::Begin(request, attempt) => {
                open.retain(|earlier| !of(request)(earlier));
                let begun = begun(name(*request).as_str(), *attempt);
                open.push(Unsettled { begun, completion_tokens: 0, ended: None });
            }
            Op::Progress(tokens) => {
                for (request, tokens) in tokens {
                    for open in open.iter_mut().filter(|open| of(request)(open)) {
                        open.completion_tokens = open.completion_tokens.max(*tokens);
                    }
                }
            }
            Op::End(request, tokens) => {
                for open in open.iter_mut().filter(|open| of(request)(open)) {
                    open.ended = Some(ended(name(*request).as_str(), *tokens));
                }
            }
            Op::Close(request) => open.retain(|open| !of(request)(open)),
        }
    }
    open
}

fn any_op() -> impl Strategy<Value = Op> {
    let request = 0..6_u8;
    prop_oneof![
        3 => (request.clone(), 1..4_u32).prop_map(|(request, attempt)| Op::Begin(request, attempt)),
        6 => proptest::collection::vec((request.clone(), 0..100_000_u32), 0..6).prop_map(Op::Progress),
        1 => (request.clone(), 0..100_000_u32).prop_map(|(request, tokens)| Op::End(request, tokens)),
        2 => request.prop_map(Op::Close),
    ]
}

fn open(folder: &Path) -> Journal {
    Journal::open(folder, &"node_1".into()).unwrap()
}

fn only(mut orphans: Vec<Orphan>) -> Orphan {
    assert_eq!(orphans.len(), 1);
    orphans.remove(0)
}

fn file(folder: &Path) -> std::path::PathBuf {
    folder.join("node_1.journal")
}

/// Enough of everything, in a few hundred bytes.
fn sample() -> Vec<Op> {
    vec![
        Op::Begin(0, 1),
        Op::Begin(1, 2),
        Op::Progress(vec![(0, 1), (1, 300)]),
        Op::End(0, 1),
        Op::Begin(2, 1),
        Op::Close(1),
        Op::Progress(vec![(0, 2), (2, 70_000)]),
    ]
}

async fn write_all(journal: &Journal, ops: &[Op]) {
    for op in ops {
        op.write(journal).await.unwrap();
    }
}

#[tokio::test]
async fn what_a_process_left_unfinished_is_found_by_the_next() {
    let folder = tempdir().unwrap();
    let journal = open(folder.path());
    write_all(&journal, &sample()).await;
    // Of requests that nobody began.
    write_all(&journal, &[Op::Progress(vec![(9, 9)]), Op::End(9, 9), Op::Close(9)]).await;
    assert_eq!(fs::metadata(file(folder.path())).unwrap().permissions().mode() & 0o777, 0o600);
    drop(journal);
    let orphan = only(Journal::take_over(folder.path()).unwrap());
    assert_eq!(orphan.node().as_str(), "node_1");
    assert!(orphan.fault().is_none());
    assert_eq!(orphan.unfinished(), model(&sample()));
}

#[tokio::test]
async fn a_journal_that_owes_nothing_leaves_no_file() {
    let folder = tempdir().unwrap();
    let journal = open(folder.path());
    write_all(&journal, &[Op::Begin(0, 1), Op::End(0, 5), Op::Close(0)]).await;
    drop(journal);
    assert!(!file(folder.path()).exists());
    assert!(Journal::take_over(folder.path()).unwrap().is_empty());
}

#[tokio::test]
async fn a_journal_has_one_holder() {
    let folder = tempdir().unwrap();
    let journal = open(folder.path());
    write_all(&journal, &sample()).await;
    let again = || Journal::open(folder.path(), &"node_1".into()).err().unwrap();
    assert!(matches!(again(), JournalError::Held(_)));
    assert!(Journal::take_over(folder.path()).unwrap().is_empty());
    drop(journal);
    assert!(matches!(again(), JournalError::LeftOver(_)));
    let orphan = only(Journal::take_over(folder.path()).unwrap());
    assert!(matches!(again(), JournalError::Held(_)));
    assert!(Journal::take_over(folder.path()).unwrap().is_empty());
    drop(orphan);
    assert_eq!(Journal::take_over(folder.path()).unwrap().len(), 1);
}

#[tokio::test]
async fn a_recovery_that_dies_goes_on_where_it_was() {
    let folder = tempdir().unwrap();
    write_all(&open(folder.path()), &sample()).await;
    let take = || only(Journal::take_over(folder.path()).unwrap());
    let mut first = take();
    first.closed(&name(0)).unwrap();
    first.closed(&name(77)).unwrap();
    let error = first.remove().unwrap_err();
    assert!(matches!(error, JournalError::Unfinished { requests: 1, .. }), "{error}");
    let mut second = take();
    let left: Vec<_> = second.unfinished().into_iter().map(|open| open.begun.request).collect();
    assert_eq!(left, [name(2)]);
    second.closed(&name(2)).unwrap();
    second.remove().unwrap();
    assert!(Journal::take_over(folder.path()).unwrap().is_empty());
    assert!(!file(folder.path()).exists());
}

#[test]
fn processes_that_start_at_the_same_time_share_what_was_left() {
    const TAKERS: usize = 8;
    const LEFT: usize = 40;
    let folder = tempdir().unwrap();
    for number in 0..LEFT {
        let journal = Journal::open(folder.path(), &format!("node_{number}").into()).unwrap();
        journal.begin(&begun("chatcmpl-1", 1)).unwrap();
    }
    let start = Barrier::new(TAKERS);
    let taken: Vec<Vec<Orphan>> = thread::scope(|scope| {
        let take = || {
            start.wait();
            Journal::take_over(folder.path()).unwrap()
        };
        let takers: Vec<_> = (0..TAKERS).map(|_| scope.spawn(take)).collect();
        takers.into_iter().map(|taker| taker.join().unwrap()).collect()
    });
    let mut nodes: Vec<_> = taken.iter().flatten().map(|orphan| orphan.node().clone()).collect();
    nodes.sort();
    nodes.dedup();
    assert_eq!(nodes.len(), LEFT);
    assert_eq!(taken.iter().map(Vec::len).sum::<usize>(), LEFT);
}

#[tokio::test]
async fn settlements_that_come_together_make_the_disk_write_few_times() {
    let folder = tempdir().unwrap();
    let journal = open(folder.path());
    let requests: Vec<_> = (0..100).map(|number| format!("chatcmpl-{number}")).collect();
    requests.iter().for_each(|request| journal.begin(&begun(request, 1)).unwrap());
    let endings: Vec<_> = requests.iter().map(|request| ended(request, 8)).collect();
    let results = join_all(endings.iter().map(|ended| journal.ended(ended))).await;
    assert!(results.iter().all(Result::is_ok));
    assert!((1..=20).contains(&journal.syncs()), "{} for 100 settlements", journal.syncs());
}

#[test]
fn a_journal_is_copied_under_those_who_write_it_and_nothing_is_lost() {
    const WRITERS: u32 = 4;
    const REQUESTS: u32 = 40;
    const STEPS: u32 = 50;
    let folder = tempdir().unwrap();
    let journal = Journal::open_with_limit(folder.path(), &"node_1".into(), 4 << 10).unwrap();
    let inode = || fs::metadata(file(folder.path())).unwrap().ino();
    // Held, so that no later file gets its number.
    let first = fs::File::open(file(folder.path())).unwrap();
    let before = first.metadata().unwrap().ino();
    let write = |writer: u32| {
        for number in 0..REQUESTS {
            let request = format!("chatcmpl-{writer}-{number}");
            journal.begin(&begun(&request, 1)).unwrap();
            for step in 1..=STEPS {
                journal.progress(&[(request.as_str().into(), step)]).unwrap();
            }
            if number % 4 == 0 {
                futures::executor::block_on(journal.ended(&ended(&request, STEPS))).unwrap();
            }
            if number % 8 != 0 {
                journal.closed(&request.into()).unwrap();
            }
        }
    };
    thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS).map(|writer| scope.spawn(move || write(writer))).collect();
        while writers.iter().any(|writer| !writer.is_finished()) {
            assert!(Journal::take_over(folder.path()).unwrap().is_empty(), "a file of the living was taken");
        }
    });
    assert!(journal.fault().is_none());
    assert_ne!(inode(), before);
    drop(journal);
    let orphan = only(Journal::take_over(folder.path()).unwrap());
    let mut left = orphan.unfinished();
    left.sort_by_key(|open| open.begun.request.clone());
    let expected = (0..WRITERS).flat_map(|writer| (0..REQUESTS).step_by(8).map(move |number| (writer, number)));
    let mut expected: Vec<_> = expected
        .map(|(writer, number)| {
            let request = format!("chatcmpl-{writer}-{number}");
            let ended = Some(ended(&request, STEPS));
            Unsettled { begun: begun(&request, 1), completion_tokens: STEPS, ended }
        })
        .collect();
    expected.sort_by_key(|open| open.begun.request.clone());
    assert_eq!(left, expected);
}

/// Nobody is kept from writing by a file that cannot be copied.
#[test]
fn a_journal_that_cannot_be_copied_grows() {
    let folder = tempdir().unwrap();
    let journal = Journal::open_with_limit(folder.path(), &"node_1".into(), 1 << 10).unwrap();
    fs::create_dir(folder.path().join("node_1.journal.new")).unwrap();
    journal.begin(&begun("chatcmpl-1", 1)).unwrap();
    for step in 1..=1000 {
        journal.progress(&[("chatcmpl-1".into(), step)]).unwrap();
    }
    futures::executor::block_on(journal.ended(&ended("chatcmpl-1", 1000))).unwrap();
    assert!(journal.fault().is_none());
    fs::remove_dir(folder.path().join("node_1.journal.new")).unwrap();
    drop(journal);
    assert_eq!(only(Journal::take_over(folder.path()).unwrap()).unfinished()[0].completion_tokens, 1000);
}

#[test]
fn what_a_dead_process_left_of_a_copy_is_cleared_away() {
    let folder = tempdir().unwrap();
    open(folder.path()).begin(&begun("chatcmpl-1", 1)).unwrap();
    let living = Journal::open(folder.path(), &"node_2".into()).unwrap();
    let copy = |node: &str| folder.path().join(format!("{node}.journal.new"));
    for node in ["node_1", "node_2", "node_3"] {
        fs::write(copy(node), b"some").unwrap();
    }
    let orphan = only(Journal::take_over(folder.path()).unwrap());
    assert_eq!(["node_1", "node_2", "node_3"].map(|node| copy(node).exists()), [false, true, false]);
    assert_eq!(orphan.unfinished().len(), 1);
    drop(living);
}

#[test]
fn a_record_that_is_too_long_is_refused_and_the_journal_goes_on() {
    let folder = tempdir().unwrap();
    let journal = open(folder.path());
    let long = Begun { price_version: "x".repeat(70_000), ..begun("chatcmpl-1", 1) };
    assert!(matches!(journal.begin(&long), Err(JournalError::TooLong { .. })));
    // More requests than one record of progress takes.
    let requests: Vec<_> = (0..5000).map(|number| format!("chatcmpl-{number}")).collect();
    requests.iter().for_each(|request| journal.begin(&begun(request, 1)).unwrap());
    let tokens: Vec<_> = requests.iter().map(|request| (request.as_str().into(), u32::MAX)).collect();
    journal.progress(&tokens).unwrap();
    drop(journal);
    let left = only(Journal::take_over(folder.path()).unwrap()).unfinished();
    assert_eq!(left.iter().filter(|open| open.completion_tokens == u32::MAX).count(), 5000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_journal_says_what_the_model_says(
        ops in proptest::collection::vec(any_op(), 0..60),
        bytes_max in prop_oneof![Just(64_u64), Just(1000), Just(1 << 20)],
        closed_later in proptest::collection::vec(0..6_u8, 0..6),
    ) {
        let folder = tempdir().unwrap();
        let journal = Journal::open_with_limit(folder.path(), &"node_1".into(), bytes_max).unwrap();
        futures::executor::block_on(write_all(&journal, &ops));
        drop(journal);
        let expected = model(&ops);
        let mut orphans = Journal::take_over(folder.path()).unwrap();
        prop_assert_eq!(orphans.len(), usize::from(!expected.is_empty()));
        let Some(mut orphan) = orphans.pop() else { return Ok(()) };
        prop_assert!(orphan.fault().is_none());
        prop_assert_eq!(orphan.unfinished(), expected);
        closed_later.iter().for_each(|request| orphan.closed(&name(*request)).unwrap());
        drop(orphan);
        let ops: Vec<_> = ops.into_iter().chain(closed_later.into_iter().map(Op::Close)).collect();
        prop_assert_eq!(only(Journal::take_over(folder.path()).unwrap()).unfinished(), model(&ops));
    }
}

/// Files outlive programs: whoever changes what these bytes mean changes the version.
#[test]
fn the_records_of_version_1_are_these_bytes() {
    let mut frames = Vec::new();
    for record in [
        Record::Begun { index: 0, begun: begun("r", 1) },
        Record::Progress(vec![(0, 300)]),
        Record::Ended { index: 0, ended: Ended { digest: None, ..ended("r", 300) } },
        Record::Closed { index: 0 },
    ] {
        frame::push(&mut frames, &record).unwrap();
    }
    assert_eq!(hex::encode(frame::header()), "6c636a6f75726e6c01000000e6006393");
    let expected = concat!(
        "34000000225cd30e000001720574656e5f31056b65795f310b747a61666f6e2e736d2d319003d804900307323032362d3031e80701066e6f64655f31",
        "05000000fd8dfec5010100ac02",
        "1500000014557ea502000172e807ac02100473746f700080d8c1a28c34",
        "020000006b5327d70300",
    );
    assert_eq!(hex::encode(frames), expected);
}
