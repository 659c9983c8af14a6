//! The journal of this process, as those who write it see it.
//!
//! Whoever writes holds a lock for one write call, and nobody holds it while the disk is made to write.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::{
    Begun, Ended, JournalError, Orphan, Unsettled,
    book::Book,
    failed,
    file::{Folder, LogFile, journal_path, successor_path, sync, sync_folder},
    frame::{self, Record},
    keeper::Keeper,
    orphan,
};
use crate::{
    domain::{NodeId, RequestId},
    fault,
};

const FILE_BYTES_MAX: u64 = 64 << 20;

/// The journal of this process. All of it may be used from many threads at once; nothing but [`Journal::open`],
/// [`Journal::take_over`] and the drop waits for the disk, and [`Journal::ended`] without holding up a thread.
///
/// Dropped while nothing is unfinished, it leaves no file.
pub struct Journal {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What those who write share with the [`Keeper`].
pub(super) struct Shared {
    pub folder: Box<Path>,
    /// The journal's name, whichever file stands under it.
    pub path: Box<Path>,
    pub successor: Box<Path>,
    pub state: Mutex<State>,
    pub mail: Mutex<Mail>,
    pub has_mail: Condvar,
    /// The keeper has something to do once the file is longer.
    pub look_at_bytes: AtomicU64,
    pub syncs: AtomicU64,
}

pub(super) struct State {
    pub file: LogFile,
    pub book: Book,
    pub fault: Option<JournalError>,
    frames: Vec<u8>,
}

/// What the keeper is asked for. Under a lock of its own: a keeper that is slow to wake holds up nobody who writes.
#[derive(Default)]
pub(super) struct Mail {
    /// Who has written and waits for the disk.
    pub waiting: Vec<oneshot::Sender<Result<(), JournalError>>>,
    pub is_long: bool,
    pub closing: bool,
    /// Nobody reads it any more.
    pub is_dead: bool,
}

impl Journal {
    /// Makes this process's journal in `folder`, and the folder if need be. The file is on the disk afterwards.
    pub fn open(folder: &Path, node: &NodeId) -> Result<Self, JournalError> {
        Self::open_with_limit(folder, node, FILE_BYTES_MAX)
    }

