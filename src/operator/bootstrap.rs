use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    accounts::{Accounts, OperatorError},
    api_keys::{KeyWish, new_secret},
    audit_log::Change,
};
use crate::{
    admission::{Scope, SecretHash},
    domain::{KeyId, NanoUsd, TenantId},
    store::keys,
};

pub const KEY_FILE_DEVELOPMENT: &str = "dev-key";
pub const KEY_FILE_ADMIN: &str = "admin-key";

/// Fixed, so that an interrupted bootstrap finds its own traces and goes on instead of starting another.
const TENANT_DEVELOPMENT: &str = "ten_development";
const TENANT_OPERATOR: &str = "ten_operator";

/// What a bootstrap found or made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bootstrap {
    /// The store had no tenant, and now has.
    pub created: bool,
    /// The file with the development key, where there is one.
    pub dev_key: Option<PathBuf>,
    /// The file with the operator's key, where there is one.
    pub admin_key: Option<PathBuf>,
}

impl Accounts {
    /// Where the store has no tenant yet: makes the development tenant with `balance` and a key for chat, an
    /// operator's key, and the two key files (mode 0600) in `data_dir`. Otherwise changes nothing.
    ///
    /// A key that is already in a file is used again, so that clients keep working after the store was
    /// emptied, and so that whatever interrupts this, the next call completes it.
    pub async fn bootstrap(&self, data_dir: &Path, balance: NanoUsd) -> Result<Bootstrap, OperatorError> {
        let dev_key = data_dir.join(KEY_FILE_DEVELOPMENT);
        let admin_key = data_dir.join(KEY_FILE_ADMIN);
        let tenants: u64 = self.store.query(redis::cmd("ZCARD").arg(keys::TENANTS)).await?;
        if tenants > 0 {
            let found = |path: PathBuf| path.exists().then_some(path);
            return Ok(Bootstrap { created: false, dev_key: found(dev_key), admin_key: found(admin_key) });
        }
        let development = TenantId::from(TENANT_DEVELOPMENT);
        let operator = TenantId::from(TENANT_OPERATOR);
        let dev_secret = secret_in(&dev_key)?;
        let admin_secret = secret_in(&admin_key)?;
        let change = Change::of("bootstrap", &development).with("operator", &operator);
        self.log.write(&change.with("balance_nano_usd", balance)).await?;
        self.open_tenant(&development, "development", balance).await?;
        self.open_tenant(&operator, "operator", NanoUsd::ZERO).await?;
        let chat = [Scope::Chat, Scope::Read].into_iter().collect();
        let wish = KeyWish::new("development", chat);
        self.store_key(&development, KeyId::generate(), &dev_secret, wish).await?;
        let admin = [Scope::Read, Scope::Admin].into_iter().collect();
        let wish = KeyWish::new("operator", admin);
        self.store_key(&operator, KeyId::generate(), &admin_secret, wish).await?;
        self.list(&[&operator, &development]).await?;
        Ok(Bootstrap { created: true, dev_key: Some(dev_key), admin_key: Some(admin_key) })
    }
}

/// The secret in a key file; a new one is made and written where there is no file.
fn secret_in(path: &Path) -> Result<String, OperatorError> {
    let fault = |source| OperatorError::KeyFile { path: path.to_owned(), source };
    match fs::read_to_string(path) {
        Ok(text) => {
            let secret = text.trim();
            if SecretHash::of(secret).is_none() || secret.contains(char::is_whitespace) {
                return Err(OperatorError::KeyFileContent(path.to_owned()));
            }
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(fault)?;
            Ok(secret.to_owned())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let secret = new_secret()?;
            write_private(path, &secret).map_err(fault)?;
            Ok(secret)
        }
        Err(error) => Err(fault(error)),
    }
}

/// Whole or not at all, and never readable by others, not even for a moment.
fn write_private(path: &Path, secret: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(format!("{secret}\n").as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(directory)?.sync_all()
}
