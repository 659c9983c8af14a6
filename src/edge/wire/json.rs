//! JSON of strangers: bounded in depth and in the number of its values, and never ambiguous.

use std::{cell::Cell, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::edge::error::{ApiError, shorten};

/// A value takes some twenty times the memory of its shortest spelling, so the body's size alone is no
/// bound. Enough for a bias on every token of a large vocabulary.
const VALUES_MAX: usize = 262_144;

/// Parses a whole body. A key that stands twice in one object is refused: readers disagree on which counts.
pub fn parse(body: &[u8]) -> Result<Value, ApiError> {
    if let Err(error) = std::str::from_utf8(body) {
        return Err(ApiError::malformed_json(format!("invalid UTF-8 at byte {}", error.valid_up_to())));
    }
    let left = Cell::new(VALUES_MAX);
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = Values { left: &left }.deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    value.map_err(|error| ApiError::malformed_json(error.to_string()))
}

#[derive(Clone, Copy)]
struct Values<'a> {
    left: &'a Cell<usize>,
}

impl Values<'_> {
    fn take_one<E: Error>(self) -> Result<(), E> {
        match self.left.get().checked_sub(1) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => Err(E::custom(format_args!("more than {VALUES_MAX} values"))),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Values<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        self.take_one()?;
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Values<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!("duplicate key `{}`", shorten(&key))));
            }
            let value = entries.next_value_seed(self)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

/// What a value is, as error messages say it.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a decimal number",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_json_is_read_as_anyone_would() {
        let text = r#" {"a": [1, -2, 3.5, "é\n", null, true], "b": {"a": 18446744073709551615}} "#;
        assert_eq!(parse(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn hostile_json_is_refused_with_its_place() {
        let deep = "[".repeat(100_000);
        let wide = format!("[{}1]", "1,".repeat(VALUES_MAX));
        for (text, said) in [
            ("", "line 1 column 0"),
            ("{", "line 1 column 1"),
            ("{\n \"a\": }", "line 2 column 7"),
            ("{} x", "trailing characters"),
            (r#"{"a":1,"b":2,"a":3}"#, "duplicate key `a` at line 1 column 16"),
            (r#"{"a":{"b":1,"b":1}}"#, "duplicate key `b`"),
            (r#""\ud800""#, "hex escape"),
            ("[1e999]", "number out of range"),
            ("[NaN]", "line 1 column 2"),
            (deep.as_str(), "recursion limit"),
            (wide.as_str(), "more than 262144 values"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.message().contains(said), "{said}: {}", error.message());
            assert_eq!(error.code(), Some("invalid_json"));
        }
        assert!(parse(b"{\"a\": \"\xff\"}").unwrap_err().message().contains("invalid UTF-8 at byte 7"));
    }
}
