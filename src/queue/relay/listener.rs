//! The edge's end: takes connections of workers and feeds the hub.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures::{SinkExt, StreamExt};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Pace, RelayError, Secret,
    wire::{ToEdge, ToWorker, Wire, decode, encode, greet, say, within},
};
use crate::queue::reply::{Feedbacks, ReplyHub, WorkerLink};

/// Workers beyond this many wait in the listen backlog.
const CONNECTIONS_MAX: usize = 1024;

pub struct RelayListener {
    listener: TcpListener,
    address: SocketAddr,
}

impl RelayListener {
    pub async fn bind(address: SocketAddr) -> Result<Self, RelayError> {
        let bind = |source| RelayError::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        Ok(Self { listener, address })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves workers until `stop`; every connection's task is tracked by `tasks`.
    pub async fn serve(self, hub: ReplyHub, secret: Secret, pace: Pace, stop: CancellationToken, tasks: TaskTracker) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let place = tokio::select! {
                place = Arc::clone(&places).acquire_owned() => place.expect("never closed"),
                () = stop.cancelled() => return,
            };
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = stop.cancelled() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a worker's connection");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (hub, secret, stop) = (hub.clone(), secret.clone(), stop.clone());
            tasks.spawn(async move {
                let _place = place;
                tokio::select! {
                    result = connection(stream, &hub, &secret, pace) => {
                        if let Err(error) = result {
                            tracing::warn!(%peer, %error, "a worker's connection ended");
                        }
                    }
                    () = stop.cancelled() => {}
                }
            });
        }
    }
}

async fn connection(stream: TcpStream, hub: &ReplyHub, secret: &Secret, pace: Pace) -> Result<(), RelayError> {
    let (wire, worker) = greet(stream, hub.node(), secret, pace).await?;
    tracing::info!(%worker, "a worker connected");
    let (link, feedbacks) = WorkerLink::new();
    let _lost = LinkGuard { hub, link: &link };
    pump(wire, hub, &link, feedbacks, pace).await
}

/// However the connection ends, its streams must not wait for it.
struct LinkGuard<'a> {
    hub: &'a ReplyHub,
    link: &'a WorkerLink,
}

impl Drop for LinkGuard<'_> {
    fn drop(&mut self) {
        self.hub.link_lost(self.link);
    }
}

async fn pump(
    wire: Wire,
    hub: &ReplyHub,
    link: &WorkerLink,
    mut feedbacks: Feedbacks,
    pace: Pace,
) -> Result<(), RelayError> {
    let (mut sink, mut source) = wire.split();
    let mut alive = interval(pace.alive);
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            frame = source.next() => {
                heard = Instant::now();
                match frame {
                    None => return Err(RelayError::Closed),
                    Some(frame) => match decode(&frame?)? {
                        ToEdge::Events(events) => {
                            for feedback in hub.deliver(events, link) {
                                link.tell(feedback);
                            }
                        }
                        ToEdge::Alive => {}
                    },
                }
            }
            feedback = feedbacks.next() => {
                for frame in say(feedback)? {
                    let frame = encode(&frame)?;
                    within(pace.silence_max, async { Ok(sink.send(frame).await?) }).await?;
                }
            }
            _ = alive.tick() => {
                if heard.elapsed() > pace.silence_max {
                    return Err(RelayError::Silent);
                }
                let frame = encode(&ToWorker::Alive)?;
                within(pace.silence_max, async { Ok(sink.send(frame).await?) }).await?;
            }
        }
    }
}
