//! The backend for a flow, parsed and hashed before, in bursts with their prefetches.
//!
//! A hit reads one line of the table; a miss, a connection nobody remembers, asks Maglev and is remembered.
//! The table of the miss is full of unconfirmed connections, the dearest it can be. `new` is the SYN of a
//! connection, by each scheduler, among so many backends; there, clients are few and have many ports.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use benches::{
    case::M,
    packet::{Family, Packet, SMALL, Transport},
    snapshot::{self, Backends, Underlay},
};
use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use dataplane::{
    connections::{Connections, Timeouts},
    counters::Counters,
    flow::{Flow, HashKey},
    forwarding::Forwarding,
    parse,
    schedule::{Schedule, Scheduler, Taker},
    select::{Context, select},
    time::Tick,
};

const BURST: usize = 64;

/// Flows prepared at once, untimed: few enough to stay in the second-level cache.
const BATCH: usize = 16 * BURST;

/// A table and packets to ask it for.
struct Table {
    forwarding: Forwarding,
    connections: Connections,
    scheduler: Scheduler,
    counters: Counters,
    hash_key: HashKey,
    packet: Packet,
    now: Tick,
}

impl Table {
    fn new(flows: u64) -> Self {
        let forwarding = snapshot::forwarding(Family::V4, Underlay::V4);
        Self::by(forwarding, flows, Transport::Tcp)
    }

    fn by(forwarding: Forwarding, flows: u64, transport: Transport) -> Self {
        let capacity = 2 * flows as usize;
        let connections = Connections::new(capacity, &Timeouts::default());
        let (slots, hash_key) = (snapshot::BACKENDS as usize, HashKey::random());
        Self {
            forwarding,
            connections: connections.expect("there is memory for a table").counting(slots),
            scheduler: Scheduler::new(slots, 0, Vec::new(), hash_key),
            counters: Counters::new(slots),
            hash_key,
            packet: Packet::new(Family::V4, transport, SMALL),
            now: Tick::from_s(1),
        }
    }

    /// As `parse` and the worker make it.
    fn flow(&mut self, number: u64) -> (Flow, u64) {
        self.packet.set_flow(number);
        let flow = parse::flow(self.packet.bytes()).expect("the packet is whole");
        (flow, flow.key.hash(&self.hash_key))
    }

    fn select(&mut self, burst: &[(Flow, u64)]) {
        for (_, hash) in burst {
            self.connections.prefetch(*hash);
        }
        let (connections, scheduler) = (&mut self.connections, &mut self.scheduler);
        let mut context = Context::new(connections, scheduler, &self.counters, self.now);
        for (flow, hash) in burst {
            let selected = select(flow, *hash, &self.forwarding, &mut context);
            black_box(selected.map(|selected| selected.slot)).expect("there is a backend");
        }
    }

    /// Selects for [`BATCH`] flows, and tells how long that took.
    fn batch(&mut self, mut number: impl FnMut() -> u64) -> Duration {
        let flows: Vec<_> = (0..BATCH).map(|_| self.flow(number())).collect();
        let start = Instant::now();
        flows.chunks(BURST).for_each(|burst| self.select(burst));
        start.elapsed()
    }
}

fn bench(criterion: &mut Criterion) {
    benches::pin();
    let mut group = criterion.benchmark_group("select");
    group.throughput(Throughput::Elements(BATCH as u64));
    for (size, flows) in [("1", 1), ("64Ki", 64 << 10), ("1M", M)] {
        let mut random = fastrand::Rng::with_seed(1);
        group.bench_function(format!("hit/{size}"), |bencher| {
            let mut table = Table::new(flows);
            for pass in 0..2 {
                table.now = Tick::from_s(1 + pass); // the second confirms
                (0..flows).for_each(|number| {
                    let flow = table.flow(number);
                    table.select(&[flow]);
                });
            }
            bencher.iter_custom(|batches| {
                (0..batches).map(|_| table.batch(|| random.u64(..flows))).sum()
            });
        });
        let mut number = 0;
        let mut next = || {
            number += 1;
            number
        };
        group.bench_function(format!("miss/{size}"), |bencher| {
            let mut table = Table::new(flows);
            for _ in 0..4 * flows.div_ceil(BATCH as u64) {
                table.batch(&mut next);
            }
            bencher.iter_custom(|batches| (0..batches).map(|_| table.batch(&mut next)).sum());
        });
    }
    schedulers(&mut group);
    group.finish();
}

/// How new flows are placed, given who takes them.
type Placing = fn(&[Taker]) -> Schedule;

/// Each scheduler's new connections, on a table that has room for nearly all.
fn schedulers(group: &mut BenchmarkGroup<'_, WallTime>) {
    let schedulers: [(&str, u32, Placing); 7] = [
        ("maglev/10", 10, |_| Schedule::Maglev),
        ("maglev/100", 100, |_| Schedule::Maglev),
        ("round-robin/100", 100, Schedule::round_robin),
        ("least-connections/10", 10, Schedule::least_connections),
        ("least-connections/100", 100, Schedule::least_connections),
        ("source-stateless/100", 100, |takers| Schedule::source(takers, 0)),
        ("source/100", 100, |takers| Schedule::source(takers, 300)),
    ];
    for (name, backends, schedule) in schedulers {
        let (backends, flows) = (Backends::new(backends), 64 << 10);
        group.bench_function(format!("new/{name}"), |bencher| {
            let forwarding = snapshot::scheduled(&backends, schedule, Family::V4, Underlay::V4);
            let mut table = Table::by(forwarding, flows, Transport::TcpSyn);
            let mut number = 0;
            let mut next = || {
                number += 1;
                number
            };
            bencher.iter_custom(|batches| {
                (0..batches)
                    .map(|_| {
                        // What is old is forgotten before the table is full.
                        table.now = table.now + 1000;
                        table.connections.sweep(table.now);
                        table.batch(&mut next)
                    })
                    .sum()
            });
        });
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
