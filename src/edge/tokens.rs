//! `POST /tokenize` and `POST /detokenize`: what a model makes of a text, free of charge.

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;

use super::{
    auth::authenticate,
    body,
    endpoint::with_ignored,
    error::ApiError,
    state::EdgeState,
    wire::{Body, tokens},
};
use crate::{
    admission::Scope,
    domain::ModelId,
    prompt::{Ask, Asked},
};

#[derive(JsonSchema, Serialize)]
pub struct Tokens<'a> {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    /// Where `return_token_strs` asked for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<&'a str>>,
}

#[derive(JsonSchema, Serialize)]
pub struct Text<'a> {
    prompt: &'a str,
}

/// The body, and the model that it is about.
async fn asked(http: &HttpRequest, payload: &mut web::Payload, state: &EdgeState) -> Result<(Body, ModelId), ApiError> {
    let principal = authenticate(http, state).await?;
    if !principal.may(Scope::Chat) {
        return Err(ApiError::permission_denied("This API key may not tokenise."));
    }
    let settings = &state.settings;
    let bytes = body::read(http, payload, settings.body_bytes_max, settings.body_ms_max).await?;
    let body = Body::read(&bytes)?;
    let name = body.model()?.unwrap_or(settings.default_model.as_str());
    let (model, _) = state.models.get_key_value(name).ok_or_else(|| ApiError::model_not_found(name))?;
    let model = model.clone();
    if !principal.may_ask(&model) {
        return Err(ApiError::permission_denied(format!("This API key may not ask the model `{model}`.")));
    }
    Ok((body, model))
}

pub async fn tokenize(
    http: HttpRequest,
    mut payload: web::Payload,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let state: Arc<EdgeState> = state.into_inner();
    let (body, model) = asked(&http, &mut payload, &state).await?;
    let (prompt, wants_texts, ignored) = tokens::read_text(body, state.settings.messages_max)?;
    let is_empty = prompt == Asked::Text(String::new());
    let prepared = state.pool.prepare(model.clone(), Ask::new(prompt)).await?;
    let tokens = if is_empty { Vec::new() } else { prepared.tokens };
    let known = state.known(&model);
    let texts = || tokens.iter().map(|token| known.vocabulary.tokens[*token as usize].as_str()).collect();
    let token_strs = wants_texts.then(texts);
    let max_model_len = state.models[&model].context_tokens_max;
    Ok(with_ignored(HttpResponse::Ok(), &ignored).json(Tokens {
        count: tokens.len(),
        max_model_len,
        token_strs,
        tokens,
    }))
}

pub async fn detokenize(
    http: HttpRequest,
    mut payload: web::Payload,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let (body, model) = asked(&http, &mut payload, &state).await?;
    let known = state.known(&model);
    let (tokens, ignored) = tokens::read_tokens(body, known.vocabulary.len())?;
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| known.vocabulary.spelled(*token)).copied().collect();
    Ok(with_ignored(HttpResponse::Ok(), &ignored).json(Text { prompt: &String::from_utf8_lossy(&bytes) }))
}
