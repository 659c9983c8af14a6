//! Tokens to text: UTF-8 that is split over tokens, and stop strings that are split over tokens.
//!
//! Text is handed out only once it is certain: never half a character, never the beginning of a stop
//! string that may still complete.

/// The text of one answer, as it grows.
pub struct TextAssembler {
    stops: Vec<String>,
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
    /// The text up to the stop string; the answer is over.
    Stopped(String),
}

impl TextAssembler {
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops.into_iter().filter(|s| !s.is_empty()).collect();
        Self { stops, bytes: Vec::new(), held: String::new() }
    }

    /// Takes the bytes of the next token.
    pub fn push(&mut self, bytes: &[u8]) -> Progress {
        self.bytes.extend_from_slice(bytes);
        self.decode(false);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return Progress::Stopped(std::mem::take(&mut self.held));
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
        self.stops.iter().map(overlap).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The text handed out for `bytes` cut into pieces of the given lengths.
    fn joined(bytes: &[u8], cuts: &[usize], stops: &[&str]) -> String {
        let mut text = TextAssembler::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = String::new();
        let mut rest = bytes;
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            rest = tail;
            match text.push(piece) {
                Progress::Text(t) => out += &t,
                Progress::Stopped(t) => return out + &t,
            }
        }
        out + &text.finish()
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
