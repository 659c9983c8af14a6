//! The configured models, opened once for the prompts and for the engines.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use super::{
    NodeError,
    limits::{self, EngineCpus},
};
use crate::{
    cluster::{PoolSpec, RestartPolicy},
    config::{self, Config, EngineKind, Role, Speculation, Spinning},
    domain::ModelId,
    engine::{self, Backend, EngineError, EngineSpec, MemoryNeed, OnnxRuntime, onnx::RuntimeOptions},
    grammar::Grammars,
    model::ModelFile,
    prompt::{PromptModel, Tokenizer},
    telemetry::Metrics,
};

pub struct Models {
    files: BTreeMap<ModelId, Arc<ModelFile>>,
    /// Of the edge and of the engines; one for each file.
    grammars: BTreeMap<ModelId, Arc<Grammars>>,
    /// Absent where nothing here needs it.
    runtime: Option<OnnxRuntime>,
    cpus: EngineCpus,
}

/// Opens every model's file and, where this node runs engines, ONNX Runtime. Blocks.
pub fn open(config: &Config) -> Result<Models, NodeError> {
    let mut opened = HashMap::<PathBuf, (Arc<ModelFile>, Arc<Grammars>)>::new();
    let (mut files, mut grammars) = (BTreeMap::new(), BTreeMap::new());
    for (id, model) in &config.models {
        let path = path(config, model);
        let (file, grammar) = match opened.get(&path) {
            Some(both) => both.clone(),
            None => {
                let file = ModelFile::open(&path).map_err(|error| fault(config, id, error.to_string()))?;
                let grammars = Arc::new(Grammars::new(Arc::clone(&file.vocabulary)));
                (file, grammars)
            }
        };
        opened.insert(path, (Arc::clone(&file), Arc::clone(&grammar)));
        files.insert(id.clone(), file);
        grammars.insert(id.clone(), grammar);
    }
    let runs = config.node.role != Role::Edge;
    let needs_runtime = runs && config.models.values().any(|model| model.engine == EngineKind::Onnx);
    let cpus = EngineCpus::of(config)?;
    if runs {
        limits::check_memory(config, &needs(config, &files))?;
    }
    let runtime = needs_runtime.then(|| start_runtime(config)).transpose()?;
    Ok(Models { files, grammars, runtime, cpus })
}

/// What each model that runs here will take. Models of one file share its weights.
fn needs(config: &Config, files: &BTreeMap<ModelId, Arc<ModelFile>>) -> Vec<(ModelId, MemoryNeed)> {
    let runs = config.models.iter().filter(|(_, model)| model.engine == EngineKind::Onnx);
    let mut counted = HashSet::new();
    let need = |(id, model): (&ModelId, &config::Model)| {
        let context = model.context_tokens_max.min(files[id].params.context_tokens);
        let kv_bytes = model.kv_memory_mib << 20;
        let mut need = MemoryNeed::of(&files[id], context, model.sequences_max, model.step_tokens_max, kv_bytes);
        if !counted.insert(Arc::as_ptr(&files[id])) {
            need.weights = 0;
        }
        (id.clone(), need)
    };
    runs.map(need).collect()
}

/// ONNX Runtime as the configuration wants it, its threads on the engine's CPUs.
pub fn start_runtime(config: &Config) -> Result<OnnxRuntime, NodeError> {
    Ok(EngineCpus::of(config)?.within(|| OnnxRuntime::start(runtime_options(config)))??)
}

