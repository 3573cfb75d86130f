//! Figures held against their floor, printed when all are known.

use std::time::Duration;

use crate::rig::ROTATION;

/// Nanoseconds per packet, as often as they were measured.
#[derive(Default, Debug)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a measurement of so many rotations.
    pub fn add(&mut self, spent: Duration, rotations: u64) {
        self.0.push(spent.as_nanos() as f64 / (rotations as f64 * ROTATION as f64));
    }

    /// The middle one: on a shared machine the mean says more about the neighbours. Zero if there is none.
    pub fn median(&mut self) -> f64 {
        self.0.sort_by(f64::total_cmp);
        self.0.get(self.0.len() / 2).copied().unwrap_or_default()
    }
}

/// A case and its floor, measured by turns.
#[derive(Debug)]
pub struct Line {
    /// The case's name.
    pub name: &'static str,
    /// The whole turn.
    pub turn: Samples,
    /// Memory alone.
    pub floor: Samples,
}

/// Prints each case's nanoseconds per packet, its floor's, and their ratio.
pub fn print(lines: &mut [Line]) {
    println!("\n{:<26}{:>10}{:>10}{:>8}", "median ns/packet", "turn", "floor", "ratio");
    for Line { name, turn, floor } in lines {
        let (turn, floor) = (turn.median(), floor.median());
        println!("{name:<26}{turn:>10.1}{floor:>10.1}{:>8.2}", turn / floor);
    }
}
