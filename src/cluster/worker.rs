//! The actor that owns one engine.
//!
//! Promises that loading never blocks an actor or the runtime, and that its own end, however it comes, is
//! heard by its supervisor. Keeps nothing that must survive it: what is in the air lives in the station.

use std::sync::Arc;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::mpsc;

use super::{
    flights::{Allowed, Outcome},
    pool::PoolMessage,
    station::{Station, WORKER_LOST},
};
use crate::{
    domain::{Claim, FailureCode, Priority, Telling, Told},
    engine::{EngineError, EngineHandle, EngineMessage, EngineRequest, Resumed},
    grammar::{Constraint, GrammarError},
};

/// Loads an engine that speaks to this sink. Blocks.
pub type Loader = Arc<dyn Fn(mpsc::Sender<EngineMessage>) -> Result<EngineHandle, EngineError> + Send + Sync>;

/// Steps that may wait between the engine and its pump. The pump never waits for a stream, so a few do.
const STEPS_WAITING_MAX: usize = 64;

pub struct Worker;

pub struct WorkerArguments {
    pub station: Arc<Station>,
    pub loader: Loader,
    pub generation: u64,
    pub pool: ActorRef<PoolMessage>,
}

pub enum WorkerMessage {
    Loaded(Result<EngineHandle, EngineError>),
    Submit(Vec<Start>),
    EngineDied(String),
    #[cfg(test)]
    Panic,
}

/// A request that is to be decoded, from its beginning or from where another worker was.
pub struct Start {
    pub claim: Arc<Claim>,
    pub told: Told,
    pub allowed: Allowed,
}

impl Start {
    fn ids_of(&self, choice: u32) -> &[u32] {
        self.told.choices.get(choice as usize).map_or(&[], |known| &known.ids)
    }

    pub fn fresh(claim: Arc<Claim>) -> Self {
        let allowed = Allowed { tokens: claim.job.allowed_tokens, is_all: false };
        Self { claim, told: Told::default(), allowed }
    }
}

pub struct WorkerState {
    arguments: WorkerArguments,
    steps: Option<mpsc::Receiver<EngineMessage>>,
    engine: Option<EngineHandle>,
}

impl Actor for Worker {
    type Msg = WorkerMessage;
    type State = WorkerState;
    type Arguments = WorkerArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<WorkerMessage>,
        arguments: WorkerArguments,
    ) -> Result<WorkerState, ActorProcessingErr> {
        let (sink, steps) = mpsc::channel(STEPS_WAITING_MAX);
        let loader = Arc::clone(&arguments.loader);
        tokio::spawn(async move {
            let loaded = tokio::task::spawn_blocking(move || loader(sink)).await;
            // A panic while loading was logged by the hook. If nobody listens any more, dropping the
            // handle ends the engine.
            let _ = myself.cast(WorkerMessage::Loaded(loaded.unwrap_or(Err(EngineError::Gone))));
        });
        Ok(WorkerState { arguments, steps: Some(steps), engine: None })
    }

    async fn handle(
        &self,
        myself: ActorRef<WorkerMessage>,
        message: WorkerMessage,
        state: &mut WorkerState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WorkerMessage::Loaded(loaded) => {
                let engine = loaded?;
                let steps = state.steps.take().ok_or("an engine was loaded twice")?;
                let WorkerArguments { station, generation, pool, .. } = &state.arguments;
                tokio::spawn(pump(steps, Arc::clone(station), *generation, myself));
                state.engine = Some(engine.clone());
                pool.cast(PoolMessage::WorkerReady(*generation, engine))?;
            }
            WorkerMessage::Submit(starts) => {
                state.arguments.station.mailbox.leave();
                let engine = state.engine.as_ref().ok_or("work came before the engine")?;
                let station = &state.arguments.station;
                for start in starts {
                    if start.claim.job.grammar.is_some() {
                        tokio::spawn(compile_and_submit(Arc::clone(station), engine.clone(), start));
                    } else {
                        submit(station, engine, start, &[]);
                    }
                }
            }
            WorkerMessage::EngineDied(why) => return Err(why.into()),
            #[cfg(test)]
            WorkerMessage::Panic => panic!("told to panic"),
        }
        Ok(())
    }
}

