use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{ArchiveError, folder_of};
use crate::{
    domain::{Month, TenantId},
    ledger::{
        audit::Audit,
        books::Books,
        entry::{Entry, NO_LINK},
    },
};

const MANIFEST: &str = "manifest.json";
/// Before the first volume.
const NO_SHA256: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Longer lines are none of ours.
const LINE_BYTES_MAX: u64 = 1 << 16;
const VERSION: u32 = 1;

/// What a manifest says of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    pub month: Month,
    /// Its name, beside the manifest.
    pub file: String,
    pub first_seq: u64,
    pub last_seq: u64,
    pub entries: u64,
    /// Of the file as it is.
    pub file_sha256: String,
    /// Of what is compressed in it: a line of JSON for each entry.
    pub content_sha256: String,
    pub link_before: String,
    pub link_after: String,
    /// As they are after its last entry.
    pub books: Books,
    /// SHA-256 of the volume before this one in the manifest, as one line of JSON.
    pub previous_sha256: String,
}

/// All of a tenant's archive, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    version: u32,
    pub tenant: TenantId,
    /// SHA-256 of the last volume, and so of all: damage to a manifest is told from damage to its files.
    last_sha256: String,
    pub volumes: Vec<Volume>,
}

/// Entries of one month of a tenant, or none. Each file is checked against its digest before its first entry is
/// answered.
pub fn read(
    folder: &Path,
    tenant: &TenantId,
    month: Month,
) -> Result<impl Iterator<Item = Result<Entry, ArchiveError>> + use<>, ArchiveError> {
    let folder = folder_of(folder, tenant)?;
    let manifest = Manifest::load(&folder, tenant)?;
    let volumes = manifest.volumes.into_iter().filter(move |volume| volume.month == month);
    Ok(volumes.flat_map(move |volume| -> Box<dyn Iterator<Item = Result<Entry, ArchiveError>>> {
        match volume.open(&folder) {
            Ok(entries) => Box::new(entries),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }))
}

impl Manifest {
    /// An empty one where there is none. Checks that it is whole, to the last byte, and chained.
    pub fn load(folder: &Path, tenant: &TenantId) -> Result<Self, ArchiveError> {
        let path = folder.join(MANIFEST);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self::empty(tenant.clone()));
            }
            Err(source) => return Err(ArchiveError::io(&path, source)),
        };
        let damaged = |what: String| ArchiveError::damaged(&path, what);
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("cannot be read: {error}")))?;
        if manifest.text() != text {
            return Err(damaged("is not written as it was".to_owned()));
        }
        if manifest.version != VERSION {
            return Err(damaged(format!("is of version {}, not {VERSION}", manifest.version)));
        }
        if manifest.tenant != *tenant {
            return Err(damaged(format!("is of tenant {}", manifest.tenant)));
        }
        match manifest.broken() {
            Some(what) => Err(damaged(what)),
            None => Ok(manifest),
        }
    }

    fn empty(tenant: TenantId) -> Self {
        Self { version: VERSION, tenant, last_sha256: NO_SHA256.to_owned(), volumes: Vec::new() }
    }

    /// One more volume.
    pub fn push(&mut self, volume: Volume) {
        self.last_sha256 = volume.sha256();
        self.volumes.push(volume);
    }

    /// What does not follow from what goes before.
    fn broken(&self) -> Option<String> {
        let mut so_far = Self::empty(self.tenant.clone());
        for volume in &self.volumes {
            let before = so_far.books();
            let is_next = volume.previous_sha256 == so_far.last_sha256
                && volume.first_seq == before.seq + 1
                && volume.link_before == before.link
                && so_far.volumes.last().is_none_or(|last| last.month <= volume.month);
            if !is_next {
                return Some(format!("`{}` does not follow from what goes before it", volume.file));
            }
            let is_sound = volume.file == so_far.name_for(volume.month, volume.first_seq)
                && volume.last_seq >= volume.first_seq
                && volume.entries == volume.last_seq - volume.first_seq + 1
                && volume.books.seq == volume.last_seq
                && volume.books.link == volume.link_after
                && volume.books.tenant == self.tenant;
            if !is_sound {
                return Some(format!("what it says of `{}` contradicts itself", volume.file));
            }
            so_far.push(volume.clone());
        }
        (so_far.last_sha256 != self.last_sha256).then(|| "its last volume is not what its digest says".to_owned())
    }

    pub fn save(&self, folder: &Path) -> Result<(), ArchiveError> {
        let part = Part::create(folder, MANIFEST)?;
        let written = (&part.file).write_all(&self.text());
        written.map_err(|source| ArchiveError::io(&part.path, source))?;
        part.keep()
    }

    fn text(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).expect("a manifest serialises");
        text.push(b'\n');
        text
    }

    /// As they are after the last entry of all.
    pub fn books(&self) -> Books {
        self.volumes.last().map_or_else(|| Books::new(self.tenant.clone()), |volume| volume.books.clone())
    }

    pub fn last_seq(&self) -> u64 {
        self.volumes.last().map_or(0, |volume| volume.last_seq)
    }

    pub fn last_sha256(&self) -> &str {
        &self.last_sha256
    }

    /// A month has more than one file only where the store's clock went back into it.
    pub fn name_for(&self, month: Month, first_seq: u64) -> String {
        match self.volumes.iter().any(|volume| volume.month == month) {
            true => format!("{month}.{first_seq}.jsonl.gz"),
            false => format!("{month}.jsonl.gz"),
        }
    }

    pub fn path(folder: &Path) -> PathBuf {
        folder.join(MANIFEST)
    }
}

