//! A closed-loop load generator for streamed chat completions: a fixed number of clients, each of which asks
//! again as soon as its answer has ended. Measures what a client sees: time to the first token, time between
//! chunks, tokens a second, errors.
//!
//! Token counts come from the server's usage, and every answer is made equally long by `ignore_eos`, so that
//! two servers do the same work. Prompts are drawn from a seed and never repeat, so that no prefix cache
//! helps. Only ever talks to this machine, and every run is bounded in requests and in time.
//!
//!     cargo run --release --example generate -- --url http://127.0.0.1:8080 --key-file .lightcone/dev-key

use std::{
    collections::BTreeMap,
    error::Error,
    fmt,
    path::PathBuf,
    rc::Rc,
    time::{Duration, Instant},
};

use clap::Parser;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::json;

#[derive(Parser)]
#[command(about = "Load generator for streamed chat completions on this machine")]
struct Arguments {
    /// Base URL without /v1; a loopback address.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// File that holds the API key; none for a server that wants none.
    #[arg(long)]
    key_file: Option<PathBuf>,
    #[arg(long, default_value = "tzafon.sm-1")]
    model: String,
    /// Clients that ask at the same time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    concurrency: u32,
    /// Measured requests in all.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// Requests before them that are not measured.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1_000))]
    warmup: u32,
    /// Words in a prompt; about as many tokens, and some 30 more of the chat template.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4_096))]
    prompt_words: u32,
    /// Output tokens of every answer.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4_096))]
    output_tokens: u32,
    /// Prompts are a function of it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A connection for every request, for servers that close theirs without saying so.
    #[arg(long)]
    connection_per_request: bool,
    /// No request starts after this time.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds_max: u64,
    /// JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// What one answered request looked like from outside.
struct Sample {
    ttft: Duration,
    /// Between one chunk with text and the next.
    gaps: Vec<Duration>,
    whole: Duration,
    prompt_tokens: u32,
    output_tokens: u32,
}

#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("connection: {0}")]
    Connection(#[from] reqwest::Error),
    #[error("status {0}")]
    Status(u16),
    #[error("error event in the stream")]
    ErrorEvent,
    #[error("malformed event: {0}")]
    Malformed(#[from] serde_json::Error),
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
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    // One thread is plenty, and leaves the cores to the server.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (report, as_json) = tokio::task::LocalSet::new().block_on(&runtime, run(arguments))?;
    match as_json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => print!("{report}"),
    }
    if report.requests == 0 {
        return Err("no request was answered".into());
    }
    Ok(())
}

async fn run(arguments: Arguments) -> Result<(Report, bool), Box<dyn Error>> {
    let client = Rc::new(Client::new(&arguments)?);
    drive(&client, &arguments, 0..arguments.warmup).await;
    let started = Instant::now();
    let first = arguments.warmup;
    let outcomes = drive(&client, &arguments, first..first + arguments.requests).await;
    Ok((Report::of(&arguments, started.elapsed(), outcomes), arguments.json))
}

/// Runs the numbered requests, `concurrency` at a time; each number has its own prompt.
async fn drive(
    client: &Rc<Client>,
    arguments: &Arguments,
    numbers: std::ops::Range<u32>,
) -> Vec<Result<Sample, Fault>> {
    let deadline = Instant::now() + Duration::from_secs(arguments.seconds_max);
    futures::stream::iter(numbers)
        .take_while(|_| std::future::ready(Instant::now() < deadline))
        .map(|number| {
            let client = client.clone();
            async move { client.ask(number, deadline + Duration::from_secs(60)).await }
        })
        .buffer_unordered(arguments.concurrency as usize)
        .collect()
        .await
}

// --- one request ----------------------------------------------------------------------------------

struct Client {
    http: reqwest::Client,
    url: String,
    key: Option<String>,
    model: String,
    prompt_words: u32,
    output_tokens: u32,
    seed: u64,
}

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
    completion_tokens: u32,
}

