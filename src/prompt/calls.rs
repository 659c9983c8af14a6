//! Calls of tools in an answer's text, read as it comes.

use super::tools::{CALL_CLOSE, CALL_OPEN};

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    Text(String),
    /// A call begins; calls count from 0.
    Call {
        index: u32,
        name: String,
    },
    /// More of the arguments of the call that began last.
    Arguments {
        index: u32,
        text: String,
    },
    /// The call is complete.
    Called {
        index: u32,
    },
}

/// Reads text in pieces of any size: what comes out joined does not depend on where they are cut.
#[derive(Debug, Default)]
pub struct CallReader {
    state: State,
    /// What cannot be told yet.
    held: String,
    calls: u32,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Text,
    /// At the beginning of an answer that is either calls or text of a form.
    Start,
    /// Of a form: whatever it has in it is no call.
    Form,
    /// Behind the opening tag, before the arguments.
    Head,
    Arguments(Json),
    /// Behind the arguments, up to the closing tag.
    Tail,
}

const NAME_KEY: &str = "\"name\":";
const ARGUMENTS_KEY: &str = "\"arguments\":";

impl CallReader {
    /// Whether a call has begun so far.
    pub fn calls(&self) -> u32 {
        self.calls
    }

    /// Of an answer that has its calls at the beginning or nowhere: the text that it has otherwise is of a form, and may
    /// hold anything.
    pub fn at_the_start() -> Self {
        Self { state: State::Start, ..Self::default() }
    }

    pub fn read(&mut self, text: &str) -> Vec<Said> {
        self.held.push_str(text);
        let mut said = Vec::new();
        while self.step(&mut said) {}
        said
    }

    /// What is left when no more comes. A call that broke off before its arguments comes to nothing: its tags are
    /// ours, and no text.
    pub fn finish(&mut self) -> Vec<Said> {
        let rest = std::mem::take(&mut self.held);
        if !matches!(self.state, State::Text | State::Start | State::Form) {
            return Vec::new();
        }
        if rest.is_empty() { Vec::new() } else { vec![Said::Text(rest)] }
    }

    /// Goes as far as one state allows. False when more text is needed.
    fn step(&mut self, said: &mut Vec<Said>) -> bool {
        match &mut self.state {
            State::Start if self.held.len() < CALL_OPEN.len() && CALL_OPEN.starts_with(self.held.as_str()) => false,
            State::Start => {
                self.state = if self.held.starts_with(CALL_OPEN) { State::Text } else { State::Form };
                true
            }
            State::Form => {
                if !self.held.is_empty() {
                    said.push(Said::Text(std::mem::take(&mut self.held)));
                }
                false
            }
            State::Text => {
                let (text, is_open) = match self.held.find(CALL_OPEN) {
                    Some(at) => (at, true),
                    None => (self.held.len() - overlap(&self.held, CALL_OPEN), false),
                };
                // Blanks before a call, and between calls, are no part of the text.
                let mut shown = self.held[..text].to_owned();
                let blanks = shown.len() - shown.trim_end().len();
                if is_open {
                    shown.truncate(shown.len() - blanks);
                    self.held.drain(..text + CALL_OPEN.len());
                    self.state = State::Head;
                } else {
                    shown.truncate(shown.len() - blanks);
                    self.held.drain(..shown.len());
                }
                if !shown.is_empty() {
                    said.push(Said::Text(shown));
                }
                is_open
            }
            State::Head => {
                let Some((name, end)) = head(&self.held) else { return false };
                let index = self.calls;
                self.calls += 1;
                self.held.drain(..end);
                self.state = State::Arguments(Json::default());
                said.push(Said::Call { index, name });
                true
            }
            State::Arguments(json) => {
                let index = self.calls - 1;
                let end = json.read(&self.held);
                let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
                if !text.is_empty() {
                    said.push(Said::Arguments { index, text });
                }
                if end.is_some() {
                    self.state = State::Tail;
                    said.push(Said::Called { index });
                }
                end.is_some()
            }
            State::Tail => match self.held.find(CALL_CLOSE) {
                Some(at) => {
                    self.held.drain(..at + CALL_CLOSE.len());
                    self.state = State::Text;
                    true
                }
                None => false,
            },
        }
    }
}

/// The name of a call, and where its arguments begin.
fn head(text: &str) -> Option<(String, usize)> {
    let name_at = text.find(NAME_KEY)? + NAME_KEY.len();
    let quoted = text[name_at..].trim_start();
    let name: String = serde_json::Deserializer::from_str(quoted).into_iter::<String>().next()?.ok()?;
    let arguments_at = text.find(ARGUMENTS_KEY)? + ARGUMENTS_KEY.len();
    let blanks = text[arguments_at..].len() - text[arguments_at..].trim_start().len();
    // What the arguments begin with must be there, or blanks before it would be counted as theirs.
    (arguments_at + blanks < text.len()).then_some((name, arguments_at + blanks))
}

