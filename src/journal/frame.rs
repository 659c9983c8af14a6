//! Records as bytes, and back.
//!
//! A file begins with magic, version and their checksum. A frame is the length of its payload, a checksum of length and
//! payload, and the payload; numbers are little-endian.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Begun, Ended};

pub const HEADER_BYTES: usize = 16;
const MAGIC: &[u8; 8] = b"lcjournl";
/// A change of [`Record`], or of anything that it is made of, needs the next number.
const VERSION: u32 = 1;
const FRAME_HEAD_BYTES: usize = 8;
const PAYLOAD_BYTES_MAX: usize = 64 << 10;
/// Requests in one record of progress, so that the longest fits a frame.
pub const PROGRESS_MAX: usize = 4096;

/// `index` is a request's number in the journal of its process, from 0 on, never given twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    Begun {
        index: u64,
        begun: Begun,
    },
    /// Completion tokens so far of each.
    Progress(Vec<(u64, u32)>),
    Ended {
        index: u64,
        ended: Ended,
    },
    Closed {
        index: u64,
    },
}

/// What is wrong with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    Header,
    /// No frame is that long.
    Length(u32),
    /// The file goes on, but not where this frame says.
    Cut,
    Checksum,
    /// The bytes are those that were written, but they are no record.
    Unreadable,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("the header is not that of a journal"),
            Self::Length(bytes) => write!(f, "a frame of {bytes} bytes"),
            Self::Cut => f.write_str("a frame is cut off, and others follow"),
            Self::Checksum => f.write_str("the checksum of a frame does not match"),
            Self::Unreadable => f.write_str("a frame is not a record"),
        }
    }
}

impl Damage {
    /// Whether a write that did not come to its end looks like this.
    fn may_be_torn(self) -> bool {
        matches!(self, Self::Cut | Self::Checksum)
    }
}

/// What reading came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// All of it up to here; what is behind was never written to its end.
    Sound { whole_bytes: usize },
    /// The first fault. What could be read before and behind it was given out.
    Damaged { offset: usize, damage: Damage },
    /// Of a version that is not ours to read.
    UnknownVersion(u32),
}

pub fn header() -> [u8; HEADER_BYTES] {
    header_of(VERSION)
}

fn header_of(version: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&version.to_le_bytes());
    let checksum = crc32fast::hash(&header[..12]);
    header[12..].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// Appends one frame. The error is the length of a payload that is too long; nothing is appended then.
pub fn push(frames: &mut Vec<u8>, record: &Record) -> Result<(), usize> {
    let at = frames.len();
    frames.extend([0; FRAME_HEAD_BYTES]);
    postcard::to_io(record, &mut *frames).expect("a record is plain data, and memory takes all of it");
    let payload = frames.len() - at - FRAME_HEAD_BYTES;
    if payload > PAYLOAD_BYTES_MAX {
        frames.truncate(at);
        return Err(payload);
    }
    let length = (payload as u32).to_le_bytes();
    let checksum = checksum(length, &frames[at + FRAME_HEAD_BYTES..]).to_le_bytes();
    frames[at..at + 4].copy_from_slice(&length);
    frames[at + 4..at + 8].copy_from_slice(&checksum);
    Ok(())
}

/// Gives out every record of a file in order.
///
/// Behind a fault it goes on at the next frame that is whole, so that a request whose end can still be read is not
/// taken for unfinished. A fault behind which there is no whole frame is a torn tail.
pub fn read(bytes: &[u8], mut record: impl FnMut(Record)) -> Reading {
    if bytes.len() < HEADER_BYTES || bytes.iter().all(|byte| *byte == 0) {
        return Reading::Sound { whole_bytes: 0 };
    }
    let mut first_fault = match version(bytes) {
        Some(VERSION) => None,
        Some(version) => return Reading::UnknownVersion(version),
        None => Some((0, Damage::Header)),
    };
    let mut at = HEADER_BYTES;
    while at < bytes.len() {
        let (damage, behind) = match frame(&bytes[at..]) {
            Ok((payload, size)) => match decode(payload) {
                Some(read) => {
                    record(read);
                    at += size;
                    continue;
                }
                None => (Damage::Unreadable, at + size),
            },
            Err(damage) => (damage, at + 1),
        };
        let next = next_frame(bytes, behind);
        if next.is_none() && damage.may_be_torn() {
            break;
        }
        first_fault.get_or_insert((at, damage));
        let Some(next) = next else { break };
        at = next;
    }
    match first_fault {
        Some((offset, damage)) => Reading::Damaged { offset, damage },
        None => Reading::Sound { whole_bytes: at },
    }
}

fn version(bytes: &[u8]) -> Option<u32> {
    let version = number(&bytes[8..]);
    (bytes[..HEADER_BYTES] == header_of(version)).then_some(version)
}

/// Where the next whole frame begins. Few places have the length of a frame, so that few checksums are made.
fn next_frame(bytes: &[u8], from: usize) -> Option<usize> {
    (from..bytes.len()).find(|at| frame(&bytes[*at..]).is_ok_and(|(payload, _)| decode(payload).is_some()))
}

/// The payload that begins here, and the length of its frame.
fn frame(bytes: &[u8]) -> Result<(&[u8], usize), Damage> {
    if bytes.len() < FRAME_HEAD_BYTES {
        return Err(Damage::Cut);
    }
    let length = number(bytes);
    let payload = length as usize;
    if payload > PAYLOAD_BYTES_MAX {
        return Err(Damage::Length(length));
    }
    let Some(payload) = bytes[FRAME_HEAD_BYTES..].get(..payload) else { return Err(Damage::Cut) };
    if checksum(length.to_le_bytes(), payload) != number(&bytes[4..]) {
        return Err(Damage::Checksum);
    }
    Ok((payload, FRAME_HEAD_BYTES + payload.len()))
}

fn decode(payload: &[u8]) -> Option<Record> {
    postcard::take_from_bytes(payload).ok().filter(|(_, rest)| rest.is_empty()).map(|(record, _)| record)
}

fn checksum(length: [u8; 4], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length);
    hasher.update(payload);
    hasher.finalize()
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
