//! Wakes a sleeping worker, so that an idle one takes a new snapshot at once. It is one end of a socket
//! pair among the descriptors that the worker sleeps on anyway: a busy one never looks at it.
#![forbid(unsafe_code)]

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
};

/// What control rings.
#[derive(Debug)]
pub struct Bell(UnixStream);

/// What a worker hears in its sleep.
#[derive(Debug)]
pub struct Ear(UnixStream);

/// Both ends.
///
/// # Errors
/// If there are no more file descriptors.
pub fn bell() -> io::Result<(Bell, Ear)> {
    let (bell, ear) = UnixStream::pair()?;
    bell.set_nonblocking(true)?;
    ear.set_nonblocking(true)?;
    Ok((Bell(bell), Ear(ear)))
}

impl Bell {
    /// Ends the worker's sleep, or its next one if it is awake. Never blocks.
    pub fn ring(&self) {
        // One that has no room for more has been rung, and a worker that is gone hears nothing.
        let _ = (&self.0).write(&[0]);
    }
}

impl Ear {
    pub(super) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Forgets what it has heard.
    pub(super) fn clear(&self) {
        let mut rung = [0; 64];
        while (&self.0).read(&mut rung).is_ok_and(|read| read == rung.len()) {}
    }
}

#[cfg(test)]
mod tests {
    use std::{
        thread,
        time::{Duration, Instant},
    };

    use super::{super::wait, *};

    #[test]
    fn a_sleeper_is_woken_by_the_bell_and_hears_it_once() {
        let slept = |ear: &Ear, timeout_ms| {
            let start = Instant::now();
            assert!(!wait(&[], Some(ear), timeout_ms).unwrap(), "no port has received anything");
            start.elapsed()
        };
        let (bell, ear) = bell().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                bell.ring();
            });
            assert!(slept(&ear, 10_000) < Duration::from_secs(5));
        });
        assert!(slept(&ear, 30) >= Duration::from_millis(30), "it was rung once");
        // However often it is rung while nobody sleeps, it is heard once.
        (0..100_000).for_each(|_| bell.ring());
        assert!(slept(&ear, 10_000) < Duration::from_secs(5));
        assert!(slept(&ear, 30) >= Duration::from_millis(30));
    }
}
