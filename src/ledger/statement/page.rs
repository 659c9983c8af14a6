//! A statement as a page: no script, nothing fetched.

use std::sync::LazyLock;

use minijinja::{Environment, Value, context, value::Serde};

use super::Statement;
use crate::domain::{NanoUsd, utc_text};

/// Values are escaped as HTML, for the name of the template ends so.
const NAME: &str = "statement.html";

static TEMPLATES: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut templates = Environment::new();
    templates.add_filter("usd", |nano: i64| NanoUsd::new(nano).to_string());
    templates.add_filter("utc", utc_text);
    templates.add_template(NAME, include_str!("statement.html")).expect("the page of a statement compiles");
    templates
});

pub fn render(statement: &Statement) -> String {
    let more_held = statement.closing.held.nano().saturating_sub(statement.opening.held.nano());
    let all = context! { freed => more_held.saturating_neg(), ..Value::from(Serde(statement)) };
    let page = TEMPLATES.get_template(NAME).and_then(|template| template.render(all));
    page.expect("a statement has all that its page names")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Position, StatementDraft};

    #[test]
    fn a_name_is_shown_and_never_run() {
        let name = "<script>alert(1)</script>\"'&".to_owned();
        let draft = StatementDraft::new("ten_1".into(), name, "2026-11".parse().unwrap());
        let position = Position { balance: NanoUsd::new(i64::MAX), held: NanoUsd::ZERO };
        let page = render(&draft.finish(position, true).unwrap());
        assert!(page.contains("&lt;script&gt;alert(1)&lt;&#x2f;script&gt;&quot;&#x27;&amp;"), "{page}");
        assert!(page.contains("9223372036.854775807") && page.contains("no entry of this month"), "{page}");
        for fetched in ["<script", "src=", "href=", "url(", "@import"] {
            assert!(!page.contains(fetched), "{fetched}");
        }
    }
}
