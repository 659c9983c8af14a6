//! The engine's thread: takes requests, plans steps, samples, and says what happened.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use tokio::sync::mpsc;

use super::{
    Backend, Batch, BatchSequence, EngineError, EngineEvent, EngineEventBody, EngineHandle, EngineLoad, EngineMessage,
    EngineRequest, EngineSpec, Forward,
    blocks::{BlockPool, BlockTable},
    handle::{News, Shared},
    onnx,
    planner::{self, Demand, Limits},
    sampler,
    scripted::Scripted,
    text::{Progress, TextAssembler},
};
use crate::{
    domain::{FinishReason, RequestId, Usage},
    model::Vocabulary,
    telemetry::Metrics,
};

/// See [`super::spawn`].
pub fn spawn(
    spec: EngineSpec,
    sink: mpsc::Sender<EngineMessage>,
    metrics: Arc<Metrics>,
) -> Result<EngineHandle, EngineError> {
    if spec.step_tokens_max < spec.sequences_max {
        return Err(EngineError::Limits(format!(
            "step_tokens_max ({}) must be at least sequences_max ({}), so that every sequence moves in every step",
            spec.step_tokens_max, spec.sequences_max
        )));
    }
    // Submissions of requests that were cancelled meanwhile stay in the inbox until the next look.
    let shared = Arc::new(Shared::new(4 * spec.sequences_max));
    let gauges = Gauges::new(&metrics, spec.model.as_str());
    let (ready, loaded) = std::sync::mpsc::sync_channel(1);
    let on_thread = Arc::clone(&shared);
    std::thread::Builder::new()
        .name(format!("engine {}", spec.model))
        .spawn(move || {
            let shared = on_thread;
            let run = || {
                let mut runner = match Runner::load(spec, Arc::clone(&shared), gauges.clone(), metrics) {
                    Ok(runner) => runner,
                    Err(e) => {
                        let _ = ready.send(Err(e));
                        return None;
                    }
                };
                let _ = ready.send(Ok(()));
                Some(runner.run(&sink))
            };
            // The panic has been logged by the hook; here it becomes the engine's last word.
            let why = match catch_unwind(AssertUnwindSafe(run)) {
                Ok(None) => return shared.close(),
                Ok(Some(Ok(()))) => "shut down".to_owned(),
                Ok(Some(Err(e))) => e.to_string(),
                Err(_) => "the engine panicked".to_owned(),
            };
            // One that was retired has a successor, whose numbers these gauges show now.
            if !shared.is_shut_down() {
                gauges.set(EngineLoad::default());
            }
            shared.close();
            let _ = sink.blocking_send(EngineMessage::Died(why));
        })
        .map_err(|e| EngineError::Limits(format!("cannot start the engine's thread: {e}")))?;
    loaded.recv().map_err(|_| EngineError::Gone)??;
    Ok(EngineHandle::new(shared))
}

struct Runner {
    forward: Box<dyn Forward>,
    vocabulary: Arc<Vocabulary>,
    pool: BlockPool,
    limits: Limits,
    context_tokens_max: usize,
    /// In order of admission.
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    scratch: sampler::Scratch,
    events: Vec<EngineEvent>,
    steps: u64,
    shared: Arc<Shared>,
    gauges: Gauges,
    step_seconds: prometheus::Histogram,
    preemptions: prometheus::IntCounter,
}

/// The gauges of one model, looked up once. They outlive the runner, so that a dead engine shows no load.
#[derive(Clone)]
struct Gauges {
    running: prometheus::IntGauge,
    waiting: prometheus::IntGauge,
    kv_blocks_used: prometheus::IntGauge,
    kv_blocks_total: prometheus::IntGauge,
}

impl Gauges {
    fn new(metrics: &Metrics, model: &str) -> Self {
        Self {
            running: metrics.running.with_label_values(&[model]),
            waiting: metrics.waiting.with_label_values(&[model]),
            kv_blocks_used: metrics.kv_blocks_used.with_label_values(&[model]),
            kv_blocks_total: metrics.kv_blocks_total.with_label_values(&[model]),
        }
    }

    fn set(&self, load: EngineLoad) {
        self.running.set(load.running as i64);
        self.waiting.set(load.waiting as i64);
        self.kv_blocks_used.set(load.kv_blocks_used as i64);
        self.kv_blocks_total.set(load.kv_blocks_total as i64);
    }
}

struct Sequence {
    request: RequestId,
    spec: EngineRequest,
    /// Prompt and output.
    tokens: Vec<u32>,
    computed: usize,
    blocks: BlockTable,
    text: TextAssembler,
    /// Decoded tokens that no event has counted yet.
    uncounted: u32,
}

impl Sequence {
    fn demand(&self) -> Demand {
        Demand { tokens: self.tokens.len(), computed: self.computed, blocks: self.blocks.ids().len() }
    }

