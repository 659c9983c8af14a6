//! Answers that are kept for later: what is stored of them, and the endpoints that find them again.

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{answer::Whole, auth::authenticate, error::ApiError, state::EdgeState};
use crate::{
    admission::Scope,
    domain::TenantId,
    ledger::LedgerError,
    prompt::{Message, Role, ToolCall},
    records::{Listed, Order, Record},
    store::StoreError,
    telemetry::unix_ms,
};

pub const CHAT: &str = "chat.completion";
pub const RESPONSE: &str = "response";
/// Answers on one page of a list.
const PAGE: usize = 20;
const PAGE_MAX: usize = 100;

/// An answer that is to be kept when it is complete.
pub struct Keeping {
    pub tenant: TenantId,
    /// As the client knows it.
    pub id: String,
    pub kind: &'static str,
    pub metadata: Map<String, Value>,
    /// What the answer answers, without instructions.
    pub conversation: Vec<Message>,
    /// The answer so far, where it is a stream.
    pub whole: Whole,
}

impl Keeping {
    /// Best effort: the client has its answer.
    pub async fn keep(self, state: &EdgeState, whole: &Whole, body: &[u8]) {
        let Self { tenant, id, kind, metadata, mut conversation, .. } = self;
        conversation.extend(whole.choices.first().map(|choice| {
            Message {
                tool_calls: choice
                    .calls
                    .iter()
                    .map(|call| ToolCall {
                        id: call.id.clone(),
                        name: call.name.clone(),
                        arguments: call.arguments.clone(),
                    })
                    .collect(),
                ..Message::new(Role::Assistant, choice.text.clone())
            }
        }));
        let answer = match serde_json::from_slice(body) {
            Ok(Value::Object(mut answer)) => {
                answer.insert("metadata".to_owned(), Value::Object(metadata));
                Value::Object(answer).to_string().into_bytes()
            }
            _ => body.to_vec(),
        };
        let conversation = serde_json::to_vec(&conversation).expect("messages serialise");
        let kind = kind.to_owned();
        let record = Record { id, kind, created_unix_ms: unix_ms(), answer, conversation };
        if let Err(error) = state.records.put(&tenant, &record).await {
            tracing::error!(%error, id = record.id, "an answer was not stored");
        }
    }
}

pub fn store_failed(error: StoreError) -> ApiError {
    tracing::warn!(%error, "a record could not be read");
    if error.is_transient() { ApiError::store_away() } else { ApiError::internal() }
}

pub fn ledger_failed(error: LedgerError) -> ApiError {
    match error {
        LedgerError::Store(error) => store_failed(error),
        error => {
            tracing::error!(%error, "an earlier request under a key could not be made free");
            ApiError::internal()
        }
    }
}

/// A stored answer of the bearer's tenant.
async fn found(http: &HttpRequest, state: &EdgeState, id: &str, kind: &str) -> Result<(TenantId, Record), ApiError> {
    let principal = authenticate(http, state).await?;
    if !principal.may(Scope::Chat) {
        return Err(ApiError::permission_denied("This API key may not read completions."));
    }
    let record = state.records.get(&principal.tenant, id).await.map_err(store_failed)?;
    match record.filter(|record| record.kind == kind) {
        Some(record) => Ok((principal.tenant, record)),
        None => Err(ApiError::not_found(kind, id)),
    }
}

fn json(bytes: Vec<u8>) -> HttpResponse {
    HttpResponse::Ok().content_type("application/json").body(bytes)
}

pub async fn get_chat(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    Ok(json(found(&http, &state, &id, CHAT).await?.1.answer))
}

pub async fn get_response(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    Ok(json(found(&http, &state, &id, RESPONSE).await?.1.answer))
}

pub async fn delete_chat(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    delete(&http, &state, &id, CHAT, "chat.completion.deleted").await
}

pub async fn delete_response(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    delete(&http, &state, &id, RESPONSE, "response.deleted").await
}

async fn delete(
    http: &HttpRequest,
    state: &EdgeState,
    id: &str,
    kind: &str,
    object: &'static str,
) -> Result<HttpResponse, ApiError> {
    let (tenant, _) = found(http, state, id, kind).await?;
    state.records.delete(&tenant, kind, id).await.map_err(store_failed)?;
    Ok(HttpResponse::Ok().json(Deleted { id, object, deleted: true }))
}

#[derive(JsonSchema, Serialize)]
pub struct Deleted<'a> {
    id: &'a str,
    #[schemars(extend("enum" = ["chat.completion.deleted", "response.deleted"]))]
    object: &'static str,
    #[schemars(extend("const" = true))]
    deleted: bool,
}

