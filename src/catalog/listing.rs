//! What is in the catalogue.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::Serialize;

use super::{Catalog, CatalogError, Manifest, io_at};
use crate::model::{CONFIG_FILE, Genai, Gguf, ModelFile, TensorInfo};

/// One model, as people see it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    pub name: String,
    pub format: &'static str,
    pub architecture: Option<String>,
    /// How most of its numbers are stored.
    pub quantisation: Option<String>,
    pub parameters: Option<u64>,
    pub size_bytes: Option<u64>,
    /// As recorded when it came; `pull` holds it against the source's.
    pub sha256: Option<String>,
    pub source: Option<String>,
    /// Configured models that need it.
    pub used_by: Vec<String>,
    /// Why it cannot be served.
    pub fault: Option<String>,
}

impl Catalog {
    /// Everything in the folder, and everything that is configured and missing there, by name. `configured`
    /// has pairs of a file and the model that needs it.
    pub fn list<'a>(
        &self,
        configured: impl IntoIterator<Item = (&'a Path, &'a str)>,
    ) -> Result<Vec<Entry>, CatalogError> {
        let mut used_by = BTreeMap::<String, Vec<String>>::new();
        for (file, model) in configured {
            used_by.entry(file.display().to_string()).or_default().push(model.to_owned());
        }
        let mut entries = Vec::new();
        let found = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            found => Some(found.map_err(io_at(&self.folder))?),
        };
        for found in found.into_iter().flatten() {
            let path = found.map_err(io_at(&self.folder))?.path();
            if is_model(&path) {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let used_by = used_by.remove(&name).unwrap_or_default();
                entries.push(describe(&path, name, used_by));
            }
        }
        // What is left is configured and lies elsewhere, or nowhere.
        entries.extend(used_by.into_iter().map(|(name, used_by)| describe(&self.path(&name), name, used_by)));
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// One of them.
    pub fn entry(&self, name: &str, used_by: Vec<String>) -> Entry {
        describe(&self.path(name), name.to_owned(), used_by)
    }
}

/// Whether a path in the folder is a model, as opposed to a manifest or to something of somebody else's.
pub fn is_model(path: &Path) -> bool {
    let is_hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
    let is_file = || path.extension().is_some_and(|extension| extension == "gguf") && path.is_file();
    !is_hidden && (is_file() || path.join(CONFIG_FILE).is_file())
}

fn describe(path: &Path, name: String, used_by: Vec<String>) -> Entry {
    let manifest = Manifest::read(path);
    let is_folder = path.is_dir();
    let opened = ModelFile::open(path);
    // A model that cannot be served has an architecture all the same, and a GGUF file has tensors.
    let (architecture, tensors) = if is_folder {
        (Genai::architecture(path).ok(), opened.as_ref().map_or(Vec::new(), |file| infos(file)))
    } else {
        Gguf::open(path).map_or((None, Vec::new()), |gguf| {
            let tensors = gguf.tensor_names().filter_map(|name| Some(gguf.tensor(name).ok()?.info()));
            (gguf.str("general.architecture").ok().map(str::to_owned), tensors.collect())
        })
    };
    let mut numbers = BTreeMap::<String, u64>::new();
    for tensor in tensors {
        let count = tensor.dims.iter().fold(1u64, |n, d| n.saturating_mul(*d));
        let format = numbers.entry(tensor.format).or_default();
        *format = format.saturating_add(count);
    }
    Entry {
        name,
        format: if is_folder { "genai" } else { "gguf" },
        architecture,
        parameters: (!numbers.is_empty()).then(|| numbers.values().fold(0u64, |n, m| n.saturating_add(*m))),
        quantisation: numbers.into_iter().max_by_key(|(_, count)| *count).map(|(format, _)| format),
        size_bytes: size(path),
        sha256: manifest.as_ref().map(|manifest| manifest.sha256.clone()),
        source: manifest.map(|manifest| manifest.source),
        used_by,
        fault: opened.err().map(|error| error.to_string()),
    }
}

fn infos(file: &ModelFile) -> Vec<TensorInfo> {
    let names = file.tensors.tensor_names().into_iter();
    names.filter_map(|name| file.tensors.tensor(name).ok()).collect()
}

/// Of a file, or of all files of a folder.
fn size(path: &Path) -> Option<u64> {
    let found = path.metadata().ok()?;
    if !found.is_dir() {
        return Some(found.len());
    }
    let files = fs::read_dir(path).ok()?.flatten().filter_map(|file| file.path().metadata().ok());
    Some(files.filter(|file| file.is_file()).map(|file| file.len()).sum())
}
