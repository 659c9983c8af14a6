//! An answer as it grows, told in pieces: what a stream sends one by one is what a plain answer joins.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Serialize;

use crate::{
    domain::{FinishReason, FundsEnd, RequestId, StoppedBy, TokenDetail, Usage},
    model::Vocabulary,
    prompt::{CallReader, Said},
};

/// What is known of an answer before its first token.
#[derive(Clone)]
pub struct Form {
    pub choices: u32,
    pub vocabulary: Arc<Vocabulary>,
    /// Calls of tools may come up in the text.
    pub has_tools: bool,
    /// What is no call has a form.
    pub has_shape: bool,
    pub is_legacy: bool,
    /// What the text begins with, before anything that is decoded.
    pub echo: String,
    pub logprobs: bool,
    pub token_ids: bool,
    pub tokens_as_ids: bool,
}

/// More of one choice.
#[derive(Clone, Debug)]
pub struct Piece {
    pub choice: u32,
    pub body: PieceBody,
    /// The tokens behind it, where they are told of.
    pub tokens: Vec<TokenDetail>,
}

#[derive(Clone, Debug)]
pub enum PieceBody {
    Text(String),
    Call { index: u32, id: String, name: String },
    Arguments { index: u32, text: String },
    End { reason: WireReason, stopped_by: Option<StoppedBy> },
}

/// Why a choice ended, as clients know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WireReason {
    Stop,
    Length,
    ToolCalls,
    FunctionCall,
}

impl WireReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::FunctionCall => "function_call",
        }
    }
}

/// Turns what a worker says into pieces.
pub struct Teller {
    request: RequestId,
    form: Form,
    choices: Vec<Choice>,
}

#[derive(Default)]
struct Choice {
    reader: Option<CallReader>,
    called: u32,
    has_ended: bool,
    /// Tokens whose text is not told yet.
    tokens: Vec<TokenDetail>,
}

impl Teller {
    pub fn new(request: RequestId, form: Form) -> Self {
        let choice = |_| Choice {
            reader: form
                .has_tools
                .then(|| if form.has_shape { CallReader::at_the_start() } else { CallReader::default() }),
            ..Choice::default()
        };
        let choices = (0..form.choices).map(choice).collect();
        Self { request, form, choices }
    }

    pub fn form(&self) -> &Form {
        &self.form
    }

    /// What each choice begins with, if with anything.
    pub fn begin(&self) -> Vec<Piece> {
        let echo = |choice| Piece { choice, body: PieceBody::Text(self.form.echo.clone()), tokens: Vec::new() };
        if self.form.echo.is_empty() { Vec::new() } else { (0..self.form.choices).map(echo).collect() }
    }

    pub fn delta(&mut self, choice: u32, text: String, tokens: Vec<TokenDetail>) -> Vec<Piece> {
        let Some(of) = self.choices.get_mut(choice as usize) else { return Vec::new() };
        of.tokens.extend(tokens);
        let said = match &mut of.reader {
            None if text.is_empty() => Vec::new(),
            None => vec![Said::Text(text)],
            Some(reader) => reader.read(&text),
        };
        self.pieces(choice, said)
    }

    /// Ends the choices that have not ended by themselves: their request was cancelled.
    pub fn end_all(&mut self) -> Vec<Piece> {
        let open: Vec<u32> =
            (0..self.form.choices).filter(|choice| !self.choices[*choice as usize].has_ended).collect();
        open.into_iter().flat_map(|choice| self.end(choice, FinishReason::Cancelled, None)).collect()
    }

    pub fn end(&mut self, choice: u32, reason: FinishReason, stopped_by: Option<StoppedBy>) -> Vec<Piece> {
        let Some(of) = self.choices.get_mut(choice as usize) else { return Vec::new() };
        let left = of.reader.as_mut().map(CallReader::finish).unwrap_or_default();
        let mut pieces = self.pieces(choice, left);
        let of = &mut self.choices[choice as usize];
        let reason = match reason {
            FinishReason::Length => WireReason::Length,
            FinishReason::Stop if of.called > 0 && self.form.is_legacy => WireReason::FunctionCall,
            FinishReason::Stop if of.called > 0 => WireReason::ToolCalls,
            // Who cancels knows it already.
            FinishReason::Stop | FinishReason::Cancelled => WireReason::Stop,
        };
        of.has_ended = true;
        let tokens = std::mem::take(&mut of.tokens);
        pieces.push(Piece { choice, body: PieceBody::End { reason, stopped_by }, tokens });
        pieces
    }

