//! What is asked: bodies of requests as pure functions of workload, seed and number.
//!
//! Words are drawn from a short list of common ones, so that a word is about a token in any vocabulary.

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Prompts that differ from the first word on, so that no prefix cache helps.
    #[default]
    Unique,
    /// One prefix for all requests, and a tail of its own for each.
    SharedPrefix,
    /// One long prompt after another, each unlike the others: its time to the first token.
    Long,
    /// A text to be given back with one word changed: most of the answer stands in the prompt.
    Rewrite,
    /// Running streams, and long prompts that arrive among them: what the streams notice.
    Disturb,
}

#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub prompt_words: u32,
    pub prefix_words: u32,
    pub disturbing_words: u32,
    pub output_tokens: u32,
}

impl Sizes {
    /// What the targets are measured with.
    pub fn of(workload: Workload) -> Self {
        let (prompt_words, output_tokens) = match workload {
            Workload::Unique => (128, 128),
            Workload::SharedPrefix => (24, 64),
            Workload::Long => (1_960, 16),
            Workload::Rewrite => (150, 160),
            Workload::Disturb => (48, 1_024),
        };
        Self { prompt_words, prefix_words: 460, disturbing_words: 3_940, output_tokens }
    }
}

pub struct Prompts {
    model: String,
    workload: Workload,
    seed: u64,
    sizes: Sizes,
    usage_in_chunks: bool,
}

/// A request and how many tokens its answer must have.
pub struct Ask {
    pub body: Value,
    pub output_tokens: u32,
}

impl Prompts {
    pub fn new(model: String, workload: Workload, seed: u64, sizes: Sizes) -> Self {
        Self { model, workload, seed, sizes, usage_in_chunks: false }
    }

    /// Whether to ask for a token count in every chunk.
    pub fn with_usage_in_chunks(self, usage_in_chunks: bool) -> Self {
        Self { usage_in_chunks, ..self }
    }

    /// The request of this number; a stream to be disturbed, in that workload.
    pub fn ask(&self, number: u32) -> Ask {
        let Sizes { prompt_words, prefix_words, output_tokens, .. } = self.sizes;
        let user = |text: String| json!({"role": "user", "content": text});
        let messages = match self.workload {
            Workload::Unique | Workload::Long | Workload::Disturb => {
                vec![user(unique(self.seed, number, prompt_words))]
            }
            Workload::SharedPrefix => vec![
                json!({"role": "system", "content": unique(self.seed, u32::MAX, prefix_words)}),
                user(unique(self.seed, number, prompt_words)),
            ],
            Workload::Rewrite => vec![user(rewrite(self.seed, number, prompt_words))],
        };
        self.body(messages, output_tokens)
    }

    /// The long prompt that arrives among running streams; answered with one token.
    pub fn disturbing(&self, number: u32) -> Ask {
        let text = unique(self.seed ^ 0x5eed, number, self.sizes.disturbing_words);
        self.body(vec![json!({"role": "user", "content": text})], 1)
    }

    fn body(&self, messages: Vec<Value>, output_tokens: u32) -> Ask {
        let mut body = json!({
            "model": self.model,
            "messages": messages,
            "stream": true,
            "stream_options": {"include_usage": true},
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": true,
            // llama-server's name for reusing what a slot has computed; unique prompts find nothing to reuse.
            "cache_prompt": self.workload == Workload::SharedPrefix,
        });
        if self.usage_in_chunks {
            body["stream_options"]["continuous_usage_stats"] = json!(true);
        }
        Ask { body, output_tokens }
    }
}

// --- texts ------------------------------------------------------------------------------------------

const NOUNS: [&str; 24] = [
    "river", "stone", "light", "house", "garden", "winter", "summer", "market", "bridge", "letter", "window", "music",
    "story", "friend", "island", "forest", "road", "ship", "water", "fire", "city", "field", "horse", "table",
];
const ADJECTIVES: [&str; 12] =
    ["silver", "golden", "small", "large", "quiet", "loud", "early", "late", "open", "old", "new", "lost"];
