//! The law of metric names. Labels are bounded: `model` is a configured model, the others are enums.

use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// All metrics of one process. Cheap to share behind an `Arc`; every method is lock-free after the
/// first use of a label.
pub struct Metrics {
    registry: Registry,
    /// HTTP requests by `route` (the pattern, not the path) and `status`.
    pub http_requests: IntCounterVec,
    /// Chat requests by `model` and `outcome`: stop, length, cancelled, failed, refused.
    pub requests: IntCounterVec,
    /// Billed prompt tokens by `model`.
    pub prompt_tokens: IntCounterVec,
    /// Billed output tokens by `model`.
    pub completion_tokens: IntCounterVec,
    /// Charged nano-dollars by `model`.
    pub spend_nano_usd: IntCounterVec,
    /// Seconds from the request's arrival at the edge to its first token, by `model`.
    pub time_to_first_token: HistogramVec,
    /// Seconds between output tokens after the first, averaged over one request, by `model`.
    pub time_per_output_token: HistogramVec,
    /// Seconds in the queue before a worker claimed the request, by `model`.
    pub queue_wait: HistogramVec,
    /// Seconds of one engine step, by `model`.
    pub step_seconds: HistogramVec,
    /// Sequences in the engine's batch, by `model`.
    pub running: IntGaugeVec,
    /// Requests claimed by this node that wait for a place in the batch, by `model`.
    pub waiting: IntGaugeVec,
    /// Requests in the shared queue, by `model`.
    pub queue_depth: IntGaugeVec,
    /// KV blocks in use, by `model`.
    pub kv_blocks_used: IntGaugeVec,
    /// KV blocks in all, by `model`.
    pub kv_blocks_total: IntGaugeVec,
    /// Sequences sent back to waiting because KV blocks ran out, by `model`.
    pub preemptions: IntCounterVec,
    /// Prompt tokens found in the prefix cache, by `model`.
    pub prefix_hit_tokens: IntCounterVec,
    /// Tokens decoded, by `model`, whether or not anybody pays for them.
    pub decoded_tokens: IntCounterVec,
    /// Tokens guessed ahead, by `model`.
    pub drafted_tokens: IntCounterVec,
    /// Guessed tokens that were right, by `model`.
    pub accepted_draft_tokens: IntCounterVec,
    /// Restarts of worker actors by their supervisor, by `model`.
    pub worker_restarts: IntCounterVec,
    /// Keys that were wrong.
    pub auth_failures: IntCounter,
    /// Addresses that this edge answers 429 because of them.
    pub addresses_blocked: IntGauge,
    /// Refusals at admission by `reason`.
    pub refusals: IntCounterVec,
    /// Holds released because nobody renewed them.
    pub expired_holds: IntCounter,
    /// Requests charged after their hold had been given up, because whoever ran them was dead or cut off.
    pub late_settlements: IntCounter,
    /// Journals that are damaged, and what of them could not be settled; each needs a person.
    pub journal_faults: IntCounter,
    /// grants + adjustments - balance - holds - charges + refunds over all tenants; anything but 0 is an alarm.
    pub ledger_imbalance_nano_usd: IntGauge,
    /// Accounts that cannot be read, at the last look; anything but 0 is an alarm.
    pub ledger_unreadable_accounts: IntGauge,
    /// Contradictions found when each tenant's ledger was last verified, on the one node that verifies and 0 on all
    /// others; anything but 0 is an alarm.
    pub ledger_faults: IntGauge,
    /// Tenants that have any.
    pub ledger_unbalanced_tenants: IntGauge,
    /// Requests that this node's journal has open.
    pub journal_open_requests: IntGauge,
    /// Those that stay in it although they ended, or that the ledger has otherwise; anything but 0 is an alarm.
    pub journal_rests: IntGauge,
    /// Requests taken over from workers that were lost, by model.
    pub takeovers: IntCounterVec,
    /// Streams cut because their client read too slowly.
    pub slow_streams_cut: IntCounter,
    /// Webhooks by `outcome`: delivered, failed (an attempt, after which there may be others), dead (given up).
    pub webhooks: IntCounterVec,
    /// Events of all tenants that wait for their delivery, as this node last counted them.
    pub webhooks_waiting: IntGauge,
}

