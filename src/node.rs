//! The composition root: builds the rooms that a role needs, in order, and takes them down in order.
//!
//! Promises that a fault at start is one clear line and leaves nothing running, that a node says it is ready
//! only when it is, and that a drain ends within its time: admission stops, what runs ends or is failed free
//! of charge, money is settled, then everything stops. Never computes and never decides about a request.

mod data_dir;
mod limits;
mod models;
mod wait;

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use futures::FutureExt;
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use data_dir::{DataDir, DataDirError};
pub use models::start_runtime;
pub use wait::shutdown_signal;

use crate::{
    admission::{Admission, Guard, GuardLimits, LimitKind, Limits, Tier, Tiers},
    cluster::{self, ArchivePlan, Cluster, ClusterContext, ClusterError, Others, PoolStatus, RecoveryError, Upkeep},
    config::{self, AppendFsync, Config, PriceFault, Role, ServiceTier},
    directory::{Directory, NodeCard, NodeState},
    domain::{ModelId, NanoUsd, NodeId, Priority},
    edge::{self, EdgeError, EdgeHandle, EdgeSpec, Readiness, ServedModel, WatchHandle},
    engine::EngineError,
    journal::{Journal, JournalError},
    ledger::{Ledger, Prices, RECEIPT_KEY_FILE, ReceiptKeyError, Receipts},
    operator::{Accounts, Bootstrap, OperatorError},
    queue::{
        Outlet, Queue, QueueLimits, ReplyHub,
        relay::{Pace, RelayError, RelayListener, Secret},
    },
    records::{Records, Retention},
    store::{
        Store, StoreError,
        embedded::{EmbeddedError, EmbeddedServer, Fsync},
    },
    telemetry::{Metrics, unix_ms},
    webhooks::{self, Dispatcher},
};

