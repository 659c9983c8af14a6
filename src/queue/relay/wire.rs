//! Frames and the handshake.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use hmac::{Hmac, KeyInit, Mac};
use rand::Rng;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use tokio::net::TcpStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::{Pace, RelayError};
use crate::domain::{EventBody, NodeId, RequestId, StoppedBy, TokenDetail, TokenEvent};

/// No frame is larger; a peer that announces a larger one is cut.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Before the peer has proved the secret it may send this much.
const HANDSHAKE_BYTES_MAX: usize = 512;
/// A frame is closed when its events come to about this much.
const FRAME_BYTES_FULL: usize = FRAME_BYTES_MAX / 4;
const VERSION: u16 = 1;

pub type Wire = Framed<TcpStream, LengthDelimitedCodec>;

/// The cluster's shared secret. Never shown.
#[derive(Clone)]
pub struct Secret(Arc<str>);

impl Secret {
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// Each side proves the secret over both nonces and both names, under a label of its own, so that
    /// an answer can neither be replayed nor reflected.
    fn proof(&self, side: &str, hello: &Hello, nonce: &[u8; 32], worker: &NodeId) -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.0.as_bytes()).expect("HMAC takes keys of any length");
        for part in [
            &b"lightcone relay"[..],
            &VERSION.to_be_bytes(),
            side.as_bytes(),
            &hello.nonce,
            nonce,
            hello.node.as_str().as_bytes(),
            b"\0",
            worker.as_str().as_bytes(),
        ] {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// First from the edge.
#[derive(Serialize, Deserialize)]
struct Hello {
    version: u16,
    node: NodeId,
    nonce: [u8; 32],
}

/// Then from the worker.
#[derive(Serialize, Deserialize)]
struct Answer {
    node: NodeId,
    nonce: [u8; 32],
    proof: [u8; 32],
}

/// Then from the edge; `None` where it does not believe the worker.
#[derive(Serialize, Deserialize)]
struct Welcome {
    proof: Option<[u8; 32]>,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum ToEdge {
    Events(Vec<TokenEvent>),
    Alive,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum ToWorker {
    Cancel(Vec<RequestId>),
    Alive,
}

/// The edge's side of the handshake; answers with the worker's name.
pub async fn greet(
    stream: TcpStream,
    edge: &NodeId,
    secret: &Secret,
    pace: Pace,
) -> Result<(Wire, NodeId), RelayError> {
    within(pace.handshake_max, async {
        let mut wire = framed(stream)?;
        let hello = Hello { version: VERSION, node: edge.clone(), nonce: nonce() };
        send(&mut wire, &hello).await?;
        let answer: Answer = receive(&mut wire).await?;
        let expected = secret.proof("worker", &hello, &answer.nonce, &answer.node);
        if !bool::from(expected.ct_eq(&answer.proof)) {
            send(&mut wire, &Welcome { proof: None }).await?;
            return Err(RelayError::WrongSecret);
        }
        let proof = secret.proof("edge", &hello, &answer.nonce, &answer.node);
        send(&mut wire, &Welcome { proof: Some(proof) }).await?;
        wire.codec_mut().set_max_frame_length(FRAME_BYTES_MAX);
        Ok((wire, answer.node))
    })
    .await
}

/// The worker's side of the handshake.
pub async fn introduce(
    stream: TcpStream,
    worker: &NodeId,
    wanted: &NodeId,
    secret: &Secret,
) -> Result<Wire, RelayError> {
    let mut wire = framed(stream)?;
    let hello: Hello = receive(&mut wire).await?;
    if hello.version != VERSION {
        return Err(RelayError::Version { ours: VERSION, theirs: hello.version });
    }
    if hello.node != *wanted {
        return Err(RelayError::WrongNode { wanted: wanted.clone(), found: hello.node });
    }
    let nonce = nonce();
    let proof = secret.proof("worker", &hello, &nonce, worker);
    send(&mut wire, &Answer { node: worker.clone(), nonce, proof }).await?;
    let welcome: Welcome = receive(&mut wire).await?;
    let expected = secret.proof("edge", &hello, &nonce, worker);
    if !welcome.proof.is_some_and(|proof| bool::from(expected.ct_eq(&proof))) {
        return Err(RelayError::WrongSecret);
    }
    wire.codec_mut().set_max_frame_length(FRAME_BYTES_MAX);
    Ok(wire)
}

fn framed(stream: TcpStream) -> Result<Wire, RelayError> {
    stream.set_nodelay(true)?;
    Ok(LengthDelimitedCodec::builder().max_frame_length(HANDSHAKE_BYTES_MAX).new_framed(stream))
}

fn nonce() -> [u8; 32] {
    let mut nonce = [0; 32];
    rand::rng().fill_bytes(&mut nonce);
    nonce
}

async fn send<T: Serialize>(wire: &mut Wire, message: &T) -> Result<(), RelayError> {
    Ok(wire.send(encode(message)?).await?)
}

async fn receive<T: DeserializeOwned>(wire: &mut Wire) -> Result<T, RelayError> {
    decode(&wire.next().await.ok_or(RelayError::Closed)??)
}

pub fn encode<T: Serialize>(message: &T) -> Result<Bytes, RelayError> {
    let bytes = postcard::to_stdvec(message)?;
    if bytes.len() > FRAME_BYTES_MAX {
        return Err(RelayError::TooLarge(bytes.len()));
    }
    Ok(bytes.into())
}

pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RelayError> {
    Ok(postcard::from_bytes(bytes)?)
}

pub async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, RelayError>>) -> Result<T, RelayError> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(RelayError::Silent))
}

/// How many of `events`, from the front, belong into one frame.
pub fn frame_length(events: &[TokenEvent]) -> usize {
    let mut bytes = 0;
    for (index, event) in events.iter().enumerate() {
        // A token and its logprob take at most so many bytes.
        let told = |tokens: &[TokenDetail]| tokens.iter().map(|detail| 16 + 9 * detail.top.len()).sum::<usize>();
        let told = match &event.body {
            EventBody::Delta { text, details, .. } => text.len() + told(details),
            EventBody::Prompt { tokens } => told(tokens),
            EventBody::ChoiceEnded { stopped_by: Some(StoppedBy::Text(text)), .. }
            | EventBody::Failed { message: text, .. } => text.len(),
            EventBody::Accepted | EventBody::ChoiceEnded { .. } | EventBody::Finished { .. } => 0,
        };
        bytes += event.request.as_str().len() + told + 32;
        if bytes > FRAME_BYTES_FULL {
            return index.max(1);
        }
    }
    events.len()
}
