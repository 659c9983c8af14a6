use redis::{FromRedisValue, Value};

use super::StoreError;
use crate::domain::FundsEnd;

/// Answer of a function: a word that says what happened, then what belongs to it. Whatever is absent or of
/// another shape is damage, never a default.
pub(crate) struct Reply {
    word: String,
    rest: std::vec::IntoIter<Value>,
}

impl Reply {
    pub fn word(&self) -> &str {
        &self.word
    }

    pub fn next<T: FromRedisValue>(&mut self, what: &str) -> Result<T, StoreError> {
        let value = self.rest.next().ok_or_else(|| StoreError::Damaged(format!("answer lacks {what}")))?;
        T::from_redis_value(value).map_err(|error| StoreError::Damaged(format!("{what}: {error}")))
    }

    /// What kept a hold from paying for more tokens.
    pub fn funds_end(&mut self) -> Result<Option<FundsEnd>, StoreError> {
        match self.next::<String>("what was in the way")?.as_str() {
            "" => Ok(None),
            "balance" => Ok(Some(FundsEnd::Balance)),
            "spend" => Ok(Some(FundsEnd::SpendLimit)),
            other => Err(StoreError::Damaged(format!("`{other}` is nothing that could be in the way"))),
        }
    }

    pub fn unexpected(&self, function: &str) -> StoreError {
        StoreError::Damaged(format!("{function} answered `{}`", self.word))
    }
}

impl FromRedisValue for Reply {
    fn from_redis_value(value: Value) -> Result<Self, redis::ParsingError> {
        let mut rest = Vec::<Value>::from_redis_value(value)?.into_iter();
        let word = match rest.next() {
            Some(word) => String::from_redis_value(word)?,
            None => return Err("an answer without a word".into()),
        };
        Ok(Self { word, rest })
    }
}
