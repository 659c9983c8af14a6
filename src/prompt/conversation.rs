//! What a client wants the model to read.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Developer,
    System,
    User,
    Assistant,
    /// What a tool answered.
    Tool,
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: Role,
    pub content: String,
    pub name: Option<String>,
    /// Of the assistant.
    pub tool_calls: Vec<ToolCall>,
    /// Of a tool: which call it answers.
    pub tool_call_id: Option<String>,
}

impl Message {
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), name: None, tool_calls: Vec::new(), tool_call_id: None }
    }

    fn bytes(&self) -> usize {
        let calls = self.tool_calls.iter().map(|call| call.name.len() + call.arguments.len());
        self.content.len() + self.name.as_ref().map_or(0, String::len) + calls.sum::<usize>()
    }
}

/// A call that the assistant made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    pub id: String,
    pub name: String,
    /// JSON, as the model wrote it.
    pub arguments: String,
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// A JSON schema; `None` takes no arguments.
    pub parameters: Option<Map<String, Value>>,
    /// Whether the arguments must match the schema to the letter.
    pub strict: bool,
}

/// A conversation, and how it is to be shown to the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    pub messages: Vec<Message>,
    /// Those that the model is told of.
    pub tools: Vec<Tool>,
    pub documents: Vec<Value>,
    /// Further variables of the template.
    pub variables: Map<String, Value>,
    /// The rendering ends with the beginning of an answer.
    pub begins_answer: bool,
    /// The rendering ends with the last message, which the answer continues.
    pub continues_last: bool,
    /// The token that begins a text goes before the rendering.
    pub has_bos: bool,
}

impl Conversation {
    pub fn new(messages: Vec<Message>) -> Self {
        Self {
            messages,
            tools: Vec::new(),
            documents: Vec::new(),
            variables: Map::new(),
            begins_answer: true,
            continues_last: false,
            has_bos: false,
        }
    }

    /// Bytes of text in the messages.
    pub fn bytes(&self) -> usize {
        self.messages.iter().map(Message::bytes).sum()
    }
}
