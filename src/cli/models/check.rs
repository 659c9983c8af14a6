//! `lightcone models check`.
//!
//! The text is the beginning of Isaac Newton's *Opticks*, fourth edition (London 1730), in the public domain;
//! as it stands, from byte 4,256 on, in `src/testdata/Isaac.Newton-Opticks.txt` of Debian's `golang-1.19-src`.

use std::sync::Arc;

use serde_json::json;

use crate::{
    catalog::Catalog,
    cli::{CliError, Output, bar::Bar, print},
    config::Config,
    engine::{
        onnx::reference::KvFormat,
        quality::{self, Bounds, Passage},
    },
    model::ModelFile,
    node::{self, NodeError},
    prompt::Tokenizer,
};

const TEXT: &str = include_str!("opticks.txt");
const BOUNDS: Bounds = Bounds { perplexity_off_max: 0.01, kl_mean_max: 0.01 };

/// A format of keys and values.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Kv {
    /// Half precision, which is what is served
    Half,
    /// Eight bits, with one scale for each token and head
    Byte,
}

impl Kv {
    fn format(self) -> KvFormat {
        match self {
            Self::Half => KvFormat::Half,
            Self::Byte => KvFormat::Byte,
        }
    }
}

pub fn run(
    config: &Config,
    catalog: &Catalog,
    model: &str,
    tokens_max: Option<u32>,
    kv: Option<Kv>,
    output: Output,
) -> Result<(), CliError> {
    let name = match config.models.get(model) {
        Some(model) => model.file.display().to_string(),
        None => model.to_owned(),
    };
    let path = catalog.path(&name);
    let fault = |why: String| NodeError::Model { model: model.into(), path: path.clone(), why };
    let file = ModelFile::open(&path).map_err(|error| fault(error.to_string()))?;
    let tokenizer = Tokenizer::new(Arc::clone(&file.vocabulary)).map_err(|error| fault(error.to_string()))?;
    let mut tokens = tokenizer.encode(TEXT, false).map_err(|error| fault(error.to_string()))?;
    tokens.truncate(tokens_max.unwrap_or(u32::MAX) as usize);
    // What the model was trained to see in front of a text.
    let bos = file.vocabulary.bos.filter(|_| file.vocabulary.begins_with_bos);

    let runtime = node::start_runtime(config)?;
    let mut bar = Bar::count();
    let total = tokens.len() as u64 - 1;
    bar.show("loading", 0, Some(total));
    let passage = Passage { tokens: &tokens, bos };
    let progress = |done| bar.show("positions", done as u64, Some(total));
    let measured = match kv {
        None => quality::measure(&runtime, &file, &passage, progress),
        Some(kv) => quality::kv_cost(&runtime, &file, &passage, kv.format(), progress),
    };
    bar.clear();
    let quality = measured.map_err(NodeError::from)?;
    print(
        output,
        &json!({
            "model": model,
            "file": name,
            "positions": quality.positions,
            "perplexity": rounded(quality.perplexity, 4),
            "perplexity_fp32": rounded(quality.perplexity_reference, 4),
            "perplexity_ratio": rounded(quality.perplexity_ratio(), 5),
            "kl_mean": rounded(quality.kl_mean, 6),
            "top1_agreement": rounded(quality.top1_agreement, 5),
        }),
    )?;
    quality.fault(BOUNDS).map_or(Ok(()), |fault| Err(CliError::Quality(fault)))
}

fn rounded(x: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (x * scale).round() / scale
}
