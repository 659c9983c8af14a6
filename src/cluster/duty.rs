//! What a supervisor has done for ever: claiming, renewing, sweeping, and so on, an actor each.
//!
//! Promises that a duty that panics is begun anew, with backoff, that it ends with its supervisor, and that the board
//! shows when it last got anywhere. A duty's work is a task beside its actor, so that no mailbox waits for it.

use std::{
    any::Any,
    collections::HashMap,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::{FutureExt, future::BoxFuture};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SpawnErr};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use super::restart::{RestartPolicy, Restarts};
use crate::directory::{self, ActorState};

/// Work that is done until it is stopped, or ends by itself.
#[derive(Clone)]
pub struct DutySpec {
    pub name: &'static str,
    run: Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>,
    /// What is under way is dropped then.
    stop: CancellationToken,
    /// Waits for it.
    tracker: TaskTracker,
}

impl DutySpec {
    pub fn new<F: Future<Output = ()> + Send + 'static>(
        name: &'static str,
        stop: &CancellationToken,
        tracker: &TaskTracker,
        run: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self {
        let run = Arc::new(move || run().boxed());
        Self { name, run, stop: stop.clone(), tracker: tracker.clone() }
    }
}

pub struct Duty;

pub enum DutyMessage {
    /// In order, or with a panic.
    Ended(Option<String>),
}

pub struct DutyState {
    actor: Arc<directory::Actor>,
    _stop: DropGuard,
}

impl Actor for Duty {
    type Msg = DutyMessage;
    type State = DutyState;
    type Arguments = (DutySpec, Arc<directory::Actor>);

    async fn pre_start(
        &self,
        myself: ActorRef<DutyMessage>,
        (spec, actor): Self::Arguments,
    ) -> Result<DutyState, ActorProcessingErr> {
        actor.is(ActorState::Ready);
        let stop = spec.stop.child_token();
        let work = AssertUnwindSafe((spec.run)()).catch_unwind();
        let work = Beating { work, actor: Arc::clone(&actor) };
        let until = stop.clone();
        spec.tracker.spawn(async move {
            let why = match until.run_until_cancelled(work).await {
                None | Some(Ok(())) => None,
                Some(Err(panic)) => Some(what_it_said(panic.as_ref())),
            };
            let _ = myself.cast(DutyMessage::Ended(why));
        });
        Ok(DutyState { actor, _stop: stop.drop_guard() })
    }

    async fn handle(
        &self,
        myself: ActorRef<DutyMessage>,
        DutyMessage::Ended(why): DutyMessage,
        state: &mut DutyState,
    ) -> Result<(), ActorProcessingErr> {
        if let Some(why) = why {
            return Err(why.into());
        }
        state.actor.is(ActorState::Stopped);
        myself.stop(None);
        Ok(())
    }
}

fn what_it_said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".to_owned())
}

/// Notes whenever its work goes on.
struct Beating<F> {
    work: F,
    actor: Arc<directory::Actor>,
}

impl<F: Future + Unpin> Future for Beating<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        self.actor.beat();
        Pin::new(&mut self.work).poll(context)
    }
}

/// The duties of one supervisor.
pub struct Duties {
    all: Vec<(DutySpec, Restarts, Arc<directory::Actor>)>,
    running: HashMap<ActorId, usize>,
}

impl Duties {
    /// They stand on the board below `place`.
    pub fn new(specs: Vec<DutySpec>, board: &directory::Board, place: &str, policy: RestartPolicy) -> Self {
        let at = |spec: DutySpec| {
            let actor = board.actor(&format!("{place}/{}", spec.name));
            (spec, Restarts::new(policy), actor)
        };
        Self { all: specs.into_iter().map(at).collect(), running: HashMap::new() }
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub async fn start(&mut self, index: usize, supervisor: ActorCell) -> Result<(), SpawnErr> {
        let (spec, _, actor) = &self.all[index];
        let (duty, _) = Actor::spawn_linked(None, Duty, (spec.clone(), Arc::clone(actor)), supervisor).await?;
        self.running.insert(duty.get_id(), index);
        Ok(())
    }

    /// One ended in order. `false`: it is none of these.
    pub fn ended(&mut self, who: ActorId) -> bool {
        self.running.remove(&who).is_some()
    }

    /// Which one failed, and when it is to be started again. Nothing where it is none of these.
    pub fn failed(&mut self, who: ActorId, why: &str) -> Option<(usize, Duration)> {
        let index = self.running.remove(&who)?;
        let (spec, restarts, actor) = &mut self.all[index];
        let verdict = restarts.failed(Instant::now(), rand::random_range(0..=1000));
        tracing::error!(duty = spec.name, why, after = ?verdict.after, "a duty failed; going on with it");
        actor.failed(why, verdict.available);
        Some((index, verdict.after))
    }
}
