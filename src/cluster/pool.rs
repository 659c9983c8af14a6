//! The actor that supervises one model's worker.
//!
//! Promises that a worker that fails, panics or freezes is replaced, with backoff and within a budget, and
//! that others go on with its requests at once, its successor among them. Never loads a model itself and never sees a token.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};

use super::{
    restart::{RestartPolicy, Restarts},
    station::{PoolStatus, Station},
    worker::{Loader, Worker, WorkerArguments, WorkerMessage},
};
use crate::{engine::EngineHandle, telemetry::Metrics};

pub struct Pool;

#[derive(Clone)]
pub struct PoolArguments {
    pub station: Arc<Station>,
    pub loader: Loader,
    pub policy: RestartPolicy,
    /// A worker that has work and makes no step for this long is frozen.
    pub stall_max: Duration,
    pub metrics: Arc<Metrics>,
    /// Above all generations that an earlier incarnation of this actor used.
    pub generation: u64,
}

pub enum PoolMessage {
    WorkerReady(u64, EngineHandle),
    Start,
    CheckProgress,
    #[cfg(test)]
    Worker(WorkerMessage),
    #[cfg(test)]
    Panic,
}

pub struct PoolState {
    arguments: PoolArguments,
    restarts: Restarts,
    generation: u64,
    worker: Option<ActorRef<WorkerMessage>>,
    /// The step last seen, and when it was new.
    progress: (u64, Instant),
}

impl Actor for Pool {
    type Msg = PoolMessage;
    type State = PoolState;
    type Arguments = PoolArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<PoolMessage>,
        arguments: PoolArguments,
    ) -> Result<PoolState, ActorProcessingErr> {
        myself.cast(PoolMessage::Start)?;
        let period = (arguments.stall_max / 8).clamp(Duration::from_millis(10), Duration::from_secs(1));
        myself.send_interval(period, || PoolMessage::CheckProgress);
        let (restarts, generation) = (Restarts::new(arguments.policy), arguments.generation);
        Ok(PoolState { arguments, restarts, generation, worker: None, progress: (0, Instant::now()) })
    }

    async fn handle(
        &self,
        myself: ActorRef<PoolMessage>,
        message: PoolMessage,
        state: &mut PoolState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            PoolMessage::Start => state.start(myself).await?,
            PoolMessage::WorkerReady(generation, engine) => {
                if let Some(worker) = state.worker.clone().filter(|_| generation == state.generation) {
                    tracing::info!(model = %state.arguments.station.model, generation, "a worker is ready");
                    state.progress = (engine.load().steps, Instant::now());
                    state.arguments.station.open(generation, engine, worker);
                }
            }
            PoolMessage::CheckProgress => state.check_progress(myself),
            #[cfg(test)]
            PoolMessage::Worker(message) => state.worker.as_ref().ok_or("no worker")?.cast(message)?,
            #[cfg(test)]
            PoolMessage::Panic => panic!("told to panic"),
        }
        Ok(())
    }

    /// The default handler would end this actor with its child.
    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<PoolMessage>,
        event: SupervisionEvent,
        state: &mut PoolState,
    ) -> Result<(), ActorProcessingErr> {
        let (who, why) = match event {
            SupervisionEvent::ActorFailed(who, error) => (who, error.to_string()),
            SupervisionEvent::ActorTerminated(who, _, reason) => {
                (who, reason.unwrap_or_else(|| "it ended without being asked to".into()))
            }
            _ => return Ok(()),
        };
        // A worker that was replaced for being frozen has been dealt with.
        if state.worker.as_ref().is_some_and(|worker| worker.get_id() == who.get_id()) {
            state.worker_lost(myself, &why);
        }
        Ok(())
    }
}

impl PoolState {
    async fn start(&mut self, myself: ActorRef<PoolMessage>) -> Result<(), ActorProcessingErr> {
        if self.worker.is_some() {
            return Ok(());
        }
        self.generation += 1;
        let arguments = WorkerArguments {
            station: Arc::clone(&self.arguments.station),
            loader: Arc::clone(&self.arguments.loader),
            generation: self.generation,
            pool: myself.clone(),
        };
        let (worker, _) = Actor::spawn_linked(None, Worker, arguments, myself.get_cell()).await?;
        self.worker = Some(worker);
        Ok(())
    }

    fn worker_lost(&mut self, myself: ActorRef<PoolMessage>, why: &str) {
        let PoolArguments { station, metrics, .. } = &self.arguments;
        self.worker = None;
        station.retire(self.generation);
        metrics.worker_restarts.with_label_values(&[station.model.as_str()]).inc();
        let verdict = self.restarts.failed(Instant::now(), rand::random_range(0..=1000));
        tracing::error!(model = %station.model, why, after = ?verdict.after, available = verdict.available,
            "a worker was lost; starting another");
        station.status.send_replace(match verdict.available {
            true => PoolStatus::Restarting(why.to_owned()),
            false => PoolStatus::Unavailable(why.to_owned()),
        });
        myself.send_after(verdict.after, || PoolMessage::Start);
    }

    fn check_progress(&mut self, myself: ActorRef<PoolMessage>) {
        let station = &self.arguments.station;
        let Some((_, steps)) = station.steps().filter(|(generation, _)| *generation == self.generation) else {
            return;
        };
        if steps != self.progress.0 || station.flights.working() == 0 {
            self.progress = (steps, Instant::now());
            return;
        }
        if self.progress.1.elapsed() > self.arguments.stall_max
            && let Some(worker) = self.worker.take()
        {
            worker.kill();
            self.worker_lost(myself, "it has work and makes no step");
        }
    }
}
