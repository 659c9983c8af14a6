//! Months that are over, moved out of the store into compressed files with a manifest of digests.
//!
//! Promises that nothing leaves the store before it lies on the disk and was read back; that whatever interrupts it
//! at whatever point, the next run goes on with it and nothing is lost, doubled or half done; and that a ledger which
//! does not add up is not archived. Never changes or deletes a file of an archive that its manifest names.

mod check;
mod shelf;
#[cfg(test)]
mod tests;
mod volume;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

pub(super) use check::{Examined, examine};
pub(super) use shelf::{CLOCKS_OFF_MS, Found, Shelf};
pub use volume::{Volume, read};

use super::{
    Ledger,
    audit::{Audit, Stored},
    books::{Books, Checkpoint},
    entry::{self, Entry},
};
use crate::{
    domain::{Month, TenantId},
    fault,
    store::{Function, Reply, StoreError},
};
use volume::{Manifest, Writer};

/// Entries read from the store at a time.
const PAGE: usize = 1000;
/// Entries taken out of the store by one call, which nothing else can run beside.
const TRIM_BATCH: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// Something in an archive is not what its digests say, or what the store says of it.
    #[error("{}: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("{0} has not begun yet, so that the months before it are not over")]
    NotOver(Month),
    #[error("the ledger does not add up and is not archived: {0}")]
    Unbalanced(String),
    #[error("{} ends at entry {last}, and the entries up to {archived} are archived; use the archive that has them", path.display())]
    Elsewhere { path: PathBuf, last: u64, archived: u64 },
    #[error("{}: another process archives to this folder", .0.display())]
    Busy(PathBuf),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("a task was lost: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl ArchiveError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }
}

/// What was archived.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Archived {
    pub tenants: usize,
    /// Files written.
    pub files: usize,
    /// Entries in them.
    pub entries: u64,
    /// Entries taken out of the store, those of an earlier run that was interrupted included.
    pub taken_out: u64,
    /// Tenants that were left as they are, and why.
    pub faults: Vec<String>,
}

impl Ledger {
    /// Moves all entries of before a month out of the store, each tenant's into a folder of its own in `folder`. A
    /// tenant whose ledger or archive is damaged is left as it is and does not keep the others. May be interrupted at
    /// any point and repeated.
    pub async fn archive(&self, folder: &Path, before: Month) -> Result<Archived, ArchiveError> {
        if before.begins_unix_ms() > self.store.now_unix_ms().await? {
            return Err(ArchiveError::NotOver(before));
        }
        let _lock = lock(folder)?;
        let mut archived = Archived::default();
        for tenant in self.tenants().await? {
            archived.tenants += 1;
            match self.archive_tenant(&mut archived, folder, &tenant, before.begins_unix_ms()).await {
                Ok(()) => {}
                Err(error @ (ArchiveError::Io { .. } | ArchiveError::Task(_))) => return Err(error),
                Err(ArchiveError::Store(error)) if !matches!(error, StoreError::Damaged(_)) => return Err(error.into()),
                Err(error) => archived.faults.push(format!("{tenant}: {error}")),
            }
        }
        Ok(archived)
    }

    async fn archive_tenant(
        &self,
        archived: &mut Archived,
        folder: &Path,
        tenant: &TenantId,
        until_unix_ms: u64,
    ) -> Result<(), ArchiveError> {
        let folder = folder_of(folder, tenant)?;
        let Some(stored) = self.snapshot(tenant).await? else { return Ok(()) };
        let mut manifest = {
            let (folder, tenant) = (folder.clone(), tenant.clone());
            blocking(move || Manifest::load(&folder, &tenant)).await?
        };
        if manifest.last_seq() < stored.archived {
            let (last, archived) = (manifest.last_seq(), stored.archived);
            return Err(ArchiveError::Elsewhere { path: folder, last, archived });
        }
        loop {
            let after = manifest.books();
            let Some(written) = self.write_volume(&folder, &manifest, after, until_unix_ms).await? else { break };
            archived.files += 1;
            archived.entries += written.entries;
            manifest.push(written);
            manifest = {
                let folder = folder.clone();
                blocking(move || manifest.save(&folder).map(|()| manifest)).await?
            };
            fault::point("ledger.manifest.written");
        }
        archived.taken_out += self.take_out(&folder, &manifest, &stored).await?;
        Ok(())
    }

