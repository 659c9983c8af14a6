//! A real edge on a real store, with a worker that does what the test says.

use std::{collections::BTreeMap, net::TcpListener, sync::Arc, time::Duration};

use futures::FutureExt;
use lightcone::{
    admission::{Guard, GuardLimits, Limits, Tier, Tiers},
    config,
    directory::Directory,
    domain::{
        Claim, EventBody, FailureCode, FinishReason, NanoUsd, NodeId, Price, PriceList, Priority, RequestId,
        TokenEvent, Usage,
    },
    edge::{self, EdgeHandle, EdgeSpec, ServedModel},
    grammar::Grammars,
    ledger::{EndReason, Ledger, Prices, ReleaseReason, Settlement},
    model::Vocabulary,
    prompt::{Encoder, PromptError, PromptModel, Template},
    queue::{
        Queue, QueueLimits, ReplyHub, Room, WorkerLink,
        reply::{Feedback, Feedbacks},
    },
    records::{Records, Retention},
    telemetry::Metrics,
};
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};

use super::house::{House, LEASE, MODEL, PRICE_VERSION};

pub const CONTEXT: u32 = 512;
pub const OUTPUT_MAX: u32 = 64;
/// As SmolLM2's file carries it.
pub const TEMPLATE: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// One token a byte; control tokens lie above.
struct Bytes;

impl Encoder for Bytes {
    fn encode(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        assert!(!text.contains("<<panic in the tokeniser>>"), "asked to panic");
        Ok(text.bytes().map(u32::from).collect())
    }

    fn control(&self, _: &str) -> Option<u32> {
        Some(1000)
    }
}

pub struct Front {
    pub house: House,
    pub queue: Queue,
    pub hub: ReplyHub,
    pub metrics: Arc<Metrics>,
    pub url: String,
    pub http: reqwest::Client,
    pub edge: Option<EdgeHandle>,
    link: WorkerLink,
    pub feedbacks: Feedbacks,
    worker: NodeId,
}

pub fn settings() -> config::Edge {
    config::Edge {
        listen: ([127, 0, 0, 1], 0).into(),
        http_threads: 1,
        default_model: MODEL.into(),
        body_bytes_max: 64 << 10,
        body_ms_max: 5_000,
        connections_max: 256,
        prompt_threads: 1,
        prompt_queue_max: 16,
        messages_max: 8,
        choices_max: 4,
        cors_origins: vec!["*".into()],
        trusted_proxies: Vec::new(),
        // All the tests' clients share one address.
        auth_failures_max: 0,
        auth_failure_window_seconds: 600,
        auth_block_seconds: 300,
        record_hours: 1,
        idempotency_hours: 1,
        stream_buffer_events: 256,
        keep_alive_ms: 10_000,
        request_ms_max: 60_000,
    }
}

/// What an edge under test is made with.
pub struct Furniture {
    pub settings: config::Edge,
    pub depth_max: usize,
    pub balance: i64,
    /// Of its holds.
    pub lease: Duration,
    pub limits: Limits,
    pub priority_max: Priority,
}

impl Default for Furniture {
    fn default() -> Self {
        Self {
            settings: settings(),
            depth_max: 8,
            balance: 1_000_000_000,
            lease: LEASE,
            limits: Limits::default(),
            priority_max: Priority::High,
        }
    }
}

impl Front {
    pub async fn start() -> Self {
        Self::with(settings(), 8, 1_000_000_000).await
    }

    pub async fn with(settings: config::Edge, depth_max: usize, balance: i64) -> Self {
        Self::furnished(Furniture { settings, depth_max, balance, ..Furniture::default() }).await
    }

    /// An edge that renews its holds every third of `lease`.
    pub async fn with_renewal(lease: Duration) -> Self {
        Self::furnished(Furniture { lease, ..Furniture::default() }).await
    }

    pub async fn furnished(furniture: Furniture) -> Self {
        let house = House::with_balance(furniture.balance).await;
        let spec = Self::spec(&house, furniture);
        let (queue, hub, metrics) = (spec.queue.clone(), spec.hub.clone(), Arc::clone(&spec.metrics));
        let edge = Self::open(spec);
        let url = format!("http://{}", edge.address);
        let (link, feedbacks) = WorkerLink::new();
        let (http, worker) = (reqwest::Client::new(), NodeId::generate());
        Self { house, queue, hub, metrics, url, http, edge: Some(edge), link, feedbacks, worker }
    }

    /// Another edge on the same store.
    pub fn beside(&self, settings: config::Edge) -> EdgeHandle {
        Self::open(Self::spec(&self.house, Furniture { settings, ..Furniture::default() }))
    }

    fn open(spec: EdgeSpec) -> EdgeHandle {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        edge::spawn(spec, listener).expect("an edge")
    }

