use std::path::{Path, PathBuf};

use tokio::sync::Semaphore;

use super::{
    ArchiveError, blocking, folder_of,
    volume::{Manifest, Volume},
};
use crate::{
    domain::{Month, NanoUsd, RequestId, TenantId},
    ledger::{
        Entry, EntryKind, Ledger, LedgerError,
        books::{Books, Checkpoint},
    },
    store::{StoreError, keys},
};

/// Questions that one process answers from files at a time; each unpacks some.
const READERS: usize = 2;
/// A request has ended so long after it came, at the latest.
const ENDED_WITHIN_MS: u64 = 92 * 86_400_000;
/// Requests are named by edges, whose clocks may be off by so much.
pub(in crate::ledger) const CLOCKS_OFF_MS: u64 = 3_600_000;

/// Where a ledger's entries are once they have left the store.
pub(in crate::ledger) struct Shelf {
    folder: PathBuf,
    readers: Semaphore,
}

/// The part of a tenant's archive that the store has no more: what is behind it is still in the store.
pub(in crate::ledger) struct Shelved {
    folder: PathBuf,
    volumes: Vec<Volume>,
    upto: u64,
}

/// A request that ended in an archived month.
pub(in crate::ledger) struct Found {
    pub entry: Entry,
    /// As far as the archive knows.
    pub refunded: NanoUsd,
    pub written_off: NanoUsd,
}

impl Shelf {
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, readers: Semaphore::new(READERS) }
    }

    /// Works on a tenant's files on a thread that may block. Nothing where they are not in this folder.
    pub async fn read<T: Send + 'static, E: From<ArchiveError> + Send + 'static>(
        &self,
        tenant: &TenantId,
        checkpoint: &Checkpoint,
        work: impl FnOnce(&Shelved) -> Result<T, E> + Send + 'static,
    ) -> Result<Option<T>, E> {
        let _place = self.readers.acquire().await.expect("it is never closed");
        let (folder, tenant, checkpoint) = (self.folder.clone(), tenant.clone(), checkpoint.clone());
        let opened = blocking(move || Ok(Shelved::open(&folder, &tenant, &checkpoint)?.map(|shelved| work(&shelved))));
        opened.await?.transpose()
    }
}

impl Shelved {
    fn open(folder: &Path, tenant: &TenantId, checkpoint: &Checkpoint) -> Result<Option<Self>, ArchiveError> {
        let folder = folder_of(folder, tenant)?;
        let manifest = Manifest::load(&folder, tenant)?;
        let upto = checkpoint.books.seq;
        if manifest.last_seq() < upto {
            return Ok(None);
        }
        let mut volumes = manifest.volumes;
        volumes.retain(|volume| volume.first_seq <= upto);
        // It names the one before, and that the one before it: all are the store's own.
        if volumes.last().is_none_or(|last| last.sha256() != checkpoint.volume_sha256) {
            let path = Manifest::path(&folder);
            return Err(ArchiveError::damaged(&path, "is not of the archive for which the store was trimmed"));
        }
        Ok(Some(Self { folder, volumes, upto }))
    }

    /// As they were when a month began, if anything had happened by then.
    pub fn books_before(&self, month: Month) -> Option<&Books> {
        let before = self.volumes.iter().rfind(|volume| volume.month < month);
        before.map(|volume| &volume.books)
    }

    pub fn entries(&self, month: Month) -> impl Iterator<Item = Result<Entry, ArchiveError>> + '_ {
        self.volumes.iter().filter(move |volume| volume.month == month).flat_map(|volume| self.of_volume(volume))
    }

    fn of_volume(&self, volume: &Volume) -> Box<dyn Iterator<Item = Result<Entry, ArchiveError>> + '_> {
        let is_out = |entry: &Result<Entry, _>| entry.as_ref().map_or(true, |entry: &Entry| entry.seq <= self.upto);
        match volume.open(&self.folder) {
            Ok(entries) => Box::new(entries.take_while(is_out)),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }

    /// How a request ended that came at that time. Files in which it cannot be are not opened.
    pub fn find(&self, request: &RequestId, came_unix_ms: u64) -> Result<Option<Found>, LedgerError> {
        let first = Month::of(came_unix_ms.saturating_sub(CLOCKS_OFF_MS));
        let last = Month::of(came_unix_ms.saturating_add(ENDED_WITHIN_MS));
        let mut end: Option<Entry> = None;
        let (mut refunded, mut written_off) = (NanoUsd::ZERO, NanoUsd::ZERO);
        let mut refunded_before = 0;
        for volume in &self.volumes {
            let has_refunds = volume.books.refunded != std::mem::replace(&mut refunded_before, volume.books.refunded);
            let is_charged = end.as_ref().is_some_and(|end| end.kind == EntryKind::Post);
            let may_end = !is_charged && (first..=last).contains(&volume.month);
            if !(may_end || is_charged && has_refunds) {
                continue;
            }
            for entry in self.of_volume(volume) {
                let entry = entry?;
                if entry.request != request.as_str() {
                    continue;
                }
                match entry.kind {
                    // What was given up may be charged late.
                    EntryKind::Post | EntryKind::Release => end = Some(entry),
                    EntryKind::Refund => refunded = refunded.checked_add(entry.amount)?,
                    EntryKind::Adjust => written_off = written_off.checked_add(entry.amount)?,
                    EntryKind::Hold | EntryKind::Grant | EntryKind::Credit => {}
                }
            }
        }
        Ok(end.map(|entry| Found { entry, refunded, written_off }))
    }
}

impl Ledger {
    /// What of a tenant's ledger is in no store any more.
    pub(in crate::ledger) async fn archived(&self, tenant: &TenantId) -> Result<Option<Checkpoint>, StoreError> {
        let text: Option<String> = self.store.query(redis::cmd("GET").arg(keys::checkpoint(tenant))).await?;
        text.map(|text| super::read_checkpoint(&text)).transpose()
    }
}
