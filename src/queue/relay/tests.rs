use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Notify,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::*;
use crate::{
    domain::{EventBody, FailureCode, FinishReason, ModelId, NodeId, RequestId, TokenEvent, Told, ToldChoice, Usage},
    queue::reply::{Feedback, Orphan, ReplyHub, ReplyStream},
    telemetry::Metrics,
};

const SECRET: &str = "a secret of the test's cluster";
const SOON: Duration = Duration::from_secs(10);

fn brisk() -> Pace {
    Pace {
        handshake_max: Duration::from_secs(2),
        alive: Duration::from_millis(100),
        silence_max: Duration::from_millis(500),
    }
}

struct EdgeEnd {
    hub: ReplyHub,
    address: String,
    stop: CancellationToken,
}

impl EdgeEnd {
    async fn start(buffer_events: usize) -> Self {
        let listener = RelayListener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.address().to_string();
        let hub =
            ReplyHub::new(NodeId::from("node_edge"), buffer_events, Some(address.clone()), Arc::new(Metrics::new()));
        let stop = CancellationToken::new();
        tokio::spawn(listener.serve(hub.clone(), Secret::new(SECRET), brisk(), stop.clone(), TaskTracker::new()));
        Self { hub, address, stop }
    }

    fn open(&self, request: &RequestId) -> ReplyStream {
        self.hub.open(request, &ModelId::from("model"))
    }

    /// Requests whose worker was lost, and their attempts.
    async fn orphans(&self) -> Vec<(RequestId, u32)> {
        let orphans = timeout(SOON, self.hub.orphans()).await.expect("a worker is lost");
        orphans.into_iter().map(|Orphan { request, attempt, .. }| (request, attempt)).collect()
    }
}

impl Drop for EdgeEnd {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[derive(Default)]
struct Heard {
    feedback: Mutex<Vec<Feedback>>,
    lost: Mutex<Vec<NodeId>>,
    wake: Notify,
}

impl Heard {
    async fn until<T>(&self, look: impl Fn(&Self) -> Option<T>) -> T {
        timeout(SOON, async {
            loop {
                if let Some(found) = look(self) {
                    return found;
                }
                self.wake.notified().await;
            }
        })
        .await
        .expect("was never heard")
    }
}

impl FeedbackSink for Heard {
    fn heard(&self, feedback: Vec<Feedback>) {
        self.feedback.lock().extend(feedback);
        self.wake.notify_one();
    }

