//! A signed statement about one settled request, which a tenant can check without asking anybody.

use std::{collections::BTreeMap, str::FromStr};

use ed25519_dalek::{Signer, SigningKey};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::receipt_key::ReceiptKey;
use crate::domain::{KeyId, ModelId, NanoUsd, Price, RequestId, TenantId, Usage};

/// The form of a receipt; another one is another number.
pub const RECEIPT_VERSION: u64 = 1;
/// Stands before what is signed, so that no signature of ours means two things.
const DOMAIN: &str = "lightcone-receipt-v1\n";
const ALGORITHM: &str = "ed25519";
const SIGNATURE_BYTES: usize = 64;
const TEXT_BYTES_MAX: usize = 1024;
/// Of digests, as SHA-1 and SHA-512 have them.
const DIGEST_BYTES: std::ops::RangeInclusive<usize> = 20..=64;

/// Why a receipt proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    #[error("this is no receipt: {0}")]
    Malformed(String),
    #[error("the receipt has version {0}, and only {RECEIPT_VERSION} is known")]
    UnknownVersion(u64),
    #[error("the receipt names the public key {named}, not {expected}")]
    OtherKey { named: String, expected: String },
    #[error("the receipt was changed, or signed by somebody else: its signature does not fit")]
    BadSignature,
    #[error("the receipt states {stated}, but its tokens cost {cost}")]
    WrongAmount { stated: NanoUsd, cost: NanoUsd },
}

impl ReceiptError {
    /// A word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::UnknownVersion(_) => "unknown_version",
            Self::OtherKey { .. } => "other_key",
            Self::BadSignature => "bad_signature",
            Self::WrongAmount { .. } => "wrong_amount",
        }
    }
}

/// What a receipt states, in the order in which it is signed.
#[derive(Clone, Debug, JsonSchema, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptStatement {
    pub version: u64,
    #[schemars(with = "String")]
    pub request: RequestId,
    #[schemars(with = "String")]
    pub tenant: TenantId,
    #[schemars(with = "String")]
    pub key: KeyId,
    #[schemars(with = "String")]
    pub model: ModelId,
    /// `prompt_tokens`, `completion_tokens`, `cached_tokens`.
    #[schemars(with = "BTreeMap<String, u32>")]
    pub usage: Usage,
    /// `input`, `output`, `cached_input`: nano-dollars for a token.
    #[schemars(with = "BTreeMap<String, i64>")]
    pub price: Price,
    pub price_version: String,
    #[schemars(with = "i64")]
    #[serde(rename = "amount_nano_usd")]
    pub amount: NanoUsd,
    /// How the request ended.
    pub reason: String,
    /// Of the tokens that were put out, in hexadecimal digits.
    pub token_digest: Option<String>,
    pub settled_unix_ms: u64,
    /// The ledger's entry that charged it, and the link that ties it to all entries before it.
    pub ledger_seq: u64,
    pub ledger_link: String,
}

/// A [`ReceiptStatement`] and its signature; one flat object in JSON. Read with [`str::parse`], which takes nothing that
/// the signature does not cover.
#[derive(Clone, Debug, JsonSchema, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    #[serde(flatten)]
    pub statement: ReceiptStatement,
    pub signature: ReceiptSignature,
}

#[derive(Clone, Debug, JsonSchema, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptSignature {
    pub algorithm: String,
    pub key_id: String,
    pub public_key: String,
    pub value: String,
}

