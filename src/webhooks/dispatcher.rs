//! Delivers what waits: on notice, when an attempt is due, and after a look at all tenants now and then.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Outcome, Postman, Settings,
    agenda::Agenda,
    outbox::{Delivery, Fate, Outbox, Taken},
};
use crate::{
    domain::TenantId,
    fault,
    store::{Store, StoreError, keys},
    telemetry::Metrics,
};

/// Deliveries under way at the same time, each of another tenant and on a thread of its own; further tenants wait for
/// the next that ends.
const VISITS_MAX: usize = 64;
/// After so many events in a row it is others' turn.
const EVENTS_PER_VISIT: usize = 16;
const STORE_AWAY_PAUSE: Duration = Duration::from_secs(1);
const PANIC_PAUSE: Duration = Duration::from_secs(60);
/// Tenants that are looked at in one round trip.
const SCAN_BATCH: usize = 256;
/// Tenants that were found and are yet to be put on the agenda; the scan waits when there are more.
const FOUND_MAX: usize = 256;

/// Delivers until it is stopped. Any number of them may share a store.
pub struct Dispatcher {
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Dispatcher {
    /// Must be called within a tokio runtime.
    pub fn start(store: Store, settings: Settings, metrics: Arc<Metrics>) -> Self {
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        let (found, finds) = mpsc::channel(FOUND_MAX);
        let again = Arc::new(Notify::new());
        let scanner = Scanner { store: store.clone(), period: settings.scan, metrics: Arc::clone(&metrics), found };
        tasks.spawn(stop.clone().run_until_cancelled_owned(scanner.run(Arc::clone(&again))).map(drop));
        let visitor = Visitor {
            outbox: Outbox::new(store.clone(), &settings),
            postman: Postman::new(settings.allow_private, settings.timeout),
            settings,
            metrics,
            stop: stop.clone(),
        };
        tasks.spawn(dispatch(store, Arc::new(visitor), finds, again));
        Self { stop, tasks }
    }

    /// Begins nothing new, and waits this long for what is under way. What is not done by then is repeated by whoever
    /// delivers next.
    pub async fn stop(mut self, grace: Duration) {
        self.stop.cancel();
        let _ = timeout(grace, async { while self.tasks.join_next().await.is_some() {} }).await;
    }
}

async fn dispatch(store: Store, visitor: Arc<Visitor>, mut finds: mpsc::Receiver<TenantId>, again: Arc<Notify>) {
    let mut notices = store.messages(keys::OUTBOX_CHANNEL);
    let (mut agenda, mut visits) = (Agenda::default(), JoinSet::new());
    let stop = visitor.stop.clone();
    while !stop.is_cancelled() {
        while visits.len() < VISITS_MAX
            && let Some(tenant) = agenda.begin(Instant::now())
        {
            let visitor = Arc::clone(&visitor);
            visits.spawn(async move {
                let visit = AssertUnwindSafe(visitor.visit(&tenant)).catch_unwind().await;
                (tenant, visit.unwrap_or(Some(PANIC_PAUSE)))
            });
        }
        let due = agenda.next_at().filter(|_| visits.len() < VISITS_MAX);
        let due = async move {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            Some(visit) = visits.join_next() => {
                let (tenant, after) = visit.expect("a visit's panic is caught");
                agenda.end(tenant, Instant::now(), after);
            }
            Some(tenant) = finds.recv() => agenda.ask(tenant, Instant::now()),
            said = notices.next() => match said {
                Some(accounts) => {
                    let tenants = accounts.iter().filter_map(|account| keys::tenant_of_account(account));
                    tenants.for_each(|tenant| agenda.ask(tenant, Instant::now()));
                }
                None => again.notify_one(),
            },
            () = stop.cancelled() => {}
        }
    }
    while visits.join_next().await.is_some() {}
}

struct Visitor {
    outbox: Outbox,
    postman: Postman,
    settings: Settings,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
}

impl Visitor {
    /// Delivers what waits for a tenant. Answers after which time to come again, if at all.
    async fn visit(&self, tenant: &TenantId) -> Option<Duration> {
        for _ in 0..EVENTS_PER_VISIT {
            if self.stop.is_cancelled() {
                return None;
            }
            let next = match self.outbox.take(tenant).await {
                Ok(Taken::Nothing) => return None,
                Ok(Taken::Later(after)) => return Some(after),
                Ok(Taken::Event(delivery)) => self.deliver(tenant, &delivery).await,
                Err(error) => Err(error),
            };
            match next {
                Ok(Fate::Delivered | Fate::Dead | Fate::Lost) => {}
                Ok(Fate::Later(after)) => return Some(after),
                Err(error) => {
                    tracing::warn!(%tenant, %error, "cannot deliver webhooks; trying again");
                    return Some(STORE_AWAY_PAUSE);
                }
            }
        }
        Some(Duration::ZERO)
    }

