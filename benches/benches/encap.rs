//! Putting the outer header in front, on frames that are in the cache.

use benches::{
    memory,
    packet::{Family, LARGE, Packet, SMALL, Transport},
    snapshot::{self, Underlay},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dataplane::{
    encap, parse,
    port::{Frame, HEADROOM},
};

const FRAMES: usize = 64;
const CHUNK_BYTES: usize = 2048;

fn encap(criterion: &mut Criterion) {
    benches::pin();
    let (v4, v6) = (Family::V4, Family::V6);
    let underlay = |family, udp_checksum| Underlay { family, udp_checksum };
    let cases = [
        ("ipv4-in-ipv4/60", v4, underlay(v4, false), Transport::Tcp, SMALL),
        ("ipv4-in-ipv4-checksum/60", v4, underlay(v4, true), Transport::Tcp, SMALL),
        ("ipv4-in-ipv6/60", v4, underlay(v6, false), Transport::Tcp, SMALL),
        ("ipv4-in-ipv6-checksum/60", v4, underlay(v6, true), Transport::Tcp, SMALL),
        ("ipv6-in-ipv6-checksum/74", v6, underlay(v6, true), Transport::Tcp, SMALL),
        // The next two must not differ from the small ones: the payload is not read.
        ("ipv4-in-ipv4/1514", v4, underlay(v4, false), Transport::Tcp, LARGE),
        ("ipv4-in-ipv4-checksum/1514", v4, underlay(v4, true), Transport::Tcp, LARGE),
    ];
    let mut group = criterion.benchmark_group("encap");
    group.throughput(Throughput::Elements(FRAMES as u64));
    for (name, family, underlay, transport, len) in cases {
        let packet = Packet::new(family, transport, len);
        let flow = parse::flow(packet.bytes()).expect("the packet is whole");
        let template = snapshot::template(1, family, underlay);
        let memory = memory::leak(FRAMES * CHUNK_BYTES);
        let mut frames: Vec<Frame> = (0..)
            .zip(memory.chunks_exact_mut(CHUNK_BYTES))
            .map(|(index, chunk)| {
                chunk[HEADROOM..][..packet.bytes().len()].copy_from_slice(packet.bytes());
                Frame::new(index, chunk)
            })
            .collect();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for (hash, frame) in (0_u64..).zip(&mut frames) {
                    // As it was received: only the old Ethernet header has been written over.
                    frame.set(HEADROOM, packet.bytes().len());
                    encap::vxlan(frame, &flow, &template, hash << 50)
                        .expect("there is room in front");
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, encap);
criterion_main!(benches);
