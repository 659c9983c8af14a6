//! The worker's side of a node: a supervision tree that claims requests and runs them.
//!
//! `root → pool (one a model) → worker (one engine)`. Promises that every claimed request ends here or is left to
//! others, who go on with it, that a worker that panics, freezes or fails is replaced with backoff, and
//! that claims are made only for what there is room for. Tokens never pass through a mailbox: the engine's
//! steps are pumped straight to the [`Outlet`]. Never speaks HTTP and never prices anything.

mod cashier;
mod confirm;
mod duties;
mod flights;
mod pool;
mod reconcile;
mod recovery;
mod restart;
mod root;
mod station;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod worker;

use std::{path::PathBuf, sync::Arc, time::Duration};

use ractor::{Actor, ActorRef};
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use reconcile::{ArchivePlan, Upkeep};
pub use recovery::{Others, Recovered, RecoveryError, settle_left_over};
pub use restart::RestartPolicy;
pub use station::PoolStatus;
pub use worker::Loader;

use crate::{
    domain::{FailureCode, ModelId, NodeId},
    grammar::Grammars,
    journal::Journal,
    ledger::Ledger,
    queue::{Orders, Outlet, Queue},
    telemetry::Metrics,
};
use cashier::Cashier;
use pool::PoolArguments;
use root::{Root, RootMessage};
use station::Station;

/// What every part of the tree works with.
pub struct ClusterContext {
    pub node: NodeId,
    pub queue: Queue,
    pub ledger: Ledger,
    pub outlet: Outlet,
    pub orders: Orders,
    /// Absent where there are no pools.
    pub journal: Option<Arc<Journal>>,
    /// Where processes of this machine have their journals.
    pub journals: PathBuf,
    pub metrics: Arc<Metrics>,
    pub claim_lease: Duration,
    /// How often expired holds of all tenants are looked for; claims of all `models` are more often.
    pub sweep: Duration,
    pub upkeep: Upkeep,
    /// Every model of the cluster, also those that this node does not run.
    pub models: Vec<ModelId>,
}

/// One model that this node runs.
pub struct PoolSpec {
    pub model: ModelId,
    pub sequences_max: usize,
    /// When half of so many tokens are left of those that a request may decode, more are paid for. 0: none ever are.
    pub step_tokens: u32,
    pub stall_max: Duration,
    pub policy: RestartPolicy,
    /// Of the model's vocabulary.
    pub grammars: Arc<Grammars>,
    pub loader: Loader,
}

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("cannot start the supervision tree: {0}")]
    Spawn(#[from] ractor::SpawnErr),
    #[error("a node that runs models needs a journal")]
    NoJournal,
    #[error("model {model}: {why}")]
    Model { model: ModelId, why: String },
}

/// A running tree. An edge has one without pools, for the sweeping.
pub struct Cluster {
    stations: Arc<[Arc<Station>]>,
    root: ActorRef<RootMessage>,
    cashier: Cashier,
    outlet: Outlet,
    claimers: TaskTracker,
    tasks: TaskTracker,
    claiming: CancellationToken,
    working: CancellationToken,
}

