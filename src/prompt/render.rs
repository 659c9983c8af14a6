//! How a client's text is kept from becoming a control token.
//!
//! A template may trim, slice, compare and join what clients wrote, so their text has to stand in the
//! rendering as itself. Every place where it spells a control token, or could complete one together with
//! its neighbours, gets an unguessable mark inside. The rendering is then cut at the control tokens that
//! are whole, which only the template can have written; the marks are taken out of what lies between, and
//! that is encoded without control tokens. A stretch between two control tokens is encoded in one piece,
//! so text and its neighbours from the template become the tokens that the model was trained on.

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, MatchKind};

use super::{PromptError, Tokenizer};

/// What this room needs of a tokeniser.
pub trait Encoder: Send + Sync {
    /// The token ids of `text`. Texts of control tokens are spelled out like any other text.
    fn encode(&self, text: &str) -> Result<Vec<u32>, PromptError>;

    /// The control token of exactly this text.
    fn control(&self, text: &str) -> Option<u32>;
}

impl Encoder for Tokenizer {
    fn encode(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        Self::encode(self, text, false).map_err(|error| PromptError::Encode(error.to_string()))
    }

    fn control(&self, text: &str) -> Option<u32> {
        Self::control(self, text)
    }
}

/// A stretch of the rendering.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    Control(&'a str),
    Text(Cow<'a, str>),
}

/// The texts of a model's control tokens, ready to be found in one pass over any text.
pub(super) struct ControlTokens {
    texts: Vec<String>,
    overlapping: AhoCorasick,
    longest: AhoCorasick,
}

impl ControlTokens {
    pub(super) fn new(texts: Vec<String>) -> Result<Self, PromptError> {
        let texts: Vec<String> = texts.into_iter().filter(|text| !text.is_empty()).collect();
        // A mark goes between the first and the second character.
        if let Some(single) = texts.iter().find(|text| text.chars().count() == 1) {
            return Err(PromptError::ControlToken(single.clone()));
        }
        let build = |kind| {
            let built = AhoCorasick::builder().match_kind(kind).build(&texts);
            built.map_err(|error| PromptError::Template(error.to_string()))
        };
        Ok(Self { overlapping: build(MatchKind::Standard)?, longest: build(MatchKind::LeftmostLongest)?, texts })
    }

    /// Cuts a rendering at its whole control tokens and takes the marks out of the rest.
    pub(super) fn split<'a>(&self, text: &'a str, mark: &Mark) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let mut from = 0;
        for found in self.longest.find_iter(text) {
            push_text(&mut pieces, &text[from..found.start()], mark);
            pieces.push(Piece::Control(&text[found.range()]));
            from = found.end();
        }
        push_text(&mut pieces, &text[from..], mark);
        pieces
    }

    /// The same for the name of a field, which must stay what it is for the template to find it: only a control token
    /// that it holds as a whole gets a mark. Its neighbours on paper are quotes, or values that have their own marks.
    pub(super) fn defuse_name<'a>(&self, text: &'a str, mark: &Mark) -> Cow<'a, str> {
        if self.longest.is_match(text) { self.defuse(text, mark) } else { Cow::Borrowed(text) }
    }

    /// `text` with a mark inside everything that is, or may become, a control token.
    pub(super) fn defuse<'a>(&self, text: &'a str, mark: &Mark) -> Cow<'a, str> {
        let after_first = |at: usize| at + text[at..].chars().next().map_or(0, char::len_utf8);
        let mut cuts: Vec<usize> =
            self.overlapping.find_overlapping_iter(text).map(|found| after_first(found.start())).collect();
        let trimmed = text.trim();
        let start = text.len() - text.trim_start().len();
        // What the edges of this text begin, the template or the next client's text might complete; text
        // that lies wholly within a control token could be its middle.
        let completes = |token: &String| suffixes(token).any(|suffix| trimmed.starts_with(suffix));
        let begins = |token: &String| prefixes(token).any(|prefix| trimmed.ends_with(prefix));
        let within = |token: &String| !trimmed.is_empty() && token.contains(trimmed);
        if self.texts.iter().any(|token| completes(token) || within(token)) {
            cuts.push(start);
        }
        if self.texts.iter().any(begins) {
            cuts.push(start + trimmed.len());
        }
        if cuts.is_empty() {
            return Cow::Borrowed(text);
        }
        cuts.sort_unstable();
        cuts.dedup();
        let mut marked = String::with_capacity(text.len() + cuts.len() * mark.0.len());
        let mut from = 0;
        for cut in cuts {
            marked.push_str(&text[from..cut]);
            marked.push_str(&mark.0);
            from = cut;
        }
        marked.push_str(&text[from..]);
        Cow::Owned(marked)
    }
}

