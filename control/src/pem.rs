//! Certificates and keys in files.

use std::path::{Path, PathBuf};

use tokio_rustls::rustls::{
    self, RootCertStore,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
};

/// Why a file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum PemError {
    /// It is not what it should be.
    #[error("{path} holds no {what}; see {setting}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Which setting names it.
        setting: &'static str,
        /// Why.
        source: pem::Error,
    },
    /// Nobody can be trusted by it.
    #[error("{path} holds a certificate that can sign no others; see {setting}")]
    Root {
        /// Which.
        path: PathBuf,
        /// Which setting names it.
        setting: &'static str,
        /// Why.
        source: rustls::Error,
    },
}

/// A file that a setting names.
#[derive(Clone, Copy, Debug)]
pub struct PemFile<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// The setting, for people.
    pub setting: &'static str,
}

impl PemFile<'_> {
    /// The certificates in it, at least one.
    ///
    /// # Errors
    /// If there is none.
    pub fn certificates(self) -> Result<Vec<CertificateDer<'static>>, PemError> {
        let read = CertificateDer::pem_file_iter(self.path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>);
        match read.map_err(self.without("certificate"))? {
            none if none.is_empty() => Err(self.without("certificate")(pem::Error::NoItemsFound)),
            some => Ok(some),
        }
    }

    /// The private key in it.
    ///
    /// # Errors
    /// If there is none.
    pub fn key(self) -> Result<PrivateKeyDer<'static>, PemError> {
        PrivateKeyDer::from_pem_file(self.path).map_err(self.without("private key"))
    }

    /// Its certificates, as those who sign others'.
    ///
    /// # Errors
    /// If there is none, or one that can't.
    pub fn roots(self) -> Result<RootCertStore, PemError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates()? {
            let Self { path, setting } = self;
            let failed = |source| PemError::Root { path: path.to_owned(), setting, source };
            roots.add(certificate).map_err(failed)?;
        }
        Ok(roots)
    }

    fn without(self, what: &'static str) -> impl Fn(pem::Error) -> PemError {
        let (path, setting) = (self.path.to_owned(), self.setting);
        move |source| PemError::Read { path: path.clone(), what, setting, source }
    }
}
