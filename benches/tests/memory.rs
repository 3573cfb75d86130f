//! Ten million connections fit into 256 MB.

use benches::{
    case::Case, memory::Resident, report::MEMORY_GOAL_BYTES, rig::Rig, rotation::Rotate,
};

#[test]
fn a_worker_with_ten_million_connections_has_less_than_256_mb_resident() {
    let case = Case::named("turn/established/10M").expect("there is such a case");
    let before = Resident::now();
    let mut rig = Rig::new(&case);
    let all = Resident::now() - before;
    assert!(rig.table.bytes >= rig.table_bytes as u64, "not all of the table is in memory");
    assert!(all.bytes >= rig.table.bytes + rig.frames.bytes, "a part is more than the whole");
    assert!(all.bytes <= MEMORY_GOAL_BYTES, "{all:?}");
    // And they are remembered: this panics if too many are not.
    rig.rotation(64);
    rig.rotation(64);
}