    async fn deliver(&self, tenant: &TenantId, delivery: &Delivery) -> Result<Fate, StoreError> {
        let Settings { attempts_max, .. } = self.settings;
        let (outcome, attempts_max) = match &delivery.message {
            Ok(message) => {
                let Delivery { url, secrets, now_unix_ms, .. } = delivery;
                (self.postman.send(url, secrets, *now_unix_ms, message).await, attempts_max)
            }
            // It will not become better by another attempt.
            Err(error) => (Outcome::Failed(format!("the event cannot be read: {error}")), 0),
        };
        fault::point("webhooks.deliver.answered");
        let fate = match &outcome {
            Outcome::Accepted(_) => self.outbox.delivered(tenant, delivery).await?,
            Outcome::Failed(why) => {
                let pause = self.settings.pause(delivery.attempt);
                self.outbox.failed(tenant, delivery, why, pause, attempts_max).await?
            }
        };
        let count = |outcome| self.metrics.webhooks.with_label_values(&[outcome]).inc();
        match &outcome {
            Outcome::Accepted(_) => count("delivered"),
            Outcome::Failed(why) => {
                count("failed");
                tracing::info!(%tenant, attempt = delivery.attempt, why, "a webhook was not taken");
            }
        }
        if fate == Fate::Dead {
            count("dead");
            tracing::warn!(%tenant, attempts = delivery.attempt, "a webhook was given up");
        }
        Ok(fate)
    }
}

/// Finds what waits, so that a notice that was lost delays and nothing more.
struct Scanner {
    store: Store,
    period: Duration,
    metrics: Arc<Metrics>,
    found: mpsc::Sender<TenantId>,
}

impl Scanner {
    /// Looks at once, then `again` and by the clock.
    async fn run(self, again: Arc<Notify>) {
        loop {
            match self.scan().await {
                Ok(waiting) => self.metrics.webhooks_waiting.set(waiting),
                Err(error) => tracing::warn!(%error, "cannot look for webhooks that wait"),
            }
            // Nodes spread over the period, so that they do not all look at once.
            let pause = sleep(self.period.mul_f64(rand::random_range(0.75..1.25)));
            tokio::select! {
                () = pause => {}
                () = again.notified() => sleep(STORE_AWAY_PAUSE.min(self.period)).await,
            }
        }
    }

    /// Answers how many events wait in all.
    async fn scan(&self) -> Result<i64, StoreError> {
        let tenants: Vec<String> = self.store.query(redis::cmd("SMEMBERS").arg(keys::WEBHOOKS)).await?;
        let tenants: Vec<TenantId> = tenants.into_iter().map(TenantId::from).collect();
        let mut waiting = 0;
        for batch in tenants.chunks(SCAN_BATCH) {
            let mut counts = redis::pipe();
            for tenant in batch {
                counts.cmd("LLEN").arg(keys::outbox(tenant));
            }
            let counts = self.store.query_all(&counts).await?;
            for (tenant, count) in batch.iter().zip(counts) {
                let redis::Value::Int(count) = count else {
                    return Err(StoreError::Damaged(format!("the outbox of {tenant}")));
                };
                waiting += count;
                if count > 0 && self.found.send(tenant.clone()).await.is_err() {
                    return Ok(waiting);
                }
            }
        }
        Ok(waiting)
    }
}
