//! What each key may hold. One row a key; a key without a row does not exist.

use std::net::SocketAddr;

use toml_edit::Value;

use super::{cpus, nano_per_token, network};
use crate::domain::NanoUsd;

#[derive(Clone, Copy, Debug)]
pub enum Rule {
    /// Any text.
    Text,
    /// Text that is not empty.
    Word,
    OneOf(&'static [&'static str]),
    /// An unordered choice of these, at least one.
    SomeOf(&'static [&'static str]),
    /// `*`, or web sites such as https://example.com; may be empty.
    Origins,
    /// Addresses and networks such as 10.0.0.0/8; may be empty.
    Networks,
    Integer(i64, i64),
    Flag,
    /// ip:port
    Address,
    /// ip:port, or empty
    AddressOrEmpty,
    /// host:port, or empty
    Endpoint,
    RedisUrl,
    /// Empty, or at least this many characters.
    Secret(usize),
    LogFilter,
    /// CPU numbers and ranges of them, or empty.
    CpuSet,
    Usd,
    /// The same, and small enough to be a limit.
    UsdLimit,
    UsdPerMillion,
    UsdPerMillionOrEmpty,
}

use Rule::{
    Address, AddressOrEmpty, CpuSet, Endpoint, Flag, Integer, LogFilter, Networks, OneOf, Origins, RedisUrl, Secret,
    SomeOf, Text, Usd, UsdLimit, UsdPerMillion, UsdPerMillionOrEmpty, Word,
};

const HOUR_MS: i64 = 3_600_000;
const DAY_SECONDS: i64 = 24 * 3600;
const MANY: i64 = 1 << 20;
/// Nano-dollars that the store compares exactly.
const SPEND_MAX: i64 = 9_000_000_000_000_000;

/// Of `limits`, and of every tier's table.
const LIMITS: &[(&str, Rule)] = &[
    ("requests_per_minute", Integer(0, 1 << 40)),
    ("tokens_per_minute", Integer(0, 1 << 40)),
    ("requests_per_day", Integer(0, 1 << 40)),
    ("tokens_per_day", Integer(0, 1 << 40)),
    ("requests_at_once", Integer(0, 1 << 40)),
    ("spend_usd_per_day", UsdLimit),
    ("spend_usd_per_month", UsdLimit),
    ("service_tier_max", OneOf(&["flex", "default", "priority"])),
];

