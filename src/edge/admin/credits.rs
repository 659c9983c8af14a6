//! Money that operators move, what became of it, and who did it.

use actix_web::{HttpResponse, web};
use serde::Serialize;

use super::{
    Desk, List, Wanted, answer,
    bodies::{self, Credit, CreditKind},
    faults,
};
use crate::{
    domain::{NanoUsd, TenantId},
    edge::error::ApiError,
    ledger::{EntryWithMovements, Moved, Refund},
    operator::{Accounts, OperatorError, Page},
};

#[derive(Serialize)]
struct Done {
    object: &'static str,
    tenant: TenantId,
    kind: &'static str,
    reference: String,
    #[serde(rename = "amount_nano_usd")]
    amount: NanoUsd,
    #[serde(flatten)]
    moved: Moved,
}

pub async fn move_credit(
    desk: Desk,
    payload: web::Payload,
    tenant: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let body = desk.body(payload).await?;
    let credit = bodies::credit(&body.fields())?;
    let (accounts, tenant) = (desk.accounts.clone(), TenantId::from(tenant.as_str()));
    let ledger = desk.state.ledger.clone();
    let moving = async move {
        let amount = match &credit.kind {
            CreditKind::Grant(amount) | CreditKind::Adjust(amount) | CreditKind::Refund(_, Some(amount)) => *amount,
            CreditKind::Refund(request, None) => {
                accounts.tenant(&tenant).await?;
                ledger.refundable(&tenant, request, &credit.reference).await?
            }
        };
        let moved = moved(&accounts, &tenant, &credit, amount).await?;
        let (kind, reference) = (credit.kind.as_str(), credit.reference);
        Ok::<_, OperatorError>(Done { object: "credit", tenant, kind, reference, amount, moved })
    };
    Ok(answer(&desk.change(moving).await?))
}

async fn moved(
    accounts: &Accounts,
    tenant: &TenantId,
    credit: &Credit,
    amount: NanoUsd,
) -> Result<Moved, OperatorError> {
    let Credit { kind, reference, note } = credit;
    match kind {
        CreditKind::Grant(_) => accounts.grant(tenant, amount, reference, note).await,
        CreditKind::Adjust(_) => accounts.adjust(tenant, amount, reference, note).await,
        CreditKind::Refund(request, _) => {
            let (request, reference, note) = (request.clone(), reference.clone(), note.clone());
            accounts.refund(tenant, &Refund { request, amount, reference, note }).await
        }
    }
}

/// Entries of a tenant behind (or, the newest first, before) the entry `after`.
pub async fn ledger(desk: Desk, tenant: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let wanted = Wanted::read(&desk.http)?;
    let (limit, after) = (wanted.limit as u64, wanted.after_number()?);
    let (ledger, tenant) = (&desk.state.ledger, TenantId::from(tenant.as_str()));
    let last = ledger.last_seq(&tenant).await.map_err(faults::of_ledger)?;
    // Entries are numbered without a gap: those behind `from`, as many as there are to be.
    let (from, count) = if wanted.newest_first {
        let until = after.map_or(last, |after| after.saturating_sub(1).min(last));
        (until.saturating_sub(limit), until.min(limit))
    } else {
        (after.unwrap_or(0), limit)
    };
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let mut entries = match count {
        0 => Vec::new(),
        count => ledger.entries(&tenant, from, count).await.map_err(faults::of_ledger)?,
    };
    if wanted.newest_first {
        // Where those that were meant lie in an archive, the store answers with later ones.
        entries.retain(|entry| entry.seq <= from + limit);
        entries.reverse();
    }
    let has_more = match entries.last() {
        Some(entry) if wanted.newest_first => entry.seq > 1,
        Some(entry) => entry.seq < last,
        None => false,
    };
    let items: Vec<EntryWithMovements> = entries.into_iter().map(Into::into).collect();
    Ok(answer(&List::of(Page { items, has_more }, "ledger.entry", |item| item.entry.seq.to_string())))
}

/// Who changed what, the newest first.
pub async fn audit(desk: Desk) -> Result<HttpResponse, ApiError> {
    let wanted = Wanted::read(&desk.http)?;
    let log = desk.accounts.audit_log();
    let mut items = log.list(wanted.before.as_deref(), wanted.limit + 1).await.map_err(faults::of_look)?;
    let has_more = items.len() > wanted.limit;
    items.truncate(wanted.limit);
    Ok(answer(&List::of(Page { items, has_more }, "audit.record", |record| record.id.clone())))
}
