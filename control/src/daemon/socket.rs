//! The socket that a daemon tells its status on: taking it over from a dead daemon, and from nobody else.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
    time,
};
use tracing::info;

/// A client that has not read the status after so long gets no more of it.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another daemon is there.
    #[error(
        "a daemon already answers on {0}: stop it, or give this one another node.control_socket"
    )]
    AlreadyRunning(PathBuf),
    /// Something that must not be deleted.
    #[error("{0} is there and is no socket: remove it, or set node.control_socket to another path")]
    NotASocket(PathBuf),
    /// Anything else.
    #[error("cannot listen on {path}; see node.control_socket")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A socket with a place in the file system, which it gives up when dropped.
#[derive(Debug)]
pub struct StatusSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode. A successor may have put its own socket in this place by the time we end.
    file: Option<(u64, u64)>,
}

impl StatusSocket {
    /// Listens; takes the place of a socket that nobody answers on.
    ///
    /// # Errors
    /// If there is a daemon, or anything that is no socket, or the place can't be had.
    pub async fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Listen { path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) => match UnixStream::connect(path).await {
                Ok(_) => return Err(SocketError::AlreadyRunning(path.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(failed)?;
                }
                Err(error) => return Err(failed(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(folder) = path.parent() {
                    fs::create_dir_all(folder).map_err(failed)?;
                }
            }
            Err(error) => return Err(failed(error)),
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        Ok(Self { listener, path: path.to_owned(), file: identity(path) })
    }

    /// The next client. One that is gone already is skipped.
    pub async fn accept(&self) -> UnixStream {
        loop {
            match self.listener.accept().await {
                Ok((client, _)) => return client,
                // Out of descriptors, most likely: better asked again later than at once.
                Err(_) => time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}

impl Drop for StatusSocket {
    fn drop(&mut self) {
        if self.file.is_some() && identity(&self.path) == self.file {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// Writes an answer, for as long as the client is worth it, while the caller goes on.
pub fn answer(mut client: UnixStream, answer: Vec<u8>) {
    tokio::spawn(async move {
        let written = time::timeout(WRITE_TIMEOUT, client.write_all(&answer)).await;
        if !matches!(written, Ok(Ok(()))) {
            info!("somebody asked for the status and did not wait for it");
        }
    });
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    fn run<T>(test: impl Future<Output = T>) -> T {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().build().unwrap().block_on(test)
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "data").unwrap();
        let error = run(StatusSocket::bind(&path)).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_dead_daemons_socket_is_taken_over_and_a_living_ones_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        run(async {
            let _living = StatusSocket::bind(&path).await.unwrap();
            let error = StatusSocket::bind(&path).await.unwrap_err();
            assert!(matches!(error, SocketError::AlreadyRunning(_)), "{error}");
        });
        assert!(!path.exists(), "given up at the end");
    }

    #[test]
    fn a_client_that_does_not_read_delays_no_other() {
        run(async {
            let ((_silent, first), (mut reading, second)) =
                (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
            // More than any socket buffers.
            answer(first, vec![0; 1 << 24]);
            answer(second, b"status".to_vec());
            let mut read = Vec::new();
            let reading = reading.read_to_end(&mut read);
            time::timeout(WRITE_TIMEOUT / 5, reading).await.unwrap().unwrap();
            assert_eq!(read, b"status");
        });
    }

    #[test]
    fn at_its_end_it_leaves_a_successors_socket_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        run(async {
            let first = StatusSocket::bind(&path).await.unwrap();
            fs::rename(&path, folder.path().join("aside")).unwrap();
            let _second = StatusSocket::bind(&path).await.unwrap();
            drop(first);
            assert!(path.exists());
        });
    }
}
