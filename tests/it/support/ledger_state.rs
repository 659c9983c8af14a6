//! What is on a tenant's books, as the store has it and as its twin does.

use std::collections::BTreeMap;

use lightcone::{admission::Principal, domain::TenantId, store::keys};

use super::{
    calendar::{day_name, month_of},
    house::House,
    twin::Twin,
};

#[derive(Debug, Default, PartialEq)]
pub struct State {
    /// Balance, what may be spent, held, charged, granted, refunded, adjusted, credit line, number of entries.
    pub account: [i128; 9],
    pub holds: BTreeMap<String, i128>,
    /// Open requests by key.
    pub open: BTreeMap<usize, i128>,
    /// Counters of days and months that are not 0: `20261123 t:spend`.
    pub counts: BTreeMap<String, i128>,
    pub events: Vec<(String, String)>,
}

impl State {
    pub fn of(twin: &Twin) -> Self {
        let name = |party: &Option<usize>| party.map_or("t".to_owned(), |key| format!("k{key}"));
        let mut counts = BTreeMap::new();
        for ((day, party), of_day) in &twin.days {
            let (who, day_name) = (name(party), day_name(*day));
            counts.insert(format!("{day_name} {who}:requests"), of_day.requests);
            counts.insert(format!("{day_name} {who}:tokens"), of_day.tokens);
            counts.insert(format!("{day_name} {who}:spend"), of_day.spend);
            counts.insert(format!("{} {who}:spend", month_of(*day)), twin.spend_of_month(*day, *party));
        }
        counts.retain(|_, count| *count != 0);
        let keys = 0..twin.keys.len();
        Self {
            account: [
                twin.balance,
                twin.available(),
                twin.held(),
                twin.charged,
                twin.granted,
                twin.refunded,
                twin.adjusted,
                twin.credit,
                twin.entries.into(),
            ],
            holds: twin.holds.iter().map(|(request, hold)| (request.clone(), hold.amount)).collect(),
            open: keys.map(|key| (key, i128::from(twin.open(Some(key))))).filter(|(_, open)| *open > 0).collect(),
            counts,
            events: twin.events.iter().map(|(kind, detail)| ((*kind).to_owned(), detail.clone())).collect(),
        }
    }

    /// Of the days and months that the twin knows of.
    pub async fn read(house: &House, tenant: &TenantId, principals: &[Principal], twin: &Twin) -> Self {
        const FIELDS: [&str; 9] =
            ["balance", "available", "held", "charged", "granted", "refunded", "adjusted", "credit", "seq"];
        type Hash = BTreeMap<String, String>;
        let key = |name: &str| format!("lc:{{t:{tenant}}}:{name}");
        let mut periods: Vec<String> = twin.days.keys().flat_map(|(day, _)| [day_name(*day), month_of(*day)]).collect();
        periods.sort();
        periods.dedup();
        let mut question = redis::pipe();
        question.cmd("HMGET").arg(keys::account(tenant)).arg(&FIELDS);
        question.cmd("HGETALL").arg(keys::holds(tenant));
        question.cmd("HGETALL").arg(key("open"));
        question.cmd("LRANGE").arg(key("outbox")).arg(0).arg(-1);
        for period in &periods {
            question.cmd("HGETALL").arg(key(&format!("period:{period}")));
        }
        let mut raw = house.valkey.raw().await;
        let mut answers: Vec<redis::Value> = question.query_async(&mut raw).await.expect("an answer");
        let counters = answers.split_off(4);
        let [account, holds, open, events]: [redis::Value; 4] = answers.try_into().expect("four answers");
        let account: Vec<String> = redis::from_redis_value(account).expect("an account");
        let (holds, open): (Hash, Hash) =
            (redis::from_redis_value(holds).expect("holds"), redis::from_redis_value(open).expect("open requests"));
        let events: Vec<String> = redis::from_redis_value(events).expect("events");
        let index = |key: &str| principals.iter().position(|known| known.key.as_str() == key).expect("a key");
        let mut counts = BTreeMap::new();
        for (period, counters) in periods.iter().zip(counters) {
            let counters: Hash = redis::from_redis_value(counters).expect("counters");
            for (name, count) in counters.iter().filter(|(name, _)| !name.starts_with("told:")) {
                let (who, what) = name.rsplit_once(':').expect("a counter");
                let who = who.strip_prefix("k:").map_or("t".to_owned(), |key| format!("k{}", index(key)));
                counts.insert(format!("{period} {who}:{what}"), number(count));
            }
        }
        counts.retain(|_, count| *count != 0);
        Self {
            account: account.iter().map(|text| number(text)).collect::<Vec<_>>().try_into().expect("nine amounts"),
            holds: holds.into_iter().map(|(request, amount)| (request, number(&amount))).collect(),
            open: open.into_iter().map(|(key, count)| (index(&key), number(&count))).collect(),
            counts,
            events: events.iter().map(|event| told(event)).collect(),
        }
    }
}

fn number(text: &str) -> i128 {
    text.parse().expect("a whole number")
}

fn told(event: &str) -> (String, String) {
    let event: serde_json::Value = serde_json::from_str(event).expect("JSON");
    let text = |name: &str| event[name].as_str().expect("a text").to_owned();
    let detail = match &*text("kind") {
        "balance.low" => text("threshold"),
        "limit.reached" => format!("{} {}", text("scope"), text("limit")),
        _ => String::new(),
    };
    (text("kind"), detail)
}