const SECONDS_TTFT: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const SECONDS_TOKEN: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28];

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let vec = IntCounterVec::new(Opts::new(name, help), labels).expect("valid metric");
            registry.register(Box::new(vec.clone())).expect("metric name is used once");
            vec
        };
        let gauge = |name: &str, help: &str, labels: &[&str]| {
            let vec = IntGaugeVec::new(Opts::new(name, help), labels).expect("valid metric");
            registry.register(Box::new(vec.clone())).expect("metric name is used once");
            vec
        };
        let plain_gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help).expect("valid metric");
            registry.register(Box::new(gauge.clone())).expect("metric name is used once");
            gauge
        };
        let plain_counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help).expect("valid metric");
            registry.register(Box::new(counter.clone())).expect("metric name is used once");
            counter
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let vec = HistogramVec::new(opts, &["model"]).expect("valid metric");
            registry.register(Box::new(vec.clone())).expect("metric name is used once");
            vec
        };
        let model = &["model"];
        Self {
            http_requests: counter(
                "lightcone_http_requests_total",
                "HTTP requests by route and status",
                &["route", "status"],
            ),
            requests: counter("lightcone_requests_total", "Chat requests by outcome", &["model", "outcome"]),
            prompt_tokens: counter("lightcone_prompt_tokens_total", "Billed prompt tokens", model),
            completion_tokens: counter("lightcone_completion_tokens_total", "Billed output tokens", model),
            spend_nano_usd: counter("lightcone_spend_nano_usd_total", "Charged nano-dollars", model),
            time_to_first_token: histogram(
                "lightcone_time_to_first_token_seconds",
                "Arrival at the edge to the first token",
                SECONDS_TTFT,
            ),
            time_per_output_token: histogram(
                "lightcone_time_per_output_token_seconds",
                "Mean time between output tokens of a request",
                SECONDS_TOKEN,
            ),
            queue_wait: histogram("lightcone_queue_wait_seconds", "Time in the queue before a claim", SECONDS_TTFT),
            step_seconds: histogram("lightcone_step_seconds", "One engine step", SECONDS_TOKEN),
            running: gauge("lightcone_running_sequences", "Sequences in the batch", model),
            waiting: gauge("lightcone_waiting_requests", "Claimed requests that wait for a place in the batch", model),
            queue_depth: gauge("lightcone_queue_depth", "Requests in the shared queue", model),
            kv_blocks_used: gauge("lightcone_kv_blocks_used", "KV blocks in use", model),
            kv_blocks_total: gauge("lightcone_kv_blocks_total", "KV blocks in all", model),
            preemptions: counter("lightcone_preemptions_total", "Sequences preempted for want of KV blocks", model),
            prefix_hit_tokens: counter(
                "lightcone_prefix_hit_tokens_total",
                "Prompt tokens found in the prefix cache",
                model,
            ),
            decoded_tokens: counter("lightcone_decoded_tokens_total", "Tokens decoded", model),
            drafted_tokens: counter("lightcone_drafted_tokens_total", "Tokens guessed ahead", model),
            accepted_draft_tokens: counter(
                "lightcone_accepted_draft_tokens_total",
                "Guessed tokens that were right",
                model,
            ),
            worker_restarts: counter("lightcone_worker_restarts_total", "Restarts of worker actors", model),
            auth_failures: plain_counter("lightcone_auth_failures_total", "Failed authentications"),
            addresses_blocked: plain_gauge(
                "lightcone_addresses_blocked",
                "Addresses that are blocked for their failed authentications",
            ),
            refusals: counter("lightcone_refusals_total", "Refused requests by reason", &["reason"]),
            expired_holds: plain_counter("lightcone_expired_holds_total", "Holds released because nobody renewed them"),
            late_settlements: plain_counter(
                "lightcone_late_settlements_total",
                "Requests charged after their hold was given up",
            ),
            journal_faults: plain_counter(
                "lightcone_journal_faults_total",
                "Damaged journals, and entries of journals that could not be settled",
            ),
            ledger_imbalance_nano_usd: plain_gauge("lightcone_ledger_imbalance_nano_usd", "Must be 0"),
            ledger_unreadable_accounts: plain_gauge(
                "lightcone_ledger_unreadable_accounts",
                "Accounts that cannot be read; must be 0",
            ),
            ledger_faults: plain_gauge("lightcone_ledger_faults", "Contradictions in the ledger; must be 0"),
            ledger_unbalanced_tenants: plain_gauge(
                "lightcone_ledger_unbalanced_tenants",
                "Tenants whose ledger has contradictions; must be 0",
            ),
            journal_open_requests: plain_gauge(
                "lightcone_journal_open_requests",
                "Requests that this node still owes the ledger",
            ),
            journal_rests: plain_gauge(
                "lightcone_journal_rests",
                "Requests that stay in the journal although they ended, or that the ledger has otherwise; must be 0",
            ),
            takeovers: counter(
                "lightcone_takeovers_total",
                "Requests taken over from workers that were lost",
                &["model"],
            ),
            slow_streams_cut: plain_counter(
                "lightcone_slow_streams_cut_total",
                "Streams cut because their client read too slowly",
            ),
            webhooks: counter("lightcone_webhooks_total", "Attempts to deliver webhooks by outcome", &["outcome"]),
            webhooks_waiting: plain_gauge("lightcone_webhooks_waiting", "Events that wait for their delivery"),
            registry,
        }
    }

    /// Prometheus text format.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("metrics encode");
        String::from_utf8(text).expect("metrics are UTF-8")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_that_ends_in_total_is_a_counter_and_nothing_else_is() {
        let metrics = Metrics::new();
        metrics.http_requests.with_label_values(&["/healthz", "200"]).inc();
        metrics.running.with_label_values(&["m"]).set(1);
        for line in metrics.render().lines().filter(|line| line.starts_with("# TYPE ")) {
            let words: Vec<&str> = line.split(' ').collect();
            assert_eq!(words[2].ends_with("_total"), words[3] == "counter", "{line}");
        }
    }
}