impl Models {
    /// What the edge renders and tokenises with; one tokeniser for each file.
    pub fn prompts(&self, config: &Config) -> Result<BTreeMap<ModelId, PromptModel>, NodeError> {
        let mut tokenizers = HashMap::<PathBuf, Arc<Tokenizer>>::new();
        let mut prompts = BTreeMap::new();
        for (id, model) in &config.models {
            let path = path(config, model);
            let tokenizer = match tokenizers.get(&path) {
                Some(tokenizer) => Arc::clone(tokenizer),
                None => {
                    let vocabulary = Arc::clone(&self.files[id].vocabulary);
                    Arc::new(Tokenizer::new(vocabulary).map_err(|error| fault(config, id, error.to_string()))?)
                }
            };
            tokenizers.insert(path, Arc::clone(&tokenizer));
            let context = model.context_tokens_max.min(self.files[id].params.context_tokens);
            let grammars = Arc::clone(&self.grammars[id]);
            let prompt =
                PromptModel::new(tokenizer, grammars, context).map_err(|error| fault(config, id, error.to_string()))?;
            prompts.insert(id.clone(), prompt);
        }
        Ok(prompts)
    }

    pub fn pools(&self, config: &Config, metrics: &Arc<Metrics>) -> Vec<PoolSpec> {
        config.models.iter().map(|(id, model)| self.pool(config, id, model, metrics)).collect()
    }

    fn pool(&self, config: &Config, id: &ModelId, model: &config::Model, metrics: &Arc<Metrics>) -> PoolSpec {
        let (id, model, metrics) = (id.clone(), model.clone(), Arc::clone(metrics));
        let (file, runtime, cpus) = (Arc::clone(&self.files[&id]), self.runtime.clone(), self.cpus.clone());
        let (kv_block_tokens, prefix_cache) = (config.engine.kv_block_tokens, config.engine.prefix_cache);
        let speculation = match config.engine.speculation {
            Speculation::Auto => engine::Speculation::Auto,
            Speculation::Off => engine::Speculation::Off,
        };
        PoolSpec {
            model: id.clone(),
            device: config.engine.providers.join(", "),
            sequences_max: model.sequences_max,
            // A hold covers the longest answer.
            step_tokens: config.ledger.step_tokens,
            stall_max: Duration::from_millis(config.engine.stall_ms_max),
            policy: RestartPolicy::default(),
            grammars: Arc::clone(&self.grammars[&id]),
            loader: Arc::new(move |sink| {
                let backend = match (model.engine, &runtime) {
                    (EngineKind::Onnx, Some(runtime)) => Backend::Onnx(runtime.clone()),
                    (EngineKind::Onnx, None) => return Err(EngineError::Gone),
                    (EngineKind::Scripted, _) => Backend::Scripted,
                };
                let spec = EngineSpec {
                    model: id.clone(),
                    file: Arc::clone(&file),
                    backend,
                    context_tokens_max: model.context_tokens_max,
                    sequences_max: model.sequences_max,
                    step_tokens_max: model.step_tokens_max,
                    kv_block_tokens,
                    kv_memory_bytes: model.kv_memory_mib << 20,
                    prefix_cache,
                    speculation,
                };
                let spawned = cpus.within(|| engine::spawn(spec, sink, Arc::clone(&metrics)));
                spawned.unwrap_or_else(|error| Err(EngineError::Limits(error.to_string())))
            }),
        }
    }
}

fn path(config: &Config, model: &config::Model) -> PathBuf {
    config.node.data_dir.join("models").join(&model.file)
}

fn fault(config: &Config, id: &ModelId, why: String) -> NodeError {
    NodeError::Model { model: id.clone(), path: path(config, &config.models[id]), why }
}

/// Called within the engine's CPUs, so that they are the cores that are counted.
fn runtime_options(config: &Config) -> RuntimeOptions {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if config.engine.threads == 0 { cores } else { config.engine.threads };
    let spinning = match config.engine.spinning {
        Spinning::On => true,
        Spinning::Off => false,
        // A thread that spins takes a core from whatever else wants to run on it, so more threads than
        // cores would wait for each other.
        Spinning::Auto => threads <= cores,
    };
    tracing::info!(threads, cores, spinning, "threads of ONNX Runtime");
    let library = OnnxRuntime::find_library(&config.engine.ort_library, &config.node.data_dir);
    RuntimeOptions { library, threads, spinning, providers: config.engine.providers.clone() }
}
