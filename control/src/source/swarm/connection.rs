//! One HTTP connection, kept open: to a Docker engine, or to the Wiremesh of a manager. It knows neither's
//! words.

use std::{fmt, io, path::PathBuf, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig,
        crypto::ring,
        pki_types::{InvalidDnsNameError, ServerName},
        version,
    },
};

use crate::pem::{PemError, PemFile};

/// How long a connection may take to be made, its TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest answer, in bytes: the tasks of a swarm of some ten thousand.
const MAX_ANSWER: usize = 64 << 20;

/// Whom to ask.
#[derive(Clone)]
pub enum Peer {
    /// On this machine.
    Unix(PathBuf),
    /// A host and a port, as in `10.0.0.1:2376`. Without TLS only on this machine.
    Tcp(String, Option<Arc<ClientConfig>>),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address, _) => f.write_str(address),
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody there, or not who should be.
    #[error("can't connect")]
    Connect(#[source] io::Error),
    /// Not a name or an address.
    #[error("that is no host")]
    Host(#[from] InvalidDnsNameError),
    /// Too late.
    #[error("no answer within {0:?}")]
    Silent(Duration),
    /// In the middle of it.
    #[error("the connection broke")]
    Broken(#[source] hyper::Error),
    /// Longer than can be meant, or cut off.
    #[error("the answer did not arrive")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No.
    #[error("{said} (status {status})")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The reason that was given.
        said: String,
    },
    /// Not in words we know.
    #[error("the answer is not understood")]
    NotUnderstood(#[from] serde_json::Error),
}

/// Why TLS can't be had.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// They don't belong together.
    #[error("the certificate and the key can't be used")]
    Tls(#[from] tokio_rustls::rustls::Error),
}

/// TLS with a certificate of our own, to servers with one signed by `ca`.
///
/// # Errors
/// If a file does not hold what it should.
pub fn tls(
    ca: PemFile<'_>,
    certificate: PemFile<'_>,
    key: PemFile<'_>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&version::TLS13, &version::TLS12])?
        .with_root_certificates(ca.roots()?)
        .with_client_auth_cert(certificate.certificates()?, key.key()?)?;
    Ok(Arc::new(config))
}

/// A connection, made when it is first needed and again when it is gone.
pub struct Connection {
    peer: Peer,
    sender: Option<SendRequest<Empty<Bytes>>>,
}

impl Connection {
    /// Of nothing yet.
    pub fn new(peer: Peer) -> Self {
        Self { peer, sender: None }
    }

    /// With whom.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The body of a successful answer.
    ///
    /// # Errors
    /// If there is none within `timeout`.
    pub async fn get(&mut self, path: &str, timeout: Duration) -> Result<Bytes, AskError> {
        let answer = async {
            let response = self.open(path).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(AskError::Body)?.to_bytes();
            if status.is_success() { Ok(body) } else { Err(refusal(status, &body)) }
        };
        let answer = time::timeout(timeout, answer).await;
        let answer = answer.unwrap_or(Err(AskError::Silent(timeout)));
        // After anything but a whole answer nobody knows what it would say next.
        if !matches!(answer, Ok(_) | Err(AskError::Refused { .. })) {
            self.sender = None;
        }
        answer
    }

    /// An answer whose body is still to come.
    ///
    /// # Errors
    /// If it does not even begin.
    pub async fn open(&mut self, path: &str) -> Result<Response<Incoming>, AskError> {
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => time::timeout(CONNECT_TIMEOUT, connect(&self.peer))
                .await
                .unwrap_or(Err(AskError::Silent(CONNECT_TIMEOUT)))?,
        };
        sender.ready().await.map_err(AskError::Broken)?;
        let host = match &self.peer {
            Peer::Unix(_) => "localhost",
            Peer::Tcp(address, _) => address,
        };
        let request = Request::get(path).header(header::HOST, host).body(Empty::new());
        let request = request.expect("a path and an address are fit for a request");
        let response = sender.send_request(request).await.map_err(AskError::Broken)?;
        self.sender = Some(sender);
        Ok(response)
    }
}

async fn connect(peer: &Peer) -> Result<SendRequest<Empty<Bytes>>, AskError> {
    match peer {
        Peer::Unix(path) => talk(UnixStream::connect(path).await.map_err(AskError::Connect)?).await,
        Peer::Tcp(address, tls) => {
            let stream = TcpStream::connect(address).await.map_err(AskError::Connect)?;
            let Some(tls) = tls else { return talk(stream).await };
            let host = address.rsplit_once(':').map_or(&**address, |(host, _)| host);
            let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
            let stream = TlsConnector::from(tls.clone()).connect(name, stream).await;
            talk(stream.map_err(AskError::Connect)?).await
        }
    }
}

async fn talk(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<SendRequest<Empty<Bytes>>, AskError> {
    let (sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(AskError::Broken)?;
    // It moves the bytes; what goes wrong with it, the sender hears too.
    tokio::spawn(connection);
    Ok(sender)
}

/// The engine gives its reason as `message`, Wiremesh as `detail`.
fn refusal(status: StatusCode, body: &[u8]) -> AskError {
    let body: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let said = body["message"].as_str().or(body["detail"].as_str());
    let said = said.unwrap_or("no reason is given").to_owned();
    AskError::Refused { status: status.as_u16(), said }
}
