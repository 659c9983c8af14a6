//! Money is a whole number of nano-dollars. No float ever touches it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

const NANO_PER_USD: i64 = 1_000_000_000;

/// Nano-dollars (1e-9 USD), signed, 64 bits: up to 9.2 billion dollars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NanoUsd(i64);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MoneyError {
    #[error("amount of money does not fit 64 bits of nano-dollars")]
    Overflow,
    #[error("`{0}` is not an amount in dollars such as 25 or 0.50 (at most nine decimals)")]
    Malformed(String),
}

impl NanoUsd {
    pub const ZERO: Self = Self(0);

    pub const fn new(nano: i64) -> Self {
        Self(nano)
    }

    pub const fn nano(self) -> i64 {
        self.0
    }

    pub fn checked_add(self, other: Self) -> Result<Self, MoneyError> {
        self.0.checked_add(other.0).map(Self).ok_or(MoneyError::Overflow)
    }

    pub fn checked_sub(self, other: Self) -> Result<Self, MoneyError> {
        self.0.checked_sub(other.0).map(Self).ok_or(MoneyError::Overflow)
    }

    pub fn checked_mul(self, count: u64) -> Result<Self, MoneyError> {
        let count = i64::try_from(count).map_err(|_| MoneyError::Overflow)?;
        self.0.checked_mul(count).map(Self).ok_or(MoneyError::Overflow)
    }
}

/// Exact, always nine decimals: `12.500000000`.
impl fmt::Display for NanoUsd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let nano = self.0.unsigned_abs();
        let per_usd = NANO_PER_USD.unsigned_abs();
        write!(f, "{sign}{}.{:09}", nano / per_usd, nano % per_usd)
    }
}

/// Dollars with up to nine decimals: `25`, `0.50`, `-1.000000001`.
impl FromStr for NanoUsd {
    type Err = MoneyError;

    fn from_str(text: &str) -> Result<Self, MoneyError> {
        let malformed = || MoneyError::Malformed(text.to_owned());
        let (negative, digits) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if !is_number(whole) || !is_number(fraction) || fraction.len() > 9 {
            return Err(malformed());
        }
        let whole: i64 = whole.parse().map_err(|_| MoneyError::Overflow)?;
        let fraction: i64 = format!("{fraction:0<9}").parse().map_err(|_| malformed())?;
        let nano =
            whole.checked_mul(NANO_PER_USD).and_then(|nano| nano.checked_add(fraction)).ok_or(MoneyError::Overflow)?;
        Ok(Self(if negative { -nano } else { nano }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dollars_are_read_and_written_exactly() {
        for (text, nano) in [("25", 25_000_000_000), ("0.50", 500_000_000), ("-1.000000001", -1_000_000_001)] {
            assert_eq!(text.parse::<NanoUsd>().unwrap().nano(), nano);
        }
        assert_eq!(NanoUsd::new(-1_000_000_001).to_string(), "-1.000000001");
        for bad in ["", ".", "1.", "1.0000000001", "1e3", "+1", "$1", "--1", "99999999999"] {
            assert!(bad.parse::<NanoUsd>().is_err(), "{bad}");
        }
    }

    #[test]
    fn arithmetic_that_does_not_fit_is_an_error() {
        let most = NanoUsd::new(i64::MAX);
        assert_eq!(most.checked_add(NanoUsd::new(1)), Err(MoneyError::Overflow));
        assert_eq!(most.checked_mul(2), Err(MoneyError::Overflow));
        assert_eq!(NanoUsd::new(i64::MIN).checked_sub(NanoUsd::new(1)), Err(MoneyError::Overflow));
    }
}