/// `models` and `tiers` stand for every table in them.
pub const RULES: &[(&str, &[(&str, Rule)])] = &[
    (
        "node",
        &[
            ("role", OneOf(&["all", "edge", "worker"])),
            ("data_dir", Word),
            ("drain_ms_max", Integer(0, HOUR_MS)),
            ("status_listen", AddressOrEmpty),
            ("memory_max_mib", Integer(0, 1 << 24)),
            ("log", LogFilter),
            ("log_format", OneOf(&["text", "json"])),
        ],
    ),
    (
        "edge",
        &[
            ("listen", Address),
            ("http_threads", Integer(1, 256)),
            ("default_model", Word),
            ("body_bytes_max", Integer(1024, 1 << 30)),
            ("body_ms_max", Integer(100, HOUR_MS)),
            ("connections_max", Integer(1, MANY)),
            ("prompt_threads", Integer(1, 256)),
            ("prompt_queue_max", Integer(1, MANY)),
            ("messages_max", Integer(1, MANY)),
            ("cors_origins", Origins),
            ("trusted_proxies", Networks),
            ("auth_failures_max", Integer(0, 10_000)),
            ("auth_failure_window_seconds", Integer(1, DAY_SECONDS)),
            ("auth_block_seconds", Integer(1, DAY_SECONDS)),
            ("choices_max", Integer(1, 128)),
            ("record_hours", Integer(1, 24 * 3650)),
            ("idempotency_hours", Integer(1, 24 * 365)),
            ("stream_buffer_events", Integer(16, MANY)),
            ("keep_alive_ms", Integer(100, HOUR_MS)),
            ("request_ms_max", Integer(1000, 24 * HOUR_MS)),
        ],
    ),
    (
        "store",
        &[
            ("redis_url", RedisUrl),
            ("server_program", Text),
            ("append_fsync", OneOf(&["always", "everysec"])),
            ("command_ms_max", Integer(10, HOUR_MS)),
        ],
    ),
    (
        "queue",
        &[
            ("depth_max", Integer(1, MANY)),
            ("start_ms_max", Integer(100, 24 * HOUR_MS)),
            ("claim_lease_ms", Integer(500, HOUR_MS)),
            ("takeover_ms_max", Integer(1000, HOUR_MS)),
            ("losses_max", Integer(1, 100)),
            ("wait_ms_max", Integer(100, 24 * HOUR_MS)),
        ],
    ),
    (
        "ledger",
        &[
            ("hold_lease_ms", Integer(1000, HOUR_MS)),
            ("sweep_ms", Integer(100, HOUR_MS)),
            ("step_tokens", Integer(0, 1 << 24)),
            ("bootstrap_balance_usd", Usd),
            ("receipt_key_file", Text),
            ("verify_seconds", Integer(0, 366 * 86_400)),
            ("archive_months", Integer(0, 1200)),
            ("archive_dir", Text),
        ],
    ),
    ("limits", LIMITS),
    ("tiers", LIMITS),
    (
        "webhooks",
        &[
            ("enabled", Flag),
            ("allow_private", Flag),
            ("attempts_max", Integer(1, 100)),
            ("timeout_ms", Integer(100, 60_000)),
        ],
    ),
    ("relay", &[("listen", Address), ("advertise", Endpoint), ("secret", Secret(16))]),
    (
        "engine",
        &[
            ("ort_library", Text),
            ("threads", Integer(0, 1024)),
            ("cpu_set", CpuSet),
            ("spinning", OneOf(&["auto", "on", "off"])),
            ("providers", SomeOf(&["cpu", "cuda", "tensorrt", "rocm", "migraphx", "directml", "coreml", "openvino"])),
            ("kv_block_tokens", Integer(1, 1024)),
            ("prefix_cache", Flag),
            ("speculation", OneOf(&["auto", "off"])),
            ("stall_ms_max", Integer(1000, HOUR_MS)),
        ],
    ),
    (
        "models",
        &[
            ("enabled", Flag),
            ("file", Word),
            ("engine", OneOf(&["onnx", "scripted"])),
            ("description", Text),
            ("owned_by", Word),
            ("created", Integer(0, i64::MAX)),
            ("context_tokens_max", Integer(2, 1 << 24)),
            ("output_tokens_max", Integer(1, 1 << 24)),
            ("sequences_max", Integer(1, 65_536)),
            ("step_tokens_max", Integer(1, MANY)),
            ("kv_memory_mib", Integer(1, 1 << 24)),
            ("input_usd_per_million", UsdPerMillion),
            ("output_usd_per_million", UsdPerMillion),
            ("cached_input_usd_per_million", UsdPerMillionOrEmpty),
            ("free", Flag),
        ],
    ),
    ("prices", &[("version", Word)]),
];

pub fn rule(section: &str, key: &str) -> Option<Rule> {
    let (_, keys) = RULES.iter().find(|(name, _)| *name == section)?;
    keys.iter().find(|(name, _)| *name == key).map(|(_, rule)| *rule)
}

impl Rule {
    /// The fault of `value`, in words that complete "key: ".
    pub fn check(self, value: &Value) -> Result<(), String> {
        match self {
            Integer(min, max) => {
                let number = value.as_integer().ok_or_else(|| wrong_type("a whole number", value))?;
                if (min..=max).contains(&number) {
                    return Ok(());
                }
                let range = if max == i64::MAX { format!("at least {min}") } else { format!("from {min} to {max}") };
                Err(format!("{number} is out of range: must be {range}"))
            }
            Flag => value.as_bool().map(drop).ok_or_else(|| wrong_type("true or false", value)),
            SomeOf(words) => {
                let list = value.as_array().ok_or_else(|| wrong_type("a list", value))?;
                if list.is_empty() {
                    return Err("must not be empty".into());
                }
                list.iter().try_for_each(|item| OneOf(words).check(item))
            }
            Origins => {
                let list = value.as_array().ok_or_else(|| wrong_type("a list", value))?;
                list.iter().try_for_each(origin)
            }
            Networks => {
                let list = value.as_array().ok_or_else(|| wrong_type("a list", value))?;
                list.iter().try_for_each(|item| {
                    let text = item.as_str().ok_or_else(|| wrong_type("text in quotes", item))?;
                    let known = network(text).map(drop);
                    known.ok_or_else(|| format!("`{text}` is not an address or a network such as 10.0.0.0/8"))
                })
            }
            _ => self.check_text(value.as_str().ok_or_else(|| wrong_type("text in quotes", value))?),
        }
    }

