//! What running streams notice when a long prompt arrives among them.
//!
//! So many clients stream answers without end. When each has had text for a while, a long prompt is sent, and
//! when its first token has come, the streams are left alone for a while again, and so on. A gap between two
//! chunks of a stream is disturbed when any part of it lies between a long prompt's sending and its first token,
//! and undisturbed when all of it lies in a quiet time; gaps at the edges of the run are neither.

use std::{
    cell::{Cell, RefCell},
    error::Error,
    ops::{ControlFlow, Range},
    rc::Rc,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::{
    client::{Client, Fault, GRACE},
    load::Outcome,
    report::Spread,
    timeline::{Gap, Timeline},
    workload::Prompts,
};

/// Chunks of every stream in a quiet time: of four streams in two such times, the 99th percentile is then not
/// the work of a dozen outliers.
const QUIET_CHUNKS: u32 = 256;
const POLL: Duration = Duration::from_millis(2);

pub struct Measured {
    /// The long prompts themselves.
    pub long: Vec<Outcome>,
    streams: Vec<Timeline>,
    /// From the first quiet time's start to the last one's end.
    run: Range<Instant>,
    disturbed: Vec<Range<Instant>>,
}

#[derive(Serialize)]
pub struct Disturbance {
    /// Between chunks of the streams, in ms.
    pub undisturbed_ms: Spread,
    pub disturbed_ms: Spread,
    /// The same for each token; they differ where a chunk carries several.
    pub undisturbed_per_token_ms: Spread,
    pub disturbed_per_token_ms: Spread,
    /// Disturbed over undisturbed, between chunks.
    pub p99_ratio: f64,
}

/// The streams' state as the conductor sees it.
struct Streams {
    chunks: RefCell<Vec<u32>>,
    stop: Cell<bool>,
    fault: Cell<Option<Fault>>,
}

pub async fn run(
    client: &Rc<Client>,
    prompts: &Rc<Prompts>,
    streams: u32,
    numbers: Range<u32>,
    limit: Duration,
    progress: &ProgressBar,
) -> Result<Measured, Box<dyn Error>> {
    let deadline = Instant::now() + limit + GRACE;
    let state = Rc::new(Streams {
        chunks: RefCell::new(vec![0; streams as usize]),
        stop: Cell::new(false),
        fault: Cell::new(None),
    });
    let mut clients = JoinSet::new();
    for stream in 0..streams {
        let (client, prompts, state) = (client.clone(), prompts.clone(), state.clone());
        // Numbers that neither the warm-up nor the long prompts have.
        let first = 1_000_000 * (stream + 1);
        clients.spawn_local(async move { keep_streaming(&client, &prompts, &state, stream, first, deadline).await });
    }

    quiet(&state, 1, deadline).await?;
    let start = Instant::now();
    let (mut long, mut disturbed) = (Vec::new(), Vec::new());
    for number in numbers {
        quiet(&state, QUIET_CHUNKS, deadline).await?;
        if Instant::now() > start + limit {
            break;
        }
        let sent = Instant::now();
        let outcome = client.ask(&prompts.disturbing(number), sent, deadline).await;
        let until = outcome.as_ref().ok().and_then(Timeline::ttft).map_or(Instant::now(), |ttft| sent + ttft);
        disturbed.push(sent..until);
        long.push(outcome);
        progress.inc(1);
    }
    quiet(&state, QUIET_CHUNKS, deadline).await?;
    state.stop.set(true);
    let run = start..Instant::now();

    let mut timelines = Vec::new();
    while let Some(ended) = clients.join_next().await {
        timelines.extend(ended.expect("a stream does not panic"));
    }
    Ok(Measured { long, streams: timelines, run, disturbed })
}

/// One stream after another until told to stop; a stream that ends is followed by the next.
async fn keep_streaming(
    client: &Client,
    prompts: &Prompts,
    state: &Streams,
    stream: u32,
    first: u32,
    deadline: Instant,
) -> Vec<Timeline> {
    let mut timelines = Vec::new();
    for number in first.. {
        let (ask, mut before) = (prompts.ask(number), 0);
        let seen = |arrivals: &[crate::timeline::Arrival]| {
            state.chunks.borrow_mut()[stream as usize] += (arrivals.len() - before) as u32;
            before = arrivals.len();
            if state.stop.get() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        match client.read(&ask, Instant::now(), deadline, seen).await {
            Ok(reading) => timelines.push(reading.into_part()),
            Err(fault) => {
                state.fault.set(Some(fault));
                break;
            }
        }
        if state.stop.get() {
            break;
        }
    }
    timelines
}

/// Until every stream has had so many chunks more.
async fn quiet(state: &Streams, chunks: u32, deadline: Instant) -> Result<(), Box<dyn Error>> {
    let goal: Vec<u32> = state.chunks.borrow().iter().map(|had| had + chunks).collect();
    while state.chunks.borrow().iter().zip(&goal).any(|(had, goal)| had < goal) {
        if let Some(fault) = state.fault.take() {
            return Err(format!("a running stream failed: {fault}").into());
        }
        if Instant::now() > deadline {
            return Err("the running streams did not get on within the limit".into());
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

impl Measured {
    pub fn summary(&self) -> Disturbance {
        let (mut disturbed, mut undisturbed) = (Vec::new(), Vec::new());
        for gap in self.streams.iter().flat_map(Timeline::gaps) {
            match place(&gap, &self.run, &self.disturbed) {
                Place::Disturbed => disturbed.push(gap),
                Place::Undisturbed => undisturbed.push(gap),
                Place::Outside => {}
            }
        }
        let lengths = |gaps: &[Gap]| Spread::of(gaps.iter().map(Gap::length));
        let per_token = |gaps: &[Gap]| Spread::of(gaps.iter().flat_map(Gap::per_token));
        let (disturbed_ms, undisturbed_ms) = (lengths(&disturbed), lengths(&undisturbed));
        Disturbance {
            p99_ratio: disturbed_ms.p99 / undisturbed_ms.p99,
            disturbed_ms,
            undisturbed_ms,
            undisturbed_per_token_ms: per_token(&undisturbed),
            disturbed_per_token_ms: per_token(&disturbed),
        }
    }
}

#[derive(PartialEq, Eq, Debug)]
enum Place {
    Undisturbed,
    Disturbed,
    Outside,
}

fn place(gap: &Gap, run: &Range<Instant>, disturbed: &[Range<Instant>]) -> Place {
    if disturbed.iter().any(|time| gap.from < time.end && gap.to > time.start) {
        Place::Disturbed
    } else if run.start <= gap.from && gap.to <= run.end {
        Place::Undisturbed
    } else {
        Place::Outside
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::tests::timeline;

    #[test]
    fn a_gap_belongs_where_any_part_of_it_was_disturbed() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let (run, disturbed) = (at(100)..at(1000), [at(300)..at(400), at(600)..at(700)]);
        let of = |from, to| place(&Gap { from: at(from), to: at(to), tokens: 1.0 }, &run, &disturbed);
        assert_eq!(of(100, 120), Place::Undisturbed);
        assert_eq!(of(290, 310), Place::Disturbed, "it was open when the prompt came");
        assert_eq!(of(250, 450), Place::Disturbed);
        assert_eq!(of(390, 410), Place::Disturbed);
        assert_eq!(of(400, 410), Place::Undisturbed);
        assert_eq!(of(699, 800), Place::Disturbed);
        assert_eq!(of(90, 110), Place::Outside);
        assert_eq!(of(990, 1001), Place::Outside);
    }

    #[test]
    fn the_summary_compares_disturbed_gaps_with_quiet_ones() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        // 10 ms a chunk, and 30 ms while the long prompt is computed.
        let chunks: Vec<_> = (0..10).map(|i| (i * 10, None)).chain((1..4).map(|i| (90 + i * 30, None))).collect();
        let measured = Measured {
            long: Vec::new(),
            streams: vec![timeline(start, &chunks, 13)],
            run: at(0)..at(180),
            disturbed: vec![at(90)..at(180); 1],
        };
        let summary = measured.summary();
        assert_eq!((summary.undisturbed_ms.count, summary.disturbed_ms.count), (9, 3));
        assert!((summary.p99_ratio - 3.0).abs() < 1e-9);
    }
}
