//! Layers: the defaults, the user's file, the environment, the flags; the later wins.

use std::{collections::BTreeMap, fmt, path::Path};

use toml_edit::{Document, DocumentMut, Item, TableLike, Value};

use super::{
    Config, DEFAULTS, PriceFault,
    check::{RULES, nearest, rule},
    check_price, nano_per_token,
};
use crate::domain::{NanoUsd, Price};

/// What the command line states.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub role: Option<String>,
    pub listen: Option<String>,
    pub redis_url: Option<String>,
    pub data_dir: Option<String>,
}

const VARIABLES: &[(&str, &str, &str)] = &[
    ("LIGHTCONE_ROLE", "node", "role"),
    ("LIGHTCONE_LISTEN", "edge", "listen"),
    ("LIGHTCONE_STATUS_LISTEN", "node", "status_listen"),
    ("LIGHTCONE_REDIS_URL", "store", "redis_url"),
    ("LIGHTCONE_DATA_DIR", "node", "data_dir"),
    ("LIGHTCONE_RELAY_LISTEN", "relay", "listen"),
    ("LIGHTCONE_RELAY_ADVERTISE", "relay", "advertise"),
    ("LIGHTCONE_RELAY_SECRET", "relay", "secret"),
    ("LIGHTCONE_ORT_LIBRARY", "engine", "ort_library"),
    ("LIGHTCONE_LOG", "node", "log"),
];

/// The model whose values a new one inherits, and what it cannot inherit.
const MODEL_TEMPLATE: &str = "tzafon.sm-1";
const MODEL_OWN: &[&str] = &["file", "input_usd_per_million", "output_usd_per_million"];

/// One thing that is wrong: where it stands, the key, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {key}{}{what}", if key.is_empty() { "" } else { ": " })]
pub struct ConfigFault {
    pub place: String,
    pub key: String,
    pub what: String,
}

/// Everything that is wrong, in the order of the places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigFaults(pub Vec<ConfigFault>);

impl fmt::Display for ConfigFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigFaults {}

impl Config {
    /// Reads all layers and reports every fault of all of them.
    pub fn load(
        file: Option<&Path>,
        env: impl Fn(&str) -> Option<String>,
        flags: Overrides,
    ) -> Result<Self, ConfigFaults> {
        let mut layers = Layers::default();
        layers.text("config/lightcone.toml", DEFAULTS);
        if let Some(path) = file {
            let name = path.display().to_string();
            match std::fs::read_to_string(path) {
                Ok(text) => layers.text(&name, &text),
                Err(error) => layers.fault(Place::Named(name), "", format!("cannot be read: {error}")),
            }
        }
        for (variable, section, key) in VARIABLES {
            // An empty variable is one that was not set.
            if let Some(text) = env(variable).filter(|text| !text.is_empty()) {
                layers.word(variable, section, key, &text);
            }
        }
        for (flag, section, key, text) in [
            ("--role", "node", "role", flags.role),
            ("--listen", "edge", "listen", flags.listen),
            ("--redis-url", "store", "redis_url", flags.redis_url),
            ("--data-dir", "node", "data_dir", flags.data_dir),
        ] {
            if let Some(text) = text {
                layers.word(flag, section, key, &text);
            }
        }
        layers.complete_models();
        layers.complete_tiers();
        layers.check_together();
        layers.finish()
    }

    /// The defaults alone.
    pub fn defaults() -> Self {
        Self::load(None, |_| None, Overrides::default()).expect("the defaults are sound; a test loads them")
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Line(String, usize),
    Named(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(file, line) => write!(f, "{file}:{line}"),
            Self::Named(name) => f.write_str(name),
        }
    }
}

/// `["models", "tzafon.sm-1", "file"]`
type Key = Vec<String>;

#[derive(Default)]
struct Layers {
    values: BTreeMap<Key, (Value, Place)>,
    /// Where each model's table was first stated.
    models: BTreeMap<String, Place>,
    /// The same of tiers.
    tiers: BTreeMap<String, Place>,
    faults: Vec<(Place, ConfigFault)>,
}

