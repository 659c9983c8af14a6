//! What is said at the end: spreads of times, tokens a second, failures by kind; as JSON and as a table.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;

use crate::{
    Arrivals,
    client::Fault,
    disturb::Disturbance,
    timeline::{Gap, Timeline},
    workload::Workload,
};

#[derive(Serialize, Default)]
pub struct Environment {
    pub workload: Workload,
    /// Clients of a closed loop.
    pub concurrency: Option<u32>,
    /// Requests a second of an open one.
    pub rate: Option<f64>,
    pub arrivals: Option<Arrivals>,
    pub seed: u64,
}

#[derive(Serialize)]
pub struct Report {
    #[serde(flatten)]
    pub environment: Environment,
    /// That were answered in full; all figures are theirs.
    pub requests: usize,
    /// How many failed, by kind.
    pub errors: BTreeMap<String, usize>,
    /// One of them in full, for whoever has to find the cause.
    pub first_error: Option<String>,
    pub seconds: f64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
    pub output_tokens_per_second: f64,
    pub requests_per_second: f64,
    pub ttft_ms: Spread,
    /// Between tokens: a chunk's gap over its tokens.
    pub inter_token_ms: Spread,
    /// Between chunks: the pauses that a client sees.
    pub inter_chunk_ms: Spread,
    /// Of each request: from its first text to its last, over its tokens in between.
    pub per_output_token_ms: Spread,
    pub request_ms: Spread,
    /// Requests whose server told how many tokens each chunk had; in the others, a chunk has the mean.
    pub requests_counted: usize,
    pub tokens_per_chunk: f64,
    pub disturbance: Option<Disturbance>,
}

impl Report {
    pub fn of(elapsed: Duration, outcomes: &[Result<Timeline, Fault>]) -> Self {
        let (mut answers, mut errors, mut first_error) = (Vec::new(), BTreeMap::new(), None);
        for outcome in outcomes {
            match outcome {
                Ok(answer) => answers.push(answer),
                Err(fault) => {
                    first_error.get_or_insert_with(|| fault.to_string());
                    *errors.entry(fault.kind()).or_default() += 1;
                }
            }
        }
        let seconds = elapsed.as_secs_f64();
        let sum = |of: fn(&Timeline) -> u32| answers.iter().map(|answer| u64::from(of(answer))).sum::<u64>();
        let output_tokens = sum(|answer| answer.usage.output);
        let chunks: usize = answers.iter().map(|answer| answer.arrivals.len()).sum();
        let gaps = || answers.iter().flat_map(|answer| answer.gaps());
        Self {
            environment: Environment::default(),
            requests: answers.len(),
            errors,
            first_error,
            seconds,
            prompt_tokens: sum(|answer| answer.usage.prompt),
            cached_tokens: sum(|answer| answer.usage.cached),
            output_tokens,
            output_tokens_per_second: output_tokens as f64 / seconds,
            requests_per_second: answers.len() as f64 / seconds,
            ttft_ms: Spread::of(answers.iter().filter_map(|answer| answer.ttft())),
            inter_token_ms: Spread::of(gaps().flat_map(|gap| gap.per_token())),
            inter_chunk_ms: Spread::of(gaps().map(|gap: Gap| gap.length())),
            per_output_token_ms: Spread::of(answers.iter().filter_map(|answer| answer.mean_per_token())),
            request_ms: Spread::of(answers.iter().map(|answer| answer.whole())),
            requests_counted: answers.iter().filter(|answer| answer.is_counted()).count(),
            tokens_per_chunk: output_tokens as f64 / chunks as f64,
            disturbance: None,
        }
    }
}