    fn spec(house: &House, furniture: Furniture) -> EdgeSpec {
        let Furniture { settings, depth_max, lease: hold_lease, limits, priority_max, .. } = furniture;
        let queue = Queue::new(
            house.store.clone(),
            QueueLimits {
                depth_max,
                claim_lease: LEASE,
                takeover_max: LEASE,
                start_max: Duration::from_secs(600),
                losses_max: 2,
            },
        );
        let metrics = Arc::new(Metrics::new());
        let hub = ReplyHub::new(NodeId::generate(), settings.stream_buffer_events, None, metrics.clone());
        let control = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"].map(str::to_owned).to_vec();
        let template = Template::compile(TEMPLATE, "<|im_start|>", "<|im_end|>", control).expect("a template");
        let texts = (0..=1000u32).map(|token| match u8::try_from(token) {
            Ok(byte) => char::from(byte).to_string(),
            Err(_) => format!("token {token}"),
        });
        let grammars = Arc::new(Grammars::new(Arc::new(Vocabulary::of_text(texts.collect(), vec![1000]))));
        let context_tokens_max = CONTEXT as usize;
        let prompt = PromptModel { template, encoder: Arc::new(Bytes), grammars, context_tokens_max };
        let price = Price::flat(NanoUsd::new(200), NanoUsd::new(300));
        let served = ServedModel {
            description: "for tests".into(),
            owned_by: "tzafon".into(),
            created: 1_763_769_600,
            context_tokens_max: CONTEXT,
            output_tokens_max: OUTPUT_MAX,
        };
        let prices = BTreeMap::from([(MODEL.into(), price)]);
        let prices = PriceList { version: PRICE_VERSION.into(), from_unix_ms: 0, prices };
        let tiers = Tiers { standard: Tier { limits, priority_max }, named: BTreeMap::new() };
        let store = house.store.clone();
        let guard_limits = GuardLimits {
            failures_max: settings.auth_failures_max,
            window: Duration::from_secs(settings.auth_failure_window_seconds),
            block: Duration::from_secs(settings.auth_block_seconds),
        };
        EdgeSpec {
            settings,
            models: BTreeMap::from([(MODEL.into(), served)]),
            prompts: BTreeMap::from([(MODEL.into(), prompt)]),
            prices: Prices::new(house.store.clone(), prices),
            wait_max: Duration::from_secs(60),
            admission: house.admission.clone().with_tiers(tiers),
            guard: Guard::new(house.store.clone(), guard_limits),
            receipts: house.receipts.clone(),
            directory: Directory::new(house.store.clone(), hold_lease),
            accounts: house.accounts.clone(),
            private_webhooks: true,
            ledger: Ledger::new(house.store.clone(), hold_lease),
            queue,
            records: Records::new(house.store.clone(), Retention::default(), hold_lease),
            hub,
            metrics,
            readiness: Arc::new(move || {
                let store = store.clone();
                async move { store.ping().await.err().map(|_| "store away".to_owned()).into_iter().collect() }.boxed()
            }),
            runtime: tokio::runtime::Handle::current(),
        }
    }

    // -- the client's side -----------------------------------------------------------------------------

    pub fn post(&self, body: impl Into<reqwest::Body>) -> RequestBuilder {
        let request = self.http.post(format!("{}/v1/chat/completions", self.url));
        request.bearer_auth(&self.house.secret).header("content-type", "application/json").body(body)
    }

    pub fn ask(&self, body: &Value) -> RequestBuilder {
        self.post(body.to_string())
    }

    pub fn get(&self, path: &str) -> RequestBuilder {
        self.http.get(format!("{}{path}", self.url)).bearer_auth(&self.house.secret)
    }

    /// Sends in the background, so that the test can be the worker meanwhile.
    pub fn asking(&self, body: &Value) -> tokio::task::JoinHandle<Response> {
        let request = self.ask(body);
        tokio::spawn(async move { request.send().await.expect("an answer") })
    }

    // -- the worker's side -----------------------------------------------------------------------------

