//! The way into a running engine.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{EngineError, EngineRequest};
use crate::domain::{FundsEnd, RequestId};

/// What is going on inside, as of the last step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineLoad {
    pub running: usize,
    pub waiting: usize,
    pub kv_blocks_used: usize,
    pub kv_blocks_total: usize,
    /// Steps since the start; a number that stands still while `running` is not 0 is a frozen engine. Where all wait
    /// for tokens that are not paid for yet, looking whether some came counts as a step.
    pub steps: u64,
}

/// Cheap to clone. Dropping the last one shuts the engine down.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Owned>,
}

struct Owned(Arc<Shared>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.shutdown();
    }
}

impl EngineHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared: Arc::new(Owned(shared)) }
    }

    /// All choices of one request, which share what it may decode, or none of them. A request that is offered again
    /// replaces what is left of its earlier attempt.
    ///
    /// # Errors
    /// [`EngineError::Full`] when the inbox has as many requests as the batch has places, and
    /// [`EngineError::Gone`] after the engine died. Cancellation has no bound to run into.
    pub fn submit(&self, choices: Vec<EngineRequest>) -> Result<(), EngineError> {
        self.shared.0.submit(choices)
    }

    /// So many tokens more are paid for, for all choices of the request together. `last`: and no more will come, so
    /// that what has not ended by itself ends with the last of them. A request that is unknown or has ended is left
    /// alone.
    pub fn allow(&self, request: &RequestId, tokens: u32, last: Option<FundsEnd>) {
        self.shared.0.send(Mail::Allow(request.clone(), tokens, last));
    }

    /// Takes effect before the next step. The request then ends with `Finished { reason: Cancelled }`;
    /// one that is unknown or has ended is left alone.
    pub fn cancel(&self, request: &RequestId) {
        self.shared.0.send(Mail::Cancel(request.clone()));
    }

    pub fn load(&self) -> EngineLoad {
        self.shared.0.load.get()
    }

    /// Ends the thread after the step that is running. What is unfinished gets no more events.
    pub fn shutdown(&self) {
        self.shared.0.shutdown();
    }
}

/// What the handle and the engine's thread share.
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    news: Condvar,
    inbox_max: usize,
    pub load: LoadCell,
}

#[derive(Default)]
struct Inbox {
    mail: Vec<Mail>,
    /// Choices in it.
    submitted: usize,
    shutdown: bool,
    gone: bool,
}

/// What the handle has to say, in the order in which it is said.
pub(super) enum Mail {
    Submit(Vec<EngineRequest>),
    Allow(RequestId, u32, Option<FundsEnd>),
    Cancel(RequestId),
}

/// What came in since the last look.
#[derive(Default)]
pub(super) struct News {
    pub mail: Vec<Mail>,
    pub shutdown: bool,
}

/// How long to wait for news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    None,
    AtMost(Duration),
    Endless,
}

impl Shared {
    pub fn new(inbox_max: usize) -> Self {
        Self { inbox: Mutex::default(), news: Condvar::new(), inbox_max, load: LoadCell::default() }
    }

    fn submit(&self, choices: Vec<EngineRequest>) -> Result<(), EngineError> {
        let mut inbox = self.inbox.lock();
        if inbox.gone || inbox.shutdown {
            return Err(EngineError::Gone);
        }
        if inbox.submitted + choices.len() > self.inbox_max {
            return Err(EngineError::Full);
        }
        inbox.submitted += choices.len();
        inbox.mail.push(Mail::Submit(choices));
        self.news.notify_one();
        Ok(())
    }

    /// Of requests that were submitted, so that there are hardly more of them than of these.
    fn send(&self, mail: Mail) {
        let mut inbox = self.inbox.lock();
        if !inbox.gone {
            inbox.mail.push(mail);
            self.news.notify_one();
        }
    }

    fn shutdown(&self) {
        self.inbox.lock().shutdown = true;
        self.news.notify_one();
    }

    pub fn is_shut_down(&self) -> bool {
        self.inbox.lock().shutdown
    }

    /// What is new; waits for something as long as `patience` allows.
    pub fn look(&self, patience: Patience) -> News {
        let mut inbox = self.inbox.lock();
        let until = match patience {
            Patience::AtMost(time) => Some(Instant::now() + time),
            Patience::None | Patience::Endless => None,
        };
        while patience != Patience::None && inbox.mail.is_empty() && !inbox.shutdown {
            match until {
                None => self.news.wait(&mut inbox),
                Some(until) if self.news.wait_until(&mut inbox, until).timed_out() => break,
                Some(_) => {}
            }
        }
        inbox.submitted = 0;
        News { mail: std::mem::take(&mut inbox.mail), shutdown: inbox.shutdown }
    }

    /// After this, `submit` says that the engine is gone.
    pub fn close(&self) {
        *self.inbox.lock() = Inbox { gone: true, ..Inbox::default() };
        self.load.set(EngineLoad::default());
    }
}

#[derive(Default)]
pub(super) struct LoadCell {
    running: AtomicUsize,
    waiting: AtomicUsize,
    kv_blocks_used: AtomicUsize,
    kv_blocks_total: AtomicUsize,
    steps: AtomicU64,
}

impl LoadCell {
    pub fn set(&self, load: EngineLoad) {
        self.running.store(load.running, Relaxed);
        self.waiting.store(load.waiting, Relaxed);
        self.kv_blocks_used.store(load.kv_blocks_used, Relaxed);
        self.kv_blocks_total.store(load.kv_blocks_total, Relaxed);
        self.steps.store(load.steps, Relaxed);
    }

    fn get(&self) -> EngineLoad {
        EngineLoad {
            running: self.running.load(Relaxed),
            waiting: self.waiting.load(Relaxed),
            kv_blocks_used: self.kv_blocks_used.load(Relaxed),
            kv_blocks_total: self.kv_blocks_total.load(Relaxed),
            steps: self.steps.load(Relaxed),
        }
    }
}
