//! A statement as a table.

use csv::{Terminator, Writer, WriterBuilder};

use super::{Charge, Line, Statement};
use crate::domain::{NanoUsd, utc_text};

/// Every row has all of these. `amount_nano_usd` is as the balance sees it, what was charged therefore negative.
const COLUMNS: [&str; 13] = [
    "kind",
    "date",
    "entry",
    "reference",
    "request",
    "model",
    "requests",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "amount_nano_usd",
    "amount_usd",
    "note",
];

/// The opening balance, all that moved it, and the closing balance, which is the sum of the rows between `opening_balance`
/// and `closing_balance` with the former. What is behind it is said for information.
pub fn render(statement: &Statement) -> String {
    let table = WriterBuilder::new().terminator(Terminator::CRLF).from_writer(Vec::new());
    let mut table = Table(table);
    table.row(COLUMNS.map(str::to_owned));
    let Statement { opening, closing, .. } = statement;
    table.amount("opening_balance", &statement.month.to_string(), opening.balance, &statement.name);
    for (kind, lines) in [
        ("grant", &statement.grants),
        ("refund", &statement.refunds),
        ("adjustment", &statement.adjustments),
        ("write_off", &statement.write_offs),
    ] {
        lines.iter().for_each(|line| table.line(kind, line));
    }
    statement.charges.iter().for_each(|charge| table.charge(charge));
    let more_held = closing.held.nano().saturating_sub(opening.held.nano());
    if more_held != 0 {
        let freed = NanoUsd::new(more_held.saturating_neg());
        table.amount("held", &statement.month.to_string(), freed, "change of what is on hold");
    }
    table.amount("closing_balance", &statement.month.to_string(), closing.balance, "");
    table.amount("held_at_end", &statement.month.to_string(), closing.held, "");
    statement.credit_lines.iter().for_each(|line| table.line("credit_line", line));
    let bytes = table.0.into_inner().expect("memory takes whatever is written");
    String::from_utf8(bytes).expect("only text was written")
}

struct Table(Writer<Vec<u8>>);

impl Table {
    fn row(&mut self, cells: [String; COLUMNS.len()]) {
        self.0.write_record(cells).expect("memory takes whatever is written");
    }

    fn amount(&mut self, kind: &str, date: &str, amount: NanoUsd, note: &str) {
        let none = String::new;
        let (nano, usd) = (amount.nano().to_string(), amount.to_string());
        let (kind, date, note) = (kind.to_owned(), date.to_owned(), harmless(note));
        self.row([kind, date, none(), none(), none(), none(), none(), none(), none(), none(), nano, usd, note]);
    }

    fn line(&mut self, kind: &str, line: &Line) {
        let none = String::new;
        let Line { entry, unix_ms, reference, request, note, amount } = line;
        self.row([
            kind.to_owned(),
            utc_text(*unix_ms),
            entry.to_string(),
            harmless(reference),
            harmless(request.as_deref().unwrap_or_default()),
            none(),
            none(),
            none(),
            none(),
            none(),
            amount.nano().to_string(),
            amount.to_string(),
            harmless(note),
        ]);
    }

    fn charge(&mut self, Charge { day, model, sums }: &Charge) {
        let amount = NanoUsd::new(sums.amount.nano().saturating_neg());
        self.row([
            "charge".to_owned(),
            day.to_string(),
            String::new(),
            String::new(),
            String::new(),
            harmless(model.as_str()),
            sums.requests.to_string(),
            sums.prompt_tokens.to_string(),
            sums.completion_tokens.to_string(),
            sums.cached_tokens.to_string(),
            amount.nano().to_string(),
            amount.to_string(),
            String::new(),
        ]);
    }
}

/// What a person wrote. Spreadsheets take a cell that begins like a formula for one, so it gets an apostrophe in front,
/// which they do not show.
fn harmless(text: &str) -> String {
    let begins_formula = text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n', '＝', '＋', '－', '＠']);
    if begins_formula { format!("'{text}") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::harmless;

    #[test]
    fn no_cell_that_a_person_wrote_is_a_formula() {
        for text in ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "＝1"] {
            assert_eq!(harmless(text), format!("'{text}"));
        }
        for text in ["", "opening balance", "a=b", "'=1"] {
            assert_eq!(harmless(text), text);
        }
    }
}
