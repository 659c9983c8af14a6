//! A running engine on the real model, and what comes out of it.

use std::{collections::HashMap, sync::Arc};

use lightcone::{
    domain::{FinishReason, ModelId, Priority, RequestId, SamplingParams, Stops, Telling, Usage},
    engine::{
        self, Backend, EngineEventBody, EngineHandle, EngineMessage, EngineRequest, EngineSpec, Resumed, Speculation,
    },
    prompt::Tokenizer,
    telemetry::Metrics,
};
use tokio::sync::mpsc;

use super::model::{model, runtime};

pub const TEXT: &str = include_str!("../../data/alice.txt");

/// A running engine and the events of its requests.
pub struct Served {
    pub handle: EngineHandle,
    pub events: mpsc::Receiver<EngineMessage>,
    pub metrics: Arc<Metrics>,
}

pub type Answers = HashMap<String, (String, FinishReason, Usage)>;

/// Shares prefixes and guesses ahead where it pays, as by default.
pub fn spec(sequences_max: usize, step_tokens_max: usize, kv_mib: usize) -> EngineSpec {
    EngineSpec {
        model: ModelId::from("test"),
        file: model(),
        backend: Backend::Onnx(runtime()),
        context_tokens_max: 1024,
        sequences_max,
        step_tokens_max,
        kv_block_tokens: 16,
        kv_memory_bytes: kv_mib << 20,
        prefix_cache: true,
        speculation: Speculation::Auto,
    }
}

pub fn tokens(text: &str) -> Vec<u32> {
    Tokenizer::new(Arc::clone(&model().vocabulary)).unwrap().encode(text, true).unwrap()
}

/// Greedy, in the model's chat format.
pub fn request(id: &str, text: &str, output_tokens_max: u32) -> EngineRequest {
    EngineRequest {
        request: RequestId::from(id),
        choice: 0,
        prompt: tokens(&format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")),
        resumed: Resumed::default(),
        output_tokens_max,
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        stops: Stops::default(),
        telling: Telling::default(),
        constraint: None,
        priority: Priority::Normal,
        lane: "tenant".into(),
        cache_salt: vec![],
        allowed_tokens: output_tokens_max,
        step_tokens: 0,
    }
}

impl Served {
    pub fn spawn(spec: EngineSpec) -> Self {
        let (sink, events) = mpsc::channel(64);
        let metrics = Arc::new(Metrics::new());
        Self { handle: engine::spawn(spec, sink, Arc::clone(&metrics)).unwrap(), events, metrics }
    }

    /// Submits all, as fast as they are taken in, and waits for all.
    pub fn answers(&mut self, requests: Vec<EngineRequest>) -> Answers {
        let count = requests.len();
        let mut requests = requests.into_iter().peekable();
        let mut texts: HashMap<String, (String, u32)> = HashMap::new();
        let mut answers = Answers::new();
        while answers.len() < count {
            while let Some(request) = requests.peek() {
                match self.handle.submit(vec![request.clone()]) {
                    Ok(()) => drop(requests.next()),
                    Err(engine::EngineError::Full) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            let EngineMessage::Step(events) = self.events.blocking_recv().expect("the engine lives") else {
                panic!("the engine died");
            };
            for event in events {
                let id = event.request.to_string();
                match event.body {
                    EngineEventBody::Prompt { .. } => {}
                    EngineEventBody::NeedsTokens { wanted } => self.handle.allow(&event.request, wanted, None),
                    EngineEventBody::Delta { text, ids, .. } => {
                        let entry = texts.entry(id).or_default();
                        entry.0 += &text;
                        entry.1 += ids.len() as u32;
                    }
                    EngineEventBody::Finished { reason, usage, .. } => {
                        let (text, counted) = texts.remove(&id).unwrap_or_default();
                        assert!(counted <= usage.completion_tokens);
                        answers.insert(id, (text, reason, usage));
                    }
                    EngineEventBody::Failed { message } => panic!("{id}: {message}"),
                }
            }
        }
        answers
    }
}
