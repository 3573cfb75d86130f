//! A network namespace that has no name: it ends, with all links in it, when the last who holds it does,
//! however that dies.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

/// A hold on it.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<OwnedFd>);

impl Namespace {
    /// A new, empty one.
    ///
    /// # Errors
    /// If the process may not: that takes `CAP_SYS_ADMIN`.
    pub fn new() -> io::Result<Self> {
        let made = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        Ok(Self(Arc::new(made?.into())))
    }

    /// Does something in it. Sockets that are made there stay there.
    ///
    /// # Errors
    /// If the process may not.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_a_thread(|| {
            setns(self.as_fd(), CloneFlags::CLONE_NEWNET)?;
            Ok(body())
        })
    }

    /// Its descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A thread's namespace is its own: nobody else is moved, and nobody has to find the way back.
fn on_a_thread<T: Send>(body: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| scope.spawn(body).join().expect("a body does not panic"))
}
