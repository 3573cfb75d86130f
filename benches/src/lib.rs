//! What the benchmarks share: packets, a snapshot to forward them by, a worker on the in-memory port, and
//! the floor that its figures are held against.
//!
//! Nothing here is timed but what [`rig::Rig::rotation`] and [`floor::Floor::rotation`] say they time.

pub mod case;
pub mod floor;
pub mod memory;
pub mod packet;
pub mod report;
pub mod rig;
pub mod snapshot;

/// Keeps the benchmark on one core, the last: the first has most of the machine's interrupts.
///
/// Without the right to, it runs where the scheduler likes, and figures scatter more.
pub fn pin() {
    let last = core_affinity::get_core_ids().and_then(|cores| cores.last().copied());
    if !last.is_some_and(core_affinity::set_for_current) {
        eprintln!("not pinned to a core: figures will scatter");
    }
}
