//! Settlements that the store has taken and might still lose.
//!
//! A store that writes its file every second may answer, die, and come back without its last second or two. Whatever
//! it has taken therefore stays in the journal until it has served for a while without a gap, and is told again after
//! one: a settlement happens once, however often it is told.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::time::sleep;

use crate::{
    journal::Journal,
    ledger::{Ledger, LedgerError, Settlement},
    telemetry::Metrics,
};

/// Longer than a store with `appendfsync everysec` holds back what it has answered.
const SURE_AFTER: Duration = Duration::from_secs(5);
const PERIOD: Duration = Duration::from_millis(250);
/// What waits beyond this is taken for sure: more than a node settles within that time.
const WAITING_MAX: usize = 1 << 16;

pub struct Confirmations {
    journal: Arc<Journal>,
    ledger: Ledger,
    metrics: Arc<Metrics>,
    waiting: Mutex<VecDeque<(Instant, Settlement)>>,
}

impl Confirmations {
    pub fn new(journal: Arc<Journal>, ledger: Ledger, metrics: Arc<Metrics>) -> Self {
        Self { journal, ledger, metrics, waiting: Mutex::default() }
    }

    /// The store has taken it, just now.
    pub fn add(&self, settlement: Settlement) {
        let oldest = {
            let mut waiting = self.waiting.lock();
            waiting.push_back((Instant::now(), settlement));
            if waiting.len() > WAITING_MAX { waiting.pop_front() } else { None }
        };
        if let Some((_, settlement)) = oldest {
            self.close(&settlement);
        }
    }

    /// For ever.
    pub async fn go_on(&self) {
        loop {
            sleep(PERIOD).await;
            self.look().await;
        }
    }

    async fn look(&self) {
        let served_for = self.ledger.store_connected_for();
        if served_for.is_zero() {
            return;
        }
        // Taken before a gap, or at its edge: what was answered is not what there is.
        let doubtful = {
            let mut waiting = self.waiting.lock();
            let is_doubtful = |(taken, _): &(Instant, Settlement)| taken.elapsed() + PERIOD > served_for;
            let doubtful: Vec<_> = waiting.iter().filter(|one| is_doubtful(one)).map(|(_, one)| one.clone()).collect();
            waiting.retain(|one| !is_doubtful(one));
            doubtful
        };
        for settlement in doubtful {
            self.tell_again(settlement).await;
        }
        let sure: Vec<_> = {
            let mut waiting = self.waiting.lock();
            let count = waiting.partition_point(|(taken, _)| taken.elapsed() > SURE_AFTER);
            waiting.drain(..count).collect()
        };
        for (_, settlement) in sure {
            self.close(&settlement);
        }
    }

    async fn tell_again(&self, settlement: Settlement) {
        match self.ledger.settle_begun(&settlement).await {
            Ok(settled) => {
                if !settled.repeated {
                    tracing::warn!(request = %settlement.request, "the store had lost a settlement; it is there again");
                    self.metrics.late_settlements.inc();
                }
                self.add(settlement);
            }
            Err(LedgerError::Store(error)) if error.is_transient() => self.add(settlement),
            Err(error) => {
                tracing::error!(request = %settlement.request, %error, "a settlement that the store may have lost");
                self.close(&settlement);
            }
        }
    }

    fn close(&self, settlement: &Settlement) {
        if let Err(error) = self.journal.closed(&settlement.request) {
            tracing::error!(request = %settlement.request, %error, "a request stays open in the journal");
        }
    }
}
