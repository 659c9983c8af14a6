use std::{collections::BTreeMap, time::Duration};

use clap::Subcommand;
use serde_json::{Value, json};

use super::{Desk, arguments, operator};
use crate::{
    cli::{CliError, Output, json as told, print},
    config,
    domain::{ModelId, NanoUsd, Price, PriceBook, PriceList},
    ledger,
    operator::PriceWish,
};

#[derive(Subcommand)]
pub enum Prices {
    /// All prices that ever held, hold, or are to come, in order of time
    List,
    /// Publish a price list; it is never changed again, and requests under way keep the price of their admission
    Set {
        /// Its name, which ledger entries and receipts carry
        #[arg(long, value_name = "NAME")]
        version: String,
        /// From when on it holds: a time such as 2026-12-31T23:59:59Z, or `now`
        #[arg(long, value_name = "WHEN", default_value = "now")]
        from: String,
        /// Dollars per million tokens of the prompt, of the answer, and of the prompt where it was found in the prefix
        /// cache (as any other, if nothing is said); may be repeated
        #[arg(long = "price", value_name = "MODEL=INPUT/OUTPUT[/CACHED]", required = true)]
        prices: Vec<String>,
        /// A model that may have a price of zero; may be repeated
        #[arg(long, value_name = "MODEL")]
        free: Vec<String>,
    },
}

pub async fn run(desk: &Desk<'_>, command: Prices) -> Result<(), CliError> {
    let configured = desk.config.price_list().map_err(crate::node::NodeError::from)?;
    let models: Vec<ModelId> = configured.prices.keys().cloned().collect();
    let book = ledger::Prices::new(desk.access.store.clone(), configured);
    match command {
        Prices::List => {
            let all = book.book().await.map_err(|error| operator(error.into()))?;
            print(desk.output, &rows(desk, &all, all.lists()).await?)
        }
        Prices::Set { version, from, prices, free } => {
            let from = match from.as_str() {
                "now" => None,
                time => Some(arguments::time("--from", time)?),
            };
            let mut wishes = BTreeMap::new();
            for text in &prices {
                let (model, price) = price_of(text)?;
                known(&models, &model)?;
                let is_free = free.iter().any(|free| free == model.as_str());
                if wishes.insert(model.clone(), PriceWish { price, is_free }).is_some() {
                    return Err(CliError::Usage(format!("--price: {model} has two prices")));
                }
            }
            if let Some(free) = free.iter().find(|free| !wishes.contains_key(free.as_str())) {
                return Err(CliError::Usage(format!("--free: {free} has no --price")));
            }
            let list = desk.accounts.publish_prices(&book, &version, from, &wishes).await.map_err(operator)?;
            match desk.output {
                Output::Json => print(desk.output, &told(&list)?),
                Output::Table => {
                    let all = book.book().await.map_err(|error| operator(error.into()))?;
                    print(desk.output, &rows(desk, &all, &[list]).await?)
                }
            }
        }
    }
}

/// A price of a model that nobody serves would go unnoticed.
fn known(models: &[ModelId], model: &ModelId) -> Result<(), CliError> {
    if models.contains(model) {
        return Ok(());
    }
    let all: Vec<&str> = models.iter().map(ModelId::as_str).collect();
    Err(CliError::Usage(format!("--price: the configuration has no model `{model}`; there are {}", all.join(", "))))
}

fn price_of(text: &str) -> Result<(ModelId, Price), CliError> {
    let odd = || CliError::Usage(format!("--price: `{text}` is not of the form MODEL=INPUT/OUTPUT[/CACHED]"));
    let (model, prices) = text.rsplit_once('=').ok_or_else(odd)?;
    let per_token = |text: &&str| {
        config::nano_per_token(text).map_err(|fault| CliError::Usage(format!("--price: {model}: {fault}")))
    };
    let prices: Vec<&str> = prices.split('/').collect();
    let prices: Vec<NanoUsd> = prices.iter().map(per_token).collect::<Result<_, _>>()?;
    match prices[..] {
        [input, output] => Ok((model.into(), Price::flat(input, output))),
        [input, output, cached_input] => Ok((model.into(), Price { input, output, cached_input })),
        _ => Err(odd()),
    }
}

/// One for each price.
async fn rows(desk: &Desk<'_>, book: &PriceBook, lists: &[PriceList]) -> Result<Value, CliError> {
    let now = desk.accounts.time_in(Duration::ZERO).await.map_err(operator)?;
    let of_list = |list: &PriceList| list.prices.keys().map(|model| row(book, list, model, now)).collect::<Vec<_>>();
    Ok(lists.iter().flat_map(of_list).collect())
}

fn row(book: &PriceBook, list: &PriceList, model: &ModelId, now_unix_ms: u64) -> Value {
    let Price { input, output, cached_input } = list.prices[model];
    let million = |price: NanoUsd| price.checked_mul(1_000_000).map(|price| price.to_string()).unwrap_or_default();
    let in_force = book.at(model, now_unix_ms).is_some_and(|(_, version)| version == list.version);
    json!({
        "version": list.version, "from_unix_ms": list.from_unix_ms, "model": model,
        "input_usd_per_million": million(input), "output_usd_per_million": million(output),
        "cached_input_usd_per_million": million(cached_input), "in_force": in_force,
    })
}
