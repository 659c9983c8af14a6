//! Real processes that die while they write. The child is this test binary, told by a variable what to do.

use std::{
    env,
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use tempfile::tempdir;

use super::{super::*, Op, model, only};
use crate::fault;

const CHILD: &str = "LIGHTCONE_JOURNAL_CHILD";
const CHILD_TEST: &str = "journal::tests::processes::the_process_that_dies_in_these_tests";
/// So that files are copied all the time.
const BYTES_MAX: u64 = 3000;
/// Where the disk of a child is full.
const DISK_BYTES: u64 = 20_000;

/// The operations of a child, the same in each; never fewer than one request open.
fn op(number: usize) -> Op {
    let (round, request) = (number / 8, (number / 8 % 200) as u8);
    let tokens = number as u32;
    match number % 8 {
        0 => Op::Begin(request, round as u32),
        5 if round % 3 == 0 => Op::End(request, tokens),
        6 if round > 3 => Op::Close(request.wrapping_add(197) % 200),
        _ => Op::Progress(vec![(request, tokens), (request.wrapping_sub(1), tokens)]),
    }
}

fn ops(count: usize) -> Vec<Op> {
    (0..count).map(op).collect()
}

/// Says one byte for each operation that has returned, until it dies or cannot go on.
#[test]
fn the_process_that_dies_in_these_tests() {
    let Ok(task) = env::var(CHILD) else { return };
    let (what, folder) = task.split_once(':').unwrap();
    let bytes_max = if what == "full" { u64::MAX } else { BYTES_MAX };
    let journal = Journal::open_with_limit(Path::new(folder), &"node_1".into(), bytes_max).unwrap();
    if what == "full" {
        fill_the_disk();
    }
    let mut stdout = std::io::stdout();
    // What the test harness has said before is not counted.
    stdout.write_all(b"#").unwrap();
    for number in 0.. {
        match futures::executor::block_on(op(number).write(&journal)) {
            Ok(()) => stdout.write_all(b".").unwrap(),
            Err(error) => {
                assert!(error.to_string().contains("cannot write"), "{error}");
                assert!(error.to_string().contains("node_1.journal: File too large"), "{error}");
                let fault = journal.fault().unwrap().to_string();
                assert_eq!(fault, error.to_string());
                // It stays failed, also for what would fit.
                assert!(journal.closed(&"chatcmpl-0".into()).is_err());
                assert!(futures::executor::block_on(op(5).write(&journal)).is_err());
                return;
            }
        }
        stdout.flush().unwrap();
    }
}

/// No file of this process may grow beyond a size: the same error path as a disk without room.
fn fill_the_disk() {
    let limit = libc::rlimit { rlim_cur: DISK_BYTES, rlim_max: DISK_BYTES };
    // SAFETY: plain calls on values of this frame.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
}

fn spawn(what: &str, folder: &Path, fault: &str) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([CHILD_TEST, "--exact", "--nocapture", "--test-threads=1"]);
    command.env(CHILD, format!("{what}:{}", folder.display())).env("LIGHTCONE_FAULT", fault);
    command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// How many operations had returned by the end of the child, and the signal that ended it.
fn wait(mut child: Child) -> (usize, Option<i32>) {
    let mut said = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut said).unwrap();
    let status = child.wait().unwrap();
    let from = said.iter().position(|byte| *byte == b'#').unwrap_or(said.len());
    let returned = said[from..].iter().skip(1).take_while(|byte| **byte == b'.').count();
    (returned, status.signal())
}

/// The file says all that had returned, and at most the one operation that was under way.
fn assert_nothing_is_lost(folder: &Path, returned: usize) {
    let orphan = only(Journal::take_over(folder).unwrap());
    assert!(orphan.fault().is_none(), "{:?}", orphan.fault());
    let left = orphan.unfinished();
    let (before, after) = (model(&ops(returned)), model(&ops(returned + 1)));
    assert!(left == before || left == after, "{returned} operations had returned; left: {left:#?}");
}

#[test]
fn a_process_that_is_killed_loses_nothing_that_it_was_told_is_written() {
    for ms in [0, 5, 20, 40, 80, 160] {
        let folder = tempdir().unwrap();
        let mut child = spawn("write", folder.path(), "");
        while !folder.path().join("node_1.journal").exists() {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(Journal::take_over(folder.path()).unwrap().is_empty(), "the child lives");
        thread::sleep(Duration::from_millis(ms));
        child.kill().unwrap();
        let (returned, signal) = wait(child);
        assert_eq!(signal, Some(libc::SIGKILL));
        assert_nothing_is_lost(folder.path(), returned);
    }
}

#[test]
fn a_process_that_dies_at_a_point_of_the_journal_loses_nothing() {
    for point in fault::POINTS.iter().filter(|point| point.starts_with("journal.")) {
        for passing in [1, 4] {
            let folder = tempdir().unwrap();
            let (returned, signal) = wait(spawn("write", folder.path(), &format!("{point}:{passing}")));
            assert_eq!(signal, Some(libc::SIGKILL), "{point}");
            assert_nothing_is_lost(folder.path(), returned);
        }
    }
}

#[test]
fn a_full_disk_is_a_named_error_and_the_journal_stays_failed() {
    let folder = tempdir().unwrap();
    let (returned, signal) = wait(spawn("full", folder.path(), ""));
    assert_eq!(signal, None);
    assert!(returned > 50, "{returned} operations");
    let bytes = std::fs::read(folder.path().join("node_1.journal")).unwrap();
    let reading = frame::read(&bytes, |_| ());
    assert_eq!(reading, frame::Reading::Sound { whole_bytes: bytes.len() }, "what was written in part is cut off");
    let orphan = only(Journal::take_over(folder.path()).unwrap());
    assert!(orphan.fault().is_none());
    assert_eq!(orphan.unfinished(), model(&ops(returned)));
}

#[test]
fn a_fault_that_cannot_be_is_an_exit_code() {
    let folder = tempdir().unwrap();
    let mut child = spawn("write", folder.path(), "journal.nowhere");
    assert_eq!(child.wait().unwrap().code(), Some(2));
}
