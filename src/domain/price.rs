//! What a token costs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ModelId, MoneyError, NanoUsd, Usage};

/// Price of one token, in nano-dollars. $0.20 per million tokens is 200.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Price {
    pub input: NanoUsd,
    pub output: NanoUsd,
    /// Of a prompt token that was found in the prefix cache; at most `input`, so that a hold at `input` covers it.
    pub cached_input: NanoUsd,
}

impl Price {
    /// One at which cached prompt tokens cost as much as others.
    pub const fn flat(input: NanoUsd, output: NanoUsd) -> Self {
        Self { input, output, cached_input: input }
    }

    /// The exact price of `usage`; an error instead of a wrong amount where it does not fit.
    pub fn cost(&self, usage: &Usage) -> Result<NanoUsd, MoneyError> {
        let fresh = usage.prompt_tokens.checked_sub(usage.cached_tokens).ok_or(MoneyError::Overflow)?;
        let fresh = self.input.checked_mul(fresh.into())?;
        let cached = self.cached_input.checked_mul(usage.cached_tokens.into())?;
        let output = self.output.checked_mul(usage.completion_tokens.into())?;
        fresh.checked_add(cached)?.checked_add(output)
    }
}

/// Prices that came into force together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PriceList {
    /// Named in every ledger entry.
    pub version: String,
    pub from_unix_ms: u64,
    pub prices: BTreeMap<ModelId, Price>,
}

/// Price lists by the time from which they hold. A list may leave models out; an earlier one then holds for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PriceBook {
    lists: Vec<PriceList>,
}

impl PriceBook {
    pub fn new(mut lists: Vec<PriceList>) -> Self {
        lists.sort_by(|a, b| (a.from_unix_ms, &a.version).cmp(&(b.from_unix_ms, &b.version)));
        Self { lists }
    }

    /// In order of time.
    pub fn lists(&self) -> &[PriceList] {
        &self.lists
    }

    /// The price of a model at a time, and the version that it is of.
    pub fn at(&self, model: &ModelId, unix_ms: u64) -> Option<(Price, &str)> {
        let begun = self.lists.iter().rev().filter(|list| list.from_unix_ms <= unix_ms);
        let found = begun.filter_map(|list| Some((*list.prices.get(model)?, list.version.as_str())));
        found.into_iter().next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_prices_cost_what_they_say() {
        let northstar = Price::flat(NanoUsd::new(300), NanoUsd::new(500));
        let usage = Usage { prompt_tokens: 1_000_000, completion_tokens: 1_000_000, cached_tokens: 400_000 };
        assert_eq!(northstar.cost(&usage).unwrap().to_string(), "0.800000000");
        let discounted = Price { cached_input: NanoUsd::new(30), ..northstar };
        assert_eq!(discounted.cost(&usage).unwrap().to_string(), "0.692000000");
        let impossible = Usage { cached_tokens: 1_000_001, ..usage };
        assert_eq!(discounted.cost(&impossible), Err(MoneyError::Overflow));
    }

    #[test]
    fn a_price_holds_from_its_date_until_the_next() {
        let (a, b) = (ModelId::from("a"), ModelId::from("b"));
        let price = |nano| Price::flat(NanoUsd::new(nano), NanoUsd::new(nano));
        let list = |version: &str, from_unix_ms, prices: &[(&ModelId, i64)]| PriceList {
            version: version.to_owned(),
            from_unix_ms,
            prices: prices.iter().map(|(model, nano)| ((*model).clone(), price(*nano))).collect(),
        };
        let book = PriceBook::new(vec![list("3", 200, &[(&a, 5)]), list("1", 0, &[(&a, 1), (&b, 2)])]);
        assert_eq!(book.at(&a, 199), Some((price(1), "1")));
        assert_eq!(book.at(&a, 200), Some((price(5), "3")));
        assert_eq!(book.at(&b, 200), Some((price(2), "1")));
        assert_eq!(book.at(&"c".into(), 200), None);
    }
}