    /// Writes the next month, and reads back what it wrote. Nothing where the next entry is not to be archived yet.
    async fn write_volume(
        &self,
        folder: &Path,
        manifest: &Manifest,
        after: Books,
        until_unix_ms: u64,
    ) -> Result<Option<Volume>, ArchiveError> {
        let mut audit = Audit::after(after.clone());
        let mut writer: Option<(Month, Writer)> = None;
        loop {
            let mut page = self.parsed_entries(&after.tenant, audit.seq()).await?;
            let read = page.len();
            let month = writer.as_ref().map(|(month, _)| *month);
            let month = month.or_else(|| page.first().map(|entry| Month::of(entry.unix_ms)));
            let in_month = |entry: &Entry| entry.unix_ms < until_unix_ms && Some(Month::of(entry.unix_ms)) == month;
            page.truncate(page.iter().position(|entry| !in_month(entry)).unwrap_or(read));
            let is_last = page.len() < PAGE;
            for entry in &page {
                audit.take(entry);
            }
            if let Some(fault) = audit.faults().first() {
                return Err(ArchiveError::Unbalanced(fault.clone()));
            }
            if let (Some(month), false) = (month, page.is_empty()) {
                let begun = writer.take();
                let (path, name) = (folder.to_owned(), manifest.name_for(month, after.seq + 1));
                let added = blocking(move || {
                    let mut writer = match begun {
                        Some((_, writer)) => writer,
                        None => Writer::create(&path, name)?,
                    };
                    writer.add(&page)?;
                    Ok(writer)
                });
                writer = Some((month, added.await?));
                fault::point("ledger.volume.begun");
            }
            if is_last {
                break;
            }
        }
        let Some((month, writer)) = writer else { return Ok(None) };
        let (folder, previous, books) = (folder.to_owned(), manifest.last_sha256().to_owned(), audit.books());
        let written = blocking(move || {
            let volume = writer.finish(month, &after, books, previous)?;
            volume.read_back(&folder, after)?;
            Ok(volume)
        });
        let written = written.await?;
        fault::point("ledger.volume.written");
        Ok(Some(written))
    }

    async fn parsed_entries(&self, tenant: &TenantId, after: u64) -> Result<Vec<Entry>, ArchiveError> {
        let raw = self.raw_entries(tenant, after, PAGE).await?;
        let parse = |(id, fields): entry::Raw| entry::parse(&id, &fields).map_err(StoreError::Damaged);
        Ok(raw.into_iter().map(parse).collect::<Result<_, _>>()?)
    }

    /// Takes out of the store what lies in files, as those have it; answers how many entries.
    async fn take_out(&self, folder: &Path, manifest: &Manifest, stored: &Stored) -> Result<u64, ArchiveError> {
        let books = match checkpoint(stored)? {
            Some(checkpoint) => checkpoint.books,
            None => Books::new(manifest.tenant.clone()),
        };
        let mut audit = Audit::after(books);
        for volume in manifest.volumes.iter().filter(|volume| volume.last_seq > stored.archived) {
            let (path, sha256) = (folder.join(&volume.file), volume.sha256());
            let mut entries = {
                let (folder, volume) = (folder.to_owned(), volume.clone());
                blocking(move || volume.open(&folder)).await?
            };
            let mut batch = Vec::new();
            loop {
                let (read, rest) = blocking(move || {
                    let read = entries.by_ref().take(TRIM_BATCH).collect::<Result<Vec<Entry>, _>>()?;
                    Ok((read, entries))
                })
                .await?;
                entries = rest;
                let is_last = read.len() < TRIM_BATCH;
                batch.extend(read.into_iter().filter(|entry| entry.seq > audit.seq()));
                // What is written off and the charge that it belongs to stay together.
                let held_back = batch.pop_if(|entry: &mut Entry| !is_last && entry.is_write_off());
                self.take_out_batch(&mut audit, &batch, &sha256).await?;
                batch.clear();
                batch.extend(held_back);
                if is_last {
                    break;
                }
            }
            if audit.books() != volume.books {
                return Err(ArchiveError::damaged(&path, "its entries do not make the books that it ends with"));
            }
        }
        Ok(audit.seq() - stored.archived)
    }

