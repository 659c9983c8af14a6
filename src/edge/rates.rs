//! `x-ratelimit-*`: what a tenant may still ask for, in the headers that clients know.

use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::admission::{Rate, Rates};

/// Nothing about a limit that there is not.
pub fn tell(rates: Rates, headers: &mut HeaderMap) {
    for (kind, rate) in [("requests", rates.requests), ("tokens", rates.tokens)] {
        let Some(Rate { limit, remaining, reset_ms }) = rate else { continue };
        for (what, value) in
            [("limit", limit.to_string()), ("remaining", remaining.to_string()), ("reset", duration(reset_ms))]
        {
            let name = HeaderName::try_from(format!("x-ratelimit-{what}-{kind}")).expect("a header's name");
            headers.insert(name, HeaderValue::try_from(value).expect("digits and letters"));
        }
    }
}

/// As OpenAI writes it: `1m0s`, `6.25s`, `120ms`.
pub fn duration(ms: u64) -> String {
    if ms < 1000 {
        return format!("{ms}ms");
    }
    let (hours, minutes, rest) = (ms / 3_600_000, ms / 60_000 % 60, ms % 60_000);
    let seconds = format!("{}s", rest as f64 / 1000.0);
    match (hours, minutes) {
        (0, 0) => seconds,
        (0, minutes) => format!("{minutes}m{seconds}"),
        (hours, minutes) => format!("{hours}h{minutes}m{seconds}"),
    }
}

#[cfg(test)]
mod tests {
    use super::duration;

    #[test]
    fn durations_are_written_as_clients_read_them() {
        let written: Vec<_> =
            [0, 120, 1000, 6250, 60_000, 61_500, 3_600_000, 90_061_000].into_iter().map(duration).collect();
        assert_eq!(written, ["0ms", "120ms", "1s", "6.25s", "1m0s", "1m1.5s", "1h0m0s", "25h1m1s"]);
    }
}
