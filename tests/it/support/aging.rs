//! A tenant's past rewritten: as somebody with full access to the store could, or as if it lay further back.

use std::collections::BTreeMap;

use lightcone::{domain::TenantId, store::keys};
use redis::aio::MultiplexedConnection;

use super::{
    calendar::{day_name, day_named},
    house::House,
};

pub type Fields = Vec<(String, String)>;

const DAY_MS: u64 = 86_400_000;

/// Changes the entries of a tenant's ledger and nothing else.
pub async fn rewrite(house: &House, tenant: &TenantId, change: impl FnOnce(&mut Vec<(String, Fields)>)) {
    let mut raw = house.valkey.raw().await;
    let key = keys::entries(tenant);
    let mut entries: Vec<(String, Fields)> =
        redis::cmd("XRANGE").arg(&key).arg("-").arg("+").query_async(&mut raw).await.expect("XRANGE");
    change(&mut entries);
    let mut all = redis::pipe();
    all.cmd("DEL").arg(&key).ignore();
    for (id, fields) in entries {
        let command = all.cmd("XADD").arg(&key).arg(id);
        for (name, value) in &fields {
            command.arg(name).arg(value);
        }
    }
    all.exec_async(&mut raw).await.expect("XADD");
}

pub fn set(fields: &mut Fields, name: &str, value: &str) {
    fields.iter_mut().find(|(field, _)| field == name).expect("the field is there").1 = value.to_owned();
}

/// Makes everything that a tenant did up to now look so many days older, to the last link and counter. Its ledger must
/// not be archived yet.
pub async fn age(house: &House, tenant: &TenantId, days: u64) {
    let mut past = Past { raw: house.valkey.raw().await, tenant, days };
    let entries = house.ledger.entries(tenant, 0, usize::MAX >> 1).await.expect("entries");
    let mut link = lightcone::ledger::NO_LINK.to_owned();
    let mut relinked = Vec::new();
    for mut entry in entries {
        entry.unix_ms -= days * DAY_MS;
        link = entry.link_after(&link);
        relinked.push((entry.unix_ms, link.clone()));
    }
    if let Some((at, link)) = relinked.last().cloned() {
        past.set_account(at, &link).await;
    }
    rewrite(house, tenant, |entries| {
        for ((_, fields), (at, link)) in entries.iter_mut().zip(relinked) {
            set(fields, "at", &at.to_string());
            set(fields, "link", &link);
        }
    })
    .await;
    past.move_terms().await;
    past.move_periods().await;
    past.move_usage().await;
}

struct Past<'a> {
    raw: MultiplexedConnection,
    tenant: &'a TenantId,
    days: u64,
}

impl Past<'_> {
    async fn set_account(&mut self, at: u64, link: &str) {
        let key = keys::account(self.tenant);
        let mut command = redis::cmd("HSET");
        command.arg(key).arg("at").arg(at).arg("link").arg(link).exec_async(&mut self.raw).await.expect("HSET");
    }

    /// The day that an open hold counts for is the seventh of its terms.
    async fn move_terms(&mut self) {
        let key = keys::hold_terms(self.tenant);
        for (request, terms) in self.hash(&key).await {
            let mut terms: Vec<String> = terms.split('\x1f').map(str::to_owned).collect();
            terms[6] = self.earlier(&terms[6]);
            let terms = terms.join("\x1f");
            redis::cmd("HSET").arg(&key).arg(request).arg(terms).exec_async(&mut self.raw).await.expect("HSET");
        }
    }

    /// Days move, and months are added up again; that somebody was told of a limit is forgotten.
    async fn move_periods(&mut self) {
        let (mut days, mut months) = (Vec::new(), BTreeMap::<String, BTreeMap<String, i64>>::new());
        for key in self.keys("period:*").await {
            let counts = self.hash(&key).await;
            redis::cmd("DEL").arg(&key).exec_async(&mut self.raw).await.expect("DEL");
            let name = key.rsplit(':').next().expect("a name").to_owned();
            if name.len() == 8 {
                days.push((self.earlier(&name), counts));
            }
        }
        for (day, mut counts) in days {
            counts.retain(|name, _| !name.starts_with("told:"));
            for (name, spend) in counts.iter().filter(|(name, _)| name.ends_with(":spend")) {
                let of_month = months.entry(day[..6].to_owned()).or_default();
                *of_month.entry(name.clone()).or_default() += spend.parse::<i64>().expect("an amount");
            }
            self.put(&format!("period:{day}"), counts).await;
        }
        for (month, counts) in months {
            self.put(&format!("period:{month}"), counts).await;
        }
    }

    async fn move_usage(&mut self) {
        for (unit, per_day) in [("hour", 24), ("minute", 24 * 60)] {
            // From the oldest on, so that none is moved to where another is yet to move away.
            let mut keys = self.keys(&format!("usage:{unit}:*")).await;
            keys.sort();
            for key in keys {
                let (name, number) = key.rsplit_once(':').expect("a number");
                let earlier = number.parse::<u64>().expect("a number") - self.days * per_day;
                let moved = format!("{name}:{earlier}");
                redis::cmd("RENAME").arg(&key).arg(moved).exec_async(&mut self.raw).await.expect("RENAME");
            }
        }
    }

    /// A day's name so many days before.
    fn earlier(&self, name: &str) -> String {
        day_name(day_named(name) - self.days as i64)
    }

    async fn keys(&mut self, pattern: &str) -> Vec<String> {
        let pattern = format!("lc:{{t:{}}}:{pattern}", self.tenant);
        redis::cmd("KEYS").arg(pattern).query_async(&mut self.raw).await.expect("KEYS")
    }

    async fn hash(&mut self, key: &str) -> BTreeMap<String, String> {
        redis::cmd("HGETALL").arg(key).query_async(&mut self.raw).await.expect("HGETALL")
    }

    async fn put<T: redis::ToRedisArgs>(&mut self, name: &str, counts: BTreeMap<String, T>) {
        if counts.is_empty() {
            return;
        }
        let mut command = redis::cmd("HSET");
        command.arg(format!("lc:{{t:{}}}:{name}", self.tenant));
        for (field, value) in counts {
            command.arg(field).arg(value);
        }
        command.exec_async(&mut self.raw).await.expect("HSET");
    }
}
