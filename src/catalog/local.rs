//! A model out of a file of this machine.

use std::{fs::File, path::Path};

use super::{
    Arrived, CatalogError, Manifest, Report,
    intake::{Intake, Part},
    io_at,
};

pub fn copy(path: &Path, intake: &Intake, report: Report) -> Result<Arrived, CatalogError> {
    let path = path.canonicalize().map_err(io_at(path))?;
    let found = path.metadata().map_err(io_at(&path))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if !found.is_file() {
        return Err(CatalogError::Source { text: path.display().to_string(), why: "it is not a file" });
    }
    // A copy is quick: begun anew rather than trusted to be of the same bytes.
    let source = path.display().to_string();
    let mut part = Part::open(&intake.work(&source)?, found.len())?;
    part.restart()?;
    let mut file = File::open(&path).map_err(io_at(&path))?;
    part.take(&mut file, &name, report)?.map_err(io_at(&path))?;
    let whole = part.finish(&source, None)?;
    let manifest = Manifest::new(source, whole.sha256.clone(), whole.bytes, false);
    Ok(Arrived { name, whole, manifest })
}
