//! What the benchmarks share: packets, a snapshot to forward them by, a worker on the in-memory port, and
//! the floor that its figures are held against.
//!
//! Nothing here is timed but what [`rotation::Rotate::handle`] says is timed.

pub mod answer;
pub mod attack;
pub mod case;
pub mod change;
pub mod floor;
pub mod memory;
pub mod node;
pub mod packet;
pub mod pair;
pub mod report;
pub mod rig;
pub mod rotation;
pub mod snapshot;

use core_affinity::CoreId;

/// Keeps the benchmark on one core, the last: the first has most of the machine's interrupts. Returns all
/// that it might have used.
///
/// Without the right to, it runs where the scheduler likes, and figures scatter more.
pub fn pin() -> Vec<CoreId> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    if !cores.last().copied().is_some_and(core_affinity::set_for_current) {
        eprintln!("not pinned to a core: figures will scatter");
    }
    cores
}
