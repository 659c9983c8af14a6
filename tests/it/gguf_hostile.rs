//! Files that lie. A small sound model is changed in ways that know the format, and in ways that know nothing
//! of it; whatever comes of it is read, or is an error: never a panic, never more memory than the file's size
//! allows, and what was read can be used.
//!
//! A long run, by hand: `LIGHTCONE_FUZZ_SECONDS=1800 LIGHTCONE_FUZZ_SEED=7 cargo test --test it gguf_hostile`.
//! What it finds is written to the temporary folder and named; it belongs into `tests/data/hostile`.

use std::{
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use lightcone::{
    grammar::Grammars,
    model::{Gguf, ModelFile},
    prompt::{PromptModel, Tokenizer},
};

use crate::support::{
    gguf::{Draft, Text, Value, block, small_model},
    heap,
};

/// Without the environment's word.
const CASES: u64 = 600;
const HEAP_FIXED: usize = 8 << 20;
/// A parsed value takes more than its bytes in the file.
const HEAP_PER_BYTE: usize = 64;

/// SplitMix64: the same cases on every machine, for ever.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// A number that somebody might not have thought of.
    pub fn awkward(&mut self) -> u64 {
        const NUMBERS: [u64; 22] = [
            0,
            1,
            2,
            3,
            7,
            31,
            33,
            127,
            255,
            65_535,
            65_536,
            65_537,
            1 << 22,
            (1 << 22) + 1,
            1 << 31,
            1 << 32,
            1 << 60,
            i64::MAX as u64,
            1 << 63,
            u64::MAX - 31,
            u64::MAX - 1,
            u64::MAX,
        ];
        match self.below(4) {
            0 => self.next(),
            1 => self.below(300) as u64,
            _ => NUMBERS[self.below(NUMBERS.len())],
        }
    }
}

fn change(draft: &mut Draft, random: &mut Random) {
    let (keys, tensors) = (draft.keys.len(), draft.tensors.len());
    match random.below(20) {
        0 => draft.key_count = Some(random.awkward()),
        1 => draft.tensor_count = Some(random.awkward()),
        2 => draft.version = random.awkward() as u32,
        3 => draft.keys[random.below(keys)].0.len = Some(random.awkward()),
        4 => drop(draft.keys.remove(random.below(keys))),
        5 => {
            let again = draft.keys[random.below(keys)].clone();
            draft.keys.insert(random.below(keys), again);
        }
        6 => drop(draft.tensors.remove(random.below(tensors))),
        7 => {
            let again = draft.tensors[random.below(tensors)].clone();
            draft.tensors.push(again);
        }
        8 => draft.tensors[random.below(tensors)].offset = Some(random.awkward()),
        9 => draft.tensors[random.below(tensors)].ty = random.below(40) as u32,
        10 => draft.tensors[random.below(tensors)].dimensions = Some(random.below(7) as u32),
        11 => {
            let dims = &mut draft.tensors[random.below(tensors)].dims;
            let at = random.below(dims.len());
            dims[at] = random.awkward();
        }
        12 => draft.tensors[random.below(tensors)].name.bytes = random.next().to_le_bytes()[..random.below(9)].into(),
        // A scale that is no number, or infinite.
        13 => {
            let data = &mut draft.tensors[random.below(tensors)].data;
            let at = random.below(data.len() / 4) * 4;
            let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.below(3)].to_le_bytes();
            data[at..at + 4].copy_from_slice(&bad);
        }
        14 => {
            let alignment = Value::U32([0, 1, 3, 64, 1 << 20, 1 << 21, u32::MAX][random.below(7)]);
            draft.keys.push(("general.alignment".into(), alignment));
        }
        15 => draft.alignment = [1, 8, 64][random.below(3)],
        16 => draft.tensors.swap(0, random.below(tensors)),
        _ => {
            let at = random.below(keys);
            change_value(&mut draft.keys[at].1, random);
        }
    }
}

