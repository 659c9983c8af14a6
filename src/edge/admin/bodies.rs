//! What operators send, read field by field. A field that nobody knows is refused here: a misspelled one would change
//! nothing, and look as if it had. A null takes away what may be absent.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    admission::{LIMIT_MAX, LimitKind, Scope, Scopes, Tiers},
    domain::{ModelId, NanoUsd, Price, RequestId},
    edge::{
        error::{ApiError, shorten},
        wire::read::{Fields, item_text, wrong_type},
    },
    ledger::TEXT_CHARACTERS_MAX,
    operator::{
        GRACE_MAX, KeyChanges, KeyWish, LABELS_MAX, LimitChanges, MODELS_MAX, NAME_CHARACTERS_MAX, PriceWish,
        TenantChanges, TenantStatus, TenantWish, UNIX_MS_MAX,
    },
    webhooks::{EndpointWish, Kind, Kinds, URL_BYTES_MAX},
};

/// Of a price of one token, in nano-dollars: a thousand dollars.
pub const PRICE_MAX: i64 = 1_000_000_000_000;
/// What a tenant begins with and how far it may owe: together they are an amount.
pub const FUNDS_MAX: i64 = i64::MAX / 2;
/// Where nothing is said.
pub const GRACE_SECONDS: u64 = 86_400;

pub const TENANT: &[&str] = &["name", "balance_nano_usd", "credit_nano_usd", "tier", "low_balance_nano_usd", "limits"];
pub const TENANT_CHANGES: &[&str] = &["status", "tier", "low_balance_nano_usd", "credit_nano_usd", "limits"];
pub const KEY: &[&str] = &["label", "labels", "scopes", "models", "expires_unix_ms", "limits"];
pub const ROTATION: &[&str] = &["grace_seconds"];
pub const CREDIT: &[&str] = &["kind", "amount_nano_usd", "reference", "note", "request"];
pub const PRICES: &[&str] = &["version", "from_unix_ms", "prices"];
pub const PRICE: &[&str] = &["input_nano_usd", "output_nano_usd", "cached_input_nano_usd", "free"];

pub const WEBHOOK: &[&str] = &["url", "kinds", "enabled", "rotate_secret"];
pub const DEAD_LETTERS: &[&str] = &["id"];

pub fn tenant(fields: &Fields<'_>, tiers: &Tiers) -> Result<TenantWish, ApiError> {
    only(fields, TENANT)?;
    let name = fields.text("name", NAME_CHARACTERS_MAX)?;
    Ok(TenantWish {
        name: fields.required("name", name)?.to_owned(),
        balance: fields.amount("balance_nano_usd", 0..=FUNDS_MAX)?.unwrap_or_default(),
        credit: fields.amount("credit_nano_usd", 0..=FUNDS_MAX)?.unwrap_or_default(),
        tier: tier(fields, tiers)?,
        low_balance: fields.amount("low_balance_nano_usd", 0..=i64::MAX)?,
        limits: limits(fields)?.into_iter().filter_map(|(kind, limit)| Some((kind, limit?))).collect(),
    })
}

/// With the credit line, where it is to change.
pub fn tenant_changes(fields: &Fields<'_>, tiers: &Tiers) -> Result<(TenantChanges, Option<NanoUsd>), ApiError> {
    only(fields, TENANT_CHANGES)?;
    let words = TenantStatus::ALL.map(TenantStatus::as_str);
    let status = fields.word("status", &words)?;
    let status = TenantStatus::ALL.into_iter().find(|known| Some(known.as_str()) == status);
    let tier = tier(fields, tiers)?;
    let low_balance = fields.amount("low_balance_nano_usd", 0..=i64::MAX)?;
    let credit = fields.amount("credit_nano_usd", 0..=FUNDS_MAX)?.unwrap_or_default();
    let changes = TenantChanges {
        status,
        tier: is_written(fields, "tier").then_some(tier),
        low_balance: is_written(fields, "low_balance_nano_usd").then_some(low_balance),
        limits: limits(fields)?,
    };
    Ok((changes, is_written(fields, "credit_nano_usd").then_some(credit)))
}

pub fn key(fields: &Fields<'_>) -> Result<KeyWish, ApiError> {
    only(fields, KEY)?;
    Ok(KeyWish {
        label: fields.text("label", NAME_CHARACTERS_MAX)?.unwrap_or("key").to_owned(),
        labels: labels(fields)?,
        scopes: scopes(fields)?.unwrap_or_else(|| [Scope::Chat, Scope::Read].into_iter().collect()),
        models: models(fields)?,
        limits: limits(fields)?.into_iter().filter_map(|(kind, limit)| Some((kind, limit?))).collect(),
        expires_unix_ms: time(fields, "expires_unix_ms")?,
    })
}

