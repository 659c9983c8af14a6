//! A progress bar on the standard error output; nothing at all where that is not a terminal.

use indicatif::{ProgressBar, ProgressStyle};

pub struct Bar {
    bar: ProgressBar,
    known: &'static str,
    unknown: &'static str,
    has_total: bool,
}

impl Bar {
    pub fn bytes() -> Self {
        Self::new(
            "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            "{msg} {spinner} {bytes} {bytes_per_sec} {elapsed}",
        )
    }

    pub fn count() -> Self {
        Self::new("{msg} [{wide_bar}] {pos}/{len} {eta}", "{msg} {spinner} {pos} {elapsed}")
    }

    fn new(known: &'static str, unknown: &'static str) -> Self {
        let bar = ProgressBar::no_length();
        bar.set_style(style(unknown));
        Self { bar, known, unknown, has_total: false }
    }

    pub fn show(&mut self, what: &str, done: u64, total: Option<u64>) {
        if self.has_total != total.is_some() {
            self.has_total = total.is_some();
            self.bar.set_style(style(if self.has_total { self.known } else { self.unknown }));
        }
        if let Some(total) = total {
            self.bar.set_length(total);
        }
        if self.bar.message() != what {
            self.bar.set_message(what.to_owned());
        }
        self.bar.set_position(done);
    }

    pub fn clear(self) {
        self.bar.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates are sound; a test makes each")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_sound() {
        for mut bar in [Bar::bytes(), Bar::count()] {
            bar.show("x", 1, None);
            bar.show("x", 2, Some(3));
            bar.clear();
        }
    }
}