impl Client {
    fn new(arguments: &Arguments) -> Result<Self, Box<dyn Error>> {
        let url = reqwest::Url::parse(&arguments.url)?;
        let is_loopback = match url.host_str().map(|host| host.trim_matches(['[', ']'])) {
            Some("localhost") => true,
            Some(host) => host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback()),
            None => false,
        };
        if !is_loopback {
            return Err("only a server on this machine is put under load: the URL must name a loopback address".into());
        }
        let key = match &arguments.key_file {
            Some(file) => Some(std::fs::read_to_string(file)?.trim().to_owned()),
            None => None,
        };
        let connections_kept = if arguments.connection_per_request { 0 } else { usize::MAX };
        let http = reqwest::Client::builder().no_proxy().tcp_nodelay(true).pool_max_idle_per_host(connections_kept);
        Ok(Self {
            http: http.build()?,
            url: format!("{}/v1/chat/completions", arguments.url.trim_end_matches('/')),
            key,
            model: arguments.model.clone(),
            prompt_words: arguments.prompt_words,
            output_tokens: arguments.output_tokens,
            seed: arguments.seed,
        })
    }

    async fn ask(&self, number: u32, deadline: Instant) -> Result<Sample, Fault> {
        tokio::time::timeout_at(deadline.into(), self.stream(number)).await.map_err(|_| Fault::TimedOut)?
    }

    async fn stream(&self, number: u32) -> Result<Sample, Fault> {
        let body = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": prompt(self.seed, number, self.prompt_words)}],
            "stream": true,
            "stream_options": {"include_usage": true},
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": true,
            // llama-server's name for not reusing another request's prefix.
            "cache_prompt": false,
        });
        let mut request = self.http.post(&self.url).json(&body);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let started = Instant::now();
        let response = request.send().await?;
        if !response.status().is_success() {
            return Err(Fault::Status(response.status().as_u16()));
        }
        let mut reading = Reading::new(started);
        let mut bytes = response.bytes_stream();
        while let Some(piece) = bytes.next().await {
            reading.feed(&piece?)?;
        }
        reading.finish(self.output_tokens)
    }
}

/// Reads an event stream as it arrives and notes when text came.
struct Reading {
    started: Instant,
    buffer: Vec<u8>,
    first: Option<Instant>,
    last: Option<Instant>,
    gaps: Vec<Duration>,
    usage: Option<Usage>,
    is_done: bool,
}

impl Reading {
    fn new(started: Instant) -> Self {
        Self { started, buffer: Vec::new(), first: None, last: None, gaps: Vec::new(), usage: None, is_done: false }
    }

    fn feed(&mut self, piece: &[u8]) -> Result<(), Fault> {
        let now = Instant::now();
        self.buffer.extend_from_slice(piece);
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            if let Some(data) = line.trim_ascii_end().strip_prefix(b"data: ") {
                self.event(data, now)?;
            }
        }
        Ok(())
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
        self.usage = chunk.usage.or(self.usage.take());
        if chunk.choices.iter().any(|choice| choice.delta.content.as_deref().is_some_and(|text| !text.is_empty())) {
            self.first.get_or_insert(now);
            if let Some(last) = self.last.replace(now) {
                self.gaps.push(now - last);
            }
        }
        Ok(())
    }

    fn finish(self, asked: u32) -> Result<Sample, Fault> {
        if !self.is_done {
            return Err(Fault::Truncated);
        }
        let usage = self.usage.ok_or(Fault::NoUsage)?;
        if usage.completion_tokens != asked {
            return Err(Fault::WrongLength { got: usage.completion_tokens, asked });
        }
        Ok(Sample {
            ttft: self.first.ok_or(Fault::NoText)? - self.started,
            gaps: self.gaps,
            whole: self.started.elapsed(),
            prompt_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
        })
    }
}

// --- prompts --------------------------------------------------------------------------------------

#[rustfmt::skip]
const WORDS: [&str; 64] = [
    "river", "stone", "light", "house", "garden", "winter", "summer", "market", "bridge", "letter", "window", "music",
    "story", "friend", "island", "forest", "road", "ship", "water", "fire", "night", "morning", "child", "city",
    "field", "horse", "paper", "glass", "table", "silver", "golden", "small", "large", "quiet", "loud", "early",
    "late", "open", "closed", "under", "over", "near", "far", "with", "without", "before", "after", "found",
    "lost", "carried", "brought", "watched", "heard", "wrote", "painted", "crossed", "followed", "waited", "the", "a",
    "old", "new", "and", "then",
];