pub fn key_changes(fields: &Fields<'_>) -> Result<KeyChanges, ApiError> {
    only(fields, KEY)?;
    let (labels, models, expires) = (labels(fields)?, models(fields)?, time(fields, "expires_unix_ms")?);
    Ok(KeyChanges {
        label: fields.text("label", NAME_CHARACTERS_MAX)?.map(str::to_owned),
        labels: is_written(fields, "labels").then_some(labels),
        scopes: scopes(fields)?,
        models: is_written(fields, "models").then_some(models),
        expires_unix_ms: is_written(fields, "expires_unix_ms").then_some(expires),
        limits: limits(fields)?,
    })
}

/// For how long the secret before is still good.
pub fn grace(fields: &Fields<'_>) -> Result<Duration, ApiError> {
    only(fields, ROTATION)?;
    let seconds = fields.integer("grace_seconds", 0..=GRACE_MAX.as_secs().cast_signed())?;
    Ok(Duration::from_secs(seconds.map_or(GRACE_SECONDS, i64::cast_unsigned)))
}

/// Money that is to be moved.
pub struct Credit {
    pub kind: CreditKind,
    pub reference: String,
    pub note: String,
}

pub enum CreditKind {
    Grant(NanoUsd),
    Adjust(NanoUsd),
    /// Without an amount: all that is left of the charge.
    Refund(RequestId, Option<NanoUsd>),
}

impl CreditKind {
    pub const WORDS: [&'static str; 3] = ["grant", "adjust", "refund"];

    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Grant(_) => "grant",
            Self::Adjust(_) => "adjust",
            Self::Refund(..) => "refund",
        }
    }
}

pub fn credit(fields: &Fields<'_>) -> Result<Credit, ApiError> {
    only(fields, CREDIT)?;
    let kind = fields.required("kind", fields.word("kind", &CreditKind::WORDS)?)?;
    let request = fields.text("request", TEXT_CHARACTERS_MAX)?;
    if request.is_some() && kind != "refund" {
        let why = format!("Invalid 'request': a {kind} is for none. Leave it out.");
        return Err(ApiError::field("unsupported_value", "request", why));
    }
    let amount = |least| fields.amount("amount_nano_usd", least..=i64::MAX);
    let needed = |least| fields.required("amount_nano_usd", amount(least)?);
    let kind = match kind {
        "grant" => CreditKind::Grant(needed(1)?),
        "adjust" => CreditKind::Adjust(needed(-i64::MAX)?),
        _ => CreditKind::Refund(fields.required("request", request)?.into(), amount(1)?),
    };
    let reference = line(fields, "reference")?;
    let reference = fields.required("reference", reference.filter(|reference| !reference.is_empty()))?.to_owned();
    Ok(Credit { kind, reference, note: line(fields, "note")?.unwrap_or_default().to_owned() })
}

/// A price list: its version, from when on it holds (nothing for now), and its prices.
pub type PriceListWish = (String, Option<u64>, BTreeMap<ModelId, PriceWish>);

pub fn prices<'a>(fields: &Fields<'a>, is_served: impl Fn(&str) -> bool) -> Result<PriceListWish, ApiError> {
    only(fields, PRICES)?;
    let version = fields.text("version", TEXT_CHARACTERS_MAX)?;
    let version = fields.required("version", version)?.to_owned();
    let from = time(fields, "from_unix_ms")?;
    let list = fields.required("prices", fields.object("prices")?)?;
    let price = |(model, value): (&'a str, &'a serde_json::Value)| {
        let at = list.param(model);
        if !is_served(model) {
            let why = format!("Invalid 'prices': the model `{}` is not served here.", shorten(model));
            return Err(ApiError::field("invalid_value", "prices", why));
        }
        let fields = Fields::of(value, at)?;
        only(&fields, PRICE)?;
        let amount = |name: &str| fields.amount(name, 0..=PRICE_MAX);
        let input = fields.required("input_nano_usd", amount("input_nano_usd")?)?;
        let output = fields.required("output_nano_usd", amount("output_nano_usd")?)?;
        let cached_input = amount("cached_input_nano_usd")?.unwrap_or(input);
        let is_free = fields.boolean("free")?.unwrap_or(false);
        Ok((ModelId::from(model), PriceWish { price: Price { input, output, cached_input }, is_free }))
    };
    Ok((version, from, list.all().map(price).collect::<Result<_, _>>()?))
}

pub fn webhook(fields: &Fields<'_>, allow_private: bool) -> Result<EndpointWish, ApiError> {
    only(fields, WEBHOOK)?;
    Ok(EndpointWish {
        url: fields.text("url", URL_BYTES_MAX)?.map(str::to_owned),
        kinds: kinds(fields)?,
        enabled: fields.boolean("enabled")?,
        rotate: fields.boolean("rotate_secret")?.unwrap_or(false),
        allow_private,
    })
}

/// The one that is meant, or all of them.
pub fn dead_letters(fields: &Fields<'_>) -> Result<Option<String>, ApiError> {
    only(fields, DEAD_LETTERS)?;
    Ok(fields.text("id", TEXT_CHARACTERS_MAX)?.map(str::to_owned))
}

// --- fields -----------------------------------------------------------------------------------------