impl ReceiptStatement {
    /// What is signed: a line that says what it is, then the statement as JSON without white space.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let mut bytes = DOMAIN.as_bytes().to_vec();
        serde_json::to_writer(&mut bytes, self).expect("numbers and strings serialise");
        bytes
    }

    fn check(&self) -> Result<(), ReceiptError> {
        if self.version != RECEIPT_VERSION {
            return Err(ReceiptError::UnknownVersion(self.version));
        }
        let Self { usage, price, .. } = self;
        for (name, text) in [
            ("request", self.request.as_str()),
            ("tenant", self.tenant.as_str()),
            ("key", self.key.as_str()),
            ("model", self.model.as_str()),
            ("price_version", &self.price_version),
            ("reason", &self.reason),
        ] {
            let sound = (1..=TEXT_BYTES_MAX).contains(&text.len()) && !text.contains(char::is_control);
            ensure(sound, name)?;
        }
        ensure(usage.cached_tokens <= usage.prompt_tokens, "usage.cached_tokens")?;
        for (name, price) in [("input", price.input), ("output", price.output), ("cached_input", price.cached_input)] {
            ensure(price >= NanoUsd::ZERO, &format!("price.{name}"))?;
        }
        ensure(self.amount >= NanoUsd::ZERO, "amount_nano_usd")?;
        ensure(self.token_digest.as_deref().is_none_or(is_digest), "token_digest")?;
        ensure(self.settled_unix_ms > 0, "settled_unix_ms")?;
        ensure(self.ledger_seq > 0, "ledger_seq")?;
        ensure(is_digest(&self.ledger_link), "ledger_link")
    }

    fn check_amount(&self) -> Result<(), ReceiptError> {
        let cost = self.price.cost(&self.usage).map_err(|error| ReceiptError::Malformed(error.to_string()))?;
        let fits = cost == self.amount;
        if fits { Ok(()) } else { Err(ReceiptError::WrongAmount { stated: self.amount, cost }) }
    }
}

impl Receipt {
    /// Only what [`Receipt::verify`] would take is signed.
    pub(super) fn sign(statement: ReceiptStatement, key: &SigningKey) -> Result<Self, ReceiptError> {
        statement.check()?;
        statement.check_amount()?;
        let value = key.sign(&statement.signed_bytes());
        let public_key = ReceiptKey::of(key);
        let signature = ReceiptSignature {
            algorithm: ALGORITHM.to_owned(),
            key_id: public_key.id(),
            public_key: public_key.to_string(),
            value: hex::encode(value.to_bytes()),
        };
        Ok(Self { statement, signature })
    }

    /// Whether the owner of `key` has stated this, and it adds up: every field is in its range and the amount is
    /// exactly what the tokens cost.
    pub fn verify(&self, key: &ReceiptKey) -> Result<(), ReceiptError> {
        self.statement.check()?;
        let ReceiptSignature { algorithm, key_id, public_key, value } = &self.signature;
        ensure(algorithm == ALGORITHM, "signature.algorithm")?;
        if *public_key != key.to_string() {
            return Err(ReceiptError::OtherKey { named: public_key.clone(), expected: key.to_string() });
        }
        ensure(*key_id == key.id(), "signature.key_id")?;
        let value = hex_bytes::<SIGNATURE_BYTES>(value);
        let value = value.ok_or_else(|| out_of_range("signature.value"))?;
        if !key.has_signed(&self.statement.signed_bytes(), &value) {
            return Err(ReceiptError::BadSignature);
        }
        self.statement.check_amount()
    }
}

impl FromStr for Receipt {
    type Err = ReceiptError;

    fn from_str(text: &str) -> Result<Self, ReceiptError> {
        let malformed = |error: serde_json::Error| ReceiptError::Malformed(error.to_string());
        let all: Value = serde_json::from_str(text).map_err(malformed)?;
        // First, for those to come may have other fields.
        if let Some(version) = all["version"].as_u64().filter(|version| *version != RECEIPT_VERSION) {
            return Err(ReceiptError::UnknownVersion(version));
        }
        let receipt: Self = serde_json::from_str(text).map_err(malformed)?;
        if serde_json::to_value(&receipt).ok() != Some(all) {
            return Err(ReceiptError::Malformed("it has a field that receipts have not".into()));
        }
        Ok(receipt)
    }
}

fn ensure(sound: bool, field: &str) -> Result<(), ReceiptError> {
    if sound { Ok(()) } else { Err(out_of_range(field)) }
}

fn out_of_range(field: &str) -> ReceiptError {
    ReceiptError::Malformed(format!("`{field}` is out of range"))
}

fn is_digest(text: &str) -> bool {
    text.len().is_multiple_of(2) && DIGEST_BYTES.contains(&(text.len() / 2)) && is_hex(text)
}

/// In the one way in which it is written.
fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn hex_bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    (is_hex(text) && hex::decode_to_slice(text, &mut bytes).is_ok()).then_some(bytes)
}

#[cfg(test)]
mod tests;
