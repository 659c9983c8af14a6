//! The keys of receipts: one that signs, kept by the store or in a file, and its public half, which everybody may have.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use ed25519_dalek::{SECRET_KEY_LENGTH, Signature, SigningKey, VerifyingKey};
use rand::TryRng;
use sha2::{Digest, Sha256};

use super::receipt::{Receipt, ReceiptError, ReceiptStatement};
use crate::store::{Store, StoreError, keys};

/// Where a node leaves its public key, in its data folder.
pub const RECEIPT_KEY_FILE: &str = "receipt-key.pub";
/// Of a key file; all that is meant for others is more than it may have.
const MODE_MAX: u32 = 0o600;
const FILE_BYTES_MAX: u64 = 256;
/// Of a public key's SHA-256, to tell keys apart.
const ID_BYTES: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum ReceiptKeyError {
    #[error("{}: {source}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} has mode {mode:04o}, so that others can read the key that signs receipts: chmod 600", path.display())]
    OpenToOthers { path: PathBuf, mode: u32 },
    #[error("{} does not hold a key: 64 hexadecimal digits", .0.display())]
    FileContent(PathBuf),
    #[error("that is no public key of receipts: 64 hexadecimal digits")]
    NotAKey,
    #[error("the system gives no random numbers: {0}")]
    Random(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The public half: what a tenant needs to check receipts. Written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ReceiptKey(VerifyingKey);

impl ReceiptKey {
    pub(super) fn of(key: &SigningKey) -> Self {
        Self(key.verifying_key())
    }

    /// Short, to tell keys apart.
    pub fn id(&self) -> String {
        hex::encode(&Sha256::digest(self.0.as_bytes())[..ID_BYTES])
    }

    pub(super) fn has_signed(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        self.0.verify_strict(message, &Signature::from_bytes(signature)).is_ok()
    }

    pub fn read(path: &Path) -> Result<Self, ReceiptKeyError> {
        let (_, text) = open(path)?;
        text.trim().parse().map_err(|_| ReceiptKeyError::FileContent(path.to_owned()))
    }

    /// Whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), ReceiptKeyError> {
        match Self::read(path) {
            Ok(known) if known == *self => return Ok(()),
            Ok(other) => tracing::warn!(was = %other, is = %self, "receipts are signed with another key than before"),
            Err(_) => {}
        }
        let written = || {
            let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
            let mut file = File::create(&temporary)?;
            writeln!(file, "{self}")?;
            file.sync_all()?;
            fs::rename(temporary, path)
        };
        written().map_err(|source| ReceiptKeyError::File { path: path.to_owned(), source })
    }
}

impl fmt::Display for ReceiptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0.as_bytes()))
    }
}

impl fmt::Debug for ReceiptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for ReceiptKey {
    type Err = ReceiptKeyError;

    fn from_str(text: &str) -> Result<Self, ReceiptKeyError> {
        let mut bytes = [0; SECRET_KEY_LENGTH];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| ReceiptKeyError::NotAKey)?;
        // With some points of the curve, anybody can sign.
        let key = VerifyingKey::from_bytes(&bytes).ok().filter(|key| !key.is_weak());
        key.map(Self).ok_or(ReceiptKeyError::NotAKey)
    }
}

/// Who signs receipts. Cheap to clone.
#[derive(Clone)]
pub struct Receipts(Arc<SigningKey>);

impl Receipts {
    /// With the key in `key_file`; without one, with that of the store, which the first who asks makes.
    pub async fn open(store: &Store, key_file: Option<&Path>) -> Result<Self, ReceiptKeyError> {
        if let Some(path) = key_file {
            return Self::read(path);
        }
        let mut fresh = [0; SECRET_KEY_LENGTH];
        let random = rand::rngs::SysRng.try_fill_bytes(&mut fresh);
        random.map_err(|error| ReceiptKeyError::Random(error.to_string()))?;
        let text = store.made_once(keys::RECEIPT_KEY, hex::encode(fresh)).await?;
        Self::parse(&text).ok_or_else(|| StoreError::Damaged("the key that signs receipts".into()).into())
    }

