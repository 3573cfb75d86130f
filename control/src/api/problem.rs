//! What is said when a request can't be done: problem details, RFC 9457.

use std::fmt;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use miette::Diagnostic;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::Remark;

/// Why a request was not done, as problem details (RFC 9457). There is no `type`: the status says what kind
/// of problem it is (`about:blank`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{detail}")]
pub struct Problem {
    /// The status in words.
    #[schema(example = "Unprocessable Entity")]
    pub title: String,
    /// The HTTP status.
    #[schema(example = 422)]
    pub status: u16,
    /// What is wrong here, in a sentence.
    pub detail: String,
    /// The values that are wrong, if it is about values of the body.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<Remark>,
}

impl Problem {
    /// One that is about no value.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            title: status.canonical_reason().unwrap_or_default().to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            errors: Vec::new(),
        }
    }

    /// One that is about values of the body.
    pub fn about(status: StatusCode, detail: impl Into<String>, errors: Vec<Remark>) -> Self {
        Self { errors, ..Self::new(status, detail) }
    }

    /// There is no such service.
    pub fn no_service(name: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no service `{name}`"))
    }
}

impl Diagnostic for Problem {
    /// What would be right, for each value that is wrong.
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        let each = self.errors.iter().map(|Remark { pointer, remedy, .. }| match &**pointer {
            "" => remedy.clone(),
            pointer => format!("{pointer}: {remedy}"),
        });
        let help = each.collect::<Vec<_>>().join("; ");
        (!help.is_empty()).then(|| Box::new(help) as Box<dyn fmt::Display>)
    }
}

/// The media type of problem details.
pub const MEDIA_TYPE: &str = "application/problem+json";

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self)).into_response();
        let media_type = HeaderValue::from_static(MEDIA_TYPE);
        response.headers_mut().insert(header::CONTENT_TYPE, media_type);
        response
    }
}
