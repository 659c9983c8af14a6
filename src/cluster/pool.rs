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
    duty::{Duties, DutySpec},
    restart::{RestartPolicy, Restarts},
    station::{PoolStatus, Station},
    worker::{Loader, Worker, WorkerArguments, WorkerMessage},
};
use crate::{
    directory::{self, ActorState, Board},
    engine::EngineHandle,
    telemetry::Metrics,
};

pub struct Pool;

#[derive(Clone)]
pub struct PoolArguments {
    pub station: Arc<Station>,
    pub loader: Loader,
    pub policy: RestartPolicy,
    /// A worker that has work and makes no step for this long is frozen.
    pub stall_max: Duration,
    pub metrics: Arc<Metrics>,
    pub duties: Vec<DutySpec>,
    pub board: Arc<Board>,
    /// Its place on it.
    pub place: String,
    pub actor: Arc<directory::Actor>,
    /// Above all generations that an earlier incarnation of this actor used.
    pub generation: u64,
}

pub enum PoolMessage {
    WorkerReady(u64, EngineHandle),
    Start,
    StartDuty(usize),
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
    worker_actor: Arc<directory::Actor>,
    duties: Duties,
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
        let PoolArguments { board, place, station, .. } = &arguments;
        let duties = Duties::new(arguments.duties.clone(), board, place, arguments.policy);
        for index in 0..duties.len() {
            myself.cast(PoolMessage::StartDuty(index))?;
        }
        let worker_actor = board.with_mailbox(&format!("{place}/worker"), Some(Arc::clone(&station.mailbox)));
        arguments.actor.is(ActorState::Ready);
        let progress = (0, Instant::now());
        Ok(PoolState { arguments, restarts, generation, worker: None, worker_actor, duties, progress })
    }

    async fn handle(
        &self,
        myself: ActorRef<PoolMessage>,
        message: PoolMessage,
        state: &mut PoolState,
    ) -> Result<(), ActorProcessingErr> {
        state.arguments.actor.beat();
        match message {
            PoolMessage::Start => state.start(myself).await?,
            PoolMessage::StartDuty(index) => state.duties.start(index, myself.get_cell()).await?,
            PoolMessage::WorkerReady(generation, engine) => {
                if let Some(worker) = state.worker.clone().filter(|_| generation == state.generation) {
                    tracing::info!(model = %state.arguments.station.model, generation, "a worker is ready");
                    state.progress = (engine.load().steps, Instant::now());
                    state.worker_actor.is(ActorState::Ready);
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
            SupervisionEvent::ActorTerminated(who, ..) if state.duties.ended(who.get_id()) => return Ok(()),
            SupervisionEvent::ActorTerminated(who, _, reason) => {
                (who, reason.unwrap_or_else(|| "it ended without being asked to".into()))
            }
            _ => return Ok(()),
        };
        if let Some((index, after)) = state.duties.failed(who.get_id(), &why) {
            myself.send_after(after, move || PoolMessage::StartDuty(index));
            return Ok(());
        }
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
        self.worker_actor.is(ActorState::Starting);
        self.arguments.station.mailbox.clear();
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
        self.worker_actor.failed(why, verdict.available);
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
            self.worker_actor.is(ActorState::Ready);
            station.status.send_if_modified(|status| {
                let goes_on = *status == PoolStatus::Stalled;
                if goes_on {
                    *status = PoolStatus::Ready;
                }
                goes_on
            });
            return;
        }
        if self.progress.1.elapsed() > self.arguments.stall_max / 2 {
            station.status.send_if_modified(|status| {
                let stalls = *status == PoolStatus::Ready;
                if stalls {
                    tracing::warn!(model = %station.model, "a worker has work and makes no step");
                    *status = PoolStatus::Stalled;
                }
                stalls
            });
            self.worker_actor.is_not_getting_on();
        }
        if self.progress.1.elapsed() > self.arguments.stall_max
            && let Some(worker) = self.worker.take()
        {
            worker.kill();
            self.worker_lost(myself, "it has work and makes no step");
        }
    }
}
