use std::collections::HashMap;

use serde::Serialize;

use crate::{
    domain::{KeyId, ModelId, NanoUsd, Price, TenantId, Usage},
    store::StoreError,
};

/// An entry as the store has it: its number and its fields.
pub(super) type Raw = (String, HashMap<String, String>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// Prepaid money came in.
    Grant,
    /// Money was set aside for a request at its admission.
    Hold,
    /// A request was charged; the rest of its hold went back to the balance.
    Post,
    /// A request's whole hold went back to the balance.
    Release,
}

/// One line of a tenant's ledger. Lines are only ever appended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// 1, 2, 3, … without a gap.
    pub seq: u64,
    pub kind: EntryKind,
    /// The request; for a grant its reference.
    pub request: String,
    pub tenant: TenantId,
    /// Empty for a grant, like `model` and `price_version`.
    pub key: KeyId,
    pub model: ModelId,
    /// For a hold: the prompt and the most that may be put out.
    pub usage: Usage,
    pub price: Price,
    pub price_version: String,
    /// What came in, was set aside, was charged, or went back.
    #[serde(rename = "amount_nano_usd")]
    pub amount: NanoUsd,
    /// After this entry.
    #[serde(rename = "balance_nano_usd")]
    pub balance: NanoUsd,
    /// Why it was posted or released; for a grant what a person wrote.
    pub note: String,
    pub unix_ms: u64,
}

/// Reads an amount as the store keeps it; anything but a whole number of nano-dollars is damage.
pub(super) fn nano(text: &str, what: &str) -> Result<NanoUsd, StoreError> {
    whole(text, what).map(NanoUsd::new).map_err(StoreError::Damaged)
}

pub(super) fn parse(id: &str, fields: &HashMap<String, String>) -> Result<Entry, String> {
    let seq = id.strip_suffix("-0").ok_or_else(|| format!("entry {id} has an odd number"))?;
    let fault = |message: String| format!("entry {id}: {message}");
    let text = |name: &str| fields.get(name).map(String::as_str).ok_or_else(|| fault(format!("`{name}` is missing")));
    let money = |name: &str| whole(text(name)?, name).map(NanoUsd::new).map_err(fault);
    let count = |name: &str| whole::<u32>(text(name)?, name).map_err(fault);
    let kind = match text("kind")? {
        "grant" => EntryKind::Grant,
        "hold" => EntryKind::Hold,
        "post" => EntryKind::Post,
        "release" => EntryKind::Release,
        other => return Err(fault(format!("`{other}` is no kind of entry"))),
    };
    Ok(Entry {
        seq: whole(seq, "number").map_err(fault)?,
        kind,
        request: text("request")?.to_owned(),
        tenant: text("tenant")?.into(),
        key: text("key")?.into(),
        model: text("model")?.into(),
        usage: Usage {
            prompt_tokens: count("prompt")?,
            completion_tokens: count("completion")?,
            cached_tokens: count("cached")?,
        },
        price: Price { input: money("input")?, output: money("output")? },
        price_version: text("version")?.to_owned(),
        amount: money("amount")?,
        balance: money("balance")?,
        note: text("note")?.to_owned(),
        unix_ms: whole(text("at")?, "at").map_err(fault)?,
    })
}

pub(super) fn whole<T: std::str::FromStr>(text: &str, what: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{what} is `{text}`, not a whole number in range"))
}
