//! The whole turn: receive → parse → connection table → encapsulate → transmit, on the in-memory port.
//!
//! Each figure includes four descriptor rings per frame, counters, the sweep of the table, and one reading
//! of the clock per burst; not the network's own work. Beside each case its floor is measured, sample by
//! sample, so that a noisy neighbour disturbs both alike; the ratio is what to track.

use std::time::Duration;

use benches::{
    case::Case,
    floor::Floor,
    report::{self, Line, Samples},
    rig::{ROTATION, Rig},
};
use criterion::{Criterion, SamplingMode, Throughput};

fn main() {
    benches::pin();
    let mut criterion = Criterion::default().sample_size(30).configure_from_args();
    let mut lines: Vec<Line> =
        Case::all().into_iter().filter_map(|case| bench(&mut criterion, &case)).collect();
    criterion.final_summary();
    report::print(&mut lines);
}

/// Times a case, if the command line asks for it.
fn bench(criterion: &mut Criterion, case: &Case) -> Option<Line> {
    let mut line = Line { name: case.name, turn: Samples::default(), floor: Samples::default() };
    // Built when first asked for: the larger ones take a second.
    let mut rig = None;
    let mut group = criterion.benchmark_group("turn");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(ROTATION as u64));
    let (_, name) = case.name.split_once('/').expect("a name has a stage");
    group.bench_function(name, |bencher| {
        let (rig, floor) = rig.get_or_insert_with(|| (Rig::new(case), Floor::new(case)));
        bencher.iter_custom(|rotations| {
            let mut spent = Duration::ZERO;
            let turns = || spent = (0..rotations).map(|_| rig.rotation()).sum();
            let allocations = allocation_counter::measure(turns);
            assert_eq!(allocations.count_total, 0, "a worker allocates nothing after start");
            line.turn.add(spent, rotations);
            line.floor.add((0..rotations).map(|_| floor.rotation()).sum(), rotations);
            spent
        });
    });
    group.finish();
    rig.map(|_| line)
}
