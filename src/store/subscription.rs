use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::StreamExt;
use parking_lot::Mutex;
use redis::{Client, Msg};
use tokio::{sync::Notify, task::AbortHandle};

/// A silent connection is asked this often whether it still lives.
const PROBE_PERIOD: Duration = Duration::from_secs(5);
const RECONNECT_DELAY_MIN: Duration = Duration::from_millis(50);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(1);
/// Messages that are kept for a reader.
const MESSAGES_MAX: usize = 1024;

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
        let heard = {
            let changed = Arc::clone(&changed);
            move |_: Option<Msg>| changed.notify_one()
        };
        let task = tokio::spawn(listen(client, channel, timeout, heard)).abort_handle();
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

/// Tells what was published, each message once however often it was said: for a reader that has to know which of
/// many things has changed.
pub struct Messages {
    said: Arc<Said>,
    task: AbortHandle,
}

#[derive(Default)]
struct Said {
    /// Nothing where it is not known: the connection was away, or there was more than is kept.
    messages: Mutex<Option<BTreeSet<String>>>,
    changed: Notify,
}

impl Messages {
    pub(super) fn start(client: Client, channel: String, timeout: Duration) -> Self {
        let said = Arc::new(Said::default());
        let heard = {
            let said = Arc::clone(&said);
            move |message: Option<Msg>| said.hear(message.map(|message| message.get_payload().unwrap_or_default()))
        };
        let task = tokio::spawn(listen(client, channel, timeout, heard)).abort_handle();
        Self { said, task }
    }

    /// Waits for the next ones. Nothing means that anything may have been said. Some may be missed while the connection
    /// is away, so a reader also looks by itself now and then.
    pub async fn next(&mut self) -> Option<BTreeSet<String>> {
        self.said.changed.notified().await;
        self.said.messages.lock().replace(BTreeSet::new())
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Said {
    fn hear(&self, message: Option<String>) {
        let mut messages = self.messages.lock();
        match (message, &mut *messages) {
            (Some(message), Some(known)) if known.len() < MESSAGES_MAX => drop(known.insert(message)),
            _ => *messages = None,
        }
        self.changed.notify_one();
    }
}

/// `heard` is called for each message, and without one whenever some may have been missed.
async fn listen(client: Client, channel: String, timeout: Duration, heard: impl Fn(Option<Msg>)) {
    let mut delay = RECONNECT_DELAY_MIN;
    loop {
        match tokio::time::timeout(timeout, subscribed(&client, &channel)).await {
            Ok(Ok((mut sink, mut messages))) => {
                delay = RECONNECT_DELAY_MIN;
                heard(None);
                loop {
                    match tokio::time::timeout(PROBE_PERIOD, messages.next()).await {
                        Ok(Some(message)) => heard(Some(message)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_are_told_once_and_where_some_may_be_missing_it_is_said_so() {
        let said = Arc::new(Said::default());
        let task = tokio::spawn(std::future::pending::<()>()).abort_handle();
        let mut messages = Messages { said: Arc::clone(&said), task };
        said.hear(None);
        assert_eq!(messages.next().await, None);
        ["b", "a", "b"].iter().for_each(|message| said.hear(Some((*message).to_owned())));
        assert_eq!(messages.next().await, Some(["a", "b"].map(str::to_owned).into()));
        (0..=MESSAGES_MAX).for_each(|number| said.hear(Some(number.to_string())));
        said.hear(Some("late".to_owned()));
        assert_eq!(messages.next().await, None);
        said.hear(Some("again".to_owned()));
        assert_eq!(messages.next().await, Some(["again".to_owned()].into()));
    }
}