impl Volume {
    /// Of this entry of the manifest: what the next one names, and the store.
    pub fn sha256(&self) -> String {
        hex::encode(Sha256::digest(serde_json::to_vec(self).expect("a volume serialises")))
    }

    /// Its entries, once the file's digest was found to be right.
    pub(super) fn open(&self, folder: &Path) -> Result<Entries, ArchiveError> {
        let path = folder.join(&self.file);
        let io = |source| ArchiveError::io(&path, source);
        let mut file = File::open(&path).map_err(io)?;
        let mut sha256 = Sha256Writer::new(io::sink());
        io::copy(&mut file, &mut sha256).map_err(io)?;
        let found = sha256.hex();
        if found != self.file_sha256 {
            let what = format!("its SHA-256 is {found} where the manifest says {}", self.file_sha256);
            return Err(ArchiveError::damaged(&path, what));
        }
        let file = File::open(&path).map_err(io)?;
        let lines = BufReader::new(GzDecoder::new(BufReader::new(file)));
        Ok(Entries { lines, sha256: Sha256::new(), count: 0, volume: self.clone(), path, ended: false })
    }

    /// Adds its entries up again, as somebody does who has nothing but the files.
    pub(super) fn read_back(&self, folder: &Path, before: Books) -> Result<(), ArchiveError> {
        let path = folder.join(&self.file);
        let mut audit = Audit::after(before);
        for entry in self.open(folder)? {
            audit.take(&entry?);
        }
        if let Some(fault) = audit.faults().first() {
            return Err(ArchiveError::damaged(&path, fault.clone()));
        }
        let is_same = audit.books() == self.books;
        if is_same { Ok(()) } else { Err(ArchiveError::damaged(&path, "does not say what was written to it")) }
    }
}

/// The entries of a file in order. What is left of the file's digests is checked with the last one.
pub(super) struct Entries {
    lines: BufReader<GzDecoder<BufReader<File>>>,
    sha256: Sha256,
    count: u64,
    volume: Volume,
    path: PathBuf,
    ended: bool,
}

impl Iterator for Entries {
    type Item = Result<Entry, ArchiveError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.read();
        self.ended = !matches!(next, Ok(Some(_)));
        next.transpose()
    }
}

