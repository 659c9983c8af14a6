//! ONNX Runtime's library: found, checked and loaded once a process.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use ort::environment::{Environment, GlobalThreadPoolOptions};
use parking_lot::Mutex;

use super::{EngineError, weights::Pack};

/// What the process wants of the library.
#[derive(Clone, Debug, PartialEq)]
pub struct RuntimeOptions {
    pub library: PathBuf,
    /// Threads shared by all sessions; at least 1.
    pub threads: usize,
    /// Whether idle threads spin.
    pub spinning: bool,
    /// Execution providers in order of preference, beside `cpu`.
    pub providers: Vec<String>,
}

/// The loaded library with its threads. Cheap to clone.
#[derive(Clone)]
pub struct OnnxRuntime {
    pub(super) environment: Arc<Environment>,
    pub(super) options: RuntimeOptions,
    pub(super) pack: Arc<Pack>,
}

/// One environment a process is all that the library allows, so the first one is kept.
static LOADED: Mutex<Option<OnnxRuntime>> = Mutex::new(None);

impl OnnxRuntime {
    /// The library for these options: `configured` where it is given, else `data_dir/lib`, else the system's.
    pub fn find_library(configured: &Path, data_dir: &Path) -> PathBuf {
        if configured.as_os_str().is_empty() {
            let own = data_dir.join("lib/libonnxruntime.so");
            if own.exists() { own } else { PathBuf::from("libonnxruntime.so") }
        } else {
            configured.to_owned()
        }
    }

    /// Loads the library, or returns what was loaded before with the same options.
    pub fn start(options: RuntimeOptions) -> Result<Self, EngineError> {
        let mut loaded = LOADED.lock();
        if let Some(runtime) = &*loaded {
            if runtime.options == options {
                return Ok(runtime.clone());
            }
            return Err(EngineError::Library {
                path: options.library.display().to_string(),
                reason: "the process has loaded ONNX Runtime with other options already".into(),
            });
        }
        if let Some(unknown) = options.providers.iter().find(|p| !super::providers::is_known(p)) {
            return Err(EngineError::Provider(unknown.clone(), "there is no provider of that name".into()));
        }
        let fault = |e: ort::Error| EngineError::Library {
            path: options.library.display().to_string(),
            reason: e.to_string().lines().next().unwrap_or_default().to_owned(),
        };
        // First of all: even the thread pool's options are made by the library.
        let builder = ort::init_from(&options.library)
            .map_err(|e| EngineError::Library { path: options.library.display().to_string(), reason: e.to_string() })?;
        let pool = GlobalThreadPoolOptions::default()
            .with_intra_threads(options.threads.max(1))
            .and_then(|pool| pool.with_inter_threads(1))
            .and_then(|pool| pool.with_spin_control(options.spinning));
        let environment = builder
            .with_name("lightcone")
            .with_global_thread_pool(pool.map_err(fault)?)
            .with_telemetry(false)
            .build()
            .map_err(fault)?;
        let runtime = Self { environment: Arc::new(environment), options, pack: Arc::default() };
        *loaded = Some(runtime.clone());
        Ok(runtime)
    }
}