    /// The next request in the queue, waiting for it.
    pub async fn claim(&self) -> Claim {
        for _ in 0..2_000 {
            let room = Room { to_take_over: 1, to_begin: 1 };
            if let Some(claim) = self.queue.claim(&MODEL.into(), &self.worker, room).await.expect("a claim").pop() {
                return claim;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("nothing was published");
    }

    /// Events with the sequence numbers from `seq` on. Answers what the edge has to say to them.
    pub fn deliver(&self, claim: &Claim, seq: u32, bodies: Vec<EventBody>) -> Vec<Feedback> {
        let (request, attempt) = (&claim.job.request, claim.attempt);
        let number = |(seq, body)| TokenEvent { request: request.clone(), attempt, seq, body };
        self.hub.deliver((seq..).zip(bodies).map(number).collect(), &self.link)
    }

    /// Settles and acknowledges, as a worker does before its last event.
    pub async fn settle(&self, claim: &Claim, completion_tokens: u32, reason: FinishReason) -> Usage {
        let job = &claim.job;
        let prompt_tokens = u32::try_from(job.prompt.len()).expect("a short prompt");
        let usage = Usage { prompt_tokens, completion_tokens, cached_tokens: 0 };
        let settlement = Settlement {
            request: job.request.clone(),
            tenant: job.tenant.clone(),
            key: job.key.clone(),
            model: job.model.clone(),
            usage,
            price: job.price,
            price_version: job.price_version.clone(),
            reason: EndReason::of(reason, None),
            digest: None,
            attempt: claim.attempt,
        };
        self.house.ledger.settle(&settlement).await.expect("a settlement");
        self.acknowledge(claim, completion_tokens).await;
        usage
    }

    async fn acknowledge(&self, claim: &Claim, tokens: u32) {
        let job = &claim.job;
        let done = self.queue.acknowledge(&job.model, &self.worker, &job.request, claim.attempt, tokens).await;
        assert!(done.expect("an acknowledgement"));
    }

    /// Answers with one token for each of `texts`.
    pub async fn answer(&self, claim: &Claim, texts: &[&str], reason: FinishReason) -> Usage {
        let delta = |text: &&str| EventBody::text(*text, 1);
        let bodies: Vec<_> = std::iter::once(EventBody::Accepted).chain(texts.iter().map(delta)).collect();
        let tokens = u32::try_from(texts.len()).expect("few");
        let _ = self.deliver(claim, 0, bodies);
        let usage = self.settle(claim, tokens, reason).await;
        let ended = EventBody::ChoiceEnded { choice: 0, reason, stopped_by: None };
        let _ = self.deliver(claim, tokens + 1, vec![ended, EventBody::Finished { reason, usage }]);
        usage
    }

    /// Fails as a worker's supervisor does.
    pub async fn fail(&self, claim: &Claim, seq: u32, code: FailureCode) {
        let job = &claim.job;
        let why = ReleaseReason::WorkerFailed;
        assert!(self.house.ledger.release(&job.tenant, &job.request, why).await.expect("a release"));
        self.acknowledge(claim, 0).await;
        let _ = self.deliver(claim, seq, vec![EventBody::Failed { code, message: "inside story".into() }]);
    }

    pub async fn depth(&self) -> usize {
        self.queue.depth(&MODEL.into()).await.expect("a depth")
    }

    /// Waits until a lease that had run out (it stood at 1) has been renewed.
    pub async fn lease_is_renewed(&self, request: &RequestId) {
        let key = lightcone::store::keys::hold_leases(&self.house.tenant);
        let mut raw = self.house.valkey.raw().await;
        for _ in 0..2_000 {
            let mut score = redis::cmd("ZSCORE");
            let until: Option<f64> = score.arg(&key).arg(request.as_str()).query_async(&mut raw).await.expect("ZSCORE");
            if until.expect("the hold is there") > 1.0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("nobody renewed the hold");
    }

    /// Waits until nothing is on hold any more.
    pub async fn nothing_held(&self) {
        for _ in 0..2_000 {
            if self.house.balance().await.held == NanoUsd::ZERO {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("a hold was left over");
    }

    /// The balance is whole, and the ledger knows of nothing but the grant.
    pub async fn assert_nothing_happened(&self, context: &str) {
        let money = self.house.balance().await;
        assert_eq!((money.balance, money.held), (money.granted, NanoUsd::ZERO), "{context}");
        let entries = self.house.ledger.entries(&self.house.tenant, 0, 10).await.expect("entries");
        assert_eq!(entries.len(), 1, "{context}: {entries:?}");
        assert_eq!(self.depth().await, 0, "{context}");
    }
}

pub fn hello() -> Value {
    json!({ "messages": [{ "role": "user", "content": "Hello" }] })
}

/// What every answer must carry.
pub fn assert_named(answer: &Response, context: &str) {
    let header = |name: &str| answer.headers().get(name).map(|value| value.to_str().expect("text").to_owned());
    assert!(header("x-request-id").is_some_and(|id| id.starts_with("req_")), "{context}: x-request-id");
    assert!(
        header("openai-processing-ms").is_some_and(|ms| ms.parse::<u64>().is_ok()),
        "{context}: openai-processing-ms"
    );
}

/// Checks an answer against the status, code and param of an error, and gives its message.
pub async fn assert_error(answer: Response, status: u16, code: &str, param: Option<&str>, context: &str) -> String {
    assert_named(&answer, context);
    let got = answer.status().as_u16();
    let text = answer.text().await.expect("a body");
    assert_eq!(got, status, "{context}: {text}");
    let json: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{context}: {error}: {text}"));
    let error = json["error"].as_object().unwrap_or_else(|| panic!("{context}: {text}"));
    assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"], "{context}");
    assert_eq!(error["code"], code, "{context}: {text}");
    assert_eq!(error["param"].as_str(), param, "{context}: {text}");
    assert!(error["type"].is_string(), "{context}: {text}");
    error["message"].as_str().expect("a message").to_owned()
}
