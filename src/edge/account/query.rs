//! The parameters of a query: each known by name, each at most once unless it is a list.

use std::{collections::BTreeSet, ops::RangeInclusive};

use actix_web::{HttpRequest, web};

use crate::edge::error::{ApiError, shorten};

/// Values of one list.
const ITEMS_MAX: usize = 100;

pub struct Query {
    pairs: Vec<(String, String)>,
}

impl Query {
    /// `known`: the names that the operation has. `name[]` is the same as `name`.
    pub fn read(http: &HttpRequest, known: &[&str]) -> Result<Self, ApiError> {
        Self::parse(http.query_string(), known)
    }

    fn parse(query: &str, known: &[&str]) -> Result<Self, ApiError> {
        let pairs = web::Query::<Vec<(String, String)>>::from_query(query);
        let mut pairs = pairs.map_err(|_| ApiError::malformed_query())?.into_inner();
        for (name, _) in &mut pairs {
            if let Some(bare) = name.strip_suffix("[]") {
                *name = bare.to_owned();
            }
            if !known.contains(&name.as_str()) {
                let why = format!("Unknown parameter: '{}'. There are {}.", shorten(name), known.join(", "));
                return Err(ApiError::field("unknown_parameter", shorten(name), why));
            }
        }
        Ok(Self { pairs })
    }

    pub fn text(&self, name: &str) -> Result<Option<&str>, ApiError> {
        let mut values = self.pairs.iter().filter(|(other, _)| other == name).map(|(_, value)| value.as_str());
        let value = values.next();
        if values.next().is_some() {
            let why = format!("Invalid '{name}': it was given more than once.");
            return Err(ApiError::field("invalid_value", name, why));
        }
        Ok(value)
    }

    pub fn whole(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let digits = text.strip_prefix('-').unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            let why = format!("Invalid type for '{name}': expected an integer, but got `{}`.", shorten(text));
            return Err(ApiError::field("invalid_type", name, why));
        }
        match text.parse().ok().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let (least, most) = (range.start(), range.end());
                let why = format!("Invalid '{name}': expected {least} to {most}, but got {}.", shorten(text));
                Err(ApiError::field("out_of_range", name, why))
            }
        }
    }

    /// One of `words`.
    pub fn word(&self, name: &str, words: &[&'static str]) -> Result<Option<&'static str>, ApiError> {
        self.text(name)?.map(|text| word(name, text, words)).transpose()
    }

    /// Those of `words` that are named.
    pub fn words(&self, name: &str, words: &[&'static str]) -> Result<BTreeSet<&'static str>, ApiError> {
        self.values(name)?.into_iter().map(|text| word(name, text, words)).collect()
    }

    /// Nothing where the list is not given.
    pub fn set<T: Ord + for<'a> From<&'a str>>(&self, name: &str) -> Result<Option<BTreeSet<T>>, ApiError> {
        let values = self.values(name)?;
        Ok((!values.is_empty()).then(|| values.into_iter().map(T::from).collect()))
    }

    fn values(&self, name: &str) -> Result<Vec<&str>, ApiError> {
        let values = self.pairs.iter().filter(|(other, _)| other == name).map(|(_, value)| value.as_str());
        let values: Vec<&str> = values.collect();
        if values.len() > ITEMS_MAX {
            let why = format!("Invalid '{name}': at most {ITEMS_MAX} items, but got {}.", values.len());
            return Err(ApiError::field("array_above_max_length", name, why));
        }
        Ok(values)
    }
}

fn word(name: &str, text: &str, words: &[&'static str]) -> Result<&'static str, ApiError> {
    words.iter().find(|word| **word == text).copied().ok_or_else(|| {
        let why = format!("Invalid '{name}': `{}` is none of {}.", shorten(text), words.join(", "));
        ApiError::field("invalid_value", name, why)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[&str] = &["a", "b"];

    #[test]
    fn parameters_are_read_by_name_with_and_without_brackets() {
        let query = Query::parse("a=7&b[]=x&b%5B%5D=y&b=x", KNOWN).unwrap();
        assert_eq!(query.whole("a", 0..=9).unwrap(), Some(7));
        assert_eq!(query.set::<String>("b").unwrap().unwrap().into_iter().collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(query.words("b", &["x", "y", "z"]).unwrap().into_iter().collect::<Vec<_>>(), ["x", "y"]);
        let none = Query::parse("", KNOWN).unwrap();
        assert!(none.text("a").unwrap().is_none() && none.set::<String>("b").unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        let refused = |query: &str, read: fn(&Query) -> Result<(), ApiError>| {
            let error = Query::parse(query, KNOWN).and_then(|query| read(&query)).unwrap_err();
            (error.code().unwrap(), error.param().unwrap().to_owned())
        };
        let number = |query: &Query| query.whole("a", 1..=9).map(drop);
        let word = |query: &Query| query.word("a", &["x"]).map(drop);
        let words = |query: &Query| query.words("b", &["x"]).map(drop);
        for (query, read, code, param) in [
            ("c=1", number as fn(&Query) -> Result<(), ApiError>, "unknown_parameter", "c"),
            ("a=1&a=1", number, "invalid_value", "a"),
            ("a=", number, "invalid_type", "a"),
            ("a=1.0", number, "invalid_type", "a"),
            ("a=%2B1", number, "invalid_type", "a"),
            ("a=0", number, "out_of_range", "a"),
            ("a=-1", number, "out_of_range", "a"),
            ("a=99999999999999999999999", number, "out_of_range", "a"),
            ("a=y", word, "invalid_value", "a"),
            ("b[]=x&b[]=y", words, "invalid_value", "b"),
            (&"b=x&".repeat(ITEMS_MAX + 1), words, "array_above_max_length", "b"),
        ] {
            assert_eq!(refused(query, read), (code, param.to_owned()), "{query}");
        }
    }
}
