//! Money that persons move: what comes in, what is given back, what is put right. Each carries a reference, so that a
//! call whose answer was lost may be repeated.

use serde::Serialize;

use super::{Ledger, LedgerError, entry};
use crate::{
    domain::{MoneyError, NanoUsd, RequestId, TenantId},
    store::{Function, Reply, keys},
};

/// Of a note or a reference.
pub const TEXT_CHARACTERS_MAX: usize = 256;

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Moved {
    #[serde(rename = "balance_nano_usd")]
    pub balance: NanoUsd,
    /// The same had been done under this reference before; this call changed nothing.
    pub repeated: bool,
}

/// What is given back of a charge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refund {
    pub request: RequestId,
    pub amount: NanoUsd,
    pub reference: String,
    pub note: String,
}

impl Ledger {
    /// Adds prepaid money.
    pub async fn grant(
        &self,
        tenant: &TenantId,
        amount: NanoUsd,
        reference: &str,
        note: &str,
    ) -> Result<Moved, LedgerError> {
        check_grant(amount, reference, note)?;
        self.move_money(Function::Grant, tenant, amount, reference, note, None).await
    }

    /// Puts the balance right, up or down; never below what may be spent.
    pub async fn adjust(
        &self,
        tenant: &TenantId,
        amount: NanoUsd,
        reference: &str,
        note: &str,
    ) -> Result<Moved, LedgerError> {
        check_adjustment(amount, reference, note)?;
        self.move_money(Function::Adjust, tenant, amount, reference, note, None).await
    }

    /// Gives a charge back, or a part of it; in all never more than was charged.
    pub async fn refund(&self, tenant: &TenantId, refund: &Refund) -> Result<Moved, LedgerError> {
        let Refund { request, amount, reference, note } = refund;
        check_grant(*amount, reference, note)?;
        self.move_money(Function::Refund, tenant, *amount, reference, note, Some(request)).await
    }

    /// What a refund under this reference gives back if it names no amount: what is left of the charge, or, where the
    /// reference was used for that before, what it gave back then.
    pub async fn refundable(
        &self,
        tenant: &TenantId,
        request: &RequestId,
        reference: &str,
    ) -> Result<NanoUsd, LedgerError> {
        let mut command = redis::cmd("HMGET");
        command.arg(keys::ended(tenant)).arg(request.as_str()).arg(format!("refundable {request}"));
        command.arg(format!("refund {reference}"));
        let (end, left, before): (Option<String>, Option<String>, Option<String>) = self.store.query(&command).await?;
        if let Some(before) = before {
            // Its amount, its request, and what stands for its note.
            return match before.split(' ').collect::<Vec<_>>()[..] {
                [amount, of, _] if of == request.as_str() => Ok(entry::nano(amount, "refund")?),
                _ => Err(LedgerError::OtherReference(reference.to_owned())),
            };
        }
        let charged = end.as_deref().and_then(|end| end.strip_prefix("post ")?.split(' ').next());
        let charged = charged.ok_or_else(|| LedgerError::NotCharged(request.clone()))?;
        let left = entry::nano(left.as_deref().unwrap_or(charged), "charge")?;
        if left == NanoUsd::ZERO {
            return Err(LedgerError::ExceedsCharge { request: request.clone(), left });
        }
        Ok(left)
    }

    /// Sets how far below zero the balance may go. One below what is in use stops new requests, and nothing else.
    pub async fn set_credit(&self, tenant: &TenantId, amount: NanoUsd, note: &str) -> Result<Moved, LedgerError> {
        check_credit(amount, note)?;
        let nano = amount.nano().to_string();
        let reply = self.call(Function::Credit, tenant, &[tenant.as_str(), &nano, note]).await?;
        moved(reply, tenant, amount, "", None)
    }

    async fn move_money(
        &self,
        function: Function,
        tenant: &TenantId,
        amount: NanoUsd,
        reference: &str,
        note: &str,
        request: Option<&RequestId>,
    ) -> Result<Moved, LedgerError> {
        let nano = amount.nano().to_string();
        let mut arguments = vec![tenant.as_str(), reference, &nano, note];
        arguments.extend(request.map(RequestId::as_str));
        let reply = self.call(function, tenant, &arguments).await?;
        moved(reply, tenant, amount, reference, request)
    }
}

fn moved(
    mut reply: Reply,
    tenant: &TenantId,
    amount: NanoUsd,
    reference: &str,
    request: Option<&RequestId>,
) -> Result<Moved, LedgerError> {
    let request = || request.cloned().unwrap_or_else(|| RequestId::from(""));
    let repeated = match reply.word() {
        "granted" | "adjusted" | "refunded" | "set" => false,
        "repeated" => true,
        "other" => return Err(LedgerError::OtherReference(reference.to_owned())),
        "overflow" => return Err(MoneyError::Overflow.into()),
        "bad_amount" => return Err(LedgerError::BadAmount(amount)),
        "not_charged" => return Err(LedgerError::NotCharged(request())),
        "exceeds_charge" => {
            let left = entry::nano(&reply.next::<String>("rest")?, "rest")?;
            return Err(LedgerError::ExceedsCharge { request: request(), left });
        }
        "insufficient" => {
            let balance = entry::nano(&reply.next::<String>("balance")?, "balance")?;
            return Err(LedgerError::Insufficient { balance, amount });
        }
        "unknown_tenant" => return Err(LedgerError::UnknownTenant(tenant.clone())),
        _ => return Err(reply.unexpected("moving money").into()),
    };
    Ok(Moved { balance: entry::nano(&reply.next::<String>("balance")?, "balance")?, repeated })
}

/// What can be said against a grant, or a refund, without asking the store.
pub(crate) fn check_grant(amount: NanoUsd, reference: &str, note: &str) -> Result<(), LedgerError> {
    if amount <= NanoUsd::ZERO {
        return Err(LedgerError::BadAmount(amount));
    }
    check_texts(reference, note)
}

pub(crate) fn check_adjustment(amount: NanoUsd, reference: &str, note: &str) -> Result<(), LedgerError> {
    if amount == NanoUsd::ZERO || amount == NanoUsd::new(i64::MIN) {
        return Err(LedgerError::BadAmount(amount));
    }
    check_texts(reference, note)
}

pub(crate) fn check_credit(amount: NanoUsd, note: &str) -> Result<(), LedgerError> {
    if amount < NanoUsd::ZERO {
        return Err(LedgerError::BadAmount(amount));
    }
    check_texts("credit", note)
}

/// The store keeps texts between separators, and people read them on one line.
fn check_texts(reference: &str, note: &str) -> Result<(), LedgerError> {
    let is_plain = |text: &str| text.chars().count() <= TEXT_CHARACTERS_MAX && !text.chars().any(char::is_control);
    let is_sound = !reference.is_empty() && is_plain(reference) && is_plain(note);
    is_sound.then_some(()).ok_or(LedgerError::BadText)
}
