//! The API over TCP: plain on a loopback address, elsewhere by TLS with client certificates only.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    time,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::ring,
        server::{VerifierBuilderError, WebPkiClientVerifier},
        version,
    },
    server::TlsStream,
};

use crate::{
    config::{self, Tls},
    pem::PemError,
};

/// How long a client may take to show who it is.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no listening over TCP.
#[derive(Debug, thiserror::Error)]
pub enum TcpError {
    /// The address.
    #[error("cannot listen on {address}; see api.listen")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A file that is to hold certificates or a key.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// They don't belong together.
    #[error("api.certificate and api.key can't be used")]
    Tls(#[from] rustls::Error),
    /// Nobody could be let in.
    #[error("api.client_ca can't be used")]
    Clients(#[from] VerifierBuilderError),
}

/// A listening address.
pub struct TcpDoor {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
}

impl TcpDoor {
    /// Listens on all addresses that are configured.
    ///
    /// # Errors
    /// If one can't be had, or what TLS needs is not there.
    pub async fn open_all(config: &config::Api) -> Result<Vec<Self>, TcpError> {
        let tls = config.tls.as_ref().map(acceptor).transpose()?;
        let mut doors = Vec::with_capacity(config.listen.len());
        for address in &config.listen {
            let listener = TcpListener::bind(address).await;
            let failed = |source| TcpError::Listen { address: *address, source };
            doors.push(Self { listener: listener.map_err(failed)?, tls: tls.clone() });
        }
        Ok(doors)
    }

    /// The next client, who may have to show who it is yet.
    pub async fn accept(&self) -> Guest {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => return Guest { stream, tls: self.tls.clone() },
                // Out of descriptors, most likely: better asked again later than at once.
                Err(_) => time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Where it listens.
    #[cfg(test)]
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }
}

/// Who has connected.
pub struct Guest {
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
}

/// Who may come in.
pub enum Admitted {
    /// From this machine.
    Plain(TcpStream),
    /// By a certificate that we accept.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Guest {
    /// Finds out. `None`: it may not.
    pub async fn admit(self) -> Option<Admitted> {
        let Some(tls) = self.tls else { return Some(Admitted::Plain(self.stream)) };
        let handshake = time::timeout(HANDSHAKE_TIMEOUT, tls.accept(self.stream)).await;
        handshake.ok()?.ok().map(|stream| Admitted::Tls(Box::new(stream)))
    }
}

fn acceptor(tls: &Tls) -> Result<TlsAcceptor, TcpError> {
    let provider = Arc::new(ring::default_provider());
    let roots = Arc::new(tls.client_ca().roots()?);
    let clients = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build()?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13, &version::TLS12])?
        .with_client_cert_verifier(clients)
        .with_single_cert(tls.certificate().certificates()?, tls.key().key()?)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use tempfile::TempDir;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        runtime,
    };
    use tokio_rustls::{
        TlsConnector,
        rustls::{
            ClientConfig, RootCertStore,
            pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        },
    };

    use super::*;

    /// A certificate and its key, in PEM.
    struct Signed {
        certificate: String,
        key: String,
    }

    fn authority() -> Issuer<'static, KeyPair> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Issuer::new(params, KeyPair::generate().unwrap())
    }

    fn own_certificate(authority: &Issuer<'_, KeyPair>) -> String {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(authority.key()).unwrap().pem()
    }

    fn signed(authority: &Issuer<'_, KeyPair>) -> Signed {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, authority).unwrap();
        Signed { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    fn tls(folder: &TempDir, server: &Signed, client_ca: &str) -> Tls {
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        Tls {
            certificate: write("certificate", &server.certificate),
            key: write("key", &server.key),
            client_ca: write("client_ca", client_ca),
        }
    }

    fn config(tls: Option<Tls>) -> config::Api {
        let listen = vec!["127.0.0.1:0".parse().unwrap()];
        config::Api { listen, tls, ..config::Api::default() }
    }

    fn run<T>(test: impl Future<Output = T>) -> T {
        runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
    }

    /// Whether a client that trusts `roots` gets a byte through and back.
    async fn gets_in(address: SocketAddr, roots: &str, own: Option<&Signed>) -> bool {
        let mut store = RootCertStore::empty();
        store.add(CertificateDer::from_pem_slice(roots.as_bytes()).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(store);
        let config = match own {
            Some(own) => {
                let chain = CertificateDer::from_pem_slice(own.certificate.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![chain], key).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        let stream = TcpStream::connect(address).await.unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let Ok(mut stream) = connector.connect("localhost".try_into().unwrap(), stream).await
        else {
            return false;
        };
        let mut echo = [0];
        stream.write_all(b"x").await.is_ok() && stream.read_exact(&mut echo).await.is_ok()
    }

    #[test]
    fn only_who_has_a_certificate_of_ours_gets_in() {
        let (ours, others) = (authority(), authority());
        let (root, stranger_root) = (own_certificate(&ours), own_certificate(&others));
        let folder = tempfile::tempdir().unwrap();
        let tls = tls(&folder, &signed(&ours), &root);
        run(async {
            let door = TcpDoor::open_all(&config(Some(tls))).await.unwrap().remove(0);
            let address = door.address();
            tokio::spawn(async move {
                loop {
                    if let Some(Admitted::Tls(mut stream)) = door.accept().await.admit().await {
                        let mut byte = [0];
                        let _ = stream.read_exact(&mut byte).await;
                        let _ = stream.write_all(&byte).await;
                        let _ = stream.shutdown().await;
                    }
                }
            });
            assert!(gets_in(address, &root, Some(&signed(&ours))).await);
            assert!(!gets_in(address, &root, Some(&signed(&others))).await);
            assert!(!gets_in(address, &root, None).await);
            assert!(!gets_in(address, &stranger_root, Some(&signed(&ours))).await);
            let mut plain = TcpStream::connect(address).await.unwrap();
            plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
            let mut answer = Vec::new();
            let _ = plain.read_to_end(&mut answer).await;
            assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
        });
    }

    #[test]
    fn files_that_hold_something_else_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let ours = authority();
        let good = tls(&folder, &signed(&ours), &own_certificate(&ours));
        for (key, spoil) in [
            ("api.certificate", &good.certificate),
            ("api.key", &good.key),
            ("api.client_ca", &good.client_ca),
        ] {
            let text = fs::read_to_string(spoil).unwrap();
            fs::write(spoil, "nothing").unwrap();
            let error = run(TcpDoor::open_all(&config(Some(good.clone())))).err().unwrap();
            assert!(error.to_string().contains(key), "{error}");
            fs::write(spoil, text).unwrap();
        }
    }
}