    fn usage(&self) -> Usage {
        let prompt = self.spec.prompt.len();
        Usage { prompt_tokens: prompt as u32, completion_tokens: (self.tokens.len() - prompt) as u32, cached_tokens: 0 }
    }
}

impl Runner {
    fn load(spec: EngineSpec, shared: Arc<Shared>, gauges: Gauges, metrics: Arc<Metrics>) -> Result<Self, EngineError> {
        let context_tokens_max = spec.context_tokens_max.min(spec.file.params.context_tokens);
        let block_bytes = onnx::kv_block_bytes(&spec.file.params, spec.kv_block_tokens);
        let blocks = spec.kv_memory_bytes / block_bytes;
        // One block more than the longest sequence, so that the last one alone can always go on.
        let blocks_min = context_tokens_max.div_ceil(spec.kv_block_tokens) + 1;
        if blocks < blocks_min {
            return Err(EngineError::Limits(format!(
                "kv_memory_mib of model {} gives {blocks} KV blocks, but one sequence of {context_tokens_max} tokens needs {blocks_min} ({} MiB)",
                spec.model,
                (blocks_min * block_bytes).div_ceil(1 << 20)
            )));
        }
        let limits = Limits {
            sequences_max: spec.sequences_max,
            step_tokens_max: spec.step_tokens_max,
            block_tokens: spec.kv_block_tokens,
        };
        let vocabulary = Arc::clone(&spec.file.vocabulary);
        let forward: Box<dyn Forward> = match &spec.backend {
            Backend::Onnx(runtime) => {
                Box::new(onnx::OnnxModel::load(runtime, &spec.file, blocks, spec.kv_block_tokens, context_tokens_max)?)
            }
            Backend::Scripted => Box::new(Scripted::new(Arc::clone(&vocabulary))),
        };
        let model = [spec.model.as_str()];
        let runner = Self {
            forward,
            vocabulary,
            pool: BlockPool::new(blocks, spec.kv_block_tokens),
            limits,
            context_tokens_max,
            running: Vec::new(),
            waiting: VecDeque::new(),
            scratch: sampler::Scratch::default(),
            events: Vec::new(),
            steps: 0,
            shared,
            gauges,
            step_seconds: metrics.step_seconds.with_label_values(&model),
            preemptions: metrics.preemptions.with_label_values(&model),
        };
        runner.publish_load();
        Ok(runner)
    }

    fn run(&mut self, sink: &mpsc::Sender<EngineMessage>) -> Result<(), EngineError> {
        loop {
            let idle = self.running.is_empty() && self.waiting.is_empty();
            let news = self.shared.look(idle);
            if news.shutdown {
                return Ok(());
            }
            self.take_in(news);
            if !(self.running.is_empty() && self.waiting.is_empty()) {
                let started = Instant::now();
                self.step()?;
                self.step_seconds.observe(started.elapsed().as_secs_f64());
            }
            self.publish_load();
            if !self.events.is_empty() {
                let events = std::mem::take(&mut self.events);
                if sink.blocking_send(EngineMessage::Step(events)).is_err() {
                    return Ok(());
                }
            }
        }
    }

    fn take_in(&mut self, news: News) {
        for spec in news.submitted {
            let longest = spec.prompt.len() + spec.output_tokens_max as usize;
            let fault = if spec.prompt.is_empty() {
                Some("the prompt has no tokens".to_owned())
            } else if longest > self.context_tokens_max {
                Some(format!("prompt and output of {longest} tokens exceed the context of {}", self.context_tokens_max))
            } else if spec.prompt.iter().any(|t| *t as usize >= self.vocabulary.len()) {
                Some("a prompt token is outside the vocabulary".to_owned())
            } else {
                None
            };
            if let Some(message) = fault {
                self.events.push(EngineEvent { request: spec.request, body: EngineEventBody::Failed { message } });
                continue;
            }
            // A request that is offered again replaces what is left of its earlier attempt.
            self.running.retain(|sequence| sequence.request != spec.request);
            self.waiting.retain(|sequence| sequence.request != spec.request);
            self.waiting.push_back(Sequence {
                request: spec.request.clone(),
                tokens: spec.prompt.clone(),
                computed: 0,
                blocks: self.pool.table(),
                text: TextAssembler::new(spec.stop.clone()),
                uncounted: 0,
                spec,
            });
        }
        for request in news.cancelled {
            let found = if let Some(at) = self.running.iter().position(|s| s.request == request) {
                Some(self.running.remove(at))
            } else {
                let at = self.waiting.iter().position(|s| s.request == request);
                at.and_then(|at| self.waiting.remove(at))
            };
            if let Some(sequence) = found {
                let body = EngineEventBody::Finished { reason: FinishReason::Cancelled, usage: sequence.usage() };
                self.events.push(EngineEvent { request, body });
            }
        }
    }

