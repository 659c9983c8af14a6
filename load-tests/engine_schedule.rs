//! What the engine's scheduling does for speed, without HTTP: what a long prompt costs running streams, what
//! a known prefix saves, what guessing ahead gains and loses, what it costs to hold answers to a form. Prints figures and judges nothing.
//!
//! `cargo run --release --example engine-schedule [-- DATA_DIR [disturb|prefix|guesses|grammars]]`

use std::{
    collections::BTreeMap,
    error::Error,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use lightcone::{
    domain::{ModelId, Priority, RequestId, SamplingParams, Stops, Telling},
    engine::{
        self, Backend, EngineEventBody, EngineHandle, EngineMessage, EngineRequest, EngineSpec, Resumed, Speculation,
        onnx::{OnnxRuntime, RuntimeOptions},
    },
    grammar::Grammars,
    model::ModelFile,
    prompt::{Shape, TextShape, Tokenizer, Whitespace},
    telemetry::Metrics,
};
use serde_json::json;
use tokio::sync::mpsc;

type Outcome<T> = Result<T, Box<dyn Error>>;

const WORDS: &str = "the a river stone bright old over under quick garden seven window letter song paper moon grey \
                     boat winter field north table open slow copper voice road small bread lamp";

struct Bench {
    runtime: OnnxRuntime,
    file: Arc<ModelFile>,
    tokenizer: Tokenizer,
    fresh: u64,
}

struct Running {
    handle: EngineHandle,
    events: mpsc::Receiver<EngineMessage>,
    /// When each step was told of.
    steps: Vec<Instant>,
}

/// Arrival times of a request's pieces of text, and its tokens.
#[derive(Default)]
struct Heard {
    at: Vec<Instant>,
    tokens: u32,
    ended: bool,
}

fn main() -> Outcome<()> {
    let data_dir = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| ".lightcone".into()));
    let threads = std::thread::available_parallelism()?.get();
    let library = OnnxRuntime::find_library("".as_ref(), &data_dir);
    let options = RuntimeOptions { library, threads, spinning: true, providers: vec!["cpu".into()] };
    let file = ModelFile::open(&data_dir.join("models/SmolLM2-135M-Instruct.Q4_1.gguf"))?;
    let tokenizer = Tokenizer::new(Arc::clone(&file.vocabulary))?;
    let mut bench = Bench { runtime: OnnxRuntime::start(options)?, file, tokenizer, fresh: 0 };
    let only = std::env::args().nth(2);
    let wanted = |name: &str| only.as_ref().is_none_or(|only| only == name);
    for streams in [1, 4, 16].into_iter().filter(|_| wanted("disturb")) {
        bench.long_prompt(streams)?;
    }
    if wanted("prefix") {
        bench.known_prefix()?;
        bench.common_prefix()?;
    }
    if wanted("guesses") {
        bench.guesses()?;
    }
    if wanted("grammars") {
        bench.grammars()?;
    }
    Ok(())
}

impl Bench {
    fn start(&self, speculation: Speculation, prefix_cache: bool) -> Outcome<Running> {
        let (sink, events) = mpsc::channel(64);
        let spec = EngineSpec {
            model: ModelId::from("bench"),
            file: Arc::clone(&self.file),
            backend: Backend::Onnx(self.runtime.clone()),
            context_tokens_max: 8192,
            sequences_max: 32,
            step_tokens_max: 64,
            kv_block_tokens: 16,
            kv_memory_bytes: 512 << 20,
            prefix_cache,
            speculation,
        };
        let handle = engine::spawn(spec, sink, Arc::new(Metrics::new()))?;
        Ok(Running { handle, events, steps: Vec::new() })
    }

    /// Text that has not been used before.
    fn text(&mut self, words: usize) -> String {
        let list: Vec<&str> = WORDS.split_whitespace().collect();
        let mut text = String::new();
        for _ in 0..words {
            self.fresh = self.fresh.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text += list[(self.fresh >> 33) as usize % list.len()];
            text.push(' ');
        }
        text
    }

    fn request(&self, id: &str, text: &str, output_tokens_max: u32) -> Outcome<EngineRequest> {
        let prompt = format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
        Ok(EngineRequest {
            request: RequestId::from(id),
            choice: 0,
            prompt: self.tokenizer.encode(&prompt, true)?,
            resumed: Resumed::default(),
            output_tokens_max,
            sampling: SamplingParams { temperature: 0.0, seed: 1, ..SamplingParams::default() },
            stops: Stops { ignore_eos: true, ..Stops::default() },
            telling: Telling::default(),
            constraint: None,
            priority: Priority::Normal,
            lane: "bench".into(),
            cache_salt: vec![],
            allowed_tokens: output_tokens_max,
            step_tokens: 0,
        })
    }

