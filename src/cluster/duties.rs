//! What a pool does by the clock and on notice: claiming, renewing, cancelling, sweeping.
//!
//! Promises that claims are made only for what there is room for, that leases are renewed by a timer that no
//! decode step can delay, and that each duty goes on whatever happens to one round of it.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{cashier::Cashier, station::Station};
use crate::{
    domain::{ModelId, RequestId},
    ledger::Ledger,
    queue::{Feedback, GivenUp, Order, Orders, Queue, Renewed},
    telemetry::{Metrics, unix_ms},
};

/// Notices may be missed, so that the queue is looked at this often in any case.
const POLL: Duration = Duration::from_millis(250);
const STORE_AWAY_PAUSE: Duration = Duration::from_millis(500);
/// The accounts are checked in every so many rounds of sweeping.
const ROUNDS_PER_AUDIT: u64 = 8;

/// Claims what there is room for, on notice and now and then. Ends by itself, so that a claim under way is
/// never dropped with what it claimed.
pub async fn claim(station: Arc<Station>, queue: Queue, metrics: Arc<Metrics>, stop: CancellationToken) {
    let mut wakeups = queue.wakeups(&station.model);
    let mut away = false;
    while !stop.is_cancelled() {
        // Asked for before the look, so that room made in between is not missed.
        let changed = station.flights.changed.notified();
        let room = station.room();
        let claimed = queue.claim(&station.model, &station.node, room).await;
        match claimed {
            Ok(claims) if claims.is_empty() => {
                away = false;
                tokio::select! {
                    () = wakeups.changed() => {}
                    // A change makes room only where there was none.
                    () = changed, if room.to_begin == 0 => {}
                    () = sleep(POLL) => {}
                    () = stop.cancelled() => {}
                }
            }
            Ok(claims) => {
                away = false;
                let now = unix_ms();
                for claim in &claims {
                    let waited = Duration::from_millis(now.saturating_sub(claim.job.enqueued_unix_ms));
                    metrics.queue_wait.with_label_values(&[station.model.as_str()]).observe(waited.as_secs_f64());
                }
                if let Err(claims) = station.take_in(claims) {
                    // The worker was lost while the claim was under way.
                    let claims: Vec<_> = claims.into_iter().map(|claim| (claim.job.request, claim.attempt)).collect();
                    if let Err(error) =
                        queue.give_up(&station.model, &station.node, &GivenUp::HandedOver, &claims).await
                    {
                        tracing::warn!(model = %station.model, %error, "cannot give claims back; they will expire");
                    }
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut away, true) {
                    tracing::warn!(model = %station.model, %error, "cannot claim requests; trying again");
                }
                sleep(STORE_AWAY_PAUSE).await;
            }
        }
    }
}

/// Renews the leases of claims and holds.
pub async fn renew(station: Arc<Station>, queue: Queue, ledger: Ledger, lease: Duration) {
    let mut timer = interval((lease / 3).max(Duration::from_millis(10)));
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        station.look_after_waiting();
        let leases = station.flights.leases();
        if leases.is_empty() {
            continue;
        }
        let claims: Vec<(RequestId, u32)> =
            leases.iter().map(|(_, request, attempt)| (request.clone(), *attempt)).collect();
        let asked = Instant::now().into_std();
        match queue.renew(&station.model, &station.node, &claims).await {
            Ok(Renewed { lost, gone }) => {
                for request in &gone {
                    restore(&station, &queue, request).await;
                }
                for request in &lost {
                    // A request that ended meanwhile is lost in the same words and means nothing.
                    if station.flights.holds(request) {
                        tracing::warn!(%request, model = %station.model, "lost a claim; stopping its request");
                    }
                    station.lose(request);
                }
                station.flights.renewed(claims.into_iter().map(|(request, _)| request), asked);
            }
            Err(error) => tracing::warn!(model = %station.model, %error, "cannot renew claims"),
        }
        let holds: Vec<_> = leases.into_iter().map(|(tenant, request, _)| (tenant, request)).collect();
        if let Err(error) = ledger.renew_holds(&holds).await {
            tracing::warn!(model = %station.model, %error, "cannot renew holds");
        }
    }
}

