//! What a node without an edge tells those who look after it: whether it is alive, ready, and what it has done.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use actix_web::{
    App, HttpResponse, HttpServer,
    dev::ServerHandle,
    rt::System,
    web::{self, Data},
};

use super::{
    server::EdgeError,
    state::Readiness,
    status::{healthz, readiness},
};
use crate::telemetry::Metrics;

/// Whoever asks more often at once waits.
const CONNECTIONS_MAX: usize = 64;

/// A running server.
pub struct WatchHandle {
    pub address: SocketAddr,
    watched: Data<Watched>,
    server: ServerHandle,
    thread: JoinHandle<()>,
}

struct Watched {
    readiness: Readiness,
    metrics: Arc<Metrics>,
    is_draining: AtomicBool,
}

/// Serves `/healthz`, `/readyz` and `/metrics` on `listener`, on a thread of its own. Blocks until it does.
pub fn watch(listener: TcpListener, readiness: Readiness, metrics: Arc<Metrics>) -> Result<WatchHandle, EdgeError> {
    let address = listener.local_addr().map_err(EdgeError::Listener)?;
    let watched = Data::new(Watched { readiness, metrics, is_draining: AtomicBool::new(false) });
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let data = watched.clone();
    let serve = move || {
        System::new().block_on(async move {
            let server = HttpServer::new(move || {
                App::new()
                    .app_data(data.clone())
                    .route("/healthz", web::get().to(healthz))
                    .route("/readyz", web::get().to(readyz))
                    .route("/metrics", web::get().to(metrics_of))
            });
            match server.workers(1).max_connections(CONNECTIONS_MAX).disable_signals().listen(listener) {
                Ok(server) => {
                    let server = server.run();
                    let _ = ready.send(Ok(server.handle()));
                    if let Err(error) = server.await {
                        tracing::error!(%error, "the status server failed");
                    }
                }
                Err(error) => drop(ready.send(Err(EdgeError::Listener(error)))),
            }
        });
    };
    let thread = std::thread::Builder::new().name("watch".into()).spawn(serve).map_err(EdgeError::Thread)?;
    let server = started.recv().map_err(|_| EdgeError::Gone)??;
    Ok(WatchHandle { address, watched, server, thread })
}

impl WatchHandle {
    /// From now on `/readyz` says that the node goes away.
    pub fn drain(&self) {
        self.watched.is_draining.store(true, Relaxed);
    }

    pub async fn stop(self) {
        self.server.stop(false).await;
        let thread = self.thread;
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
}

async fn readyz(watched: Data<Watched>) -> HttpResponse {
    let mut reasons = Vec::new();
    if watched.is_draining.load(Relaxed) {
        reasons.push("draining".to_owned());
    }
    reasons.extend((watched.readiness)().await);
    readiness(reasons)
}

async fn metrics_of(watched: Data<Watched>) -> HttpResponse {
    super::status::rendered(&watched.metrics)
}