    fn step(&mut self) -> Result<(), EngineError> {
        let rows = self.schedule();
        if rows.is_empty() {
            return Ok(());
        }
        self.steps += 1;
        let mut batch = Batch::default();
        let mut members = Vec::with_capacity(rows.len());
        for (at, rows) in rows {
            let sequence = &self.running[at];
            members.push((at, rows));
            batch.sequences.push(BatchSequence {
                tokens: &sequence.tokens,
                prompt_tokens: sequence.spec.prompt.len(),
                computed: sequence.computed,
                rows,
                logits_rows: usize::from(sequence.computed + rows == sequence.tokens.len()),
                blocks: sequence.blocks.ids(),
            });
        }
        let vocabulary = self.forward.vocabulary();
        let logits = self.forward.forward(&batch)?;
        let mut logits = logits.chunks_exact(vocabulary);
        let mut ended = Vec::new();
        for (at, rows) in members {
            let sequence = &mut self.running[at];
            sequence.computed += rows;
            if sequence.computed < sequence.tokens.len() {
                continue;
            }
            let row = logits.next().ok_or_else(|| EngineError::Limits("the model returned too few rows".into()))?;
            if !sampler::is_finite(row) {
                let message = "the model computed something that is not a number".to_owned();
                let request = sequence.request.clone();
                self.events.push(EngineEvent { request, body: EngineEventBody::Failed { message } });
                ended.push(at);
                continue;
            }
            let token = sampler::sample(row, &sequence.spec.sampling, sequence.tokens.len(), &mut self.scratch);
            if accept(sequence, token, &self.vocabulary, &mut self.events) {
                ended.push(at);
            }
        }
        for at in ended.into_iter().rev() {
            self.running.remove(at);
        }
        Ok(())
    }

    /// Plans the step and makes room for it: (index in `running`, rows) of each sequence that takes part.
    fn schedule(&mut self) -> Vec<(usize, usize)> {
        let running: Vec<Demand> = self.running.iter().map(Sequence::demand).collect();
        let waiting = self.waiting.iter().map(Sequence::demand);
        let plan = planner::plan(&running, waiting, self.pool.free(), &self.limits);
        for _ in 0..plan.preempted {
            let Some(mut sequence) = self.running.pop() else { break };
            sequence.blocks.clear();
            sequence.computed = 0;
            self.waiting.push_front(sequence);
            self.preemptions.inc();
        }
        let joined = self.waiting.drain(..plan.admitted.len());
        self.running.extend(joined);
        let mut rows = Vec::new();
        for (at, count) in plan.running.into_iter().chain(plan.admitted).enumerate() {
            let sequence = &mut self.running[at];
            if count > 0 {
                let has_room = sequence.blocks.grow_to(sequence.computed + count);
                assert!(has_room, "the planner gave out more KV blocks than there are");
                rows.push((at, count));
            }
        }
        rows
    }

    fn publish_load(&self) {
        let load = EngineLoad {
            running: self.running.len(),
            waiting: self.waiting.len(),
            kv_blocks_used: self.pool.total() - self.pool.free(),
            kv_blocks_total: self.pool.total(),
            steps: self.steps,
        };
        self.shared.load.set(load);
        // A retired engine that wakes up late must not paint over its successor's numbers.
        if !self.shared.is_shut_down() {
            self.gauges.set(load);
        }
    }
}

/// Adds a decoded token to its sequence; true when the answer is over.
fn accept(sequence: &mut Sequence, token: u32, vocabulary: &Vocabulary, events: &mut Vec<EngineEvent>) -> bool {
    sequence.tokens.push(token);
    sequence.uncounted += 1;
    let decoded = sequence.tokens.len() - sequence.spec.prompt.len();
    let (text, reason) = if !sequence.spec.ignore_eos && vocabulary.is_eos(token) {
        (sequence.text.finish(), Some(FinishReason::Stop))
    } else {
        match sequence.text.push(vocabulary.bytes(token)) {
            Progress::Stopped(text) => (text, Some(FinishReason::Stop)),
            Progress::Text(text) if decoded >= sequence.spec.output_tokens_max as usize => {
                (text + &sequence.text.finish(), Some(FinishReason::Length))
            }
            Progress::Text(text) => (text, None),
        }
    };
    if !text.is_empty() {
        let tokens = std::mem::take(&mut sequence.uncounted);
        let body = EngineEventBody::Delta { text, tokens };
        events.push(EngineEvent { request: sequence.request.clone(), body });
    }
    if let Some(reason) = reason {
        let body = EngineEventBody::Finished { reason, usage: sequence.usage() };
        events.push(EngineEvent { request: sequence.request.clone(), body });
    }
    reason.is_some()
}
