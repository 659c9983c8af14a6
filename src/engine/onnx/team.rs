//! Threads that go through the phases of an operator together.
//!
//! Handing a loop to a thread pool costs microseconds, and a layer has nine loops; so the pool is asked once
//! a layer, and between the loops the threads only wait for each other's last pieces. A thread that comes
//! late, or never, costs speed and nothing else: whoever is there takes all pieces.
//!
//! The pieces of a phase are cut in shares, one a member, of pieces that follow each other: memory is read
//! fastest from end to end. Who is done with its own share helps with the others'.

use std::{
    cell::Cell,
    hint,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{
        AtomicBool, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release},
    },
    thread,
    time::{Duration, Instant},
};

/// Phases that one operator may have.
const PHASES_MAX: usize = 12;
/// Looks at the others' progress before the processor is offered to somebody else, who may keep it for
/// milliseconds; some tenths of one.
const SPINS: usize = 10_000;
/// The same, when it has been offered before.
const SPINS_AGAIN: usize = 500;

/// Shares of a phase. More members than this share shares.
const SHARES_MAX: usize = 32;

/// Shared by the threads of one call.
pub struct Team {
    phases: [Phase; PHASES_MAX],
    shares: usize,
    is_broken: AtomicBool,
}

/// A cache line of its own, so that phases do not slow each other down.
#[derive(Default)]
#[repr(align(64))]
struct Phase {
    done: AtomicUsize,
    /// Of each share.
    taken: [AtomicUsize; SHARES_MAX],
}

impl Team {
    pub fn of(members: usize) -> Self {
        let shares = members.clamp(1, SHARES_MAX);
        Self { phases: Default::default(), shares, is_broken: AtomicBool::new(false) }
    }

    /// Goes through the phases as member `index` of the team. Every member runs the same `work`.
    pub fn join<'a>(&'a self, index: usize, times: Option<&'a Times>, work: impl FnOnce(&Member)) {
        let started = times.map(|_| Cell::new(Instant::now()));
        work(&Member { team: self, share: index % self.shares, phase: Cell::new(0), times: times.zip(started) });
    }

    /// Whether a piece panicked. The numbers are then worthless.
    pub fn is_broken(&self) -> bool {
        self.is_broken.load(Relaxed)
    }
}

/// One thread of a team.
pub struct Member<'a> {
    team: &'a Team,
    share: usize,
    phase: Cell<usize>,
    times: Option<(&'a Times, Cell<Instant>)>,
}

impl Member<'_> {
    /// The next phase: each of `count` pieces is computed once, by whichever thread takes it. Returns when all
    /// are, and what they wrote can be read. `kind` is what its time counts as.
    ///
    /// # Panics
    /// If there are more phases than [`PHASES_MAX`].
    pub fn each(&self, kind: usize, count: usize, body: impl Fn(usize)) {
        let phase = &self.team.phases[self.phase.get()];
        self.phase.set(self.phase.get() + 1);
        let shares = self.team.shares;
        for share in (self.share..shares).chain(0..self.share) {
            let (from, to) = (count * share / shares, count * (share + 1) / shares);
            while let piece = from + phase.taken[share].fetch_add(1, Relaxed)
                && piece < to
            {
                // The others wait for this piece, whatever becomes of it.
                if !self.team.is_broken() && catch_unwind(AssertUnwindSafe(|| body(piece))).is_err() {
                    self.team.is_broken.store(true, Relaxed);
                }
                phase.done.fetch_add(1, Release);
            }
        }
        let mut spins = SPINS;
        while phase.done.load(Acquire) < count {
            if spins > 0 {
                spins -= 1;
                hint::spin_loop();
            } else {
                spins = SPINS_AGAIN;
                thread::yield_now();
            }
        }
        if let Some((times, since)) = &self.times {
            times.add(kind, since);
        }
    }
}

/// How long the phases of each kind took.
#[derive(Debug, Default)]
pub struct Times {
    nanoseconds: [AtomicUsize; PHASES_MAX],
}

impl Times {
    fn add(&self, kind: usize, since: &Cell<Instant>) {
        let now = Instant::now();
        let passed = now.duration_since(since.replace(now));
        self.nanoseconds[kind].fetch_add(passed.as_nanos() as usize, Relaxed);
    }

    /// Of one kind since the last call.
    pub fn take(&self, kind: usize) -> Duration {
        Duration::from_nanos(self.nanoseconds[kind].swap(0, Relaxed) as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn every_piece_is_computed_once_and_each_phase_sees_all_of_the_one_before() {
        for threads in 1..5 {
            let cells: Vec<Vec<AtomicU64>> = (0..4).map(|_| (0..37).map(|_| AtomicU64::new(0)).collect()).collect();
            let team = Team::of(3);
            let work = |member: &Member| {
                member.each(0, 37, |i| {
                    cells[0][i].fetch_add(1, Relaxed);
                });
                for phase in 1..4 {
                    member.each(0, 37, |i| {
                        let before: u64 = cells[phase - 1].iter().map(|cell| cell.load(Relaxed)).sum();
                        cells[phase][i].fetch_add(before, Relaxed);
                    });
                }
            };
            thread::scope(|scope| {
                for index in 0..threads {
                    let (team, work) = (&team, &work);
                    scope.spawn(move || team.join(index, None, work));
                }
            });
            for (phase, cells) in cells.iter().enumerate() {
                assert!(cells.iter().all(|cell| cell.load(Relaxed) == 37u64.pow(phase as u32)), "{phase}");
            }
        }
    }

    #[test]
    fn who_comes_when_all_is_done_finds_nothing_to_do() {
        let team = Team::of(2);
        let pieces = AtomicUsize::new(0);
        for _ in 0..2 {
            team.join(0, None, |member| {
                member.each(0, 5, |_| {
                    pieces.fetch_add(1, Relaxed);
                })
            });
        }
        assert_eq!(pieces.load(Relaxed), 5);
    }

    #[test]
    fn a_piece_that_panics_is_known_and_keeps_nobody_waiting() {
        let team = Team::of(2);
        team.join(0, None, |member| {
            member.each(0, 3, |piece| assert_ne!(piece, 1));
            member.each(0, 3, |_| ());
        });
        assert!(team.is_broken());
    }
}
