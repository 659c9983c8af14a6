//! When requests are sent: by clients that wait for their answers, or by a clock that waits for nobody.

use std::{
    ops::Range,
    rc::Rc,
    time::{Duration, Instant},
};

use futures::{FutureExt, StreamExt};
use indicatif::ProgressBar;
use tokio::task::JoinSet;

use crate::{
    Arrivals,
    client::{Client, Fault, GRACE},
    timeline::Timeline,
    workload::{Prompts, Random},
};

pub enum Load {
    Closed { clients: u32 },
    Open { due: Vec<Duration>, open_max: u32 },
}

pub type Outcome = Result<Timeline, Fault>;

/// Runs the numbered requests; each number has its own prompt. None starts after `limit`.
pub async fn drive(
    client: &Rc<Client>,
    prompts: &Rc<Prompts>,
    load: &Load,
    numbers: Range<u32>,
    limit: Duration,
    progress: &ProgressBar,
) -> Vec<Outcome> {
    let started = Instant::now();
    match load {
        Load::Closed { clients } => closed(client, prompts, *clients, numbers, started + limit, progress).await,
        Load::Open { due, open_max } => {
            let due = due.iter().take_while(|due| **due < limit).map(|due| started + *due);
            open(client, prompts, numbers.zip(due), *open_max, started + limit + GRACE, progress).await
        }
    }
}

async fn closed(
    client: &Rc<Client>,
    prompts: &Rc<Prompts>,
    clients: u32,
    numbers: Range<u32>,
    last_start: Instant,
    progress: &ProgressBar,
) -> Vec<Outcome> {
    futures::stream::iter(numbers)
        .take_while(|_| std::future::ready(Instant::now() < last_start))
        .map(|number| {
            let (client, ask) = (client.clone(), prompts.ask(number));
            async move { client.ask(&ask, Instant::now(), last_start + GRACE).await }
        })
        .buffer_unordered(clients as usize)
        .inspect(|_| progress.inc(1))
        .collect()
        .await
}

/// A request that is due while `open_max` are open is not sent: an honest generator says so, instead of waiting
/// until the server has time.
async fn open(
    client: &Rc<Client>,
    prompts: &Rc<Prompts>,
    requests: impl Iterator<Item = (u32, Instant)>,
    open_max: u32,
    deadline: Instant,
    progress: &ProgressBar,
) -> Vec<Outcome> {
    let (mut running, mut outcomes) = (JoinSet::new(), Vec::new());
    for (number, due) in requests {
        let ask = prompts.ask(number);
        tokio::time::sleep_until(due.into()).await;
        while let Some(Some(ended)) = running.join_next().now_or_never() {
            outcomes.push(ended.expect("a request does not panic"));
            progress.inc(1);
        }
        if running.len() >= open_max as usize {
            outcomes.push(Err(Fault::NotSent));
            progress.inc(1);
            continue;
        }
        let client = client.clone();
        running.spawn_local(async move { client.ask(&ask, due, deadline).await });
    }
    while let Some(ended) = running.join_next().await {
        outcomes.push(ended.expect("a request does not panic"));
        progress.inc(1);
    }
    outcomes
}

/// When each of so many requests is due, from the start.
pub fn schedule(arrivals: Arrivals, rate: f64, requests: u32, seed: u64) -> Vec<Duration> {
    let mut random = Random::new(seed, u32::MAX - 1);
    let mut at = 0.0;
    (0..requests)
        .map(|_| {
            let due = Duration::from_secs_f64(at);
            at += match arrivals {
                Arrivals::Fixed => 1.0 / rate,
                Arrivals::Poisson => -random.unit().ln() / rate,
            };
            due
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_arrivals_are_evenly_spaced() {
        let due = schedule(Arrivals::Fixed, 4.0, 4, 1);
        assert_eq!(due, [0, 250, 500, 750].map(Duration::from_millis));
    }

    #[test]
    fn poisson_arrivals_have_the_rates_mean_and_as_large_a_deviation() {
        const REQUESTS: u32 = 20_000;
        let due = schedule(Arrivals::Poisson, 50.0, REQUESTS, 9);
        let waits: Vec<f64> = due.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = waits.iter().sum::<f64>() / waits.len() as f64;
        let variance = waits.iter().map(|wait| (wait - mean).powi(2)).sum::<f64>() / waits.len() as f64;
        // Three standard errors of the mean are 2%.
        assert!((mean * 50.0 - 1.0).abs() < 0.03, "mean {mean}");
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "deviation {}", variance.sqrt());
    }

    #[test]
    fn arrivals_are_a_function_of_the_seed() {
        let of = |seed| schedule(Arrivals::Poisson, 3.0, 50, seed);
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }
}