/// A story task that differs from the first word on, so that no two prompts share more than the template.
fn prompt(seed: u64, number: u32, words: u32) -> String {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(number).wrapping_mul(0xD1B5_4A32_D192_ED03);
    let mut text = format!("{number} {seed}:");
    for _ in 0..words {
        text.push(' ');
        text.push_str(WORDS[(split_mix(&mut state) % WORDS.len() as u64) as usize]);
    }
    text
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

// --- the report -----------------------------------------------------------------------------------

#[derive(Serialize)]
struct Report {
    concurrency: u32,
    seed: u64,
    requests: usize,
    errors: BTreeMap<String, usize>,
    seconds: f64,
    prompt_tokens: u64,
    output_tokens: u64,
    output_tokens_per_second: f64,
    requests_per_second: f64,
    ttft_ms: Spread,
    /// Between chunks; a server that puts several tokens into one chunk has fewer and longer ones.
    inter_chunk_ms: Spread,
    /// Of each request: from its first text to its end, over its tokens after the first.
    per_output_token_ms: Spread,
    request_ms: Spread,
}

#[derive(Serialize)]
struct Spread {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Spread {
    fn of(values: impl IntoIterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = values.into_iter().map(|value| value.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = ((ms.len() as f64 * share).ceil() as usize).clamp(1, ms.len().max(1)) - 1;
            ms.get(rank).copied().unwrap_or(f64::NAN)
        };
        let mean = ms.iter().sum::<f64>() / ms.len() as f64;
        Self { mean, p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

impl Report {
    fn of(arguments: &Arguments, elapsed: Duration, outcomes: Vec<Result<Sample, Fault>>) -> Self {
        let (mut samples, mut errors) = (Vec::new(), BTreeMap::new());
        for outcome in outcomes {
            match outcome {
                Ok(sample) => samples.push(sample),
                Err(fault) => *errors.entry(fault.to_string()).or_default() += 1,
            }
        }
        let seconds = elapsed.as_secs_f64();
        let output_tokens = samples.iter().map(|sample| u64::from(sample.output_tokens)).sum::<u64>();
        Self {
            concurrency: arguments.concurrency,
            seed: arguments.seed,
            requests: samples.len(),
            errors,
            seconds,
            prompt_tokens: samples.iter().map(|sample| u64::from(sample.prompt_tokens)).sum(),
            output_tokens,
            output_tokens_per_second: output_tokens as f64 / seconds,
            requests_per_second: samples.len() as f64 / seconds,
            ttft_ms: Spread::of(samples.iter().map(|sample| sample.ttft)),
            inter_chunk_ms: Spread::of(samples.iter().flat_map(|sample| sample.gaps.iter().copied())),
            per_output_token_ms: Spread::of(
                samples
                    .iter()
                    .filter(|sample| sample.output_tokens > 1)
                    .map(|sample| (sample.whole - sample.ttft) / (sample.output_tokens - 1)),
            ),
            request_ms: Spread::of(samples.iter().map(|sample| sample.whole)),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} requests at concurrency {} in {:.1} s: {} prompt and {} output tokens, {:.1} output tokens/s",
            self.requests,
            self.concurrency,
            self.seconds,
            self.prompt_tokens,
            self.output_tokens,
            self.output_tokens_per_second
        )?;
        writeln!(f, "{:<24}{:>9}{:>9}{:>9}{:>9}{:>9}", "ms", "mean", "p50", "p90", "p99", "max")?;
        for (name, spread) in [
            ("time to first token", &self.ttft_ms),
            ("between chunks", &self.inter_chunk_ms),
            ("per output token", &self.per_output_token_ms),
            ("whole request", &self.request_ms),
        ] {
            let Spread { mean, p50, p90, p99, max } = spread;
            writeln!(f, "{name:<24}{mean:>9.1}{p50:>9.1}{p90:>9.1}{p99:>9.1}{max:>9.1}")?;
        }
        for (fault, count) in &self.errors {
            writeln!(f, "{count} failed: {fault}")?;
        }
        Ok(())
    }
}