fn change_value(value: &mut Value, random: &mut Random) {
    match value {
        Value::U32(x) if random.below(2) == 0 => *x = random.awkward() as u32,
        Value::F32(x) if random.below(2) == 0 => {
            *x = [f32::NAN, f32::INFINITY, -1.0, 0.0, 1e30][random.below(5)];
        }
        Value::Text(text) if random.below(2) == 0 => change_text(text, random),
        Value::Array { ty, len, items } if random.below(4) > 0 => match random.below(7) {
            0 => *len = Some(random.awkward()),
            1 => *ty = random.below(14) as u32,
            2 => drop(items.pop()),
            3 => {
                let many = items.clone();
                items.extend(many);
            }
            4 if !items.is_empty() => {
                let item = random.below(items.len());
                *len = Some(items.len() as u64);
                items[item] = Value::Array { ty: 9, len: Some(random.awkward()), items: vec![] };
            }
            5 => {
                *items = (0..random.below(5000)).map(|_| Value::U8(0)).collect();
                *ty = 0;
            }
            _ => {
                let item = random.below(items.len());
                if let Some(item) = items.get_mut(item) {
                    change_value(item, random);
                }
            }
        },
        other => {
            *other = match random.below(9) {
                0 => Value::U8(random.next() as u8),
                1 => Value::I32(-(random.below(9) as i32)),
                2 => Value::U64(random.awkward()),
                3 => Value::F32(f32::NAN),
                4 => Value::Bool(random.below(4) as u8),
                5 => Value::Text("".into()),
                6 => Value::Array { ty: random.below(14) as u32, len: Some(random.awkward()), items: vec![] },
                7 => Value::Raw { ty: random.below(20) as u32, bytes: vec![0xff; random.below(64)] },
                _ => Value::Text(Text { bytes: vec![b'x'; 1 << 16], len: None }),
            }
        }
    }
}

fn change_text(text: &mut Text, random: &mut Random) {
    match random.below(5) {
        0 => text.len = Some(random.awkward()),
        1 => text.bytes.clear(),
        2 => text.bytes = vec![0xff, 0xfe],
        3 => text.bytes = "{% for".into(),
        _ => text.bytes = ["<|a|>", "l l", "h", " ", "he ll", "🦀", "\u{0}"][random.below(7)].into(),
    }
}

/// Knows nothing of the format.
pub fn change_bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    let len = bytes.len();
    match random.below(4) {
        0 => bytes.truncate(random.below(len)),
        1 => {
            for _ in 0..1 + random.below(8) {
                bytes[random.below(len)] ^= 1 << random.below(8);
            }
        }
        2 => {
            let at = random.below(len.saturating_sub(8));
            let number = random.awkward().to_le_bytes();
            let room = (len - at).min(8);
            bytes[at..at + room].copy_from_slice(&number[..room]);
        }
        _ => {
            let (from, to) = (random.below(len), random.below(len));
            let room = random.below(64).min(len - from.max(to));
            bytes.copy_within(from..from + room, to);
        }
    }
}

fn hostile(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut draft = small_model([0, 2, 3, 8][random.below(4)]);
    let changes = random.below(4);
    for _ in 0..changes {
        change(&mut draft, &mut random);
        if draft.keys.is_empty() || draft.tensors.is_empty() {
            break;
        }
    }
    let mut bytes = draft.encode();
    if (changes == 0 || random.below(3) == 0) && !bytes.is_empty() {
        change_bytes(&mut bytes, &mut random);
    }
    bytes
}

/// How far the file came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reached {
    Nothing,
    Container,
    Model,
    Prompt,
}

/// Reads the file as a node would, and uses what was read.
fn read(path: &Path) -> Reached {
    let Ok(gguf) = Gguf::open(path) else { return Reached::Nothing };
    for name in gguf.tensor_names() {
        let info = gguf.tensor(name).expect("a name of its own");
        let numbers = info.dims.iter().product::<u64>();
        assert!(gguf.bytes(info).len() as u64 * 8 >= numbers, "a tensor of more numbers than bytes");
        if numbers < 1 << 20
            && let Ok(numbers) = gguf.dequantize(name)
        {
            assert!(numbers.iter().all(|x| x.is_finite()));
        }
    }
    let Ok(file) = ModelFile::open(path) else { return Reached::Container };
    let p = &file.params;
    assert!(p.heads > 0 && p.kv_heads > 0 && p.layers > 0 && p.rope_base.is_finite() && p.norm_epsilon.is_finite());
    assert!(file.vocabulary.eos.iter().chain(&file.vocabulary.bos).all(|id| (*id as usize) < file.vocabulary.len()));
    let Ok(tokenizer) = Tokenizer::new(Arc::clone(&file.vocabulary)) else { return Reached::Model };
    if let Ok(tokens) = tokenizer.encode("hello <|a|> wörld", true) {
        assert!(tokens.iter().all(|token| (*token as usize) < file.vocabulary.len()));
    }
    let grammars = Arc::new(Grammars::new(Arc::clone(&file.vocabulary)));
    match PromptModel::new(Arc::new(tokenizer), grammars, 64) {
        Ok(_) => Reached::Prompt,
        Err(_) => Reached::Model,
    }
}

