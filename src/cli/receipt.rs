//! `lightcone receipt`: what a tenant does with a receipt, and the key that an operator gives out for it.

use std::{
    fs::File,
    io::{self, Read},
};

use clap::Subcommand;
use serde_json::json;

use super::{CliError, Output, commands::Access, print};
use crate::{
    config::Config,
    ledger::{RECEIPT_KEY_FILE, Receipt, ReceiptError, ReceiptKey, ReceiptKeyError, Receipts},
    node::NodeError,
};

/// More is no receipt.
const RECEIPT_BYTES_MAX: u64 = 64 << 10;

#[derive(Subcommand)]
pub enum Command {
    /// Check a receipt: who has signed it, and that it adds up. Asks nobody; succeeds only if all is well
    Verify {
        /// A receipt as JSON, or - for the standard input
        file: String,
        /// The operator's public key, or a file that has it [default: receipt-key.pub in the data folder]
        #[arg(long, value_name = "HEX|FILE")]
        public_key: Option<String>,
    },
    /// The public key with which everybody can check this store's receipts
    Key,
}

pub async fn run(config: Config, command: Command, output: Output) -> Result<(), CliError> {
    match command {
        Command::Verify { file, public_key } => {
            let key = public_key_of(&config, public_key.as_deref())?;
            verify(&read(&file)?, &key, output)
        }
        Command::Key => {
            let key = own_key(&config).await?;
            print(output, &json!({ "public_key": key.to_string(), "key_id": key.id() }))
        }
    }
}

fn verify(text: &str, key: &ReceiptKey, output: Output) -> Result<(), CliError> {
    let judged = text.parse::<Receipt>().and_then(|receipt| receipt.verify(key).map(|()| receipt));
    match judged {
        Ok(Receipt { statement, signature }) => {
            let usage = statement.usage;
            let shown = json!({
                "valid": true,
                "request": statement.request,
                "tenant": statement.tenant,
                "model": statement.model,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_tokens": usage.cached_tokens,
                "amount_nano_usd": statement.amount,
                "reason": statement.reason,
                "settled_unix_ms": statement.settled_unix_ms,
                "key_id": signature.key_id,
            });
            print(output, &shown)
        }
        Err(error) => {
            print(output, &json!({ "valid": false, "code": error.code(), "why": error.to_string() }))?;
            Err(error.into())
        }
    }
}

fn public_key_of(config: &Config, named: Option<&str>) -> Result<ReceiptKey, CliError> {
    let Some(named) = named else {
        let path = config.node.data_dir.join(RECEIPT_KEY_FILE);
        return match ReceiptKey::read(&path) {
            Err(ReceiptKeyError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(CliError::Usage(format!(
                    "there is no {}: name the operator's public key with --public-key",
                    path.display()
                )))
            }
            read => read.map_err(usage),
        };
    };
    match named.parse() {
        Ok(key) => Ok(key),
        Err(error) => match ReceiptKey::read(named.as_ref()) {
            Err(ReceiptKeyError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(CliError::Usage(format!("--public-key: `{named}` is no file, and {error}")))
            }
            read => read.map_err(usage),
        },
    }
}

async fn own_key(config: &Config) -> Result<ReceiptKey, CliError> {
    if let Some(path) = config.ledger.receipt_key_file() {
        return Ok(Receipts::read(path).map_err(NodeError::from)?.public_key());
    }
    let access = Access::open(config).await?;
    let receipts = Receipts::open(&access.store, None).await;
    access.close().await;
    Ok(receipts.map_err(NodeError::from)?.public_key())
}

fn read(file: &str) -> Result<String, CliError> {
    let mut text = String::new();
    let read = match file {
        "-" => io::stdin().take(RECEIPT_BYTES_MAX).read_to_string(&mut text),
        path => File::open(path).and_then(|file| file.take(RECEIPT_BYTES_MAX).read_to_string(&mut text)),
    };
    match read {
        Ok(_) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(ReceiptError::Malformed("it is not text".into()).into())
        }
        Err(error) => Err(CliError::Usage(format!("{file}: {error}"))),
    }
}

fn usage(error: ReceiptKeyError) -> CliError {
    CliError::Usage(error.to_string())
}
