//! What a request says, understood or refused with a problem.

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{StatusCode, header, request::Parts},
};
use serde::de::DeserializeOwned;

use super::{Condition, Problem};
use crate::config::Remark;

/// The name in the path.
pub struct Name(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Path(name) =
            path.map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.body_text()))?;
        Ok(Self(name))
    }
}

/// What stands behind the question mark.
pub struct Asked<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        let Query(asked) =
            query.map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.body_text()))?;
        Ok(Self(asked))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Condition {
    type Rejection = Problem;

    /// Of `If-Match` only: weak versions match nothing, RFC 9110 section 13.1.1.
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let mut versions = Vec::new();
        let mut fields = parts.headers.get_all(header::IF_MATCH).iter().peekable();
        if fields.peek().is_none() {
            return Ok(Self::Missing);
        }
        for field in fields {
            // None of our versions has a comma or a quote in it.
            for word in field.to_str().unwrap_or_default().split(',').map(str::trim) {
                if word == "*" {
                    return Ok(Self::Any);
                }
                let version = word.strip_prefix('"').and_then(|word| word.strip_suffix('"'));
                versions.extend(version.map(str::to_owned));
            }
        }
        Ok(Self::Versions(versions))
    }
}

/// A body in JSON.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        // Not only for order's sake: a web page can't send this type to another origin unasked.
        let said = request.headers().get(header::CONTENT_TYPE).and_then(|said| said.to_str().ok());
        let said = said.unwrap_or_default().split(';').next().unwrap_or_default().trim();
        if !said.eq_ignore_ascii_case("application/json") {
            let detail = "the body has to be JSON, and `Content-Type: application/json` to say so";
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail));
        }
        let body = Bytes::from_request(request, state)
            .await
            .map_err(|error| Problem::new(error.status(), error.body_text()))?;
        let mut json = serde_json::Deserializer::from_slice(&body);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let place = error.path().to_string();
            wrong(&place, error.into_inner())
        })?;
        json.end().map_err(|error| wrong(".", error))?;
        Ok(Self(value))
    }
}

/// What is no JSON, or no value of ours. `place` is dotted, as in `backends[0].vni`.
fn wrong(place: &str, error: serde_json::Error) -> Problem {
    if !error.is_data() {
        return Problem::new(StatusCode::BAD_REQUEST, format!("the body is no JSON: {error}"));
    }
    let steps = place.split(['.', '[']).map(|step| step.trim_end_matches(']'));
    let pointer = steps.filter(|step| !step.is_empty()).map(|step| format!("/{step}")).collect();
    let said = error.to_string();
    let said = said.rsplit_once(" at line ").map_or(&*said, |(said, _)| said);
    let (detail, remedy) = said.split_once(", ").unwrap_or((said, "see /openapi.json"));
    let remark = Remark { pointer, detail: detail.to_owned(), remedy: remedy.to_owned() };
    let detail = format!("{}: {detail}, {remedy}", remark.pointer);
    Problem::about(StatusCode::UNPROCESSABLE_ENTITY, detail, vec![remark])
}
