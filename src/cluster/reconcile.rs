//! Looking over the ledger while it is in use: every tenant is verified now and then, journals are compared with it,
//! and old months are archived.
//!
//! Promises to say what does not add up, and whose it is. Never puts anything right.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::time::sleep;

use crate::{
    domain::{Month, NodeId, RequestId, TenantId},
    journal::{Journal, Unsettled},
    ledger::{GenerationState, Ledger, Report},
    telemetry::{Metrics, unix_ms},
};

/// After which the first tenant of a pass is verified at the latest, so that a node says soon that it does.
const BEGIN_MAX: Duration = Duration::from_secs(10);
const PAUSE_MIN: Duration = Duration::from_millis(10);
const STORE_AWAY_PAUSE: Duration = Duration::from_secs(5);
/// For how long the others rest when the node that verifies is dead.
const LEASE: Duration = Duration::from_secs(6);
/// Faults that are known to have been logged; beyond, they are logged again.
const KNOWN_MAX: usize = 10_000;
const DAY: Duration = Duration::from_secs(86_400);
const JOURNAL_PERIOD: Duration = Duration::from_secs(2);
/// What has ended is settled, sure, and closed within less, unless the store is away.
const REST_AFTER_MS: u64 = 60_000;

/// How the ledger is looked after.
#[derive(Clone, Debug, Default)]
pub struct Upkeep {
    /// How long it takes until every tenant was verified once; nothing for never.
    pub verify: Option<Duration>,
    pub archive: Option<ArchivePlan>,
}

/// Months older than so many, the one that runs not counted, go to a folder.
#[derive(Clone, Debug)]
pub struct ArchivePlan {
    pub folder: PathBuf,
    pub months: u32,
}

/// Verifies one tenant after the other, spread over the time of a pass, while no other node does.
pub async fn verify(ledger: Ledger, node: NodeId, metrics: Arc<Metrics>, pass: Duration) {
    let mut findings = Findings { metrics, found: HashMap::new(), known: HashSet::new() };
    sleep(pass.min(BEGIN_MAX).mul_f64(rand::random_range(0.5..1.0))).await;
    loop {
        let turn = async {
            if !ledger.is_verifier(&node, LEASE).await? {
                return Ok(None);
            }
            ledger.tenants().await.map(Some)
        };
        let tenants = match turn.await {
            Ok(Some(tenants)) => tenants,
            Ok(None) => {
                findings.forget();
                sleep(LEASE / 2).await;
                continue;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot verify the ledger; trying again");
                sleep(STORE_AWAY_PAUSE).await;
                continue;
            }
        };
        findings.keep(&tenants);
        let pause = (pass / u32::try_from(tenants.len().max(1)).unwrap_or(u32::MAX)).max(PAUSE_MIN);
        for tenant in &tenants {
            match ledger.verify_tenants(std::slice::from_ref(tenant), None).await {
                Ok(report) => findings.add(tenant, report),
                Err(error) => tracing::warn!(%tenant, %error, "cannot verify a ledger"),
            }
            if !rest(&ledger, &node, pause).await {
                break;
            }
        }
        if tenants.is_empty() {
            rest(&ledger, &node, pause).await;
        }
    }
}

/// Does nothing for a while, and stays the one that verifies; `false` where another node is by now.
async fn rest(ledger: &Ledger, node: &NodeId, mut pause: Duration) -> bool {
    loop {
        let part = pause.min(LEASE / 3);
        sleep(part).await;
        // Of a store that is away the next tenant will tell.
        if !ledger.is_verifier(node, LEASE).await.unwrap_or(true) {
            return false;
        }
        pause -= part;
        if pause.is_zero() {
            return true;
        }
    }
}

/// What was found when each tenant was verified last.
struct Findings {
    metrics: Arc<Metrics>,
    found: HashMap<TenantId, usize>,
    known: HashSet<String>,
}

impl Findings {
    fn add(&mut self, tenant: &TenantId, report: Report) {
        if self.known.len() > KNOWN_MAX {
            self.known.clear();
        }
        // What was put right and comes back is logged again.
        let (own, still) = (format!("{tenant}: "), HashSet::<&String>::from_iter(&report.faults));
        self.known.retain(|fault| !fault.starts_with(&own) || still.contains(fault));
        for fault in report.faults {
            if !self.known.contains(&fault) {
                tracing::error!(%tenant, fault, "the ledger does not add up");
                self.known.insert(fault);
            }
        }
        self.found.insert(tenant.clone(), report.faults_total);
        self.show();
    }

    fn keep(&mut self, tenants: &[TenantId]) {
        let tenants: HashSet<&TenantId> = tenants.iter().collect();
        self.found.retain(|tenant, _| tenants.contains(tenant));
        self.show();
    }

    /// Another node says it from now on.
    fn forget(&mut self) {
        self.found.clear();
        self.show();
    }

    fn show(&self) {
        let whole = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.metrics.ledger_faults.set(whole(self.found.values().sum()));
        let unbalanced = self.found.values().filter(|faults| **faults > 0).count();
        self.metrics.ledger_unbalanced_tenants.set(whole(unbalanced));
    }
}