#[derive(JsonSchema, Serialize)]
pub struct ChatList<'a> {
    #[schemars(extend("const" = "list"))]
    object: &'static str,
    #[schemars(with = "Vec<Stored>")]
    data: Vec<Value>,
    first_id: Option<&'a str>,
    last_id: Option<&'a str>,
    has_more: bool,
}

/// Stands for what is kept as it was answered.
#[derive(JsonSchema)]
#[schemars(extend("$ref" = "#/components/schemas/StoredChatCompletion"))]
struct Stored {}

/// Which of the stored answers a list is to have.
#[derive(Default)]
struct Wanted {
    after: Option<String>,
    limit: usize,
    order: Order,
    model: Option<String>,
    metadata: Vec<(String, String)>,
}

impl Wanted {
    fn read(query: &str) -> Result<Self, ApiError> {
        let unreadable = |_| ApiError::malformed_query();
        let pairs = web::Query::<Vec<(String, String)>>::from_query(query).map_err(unreadable)?.into_inner();
        let mut wanted = Self { limit: PAGE, ..Self::default() };
        for (name, value) in pairs {
            match name.as_str() {
                "after" => wanted.after = Some(value),
                "model" => wanted.model = Some(value),
                "order" if value == "asc" => wanted.order = Order::OldestFirst,
                "order" if value == "desc" => wanted.order = Order::NewestFirst,
                "order" => {
                    let why = "Invalid 'order': expected 'asc' or 'desc'.";
                    return Err(ApiError::field("invalid_value", "order", why));
                }
                "limit" => match value.parse() {
                    Ok(limit) if (1..=PAGE_MAX).contains(&limit) => wanted.limit = limit,
                    _ => {
                        let why = format!("Invalid 'limit': expected a whole number from 1 to {PAGE_MAX}.");
                        return Err(ApiError::field("out_of_range", "limit", why));
                    }
                },
                "metadata" => {
                    let why = "Invalid 'metadata': expected 'metadata[key]=value'.";
                    return Err(ApiError::field("invalid_value", "metadata", why));
                }
                name => {
                    let key = name.strip_prefix("metadata[").and_then(|name| name.strip_suffix(']'));
                    wanted.metadata.extend(key.map(|key| (key.to_owned(), value)));
                }
            }
        }
        Ok(wanted)
    }

    fn has(&self, answer: &Value) -> bool {
        self.model.as_ref().is_none_or(|model| answer["model"] == **model)
            && self.metadata.iter().all(|(key, value)| answer["metadata"][key] == **value)
    }
}

/// The tenant's stored completions, the oldest first unless asked otherwise.
pub async fn list_chat(http: HttpRequest, state: web::Data<EdgeState>) -> Result<HttpResponse, ApiError> {
    let principal = authenticate(&http, &state).await?;
    if !principal.may(Scope::Chat) {
        return Err(ApiError::permission_denied("This API key may not read completions."));
    }
    let wanted = Wanted::read(http.query_string())?;
    let choose = |record: Record| {
        let answer = serde_json::from_slice(&record.answer).ok()?;
        wanted.has(&answer).then_some((record.id, answer))
    };
    let (after, limit) = (wanted.after.as_deref(), wanted.limit);
    let listed = state.records.list(&principal.tenant, CHAT, wanted.order, after, limit, choose).await;
    let Listed { found, last, has_more } = listed.map_err(store_failed)?;
    let (ids, data): (Vec<String>, Vec<Value>) = found.into_iter().unzip();
    let first_id = ids.first().map(String::as_str);
    // Where not all was looked at, the next page begins behind what was, wanted or not.
    let last_id = if has_more { last.as_deref() } else { ids.last().map(String::as_str) };
    Ok(HttpResponse::Ok().json(ChatList { object: "list", data, first_id, last_id, has_more }))
}

/// What an earlier response and those before it said.
pub async fn earlier(state: &Arc<EdgeState>, tenant: &TenantId, id: &str) -> Result<Vec<Message>, ApiError> {
    let record = state.records.get(tenant, id).await.map_err(store_failed)?;
    let Some(record) = record.filter(|record| record.kind == RESPONSE) else {
        let why = format!("Previous response with id '{}' not found.", super::error::shorten(id));
        return Err(ApiError::field("previous_response_not_found", "previous_response_id", why));
    };
    serde_json::from_slice(&record.conversation).map_err(|error| {
        tracing::error!(%error, id, "a stored conversation cannot be read");
        ApiError::internal()
    })
}
