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
use crate::{
    domain::{EventBody, NodeId, RequestId, StoppedBy, TokenDetail, TokenEvent},
    queue::reply::Feedback,
};

/// No frame is larger; a peer that announces a larger one is cut.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Before the peer has proved the secret it may send this much.
const HANDSHAKE_BYTES_MAX: usize = 512;
/// A frame is closed when its events come to about this much.
const FRAME_BYTES_FULL: usize = FRAME_BYTES_MAX / 4;
const VERSION: u16 = 2;
/// What is longer travels in pieces.
const PIECE_BYTES_MAX: usize = FRAME_BYTES_MAX / 4;

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
    /// Requests and their attempts.
    Superseded(Vec<(RequestId, u32)>),
    /// Requests of which the last event has arrived.
    Heard(Vec<RequestId>),
    /// A piece of what the client of a request was told, of which there may be much. Pieces of one request come one
    /// behind the other.
    Resume {
        request: RequestId,
        attempt: u32,
        piece: Vec<u8>,
        is_last: bool,
    },
    Alive,
}

/// The frames that say it. Identifiers are 48 bytes each, so that those of one frame stay far below its limit.
pub fn say(feedback: Vec<Feedback>) -> Result<Vec<ToWorker>, RelayError> {
    let mut frames = Vec::new();
    for feedback in feedback {
        match (feedback, frames.last_mut()) {
            (Feedback::Cancel(request), Some(ToWorker::Cancel(requests))) if requests.len() < NAMES_PER_FRAME => {
                requests.push(request);
            }
            (Feedback::Cancel(request), _) => frames.push(ToWorker::Cancel(vec![request])),
            (Feedback::Heard(request), Some(ToWorker::Heard(requests))) if requests.len() < NAMES_PER_FRAME => {
                requests.push(request);
            }
            (Feedback::Heard(request), _) => frames.push(ToWorker::Heard(vec![request])),
            (Feedback::Superseded { request, attempt }, Some(ToWorker::Superseded(requests)))
                if requests.len() < NAMES_PER_FRAME =>
            {
                requests.push((request, attempt));
            }
            (Feedback::Superseded { request, attempt }, _) => {
                frames.push(ToWorker::Superseded(vec![(request, attempt)]));
            }
            (Feedback::Resume { request, attempt, told }, _) => {
                let told = postcard::to_stdvec(&told)?;
                let pieces = told.len().div_ceil(PIECE_BYTES_MAX);
                for (index, piece) in told.chunks(PIECE_BYTES_MAX).enumerate() {
                    let (request, piece, is_last) = (request.clone(), piece.to_vec(), index + 1 == pieces);
                    frames.push(ToWorker::Resume { request, attempt, piece, is_last });
                }
            }
        }
    }
    Ok(frames)
}

const NAMES_PER_FRAME: usize = 4096;
/// More is never told: choices times tokens of the longest answers, and then some.
const TOLD_BYTES_MAX: usize = 64 << 20;

/// Puts pieces together again.
#[derive(Default)]
pub struct Hearing {
    begun: Option<(RequestId, u32, Vec<u8>)>,
}

impl Hearing {
    pub fn hear(&mut self, frame: ToWorker) -> Result<Vec<Feedback>, RelayError> {
        Ok(match frame {
            ToWorker::Alive => Vec::new(),
            ToWorker::Cancel(requests) => requests.into_iter().map(Feedback::Cancel).collect(),
            ToWorker::Heard(requests) => requests.into_iter().map(Feedback::Heard).collect(),
            ToWorker::Superseded(requests) => {
                let superseded = |(request, attempt)| Feedback::Superseded { request, attempt };
                requests.into_iter().map(superseded).collect()
            }
            ToWorker::Resume { request, attempt, piece, is_last } => {
                let (of, by, mut told) = self.begun.take().unwrap_or_else(|| (request.clone(), attempt, Vec::new()));
                if (&of, by) != (&request, attempt) || told.len() + piece.len() > TOLD_BYTES_MAX {
                    return Err(RelayError::OutOfOrder);
                }
                told.extend(piece);
                if !is_last {
                    self.begun = Some((request, attempt, told));
                    return Ok(Vec::new());
                }
                vec![Feedback::Resume { request, attempt, told: postcard::from_bytes(&told)? }]
            }
        })
    }
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
            EventBody::Delta { text, ids, details, .. } => text.len() + 5 * ids.len() + told(details),
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
