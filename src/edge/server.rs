//! The HTTP server: routes, what every answer carries, start and drain.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use actix_cors::Cors;
use actix_web::{
    App, Error, HttpMessage, HttpRequest, HttpResponse, HttpServer, ResponseError,
    body::{BoxBody, MessageBody},
    dev::{ServerHandle, ServiceRequest, ServiceResponse},
    http::header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue},
    middleware::{Compress, Next, from_fn},
    rt::System,
    web,
};
use tokio::{sync::oneshot, time::timeout};
use uuid::Uuid;

use super::{
    auth, cancel,
    error::ApiError,
    openapi::Document,
    operations, orphans, rates,
    state::{EdgeSpec, EdgeState},
};
use crate::{
    admission::Rates,
    domain::{FailureCode, RequestId},
};

/// The head of a request must arrive within this time.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// An idle connection is kept for the next request for this long.
const IDLE_TIME_MAX: Duration = Duration::from_secs(75);
/// After the streams have ended, how long connections may take to go.
const CLOSE_SECONDS_MAX: u64 = 1;
/// What was taken on behind the connections: holds given back, answers kept.
const TASKS_TIME_MAX: Duration = Duration::from_secs(3);
const BACKLOG: u32 = 1024;
/// How long a browser may remember what it was allowed.
const CORS_SECONDS: usize = 3600;

#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    #[error("the HTTP server cannot use its listener: {0}")]
    Listener(#[source] std::io::Error),
    #[error("the HTTP thread could not be started: {0}")]
    Thread(#[source] std::io::Error),
    #[error("the HTTP thread ended before it was ready")]
    Gone,
}

/// A running edge.
pub struct EdgeHandle {
    pub address: SocketAddr,
    state: Arc<EdgeState>,
    server: ServerHandle,
    thread: JoinHandle<()>,
}

/// Starts the edge on `listener`, in an actix system on a thread of its own. Blocks until it serves.
pub fn spawn(spec: EdgeSpec, listener: TcpListener) -> Result<EdgeHandle, EdgeError> {
    let address = listener.local_addr().map_err(EdgeError::Listener)?;
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name("edge".into())
        .spawn(move || {
            System::new().block_on(async move {
                let state = Arc::new(EdgeState::start(spec));
                let server = match bind(Arc::clone(&state), listener) {
                    Ok(server) => server,
                    Err(error) => {
                        let _ = ready.send(Err(EdgeError::Listener(error)));
                        return;
                    }
                };
                let (stop, stopped) = oneshot::channel::<()>();
                let renewing = Arc::clone(&state);
                // On the shared runtime, for no HTTP work may delay a renewal.
                let renewal = state.runtime.spawn(async move {
                    tokio::select! {
                        () = renewing.renew_holds() => {}
                        () = cancel::obey(Arc::clone(&renewing)) => {}
                        () = orphans::pass_on(Arc::clone(&renewing)) => {}
                        () = orphans::publish_again(Arc::clone(&renewing)) => {}
                        () = auth::learn_blocks(&renewing) => {}
                        _ = stopped => {}
                    }
                });
                let _ = ready.send(Ok((state, server.handle())));
                if let Err(error) = server.await {
                    tracing::error!(%error, "the HTTP server failed");
                }
                drop(stop);
                let _ = renewal.await;
            });
        })
        .map_err(EdgeError::Thread)?;
    let (state, server) = started.recv().map_err(|_| EdgeError::Gone)??;
    Ok(EdgeHandle { address, state, server, thread })
}

impl EdgeHandle {
    /// Requests that wait for their answer or are being answered.
    pub fn open_requests(&self) -> usize {
        self.state.open_count()
    }

    /// From now on new requests are refused and `/readyz` says so; those under way go on.
    pub fn drain(&self) {
        self.state.drain();
    }

    /// Drains for at most `grace`, then ends every stream with an error event, and stops.
    pub async fn stop(self, grace: Duration) {
        self.drain();
        if timeout(grace, self.state.all_closed()).await.is_err() {
            let open = self.state.open_count();
            tracing::warn!(open, "requests did not end within the grace period; failing them");
            self.state.hub.fail_all(FailureCode::Draining, "the node is shutting down");
            let _ = timeout(Duration::from_secs(CLOSE_SECONDS_MAX), self.state.all_closed()).await;
        }
        self.state.tasks.close();
        if timeout(TASKS_TIME_MAX, self.state.tasks.wait()).await.is_err() {
            tracing::warn!("some holds could not be given back in time; they will expire");
        }
        self.server.stop(true).await;
        let thread = self.thread;
        if tokio::task::spawn_blocking(move || thread.join()).await.is_ok_and(|joined| joined.is_err()) {
            tracing::error!("the HTTP thread panicked");
        }
    }
}

fn bind(state: Arc<EdgeState>, listener: TcpListener) -> std::io::Result<actix_web::dev::Server> {
    let threads = state.settings.http_threads.max(1);
    let connections = state.settings.connections_max.div_ceil(threads).max(1);
    let document = Arc::new(Document::of(&state));
    let data = web::Data::from(state);
    let server = HttpServer::new(move || {
        App::new()
            .app_data(data.clone())
            .wrap(from_fn(observe))
            .wrap(Compress::default())
            .wrap(cors(&data.settings.cors_origins))
            .app_data(web::Data::from(Arc::clone(&document)))
            .configure(operations::bind)
            .default_service(web::to(unknown_path))
    })
    .workers(threads)
    .max_connections(connections)
    .backlog(BACKLOG)
    .tcp_nodelay(true)
    .client_request_timeout(HEAD_TIME_MAX)
    .keep_alive(IDLE_TIME_MAX)
    // Otherwise a client that goes away is noticed only when a write to it fails.
    .h1_allow_half_closed(false)
    .shutdown_timeout(CLOSE_SECONDS_MAX)
    .disable_signals()
    .listen(listener)?
    .run();
    Ok(server)
}

/// For browsers. Who calls is told by a key and never by a cookie, so other sites gain nothing by being let in.
fn cors(origins: &[String]) -> Cors {
    let cors = Cors::default()
        .allowed_methods(["GET", "POST", "DELETE", "HEAD"])
        .allow_any_header()
        .expose_any_header()
        .max_age(CORS_SECONDS);
    if origins.iter().any(|origin| origin == "*") {
        return cors.allow_any_origin().send_wildcard();
    }
    origins.iter().fold(cors, |cors, origin| cors.allowed_origin(origin))
}

async fn unknown_path(http: HttpRequest) -> HttpResponse {
    ApiError::unknown_path(http.method().as_str(), http.path()).error_response()
}

/// When a request came, and what it is called.
#[derive(Clone, Copy)]
pub(super) struct Arrival {
    pub at: Instant,
    id: Uuid,
}

impl Arrival {
    pub(super) fn now() -> Self {
        Self { at: Instant::now(), id: Uuid::now_v7() }
    }

    /// The completion's name; `x-request-id` has the same number.
    pub(super) fn request_id(&self) -> RequestId {
        RequestId::from(format!("chatcmpl-{}", self.id.simple()))
    }
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");

const PROBLEM_JSON: &str = "application/problem+json";

/// Whether a client would rather have errors in the form of RFC 9457 (once 7807).
fn wants_problem(request: &ServiceRequest) -> bool {
    let accepted = request.headers().get_all(ACCEPT).filter_map(|value| value.to_str().ok());
    accepted
        .flat_map(|value| value.split(','))
        .any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case(PROBLEM_JSON)))
}

