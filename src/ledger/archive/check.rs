use std::path::Path;

use super::{
    folder_of,
    volume::{Manifest, Volume},
};
use crate::{
    domain::TenantId,
    ledger::{audit::Audit, books::Checkpoint},
};

/// What the files of a tenant's archive turned out to be.
pub struct Examined {
    /// Each names its file.
    pub faults: Vec<String>,
    /// From where the store's part of the ledger goes on, with all that the files say; nothing where they cannot be
    /// relied on.
    pub audit: Option<Audit>,
}

/// Adds up everything from the first entry on, and compares it with the manifest and with what the store has of the
/// archive's end. Blocks.
pub fn examine(folder: &Path, tenant: &TenantId, checkpoint: Option<&Checkpoint>) -> Examined {
    let mut examined = Examined { faults: Vec::new(), audit: None };
    let loaded = folder_of(folder, tenant).and_then(|folder| Ok((Manifest::load(&folder, tenant)?, folder)));
    let (manifest, folder) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            examined.faults.push(error.to_string());
            return examined;
        }
    };
    let archived = checkpoint.map_or(0, |checkpoint| checkpoint.books.seq);
    if manifest.last_seq() < archived {
        let (path, last) = (Manifest::path(&folder), manifest.last_seq());
        let what = if last == 0 { "is missing or empty".to_owned() } else { format!("ends at entry {last}") };
        examined.faults.push(format!("{}: {what}, and the entries up to {archived} are archived", path.display()));
    }
    let mut audit = Audit::of(tenant.clone());
    for volume in &manifest.volumes {
        let is_there = examined.add(&folder, volume, &mut audit, checkpoint);
        if !is_there {
            audit = Audit::after(volume.books.clone());
        }
    }
    if !examined.faults.is_empty() {
        examined.audit = None;
    } else if archived == manifest.last_seq() {
        audit.leave_archive();
        examined.audit = Some(audit);
    } else if archived == 0 {
        examined.audit = Some(Audit::of(tenant.clone()));
    }
    examined
}

impl Examined {
    /// Takes a file's entries; `false` where they could not all be read.
    fn add(&mut self, folder: &Path, volume: &Volume, audit: &mut Audit, checkpoint: Option<&Checkpoint>) -> bool {
        let path = folder.join(&volume.file);
        let entries = match volume.open(folder) {
            Ok(entries) => entries,
            Err(error) => {
                self.faults.push(error.to_string());
                return false;
            }
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    self.faults.push(error.to_string());
                    return false;
                }
            };
            audit.take(&entry);
            if let Some(checkpoint) = checkpoint.filter(|checkpoint| checkpoint.books.seq == entry.seq) {
                self.compare(&path, volume, audit, checkpoint);
            }
        }
        self.faults.extend(audit.take_faults().into_iter().map(|fault| format!("{}: {fault}", path.display())));
        if audit.books() != volume.books {
            self.faults.push(format!("{}: its entries do not make the books that it ends with", path.display()));
        }
        true
    }

    /// With what the store has of the archive's end, where that is.
    fn compare(&mut self, path: &Path, volume: &Volume, audit: &Audit, checkpoint: &Checkpoint) {
        let seq = checkpoint.books.seq;
        if audit.books() != checkpoint.books {
            let what = format!("its entries up to {seq} do not make the books that the store has of them");
            self.faults.push(format!("{}: {what}", path.display()));
        }
        if volume.sha256() != checkpoint.volume_sha256 {
            self.faults.push(format!("{}: is not the file from which the store was trimmed", path.display()));
        }
        // Of a file that is not wholly out of the store yet.
        if seq < volume.last_seq {
            let mut from_here = audit.clone();
            from_here.leave_archive();
            self.audit = Some(from_here);
        }
    }
}
