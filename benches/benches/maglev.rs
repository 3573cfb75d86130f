//! Maglev: picking a backend for a hash, and building the table.

use std::hint::black_box;

use benches::snapshot;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dataplane::maglev::Size;

const HASHES: usize = 1024;

fn maglev(criterion: &mut Criterion) {
    benches::pin();
    let size = |entries| Size::new(entries).expect("a prime");
    let mut random = fastrand::Rng::with_seed(1);
    let hashes: Vec<u64> = (0..HASHES).map(|_| random.u64(..)).collect();
    let mut group = criterion.benchmark_group("maglev");
    group.throughput(Throughput::Elements(HASHES as u64));
    for entries in [5003, 65_537] {
        let maglev = snapshot::maglev(size(entries), snapshot::BACKENDS);
        group.bench_function(format!("pick/{entries}"), |bencher| {
            bencher
                .iter(|| hashes.iter().fold(0, |sum, &hash| sum ^ maglev.pick(hash).unwrap_or(0)));
        });
    }
    for (entries, backends) in [(5003, 10), (5003, 100), (65_537, 100)] {
        group.throughput(Throughput::Elements(entries.into()));
        group.bench_function(format!("build/{entries}x{backends}"), |bencher| {
            bencher.iter(|| snapshot::maglev(size(entries), black_box(backends)));
        });
    }
    group.finish();
}

criterion_group!(benches, maglev);
criterion_main!(benches);
