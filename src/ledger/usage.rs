//! What was used, as the counters have it that every settlement moves: by hour, and for a while by minute.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use futures::{StreamExt, TryStreamExt, stream};
use schemars::JsonSchema;
use serde::Serialize;

use super::{Ledger, entry};
use crate::{
    domain::{KeyId, ModelId, MoneyError, NanoUsd, TenantId},
    store::{StoreError, keys},
};

const HOUR: u64 = 3600;
const DAY: u64 = 86_400;
/// For how long the store keeps counters; as `functions/ledger.lua` says.
const HOURS_KEPT: u64 = 400 * DAY;
const MINUTES_KEPT: u64 = 2 * DAY;
/// Counters of one tenant that one question may be about: as many hours as are kept.
const COUNTERS_MAX: u64 = HOURS_KEPT / HOUR;
/// Counters of all tenants that one answer is made of; what is beyond is left to the next question.
const READS_MAX: u64 = 200_000;
/// Counters read in one round trip.
const READS_PER_CALL: usize = 512;
const TENANTS_AT_ONCE: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    #[error("the range ends at {to}, which is not after its beginning at {from}")]
    Backwards { from: u64, to: u64 },
    #[error("the range has {buckets} buckets of {width}; at most {most} can be asked for at a time")]
    TooLong { buckets: u64, width: UsageWidth, most: u64 },
    /// Nothing is better than a sum that lacks something.
    #[error("what was used before {kept_from} is not kept in buckets of {width}")]
    Forgotten { kept_from: u64, width: UsageWidth },
    #[error(transparent)]
    Money(#[from] MoneyError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How long a bucket is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UsageWidth {
    Minute,
    Hour,
    /// Of UTC.
    #[default]
    Day,
}

impl UsageWidth {
    pub const ALL: [Self; 3] = [Self::Minute, Self::Hour, Self::Day];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Minute => "1m",
            Self::Hour => "1h",
            Self::Day => "1d",
        }
    }

    pub fn seconds(self) -> u64 {
        match self {
            Self::Minute => 60,
            Self::Hour => HOUR,
            Self::Day => DAY,
        }
    }

    /// Of the counters that it is made of.
    fn counter_seconds(self) -> u64 {
        self.seconds().min(HOUR)
    }

    fn kept(self) -> u64 {
        if self == Self::Minute { MINUTES_KEPT } else { HOURS_KEPT }
    }
}

impl fmt::Display for UsageWidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for UsageWidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|width| width.as_str() == text);
        known.ok_or_else(|| format!("`{text}` is no width of a bucket; there are 1m, 1h and 1d"))
    }
}

/// Whole buckets, one behind the other. Times are unix seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageRange {
    from: u64,
    to: u64,
    width: UsageWidth,
}

impl UsageRange {
    /// The buckets in which something between `from` and `to` (excluded) may lie.
    pub fn new(from: u64, to: u64, width: UsageWidth) -> Result<Self, UsageError> {
        if to <= from {
            return Err(UsageError::Backwards { from, to });
        }
        let seconds = width.seconds();
        let (first, end) = (from / seconds, to.div_ceil(seconds));
        let (buckets, most) = (end - first, COUNTERS_MAX * width.counter_seconds() / seconds);
        if buckets > most {
            return Err(UsageError::TooLong { buckets, width, most });
        }
        Ok(Self { from: first * seconds, to: end.saturating_mul(seconds), width })
    }

    pub fn from(&self) -> u64 {
        self.from
    }

    pub fn to(&self) -> u64 {
        self.to
    }

    fn buckets(&self) -> u64 {
        (self.to - self.from) / self.width.seconds()
    }

    fn first(self, buckets: u64) -> Self {
        Self { to: self.from + buckets.min(self.buckets()) * self.width.seconds(), ..self }
    }
}

/// Whose usage, and what is told apart. `None` is all there are.
#[derive(Clone, Debug, Default)]
pub struct UsageWish {
    pub tenants: Option<BTreeSet<TenantId>>,
    pub keys: Option<BTreeSet<KeyId>>,
    pub models: Option<BTreeSet<ModelId>>,
    pub by_tenant: bool,
    pub by_key: bool,
    pub by_model: bool,
}

/// Requests that were charged, and what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema, Serialize)]
pub struct UsageSums {
    pub requests: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// Counted in `prompt_tokens` too.
    pub cached_tokens: u64,
    #[serde(rename = "amount_nano_usd")]
    #[schemars(with = "i64")]
    pub amount: NanoUsd,
}

