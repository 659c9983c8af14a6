//! The fields of one object, each named by its way from the body's root.

use std::{borrow::Cow, ops::RangeInclusive};

use serde_json::{Map, Value};

use super::json;
use crate::{domain::NanoUsd, edge::error::ApiError};

/// An object of a request. A field that is null is as one that is not there.
#[derive(Clone)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// `""` for the body itself, else `messages[3]` and its like.
    at: Cow<'a, str>,
}

impl<'a> Fields<'a> {
    pub fn root(map: &'a Map<String, Value>) -> Self {
        Self { map, at: Cow::Borrowed("") }
    }

    /// `value` as an object that stands at `at`.
    pub fn of(value: &'a Value, at: String) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, at: Cow::Owned(at) }),
            other => Err(wrong_type(&at, "an object", other)),
        }
    }

    /// How errors name a field.
    pub fn param(&self, name: &str) -> String {
        if self.at.is_empty() { name.to_owned() } else { format!("{}.{name}", self.at) }
    }

    /// Names and values of all fields that are there.
    pub fn all(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.as_str(), value))
    }

    /// Names of all fields that were written, those that are null among them.
    pub fn written(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    pub fn given(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.given(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| wrong_type(&self.param(name), expected, value))
    }

    /// # Errors
    /// 400 when `value` is not there.
    pub fn required<T>(&self, name: &str, value: Option<T>) -> Result<T, ApiError> {
        value.ok_or_else(|| {
            let param = self.param(name);
            let why = format!("Missing required parameter: '{param}'.");
            ApiError::field("missing_required_parameter", param, why)
        })
    }

    pub fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "a boolean", Value::as_bool)
    }

    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        match self.typed(name, "a number", Value::as_f64)? {
            Some(number) if !range.contains(&number) => Err(self.outside(name, range.start(), range.end(), number)),
            number => Ok(number.map(|number| number as f32)),
        }
    }

    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some((value, integer)) =
            self.typed(name, "an integer", |value| whole(value).map(|integer| (value, integer)))?
        else {
            return Ok(None);
        };
        match i64::try_from(integer).ok().filter(|integer| range.contains(integer)) {
            Some(integer) => Ok(Some(integer)),
            None => Err(self.outside(name, range.start(), range.end(), value)),
        }
    }

    /// Of money, in nano-dollars: nothing that was written as a fraction or with an exponent, for readers round those.
    pub fn amount(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<NanoUsd>, ApiError> {
        let Some(value) = self.given(name) else { return Ok(None) };
        let whole = value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from));
        // What is too long for 64 bits was read as a float.
        let is_huge = value.as_f64().is_some_and(|number| number.abs() >= 2_f64.powi(63));
        match whole.and_then(|whole| i64::try_from(whole).ok()).filter(|whole| range.contains(whole)) {
            Some(whole) => Ok(Some(NanoUsd::new(whole))),
            None if whole.is_some() || is_huge => Err(self.outside(name, range.start(), range.end(), value)),
            None => Err(wrong_type(&self.param(name), "a whole number of nano-dollars", value)),
        }
    }

    fn outside(
        &self,
        name: &str,
        min: impl std::fmt::Display,
        max: impl std::fmt::Display,
        value: impl std::fmt::Display,
    ) -> ApiError {
        let param = self.param(name);
        let why = format!("Invalid '{param}': expected a value from {min} to {max}, but got {value}.");
        ApiError::field("out_of_range", param, why)
    }

    /// A string of at most `most` characters.
    pub fn text(&self, name: &str, most: usize) -> Result<Option<&'a str>, ApiError> {
        match self.typed(name, "a string", Value::as_str)? {
            Some(text) if text.len() > most && text.chars().count() > most => {
                let (param, count) = (self.param(name), text.chars().count());
                let why = format!("Invalid '{param}': at most {most} characters, but got {count}.");
                Err(ApiError::field("string_above_max_length", param, why))
            }
            text => Ok(text),
        }
    }

    /// One of `words`.
    pub fn word(&self, name: &str, words: &[&'static str]) -> Result<Option<&'static str>, ApiError> {
        let Some(text) = self.typed(name, "a string", Value::as_str)? else { return Ok(None) };
        match words.iter().find(|word| **word == text) {
            Some(word) => Ok(Some(word)),
            None => Err(self.none_of(name, text, words)),
        }
    }

    pub fn none_of(&self, name: &str, value: &str, words: &[&str]) -> ApiError {
        let param = self.param(name);
        let value = crate::edge::error::shorten(value);
        let why = format!("Invalid '{param}': `{value}` is none of {}.", words.join(", "));
        ApiError::field("invalid_value", param, why)
    }

    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.given(name).map(|value| Fields::of(value, self.param(name))).transpose()
    }

    /// An object as it is, for others to read.
    pub fn map(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.typed(name, "an object", Value::as_object)
    }

    pub fn array(&self, name: &str, items_max: usize) -> Result<Option<&'a [Value]>, ApiError> {
        match self.typed(name, "an array", Value::as_array)? {
            Some(items) if items.len() > items_max => Err(self.too_many(name, items.len(), items_max)),
            items => Ok(items.map(Vec::as_slice)),
        }
    }

    fn too_many(&self, name: &str, count: usize, most: usize) -> ApiError {
        let param = self.param(name);
        let why = format!("Invalid '{param}': at most {most} items, but got {count}.");
        ApiError::field("array_above_max_length", param, why)
    }

    /// Strings of an array, none of them empty or longer than `most` characters.
    pub fn texts(&self, name: &str, items_max: usize, most: usize) -> Result<Option<Vec<String>>, ApiError> {
        let Some(items) = self.array(name, items_max)? else { return Ok(None) };
        let item = |(i, value): (usize, &Value)| item_text(&format!("{}[{i}]", self.param(name)), value, most);
        items.iter().enumerate().map(item).collect::<Result<_, _>>().map(Some)
    }

    /// Token ids below `vocabulary`, in an array.
    pub fn tokens(&self, name: &str, items_max: usize, vocabulary: usize) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(items) = self.array(name, items_max)? else { return Ok(None) };
        let token = |(i, value): (usize, &Value)| {
            let param = || format!("{}[{i}]", self.param(name));
            let token = whole(value).ok_or_else(|| wrong_type(&param(), "an integer", value))?;
            let token = u32::try_from(token).ok().filter(|token| (*token as usize) < vocabulary);
            token.ok_or_else(|| no_token(&param(), &value.to_string(), vocabulary))
        };
        items.iter().enumerate().map(token).collect::<Result<_, _>>().map(Some)
    }
}

