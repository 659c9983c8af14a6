//! Where a pull works until it is whole: `models/.pull`, one pull at a time.
//!
//! A ticket says what the unfinished work is of. Work with another ticket is thrown away, so that at most
//! one unfinished pull takes up space, and nothing is ever continued with the bytes of something else.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
};

use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags};
use sha2::{Digest, Sha256};

use super::{CatalogError, Progress, Report, io_at};

/// Left free on the disk whatever is pulled.
const RESERVE_BYTES: u64 = 64 << 20;
const PIECE_BYTES: usize = 256 << 10;
const MIB: u64 = 1 << 20;

pub struct Intake {
    folder: PathBuf,
    _lock: Flock<File>,
}

impl Intake {
    /// Takes the catalogue's lock; the kernel gives it back with the process, however that ends.
    pub fn open(models: &Path) -> Result<Self, CatalogError> {
        let folder = models.join(".pull");
        fs::create_dir_all(&folder).map_err(io_at(&folder))?;
        let path = folder.join("lock");
        let mut open = OpenOptions::new();
        let mut file = open.read(true).write(true).create(true).truncate(false).open(&path).map_err(io_at(&path))?;
        let mut pid = String::new();
        let _ = Read::by_ref(&mut file).take(32).read_to_string(&mut pid);
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::Error::EWOULDBLOCK)) => {
                return Err(CatalogError::Busy { path: models.to_owned(), pid: pid.trim().to_owned() });
            }
            Err((_, error)) => return Err(io_at(&path)(error.into())),
        };
        let note = |lock: &mut Flock<File>| {
            lock.set_len(0)?;
            lock.rewind()?;
            writeln!(lock, "{}", std::process::id())
        };
        note(&mut lock).map_err(io_at(&path))?;
        Ok(Self { folder, _lock: lock })
    }

    /// The folder to work in, with what an earlier pull of the same ticket left there.
    pub fn work(&self, ticket: &str) -> Result<PathBuf, CatalogError> {
        let (work, path) = (self.folder.join("work"), self.folder.join("ticket"));
        if fs::read_to_string(&path).is_ok_and(|found| found == ticket) && work.is_dir() {
            return Ok(work);
        }
        self.clear()?;
        fs::create_dir(&work).map_err(io_at(&work))?;
        fs::write(&path, ticket).map_err(io_at(&path))?;
        Ok(work)
    }

    /// Takes something away: at once by its name, and then in peace.
    pub fn discard(&self, path: &Path) -> Result<(), CatalogError> {
        let gone = self.folder.join("gone");
        remove(&gone)?;
        fs::rename(path, &gone).map_err(io_at(path))?;
        remove(&gone)
    }

    /// Leaves nothing but the lock.
    pub fn clear(&self) -> Result<(), CatalogError> {
        // The ticket goes first: without one the work is nobody's.
        ["ticket", "work", "gone"].iter().try_for_each(|name| remove(&self.folder.join(name)))
    }
}

/// A file, a folder with all that is in it, or nothing.
fn remove(path: &Path) -> Result<(), CatalogError> {
    let is_folder = path.symlink_metadata().is_ok_and(|found| found.is_dir());
    match if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) } {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_at(path)(error)),
        _ => Ok(()),
    }
}

/// A file on its way: what has arrived, and the digest of it.
pub struct Part {
    path: PathBuf,
    file: File,
    sha: Sha256,
    done: u64,
    total: u64,
}

/// A file, or a folder of files, of which all has arrived.
pub struct Whole {
    pub path: PathBuf,
    pub sha256: String,
    pub bytes: u64,
}

impl Part {
    /// Goes on where an earlier try stopped, if there was one.
    pub fn open(work: &Path, total: u64) -> Result<Self, CatalogError> {
        let path = work.join("part");
        let mut open = OpenOptions::new();
        let file = open.read(true).write(true).create(true).truncate(false).open(&path).map_err(io_at(&path))?;
        let mut part = Self { path, file, sha: Sha256::new(), done: 0, total };
        let found = part.file.metadata().map_err(io_at(&part.path))?.len();
        if found > total {
            part.restart()?;
        }
        part.done = hash(&mut part.file, &mut part.sha).map_err(io_at(&part.path))?;
        check_space(work, total - part.done)?;
        Ok(part)
    }

    pub fn done(&self) -> u64 {
        self.done
    }

    pub fn missing(&self) -> u64 {
        self.total - self.done
    }

    /// Throws away what has arrived.
    pub fn restart(&mut self) -> Result<(), CatalogError> {
        let begin = |file: &mut File| file.set_len(0).and_then(|()| file.rewind());
        begin(&mut self.file).map_err(io_at(&self.path))?;
        self.sha = Sha256::new();
        self.done = 0;
        Ok(())
    }