    fn check_text(self, text: &str) -> Result<(), String> {
        match self {
            Text => Ok(()),
            Word if text.trim().is_empty() => Err("must not be empty".into()),
            Word => Ok(()),
            OneOf(words) if words.contains(&text) => Ok(()),
            OneOf(words) => {
                let hint = nearest(text, words.iter().copied()).map(|word| format!("; did you mean `{word}`?"));
                Err(format!("`{text}` is not one of {}{}", words.join(", "), hint.unwrap_or_default()))
            }
            AddressOrEmpty if text.is_empty() => Ok(()),
            Address | AddressOrEmpty => match text.parse::<SocketAddr>() {
                Ok(_) => Ok(()),
                Err(_) => Err(format!("`{text}` is not an address such as 127.0.0.1:8080 or [::1]:8080")),
            },
            Endpoint => {
                let port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
                let sound =
                    text.is_empty() || text.rsplit_once(':').is_some_and(|(host, p)| !host.is_empty() && port(p));
                sound.then_some(()).ok_or_else(|| format!("`{text}` is not host:port"))
            }
            RedisUrl => redis_url(text),
            Secret(min) if text.is_empty() || text.chars().count() >= min => Ok(()),
            Secret(min) => Err(format!("must have at least {min} characters")),
            LogFilter => match tracing_subscriber::EnvFilter::builder().parse(text) {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("`{text}` is not a log filter: {error}")),
            },
            CpuSet => cpus(text).map(drop).ok_or_else(|| format!("`{text}` is not a set of CPUs such as 0-3,8")),
            Usd => match text.parse::<NanoUsd>() {
                Ok(amount) if amount < NanoUsd::ZERO => Err("must not be negative".into()),
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            },
            UsdLimit => match text.parse::<NanoUsd>() {
                Ok(amount) if amount < NanoUsd::ZERO => Err("must not be negative".into()),
                Ok(amount) if amount.nano() > SPEND_MAX => Err("must be at most 9000000".into()),
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            },
            UsdPerMillionOrEmpty if text.is_empty() => Ok(()),
            UsdPerMillion | UsdPerMillionOrEmpty => nano_per_token(text).map(drop).map_err(|error| error.to_string()),
            SomeOf(_) | Origins | Networks | Integer(..) | Flag => unreachable!("not text"),
        }
    }

    /// A value out of the environment or off the command line, where everything is text.
    pub fn read(self, text: &str) -> Value {
        match self {
            Integer(..) => text.parse::<i64>().map_or_else(|_| text.into(), Value::from),
            Flag => text.parse::<bool>().map_or_else(|_| text.into(), Value::from),
            SomeOf(_) | Origins | Networks => {
                Value::Array(text.split(',').map(|word| Value::from(word.trim())).collect())
            }
            _ => text.into(),
        }
    }
}

fn origin(value: &Value) -> Result<(), String> {
    let text = value.as_str().ok_or_else(|| wrong_type("text in quotes", value))?;
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    if text == "*" || host.is_some_and(|host| !host.is_empty() && !host.contains('/')) {
        return Ok(());
    }
    Err(format!("`{text}` is not `*` or a site such as https://example.com"))
}

fn redis_url(text: &str) -> Result<(), String> {
    if text.starts_with("rediss://") {
        return Err("this build speaks no TLS to the store: use redis:// in a trusted network".into());
    }
    let known = ["redis://", "redis+unix://", "unix://"];
    if text.is_empty() || known.iter().any(|scheme| text.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty())) {
        return Ok(());
    }
    // The text may hold a password and is not repeated.
    Err("is not of the form redis://[user:password@]host:port/db".into())
}

fn wrong_type(wanted: &str, value: &Value) -> String {
    let found = match value {
        Value::String(_) => "text",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number with a fraction",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::InlineTable(_) => "a table",
    };
    format!("must be {wanted}, not {found}")
}

/// The known word that `text` was probably meant to be.
pub fn nearest<'a>(text: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let (distance, word) = known.map(|word| (distance(text, word), word)).min()?;
    (distance <= 1 + word.len() / 4).then_some(word)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.chars().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[row.len() - 1]
}
