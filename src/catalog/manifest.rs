//! What is known of a model beside its bytes, in a small JSON file beside it.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{CatalogError, io_at};

/// A manifest is a few lines; a larger file is not one.
const BYTES_MAX: u64 = 64 << 10;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// As `pull` would take it again.
    pub source: String,
    /// Of the file as it was placed; of a folder, that of the lines `<sha256>  <name>` of its files, in the order
    /// of their names.
    pub sha256: String,
    pub bytes: u64,
    /// Whether the source gave a digest (of each file), and it was this one.
    pub is_announced: bool,
    /// Unix seconds.
    pub pulled_at: u64,
}

impl Manifest {
    pub fn new(source: String, sha256: String, bytes: u64, is_announced: bool) -> Self {
        let pulled_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        Self { source, sha256, bytes, is_announced, pulled_at }
    }

    /// The manifest of a model; none where there is none, or none that can be read.
    pub fn read(model: &Path) -> Option<Self> {
        let path = path(model);
        if fs::metadata(&path).ok()?.len() > BYTES_MAX {
            return None;
        }
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    pub(super) fn write(&self, model: &Path) -> Result<(), CatalogError> {
        let path = path(model);
        let unfinished = with_suffix(&path, ".unfinished");
        let text = serde_json::to_string_pretty(self).map_err(io::Error::from).map_err(io_at(&path))?;
        fs::write(&unfinished, text + "\n").map_err(io_at(&unfinished))?;
        fs::rename(&unfinished, &path).map_err(io_at(&path))
    }
}

pub fn remove(model: &Path) -> Result<(), CatalogError> {
    let path = path(model);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_at(&path)(error)),
        _ => Ok(()),
    }
}

fn path(model: &Path) -> PathBuf {
    with_suffix(model, ".manifest.json")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}
