//! Tokens to text: UTF-8 that is split over tokens, and stop strings that are split over tokens.
//!
//! Text is handed out only once it is certain: never half a character, never the beginning of a stop
//! string that may still complete.

/// The text of one answer, as it grows.
pub struct TextAssembler {
    stops: Vec<String>,
    /// Whether the text ends with what stopped it, rather than before it.
    shows_stops: bool,
    /// From this on, nothing stops it any more; empty where there is no such text.
    until: String,
    is_past_stops: bool,
    /// Bytes at the end that are not yet a whole character.
    bytes: Vec<u8>,
    /// Whole characters held back because they may begin a stop string.
    held: String,
}

/// What a token brought.
#[derive(Debug, PartialEq)]
pub enum Progress {
    /// Text that may be sent; may be empty.
    Text(String),
    /// The answer is over.
    Stopped {
        /// Up to the stop string.
        text: String,
        by: String,
        /// Bytes from there on, which are no part of the text.
        dropped: usize,
    },
}

impl TextAssembler {
    pub fn new(stops: Vec<String>, shows_stops: bool, until: String) -> Self {
        let stops = stops.into_iter().filter(|s| !s.is_empty()).collect();
        Self { stops, shows_stops, until, is_past_stops: false, bytes: Vec::new(), held: String::new() }
    }

    /// Whether what stops must no longer do so.
    pub fn is_past_stops(&self) -> bool {
        self.is_past_stops
    }

    /// Bytes that are not handed out yet.
    pub fn waiting(&self) -> usize {
        self.bytes.len() + self.held.len()
    }

    /// Takes the bytes of the next token. Unless it `may_stop`, the text is only text.
    pub fn push(&mut self, bytes: &[u8], may_stop: bool) -> Progress {
        self.bytes.extend_from_slice(bytes);
        self.decode(false);
        let end = (!self.until.is_empty()).then(|| self.held.find(&self.until)).flatten();
        if !may_stop && end.is_none() {
            return Progress::Text(std::mem::take(&mut self.held));
        }
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop)));
        let first = found.filter(|_| may_stop).min_by_key(|(at, _)| *at);
        if let Some((at, stop)) = first.filter(|(at, _)| end.is_none_or(|end| *at < end)) {
            let by = stop.clone();
            let end = if self.shows_stops { at + by.len() } else { at };
            let dropped = self.held.len() - end + self.bytes.len();
            self.held.truncate(end);
            return Progress::Stopped { text: std::mem::take(&mut self.held), by, dropped };
        }
        if end.is_some() {
            self.is_past_stops = true;
            self.stops.clear();
            self.until.clear();
        }
        let rest = self.held.split_off(self.held.len() - self.possible_stop());
        Progress::Text(std::mem::replace(&mut self.held, rest))
    }

    /// What was held back, when no more tokens come. Half a character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        self.decode(true);
        std::mem::take(&mut self.held)
    }

    /// Moves whole characters from `bytes` to `held`; bytes that can no longer become one, as U+FFFD.
    fn decode(&mut self, last: bool) {
        let mut from = 0;
        loop {
            match std::str::from_utf8(&self.bytes[from..]) {
                Ok(text) => {
                    self.held.push_str(text);
                    from = self.bytes.len();
                    break;
                }
                Err(e) => {
                    let valid = from + e.valid_up_to();
                    self.held.push_str(std::str::from_utf8(&self.bytes[from..valid]).unwrap_or_default());
                    from = valid;
                    match e.error_len() {
                        Some(len) => from += len,
                        None if last => from = self.bytes.len(),
                        None => break,
                    }
                    self.held.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
        self.bytes.drain(..from);
    }

    /// Length in bytes of the longest end of `held` that begins a stop string.
    fn possible_stop(&self) -> usize {
        let overlap = |stop: &String| {
            (1..stop.len().min(self.held.len() + 1))
                .rev()
                .find(|len| stop.is_char_boundary(*len) && self.held.ends_with(&stop[..*len]))
                .unwrap_or(0)
        };
        self.stops.iter().chain([&self.until]).map(overlap).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The text handed out for `bytes` cut into pieces of the given lengths.
    fn joined(bytes: &[u8], cuts: &[usize], stops: &[&str]) -> String {
        joined_with(bytes, cuts, stops, false)
    }

    fn joined_with(bytes: &[u8], cuts: &[usize], stops: &[&str], shows_stops: bool) -> String {
        let mut text = TextAssembler::new(stops.iter().map(|s| (*s).to_owned()).collect(), shows_stops, String::new());
        let mut out = String::new();
        let mut rest = bytes;
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            rest = tail;
            match text.push(piece, true) {
                Progress::Text(t) => out += &t,
                Progress::Stopped { text, .. } => return out + &text,
            }
        }
        out + &text.finish()
    }

    #[test]
    fn nothing_stops_what_comes_behind_a_text_that_says_so() {
        let whole = "say\n it<call>\n{\"a\": 1}";
        for cut in 0..=whole.len() {
            let mut text = TextAssembler::new(vec!["\n{".into(), "}".into()], false, "<call>".into());
            let mut told = String::new();
            for piece in [&whole[..cut], &whole[cut..]] {
                match text.push(piece.as_bytes(), true) {
                    Progress::Text(text) => told += &text,
                    stopped @ Progress::Stopped { .. } => panic!("{stopped:?} at {cut}"),
                }
            }
            assert_eq!(told + &text.finish(), whole);
            assert!(text.is_past_stops());
        }
        let mut text = TextAssembler::new(vec!["it".into()], false, "<call>".into());
        assert!(matches!(text.push(whole.as_bytes(), true), Progress::Stopped { text, .. } if text == "say\n "));
    }

    #[test]
    fn a_stop_string_over_several_tokens_never_shows() {
        assert_eq!(joined(b"one END two", &[1], &["END"]), "one ");
        assert_eq!(joined(b"one EN two", &[1], &["END"]), "one EN two");
        assert_eq!(joined(b"aab", &[1], &["ab"]), "a");
        assert_eq!(joined("x€y".as_bytes(), &[1], &["€"]), "x");
        assert_eq!(joined(b"abcd", &[4], &["cd", "b"]), "a");
    }

    #[test]
    fn a_stop_string_is_shown_whole_where_it_is_wanted_and_ignored_while_it_must_not_stop() {
        assert_eq!(joined_with(b"one END two", &[1], &["END"], true), "one END");
        assert_eq!(joined_with(b"one END two", &[11], &["END", "ND"], true), "one END");
        let mut text = TextAssembler::new(vec!["b".into()], false, String::new());
        assert_eq!(text.push(b"ab", false), Progress::Text("ab".into()));
        assert_eq!(text.push(b"cb", true), Progress::Stopped { text: "c".into(), by: "b".into(), dropped: 1 });
    }

    #[test]
    fn bytes_that_are_no_text_become_replacement_characters_and_nothing_is_lost_after_them() {
        assert_eq!(joined(b"a\xffb\xe2\x82", &[1], &[]), "a\u{fffd}b\u{fffd}");
    }

    proptest! {
        #[test]
        fn the_text_does_not_depend_on_where_the_tokens_end(
            text in "[abé€🦀]{0,40}",
            cuts in prop::collection::vec(1usize..5, 1..8),
            stop in "[abé€]{1,3}",
        ) {
            let expected = text.find(&stop).map_or(text.as_str(), |at| &text[..at]);
            prop_assert_eq!(joined(text.as_bytes(), &cuts, &[&stop]), expected);
        }
    }
}
