//! Journals of dead processes.

use std::path::Path;

use super::{
    JournalError, Unsettled,
    book::Book,
    file::{Folder, LogFile},
    frame::{self, Reading},
};
use crate::domain::{NodeId, RequestId};

/// The journal of a dead process, held by this one. Dropped before it was removed, it is there for the next start.
#[must_use = "what a dead process owes must be dealt with"]
pub struct Orphan {
    node: NodeId,
    file: LogFile,
    book: Book,
    fault: Option<JournalError>,
}

pub(super) fn take_over(folder: &Path) -> Result<Vec<Orphan>, JournalError> {
    let taken = Folder::lock(folder)?.take_all()?;
    taken.into_iter().map(|(node, file)| Orphan::read(node, file)).collect()
}

impl Orphan {
    fn read(node: NodeId, mut file: LogFile) -> Result<Self, JournalError> {
        let mut book = Book::default();
        let path = || file.path().to_owned();
        let fault = match file.read().map(|bytes| (frame::read(&bytes, |record| book.apply(record)), bytes.len())) {
            Ok((Reading::Sound { whole_bytes }, bytes)) => {
                if whole_bytes < bytes {
                    let path = path();
                    let cut = bytes - whole_bytes;
                    tracing::warn!(path = %path.display(), cut_bytes = cut, "cut off what was not written to its end");
                    file.truncate(whole_bytes as u64)?;
                }
                None
            }
            Ok((Reading::Damaged { offset, damage }, _)) => {
                Some(JournalError::Damaged { path: path(), offset: offset as u64, damage })
            }
            Ok((Reading::UnknownVersion(version), _)) => Some(JournalError::UnknownVersion { path: path(), version }),
            Err(error) => Some(error),
        };
        if let Some(fault) = &fault {
            tracing::error!(%node, %fault, readable = book.unfinished().len(), "the journal of a dead process");
        }
        Ok(Self { node, file, book, fault })
    }

    /// Who wrote it.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// What is wrong with the file, if anything. [`Orphan::unfinished`] has what can be read all the same; a request in
    /// it may have ended in a part that cannot.
    pub fn fault(&self) -> Option<&JournalError> {
        self.fault.as_ref()
    }

    /// What was begun and not closed, in the order in which it was begun.
    pub fn unfinished(&self) -> Vec<Unsettled> {
        self.book.unfinished()
    }

    /// Notes that the request has been dealt with, so that a recovery that dies goes on behind it. A request that is
    /// not unfinished is passed over.
    pub fn closed(&mut self, request: &RequestId) -> Result<(), JournalError> {
        let Some(record) = self.book.close(request) else { return Ok(()) };
        let mut frames = Vec::new();
        frame::push(&mut frames, &record).map_err(|bytes| JournalError::TooLong { bytes })?;
        self.file.append(&frames)?;
        self.book.apply(record);
        Ok(())
    }

    /// Removes the file once everything in it is closed; before that it is an error, and the file stays. A damaged one
    /// is kept as `….damaged` for a person to look at, and one that could not be read at all stays where it is.
    pub fn remove(self) -> Result<(), JournalError> {
        let requests = self.book.unfinished().len();
        if requests > 0 {
            return Err(JournalError::Unfinished { path: self.file.path().to_owned(), requests });
        }
        match self.fault {
            None => self.file.remove(),
            Some(JournalError::Damaged { .. }) => {
                let path = self.file.set_aside()?;
                tracing::error!(path = %path.display(), "a damaged journal was kept");
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }
}