    /// With the key in a file that nobody else may read.
    pub fn read(path: &Path) -> Result<Self, ReceiptKeyError> {
        let (mode, text) = open(path)?;
        if mode & !MODE_MAX != 0 {
            return Err(ReceiptKeyError::OpenToOthers { path: path.to_owned(), mode });
        }
        Self::parse(text.trim()).ok_or_else(|| ReceiptKeyError::FileContent(path.to_owned()))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut seed = [0; SECRET_KEY_LENGTH];
        hex::decode_to_slice(text, &mut seed).ok()?;
        Some(Self(Arc::new(SigningKey::from_bytes(&seed))))
    }

    pub fn public_key(&self) -> ReceiptKey {
        ReceiptKey::of(&self.0)
    }

    /// Signs what adds up, and nothing else.
    pub fn sign(&self, statement: ReceiptStatement) -> Result<Receipt, ReceiptError> {
        Receipt::sign(statement, &self.0)
    }
}

/// Without the key.
impl fmt::Debug for Receipts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Receipts").field(&self.public_key()).finish()
    }
}

/// A key file's permissions and text.
fn open(path: &Path) -> Result<(u32, String), ReceiptKeyError> {
    let fault = |source| ReceiptKeyError::File { path: path.to_owned(), source };
    let file = File::open(path).map_err(fault)?;
    let mode = file.metadata().map_err(fault)?.permissions().mode() & 0o777;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(fault)?;
    Ok((mode, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str, mode: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn a_key_file_is_read_only_where_nobody_else_can_read_it() {
        let seed = format!("{}\n", "07".repeat(32));
        let key = Receipts::read(file(&seed, 0o600).path()).unwrap().public_key();
        assert_eq!(key.to_string(), "ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c");
        assert_eq!(Receipts::read(file(&seed, 0o400).path()).unwrap().public_key(), key);
        for mode in [0o604, 0o640, 0o620, 0o601, 0o700, 0o644] {
            let error = Receipts::read(file(&seed, mode).path()).unwrap_err();
            assert!(matches!(error, ReceiptKeyError::OpenToOthers { mode: told, .. } if told == mode), "{error}");
        }
    }

    #[test]
    fn a_file_without_a_key_is_one_clear_line() {
        for text in ["", "07", &"07".repeat(33), &"0g".repeat(32)] {
            let file = file(text, 0o600);
            for error in [Receipts::read(file.path()).unwrap_err(), ReceiptKey::read(file.path()).unwrap_err()] {
                let path = file.path().display();
                assert_eq!(error.to_string(), format!("{path} does not hold a key: 64 hexadecimal digits"));
            }
        }
        let error = Receipts::read(Path::new("/nowhere/key")).unwrap_err();
        assert!(error.to_string().starts_with("/nowhere/key: No such file"), "{error}");
    }

    #[test]
    fn a_key_with_which_anybody_can_sign_is_no_key() {
        // The neutral element, and a point of order two.
        for weak in [format!("01{}", "00".repeat(31)), format!("ec{}7f", "ff".repeat(30))] {
            assert!(weak.parse::<ReceiptKey>().is_err(), "{weak}");
        }
    }

    #[test]
    fn a_public_key_is_written_once_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(RECEIPT_KEY_FILE);
        for digits in ["07", "07", "08"] {
            let key = Receipts::parse(&digits.repeat(32)).unwrap().public_key();
            key.write(&path).unwrap();
            assert_eq!(ReceiptKey::read(&path).unwrap(), key);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_signing_key_is_never_shown() {
        let receipts = Receipts::parse(&"07".repeat(32)).unwrap();
        assert!(!format!("{receipts:?}").contains("0707"), "{receipts:?}");
    }
}
