use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use redis::{
    Client, Cmd, ConnectionInfo, ErrorKind, FromRedisValue, IntoConnectionInfo, RedisError, RedisResult, Value,
    aio::{ConnectionManager, ConnectionManagerConfig},
    io::tcp::TcpSettings,
};

use super::{Function, Messages, StoreError, Subscription, functions, keys, layout};

/// Pause between attempts to reconnect. Small against a lease, so that owners return in time to renew.
const RECONNECT_DELAY_MIN: Duration = Duration::from_millis(50);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(1);
/// Further attempts of one round; the next command after a failed round starts another. Few, because commands
/// wait for the round: a short absence is waited out, a longer one refuses requests at once.
const RECONNECT_ATTEMPTS: usize = 2;

/// A shared, multiplexed, reconnecting connection. Cheap to clone, usable from any tokio runtime.
#[derive(Clone)]
pub struct Store {
    client: Client,
    connection: ConnectionManager,
    command_timeout: Duration,
    /// Since when the server has served without a gap; `None` while it does not.
    serving_since: Arc<Mutex<Option<Instant>>>,
}

impl Store {
    /// Connects, loads the functions and looks whether the data are ours; one attempt, whose failure names its cause. `url` is `redis://…`, or
    /// `unix:///path` (`redis+unix:///path`).
    pub async fn connect(url: &str, command_timeout: Duration) -> Result<Self, StoreError> {
        let client = open_client(url, command_timeout)
            .map_err(|source| StoreError::Address { url: without_password(url), source })?;
        let store = Self::connect_with(client, command_timeout)
            .await
            .map_err(|source| StoreError::Connect { url: without_password(url), source: Box::new(source) })?;
        layout::check(&store).await?;
        Ok(store)
    }

    async fn connect_with(client: Client, command_timeout: Duration) -> Result<Self, StoreError> {
        // The manager below would hide the cause behind its own repeated attempts.
        match tokio::time::timeout(command_timeout, client.get_multiplexed_async_connection()).await {
            Ok(Ok(_probe)) => {}
            Ok(Err(error)) => return Err(classify(error)),
            Err(_) => return Err(StoreError::TimedOut(command_timeout.as_millis())),
        }
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(command_timeout))
            .set_response_timeout(Some(command_timeout))
            .set_min_delay(RECONNECT_DELAY_MIN)
            .set_max_delay(RECONNECT_DELAY_MAX)
            .set_number_of_retries(RECONNECT_ATTEMPTS);
        let connection = ConnectionManager::new_lazy_with_config(client.clone(), config).map_err(classify)?;
        let store = Self { client, connection, command_timeout, serving_since: Arc::default() };
        store.load_functions().await?;
        Ok(store)
    }

    pub async fn ping(&self) -> Result<(), StoreError> {
        self.query::<String>(&redis::cmd("PING")).await.map(drop)
    }

    /// How long the server has served without a gap, as this process saw it. Whoever takes away what others
    /// failed to renew waits for a lease's time after this began, because an outage kept them from renewing
    /// as well.
    pub fn connected_for(&self) -> Duration {
        self.serving_since.lock().map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The store's clock. All leases and deadlines are measured by it, never by a node's own clock.
    pub async fn now_unix_ms(&self) -> Result<u64, StoreError> {
        let (seconds, micros): (u64, u64) = self.query(&redis::cmd("TIME")).await?;
        Ok(seconds * 1000 + micros / 1000)
    }

    /// A random secret that all users of this store share: made by the first who asks.
    pub async fn shared_secret(&self) -> Result<String, StoreError> {
        let fresh = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        self.made_once(keys::RELAY_SECRET, fresh).await
    }

    /// What the first who asked for it has made.
    pub(crate) async fn made_once(&self, key: &str, fresh: String) -> Result<String, StoreError> {
        self.query::<redis::Value>(redis::cmd("SET").arg(key).arg(fresh).arg("NX")).await?;
        self.query(redis::cmd("GET").arg(key)).await
    }

    /// Notices that `channel` was published to, on a connection of its own that reconnects for ever.
    /// Must be called within a tokio runtime; ends when the subscription is dropped.
    pub fn subscribe(&self, channel: impl Into<String>) -> Subscription {
        Subscription::start(self.client.clone(), channel.into(), self.command_timeout)
    }

    /// The same for readers that have to know what was published.
    pub(crate) fn messages(&self, channel: impl Into<String>) -> Messages {
        Messages::start(self.client.clone(), channel.into(), self.command_timeout)
    }

    /// Runs one of our functions, atomically on the server.
    pub(crate) async fn call<T: FromRedisValue>(
        &self,
        function: Function,
        keys: &[String],
        arguments: &[&[u8]],
    ) -> Result<T, StoreError> {
        let mut command = redis::cmd(if function.only_reads() { "FCALL_RO" } else { "FCALL" });
        command.arg(functions::library().name_of(function)).arg(keys.len());
        for key in keys {
            command.arg(key);
        }
        for argument in arguments {
            command.arg(*argument);
        }
        match self.query(&command).await {
            // The server was replaced or emptied since we loaded them. Nothing was executed, so to repeat
            // the call is safe.
            Err(error) if is_function_missing(&error) => {
                self.load_functions().await?;
                self.query(&command).await
            }
            answer => answer,
        }
    }

    pub(crate) async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, StoreError> {
        let mut connection = self.connection.clone();
        // An error that the server answers with arrives as a value like any other.
        let answer =
            self.within_limit(async move { connection.send_packed_command(command).await?.extract_error() }).await?;
        T::from_redis_value(answer).map_err(|error| StoreError::Damaged(format!("unexpected answer: {error}")))
    }

    /// Several commands in one round trip; not a transaction.
    pub(crate) async fn query_all(&self, commands: &redis::Pipeline) -> Result<Vec<Value>, StoreError> {
        let mut connection = self.connection.clone();
        let count = commands.cmd_iter().count();
        self.within_limit(async move {
            let answers = connection.send_packed_commands(commands, 0, count).await?;
            answers.into_iter().map(Value::extract_error).collect()
        })
        .await
    }

    async fn load_functions(&self) -> Result<(), StoreError> {
        let mut command = redis::cmd("FUNCTION");
        command.arg("LOAD").arg(&functions::library().source);
        match self.query::<String>(&command).await {
            // Under its name, which is its digest, it is the same. To load it again would write it into the file again.
            Err(StoreError::Refused(refusal))
                if refusal.detail().is_some_and(|detail| detail.contains("already exists")) =>
            {
                Ok(())
            }
            loaded => loaded.map(drop),
        }
    }

    async fn within_limit<T>(&self, command: impl Future<Output = RedisResult<T>>) -> Result<T, StoreError> {
        // The connection's own limit covers the answer, not the wait for a reconnection in progress.
        let outcome = match tokio::time::timeout(self.command_timeout, command).await {
            Ok(outcome) => outcome.map_err(classify),
            Err(_) => Err(StoreError::TimedOut(self.command_timeout.as_millis())),
        };
        let mut since = self.serving_since.lock();
        match &outcome {
            Err(error) if keeps_everyone_from_writing(error) => *since = None,
            _ => {
                since.get_or_insert_with(Instant::now);
            }
        }
        outcome
    }
}

