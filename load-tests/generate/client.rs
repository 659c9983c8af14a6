//! One request and its event stream. Speaks only to this machine.

use std::{
    error::Error,
    ops::ControlFlow,
    path::Path,
    time::{Duration, Instant},
};

use futures::StreamExt;
use serde::Deserialize;

use crate::{
    timeline::{Arrival, Timeline, Tokens},
    workload::Ask,
};

/// An event longer than this is not one of a chat completion.
const LINE_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("connection: {0}")]
    Connection(#[from] reqwest::Error),
    #[error("status {0}")]
    Status(u16),
    #[error("error event in the stream")]
    ErrorEvent,
    #[error("malformed event: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("event of more than {LINE_BYTES_MAX} bytes")]
    EventTooLong,
    #[error("the stream ended without [DONE]")]
    Truncated,
    #[error("no usage in the stream")]
    NoUsage,
    #[error("no text in the stream")]
    NoText,
    #[error("{got} output tokens instead of {asked}")]
    WrongLength { got: u32, asked: u32 },
    #[error("no answer within the limit")]
    TimedOut,
    #[error("not sent: as many requests were open as may be")]
    NotSent,
}

impl Fault {
    /// Under which failures are counted: few, whatever the server says.
    pub fn kind(&self) -> String {
        match self {
            Self::Connection(_) => "connection".into(),
            Self::Status(status) => format!("status {status}"),
            Self::ErrorEvent => "error event".into(),
            Self::Malformed(_) | Self::EventTooLong => "malformed event".into(),
            Self::Truncated => "truncated stream".into(),
            Self::NoUsage => "no usage".into(),
            Self::NoText => "no text".into(),
            Self::WrongLength { .. } => "wrong length".into(),
            Self::TimedOut => "timed out".into(),
            Self::NotSent => "not sent".into(),
        }
    }
}

pub struct Client {
    http: reqwest::Client,
    url: String,
    key: Option<String>,
}

impl Client {
    pub fn new(base: &str, key_file: Option<&Path>, connection_per_request: bool) -> Result<Self, Box<dyn Error>> {
        if !is_loopback(&reqwest::Url::parse(base)?) {
            return Err("only a server on this machine is put under load: the URL must name a loopback address".into());
        }
        let key = match key_file {
            Some(file) => Some(std::fs::read_to_string(file)?.trim().to_owned()),
            None => None,
        };
        let connections_kept = if connection_per_request { 0 } else { usize::MAX };
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .tcp_nodelay(true)
            .pool_max_idle_per_host(connections_kept);
        Ok(Self { http: http.build()?, url: format!("{}/v1/chat/completions", base.trim_end_matches('/')), key })
    }

    /// Asks, and reads to the end; times count from `due`.
    pub async fn ask(&self, ask: &Ask, due: Instant, deadline: Instant) -> Result<Timeline, Fault> {
        let reading = self.read(ask, due, deadline, |_| ControlFlow::Continue(())).await?;
        reading.finish(ask.output_tokens)
    }

    /// Asks, and reads until the stream's end or until `seen`, called at every chunk with text, has had enough.
    /// What was read then is all that is known: a stream that is broken off has no usage.
    pub async fn read(
        &self,
        ask: &Ask,
        due: Instant,
        deadline: Instant,
        seen: impl FnMut(&[Arrival]) -> ControlFlow<()>,
    ) -> Result<Reading, Fault> {
        tokio::time::timeout_at(deadline.into(), self.stream(ask, due, seen)).await.map_err(|_| Fault::TimedOut)?
    }

    async fn stream(
        &self,
        ask: &Ask,
        due: Instant,
        mut seen: impl FnMut(&[Arrival]) -> ControlFlow<()>,
    ) -> Result<Reading, Fault> {
        let mut request = self.http.post(&self.url).json(&ask.body);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await?;
        if !response.status().is_success() {
            return Err(Fault::Status(response.status().as_u16()));
        }
        let mut reading = Reading::new(due);
        let mut bytes = response.bytes_stream();
        while let Some(piece) = bytes.next().await {
            let before = reading.arrivals.len();
            reading.feed(&piece?, Instant::now())?;
            if reading.arrivals.len() > before && seen(&reading.arrivals).is_break() {
                break;
            }
        }
        Ok(reading)
    }
}

fn is_loopback(url: &reqwest::Url) -> bool {
    match url.host_str().map(|host| host.trim_matches(['[', ']'])) {
        Some("localhost") => true,
        Some(host) => host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback()),
        None => false,
    }
}

// --- the event stream -------------------------------------------------------------------------------

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Delta,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: u32,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u32>,
}

/// Reads an event stream as it arrives and notes when text came.
pub struct Reading {
    due: Instant,
    last: Instant,
    buffer: Vec<u8>,
    arrivals: Vec<Arrival>,
    usage: Option<Usage>,
    is_done: bool,
}

impl Reading {
    fn new(due: Instant) -> Self {
        Self { due, last: due, buffer: Vec::new(), arrivals: Vec::new(), usage: None, is_done: false }
    }

    fn feed(&mut self, piece: &[u8], now: Instant) -> Result<(), Fault> {
        self.last = now;
        self.buffer.extend_from_slice(piece);
        let mut rest = 0;
        while let Some(end) = self.buffer[rest..].iter().position(|byte| *byte == b'\n') {
            let line = self.buffer[rest..rest + end].to_vec();
            rest += end + 1;
            if let Some(data) = line.trim_ascii_end().strip_prefix(b"data: ") {
                self.event(data, now)?;
            }
        }
        self.buffer.drain(..rest);
        if self.buffer.len() > LINE_BYTES_MAX { Err(Fault::EventTooLong) } else { Ok(()) }
    }