/// Claims a request again that the store has lost with its last moments.
async fn restore(station: &Arc<Station>, queue: &Queue, request: &RequestId) {
    let Some(claim) = station.flights.claim(request) else { return };
    tracing::warn!(%request, model = %station.model, "the store had lost a claim of a request that runs here");
    match queue.restore(&claim).await {
        // It has ended meanwhile, and what was acknowledged then was not there.
        Ok(true) if !station.flights.holds(request) => {
            let done = queue.acknowledge(&claim.job.model, &claim.owner, request, claim.attempt, 0).await;
            if let Err(error) = done {
                tracing::warn!(%request, %error, "a claim of a request that has ended will run out");
            }
        }
        Ok(true) => {}
        Ok(false) => station.lose(request),
        Err(error) => tracing::warn!(%request, %error, "cannot claim a request again"),
    }
}

/// Carries out what edges want.
pub async fn obey(stations: Arc<[Arc<Station>]>, orders: Arc<tokio::sync::Mutex<Orders>>) {
    let mut orders = orders.lock().await;
    loop {
        for order in orders.next().await {
            match order {
                // Nobody knows those that have ended meanwhile.
                Order::Told(Feedback::Cancel(request)) => {
                    let _ = stations.iter().any(|station| station.cancel(&request));
                }
                Order::Told(Feedback::Resume { request, attempt, told }) => {
                    if let Some(station) = stations.iter().find(|station| station.flights.holds(&request)) {
                        station.resume(&request, attempt, told);
                    }
                }
                Order::Told(Feedback::Superseded { request, attempt }) => {
                    stations.iter().for_each(|station| station.superseded(&request, attempt));
                }
                Order::Told(Feedback::Heard(request)) => {
                    stations.iter().for_each(|station| station.flights.heard(&request));
                }
                Order::EdgeLost(edge) => stations.iter().for_each(|station| station.edge_lost(&edge)),
            }
        }
    }
}

/// Finds requests whose workers or deadlines are gone.
pub async fn sweep_claims(
    models: Arc<[ModelId]>,
    queue: Queue,
    cashier: Cashier,
    metrics: Arc<Metrics>,
    period: Duration,
) {
    loop {
        sleep(spread(period)).await;
        for model in models.iter() {
            match queue.expired(model).await {
                Ok(expired) => expired.into_iter().for_each(|expired| cashier.bury(expired)),
                Err(error) => tracing::warn!(%model, %error, "cannot sweep claims"),
            }
            if let Ok(depth) = queue.depth(model).await {
                metrics.queue_depth.with_label_values(&[model.as_str()]).set(i64::try_from(depth).unwrap_or(i64::MAX));
            }
        }
    }
}

/// Finds holds of dead edges, and checks the accounts.
pub async fn sweep_holds(ledger: Ledger, metrics: Arc<Metrics>, period: Duration) {
    for round in 0u64.. {
        sleep(spread(period)).await;
        match ledger.sweep_expired_holds().await {
            Ok(0) => {}
            Ok(holds) => {
                tracing::warn!(holds, "released holds that nobody renewed");
                metrics.expired_holds.inc_by(holds as u64);
            }
            Err(error) => tracing::warn!(%error, "cannot sweep holds"),
        }
        if round % ROUNDS_PER_AUDIT == 0 {
            match ledger.imbalance().await {
                Ok((imbalance, unreadable)) => {
                    metrics.ledger_imbalance_nano_usd.set(imbalance.nano());
                    metrics.ledger_unreadable_accounts.set(i64::try_from(unreadable).unwrap_or(i64::MAX));
                }
                Err(error) => tracing::error!(%error, "cannot check the accounts"),
            }
        }
    }
}

/// Nodes spread over a period, so that they do not all sweep at once.
fn spread(period: Duration) -> Duration {
    period.mul_f64(rand::random_range(0.75..1.25))
}

/// Waits until nothing is in the air; `false` when that took too long.
pub async fn landed(station: &Station, limit: Duration) -> bool {
    let all = async {
        loop {
            let changed = station.flights.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if station.flights.count().0 == 0 {
                return;
            }
            changed.await;
        }
    };
    timeout(limit, all).await.is_ok()
}
