//! Runs one case of the turn benchmark for so many rotations, for profilers to look at.
//!
//! ```text
//! turns turn/established/1M 1000
//! valgrind --tool=callgrind --toggle-collect='*Rig::turn*' --zero-before='*turns::rotate*' \
//!     turns --shrunk turn/established/1M 2
//! ```
//!
//! The second counts instructions; `scripts/bench-turn --instructions` does that for all cases.

use std::{env, process, time::Duration};

use benches::{
    case::{BURSTS, Case},
    rig::Rig,
    rotation::{ROTATION, Rotate},
};

const USAGE: &str = "usage: turns [--shrunk] CASE [ROTATIONS [BURST]]
  --shrunk   with a small connection table and few connections: quick to set up, and all else alike
  BURST      packets that come at once: a power of two of at most 64
cases:";

fn main() {
    let mut args: Vec<_> = env::args().skip(1).collect();
    let shrunk = args.first().is_some_and(|arg| arg == "--shrunk");
    let mut args = args.drain(usize::from(shrunk)..);
    let case = args.next().and_then(|name| Case::named(&name));
    let mut number = |default| args.next().map_or(Some(default), |arg| arg.parse().ok());
    let (rotations, burst) = (number(100), number(BURSTS[0]));
    let (Some(case), Some(rotations), Some(burst)) = (case, rotations, burst) else {
        eprintln!("{USAGE}");
        Case::all().iter().for_each(|case| eprintln!("  {}", case.name));
        process::exit(2);
    };
    benches::pin();
    let case = if shrunk { case.shrunk() } else { case };
    let mut rig = Rig::new(&case);
    let mut spent = rotate(&mut rig, rotations, burst);
    let packets = rotations * ROTATION;
    let total: Duration = spent.iter().sum();
    spent.sort_unstable();
    let median = spent.get(rotations / 2).copied().unwrap_or_default();
    println!(
        "{}: {packets} packets, {:.1} ns each, {:.1} in the median rotation, table on {}, frames on {}",
        case.name,
        total.as_nanos() as f64 / packets as f64,
        median.as_nanos() as f64 / ROTATION as f64,
        rig.table,
        rig.frames,
    );
}

/// What a profiler is to look at: all before is setting up.
#[inline(never)]
fn rotate(rig: &mut Rig, rotations: usize, burst: usize) -> Vec<Duration> {
    (0..rotations).map(|_| rig.rotation(burst)).collect()
}