impl Cluster {
    /// Starts the tree and its duties; models load in the background.
    pub async fn start(context: ClusterContext, pools: Vec<PoolSpec>) -> Result<Self, ClusterError> {
        let ClusterContext { node, queue, ledger, outlet, orders, journal, journals, .. } = context;
        let ClusterContext { metrics, claim_lease, sweep, upkeep, models, .. } = context;
        let cashier = Cashier::new(
            queue.clone(),
            ledger.clone(),
            outlet.clone(),
            journal.clone(),
            Arc::clone(&metrics),
            claim_lease,
        );
        let mut stations = Vec::new();
        let mut arguments = Vec::new();
        for spec in pools {
            let journal = journal.clone().ok_or(ClusterError::NoJournal)?;
            let station = Station::new(node.clone(), &spec, cashier.clone(), journal, outlet.clone());
            let station = Arc::new(station);
            stations.push(Arc::clone(&station));
            let metrics = Arc::clone(&metrics);
            let PoolSpec { stall_max, policy, loader, .. } = spec;
            arguments.push(PoolArguments { station, loader, policy, stall_max, metrics, generation: 0 });
        }
        let (root, _) = Actor::spawn(None, Root, arguments).await?;
        let (claimers, tasks) = (TaskTracker::new(), TaskTracker::new());
        let (claiming, working) = (CancellationToken::new(), CancellationToken::new());
        let stations: Arc<[_]> = stations.into();
        for station in stations.iter() {
            let (of, by, with) = (Arc::clone(station), queue.clone(), Arc::clone(&metrics));
            let stop = claiming.clone();
            let claim = move || duties::claim(Arc::clone(&of), by.clone(), Arc::clone(&with), stop.clone());
            claimers.spawn(duties::forever("claim", working.clone(), claim));
            let (of, by, with) = (Arc::clone(station), queue.clone(), ledger.clone());
            let renew = move || duties::renew(Arc::clone(&of), by.clone(), with.clone(), claim_lease);
            tasks.spawn(duties::forever("renew", working.clone(), renew));
        }
        let (of, orders) = (Arc::clone(&stations), Arc::new(tokio::sync::Mutex::new(orders)));
        let obey = move || duties::obey(Arc::clone(&of), Arc::clone(&orders));
        tasks.spawn(duties::forever("obey", working.clone(), obey));
        let recovering = (queue.clone(), ledger.clone(), Arc::clone(&metrics));
        let (models, by): (Arc<[_]>, _) = (models.into(), cashier.clone());
        if let Some(pass) = upkeep.verify {
            let (of, by, with) = (ledger.clone(), node.clone(), Arc::clone(&metrics));
            let verify = move || reconcile::verify(of.clone(), by.clone(), Arc::clone(&with), pass);
            tasks.spawn(duties::forever("verify", working.clone(), verify));
        }
        if let Some(plan) = upkeep.archive {
            let of = ledger.clone();
            let archive = move || reconcile::archive(of.clone(), plan.clone());
            tasks.spawn(duties::forever("archive", working.clone(), archive));
        }
        if let Some(journal) = journal {
            let (of, with) = (ledger.clone(), Arc::clone(&metrics));
            let rests = move || reconcile::rests(of.clone(), Arc::clone(&journal), Arc::clone(&with));
            tasks.spawn(duties::forever("rests", working.clone(), rests));
        }
        let (of, with) = (ledger.clone(), Arc::clone(&metrics));
        let sweep_holds = move || duties::sweep_holds(of.clone(), Arc::clone(&with), sweep);
        tasks.spawn(duties::forever("sweep holds", working.clone(), sweep_holds));
        let often = (claim_lease / SWEEPS_PER_LEASE).min(sweep);
        let sweep_claims = move || {
            let (models, metrics) = (Arc::clone(&models), Arc::clone(&metrics));
            duties::sweep_claims(models, queue.clone(), by.clone(), metrics, often)
        };
        tasks.spawn(duties::forever("sweep claims", working.clone(), sweep_claims));
        if let Some(confirmations) = cashier.confirmations() {
            let confirm = move || {
                let confirmations = Arc::clone(&confirmations);
                async move { confirmations.go_on().await }
            };
            tasks.spawn(duties::forever("confirm", working.clone(), confirm));
            let recover = move || recovery::go_on(recovering.clone(), journals.clone());
            tasks.spawn(duties::forever("recover", working.clone(), recover));
        }
        Ok(Self { stations, root, cashier, outlet, claimers, tasks, claiming, working })
    }

    /// Waits until every model has been loaded, or the first one has failed to.
    pub async fn ready(&self) -> Result<(), ClusterError> {
        for station in self.stations.iter() {
            let mut status = station.status.subscribe();
            let first = status.wait_for(|status| *status != PoolStatus::Loading).await;
            let first = first.map_or(PoolStatus::Loading, |status| status.clone());
            if let PoolStatus::Restarting(why) | PoolStatus::Unavailable(why) = first {
                return Err(ClusterError::Model { model: station.model.clone(), why });
            }
        }
        Ok(())
    }

    /// The state of each model's pool, now and later.
    pub fn statuses(&self) -> Vec<(ModelId, watch::Receiver<PoolStatus>)> {
        self.stations.iter().map(|station| (station.model.clone(), station.status.subscribe())).collect()
    }

    /// Claims nothing more, lets what runs end until `deadline`, leaves the rest to other nodes (fails those of the edge
    /// in this process, free of charge), settles, and stops the engines.
    pub async fn drain(self, deadline: Instant) {
        self.claiming.cancel();
        self.claimers.close();
        self.claimers.wait().await;
        for station in self.stations.iter() {
            let left = deadline.saturating_duration_since(Instant::now());
            if !duties::landed(station, left).await {
                let (flying, _) = station.flights.count();
                tracing::warn!(model = %station.model, flying, "requests did not end in time; leaving them to others");
                station.hand_over(|_, edge| *edge != station.node);
                // Those of its own edge have nobody to be told by.
                station.fail(
                    |_, _| true,
                    FailureCode::Draining,
                    "the server is going away; the request was not charged",
                );
            }
        }
        self.cashier.close(SETTLE_MAX).await;
        self.working.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let _ = self.root.stop_and_wait(None, Some(STOP_MAX)).await;
        for station in self.stations.iter() {
            station.retire(u64::MAX);
        }
        self.outlet.close(CLOSE_MAX).await;
    }
}

/// A lost worker's requests are found that soon after its lease ran out.
const SWEEPS_PER_LEASE: u32 = 4;
/// Settlements of requests that ended just before the drain's end.
const SETTLE_MAX: Duration = Duration::from_secs(5);
const STOP_MAX: Duration = Duration::from_secs(2);
const CLOSE_MAX: Duration = Duration::from_secs(2);