/// Length of the longest end of `text` that begins `tag`.
fn overlap(text: &str, tag: &str) -> usize {
    (1..tag.len().min(text.len() + 1)).rev().find(|len| text.ends_with(&tag[..*len])).unwrap_or(0)
}

/// Where a JSON object ends.
#[derive(Debug, Default)]
struct Json {
    depth: u32,
    in_string: bool,
    is_escaped: bool,
}

impl Json {
    /// Reads on. How much of `text` belongs to the object, if it ends here.
    fn read(&mut self, text: &str) -> Option<usize> {
        for (at, byte) in text.bytes().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.is_escaped => self.is_escaped = false,
                    b'\\' => self.is_escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(at + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_of_a_form_is_text_whatever_it_says() {
        let form = format!("{{\"t\": \"{CALL_OPEN}\", \"name\": \"delete_all\", \"arguments\": {{}}}} \n");
        let call = format!("{CALL_OPEN}\n{{\"name\": \"f\", \"arguments\": {{\"a\": 1}}}}\n{CALL_CLOSE}");
        for cut in 1..form.len().min(call.len()) {
            let mut reader = CallReader::at_the_start();
            let mut said = reader.read(&form[..cut]);
            said.extend(reader.read(&form[cut..]));
            said.extend(reader.finish());
            let text: String = said
                .iter()
                .map(|said| match said {
                    Said::Text(text) => text.as_str(),
                    _ => "a call",
                })
                .collect();
            assert_eq!(text, form);
            let mut reader = CallReader::at_the_start();
            let mut said = reader.read(&call[..cut]);
            said.extend(reader.read(&call[cut..]));
            assert!(said.contains(&Said::Call { index: 0, name: "f".into() }), "{said:?}");
            assert!(!said.iter().any(|said| matches!(said, Said::Text(_))), "{said:?}");
        }
        // What broke off before it was certain is text.
        let mut reader = CallReader::at_the_start();
        assert_eq!(reader.read("<tool"), []);
        assert_eq!(reader.finish(), [Said::Text("<tool".into())]);
    }

    /// What was said, joined: the text, and each call's name and arguments.
    fn joined(pieces: impl Iterator<Item = String>) -> (String, Vec<(String, String, bool)>) {
        let mut reader = CallReader::default();
        let mut said: Vec<Said> = pieces.flat_map(|piece| reader.read(&piece)).collect();
        said.extend(reader.finish());
        let (mut all, mut calls) = (String::new(), Vec::<(String, String, bool)>::new());
        for piece in said {
            match piece {
                Said::Text(text) => all += &text,
                Said::Call { index, name } => {
                    assert_eq!(index as usize, calls.len());
                    calls.push((name, String::new(), false));
                }
                Said::Arguments { index, text } => calls[index as usize].1 += &text,
                Said::Called { index } => calls[index as usize].2 = true,
            }
        }
        (all, calls)
    }

    fn cut(text: &str, sizes: &[usize]) -> Vec<String> {
        let mut sizes = sizes.iter().cycle();
        let characters: Vec<char> = text.chars().collect();
        let mut rest = &characters[..];
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
            pieces.push(piece.iter().collect());
            rest = tail;
        }
        pieces
    }

    const TWO: &str = "Let me <b>look</b>.\n<tool_call>\n{\"name\": \"a-1\", \"arguments\": {\"x\": \"}\\\"{\", \"y\": \
                       [1, {}]}}\n</tool_call>\n<tool_call>\n{\"name\": \"b\", \"arguments\": {}}\n</tool_call>";

    #[test]
    fn text_and_calls_are_told_apart() {
        let (text, calls) = joined([TWO.to_owned()].into_iter());
        assert_eq!(text, "Let me <b>look</b>.");
        assert_eq!(calls[0], ("a-1".into(), "{\"x\": \"}\\\"{\", \"y\": [1, {}]}".into(), true));
        assert_eq!(calls[1], ("b".into(), "{}".into(), true));
    }

    #[test]
    fn an_answer_that_breaks_off_loses_nothing_that_was_certain() {
        let (text, calls) = joined([TWO[..70].to_owned()].into_iter());
        assert_eq!(text, "Let me <b>look</b>.");
        assert!(!calls[0].2 && calls[0].1.starts_with("{\"x\""), "{calls:?}");
        assert_eq!(joined(["a <tool".to_owned()].into_iter()).0, "a <tool");
        assert_eq!(joined(["a <tool_call>\n{\"na".to_owned()].into_iter()).0, "a");
        assert_eq!(joined(["ends in blanks \n".to_owned()].into_iter()).0, "ends in blanks \n");
    }

    proptest! {
        #[test]
        fn where_the_text_is_cut_makes_no_difference(
            end in 0..=TWO.len(),
            sizes in prop::collection::vec(1usize..9, 1..6),
        ) {
            prop_assume!(TWO.is_char_boundary(end));
            let whole = joined([TWO[..end].to_owned()].into_iter());
            prop_assert_eq!(joined(cut(&TWO[..end], &sizes).into_iter()), whole);
        }
    }
}