/// Where the tenant stands, if the request was weighed against its limits.
fn rates_of(response: &ServiceResponse<BoxBody>) -> Rates {
    let refused = response.response().extensions().get::<ApiError>().map(ApiError::rates);
    let admitted = response.request().extensions().get::<Rates>().copied();
    admitted.or(refused).unwrap_or_default()
}

/// What every answer carries, whatever it is.
async fn observe<B: MessageBody + 'static>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let arrival = Arrival::now();
    request.extensions_mut().insert(arrival);
    let state = request.app_data::<web::Data<EdgeState>>().cloned();
    let wants_problem = wants_problem(&request);
    let mut response = next.call(request).await?.map_into_boxed_body();
    let id = format!("req_{}", arrival.id.simple());
    let problem = response.response().extensions().get::<ApiError>().filter(|_| wants_problem).cloned();
    if let Some(error) = problem {
        response = response.map_body(|head, _| {
            head.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
            BoxBody::new(error.problem(&id))
        });
    }
    let rates = rates_of(&response);
    let headers = response.response_mut().headers_mut();
    rates::tell(rates, headers);
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, value);
    }
    headers.insert(PROCESSING_MS, HeaderValue::from(arrival.at.elapsed().as_millis() as u64));
    if let Some(state) = state {
        let route = response.request().match_pattern().unwrap_or_else(|| "unmatched".into());
        state.metrics.http_requests.with_label_values(&[route.as_str(), response.status().as_str()]).inc();
        if state.is_draining() {
            response.response_mut().head_mut().set_connection_type(actix_web::http::ConnectionType::Close);
        }
    }
    Ok(response)
}
