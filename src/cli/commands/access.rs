use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    cli::CliError,
    config::Config,
    node::{self, DataDir, DataDirError, NodeError},
    store::{Store, embedded::EmbeddedServer},
};

/// A way to the store: the configured one, the one that a running node has, or one of our own for as long as
/// the command takes.
pub struct Access {
    pub store: Store,
    own: Option<(EmbeddedServer, DataDir)>,
}

/// A node that starts or stops holds the folder for a moment without a store that answers.
const NODE_PATIENCE: Duration = Duration::from_secs(10);

impl Access {
    pub async fn open(config: &Config) -> Result<Self, CliError> {
        let limit = Duration::from_millis(config.store.command_ms_max);
        let connect = |url: String| async move { Store::connect(&url, limit).await.map_err(NodeError::from) };
        if !config.store.redis_url.is_empty() {
            return Ok(Self { store: connect(config.store.redis_url.clone()).await?, own: None });
        }
        let data_dir = &config.node.data_dir;
        let begun = Instant::now();
        loop {
            match DataDir::lock(data_dir) {
                Ok(lock) => {
                    let server = node::embedded(config).await?;
                    let store = connect(server.url().to_owned()).await?;
                    return Ok(Self { store, own: Some((server, lock)) });
                }
                Err(locked @ DataDirError::Locked { .. }) => {
                    if let Some(url) = EmbeddedServer::running(data_dir) {
                        return Ok(Self { store: connect(url).await?, own: None });
                    }
                    if begun.elapsed() > NODE_PATIENCE {
                        return Err(NodeError::from(locked).into());
                    }
                    sleep(Duration::from_millis(100)).await;
                }
                Err(error) => return Err(NodeError::from(error).into()),
            }
        }
    }

    pub async fn close(self) {
        drop(self.store);
        if let Some((server, lock)) = self.own {
            let _ = tokio::task::spawn_blocking(move || server.stop()).await;
            drop(lock);
        }
    }
}