/// Why a node did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error("store: {0}")]
    Store(#[from] StoreError),
    #[error("model {model} ({}): {why}", path.display())]
    Model { model: ModelId, path: PathBuf, why: String },
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("journal: {0}")]
    Journal(#[from] JournalError),
    #[error("cannot settle what an earlier process left: {0}")]
    Recovery(#[from] RecoveryError),
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Relay(#[from] RelayError),
    #[error(transparent)]
    Edge(#[from] EdgeError),
    #[error(transparent)]
    Operator(#[from] OperatorError),
    #[error("receipts: {0}")]
    ReceiptKey(#[from] ReceiptKeyError),
    #[error("prices: {0}")]
    Price(#[from] PriceFault),
    #[error("money: {0}")]
    Money(#[from] crate::domain::MoneyError),
    #[error("{0}")]
    Limits(String),
    #[error("cannot listen for signals: {0}")]
    Signals(std::io::Error),
    #[error("a task of the start was lost: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl NodeError {
    /// Told apart by scripts: 3 the data folder, 4 the store, 5 a model, its library or
    /// its limits, 6 an address in use.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::DataDir(_) | Self::Journal(_) | Self::Recovery(RecoveryError::Journal(_)) => 3,
            Self::Embedded(_) | Self::Store(_) | Self::Operator(_) | Self::ReceiptKey(_) | Self::Recovery(_) => 4,
            Self::Model { .. } | Self::Engine(_) | Self::Cluster(_) | Self::Limits(_) => 5,
            Self::Listen { .. } | Self::Relay(_) => 6,
            _ => 1,
        }
    }
}

/// A node that serves.
pub struct Node {
    config: Config,
    /// Where the edge listens, if there is one.
    address: Option<SocketAddr>,
    bootstrap: Option<Bootstrap>,
    edge: Option<EdgeHandle>,
    /// Where there is no edge that says how the node is.
    watch: Option<WatchHandle>,
    /// Where there is an edge, and it is wanted here.
    webhooks: Option<Dispatcher>,
    cluster: Cluster,
    relay: Option<Relay>,
    embedded: Option<EmbeddedServer>,
    metrics: Arc<Metrics>,
    /// Released last.
    _lock: Option<DataDir>,
}

/// What an edge shares with the rest of the node.
struct Rooms {
    store: Store,
    ledger: Ledger,
    queue: Queue,
    receipts: Receipts,
}

struct Relay {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Node {
    /// Starts what the role needs and waits until it is ready. Logging must have been set up.
    pub async fn start(config: Config) -> Result<Self, NodeError> {
        let role = config.node.role;
        let lock = match role {
            Role::All => Some(DataDir::lock(&config.node.data_dir)?),
            Role::Edge | Role::Worker => None,
        };
        // Taken before anything slow, so that a busy port is known at once.
        let http = match role {
            Role::All | Role::Edge => Some(listen(config.edge.listen)?),
            Role::Worker => config.status_address().map(listen).transpose()?,
        };
        let models = {
            let config = config.clone();
            tokio::task::spawn_blocking(move || models::open(&config)).await??
        };
        let (embedded, url) = start_store(&config).await?;
        let store = Store::connect(&url, Duration::from_millis(config.store.command_ms_max)).await?;
        let ledger = Ledger::new(store.clone(), Duration::from_millis(config.ledger.hold_lease_ms))
            .with_archive(config.archive_dir());
        let accounts = Accounts::new(store.clone(), ledger.clone());
        let bootstrap = match role {
            Role::All => Some(bootstrap(&config, &accounts.acting_as("a node that started")).await?),
            Role::Edge | Role::Worker => None,
        };
        let receipts = Receipts::open(&store, config.ledger.receipt_key_file()).await?;
        if role == Role::All {
            receipts.public_key().write(&config.node.data_dir.join(RECEIPT_KEY_FILE))?;
        }

        let node = NodeId::generate();
        let metrics = Arc::new(Metrics::new());
        let claim_lease = Duration::from_millis(config.queue.claim_lease_ms);
        let limits = QueueLimits {
            depth_max: config.queue.depth_max,
            start_max: Duration::from_millis(config.queue.start_ms_max),
            claim_lease,
            takeover_max: Duration::from_millis(config.queue.takeover_ms_max),
            losses_max: config.queue.losses_max,
        };
        let queue = Queue::new(store.clone(), limits);
        let journals = config.node.data_dir.join(JOURNALS);
        let journal = match role {
            Role::Edge => None,
            Role::All | Role::Worker => {
                // Before anything is given up as left over.
                let others = if embedded.is_some() { Others::AreDead } else { Others::MayGoOn };
                cluster::settle_left_over(&journals, others, &queue, &ledger, &metrics).await?;
                Some(Arc::new(Journal::open(&journals, &node)?))
            }
        };
        let secret = match config.relay.secret.as_str() {
            // Nodes of role `all` on one store may claim each other's requests, so they must be able to answer.
            "" if embedded.is_none() => Some(Secret::new(&store.shared_secret().await?)),
            "" => None,
            configured => Some(Secret::new(configured)),
        };
        if embedded.is_some() {
            bury_left_over(&config, &queue, &ledger).await?;
        }
        let (hub, relay) = match role {
            Role::Worker => (None, None),
            Role::All | Role::Edge => open_hub(&config, node.clone(), secret.clone(), &metrics).await?,
        };
        let (outlet, orders) = Outlet::new(node.clone(), hub.clone(), secret.map(|secret| (secret, Pace::default())));
        let card = NodeCard {
            node: node.clone(),
            host: nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            role: role.as_str().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_unix_ms: unix_ms(),
            state: NodeState::Ready,
            http: http.as_ref().and_then(|listener| listener.local_addr().ok()).map(|address| address.to_string()),
            relay: hub.as_ref().and_then(|hub| hub.reply_to().relay),
            open_streams: 0,
            models: Vec::new(),
            actors: Vec::new(),
        };
        let context = ClusterContext {
            node,
            directory: Directory::new(store.clone(), NODE_LEASE),
            card,
            hub: hub.clone(),
            queue: queue.clone(),
            ledger: ledger.clone(),
            outlet,
            orders,
            journal,
            journals,
            metrics: Arc::clone(&metrics),
            claim_lease,
            sweep: Duration::from_millis(config.ledger.sweep_ms),
            upkeep: upkeep(&config),
            models: config.models.keys().cloned().collect(),
        };
        let pools = match role {
            Role::All | Role::Worker => models.pools(&config, &metrics),
            Role::Edge => Vec::new(),
        };
        let cluster = Cluster::start(context, pools).await?;
        let mut started = Self {
            config,
            address: None,
            bootstrap,
            edge: None,
            watch: None,
            webhooks: None,
            cluster,
            relay,
            embedded,
            metrics: Arc::clone(&metrics),
            _lock: lock,
        };
        if let Err(error) = started.cluster.ready().await {
            started.stop(Duration::ZERO).await;
            return Err(error.into());
        }
        if role == Role::Worker
            && let Some(listener) = http
        {
            let readiness = readiness(store, &started.cluster, false);
            let watching = tokio::task::spawn_blocking(move || edge::watch(listener, readiness, metrics)).await?;
            match watching {
                Ok(watch) => {
                    started.address = Some(watch.address);
                    started.watch = Some(watch);
                }
                Err(error) => {
                    started.stop(Duration::ZERO).await;
                    return Err(error.into());
                }
            }
        } else if let (Some(listener), Some(hub)) = (http, hub) {
            match started
                .open_edge(listener, hub, &models, Rooms { store: store.clone(), ledger, queue, receipts })
                .await
            {
                Ok(edge) => {
                    started.address = Some(edge.address);
                    started.edge = Some(edge);
                    let config = &started.config.webhooks;
                    let dispatcher = || Dispatcher::start(store, webhook_settings(config), Arc::clone(&metrics));
                    started.webhooks = config.enabled.then(dispatcher);
                }
                Err(error) => {
                    started.stop(Duration::ZERO).await;
                    return Err(error);
                }
            }
        }
        Ok(started)
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    pub fn bootstrap(&self) -> Option<&Bootstrap> {
        self.bootstrap.as_ref()
    }

    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Drains within `node.drain_ms_max` and stops.
    pub async fn drain(self) {
        let grace = Duration::from_millis(self.config.node.drain_ms_max);
        self.stop(grace).await;
    }

    async fn stop(self, grace: Duration) {
        // The last part belongs to settling and to stopping.
        let deadline = Instant::now() + grace - (grace / 4).min(Duration::from_secs(3));
        if let Some(edge) = &self.edge {
            edge.drain();
            while edge.open_requests() > 0 && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        if let Some(watch) = &self.watch {
            watch.drain();
        }
        // Before the edge, so that what is failed here is free and its clients hear of it.
        self.cluster.drain(deadline).await;
        if let Some(edge) = self.edge {
            edge.stop(STREAMS_CLOSE_MAX.min(grace)).await;
        }
        if let Some(watch) = self.watch {
            watch.stop().await;
        }
        if let Some(webhooks) = self.webhooks {
            webhooks.stop(WEBHOOKS_CLOSE_MAX.min(grace)).await;
        }
        if let Some(relay) = self.relay {
            relay.stop.cancel();
            relay.tasks.close();
            relay.tasks.wait().await;
        }
        if let Some(embedded) = self.embedded {
            let _ = tokio::task::spawn_blocking(move || embedded.stop()).await;
        }
    }

    async fn open_edge(
        &self,
        listener: TcpListener,
        hub: ReplyHub,
        models: &models::Models,
        Rooms { store, ledger, queue, receipts }: Rooms,
    ) -> Result<EdgeHandle, NodeError> {
        let config = &self.config;
        let spec = EdgeSpec {
            settings: config.edge.clone(),
            models: config.models.iter().map(|(id, model)| (id.clone(), ServedModel::new(model))).collect(),
            prompts: models.prompts(config)?,
            prices: Prices::new(store.clone(), config.price_list()?),
            wait_max: Duration::from_millis(config.queue.wait_ms_max),
            accounts: Accounts::new(store.clone(), ledger.clone()),
            private_webhooks: self.config.webhooks.allow_private,
            admission: Admission::new(store.clone(), ledger.hold_lease())
                .with_tiers(tiers(config)?)
                .with_step(config.ledger.step_tokens),
            guard: Guard::new(store.clone(), guard_limits(&config.edge)),
            receipts,
            directory: Directory::new(store.clone(), NODE_LEASE),
            records: Records::new(store.clone(), retention(&config.edge), ledger.hold_lease()),
            ledger,
            queue,
            hub,
            metrics: Arc::clone(&self.metrics),
            readiness: readiness(store, &self.cluster, true),
            runtime: tokio::runtime::Handle::current(),
        };
        Ok(tokio::task::spawn_blocking(move || edge::spawn(spec, listener)).await??)
    }
}

fn upkeep(config: &Config) -> Upkeep {
    let (verify, months) = (config.ledger.verify_seconds, config.ledger.archive_months);
    let archives = config.node.role == Role::All && months > 0;
    let plan = || ArchivePlan { folder: config.archive_dir(), months };
    Upkeep { verify: (verify > 0).then(|| Duration::from_secs(verify)), archive: archives.then(plan) }
}

/// The configured sets of limits.
pub fn tiers(config: &Config) -> Result<Tiers, NodeError> {
    let named = config.tiers.iter().map(|(name, limits)| Ok((name.clone(), tier(limits)?)));
    Ok(Tiers { standard: tier(&config.limits)?, named: named.collect::<Result<_, NodeError>>()? })
}

fn guard_limits(edge: &config::Edge) -> GuardLimits {
    GuardLimits {
        failures_max: edge.auth_failures_max,
        window: Duration::from_secs(edge.auth_failure_window_seconds),
        block: Duration::from_secs(edge.auth_block_seconds),
    }
}

fn tier(limits: &config::Limits) -> Result<Tier, NodeError> {
    let priority_max = match limits.service_tier_max {
        ServiceTier::Flex => Priority::Low,
        ServiceTier::Default => Priority::Normal,
        ServiceTier::Priority => Priority::High,
    };
    let limits = [
        (LimitKind::RequestsPerMinute, limits.requests_per_minute),
        (LimitKind::TokensPerMinute, limits.tokens_per_minute),
        (LimitKind::RequestsPerDay, limits.requests_per_day),
        (LimitKind::TokensPerDay, limits.tokens_per_day),
        (LimitKind::RequestsAtOnce, limits.requests_at_once),
        (LimitKind::SpendPerDay, spend(&limits.spend_usd_per_day)?),
        (LimitKind::SpendPerMonth, spend(&limits.spend_usd_per_month)?),
    ];
    Ok(Tier { limits: limits.into_iter().collect::<Limits>(), priority_max })
}

fn spend(usd: &str) -> Result<u64, NodeError> {
    Ok(u64::try_from(usd.parse::<NanoUsd>()?.nano()).unwrap_or(0))
}

/// The embedded store has no other users than the node that holds the data folder's lock: whatever was under
/// way when the last one died is over, and its holds need not wait for their leases.
async fn bury_left_over(config: &Config, queue: &Queue, ledger: &Ledger) -> Result<(), NodeError> {
    let mut requests = 0;
    for model in config.models.keys() {
        requests += queue.left_over(model).await?.len();
    }
    let holds = ledger.release_left_over_holds().await.map_err(OperatorError::from)?;
    if requests + holds > 0 {
        tracing::warn!(requests, holds, "ended what the last node left behind, free of charge");
    }
    Ok(())
}

/// How events are delivered, as configured.
pub fn webhook_settings(config: &config::Webhooks) -> webhooks::Settings {
    let timeout = Duration::from_millis(config.timeout_ms);
    webhooks::Settings::new(config.allow_private, config.attempts_max, timeout)
}

fn retention(edge: &crate::config::Edge) -> Retention {
    let hours = |hours: u64| Duration::from_secs(hours * 3600);
    Retention { records: hours(edge.record_hours), once: hours(edge.idempotency_hours) }
}

/// A node that has said nothing for so long shows as lost.
const NODE_LEASE: Duration = Duration::from_secs(6);

/// In the data folder.
const JOURNALS: &str = "journal";

/// Streams that were told of their end get this long to say so to their clients.
const STREAMS_CLOSE_MAX: Duration = Duration::from_secs(1);

/// A webhook under way gets this long to be answered; otherwise it is sent again later.
const WEBHOOKS_CLOSE_MAX: Duration = Duration::from_secs(2);

fn listen(address: SocketAddr) -> Result<TcpListener, NodeError> {
    let bind = || {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    bind().map_err(|source| NodeError::Listen { address, source })
}

/// The address of the store, and the server if it is ours.
async fn start_store(config: &Config) -> Result<(Option<EmbeddedServer>, String), NodeError> {
    if !config.store.redis_url.is_empty() {
        return Ok((None, config.store.redis_url.clone()));
    }
    let embedded = embedded(config).await?;
    let url = embedded.url().to_owned();
    Ok((Some(embedded), url))
}

/// Starts the embedded server. The caller holds the data folder's lock.
pub async fn embedded(config: &Config) -> Result<EmbeddedServer, NodeError> {
    let (data_dir, program) = (config.node.data_dir.clone(), config.store.server_program.clone());
    let fsync = match config.store.append_fsync {
        AppendFsync::Always => Fsync::Always,
        AppendFsync::Everysec => Fsync::Everysec,
    };
    Ok(tokio::task::spawn_blocking(move || EmbeddedServer::start(&data_dir, &program, fsync)).await??)
}

/// The development tenant and the key files, where the store has no tenant yet.
pub async fn bootstrap(config: &Config, accounts: &Accounts) -> Result<Bootstrap, NodeError> {
    let balance: NanoUsd = config.ledger.bootstrap_balance_usd.parse()?;
    Ok(accounts.bootstrap(&config.node.data_dir, balance).await?)
}

/// The edge's hub, and its relay where there is a secret for it.
async fn open_hub(
    config: &Config,
    node: NodeId,
    secret: Option<Secret>,
    metrics: &Arc<Metrics>,
) -> Result<(Option<ReplyHub>, Option<Relay>), NodeError> {
    let buffer_events = config.edge.stream_buffer_events;
    let Some(secret) = secret else {
        return Ok((Some(ReplyHub::new(node, buffer_events, None, Arc::clone(metrics))), None));
    };
    let listener = RelayListener::bind(config.relay.listen).await?;
    let address = match config.relay.advertise.as_str() {
        "" => listener.address().to_string(),
        advertised => advertised.to_owned(),
    };
    tracing::info!(address, "taking tokens from workers");
    let hub = ReplyHub::new(node, buffer_events, Some(address), Arc::clone(metrics));
    let relay = Relay { stop: CancellationToken::new(), tasks: TaskTracker::new() };
    let serving = listener.serve(hub.clone(), secret, Pace::default(), relay.stop.clone(), relay.tasks.clone());
    relay.tasks.spawn(serving);
    Ok((Some(hub), Some(relay)))
}

fn readiness(store: Store, cluster: &Cluster, has_edge: bool) -> Readiness {
    let statuses = Arc::new(cluster.statuses());
    Arc::new(move || {
        let (store, statuses) = (store.clone(), Arc::clone(&statuses));
        async move {
            let mut reasons = Vec::new();
            if let Err(error) = store.ping().await {
                tracing::debug!(%error, "not ready");
                reasons.push("the store is not reachable".to_owned());
            }
            for (model, status) in statuses.iter() {
                let status: &PoolStatus = &status.borrow();
                // An edge keeps what comes while a worker starts anew; a worker has nothing else to be asked for.
                if let Some(fault) = status.fault().filter(|_| !has_edge || !status.is_available()) {
                    reasons.push(format!("model {model} {fault}"));
                }
            }
            reasons
        }
        .boxed()
    })
}
