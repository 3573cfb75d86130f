//! A worker allocates nothing after start (I7).

use benches::{
    case::{BURSTS, Case},
    rig::Rig,
    rotation::Rotate,
};

#[test]
fn no_turn_of_any_case_allocates() {
    for case in Case::all() {
        let mut rig = Rig::new(&case.clone().shrunk()); // a larger table is no different, but slow to set up
        for burst in BURSTS {
            let allocations = allocation_counter::measure(|| {
                rig.rotation(burst);
                rig.rotation(burst);
            });
            assert_eq!(allocations.count_total, 0, "{}", case.name);
        }
    }
}

#[test]
fn an_allocation_would_be_counted() {
    let allocations = allocation_counter::measure(|| drop(std::hint::black_box(Box::new(1))));
    assert_eq!(allocations.count_total, 1);
}
