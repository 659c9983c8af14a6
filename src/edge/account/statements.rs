//! `GET /statements/{month}`: a tenant's month as JSON, as a table, or as a page to print.

use actix_web::{HttpRequest, HttpResponse, http::header, web};

use super::{query::Query, reader};
use crate::{
    domain::Month,
    edge::{error::ApiError, state::EdgeState, stored::store_failed},
    ledger::StatementError,
};

pub const FORMATS: &[&str] = &["json", "csv", "html"];
/// Made at a time by one edge; each reads all of a month's entries.
pub const AT_ONCE: usize = 4;

pub async fn get(
    http: HttpRequest,
    month: web::Path<String>,
    state: web::Data<EdgeState>,
) -> Result<HttpResponse, ApiError> {
    let principal = reader(&http, &state).await?;
    let month: Month = month.parse().map_err(|_| {
        let why = "Invalid 'month': expected a month of UTC such as 2026-11.";
        ApiError::field("invalid_value", "month", why)
    })?;
    let format = Query::read(&http, &["format"])?.word("format", FORMATS)?.unwrap_or("json");
    let _place = state.statements.try_acquire().map_err(|_| ApiError::too_many_statements())?;
    let statement = state.ledger.statement(&principal.tenant, month).await.map_err(failed)?;
    let mut answer = HttpResponse::Ok();
    let named = |ending: &str| format!("attachment; filename=\"statement-{month}.{ending}\"");
    Ok(match format {
        "csv" => answer
            .content_type("text/csv; charset=utf-8")
            .insert_header((header::CONTENT_DISPOSITION, named("csv")))
            .body(statement.to_csv()),
        "html" => answer
            .content_type("text/html; charset=utf-8")
            .insert_header((header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'"))
            .body(statement.to_page()),
        _ => answer.json(statement),
    })
}

fn failed(error: StatementError) -> ApiError {
    match error {
        StatementError::NoSuchMonth { month, first, last } => {
            ApiError::no_statement(format!("There is no statement of {month}: there are those from {first} to {last}."))
        }
        StatementError::Archived(month) => ApiError::archived("month", format!("The month {month}")),
        StatementError::Store(error) => store_failed(error),
        error => {
            tracing::error!(%error, "a statement could not be made");
            ApiError::internal()
        }
    }
}
