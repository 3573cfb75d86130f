//! The command line's end of the API.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, runtime::Runtime, time};

use super::Problem;

/// How long a daemon may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may take to change something: longer than it allows itself.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(35);

/// Why there is no answer.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum ClientError {
    /// Nobody there.
    #[error("no daemon answers on {socket}")]
    #[diagnostic(help(
        "is it running, may you use its socket, and is this its api.socket? name another with -s"
    ))]
    NoDaemon {
        /// Where it was looked for.
        socket: String,
        /// Why.
        source: io::Error,
    },
    /// Too late.
    #[error("the daemon on {socket} does not answer within {timeout:?}")]
    #[diagnostic(help("is it stopped, or the machine overloaded?"))]
    Silent {
        /// Where.
        socket: String,
        /// How long was waited.
        timeout: Duration,
    },
    /// In the middle of it.
    #[error("the daemon on {socket} stopped answering")]
    Broken {
        /// Where.
        socket: String,
        /// Why.
        source: hyper::Error,
    },
    /// No.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Refused(Problem),
    /// Not in our words.
    #[error("the daemon's answer is not understood: is it of another version?")]
    NotUnderstood(#[source] serde_json::Error),
    /// No memory or descriptors.
    #[error("cannot ask the daemon")]
    Runtime(#[source] io::Error),
}

/// Asks one daemon.
pub struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

/// What is asked for. The path is encoded already.
#[derive(Debug)]
struct Asked<'a> {
    method: Method,
    path: &'a str,
    body: Vec<u8>,
    if_match: Option<&'a str>,
    timeout: Duration,
}

impl Client {
    /// For the daemon on this socket.
    ///
    /// # Errors
    /// If the process has no resources left.
    pub fn new(socket: &Path) -> Result<Self, ClientError> {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().map_err(ClientError::Runtime)?;
        Ok(Self { socket: socket.to_owned(), runtime })
    }

    /// Reads something.
    ///
    /// # Errors
    /// If there is no daemon, or it says no.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let (method, timeout) = (Method::GET, ANSWER_TIMEOUT);
        self.ask(Asked { method, path, body: Vec::new(), if_match: None, timeout })
    }

    /// Changes something, if it is still of this version.
    ///
    /// # Errors
    /// If there is no daemon, or it says no.
    pub fn change<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        version: Option<&str>,
    ) -> Result<T, ClientError> {
        let body = body.map_or_else(Vec::new, |b| serde_json::to_vec(b).expect("plain data"));
        let if_match = version.map(quoted);
        let (if_match, timeout) = (if_match.as_deref(), CHANGE_TIMEOUT);
        self.ask(Asked { method, path, body, if_match, timeout })
    }

    fn ask<T: DeserializeOwned>(&self, asked: Asked<'_>) -> Result<T, ClientError> {
        let (timeout, socket) = (asked.timeout, || self.socket.display().to_string());
        let (status, body) = self.runtime.block_on(async {
            let answer = async {
                let response = self.send(asked).await?;
                let status = response.status();
                let body = response.into_body().collect().await;
                let broken = |source| ClientError::Broken { socket: socket(), source };
                Ok((status, body.map_err(broken)?.to_bytes()))
            };
            let silent = |_| ClientError::Silent { socket: socket(), timeout };
            time::timeout(timeout, answer).await.map_err(silent)?
        })?;
        understand(status, &body)
    }

    /// Calls `each` with every event of a watch stream, until it says no more, or the daemon ends.
    ///
    /// # Errors
    /// If there is no daemon, or it says no, or ends.
    pub fn watch<T: DeserializeOwned>(
        &self,
        path: &str,
        mut each: impl FnMut(T) -> bool,
    ) -> Result<(), ClientError> {
        let broken =
            |source| ClientError::Broken { socket: self.socket.display().to_string(), source };
        let (timeout, socket) = (ANSWER_TIMEOUT, self.socket.display().to_string());
        let asked = Asked { method: Method::GET, path, body: Vec::new(), if_match: None, timeout };
        self.runtime.block_on(async {
            let response = time::timeout(timeout, self.send(asked)).await;
            let response = response.map_err(|_| ClientError::Silent { socket, timeout })??;
            let status = response.status();
            let mut body = response.into_body();
            if status != StatusCode::OK {
                let body = body.collect().await.map_err(broken)?.to_bytes();
                return understand::<()>(status, &body);
            }
            let mut text = Vec::new();
            while let Some(frame) = body.frame().await {
                text.extend(frame.map_err(broken)?.into_data().unwrap_or_default());
                while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = text.drain(..=end).collect();
                    let Some(data) = line.strip_prefix(b"data: ") else { continue };
                    let event = serde_json::from_slice(data);
                    if !each(event.map_err(ClientError::NotUnderstood)?) {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    async fn send(&self, asked: Asked<'_>) -> Result<hyper::Response<Incoming>, ClientError> {
        let socket = || self.socket.display().to_string();
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::NoDaemon { socket: socket(), source })?;
        let broken = |source| ClientError::Broken { socket: socket(), source };
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // It moves the bytes; what goes wrong with it, the sender hears too.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(asked.method)
            .uri(asked.path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(version) = asked.if_match {
            request = request.header(header::IF_MATCH, version);
        }
        let request = request.body(Full::new(Bytes::from(asked.body))).expect("it is well formed");
        sender.send_request(request).await.map_err(broken)
    }
}

fn understand<T: DeserializeOwned>(status: StatusCode, body: &[u8]) -> Result<T, ClientError> {
    if status.is_success() {
        // An empty answer is JSON's nothing.
        let body = if body.is_empty() { b"null" } else { body };
        return serde_json::from_slice(body).map_err(ClientError::NotUnderstood);
    }
    let problem = serde_json::from_slice(body).unwrap_or_else(|_| {
        Problem::new(status, format!("the daemon answers {status} without a reason"))
    });
    Err(ClientError::Refused(problem))
}

/// A name as a part of a path, or of what stands behind the question mark.
pub fn segment(name: &str) -> String {
    utf8_percent_encode(name, NON_ALPHANUMERIC).to_string()
}

/// As `If-Match` has it: an ETag, or `*` for any.
fn quoted(version: &str) -> String {
    if version == "*" { version.to_owned() } else { format!("\"{version}\"") }
}
