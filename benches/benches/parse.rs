//! Bytes → `Flow`, on packets that are in the cache.

use std::hint::black_box;

use benches::packet::{Family, LARGE, Packet, SMALL, Transport};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dataplane::parse;

const PACKETS: usize = 64;

fn parse(criterion: &mut Criterion) {
    benches::pin();
    let small = |family, transport| Packet::new(family, transport, SMALL);
    let cases = [
        ("ipv4-tcp/60", small(Family::V4, Transport::Tcp)),
        ("ipv4-tcp/1514", Packet::new(Family::V4, Transport::Tcp, LARGE)),
        ("ipv4-udp/60", small(Family::V4, Transport::Udp)),
        ("ipv4-tcp-vlan/64", small(Family::V4, Transport::Tcp).tagged()),
        ("ipv6-tcp/74", small(Family::V6, Transport::Tcp)),
        ("ipv6-udp/62", small(Family::V6, Transport::Udp)),
        ("ipv6-tcp-vlan/78", small(Family::V6, Transport::Tcp).tagged()),
    ];
    let mut group = criterion.benchmark_group("parse");
    group.throughput(Throughput::Elements(PACKETS as u64));
    for (name, packet) in cases {
        let packets: Vec<Packet> = (0..PACKETS as u64)
            .map(|number| {
                let mut packet = packet.clone();
                packet.set_flow(number);
                packet
            })
            .collect();
        assert!(packets.iter().all(|packet| parse::flow(packet.bytes()).is_ok()), "{name}");
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for packet in &packets {
                    let _ = black_box(parse::flow(black_box(packet.bytes())));
                }
            });
        });
    }
    // What strangers send must be no dearer than what clients do.
    let truncated = &small(Family::V4, Transport::Tcp).bytes()[..40].to_vec();
    group.bench_function("truncated/40", |bencher| {
        bencher.iter(|| {
            for _ in 0..PACKETS {
                let _ = black_box(parse::flow(black_box(truncated)));
            }
        });
    });
    group.finish();
}

criterion_group!(benches, parse);
criterion_main!(benches);
