use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use crate::{
    domain::{KeyId, ModelId, MoneyError, NanoUsd, Price, TenantId, Usage},
    store::StoreError,
};

/// An entry as the store has it: its number and its fields.
pub(super) type Raw = (String, HashMap<String, String>);

/// The link before the first entry of a tenant.
pub const NO_LINK: &str = "0000000000000000000000000000000000000000";

/// What an entry's link covers, in this order; behind the link before it and its own number.
const LINKED: [&str; 20] = [
    "kind",
    "request",
    "reference",
    "tenant",
    "key",
    "model",
    "prompt",
    "completion",
    "cached",
    "input",
    "output",
    "cached_input",
    "version",
    "amount",
    "hold",
    "balance",
    "held",
    "note",
    "digest",
    "at",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// Prepaid money came in.
    Grant,
    /// Money was set aside for a request: at its admission, or as its answer grew.
    Hold,
    /// A request was charged; the rest of its hold went back to the balance.
    Post,
    /// A request's whole hold went back to the balance.
    Release,
    /// A charge, or a part of it, was given back.
    Refund,
    /// A correction by a person, or what could not be collected.
    Adjust,
    /// The credit line was set. Moves no money.
    Credit,
}

impl EntryKind {
    pub const ALL: [Self; 7] =
        [Self::Grant, Self::Hold, Self::Post, Self::Release, Self::Refund, Self::Adjust, Self::Credit];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Grant => "grant",
            Self::Hold => "hold",
            Self::Post => "post",
            Self::Release => "release",
            Self::Refund => "refund",
            Self::Adjust => "adjust",
            Self::Credit => "credit",
        }
    }
}

/// Where money is. Every movement takes from one and gives to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Account {
    /// What the tenant pays with.
    Funding,
    Balance,
    Held,
    /// What was earned.
    Charges,
    /// What was given back of it.
    Refunds,
    /// The other side of corrections.
    Adjustments,
}

/// One side of an entry: the amount is never negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Movement {
    pub from: Account,
    pub to: Account,
    #[serde(rename = "amount_nano_usd")]
    pub amount: NanoUsd,
}

/// One line of a tenant's ledger. Lines are only ever appended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// 1, 2, 3, … without a gap.
    pub seq: u64,
    pub kind: EntryKind,
    /// Empty where no request is concerned.
    pub request: String,
    /// What a person called a grant, a refund or an adjustment; makes it happen once.
    pub reference: String,
    pub tenant: TenantId,
    /// Of holds, posts and releases alone, like `model` and `price_version`.
    pub key: KeyId,
    pub model: ModelId,
    /// For a hold: the prompt, and the tokens that it pays for.
    pub usage: Usage,
    pub price: Price,
    pub price_version: String,
    /// What came in, was set aside, was charged, or went back; of a correction with its sign.
    #[serde(rename = "amount_nano_usd")]
    pub amount: NanoUsd,
    /// Of a post or a release: what was on hold until then. 0 for a request whose hold had expired.
    #[serde(rename = "hold_nano_usd")]
    pub hold: NanoUsd,
    /// After this entry.
    #[serde(rename = "balance_nano_usd")]
    pub balance: NanoUsd,
    /// On hold for all requests, after this entry.
    #[serde(rename = "held_nano_usd")]
    pub held: NanoUsd,
    /// Why it was posted or released; what a person wrote.
    pub note: String,
    /// SHA-256 of the ids of the tokens that were put out, where they are known; see `Receipt`.
    pub digest: String,
    /// Never before that of the entry before.
    pub unix_ms: u64,
    /// SHA-1 of the link before and of everything in this entry.
    pub link: String,
}

/// An entry with what it moved, for whoever reads the ledger.
#[derive(Clone, Debug, Serialize)]
pub struct EntryWithMovements {
    #[serde(flatten)]
    pub entry: Entry,
    pub movements: Vec<Movement>,
}

impl From<Entry> for EntryWithMovements {
    fn from(entry: Entry) -> Self {
        Self { movements: entry.movements(), entry }
    }
}

impl Entry {
    /// The link that this entry should have behind `before`.
    pub fn link_after(&self, before: &str) -> String {
        let fields = self.fields();
        let mut text = format!("{before}\x1f{}", self.seq);
        for (_, value) in &fields {
            text.push('\x1f');
            text.push_str(value);
        }
        hex::encode(Sha1::digest(text.as_bytes()))
    }

