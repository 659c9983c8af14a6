//! A load generator for streamed chat completions, and what a client sees under its load: time to the first
//! token, time between tokens, time of a whole answer, tokens a second, failures by kind.
//!
//! Closed loop (`--concurrency`): so many clients, each of which asks again as soon as its answer has ended.
//! Open loop (`--rate`): requests come by a clock, whatever the server does, and a request's times count from
//! when it was due, so that a server that falls behind cannot hide it. Prompts, arrivals and their order are
//! functions of the seed. Every answer is made equally long by `ignore_eos`, so that two servers do the same
//! work; token counts come from the server's usage. Only ever talks to this machine, and every run is bounded
//! in requests, in tokens and in time.
//!
//!     cargo run --release --example generate -- --url http://127.0.0.1:8080 --key-file .lightcone/dev-key
//!     … -- --rate 4 --requests 100                       Poisson arrivals, 4 a second
//!     … -- --workload disturb --concurrency 4            what a long prompt does to four running streams

mod client;
mod disturb;
mod load;
mod report;
mod timeline;
mod workload;

use std::{
    error::Error,
    io::Write,
    path::PathBuf,
    rc::Rc,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use client::Client;
use load::Load;
use report::{Environment, Report};
use workload::{Sizes, Workload};

/// A run holds the time of every chunk until it has ended.
const OUTPUT_TOKENS_MAX: u64 = 20_000_000;

#[derive(Parser)]
#[command(about = "Load generator for streamed chat completions on this machine")]
pub struct Arguments {
    /// Base URL without /v1; a loopback address.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// File that holds the API key; none for a server that wants none.
    #[arg(long)]
    key_file: Option<PathBuf>,
    #[arg(long, default_value = "tzafon.sm-1")]
    model: String,
    /// What is asked.
    #[arg(long, value_enum, default_value_t = Workload::Unique)]
    workload: Workload,
    /// Clients that ask at the same time; the running streams of `disturb`.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    concurrency: u32,
    /// Requests a second instead of a number of clients.
    #[arg(long, value_parser = positive_rate)]
    rate: Option<f64>,
    /// How requests at a rate come.
    #[arg(long, value_enum, default_value_t = Arrivals::Poisson)]
    arrivals: Arrivals,
    /// Requests at a rate that may be open at once; one that is due above it is not sent, and counted.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4_096))]
    open_max: u32,
    /// Measured requests in all; the long prompts of `disturb`.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// Requests before them that are not measured.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1_000))]
    warmup: u32,
    /// Words of what is a request's own; about as many tokens, and some 30 more of the chat template.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=30_000))]
    prompt_words: Option<u32>,
    /// Words of the prefix that `shared-prefix` requests share.
    #[arg(long, default_value_t = 460, value_parser = clap::value_parser!(u32).range(1..=30_000))]
    prefix_words: u32,
    /// Words of the long prompt of `disturb`.
    #[arg(long, default_value_t = 3_940, value_parser = clap::value_parser!(u32).range(1..=30_000))]
    disturbing_words: u32,
    /// Output tokens of every answer.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=30_000))]
    output_tokens: Option<u32>,
    /// Prompts and arrivals are functions of it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A connection for every request, for servers that close theirs without saying so.
    #[arg(long)]
    connection_per_request: bool,
    /// Asks for a token count in every chunk, of servers that know how (vLLM does).
    #[arg(long)]
    usage_in_chunks: bool,
    /// No request starts after this time, and a minute later all is over.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds_max: u64,
    /// JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arrivals {
    /// Each independent of the others.
    Poisson,
    /// Evenly spaced.
    Fixed,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    // One thread is plenty, and leaves the cores to the server.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = tokio::task::LocalSet::new().block_on(&runtime, run(&arguments))?;
    let mut out = std::io::stdout().lock();
    match arguments.json {
        true => writeln!(out, "{}", serde_json::to_string(&report)?)?,
        false => write!(out, "{report}")?,
    }
    if report.requests == 0 {
        return Err("no request was answered".into());
    }
    Ok(())
}

async fn run(arguments: &Arguments) -> Result<Report, Box<dyn Error>> {
    let sizes = sizes(arguments);
    let asked = u64::from(arguments.requests) * u64::from(sizes.output_tokens);
    if asked > OUTPUT_TOKENS_MAX {
        return Err(format!("{asked} output tokens in one run, at most {OUTPUT_TOKENS_MAX}").into());
    }
    let client = Client::new(&arguments.url, arguments.key_file.as_deref(), arguments.connection_per_request)?;
    let prompts = workload::Prompts::new(arguments.model.clone(), arguments.workload, arguments.seed, sizes)
        .with_usage_in_chunks(arguments.usage_in_chunks);
    let (client, prompts) = (Rc::new(client), Rc::new(prompts));

    let warm = Load::Closed { clients: arguments.concurrency };
    let limit = Duration::from_secs(arguments.seconds_max);
    load::drive(&client, &prompts, &warm, 0..arguments.warmup, limit, &ProgressBar::hidden()).await;

    let numbers = arguments.warmup..arguments.warmup + arguments.requests;
    let (progress, started) = (progress(u64::from(arguments.requests)), Instant::now());
    let mut report = if arguments.workload == Workload::Disturb {
        let measured = disturb::run(&client, &prompts, arguments.concurrency, numbers, limit, &progress).await?;
        let mut report = Report::of(started.elapsed(), &measured.long);
        report.disturbance = Some(measured.summary());
        report
    } else {
        let load = load(arguments);
        let outcomes = load::drive(&client, &prompts, &load, numbers, limit, &progress).await;
        Report::of(started.elapsed(), &outcomes)
    };
    progress.finish_and_clear();
    report.environment = Environment {
        workload: arguments.workload,
        concurrency: arguments.rate.is_none().then_some(arguments.concurrency),
        rate: arguments.rate,
        arrivals: arguments.rate.map(|_| arguments.arrivals),
        seed: arguments.seed,
    };
    Ok(report)
}

fn sizes(arguments: &Arguments) -> Sizes {
    let mut sizes = Sizes::of(arguments.workload);
    sizes.prompt_words = arguments.prompt_words.unwrap_or(sizes.prompt_words);
    sizes.output_tokens = arguments.output_tokens.unwrap_or(sizes.output_tokens);
    sizes.prefix_words = arguments.prefix_words;
    sizes.disturbing_words = arguments.disturbing_words;
    sizes
}

fn load(arguments: &Arguments) -> Load {
    match arguments.rate {
        None => Load::Closed { clients: arguments.concurrency },
        Some(rate) => Load::Open {
            due: load::schedule(arguments.arrivals, rate, arguments.requests, arguments.seed),
            open_max: arguments.open_max,
        },
    }
}

/// On the error stream, and only where somebody looks at it.
fn progress(steps: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}");
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
    style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
}

fn positive_rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match (0.001..=1_000.0).contains(&rate) {
        true => Ok(rate),
        false => Err("between 0.001 and 1000 a second".into()),
    }
}