/// Reads it in a way that survives a panic; the fault, in words.
fn try_read(bytes: &[u8]) -> Result<Reached, String> {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(bytes).expect("a file can be written");
    let (result, peak) = heap::peak_of(|| catch_unwind(AssertUnwindSafe(|| read(file.path()))));
    let allowed = HEAP_FIXED + HEAP_PER_BYTE * bytes.len();
    match result {
        Err(panic) => Err(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned())),
        Ok(_) if peak > allowed => Err(format!("{peak} bytes on the heap for a file of {}", bytes.len())),
        Ok(reached) => Ok(reached),
    }
}

#[test]
fn the_small_model_is_sound() {
    for ty in [0, 2, 3, 8] {
        assert!(block(ty).is_some());
        assert_eq!(try_read(&small_model(ty).encode()), Ok(Reached::Prompt), "type {ty}");
    }
}

#[test]
fn hostile_files_are_read_or_refused_and_nothing_else() {
    let env = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (limit, seed) = (env("LIGHTCONE_FUZZ_SECONDS").map(Duration::from_secs), env("LIGHTCONE_FUZZ_SEED"));
    let first = seed.unwrap_or(1).wrapping_mul(1 << 40);
    let (begun, mut cases, mut reached, mut faults) = (Instant::now(), 0u64, [0u64; 4], Vec::new());
    let goes_on = |cases: u64| limit.map_or(cases < CASES, |limit| begun.elapsed() < limit);
    while goes_on(cases) && faults.len() < 20 {
        let bytes = hostile(first + cases);
        match try_read(&bytes) {
            Ok(far) => reached[far as usize] += 1,
            Err(fault) => {
                let path = std::env::temp_dir().join(format!("lightcone-hostile-{}.gguf", first + cases));
                std::fs::write(&path, &bytes).expect("a file can be written");
                faults.push(format!("{}: {fault}", path.display()));
            }
        }
        cases += 1;
    }
    println!("{cases} files; nothing, container, model, prompt: {reached:?}");
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
    // A harness whose files all fail at the first byte tests nothing.
    assert!([0, 1, 3].iter().all(|far| reached[*far] > cases / 50), "{reached:?}");
}

/// Lists whose values take one byte in the file, and many in memory.
#[test]
fn a_file_cannot_have_us_hold_many_times_its_size() {
    let mut draft = small_model(0);
    for key in 0..8 {
        let bytes = [&0u32.to_le_bytes()[..], &(1u64 << 20).to_le_bytes(), &vec![1; 1 << 20]].concat();
        draft.keys.push((format!("list.{key}").as_str().into(), Value::Raw { ty: 9, bytes }));
    }
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(&draft.encode()).expect("a file can be written");
    let (opened, peak) = heap::peak_of(|| Gguf::open(file.path()));
    let error = opened.err().expect("too much").to_string();
    assert!(error.contains("its lists have more than 4194304 values"), "{error}");
    assert!(peak < 160 << 20, "{peak}");
}

/// What long runs found, once.
#[test]
fn files_that_once_broke_the_reader_do_so_no_more() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hostile");
    let mut found = 0;
    for entry in std::fs::read_dir(&folder).expect("the corpus") {
        let path = entry.expect("the corpus").path();
        let read = try_read(&std::fs::read(&path).expect("a file"));
        assert!(read.is_ok(), "{}: {read:?}", path.display());
        found += 1;
    }
    assert!(found > 0);
}
