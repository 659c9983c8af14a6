//! What money costs: admissions and settlements a second on one store, by how its append-only file is made durable,
//! and what a request costs the store in commands, CPU and bytes of memory and of file.
//!
//!     cargo run --release --example ledger -- --server PROGRAM [--seconds 5] [--callers 64] [--tenants 100]

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Parser;
use lightcone::{
    admission::{Admission, Ask, Principal, Scope},
    domain::{NanoUsd, Price, RequestId, Usage},
    ledger::{EndReason, Ledger, Settlement},
    operator::Accounts,
    store::{
        Store,
        embedded::{EmbeddedServer, Fsync},
    },
};

const LEASE: Duration = Duration::from_secs(600);
const PRICE: Price = Price::flat(NanoUsd::new(200), NanoUsd::new(300));

#[derive(Parser)]
struct Arguments {
    /// valkey-server or redis-server
    #[arg(long)]
    server: String,
    /// For each measurement
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Requests at the same time
    #[arg(long, default_value_t = 64)]
    callers: usize,
    #[arg(long, default_value_t = 100)]
    tenants: usize,
    /// Output tokens that a hold pays for; each request puts out 100
    #[arg(long, default_value_t = 256)]
    step: u32,
}

#[tokio::main]
async fn main() {
    let arguments = Arguments::parse();
    println!("{} callers, {} tenants, {} s each", arguments.callers, arguments.tenants, arguments.seconds);
    println!(
        "{:<12}{:>10}{:>10}{:>10}{:>12}{:>12}{:>12}{:>12}",
        "fsync", "pairs/s", "p50 ms", "p99 ms", "store us", "commands", "memory B", "file B"
    );
    // Interleaved, so that the machine's moods hit both.
    for _ in 0..3 {
        for (name, fsync) in [("everysec", Fsync::Everysec), ("always", Fsync::Always)] {
            let row = measure(&arguments, fsync).await;
            println!("{name:<12}{row}");
        }
    }
}

async fn measure(arguments: &Arguments, fsync: Fsync) -> String {
    let folder = std::env::temp_dir().join(format!("lightcone-ledger-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let server = EmbeddedServer::start(&folder, &arguments.server, fsync).expect("a store");
    let store = Store::connect(server.url(), Duration::from_secs(10)).await.expect("a connection");
    let ledger = Ledger::new(store.clone(), LEASE);
    let admission = Admission::new(store.clone(), LEASE).with_step(arguments.step);
    let accounts = Accounts::new(store, ledger.clone());
    let mut principals = Vec::new();
    for index in 0..arguments.tenants {
        let tenant = accounts.create_tenant(&format!("t{index}"), NanoUsd::new(1 << 60)).await.expect("a tenant").id;
        let key = accounts.create_key(&tenant, "key", [Scope::Chat].into_iter().collect()).await.expect("a key");
        principals.push(admission.authenticate(&key.secret).await.expect("a principal"));
    }
    let before = Figures::of(server.url(), &folder).await;
    let (pairs, mut times) = storm(arguments, &admission, &ledger, principals.into()).await;
    let after = Figures::of(server.url(), &folder).await;
    let report = ledger.verify().await.expect("a report");
    assert!(report.is_balanced(), "{report:?}");
    tokio::task::spawn_blocking(move || server.stop()).await.expect("stopped");
    std::fs::remove_dir_all(&folder).expect("the folder is ours");

    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e3;
    let each = |what: fn(&Figures) -> f64| (what(&after) - what(&before)) / pairs as f64;
    format!(
        "{:>10.0}{:>10.2}{:>10.2}{:>12.0}{:>12.1}{:>12.0}{:>12.0}",
        pairs as f64 / arguments.seconds as f64,
        at(0.5),
        at(0.99),
        each(|figures| figures.cpu_us),
        each(|figures| figures.commands),
        each(|figures| figures.memory),
        each(|figures| figures.file),
    )
}

async fn storm(
    arguments: &Arguments,
    admission: &Admission,
    ledger: &Ledger,
    principals: Arc<[Principal]>,
) -> (u64, Vec<Duration>) {
    let (running, pairs) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
    let callers = (0..arguments.callers).map(|caller| {
        let (admission, ledger, principals) = (admission.clone(), ledger.clone(), Arc::clone(&principals));
        let (running, pairs) = (Arc::clone(&running), Arc::clone(&pairs));
        tokio::spawn(async move {
            let (mut times, mut turn) = (Vec::new(), caller);
            while running.load(Ordering::Relaxed) {
                turn += 1;
                let begun = Instant::now();
                pair(&admission, &ledger, &principals[turn % principals.len()]).await;
                times.push(begun.elapsed());
                pairs.fetch_add(1, Ordering::Relaxed);
            }
            times
        })
    });
    let callers: Vec<_> = callers.collect();
    tokio::time::sleep(Duration::from_secs(arguments.seconds)).await;
    running.store(false, Ordering::Relaxed);
    let mut times = Vec::new();
    for caller in callers {
        times.extend(caller.await.expect("a caller"));
    }
    (pairs.load(Ordering::Relaxed), times)
}

/// One request's money, from its admission to its charge.
async fn pair(admission: &Admission, ledger: &Ledger, principal: &Principal) {
    let ask = Ask {
        request: RequestId::generate(),
        model: "tzafon.sm-1".into(),
        price: PRICE,
        price_version: "2026-11".to_owned(),
        prompt_tokens: 200,
        output_tokens_max: 4096,
        choices: 1,
    };
    let admitted = admission.admit(principal, ask).await.expect("admitted");
    let settlement = Settlement {
        request: admitted.request().clone(),
        tenant: admitted.tenant().clone(),
        key: admitted.key().clone(),
        model: admitted.model().clone(),
        usage: Usage { prompt_tokens: 200, completion_tokens: 100, cached_tokens: 0 },
        price: PRICE,
        price_version: "2026-11".to_owned(),
        reason: EndReason::Stop,
        digest: Some([7; 32]),
        attempt: 1,
    };
    ledger.settle(&settlement).await.expect("settled");
}

/// What the store has done and has.
struct Figures {
    cpu_us: f64,
    /// Those that functions issue, which are most of it.
    commands: f64,
    memory: f64,
    file: f64,
}

impl Figures {
    async fn of(url: &str, folder: &Path) -> Self {
        let client = redis::Client::open(url).expect("an address");
        let mut connection = client.get_multiplexed_async_connection().await.expect("a connection");
        let info: String = redis::cmd("INFO").arg("everything").query_async(&mut connection).await.expect("INFO");
        let number = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|text| text.trim().parse::<f64>().ok()).unwrap_or(0.0)
        };
        let calls = |line: &str| line.split("calls=").nth(1)?.split(',').next()?.parse::<f64>().ok();
        let commands = info.lines().filter(|line| line.starts_with("cmdstat_")).filter_map(calls).sum();
        Self {
            cpu_us: (number("used_cpu_user") + number("used_cpu_sys")) * 1e6,
            commands,
            memory: number("used_memory"),
            file: bytes_under(folder.to_owned()) as f64,
        }
    }
}

fn bytes_under(folder: PathBuf) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(of) if of.is_dir() => bytes_under(entry.path()),
        Ok(of) if of.is_file() => of.len(),
        _ => 0,
    });
    sizes.sum()
}