    fn edge_lost(&self, edge: &NodeId) {
        self.lost.lock().push(edge.clone());
        self.wake.notify_one();
    }
}

fn worker(secret: &str) -> (Dialer, Arc<Heard>) {
    let heard = Arc::new(Heard::default());
    (Dialer::new(NodeId::from("node_worker"), Secret::new(secret), brisk(), heard.clone()), heard)
}

/// Of the first attempt.
fn event(request: &RequestId, seq: u32, body: EventBody) -> TokenEvent {
    TokenEvent { request: request.clone(), attempt: 1, seq, body }
}

fn accepted(request: &RequestId) -> TokenEvent {
    event(request, 0, EventBody::Accepted)
}

fn delta(request: &RequestId, seq: u32, text: &str) -> TokenEvent {
    event(request, seq, EventBody::text(text, 1))
}

async fn next(stream: &mut ReplyStream) -> TokenEvent {
    timeout(SOON, stream.next()).await.expect("an event in time").expect("an event")
}

fn is_failed(event: &TokenEvent, wanted: FailureCode) -> bool {
    matches!(event.body, EventBody::Failed { code, .. } if code == wanted)
}

#[tokio::test]
async fn tokens_of_many_streams_cross_one_connection_in_order() {
    let edge = EdgeEnd::start(4096).await;
    let (dialer, _heard) = worker(SECRET);
    let requests: Vec<_> = (0..20).map(|n| RequestId::from(format!("r{n}"))).collect();
    let mut streams: Vec<_> = requests.iter().map(|request| edge.open(request)).collect();
    let node = edge.hub.node().clone();
    dialer.send(&node, &edge.address, requests.iter().map(accepted).collect());
    for seq in 1..200 {
        let step = requests.iter().map(|request| delta(request, seq, "word ")).collect();
        dialer.send(&node, &edge.address, step);
    }
    let last = EventBody::Finished { reason: FinishReason::Stop, usage: Usage::default() };
    dialer.send(&node, &edge.address, requests.iter().map(|r| event(r, 200, last.clone())).collect());
    for stream in &mut streams {
        for seq in 0..=200 {
            assert_eq!(next(stream).await.seq, seq);
        }
        assert!(stream.next().await.is_none());
    }
    dialer.close(SOON).await;
}

#[tokio::test]
async fn events_larger_than_a_frame_together_are_split() {
    let edge = EdgeEnd::start(64).await;
    let (dialer, _heard) = worker(SECRET);
    let request = RequestId::from("long");
    let mut stream = edge.open(&request);
    let text = "x".repeat(100_000);
    let step = (1..30).map(|seq| delta(&request, seq, &text));
    dialer.send(edge.hub.node(), &edge.address, std::iter::once(accepted(&request)).chain(step).collect());
    for seq in 0..30 {
        assert_eq!(next(&mut stream).await.seq, seq);
    }
}

#[tokio::test]
async fn a_client_that_goes_away_is_cancelled_at_the_worker() {
    let edge = EdgeEnd::start(64).await;
    let (dialer, heard) = worker(SECRET);
    let request = RequestId::from("r");
    let mut stream = edge.open(&request);
    dialer.send(edge.hub.node(), &edge.address, vec![accepted(&request)]);
    next(&mut stream).await;
    drop(stream);
    assert_eq!(heard.until(|heard| heard.feedback.lock().pop()).await, Feedback::Cancel(request));
}

#[tokio::test]
async fn a_slow_client_is_cut_and_the_others_go_on() {
    let edge = EdgeEnd::start(4).await;
    let (dialer, heard) = worker(SECRET);
    let (slow, quick) = (RequestId::from("slow"), RequestId::from("quick"));
    let (mut slow_stream, mut quick_stream) = (edge.open(&slow), edge.open(&quick));
    dialer.send(edge.hub.node(), &edge.address, vec![accepted(&slow), accepted(&quick)]);
    next(&mut quick_stream).await;
    for seq in 1..10 {
        dialer.send(edge.hub.node(), &edge.address, vec![delta(&slow, seq, "a"), delta(&quick, seq, "b")]);
        assert_eq!(next(&mut quick_stream).await.seq, seq);
    }
    assert_eq!(heard.until(|heard| heard.feedback.lock().pop()).await, Feedback::Cancel(slow));
    for _ in 0..4 {
        next(&mut slow_stream).await;
    }
    assert!(is_failed(&next(&mut slow_stream).await, FailureCode::SlowConsumer));
}

#[tokio::test]
async fn a_worker_with_the_wrong_secret_is_refused() {
    let edge = EdgeEnd::start(4).await;
    let (dialer, heard) = worker("another secret altogether");
    let request = RequestId::from("r");
    let mut stream = edge.open(&request);
    dialer.send(edge.hub.node(), &edge.address, vec![accepted(&request)]);
    heard.until(|heard| heard.lost.lock().pop()).await;
    assert!(timeout(Duration::from_millis(50), stream.next()).await.is_err(), "nothing was delivered");
}

#[tokio::test]
async fn a_peer_that_is_no_worker_gets_nothing_and_is_closed() {
    let edge = EdgeEnd::start(4).await;
    let mut stranger = TcpStream::connect(&edge.address).await.unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\nhost: edge\r\n\r\n").await.unwrap();
    let mut heard = Vec::new();
    let _ = timeout(SOON, stranger.read_to_end(&mut heard)).await.expect("the edge closes the connection");
    assert!(heard.len() < 128, "only the greeting was sent");
}

#[tokio::test]
async fn a_worker_refuses_an_edge_that_took_the_address_of_a_dead_one() {
    let edge = EdgeEnd::start(4).await;
    let (dialer, heard) = worker(SECRET);
    let former = NodeId::from("node_former");
    dialer.send(&former, &edge.address, vec![event(&RequestId::from("r"), 0, EventBody::Accepted)]);
    assert_eq!(heard.until(|heard| heard.lost.lock().pop()).await, former);
}

#[tokio::test]
async fn a_worker_that_dies_leaves_the_requests_that_it_served_to_others() {
    let edge = EdgeEnd::start(64).await;
    let (dialer, _heard) = worker(SECRET);
    let (request, other) = (RequestId::from("r"), RequestId::from("unclaimed"));
    let (mut stream, _other) = (edge.open(&request), edge.open(&other));
    dialer.send(edge.hub.node(), &edge.address, vec![accepted(&request)]);
    next(&mut stream).await;
    dialer.close(SOON).await;
    assert_eq!(edge.orphans().await, [(request.clone(), 1)]);
    // Another one is told where to go on, however much that is.
    let (dialer, heard) = worker(SECRET);
    let ids: Vec<u32> = (0..300_000).collect();
    let told = Told { prompt_tokens: 0, choices: vec![ToldChoice { ids: ids.clone(), text_bytes: 0, ended: None }] };
    let body = EventBody::Delta { choice: 0, text: String::new(), ids, details: Vec::new() };
    let of = |attempt, seq, body| TokenEvent { request: request.clone(), attempt, seq, body };
    let second = vec![of(2, 0, EventBody::Accepted), of(2, 1, body)];
    dialer.send(edge.hub.node(), &edge.address, second);
    next(&mut stream).await;
    next(&mut stream).await;
    dialer.close(SOON).await;
    assert_eq!(edge.orphans().await, [(request.clone(), 2)]);
    heard.feedback.lock().clear();
    let (dialer, heard) = worker(SECRET);
    dialer.send(edge.hub.node(), &edge.address, vec![of(3, 0, EventBody::Accepted)]);
    let resume = Feedback::Resume { request: request.clone(), attempt: 3, told };
    assert!(heard.until(|heard| heard.feedback.lock().pop()).await == resume);
    assert_eq!(edge.hub.open_requests().len(), 2);
    drop(dialer);
}

#[tokio::test]
async fn an_edge_that_dies_is_reported_lost_and_a_later_send_dials_again() {
    let edge = EdgeEnd::start(64).await;
    let (dialer, heard) = worker(SECRET);
    let request = RequestId::from("r");
    let (node, address) = (edge.hub.node().clone(), edge.address.clone());
    let mut stream = edge.open(&request);
    dialer.send(&node, &address, vec![accepted(&request)]);
    next(&mut stream).await;
    drop(edge);
    assert_eq!(heard.until(|heard| heard.lost.lock().pop()).await, node);
    dialer.send(&node, &address, vec![event(&request, 1, EventBody::Accepted)]);
    assert_eq!(heard.until(|heard| heard.lost.lock().pop()).await, node, "dialled again, in vain");
}

#[tokio::test]
async fn a_worker_that_freezes_is_noticed_by_its_silence() {
    let edge = EdgeEnd::start(64).await;
    let request = RequestId::from("r");
    let mut stream = edge.open(&request);
    // A worker that proves the secret, sends one event and then never again.
    let socket = TcpStream::connect(&edge.address).await.unwrap();
    let me = NodeId::from("node_frozen");
    let mut wire = wire::introduce(socket, &me, edge.hub.node(), &Secret::new(SECRET)).await.unwrap();
    let accepted = wire::ToEdge::Events(vec![accepted(&request)]);
    futures::SinkExt::send(&mut wire, wire::encode(&accepted).unwrap()).await.unwrap();
    next(&mut stream).await;
    assert_eq!(edge.orphans().await, [(request, 1)]);
    drop(wire);
}

#[tokio::test]
async fn a_frame_beyond_the_limit_cuts_the_connection() {
    let edge = EdgeEnd::start(64).await;
    let socket = TcpStream::connect(&edge.address).await.unwrap();
    let me = NodeId::from("node_mad");
    let wire = wire::introduce(socket, &me, edge.hub.node(), &Secret::new(SECRET)).await.unwrap();
    let mut socket = wire.into_inner();
    socket.write_all(&u32::MAX.to_be_bytes()).await.unwrap();
    let _ = timeout(SOON, socket.read_to_end(&mut Vec::new())).await.expect("the edge closes the connection");
}
