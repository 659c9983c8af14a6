//! JSON for people: objects as lines of name and value, lists of objects as tables.

use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::domain::NanoUsd;

const MIB: f64 = 1048576.0;

pub fn render(value: &Value) -> String {
    match value {
        Value::Object(object) => lines(object),
        Value::Array(rows) => rows_of(rows),
        other => format!("{}\n", cell("", other)),
    }
}

fn lines(object: &Map<String, Value>) -> String {
    let cells: Vec<_> = object.iter().map(|(name, value)| (heading(name), cell(name, value))).collect();
    let width = cells.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    cells.into_iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

fn rows_of(rows: &[Value]) -> String {
    let Some(Value::Object(first)) = rows.first() else {
        return if rows.is_empty() {
            "none\n".to_owned()
        } else {
            rows.iter().map(|row| cell("", row) + "\n").collect()
        };
    };
    let names: Vec<&String> = first.keys().collect();
    let mut grid = vec![names.iter().map(|name| heading(name)).collect::<Vec<_>>()];
    grid.extend(rows.iter().map(|row| names.iter().map(|name| cell(name, &row[name.as_str()])).collect()));
    let width = |column: usize| grid.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..names.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    grid.iter().map(line).collect()
}

/// Money is shown in dollars, exactly; sizes in MiB; times as RFC 3339 has them.
fn heading(name: &str) -> String {
    if name == "unix_ms" {
        return "at".to_owned();
    }
    let what = |name: &str| name.replace('_', " ");
    match (name.strip_suffix("_nano_usd"), name.strip_suffix("_bytes"), name.strip_suffix("_unix_ms")) {
        (Some(name), _, _) => format!("{} ($)", what(name)),
        (_, Some(name), _) => format!("{} (MiB)", what(name)),
        (_, _, Some(name)) => what(name),
        _ => what(name),
    }
}

/// A name within a cell, for what is shown.
fn short(name: &str) -> String {
    match (name.strip_suffix("_nano_usd"), name.strip_suffix("_unix_ms")) {
        (Some(name), _) => format!("{name}_usd"),
        (_, Some(name)) => name.to_owned(),
        _ => name.to_owned(),
    }
}

/// Limits of spend are nano-dollars too.
fn is_money(name: &str) -> bool {
    name.ends_with("_nano_usd") || name.starts_with("spend_per_")
}

fn time(ms: u64) -> Option<String> {
    Some(Timestamp::from_millisecond(i64::try_from(ms).ok()?).ok()?.to_string())
}

fn cell(name: &str, value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        // Enough of a digest to tell two apart; JSON has all of it.
        Value::String(text) if name == "sha256" => text.chars().take(12).collect(),
        Value::String(text) => text.clone(),
        Value::Number(number) if name.ends_with("unix_ms") => {
            number.as_u64().and_then(time).unwrap_or_else(|| number.to_string())
        }
        Value::Number(number) if is_money(name) => {
            number.as_i64().map_or_else(|| number.to_string(), |nano| NanoUsd::new(nano).to_string())
        }
        Value::Number(number) if name.ends_with("_bytes") => {
            number.as_u64().map_or_else(|| number.to_string(), |bytes| format!("{:.1}", bytes as f64 / MIB))
        }
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| cell("", item)).collect();
            if items.is_empty() { "none".to_owned() } else { items.join(", ") }
        }
        Value::Object(object) => {
            let part = |(name, value): (&String, &Value)| format!("{}={}", short(name), cell(name, value));
            let parts: Vec<_> = object.iter().map(part).collect();
            if parts.is_empty() { "none".to_owned() } else { parts.join(" ") }
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::render;

    #[test]
    fn money_is_shown_in_dollars_and_lists_are_aligned() {
        let one = render(&json!({ "balance_nano_usd": 1_500_000_000, "note": "", "faults": [] }));
        assert_eq!(one, "balance ($)  1.500000000\nnote         -\nfaults       none\n");
        let many = render(&json!([{ "id": "a", "held_nano_usd": -1 }, { "id": "long", "held_nano_usd": 0 }]));
        assert_eq!(many, "id    held ($)\na     -0.000000001\nlong  0.000000000\n");
        assert_eq!(render(&json!([])), "none\n");
        let file = render(&json!({ "size_bytes": 1_572_864, "sha256": "0123456789abcdef" }));
        assert_eq!(file, "size (MiB)  1.5\nsha256      0123456789ab\n");
        let key = render(
            &json!({ "created_unix_ms": 1_763_769_600_000_u64, "limits": { "spend_per_day": 5_000_000_000_u64 } }),
        );
        assert_eq!(key, "created  2025-11-22T00:00:00Z\nlimits   spend_per_day=5.000000000\n");
    }
}