    /// `bytes_max`: when the file has grown beyond, what is unfinished is copied to a new one.
    pub fn open_with_limit(folder: &Path, node: &NodeId, bytes_max: u64) -> Result<Self, JournalError> {
        let path = journal_path(folder, node);
        let file = {
            let _folder = Folder::lock(folder)?;
            if path.exists() {
                let is_left_over = LogFile::take(path.clone())?.is_some();
                return Err(if is_left_over { JournalError::LeftOver(path) } else { JournalError::Held(path) });
            }
            LogFile::create(path.clone())?
        };
        // The folder may be new as well.
        let folders = [Some(folder), folder.parent().filter(|parent| !parent.as_os_str().is_empty())];
        let synced = sync(&file.handle(), &path);
        let synced = synced.and_then(|()| folders.into_iter().flatten().try_for_each(sync_folder));
        if let Err(error) = synced {
            file.discard();
            return Err(error);
        }
        let keeper_file = file.handle();
        let shared = Arc::new(Shared {
            folder: folder.into(),
            path: path.as_path().into(),
            successor: successor_path(folder, node).into(),
            state: Mutex::new(State { file, book: Book::default(), fault: None, frames: Vec::new() }),
            mail: Mutex::default(),
            has_mail: Condvar::new(),
            look_at_bytes: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
        });
        let keeper = Keeper::new(Arc::clone(&shared), keeper_file, bytes_max);
        let thread = thread::Builder::new().name("journal".into()).spawn(move || keeper.serve());
        let thread = thread.map_err(failed("start a thread for", &path))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The journals of dead processes in `folder`. Each is held by this process until it is dropped or removed; two
    /// processes never hold the same.
    pub fn take_over(folder: &Path) -> Result<Vec<Orphan>, JournalError> {
        orphan::take_over(folder)
    }

    /// From here on the request is owed for. Begun again, it counts anew.
    pub fn begin(&self, begun: &Begun) -> Result<(), JournalError> {
        self.shared.write(|book| vec![book.begin(begun)])?;
        fault::point("journal.begin.written");
        Ok(())
    }

    /// Completion tokens of each request so far, all choices together, after one step of the engine. Never waits for
    /// the disk. Requests that are not open are passed over, and a count never falls.
    pub fn progress(&self, tokens: &[(RequestId, u32)]) -> Result<(), JournalError> {
        self.shared.write(|book| book.progress(tokens))?;
        fault::point("journal.progress.written");
        Ok(())
    }

    /// The settlement that the ledger is to be told of. On the disk when it returns. A request that is not open is
    /// passed over.
    pub async fn ended(&self, ended: &Ended) -> Result<(), JournalError> {
        if !self.shared.write(|book| book.end(ended).into_iter().collect())? {
            return Ok(());
        }
        fault::point("journal.ended.written");
        let (tell, synced) = oneshot::channel();
        self.shared.tell_keeper(|mail| {
            if !mail.is_dead {
                mail.waiting.push(tell);
            }
        });
        synced.await.unwrap_or_else(|_| Err(JournalError::Stopped(self.shared.path.to_path_buf())))
    }

    /// The ledger knows, or the request is free. A request that is not open is passed over.
    pub fn closed(&self, request: &RequestId) -> Result<(), JournalError> {
        self.shared.write(|book| book.close(request).into_iter().collect())?;
        fault::point("journal.closed.written");
        Ok(())
    }

    /// What was begun and not closed, in order.
    pub fn unfinished(&self) -> Vec<Unsettled> {
        self.shared.state.lock().book.unfinished()
    }

    /// Why nothing more is written; every call answers with it from then on.
    pub fn fault(&self) -> Option<JournalError> {
        self.shared.state.lock().fault.clone()
    }

    /// How often the disk was made to write for those who waited.
    pub fn syncs(&self) -> u64 {
        self.shared.syncs.load(Ordering::Relaxed)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.shared.tell_keeper(|mail| mail.closing = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let state = self.shared.state.lock();
        if state.fault.is_none()
            && state.book.is_empty()
            && let Err(error) = std::fs::remove_file(&self.shared.path)
        {
            tracing::warn!(path = %self.shared.path.display(), %error, "cannot remove a journal that owes nothing");
        }
    }
}

impl Shared {
    /// Writes what the book makes of an operation in one call, and then into the book. `false`: it is nothing.
    fn write(&self, plan: impl FnOnce(&Book) -> Vec<Record>) -> Result<bool, JournalError> {
        let mut state = self.state.lock();
        let State { file, book, fault, frames } = &mut *state;
        if let Some(fault) = fault {
            return Err(fault.clone());
        }
        let records = plan(book);
        if records.is_empty() {
            return Ok(false);
        }
        frames.clear();
        for record in &records {
            frame::push(frames, record).map_err(|bytes| JournalError::TooLong { bytes })?;
        }
        if let Err(error) = file.append(frames) {
            tracing::error!(%error, "the journal has failed");
            *fault = Some(error.clone());
            return Err(error);
        }
        records.into_iter().for_each(|record| book.apply(record));
        let bytes = file.bytes();
        drop(state);
        if bytes > self.look_at_bytes.load(Ordering::Relaxed) {
            // Once, until the keeper says where to look again.
            self.look_at_bytes.store(u64::MAX, Ordering::Relaxed);
            self.tell_keeper(|mail| mail.is_long = true);
        }
        Ok(true)
    }

    fn tell_keeper(&self, write: impl FnOnce(&mut Mail)) {
        write(&mut self.mail.lock());
        self.has_mail.notify_one();
    }
}
