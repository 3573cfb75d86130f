//! Time as the packet path knows it: given by whoever owns a clock, never read here.

use std::ops::Add;

/// Milliseconds on a clock that never goes back, from a start of its owner's choosing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Tick(pub u64);

impl Tick {
    /// The tick `seconds` after the clock's start.
    pub const fn from_s(seconds: u64) -> Self {
        Self(seconds * 1000)
    }

    /// Milliseconds since `earlier`, or 0 if that is later.
    #[inline]
    pub fn ms_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<u64> for Tick {
    type Output = Self;

    /// `ms` milliseconds later.
    fn add(self, ms: u64) -> Self {
        Self(self.0 + ms)
    }
}
