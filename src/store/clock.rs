use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Watches the store's clock against this process's own, which never jumps: after a jump all leases look expired, or
/// none ever.
#[derive(Default)]
pub(crate) struct ClockWatch {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    seen: Option<(Instant, u64)>,
    jumped: Option<Instant>,
}

impl ClockWatch {
    /// Whether what the store's clock says now, `unix_ms`, may be held against leases of this length.
    pub fn is_steady(&self, unix_ms: u64, lease: Duration) -> bool {
        self.look(Instant::now(), unix_ms, lease)
    }

    fn look(&self, now: Instant, unix_ms: u64, lease: Duration) -> bool {
        let mut state = self.state.lock();
        if let Some((then, then_ms)) = state.seen {
            let passed = u64::try_from(now.duration_since(then).as_millis()).unwrap_or(u64::MAX);
            let off = unix_ms.abs_diff(then_ms.saturating_add(passed));
            if u128::from(off) > lease.as_millis() / 2 {
                tracing::warn!(off_ms = off, "the store's clock jumped; nothing is given up until its owners had time");
                state.jumped = Some(now);
            }
        }
        state.seen = Some((now, unix_ms));
        state.jumped.is_none_or(|jumped| now.duration_since(jumped) >= lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_jump_of_the_clock_nothing_expires_for_the_time_of_a_lease() {
        let watch = ClockWatch::default();
        let (start, lease) = (Instant::now(), Duration::from_secs(10));
        let look = |seconds: u64, unix_ms: u64| watch.look(start + Duration::from_secs(seconds), unix_ms, lease);
        assert!(look(0, 1_000_000));
        assert!(look(2, 1_002_100));
        assert!(!look(4, 4_604_000), "an hour ahead");
        assert!(!look(13, 4_613_000));
        assert!(look(14, 4_614_000));
        assert!(!look(16, 1_016_000), "and back");
        assert!(look(26, 1_026_000));
    }
}
