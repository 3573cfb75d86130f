//! The socket that the API is served on: taking it over from a dead daemon, and from nobody else.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    net::{UnixListener, UnixSocket, UnixStream},
    time,
};

/// Clients that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another daemon is there.
    #[error("a daemon already answers on {0}: stop it, or give this one another api.socket")]
    AlreadyRunning(PathBuf),
    /// Something that must not be deleted.
    #[error("{0} is there and is no socket: remove it, or set api.socket to another path")]
    NotASocket(PathBuf),
    /// Anything else.
    #[error("cannot listen on {path}; see api.socket")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A socket with a place in the file system, which it gives up when dropped.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode. A successor may have put its own socket in this place by the time we end.
    file: Option<(u64, u64)>,
}

impl ApiSocket {
    /// Listens for whom `mode` allows it; takes the place of a socket that nobody answers on.
    ///
    /// # Errors
    /// If there is a daemon, or anything that is no socket, or the place can't be had.
    pub async fn bind(path: &Path, mode: u32) -> Result<Self, SocketError> {
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
        // Under another name, and deaf, until the mode says who may come in.
        let unready = path.with_extension(format!("{}.new", std::process::id()));
        let listen = || {
            let socket = UnixSocket::new_stream()?;
            socket.bind(&unready)?;
            fs::set_permissions(&unready, fs::Permissions::from_mode(mode))?;
            let listener = socket.listen(BACKLOG)?;
            fs::rename(&unready, path)?;
            Ok(listener)
        };
        // In a container one that was killed in between had the same number.
        let _ = fs::remove_file(&unready);
        let listener = listen().map_err(|error| {
            let _ = fs::remove_file(&unready);
            failed(error)
        })?;
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

impl Drop for ApiSocket {
    fn drop(&mut self) {
        if self.file.is_some() && identity(&self.path) == self.file {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        thread,
    };

    use super::*;

    const MODE: u32 = 0o600;

    fn run<T>(test: impl Future<Output = T>) -> T {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().build().unwrap().block_on(test)
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "data").unwrap();
        let error = run(ApiSocket::bind(&path, MODE)).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_dead_daemons_socket_is_taken_over_and_a_living_ones_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        run(async {
            let _living = ApiSocket::bind(&path, MODE).await.unwrap();
            let error = ApiSocket::bind(&path, MODE).await.unwrap_err();
            assert!(matches!(error, SocketError::AlreadyRunning(_)), "{error}");
        });
        assert!(!path.exists(), "given up at the end");
    }

    #[test]
    fn its_mode_says_who_may() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        run(async {
            let _socket = ApiSocket::bind(&path, 0o640).await.unwrap();
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o640);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no other name is left");
        });
    }

    #[test]
    fn what_one_that_was_killed_in_between_left_is_no_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let unready = path.with_extension(format!("{}.new", std::process::id()));
        drop(std::os::unix::net::UnixListener::bind(&unready).unwrap());
        run(async {
            let _socket = ApiSocket::bind(&path, MODE).await.unwrap();
            assert!(!unready.exists());
        });
    }

    #[test]
    fn nobody_comes_in_before_the_mode_says_who_may() {
        let folder = tempfile::tempdir().unwrap();
        // Each has names of its own, lest one be taken for the next.
        let path = |round: usize| folder.path().join(format!("{round}.sock"));
        let rounds = 2000;
        let now = AtomicUsize::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                loop {
                    let round = now.load(Ordering::Relaxed);
                    if round == rounds {
                        break;
                    }
                    let unready = path(round).with_extension(format!("{}.new", std::process::id()));
                    if std::os::unix::net::UnixStream::connect(&unready).is_err() {
                        continue;
                    }
                    // If it is not there by now, it has its mode and its name.
                    let mode = fs::metadata(&unready).map(|found| found.permissions().mode());
                    let early = mode.ok().filter(|mode| mode & 0o777 != 0o600);
                    assert!(early.is_none(), "let in too early, by mode {early:?}");
                }
            });
            for round in 0..rounds {
                run(ApiSocket::bind(&path(round), MODE)).unwrap();
                now.store(round + 1, Ordering::Relaxed);
            }
        });
    }

    #[test]
    fn at_its_end_it_leaves_a_successors_socket_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        run(async {
            let first = ApiSocket::bind(&path, MODE).await.unwrap();
            fs::rename(&path, folder.path().join("aside")).unwrap();
            let _second = ApiSocket::bind(&path, MODE).await.unwrap();
            drop(first);
            assert!(path.exists());
        });
    }
}