    /// Streams run; then a prompt of about 4,000 tokens comes.
    fn long_prompt(&mut self, streams: usize) -> Outcome<()> {
        let mut running = self.start(Speculation::Off, true)?;
        let mut all = BTreeMap::new();
        for i in 0..streams {
            let text = self.text(40);
            running.handle.submit(vec![self.request(&format!("s{i}"), &text, 3000)?])?;
        }
        running.listen_for(&mut all, Duration::from_secs(5), |_| false)?;
        let long = self.text(3960);
        let (submitted, request) = (Instant::now(), self.request("long", &long, 1)?);
        let tokens = request.prompt.len();
        running.handle.submit(vec![request])?;
        let has_ended = |all: &BTreeMap<String, Heard>| all.get("long").is_some_and(|heard| heard.ended);
        running.listen_for(&mut all, Duration::from_secs(180), has_ended)?;
        let first = submitted.elapsed();
        let gaps = |all: &BTreeMap<String, Heard>, from: Instant, to: Instant| {
            let streams = all.iter().filter(|(id, _)| *id != "long");
            let pairs = streams.flat_map(|(_, heard)| heard.at.windows(2).map(|pair| (pair[0], pair[1])));
            let within = pairs.filter(|(a, b)| *a >= from && *b <= to);
            let mut ms: Vec<f64> = within.map(|(a, b)| (b - a).as_secs_f64() * 1e3).collect();
            ms.sort_by(f64::total_cmp);
            ms
        };
        // The first second is for streams that begin.
        let alone = gaps(&all, submitted - Duration::from_secs(4), submitted);
        let beside = gaps(&all, submitted, submitted + first);
        println!(
            "{streams:2} streams, then a prompt of {tokens} tokens (first token after {:.1} s): between tokens, in ms, \
             p50 {:.1} -> {:.1}, p99 {:.1} -> {:.1} ({:.2} times)",
            first.as_secs_f64(),
            at(&alone, 0.5),
            at(&beside, 0.5),
            at(&alone, 0.99),
            at(&beside, 0.99),
            at(&beside, 0.99) / at(&alone, 0.99)
        );
        Ok(())
    }

    fn known_prefix(&mut self) -> Outcome<()> {
        let mut running = self.start(Speculation::Off, true)?;
        let mut ratios = Vec::new();
        for _ in 0..5 {
            let common = self.text(480);
            let mut times = Vec::new();
            for turn in ["first", "second"] {
                let text = format!("{common} {}", self.text(8));
                let started = Instant::now();
                running.handle.submit(vec![self.request(turn, &text, 1)?])?;
                let mut all = BTreeMap::new();
                running.listen_for(&mut all, Duration::from_secs(60), |all| all.values().any(|heard| heard.ended))?;
                times.push(started.elapsed().as_secs_f64() * 1e3);
            }
            ratios.push(times[1] / times[0]);
            println!("a prefix of some 500 tokens: first token after {:.0} ms, then {:.0} ms", times[0], times[1]);
        }
        ratios.sort_by(f64::total_cmp);
        println!("  median {:.0}%", ratios[2] * 100.0);
        Ok(())
    }

    fn common_prefix(&mut self) -> Outcome<()> {
        for prefix_cache in [false, true] {
            let mut running = self.start(Speculation::Off, prefix_cache)?;
            let common = self.text(450);
            let started = Instant::now();
            for i in 0..12 {
                let text = format!("{common} {}", self.text(8));
                running.handle.submit(vec![self.request(&i.to_string(), &text, 32)?])?;
            }
            let mut all = BTreeMap::new();
            let done = |all: &BTreeMap<String, Heard>| all.values().filter(|heard| heard.ended).count() == 12;
            running.listen_for(&mut all, Duration::from_secs(120), done)?;
            let tokens: u32 = all.values().map(|heard| heard.tokens).sum();
            let rate = f64::from(tokens) / started.elapsed().as_secs_f64();
            println!("12 requests at once with one prefix, shared: {prefix_cache}: {rate:.0} tokens/s");
        }
        Ok(())
    }

    /// One stream that copies and one that does not, with and without guessing, in turns.
    fn guesses(&mut self) -> Outcome<()> {
        let text = "Alice was beginning to get very tired of sitting by her sister on the bank, and of having \
                    nothing to do. Once or twice she had peeped into the book her sister was reading, but it had no \
                    pictures or conversations in it, and what is the use of a book, thought Alice, without pictures \
                    or conversations? So she was considering in her own mind whether the pleasure of making a chain \
                    of daisies would be worth the trouble of getting up and picking the daisies.";
        let copy = format!("Rewrite this text, with the word sister changed to brother, and say nothing else:\n{text}");
        let tasks = [("copy", copy), ("story", "Write a long story about a boat in winter.".to_owned())];
        for (name, task) in tasks {
            let mut rates = [Vec::new(), Vec::new()];
            for round in 0..6 {
                let speculation = [Speculation::Off, Speculation::Auto][round % 2];
                let mut running = self.start(speculation, false)?;
                running.handle.submit(vec![self.request("r", &task, 120)?])?;
                let mut all = BTreeMap::new();
                running.listen_for(&mut all, Duration::from_secs(60), |all| all.values().any(|heard| heard.ended))?;
                let heard = &all["r"];
                let whole = *heard.at.last().ok_or("no text")? - heard.at[0];
                rates[round % 2].push(f64::from(heard.tokens) / whole.as_secs_f64());
            }
            rates.iter_mut().for_each(|rates| rates.sort_by(f64::total_cmp));
            let (without, with) = (rates[0][1], rates[1][1]);
            println!("{name}: {without:.0} tokens/s, guessing {with:.0} ({:.2} times)", with / without);
        }
        Ok(())
    }