impl Entries {
    fn read(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let damaged = |what: String| ArchiveError::damaged(&self.path, what);
        let mut line = Vec::new();
        let read = (&mut self.lines).take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
        read.map_err(|error| damaged(format!("cannot be unpacked: {error}")))?;
        if line.is_empty() {
            let sha256 = hex::encode(self.sha256.finalize_reset());
            let is_whole = self.count == self.volume.entries && sha256 == self.volume.content_sha256;
            let what = || damaged("does not have the content that the manifest says".to_owned());
            return if is_whole { Ok(None) } else { Err(what()) };
        }
        self.sha256.update(&line);
        self.count += 1;
        let entry = serde_json::from_slice(&line);
        entry.map(Some).map_err(|error| damaged(format!("line {} cannot be read: {error}", self.count)))
    }
}

/// A file that is not there until it is whole.
struct Part {
    file: File,
    path: PathBuf,
    folder: PathBuf,
    name: String,
}

impl Part {
    fn create(folder: &Path, name: &str) -> Result<Self, ArchiveError> {
        fs::create_dir_all(folder).map_err(|source| ArchiveError::io(folder, source))?;
        let path = folder.join(format!(".{name}.part"));
        let file = File::create(&path).map_err(|source| ArchiveError::io(&path, source))?;
        Ok(Self { file, path, folder: folder.to_owned(), name: name.to_owned() })
    }

    fn keep(self) -> Result<(), ArchiveError> {
        let keep = || {
            self.file.sync_all()?;
            fs::rename(&self.path, self.folder.join(&self.name))?;
            File::open(&self.folder)?.sync_all()?;
            // The folder itself may be new.
            match self.folder.parent() {
                Some(parent) => File::open(parent)?.sync_all(),
                None => Ok(()),
            }
        };
        keep().map_err(|source| ArchiveError::io(&self.path, source))
    }
}

/// Writes a volume.
pub(super) struct Writer {
    part: Part,
    encoder: GzEncoder<Sha256Writer<BufWriter<File>>>,
    content: Sha256,
    entries: u64,
}

impl Writer {
    pub fn create(folder: &Path, name: String) -> Result<Self, ArchiveError> {
        let part = Part::create(folder, &name)?;
        let file = part.file.try_clone().map_err(|source| ArchiveError::io(&part.path, source))?;
        let encoder = GzEncoder::new(Sha256Writer::new(BufWriter::new(file)), Compression::default());
        Ok(Self { part, encoder, content: Sha256::new(), entries: 0 })
    }

    pub fn add(&mut self, entries: &[Entry]) -> Result<(), ArchiveError> {
        for entry in entries {
            let mut line = serde_json::to_vec(entry).expect("an entry serialises");
            line.push(b'\n');
            self.content.update(&line);
            self.entries += 1;
            self.encoder.write_all(&line).map_err(|source| ArchiveError::io(&self.part.path, source))?;
        }
        Ok(())
    }

    /// Puts the file in its place.
    pub fn finish(
        self,
        month: Month,
        before: &Books,
        books: Books,
        previous_sha256: String,
    ) -> Result<Volume, ArchiveError> {
        let Self { part, encoder, content, entries } = self;
        let mut file = encoder.finish().map_err(|source| ArchiveError::io(&part.path, source))?;
        file.flush().map_err(|source| ArchiveError::io(&part.path, source))?;
        let (file_sha256, name) = (file.hex(), part.name.clone());
        part.keep()?;
        Ok(Volume {
            month,
            file: name,
            first_seq: before.seq + 1,
            last_seq: books.seq,
            entries,
            file_sha256,
            content_sha256: hex::encode(content.finalize()),
            link_before: if before.seq == 0 { NO_LINK.to_owned() } else { before.link.clone() },
            link_after: books.link.clone(),
            books,
            previous_sha256,
        })
    }
}

struct Sha256Writer<W> {
    inner: W,
    sha256: Sha256,
}

impl<W> Sha256Writer<W> {
    fn new(inner: W) -> Self {
        Self { inner, sha256: Sha256::new() }
    }

    fn hex(self) -> String {
        hex::encode(self.sha256.finalize())
    }
}

impl<W: Write> Write for Sha256Writer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.sha256.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
