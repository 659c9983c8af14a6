//! What a token costs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ModelId, MoneyError, NanoUsd, Usage};

/// Price of one token, in nano-dollars. $0.20 per million tokens is 200.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Price {
    pub input: NanoUsd,
    pub output: NanoUsd,
}

impl Price {
    /// The exact price of `usage`; an error instead of a wrong amount where it does not fit.
    pub fn cost(&self, usage: &Usage) -> Result<NanoUsd, MoneyError> {
        let input = self.input.checked_mul(u64::from(usage.prompt_tokens))?;
        let output = self.output.checked_mul(u64::from(usage.completion_tokens))?;
        input.checked_add(output)
    }
}

/// The prices in force, under one version that every ledger entry names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PriceBook {
    pub version: String,
    pub prices: BTreeMap<ModelId, Price>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_prices_cost_what_they_say() {
        let northstar = Price { input: NanoUsd::new(300), output: NanoUsd::new(500) };
        let usage = Usage { prompt_tokens: 1_000_000, completion_tokens: 1_000_000, cached_tokens: 0 };
        assert_eq!(northstar.cost(&usage).unwrap().to_string(), "0.800000000");
    }
}