    /// Eight streams held to JSON schemas, against the same streams left to themselves, in turns.
    fn grammars(&mut self) -> Outcome<()> {
        let grammars = Grammars::new(Arc::clone(&self.file.vocabulary));
        for (name, schema) in [("plain objects", objects()), ("patterns, numbers and choices", hard())] {
            let shape = Shape { text: TextShape::Json { schema, whitespace: Whitespace::None }, ..Shape::default() };
            let constraint = grammars.compile("bench", &shape.grammar().ok_or("a shape without a grammar")?)?;
            let (mut means, mut medians) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
            for round in 0..10 {
                let mut running = self.start(Speculation::Off, false)?;
                let text = self.text(40);
                for i in 0..8 {
                    let constraint = (round % 2 == 1).then(|| constraint.clone());
                    let request = self.request(&i.to_string(), &format!("{text} {i}"), 160)?;
                    running.handle.submit(vec![EngineRequest { constraint, ..request }])?;
                }
                let mut all = BTreeMap::new();
                let done = |all: &BTreeMap<String, Heard>| all.values().filter(|heard| heard.ended).count() == 8;
                running.listen_for(&mut all, Duration::from_secs(120), done)?;
                // While all eight run: the first steps are those of their prompts.
                let from = all.values().filter_map(|heard| heard.at.first()).max().ok_or("no text")?;
                let steps = running.steps.windows(2).filter(|pair| pair[0] >= *from);
                let mut ms: Vec<f64> = steps.map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect();
                let short = all.values().filter(|heard| heard.tokens < 150).count();
                if short > 0 {
                    return Err(format!("{short} answers ended before their time").into());
                }
                ms.sort_by(f64::total_cmp);
                means[round % 2].push(ms.iter().sum::<f64>() / ms.len() as f64);
                medians[round % 2].push(at(&ms, 0.5));
            }
            means.iter_mut().chain(&mut medians).for_each(|rounds| rounds.sort_by(f64::total_cmp));
            let pick = |rounds: &[Vec<f64>; 2]| (rounds[0][2], rounds[1][2], rounds[1][2] / rounds[0][2]);
            let ((a, b, ratio), (c, d, other)) = (pick(&means), pick(&medians));
            println!(
                "8 streams held to {name}: a step takes {a:.1} -> {b:.1} ms in the mean ({ratio:.3} times), \
                 {c:.1} -> {d:.1} in the median ({other:.3} times)"
            );
        }
        Ok(())
    }
}

fn objects() -> serde_json::Value {
    let item = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "text"],
        "properties": { "name": { "type": "string" }, "text": { "type": "string" } },
    });
    json!({ "type": "array", "minItems": 100, "items": item })
}

fn hard() -> serde_json::Value {
    let item = json!({
        "type": "object", "additionalProperties": false, "required": ["id", "when", "kind", "size", "more"],
        "properties": {
            "id": { "type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}(-[a-z]+)?$" },
            "when": { "type": "string", "format": "date-time" },
            "kind": { "enum": ["lamp", "lantern", "lighthouse", "torch"] },
            "size": { "type": "number", "minimum": -10, "maximum": 1000 },
            "more": { "anyOf": [{ "type": "string", "maxLength": 20 }, { "type": "array", "items": { "type": "boolean" } }] },
        },
    });
    json!({ "type": "array", "minItems": 100, "items": item })
}

impl Running {
    /// Listens until `done`, or for at most `limit`.
    fn listen_for(
        &mut self,
        all: &mut BTreeMap<String, Heard>,
        limit: Duration,
        done: impl Fn(&BTreeMap<String, Heard>) -> bool,
    ) -> Outcome<()> {
        let started = Instant::now();
        while started.elapsed() < limit && !done(all) {
            let Some(EngineMessage::Step(events)) = self.events.blocking_recv() else {
                return Err("the engine died".into());
            };
            let now = Instant::now();
            self.steps.push(now);
            for event in events {
                let heard = all.entry(event.request.to_string()).or_default();
                match event.body {
                    EngineEventBody::Prompt { .. } | EngineEventBody::NeedsTokens { .. } => {}
                    EngineEventBody::Delta { ids, .. } => {
                        heard.at.push(now);
                        heard.tokens += ids.len() as u32;
                    }
                    EngineEventBody::Finished { .. } => heard.ended = true,
                    EngineEventBody::Failed { message } => return Err(message.into()),
                }
            }
        }
        Ok(())
    }
}

fn at(sorted: &[f64], share: f64) -> f64 {
    let rank = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(rank).copied().unwrap_or(f64::NAN)
}
