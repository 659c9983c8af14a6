//! What the worker's journal costs: a step's progress, which every step of the engine pays, and settlements a second,
//! which the disk decides. Progress is measured alone and while others make the disk write, because it must not wait
//! for them.
//!
//!     cargo run --release --example journal [FOLDER]
//!
//! The folder (the system's temporary one where none is named) should be on the disk that the data folder is on.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use lightcone::{
    domain::{NanoUsd, NodeId, Price, RequestId, Usage},
    journal::{Begun, Ended, Journal},
};

const REQUESTS: usize = 32;
const PERIOD: Duration = Duration::from_secs(3);

fn main() {
    let parent = std::env::args().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = parent.join(format!("lightcone-journal-{}", std::process::id()));
    println!("{}", folder.display());
    measure(&folder);
    std::fs::remove_dir_all(&folder).expect("the folder is ours");
}

fn measure(folder: &std::path::Path) {
    let journal = Journal::open(folder, &NodeId::generate()).expect("the folder can be written");
    let requests: Vec<_> = (0..REQUESTS).map(|_| RequestId::generate()).collect();
    let mut begun = times(&requests, |request| journal.begin(&terms(request)).expect("is written"));
    println!("{:<44}{}", "begin, us", row(&mut begun));

    let step = |tokens: u32| requests.iter().map(|request| (request.clone(), tokens)).collect::<Vec<_>>();
    let mut tokens = 0;
    let mut progress = |steps: usize, pause: Duration| {
        let call = |_| {
            thread::sleep(pause);
            tokens += 1;
            let step = step(tokens);
            let started = Instant::now();
            journal.progress(&step).expect("is written");
            started.elapsed()
        };
        row(&mut (0..steps).map(call).collect::<Vec<_>>())
    };
    println!("{:<44}{}", format!("progress of {REQUESTS} requests, us"), progress(100_000, Duration::ZERO));

    for callers in [1, REQUESTS] {
        let (ended, syncs) = settle(&journal, &requests[..callers], || thread::sleep(PERIOD));
        println!("{:<44}{ended:>10.0} with {syncs:.0} syncs", format!("ended a second, {callers} callers"));
    }
    // As often as an engine makes steps, while the disk writes nearly always. Many callers are more than few cores serve.
    for callers in [1, REQUESTS] {
        let mut beside = String::new();
        settle(&journal, &requests[..callers], || beside = progress(500, Duration::from_millis(5)));
        println!("{:<44}{beside}", format!("the same beside {callers} callers of ended, us"));
    }

    let mut closed = times(&requests, |request| journal.closed(request).expect("is written"));
    println!("{:<44}{}", "closed, us", row(&mut closed));
}

/// Settlements and syncs a second of as many callers as there are requests, for as long as `meanwhile` takes.
fn settle(journal: &Journal, requests: &[RequestId], meanwhile: impl FnOnce()) -> (f64, f64) {
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let (started, syncs) = (Instant::now(), journal.syncs());
    let settle = |request: &RequestId| {
        let ended = settlement(request);
        while !stop.load(Ordering::Relaxed) {
            futures::executor::block_on(journal.ended(&ended)).expect("is on the disk");
            count.fetch_add(1, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        requests.iter().for_each(|request| drop(scope.spawn(move || settle(request))));
        meanwhile();
        stop.store(true, Ordering::Relaxed);
    });
    let seconds = started.elapsed().as_secs_f64();
    (count.into_inner() as f64 / seconds, (journal.syncs() - syncs) as f64 / seconds)
}

fn times(requests: &[RequestId], call: impl Fn(&RequestId)) -> Vec<Duration> {
    let time = |request| {
        let started = Instant::now();
        call(request);
        started.elapsed()
    };
    requests.iter().map(time).collect()
}

fn row(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e6;
    format!("{:>10.1} p50 {:>10.1} p99 {:>10.1} max", at(0.5), at(0.99), at(1.0))
}

fn terms(request: &RequestId) -> Begun {
    Begun {
        request: request.clone(),
        tenant: "ten_0198c0ffee0198c0ffee0198c0ffee01".into(),
        key: "key_0198c0ffee0198c0ffee0198c0ffee01".into(),
        model: "tzafon.sm-1".into(),
        price: Price { input: NanoUsd::new(200), output: NanoUsd::new(300) },
        price_version: "2026-01".to_owned(),
        prompt_tokens: 1000,
        attempt: 1,
        owner: NodeId::from("node_0198c0ffee0198c0ffee0198c0ffee01"),
    }
}

fn settlement(request: &RequestId) -> Ended {
    let usage = Usage { prompt_tokens: 1000, completion_tokens: 256, cached_tokens: 512 };
    Ended { request: request.clone(), usage, reason: "stop".to_owned(), digest: Some([7; 32]), unix_ms: 1 }
}
