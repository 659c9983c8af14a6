//! The engine's thread: takes requests, plans steps, samples, and says what happened.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use tokio::sync::mpsc;

use super::{
    Backend, Batch, BatchSequence, EngineError, EngineEvent, EngineEventBody, EngineHandle, EngineLoad, EngineMessage,
    EngineRequest, EngineSpec, Forward, Speculation,
    blocks::BlockPool,
    draft::DRAFTS_MAX,
    handle::{News, Shared},
    line::{Line, Ticket},
    onnx,
    pace::{Load, Pace},
    planner::{self, Candidate, Leader, Limits, Turn},
    sampler,
    scripted::Scripted,
    sequence::Sequence,
};
use crate::{
    domain::{FinishReason, RequestId},
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
                let mut runner = match Runner::load(spec, Arc::clone(&shared), gauges.clone(), &metrics) {
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
    settings: Settings,
    /// In order of admission.
    running: Vec<Running>,
    waiting: Line<Sequence>,
    pace: Pace,
    scratch: sampler::Scratch,
    events: Vec<EngineEvent>,
    steps: u64,
    clock: fn() -> Instant,
    started: Instant,
    shared: Arc<Shared>,
    gauges: Gauges,
    counts: Counts,
}

struct Running {
    ticket: Ticket,
    sequence: Sequence,
}

#[derive(Clone, Copy)]
struct Settings {
    context_tokens_max: usize,
    sequences_max: usize,
    step_tokens_max: usize,
    block_tokens: usize,
    prefix_cache: bool,
    speculation: Speculation,
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

/// What one model counts, looked up once.
struct Counts {
    step_seconds: prometheus::Histogram,
    preemptions: prometheus::IntCounter,
    prefix_hit_tokens: prometheus::IntCounter,
    drafted_tokens: prometheus::IntCounter,
    accepted_draft_tokens: prometheus::IntCounter,
}

impl Counts {
    fn new(metrics: &Metrics, model: &str) -> Self {
        Self {
            step_seconds: metrics.step_seconds.with_label_values(&[model]),
            preemptions: metrics.preemptions.with_label_values(&[model]),
            prefix_hit_tokens: metrics.prefix_hit_tokens.with_label_values(&[model]),
            drafted_tokens: metrics.drafted_tokens.with_label_values(&[model]),
            accepted_draft_tokens: metrics.accepted_draft_tokens.with_label_values(&[model]),
        }
    }
}

impl Runner {
    fn load(spec: EngineSpec, shared: Arc<Shared>, gauges: Gauges, metrics: &Metrics) -> Result<Self, EngineError> {
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
        let settings = Settings {
            context_tokens_max,
            sequences_max: spec.sequences_max,
            step_tokens_max: spec.step_tokens_max,
            block_tokens: spec.kv_block_tokens,
            prefix_cache: spec.prefix_cache,
            // A script says what happens at which token; it is to be met a token a step.
            speculation: match spec.backend {
                Backend::Onnx(_) => spec.speculation,
                Backend::Scripted => Speculation::Off,
            },
        };
        let vocabulary = Arc::clone(&spec.file.vocabulary);
        let forward: Box<dyn Forward> = match &spec.backend {
            Backend::Onnx(runtime) => {
                Box::new(onnx::OnnxModel::load(runtime, &spec.file, blocks, spec.kv_block_tokens, context_tokens_max)?)
            }
            Backend::Scripted => Box::new(Scripted::new(Arc::clone(&vocabulary))),
        };
        let counts = Counts::new(metrics, spec.model.as_str());
        let runner = Self::new(forward, vocabulary, blocks, settings, Instant::now, shared, gauges, counts);
        runner.publish_load();
        Ok(runner)
    }

    fn new(
        forward: Box<dyn Forward>,
        vocabulary: Arc<Vocabulary>,
        blocks: usize,
        settings: Settings,
        clock: fn() -> Instant,
        shared: Arc<Shared>,
        gauges: Gauges,
        counts: Counts,
    ) -> Self {
        Self {
            forward,
            vocabulary,
            pool: BlockPool::new(blocks, settings.block_tokens, settings.prefix_cache),
            settings,
            running: Vec::new(),
            waiting: Line::new(),
            pace: Pace::new(),
            scratch: sampler::Scratch::default(),
            events: Vec::new(),
            steps: 0,
            clock,
            started: clock(),
            shared,
            gauges,
            counts,
        }
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    fn run(&mut self, sink: &mpsc::Sender<EngineMessage>) -> Result<(), EngineError> {
        loop {
            let news = self.shared.look(self.is_idle());
            if news.shutdown {
                return Ok(());
            }
            self.take_in(news);
            if !self.is_idle() {
                let started = Instant::now();
                self.step()?;
                self.counts.step_seconds.observe(started.elapsed().as_secs_f64());
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
            if let Some(message) = self.fault(&spec) {
                self.events.push(EngineEvent { request: spec.request, body: EngineEventBody::Failed { message } });
                continue;
            }
            // A request that is offered again replaces what is left of its earlier attempt.
            drop(self.remove(&spec.request));
            let priority = spec.priority;
            let sequence = Sequence::new(spec, &self.pool, self.settings.block_tokens);
            self.waiting.join(&sequence.spec.lane.clone(), priority, (self.clock)(), sequence);
        }
        for request in news.cancelled {
            if let Some(sequence) = self.remove(&request) {
                let usage = sequence.usage();
                self.events.push(sequence.event(EngineEventBody::Finished { reason: FinishReason::Cancelled, usage }));
            }
        }
    }

    /// Why a request cannot be served.
    fn fault(&self, spec: &EngineRequest) -> Option<String> {
        let longest = spec.prompt.len() + spec.output_tokens_max as usize;
        let context = self.settings.context_tokens_max;
        if spec.prompt.is_empty() {
            Some("the prompt has no tokens".to_owned())
        } else if longest > context {
            Some(format!("prompt and output of {longest} tokens exceed the context of {context}"))
        } else if spec.prompt.iter().any(|t| *t as usize >= self.vocabulary.len()) {
            Some("a prompt token is outside the vocabulary".to_owned())
        } else {
            None
        }
    }

    fn remove(&mut self, request: &RequestId) -> Option<Sequence> {
        match self.running.iter().position(|running| running.sequence.spec.request == *request) {
            Some(at) => Some(self.running.remove(at).sequence),
            None => self.waiting.leave(|sequence| sequence.spec.request == *request).pop(),
        }
    }

    fn step(&mut self) -> Result<(), EngineError> {
        let members = self.schedule();
        if members.is_empty() {
            return Ok(());
        }
        self.steps += 1;
        let started = (self.clock)();
        let mut load = Load::default();
        let mut batch = Batch::default();
        for Member { at, rows, logits_rows } in &members {
            let sequence = &self.running[*at].sequence;
            load.add(sequence.computed, *rows, *logits_rows);
            batch.sequences.push(BatchSequence {
                tokens: &sequence.tokens,
                prompt_tokens: sequence.spec.prompt.len(),
                computed: sequence.computed,
                rows: *rows,
                logits_rows: *logits_rows,
                blocks: sequence.blocks.ids(),
            });
        }
        let vocabulary = self.forward.vocabulary();
        let mut logits = self.forward.forward(&batch)?;
        let mut ended = Vec::new();
        for Member { at, rows, logits_rows } in members {
            let (own, others) = logits
                .split_at_checked(logits_rows * vocabulary)
                .ok_or_else(|| EngineError::Limits("the model returned too few rows".into()))?;
            logits = others;
            let sequence = &mut self.running[at].sequence;
            let drafts = sequence.take_drafts();
            sequence.computed += rows - drafts.len();
            let end = verify(sequence, own.chunks_exact(vocabulary), &drafts, &self.vocabulary, &mut self.scratch);
            self.counts.drafted_tokens.inc_by(drafts.len() as u64);
            self.counts.accepted_draft_tokens.inc_by(end.accepted as u64);
            if !matches!(end.last, Some(EngineEventBody::Failed { .. })) {
                sequence.publish(self.settings.block_tokens);
            }
            sequence.speak(&mut self.events);
            if let Some(last) = end.last {
                self.events.push(sequence.event(last));
                ended.push(at);
            }
        }
        for at in ended.into_iter().rev() {
            self.running.remove(at);
        }
        self.pace.observe(load, ((self.clock)() - started).as_secs_f64() * 1e3);
        Ok(())
    }

    /// Plans the step and makes room for it.
    fn schedule(&mut self) -> Vec<Member> {
        let now = (self.clock)();
        self.pool.set_time(now - self.started);
        self.waiting.age(now);
        let limits = self.prepare();
        let running: Vec<_> = self.running.iter().map(|r| r.sequence.demand(r.ticket.priority)).collect();
        let candidates = (0..self.waiting.len()).map(|at| self.candidate(at));
        let plan = planner::plan(&running, candidates, self.pool.free(), &limits);
        // Who joins takes what was found for it before anybody's growth could push it out.
        let mut joining = Vec::with_capacity(plan.admitted.len());
        for (before, (at, rows)) in plan.admitted.into_iter().enumerate() {
            let (ticket, mut sequence) = self.waiting.serve(at - before);
            if let Some(hit) = sequence.begin(&self.pool, self.settings.block_tokens) {
                self.counts.prefix_hit_tokens.inc_by(hit.into());
            }
            joining.push((Running { ticket, sequence }, rows));
        }
        let mut members = Vec::with_capacity(self.running.len() + joining.len());
        let mut kept = Vec::with_capacity(self.running.len() + joining.len());
        for (mut running, turn) in std::mem::take(&mut self.running).into_iter().zip(plan.running) {
            match turn {
                Turn::Rows(rows) => {
                    members.push(Member { at: kept.len(), rows, logits_rows: 0 });
                    kept.push(running);
                }
                Turn::Preempted => {
                    running.sequence.preempt();
                    self.waiting.rejoin(running.ticket, running.sequence);
                    self.counts.preemptions.inc();
                }
            }
        }
        for (running, rows) in joining {
            members.push(Member { at: kept.len(), rows, logits_rows: 0 });
            kept.push(running);
        }
        self.running = kept;
        members.retain(|member| member.rows > 0);
        for Member { at, rows, logits_rows } in &mut members {
            let sequence = &mut self.running[*at].sequence;
            let end = sequence.computed + *rows;
            let known = sequence.tokens.len();
            sequence.drafts.truncate(end.saturating_sub(known));
            sequence.show_drafts();
            *logits_rows = (end + 1).saturating_sub(known);
            let has_room = sequence.blocks.grow_to(end);
            assert!(has_room, "the planner gave out more KV blocks than there are");
        }
        members
    }

    /// Has drafts guessed, and says how much the step may hold.
    fn prepare(&mut self) -> Limits {
        let Settings { sequences_max, step_tokens_max, block_tokens, speculation, .. } = self.settings;
        let (mut decodes, mut prompts, mut position) = (Load::default(), 0, None);
        for Running { sequence, .. } in &mut self.running {
            sequence.drafts.clear();
            match sequence.tokens.len() - sequence.computed {
                1 => decodes.add(sequence.computed, 1, 1),
                _ => {
                    prompts += 1;
                    position = position.or(Some(sequence.computed));
                }
            }
        }
        prompts += self.waiting.len().min(sequences_max - self.running.len());
        if speculation != Speculation::Off && prompts == 0 {
            for Running { sequence, .. } in &mut self.running {
                // What a row costs, in tokens that the batch could have had instead.
                let price = self.pace.draft_price(decodes, sequence.computed) * decodes.rows as f64;
                let wanted = match speculation {
                    Speculation::Always => DRAFTS_MAX,
                    _ => sequence.drafter.wanted(price),
                };
                let most = wanted.min(sequence.output_left().saturating_sub(1));
                sequence.drafts.extend_from_slice(sequence.drafter.guess(&sequence.tokens, most));
            }
        }
        let chunk_tokens_max = self.pace.chunk_tokens(decodes, prompts, position.unwrap_or(0));
        Limits { sequences_max, step_tokens_max, chunk_tokens_max, block_tokens, blocks_total: self.pool.total() }
    }

    /// What the planner has to know of who waits at `at`.
    fn candidate(&self, at: usize) -> Candidate {
        let Some((ticket, sequence)) = self.waiting.get(at) else { unreachable!("asked for within the line") };
        let (tokens, priority) = (sequence.tokens.len(), ticket.priority);
        if !self.settings.prefix_cache {
            return Candidate { tokens, priority, found: 0, found_free: 0, behind: None };
        }
        let usable = sequence.chain.usable(tokens);
        let found = self.pool.find(usable);
        let next = usable.get(found.blocks);
        let computes_next = |other: &Sequence| next.is_some() && other.chain.names().get(found.blocks) == next;
        // Nobody waits for somebody of a lower class, who may itself have to wait.
        let leads = |running: &Running| running.ticket.priority >= priority && computes_next(&running.sequence);
        let behind = if self.running.iter().any(leads) {
            Some(Leader::Running)
        } else {
            self.waiting.iter().take(at).position(|(_, other)| computes_next(other)).map(Leader::Waiting)
        };
        Candidate { tokens, priority, found: found.blocks, found_free: found.kept, behind }
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

/// A sequence's part in one step.
struct Member {
    /// Its place in `Runner::running`.
    at: usize,
    rows: usize,
    logits_rows: usize,
}

/// What came of one sequence's step.
struct End {
    /// Drafts that were right.
    accepted: usize,
    /// Its last event, if it has ended.
    last: Option<EngineEventBody>,
}

/// Samples from row after row of `logits` for as long as what comes out is what the next row was computed
/// with. Random numbers belong to positions, so this is what would have come out row by row.
fn verify<'a>(
    sequence: &mut Sequence,
    logits: impl Iterator<Item = &'a [f32]>,
    drafts: &[u32],
    vocabulary: &Vocabulary,
    scratch: &mut sampler::Scratch,
) -> End {
    let mut end = End { accepted: 0, last: None };
    for (i, row) in logits.enumerate() {
        if !sampler::is_finite(row) {
            let message = "the model computed something that is not a number".to_owned();
            end.last = Some(EngineEventBody::Failed { message });
            break;
        }
        let token = sampler::sample(row, &sequence.spec.sampling, sequence.tokens.len(), scratch);
        let is_right = drafts.get(i) == Some(&token);
        end.accepted += usize::from(is_right);
        // All but the token that is new now.
        sequence.computed = sequence.tokens.len();
        if let Some(reason) = sequence.accept(token, vocabulary) {
            end.last = Some(EngineEventBody::Finished { reason, usage: sequence.usage() });
            break;
        }
        if !is_right {
            break;
        }
    }
    sequence.drafter.learn(drafts.len(), end.accepted);
    end
}

#[cfg(test)]
mod tests;
