use std::{path::Path, sync::Arc};

use super::{Genai, Gguf, ModelError, ModelParams, Tensors, Vocabulary};

/// An opened and checked model: what the edge (vocabulary, template) and the engine (all of it) share.
pub struct ModelFile {
    pub tensors: Tensors,
    pub params: ModelParams,
    pub vocabulary: Arc<Vocabulary>,
}

impl ModelFile {
    /// A GGUF file, or a folder of onnxruntime-genai.
    pub fn open(path: &Path) -> Result<Arc<Self>, ModelError> {
        let (tensors, params, vocabulary) = if path.is_dir() {
            let (genai, params, vocabulary) = Genai::open(path)?;
            (Tensors::Genai(genai), params, vocabulary)
        } else {
            let gguf = Gguf::open(path)?;
            let (params, vocabulary) = (ModelParams::read(&gguf)?, Vocabulary::read(&gguf)?);
            (Tensors::Gguf(gguf), params, vocabulary)
        };
        if vocabulary.len() != params.vocabulary {
            return Err(ModelError::Corrupted(format!(
                "{} tokens but {} embeddings",
                vocabulary.len(),
                params.vocabulary
            )));
        }
        Ok(Arc::new(Self { tensors, params, vocabulary: Arc::new(vocabulary) }))
    }
}
