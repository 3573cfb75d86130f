//! HTTP/1.1 GET requests, in the clear or over TLS. Redirects are not followed: they are an answer.

use std::{cell::OnceCell, net::SocketAddr, pin::pin, sync::Arc};

use axum::body::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, Response, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        self, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
        pki_types::{CertificateDer, ServerName, UnixTime},
    },
};

use super::{
    super::{Http, Verify},
    Outcome, direct, failure,
};
use crate::config::written_range;

/// TLS' settings, made when they are first needed.
#[derive(Default)]
pub struct Clients {
    trusted: OnceCell<TlsConnector>,
    anything: OnceCell<TlsConnector>,
}

impl Clients {
    /// Asks, and compares the answer with what is expected.
    pub async fn probe(&self, to: SocketAddr, http: &Http) -> Outcome {
        let stream = match TcpStream::connect(to).await {
            Ok(stream) => stream,
            Err(error) => return failure(&format!("no connection to {to}"), &error),
        };
        let Some(verify) = http.tls else { return ask(stream, to, http).await };
        let connector = match verify {
            Verify::Trusted => self.trusted.get_or_init(trusted),
            Verify::Anything => self.anything.get_or_init(anything),
        };
        let name = http.host.as_deref().map(without_port);
        let name = match name.map(|name| ServerName::try_from(name.to_owned())) {
            Some(Ok(name)) => name,
            // What is no name can't be in a certificate either.
            Some(Err(_)) | None => ServerName::from(to.ip()),
        };
        match connector.connect(name, stream).await {
            Ok(stream) => ask(stream, to, http).await,
            Err(error) => failure(&format!("no TLS with {to}"), &error),
        }
    }
}

/// A Host header's name or address.
fn without_port(host: &str) -> &str {
    match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    }
}

async fn ask<S: AsyncRead + AsyncWrite + Unpin + 'static>(
    stream: S,
    to: SocketAddr,
    http: &Http,
) -> Outcome {
    let host = http.host.clone().unwrap_or_else(|| to.to_string());
    let request = Request::get(&http.path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, concat!("wiremesh/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new());
    let request = match request {
        Ok(request) => request,
        Err(error) => return Outcome::Impossible(format!("there is no such request: {error}")),
    };
    let broken = |error: &hyper::Error| Outcome::Failed(format!("no HTTP from {to}: {error}"));
    let (mut sender, connection) = match http1::handshake(TokioIo::new(stream)).await {
        Ok(both) => both,
        Err(error) => return broken(&error),
    };
    let mut exchange = pin!(async {
        match sender.send_request(request).await {
            Ok(response) => judge(response, http).await.unwrap_or_else(|error| broken(&error)),
            Err(error) => broken(&error),
        }
    });
    // The connection moves the bytes. It may end before all of them have been read here.
    tokio::select! {
        outcome = &mut exchange => outcome,
        _ = connection => exchange.await,
    }
}

async fn judge(response: Response<Incoming>, http: &Http) -> Result<Outcome, hyper::Error> {
    let status = response.status();
    if !http.status.iter().any(|range| range.contains(&status.as_u16())) {
        let expected: Vec<String> = http.status.iter().map(written_range).collect();
        let expected = expected.join(", ");
        return Ok(Outcome::Failed(format!("status {status}, where {expected} is expected")));
    }
    let Some(expected) = &http.body else { return Ok(Outcome::Passed(status.to_string())) };
    let (mut body, mut read) = (response.into_body(), Vec::new());
    while read.len() < Http::BODY_BYTES
        && let Some(frame) = body.frame().await
    {
        if let Ok(data) = frame?.into_data() {
            read.extend_from_slice(&data);
        }
    }
    read.truncate(Http::BODY_BYTES);
    Ok(match direct::contains(&read, expected.as_bytes()) {
        true => Outcome::Passed(format!("{status}, with `{expected}`")),
        false => {
            let len = read.len();
            Outcome::Failed(format!("status {status}, but no `{expected}` in {len} bytes of body"))
        }
    })
}

fn trusted() -> TlsConnector {
    let mut roots = RootCertStore::empty();
    // Where none can be read, no certificate is good, and the check says so.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let config = builder().with_root_certificates(roots).with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

fn anything() -> TlsConnector {
    let verifier = Arc::new(Anything(Arc::new(ring::default_provider())));
    let config =
        builder().dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

fn builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the provider has what the default versions need")
}

/// Takes any certificate, as `tls_verify = false` says.
#[derive(Debug)]
struct Anything(Arc<CryptoProvider>);

impl ServerCertVerifier for Anything {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificates_name_is_the_host_without_its_port() {
        for (host, name) in [
            ("shop.example", "shop.example"),
            ("shop.example:8443", "shop.example"),
            ("192.0.2.1:8443", "192.0.2.1"),
            ("[2001:db8::1]:8443", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1"),
        ] {
            assert_eq!(without_port(host), name);
            ServerName::try_from(name).unwrap();
        }
    }
}
