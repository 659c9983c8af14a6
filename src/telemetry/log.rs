//! Logs: one line an event on the standard error, as text or as JSON.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::{EnvFilter, fmt, util::SubscriberInitExt};

/// How a line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStyle {
    Text,
    Json,
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("`{filter}` is not a log filter")]
    Filter { filter: String, source: tracing_subscriber::filter::ParseError },
    #[error("logging was already set up")]
    Repeated { source: tracing_subscriber::util::TryInitError },
}

/// ONNX Runtime narrates every node of a graph at `info`; whoever wants that asks for it by name.
const QUIET: &str = "ort=warn";

/// Sets up logging for the whole process, once.
pub fn init(filter: &str, style: LogStyle) -> Result<(), LogError> {
    let builder = fmt().with_env_filter(parse(filter)?).with_writer(stderr);
    let repeated = |source| LogError::Repeated { source };
    match style {
        LogStyle::Text => builder.with_ansi(stderr().is_terminal()).finish().try_init().map_err(repeated),
        LogStyle::Json => builder.json().flatten_event(true).finish().try_init().map_err(repeated),
    }
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    let names_ort = filter.split(',').any(|part| {
        let target = part.trim().split(['=', '[']).next().unwrap_or_default();
        target == "ort" || target.starts_with("ort::")
    });
    let whole = if names_ort { filter.to_owned() } else { format!("{filter},{QUIET}") };
    EnvFilter::builder()
        .parse(whole.trim_start_matches(','))
        .map_err(|source| LogError::Filter { filter: filter.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn onnx_runtime_is_quiet_unless_it_is_asked_for_by_name() {
        assert!(parse("info").unwrap().to_string().contains("ort=warn"));
        assert!(parse("").unwrap().to_string().contains("ort=warn"));
        assert!(parse("info,ort=debug").unwrap().to_string().contains("ort=debug"));
        assert!(!parse("info,ort=debug").unwrap().to_string().contains("ort=warn"));
        assert!(parse("info,lightcone::short=debug").unwrap().to_string().contains("ort=warn"));
    }

    #[test]
    fn a_filter_that_is_none_is_an_error() {
        assert!(matches!(parse("lightcone=loudly"), Err(LogError::Filter { .. })));
    }
}