    fn event(&mut self, data: &[u8], now: Instant) -> Result<(), Fault> {
        if data == b"[DONE]" {
            self.is_done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(data)?;
        if chunk.error.is_some() {
            return Err(Fault::ErrorEvent);
        }
        let tokens_so_far = chunk.usage.as_ref().map(|usage| usage.completion_tokens);
        self.usage = chunk.usage.or(self.usage.take());
        if chunk.choices.iter().any(|choice| choice.delta.content.as_deref().is_some_and(|text| !text.is_empty())) {
            self.arrivals.push(Arrival { at: now, tokens_so_far });
        }
        Ok(())
    }

    pub fn finish(self, asked: u32) -> Result<Timeline, Fault> {
        if !self.is_done {
            return Err(Fault::Truncated);
        }
        let usage = self.usage.ok_or(Fault::NoUsage)?;
        if usage.completion_tokens != asked {
            return Err(Fault::WrongLength { got: usage.completion_tokens, asked });
        }
        if self.arrivals.is_empty() {
            return Err(Fault::NoText);
        }
        let cached = usage.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or(0);
        let usage = Tokens { prompt: usage.prompt_tokens, cached, output: usage.completion_tokens };
        Ok(Timeline { asked: self.due, arrivals: self.arrivals, ended: self.last, usage })
    }

    /// Of a stream that was broken off on purpose; a chunk without a count is taken as one token.
    pub fn into_part(self) -> Timeline {
        let counted = self.arrivals.last().and_then(|arrival| arrival.tokens_so_far);
        let output = counted.unwrap_or(self.arrivals.len() as u32);
        let prompt = self.usage.map_or(0, |usage| usage.prompt_tokens);
        let usage = Tokens { prompt, cached: 0, output };
        Timeline { asked: self.due, arrivals: self.arrivals, ended: self.last, usage }
    }
}

/// How long after the last start a run waits for answers.
pub const GRACE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn text(content: &str, usage: &str) -> String {
        format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{content}\"}}}}],\"usage\":{usage}}}\n\n")
    }

    const LAST: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":3,\
                        \"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\ndata: [DONE]\n\n";

    fn read(stream: &str, piece_bytes: usize) -> Result<Timeline, Fault> {
        let start = Instant::now();
        let mut reading = Reading::new(start);
        for (number, piece) in stream.as_bytes().chunks(piece_bytes).enumerate() {
            reading.feed(piece, start + Duration::from_millis(number as u64 + 1))?;
        }
        reading.finish(3)
    }

    #[test]
    fn a_stream_is_read_the_same_however_it_is_cut() {
        let stream = [&text("", "null"), &text("a", "null"), ": ping\r\n\r\n", &text("b", "null"), LAST].concat();
        for piece_bytes in [1, 7, 64, stream.len()] {
            let answer = read(&stream, piece_bytes).expect("is whole");
            assert_eq!(answer.arrivals.len(), 2, "a chunk without text is none");
            assert_eq!((answer.usage.prompt, answer.usage.cached, answer.usage.output), (9, 4, 3));
            assert!(!answer.is_counted());
        }
        let at_once = read(&stream, stream.len()).expect("is whole");
        assert_eq!(at_once.ttft(), Some(Duration::from_millis(1)));
    }

    #[test]
    fn running_totals_are_kept_with_their_chunks() {
        let usage = |tokens: u32| format!("{{\"prompt_tokens\":9,\"completion_tokens\":{tokens}}}");
        let stream = [&text("a", &usage(1)), &text("bc", &usage(3)), LAST].concat();
        let answer = read(&stream, stream.len()).expect("is whole");
        let totals: Vec<_> = answer.arrivals.iter().map(|arrival| arrival.tokens_so_far).collect();
        assert_eq!(totals, [Some(1), Some(3)]);
        assert!(answer.is_counted());
    }

    #[test]
    fn a_stream_that_is_not_an_answer_is_a_fault_of_its_kind() {
        let whole = [&text("a", "null"), LAST].concat();
        let cases = [
            (whole.replace("data: [DONE]", ""), "truncated stream"),
            (whole.replace("\"completion_tokens\":3", "\"completion_tokens\":2"), "wrong length"),
            (LAST.to_owned(), "no text"),
            ([&text("a", "null"), "data: [DONE]\n\n"].concat(), "no usage"),
            ("data: {\"error\":{\"message\":\"no\"}}\n\n".to_owned(), "error event"),
            ("data: {\n\n".to_owned(), "malformed event"),
            ("x".repeat(LINE_BYTES_MAX + 1), "malformed event"),
        ];
        for (stream, kind) in cases {
            assert_eq!(read(&stream, 4096).map(|_| ()).map_err(|fault| fault.kind()), Err(kind.to_owned()));
        }
    }

    #[test]
    fn only_loopback_addresses_are_put_under_load() {
        let is_taken = |url: &str| Client::new(url, None, false).is_ok();
        for url in ["http://127.0.0.1:8080", "http://127.9.9.9", "http://[::1]:1", "http://localhost:8080/"] {
            assert!(is_taken(url), "{url}");
        }
        for url in ["http://10.0.0.1", "http://192.168.1.1:80", "http://example.test", "http://localhost.example.test"]
        {
            assert!(!is_taken(url), "{url}");
        }
    }
}
