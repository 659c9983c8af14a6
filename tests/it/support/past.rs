//! Puts what has just happened into the past, as if it had happened then.

use std::collections::HashMap;

use lightcone::{
    domain::{Month, TenantId},
    ledger::NO_LINK,
    store::keys,
};

use super::house::House;

/// The month that is `back` months before this one.
pub async fn month_before(house: &House, back: usize) -> Month {
    let now = house.ledger.now_unix_ms().await.expect("a time");
    (0..back).fold(Month::of(now), |month, _| Month::of(month.begins_unix_ms() - 1))
}

/// Dates a tenant's entries, of which there are as many as `times`, and links them anew.
pub async fn date_entries(house: &House, tenant: &TenantId, times: &[u64]) {
    let mut raw = house.valkey.raw().await;
    let (account, stream) = (keys::account(tenant), keys::entries(tenant));
    let entries = house.ledger.entries(tenant, 0, times.len() + 1).await.expect("entries");
    assert_eq!(entries.len(), times.len(), "a time for each entry");
    let stored: Vec<(String, HashMap<String, String>)> =
        redis::cmd("XRANGE").arg(&stream).arg("-").arg("+").query_async(&mut raw).await.expect("XRANGE");
    redis::cmd("DEL").arg(&stream).exec_async(&mut raw).await.expect("DEL");
    let mut link = NO_LINK.to_owned();
    for ((mut entry, (id, mut fields)), time) in entries.into_iter().zip(stored).zip(times) {
        entry.unix_ms = *time;
        link = entry.link_after(&link);
        fields.insert("at".to_owned(), time.to_string());
        fields.insert("link".to_owned(), link.clone());
        let mut add = redis::cmd("XADD");
        add.arg(&stream).arg(id);
        fields.iter().for_each(|(name, value)| drop(add.arg(name).arg(value)));
        add.exec_async(&mut raw).await.expect("XADD");
    }
    let mut set = redis::cmd("HSET");
    set.arg(&account).arg("link").arg(&link).arg("at").arg(times.last().expect("an entry"));
    set.arg("created").arg(times[0]).exec_async(&mut raw).await.expect("HSET");
}

/// Makes a tenant as old as `seconds` say (unix time).
pub async fn born(house: &House, tenant: &TenantId, seconds: u64) {
    let mut raw = house.valkey.raw().await;
    let mut add = redis::cmd("ZADD");
    add.arg(keys::TENANTS).arg(seconds * 1000).arg(tenant.as_str()).exec_async(&mut raw).await.expect("ZADD");
}

/// Makes what was used until now used at `seconds`: the counters of its hour and its minute take it over.
pub async fn used_at(house: &House, tenant: &TenantId, seconds: u64) {
    let mut raw = house.valkey.raw().await;
    for (kind, width) in [("hour", 3600), ("minute", 60)] {
        let counter = |number: &str| format!("lc:{{t:{tenant}}}:usage:{kind}:{number}");
        let now = house.ledger.now_unix_ms().await.expect("a time") / 1000 / width;
        let target = counter(&(seconds / width).to_string());
        // It may have been used in the bucket before this one.
        for source in [counter(&now.to_string()), counter(&(now - 1).to_string())] {
            let fields: Vec<(String, i64)> =
                redis::cmd("HGETALL").arg(&source).query_async(&mut raw).await.expect("HGETALL");
            redis::cmd("DEL").arg(&source).exec_async(&mut raw).await.expect("DEL");
            for (field, value) in fields {
                let mut add = redis::cmd("HINCRBY");
                add.arg(&target).arg(field).arg(value).exec_async(&mut raw).await.expect("HINCRBY");
            }
        }
    }
}
