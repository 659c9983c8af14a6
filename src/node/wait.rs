//! Waiting for the word to stop.

use tokio::signal::unix::{SignalKind, signal};

use super::NodeError;

/// Resolves at the first SIGTERM or SIGINT. A second one ends the process at once: whoever asks twice does
/// not want to wait for a drain. The leases of what was under way expire by themselves.
pub fn shutdown_signal() -> Result<impl Future<Output = &'static str>, NodeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(NodeError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(NodeError::Signals)?;
    Ok(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::warn!("asked to stop twice; stopping at once");
            std::process::exit(130);
        });
        name
    })
}