/// Compares what this process's journal has open with the ledger, again and again.
pub async fn rests(ledger: Ledger, journal: Arc<Journal>, metrics: Arc<Metrics>) {
    let mut known = HashSet::<RequestId>::new();
    loop {
        sleep(JOURNAL_PERIOD).await;
        let open = journal.unfinished();
        metrics.journal_open_requests.set(i64::try_from(open.len()).unwrap_or(i64::MAX));
        let mut rests = HashSet::new();
        for unsettled in &open {
            let request = &unsettled.begun.request;
            // What a running request has come to is only known when it ends.
            let Some(ended) = &unsettled.ended else { continue };
            let state = match ledger.generation(&unsettled.begun.tenant, request).await {
                Ok(generation) => generation.map(|generation| generation.state),
                Err(error) => {
                    tracing::warn!(%request, %error, "cannot compare the journal with the ledger");
                    break;
                }
            };
            let is_old = unix_ms().saturating_sub(ended.unix_ms) > REST_AFTER_MS;
            let Some(fault) = contradiction(unsettled, state.as_ref(), is_old) else { continue };
            if !known.contains(request) {
                tracing::error!(tenant = %unsettled.begun.tenant, %request, fault, "the journal has a rest");
            }
            rests.insert(request.clone());
        }
        metrics.journal_rests.set(i64::try_from(rests.len()).unwrap_or(i64::MAX));
        known = rests;
    }
}

/// What is wrong with a request that ended and is still in the journal, if anything is. `is_old`: it ended long ago.
fn contradiction(unsettled: &Unsettled, state: Option<&GenerationState>, is_old: bool) -> Option<String> {
    let usage = unsettled.ended.as_ref()?.usage;
    match state {
        Some(GenerationState::Charged { entry, .. }) if entry.usage != usage => {
            Some(format!("it was charged for {:?} where the journal has {usage:?}", entry.usage))
        }
        Some(GenerationState::Charged { .. }) => is_old.then(|| "it was charged and is not closed".to_owned()),
        Some(GenerationState::Released { entry }) => {
            is_old.then(|| format!("its hold was given back ({}) where the journal has {usage:?}", entry.note))
        }
        Some(GenerationState::Running { .. }) => is_old.then(|| "it ended and was not charged".to_owned()),
        None => is_old.then(|| "it ended and the ledger has no trace of it".to_owned()),
    }
}

/// Archives once a day. What interrupts it costs nothing but the time until the next.
pub async fn archive(ledger: Ledger, plan: ArchivePlan) {
    loop {
        sleep(BEGIN_MAX).await;
        let archived = async {
            let before = Month::of(ledger.now_unix_ms().await.map_err(|error| error.to_string())?).before(plan.months);
            ledger.archive(&plan.folder, before).await.map_err(|error| error.to_string())
        };
        match archived.await {
            Ok(archived) => {
                for fault in &archived.faults {
                    tracing::error!(fault, "a ledger is not archived");
                }
                if archived.taken_out > 0 {
                    tracing::info!(files = archived.files, entries = archived.taken_out, "archived old months");
                }
            }
            Err(error) => tracing::error!(error, "cannot archive old months; trying again tomorrow"),
        }
        sleep(DAY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::{NanoUsd, Price, Usage},
        journal::{Begun, Ended},
        ledger::{Entry, EntryKind, NO_LINK},
    };

    const USAGE: Usage = Usage { prompt_tokens: 3, completion_tokens: 4, cached_tokens: 0 };

    fn ended() -> Unsettled {
        let begun = Begun {
            request: "chatcmpl-1".into(),
            tenant: "ten_1".into(),
            key: "key_1".into(),
            model: "m".into(),
            price: Price::flat(NanoUsd::new(1), NanoUsd::new(2)),
            price_version: "1".to_owned(),
            prompt_tokens: 3,
            attempt: 1,
            owner: NodeId::generate(),
        };
        let (request, reason) = (begun.request.clone(), "stop".to_owned());
        let ended = Ended { request, usage: USAGE, reason, digest: None, unix_ms: 0 };
        Unsettled { begun, completion_tokens: 4, ended: Some(ended) }
    }

    fn entry(kind: EntryKind, usage: Usage) -> Box<Entry> {
        let begun = ended().begun;
        Box::new(Entry {
            seq: 1,
            kind,
            request: begun.request.to_string(),
            reference: String::new(),
            tenant: begun.tenant,
            key: begun.key,
            model: begun.model,
            usage,
            price: begun.price,
            price_version: begun.price_version,
            amount: NanoUsd::new(11),
            hold: NanoUsd::new(20),
            balance: NanoUsd::ZERO,
            held: NanoUsd::ZERO,
            note: "expired".to_owned(),
            digest: String::new(),
            unix_ms: 0,
            link: NO_LINK.to_owned(),
        })
    }

    fn charged(usage: Usage) -> GenerationState {
        let entry = entry(EntryKind::Post, usage);
        GenerationState::Charged { entry, refunded: NanoUsd::ZERO, written_off: NanoUsd::ZERO }
    }

    #[test]
    fn a_charge_for_other_tokens_than_the_journal_has_is_a_rest_at_once() {
        let other = charged(Usage { completion_tokens: 5, ..USAGE });
        for is_old in [false, true] {
            let fault = contradiction(&ended(), Some(&other), is_old).expect("a fault");
            assert!(fault.contains("completion_tokens: 5") && fault.contains("completion_tokens: 4"), "{fault}");
        }
    }

    #[test]
    fn what_is_under_way_is_a_rest_only_when_it_stays() {
        let released = GenerationState::Released { entry: entry(EntryKind::Release, USAGE) };
        let running = GenerationState::Running { held: NanoUsd::new(20) };
        for (state, what) in [
            (Some(charged(USAGE)), "not closed"),
            (Some(released), "given back (expired)"),
            (Some(running), "not charged"),
            (None, "no trace"),
        ] {
            assert_eq!(contradiction(&ended(), state.as_ref(), false), None, "{what}");
            let fault = contradiction(&ended(), state.as_ref(), true).expect("a fault");
            assert!(fault.contains(what), "{fault}");
        }
    }

    #[test]
    fn what_runs_is_no_rest() {
        assert_eq!(contradiction(&Unsettled { ended: None, ..ended() }, None, true), None);
    }
}
