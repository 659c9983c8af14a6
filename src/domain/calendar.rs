//! Days and months of UTC.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use time::OffsetDateTime;

const DAY_MS: u64 = 86_400_000;
/// The end of the year 9999; whatever lies behind it counts as that.
const LAST_UNIX_SECONDS: u64 = 253_402_300_799;

/// A month of UTC, `2026-11`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Month {
    year: i32,
    month: u8,
}

/// A day of UTC, `2026-11-23`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day(u64);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no month such as 2026-11")]
pub struct NoMonth(String);

impl Month {
    pub fn of(unix_ms: u64) -> Self {
        let date = at(unix_ms).date();
        Self { year: date.year(), month: date.month().into() }
    }

    pub fn begins_unix_ms(self) -> u64 {
        let date = time::Date::from_calendar_date(self.year, self.name(), 1).expect("a month has a first day");
        u64::try_from(date.midnight().assume_utc().unix_timestamp()).expect("no month is before 1970") * 1000
    }

    /// The first instant that is not in it any more.
    pub fn ends_unix_ms(self) -> u64 {
        self.begins_unix_ms() + u64::from(self.name().length(self.year)) * DAY_MS
    }

    /// So many months before it.
    pub fn before(self, months: u32) -> Self {
        let first = Self { year: 1970, month: 1 };
        (0..months).fold(self, |month, _| if month <= first { first } else { Self::of(month.begins_unix_ms() - 1) })
    }

    fn name(self) -> time::Month {
        time::Month::try_from(self.month).expect("1 to 12")
    }
}

impl Day {
    pub fn of(unix_ms: u64) -> Self {
        Self(unix_ms / DAY_MS)
    }

    pub fn begins_unix_ms(self) -> u64 {
        self.0 * DAY_MS
    }

    /// As the store's counters are named: 20261231.
    pub fn from_digits(text: &str) -> Option<Self> {
        if text.len() != 8 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let (year, month, day) = (text[..4].parse().ok()?, text[4..6].parse::<u8>().ok()?, text[6..].parse().ok()?);
        let date = time::Date::from_calendar_date(year, time::Month::try_from(month).ok()?, day).ok()?;
        let seconds = u64::try_from(date.midnight().assume_utc().unix_timestamp()).ok()?;
        Some(Self(seconds * 1000 / DAY_MS))
    }

    /// The same backwards.
    pub fn digits(self) -> String {
        let date = at(self.begins_unix_ms()).date();
        format!("{:04}{:02}{:02}", date.year(), u8::from(date.month()), date.day())
    }
}

impl FromStr for Month {
    type Err = NoMonth;

    fn from_str(text: &str) -> Result<Self, NoMonth> {
        let number = |part: &str, digits: usize| {
            let is_number = part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit());
            is_number.then(|| part.parse().ok()).flatten()
        };
        let parts = text.split_once('-').and_then(|(year, month)| Some((number(year, 4)?, number(month, 2)?)));
        match parts {
            Some((year @ 1970..=9999, month @ 1..=12)) => Ok(Self { year, month: month as u8 }),
            _ => Err(NoMonth(text.chars().take(32).collect())),
        }
    }
}

impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}", self.year, self.month)
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let date = at(self.begins_unix_ms()).date();
        write!(f, "{:04}-{:02}-{:02}", date.year(), u8::from(date.month()), date.day())
    }
}

impl Serialize for Month {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Month {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for Day {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An instant as RFC 3339 has it: `2026-11-23T08:15:00.250Z`.
pub fn utc_text(unix_ms: u64) -> String {
    let time = at(unix_ms).time();
    let (hour, minute, second) = time.as_hms();
    format!("{}T{hour:02}:{minute:02}:{second:02}.{:03}Z", Day::of(unix_ms), unix_ms % 1000)
}

fn at(unix_ms: u64) -> OffsetDateTime {
    let seconds = (unix_ms / 1000).min(LAST_UNIX_SECONDS);
    OffsetDateTime::from_unix_timestamp(seconds as i64).expect("a time of these years")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_begin_where_the_one_before_ends() {
        let mut month = Month::of(0);
        assert_eq!((month.to_string().as_str(), month.begins_unix_ms()), ("1970-01", 0));
        for _ in 0..12 * 200 {
            let end = month.ends_unix_ms();
            assert_eq!(Month::of(end - 1), month);
            let next = Month::of(end);
            assert_eq!(next.begins_unix_ms(), end, "{next}");
            assert!(next > month);
            month = next;
        }
        assert_eq!(month.to_string(), "2170-01");
    }

    #[test]
    fn a_month_is_read_as_it_is_written_and_nothing_else_is_one() {
        for text in ["1970-01", "2024-02", "2026-11", "9999-12"] {
            assert_eq!(text.parse::<Month>().unwrap().to_string(), text);
        }
        let february: Month = "2024-02".parse().unwrap();
        assert_eq!(february.ends_unix_ms() - february.begins_unix_ms(), 29 * DAY_MS);
        for bad in
            ["", "2026", "2026-13", "2026-00", "2026-1", "1969-12", "20261-1", "+026-11", "2026-11-01", "２０２６-11"]
        {
            assert!(bad.parse::<Month>().is_err(), "{bad}");
        }
    }

    #[test]
    fn instants_are_written_as_rfc_3339_has_them() {
        assert_eq!(utc_text(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc_text(1_709_251_199_999), "2024-02-29T23:59:59.999Z");
        assert_eq!(Day::of(1_709_251_200_000).to_string(), "2024-03-01");
        assert!(utc_text(u64::MAX).starts_with("9999-12-31T23:59:59"));
    }
}
