use std::collections::BTreeMap;

use actix_web::{HttpResponse, web};
use serde::Serialize;

use super::{Desk, Few, Sorted, answer, bodies, faults};
use crate::{
    admission::{Limits, Tier},
    domain::{ModelId, NanoUsd, Price, PriceList},
    edge::{dialect::openai::service_tier, error::ApiError},
};

const PRICE_LIST: &str = "price_list";

/// Of one token.
#[derive(Serialize)]
struct WirePrice {
    input_nano_usd: NanoUsd,
    output_nano_usd: NanoUsd,
    cached_input_nano_usd: NanoUsd,
}

#[derive(Serialize)]
struct WirePriceList<'a> {
    version: &'a str,
    from_unix_ms: u64,
    prices: BTreeMap<&'a ModelId, WirePrice>,
}

impl<'a> From<&'a PriceList> for WirePriceList<'a> {
    fn from(list: &'a PriceList) -> Self {
        let price = |(model, price): (&'a ModelId, &Price)| {
            let Price { input, output, cached_input } = *price;
            let price =
                WirePrice { input_nano_usd: input, output_nano_usd: output, cached_input_nano_usd: cached_input };
            (model, price)
        };
        let prices = list.prices.iter().map(price).collect();
        Self { version: &list.version, from_unix_ms: list.from_unix_ms, prices }
    }
}

/// All price lists in order of time, the configured one among them.
pub async fn list_prices(desk: Desk) -> Result<HttpResponse, ApiError> {
    let book = desk.state.prices.book().await.map_err(|error| faults::of_look(error.into()))?;
    Ok(answer(&Few::of(book.lists().iter().map(WirePriceList::from), PRICE_LIST)))
}

pub async fn set_prices(desk: Desk, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let body = desk.body(payload).await?;
    let is_served = |model: &str| desk.state.models.contains_key(model);
    let (version, from, wishes) = bodies::prices(&body.fields(), is_served)?;
    let (accounts, prices) = (desk.accounts.clone(), desk.state.prices.clone());
    let publishing = async move { accounts.publish_prices(&prices, &version, from, &wishes).await };
    Ok(answer(&Sorted { object: PRICE_LIST, thing: WirePriceList::from(&desk.change(publishing).await?) }))
}

#[derive(Serialize)]
struct WireTier {
    name: String,
    limits: Limits,
    service_tier_max: &'static str,
}

/// The sets of limits that this edge's configuration has.
pub async fn list_tiers(desk: Desk) -> Result<HttpResponse, ApiError> {
    let tier = |(name, tier): (&str, &Tier)| {
        let (name, limits) = (name.to_owned(), tier.limits.clone());
        WireTier { name, limits, service_tier_max: service_tier(tier.priority_max) }
    };
    Ok(answer(&Few::of(desk.state.admission.tiers().iter().map(tier), "tier")))
}
