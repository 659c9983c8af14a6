//! Whose key a request carries, and whether it is looked at: not where too many wrong ones came from.

use std::time::Duration;

use actix_web::{HttpRequest, http::header};
use tokio::time::{MissedTickBehavior, interval};

use super::{address, error::ApiError, state::EdgeState};
use crate::admission::{Address, AuthError, Principal};

/// How often an edge asks what others have blocked, so that all know within a second.
const BLOCKS_PERIOD: Duration = Duration::from_millis(500);

/// The bearer of the key in `Authorization: Bearer sk_…`.
pub(super) async fn authenticate(http: &HttpRequest, state: &EdgeState) -> Result<Principal, ApiError> {
    // Who brings no key has not guessed at one.
    let secret = bearer(http).ok_or_else(ApiError::no_key)?;
    let source = address::source(http, &state.trusted_proxies).map(Address::from);
    if let Some(left) = source.and_then(|source| state.guard.blocked_for(source)) {
        return Err(ApiError::address_blocked(left));
    }
    let principal = match secret {
        Ok(secret) => state.admission.authenticate(secret).await,
        Err(error) => Err(error),
    };
    match principal {
        Ok(principal) => return Ok(principal),
        Err(AuthError::Unknown) => {}
        Err(AuthError::Revoked(key)) => tracing::info!(%key, "a revoked key was used"),
        Err(AuthError::Expired(key)) => tracing::info!(%key, "an expired key was used"),
        // A key that is good, and known to be: no guess.
        Err(AuthError::Suspended(tenant)) => {
            tracing::info!(%tenant, "a suspended tenant's key was used");
            return Err(ApiError::suspended());
        }
        Err(AuthError::Store(error)) => {
            tracing::warn!(%error, "a key could not be checked");
            return Err(ApiError::store_away());
        }
    }
    state.metrics.auth_failures.inc();
    if let Some(source) = source {
        match state.guard.failed(source).await {
            Ok(true) => tracing::warn!(address = %source, "blocked after too many failed authentications"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "a failed authentication was not counted"),
        }
    }
    Err(ApiError::bad_key())
}

/// What stands where a key should; nothing where there is none.
fn bearer(http: &HttpRequest) -> Option<Result<&str, AuthError>> {
    let mut values = http.headers().get_all(header::AUTHORIZATION);
    let value = values.next()?;
    if values.next().is_some() {
        return Some(Err(AuthError::Unknown));
    }
    let Ok(text) = value.to_str() else { return Some(Err(AuthError::Unknown)) };
    let (scheme, secret) = text.trim().split_once(' ')?;
    let secret = secret.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !secret.is_empty()).then_some(Ok(secret))
}

/// Learns what other edges have blocked, for as long as somebody polls it. While the store is away, what is known
/// stays until it ends.
pub(super) async fn learn_blocks(state: &EdgeState) {
    if state.guard.is_off() {
        return std::future::pending().await;
    }
    let mut ticks = interval(BLOCKS_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match state.guard.refresh().await {
            Ok(blocked) => state.metrics.addresses_blocked.set(i64::try_from(blocked).unwrap_or(i64::MAX)),
            Err(error) => tracing::debug!(%error, "what is blocked elsewhere is not known"),
        }
    }
}
