//! Configuration: `config/lightcone.toml` is defaults and manual in one.
//!
//! Promises that every fault of a user's file, environment and flags is reported at once, each with the
//! place it stands at, and that a [`Config`] that was loaded is sound: addresses parse, prices are exact.
//! Never reads the environment by itself, and never opens what it names.

mod check;
mod load;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::Deserialize;

use crate::domain::{ModelId, MoneyError, NanoUsd, Price, PriceList};

pub use load::{ConfigFault, ConfigFaults, Overrides};

/// The defaults and the manual.
pub const DEFAULTS: &str = include_str!("../config/lightcone.toml");

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub node: Node,
    pub edge: Edge,
    pub store: Store,
    pub queue: Queue,
    pub ledger: Ledger,
    pub limits: Limits,
    #[serde(default)]
    pub tiers: BTreeMap<String, Limits>,
    pub webhooks: Webhooks,
    pub relay: Relay,
    pub engine: Engine,
    pub models: BTreeMap<ModelId, Model>,
    pub prices: Prices,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    All,
    Edge,
    Worker,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Edge => "edge",
            Self::Worker => "worker",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    pub role: Role,
    pub data_dir: PathBuf,
    pub drain_ms_max: u64,
    pub status_listen: String,
    pub memory_max_mib: usize,
    pub log: String,
    pub log_format: LogFormat,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edge {
    pub listen: SocketAddr,
    pub http_threads: usize,
    pub default_model: ModelId,
    pub body_bytes_max: usize,
    pub body_ms_max: u64,
    pub connections_max: usize,
    pub prompt_threads: usize,
    pub prompt_queue_max: usize,
    pub messages_max: usize,
    pub choices_max: u32,
    pub cors_origins: Vec<String>,
    pub trusted_proxies: Vec<String>,
    pub auth_failures_max: u64,
    pub auth_failure_window_seconds: u64,
    pub auth_block_seconds: u64,
    pub record_hours: u64,
    pub idempotency_hours: u64,
    pub stream_buffer_events: usize,
    pub keep_alive_ms: u64,
    pub request_ms_max: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Store {
    pub redis_url: String,
    pub server_program: String,
    pub append_fsync: AppendFsync,
    pub command_ms_max: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AppendFsync {
    Always,
    Everysec,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    pub depth_max: usize,
    pub start_ms_max: u64,
    pub claim_lease_ms: u64,
    pub takeover_ms_max: u64,
    pub losses_max: u32,
    pub wait_ms_max: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    pub hold_lease_ms: u64,
    pub sweep_ms: u64,
    pub step_tokens: u32,
    pub bootstrap_balance_usd: String,
    pub receipt_key_file: PathBuf,
    pub verify_seconds: u64,
    pub archive_months: u32,
    pub archive_dir: PathBuf,
}

/// What tenants of one tier may do.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    pub requests_per_minute: u64,
    pub tokens_per_minute: u64,
    pub requests_per_day: u64,
    pub tokens_per_day: u64,
    pub requests_at_once: u64,
    pub spend_usd_per_day: String,
    pub spend_usd_per_month: String,
    pub service_tier_max: ServiceTier,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceTier {
    Flex,
    Default,
    Priority,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Webhooks {
    pub enabled: bool,
    pub allow_private: bool,
    pub attempts_max: u32,
    pub timeout_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relay {
    pub listen: SocketAddr,
    pub advertise: String,
    pub secret: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    pub ort_library: PathBuf,
    pub threads: usize,
    pub cpu_set: String,
    pub spinning: Spinning,
    pub providers: Vec<String>,
    pub kv_block_tokens: usize,
    pub prefix_cache: bool,
    pub speculation: Speculation,
    pub stall_ms_max: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Speculation {
    Auto,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spinning {
    Auto,
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    Onnx,
    Scripted,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub file: PathBuf,
    pub engine: EngineKind,
    pub description: String,
    pub owned_by: String,
    pub created: u64,
    pub context_tokens_max: usize,
    pub output_tokens_max: u32,
    pub sequences_max: usize,
    pub step_tokens_max: usize,
    pub kv_memory_mib: usize,
    pub input_usd_per_million: String,
    pub output_usd_per_million: String,
    pub cached_input_usd_per_million: String,
    pub free: bool,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    pub version: String,
}

/// A price is quoted in dollars per million tokens and charged in whole nano-dollars per token.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PriceFault {
    #[error(transparent)]
    Money(#[from] MoneyError),
    #[error("`{0}` dollars per million tokens is not a whole number of nano-dollars per token (use steps of 0.001)")]
    Inexact(String),
    #[error("a price cannot be negative")]
    Negative,
    #[error("a price of zero gives the model away; say `free = true` if that is meant")]
    Zero,
    #[error("a cached prompt token cannot cost more than another one")]
    CachedAboveInput,
}

impl Edge {
    /// The networks of `trusted_proxies`.
    pub fn trusted_networks(&self) -> Vec<IpNet> {
        let network = |text: &String| network(text).expect("a loaded configuration is sound");
        self.trusted_proxies.iter().map(network).collect()
    }
}

impl Ledger {
    pub fn receipt_key_file(&self) -> Option<&Path> {
        Some(self.receipt_key_file.as_path()).filter(|path| !path.as_os_str().is_empty())
    }
}

impl Engine {
    /// The CPUs of `cpu_set`; none where it leaves that open.
    pub fn cpus(&self) -> BTreeSet<usize> {
        cpus(&self.cpu_set).expect("a loaded configuration is sound")
    }
}

impl Model {
    pub fn price(&self) -> Result<Price, PriceFault> {
        let input = nano_per_token(&self.input_usd_per_million)?;
        let output = nano_per_token(&self.output_usd_per_million)?;
        let cached_input = match self.cached_input_usd_per_million.as_str() {
            "" => input,
            text => nano_per_token(text)?,
        };
        check_price(Price { input, output, cached_input }, self.free)
    }
}

/// A price that may be charged.
pub fn check_price(price: Price, is_free: bool) -> Result<Price, PriceFault> {
    let Price { input, output, cached_input } = price;
    if [input, output, cached_input].into_iter().any(|price| price < NanoUsd::ZERO) {
        return Err(PriceFault::Negative);
    }
    if cached_input > input {
        return Err(PriceFault::CachedAboveInput);
    }
    // Cached prompt tokens may well be free.
    if !is_free && (input == NanoUsd::ZERO || output == NanoUsd::ZERO) {
        return Err(PriceFault::Zero);
    }
    Ok(price)
}

impl Config {
    /// Where a worker without an edge says how it is.
    pub fn status_address(&self) -> Option<SocketAddr> {
        let text = &self.node.status_listen;
        (!text.is_empty()).then(|| text.parse().expect("a loaded configuration is sound"))
    }

    /// Where archives of the ledger lie.
    pub fn archive_dir(&self) -> PathBuf {
        let given = &self.ledger.archive_dir;
        if given.as_os_str().is_empty() { self.node.data_dir.join("archive") } else { given.clone() }
    }

    /// The prices that this configuration states, which hold until others are published.
    pub fn price_list(&self) -> Result<PriceList, PriceFault> {
        let price = |(id, model): (&ModelId, &Model)| Ok((id.clone(), model.price()?));
        let prices = self.models.iter().map(price).collect::<Result<_, PriceFault>>()?;
        Ok(PriceList { version: self.prices.version.clone(), from_unix_ms: 0, prices })
    }
}

/// Reads `0-3,8`, as the system's own tools write sets of CPUs.
fn cpus(text: &str) -> Option<BTreeSet<usize>> {
    const CPUS_MAX: usize = 1024;
    let mut set = BTreeSet::new();
    for part in text.split(',').filter(|_| !text.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<usize>().ok()?, last.trim().parse::<usize>().ok()?);
        if first > last || last >= CPUS_MAX {
            return None;
        }
        set.extend(first..=last);
    }
    Some(set)
}

/// Reads `10.0.0.0/8`, or an address alone.
fn network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// Of dollars per million tokens.
pub fn nano_per_token(usd_per_million: &str) -> Result<NanoUsd, PriceFault> {
    let nano = usd_per_million.parse::<NanoUsd>()?.nano();
    if nano < 0 {
        return Err(PriceFault::Negative);
    }
    if nano % 1_000_000 != 0 {
        return Err(PriceFault::Inexact(usd_per_million.to_owned()));
    }
    Ok(NanoUsd::new(nano / 1_000_000))
}

#[cfg(test)]
mod tests;
