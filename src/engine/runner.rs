//! The engine's thread: takes requests, plans steps, samples, and says what happened.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{
    Backend, Batch, BatchSequence, EngineError, EngineEvent, EngineEventBody, EngineHandle, EngineLoad, EngineMessage,
    EngineRequest, EngineSpec, Forward, Speculation,
    allowance::Share,
    blocks::BlockPool,
    draft::DRAFTS_MAX,
    handle::{Mail, News, Patience, Shared},
    line::{Line, Ticket},
    masks::Masks,
    onnx,
    pace::{Load, Pace},
    planner::{self, Candidate, Leader, Limits, Turn},
    sampler,
    scripted::Scripted,
    sequence::{Ending, Sequence},
    verify::{tell_of_prompt, verify},
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
    let shared = Arc::new(Shared::new(4 * spec.sequences_max * CHOICES_MAX));
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

/// Choices that one request may have at most, whatever an edge allows.
const CHOICES_MAX: usize = 128;
/// Rows of a prompt that is told of in one step: each has logits over the whole vocabulary.
const TOLD_ROWS_MAX: usize = 16;
/// How often to look up from waiting for tokens that are not paid for yet, so that nobody takes this for a freeze.
const LOOK_EVERY: Duration = Duration::from_millis(250);

struct Runner {
    forward: Box<dyn Forward>,
    vocabulary: Arc<Vocabulary>,
    pool: BlockPool,
    settings: Settings,
    /// In order of admission.
    running: Vec<Running>,
    waiting: Line<Sequence>,
    /// From the first request with a grammar on.
    masks: Option<Masks>,
    pace: Pace,
    scratch: sampler::Scratch,
    events: Vec<EngineEvent>,
    steps: u64,
    /// Plans made so far: tokens are set aside for one at a time.
    plans: u64,
    /// Until there is news, nobody can go on: all wait for tokens.
    sits: bool,
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
    blocks: usize,
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
    decoded_tokens: prometheus::IntCounter,
    drafted_tokens: prometheus::IntCounter,
    accepted_draft_tokens: prometheus::IntCounter,
}

