//! The models that are served.

use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;

use super::{
    auth::authenticate,
    error::ApiError,
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
    fn new(id: &'a ModelId, model: &'a ServedModel) -> Self {
        let million = |price: NanoUsd| price.checked_mul(1_000_000).ok().map(|price| price.to_string());
        Self {
            id,
            object: "model",
            created: model.created,
            owned_by: &model.owned_by,
            description: &model.description,
            context_length: model.context_tokens_max,
            max_output_tokens: model.output_tokens_max,
            pricing: Pricing {
                currency: "USD",
                input_per_million_tokens: million(model.price.input),
                output_per_million_tokens: million(model.price.output),
            },
            features: FEATURES,
        }
    }
}

pub(super) async fn list(http: HttpRequest, state: web::Data<EdgeState>) -> Result<HttpResponse, ApiError> {
    authenticate(&http, &state).await?;
    let data = state.models.iter().map(|(id, model)| Model::new(id, model)).collect();
    Ok(HttpResponse::Ok().json(List { object: "list", data }))
}

pub(super) async fn one(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    authenticate(&http, &state).await?;
    let (id, model) = state.models.get_key_value(id.as_str()).ok_or_else(|| ApiError::model_not_found(&id))?;
    Ok(HttpResponse::Ok().json(Model::new(id, model)))
}