impl UsageSums {
    pub fn checked_add(&self, other: &Self) -> Result<Self, MoneyError> {
        let add = |a: u64, b: u64| a.checked_add(b).ok_or(MoneyError::Overflow);
        Ok(Self {
            requests: add(self.requests, other.requests)?,
            prompt_tokens: add(self.prompt_tokens, other.prompt_tokens)?,
            completion_tokens: add(self.completion_tokens, other.completion_tokens)?,
            cached_tokens: add(self.cached_tokens, other.cached_tokens)?,
            amount: self.amount.checked_add(other.amount)?,
        })
    }
}

/// Of one group; what was not told apart is `None`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UsageRow {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<TenantId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelId>,
    #[serde(flatten)]
    pub sums: UsageSums,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UsageBucket {
    /// Unix seconds.
    pub from: u64,
    /// Excluded.
    pub to: u64,
    /// None where nothing was used.
    pub rows: Vec<UsageRow>,
}

type Group = (Option<TenantId>, Option<KeyId>, Option<ModelId>);
/// Of one tenant: by counter, counted in its seconds since 1970.
type Counted = BTreeMap<u64, BTreeMap<(ModelId, KeyId), UsageSums>>;

impl Ledger {
    /// The buckets of a range, from its first on; fewer than all of them where so many tenants are asked about that one
    /// answer would be too long to wait for, but never none.
    pub async fn usage(&self, range: UsageRange, wish: &UsageWish) -> Result<Vec<UsageBucket>, UsageError> {
        let width = range.width;
        let now = self.store.now_unix_ms().await? / 1000;
        let tenants = self.tenants_and_birth(wish.tenants.as_ref()).await?;
        let kept_from = now.saturating_sub(width.kept());
        let is_lost = |born: &u64| range.from.max(*born) <= kept_from && *born < range.to;
        if tenants.iter().any(|(_, born)| is_lost(born)) {
            return Err(UsageError::Forgotten { kept_from, width });
        }
        let counters_a_bucket = width.seconds() / width.counter_seconds();
        let at_once = READS_MAX / (counters_a_bucket * tenants.len().max(1) as u64);
        let range = range.first(at_once.max(1));
        let mut groups: Vec<BTreeMap<Group, UsageSums>> = vec![BTreeMap::new(); range.buckets() as usize];
        let reads = tenants.into_iter().map(|(tenant, born)| async move {
            // Nobody has used anything before there was an account, or will have after now.
            let begin = range.from.max(born);
            let counted = self.counters(&tenant, width.counter_seconds(), begin, range.to.min(now + 1)).await?;
            Ok::<_, UsageError>((tenant, counted))
        });
        let mut reads = stream::iter(reads.collect::<Vec<_>>()).buffered(TENANTS_AT_ONCE);
        while let Some((tenant, counted)) = reads.try_next().await? {
            for (at, sums) in counted {
                let bucket = &mut groups[((at - range.from) / width.seconds()) as usize];
                for ((model, key), sums) in sums {
                    let is_wanted = wish.keys.as_ref().is_none_or(|keys| keys.contains(&key))
                        && wish.models.as_ref().is_none_or(|models| models.contains(&model));
                    if is_wanted {
                        let tenant = wish.by_tenant.then(|| tenant.clone());
                        let group = (tenant, wish.by_key.then_some(key), wish.by_model.then_some(model));
                        let all = bucket.entry(group).or_default();
                        *all = all.checked_add(&sums)?;
                    }
                }
            }
        }
        let bucket = |(index, groups): (usize, BTreeMap<Group, UsageSums>)| {
            let from = range.from + index as u64 * width.seconds();
            let row = |((tenant, key, model), sums)| UsageRow { tenant, key, model, sums };
            UsageBucket { from, to: from + width.seconds(), rows: groups.into_iter().map(row).collect() }
        };
        Ok(groups.into_iter().enumerate().map(bucket).collect())
    }

    /// Of those that are wanted the ones that there are, and since when (unix seconds).
    async fn tenants_and_birth(&self, wanted: Option<&BTreeSet<TenantId>>) -> Result<Vec<(TenantId, u64)>, StoreError> {
        let Some(wanted) = wanted else {
            let mut all = redis::cmd("ZRANGE");
            all.arg(keys::TENANTS).arg(0).arg(-1).arg("WITHSCORES");
            let all: Vec<(String, f64)> = self.store.query(&all).await?;
            return Ok(all.into_iter().map(|(tenant, ms)| (tenant.into(), ms as u64 / 1000)).collect());
        };
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let mut scores = redis::cmd("ZMSCORE");
        scores.arg(keys::TENANTS);
        for tenant in wanted {
            scores.arg(tenant.as_str());
        }
        let scores: Vec<Option<f64>> = self.store.query(&scores).await?;
        let found = wanted.iter().zip(scores).filter_map(|(tenant, ms)| Some((tenant.clone(), ms? as u64 / 1000)));
        Ok(found.collect())
    }