/// What breaks a control token apart; one for each request.
pub(super) struct Mark(String);

impl Mark {
    /// Noncharacters around 96 random bits in decimal, which no filter for letters changes: nobody writes
    /// them by chance, nobody can guess them.
    pub(super) fn random() -> Self {
        let random = rand::random::<u128>() >> 32;
        Self(format!("\u{FDD0}{random}\u{FDD1}"))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

fn suffixes(token: &str) -> impl Iterator<Item = &str> {
    token.char_indices().skip(1).map(|(at, _)| &token[at..])
}

fn prefixes(token: &str) -> impl Iterator<Item = &str> {
    token.char_indices().skip(1).map(|(at, _)| &token[..at])
}

fn push_text<'a>(pieces: &mut Vec<Piece<'a>>, text: &'a str, mark: &Mark) {
    if text.is_empty() {
        return;
    }
    let text = if text.contains(&mark.0) { Cow::Owned(text.replace(&mark.0, "")) } else { Cow::Borrowed(text) };
    pieces.push(Piece::Text(text));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> ControlTokens {
        ControlTokens::new(["<|im_start|>", "<|im_end|>", "<|im|>", "<<", "<|im"].map(str::to_owned).to_vec()).unwrap()
    }

    fn plain(pieces: &[Piece]) -> String {
        pieces
            .iter()
            .map(|piece| match piece {
                Piece::Control(text) => *text,
                Piece::Text(text) => text,
            })
            .collect()
    }

    #[test]
    fn what_a_client_wrote_never_holds_a_whole_control_token() {
        let tokens = tokens();
        let mark = Mark::random();
        let parts = ["<", "<|", "|>", ">", "<|im_end|>", "<|im", "_end|>", "<|im_start|>", " ", "\n", "a", "é", "<<<<"];
        for a in parts {
            for b in parts {
                for c in parts {
                    let text = format!("{a}{b}{c}");
                    let defused = tokens.defuse(&text, &mark);
                    let pieces = tokens.split(&defused, &mark);
                    assert!(pieces.iter().all(|piece| matches!(piece, Piece::Text(_))), "{text:?}");
                    assert_eq!(plain(&pieces), text);
                }
            }
        }
    }

    #[test]
    fn two_texts_side_by_side_do_not_add_up_to_a_control_token() {
        let tokens = tokens();
        let mark = Mark::random();
        let whole = "<|im_end|>";
        for cut in 0..=whole.len() {
            let (left, right) = whole.split_at(cut);
            let text = tokens.defuse(left, &mark).into_owned() + &tokens.defuse(right, &mark);
            assert!(tokens.split(&text, &mark).iter().all(|piece| matches!(piece, Piece::Text(_))), "{cut}");
            // The same where the template itself writes one of the two.
            let text = left.to_owned() + &tokens.defuse(right, &mark);
            let pieces = tokens.split(&text, &mark);
            assert!(cut == whole.len() || !pieces.contains(&Piece::Control(whole)), "{cut}");
        }
    }

    #[test]
    fn ordinary_text_is_left_alone() {
        let tokens = tokens();
        let mark = Mark::random();
        for text in ["", "Hello, world", "a < b", "a </think> ", "x => y"] {
            assert!(matches!(tokens.defuse(text, &mark), Cow::Borrowed(_)), "{text}");
        }
    }
}
