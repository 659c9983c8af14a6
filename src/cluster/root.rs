//! The root of the supervision tree: keeps every pool, and what the node does beside them, alive.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};

use super::{
    duty::{Duties, DutySpec},
    pool::{Pool, PoolArguments, PoolMessage},
    restart::{RestartPolicy, Restarts},
    station::PoolStatus,
};
use crate::directory::{self, ActorState, Board};

pub struct Root;

/// Its place on the board.
pub const ROOT: &str = "root";

pub struct RootArguments {
    pub pools: Vec<PoolArguments>,
    pub duties: Vec<DutySpec>,
    pub board: Arc<Board>,
}

pub enum RootMessage {
    Start(usize),
    StartDuty(usize),
    #[cfg(test)]
    Pool(usize, PoolMessage),
}

pub struct RootState {
    pools: Vec<(PoolArguments, Restarts)>,
    running: HashMap<ActorId, (usize, ActorRef<PoolMessage>)>,
    duties: Duties,
    actor: Arc<directory::Actor>,
}

/// Generations of one pool's incarnation; no worker is restarted this often.
const GENERATIONS: u64 = 1 << 32;

impl Actor for Root {
    type Msg = RootMessage;
    type State = RootState;
    type Arguments = RootArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<RootMessage>,
        RootArguments { pools, duties, board }: RootArguments,
    ) -> Result<RootState, ActorProcessingErr> {
        let duties = Duties::new(duties, &board, ROOT, RestartPolicy::default());
        for index in 0..pools.len() {
            myself.cast(RootMessage::Start(index))?;
        }
        for index in 0..duties.len() {
            myself.cast(RootMessage::StartDuty(index))?;
        }
        let actor = board.actor(ROOT);
        actor.is(ActorState::Ready);
        let pools = pools.into_iter().map(|pool| (Restarts::new(pool.policy), pool)).map(|(r, p)| (p, r)).collect();
        Ok(RootState { pools, running: HashMap::new(), duties, actor })
    }

    async fn handle(
        &self,
        myself: ActorRef<RootMessage>,
        message: RootMessage,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        state.actor.beat();
        match message {
            RootMessage::StartDuty(index) => state.duties.start(index, myself.get_cell()).await?,
            RootMessage::Start(index) => {
                let (arguments, _) = &mut state.pools[index];
                let (pool, _) = Actor::spawn_linked(None, Pool, arguments.clone(), myself.get_cell()).await?;
                arguments.generation += GENERATIONS;
                state.running.insert(pool.get_id(), (index, pool));
            }
            #[cfg(test)]
            RootMessage::Pool(index, message) => {
                let pool = state.running.values().find(|(at, _)| *at == index).ok_or("no such pool")?;
                pool.1.cast(message)?;
            }
        }
        Ok(())
    }

    /// The default handler would end the whole tree with one pool.
    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<RootMessage>,
        event: SupervisionEvent,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        let (who, why) = match event {
            SupervisionEvent::ActorFailed(who, error) => (who, error.to_string()),
            SupervisionEvent::ActorTerminated(who, ..) if state.duties.ended(who.get_id()) => return Ok(()),
            SupervisionEvent::ActorTerminated(who, _, reason) => (who, reason.unwrap_or_default()),
            _ => return Ok(()),
        };
        if let Some((index, after)) = state.duties.failed(who.get_id(), &why) {
            myself.send_after(after, move || RootMessage::StartDuty(index));
            return Ok(());
        }
        let Some((index, _)) = state.running.remove(&who.get_id()) else { return Ok(()) };
        let (arguments, restarts) = &mut state.pools[index];
        // Its worker ended with it.
        arguments.station.retire(arguments.generation);
        let verdict = restarts.failed(Instant::now(), rand::random_range(0..=1000));
        tracing::error!(model = %arguments.station.model, why, after = ?verdict.after, "a pool was lost; starting another");
        arguments.actor.failed(&why, verdict.available);
        arguments.station.status.send_replace(PoolStatus::Restarting(why));
        myself.send_after(verdict.after.max(Duration::from_millis(1)), move || RootMessage::Start(index));
        Ok(())
    }
}
