//! What operators do over HTTP: tenants, keys, credits, the ledger, prices, tiers, and the record of changes.
//!
//! Promises that nothing here answers a key without the scope `admin`, that a change which has begun is seen through
//! when its client hangs up, that no list is read whole, and that no answer is kept by whoever passes it on. Amounts are
//! whole nano-dollars. What is done, and what of it is refused, the room `operator` decides.

mod bodies;
mod credits;
mod faults;
mod keys;
mod nodes;
mod operations;
mod prices;
pub(super) mod schemas;
mod tenants;
mod webhooks;

use std::{pin::Pin, sync::Arc};

use actix_web::{
    FromRequest, HttpRequest, HttpResponse,
    dev::Payload,
    http::header::{CACHE_CONTROL, HeaderValue},
    web,
};
use serde::Serialize;

pub(super) use operations::OPERATIONS;

use super::{auth::authenticate, body, error::ApiError, state::EdgeState, wire::Body};
use crate::{
    admission::{Principal, Scope},
    operator::{Accounts, OperatorError, Page},
};

/// Nothing that an operator says is longer.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Things on one page of a list.
const PAGE: usize = 20;
const PAGE_MAX: usize = 100;

/// An operator's request.
struct Desk {
    http: HttpRequest,
    state: Arc<EdgeState>,
    principal: Principal,
    /// Acting as the operator's key.
    accounts: Accounts,
}

/// Handlers that ask for a desk are not run for anybody else.
impl FromRequest for Desk {
    type Error = ApiError;
    type Future = Pin<Box<dyn Future<Output = Result<Self, ApiError>>>>;

    fn from_request(http: &HttpRequest, _: &mut Payload) -> Self::Future {
        Box::pin(Self::open(http.clone()))
    }
}

impl Desk {
    async fn open(http: HttpRequest) -> Result<Self, ApiError> {
        let state = http.app_data::<web::Data<EdgeState>>().ok_or_else(ApiError::internal)?.clone().into_inner();
        let principal = authenticate(&http, &state).await?;
        if !principal.may(Scope::Admin) {
            return Err(ApiError::permission_denied("This API key may not act for the operator."));
        }
        let accounts = state.accounts.acting_as(format!("key {}", principal.key));
        Ok(Self { http, state, principal, accounts })
    }

    async fn body(&self, mut payload: web::Payload) -> Result<Body, ApiError> {
        let settings = &self.state.settings;
        let bytes_max = settings.body_bytes_max.min(BODY_BYTES_MAX);
        Body::read(&body::read(&self.http, &mut payload, bytes_max, settings.body_ms_max).await?)
    }

    /// Sees a change through, also when whoever asked for it hangs up in the middle.
    async fn change<T: Send + 'static>(
        &self,
        change: impl Future<Output = Result<T, OperatorError>> + Send + 'static,
    ) -> Result<T, ApiError> {
        match self.state.tasks.spawn_on(change, &self.state.runtime).await {
            Ok(done) => done.map_err(faults::of_change),
            Err(error) => {
                tracing::error!(%error, "an operator's change broke off");
                Err(ApiError::internal())
            }
        }
    }
}

fn answer<T: Serialize>(thing: &T) -> HttpResponse {
    HttpResponse::Ok().insert_header((CACHE_CONTROL, HeaderValue::from_static("no-store"))).json(thing)
}

/// A thing with what sort of thing it is.
#[derive(Serialize)]
struct Sorted<T> {
    object: &'static str,
    #[serde(flatten)]
    thing: T,
}

impl<T> Sorted<T> {
    fn tenant(thing: T) -> Self {
        Self { object: "tenant", thing }
    }

    fn key(thing: T) -> Self {
        Self { object: "key", thing }
    }
}

/// A list that is not in pages, for what there are few of.
#[derive(Serialize)]
struct Few<T> {
    object: &'static str,
    data: Vec<Sorted<T>>,
}

impl<T> Few<T> {
    fn of(things: impl IntoIterator<Item = T>, object: &'static str) -> Self {
        Self { object: "list", data: things.into_iter().map(|thing| Sorted { object, thing }).collect() }
    }
}

#[derive(Serialize)]
struct List<T> {
    object: &'static str,
    data: Vec<Sorted<T>>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

impl<T> List<T> {
    fn of(page: Page<T>, object: &'static str, id: impl Fn(&T) -> String) -> Self {
        let (first_id, last_id) = (page.items.first().map(&id), page.items.last().map(&id));
        let data = page.items.into_iter().map(|thing| Sorted { object, thing }).collect();
        Self { object: "list", data, first_id, last_id, has_more: page.has_more }
    }
}

/// Which part of a list is wanted.
struct Wanted {
    limit: usize,
    after: Option<String>,
    before: Option<String>,
    newest_first: bool,
}

impl Wanted {
    fn read(http: &HttpRequest) -> Result<Self, ApiError> {
        let unreadable = |_| ApiError::malformed_query();
        let pairs = web::Query::<Vec<(String, String)>>::from_query(http.query_string()).map_err(unreadable)?;
        let mut wanted = Self { limit: PAGE, after: None, before: None, newest_first: false };
        for (name, value) in pairs.into_inner() {
            match name.as_str() {
                "after" => wanted.after = Some(value),
                "before" => wanted.before = Some(value),
                "order" if ["asc", "desc"].contains(&&*value) => wanted.newest_first = value == "desc",
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
                _ => {}
            }
        }
        Ok(wanted)
    }

    /// `after`, where a list is numbered.
    fn after_number(&self) -> Result<Option<u64>, ApiError> {
        let number = |text: &String| {
            text.parse().map_err(|_| {
                let why = "Invalid 'after': expected the number of an entry.";
                ApiError::field("invalid_value", "after", why)
            })
        };
        self.after.as_ref().map(number).transpose()
    }
}
