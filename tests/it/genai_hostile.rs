//! Folders that lie: each lie is one clear line and never a panic, a file outside the folder, or memory of the
//! lie's choosing.
//!
//! A long run, by hand: `LIGHTCONE_FUZZ_SECONDS=1800 LIGHTCONE_FUZZ_SEED=7 cargo test --test it genai_hostile`.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use lightcone::{
    grammar::Grammars,
    model::ModelFile,
    prompt::{PromptModel, Tokenizer},
};
use serde_json::json;

use crate::{
    gguf_hostile::{Random, change_bytes},
    support::{
        genai::{Attribute, Folder, LAYOUTS, field, small_folder},
        heap,
    },
};

/// Without the environment's word.
const CASES: u64 = 250;
const HEAP_FIXED: usize = 8 << 20;
const HEAP_PER_BYTE: usize = 64;

/// Opens it as a node would and uses what was read; what was wrong, in words.
fn read(path: &Path) -> Result<(), String> {
    let file = ModelFile::open(path).map_err(|error| error.to_string())?;
    for name in file.tensors.tensor_names() {
        let numbers = file.tensors.dequantize(name).map_err(|error| error.to_string())?;
        assert!(numbers.iter().all(|x| x.is_finite()));
    }
    let tokenizer = Tokenizer::new(Arc::clone(&file.vocabulary)).map_err(|error| error.to_string())?;
    let tokens = tokenizer.encode("hello <|a|> wörld", true).map_err(|error| error.to_string())?;
    assert!(tokens.iter().all(|token| (*token as usize) < file.vocabulary.len()));
    let grammars = Arc::new(Grammars::new(Arc::clone(&file.vocabulary)));
    PromptModel::new(Arc::new(tokenizer), grammars, 64).map(drop).map_err(|error| error.to_string())
}

/// The same, in a way that survives a panic: that, or too much memory, is the outer error.
fn try_read(folder: &Path) -> Result<Result<(), String>, String> {
    let bytes: u64 = fs::read_dir(folder).expect("a folder").map(|file| file.unwrap().metadata().unwrap().len()).sum();
    let (result, peak) = heap::peak_of(|| catch_unwind(AssertUnwindSafe(|| read(folder))));
    match result {
        Err(panic) => Err(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned())),
        Ok(_) if peak > HEAP_FIXED + HEAP_PER_BYTE * bytes as usize => Err(format!("{peak} bytes for {bytes}")),
        Ok(read) => Ok(read),
    }
}