/// The same for a request whose answer must match a grammar: compiling takes milliseconds, which neither an actor
/// nor an engine should spend.
async fn compile_and_submit(station: Arc<Station>, engine: EngineHandle, start: Start) {
    let claim = Arc::clone(&start.claim);
    let Some(source) = claim.job.grammar.clone() else { return };
    let (grammars, lane) = (Arc::clone(&station.grammars), claim.job.tenant.to_string());
    let compiled = tokio::task::spawn_blocking(move || {
        let constraint = grammars.compile(&lane, &source)?;
        let read = (0..start.claim.job.choices).map(|choice| Held::behind(&constraint, start.ids_of(choice)));
        let held = read.collect::<Result<Vec<_>, GrammarError>>()?;
        Ok::<_, GrammarError>((start, held))
    });
    match compiled.await {
        Ok(Ok((start, held))) => submit(&station, &engine, start, &held),
        Ok(Err(error)) => fail(&station, &claim, &format!("its grammar was not compiled: {error}")),
        Err(error) => fail(&station, &claim, &format!("compiling its grammar failed: {error}")),
    }
}

/// A choice's place in the grammar of its request.
struct Held {
    constraint: Constraint,
    /// Nothing may follow.
    is_complete: bool,
}

impl Held {
    fn behind(constraint: &Constraint, ids: &[u32]) -> Result<Self, GrammarError> {
        let mut held = Self { constraint: constraint.clone(), is_complete: false };
        for id in ids {
            held.is_complete = held.constraint.accept(*id)?;
        }
        Ok(held)
    }
}

fn fail(station: &Arc<Station>, claim: &Claim, why: &str) {
    tracing::error!(request = %claim.job.request, why, "the engine did not take a request");
    let failed = Outcome::Failed { code: FailureCode::WorkerFailed, message: WORKER_LOST.to_owned() };
    station.end(&claim.job.request, failed);
}

/// `held`: of each choice, where there is a grammar.
fn submit(station: &Arc<Station>, engine: &EngineHandle, start: Start, held: &[Held]) {
    let claim = Arc::clone(&start.claim);
    let job = &claim.job;
    match station.flights.is_cancelled(&job.request) {
        None => return,
        Some(true) => return station.withdraw(&job.request),
        Some(false) => {}
    }
    let choice = |choice| {
        let mut sampling = job.sampling.clone();
        sampling.seed = sampling.seed.wrapping_add(u64::from(choice).wrapping_mul(CHOICES_APART));
        EngineRequest {
            request: job.request.clone(),
            choice,
            prompt: job.prompt.clone(),
            resumed: Resumed {
                tokens: start.ids_of(choice).to_vec(),
                text_bytes: start.told.choices.get(choice as usize).map_or(0, |known| known.text_bytes),
                is_complete: held.get(choice as usize).is_some_and(|held| held.is_complete),
                prompt_tokens: if choice == 0 { start.told.prompt_tokens } else { 0 },
            },
            output_tokens_max: job.output_tokens_max,
            sampling,
            stops: job.stops.clone(),
            // Of the prompt, one choice tells.
            telling: Telling { prompt_logprobs: job.telling.prompt_logprobs.filter(|_| choice == 0), ..job.telling },
            constraint: held.get(choice as usize).map(|held| held.constraint.clone()),
            // Who has waited before waits no more.
            priority: if claim.attempt > 1 { Priority::High } else { job.priority },
            // To the engine tenants are lanes: it need not know what a tenant is to keep them apart.
            lane: job.tenant.as_str().into(),
            cache_salt: job.cache_salt.clone().into_bytes(),
            allowed_tokens: start.allowed.tokens,
            step_tokens: if start.allowed.is_all { 0 } else { station.step_tokens },
        }
    };
    let is_open = |choice: &u32| start.told.choices.get(*choice as usize).is_none_or(|known| known.ended.is_none());
    if let Err(error) = engine.submit((0..job.choices).filter(is_open).map(choice).collect()) {
        return fail(station, &claim, &error.to_string());
    }
    // Its client may have gone between the look and the submission, when the engine did not know it yet.
    if station.flights.is_cancelled(&job.request) != Some(false) {
        engine.cancel(&job.request);
    }
}

/// Between the seeds of a request's choices, the first of which has the request's own. Any odd number would do.
const CHOICES_APART: u64 = 0x9e37_79b9_7f4a_7c15;

/// Carries the engine's steps to the station. Never waits for anything but the engine.
async fn pump(
    mut steps: mpsc::Receiver<EngineMessage>,
    station: Arc<Station>,
    generation: u64,
    worker: ActorRef<WorkerMessage>,
) {
    let mut end = End { worker, why: "its events were lost".to_owned() };
    while let Some(message) = steps.recv().await {
        match message {
            EngineMessage::Step(events) => station.advance(events, generation),
            EngineMessage::Died(why) => end.why = why,
        }
    }
}

/// Tells the worker that no more events will come, even if the pump panics.
struct End {
    worker: ActorRef<WorkerMessage>,
    why: String,
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.worker.cast(WorkerMessage::EngineDied(std::mem::take(&mut self.why)));
    }
}
