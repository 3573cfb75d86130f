//! Watches that workers turn, on a thread of its own, so that nothing control waits for can delay it. One
//! that stands still has its queues handed to the kernel until it turns again.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use dataplane::{
    counters::Counters,
    steer::{Steer, SteerError},
};
use tracing::{error, warn};

use super::{Socket, lock};
use crate::causes;

/// How often workers are looked at, in milliseconds.
pub const TICK_MS: u32 = 100;

/// What is watched of one worker.
#[derive(Debug)]
pub struct Watched {
    pub worker: usize,
    pub counters: Arc<Counters>,
    pub sockets: Vec<Socket>,
    /// For others to read.
    pub hung: Arc<AtomicBool>,
}

/// The thread, ended when dropped.
#[derive(Debug)]
pub struct Watchdog {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watchdog {
    /// Starts to watch workers that get their packets. One that has not turned for `timeout` is hung.
    ///
    /// # Errors
    /// If there is no thread.
    pub fn start(
        watched: Vec<Watched>,
        steers: Arc<Mutex<Vec<Steer>>>,
        timeout: Duration,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let watch = move || {
            let mut all: Vec<_> =
                watched.into_iter().map(|watched| (watched, Watch::new(Instant::now()))).collect();
            while !stopped.load(Ordering::Relaxed) {
                for (watched, watch) in &mut all {
                    look(watched, watch, &steers, timeout);
                }
                thread::park_timeout(Duration::from_millis(TICK_MS.into()));
            }
        };
        let thread = thread::Builder::new().name("watchdog".to_owned()).spawn(watch)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// Looks at one worker, and does what has to be done about its queues.
fn look(watched: &Watched, watch: &mut Watch, steers: &Mutex<Vec<Steer>>, timeout: Duration) {
    let hung = watch.hangs(watched.counters.turns(), Instant::now(), timeout);
    watched.hung.store(hung, Ordering::Relaxed);
    if hung == watch.starved {
        watch.complained = false;
        return;
    }
    let mut steers = lock(steers);
    let failed = each(&watched.sockets, |socket| {
        let steer = &mut steers[socket.interface];
        if hung {
            steer.clear_socket(socket.queue)
        } else {
            steer.set_socket(socket.queue, socket.fd)
        }
    });
    let worker = watched.worker;
    match (failed, hung) {
        (None, true) => error!(worker, "the worker hangs: the kernel gets its packets"),
        (None, false) => warn!(worker, "the worker turns again and gets its packets"),
        // Tried again at every tick, and said once.
        (Some(_), _) if watch.complained => return,
        (Some(error), hung) => {
            let error = causes::line(&error);
            watch.complained = true;
            if hung {
                error!(
                    worker,
                    "the worker hangs, and its packets can't all be given to the kernel: {error}"
                );
            } else {
                error!(
                    worker,
                    "the worker turns again, and can't be given all its packets: {error}"
                );
            }
            return;
        }
    }
    watch.starved = hung;
    watch.complained = false;
}

/// Does it for every socket, whatever becomes of the others. Returns the last failure.
fn each(
    sockets: &[Socket],
    mut change: impl FnMut(&Socket) -> Result<(), SteerError>,
) -> Option<SteerError> {
    sockets.iter().filter_map(|socket| change(socket).err()).last()
}

/// When a worker was last seen to turn, and who gets its packets.
#[derive(Debug)]
struct Watch {
    turns: u64,
    since: Instant,
    /// Whether the kernel gets them, all of them.
    starved: bool,
    complained: bool,
}

impl Watch {
    fn new(now: Instant) -> Self {
        Self { turns: 0, since: now, starved: false, complained: false }
    }

    /// Whether the worker has made no turn for `timeout`.
    fn hangs(&mut self, turns: u64, now: Instant, timeout: Duration) -> bool {
        if turns != self.turns {
            (self.turns, self.since) = (turns, now);
        }
        now - self.since >= timeout
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_hangs_after_the_timeout_and_no_more_once_it_turns() {
        let (start, timeout) = (Instant::now(), Duration::from_millis(300));
        let mut watch = Watch::new(start);
        let mut hangs =
            |turns, after_ms| watch.hangs(turns, start + Duration::from_millis(after_ms), timeout);
        assert!(!hangs(5, 100) && !hangs(5, 300) && hangs(5, 400) && hangs(5, 500));
        assert!(!hangs(6, 600));
    }

    #[test]
    fn one_queue_that_cannot_be_changed_keeps_no_other_from_it() {
        let sockets: Vec<_> = (0..3).map(|queue| Socket { interface: 0, queue, fd: 0 }).collect();
        let mut changed = Vec::new();
        let failed = each(&sockets, |socket| {
            if socket.queue == 1 {
                return Err(SteerError::NoQueue(1));
            }
            changed.push(socket.queue);
            Ok(())
        });
        assert!(matches!(failed, Some(SteerError::NoQueue(1))));
        assert_eq!(changed, [0, 2]);
    }
}
