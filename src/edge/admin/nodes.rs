use actix_web::HttpResponse;
use serde::Serialize;

use super::{Desk, Few, answer, faults};
use crate::{
    directory::{ActorCard, Listed},
    domain::NodeId,
    edge::error::ApiError,
};

/// Every node of the cluster, those that were lost lately among them.
pub async fn list_nodes(desk: Desk) -> Result<HttpResponse, ApiError> {
    let mut nodes = listed(&desk).await?;
    nodes.iter_mut().for_each(|node| node.card.actors.clear());
    Ok(answer(&Few::of(nodes, "node")))
}

/// An actor, and where it is.
#[derive(Serialize)]
struct WireActor {
    node: NodeId,
    host: String,
    #[serde(flatten)]
    actor: ActorCard,
}

/// Every actor of every node, as its node last said.
pub async fn list_actors(desk: Desk) -> Result<HttpResponse, ApiError> {
    let actors = listed(&desk).await?.into_iter().flat_map(|Listed { card, .. }| {
        let (node, host) = (card.node, card.host);
        card.actors.into_iter().map(move |actor| WireActor { node: node.clone(), host: host.clone(), actor })
    });
    Ok(answer(&Few::of(actors, "actor")))
}

async fn listed(desk: &Desk) -> Result<Vec<Listed>, ApiError> {
    desk.state.directory.list().await.map_err(|error| faults::of_look(error.into()))
}
