//! The files of a journal's folder, and who holds them.
//!
//! A journal's lock is on the file itself. A file that takes another's place is locked before it does, and whoever gets
//! a lock looks whether the file still stands under its name: a lock on a file that was replaced or removed in the
//! meantime is none. Files are made and taken over under the folder's own lock, so that nobody sees one that its maker
//! has not locked yet.

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{FallocateFlags, Flock, FlockArg};

use super::{JournalError, failed, frame};
use crate::domain::NodeId;

const SUFFIX: &str = ".journal";
/// Set aside on the disk at a time. A write that needs no new place does not wait for the file system, which gives
/// places out while it makes the disk write.
pub const ROOM_BYTES: u64 = 1 << 20;
/// Holders of the folder's lock make or look for files, and do nothing that takes long.
const FOLDER_WAIT: Duration = Duration::from_secs(10);
const FOLDER_PAUSE: Duration = Duration::from_millis(5);

/// For who makes the disk write while others append. The file is held for as long as there is one.
pub type Handle = Arc<Flock<File>>;

/// A journal's file, held by this process, that grows at its end.
pub struct LogFile {
    path: PathBuf,
    file: Handle,
    bytes: u64,
}

impl LogFile {
    /// A new file, of which nothing is sure to be on the disk.
    pub fn create(path: PathBuf) -> Result<Self, JournalError> {
        let file = options().create_new(true).open(&path).map_err(failed("make", &path))?;
        let Some(file) = try_lock(file, &path)? else { return Err(JournalError::Held(path)) };
        make_room(&file, 0);
        let mut made = Self { path, file: Arc::new(file), bytes: 0 };
        match made.append(&frame::header()) {
            Ok(()) => Ok(made),
            Err(error) => {
                made.discard();
                Err(error)
            }
        }
    }

    /// A file that a dead process left; `None` where somebody holds it, or has dealt with it.
    pub fn take(path: PathBuf) -> Result<Option<Self>, JournalError> {
        let file = match options().open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(failed("open", &path))?,
        };
        Self::hold(file, path)
    }

    /// A file that was found at `path`, if it is still there and nobody has it.
    fn hold(file: File, path: PathBuf) -> Result<Option<Self>, JournalError> {
        let Some(file) = try_lock(file, &path)? else { return Ok(None) };
        let held = file.metadata().map_err(failed("look at", &path))?;
        let named = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            named => named.map_err(failed("look at", &path))?,
        };
        let is_same = (held.dev(), held.ino()) == (named.dev(), named.ino());
        Ok(is_same.then(|| Self { path, file: Arc::new(file), bytes: held.len() }))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn handle(&self) -> Handle {
        Arc::clone(&self.file)
    }

    pub fn read(&self) -> Result<Vec<u8>, JournalError> {
        let mut bytes = Vec::new();
        (&**self.file).read_to_end(&mut bytes).map_err(failed("read", &self.path))?;
        Ok(bytes)
    }

    /// Appends all of `bytes` or nothing, in one write call as long as the disk has room.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), JournalError> {
        if let Err(error) = (&**self.file).write_all(bytes) {
            // What is left of a frame where this fails too is a torn tail.
            if let Err(error) = self.file.set_len(self.bytes) {
                tracing::error!(path = %self.path.display(), %error, "cannot cut off what was written in part");
            }
            return Err(failed("write", &self.path)(error));
        }
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Appends what `other` has between two places.
    pub fn append_from(&mut self, other: &File, from: u64, to: u64) -> Result<(), JournalError> {
        let mut bytes = vec![0; (to - from) as usize];
        other.read_exact_at(&mut bytes, from).map_err(failed("copy to", &self.path))?;
        self.append(&bytes)
    }

    pub fn truncate(&mut self, bytes: u64) -> Result<(), JournalError> {
        self.file.set_len(bytes).map_err(failed("cut off the tail of", &self.path))?;
        self.bytes = bytes;
        Ok(())
    }

    /// Takes the place of the file at `path`.
    pub fn rename(&mut self, path: &Path) -> Result<(), JournalError> {
        fs::rename(&self.path, path).map_err(failed("rename", &self.path))?;
        self.path = path.to_owned();
        Ok(())
    }

    pub fn remove(self) -> Result<(), JournalError> {
        fs::remove_file(&self.path).map_err(failed("remove", &self.path))
    }

    /// Removes a file that nothing depends on.
    pub fn discard(self) {
        if let Err(error) = self.remove() {
            tracing::warn!(%error, "a file is left over");
        }
    }

    /// Keeps the file under a name of its own, where nobody takes it over.
    pub fn set_aside(mut self) -> Result<PathBuf, JournalError> {
        let name = |count: usize| {
            let mut name = self.path.clone().into_os_string();
            name.push(".damaged");
            if count > 0 {
                name.push(format!(".{count}"));
            }
            PathBuf::from(name)
        };
        let free = (0..).map(name).find(|path| fs::symlink_metadata(path).is_err());
        let free = free.expect("some number is free");
        self.rename(&free)?;
        Ok(free)
    }
}

