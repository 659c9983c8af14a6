//! The node's card in the directory: what it is, what its models have to do, how its actors are.

use std::sync::Arc;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::station::{PoolStatus, Station};
use crate::{
    directory::{ActorState, Board, Directory, ModelCard, NodeCard, NodeState},
    queue::ReplyHub,
    store::StoreError,
};

/// What a card is made of.
#[derive(Clone)]
pub struct Announcer {
    pub directory: Directory,
    /// What does not change of it.
    pub card: Arc<NodeCard>,
    /// Where the node has clients.
    pub hub: Option<ReplyHub>,
    pub board: Arc<Board>,
    pub stations: Arc<[Arc<Station>]>,
    /// Cancelled once the node takes on nothing more.
    pub claiming: CancellationToken,
}

impl Announcer {
    /// Does so for ever, three times a lease.
    pub async fn go_on(self) {
        let mut timer = interval(self.directory.lease() / 3);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut away = false;
        loop {
            tokio::select! {
                _ = timer.tick() => {}
                // Told at once, so that nobody counts on it.
                () = self.claiming.cancelled(), if !self.claiming.is_cancelled() => {}
            }
            match self.announce().await {
                Ok(()) => away = false,
                Err(error) if !std::mem::replace(&mut away, true) => {
                    tracing::warn!(%error, "cannot announce this node; trying again");
                }
                Err(_) => {}
            }
        }
    }

    pub async fn announce(&self) -> Result<(), StoreError> {
        self.directory.announce(&self.card()).await
    }

    /// In order, so that it is not taken for lost.
    pub async fn leave(&self) {
        if let Err(error) = self.directory.leave(&self.card.node).await {
            tracing::debug!(%error, "this node could not say that it leaves");
        }
    }

    fn card(&self) -> NodeCard {
        let models: Vec<_> = self.stations.iter().map(|station| of_model(station)).collect();
        let is_whole = models.iter().all(|model| model.state == ActorState::Ready);
        let state = match (self.claiming.is_cancelled(), is_whole) {
            (true, _) => NodeState::Draining,
            (false, true) => NodeState::Ready,
            (false, false) => NodeState::Degraded,
        };
        let open_streams = self.hub.as_ref().map_or(0, ReplyHub::open_count);
        NodeCard { state, open_streams, models, actors: self.board.cards(), ..NodeCard::clone(&self.card) }
    }
}

fn of_model(station: &Station) -> ModelCard {
    let load = station.load().unwrap_or_default();
    ModelCard {
        model: station.model.clone(),
        state: match &*station.status.borrow() {
            PoolStatus::Loading => ActorState::Starting,
            PoolStatus::Ready => ActorState::Ready,
            PoolStatus::Stalled => ActorState::Stalled,
            PoolStatus::Restarting(_) => ActorState::Restarting,
            PoolStatus::Unavailable(_) => ActorState::Unavailable,
        },
        device: station.device.clone(),
        sequences_max: station.sequences_max,
        claimed: station.flights.count().1,
        running: load.running,
        waiting: load.waiting,
        kv_blocks_used: load.kv_blocks_used,
        kv_blocks_total: load.kv_blocks_total,
    }
}
