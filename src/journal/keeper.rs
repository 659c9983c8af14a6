//! The thread that waits for the disk, so that those who write do not.
//!
//! It makes the disk write once for all who wait by then, sets room aside before it is needed, and copies what is
//! unfinished to a new file when the old one has grown too long. Nobody else replaces the file.

use std::{
    mem,
    sync::{Arc, atomic::Ordering},
    thread,
};

use super::{
    JournalError,
    file::{Handle, LogFile, ROOM_BYTES, make_room, sync, sync_folder},
    frame,
    writer::{Mail, Shared},
};
use crate::fault;

/// What may be left to copy while writers wait.
const COPY_WHILE_WAITING_BYTES_MAX: u64 = 64 << 10;
const COPY_ROUNDS_MAX: usize = 8;

pub struct Keeper {
    shared: Arc<Shared>,
    file: Handle,
    /// Up to where the file has room on the disk.
    room_bytes: u64,
    /// The file is copied when it is longer: `limit_bytes`, or more where a copy would be nearly as long.
    bytes_max: u64,
    limit_bytes: u64,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>, file: Handle, limit_bytes: u64) -> Self {
        let keeper = Self { shared, file, room_bytes: ROOM_BYTES, bytes_max: limit_bytes, limit_bytes };
        keeper.look_later();
        keeper
    }

    /// Until the journal is dropped.
    pub(super) fn serve(mut self) {
        loop {
            let Mail { waiting, is_long, closing, .. } = self.next_mail();
            if !waiting.is_empty() {
                let synced = self.check(sync(&self.file, &self.shared.path));
                self.shared.syncs.fetch_add(1, Ordering::Relaxed);
                fault::point("journal.ended.synced");
                for tell in waiting {
                    // Whoever has gone away has written all the same.
                    let _ = tell.send(synced.clone());
                }
            }
            if closing {
                return;
            }
            if is_long {
                self.look();
                self.look_later();
            }
        }
    }

    fn next_mail(&self) -> Mail {
        let mut mail = self.shared.mail.lock();
        while mail.waiting.is_empty() && !mail.is_long && !mail.closing {
            self.shared.has_mail.wait(&mut mail);
        }
        mem::take(&mut mail)
    }

    fn look(&mut self) {
        let (bytes, has_failed) = {
            let state = self.shared.state.lock();
            (state.file.bytes(), state.fault.is_some())
        };
        if has_failed {
            return;
        }
        if bytes > self.bytes_max {
            self.compact();
        } else if bytes > self.room_bytes - ROOM_BYTES / 2 {
            let from = self.room_bytes.max(bytes);
            make_room(&self.file, from);
            self.room_bytes = from + ROOM_BYTES;
        }
    }

    fn look_later(&self) {
        let bytes = self.bytes_max.min(self.room_bytes - ROOM_BYTES / 2);
        self.shared.look_at_bytes.store(bytes, Ordering::Relaxed);
    }

    /// A disk that failed to write once cannot be trusted to have written what it says it has.
    fn check(&self, done: Result<(), JournalError>) -> Result<(), JournalError> {
        if let Err(error) = &done {
            tracing::error!(%error, "the journal has failed");
            self.shared.state.lock().fault.get_or_insert_with(|| error.clone());
        }
        done
    }

    fn compact(&mut self) {
        match self.copy_unfinished() {
            Ok(copy_bytes) => {
                self.room_bytes = ROOM_BYTES;
                self.bytes_max = self.limit_bytes.max(2 * copy_bytes);
                // The name, and what was written to the old file by some who still wait.
                let synced = sync_folder(&self.shared.folder).and_then(|()| sync(&self.file, &self.shared.path));
                let _ = self.check(synced);
                fault::point("journal.compacted");
            }
            Err(error) => {
                self.bytes_max += self.limit_bytes;
                tracing::warn!(%error, "the journal could not be made shorter, and grows");
            }
        }
    }

    /// Writes what is unfinished to a new file, and all that is written meanwhile; then it takes the old one's place.
    /// Answers with its length.
    ///
    /// Whoever was told that a settlement is on the disk was told so before this began, by this thread. So it is in the
    /// first part, which is on the disk before the new file has the name.
    fn copy_unfinished(&mut self) -> Result<u64, JournalError> {
        let shared = &*self.shared;
        let (records, mut copied) = {
            let state = shared.state.lock();
            (state.book.records(), state.file.bytes())
        };
        let mut frames = Vec::new();
        for record in &records {
            frame::push(&mut frames, record).map_err(|bytes| JournalError::TooLong { bytes })?;
        }
        // Of an earlier attempt that failed.
        let _ = std::fs::remove_file(&shared.successor);
        let mut new = LogFile::create(shared.successor.to_path_buf())?;
        let mut fill = || {
            new.append(&frames)?;
            for _ in 0..COPY_ROUNDS_MAX {
                let written = shared.state.lock().file.bytes();
                if written - copied <= COPY_WHILE_WAITING_BYTES_MAX {
                    break;
                }
                new.append_from(&self.file, copied, written)?;
                copied = written;
            }
            sync(&new.handle(), new.path())
        };
        if let Err(error) = fill() {
            new.discard();
            return Err(error);
        }
        let mut state = shared.state.lock();
        // A file that could not be written may have been cut off where it was copied.
        let may_swap = state.fault.clone().map_or(Ok(()), Err);
        let written = state.file.bytes();
        let swapped = may_swap
            .and_then(|()| new.append_from(&self.file, copied, written))
            .and_then(|()| new.rename(&shared.path));
        if let Err(error) = swapped {
            drop(state);
            new.discard();
            return Err(error);
        }
        let (bytes, handle) = (new.bytes(), new.handle());
        let old = mem::replace(&mut state.file, new);
        drop(state);
        // Only now: the disk frees what it held, which takes time.
        drop((old, mem::replace(&mut self.file, handle)));
        Ok(bytes)
    }
}

/// Also by a panic: nobody waits for a disk that nobody makes write.
impl Drop for Keeper {
    fn drop(&mut self) {
        if thread::panicking() {
            let stopped = JournalError::Stopped(self.shared.path.to_path_buf());
            self.shared.state.lock().fault.get_or_insert(stopped);
        }
        let mut mail = self.shared.mail.lock();
        mail.is_dead = true;
        mail.waiting.clear();
    }
}
