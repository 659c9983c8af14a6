use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use redis::Client;
use tokio::{sync::Notify, task::AbortHandle};

/// A silent connection is asked this often whether it still lives.
const PROBE_PERIOD: Duration = Duration::from_secs(5);
const RECONNECT_DELAY_MIN: Duration = Duration::from_millis(50);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(1);

/// Tells that something was published, not what: notices that nobody has taken yet fold into one, so that it
/// holds no more than a flag however slow its reader is. After a lost connection it tells so once, because
/// what was published meanwhile is not known.
pub struct Subscription {
    changed: Arc<Notify>,
    task: AbortHandle,
}

impl Subscription {
    pub(super) fn start(client: Client, channel: String, timeout: Duration) -> Self {
        let changed = Arc::new(Notify::new());
        let task = tokio::spawn(listen(client, channel, timeout, changed.clone())).abort_handle();
        Self { changed, task }
    }

    /// Waits for the next notice. A publication may be missed while the connection is away, so a reader also
    /// looks by itself now and then.
    pub async fn changed(&mut self) {
        self.changed.notified().await;
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(client: Client, channel: String, timeout: Duration, changed: Arc<Notify>) {
    let mut delay = RECONNECT_DELAY_MIN;
    loop {
        match tokio::time::timeout(timeout, subscribed(&client, &channel)).await {
            Ok(Ok((mut sink, mut messages))) => {
                delay = RECONNECT_DELAY_MIN;
                changed.notify_one();
                loop {
                    match tokio::time::timeout(PROBE_PERIOD, messages.next()).await {
                        Ok(Some(_)) => changed.notify_one(),
                        Ok(None) => break,
                        Err(_silent) => {
                            let probe = tokio::time::timeout(timeout, sink.ping::<redis::Value>()).await;
                            if !matches!(probe, Ok(Ok(_))) {
                                break;
                            }
                        }
                    }
                }
                tracing::info!(channel, "lost the subscription, reconnecting");
            }
            Ok(Err(error)) => tracing::debug!(channel, %error, "cannot subscribe yet"),
            Err(_) => tracing::debug!(channel, "cannot subscribe in time"),
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(RECONNECT_DELAY_MAX);
    }
}

async fn subscribed(
    client: &Client,
    channel: &str,
) -> redis::RedisResult<(redis::aio::PubSubSink, redis::aio::PubSubStream)> {
    let (mut sink, messages) = client.get_async_pubsub().await?.split();
    sink.subscribe(channel).await?;
    Ok((sink, messages))
}
