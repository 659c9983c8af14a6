//! A model out of a file or a folder of this machine.

use std::{fs::File, path::Path};

use super::{
    Arrived, CatalogError, Manifest, Report,
    intake::{self, Intake, Part, Tree, Whole},
    io_at,
};
use crate::model::CONFIG_FILE;

pub fn copy(path: &Path, intake: &Intake, report: Report) -> Result<Arrived, CatalogError> {
    let path = path.canonicalize().map_err(io_at(path))?;
    let found = path.metadata().map_err(io_at(&path))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let source = path.display().to_string();
    // A copy is quick: begun anew rather than trusted to be of the same bytes.
    intake.clear()?;
    let whole = if found.is_file() {
        copied(&path, Part::open(&intake.work(&source)?, found.len())?, &name, report)?
    } else if path.join(CONFIG_FILE).is_file() {
        let mut tree = Tree::open(&intake.work(&source)?)?;
        for (name, file) in intake::files(&path)? {
            let bytes = file.metadata().map_err(io_at(&file))?.len();
            tree.add(&name, copied(&file, tree.part(bytes)?, &name, report)?)?;
        }
        tree.finish()?
    } else {
        return Err(CatalogError::Source {
            text: source,
            why: "it is neither a file nor a folder with genai_config.json",
        });
    };
    let manifest = Manifest::new(source, whole.sha256.clone(), whole.bytes, false);
    Ok(Arrived { name, whole, manifest })
}

fn copied(path: &Path, mut part: Part, name: &str, report: Report) -> Result<Whole, CatalogError> {
    let mut file = File::open(path).map_err(io_at(path))?;
    part.take(&mut file, name, report)?.map_err(io_at(path))?;
    part.finish(name, None)
}
