//! What a request says, understood or refused with a problem.

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{StatusCode, header, request::Parts},
};
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;

use super::{Condition, MAX_BODY, Problem};
use crate::config::Remark;

/// The name in the path.
pub struct Name(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        // It can only be no text, and so are no names.
        let Path(name) = path.map_err(|error| {
            let detail = format!("there is no such service: {}", error.body_text());
            Problem::new(StatusCode::NOT_FOUND, detail)
        })?;
        Ok(Self(name))
    }
}

/// What stands behind the question mark.
pub struct Asked<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        let Query(asked) = query.map_err(|error| {
            let detail = format!("{}: see /openapi.json", error.body_text());
            Problem::new(StatusCode::BAD_REQUEST, detail)
        })?;
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
            for word in field.to_str().unwrap_or("?").split(',').map(str::trim) {
                if word == "*" {
                    return Ok(Self::Any);
                }
                let strong = word.strip_prefix("W/").unwrap_or(word);
                let version = strong.strip_prefix('"').and_then(|word| word.strip_suffix('"'));
                let Some(version) = version else {
                    let detail = format!(
                        "`If-Match` is {word}: an ETag with its quotes, as it was given, or *"
                    );
                    return Err(Problem::new(StatusCode::BAD_REQUEST, detail));
                };
                versions.extend((strong == word).then(|| version.to_owned()));
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
        let body = Bytes::from_request(request, state).await.map_err(|error| {
            let detail = match error.status() {
                StatusCode::PAYLOAD_TOO_LARGE => {
                    format!("the body is too large: {MAX_BODY} bytes at most")
                }
                _ => error.body_text(),
            };
            Problem::new(error.status(), detail)
        })?;
        let mut json = serde_json::Deserializer::from_slice(&body);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let pointer = pointer(error.path());
            wrong(pointer, error.into_inner())
        })?;
        json.end().map_err(|error| wrong(String::new(), error))?;
        Ok(Self(value))
    }
}

/// A JSON pointer, RFC 6901.
fn pointer(path: &serde_path_to_error::Path) -> String {
    let steps = path.iter().filter_map(|step| match step {
        Segment::Seq { index } => Some(format!("/{index}")),
        Segment::Map { key } => Some(format!("/{}", key.replace('~', "~0").replace('/', "~1"))),
        Segment::Enum { .. } | Segment::Unknown => None,
    });
    steps.collect()
}

/// What is no JSON, or no value of ours.
fn wrong(pointer: String, error: serde_json::Error) -> Problem {
    if !error.is_data() {
        return Problem::new(StatusCode::BAD_REQUEST, format!("the body is no JSON: {error}"));
    }
    let said = error.to_string();
    let said = said.rsplit_once(" at line ").map_or(&*said, |(said, _)| said);
    // What was sent may have any words in it: serde's own come last.
    let (detail, remedy) = match said.rsplit_once(", expected ") {
        Some((detail, remedy)) => (detail, format!("expected {remedy}")),
        None => (said, "see /openapi.json".to_owned()),
    };
    let remark = Remark { pointer, detail: detail.to_owned(), remedy };
    let detail = format!("{}: {detail}, {}", remark.pointer, remark.remedy);
    Problem::about(StatusCode::UNPROCESSABLE_ENTITY, detail, vec![remark])
}
