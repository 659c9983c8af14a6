//! Execution providers by the names that the configuration uses.

use ort::ep::{self, ExecutionProvider, ExecutionProviderDispatch};
use ort::session::builder::SessionBuilder;

use super::EngineError;

const NAMES: [&str; 8] = ["cpu", "cuda", "tensorrt", "rocm", "migraphx", "directml", "coreml", "openvino"];

pub fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

/// Registers the providers in order; one that the library lacks is an error, never a silent fall-back.
pub fn register(builder: SessionBuilder, names: &[String]) -> Result<SessionBuilder, EngineError> {
    let mut providers: Vec<ExecutionProviderDispatch> = Vec::new();
    for name in names.iter().filter(|n| *n != "cpu") {
        let lacking = |why: String| EngineError::Provider(name.clone(), why);
        let (available, dispatch) = match name.as_str() {
            "cuda" => offer(ep::CUDA::default(), ep::CUDA::build),
            "tensorrt" => offer(ep::TensorRT::default(), ep::TensorRT::build),
            "rocm" => offer(ep::ROCm::default(), ep::ROCm::build),
            "migraphx" => offer(ep::MIGraphX::default(), ep::MIGraphX::build),
            "directml" => offer(ep::DirectML::default(), ep::DirectML::build),
            "coreml" => offer(ep::CoreML::default(), ep::CoreML::build),
            "openvino" => offer(ep::OpenVINO::default(), ep::OpenVINO::build),
            _ => return Err(lacking("there is no provider of that name".into())),
        };
        if !available {
            return Err(lacking("this build of ONNX Runtime does not contain it".into()));
        }
        providers.push(dispatch.error_on_failure());
    }
    builder.with_execution_providers(providers).map_err(|e| EngineError::Onnx(e.into()))
}

fn offer<P: ExecutionProvider>(
    provider: P,
    build: impl Fn(P) -> ExecutionProviderDispatch,
) -> (bool, ExecutionProviderDispatch) {
    (P::is_available().unwrap_or(false), build(provider))
}
