//! The whole turn: receive → parse → connection table → encapsulate → transmit, on the in-memory port.
//!
//! Each figure includes four descriptor rings per frame, counters, the sweep of the table, and one reading
//! of the clock per burst; not the network's own work. Beside each case its floor is measured, sample by
//! sample, so that a noisy neighbour disturbs both alike; the ratio is what to track. The table printed at
//! the end has the goals, and all of this again for bursts of one packet.

use std::time::Duration;

use benches::{
    case::{BURSTS, Case},
    pair::Pair,
    report::{self, Line, Measured, Samples, Scaling},
    rig::Rig,
    rotation::{ROTATION, Rotate},
};
use core_affinity::CoreId;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, measurement::WallTime,
};

/// The cases of two workers: all in the first-level cache, where they could only be slowed down by
/// sharing a line; and with misses, where the memory slows them down that they share.
const TWO_WORKERS: [&str; 2] = ["turn/established/1", "turn/established/1M"];

fn main() {
    let cores = benches::pin();
    let mut criterion = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4))
        .configure_from_args();
    let mut group = criterion.benchmark_group("turn");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(ROTATION as u64));
    let mut lines: Vec<Line> =
        Case::all().into_iter().filter_map(|case| bench(&mut group, case)).collect();
    let scalings: Vec<Scaling> =
        TWO_WORKERS.iter().filter_map(|name| bench_two(&mut group, name, &cores)).collect();
    group.finish();
    criterion.final_summary();
    if !(lines.is_empty() && scalings.is_empty()) {
        report::print(&mut lines, &scalings);
    }
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// A case's name without the group's.
fn short(name: &str) -> &str {
    name.split_once('/').map_or(name, |(_, name)| name)
}

/// Times a case, if the command line asks for it.
fn bench(group: &mut Group<'_>, case: Case) -> Option<Line> {
    let mut bursts: [Measured; 2] = Default::default();
    // Built when first asked for: the larger ones take seconds.
    let mut rig = None;
    for (burst, measured) in BURSTS.into_iter().zip(&mut bursts) {
        let id = match burst {
            1 => BenchmarkId::new(short(case.name), "burst-of-1"),
            _ => BenchmarkId::from_parameter(short(case.name)),
        };
        group.bench_function(id, |bencher| {
            let (rig, floor) = rig.get_or_insert_with(|| {
                let rig = Rig::new(&case);
                let floor = rig.floor();
                (rig, floor)
            });
            bencher.iter_custom(|rotations| {
                let spent = rotate(rig, burst, rotations, &mut measured.turn);
                rotate(floor, burst, rotations, &mut measured.floor);
                spent
            });
        });
    }
    let (rig, _) = rig?;
    let hit_share = rig.hit_share();
    let Rig { table_bytes, table, frames, .. } = rig;
    Some(Line { case, bursts, hit_share, table_bytes, table, frames })
}

fn rotate(
    rotating: &mut impl Rotate,
    burst: usize,
    rotations: u64,
    samples: &mut Samples,
) -> Duration {
    let mut sum = Duration::ZERO;
    for _ in 0..rotations {
        rotating.refill();
        let mut spent = Duration::ZERO;
        let allocations = allocation_counter::measure(|| spent = rotating.handle(burst));
        assert_eq!(allocations.count_total, 0, "a worker allocates nothing after start");
        samples.add(spent);
        sum += spent;
    }
    sum
}

/// Times two workers with this case each, if the command line asks for it and there are two cores.
fn bench_two(group: &mut Group<'_>, name: &'static str, cores: &[CoreId]) -> Option<Scaling> {
    let [first, .., last] = *cores else {
        eprintln!("{name} by two workers: there is only one core");
        return None;
    };
    let mut both = None;
    group.bench_function(BenchmarkId::new("two-workers", short(name)), |bencher| {
        let (workers, floors) = both.get_or_insert_with(|| {
            let case = Case::named(name).expect("it is one of them");
            let rigs: [Rig; 2] = Rig::crew(&case);
            let floors = rigs.each_ref().map(Rig::floor);
            (Pair::new(rigs, [first, last]), Pair::new(floors, [first, last]))
        });
        bencher.iter_custom(|rotations| {
            floors.measure(rotations);
            workers.measure(rotations)
        });
    });
    both.map(|(mut turn, mut floor)| Scaling { name, turn: turn.scaling(), floor: floor.scaling() })
}