const VERBS: [&str; 8] = ["carried", "found", "watched", "heard", "painted", "crossed", "followed", "brought"];
const OTHERS: [&str; 16] = [
    "under", "over", "near", "far", "with", "without", "before", "after", "the", "a", "and", "then", "night",
    "morning", "child", "paper",
];

/// Begins with its number, so that no two prompts share more than the template.
fn unique(seed: u64, number: u32, words: u32) -> String {
    let mut random = Random::new(seed, number);
    let mut text = format!("{number} {seed}:");
    for _ in 0..words {
        let list: &[&str] = match random.below(4) {
            0 => &NOUNS,
            1 => &ADJECTIVES,
            2 => &VERBS,
            _ => &OTHERS,
        };
        text.push(' ');
        text.push_str(random.pick(list));
    }
    text
}

fn rewrite(seed: u64, number: u32, words: u32) -> String {
    const SENTENCE_WORDS: u32 = 10;
    let mut random = Random::new(seed, number);
    let changed = random.pick(&NOUNS);
    let mut text = String::new();
    for sentence in 0..words.div_ceil(SENTENCE_WORDS) {
        let (first, second) = (random.pick(&ADJECTIVES), random.pick(&ADJECTIVES));
        // Every third sentence has the word that is to be changed.
        let subject = if sentence % 3 == 0 { changed } else { random.pick(&NOUNS) };
        let (object, place, verb) = (random.pick(&NOUNS), random.pick(&NOUNS), random.pick(&VERBS));
        text.push_str(&format!("The {first} {subject} {verb} the {second} {object} near a {place}. "));
    }
    format!(
        "Repeat the following text word for word, but write \"castle\" wherever it says \"{changed}\". \
         Answer with the text alone.\n\n{}",
        text.trim_end()
    )
}

/// SplitMix64: seeded, and the same on every machine and with every version of every library.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64, number: u32) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(number).wrapping_mul(0xD1B5_4A32_D192_ED03))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn pick<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[self.below(list.len())]
    }

    /// In (0, 1]: never zero, so that its logarithm is finite.
    pub fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(workload: Workload, number: u32) -> Vec<String> {
        let ask = Prompts::new("m".into(), workload, 7, Sizes::of(workload)).ask(number);
        let messages = ask.body["messages"].as_array().expect("has messages").clone();
        messages.iter().map(|message| message["content"].as_str().expect("is text").to_owned()).collect()
    }

    #[test]
    fn a_prompt_is_a_function_of_seed_and_number() {
        for workload in Workload::value_variants() {
            assert_eq!(texts(*workload, 3), texts(*workload, 3), "{workload:?}");
            assert_ne!(texts(*workload, 3), texts(*workload, 4), "{workload:?}");
        }
    }

    #[test]
    fn unique_prompts_differ_from_their_first_word_on_and_shared_ones_only_in_their_tail() {
        assert_ne!(texts(Workload::Unique, 1)[0].split(' ').next(), texts(Workload::Unique, 2)[0].split(' ').next());
        let (one, other) = (texts(Workload::SharedPrefix, 1), texts(Workload::SharedPrefix, 2));
        assert_eq!(one[0], other[0]);
        assert_eq!(one[0].split(' ').count(), 2 + 460);
        assert_ne!(one[1], other[1]);
    }

    #[test]
    fn a_text_to_be_rewritten_has_the_word_that_changes() {
        let text = texts(Workload::Rewrite, 5).remove(0);
        let changed = text.split('"').nth(3).expect("names the word");
        let (_, body) = text.split_once("\n\n").expect("has a body");
        assert!(body.matches(changed).count() >= 5, "{text}");
        assert!((140..=170).contains(&body.split(' ').count()), "{text}");
    }
}