    async fn take_out_batch(&self, audit: &mut Audit, batch: &[Entry], volume: &str) -> Result<(), ArchiveError> {
        let Some(last) = batch.last() else { return Ok(()) };
        let after = audit.seq();
        batch.iter().for_each(|entry| audit.take(entry));
        if let Some(fault) = audit.faults().first() {
            return Err(ArchiveError::Unbalanced(fault.clone()));
        }
        let checkpoint = Checkpoint { books: audit.books(), volume_sha256: volume.to_owned() };
        let checkpoint = serde_json::to_string(&checkpoint).expect("books serialise");
        let tenant = last.tenant.clone();
        let numbers = [after, last.seq, last.unix_ms].map(|number| number.to_string());
        let [after, upto, at] = &numbers;
        fault::point("ledger.trim.asked");
        let reply: Reply = self.call(Function::Trim, &tenant, &[after, upto, at, &last.link, &checkpoint]).await?;
        fault::point("ledger.trim.answered");
        match reply.word() {
            "trimmed" => Ok(()),
            "moved" => Err(ArchiveError::Unbalanced(format!("{tenant} is archived by somebody else as well"))),
            "other" => Err(ArchiveError::Unbalanced(format!(
                "{tenant}: entry {upto} of the store is not the one that was archived"
            ))),
            _ => Err(reply.unexpected("trim").into()),
        }
    }
}

/// What the store says of the end of a tenant's archive. Absent and present at the right times, or an error.
pub(super) fn checkpoint(stored: &Stored) -> Result<Option<Checkpoint>, StoreError> {
    let Some(text) = &stored.checkpoint else {
        let is_fine = stored.archived == 0;
        let gone = || damaged_checkpoint(format!("after entry {} is gone", stored.archived));
        return if is_fine { Ok(None) } else { Err(gone()) };
    };
    let checkpoint = read_checkpoint(text)?;
    let seq = checkpoint.books.seq;
    if seq != stored.archived {
        return Err(damaged_checkpoint(format!("is of entry {seq} and not of entry {}", stored.archived)));
    }
    Ok(Some(checkpoint))
}

fn read_checkpoint(text: &str) -> Result<Checkpoint, StoreError> {
    serde_json::from_str(text).map_err(|error| damaged_checkpoint(format!("cannot be read: {error}")))
}

fn damaged_checkpoint(what: String) -> StoreError {
    StoreError::Damaged(format!("the checkpoint of the archive {what}"))
}

/// A tenant's part of an archive.
fn folder_of(folder: &Path, tenant: &TenantId) -> Result<PathBuf, ArchiveError> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    let name = tenant.as_str();
    if name.is_empty() || !name.chars().all(is_name) {
        return Err(ArchiveError::damaged(folder, format!("`{name}` cannot be the name of a folder")));
    }
    Ok(folder.join(name))
}

/// The kernel takes the lock back with the process, however that ends.
fn lock(folder: &Path) -> Result<Flock<File>, ArchiveError> {
    fs::create_dir_all(folder).map_err(|source| ArchiveError::io(folder, source))?;
    let path = folder.join("lock");
    let file = File::create(&path).map_err(|source| ArchiveError::io(&path, source))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::Error::EWOULDBLOCK => ArchiveError::Busy(folder.to_owned()),
        errno => ArchiveError::io(&path, errno.into()),
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ArchiveError> + Send + 'static,
) -> Result<T, ArchiveError> {
    tokio::task::spawn_blocking(work).await?
}