    fn pieces(&mut self, choice: u32, said: Vec<Said>) -> Vec<Piece> {
        let of = &mut self.choices[choice as usize];
        let mut pieces = Vec::with_capacity(said.len());
        for said in said {
            let body = match said {
                Said::Text(text) => PieceBody::Text(text),
                Said::Call { index, name } => {
                    PieceBody::Call { index, id: call_id(&self.request, choice, index), name }
                }
                Said::Arguments { index, text } => PieceBody::Arguments { index, text },
                Said::Called { .. } => {
                    of.called += 1;
                    continue;
                }
            };
            pieces.push(Piece { choice, body, tokens: std::mem::take(&mut of.tokens) });
        }
        pieces
    }
}

/// A function of the request and of the call's place in it, so that whoever tells of the call again names it the same.
fn call_id(request: &RequestId, choice: u32, index: u32) -> String {
    let unique = request.as_str().strip_prefix("chatcmpl-").unwrap_or(request.as_str());
    format!("call_{unique}_{choice}_{index}")
}

/// A whole answer.
#[derive(Debug, Default)]
pub struct Whole {
    pub prompt: Vec<TokenDetail>,
    pub choices: Vec<WholeChoice>,
    pub usage: Usage,
}

#[derive(Clone, Debug, Default)]
pub struct WholeChoice {
    pub text: String,
    pub calls: Vec<WholeCall>,
    pub tokens: Vec<TokenDetail>,
    pub reason: Option<WireReason>,
    pub stopped_by: Option<StoppedBy>,
}

#[derive(Clone, Debug, Default)]
pub struct WholeCall {
    pub id: String,
    pub name: String,
    pub arguments: String,
}

impl Whole {
    pub fn of(choices: u32) -> Self {
        Self { choices: vec![WholeChoice::default(); choices as usize], ..Self::default() }
    }

    /// Why there was no money for more of it, if that is what ended any of its choices.
    pub fn limited_by(&self) -> Option<FundsEnd> {
        self.choices.iter().find_map(|choice| match choice.stopped_by {
            Some(StoppedBy::Funds(why)) => Some(why),
            _ => None,
        })
    }

    pub fn add(&mut self, pieces: Vec<Piece>) {
        for Piece { choice, body, tokens } in pieces {
            let Some(choice) = self.choices.get_mut(choice as usize) else { continue };
            choice.tokens.extend(tokens);
            match body {
                PieceBody::Text(text) => choice.text.push_str(&text),
                PieceBody::Call { id, name, .. } => {
                    choice.calls.push(WholeCall { id, name, arguments: String::new() });
                }
                PieceBody::Arguments { text, .. } => {
                    if let Some(call) = choice.calls.last_mut() {
                        call.arguments.push_str(&text);
                    }
                }
                PieceBody::End { reason, stopped_by } => {
                    (choice.reason, choice.stopped_by) = (Some(reason), stopped_by);
                }
            }
        }
    }
}

// --- tokens on the wire ------------------------------------------------------------------------------

#[derive(JsonSchema, Serialize)]
pub struct Logprobs {
    content: Vec<TokenLogprob>,
    refusal: Option<()>,
}

impl Logprobs {
    pub fn is_empty(&self) -> bool {
        self.content.is_empty()
    }

    /// The tokens alone.
    pub fn content(&self) -> serde_json::Value {
        serde_json::json!(self.content)
    }
}

#[derive(JsonSchema, Serialize)]
struct TokenLogprob {
    #[serde(flatten)]
    token: AnyLogprob,
    top_logprobs: Vec<AnyLogprob>,
}

#[derive(JsonSchema, Serialize)]
struct AnyLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl Form {
    /// The bytes that a token stands for; of control tokens, their names.
    pub fn bytes(&self, token: u32) -> &[u8] {
        self.vocabulary.spelled(token)
    }

    /// How a token is shown where tokens are told of.
    pub fn shown(&self, token: u32) -> String {
        if self.tokens_as_ids {
            return format!("token_id:{token}");
        }
        String::from_utf8_lossy(self.bytes(token)).into_owned()
    }

    fn any(&self, token: u32, logprob: f32) -> AnyLogprob {
        AnyLogprob { token: self.shown(token), logprob, bytes: self.bytes(token).to_vec() }
    }

    /// `None` where nobody asked.
    pub fn logprobs(&self, tokens: &[TokenDetail]) -> Option<Logprobs> {
        let content = |detail: &TokenDetail| TokenLogprob {
            token: self.any(detail.token, detail.logprob),
            top_logprobs: detail.top.iter().map(|(token, logprob)| self.any(*token, *logprob)).collect(),
        };
        let shown = tokens.iter().filter(|detail| !detail.is_hidden);
        self.logprobs.then(|| Logprobs { content: shown.map(content).collect(), refusal: None })
    }

    /// The same of the ids.
    pub fn token_ids(&self, tokens: &[TokenDetail]) -> Option<Vec<u32>> {
        self.token_ids.then(|| tokens.iter().map(|detail| detail.token).collect())
    }
}
