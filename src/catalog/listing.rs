//! What is in the catalogue.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::Serialize;

use super::{Catalog, CatalogError, Manifest, io_at};
use crate::model::{Gguf, ModelFile};

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
    !is_hidden && path.extension().is_some_and(|extension| extension == "gguf") && path.is_file()
}

fn describe(path: &Path, name: String, used_by: Vec<String>) -> Entry {
    let manifest = Manifest::read(path);
    let mut entry = Entry {
        name,
        format: "gguf",
        architecture: None,
        quantisation: None,
        parameters: None,
        size_bytes: path.metadata().ok().map(|found| found.len()),
        sha256: manifest.as_ref().map(|manifest| manifest.sha256.clone()),
        source: manifest.map(|manifest| manifest.source),
        used_by,
        fault: None,
    };
    // The container first: a file that cannot be served has an architecture all the same.
    match Gguf::open(path) {
        Ok(gguf) => {
            entry.architecture = gguf.str("general.architecture").ok().map(str::to_owned);
            let mut numbers = BTreeMap::<String, u64>::new();
            for tensor in gguf.tensor_names().filter_map(|name| gguf.tensor(name).ok()) {
                let count = tensor.dims.iter().fold(1u64, |n, d| n.saturating_mul(*d));
                let ty = numbers.entry(format!("{:?}", tensor.ty)).or_default();
                *ty = ty.saturating_add(count);
            }
            entry.parameters = Some(numbers.values().fold(0, |n, m| n.saturating_add(*m)));
            entry.quantisation = numbers.into_iter().max_by_key(|(_, count)| *count).map(|(ty, _)| ty);
            entry.fault = ModelFile::open(path).err().map(|error| error.to_string());
        }
        Err(error) => entry.fault = Some(error.to_string()),
    }
    entry
}
