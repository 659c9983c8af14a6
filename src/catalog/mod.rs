//! The models folder as a catalogue: what is in it, where it came from, and the way of something new into it.
//!
//! Promises that a name in the catalogue is always a whole model, a file or a folder: what is pulled is written
//! elsewhere, held against the digest that its source gives, opened as a model, and only then renamed into place,
//! with a manifest beside it. A pull that broke goes on where it stopped; two pulls at once do not happen; what is
//! left over on the disk is at most one unfinished pull. Never decides what is served: that is the
//! configuration's.

mod hub;
mod intake;
mod listing;
mod local;
mod manifest;
mod python;
mod source;

use std::{
    io,
    path::{Path, PathBuf},
};

pub use listing::Entry;
pub use manifest::Manifest;
pub use source::Source;

use crate::model::{ModelError, ModelFile};
use intake::{Intake, Whole};

#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error("`{text}` is not a source of models: {why}")]
    Source { text: String, why: &'static str },
    #[error("`{0}` cannot be the name of a model: letters, digits and . _ - + = are allowed, and no dot in front")]
    Name(String),
    #[error("cannot use {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("no space left in {}: {needed_mib} MiB are needed, {free_mib} are free", path.display())]
    NoSpace { path: PathBuf, needed_mib: u64, free_mib: u64 },
    #[error("another lightcone{} is changing {}", if pid.is_empty() { String::new() } else { format!(" (process {pid})") }, path.display())]
    Busy { path: PathBuf, pid: String },
    #[error("there is no model `{name}` in {}", folder.display())]
    Unknown { name: String, folder: PathBuf },
    #[error("`{name}` is used by {used_by}; take it out of the configuration, or say --force")]
    InUse { name: String, used_by: String },
    #[error("there is another model `{0}` in the catalogue; give a new --name, or say --force")]
    Occupied(String),
    #[error("{what} has SHA-256 {found}, but {expected} was announced; it was thrown away")]
    Digest { what: String, found: String, expected: String },
    #[error("{what} is not a model that can be served: {source}")]
    Model { what: String, source: ModelError },
    #[error("{0}")]
    Hub(#[from] hub::HubError),
    #[error("{0}")]
    Python(String),
}

impl CatalogError {
    /// Whether what was asked for makes no sense, as opposed to what could not be done.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Source { .. } | Self::Name(_) | Self::Unknown { .. })
    }
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> CatalogError {
    let path = path.to_owned();
    |source| CatalogError::Io { path, source }
}

/// How far a pull is; told after every piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    pub what: &'a str,
    pub done: u64,
    /// Unknown where the source does not say.
    pub total: Option<u64>,
}

type Report<'a> = &'a mut dyn FnMut(Progress);

/// How a pull is to go.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// In the catalogue; the source's own name of the file or folder where absent.
    pub name: Option<String>,
    /// Replaces what has the name already.
    pub force: bool,
}

pub struct Catalog {
    folder: PathBuf,
}

impl Catalog {
    /// The catalogue of a data folder. Nothing is touched yet.
    pub fn of(data_dir: &Path) -> Self {
        Self { folder: data_dir.join("models") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Brings a model into the catalogue and returns its name there. Blocks for as long as that takes.
    pub fn pull(&self, source: &Source, options: &PullOptions, report: Report) -> Result<String, CatalogError> {
        if let Some(name) = &options.name {
            check_name(name)?;
        }
        let intake = Intake::open(&self.folder)?;
        let arrived = match source {
            Source::Hub(hub) => {
                let found = hub::find(hub)?;
                let name = options.name.as_deref().unwrap_or(found.name());
                if !options.force && self.is_from(name, found.pinned())? {
                    return Ok(name.to_owned());
                }
                if !options.force && self.has(name, found.sha256())? {
                    self.note(name, &found.manifest())?;
                    return Ok(name.to_owned());
                }
                found.download(&intake, report)?
            }
            Source::Local(path) => local::copy(path, &intake, report)?,
            Source::Package(package) => python::download(package, &intake, report)?,
        };
        let name = options.name.clone().unwrap_or_else(|| arrived.name.clone());
        self.place(&name, arrived, options.force)?;
        intake.clear()?;
        Ok(name)
    }

    /// Takes a model out of the catalogue. `used_by` are the configured models that need it.
    pub fn remove(&self, name: &str, used_by: &[String], force: bool) -> Result<(), CatalogError> {
        let unknown = || CatalogError::Unknown { name: name.to_owned(), folder: self.folder.clone() };
        if check_name(name).is_err() || !listing::is_model(&self.path(name)) {
            return Err(unknown());
        }
        if !used_by.is_empty() && !force {
            return Err(CatalogError::InUse { name: name.to_owned(), used_by: used_by.join(", ") });
        }
        let intake = Intake::open(&self.folder)?;
        let path = self.path(name);
        intake.discard(&path)?;
        manifest::remove(&path)
    }

    /// Whether what has the name came from this very source, and is as it was then.
    fn is_from(&self, name: &str, pinned: &str) -> Result<bool, CatalogError> {
        let path = self.path(name);
        match Manifest::read(&path).filter(|manifest| manifest.source == pinned && path.exists()) {
            Some(manifest) => Ok(intake::digest(&path)? == manifest.sha256),
            None => Ok(false),
        }
    }

    /// Whether the catalogue has this very file under the name. Another file of that name is a fault.
    fn has(&self, name: &str, sha256: Option<&str>) -> Result<bool, CatalogError> {
        let path = self.path(name);
        if !path.exists() {
            return Ok(false);
        }
        match sha256 {
            Some(sha256) if intake::digest(&path)? == sha256 => Ok(true),
            _ => Err(CatalogError::Occupied(name.to_owned())),
        }
    }

    fn place(&self, name: &str, arrived: Arrived, force: bool) -> Result<(), CatalogError> {
        check_name(name)?;
        let what = arrived.manifest.source.clone();
        ModelFile::open(&arrived.whole.path).map_err(|source| CatalogError::Model { what, source })?;
        if force || !self.has(name, Some(&arrived.manifest.sha256))? {
            arrived.whole.rename(&self.path(name))?;
        }
        self.note(name, &arrived.manifest)
    }

    fn note(&self, name: &str, manifest: &Manifest) -> Result<(), CatalogError> {
        manifest.write(&self.path(name))
    }
}

/// Something that lies whole in the intake, not yet in the catalogue.
struct Arrived {
    /// What its source calls it.
    name: String,
    whole: Whole,
    manifest: Manifest,
}

/// Names are file names; they stand on command lines and in configuration files.
fn check_name(name: &str) -> Result<(), CatalogError> {
    let plain = |c: char| c.is_alphanumeric() || "._-+=".contains(c);
    let sound = !name.is_empty() && name.len() <= 200 && !name.starts_with('.') && name.chars().all(plain);
    if sound { Ok(()) } else { Err(CatalogError::Name(name.to_owned())) }
}
