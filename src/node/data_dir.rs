//! The data folder: made if need be, checked, and held by one node at a time.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("cannot use the data folder {}: {source}", path.display())]
    Unusable { path: PathBuf, source: io::Error },
    #[error("another lightcone{} uses the data folder {} already", process(.pid), path.display())]
    Locked { path: PathBuf, pid: String },
}

fn process(pid: &str) -> String {
    if pid.is_empty() { String::new() } else { format!(" (process {pid})") }
}

/// The folder's lock. The kernel releases it with the process, however that ends.
pub struct DataDir {
    _lock: Flock<File>,
}

impl DataDir {
    /// Makes the folder if need be and locks it; fails at once where another process holds it.
    pub fn lock(path: &Path) -> Result<Self, DataDirError> {
        let unusable = |source| DataDirError::Unusable { path: path.to_owned(), source };
        let run = path.join("run");
        fs::create_dir_all(&run).map_err(unusable)?;
        let file = run.join("lock");
        let mut open = OpenOptions::new();
        let mut file = open.read(true).write(true).create(true).truncate(false).open(file).map_err(unusable)?;
        let mut pid = String::new();
        let _ = file.read_to_string(&mut pid);
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::Error::EWOULDBLOCK)) => {
                return Err(DataDirError::Locked { path: path.to_owned(), pid: pid.trim().to_owned() });
            }
            Err((_, error)) => return Err(unusable(error.into())),
        };
        let note = |lock: &mut Flock<File>| {
            lock.set_len(0)?;
            lock.rewind()?;
            writeln!(lock, "{}", std::process::id())
        };
        note(&mut lock).map_err(unusable)?;
        Ok(Self { _lock: lock })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_node_is_told_who_holds_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/data");
        let first = DataDir::lock(&path).unwrap();
        let error = DataDir::lock(&path).err().unwrap().to_string();
        assert!(error.contains(&format!("(process {})", std::process::id())), "{error}");
        drop(first);
        DataDir::lock(&path).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_is_one_clear_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = DataDir::lock(file.path()).err().unwrap().to_string();
        assert!(error.starts_with("cannot use the data folder /"), "{error}");
        assert_eq!(error.lines().count(), 1);
    }
}
