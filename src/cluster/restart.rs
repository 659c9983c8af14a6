//! When a worker that failed is started again. Pure: time and chance are given.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Waits that double, and a budget of failures within a window of time.
#[derive(Clone, Copy, Debug)]
pub struct RestartPolicy {
    pub delay_min: Duration,
    pub delay_max: Duration,
    /// More failures than this within `window` mark the model unavailable.
    pub budget: usize,
    pub window: Duration,
    /// How often it is tried all the same once the budget is spent.
    pub slow: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            delay_min: Duration::from_millis(100),
            delay_max: Duration::from_secs(10),
            budget: 5,
            window: Duration::from_secs(60),
            slow: Duration::from_secs(15),
        }
    }
}

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub after: Duration,
    /// Whether the budget still holds.
    pub available: bool,
}

/// The failures of one worker.
#[derive(Debug)]
pub struct Restarts {
    policy: RestartPolicy,
    /// At most `budget` + 1 of them.
    failures: VecDeque<Instant>,
}

impl Restarts {
    pub fn new(policy: RestartPolicy) -> Self {
        Self { policy, failures: VecDeque::new() }
    }

    /// Counts a failure. `chance` in 0..=1000 spreads the restarts of many nodes by a fifth either way.
    pub fn failed(&mut self, now: Instant, chance: u32) -> Verdict {
        let policy = self.policy;
        self.failures.retain(|&then| now.duration_since(then) < policy.window);
        self.failures.push_back(now);
        if self.failures.len() > policy.budget {
            self.failures.truncate(policy.budget + 1);
            return Verdict { after: spread(policy.slow, chance), available: false };
        }
        let doublings = u32::try_from(self.failures.len() - 1).unwrap_or(u32::MAX).min(20);
        let after = policy.delay_max.min(policy.delay_min.saturating_mul(1 << doublings));
        Verdict { after: spread(after, chance), available: true }
    }
}

fn spread(delay: Duration, chance: u32) -> Duration {
    delay * (800 + 400 * chance.min(1000) / 1000) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIDDLE: u32 = 500;

    #[test]
    fn waits_double_until_the_budget_is_spent_and_slow_tries_go_on() {
        let mut restarts = Restarts::new(RestartPolicy::default());
        let now = Instant::now();
        let waits: Vec<_> = (0..7).map(|_| restarts.failed(now, MIDDLE)).collect();
        let ms: Vec<_> = waits.iter().map(|verdict| verdict.after.as_millis()).collect();
        assert_eq!(ms, [100, 200, 400, 800, 1600, 15_000, 15_000]);
        assert_eq!(waits.iter().filter(|verdict| verdict.available).count(), 5);
    }

    #[test]
    fn failures_are_forgotten_after_the_window() {
        let mut restarts = Restarts::new(RestartPolicy::default());
        let now = Instant::now();
        for _ in 0..6 {
            restarts.failed(now, MIDDLE);
        }
        let later = restarts.failed(now + Duration::from_secs(61), MIDDLE);
        assert_eq!(later, Verdict { after: Duration::from_millis(100), available: true });
    }

    #[test]
    fn chance_spreads_by_a_fifth() {
        let policy = RestartPolicy::default();
        let wait = |chance| Restarts::new(policy).failed(Instant::now(), chance).after.as_millis();
        assert_eq!((wait(0), wait(1000)), (80, 120));
    }
}
