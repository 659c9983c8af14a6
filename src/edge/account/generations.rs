//! `GET /generations/{id}`: one request of the tenant's, and what it cost.

use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;

use super::{ledger_failed, reader};
use crate::{
    domain::{NanoUsd, Price, RequestId, TenantId, Usage},
    edge::{
        auth::authenticate,
        error::{ApiError, shorten},
        state::EdgeState,
        stored::store_failed,
    },
    ledger::{Entry, Generation, GenerationState, LedgerError, RECEIPT_VERSION, ReceiptStatement},
};

#[derive(JsonSchema, Serialize)]
pub struct Cost<'a> {
    id: &'a str,
    #[schemars(extend("const" = "generation"))]
    object: &'static str,
    /// Running: money is set aside. Charged, or released: nothing is to be paid.
    #[schemars(extend("enum" = ["running", "charged", "released"]))]
    status: &'static str,
    /// The API key that asked.
    key: &'a str,
    model: &'a str,
    /// Unix seconds.
    created: Option<u64>,
    settled: Option<u64>,
    /// Null until it was charged.
    usage: Option<Tokens>,
    price: PriceNano,
    price_version: &'a str,
    /// How it ended, or why it was free.
    reason: Option<&'a str>,
    amount_nano_usd: i64,
    amount_usd: String,
    /// Set aside for it at present.
    held_nano_usd: i64,
    /// Of the amount, given back so far.
    refunded_nano_usd: i64,
    /// Of the amount, what the balance could not pay and nobody has to.
    written_off_nano_usd: i64,
    /// SHA-256 of the ids of the tokens that were put out, where it is known.
    digest: Option<&'a str>,
    /// The ledger's entry that ended it.
    entry: Option<Place<'a>>,
}

#[derive(JsonSchema, Serialize)]
struct Tokens {
    prompt_tokens: u32,
    completion_tokens: u32,
    /// Counted in `prompt_tokens` too.
    cached_tokens: u32,
}

/// Of one token, as of the admission.
#[derive(JsonSchema, Serialize)]
struct PriceNano {
    input_nano_usd: i64,
    output_nano_usd: i64,
    /// Of a prompt token that was found in the prefix cache.
    cached_input_nano_usd: i64,
}

#[derive(JsonSchema, Serialize)]
struct Place<'a> {
    number: u64,
    link: &'a str,
}

pub async fn get(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let principal = reader(&http, &state).await?;
    let found = find(&state, &principal.tenant, &id).await?;
    let generation = found.ok_or_else(|| ApiError::not_found("generation", &id))?;
    Ok(HttpResponse::Ok().json(Cost::of(&generation)))
}

/// What it cost, signed.
pub async fn receipt(
    http: HttpRequest,
    id: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let principal = reader(&http, &state).await?;
    let found = find(&state, &principal.tenant, &id).await?;
    let statement = found.and_then(|generation| stated(&principal.tenant, generation));
    let statement = statement.ok_or_else(|| ApiError::not_found("charged generation", &id))?;
    let receipt = state.receipts.sign(statement).map_err(|error| {
        tracing::error!(%error, id = %id, "a receipt cannot be signed");
        ApiError::internal()
    })?;
    Ok(HttpResponse::Ok().json(receipt))
}

#[derive(JsonSchema, Serialize)]
pub struct PublicKey {
    #[schemars(extend("const" = "ed25519"))]
    algorithm: &'static str,
    key_id: String,
    public_key: String,
}

/// With which receipts are checked.
pub async fn receipt_key(http: HttpRequest, state: web::Data<EdgeState>) -> Result<HttpResponse, ApiError> {
    authenticate(&http, &state).await?;
    let key = state.receipts.public_key();
    Ok(HttpResponse::Ok().json(PublicKey { algorithm: "ed25519", key_id: key.id(), public_key: key.to_string() }))
}

