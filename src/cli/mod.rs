//! The command line: arguments to configuration to a node or to one operator's command.
//!
//! Promises one clear line for each fault and an exit code that scripts can tell apart (2 for the command
//! line and the configuration; see [`NodeError::exit_code`] for the rest), and the same facts as a table or
//! as JSON. Never shows a panic's trace.

mod bar;
mod commands;
mod models;
mod receipt;
mod serve;
mod table;

use std::{io::Write, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use crate::{
    catalog::CatalogError,
    config::{Config, ConfigFaults, LogFormat, Overrides},
    ledger::{ArchiveError, ReceiptError},
    node::NodeError,
    telemetry::log::{self, LogStyle},
};

#[derive(Parser)]
#[command(name = "lightcone", version, about = "OpenAI-compatible, metered chat completions", max_term_width = 110)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args)]
struct Common {
    /// A configuration file; it states only what differs from the defaults (LIGHTCONE_CONFIG)
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Downloads, the embedded store and the key files (LIGHTCONE_DATA_DIR)
    #[arg(long, global = true, value_name = "FOLDER")]
    data_dir: Option<String>,
    /// A Redis or Valkey server instead of the embedded one (LIGHTCONE_REDIS_URL)
    #[arg(long, global = true, value_name = "URL")]
    redis_url: Option<String>,
    /// How results are printed
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Run a node
    Serve {
        /// all, edge or worker (LIGHTCONE_ROLE)
        #[arg(long)]
        role: Option<String>,
        /// Address of the HTTP server (LIGHTCONE_LISTEN)
        #[arg(long, value_name = "ADDRESS:PORT")]
        listen: Option<String>,
    },
    /// The models folder: what is there, bringing more, how good the engine's version of one is
    #[command(subcommand)]
    Models(models::Models),
    /// Signed statements of what requests have cost
    #[command(subcommand)]
    Receipt(receipt::Command),
    #[command(flatten)]
    Operator(commands::Command),
}

/// Everything that ends a command badly.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error("{0}")]
    Config(#[from] ConfigFaults),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error("{0}")]
    Usage(String),
    #[error("the ledger does not balance")]
    Imbalance,
    #[error("the endpoint did not take the message: {0}")]
    NotTaken(String),
    #[error("archive: {0}")]
    Archive(ArchiveError),
    #[error(transparent)]
    Receipt(#[from] ReceiptError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("the served model is too far from its file's weights: {0}")]
    Quality(String),
    #[error("cannot print the result: {0}")]
    Print(#[from] std::io::Error),
}

impl CliError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Usage(_) => 2,
            Self::Node(error) => error.exit_code(),
            Self::Catalog(error) if error.is_usage() => 2,
            Self::Catalog(CatalogError::Model { .. }) => 5,
            Self::Catalog(_)
            | Self::Quality(_)
            | Self::Imbalance
            | Self::NotTaken(_)
            | Self::Archive(_)
            | Self::Receipt(_)
            | Self::Print(_) => 1,
        }
    }
}

/// The program.
pub fn main() -> ExitCode {
    std::panic::set_hook(Box::new(one_line));
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error.to_string().lines() {
                eprintln!("lightcone: {line}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(Arguments { common, command }: Arguments) -> Result<(), CliError> {
    let (role, listen) = match &command {
        Command::Serve { role, listen } => (role.clone(), listen.clone()),
        Command::Models(_) | Command::Receipt(_) | Command::Operator(_) => (None, None),
    };
    let env = |name: &str| std::env::var(name).ok();
    let file = common.config.clone().or_else(|| env("LIGHTCONE_CONFIG").filter(|f| !f.is_empty()).map(PathBuf::from));
    let flags = Overrides { role, listen, redis_url: common.redis_url.clone(), data_dir: common.data_dir.clone() };
    let config = Config::load(file.as_deref(), env, flags)?;
    crate::fault::check().map_err(CliError::Usage)?;
    let style = match config.node.log_format {
        LogFormat::Text => LogStyle::Text,
        LogFormat::Json => LogStyle::Json,
    };
    // A command's result is not to drown in the store's comings and goings.
    let filter = if matches!(command, Command::Serve { .. }) { config.node.log.as_str() } else { "warn" };
    log::init(filter, style).map_err(|error| CliError::Usage(error.to_string()))?;
    match command {
        // Works on files alone, and blocks.
        Command::Models(command) => models::run(&config, command, common.output),
        Command::Serve { .. } => on_runtime(serve::serve(config, common.output)),
        Command::Receipt(command) => on_runtime(receipt::run(config, command, common.output)),
        Command::Operator(command) => on_runtime(commands::run(config, command, common.output)),
    }
}

fn on_runtime(command: impl Future<Output = Result<(), CliError>>) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("lightcone").build()?;
    let done = runtime.block_on(command);
    // An engine that is frozen must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    done
}

fn print(output: Output, value: &Value) -> Result<(), CliError> {
    let text = match output {
        Output::Json => format!("{value}\n"),
        Output::Table => table::render(value),
    };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

fn json<T: Serialize>(value: &T) -> Result<Value, CliError> {
    serde_json::to_value(value).map_err(|error| CliError::Print(error.into()))
}

/// A panic is a fault of ours: one line, for the log; whoever supervises the thread deals with it.
fn one_line(panic: &std::panic::PanicHookInfo<'_>) {
    let place = panic.location().map(|place| format!("{}:{}", place.file(), place.line())).unwrap_or_default();
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("unnamed").to_owned();
    let message = panic.payload_as_str().unwrap_or("no message").replace('\n', " ");
    if tracing::dispatcher::has_been_set() {
        tracing::error!(place, thread, message, "panic");
    } else {
        eprintln!("lightcone: panic at {place}: {message}");
    }
}