/// Every lie with some words of what is said of it.
#[test]
fn every_lie_is_one_clear_line() {
    type Lie = Box<dyn Fn(&mut Folder)>;
    let (f32s, codes) = (0, 2);
    let lie = |ty: u32, said: &'static str, lie: Lie| (ty, said, lie);
    let int = |node: &'static str, name: &'static str, value: i64| -> Lie {
        Box::new(move |folder| folder.node(node).set(name, Attribute::Int(value)))
    };
    let location = |to: &'static str| -> Lie { Box::new(move |f| f.initializer("o_proj").location = to.into()) };
    let offset = |to: &'static str| -> Lie { Box::new(move |f| f.initializer("o_proj").offset = Some(to.into())) };
    let length = |to: &'static str| -> Lie { Box::new(move |f| f.initializer("o_proj").length = Some(to.into())) };
    let dims =
        |name: &'static str, dims: &'static [i64]| -> Lie { Box::new(move |f| f.initializer(name).dims = dims.into()) };
    let number = |name: &'static str, at: usize, x: f32| -> Lie {
        Box::new(move |f| f.initializer(name).data[at * 4..][..4].copy_from_slice(&x.to_le_bytes()))
    };
    let config = |key: &'static str, value: serde_json::Value| -> Lie {
        Box::new(move |f| *f.config.pointer_mut(key).unwrap() = value.clone())
    };
    let lies = [
        // The data: where it is, and how much.
        lie(codes, "`../secret` is not the name of a file in its folder", location("../secret")),
        lie(codes, "`/etc/passwd` is not the name of a file in its folder", location("/etc/passwd")),
        lie(codes, "`..` is not the name of a file in its folder", location("..")),
        lie(codes, "`a/../b` is not the name of a file in its folder", location("a/../b")),
        lie(codes, "`` is not the name of a file in its folder", location("")),
        lie(codes, "cannot read model file ", location("other.data")),
        lie(codes, "it is truncated or corrupted", offset("9999999")),
        lie(codes, "it is truncated or corrupted", offset("18446744073709551615")),
        lie(codes, "has the offset `-1`", offset("-1")),
        lie(codes, "has the offset `99999999999999999999`", offset("99999999999999999999")),
        lie(codes, "has 7 bytes of data, but its shape", length("7")),
        lie(codes, "it is truncated or corrupted", length("18446744073709551615")),
        lie(codes, "it is truncated or corrupted", Box::new(|f| f.data_bytes = Some(1000))),
        lie(codes, "it is truncated or corrupted", Box::new(|f| f.graph_bytes = Some(1000))),
        lie(codes, "it is not an ONNX model", Box::new(|f| f.graph_bytes = Some(0))),
        // Shapes.
        lie(codes, "has the impossible shape", dims("o_proj", &[i64::MAX, i64::MAX])),
        lie(codes, "has the impossible shape", dims("o_proj", &[-1, 64])),
        lie(codes, "has the impossible shape", dims("o_proj", &[0])),
        lie(codes, "has the impossible shape", dims("o_proj", &[1, 1, 1, 1, 1])),
        lie(codes, "has 2048 bytes of data, but its shape", dims("o_proj", &[1 << 40])),
        lie(f32s, "tensor `output.weight` has shape [260, 64]", dims("lm_head", &[260, 64])),
        lie(f32s, "has the shape [8, 8], expected 64 floats", dims("input_layernorm", &[8, 8])),
        lie(codes, "has data type 99, which is not supported", Box::new(|f| f.initializer("o_proj").ty = 99)),
        lie(codes, "has K 0, outside", int("o_proj", "K", 0)),
        lie(codes, "has K -64, outside", int("o_proj", "K", -64)),
        lie(codes, "has N 9223372036854775807, outside", int("o_proj", "N", i64::MAX)),
        lie(codes, "bytes of `model.layers.0.attn.o_proj.MatMul.weight_Q4`", int("o_proj", "N", 1 << 26)),
        lie(codes, "has 4 bits in blocks of 16, which is not supported", int("o_proj", "block_size", 16)),
        lie(codes, "has 4 bits in blocks of 0, which is not supported", int("o_proj", "block_size", 0)),
        lie(codes, "has 2 bits in blocks of 32, which is not supported", int("o_proj", "bits", 2)),
        // Numbers.
        lie(f32s, "holds a value that is not a finite number", number("lm_head", 77, f32::NAN)),
        lie(
            codes,
            "holds a value that is not a finite number",
            number("o_proj.MatMul.weight_scales", 3, f32::INFINITY),
        ),
        lie(codes, "scaled rotary embeddings are not supported", number("cos_cache", 500, 0.5)),
        lie(codes, "scaled rotary embeddings are not supported", number("sin_cache", 31, f32::NAN)),
        // What a node does beside what is known of it.
        lie(
            codes,
            "(Softplus) stands where only Sigmoid is supported",
            Box::new(|f| f.node("Sigmoid").op = "Softplus".into()),
        ),
        lie(codes, "has local_window_size 64, but only -1 is supported", int("GroupQuery", "local_window_size", 64)),
        lie(codes, "has do_rotary 0, but only 1 is supported", int("GroupQuery", "do_rotary", 0)),
        lie(codes, "has rotary_interleaved 1", int("GroupQuery", "rotary_interleaved", 1)),
        lie(codes, "has num_heads 4, but genai_config.json has 2", int("GroupQuery", "num_heads", 4)),
        lie(codes, "has an attribute `sliding`, which is not supported", int("GroupQuery", "sliding", 1)),
        lie(codes, "softcap 30", Box::new(|f| f.node("GroupQuery").set("softcap", Attribute::Float(30.0)))),
        lie(
            codes,
            "has an input 11, which is not supported",
            Box::new(|f| f.node("GroupQuery").inputs[11] = "cos_cache".into()),
        ),
        lie(codes, "has weight_prepacked 1", int("o_proj", "weight_prepacked", 1)),
        lie(
            codes,
            "has the epsilon 0.1, unlike the others",
            Box::new(|f| f.node("post_attention").set("epsilon", Attribute::Float(0.1))),
        ),
        lie(
            codes,
            "an attribute `epsilon` that is no finite number",
            Box::new(|f| f.node("post_attention").set("epsilon", Attribute::Float(f32::NAN))),
        ),
        lie(
            codes,
            "is not the SiLU of one value",
            Box::new(|f| {
                let other = f.node("mlp/up_proj").outputs[0].clone();
                f.node("Sigmoid").inputs[0] = other;
            }),
        ),
        lie(
            codes,
            "do not reckon lengths from the attention mask",
            Box::new(|f| f.node("ReduceSum").inputs[0] = "input_ids".into()),
        ),
        lie(codes, "does not read the tokens", Box::new(|f| f.node("GatherBlock").inputs[1] = "other_ids".into())),
        // What nobody reads.
        lie(
            codes,
            "node `/more` (Relu) is not supported",
            Box::new(|f| {
                let mut more = f.node("Sigmoid").clone();
                (more.name, more.op, more.outputs) = ("/more".into(), "Relu".into(), vec!["more".into()]);
                f.nodes.push(more);
            }),
        ),
        lie(
            codes,
            "initializer `lora` is not supported",
            Box::new(|f| {
                let mut more = f.initializer("o_proj").clone();
                more.name = "lora".into();
                f.initializers.push(more);
            }),
        ),
        lie(codes, "stands twice", Box::new(|f| f.initializers.push(f.initializers[0].clone()))),
        lie(codes, "is made twice", Box::new(|f| f.nodes.push(f.nodes[3].clone()))),
        lie(codes, "no node makes `logits`", Box::new(|f| _ = f.nodes.pop())),
        lie(codes, "is not an initializer", Box::new(|f| _ = f.initializers.pop())),
        lie(
            codes,
            "functions of its own and sparse initializers are not supported",
            Box::new(|f| field(&mut f.more_graph, 15, b"")),
        ),
        lie(
            codes,
            "it has more than 65536 nodes or initializers",
            Box::new(|f| f.more_graph = [0x0a, 0].repeat(70_000)),
        ),
        // The configuration.
        lie(codes, "model.type is `phi3`; in this layout, llama is the only", config("/model/type", json!("phi3"))),
        lie(codes, "unknown field `vision`", Box::new(|f| f.config["model"]["vision"] = json!({}))),
        lie(codes, "unknown field `pipeline`", Box::new(|f| f.config["model"]["decoder"]["pipeline"] = json!([]))),
        lie(
            codes,
            "num_hidden_layers is 9999999, outside",
            config("/model/decoder/num_hidden_layers", json!(9_999_999)),
        ),
        lie(
            codes,
            "stands where only com.microsoft.SkipSimplified",
            config("/model/decoder/num_hidden_layers", json!(2)),
        ),
        lie(codes, "num_attention_heads is 0, outside", config("/model/decoder/num_attention_heads", json!(0))),
        lie(codes, "has the shape [128, 16], expected", config("/model/context_length", json!(1 << 20))),
        lie(codes, "tensor `output.weight` has shape", config("/model/vocab_size", json!(1 << 20))),
        lie(codes, "eos_token_id 260 is outside the vocabulary", config("/model/eos_token_id", json!([259, 260]))),
        lie(
            codes,
            "`../model.onnx` is not the name of a file",
            config("/model/decoder/filename", json!("../model.onnx")),
        ),
        lie(codes, "genai_config.json: it was not understood", config("/model/decoder", json!("?"))),
        // The tokens.
        lie(
            codes,
            "a model of type `Unigram` is not supported",
            Box::new(|f| f.tokenizer["model"]["type"] = json!("Unigram")),
        ),
        lie(
            codes,
            "normalizers and byte fallback are not supported",
            Box::new(|f| f.tokenizer["normalizer"] = json!({ "type": "NFC" })),
        ),
        lie(
            codes,
            "its pre-tokenizer is not supported",
            Box::new(|f| f.tokenizer["pre_tokenizer"] = json!({ "type": "Whitespace" })),
        ),
        lie(
            codes,
            "its pre-tokenizer is not supported",
            Box::new(|f| f.tokenizer["model"]["ignore_merges"] = json!(true)),
        ),
        lie(
            codes,
            "has the id 4000000000, but there are 260 embeddings",
            Box::new(|f| f.tokenizer["model"]["vocab"]["far"] = json!(4_000_000_000u32)),
        ),
        lie(codes, "are both token 5", Box::new(|f| f.tokenizer["model"]["vocab"]["twice"] = json!(5))),
        lie(codes, "looks at its neighbours", Box::new(|f| f.tokenizer["added_tokens"][0]["lstrip"] = json!(true))),
        lie(codes, "has another id, too", Box::new(|f| f.tokenizer["added_tokens"][0]["content"] = json!("he"))),
        lie(codes, "bos_token `nobody` is no token", Box::new(|f| f.tokenizer_config["bos_token"] = json!("nobody"))),
        lie(codes, "chat template does not compile", Box::new(|f| f.template = Some("{% for".into()))),
    ];
    let mut faults = Vec::new();
    for (ty, said, lie) in lies {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("secret"), "not yours").unwrap();
        let folder = place.path().join("folder");
        let mut draft = small_folder(ty, LAYOUTS[0]);
        lie(&mut draft);
        draft.write(&folder);
        match try_read(&folder) {
            Ok(Err(error)) if error.contains(said) && error.lines().count() == 1 && error.len() < 600 => {}
            other => faults.push(format!("expected `{said}`, found {other:?}")),
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn files_that_are_missing_or_no_files_are_named() {
    for name in ["model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json", "genai_config.json"] {
        let place = tempfile::tempdir().unwrap();
        small_folder(2, LAYOUTS[0]).write(place.path());
        let path = place.path().join(name);
        fs::remove_file(&path).unwrap();
        let error = try_read(place.path()).unwrap().unwrap_err();
        assert!(error.starts_with("cannot read model file ") && error.contains(name), "{error}");
        // Nobody waits for the other end of a pipe.
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = try_read(place.path()).unwrap().unwrap_err();
        assert!(error.starts_with("cannot read model file ") && error.ends_with("not a file"), "{error}");
    }
}

#[test]
fn the_small_folder_is_sound() {
    for ty in [0, 2, 8] {
        for layout in LAYOUTS {
            let place = tempfile::tempdir().unwrap();
            small_folder(ty, layout).write(place.path());
            assert_eq!(try_read(place.path()), Ok(Ok(())), "{ty} {layout:?}");
        }
    }
}

/// Lists whose entries take two bytes in the file, and many in memory.
#[test]
fn a_graph_cannot_have_us_hold_many_times_its_size() {
    let attributes = [0x2a, 0].repeat(30_000);
    let inputs = [0x0a, 0].repeat(30_000);
    for node in [attributes, inputs] {
        let place = tempfile::tempdir().unwrap();
        let mut folder = small_folder(2, LAYOUTS[0]);
        (0..60).for_each(|_| field(&mut folder.more_graph, 1, &node));
        folder.write(place.path());
        let error = try_read(place.path()).unwrap().unwrap_err();
        assert!(error.contains("has more inputs or attributes than any"), "{error}");
    }
}

#[test]
fn changed_folders_are_read_or_refused_and_nothing_else() {
    let env = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (limit, seed) = (env("LIGHTCONE_FUZZ_SECONDS").map(Duration::from_secs), env("LIGHTCONE_FUZZ_SEED"));
    let first = seed.unwrap_or(1).wrapping_mul(1 << 40);
    let (begun, mut cases, mut sound, mut faults) = (Instant::now(), 0u64, 0u64, Vec::new());
    let goes_on = |cases: u64| limit.map_or(cases < CASES, |limit| begun.elapsed() < limit);
    while goes_on(cases) && faults.len() < 20 {
        let mut random = Random(first + cases);
        let place = tempfile::tempdir().unwrap();
        small_folder([0, 2, 8][random.below(3)], LAYOUTS[random.below(LAYOUTS.len())]).write(place.path());
        for _ in 0..1 + random.below(3) {
            // The graph has most to tell.
            let names =
                ["model.onnx", "model.onnx", "model.onnx", "tokenizer.json", "genai_config.json", "model.onnx.data"];
            let path = place.path().join(names[random.below(names.len())]);
            let mut bytes = fs::read(&path).unwrap();
            if !bytes.is_empty() {
                change_bytes(&mut bytes, &mut random);
            }
            fs::write(&path, bytes).unwrap();
        }
        match try_read(place.path()) {
            Ok(read) => sound += u64::from(read.is_ok()),
            Err(fault) => faults.push(format!("{}: {fault}", place.keep().display())),
        }
        cases += 1;
    }
    println!("{cases} folders, {sound} sound");
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
    assert!(sound > 0 && sound < cases, "{sound} of {cases}");
}
