//! When a thread that polls ports without finding packets sleeps, and for how long.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// A sleeping worker wakes this often, to acknowledge snapshots and sweep its table.
pub const SLEEP_MS: i32 = 100;
/// How long it sleeps while frames are still being sent.
const SLEEP_IN_FLIGHT_MS: i32 = 1;
/// Frames that are still not sent after so long never will be: their interface is gone.
const STUCK: Duration = Duration::from_millis(100);

/// One thread's idleness.
#[derive(Debug)]
pub struct Rest {
    spin: Duration,
    busy: Instant,
    in_flight: usize,
    since: Instant,
}

impl Rest {
    /// For a thread that looks again for `spin` before it sleeps.
    pub fn new(spin: Duration, now: Instant) -> Self {
        Self { spin, busy: now, in_flight: 0, since: now }
    }

    /// To be asked after every turn, which found so many packets. `None`: turn on. Else sleep for so many
    /// milliseconds at most.
    pub fn after(
        &mut self,
        received: usize,
        in_flight: impl FnOnce() -> usize,
        now: Instant,
    ) -> Option<i32> {
        if received > 0 {
            self.busy = now;
            return None;
        }
        (now - self.busy >= self.spin).then(|| self.timeout_ms(in_flight(), now))
    }

    /// Briefly while frames are being sent. But a port whose interface is gone never gives them back: once
    /// their number has stood still for a while, as long as without any.
    fn timeout_ms(&mut self, in_flight: usize, now: Instant) -> i32 {
        if in_flight != self.in_flight {
            (self.in_flight, self.since) = (in_flight, now);
        }
        let moving = in_flight > 0 && now - self.since < STUCK;
        if moving { SLEEP_IN_FLIGHT_MS } else { SLEEP_MS }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_comes_after_spinning_in_vain_and_not_after_packets() {
        let start = Instant::now();
        let mut rest = Rest::new(Duration::from_micros(50), start);
        let mut after =
            |received, us| rest.after(received, || 0, start + Duration::from_micros(us));
        assert_eq!([after(0, 49), after(0, 50)], [None, Some(SLEEP_MS)]);
        assert_eq!([after(1, 200), after(0, 249), after(0, 250)], [None, None, Some(SLEEP_MS)]);
    }

    #[test]
    fn frames_that_are_never_sent_do_not_keep_a_worker_awake() {
        let start = Instant::now();
        let mut rest = Rest::new(Duration::ZERO, start);
        let mut timeout_ms =
            |in_flight, ms| rest.after(0, || in_flight, start + Duration::from_millis(ms)).unwrap();
        assert_eq!(timeout_ms(0, 0), SLEEP_MS);
        assert_eq!([timeout_ms(8, 500), timeout_ms(8, 599)], [SLEEP_IN_FLIGHT_MS; 2]);
        assert_eq!(timeout_ms(7, 610), SLEEP_IN_FLIGHT_MS, "some were sent");
        assert_eq!([timeout_ms(7, 710), timeout_ms(7, 9000)], [SLEEP_MS; 2]);
    }
}