/// Sets the next piece of the disk aside for a file, which does not get longer by it. Where that cannot be, writes are
/// slower or say so themselves.
pub fn make_room(file: &File, from: u64) {
    let (from, bytes) = (from as libc::off_t, ROOM_BYTES as libc::off_t);
    if let Err(error) = nix::fcntl::fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from, bytes) {
        tracing::debug!(%error, "cannot set room aside for the journal");
    }
}

/// What was appended to the file before is on the disk after.
pub fn sync(file: &File, path: &Path) -> Result<(), JournalError> {
    file.sync_data().map_err(failed("sync", path))
}

/// So are the names in the folder.
pub fn sync_folder(folder: &Path) -> Result<(), JournalError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync", folder))
}

/// The right to make or take over files of a folder.
pub struct Folder {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Folder {
    /// Makes the folder if need be and waits for its lock.
    pub fn lock(path: &Path) -> Result<Self, JournalError> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make", path))?;
        let lock = path.join("lock");
        let begun = Instant::now();
        loop {
            let file = options().create(true).open(&lock).map_err(failed("open", &lock))?;
            if let Some(lock) = try_lock(file, &lock)? {
                return Ok(Self { path: path.to_owned(), _lock: lock });
            }
            if begun.elapsed() > FOLDER_WAIT {
                return Err(JournalError::Held(lock));
            }
            thread::sleep(FOLDER_PAUSE);
        }
    }

    /// The journals of dead processes, with their names; holds each from now on. What a dead process left of a file
    /// that was to take another's place is removed.
    pub fn take_all(&self) -> Result<Vec<(NodeId, LogFile)>, JournalError> {
        let list = || fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
        let mut names = list().map_err(failed("list", &self.path))?;
        names.sort();
        let mut taken = Vec::new();
        for node in names.iter().filter_map(|name| node_of(name, "")) {
            taken.extend(LogFile::take(journal_path(&self.path, &node))?.map(|file| (node, file)));
        }
        for node in names.iter().filter_map(|name| node_of(name, ".new")) {
            let is_ours = taken.iter().any(|(dead, _)| *dead == node);
            if is_ours || !journal_path(&self.path, &node).exists() {
                let path = successor_path(&self.path, &node);
                match fs::remove_file(&path) {
                    // Its owner lived, and ended well just now.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    removed => removed.map_err(failed("remove", &path))?,
                }
            }
        }
        Ok(taken)
    }
}

pub fn journal_path(folder: &Path, node: &NodeId) -> PathBuf {
    folder.join(format!("{node}{SUFFIX}"))
}

/// Of the file that is to take the journal's place.
pub fn successor_path(folder: &Path, node: &NodeId) -> PathBuf {
    folder.join(format!("{node}{SUFFIX}.new"))
}

fn node_of(name: &OsStr, behind: &str) -> Option<NodeId> {
    name.to_str()?.strip_suffix(behind)?.strip_suffix(SUFFIX).map(NodeId::from)
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).append(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options
}

/// `None`: another holds it.
fn try_lock(file: File, path: &Path) -> Result<Option<Flock<File>>, JournalError> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(failed("lock", path)(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_on_a_file_that_was_replaced_or_removed_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let find = || options().open(&path).unwrap();
        drop(LogFile::create(path.clone()).unwrap());
        let found = find();
        assert!(LogFile::hold(find(), path.clone()).unwrap().is_some());
        let mut successor = LogFile::create(folder.path().join("journal.new")).unwrap();
        successor.rename(&path).unwrap();
        assert!(LogFile::hold(found, path.clone()).unwrap().is_none(), "replaced");
        let found = find();
        assert!(LogFile::hold(find(), path.clone()).unwrap().is_none(), "held");
        successor.remove().unwrap();
        assert!(LogFile::hold(found, path.clone()).unwrap().is_none(), "removed");
        assert!(LogFile::take(path).unwrap().is_none(), "not there");
    }
}
