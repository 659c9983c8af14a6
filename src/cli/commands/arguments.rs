//! Arguments that are more than text. Each fault names the argument that it is about.

use std::{collections::BTreeMap, time::Duration};

use jiff::{Span, SpanRelativeTo, Timestamp, civil::Date, tz::TimeZone};

use super::{Desk, operator};
use crate::{
    admission::{LIMIT_MAX, LimitKind, Limits},
    cli::CliError,
    domain::{MoneyError, Month, NanoUsd},
    operator::LimitChanges,
};

/// Of 2026-12-31.
const DAY_LEN: usize = 10;

fn wrong(name: &str, why: impl std::fmt::Display) -> CliError {
    CliError::Usage(format!("{name}: {why}"))
}

/// Dollars, exactly.
pub fn usd(name: &str, text: &str) -> Result<NanoUsd, CliError> {
    text.parse().map_err(|error: MoneyError| wrong(name, error))
}

/// `none` is nothing.
pub fn usd_or_none(name: &str, text: &str) -> Result<Option<NanoUsd>, CliError> {
    if text == "none" { Ok(None) } else { usd(name, text).map(Some) }
}

/// Such as 24h, 30d or 1h 30m.
pub fn duration(name: &str, text: &str) -> Result<Duration, CliError> {
    let span = text.parse::<Span>().and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()));
    let duration = span.ok().and_then(|duration| Duration::try_from(duration).ok());
    duration.ok_or_else(|| wrong(name, format!("`{text}` is no time such as 90s, 24h or 30d")))
}

/// Unix milliseconds: of Unix seconds, of the beginning of a month or a day of UTC, or of a time of RFC 3339.
fn timestamp(text: &str) -> Option<u64> {
    if let Ok(seconds) = text.parse::<u64>() {
        return seconds.checked_mul(1000);
    }
    if let Ok(month) = text.parse::<Month>() {
        return Some(month.begins_unix_ms());
    }
    let time = match text.len() {
        DAY_LEN => text.parse::<Date>().and_then(|day| TimeZone::UTC.to_timestamp(day.at(0, 0, 0, 0))),
        _ => text.parse::<Timestamp>(),
    };
    u64::try_from(time.ok()?.as_millisecond()).ok()
}

const TIMES: &str = "a time such as 2026-12-31T23:59:59Z, a day such as 2026-12-31, a month or Unix seconds";

pub fn time(name: &str, text: &str) -> Result<u64, CliError> {
    timestamp(text).ok_or_else(|| wrong(name, format!("`{text}` is not {TIMES}")))
}

/// The same, or how long it is until then by the store's clock; `never` is nothing.
pub async fn end(desk: &Desk<'_>, name: &str, text: &str) -> Result<Option<u64>, CliError> {
    if text == "never" {
        return Ok(None);
    }
    if let Some(time) = timestamp(text) {
        return Ok(Some(time));
    }
    let later = duration(name, text)
        .map_err(|_| wrong(name, format!("`{text}` is neither {TIMES}, nor a time from now such as 30d")))?;
    desk.accounts.time_in(later).await.map(Some).map_err(operator)
}

/// `NAME=VALUE`, counts as they are and spend in dollars; `none` takes one's own away.
pub fn limit_changes(name: &str, texts: &[String]) -> Result<LimitChanges, CliError> {
    let changes: LimitChanges = texts.iter().map(|text| limit(name, text)).collect::<Result<_, _>>()?;
    let twice =
        changes.iter().enumerate().find(|(at, (kind, _))| changes[..*at].iter().any(|(other, _)| other == kind));
    match twice {
        Some((_, (kind, _))) => Err(wrong(name, format!("{kind} is named twice"))),
        None => Ok(changes),
    }
}

fn limit(name: &str, text: &str) -> Result<(LimitKind, Option<u64>), CliError> {
    let (kind, value) =
        text.split_once('=').ok_or_else(|| wrong(name, format!("`{text}` is not of the form NAME=VALUE")))?;
    let kind: LimitKind = kind.parse().map_err(|error| wrong(name, error))?;
    if value == "none" {
        return Ok((kind, None));
    }
    let limit = if kind.is_spend() {
        let amount = usd(&format!("{name} {kind}"), value)?;
        u64::try_from(amount.nano()).ok()
    } else {
        value.parse().ok()
    };
    let limit = limit.filter(|limit| *limit <= LIMIT_MAX);
    let most = if kind.is_spend() { "dollars from 0 to 9000000" } else { "a whole number from 0 to 9000000000000000" };
    let limit = limit.ok_or_else(|| wrong(name, format!("{kind} is `{value}`, not {most}, or none")))?;
    Ok((kind, Some(limit)))
}

/// Limits that somebody is to have from the beginning.
pub fn limits(name: &str, texts: &[String]) -> Result<Limits, CliError> {
    let changes = limit_changes(name, texts)?;
    Ok(changes.into_iter().filter_map(|(kind, limit)| Some((kind, limit?))).collect())
}

/// `name=value,…`; nothing for none.
pub fn labels(name: &str, text: &str) -> Result<BTreeMap<String, String>, CliError> {
    let label = |part: &str| match part.split_once('=') {
        Some((label, value)) => Ok((label.trim().to_owned(), value.trim().to_owned())),
        None => Err(wrong(name, format!("`{part}` is not of the form name=value"))),
    };
    let mut labels = BTreeMap::new();
    for part in text.split(',').filter(|part| !part.trim().is_empty()) {
        let (label, value) = label(part)?;
        if labels.contains_key(&label) {
            return Err(wrong(name, format!("{label} is named twice")));
        }
        labels.insert(label, value);
    }
    Ok(labels)
}

/// What makes a change of money happen once, where nobody gave it a name.
pub fn reference(given: Option<String>, what: &str) -> String {
    given.unwrap_or_else(|| format!("{what}-{}", uuid::Uuid::now_v7().simple()))
}

#[cfg(test)]
mod tests {
    use super::time;

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, unix_ms) in [
            ("1700000000", 1_700_000_000_000),
            ("2024-02", 1_706_745_600_000),
            ("2024-02-29", 1_709_164_800_000),
            ("2024-02-29T12:00:00.5Z", 1_709_208_000_500),
            ("2024-02-29T12:00:00+01:00", 1_709_204_400_000),
        ] {
            assert_eq!(time("--from", text).unwrap(), unix_ms, "{text}");
        }
        let bad = ["", "yesterday", "2023-02-29", "2024-02-00", "2024-2-1", "-1", "2024-02-1", "2024-02-29T12:00:00"];
        for bad in bad.into_iter().chain(["99999999999999999999", "18446744073709551615", "1969-12-31"]) {
            assert!(time("--from", bad).is_err(), "{bad}");
        }
    }
}
