use std::{path::Path, sync::Arc};

use super::{Gguf, GgufError, ModelParams, Vocabulary};

/// An opened and checked model file: what the edge (vocabulary, template) and the engine (all of it) share.
pub struct ModelFile {
    pub gguf: Gguf,
    pub params: ModelParams,
    pub vocabulary: Arc<Vocabulary>,
}

impl ModelFile {
    pub fn open(path: &Path) -> Result<Arc<Self>, GgufError> {
        let gguf = Gguf::open(path)?;
        let params = ModelParams::read(&gguf)?;
        let vocabulary = Arc::new(Vocabulary::read(&gguf)?);
        if vocabulary.len() != params.vocabulary {
            return Err(GgufError::Corrupted(format!(
                "{} tokens but {} embeddings",
                vocabulary.len(),
                params.vocabulary
            )));
        }
        Ok(Arc::new(Self { gguf, params, vocabulary }))
    }
}
