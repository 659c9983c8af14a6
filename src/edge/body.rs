//! Reading a request's body: bounded in size and in time, so that half-sent bodies hold nobody up.

use std::time::Duration;

use actix_web::{
    HttpRequest,
    http::header,
    web::{Bytes, BytesMut, Payload},
};
use futures::StreamExt;
use tokio::time::{Instant, timeout, timeout_at};

use super::error::{ApiError, shorten};

/// What is read and thrown away after a refusal, so that the client gets to read the answer instead of a
/// reset connection.
const DISCARD_BYTES_MAX: usize = 16 << 20;
const DISCARD_TIME_MAX: Duration = Duration::from_millis(30);

/// The whole body, which must say that it is JSON.
pub(super) async fn read(
    http: &HttpRequest,
    payload: &mut Payload,
    bytes_max: usize,
    ms_max: u64,
) -> Result<Bytes, ApiError> {
    check_headers(http)?;
    let announced = http.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: usize| length > bytes_max) {
        return Err(ApiError::body_too_large(bytes_max));
    }
    let deadline = Instant::now() + Duration::from_millis(ms_max);
    let mut body = BytesMut::with_capacity(announced.unwrap_or(0).min(64 << 10));
    loop {
        match timeout_at(deadline, payload.next()).await {
            Err(_) => return Err(ApiError::body_too_late(ms_max)),
            Ok(None) => return Ok(body.freeze()),
            Ok(Some(Err(error))) => {
                tracing::debug!(%error, "a request body broke off");
                return Err(ApiError::broken_body());
            }
            Ok(Some(Ok(chunk))) if body.len() + chunk.len() > bytes_max => {
                return Err(ApiError::body_too_large(bytes_max));
            }
            Ok(Some(Ok(chunk))) => body.extend_from_slice(&chunk),
        }
    }
}

/// Reads on for a moment after a refusal.
pub(super) async fn discard(mut payload: Payload) {
    let reading = async {
        let mut bytes = 0;
        while let Some(Ok(chunk)) = payload.next().await {
            bytes += chunk.len();
            if bytes > DISCARD_BYTES_MAX {
                return;
            }
        }
    };
    let _ = timeout(DISCARD_TIME_MAX, reading).await;
}

fn check_headers(http: &HttpRequest) -> Result<(), ApiError> {
    let header = |name| http.headers().get(name).map(|value| value.to_str().unwrap_or("?"));
    if let Some(content_type) = header(header::CONTENT_TYPE) {
        let essence = content_type.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            let why = format!("Unsupported content type `{}`: send `application/json`.", shorten(content_type));
            return Err(ApiError::unsupported_media_type(why));
        }
    }
    if let Some(encoding) = header(header::CONTENT_ENCODING)
        && !encoding.trim().eq_ignore_ascii_case("identity")
    {
        let why = format!("Unsupported content encoding `{}`: send the body as it is.", shorten(encoding));
        return Err(ApiError::unsupported_media_type(why));
    }
    Ok(())
}