    /// Takes what comes, at most what is missing. An error of the reader ends it; what had come is kept.
    pub fn take(&mut self, from: &mut dyn Read, what: &str, report: Report) -> Result<io::Result<()>, CatalogError> {
        let mut piece = vec![0; PIECE_BYTES];
        while self.missing() > 0 {
            let room = usize::try_from(self.missing()).unwrap_or(usize::MAX).min(PIECE_BYTES);
            let read = match from.read(&mut piece[..room]) {
                Ok(0) => return Ok(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Ok(Err(error)),
            };
            self.file.write_all(&piece[..read]).map_err(|error| self.unwritten(error))?;
            self.sha.update(&piece[..read]);
            self.done += read as u64;
            report(Progress { what, done: self.done, total: Some(self.total) });
        }
        Ok(Ok(()))
    }

    /// The whole file, on the disk, with the digest that was announced, if one was.
    pub fn finish(self, what: &str, announced: Option<&str>) -> Result<Whole, CatalogError> {
        let found = hex::encode(self.sha.clone().finalize());
        if let Some(expected) = announced.filter(|expected| !expected.eq_ignore_ascii_case(&found)) {
            fs::remove_file(&self.path).map_err(io_at(&self.path))?;
            return Err(CatalogError::Digest { what: what.to_owned(), found, expected: expected.to_owned() });
        }
        self.file.sync_all().map_err(|error| self.unwritten(error))?;
        Ok(Whole { path: self.path, sha256: found, bytes: self.done })
    }

    fn unwritten(&self, error: io::Error) -> CatalogError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => no_space(&self.path, self.missing(), 0),
            _ => io_at(&self.path)(error),
        }
    }
}

impl Whole {
    /// One that somebody else wrote.
    pub fn written(path: PathBuf) -> Result<Self, CatalogError> {
        let sha256 = digest(&path)?;
        let mut bytes = 0;
        for (_, file) in files(&path)? {
            bytes += sync(&file)?.metadata().map_err(io_at(&file))?.len();
        }
        if path.is_dir() {
            sync(&path)?;
        }
        Ok(Self { path, sha256, bytes })
    }

    /// Puts it where it belongs, in one step, whatever has been there.
    pub fn rename(&self, to: &Path) -> Result<(), CatalogError> {
        if to.symlink_metadata().is_ok() && (to.is_dir() || self.path.is_dir()) {
            self.exchange(to)?;
        } else {
            fs::rename(&self.path, to).map_err(io_at(to))?;
        }
        sync(to.parent().unwrap_or(Path::new("."))).map(drop)
    }

    /// What was there is in the intake then, and is cleared with it.
    fn exchange(&self, to: &Path) -> Result<(), CatalogError> {
        let flags = RenameFlags::RENAME_EXCHANGE;
        match nix::fcntl::renameat2(AT_FDCWD, &self.path, AT_FDCWD, to, flags) {
            // A file system that cannot: for a moment, the name is nobody's.
            Err(nix::Error::EINVAL | nix::Error::ENOSYS) => {
                let old = self.path.with_extension("old");
                fs::rename(to, &old).and_then(|()| fs::rename(&self.path, to)).map_err(io_at(to))
            }
            done => done.map_err(|error| io_at(to)(error.into())),
        }
    }
}

/// Files that arrive one by one, and are one model: the folder `model` of the work.
pub struct Tree {
    work: PathBuf,
    folder: PathBuf,
    bytes: u64,
}

impl Tree {
    /// Goes on with the files that an earlier try left there.
    pub fn open(work: &Path) -> Result<Self, CatalogError> {
        let folder = work.join("model");
        fs::create_dir_all(&folder).map_err(io_at(&folder))?;
        Ok(Self { work: work.to_owned(), folder, bytes: 0 })
    }

    /// Whether a file is there already; only whole ones ever are.
    pub fn has(&mut self, name: &str, bytes: u64) -> bool {
        let is_there = self.folder.join(name).metadata().is_ok_and(|found| found.is_file() && found.len() == bytes);
        self.bytes += if is_there { bytes } else { 0 };
        is_there
    }

    pub fn part(&self, bytes: u64) -> Result<Part, CatalogError> {
        Part::open(&self.work, bytes)
    }

    pub fn add(&mut self, name: &str, whole: Whole) -> Result<(), CatalogError> {
        self.bytes += whole.bytes;
        whole.rename(&self.folder.join(name))
    }

    pub fn finish(self) -> Result<Whole, CatalogError> {
        Ok(Whole { sha256: digest(&self.folder)?, path: self.folder, bytes: self.bytes })
    }
}

fn sync(path: &Path) -> Result<File, CatalogError> {
    File::open(path).and_then(|file| file.sync_all().map(|()| file)).map_err(io_at(path))
}

