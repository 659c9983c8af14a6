use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::domain::{NanoUsd, TenantId};

/// What a tenant can be told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Less is left than the tenant wants to have.
    BalanceLow,
    /// A request got less than it asked for because nothing more may be spent.
    BalanceExhausted,
    /// So it did because of a limit of a day or a month.
    LimitReached,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::BalanceLow, Self::BalanceExhausted, Self::LimitReached];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::BalanceLow => "balance.low",
            Self::BalanceExhausted => "balance.exhausted",
            Self::LimitReached => "limit.reached",
        }
    }
}

/// Those that an endpoint wants: at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kinds(BTreeSet<Kind>);

impl Kinds {
    pub fn all() -> Self {
        Self(Kind::ALL.into())
    }

    /// `kinds` has at least one.
    pub fn of(kinds: BTreeSet<Kind>) -> Self {
        Self(kinds)
    }

    pub fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|kind| kind.as_str()).collect()
    }
}

/// `balance.low,limit.reached`
impl FromStr for Kinds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kind = |name: &str| {
            Kind::ALL.into_iter().find(|kind| kind.as_str() == name.trim()).ok_or_else(|| {
                let all = Kind::ALL.map(Kind::as_str).join(", ");
                format!("`{name}` is not a kind of event; there are {all}")
            })
        };
        text.split(',').map(kind).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Kinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(","))
    }
}

impl Serialize for Kinds {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

/// What is sent: the same bytes and the same id at each attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub id: String,
    pub body: String,
}

/// An event as `functions/outbox.lua` writes it.
#[derive(Deserialize)]
struct Stored {
    id: String,
    kind: String,
    at: String,
    balance: String,
    held: String,
    threshold: Option<String>,
    limit: Option<String>,
    limit_value: Option<String>,
    period: Option<String>,
    scope: Option<String>,
    key: Option<String>,
}

#[derive(Serialize)]
struct Payload<'a> {
    id: &'a str,
    r#type: &'a str,
    /// Unix seconds.
    created: u64,
    tenant: &'a TenantId,
    data: Data,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
struct Data {
    #[serde(flatten)]
    about: About,
    #[serde(rename = "balance_nano_usd")]
    balance: NanoUsd,
    #[serde(rename = "held_nano_usd")]
    held: NanoUsd,
}

#[derive(Default, Serialize)]
struct About {
    #[serde(rename = "threshold_nano_usd", skip_serializing_if = "Option::is_none")]
    threshold: Option<NanoUsd>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<String>,
    /// In requests, tokens or nano-dollars, as `limit` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    limit_value: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    period: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
}

impl Message {
    /// The error says what is wrong with what was stored.
    pub fn of(tenant: &TenantId, stored: &str) -> Result<Self, String> {
        let event: Stored = serde_json::from_str(stored).map_err(|error| error.to_string())?;
        let money = |text: &str| text.parse().map(NanoUsd::new).map_err(|_| format!("`{text}` is not an amount"));
        let number = |text: &str| text.parse::<u64>().map_err(|_| format!("`{text}` is not a number"));
        let about = About {
            threshold: event.threshold.as_deref().map(money).transpose()?,
            limit: event.limit,
            limit_value: event.limit_value.as_deref().map(number).transpose()?,
            period: event.period.map(dated),
            scope: event.scope,
            key: event.key,
        };
        let data = Data { about, balance: money(&event.balance)?, held: money(&event.held)? };
        let id = message_id(tenant, &event.id);
        Ok(Self::new(tenant, id, &event.kind, number(&event.at)? / 1000, data))
    }

    /// One that is sent because somebody wants to see whether it arrives.
    pub fn test(tenant: &TenantId, now_unix_ms: u64, balance: NanoUsd, held: NanoUsd) -> Self {
        let id = message_id(tenant, &format!("test_{now_unix_ms}"));
        let data = Data { about: About::default(), balance, held };
        Self::new(tenant, id, "webhook.test", now_unix_ms / 1000, data)
    }

    fn new(tenant: &TenantId, id: String, kind: &str, created: u64, data: Data) -> Self {
        let payload = Payload { id: &id, r#type: kind, created, tenant, data };
        let body = serde_json::to_string(&payload).expect("text and numbers are JSON");
        Self { id, body }
    }
}

/// Unlike that of any other event of any tenant. `number` is the event's among those of its tenant.
pub fn message_id(tenant: &TenantId, number: &str) -> String {
    let name = tenant.as_str();
    format!("evt_{}_{number}", name.strip_prefix("ten_").unwrap_or(name))
}

/// The event's number among those of its tenant.
pub fn number_of<'a>(tenant: &TenantId, message_id: &'a str) -> Option<&'a str> {
    message_id.strip_prefix(&self::message_id(tenant, ""))
}

/// `2026-11-23` of `20261123`, and `2026-11` of `202611`.
fn dated(period: String) -> String {
    match (period.get(..4), period.get(4..6), period.get(6..)) {
        (Some(year), Some(month), Some("")) => format!("{year}-{month}"),
        (Some(year), Some(month), Some(day)) => format!("{year}-{month}-{day}"),
        _ => period,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn told(stored: &Value) -> Result<(String, Value), String> {
        let message = Message::of(&"ten_one".into(), &stored.to_string())?;
        Ok((message.id, serde_json::from_str(&message.body).unwrap()))
    }

    #[test]
    fn a_message_says_what_happened_in_whole_numbers() {
        let low = json!({
            "id": "7", "kind": "balance.low", "at": "1795451544730", "balance": "9007199254740993", "held": "12",
            "threshold": "9007199254740995",
        });
        let payload = json!({
            "id": "evt_one_7", "type": "balance.low", "created": 1_795_451_544, "tenant": "ten_one", "data": {
                "threshold_nano_usd": 9_007_199_254_740_995_i64, "balance_nano_usd": 9_007_199_254_740_993_i64,
                "held_nano_usd": 12,
            },
        });
        assert_eq!(told(&low), Ok(("evt_one_7".to_owned(), payload)));
        let limit = json!({
            "id": "8", "kind": "limit.reached", "at": "1000", "balance": "-5", "held": "0", "limit": "spend_per_day",
            "limit_value": "100", "period": "20261123", "scope": "key", "key": "key_a",
        });
        let data = json!({
            "limit": "spend_per_day", "limit_value": 100, "period": "2026-11-23", "scope": "key", "key": "key_a",
            "balance_nano_usd": -5, "held_nano_usd": 0,
        });
        assert_eq!(told(&limit).unwrap().1["data"], data);
    }

    #[test]
    fn an_event_that_cannot_be_read_is_not_guessed_at() {
        let sound = json!({ "id": "7", "kind": "balance.exhausted", "at": "1", "balance": "1", "held": "0" });
        assert!(told(&sound).is_ok());
        for (name, value) in [("balance", json!("1e3")), ("at", json!("")), ("held", json!(null)), ("id", json!(1))] {
            let mut broken = sound.clone();
            broken[name] = value;
            assert!(told(&broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn kinds_are_named_one_by_one() {
        assert_eq!("limit.reached, balance.low".parse::<Kinds>().unwrap().to_string(), "balance.low,limit.reached");
        assert_eq!(Kinds::all().to_string().parse(), Ok(Kinds::all()));
        for bad in ["", "balance", "balance.low,"] {
            assert!(bad.parse::<Kinds>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_number_of_an_event_is_found_in_its_id() {
        let tenant = TenantId::from("ten_one");
        assert_eq!(number_of(&tenant, &message_id(&tenant, "7")), Some("7"));
        assert_eq!(number_of(&tenant, "evt_other_7"), None);
    }
}
