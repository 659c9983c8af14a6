//! The real model and the real ONNX Runtime, as `make test` lays them down.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use lightcone::{
    engine::onnx::{OnnxRuntime, RuntimeOptions},
    model::ModelFile,
};

/// Where downloads lie: `LIGHTCONE_TEST_DATA_DIR`, else `.lightcone` of the checkout.
pub fn data_dir() -> PathBuf {
    std::env::var_os("LIGHTCONE_TEST_DATA_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".lightcone"), PathBuf::from)
}

pub fn model_path() -> PathBuf {
    let path = data_dir().join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run `make test`, which fetches it", path.display());
    path
}

pub fn model() -> Arc<ModelFile> {
    static MODEL: OnceLock<Arc<ModelFile>> = OnceLock::new();
    Arc::clone(MODEL.get_or_init(|| ModelFile::open(&model_path()).expect("the model file is sound")))
}

/// Gemma 3 270M, a base model: fetched for the tests alone.
pub fn gemma() -> Arc<ModelFile> {
    static MODEL: OnceLock<Arc<ModelFile>> = OnceLock::new();
    let path = data_dir().join("models/gemma-3-270m-q4_k_m.gguf");
    assert!(path.exists(), "{} is missing: run `make test`, which fetches it", path.display());
    Arc::clone(MODEL.get_or_init(|| ModelFile::open(&path).expect("the model file is sound")))
}

pub fn runtime() -> OnnxRuntime {
    let library = OnnxRuntime::find_library(Path::new(""), &data_dir());
    let options = RuntimeOptions { library, threads: 2, spinning: false, providers: vec!["cpu".into()] };
    OnnxRuntime::start(options).expect("ONNX Runtime loads")
}