fn open_client(url: &str, command_timeout: Duration) -> RedisResult<Client> {
    let info: ConnectionInfo = url.into_connection_info()?;
    let tcp = TcpSettings::default().set_nodelay(true);
    // A server that vanishes without closing the connection is given up as soon as it would be for silence;
    // the system's own default is a quarter of an hour.
    #[cfg(target_os = "linux")]
    let tcp = tcp.set_user_timeout(command_timeout);
    Client::open(info.set_tcp_settings(tcp))
}

fn classify(error: RedisError) -> StoreError {
    match error.kind() {
        _ if error.code() == Some("DAMAGED") => {
            StoreError::Damaged(error.detail().unwrap_or("no further detail").to_owned())
        }
        _ if error.is_timeout() => StoreError::Unreachable(error),
        ErrorKind::Io | ErrorKind::ClusterConnectionNotFound => StoreError::Unreachable(error),
        _ => StoreError::Refused(error),
    }
}

/// Whether this failure is one of the server, and not of the command: then others fail to renew too.
fn keeps_everyone_from_writing(error: &StoreError) -> bool {
    match error {
        StoreError::Unreachable(_) | StoreError::TimedOut(_) => true,
        StoreError::Refused(error) => matches!(
            error.code(),
            Some(
                "LOADING"
                    | "READONLY"
                    | "MASTERDOWN"
                    | "CLUSTERDOWN"
                    | "OOM"
                    | "MISCONF"
                    | "NOREPLICAS"
                    | "BUSY"
                    | "TRYAGAIN"
            )
        ),
        _ => false,
    }
}

fn is_function_missing(error: &StoreError) -> bool {
    matches!(error, StoreError::Refused(refusal)
        if refusal.detail().is_some_and(|detail| detail.contains("Function not found")))
}

/// An address as it may be shown: a password in it is replaced.
fn without_password(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme + 3 <= at => format!("{}://***{}", &url[..scheme], &url[at..]),
        _ => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_never_shown() {
        assert_eq!(without_password("redis://user:secret@host:1/0"), "redis://***@host:1/0");
        assert_eq!(without_password("unix:///run/v.sock"), "unix:///run/v.sock");
        let address = "http://user:secret@host";
        let error = open_client(address, Duration::from_secs(1))
            .map_err(|source| StoreError::Address { url: without_password(address), source })
            .unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}
