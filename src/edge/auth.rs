//! Whose key a request carries.

use actix_web::{HttpRequest, http::header};

use super::{error::ApiError, state::EdgeState};
use crate::admission::{AuthError, Principal};

/// The bearer of the key in `Authorization: Bearer sk_…`.
pub(super) async fn authenticate(http: &HttpRequest, state: &EdgeState) -> Result<Principal, ApiError> {
    let secret = bearer(http)?;
    state.admission.authenticate(secret).await.map_err(|error| match error {
        AuthError::Unknown => ApiError::bad_key(),
        AuthError::Revoked(key) => {
            tracing::info!(%key, "a revoked key was used");
            ApiError::bad_key()
        }
        AuthError::Expired(key) => {
            tracing::info!(%key, "an expired key was used");
            ApiError::bad_key()
        }
        AuthError::Suspended(tenant) => {
            tracing::info!(%tenant, "a suspended tenant's key was used");
            ApiError::suspended()
        }
        AuthError::Store(error) => {
            tracing::warn!(%error, "a key could not be checked");
            ApiError::store_away()
        }
    })
}

fn bearer(http: &HttpRequest) -> Result<&str, ApiError> {
    let mut values = http.headers().get_all(header::AUTHORIZATION);
    let value = values.next().ok_or_else(ApiError::no_key)?;
    if values.next().is_some() {
        return Err(ApiError::bad_key());
    }
    let text = value.to_str().map_err(|_| ApiError::bad_key())?.trim();
    let (scheme, secret) = text.split_once(' ').unwrap_or((text, ""));
    if !scheme.eq_ignore_ascii_case("bearer") || secret.trim().is_empty() {
        return Err(ApiError::no_key());
    }
    Ok(secret.trim())
}