fn only(fields: &Fields<'_>, known: &[&str]) -> Result<(), ApiError> {
    match fields.written().find(|name| !known.contains(name)) {
        None => Ok(()),
        Some(other) => {
            let param = fields.param(&shorten(other));
            let why = format!("Unknown parameter: '{param}'. There are {}.", known.join(", "));
            Err(ApiError::field("unknown_parameter", param, why))
        }
    }
}

fn is_written(fields: &Fields<'_>, name: &str) -> bool {
    fields.written().any(|written| written == name)
}

/// A text for one line, as the ledger takes it.
fn line<'a>(fields: &Fields<'a>, name: &str) -> Result<Option<&'a str>, ApiError> {
    match fields.text(name, TEXT_CHARACTERS_MAX)? {
        Some(text) if text.chars().any(char::is_control) => {
            let why = format!("Invalid '{name}': it has control characters.");
            Err(ApiError::field("invalid_value", name, why))
        }
        text => Ok(text),
    }
}

/// As tenants have it written down: nothing for the standard one.
fn tier(fields: &Fields<'_>, tiers: &Tiers) -> Result<String, ApiError> {
    let Some(name) = fields.text("tier", NAME_CHARACTERS_MAX)? else { return Ok(String::new()) };
    let known = tiers.find(name).map(str::to_owned);
    known.ok_or_else(|| fields.none_of("tier", name, &tiers.iter().map(|(name, _)| name).collect::<Vec<_>>()))
}

fn time(fields: &Fields<'_>, name: &str) -> Result<Option<u64>, ApiError> {
    Ok(fields.integer(name, 0..=UNIX_MS_MAX.cast_signed())?.map(i64::cast_unsigned))
}

/// Nano-dollars where it is spend.
fn limits(fields: &Fields<'_>) -> Result<LimitChanges, ApiError> {
    let Some(limits) = fields.object("limits")? else { return Ok(Vec::new()) };
    only(&limits, &LimitKind::ALL.map(LimitKind::as_str))?;
    let changed = LimitKind::ALL.into_iter().filter(|kind| is_written(&limits, kind.as_str()));
    let limit = |kind: LimitKind| {
        let limit = limits.integer(kind.as_str(), 0..=LIMIT_MAX.cast_signed())?;
        Ok((kind, limit.map(i64::cast_unsigned)))
    };
    changed.map(limit).collect()
}

fn labels(fields: &Fields<'_>) -> Result<BTreeMap<String, String>, ApiError> {
    let Some(labels) = fields.object("labels")? else { return Ok(BTreeMap::new()) };
    if labels.written().count() > LABELS_MAX {
        let why = format!("Invalid 'labels': at most {LABELS_MAX} pairs.");
        return Err(ApiError::field("object_above_max_properties", "labels", why));
    }
    let label = |name: &str| {
        let value = labels.text(name, NAME_CHARACTERS_MAX)?;
        Ok((name.to_owned(), labels.required(&shorten(name), value)?.to_owned()))
    };
    labels.written().map(label).collect()
}

fn scopes(fields: &Fields<'_>) -> Result<Option<Scopes>, ApiError> {
    let Some(items) = fields.array("scopes", Scope::ALL.len())? else { return Ok(None) };
    let scope = |(i, value): (usize, &serde_json::Value)| {
        let at = || format!("scopes[{i}]");
        let text = value.as_str().ok_or_else(|| wrong_type(&at(), "a string", value))?;
        text.parse::<Scope>().map_err(|_| fields.none_of(&at(), text, &Scope::ALL.map(Scope::as_str)))
    };
    items.iter().enumerate().map(scope).collect::<Result<_, _>>().map(Some)
}

fn models(fields: &Fields<'_>) -> Result<Option<BTreeSet<ModelId>>, ApiError> {
    let Some(items) = fields.array("models", MODELS_MAX)? else { return Ok(None) };
    let model = |(i, value)| item_text(&format!("models[{i}]"), value, NAME_CHARACTERS_MAX).map(ModelId::from);
    items.iter().enumerate().map(model).collect::<Result<_, _>>().map(Some)
}

fn kinds(fields: &Fields<'_>) -> Result<Option<Kinds>, ApiError> {
    let Some(items) = fields.array("kinds", Kind::ALL.len())? else { return Ok(None) };
    if items.is_empty() {
        return Err(ApiError::field("empty_array", "kinds", "Invalid 'kinds': expected one at least."));
    }
    let kind = |(i, value): (usize, &serde_json::Value)| {
        let at = || format!("kinds[{i}]");
        let text = value.as_str().ok_or_else(|| wrong_type(&at(), "a string", value))?;
        let known = Kind::ALL.into_iter().find(|kind| kind.as_str() == text);
        known.ok_or_else(|| fields.none_of(&at(), text, &Kind::ALL.map(Kind::as_str)))
    };
    items.iter().enumerate().map(kind).collect::<Result<BTreeSet<_>, _>>().map(|kinds| Some(Kinds::of(kinds)))
}