impl Counts {
    fn new(metrics: &Metrics, model: &str) -> Self {
        Self {
            step_seconds: metrics.step_seconds.with_label_values(&[model]),
            preemptions: metrics.preemptions.with_label_values(&[model]),
            prefix_hit_tokens: metrics.prefix_hit_tokens.with_label_values(&[model]),
            decoded_tokens: metrics.decoded_tokens.with_label_values(&[model]),
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
            blocks,
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
        let runner = Self::new(forward, vocabulary, settings, Instant::now, shared, gauges, counts);
        runner.publish_load();
        Ok(runner)
    }

    fn new(
        forward: Box<dyn Forward>,
        vocabulary: Arc<Vocabulary>,
        settings: Settings,
        clock: fn() -> Instant,
        shared: Arc<Shared>,
        gauges: Gauges,
        counts: Counts,
    ) -> Self {
        Self {
            forward,
            vocabulary,
            pool: BlockPool::new(settings.blocks, settings.block_tokens, settings.prefix_cache),
            settings,
            running: Vec::new(),
            waiting: Line::new(),
            masks: None,
            pace: Pace::new(),
            scratch: sampler::Scratch::default(),
            events: Vec::new(),
            steps: 0,
            plans: 0,
            sits: false,
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
            let news = self.shared.look(self.patience());
            if news.shutdown {
                return Ok(());
            }
            self.take_in(news);
            if !self.is_idle() {
                let started = Instant::now();
                self.step()?;
                if !self.sits {
                    self.counts.step_seconds.observe(started.elapsed().as_secs_f64());
                }
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

    fn patience(&self) -> Patience {
        match self.sits {
            _ if self.is_idle() => Patience::Endless,
            true => Patience::AtMost(LOOK_EVERY),
            false => Patience::None,
        }
    }

    fn take_in(&mut self, news: News) {
        for mail in news.mail {
            match mail {
                Mail::Submit(choices) => self.take_up(choices),
                Mail::Allow(request, tokens, last) => {
                    let known = self.sequences().find(|sequence| sequence.spec.request == request);
                    if known.map(|sequence| sequence.share.allow(tokens, last)).is_some() {
                        self.ask_for_tokens(&request);
                        self.end_unpaid();
                    }
                }
                Mail::Cancel(request) => {
                    for sequence in self.remove(|sequence| sequence.spec.request == request) {
                        let ending = Ending { reason: FinishReason::Cancelled, stopped_by: None };
                        self.events.push(sequence.event(sequence.finished(ending)));
                    }
                }
            }
        }
    }

    /// Puts all choices of a request in line.
    fn take_up(&mut self, choices: Vec<EngineRequest>) {
        let Some(EngineRequest { request, allowed_tokens, step_tokens, .. }) = choices.first() else { return };
        let (request, allowed_tokens, step_tokens) = (request.clone(), *allowed_tokens, *step_tokens);
        drop(self.remove(|earlier| earlier.spec.request == request));
        let (good, bad): (Vec<_>, Vec<_>) =
            choices.into_iter().map(|spec| (self.fault(&spec), spec)).partition(|(fault, _)| fault.is_none());
        for (fault, EngineRequest { request, choice, .. }) in bad {
            let message = fault.unwrap_or_default();
            self.events.push(EngineEvent { request, choice, body: EngineEventBody::Failed { message } });
        }
        let outputs =
            good.iter().map(|(_, spec)| spec.output_tokens_max.saturating_sub(spec.resumed.tokens.len() as u32));
        let shares = Share::split(allowed_tokens, step_tokens, outputs);
        for ((_, spec), share) in good.into_iter().zip(shares) {
            let (lane, priority) = (Arc::clone(&spec.lane), spec.priority);
            let block_tokens = self.settings.block_tokens;
            let (mut sequence, ending) = Sequence::new(spec, share, &self.pool, block_tokens, &self.vocabulary);
            match ending {
                None => self.waiting.join(&lane, priority, (self.clock)(), sequence),
                Some(ending) => {
                    self.events.push(sequence.event(sequence.finished(ending)));
                    sequence.share.close();
                }
            }
        }
        self.ask_for_tokens(&request);
        self.end_unpaid();
    }

    /// Ends everybody who can decode nothing more, wherever it is.
    fn end_unpaid(&mut self) {
        for mut sequence in self.remove(|sequence| sequence.share.end().is_some()) {
            let Some(ending) = sequence.run_out() else { continue };
            sequence.speak(true, &mut self.events);
            self.events.push(sequence.event(sequence.finished(ending)));
        }
    }

    /// If the time has come.
    fn ask_for_tokens(&mut self, request: &RequestId) {
        let asks =
            |sequence: &Sequence| Some(sequence.event(EngineEventBody::NeedsTokens { wanted: sequence.share.ask()? }));
        let event = self.sequences().find(|sequence| sequence.spec.request == *request).and_then(asks);
        self.events.extend(event);
    }

    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        let waiting = self.waiting.iter().map(|(_, sequence)| sequence);
        self.running.iter().map(|running| &running.sequence).chain(waiting)
    }

    /// Why a request cannot be served.
    fn fault(&self, spec: &EngineRequest) -> Option<String> {
        let longest = spec.prompt.len() + spec.output_tokens_max as usize;
        let context = self.settings.context_tokens_max;
        if spec.prompt.is_empty() {
            Some("the prompt has no tokens".to_owned())
        } else if longest > context {
            Some(format!("prompt and output of {longest} tokens exceed the context of {context}"))
        } else if spec.prompt.iter().chain(&spec.resumed.tokens).any(|t| *t as usize >= self.vocabulary.len()) {
            Some("a prompt token is outside the vocabulary".to_owned())
        } else {
            None
        }
    }

    fn remove(&mut self, which: impl Fn(&Sequence) -> bool) -> Vec<Sequence> {
        let mut removed = self.waiting.leave(|sequence| which(sequence));
        let chosen = self.running.extract_if(.., |running| which(&running.sequence));
        removed.extend(chosen.map(|running| running.sequence));
        removed
    }

    fn step(&mut self) -> Result<(), EngineError> {
        let members = self.schedule();
        self.steps += u64::from(self.sits || !members.is_empty());
        if members.is_empty() {
            return Ok(());
        }
        let started = (self.clock)();
        self.ask_for_masks(&members)?;
        let mut load = Load::default();
        let mut batch = Batch::default();
        for Member { at, rows, logits_rows, .. } in &members {
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
        let mut masks = HashMap::new();
        for (at, constraint, mask) in self.masks.iter_mut().flat_map(Masks::collect) {
            self.running[at].sequence.constraint = Some(constraint);
            masks.insert(at, mask);
        }
        let mut ended = Vec::new();
        let mut has_run_out = false;
        for Member { at, rows, logits_rows, prompt_rows } in members {
            let (own, others) = logits
                .split_at_checked(logits_rows * vocabulary)
                .ok_or_else(|| EngineError::Limits("the model returned too few rows".into()))?;
            logits = others;
            let (of_prompt, own) = own.split_at(prompt_rows * vocabulary);
            let sequence = &mut self.running[at].sequence;
            tell_of_prompt(sequence, of_prompt.chunks_exact(vocabulary), &mut self.scratch);
            let drafts = sequence.take_drafts();
            sequence.computed += rows - drafts.len();
            let mask = masks.remove(&at);
            let rows = own.chunks_exact(vocabulary);
            let known = sequence.tokens.len();
            let end = verify(sequence, rows, &drafts, mask, &self.vocabulary, &mut self.scratch);
            self.counts.decoded_tokens.inc_by((sequence.tokens.len() - known) as u64);
            self.counts.drafted_tokens.inc_by(drafts.len() as u64);
            self.counts.accepted_draft_tokens.inc_by(end.accepted as u64);
            if !matches!(end.last, Some(EngineEventBody::Failed { .. })) {
                sequence.publish(self.settings.block_tokens);
            }
            sequence.speak(end.last.is_some(), &mut self.events);
            has_run_out |= sequence.share.end().is_some();
            if let Some(last) = end.last {
                self.events.push(sequence.event(last));
                sequence.share.close();
                ended.push(at);
            }
        }
        // Of a request whose other choices wait, one that has just ended tells.
        for Running { sequence, .. } in &self.running {
            let wanted = sequence.share.ask();
            self.events.extend(wanted.map(|wanted| sequence.event(EngineEventBody::NeedsTokens { wanted })));
        }
        for at in ended.into_iter().rev() {
            self.running.remove(at);
        }
        if has_run_out {
            self.end_unpaid();
        }
        self.pace.observe(load, ((self.clock)() - started).as_secs_f64() * 1e3);
        Ok(())
    }

    /// Plans the step and makes room for it.
    fn schedule(&mut self) -> Vec<Member> {
        let now = (self.clock)();
        self.pool.set_time(now - self.started);
        self.waiting.age(now);
        self.plans += 1;
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
        let mut has_preempted = false;
        for (mut running, turn) in std::mem::take(&mut self.running).into_iter().zip(plan.running) {
            match turn {
                Turn::Rows(rows) => {
                    members.push(Member::new(kept.len(), rows));
                    kept.push(running);
                }
                Turn::Preempted => {
                    has_preempted = true;
                    running.sequence.preempt();
                    self.waiting.rejoin(running.ticket, running.sequence);
                    self.counts.preemptions.inc();
                }
            }
        }
        for (running, rows) in joining {
            members.push(Member::new(kept.len(), rows));
            kept.push(running);
        }
        self.running = kept;
        members.retain(|member| member.rows > 0);
        let all_wait = || self.running.iter().all(|running| running.sequence.waits_for_tokens());
        self.sits = members.is_empty() && !has_preempted && all_wait();
        for Member { at, rows, logits_rows, prompt_rows } in &mut members {
            let sequence = &mut self.running[*at].sequence;
            if sequence.prompt_rows(*rows) > 0 {
                *rows = (*rows).min(TOLD_ROWS_MAX);
            }
            let end = sequence.computed + *rows;
            let known = sequence.tokens.len();
            sequence.drafts.truncate(end.saturating_sub(known));
            sequence.show_drafts();
            *prompt_rows = sequence.prompt_rows(*rows);
            // Of a prompt that is told of, every row: those before the last are its own.
            let sampled = (end + 1).saturating_sub(known);
            *logits_rows = if *prompt_rows > 0 { *rows } else { sampled };
            *prompt_rows = if *prompt_rows > 0 { *rows - sampled } else { 0 };
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
            if sequence.is_at_its_end() {
                sequence.may_decode = sequence.share.promise(1, self.plans) == 1;
                if sequence.may_decode {
                    decodes.add(sequence.computed, 1, 1);
                }
            }
        }
        // A prompt may yet have rows to go before its first token.
        for Running { sequence, .. } in self.running.iter_mut().filter(|running| !running.sequence.is_at_its_end()) {
            sequence.may_decode = sequence.share.promise(1, self.plans) == 1;
            prompts += 1;
            position = position.or(Some(sequence.computed));
        }
        let able = self.waiting.iter().filter(|(_, sequence)| !sequence.share.is_empty());
        prompts += able.take(sequences_max - self.running.len()).count();
        if speculation != Speculation::Off && prompts == 0 {
            for Running { sequence, .. } in self.running.iter_mut().filter(|running| running.sequence.may_decode) {
                // What a row costs, in tokens that the batch could have had instead.
                let price = self.pace.draft_price(decodes, sequence.computed) * decodes.rows as f64;
                let wanted = match speculation {
                    // What a grammar allows behind a guess would have to be known before the guess is.
                    _ if sequence.constraint.is_some() => 0,
                    Speculation::Always => DRAFTS_MAX,
                    _ => sequence.drafter.wanted(price),
                };
                let most = wanted.min(sequence.output_left().saturating_sub(1));
                let guess = sequence.drafter.guess(&sequence.tokens, most);
                let paid = sequence.share.promise(guess.len(), self.plans);
                sequence.drafts.extend_from_slice(&guess[..paid]);
            }
        }
        let chunk_tokens_max = self.pace.chunk_tokens(decodes, prompts, position.unwrap_or(0));
        Limits { sequences_max, step_tokens_max, chunk_tokens_max, block_tokens, blocks_total: self.pool.total() }
    }

    /// What the planner has to know of who waits at `at`.
    fn candidate(&self, at: usize) -> Candidate {
        let Some((ticket, sequence)) = self.waiting.get(at) else { unreachable!("asked for within the line") };
        let (tokens, priority) = (sequence.tokens.len(), ticket.priority);
        let may_decode = sequence.share.promise(1, self.plans) == 1;
        if !self.settings.prefix_cache || !may_decode {
            return Candidate { tokens, may_decode, priority, found: 0, found_free: 0, behind: None };
        }
        let usable = sequence.usable();
        let found = self.pool.find(usable);
        let next = usable.get(found.blocks);
        let computes_next = |other: &Sequence| next.is_some() && other.chain.names().get(found.blocks) == next;
        // Nobody waits for somebody of a lower class, who may itself have to wait, nor for who waits for tokens.
        let leads = |Running { ticket, sequence }: &Running| {
            ticket.priority >= priority && !sequence.waits_for_tokens() && computes_next(sequence)
        };
        let behind = if self.running.iter().any(leads) {
            Some(Leader::Running)
        } else {
            self.waiting.iter().take(at).position(|(_, other)| computes_next(other)).map(Leader::Waiting)
        };
        Candidate { tokens, may_decode, priority, found: found.blocks, found_free: found.kept, behind }
    }

    /// Has it worked out what the grammars of those that are sampled from in this step allow.
    fn ask_for_masks(&mut self, members: &[Member]) -> Result<(), EngineError> {
        for Member { at, .. } in members.iter().filter(|member| member.logits_rows > member.prompt_rows) {
            let Some(constraint) = self.running[*at].sequence.constraint.take() else { continue };
            let masks = match self.masks.take() {
                Some(masks) => masks,
                None => Masks::start()?,
            };
            self.masks.insert(masks).ask(*at, constraint)?;
        }
        Ok(())
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
    /// Those of the logits' rows, the first, that tell of the prompt instead of being sampled from.
    prompt_rows: usize,
}

impl Member {
    fn new(at: usize, rows: usize) -> Self {
        Self { at, rows, logits_rows: 0, prompt_rows: 0 }
    }
}

#[cfg(test)]
mod tests;