/// SHA-256 in hexadecimal: of a file; of a folder, that of the lines that `sha256sum` writes of its files, in the
/// order of their names.
pub fn digest(path: &Path) -> Result<String, CatalogError> {
    let of = |path: &Path| {
        let mut sha = Sha256::new();
        File::open(path).and_then(|mut file| hash(&mut file, &mut sha)).map_err(io_at(path))?;
        Ok(hex::encode(sha.finalize()))
    };
    if !path.is_dir() {
        return of(path);
    }
    let mut lines = Sha256::new();
    for (name, file) in files(path)? {
        lines.update(format!("{}  {name}\n", of(&file)?));
    }
    Ok(hex::encode(lines.finalize()))
}

/// The files of a model by their names: of a folder, those directly in it that are not hidden.
pub fn files(path: &Path) -> Result<BTreeMap<String, PathBuf>, CatalogError> {
    if !path.is_dir() {
        return Ok(BTreeMap::from([(String::new(), path.to_owned())]));
    }
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(path).map_err(io_at(path))? {
        let file = entry.map_err(io_at(path))?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with('.') && file.is_file() {
            files.insert(name, file);
        }
    }
    Ok(files)
}

/// Reads to the end, in pieces.
fn hash(file: &mut File, sha: &mut Sha256) -> io::Result<u64> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut total = 0;
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(total),
            Ok(read) => {
                sha.update(&piece[..read]);
                total += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Fails unless so much fits, and a reserve.
pub fn check_space(folder: &Path, needed: u64) -> Result<(), CatalogError> {
    let stat = nix::sys::statvfs::statvfs(folder).map_err(|error| io_at(folder)(error.into()))?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    if needed > 0 && free < needed.saturating_add(RESERVE_BYTES) { Err(no_space(folder, needed, free)) } else { Ok(()) }
}

fn no_space(path: &Path, needed: u64, free: u64) -> CatalogError {
    let needed_mib = needed.saturating_add(RESERVE_BYTES).div_ceil(MIB);
    CatalogError::NoSpace { path: path.to_owned(), needed_mib, free_mib: free / MIB }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sha(bytes: &[u8]) -> String {
        hex::encode(Sha256::digest(bytes))
    }

    #[test]
    fn a_part_goes_on_where_it_stopped_and_knows_the_digest_of_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..600_000u32).map(|i| (i % 251) as u8).collect();
        let total = bytes.len() as u64;
        let mut first = Part::open(folder.path(), total).unwrap();
        let broken = first.take(&mut &bytes[..400_000], "x", &mut |_| {}).unwrap();
        assert_eq!(broken.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        drop(first);
        let mut second = Part::open(folder.path(), total).unwrap();
        assert_eq!((second.done(), second.missing()), (400_000, 200_000));
        let mut last = None;
        // More than is missing is on offer; no more than that is taken.
        let rest = [&bytes[400_000..], &[7; 100]].concat();
        second.take(&mut &rest[..], "x", &mut |p| last = Some((p.done, p.total))).unwrap().unwrap();
        assert_eq!(last, Some((total, Some(total))));
        let whole = second.finish("x", Some(&sha(&bytes))).unwrap();
        assert_eq!((fs::read(&whole.path).unwrap(), whole.sha256, whole.bytes), (bytes.clone(), sha(&bytes), total));
    }

    #[test]
    fn a_wrong_digest_throws_the_part_away_and_a_part_that_is_too_long_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let mut part = Part::open(folder.path(), 5).unwrap();
        part.take(&mut &b"hello"[..], "x", &mut |_| {}).unwrap().unwrap();
        let error = part.finish("x", Some(&sha(b"other"))).err().unwrap();
        assert!(matches!(error, CatalogError::Digest { .. }), "{error}");
        assert!(!folder.path().join("part").exists());
        fs::write(folder.path().join("part"), b"too long for five").unwrap();
        assert_eq!(Part::open(folder.path(), 5).unwrap().done(), 0);
    }

    #[test]
    fn work_is_kept_for_the_same_ticket_only_and_the_lock_is_exclusive() {
        let models = tempfile::tempdir().unwrap();
        let intake = Intake::open(models.path()).unwrap();
        let busy = Intake::open(models.path()).err().unwrap().to_string();
        assert!(busy.contains(&format!("(process {})", std::process::id())), "{busy}");
        fs::write(intake.work("a").unwrap().join("part"), b"1").unwrap();
        assert!(intake.work("a").unwrap().join("part").exists());
        assert!(!intake.work("b").unwrap().join("part").exists());
        drop(intake);
        let intake = Intake::open(models.path()).unwrap();
        intake.clear().unwrap();
        intake.clear().unwrap();
    }

    #[test]
    fn what_does_not_fit_the_disk_is_refused_before_it_comes() {
        let folder = tempfile::tempdir().unwrap();
        let error = Part::open(folder.path(), u64::MAX / 2).err().unwrap();
        assert!(matches!(error, CatalogError::NoSpace { .. }), "{error}");
    }
}
