//! The way into a running engine.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use parking_lot::{Condvar, Mutex};

use super::{EngineError, EngineRequest};
use crate::domain::RequestId;

/// What is going on inside, as of the last step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineLoad {
    pub running: usize,
    pub waiting: usize,
    pub kv_blocks_used: usize,
    pub kv_blocks_total: usize,
    /// Steps since the start; a number that stands still while `running` is not 0 is a frozen engine.
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

    /// # Errors
    /// [`EngineError::Full`] when the inbox has as many requests as the batch has places, and
    /// [`EngineError::Gone`] after the engine died. Cancellation has no bound to run into.
    pub fn submit(&self, request: EngineRequest) -> Result<(), EngineError> {
        self.shared.0.submit(request)
    }

    /// Takes effect before the next step. The request then ends with `Finished { reason: Cancelled }`;
    /// one that is unknown or has ended is left alone.
    pub fn cancel(&self, request: &RequestId) {
        self.shared.0.cancel(request.clone());
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
    submitted: VecDeque<EngineRequest>,
    cancelled: Vec<RequestId>,
    shutdown: bool,
    gone: bool,
}

/// What came in since the last look.
#[derive(Default)]
pub(super) struct News {
    pub submitted: VecDeque<EngineRequest>,
    pub cancelled: Vec<RequestId>,
    pub shutdown: bool,
}

impl Shared {
    pub fn new(inbox_max: usize) -> Self {
        Self { inbox: Mutex::default(), news: Condvar::new(), inbox_max, load: LoadCell::default() }
    }

    fn submit(&self, request: EngineRequest) -> Result<(), EngineError> {
        let mut inbox = self.inbox.lock();
        if inbox.gone || inbox.shutdown {
            return Err(EngineError::Gone);
        }
        if inbox.submitted.len() >= self.inbox_max {
            return Err(EngineError::Full);
        }
        inbox.submitted.push_back(request);
        self.news.notify_one();
        Ok(())
    }

    fn cancel(&self, request: RequestId) {
        let mut inbox = self.inbox.lock();
        if !inbox.gone {
            inbox.cancelled.push(request);
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

    /// What is new; waits for something when `idle`.
    pub fn look(&self, idle: bool) -> News {
        let mut inbox = self.inbox.lock();
        while idle && inbox.submitted.is_empty() && inbox.cancelled.is_empty() && !inbox.shutdown {
            self.news.wait(&mut inbox);
        }
        News {
            submitted: std::mem::take(&mut inbox.submitted),
            cancelled: std::mem::take(&mut inbox.cancelled),
            shutdown: inbox.shutdown,
        }
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
