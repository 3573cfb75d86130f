//! How often a worker may do what anyone can make it do: a token bucket, filled by the clock it is shown.

use crate::time::Tick;

/// At most so many a second, in bursts of a tenth of that.
#[derive(Debug)]
pub struct RateLimit {
    per_s: u64,
    /// Thousandths, so that a millisecond at one a second counts.
    tokens: u64,
    filled_at: Tick,
}

impl RateLimit {
    /// The limit, with a burst in hand.
    pub fn new(per_s: u32) -> Self {
        let mut limit = Self { per_s: per_s.into(), tokens: 0, filled_at: Tick(0) };
        limit.tokens = limit.most();
        limit
    }

    fn most(&self) -> u64 {
        (self.per_s * 100).max(1000)
    }

    /// Takes one, if there is one.
    #[inline]
    pub fn take(&mut self, now: Tick) -> bool {
        // A second fills it, and any longer may be too much for 64 bits.
        let earned = now.ms_since(self.filled_at).min(1000) * self.per_s;
        self.tokens = (self.tokens + earned).min(self.most());
        self.filled_at = now;
        let Some(left) = self.tokens.checked_sub(1000).filter(|_| self.per_s > 0) else {
            return false;
        };
        self.tokens = left;
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_rate_limit_lets_through_what_it_says() {
        for start in [0, 1_000_000] {
            let mut limit = RateLimit::new(1000);
            let taken = (0..10_000).filter(|i| limit.take(Tick(start + i / 5))).count();
            assert!((2_000..=2_200).contains(&taken), "{taken} in two seconds");
        }
        assert!(!RateLimit::new(0).take(Tick(1_000_000)));
    }

    #[test]
    fn a_slow_rate_adds_up_over_many_milliseconds() {
        let mut limit = RateLimit::new(2);
        let taken = (0..10_000).filter(|&ms| limit.take(Tick(ms))).count();
        assert_eq!(taken, 20);
    }

    #[test]
    fn a_limit_that_rested_for_ages_is_as_one_that_rested_for_a_second() {
        for per_s in [1, 50_000, u32::MAX] {
            let mut limit = RateLimit::new(per_s);
            assert!(limit.take(Tick(u64::MAX)), "{per_s} a second");
        }
    }
}
