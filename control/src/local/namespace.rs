//! A network namespace that has no name: it ends, with all links in it, when the last who holds it does,
//! however that dies.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread,
};

use dataplane::port::xsk;
use nix::sched::{CloneFlags, unshare};

/// A hold on it.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<OwnedFd>);

impl Namespace {
    /// A new, empty one.
    ///
    /// # Errors
    /// If the process may not: that takes `CAP_SYS_ADMIN`.
    pub fn new() -> io::Result<Self> {
        // On a thread of its own: nobody else is moved.
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        };
        let made = thread::spawn(make).join().expect("making one does not panic");
        Ok(Self(Arc::new(made?.into())))
    }

    /// Does something in it. Sockets that are made there stay there.
    ///
    /// # Errors
    /// If the process may not.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> io::Result<T> {
        xsk::in_namespace(self.as_fd(), body)
    }

    /// Its descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
