//! `lightcone serve`.

use std::{
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use serde_json::json;

use super::{CliError, Output};
use crate::{
    config::Config,
    node::{Node, shutdown_signal},
};

pub async fn serve(config: Config, output: Output) -> Result<(), CliError> {
    let stop = shutdown_signal()?;
    tokio::pin!(stop);
    let node = tokio::select! {
        node = Node::start(config) => node?,
        // Nothing was served yet, so that there is nothing to drain.
        _ = &mut stop => return Ok(()),
    };
    let ready = match output {
        Output::Table => banner(&node),
        Output::Json => format!("{}\n", facts(&node)),
    };
    // A node whose output nobody reads serves all the same.
    let _ = io::stdout().write_all(ready.as_bytes()).and_then(|()| io::stdout().flush());
    let signal = stop.await;
    tracing::info!(signal, grace_ms = node.config().node.drain_ms_max, "draining");
    node.drain().await;
    tracing::info!("stopped");
    Ok(())
}

fn facts(node: &Node) -> serde_json::Value {
    let keys = node.bootstrap();
    json!({
        "status": "ready",
        "role": node.config().node.role.as_str(),
        "url": node.address().map(url),
        "dev_key_file": keys.and_then(|keys| keys.dev_key.as_ref()),
        "admin_key_file": keys.and_then(|keys| keys.admin_key.as_ref()),
        "models": node.config().models.keys().collect::<Vec<_>>(),
    })
}

fn banner(node: &Node) -> String {
    let models: Vec<_> = node.config().models.keys().map(|model| model.as_str()).collect();
    let models = models.join(", ");
    let Some(address) = node.address() else {
        return format!("\nLightcone is ready: worker for {models}\n\n");
    };
    let url = url(address);
    let key_file = node.bootstrap().and_then(|keys| keys.dev_key.as_ref());
    let key = key_file.and_then(|path| Some((std::fs::read_to_string(path).ok()?.trim().to_owned(), path)));
    let (key, place) = match &key {
        Some((key, path)) => (key.as_str(), format!("  ({})", path.display())),
        None => ("$LIGHTCONE_KEY", "  (make one with `lightcone keys create`)".to_owned()),
    };
    let model = &node.config().edge.default_model;
    format!(
        "\nLightcone is ready.\n\n  URL     {url}\n  Key     {key}{place}\n  Models  {models}\n\nTry it:\n\n\
         curl -N {url}/v1/chat/completions \\\n  -H \"Authorization: Bearer {key}\" \\\n  \
         -H \"Content-Type: application/json\" \\\n  -d '{{\"model\": \"{model}\", \"stream\": true, \
         \"messages\": [{{\"role\": \"user\", \"content\": \"What is a light cone?\"}}]}}'\n\n"
    )
}

/// An address that a client on this machine can use.
fn url(address: SocketAddr) -> String {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, address.port()))
}
