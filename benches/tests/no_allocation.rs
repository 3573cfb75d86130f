//! A worker allocates nothing after start (I7).

use benches::{
    case::{Case, Flows},
    rig::Rig,
};

#[test]
fn no_turn_of_any_case_allocates() {
    for mut case in Case::all() {
        if let Flows::Established(flows) = &mut case.flows {
            *flows = (*flows).min(1 << 16); // the million is no different, but slow to set up
        }
        let mut rig = Rig::new(&case);
        let allocations = allocation_counter::measure(|| {
            rig.rotation();
            rig.rotation();
        });
        assert_eq!(allocations.count_total, 0, "{}", case.name);
    }
}

#[test]
fn an_allocation_would_be_counted() {
    let allocations = allocation_counter::measure(|| drop(std::hint::black_box(Box::new(1))));
    assert_eq!(allocations.count_total, 1);
}
