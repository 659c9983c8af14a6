use std::collections::BTreeMap;

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Serialize;

use super::{Desk, Sorted, answer, bodies, faults};
use crate::{
    admission::{Limits, Tier},
    domain::{ModelId, NanoUsd, Price, PriceList},
    edge::{dialect::openai::service_tier, error::ApiError, state::EdgeState},
};

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

impl<'a> From<&'a PriceList> for Sorted<WirePriceList<'a>> {
    fn from(list: &'a PriceList) -> Self {
        let price = |(model, price): (&'a ModelId, &Price)| {
            let Price { input, output, cached_input } = *price;
            let price =
                WirePrice { input_nano_usd: input, output_nano_usd: output, cached_input_nano_usd: cached_input };
            (model, price)
        };
        let prices = list.prices.iter().map(price).collect();
        Self {
            object: "price_list",
            thing: WirePriceList { version: &list.version, from_unix_ms: list.from_unix_ms, prices },
        }
    }
}

/// What there are few of: not in pages.
#[derive(Serialize)]
struct Few<T> {
    object: &'static str,
    data: Vec<Sorted<T>>,
}

/// All price lists in order of time, the configured one among them.
pub async fn list_prices(http: HttpRequest, state: web::Data<EdgeState>) -> Result<HttpResponse, ApiError> {
    let desk = Desk::open(&http, state).await?;
    let book = desk.state.prices.book().await.map_err(|error| faults::of_look(error.into()))?;
    Ok(answer(&Few { object: "list", data: book.lists().iter().map(Sorted::from).collect() }))
}

pub async fn set_prices(
    http: HttpRequest,
    payload: web::Payload,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let desk = Desk::open(&http, state).await?;
    let body = desk.body(&http, payload).await?;
    let is_served = |model: &str| desk.state.models.contains_key(model);
    let (version, from, wishes) = bodies::prices(&body.fields(), is_served)?;
    let (accounts, prices) = (desk.accounts.clone(), desk.state.prices.clone());
    let publishing = async move { accounts.publish_prices(&prices, &version, from, &wishes).await };
    Ok(answer(&Sorted::from(&desk.change(publishing).await?)))
}

#[derive(Serialize)]
struct WireTier {
    name: String,
    limits: Limits,
    service_tier_max: &'static str,
}

/// The sets of limits that this edge's configuration has.
pub async fn list_tiers(http: HttpRequest, state: web::Data<EdgeState>) -> Result<HttpResponse, ApiError> {
    let desk = Desk::open(&http, state).await?;
    let tier = |(name, tier): (&str, &Tier)| {
        let (name, limits) = (name.to_owned(), tier.limits.clone());
        Sorted { object: "tier", thing: WireTier { name, limits, service_tier_max: service_tier(tier.priority_max) } }
    };
    Ok(answer(&Few { object: "list", data: desk.state.admission.tiers().iter().map(tier).collect() }))
}