    /// What it moved, as a bookkeeper writes it: empty for what moves nothing.
    pub fn movements(&self) -> Vec<Movement> {
        use Account::{Adjustments, Balance, Charges, Funding, Held, Refunds};
        let movement = |from, to, amount| Movement { from, to, amount };
        let rest = NanoUsd::new(self.hold.nano().saturating_sub(self.amount.nano()));
        let mut movements = match self.kind {
            EntryKind::Grant => vec![movement(Funding, Balance, self.amount)],
            EntryKind::Hold => vec![movement(Balance, Held, self.amount)],
            EntryKind::Post if self.hold == NanoUsd::ZERO => vec![movement(Balance, Charges, self.amount)],
            EntryKind::Post => vec![movement(Held, Charges, self.amount), movement(Held, Balance, rest)],
            EntryKind::Release => vec![movement(Held, Balance, self.amount)],
            EntryKind::Refund => vec![movement(Refunds, Balance, self.amount)],
            EntryKind::Adjust if self.amount < NanoUsd::ZERO => {
                vec![movement(Balance, Adjustments, NanoUsd::new(self.amount.nano().saturating_neg()))]
            }
            EntryKind::Adjust => vec![movement(Adjustments, Balance, self.amount)],
            EntryKind::Credit => Vec::new(),
        };
        movements.retain(|movement| movement.amount != NanoUsd::ZERO);
        movements
    }

    /// What could not be collected of a request's charge: an adjustment that nobody made.
    pub fn is_write_off(&self) -> bool {
        self.kind == EntryKind::Adjust && self.reference.is_empty() && self.note == "written_off"
    }

    /// By how much it moved one of the accounts.
    pub fn moved(&self, account: Account) -> Result<NanoUsd, MoneyError> {
        self.movements().iter().try_fold(NanoUsd::ZERO, |sum, Movement { from, to, amount }| {
            let sum = if *to == account { sum.checked_add(*amount)? } else { sum };
            if *from == account { sum.checked_sub(*amount) } else { Ok(sum) }
        })
    }

    /// As the store has them.
    fn fields(&self) -> Vec<(&'static str, String)> {
        let Usage { prompt_tokens, completion_tokens, cached_tokens } = self.usage;
        let value = |name: &str| match name {
            "kind" => self.kind.as_str().to_owned(),
            "request" => self.request.clone(),
            "reference" => self.reference.clone(),
            "tenant" => self.tenant.to_string(),
            "key" => self.key.to_string(),
            "model" => self.model.to_string(),
            "prompt" => prompt_tokens.to_string(),
            "completion" => completion_tokens.to_string(),
            "cached" => cached_tokens.to_string(),
            "input" => self.price.input.nano().to_string(),
            "output" => self.price.output.nano().to_string(),
            "cached_input" => self.price.cached_input.nano().to_string(),
            "version" => self.price_version.clone(),
            "amount" => self.amount.nano().to_string(),
            "hold" => self.hold.nano().to_string(),
            "balance" => self.balance.nano().to_string(),
            "held" => self.held.nano().to_string(),
            "note" => self.note.clone(),
            "digest" => self.digest.clone(),
            _ => self.unix_ms.to_string(),
        };
        LINKED.into_iter().map(|name| (name, value(name))).collect()
    }
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
    let kind = text("kind")?;
    let kind = EntryKind::ALL.into_iter().find(|known| known.as_str() == kind);
    let kind = kind.ok_or_else(|| fault("is of no known kind".to_owned()))?;
    Ok(Entry {
        seq: whole(seq, "number").map_err(fault)?,
        kind,
        request: text("request")?.to_owned(),
        reference: text("reference")?.to_owned(),
        tenant: text("tenant")?.into(),
        key: text("key")?.into(),
        model: text("model")?.into(),
        usage: Usage {
            prompt_tokens: count("prompt")?,
            completion_tokens: count("completion")?,
            cached_tokens: count("cached")?,
        },
        price: Price { input: money("input")?, output: money("output")?, cached_input: money("cached_input")? },
        price_version: text("version")?.to_owned(),
        amount: money("amount")?,
        hold: money("hold")?,
        balance: money("balance")?,
        held: money("held")?,
        note: text("note")?.to_owned(),
        digest: text("digest")?.to_owned(),
        unix_ms: whole(text("at")?, "at").map_err(fault)?,
        link: text("link")?.to_owned(),
    })
}

pub(super) fn whole<T: std::str::FromStr>(text: &str, what: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{what} is `{text}`, not a whole number in range"))
}
