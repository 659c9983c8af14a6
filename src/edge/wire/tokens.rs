//! Requests about tokens alone.

use super::{Body, fields, messages::messages, read::Fields};
use crate::{
    edge::error::ApiError,
    prompt::{Asked, Conversation},
};

/// What is to be tokenised, and whether the tokens' texts are wanted.
/// With the names of what has no effect.
pub fn read_text(body: Body, messages_max: usize) -> Result<(Asked, bool, Vec<String>), ApiError> {
    let Body { map } = body;
    let mut ignored = fields::check(&map, fields::TOKENIZE)?;
    let fields = Fields::root(&map);
    let wants_texts = fields.boolean("return_token_strs")?.unwrap_or(false);
    let text = fields.text("prompt", usize::MAX)?;
    let continues_last = fields.boolean("continue_final_message")?.unwrap_or(false);
    let begins_answer = fields.boolean("add_generation_prompt")?.unwrap_or(!continues_last);
    let has_bos = fields.boolean("add_special_tokens")?.unwrap_or(false);
    let variables = fields.map("chat_template_kwargs")?.cloned().unwrap_or_default();
    if fields.given("messages").is_none() {
        if has_bos {
            ignored.push("add_special_tokens".to_owned());
        }
        return Ok((Asked::Text(fields.required("prompt", text)?.to_owned()), wants_texts, ignored));
    }
    let messages = messages(&fields, messages_max, &mut ignored)?;
    let mut conversation = Conversation::new(messages);
    (conversation.continues_last, conversation.begins_answer) = (continues_last, begins_answer);
    (conversation.has_bos, conversation.variables) = (has_bos, variables);
    Ok((Asked::Conversation(Box::new(conversation)), wants_texts, ignored))
}

pub fn read_tokens(body: Body, vocabulary: usize) -> Result<(Vec<u32>, Vec<String>), ApiError> {
    let Body { map } = body;
    let ignored = fields::check(&map, fields::DETOKENIZE)?;
    let fields = Fields::root(&map);
    let tokens = fields.tokens("tokens", usize::MAX, vocabulary)?;
    Ok((fields.required("tokens", tokens)?, ignored))
}
