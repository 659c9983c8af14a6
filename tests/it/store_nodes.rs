//! Who is in the cluster, as the store has it.

use std::time::Duration;

use lightcone::{
    directory::{Directory, Listed, NodeCard, NodeState},
    domain::NodeId,
};

use crate::support::valkey::Valkey;

pub fn card(node: &str) -> NodeCard {
    NodeCard {
        node: NodeId::from(node),
        host: "host".to_owned(),
        role: "worker".to_owned(),
        version: "1".to_owned(),
        started_unix_ms: 7,
        state: NodeState::Ready,
        http: None,
        relay: Some("127.0.0.1:1".to_owned()),
        open_streams: 3,
        models: Vec::new(),
        actors: Vec::new(),
    }
}

fn names(nodes: &[Listed]) -> Vec<(&str, NodeState)> {
    nodes.iter().map(|node| (node.card.node.as_str(), node.card.state)).collect()
}

#[tokio::test]
async fn a_node_is_there_for_its_lease_then_lost_and_gone_at_once_when_it_leaves() {
    let valkey = Valkey::start();
    let store = valkey.store().await;
    let (long, brief) = (Duration::from_secs(60), Duration::from_millis(20));
    let (lasting, passing) = (Directory::new(store.clone(), long), Directory::new(store.clone(), brief));
    assert_eq!(lasting.list().await.unwrap(), []);
    lasting.announce(&card("b")).await.unwrap();
    passing.announce(&card("c")).await.unwrap();
    let draining = NodeCard { state: NodeState::Draining, ..card("a") };
    lasting.announce(&draining).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let nodes = lasting.list().await.unwrap();
    assert_eq!(names(&nodes), [("a", NodeState::Draining), ("b", NodeState::Ready), ("c", NodeState::Lost)]);
    assert_eq!(nodes[1].card, card("b"));
    assert!(nodes[1].lease_left_ms > 50_000 && nodes[2].lease_left_ms < 0);
    lasting.leave(&NodeId::from("a")).await.unwrap();
    passing.announce(&card("c")).await.unwrap();
    assert_eq!(names(&lasting.list().await.unwrap())[0].0, "b");
    // Lost for so long that nobody looks for it.
    redis::cmd("ZADD").arg("lc:{nodes}:leases").arg(1).arg("c").exec_async(&mut valkey.raw().await).await.unwrap();
    lasting.announce(&card("b")).await.unwrap();
    assert_eq!(names(&lasting.list().await.unwrap()), [("b", NodeState::Ready)]);
}

#[tokio::test]
async fn a_card_that_cannot_be_read_hides_no_other_and_many_are_read_in_pages() {
    let valkey = Valkey::start();
    let directory = Directory::new(valkey.store().await, Duration::from_secs(60));
    let nodes: Vec<String> = (0..600).map(|number| format!("node-{number:04}")).collect();
    for node in &nodes {
        directory.announce(&card(node)).await.unwrap();
    }
    let damage = redis::cmd("HSET").arg("lc:{nodes}:cards").arg("node-0300").arg("{").clone();
    damage.exec_async(&mut valkey.raw().await).await.unwrap();
    let listed = directory.list().await.unwrap();
    let expected = nodes.iter().filter(|node| *node != "node-0300");
    assert!(listed.iter().map(|node| node.card.node.as_str()).eq(expected.map(String::as_str)));
}