/// Nothing of one that was not charged.
fn stated(tenant: &TenantId, generation: Generation) -> Option<ReceiptStatement> {
    let Generation { request, terms, state, .. } = generation;
    let GenerationState::Charged { entry, .. } = state else { return None };
    Some(ReceiptStatement {
        version: RECEIPT_VERSION,
        request,
        tenant: tenant.clone(),
        key: terms.key,
        model: terms.model,
        usage: entry.usage,
        price: terms.price,
        price_version: terms.price_version,
        amount: entry.amount,
        reason: entry.note,
        token_digest: Some(entry.digest).filter(|digest| !digest.is_empty()),
        settled_unix_ms: entry.unix_ms,
        ledger_seq: entry.seq,
        ledger_link: entry.link,
    })
}

/// By the id of its answer, or by the name that its client gave it, for as long as that is remembered.
async fn find(state: &EdgeState, tenant: &TenantId, id: &str) -> Result<Option<Generation>, ApiError> {
    let bare = ["chatcmpl-", "cmpl-", "resp_"].iter().find_map(|prefix| id.strip_prefix(prefix)).unwrap_or(id);
    let request = RequestId::from(format!("chatcmpl-{bare}"));
    let found = match state.ledger.generation(tenant, &request).await {
        Ok(Some(found)) => return Ok(Some(found)),
        found => found,
    };
    // What a client calls its request may look like one of ours.
    for name in [id, bare] {
        if let Some(request) = state.records.named(tenant, name).await.map_err(store_failed)? {
            return state.ledger.generation(tenant, &request).await.map_err(|error| failed(error, id));
        }
    }
    found.map_err(|error| failed(error, id))
}

fn failed(error: LedgerError, id: &str) -> ApiError {
    match error {
        LedgerError::Archived(_) => {
            ApiError::archived("id", format!("What was asked at the time of '{}'", shorten(id)))
        }
        error => ledger_failed(error),
    }
}

impl<'a> Cost<'a> {
    fn of(generation: &'a Generation) -> Self {
        let Generation { request, created_unix_ms, terms, state } = generation;
        let Price { input, output, cached_input } = terms.price;
        let mut cost = Self {
            id: request.as_str(),
            object: "generation",
            status: "running",
            key: terms.key.as_str(),
            model: terms.model.as_str(),
            created: created_unix_ms.map(|ms| ms / 1000),
            settled: None,
            usage: None,
            price: PriceNano {
                input_nano_usd: input.nano(),
                output_nano_usd: output.nano(),
                cached_input_nano_usd: cached_input.nano(),
            },
            price_version: &terms.price_version,
            reason: None,
            amount_nano_usd: 0,
            amount_usd: NanoUsd::ZERO.to_string(),
            held_nano_usd: 0,
            refunded_nano_usd: 0,
            written_off_nano_usd: 0,
            digest: None,
            entry: None,
        };
        match state {
            GenerationState::Running { held } => cost.held_nano_usd = held.nano(),
            GenerationState::Released { entry } => {
                cost.status = "released";
                cost.ended_by(entry);
            }
            GenerationState::Charged { entry, refunded, written_off } => {
                cost.status = "charged";
                cost.ended_by(entry);
                let Usage { prompt_tokens, completion_tokens, cached_tokens } = entry.usage;
                cost.usage = Some(Tokens { prompt_tokens, completion_tokens, cached_tokens });
                cost.amount_nano_usd = entry.amount.nano();
                cost.amount_usd = entry.amount.to_string();
                cost.refunded_nano_usd = refunded.nano();
                cost.written_off_nano_usd = written_off.nano();
                cost.digest = Some(entry.digest.as_str()).filter(|digest| !digest.is_empty());
            }
        }
        cost
    }

    fn ended_by(&mut self, entry: &'a Entry) {
        self.settled = Some(entry.unix_ms / 1000);
        self.reason = Some(&entry.note);
        self.entry = Some(Place { number: entry.seq, link: &entry.link });
    }
}
