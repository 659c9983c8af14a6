//! Folders of onnxruntime-genai: the same weights as a GGUF file are the same model.

use std::{path::Path, sync::Arc};

use lightcone::{
    engine::{
        Batch, BatchSequence, Forward,
        onnx::{OnnxModel, reference::Reference},
    },
    grammar::Grammars,
    model::{AffineBlock, BLOCK, ModelFile, RopePairs, TokenKind},
    prompt::{PromptModel, Tokenizer},
};
use serde_json::{Value, json};

use crate::support::{
    engine::TEXT,
    genai::{Folder, LAYOUTS, Layout, small_folder, tokenizer_json},
    gguf::small_model,
    model::{model, runtime},
    process::Home,
};

const TYPES: [u32; 3] = [0, 2, 8];

fn opened(folder: &Folder) -> Arc<ModelFile> {
    let place = tempfile::tempdir().expect("a folder");
    folder.write(place.path());
    ModelFile::open(place.path()).expect("a sound folder")
}

fn opened_gguf(ty: u32) -> Arc<ModelFile> {
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("small.gguf");
    std::fs::write(&path, small_model(ty).encode()).expect("a file");
    ModelFile::open(&path).expect("a sound file")
}

/// Pairs of one model in both formats, as its builder may lay it out.
fn pairs() -> impl Iterator<Item = (u32, Layout, Arc<ModelFile>, Arc<ModelFile>)> {
    let each = TYPES.into_iter().flat_map(|ty| LAYOUTS.map(|layout| (ty, layout)));
    each.map(|(ty, layout)| (ty, layout, opened_gguf(ty), opened(&small_folder(ty, layout))))
}

#[test]
fn a_folder_and_a_file_of_the_same_weights_say_the_same_to_the_bit() {
    let row_in_file = |name: &str, row: usize| match name {
        // The halves of a head are neighbours there.
        "blk.0.attn_q.weight" | "blk.0.attn_k.weight" => row / 32 * 32 + row % 16 * 2 + row % 32 / 16,
        _ => row,
    };
    for (ty, layout, file, folder) in pairs() {
        let mut params = folder.params.clone();
        assert_eq!(params.rope_pairs, RopePairs::Halves);
        params.rope_pairs = RopePairs::Neighbours;
        assert_eq!(params, file.params);
        let (found, wanted) = (&folder.tensors, &file.tensors);
        // A table that serves as the head, too, is no second tensor.
        assert_eq!(found.has_tensor("output.weight"), !layout.is_shared);
        for name in found.tensor_names() {
            let source = if name == "output.weight" { "token_embd.weight" } else { name };
            let info = wanted.tensor(source).unwrap();
            assert_eq!(found.tensor(name).unwrap().dims, info.dims, "{name}");
            let (columns, rows) = (info.dims[0] as usize, info.dims[1..].iter().product::<u64>() as usize);
            let numbers = found.dequantize(name).unwrap();
            let expected = wanted.dequantize(source).unwrap();
            let zero = half::f16::ZERO;
            let empty = vec![AffineBlock { codes: [0; BLOCK], scale: zero, offset: zero }; columns / BLOCK];
            for row in 0..rows {
                let at = row_in_file(name, row);
                assert_eq!(numbers[row * columns..][..columns], expected[at * columns..][..columns], "{name} {row}");
                // Embeddings of their own lost their codes; nothing is multiplied with them.
                if info.dims.len() == 2 && (name != "token_embd.weight" || layout.is_shared) {
                    let (mut ours, mut theirs) = (empty.clone(), empty.clone());
                    found.affine_row(name, row, &mut ours).unwrap();
                    wanted.affine_row(source, at, &mut theirs).unwrap();
                    assert_eq!(ours, theirs, "{ty} {layout:?} {name} {row}");
                }
            }
        }
        assert_eq!(found.tensor_names().len(), wanted.tensor_names().len() + usize::from(!layout.is_shared));
    }
}

#[test]
fn a_folder_is_served_as_the_file_of_the_same_weights_is() {
    let (runtime, tokens) = (runtime(), (0..96).map(|i| i * 37 % 260).collect::<Vec<u32>>());
    let served = |file: &Arc<ModelFile>| {
        let blocks: Vec<u32> = (0..8).collect();
        let mut model = OnnxModel::load(&runtime, file, blocks.len(), 16, 128).expect("a model");
        let (rows, tokens) = (tokens.len(), &tokens[..]);
        let sequence =
            BatchSequence { tokens, prompt_tokens: rows, computed: 0, rows, logits_rows: rows, blocks: &blocks };
        model.forward(&Batch { sequences: vec![sequence] }).expect("logits").to_vec()
    };
    let exact = |file: &Arc<ModelFile>| {
        Reference::load(&runtime, file, tokens.len()).expect("a model").logits(&tokens).expect("logits")
    };
    let off = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    for (ty, layout, file, folder) in pairs() {
        let (wanted, found) = (exact(&file), exact(&folder));
        let range = wanted.iter().fold(0f32, |most, x| most.max(x.abs()));
        assert!(off(&wanted, &found) <= range * 1e-5, "{ty} {layout:?}: {} of {range}", off(&wanted, &found));
        // Scores are summed in another order, and a sum may fall on the other side of a rounding.
        let (wanted, found) = (served(&file), served(&folder));
        assert!(off(&wanted, &found) <= range * 1e-2, "{ty} {layout:?}: {} of {range}", off(&wanted, &found));
    }
}