impl Layers {
    fn fault(&mut self, place: Place, key: &str, what: impl Into<String>) {
        let fault = ConfigFault { place: place.to_string(), key: key.to_owned(), what: what.into() };
        self.faults.push((place, fault));
    }

    fn text(&mut self, file: &str, text: &str) {
        let line = |span: Option<std::ops::Range<usize>>| {
            let start = span.map_or(0, |span| span.start.min(text.len()));
            Place::Line(file.to_owned(), 1 + text.as_bytes()[..start].iter().filter(|&&byte| byte == b'\n').count())
        };
        let document = match Document::parse(text) {
            Ok(document) => document,
            Err(error) => {
                let message = error.message().lines().collect::<Vec<_>>().join(", ");
                return self.fault(line(error.span()), "", format!("is not TOML: {message}"));
            }
        };
        for (section, place, item) in entries(document.as_table(), &line) {
            let Some((_, keys)) = RULES.iter().find(|(name, _)| *name == section) else {
                let what = unknown("section", &section, RULES.iter().map(|(name, _)| *name));
                self.fault(place, &section, what);
                continue;
            };
            let Some(table) = item.as_table_like() else {
                self.fault(place, &section, format!("is a section: write [{section}]"));
                continue;
            };
            if section != "models" && section != "tiers" {
                self.section(&[section], table, keys, &line);
                continue;
            }
            for (name, place, item) in entries(table, &line) {
                let path = [section.clone(), name.clone()];
                let Some(table) = item.as_table_like() else {
                    let what = format!("is a table: write [{section}.\"name\"]");
                    self.fault(place, &shown(&path), what);
                    continue;
                };
                let named = if section == "models" { &mut self.models } else { &mut self.tiers };
                named.entry(name).or_insert(place);
                self.section(&path, table, keys, &line);
            }
        }
    }

    fn section(
        &mut self,
        path: &[String],
        table: &dyn TableLike,
        keys: &[(&str, super::check::Rule)],
        line: &dyn Fn(Option<std::ops::Range<usize>>) -> Place,
    ) {
        for (name, place, item) in entries(table, line) {
            let mut key = path.to_vec();
            key.push(name.clone());
            let Some((_, rule)) = keys.iter().find(|(known, _)| *known == name) else {
                let mut what = unknown("key", &name, keys.iter().map(|(known, _)| *known));
                let elsewhere = RULES.iter().find(|(_, keys)| keys.iter().any(|(known, _)| *known == name));
                if let (Some((section, _)), false) = (elsewhere, what.contains("did you mean")) {
                    what += &format!("; did you mean {section}.{name}?");
                }
                self.fault(place, &shown(&key), what);
                continue;
            };
            let checked = match item.as_value() {
                Some(value) => rule.check(value).map(|()| value.clone()),
                None => Err("must be a value, not a table".to_owned()),
            };
            match checked {
                Ok(value) => drop(self.values.insert(key, (value, place))),
                Err(what) => self.fault(place, &shown(&key), what),
            }
        }
    }

    /// A value of the environment or the command line.
    fn word(&mut self, name: &str, section: &str, key: &str, text: &str) {
        let rule = rule(section, key).expect("overrides name keys that exist");
        let (value, place) = (rule.read(text), Place::Named(name.to_owned()));
        let key = vec![section.to_owned(), key.to_owned()];
        match rule.check(&value) {
            Ok(()) => drop(self.values.insert(key, (value, place))),
            Err(what) => self.fault(place, &shown(&key), what),
        }
    }

