//! The price book: what is configured, and the price lists that were published since, each from its date on.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    domain::{ModelId, Price, PriceBook, PriceList},
    store::{Store, StoreError, keys},
};

/// How old what is known of the book may be.
const AGE_MAX: Duration = Duration::from_millis(500);
/// Within so long everybody knows what was published.
const HEARD_MS: u64 = 1000;
/// Longest name of a version.
const VERSION_BYTES_MAX: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum PricesError {
    #[error("there is no price for model {0}")]
    NoPrice(ModelId),
    #[error("price version `{0}` exists already; a published list is never changed")]
    VersionTaken(String),
    #[error(
        "prices cannot be changed in the past: `from` is {from_unix_ms} and it is {now_unix_ms} by the store's clock"
    )]
    InThePast { from_unix_ms: u64, now_unix_ms: u64 },
    #[error("a price version must have 1 to {VERSION_BYTES_MAX} letters, digits, dots, dashes or underscores")]
    BadVersion,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Prices {
    store: Store,
    configured: Arc<PriceList>,
    known: Arc<Mutex<Option<Known>>>,
}

#[derive(Clone)]
struct Known {
    asked: Instant,
    /// By the store's clock, when it was asked.
    unix_ms: u64,
    book: Arc<PriceBook>,
}

impl Prices {
    /// `configured` holds wherever nothing else was published.
    pub fn new(store: Store, configured: PriceList) -> Self {
        Self { store, configured: Arc::new(configured), known: Arc::default() }
    }

    /// What a token of a model costs now, and the version that says so.
    pub async fn current(&self, model: &ModelId) -> Result<(Price, String), PricesError> {
        let Known { asked, unix_ms, book } = self.known().await?;
        let passed = u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX);
        let found = book.at(model, unix_ms.saturating_add(passed));
        let found = found.map(|(price, version)| (price, version.to_owned()));
        found.ok_or_else(|| PricesError::NoPrice(model.clone()))
    }

    /// All lists, the configured one among them.
    pub async fn book(&self) -> Result<Arc<PriceBook>, PricesError> {
        Ok(self.known().await?.book)
    }

    /// What can be said against a new list without publishing it.
    pub async fn check(&self, version: &str, from_unix_ms: Option<u64>) -> Result<(), PricesError> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let is_name = (1..=VERSION_BYTES_MAX).contains(&version.len()) && version.bytes().all(is_plain);
        if !is_name {
            return Err(PricesError::BadVersion);
        }
        let now_unix_ms = self.store.now_unix_ms().await?;
        match from_unix_ms {
            Some(from_unix_ms) if from_unix_ms < now_unix_ms => {
                Err(PricesError::InThePast { from_unix_ms, now_unix_ms })
            }
            _ if self.known().await?.book.lists().iter().any(|list| list.version == version) => {
                Err(PricesError::VersionTaken(version.to_owned()))
            }
            _ => Ok(()),
        }
    }

    /// Adds a list that holds from its date on (nothing for now), on every edge within a second. Requests under way
    /// keep the price at which they were admitted.
    pub async fn publish(
        &self,
        version: &str,
        from_unix_ms: Option<u64>,
        prices: BTreeMap<ModelId, Price>,
    ) -> Result<PriceList, PricesError> {
        self.check(version, from_unix_ms).await?;
        let from_unix_ms = match from_unix_ms {
            Some(from) => from,
            // When every edge has heard of it.
            None => self.store.now_unix_ms().await? + HEARD_MS,
        };
        let list = PriceList { version: version.to_owned(), from_unix_ms, prices };
        let json = serde_json::to_string(&list).expect("prices serialise");
        let mut command = redis::cmd("HSETNX");
        command.arg(keys::PRICES).arg(version).arg(json);
        let is_new: bool = self.store.query(&command).await?;
        *self.known.lock() = None;
        if is_new { Ok(list) } else { Err(PricesError::VersionTaken(version.to_owned())) }
    }

    async fn known(&self) -> Result<Known, StoreError> {
        let known = self.known.lock().clone();
        if let Some(known) = known.filter(|known| known.asked.elapsed() < AGE_MAX) {
            return Ok(known);
        }
        let asked = Instant::now();
        let published: Vec<String> = self.store.query(redis::cmd("HVALS").arg(keys::PRICES)).await?;
        let unix_ms = self.store.now_unix_ms().await?;
        let read = |json: &String| serde_json::from_str::<PriceList>(json);
        let mut lists = published.iter().map(read).collect::<Result<Vec<_>, _>>().map_err(|error| {
            // Whoever cannot read a price must not make one up.
            StoreError::Damaged(format!("price list: {error}"))
        })?;
        lists.push((*self.configured).clone());
        let known = Known { asked, unix_ms, book: Arc::new(PriceBook::new(lists)) };
        *self.known.lock() = Some(known.clone());
        Ok(known)
    }
}
