//! What processes that died still owed the ledger, out of their journals.
//!
//! Promises that whatever a journal says was decoded is charged once, that nothing is charged for what had not put out
//! anything, and that a recovery which is itself interrupted goes on where it was. Never touches the journal of a
//! process that lives.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::time::sleep;

use crate::{
    domain::Usage,
    journal::{Journal, JournalError, Orphan, Unsettled},
    ledger::{EndReason, Ledger, LedgerError, ReleaseReason, Settlement},
    queue::{Disowned, Queue},
    store::StoreError,
    telemetry::Metrics,
};

/// What it came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    pub charged: usize,
    pub free: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    #[error("journal: {0}")]
    Journal(#[from] JournalError),
    #[error("a journal's settlement cannot be sent: {0}")]
    Ledger(#[from] LedgerError),
    #[error("a journal's claim cannot be ended: {0}")]
    Store(#[from] StoreError),
}

/// Who else may go on with the requests of a process that died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// As long as the queue has them.
    MayGoOn,
    /// All that used this store before are dead.
    AreDead,
}

/// Settles what the journals of dead processes in `folder` have open. Ends at the first thing that the store does not
/// take, to be called again.
pub async fn settle_left_over(
    folder: &Path,
    others: Others,
    queue: &Queue,
    ledger: &Ledger,
    metrics: &Metrics,
) -> Result<Recovered, RecoveryError> {
    let of = folder.to_owned();
    let orphans = tokio::task::spawn_blocking(move || Journal::take_over(&of)).await.map_err(|error| {
        let source = Arc::new(std::io::Error::other(error));
        JournalError::Io { doing: "take over", path: folder.to_owned(), source }
    })??;
    let mut recovered = Recovered::default();
    for mut orphan in orphans {
        if let Some(fault) = orphan.fault() {
            tracing::error!(%fault, node = %orphan.node(), "a journal is damaged; what could be read is settled");
            metrics.journal_faults.inc();
        }
        // What could not be ended stays in the file, and is tried again.
        if settle_all(&mut orphan, others, queue, ledger, metrics, &mut recovered).await? {
            orphan.remove()?;
        }
    }
    if recovered != Recovered::default() {
        let Recovered { charged, free } = recovered;
        tracing::warn!(charged, free, "settled what processes that died had left behind");
    }
    Ok(recovered)
}

/// How often the folder is looked at for journals of other processes that died.
const PERIOD: Duration = Duration::from_secs(10);

/// Does so for ever.
pub async fn go_on((queue, ledger, metrics): (Queue, Ledger, Arc<Metrics>), folder: PathBuf) {
    loop {
        sleep(PERIOD.mul_f64(rand::random_range(0.75..1.25))).await;
        if let Err(error) = settle_left_over(&folder, Others::MayGoOn, &queue, &ledger, &metrics).await {
            tracing::warn!(%error, "journals of dead processes wait");
        }
    }
}

async fn settle_all(
    orphan: &mut Orphan,
    others: Others,
    queue: &Queue,
    ledger: &Ledger,
    metrics: &Metrics,
    recovered: &mut Recovered,
) -> Result<bool, RecoveryError> {
    let mut is_done = true;
    for unsettled in orphan.unfinished() {
        let begun = &unsettled.begun;
        let request = begun.request.clone();
        // Whoever goes on with it settles all of it. Until it has left the queue, nobody knows whether somebody does.
        if others == Others::MayGoOn && queue.disown(&begun.model, &request, begun.attempt).await? != Disowned::Absent {
            is_done = false;
            continue;
        }
        let completion_tokens = match settlement_of(&unsettled) {
            Some(settlement) => {
                let tokens = settlement.usage.completion_tokens;
                let mut posted = ledger.settle(&settlement).await;
                if let Err(LedgerError::Unknown(_) | LedgerError::ExceedsHold { .. }) = posted {
                    // The store may have died as well, and lost the hold or what that had grown by.
                    posted = ledger.settle_begun(&settlement).await;
                }
                match posted {
                    Ok(settled) => {
                        recovered.charged += usize::from(!settled.repeated);
                        metrics.late_settlements.inc_by(u64::from(settled.late));
                    }
                    Err(LedgerError::Store(error)) if error.is_transient() => return Err(error.into()),
                    Err(LedgerError::Store(StoreError::Damaged(fault))) => {
                        tracing::error!(%request, fault, "an account is damaged; a journal's request waits");
                        is_done = false;
                        continue;
                    }
                    // Whoever had it later has settled it, or is to.
                    Err(LedgerError::Superseded(_)) => {}
                    // Free, or a person's to look at: once more would be no better.
                    Err(error) => {
                        tracing::error!(%request, %error, usage = ?settlement.usage, "cannot settle out of a journal");
                        metrics.journal_faults.inc();
                    }
                }
                tokens
            }
            None => {
                match ledger.release(&begun.tenant, &request, ReleaseReason::WorkerLost).await {
                    Ok(_) => {}
                    Err(LedgerError::Store(StoreError::Damaged(fault))) => {
                        tracing::error!(%request, fault, "an account is damaged; a journal's request waits");
                        is_done = false;
                        continue;
                    }
                    Err(error) => return Err(error.into()),
                }
                recovered.free += 1;
                0
            }
        };
        // Somebody else may have it by now, or it may have been given up.
        queue.acknowledge(&begun.model, &begun.owner, &request, begun.attempt, completion_tokens).await?;
        orphan.closed(&request)?;
    }
    Ok(is_done)
}

/// Nothing for a request that put nothing out.
fn settlement_of(unsettled: &Unsettled) -> Option<Settlement> {
    let Unsettled { begun, completion_tokens, ended } = unsettled;
    let (usage, reason, digest) = match ended {
        Some(ended) => {
            let reason = ended.reason.parse().unwrap_or(EndReason::WorkerLost);
            (ended.usage, reason, ended.digest)
        }
        None if *completion_tokens == 0 => return None,
        None => {
            let usage = Usage {
                prompt_tokens: begun.prompt_tokens,
                completion_tokens: *completion_tokens,
                // Nobody knows any more.
                cached_tokens: 0,
            };
            (usage, EndReason::WorkerLost, None)
        }
    };
    Some(Settlement {
        request: begun.request.clone(),
        tenant: begun.tenant.clone(),
        key: begun.key.clone(),
        model: begun.model.clone(),
        usage,
        price: begun.price,
        price_version: begun.price_version.clone(),
        reason,
        digest,
        attempt: begun.attempt,
    })
}