/// `LIGHTCONE_GENAI_FOLDER` names where the folder is to be left, for `tests/data/genai_logits.py`.
#[test]
fn the_weights_of_a_folder_compute_what_onnxruntime_genai_computes_with_it() {
    let written = small_folder(0, LAYOUTS[0]);
    if let Some(path) = std::env::var_os("LIGHTCONE_GENAI_FOLDER") {
        written.write(Path::new(&path));
    }
    let fixture: Value = serde_json::from_str(include_str!("../data/genai_logits.json")).unwrap();
    let tokens: Vec<u32> = serde_json::from_value(fixture["tokens"].clone()).unwrap();
    let file = opened(&written);
    let logits = Reference::load(&runtime(), &file, tokens.len()).unwrap().logits(&tokens).unwrap();
    let rows = fixture["logits"].as_object().unwrap();
    assert_eq!(rows.len(), 4);
    for (at, expected) in rows {
        let found = &logits[at.parse::<usize>().unwrap() * 260..][..260];
        let expected: Vec<f32> = serde_json::from_value(expected.clone()).unwrap();
        let off = found.iter().zip(&expected).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(off < 2e-5 && expected.len() == 260, "{at}: {off}");
    }
}

/// With as many tokens as the real model, and zeros for embeddings.
fn folder_of_real_tokens() -> Folder {
    let vocabulary = &model().vocabulary;
    let lightcone::model::Scheme::ByteLevel { merges, .. } = &vocabulary.scheme else { panic!("byte-level") };
    let control = (0..vocabulary.len()).filter(|id| vocabulary.kinds[*id] == TokenKind::Control);
    let control: Vec<_> = control.map(|id| (id, vocabulary.tokens[id].clone())).collect();
    let mut folder = small_folder(0, LAYOUTS[0]);
    folder.tokenizer = tokenizer_json(&vocabulary.tokens, merges, &control);
    folder.tokenizer_config = json!({ "bos_token": "<|im_start|>", "chat_template": vocabulary.chat_template });
    folder.template = None;
    folder.config["model"]["vocab_size"] = json!(vocabulary.len());
    folder.config["model"]["eos_token_id"] = json!(2);
    let head = folder.initializer("lm_head");
    head.dims[1] = vocabulary.len() as i64;
    head.data = vec![0; 64 * 4 * vocabulary.len()];
    folder
}

#[test]
fn the_tokenizer_of_a_folder_makes_the_tokens_that_the_file_s_makes() {
    let folder = opened(&folder_of_real_tokens());
    let (wanted, found) = (&model().vocabulary, &folder.vocabulary);
    assert!(wanted.tokens == found.tokens && wanted.kinds == found.kinds);
    assert_eq!((&wanted.eos, wanted.bos, wanted.begins_with_bos), (&found.eos, found.bos, found.begins_with_bos));
    assert_eq!(wanted.chat_template, found.chat_template);
    assert!((0..wanted.len() as u32).all(|id| wanted.bytes(id) == found.bytes(id)));
    let [wanted, found] = [wanted, found].map(|vocabulary| Tokenizer::new(Arc::clone(vocabulary)).unwrap());
    for text in
        [TEXT, "", " ", "12345", "a  b\n\n\tc", "naïve 🦀 日本", "<|im_start|>user\nhi<|im_end|>", "<|im_<|im_end|>|>"]
    {
        for specials in [false, true] {
            assert_eq!(wanted.encode(text, specials).unwrap(), found.encode(text, specials).unwrap(), "{text:?}");
        }
        let plain = found.encode(text, false).unwrap();
        assert!(plain.iter().all(|id| found.vocabulary().kinds[*id as usize] != TokenKind::Control), "{text:?}");
    }
    let grammars = Arc::new(Grammars::new(Arc::clone(found.vocabulary())));
    PromptModel::new(Arc::new(found), grammars, 64).expect("a template");
}

#[test]
fn rows_without_a_text_are_tokens_that_no_text_becomes() {
    let mut folder = folder_of_real_tokens();
    let count = model().vocabulary.len() + 64;
    folder.config["model"]["vocab_size"] = json!(count);
    let head = folder.initializer("lm_head");
    head.dims[1] = count as i64;
    head.data = vec![0; 64 * 4 * count];
    let vocabulary = Arc::clone(&opened(&folder).vocabulary);
    assert_eq!((vocabulary.len(), vocabulary.kinds[count - 1]), (count, TokenKind::Control));
    let tokenizer = Tokenizer::new(Arc::clone(&vocabulary)).unwrap();
    let text = format!("x {} y", vocabulary.tokens[count - 1]);
    assert!(tokenizer.encode(&text, false).unwrap().iter().all(|id| (*id as usize) < count - 64));
}

