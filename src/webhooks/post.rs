//! One message, sent once.

use std::{
    fmt,
    net::SocketAddr,
    time::{Duration, Instant},
};

use ureq::{
    Agent,
    http::Uri,
    unversioned::{
        resolver::{ResolvedSocketAddrs, Resolver},
        transport::{DefaultConnector, NextTimeout},
    },
};

use super::{Secret, Target, event::Message};

const USER_AGENT: &str = concat!("lightcone-webhooks/", env!("CARGO_PKG_VERSION"));
const ANSWER_HEADER_BYTES_MAX: usize = 16 << 10;
/// What the client is given beyond its own limit before it is left to itself.
const GRACE: Duration = Duration::from_secs(1);
/// As many as the client takes.
const ADDRESSES_MAX: usize = 16;

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With one of 2xx.
    Accepted(u16),
    Failed(String),
}

/// Sends messages to endpoints.
#[derive(Clone, Debug)]
pub struct Postman {
    allow_private: bool,
    timeout: Duration,
}

impl Postman {
    pub fn new(allow_private: bool, timeout: Duration) -> Self {
        Self { allow_private, timeout }
    }

    /// Signed with each of `secrets`. Ends within the time limit.
    pub(super) async fn send(&self, url: &str, secrets: &[Secret], now_unix_ms: u64, message: &Message) -> Outcome {
        let begun = Instant::now();
        let sent = async {
            // Judged again: it may have been allowed by another node's configuration.
            let target = Target::parse(url, self.allow_private).map_err(|error| error.to_string())?;
            let addresses = look_up(&target).await?;
            let now = now_unix_ms / 1000;
            let signatures: Vec<_> =
                secrets.iter().map(|secret| secret.sign(&message.id, now, &message.body)).collect();
            let letter = Letter {
                uri: target.uri,
                addresses,
                id: message.id.clone(),
                now,
                signatures: signatures.join(" "),
                body: message.body.clone(),
                time: self.timeout.saturating_sub(begun.elapsed()),
            };
            tokio::task::spawn_blocking(move || letter.post()).await.map_err(|error| error.to_string())?
        };
        // A thread that hangs is not waited for: the client has its own limit, this one is for the look-up.
        match tokio::time::timeout(self.timeout + GRACE, sent).await {
            Ok(Ok(status)) if (200..300).contains(&status) => Outcome::Accepted(status),
            Ok(Ok(status)) => Outcome::Failed(format!("answered {status}")),
            Ok(Err(why)) => Outcome::Failed(why),
            Err(_) => Outcome::Failed(format!("no answer within {} ms", self.timeout.as_millis())),
        }
    }
}

/// The addresses that may be connected to. They are handed to the client, so that what was judged is what is used.
async fn look_up(target: &Target) -> Result<Vec<SocketAddr>, String> {
    let found = tokio::net::lookup_host((target.host(), target.port())).await;
    let found = found.map_err(|error| format!("cannot look up {}: {error}", target.host()))?;
    let mut addresses = target.permitted(found).map_err(|error| error.to_string())?;
    addresses.truncate(ADDRESSES_MAX);
    if addresses.is_empty() {
        return Err(format!("{} has no address", target.host()));
    }
    Ok(addresses)
}

struct Letter {
    uri: Uri,
    addresses: Vec<SocketAddr>,
    id: String,
    now: u64,
    signatures: String,
    body: String,
    time: Duration,
}

impl Letter {
    /// Blocks. Answers the status; what comes after it is not read.
    fn post(self) -> Result<u16, String> {
        let config = Agent::config_builder()
            .timeout_global(Some(self.time))
            .max_redirects(0)
            .http_status_as_error(false)
            // A proxy would look the address up by itself.
            .proxy(None)
            .max_idle_connections(0)
            .max_response_header_size(ANSWER_HEADER_BYTES_MAX)
            .user_agent(USER_AGENT)
            .build();
        let agent = Agent::with_parts(config, DefaultConnector::default(), Known(self.addresses));
        let request = agent
            .post(self.uri)
            .header("content-type", "application/json")
            .header("webhook-id", &self.id)
            .header("webhook-timestamp", self.now.to_string())
            .header("webhook-signature", &self.signatures);
        let answer = request.send(&self.body).map_err(|error| error.to_string())?;
        Ok(answer.status().as_u16())
    }
}

/// Looks nothing up.
struct Known(Vec<SocketAddr>);

impl Resolver for Known {
    fn resolve(&self, _: &Uri, _: &ureq::config::Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut addresses = self.empty();
        self.0.iter().for_each(|address| addresses.push(*address));
        Ok(addresses)
    }
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.0).finish()
    }
}
