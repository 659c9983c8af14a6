//! The tree under failure: a real store, a real (scripted) engine, and actors that are told to panic.

use std::{
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

use super::{pool::PoolMessage, root::RootMessage, testing::job, worker::WorkerMessage, *};
use crate::{
    directory::{Directory, NodeCard, NodeState},
    domain::{EventBody, FinishReason, FundsEnd, Job, RequestId, StoppedBy, Usage},
    engine::{self, Backend, EngineError, EngineSpec},
    grammar::Grammars,
    journal::{Begun, Ended},
    model::ModelFile,
    prompt::Tokenizer,
    queue::{QueueLimits, ReplyHub, ReplyStream},
    store::{
        Store,
        embedded::{EmbeddedServer, Fsync},
    },
};

const LEASE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

fn card(node: &NodeId) -> NodeCard {
    NodeCard {
        node: node.clone(),
        host: "here".to_owned(),
        role: "all".to_owned(),
        version: "0".to_owned(),
        started_unix_ms: 0,
        state: NodeState::Ready,
        http: None,
        relay: None,
        open_streams: 0,
        models: Vec::new(),
        actors: Vec::new(),
    }
}

struct Tree {
    _folder: tempfile::TempDir,
    server: EmbeddedServer,
    queue: Queue,
    hub: ReplyHub,
    metrics: Arc<Metrics>,
    journal: Arc<Journal>,
    cluster: Cluster,
    loads: Arc<AtomicU32>,
    tokenizer: Tokenizer,
}

impl Tree {
    /// `refuse` says which attempts to load fail.
    async fn start(refuse: fn(u32) -> bool) -> Self {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let data = std::env::var_os("LIGHTCONE_TEST_DATA_DIR").map_or(manifest.join(".lightcone"), Into::into);
        let file = ModelFile::open(&data.join("models/SmolLM2-135M-Instruct.Q4_1.gguf"))
            .expect("the model's file: run `make test`, which fetches it");
        let program = std::env::var("LIGHTCONE_TEST_REDIS_SERVER").ok();
        let own = Some(data.join("bin/valkey-server")).filter(|own| own.is_file()).map(|own| own.display().to_string());
        let tokenizer = Tokenizer::new(Arc::clone(&file.vocabulary)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let program = program.or(own).unwrap_or_default();
        let server = EmbeddedServer::start(folder.path(), &program, Fsync::Everysec).expect("a server");
        let store = Store::connect(server.url(), Duration::from_secs(5)).await.unwrap();
        let queue = Queue::new(
            store.clone(),
            QueueLimits {
                depth_max: 64,
                claim_lease: LEASE,
                takeover_max: SOON,
                start_max: Duration::from_secs(600),
                losses_max: 2,
            },
        );
        let (node, metrics) = (NodeId::generate(), Arc::new(Metrics::new()));
        let hub = ReplyHub::new(node.clone(), 1024, None, Arc::clone(&metrics));
        let (outlet, orders) = Outlet::new(node.clone(), Some(hub.clone()), None);
        let model = ModelId::from("model");
        let journal = Arc::new(Journal::open(&folder.path().join("journal"), &node).expect("a journal"));
        let context = ClusterContext {
            node: node.clone(),
            queue: queue.clone(),
            ledger: Ledger::new(store.clone(), LEASE),
            outlet,
            orders,
            journal: Some(Arc::clone(&journal)),
            journals: folder.path().join("journal"),
            metrics: Arc::clone(&metrics),
            directory: Directory::new(store, LEASE),
            card: card(&node),
            hub: Some(hub.clone()),
            claim_lease: LEASE,
            sweep: Duration::from_secs(60),
            upkeep: Upkeep::default(),
            models: vec![model.clone()],
        };
        let loads = Arc::new(AtomicU32::new(0));
        let (counter, with) = (Arc::clone(&loads), Arc::clone(&metrics));
        let spec = PoolSpec {
            model: model.clone(),
            device: "cpu".to_owned(),
            sequences_max: 4,
            step_tokens: 8,
            stall_max: Duration::from_secs(60),
            grammars: Arc::new(Grammars::new(Arc::clone(&file.vocabulary))),
            policy: RestartPolicy { delay_min: Duration::from_millis(5), ..RestartPolicy::default() },
            loader: Arc::new(move |sink| {
                if refuse(counter.fetch_add(1, Ordering::SeqCst)) {
                    return Err(EngineError::Limits("told to fail".into()));
                }
                let (model, file) = (model.clone(), Arc::clone(&file));
                let (context_tokens_max, sequences_max, step_tokens_max) = (256, 4, 64);
                let (kv_block_tokens, kv_memory_bytes) = (16, 256 << 20);
                let spec = EngineSpec {
                    model,
                    file,
                    backend: Backend::Scripted,
                    context_tokens_max,
                    sequences_max,
                    step_tokens_max,
                    kv_block_tokens,
                    kv_memory_bytes,
                    prefix_cache: true,
                    speculation: engine::Speculation::Auto,
                };
                engine::spawn(spec, sink, Arc::clone(&with))
            }),
        };
        let cluster = Cluster::start(context, vec![spec]).await.unwrap();
        Self { _folder: folder, server, queue, hub, metrics, journal, cluster, loads, tokenizer }
    }

    async fn ask(&self, request: &str, prompt: &str, tokens: u32) -> ReplyStream {
        let stream = self.hub.open(&RequestId::from(request), &ModelId::from("model"));
        let reply_to = self.hub.reply_to();
        let prompt = self.tokenizer.encode(prompt, false).unwrap();
        let job = Job { prompt, output_tokens_max: tokens, reply_to, ..job(request, "") };
        self.queue.publish(&job).await.unwrap();
        stream
    }

    fn restarts(&self) -> u64 {
        self.metrics.worker_restarts.with_label_values(&["model"]).get()
    }

    async fn stop(self) {
        self.cluster.drain(Instant::now()).await;
        self.server.stop();
    }
}

async fn last(mut stream: ReplyStream) -> EventBody {
    let all = async {
        let mut last = None;
        while let Some(event) = stream.next().await {
            last = Some(event.body);
        }
        last.expect("a last event")
    };
    tokio::time::timeout(SOON, all).await.expect("the stream ends")
}

/// There is no hold for these requests, so that their settlement finds them free of charge.
fn was_served(body: &EventBody) -> bool {
    matches!(body, EventBody::Failed { message, .. } if message.contains("could not be settled"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_actor_that_panics_is_replaced_by_one_that_looks_after_what_it_had() {
    let tree = Tree::start(|_| false).await;
    tree.cluster.ready().await.unwrap();
    // The engine is well and has to be stopped, too.
    let mut stream = tree.ask("a", "<<slow:50>>", 200).await;
    assert_eq!(stream.next().await.unwrap().body, EventBody::Accepted);
    tree.cluster.root.cast(RootMessage::Pool(0, PoolMessage::Worker(WorkerMessage::Panic))).unwrap();
    // There is no account for it, so that nothing says what it may decode.
    let end = last(stream).await;
    assert!(matches!(&end, EventBody::Failed { message, .. } if message == station::WORKER_LOST), "{end:?}");
    let end = last(tree.ask("b", "well", 3).await).await;
    assert!(was_served(&end), "{end:?}");
    assert_eq!((tree.restarts(), tree.loads.load(Ordering::SeqCst)), (1, 2));
    tree.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_without_a_hold_gets_no_more_tokens_than_were_paid_for() {
    let tree = Tree::start(|_| false).await;
    tree.cluster.ready().await.unwrap();
    let mut stream = tree.ask("a", "well", 50).await;
    let (mut heard, mut ended) = (0, None);
    while let Some(event) = stream.next().await {
        match event.body {
            EventBody::Delta { ids, .. } => heard += ids.len(),
            EventBody::ChoiceEnded { reason, stopped_by, .. } => ended = Some((reason, stopped_by)),
            _ => {}
        }
    }
    let funds = Some(StoppedBy::Funds(FundsEnd::Balance));
    assert_eq!((heard, ended), (8, Some((FinishReason::Length, funds))));
    tree.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_actor_that_panics_is_replaced_with_its_worker() {
    let tree = Tree::start(|_| false).await;
    tree.cluster.ready().await.unwrap();
    tree.cluster.root.cast(RootMessage::Pool(0, PoolMessage::Panic)).unwrap();
    while tree.loads.load(Ordering::SeqCst) < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let end = last(tree.ask("a", "well", 3).await).await;
    assert!(was_served(&end), "{end:?}");
    tree.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_fails_is_tried_again_and_the_queue_waits() {
    let tree = Tree::start(|attempt| attempt < 3).await;
    assert!(matches!(tree.cluster.ready().await, Err(ClusterError::Model { why, .. }) if why.contains("told to fail")));
    let end = last(tree.ask("a", "well", 3).await).await;
    assert!(was_served(&end), "{end:?}");
    assert_eq!((tree.restarts(), tree.loads.load(Ordering::SeqCst)), (3, 4));
    tree.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ended_long_ago_and_is_still_owed_shows_until_it_is_closed() {
    let tree = Tree::start(|_| false).await;
    let Job { request, tenant, key, model, price, price_version, .. } = job("chatcmpl-1", "");
    let (owner, usage) = (NodeId::generate(), Usage { prompt_tokens: 3, completion_tokens: 1, cached_tokens: 0 });
    let begun = Begun { request, tenant, key, model, price, price_version, prompt_tokens: 3, attempt: 1, owner };
    let request = begun.request.clone();
    tree.journal.begin(&begun).unwrap();
    let see = async |open: i64, rests: i64| {
        let gauges = || (tree.metrics.journal_open_requests.get(), tree.metrics.journal_rests.get());
        let begun = Instant::now();
        while gauges() != (open, rests) {
            assert!(begun.elapsed() < SOON, "{:?}", gauges());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    see(1, 0).await;
    let ended = Ended { request: request.clone(), usage, reason: "stop".to_owned(), digest: None, unix_ms: 1 };
    tree.journal.ended(&ended).await.unwrap();
    see(1, 1).await;
    tree.journal.closed(&request).unwrap();
    see(0, 0).await;
    tree.stop().await;
}