    /// What a tenant's counters say that touch the time from `begin` to `end`.
    async fn counters(&self, tenant: &TenantId, seconds: u64, begin: u64, end: u64) -> Result<Counted, UsageError> {
        let name = |number| match seconds {
            HOUR => keys::usage_hour(tenant, number),
            _ => keys::usage_minute(tenant, number),
        };
        let mut counted = Counted::new();
        if end <= begin {
            return Ok(counted);
        }
        let numbers: Vec<u64> = (begin / seconds..end.div_ceil(seconds)).collect();
        for numbers in numbers.chunks(READS_PER_CALL) {
            let mut question = redis::pipe();
            for number in numbers {
                question.cmd("HGETALL").arg(name(*number));
            }
            let answers = self.store.query_all(&question).await?;
            for (number, answer) in numbers.iter().zip(answers) {
                let sums = read(answer).map_err(|fault| {
                    StoreError::Damaged(format!("usage of {tenant} at {}: {fault}", number * seconds))
                })?;
                if !sums.is_empty() {
                    counted.insert(number * seconds, sums);
                }
            }
        }
        Ok(counted)
    }
}

/// One counter: `<model>\x1f<key>\x1f<what>` to a number.
fn read(answer: redis::Value) -> Result<BTreeMap<(ModelId, KeyId), UsageSums>, String> {
    let fields: Vec<(String, String)> =
        redis::FromRedisValue::from_redis_value(answer).map_err(|error: redis::ParsingError| error.to_string())?;
    let mut sums = BTreeMap::<(ModelId, KeyId), UsageSums>::new();
    for (name, value) in fields {
        let mut parts = name.split('\x1f');
        let (Some(model), Some(key), Some(what), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(format!("`{name}` names nothing that is counted"));
        };
        let sums = sums.entry((model.into(), key.into())).or_default();
        let count = match what {
            "requests" => &mut sums.requests,
            "prompt" => &mut sums.prompt_tokens,
            "completion" => &mut sums.completion_tokens,
            "cached" => &mut sums.cached_tokens,
            "amount" => {
                sums.amount = NanoUsd::new(entry::whole(&value, what)?);
                continue;
            }
            other => return Err(format!("`{other}` is nothing that is counted")),
        };
        *count = entry::whole(&value, what)?;
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_made_of_whole_buckets() {
        let range = |from, to, width| UsageRange::new(from, to, width).unwrap();
        let hours = range(3599, 7201, UsageWidth::Hour);
        assert_eq!((hours.from(), hours.to(), hours.buckets()), (0, 3 * HOUR, 3));
        let day = range(DAY, DAY + 1, UsageWidth::Day);
        assert_eq!((day.from(), day.to()), (DAY, 2 * DAY));
        assert_eq!(hours.first(2).to(), 2 * HOUR);
        assert_eq!(hours.first(9), hours);
    }

    #[test]
    fn ranges_that_run_backwards_or_too_far_are_named() {
        for (from, to) in [(5, 5), (6, 5)] {
            let error = UsageRange::new(from, to, UsageWidth::Minute).unwrap_err();
            assert!(matches!(error, UsageError::Backwards { .. }));
        }
        for (width, most) in [(UsageWidth::Minute, 9600), (UsageWidth::Hour, 9600), (UsageWidth::Day, 400)] {
            let seconds = width.seconds();
            assert!(UsageRange::new(seconds, seconds * (most + 1), width).is_ok());
            let error = UsageRange::new(seconds, seconds * (most + 1) + 1, width).unwrap_err();
            assert!(matches!(error, UsageError::TooLong { buckets, most: m, .. } if buckets == most + 1 && m == most));
        }
        assert!(matches!(UsageRange::new(0, u64::MAX, UsageWidth::Day), Err(UsageError::TooLong { .. })));
    }

    #[test]
    fn a_counter_that_cannot_be_read_is_damage() {
        let counter = |fields: &[(&str, &str)]| {
            let texts = fields.iter().flat_map(|(name, value)| [*name, *value]);
            read(redis::Value::Array(texts.map(|text| redis::Value::BulkString(text.into())).collect()))
        };
        let whole =
            counter(&[("m\x1fk\x1frequests", "2"), ("m\x1fk\x1famount", "7"), ("m\x1fl\x1fprompt", "3")]).unwrap();
        assert_eq!(whole.len(), 2);
        assert_eq!(whole[&("m".into(), "k".into())].amount, NanoUsd::new(7));
        for bad in [("m\x1fk\x1frequests", "x"), ("m\x1fk\x1fwork", "1"), ("requests", "1"), ("m\x1fk\x1fprompt", "-1")]
        {
            assert!(counter(&[bad]).is_err(), "{bad:?}");
        }
    }
}
