//! Points at which tests make real processes die, stand still or wait.
//!
//! Only ever for tests: nothing but the environment variable `LIGHTCONE_FAULT` arms a point, and it is read once. It
//! says `NAME[:N][=ACTION]`: at the `N`-th passing of the point (the first where nothing is said) one of
//!
//! | action | what happens |
//! |---|---|
//! | `kill` | this process is killed (`SIGKILL`); what is meant where no action is given |
//! | `kill=PID` | that process is killed, and this one goes on |
//! | `stop` | this process stands still (`SIGSTOP`) until it is told to go on |
//! | `pause=MS` | the thread sleeps, and with it whatever waits for it |
//!
//! A point that is not armed costs one relaxed load. Every point has one place in the code, and stands in [`POINTS`];
//! a test compares the two.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Every point there is, `room.what.when`.
pub const POINTS: &[&str] = &[
    "admission.hold.asked",
    "admission.hold.answered",
    "queue.publish.asked",
    "queue.publish.answered",
    "queue.claim.answered",
    "queue.acknowledge.asked",
    "queue.acknowledge.answered",
    "operator.tenant.opened",
    "operator.tenant.listed",
    "ledger.extend.asked",
    "ledger.extend.answered",
    "ledger.settle.asked",
    "ledger.settle.answered",
    "ledger.release.asked",
    "ledger.release.answered",
    "ledger.volume.begun",
    "ledger.volume.written",
    "ledger.manifest.written",
    "ledger.trim.asked",
    "ledger.trim.answered",
    "journal.begin.written",
    "journal.progress.written",
    "journal.ended.written",
    "journal.ended.synced",
    "journal.closed.written",
    "journal.compacted",
    "webhooks.deliver.answered",
];

const VARIABLE: &str = "LIGHTCONE_FAULT";

const UNREAD: u8 = 0;
const UNARMED: u8 = 1;
const ARMED: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(UNREAD);
static PLAN: OnceLock<Result<Option<Plan>, String>> = OnceLock::new();

#[derive(Debug)]
struct Plan {
    point: &'static str,
    at_passing: u64,
    action: Action,
    passings: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill(Option<Pid>),
    Stop,
    Pause(Duration),
}

/// What happens here, if a test wants something to happen here.
#[inline]
pub fn point(name: &'static str) {
    if STATE.load(Ordering::Relaxed) != UNARMED {
        pass(name);
    }
}

/// Whether the variable says something that can be done; the error is one line. For a program's start.
pub fn check() -> Result<(), String> {
    plan().as_ref().map(|_| ()).map_err(Clone::clone)
}

#[cold]
fn pass(name: &'static str) {
    match plan() {
        Ok(None) => {}
        Ok(Some(plan)) if plan.point != name => {}
        Ok(Some(plan)) => {
            if plan.passings.fetch_add(1, Ordering::Relaxed) + 1 == plan.at_passing {
                act(plan.action);
            }
        }
        // A test that arms nothing by mistake would pass for the wrong reason.
        Err(error) => {
            eprintln!("lightcone: {error}");
            std::process::exit(2);
        }
    }
}

fn plan() -> &'static Result<Option<Plan>, String> {
    let plan = PLAN.get_or_init(|| match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => parse(&text).map(Some).map_err(|error| format!("{VARIABLE}: {error}")),
        _ => Ok(None),
    });
    let state = if matches!(plan, Ok(None)) { UNARMED } else { ARMED };
    STATE.store(state, Ordering::Relaxed);
    plan
}

fn parse(text: &str) -> Result<Plan, String> {
    let (place, order) = text.split_once('=').unwrap_or((text, "kill"));
    let (name, passing) = place.split_once(':').unwrap_or((place, "1"));
    let known = POINTS.iter().find(|point| **point == name);
    let point = known.ok_or_else(|| format!("there is no point `{name}`; there are {}", POINTS.join(", ")))?;
    let at_passing = passing.parse().ok().filter(|passing| *passing > 0);
    let at_passing = at_passing.ok_or_else(|| format!("`{passing}` is not the number of a passing, from 1 on"))?;
    let action = match order.split_once('=') {
        None if order == "kill" => Some(Action::Kill(None)),
        None if order == "stop" => Some(Action::Stop),
        // 1 and what is below it are not single processes of ours.
        Some(("kill", pid)) => {
            pid.parse().ok().filter(|pid| *pid > 1).map(|pid| Action::Kill(Some(Pid::from_raw(pid))))
        }
        Some(("pause", ms)) => ms.parse().ok().map(|ms| Action::Pause(Duration::from_millis(ms))),
        _ => None,
    };
    let action = action.ok_or_else(|| format!("`{order}` is not one of kill, kill=PID, stop and pause=MS"))?;
    Ok(Plan { point, at_passing, action, passings: AtomicU64::new(0) })
}

fn act(action: Action) {
    let sent = match action {
        Action::Kill(pid) => kill(pid.unwrap_or(Pid::this()), Signal::SIGKILL),
        Action::Stop => kill(Pid::this(), Signal::SIGSTOP),
        Action::Pause(time) => {
            thread::sleep(time);
            Ok(())
        }
    };
    if let Err(error) = sent {
        eprintln!("lightcone: {VARIABLE}: the signal could not be sent: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<(u64, Action)> {
        let plan = parse(&format!("{}{text}", POINTS[0])).ok()?;
        assert_eq!(plan.point, POINTS[0]);
        Some((plan.at_passing, plan.action))
    }

    #[test]
    fn a_fault_says_where_at_which_passing_and_what() {
        let of = |pid| Some(Pid::from_raw(pid));
        for (text, expected) in [
            ("", (1, Action::Kill(None))),
            (":7", (7, Action::Kill(None))),
            ("=kill", (1, Action::Kill(None))),
            (":2=kill=4711", (2, Action::Kill(of(4711)))),
            ("=stop", (1, Action::Stop)),
            (":3=pause=250", (3, Action::Pause(Duration::from_millis(250)))),
        ] {
            assert_eq!(read(text), Some(expected), "{text}");
        }
        for bad in [":0", ":", ":x", "=", "=die", "=kill=", "=kill=0", "=kill=-1", "=kill=1", "=pause", "=stop=1", " "]
        {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_point_that_does_not_exist_is_named() {
        let error = parse("ledger.nowhere:2").unwrap_err();
        assert!(error.starts_with("there is no point `ledger.nowhere`; there are admission.hold.asked, "), "{error}");
        assert_eq!(error.lines().count(), 1);
    }

    #[test]
    fn what_is_not_armed_does_nothing() {
        assert_eq!(check(), Ok(()));
        POINTS.iter().for_each(|name| point(name));
        assert_eq!(STATE.load(Ordering::Relaxed), UNARMED);
    }
}
