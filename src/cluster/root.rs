//! The root of the supervision tree: keeps every pool alive.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};

use super::{
    pool::{Pool, PoolArguments, PoolMessage},
    restart::Restarts,
    station::PoolStatus,
};

pub struct Root;

pub enum RootMessage {
    Start(usize),
    #[cfg(test)]
    Pool(usize, PoolMessage),
}

pub struct RootState {
    pools: Vec<(PoolArguments, Restarts)>,
    running: HashMap<ActorId, (usize, ActorRef<PoolMessage>)>,
}

/// Generations of one pool's incarnation; no worker is restarted this often.
const GENERATIONS: u64 = 1 << 32;

impl Actor for Root {
    type Msg = RootMessage;
    type State = RootState;
    type Arguments = Vec<PoolArguments>;

    async fn pre_start(
        &self,
        myself: ActorRef<RootMessage>,
        pools: Vec<PoolArguments>,
    ) -> Result<RootState, ActorProcessingErr> {
        for index in 0..pools.len() {
            myself.cast(RootMessage::Start(index))?;
        }
        let pools = pools.into_iter().map(|pool| (Restarts::new(pool.policy), pool)).map(|(r, p)| (p, r)).collect();
        Ok(RootState { pools, running: HashMap::new() })
    }

    async fn handle(
        &self,
        myself: ActorRef<RootMessage>,
        message: RootMessage,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
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
            SupervisionEvent::ActorTerminated(who, _, reason) => (who, reason.unwrap_or_default()),
            _ => return Ok(()),
        };
        let Some((index, _)) = state.running.remove(&who.get_id()) else { return Ok(()) };
        let (arguments, restarts) = &mut state.pools[index];
        // Its worker ended with it.
        arguments.station.retire(arguments.generation);
        let verdict = restarts.failed(Instant::now(), rand::random_range(0..=1000));
        tracing::error!(model = %arguments.station.model, why, after = ?verdict.after, "a pool was lost; starting another");
        arguments.station.status.send_replace(PoolStatus::Restarting(why));
        myself.send_after(verdict.after.max(Duration::from_millis(1)), move || RootMessage::Start(index));
        Ok(())
    }
}