    /// New models inherit what the manual says they do; disabled ones go.
    fn complete_models(&mut self) {
        let (_, keys) = RULES.iter().find(|(name, _)| *name == "models").expect("there is such a section");
        let key = |model: &str, name: &str| vec!["models".to_owned(), model.to_owned(), name.to_owned()];
        let mut defaults = Self::default();
        defaults.text("config/lightcone.toml", DEFAULTS);
        for (model, place) in self.models.clone() {
            let enabled = self.values.remove(&key(&model, "enabled"));
            if enabled.is_some_and(|(value, _)| value.as_bool() == Some(false)) {
                self.values.retain(|key, _| !(key[0] == "models" && key[1] == model));
                self.models.remove(&model);
                continue;
            }
            for (name, _) in keys.iter().filter(|(name, _)| *name != "enabled") {
                let own = key(&model, name);
                if self.values.contains_key(&own) || self.faults.iter().any(|(_, fault)| fault.key == shown(&own)) {
                    continue;
                }
                if MODEL_OWN.contains(name) {
                    self.fault(place.clone(), &shown(&own), "is missing, and a new model has no default for it");
                    continue;
                }
                let value = match *name {
                    "description" | "cached_input_usd_per_million" => Value::from(""),
                    "free" => Value::from(false),
                    _ => defaults.values[&key(MODEL_TEMPLATE, name)].0.clone(),
                };
                self.values.insert(own, (value, place.clone()));
            }
        }
    }

    /// Tiers take from `limits` what they do not state.
    fn complete_tiers(&mut self) {
        let (_, keys) = RULES.iter().find(|(name, _)| *name == "tiers").expect("there is such a section");
        for (tier, place) in self.tiers.clone() {
            for (name, _) in *keys {
                let own = vec!["tiers".to_owned(), tier.clone(), (*name).to_owned()];
                let of_all = vec!["limits".to_owned(), (*name).to_owned()];
                if !self.values.contains_key(&own)
                    && let Some((value, _)) = self.values.get(&of_all).cloned()
                {
                    self.values.insert(own, (value, place.clone()));
                }
            }
        }
    }

    /// Faults that only several keys together have.
    fn check_together(&mut self) {
        let role = self.string("node", "role");
        if role != "all" {
            let place = self.place("node", "role");
            if self.string("store", "redis_url").is_empty() && !self.faulty("store.redis_url") {
                self.fault(place.clone(), "store.redis_url", format!("is required for role `{role}`"));
            }
            if self.string("relay", "secret").is_empty() && !self.faulty("relay.secret") {
                self.fault(place, "relay.secret", format!("is required for role `{role}`"));
            }
        }
        let listen = self.string("relay", "listen").parse::<std::net::SocketAddr>();
        if role == "edge"
            && listen.is_ok_and(|listen| listen.ip().is_unspecified())
            && self.string("relay", "advertise").is_empty()
        {
            let place = self.place("relay", "listen");
            let what = "is required where relay.listen is on all addresses: workers must know which one to dial";
            self.fault(place, "relay.advertise", what);
        }
        let default_model = self.string("edge", "default_model");
        if self.models.is_empty() {
            self.fault(Place::Named("models".into()), "", "no model is enabled");
        } else if !self.models.contains_key(&default_model) {
            let known = nearest(&default_model, self.models.keys().map(String::as_str));
            let hint = known.map(|known| format!("; did you mean `{known}`?")).unwrap_or_default();
            let place = self.place("edge", "default_model");
            self.fault(place, "edge.default_model", format!("`{default_model}` is not among the models{hint}"));
        }
        for model in self.models.keys().cloned().collect::<Vec<_>>() {
            self.at_most(&model, "output_tokens_max", "context_tokens_max");
            // Every running sequence takes a token of each step.
            self.at_most(&model, "sequences_max", "step_tokens_max");
            self.check_price(&model);
        }
    }

