//! Tools for models whose template knows them, and for those whose template does not.
//!
//! A call is written as `<tool_call>`, a line break, `{"name": "…", "arguments": {…}}`, a line break and
//! `</tool_call>`: the form that most open models were trained on. A template that mentions it gets the tools
//! themselves; any other gets them explained in the system message, and what tools answered as a user's words.

use serde_json::{Value, json};

use super::{Message, Role, Tool, ToolCall};

pub const CALL_OPEN: &str = "<tool_call>";
pub const CALL_CLOSE: &str = "</tool_call>";
const ANSWER_OPEN: &str = "<tool_response>";
const ANSWER_CLOSE: &str = "</tool_response>";

/// Whether a template shows tools to the model, and calls in the form that we read.
pub fn are_known_to(template: &str) -> bool {
    template.contains("tools") && template.contains(CALL_OPEN)
}

/// A tool as OpenAI's wire format has it, which templates expect.
pub fn shown(tool: &Tool) -> Value {
    let mut function = json!({ "name": tool.name });
    if let Some(description) = &tool.description {
        function["description"] = json!(description);
    }
    function["parameters"] = match &tool.parameters {
        Some(schema) => Value::Object(schema.clone()),
        None => json!({ "type": "object", "properties": {} }),
    };
    json!({ "type": "function", "function": function })
}

/// The conversation for a template that knows neither tools nor calls.
pub fn spelled_out(messages: &[Message], tools: &[Tool]) -> Vec<Message> {
    let mut plain: Vec<Message> = Vec::with_capacity(messages.len() + 1);
    for message in messages {
        match message.role {
            Role::Assistant if !message.tool_calls.is_empty() => {
                let mut content = message.content.clone();
                for call in &message.tool_calls {
                    if !content.is_empty() {
                        content.push('\n');
                    }
                    content.push_str(&spelled_call(call));
                }
                plain.push(Message { content, tool_calls: Vec::new(), ..message.clone() });
            }
            Role::Tool => {
                let answer = format!("{ANSWER_OPEN}\n{}\n{ANSWER_CLOSE}", message.content);
                // Answers to calls that were made at once are one turn.
                match plain.last_mut() {
                    Some(last) if last.role == Role::User && last.content.ends_with(ANSWER_CLOSE) => {
                        last.content.push('\n');
                        last.content.push_str(&answer);
                    }
                    _ => plain.push(Message::new(Role::User, answer)),
                }
            }
            _ => plain.push(message.clone()),
        }
    }
    if tools.is_empty() {
        return plain;
    }
    let explained = explained(tools);
    match plain.first_mut() {
        Some(first) if matches!(first.role, Role::System | Role::Developer) => {
            first.content.push_str("\n\n");
            first.content.push_str(&explained);
        }
        _ => plain.insert(0, Message::new(Role::System, explained)),
    }
    plain
}

fn spelled_call(call: &ToolCall) -> String {
    let name = Value::from(call.name.as_str());
    let arguments = if call.arguments.trim().is_empty() { "{}" } else { &call.arguments };
    format!("{CALL_OPEN}\n{{\"name\": {name}, \"arguments\": {arguments}}}\n{CALL_CLOSE}")
}

fn explained(tools: &[Tool]) -> String {
    let list: Vec<String> = tools.iter().map(|tool| shown(tool).to_string()).collect();
    format!(
        "You can call the functions below when they help you to answer. Each is described by a JSON object with its \
         name and the JSON schema of its arguments:\n{}\n\nTo call a function, write only its name and arguments, as \
         JSON between two tags:\n{CALL_OPEN}\n{{\"name\": \"function_name\", \"arguments\": {{\"argument\": \
         \"value\"}}}}\n{CALL_CLOSE}\nThe function's answer then comes between {ANSWER_OPEN} and {ANSWER_CLOSE}. If \
         no function helps, answer in plain text.",
        list.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weather() -> Tool {
        let schema = json!({ "type": "object", "properties": { "city": { "type": "string" } } });
        let parameters = schema.as_object().cloned();
        Tool { name: "weather".into(), description: Some("Today's weather".into()), parameters, strict: false }
    }

    #[test]
    fn tools_are_explained_in_the_system_message_and_calls_and_answers_are_spelled_out() {
        let call =
            |id: &str, arguments: &str| ToolCall { id: id.into(), name: "weather".into(), arguments: arguments.into() };
        let calls = vec![call("1", r#"{"city":"Bern"}"#), call("2", "")];
        let answer =
            |id: &str, content: &str| Message { tool_call_id: Some(id.into()), ..Message::new(Role::Tool, content) };
        let messages = [
            Message::new(Role::System, "Be brief."),
            Message::new(Role::User, "Weather?"),
            Message { tool_calls: calls, ..Message::new(Role::Assistant, "Let me look.") },
            answer("1", "sun"),
            answer("2", "rain"),
        ];
        let plain = spelled_out(&messages, &[weather()]);
        assert!(plain[0].content.starts_with("Be brief.\n\nYou can call"));
        assert!(plain[0].content.contains(r#"{"type":"function","function":{"name":"weather","description":"Today's"#));
        assert_eq!(
            plain[2].content,
            "Let me look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\":\"Bern\"}}\n</tool_call>\n\
             <tool_call>\n{\"name\": \"weather\", \"arguments\": {}}\n</tool_call>"
        );
        assert_eq!(plain.len(), 4);
        assert_eq!((plain[3].role, plain[3].content.matches(ANSWER_OPEN).count()), (Role::User, 2));
        let without = spelled_out(&messages[1..2], &[weather()]);
        assert_eq!((without[0].role, without.len()), (Role::System, 2));
        assert_eq!(spelled_out(&messages[1..2], &[]), messages[1..2]);
    }
}