/// In milliseconds. Percentiles are nearest ranks: each is a time that was measured. Of no times at all, all are
/// NaN, which JSON knows as null.
#[derive(Serialize, Debug, Clone, Copy)]
pub struct Spread {
    pub count: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = values.into_iter().map(|value| value.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        // In whole percents: 0.9 is no binary fraction, and 10 values must not have an eleventh rank.
        let at = |percent: usize| {
            let rank = (ms.len() * percent).div_ceil(100).max(1);
            ms.get(rank - 1).copied().unwrap_or(f64::NAN)
        };
        let mean = ms.iter().sum::<f64>() / ms.len() as f64;
        Self { count: ms.len(), mean, p50: at(50), p90: at(90), p99: at(99), max: at(100) }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Environment { workload, concurrency, rate, .. } = &self.environment;
        let load = match (concurrency, rate) {
            (Some(clients), _) => format!("{clients} at a time"),
            (None, Some(rate)) => format!("{rate} a second"),
            (None, None) => String::new(),
        };
        writeln!(
            f,
            "{:?}, {load}: {} requests in {:.1} s, {} prompt tokens ({} cached), {} output tokens, {:.1} a second",
            workload,
            self.requests,
            self.seconds,
            self.prompt_tokens,
            self.cached_tokens,
            self.output_tokens,
            self.output_tokens_per_second
        )?;
        writeln!(f, "{:<26}{:>9}{:>9}{:>9}{:>9}{:>9}", "ms", "mean", "p50", "p90", "p99", "max")?;
        row(f, "time to first token", &self.ttft_ms)?;
        row(f, "between tokens", &self.inter_token_ms)?;
        row(f, "between chunks", &self.inter_chunk_ms)?;
        row(f, "per output token", &self.per_output_token_ms)?;
        row(f, "whole request", &self.request_ms)?;
        if let Some(disturbance) = &self.disturbance {
            row(f, "streams, undisturbed", &disturbance.undisturbed_ms)?;
            row(f, "streams, disturbed", &disturbance.disturbed_ms)?;
            writeln!(f, "p99 disturbed over undisturbed: {:.2}", disturbance.p99_ratio)?;
        }
        writeln!(
            f,
            "{:.2} tokens a chunk, {}",
            self.tokens_per_chunk,
            match self.requests_counted == self.requests {
                true => "counted by the server",
                false => "taken as the mean of each answer",
            }
        )?;
        for (kind, count) in &self.errors {
            writeln!(f, "{count} failed: {kind}")?;
        }
        match &self.first_error {
            Some(error) => writeln!(f, "first failure: {error}"),
            None => Ok(()),
        }
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, spread: &Spread) -> fmt::Result {
    let Spread { mean, p50, p90, p99, max, .. } = spread;
    writeln!(f, "{name:<26}{mean:>9.1}{p50:>9.1}{p90:>9.1}{p99:>9.1}{max:>9.1}")
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::timeline::tests::timeline;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let of = |count: u64| Spread::of((1..=count).rev().map(Duration::from_millis));
        let hundred = of(100);
        assert_eq!((hundred.p50, hundred.p90, hundred.p99, hundred.max), (50.0, 90.0, 99.0, 100.0));
        let ten = of(10);
        assert_eq!((ten.p50, ten.p90, ten.p99, ten.max), (5.0, 9.0, 10.0, 10.0));
        assert_eq!((of(1).p50, of(1).p99, of(1).mean), (1.0, 1.0, 1.0));
        assert_eq!(of(1_000).p99, 990.0);
        assert!(of(0).p50.is_nan() && of(0).mean.is_nan());
    }

    #[test]
    fn a_report_adds_up_answers_and_counts_failures_by_kind() {
        let start = Instant::now();
        let outcomes = vec![
            Ok(timeline(start, &[(50, None), (60, None), (70, None)], 3)),
            Ok(timeline(start, &[(150, Some(1)), (190, Some(5))], 5)),
            Err(Fault::Status(429)),
            Err(Fault::Status(429)),
            Err(Fault::NotSent),
        ];
        let report = Report::of(Duration::from_secs(2), &outcomes);
        assert_eq!((report.requests, report.prompt_tokens, report.output_tokens), (2, 20, 8));
        assert_eq!(report.output_tokens_per_second, 4.0);
        assert_eq!((report.ttft_ms.p50, report.ttft_ms.max), (50.0, 150.0));
        assert_eq!((report.inter_token_ms.count, report.inter_token_ms.max), (6, 10.0));
        assert_eq!((report.inter_chunk_ms.count, report.inter_chunk_ms.max), (3, 40.0));
        assert_eq!((report.requests_counted, report.tokens_per_chunk), (1, 1.6));
        assert_eq!(report.errors, BTreeMap::from([("status 429".to_owned(), 2), ("not sent".to_owned(), 1)]));
    }

    #[test]
    fn the_table_and_the_json_say_the_same() {
        let outcomes = vec![Ok(timeline(Instant::now(), &[(50, None), (62, None)], 2)), Err(Fault::NoText)];
        let mut report = Report::of(Duration::from_secs(1), &outcomes);
        report.environment.concurrency = Some(3);
        let table = report.to_string();
        let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[2], ["time", "to", "first", "token", "50.0", "50.0", "50.0", "50.0", "50.0"]);
        assert_eq!(rows[3], ["between", "tokens", "12.0", "12.0", "12.0", "12.0", "12.0"]);
        assert!(table.contains("3 at a time: 1 requests in 1.0 s") && table.contains("1 failed: no text"), "{table}");
        let json = serde_json::to_value(&report).expect("is JSON");
        assert_eq!(json["ttft_ms"]["p50"], 50.0);
        assert_eq!((&json["workload"], &json["concurrency"]), (&"unique".into(), &3.into()));
        assert_eq!(json["errors"]["no text"], 1);
    }
}