    /// A price that gives the model away by mistake, or a discount that is none.
    fn check_price(&mut self, model: &str) {
        let key = |name: &str| vec!["models".to_owned(), model.to_owned(), name.to_owned()];
        let text = |name: &str| {
            let (value, _) = self.values.get(&key(name))?;
            value.as_str().map(str::to_owned)
        };
        let nano = |name: &str| nano_per_token(&text(name)?).ok();
        let (Some(input), Some(output)) = (nano("input_usd_per_million"), nano("output_usd_per_million")) else {
            return;
        };
        let cached_input = nano("cached_input_usd_per_million").unwrap_or(input);
        let is_free = self.values.get(&key("free")).is_some_and(|(value, _)| value.as_bool() == Some(true));
        if let Err(fault) = check_price(Price { input, output, cached_input }, is_free) {
            let name = match fault {
                PriceFault::CachedAboveInput => "cached_input_usd_per_million",
                _ if input == NanoUsd::ZERO => "input_usd_per_million",
                _ => "output_usd_per_million",
            };
            let place = self.values[&key(name)].1.clone();
            self.fault(place, &shown(&key(name)), fault.to_string());
        }
    }

    fn at_most(&mut self, model: &str, smaller: &str, larger: &str) {
        let get = |name: &str| {
            let (value, place) = self.values.get(&vec!["models".into(), model.to_owned(), name.to_owned()])?;
            Some((value.as_integer()?, place.clone()))
        };
        if let (Some((a, place)), Some((b, _))) = (get(smaller), get(larger))
            && a > b
        {
            let key = shown(&["models".into(), model.to_owned(), smaller.to_owned()]);
            self.fault(place, &key, format!("{a} must not exceed {larger}, which is {b}"));
        }
    }

    fn string(&self, section: &str, key: &str) -> String {
        let value = self.values.get(&vec![section.to_owned(), key.to_owned()]);
        value.and_then(|(value, _)| value.as_str()).unwrap_or_default().to_owned()
    }

    fn place(&self, section: &str, key: &str) -> Place {
        self.values[&vec![section.to_owned(), key.to_owned()]].1.clone()
    }

    fn faulty(&self, key: &str) -> bool {
        self.faults.iter().any(|(_, fault)| fault.key == key)
    }

    fn finish(mut self) -> Result<Config, ConfigFaults> {
        if self.faults.is_empty() {
            let mut document = DocumentMut::new();
            for (key, (value, _)) in self.values {
                let (name, path) = key.split_last().expect("keys have parts");
                let mut item = document.as_item_mut();
                for part in path {
                    item = item
                        .as_table_like_mut()
                        .expect("sections are tables")
                        .entry(part)
                        .or_insert(toml_edit::table());
                }
                item[name.as_str()] = Item::Value(value);
            }
            return toml_edit::de::from_document(document).map_err(|error| {
                // The rules let something pass that the types do not: a fault of ours, told all the same.
                let fault =
                    ConfigFault { place: "configuration".into(), key: String::new(), what: error.message().to_owned() };
                ConfigFaults(vec![fault])
            });
        }
        self.faults.sort_by(|(a, _), (b, _)| a.cmp(b));
        Err(ConfigFaults(self.faults.into_iter().map(|(_, fault)| fault).collect()))
    }
}

/// The entries of a table with the places of their keys.
fn entries<'a>(
    table: &'a dyn TableLike,
    line: &dyn Fn(Option<std::ops::Range<usize>>) -> Place,
) -> Vec<(String, Place, &'a Item)> {
    let entry = |(name, item): (&str, &'a Item)| {
        let span = table.key(name).and_then(toml_edit::Key::span).or_else(|| item.span());
        (name.to_owned(), line(span), item)
    };
    table.iter().map(entry).collect()
}

fn unknown<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a str>) -> String {
    match nearest(name, known) {
        Some(word) => format!("unknown {what}; did you mean `{word}`?"),
        None => format!("unknown {what}"),
    }
}

fn shown(path: &[String]) -> String {
    let bare = |part: &String| part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    let parts: Vec<_> = path.iter().map(|part| if bare(part) { part.clone() } else { format!("{part:?}") }).collect();
    parts.join(".")
}