#[test]
fn a_vocabulary_whose_texts_can_spell_a_control_token_is_refused() {
    let refused = |control: (usize, &str), merges: &[&str], ignores_merges: bool| {
        let mut folder = small_folder(0, LAYOUTS[0]);
        let vocab = folder.tokenizer["model"]["vocab"].as_object_mut().unwrap();
        vocab.retain(|_, id| id.as_u64() != Some(control.0 as u64));
        vocab.insert(control.1.to_owned(), json!(control.0));
        folder.tokenizer["added_tokens"][0] = json!({ "id": control.0, "content": control.1, "special": true });
        folder.tokenizer["model"]["merges"] = json!(merges);
        folder.tokenizer_config = json!({});
        if ignores_merges {
            folder.tokenizer["model"]["ignore_merges"] = json!(true);
            folder.tokenizer["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": lightcone::model::LLAMA_BPE_PATTERN },
                  "behavior": "Isolated", "invert": false },
                { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
            ] });
        }
        Tokenizer::new(Arc::clone(&opened(&folder).vocabulary)).err().map(|error| error.to_string())
    };
    assert_eq!(refused((258, "<|a|>"), &["h e", "l l"], false), None);
    assert_eq!(refused((258, "<|a|>"), &["h e", "l l"], true), None);
    for (control, merges, ignores_merges) in [
        ("hell", &["h e", "l l", "he ll"][..], false),
        ("hello", &["h e", "l l"], true),
        // As a word with a space in front is spelled.
        ("Ġhello", &["h e", "l l"], true),
    ] {
        let error = refused((258, control), merges, ignores_merges).unwrap_or_else(|| panic!("{control}"));
        assert!(error.contains(&format!("can spell the control token `{control}`")), "{error}");
    }
}

/// One prompt, to a node that serves the same model from a file and from a folder.
#[tokio::test]
async fn a_node_serves_a_folder_by_its_name() {
    let table = |name: &str, file: &str| {
        format!(
            "[models.\"{name}\"]\nfile = \"{file}\"\nengine = \"onnx\"\ninput_usd_per_million = \"1\"\n\
             output_usd_per_million = \"1\"\ncontext_tokens_max = 128\noutput_tokens_max = 64\nsequences_max = 2\nkv_memory_mib = 8\n"
        )
    };
    let home = Home::new(&(table("as.file", "small.gguf") + &table("as.folder", "small-int4")));
    let models = home.data_dir().join("models");
    std::fs::write(models.join("small.gguf"), small_model(2).encode()).unwrap();
    small_folder(2, LAYOUTS[0]).write(&models.join("small-int4"));
    let node = home.start(&[]);
    let ask = async |model: &str| {
        let body = json!({
            "model": model, "max_tokens": 24, "temperature": 1, "seed": 7, "ignore_eos": true,
            "messages": [{ "role": "user", "content": "hello <|b|> there" }],
        });
        let request = reqwest::Client::new().post(format!("{}/v1/chat/completions", node.url)).bearer_auth(home.key());
        let answer = request.header("content-type", "application/json").body(body.to_string()).send().await.unwrap();
        serde_json::from_str::<Value>(&answer.text().await.unwrap()).unwrap()
    };
    let (file, folder) = (ask("as.file").await, ask("as.folder").await);
    assert_eq!((&folder["usage"]["prompt_tokens"], &folder["usage"]["completion_tokens"]), (&json!(16), &json!(24)));
    assert_eq!(folder["usage"], file["usage"]);
    assert_eq!(folder["choices"][0]["message"], file["choices"][0]["message"]);
    home.assert_settled(&[]);
}

/// What `models check` says of a file, it says of a folder.
#[test]
fn the_quality_of_a_folder_is_measured_against_its_own_weights() {
    let folder = opened(&small_folder(2, LAYOUTS[1]));
    let tokens: Vec<u32> = (0..100).map(|i| i * 91 % 260).collect();
    let passage = lightcone::engine::quality::Passage { tokens: &tokens, bos: None };
    let quality = lightcone::engine::quality::measure(&runtime(), &folder, &passage, |_| {}).unwrap();
    assert_eq!(quality.positions, 99);
    assert!(quality.kl_mean < 0.01 && (quality.perplexity_ratio() - 1.0).abs() < 0.01, "{quality:?}");
}

#[test]
fn a_folder_without_its_configuration_is_no_model() {
    let place = tempfile::tempdir().unwrap();
    let error = ModelFile::open(place.path()).err().unwrap().to_string();
    assert!(error.starts_with("cannot read model file ") && error.contains("genai_config.json"), "{error}");
    assert!(ModelFile::open(Path::new("/no/such/folder")).is_err());
}
