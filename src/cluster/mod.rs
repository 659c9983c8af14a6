//! The worker's side of a node: a supervision tree that claims requests and runs them.
//!
//! `root → pool (one a model) → worker (one engine), claimer, renewer`; and `root` → what a node does beside them: the
//! courier (what edges want), the reconcilers of claims and holds, the recoverer of journals, the confirmer, the verifier,
//! the archiver, the directory. Promises that every claimed request ends here or is left to
//! others, who go on with it, that a worker that panics, freezes or fails is replaced with backoff, and
//! that claims are made only for what there is room for. Tokens never pass through a mailbox: the engine's
//! steps are pumped straight to the [`Outlet`]. Never speaks HTTP and never prices anything.

mod announce;
mod cashier;
mod confirm;
mod duties;
mod duty;
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
    directory::{Board, Directory, NodeCard},
    domain::{FailureCode, ModelId, NodeId},
    grammar::Grammars,
    journal::Journal,
    ledger::Ledger,
    queue::{Orders, Outlet, Queue, ReplyHub},
    telemetry::Metrics,
};
use announce::Announcer;
use cashier::Cashier;
use duty::DutySpec;
use pool::PoolArguments;
use root::{ROOT, Root, RootArguments, RootMessage};
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
    pub directory: Directory,
    /// What this node says of itself, but for its load, its models and its actors.
    pub card: NodeCard,
    /// Where this node has clients.
    pub hub: Option<ReplyHub>,
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
    /// What it runs on, for people.
    pub device: String,
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
    announcer: Announcer,
    claimers: TaskTracker,
    tasks: TaskTracker,
    claiming: CancellationToken,
    working: CancellationToken,
}

impl Cluster {
    /// Starts the tree and its duties; models load in the background.
    pub async fn start(context: ClusterContext, pools: Vec<PoolSpec>) -> Result<Self, ClusterError> {
        let ClusterContext { node, queue, ledger, outlet, orders, journal, journals, .. } = context;
        let ClusterContext { metrics, claim_lease, sweep, upkeep, models, directory, card, hub, .. } = context;
        let board = Arc::new(Board::default());
        let cashier = Cashier::new(
            queue.clone(),
            ledger.clone(),
            outlet.clone(),
            journal.clone(),
            Arc::clone(&metrics),
            claim_lease,
        );
        let (claimers, tasks) = (TaskTracker::new(), TaskTracker::new());
        let (claiming, working) = (CancellationToken::new(), CancellationToken::new());
        let mut stations = Vec::new();
        let mut arguments = Vec::new();
        for spec in pools {
            let journal = journal.clone().ok_or(ClusterError::NoJournal)?;
            let station = Station::new(node.clone(), &spec, cashier.clone(), journal, outlet.clone());
            let station = Arc::new(station);
            stations.push(Arc::clone(&station));
            let (of, by, with, stop) = (Arc::clone(&station), queue.clone(), Arc::clone(&metrics), claiming.clone());
            let claim = move || duties::claim(Arc::clone(&of), by.clone(), Arc::clone(&with), stop.clone());
            let (of, by, with) = (Arc::clone(&station), queue.clone(), ledger.clone());
            let renew = move || duties::renew(Arc::clone(&of), by.clone(), with.clone(), claim_lease);
            let duties = vec![
                DutySpec::new("claimer", &working, &claimers, claim),
                DutySpec::new("renewer", &working, &tasks, renew),
            ];
            let (metrics, board) = (Arc::clone(&metrics), Arc::clone(&board));
            let PoolSpec { model, stall_max, policy, loader, .. } = spec;
            let place = format!("{ROOT}/{model}");
            let actor = board.actor(&place);
            arguments.push(PoolArguments {
                station,
                loader,
                policy,
                stall_max,
                metrics,
                duties,
                board,
                place,
                actor,
                generation: 0,
            });
        }
        let stations: Arc<[_]> = stations.into();
        let mut more = Vec::new();
        let (of, orders) = (Arc::clone(&stations), Arc::new(tokio::sync::Mutex::new(orders)));
        more.push(DutySpec::new("courier", &working, &tasks, move || {
            duties::obey(Arc::clone(&of), Arc::clone(&orders))
        }));
        if let Some(pass) = upkeep.verify {
            let (of, by, with) = (ledger.clone(), node.clone(), Arc::clone(&metrics));
            let verify = move || reconcile::verify(of.clone(), by.clone(), Arc::clone(&with), pass);
            more.push(DutySpec::new("verifier", &working, &tasks, verify));
        }
        if let Some(plan) = upkeep.archive {
            let of = ledger.clone();
            let archive = move || reconcile::archive(of.clone(), plan.clone());
            more.push(DutySpec::new("archiver", &working, &tasks, archive));
        }
        if let Some(journal) = journal {
            let (of, with) = (ledger.clone(), Arc::clone(&metrics));
            let rests = move || reconcile::rests(of.clone(), Arc::clone(&journal), Arc::clone(&with));
            more.push(DutySpec::new("journal-checker", &working, &tasks, rests));
        }
        let (of, with) = (ledger.clone(), Arc::clone(&metrics));
        let sweep_holds = move || duties::sweep_holds(of.clone(), Arc::clone(&with), sweep);
        more.push(DutySpec::new("hold-reconciler", &working, &tasks, sweep_holds));
        let often = (claim_lease / SWEEPS_PER_LEASE).min(sweep);
        let (models, by, with, of): (Arc<[_]>, _, _, _) =
            (models.into(), cashier.clone(), Arc::clone(&metrics), queue.clone());
        let sweep_claims =
            move || duties::sweep_claims(Arc::clone(&models), of.clone(), by.clone(), Arc::clone(&with), often);
        more.push(DutySpec::new("claim-reconciler", &working, &tasks, sweep_claims));
        if let Some(confirmations) = cashier.confirmations() {
            let confirm = move || {
                let confirmations = Arc::clone(&confirmations);
                async move { confirmations.go_on().await }
            };
            more.push(DutySpec::new("confirmer", &working, &tasks, confirm));
            let recovering = (queue, ledger, Arc::clone(&metrics));
            let recover = move || recovery::go_on(recovering.clone(), journals.clone());
            more.push(DutySpec::new("recoverer", &working, &tasks, recover));
        }
        let announcer = Announcer {
            directory,
            card: Arc::new(card),
            hub,
            board: Arc::clone(&board),
            stations: Arc::clone(&stations),
            claiming: claiming.clone(),
        };
        let of = announcer.clone();
        more.push(DutySpec::new("directory", &working, &tasks, move || of.clone().go_on()));
        let arguments = RootArguments { pools: arguments, duties: more, board: Arc::clone(&board) };
        let (root, _) = Actor::spawn(None, Root, arguments).await?;
        Ok(Self { stations, root, cashier, outlet, announcer, claimers, tasks, claiming, working })
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
        self.announcer.leave().await;
        self.outlet.close(CLOSE_MAX).await;
    }
}

/// A lost worker's requests are found that soon after its lease ran out.
const SWEEPS_PER_LEASE: u32 = 4;
/// Settlements of requests that ended just before the drain's end.
const SETTLE_MAX: Duration = Duration::from_secs(5);
const STOP_MAX: Duration = Duration::from_secs(2);
const CLOSE_MAX: Duration = Duration::from_secs(2);
