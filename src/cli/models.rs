//! `lightcone models`: the catalogue of the data folder, and the quality of what the engine makes of a file.

mod check;

use clap::Subcommand;
use serde_json::{Value, json};

use super::{CliError, Output, bar::Bar, print};
use crate::{
    catalog::{Catalog, PullOptions, Source},
    config::Config,
};

#[derive(Subcommand)]
pub enum Models {
    /// What is in the catalogue, and what the configuration wants there
    List,
    /// Bring a model into the catalogue; one that broke off goes on where it stopped
    Pull {
        /// hf:owner/name[/file or folder][@revision], pypi:name[==version], or a file or folder
        source: String,
        /// Its name in the catalogue
        #[arg(long)]
        name: Option<String>,
        /// Replace what has that name
        #[arg(long)]
        force: bool,
    },
    /// Compare what the engine computes with the file's own weights, on a fixed text; fails if it lost too much
    Check {
        /// A configured model, or a name in the catalogue
        model: String,
        /// Read only so many tokens of the text
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
        tokens: Option<u32>,
        /// Instead, compare those weights with themselves when keys and values are kept in this format
        #[arg(long, value_name = "FORMAT")]
        kv: Option<check::Kv>,
    },
    /// Take a model out of the catalogue
    Rm {
        /// Its name in the catalogue
        model: String,
        /// Also one that the configuration uses
        #[arg(long)]
        force: bool,
    },
}

/// Blocks.
pub fn run(config: &Config, command: Models, output: Output) -> Result<(), CliError> {
    let catalog = Catalog::of(&config.node.data_dir);
    match command {
        Models::List => {
            let configured = config.models.iter().map(|(id, model)| (model.file.as_path(), id.as_str()));
            print(output, &super::json(&catalog.list(configured)?)?)
        }
        Models::Pull { source, name, force } => {
            let source: Source = source.parse()?;
            let mut bar = Bar::bytes();
            let pulled = catalog.pull(&source, &PullOptions { name, force }, &mut |progress| {
                bar.show(progress.what, progress.done, progress.total);
            });
            bar.clear();
            let name = pulled?;
            print(output, &super::json(&catalog.entry(&name, used_by(config, &name)))?)
        }
        Models::Check { model, tokens, kv } => check::run(config, &catalog, &model, tokens, kv, output),
        Models::Rm { model, force } => {
            let used_by = used_by(config, &model);
            catalog.remove(&model, &used_by, force)?;
            print(output, &json!({ "removed": model, "used_by": Value::from(used_by) }))
        }
    }
}

/// The configured models that need a model of the catalogue.
fn used_by(config: &Config, name: &str) -> Vec<String> {
    let uses = config.models.iter().filter(|(_, model)| model.file.as_os_str() == name);
    uses.map(|(id, _)| id.to_string()).collect()
}