/// A number without a fraction, however it is spelled: to JSON, 1 and 1.0 are the same.
pub fn whole(value: &Value) -> Option<i128> {
    let integer = value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from));
    // What is less than every integer would be rounded to the least of them.
    let rounded = |number: f64| if number <= i64::MIN as f64 { i128::MIN } else { number as i128 };
    integer.or_else(|| value.as_f64().filter(|number| number.fract() == 0.0).map(rounded))
}

/// A string that is not empty and has at most `most` characters.
pub fn item_text(param: &str, value: &Value, most: usize) -> Result<String, ApiError> {
    let text = value.as_str().ok_or_else(|| wrong_type(param, "a string", value))?;
    let count = text.chars().count();
    if !(1..=most).contains(&count) {
        let why = format!("Invalid '{param}': expected 1 to {most} characters, but got {count}.");
        return Err(ApiError::field("invalid_value", param, why));
    }
    Ok(text.to_owned())
}

/// A 400 for an id that no token has.
pub fn no_token(param: &str, id: &str, vocabulary: usize) -> ApiError {
    let id = crate::edge::error::shorten(id);
    let why = format!("Invalid '{param}': {id} is no token of this model, whose ids are below {vocabulary}.");
    ApiError::field("out_of_range", param, why)
}

/// A 400 for a value of the wrong type.
pub fn wrong_type(param: &str, expected: &str, value: &Value) -> ApiError {
    let why = format!("Invalid type for '{param}': expected {expected}, but got {} instead.", json::kind(value));
    ApiError::field("invalid_type", param, why)
}

/// A 400 for what this service does not do.
pub fn unsupported(param: impl Into<String>, why: impl std::fmt::Display) -> ApiError {
    let param = param.into();
    let why = format!("`{param}` {why}");
    ApiError::field("unsupported_value", param, why)
}
