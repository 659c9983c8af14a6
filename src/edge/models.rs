//! The models that are served.

use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;

use super::{
    auth::authenticate,
    error::ApiError,
    generation::no_price,
    state::{EdgeState, ServedModel},
};
use crate::domain::{ModelId, NanoUsd};

#[derive(JsonSchema, Serialize)]
pub(super) struct List<'a> {
    #[schemars(extend("const" = "list"))]
    object: &'static str,
    data: Vec<Model<'a>>,
}

#[derive(JsonSchema, Serialize)]
pub(super) struct Model<'a> {
    #[schemars(with = "String")]
    id: &'a ModelId,
    #[schemars(extend("const" = "model"))]
    object: &'static str,
    created: u64,
    owned_by: &'a str,
    description: &'a str,
    context_length: u32,
    max_output_tokens: u32,
    pricing: Pricing,
    features: &'static [&'static str],
}

/// In dollars, exact, as text.
#[derive(JsonSchema, Serialize)]
struct Pricing {
    currency: &'static str,
    input_per_million_tokens: Option<String>,
    output_per_million_tokens: Option<String>,
    /// Of prompt tokens that were found in the prefix cache.
    cached_input_per_million_tokens: Option<String>,
    /// Named in the ledger and on receipts.
    version: String,
}

const FEATURES: &[&str] = &[
    "chat",
    "completions",
    "responses",
    "streaming",
    "tools",
    "structured_outputs",
    "logprobs",
    "logit_bias",
    "seed",
    "stop",
];

impl<'a> Model<'a> {
    async fn new(id: &'a ModelId, model: &'a ServedModel, state: &EdgeState) -> Result<Self, ApiError> {
        let (price, version) = state.prices.current(id).await.map_err(no_price)?;
        let million = |price: NanoUsd| price.checked_mul(1_000_000).ok().map(|price| price.to_string());
        Ok(Self {
            id,
            object: "model",
            created: model.created,
            owned_by: &model.owned_by,
            description: &model.description,
            context_length: model.context_tokens_max,
            max_output_tokens: model.output_tokens_max,
            pricing: Pricing {
                currency: "USD",
                input_per_million_tokens: million(price.input),
                output_per_million_tokens: million(price.output),
                cached_input_per_million_tokens: million(price.cached_input),
                version,
            },
            features: FEATURES,
        })
    }
}

/// Those that the key may ask.
pub(super) async fn list(http: HttpRequest, state: web::Data<EdgeState>) -> Result<HttpResponse, ApiError> {
    let principal = authenticate(&http, &state).await?;
    let mut data = Vec::with_capacity(state.models.len());
    for (id, model) in state.models.iter().filter(|(id, _)| principal.may_ask(id)) {
        data.push(Model::new(id, model, &state).await?);
    }
    Ok(HttpResponse::Ok().json(List { object: "list", data }))
}

pub(super) async fn one(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let principal = authenticate(&http, &state).await?;
    let known = state.models.get_key_value(id.as_str()).filter(|(id, _)| principal.may_ask(id));
    let (id, model) = known.ok_or_else(|| ApiError::model_not_found(&id))?;
    Ok(HttpResponse::Ok().json(Model::new(id, model, &state).await?))
}
