//! Full NAT, tested from outside: clients at one end, tasks behind their tunnels at the other. What passes is
//! read back by etherparse, which also judges every checksum.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    panic::AssertUnwindSafe,
    sync::Arc,
};

use dataplane::{
    counters::{Counters, DropReason, Event},
    encap::{Template, Tunnel},
    flow::{HashKey, protocol},
    forwarding::{Backend, Common, Forwarding, Link, Mesh, Nat, Overlay, Prefix, Service, Slot},
    maglev::{Candidate, Maglev, Size},
    nat::{self, Id, Slots},
    port::{HEADROOM, sim::SimPort},
    publish::Publisher,
    schedule::{Schedule, Taker},
    time::Tick,
    wire::ethernet::MacAddr,
    worker::Worker,
};
use etherparse::{
    EtherType, Ethernet2Header, Icmpv4Type, Icmpv6Type, IpHeaders, NetSlice, PacketBuilder,
    SlicedPacket, TcpHeader, TcpOptionElement, TransportSlice,
};
use proptest::prelude::*;

use crate::{
    hostile,
    packets::{add_nonce, arp_request, naive_sum, solicitation, tag},
    rig::{CLIENT_MAC, Equipment, SLOTS, ip, node_mac, vip},
    script::Script,
};

pub const VNI: u32 = 4096;
pub const VNI6: u32 = 4097;
pub const MESH: &str = "10.0.0.5";
pub const MESH6: &str = "fd00::5";
pub const NODE: &str = "192.0.2.1";
const NODE6: &str = "2001:db8::1";
const VIP: &str = "203.0.113.10:8080";
const VIP6: &str = "[2001:db8:113::10]:8080";
pub const MESH_MAC: [u8; 6] = [2, 0x42, 10, 0, 0, 5];
const MTU: u16 = 1450;
const TARGET: u16 = 80;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

fn client(port: u16) -> SocketAddr {
    SocketAddr::new(ip("198.51.100.7"), port)
}

fn client6(port: u16) -> SocketAddr {
    SocketAddr::new(ip("2001:db8:100::7"), port)
}

fn at(end: &str) -> SocketAddr {
    end.parse().unwrap()
}

/// Where the task in this slot is.
fn task(slot: Slot, v6: bool) -> SocketAddr {
    let address = if v6 { format!("fd00::1:{slot}") } else { format!("10.0.0.{}", 100 + slot) };
    SocketAddr::new(ip(&address), TARGET)
}

fn task_mac(slot: Slot) -> [u8; 6] {
    [2, 0x42, 10, 0, 0, 100 + slot as u8]
}

/// The node that runs it.
fn vtep(slot: Slot) -> IpAddr {
    ip(&format!("192.0.2.{}", 10 + slot))
}

/// A packet of TCP or UDP, as a client or a task would send it.
#[derive(Clone, Debug)]
struct Segment {
    src: SocketAddr,
    dst: SocketAddr,
    /// `None` for UDP.
    flags: Option<u8>,
    seq: u32,
    ack: u32,
    mss: Option<u16>,
    /// Bytes of no-operations before the MSS.
    pad: usize,
    payload: Vec<u8>,
    dont_fragment: bool,
    /// UDP without a checksum.
    bare: bool,
}

fn tcp(src: SocketAddr, dst: SocketAddr, flags: u8) -> Segment {
    Segment {
        src,
        dst,
        flags: Some(flags),
        seq: 1_000_000,
        ack: if flags & ACK != 0 { 7_000_000 } else { 0 },
        mss: None,
        pad: 0,
        payload: Vec::new(),
        dont_fragment: true,
        bare: false,
    }
}

fn udp(src: SocketAddr, dst: SocketAddr) -> Segment {
    Segment { flags: None, payload: b"question".to_vec(), ..tcp(src, dst, 0) }
}

impl Segment {
    fn with_payload(self, len: usize) -> Self {
        Self { payload: (0..len).map(|i| (i * 7 + i / 256) as u8).collect(), ..self }
    }

    /// As a frame between these stations.
    fn frame(&self, from: [u8; 6], to: [u8; 6]) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2(from, to);
        let mut frame = Vec::new();
        let builder = match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut header =
                    etherparse::Ipv4Header::new(0, 61, 6.into(), src.octets(), dst.octets())
                        .unwrap();
                header.identification = 0x4711;
                header.dont_fragment = self.dont_fragment;
                builder.ip(IpHeaders::Ipv4(header, Default::default()))
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => builder.ipv6(src.octets(), dst.octets(), 61),
            _ => panic!("one family"),
        };
        match self.flags {
            Some(flags) => {
                let mut header = TcpHeader::new(self.src.port(), self.dst.port(), self.seq, 512);
                (header.fin, header.syn) = (flags & FIN != 0, flags & SYN != 0);
                (header.rst, header.ack) = (flags & RST != 0, flags & ACK != 0);
                header.acknowledgment_number = self.ack;
                let mut options = vec![TcpOptionElement::Noop; self.pad];
                options.extend(self.mss.map(TcpOptionElement::MaximumSegmentSize));
                header.set_options(&options).unwrap();
                builder.tcp_header(header).write(&mut frame, &self.payload).unwrap();
            }
            None => {
                let builder = builder.udp(self.src.port(), self.dst.port());
                builder.write(&mut frame, &self.payload).unwrap();
                if self.bare {
                    let at = frame.len() - self.payload.len() - 2;
                    frame[at..at + 2].fill(0);
                }
            }
        }
        frame
    }

    fn by_client(&self) -> Vec<u8> {
        self.frame(CLIENT_MAC, node_mac(0))
    }

    /// In the tunnel from its task's node.
    fn by_task(&self, slot: Slot) -> Vec<u8> {
        let vni = if self.src.is_ipv4() { VNI } else { VNI6 };
        tunneled(&self.frame(task_mac(slot), MESH_MAC), vtep(slot), vni)
    }

    /// Reads what etherparse makes of a frame, with all its checksums.
    fn read(frame: &[u8]) -> Self {
        let sliced = SlicedPacket::from_ethernet(frame).unwrap();
        let (src, dst, dont_fragment) = match sliced.net.as_ref().unwrap() {
            NetSlice::Ipv4(packet) => {
                let header = packet.header().to_header();
                assert_eq!(header.header_checksum, header.calc_header_checksum());
                assert_eq!((header.time_to_live, header.identification), (61, 0x4711));
                (header.source.into(), header.destination.into(), header.dont_fragment)
            }
            NetSlice::Ipv6(packet) => {
                let header = packet.header().to_header();
                (IpAddr::from(header.source), IpAddr::from(header.destination), true)
            }
            NetSlice::Arp(_) => panic!("IP"),
        };
        let end = SocketAddr::new;
        match sliced.transport.as_ref().unwrap() {
            TransportSlice::Tcp(slice) => {
                let header = slice.to_header();
                assert_eq!(header.checksum, checksum(&sliced));
                let bit = |is: bool, bit: u8| if is { bit } else { 0 };
                let flags = bit(header.fin, FIN)
                    | bit(header.syn, SYN)
                    | bit(header.rst, RST)
                    | bit(header.ack, ACK);
                let options: Vec<_> = header.options.elements_iter().map(Result::unwrap).collect();
                let mss = options.iter().find_map(|option| match option {
                    TcpOptionElement::MaximumSegmentSize(mss) => Some(*mss),
                    _ => None,
                });
                Self {
                    src: end(src, header.source_port),
                    dst: end(dst, header.destination_port),
                    flags: Some(flags),
                    seq: header.sequence_number,
                    ack: header.acknowledgment_number,
                    mss,
                    pad: options.iter().take_while(|o| **o == TcpOptionElement::Noop).count(),
                    payload: slice.payload().to_vec(),
                    dont_fragment,
                    bare: false,
                }
            }
            TransportSlice::Udp(slice) => {
                let header = slice.to_header();
                if header.checksum != 0 {
                    assert_eq!(header.checksum, checksum(&sliced));
                }
                Self {
                    bare: header.checksum == 0,
                    dont_fragment,
                    payload: slice.payload().to_vec(),
                    ..udp(end(src, header.source_port), end(dst, header.destination_port))
                }
            }
            other => panic!("{other:?}"),
        }
    }
}

/// What etherparse says a packet's transport checksum should be.
fn checksum(sliced: &SlicedPacket<'_>) -> u16 {
    let transport = sliced.transport.as_ref().unwrap();
    match (sliced.net.as_ref().unwrap(), transport) {
        (NetSlice::Ipv4(ip), TransportSlice::Tcp(tcp)) => {
            tcp.to_header().calc_checksum_ipv4(&ip.header().to_header(), tcp.payload()).unwrap()
        }
        (NetSlice::Ipv6(ip), TransportSlice::Tcp(tcp)) => {
            tcp.to_header().calc_checksum_ipv6(&ip.header().to_header(), tcp.payload()).unwrap()
        }
        (NetSlice::Ipv4(ip), TransportSlice::Udp(udp)) => {
            udp.to_header().calc_checksum_ipv4(&ip.header().to_header(), udp.payload()).unwrap()
        }
        (NetSlice::Ipv6(ip), TransportSlice::Udp(udp)) => {
            udp.to_header().calc_checksum_ipv6(&ip.header().to_header(), udp.payload()).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

/// A frame in a tunnel to this node.
pub fn tunneled(inner: &[u8], from: IpAddr, vni: u32) -> Vec<u8> {
    let mut payload = [&[8, 0, 0, 0][..], &(vni << 8).to_be_bytes()].concat();
    payload.extend(inner);
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 2, 0], node_mac(0));
    match (from, ip(NODE), ip(NODE6)) {
        (IpAddr::V4(from), IpAddr::V4(to), _) => builder
            .ipv4(from.octets(), to.octets(), 64)
            .udp(50_000, 4789)
            .write(&mut frame, &payload)
            .unwrap(),
        (IpAddr::V6(from), _, IpAddr::V6(to)) => builder
            .ipv6(from.octets(), to.octets(), 64)
            .udp(50_000, 4789)
            .write(&mut frame, &payload)
            .unwrap(),
        _ => panic!("the node has an address of each family"),
    }
    frame
}

/// What is in a tunnel: where it goes, its network, and the inner frame.
fn untunneled(frame: &[u8]) -> (IpAddr, u32, Vec<u8>) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(NetSlice::Ipv4(ip)) = &sliced.net else { panic!("IPv4") };
    let header = ip.header().to_header();
    assert_eq!(header.header_checksum, header.calc_header_checksum());
    let Some(TransportSlice::Udp(udp)) = &sliced.transport else { panic!("UDP: {sliced:?}") };
    assert_eq!(udp.to_header().destination_port, 4789);
    let payload = udp.payload();
    assert_eq!(payload[0], 8);
    let vni = u32::from_be_bytes([0, payload[4], payload[5], payload[6]]);
    (header.destination.into(), vni, payload[8..].to_vec())
}

/// What the world of a test is like.
#[derive(Clone)]
struct World {
    /// Slots of tasks that take new connections.
    tasks: Vec<Slot>,
    /// Slots of tasks that can't be reached.
    lost: Vec<Slot>,
    allow: Vec<Prefix>,
    partial_checksums: bool,
    mtu: u16,
    least_connections: bool,
}

impl World {
    fn new(tasks: &[Slot]) -> Self {
        let (allow, partial_checksums, mtu) = (Vec::new(), false, MTU);
        let (tasks, lost) = (tasks.to_vec(), Vec::new());
        Self { tasks, lost, allow, partial_checksums, mtu, least_connections: false }
    }

    fn forwarding(&self) -> Arc<Forwarding> {
        let key = HashKey::from_seed("maglev");
        let mut backends = vec![None; SLOTS];
        let mut tasks = vec![Default::default(); SLOTS];
        let mut services = Vec::new();
        for v6 in [false, true] {
            // Every other slot is of the other family's service.
            let slots: Vec<Slot> =
                self.tasks.iter().map(|slot| 2 * slot + Slot::from(v6)).collect();
            let names: Vec<_> = slots.iter().map(|slot| format!("task-{slot}")).collect();
            let candidates: Vec<_> = slots
                .iter()
                .zip(&names)
                .map(|(&slot, name)| Candidate { name, weight: 1, slot })
                .collect();
            let takers: Vec<_> = slots.iter().map(|&slot| Taker { slot, weight: 1 }).collect();
            let address = if v6 { at(VIP6) } else { at(VIP) };
            let vips = [protocol::TCP, protocol::UDP]
                .map(|protocol| vip(&address.ip().to_string(), protocol, address.port()));
            services.push(Service {
                vips: vips.to_vec(),
                maglev: Arc::new(Maglev::build(Size::new(251).unwrap(), &candidates, &key)),
                schedule: match self.least_connections {
                    true => Schedule::least_connections(&takers),
                    false => Schedule::Maglev,
                },
                resets: false,
                nat: Some(Arc::new(Nat {
                    overlay: u32::from(v6),
                    targets: vec![TARGET; 2],
                    allow: self.allow.clone(),
                })),
            });
            let lost: Vec<Slot> = self.lost.iter().map(|slot| 2 * slot + Slot::from(v6)).collect();
            for &slot in slots.iter().chain(&lost) {
                tasks[slot as usize] = task(slot, v6).ip().into();
                backends[slot as usize] = Some(Backend {
                    service: u32::from(v6),
                    mtu: self.mtu,
                    link: 0,
                    reachable: !lost.contains(&slot),
                    template: Template::render(&Tunnel {
                        src_mac: MacAddr(node_mac(0)),
                        dst_mac: MacAddr([2, 0, 0, 0, 2, slot as u8]),
                        vlans: Vec::new(),
                        src: ip(NODE),
                        dst: vtep(slot),
                        udp_port: 4789,
                        vni: if v6 { VNI6 } else { VNI },
                        inner_dst_mac: MacAddr(task_mac(slot)),
                        inner_src_mac: MacAddr(MESH_MAC),
                        inner_v6: v6,
                        udp_checksum: false,
                    })
                    .unwrap(),
                });
            }
        }
        let overlay = |vni, bank, address: &str| Overlay {
            vni,
            udp_port: 4789,
            mac: MacAddr(MESH_MAC),
            mesh: vec![Mesh { bank, address: ip(address).into() }],
        };
        let common = Common {
            links: vec![Link {
                mac: MacAddr(node_mac(0)),
                partial_checksums: self.partial_checksums,
            }],
            answer_arp: false,
            maglev_key: key,
            overlays: vec![overlay(VNI, 0, MESH), overlay(VNI6, 1, MESH6)],
            tasks,
        };
        Arc::new(Forwarding::new(common, services, backends).unwrap())
    }
}

/// A node with two workers, which share the slots.
struct Node {
    workers: [Worker<SimPort>; 2],
    counters: [Arc<Counters>; 2],
    slots: Arc<Slots>,
    publisher: Publisher<Forwarding>,
    now: Tick,
}

impl Node {
    fn new(world: &World) -> Self {
        Self::with(world, nat::Timeouts::default(), 1024..=65535)
    }

    fn with(world: &World, timeouts: nat::Timeouts, ports: RangeInclusive<u16>) -> Self {
        let mut publisher = Publisher::new(world.forwarding());
        let slots = Arc::new(Slots::new(2, timeouts, ports).unwrap());
        let equipment = Equipment { icmp_errors_per_s: 100, ..Equipment::default() };
        let [(one, by_one), (other, by_other)] = equipment.pair(&mut publisher, &slots);
        let (workers, counters) = ([one, other], [by_one, by_other]);
        let mut node = Self { workers, counters, slots, publisher, now: Tick::from_s(1000) };
        node.turn();
        node
    }

    fn publish(&mut self, world: &World) {
        self.publisher.publish(world.forwarding());
        self.publisher.retire();
    }

    fn turn(&mut self) {
        for worker in &mut self.workers {
            worker.turn(self.now);
            assert_eq!(worker.frames(), 256, "no frame is lost");
        }
    }

    /// Time goes by; what is sent meanwhile.
    fn wait(&mut self, ms: u64) -> Vec<Vec<u8>> {
        let until = self.now + ms;
        let mut sent = Vec::new();
        while self.now < until {
            self.now = self.now + 100.min(until.ms_since(self.now));
            self.turn();
            sent.extend(self.sent());
        }
        sent
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        let mut sent = Vec::new();
        for worker in &mut self.workers {
            while let Some(bytes) = worker.ports_mut()[0].take_sent(<[u8]>::to_vec) {
                sent.push(bytes);
            }
        }
        sent
    }

    /// What a packet to this worker makes leave.
    fn send_to(&mut self, worker: usize, frame: &[u8]) -> Vec<Vec<u8>> {
        assert!(self.workers[worker].ports_mut()[0].deliver_at(HEADROOM, frame));
        self.turn();
        self.sent()
    }

    fn send(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        self.send_to(0, frame)
    }

    /// What a client's packet becomes: the task's slot, and the packet that it gets.
    fn toward_task(&mut self, segment: &Segment) -> (Slot, Segment) {
        let sent = self.send(&segment.by_client());
        let [frame] = &sent[..] else { panic!("{} packets: {:?}", sent.len(), self.drops()) };
        self.unwrap(frame)
    }

    fn unwrap(&self, frame: &[u8]) -> (Slot, Segment) {
        let (to, vni, inner) = untunneled(frame);
        let slot = (0..SLOTS as Slot).find(|slot| vtep(*slot) == to).unwrap();
        let v6 = slot % 2 == 1;
        assert_eq!(vni, if v6 { VNI6 } else { VNI });
        let (ethernet, _) = Ethernet2Header::from_slice(&inner).unwrap();
        assert_eq!((ethernet.source, ethernet.destination), (MESH_MAC, task_mac(slot)));
        let segment = Segment::read(&inner);
        assert_eq!(segment.dst, task(slot, v6));
        assert_eq!(segment.src.ip(), ip(if v6 { MESH6 } else { MESH }));
        (slot, segment)
    }

    /// What a task's answer becomes, whichever worker it comes to.
    fn toward_client(&mut self, slot: Slot, segment: &Segment) -> Segment {
        let sent = self.send_to(1, &segment.by_task(slot));
        let [frame] = &sent[..] else { panic!("{} packets: {:?}", sent.len(), self.drops()) };
        let (ethernet, _) = Ethernet2Header::from_slice(frame).unwrap();
        assert_eq!((ethernet.source, ethernet.destination), (node_mac(0), CLIENT_MAC));
        Segment::read(frame)
    }

    /// All reasons that were ever counted.
    fn drops(&self) -> BTreeMap<&'static str, u64> {
        let count = |reason: &DropReason| self.counters.iter().map(|c| c.drops(*reason)).sum();
        let all = DropReason::ALL.iter().map(|reason| (reason.label(), count(reason)));
        all.filter(|(_, count)| *count > 0).collect()
    }

    fn events(&self, event: Event) -> u64 {
        self.counters.iter().map(|counters| counters.events(event)).sum()
    }

    /// Opens a connection as far as the client's acknowledgement; the task, and who it takes for its client.
    fn connect(&mut self, client: SocketAddr, vip: SocketAddr) -> (Slot, SocketAddr) {
        let (slot, syn) = self.toward_task(&tcp(client, vip, SYN));
        self.toward_client(slot, &tcp(syn.dst, syn.src, SYN | ACK));
        let (same, ack) = self.toward_task(&tcp(client, vip, ACK));
        assert_eq!((same, ack.src), (slot, syn.src));
        (slot, syn.src)
    }

    /// Both sides close a connection, the client first or the task.
    fn close(&mut self, client: SocketAddr, mesh: SocketAddr, slot: Slot, client_first: bool) {
        let by_client = tcp(client, at(VIP), FIN | ACK);
        let by_task = tcp(task(slot, false), mesh, FIN | ACK);
        if client_first {
            self.toward_task(&by_client);
            self.toward_client(slot, &by_task);
        } else {
            self.toward_client(slot, &by_task);
            self.toward_task(&by_client);
        }
    }
}

#[test]
fn a_connection_is_translated_both_ways_and_nothing_else_changes() {
    let mut node = Node::new(&World::new(&[1, 2]));
    for (client, vip) in [(client(40_000), at(VIP)), (client6(40_000), at(VIP6))] {
        let (slot, mesh) = node.connect(client, vip);
        let task = task(slot, vip.is_ipv6());
        for len in [0, 1, 2, 333, 1000] {
            let question = tcp(client, vip, ACK).with_payload(len);
            let (to, got) = node.toward_task(&question);
            assert_eq!((to, got.src, got.dst), (slot, mesh, task));
            assert_eq!(
                (got.payload, got.seq, got.ack),
                (question.payload, question.seq, question.ack)
            );
            let answer = tcp(task, mesh, ACK).with_payload(len);
            let got = node.toward_client(slot, &answer);
            assert_eq!((got.src, got.dst), (vip, client));
            assert_eq!((got.payload, got.seq, got.ack), (answer.payload, answer.seq, answer.ack));
        }
    }
    assert_eq!(node.drops(), BTreeMap::new());
    assert_eq!((node.slots.used(0), node.slots.used(1)), (1, 1));
}

#[test]
fn datagrams_are_translated_with_and_without_a_checksum() {
    let mut node = Node::new(&World::new(&[1, 2]));
    for (client, vip) in [(client(53), at(VIP)), (client6(53), at(VIP6))] {
        for bare in [false, true] {
            if bare && vip.is_ipv6() {
                continue; // RFC 8200 section 8.1
            }
            let question = Segment { bare, ..udp(client, vip) };
            let (slot, got) = node.toward_task(&question);
            assert_eq!((&got.payload, got.bare), (&question.payload, bare));
            let answer = Segment { bare, ..udp(got.dst, got.src).with_payload(77) };
            let back = node.toward_client(slot, &answer);
            assert_eq!((back.src, back.dst, back.bare), (vip, client, bare));
            assert_eq!(back.payload, answer.payload);
        }
    }
}

#[test]
fn a_checksum_that_becomes_zero_is_sent_as_ones() {
    let mut node = Node::new(&World::new(&[1]));
    for (client, vip, at) in [(client(53), at(VIP), 14 + 20), (client6(53), at(VIP6), 14 + 40)] {
        let question = Segment { payload: vec![0, 0], ..udp(client, vip) };
        let sent = node.send(&question.by_client());
        let checksum = untunneled(&sent[0]).2[at + 6..at + 8].to_vec();
        // What is added to the payload is taken from the checksum.
        let question = Segment { payload: checksum, ..question };
        let sent = node.send(&question.by_client());
        let inner = untunneled(&sent[0]).2;
        assert_eq!(inner[at + 6..at + 8], [0xff, 0xff], "zero would mean that there is none");
        assert_eq!(Segment::read(&inner).payload, question.payload);
    }
}

#[test]
fn every_connection_has_a_port_of_its_own() {
    let mut node = Node::new(&World::new(&[1, 2]));
    let mut seen = BTreeSet::new();
    let mut tasks = BTreeSet::new();
    for port in 10_000..12_000 {
        let (slot, syn) = node.toward_task(&tcp(client(port), at(VIP), SYN));
        assert!(seen.insert(syn.src), "{} twice", syn.src);
        tasks.insert(slot);
    }
    assert_eq!((node.slots.used(0), tasks.len()), (2000, 2));
}

#[test]
fn the_fewest_connections_are_those_of_all_workers_that_have_not_ended() {
    let world = World { least_connections: true, ..World::new(&[1, 2, 3]) };
    let mut node = Node::new(&world);
    let mut tasks: BTreeMap<Slot, u32> = BTreeMap::new();
    for port in 0..300 {
        let syn = tcp(client(10_000 + port), at(VIP), SYN).by_client();
        let sent = node.send_to(usize::from(port % 2), &syn);
        *tasks.entry(node.unwrap(&sent[0]).0).or_default() += 1;
    }
    assert_eq!(tasks, BTreeMap::from([(2, 100), (4, 100), (6, 100)]));
    // What one task's clients give up, others get.
    for port in 0..300 {
        let rst = tcp(client(10_000 + port), at(VIP), RST).by_client();
        let sent = node.send_to(usize::from(port % 2), &rst);
        if node.unwrap(&sent[0]).0 != 4 {
            node.send(&tcp(client(10_000 + port), at(VIP), ACK).by_client());
        }
    }
    node.wait(3000);
    for port in 0..100 {
        assert_eq!(node.toward_task(&tcp(client(20_000 + port), at(VIP), SYN)).0, 4);
    }
}

#[test]
fn a_syn_that_is_said_again_keeps_its_port() {
    let mut node = Node::new(&World::new(&[1, 2]));
    let syn = tcp(client(40_000), at(VIP), SYN);
    let (slot, first) = node.toward_task(&syn);
    node.wait(3000);
    let (same, second) = node.toward_task(&syn);
    assert_eq!((slot, first.src), (same, second.src));
}

#[test]
fn packets_of_one_new_flow_that_come_together_share_its_port() {
    let mut node = Node::new(&World::new(&[1, 2]));
    for segment in [udp(client(53), at(VIP)), tcp(client(40_000), at(VIP), SYN)] {
        let before = node.slots.used(0);
        for _ in 0..3 {
            let port = &mut node.workers[0].ports_mut()[0];
            assert!(port.deliver_at(HEADROOM, &segment.by_client()));
        }
        node.turn();
        let sent: Vec<_> = node.sent().iter().map(|frame| node.unwrap(frame)).collect();
        assert_eq!(sent.len(), 3);
        assert!(sent.iter().all(|(slot, got)| (*slot, got.src) == (sent[0].0, sent[0].1.src)));
        assert_eq!(node.slots.used(0), before + 1);
    }
}

#[test]
fn the_mss_is_lowered_to_what_the_tunnel_carries_both_ways() {
    let mut node = Node::new(&World::new(&[1]));
    for (client, vip, most) in [(client(40_000), at(VIP), 1410), (client6(40_000), at(VIP6), 1390)]
    {
        for (pad, mss, expected) in
            [(0, 1460, most), (1, 8960, most), (2, 1461, most), (3, 1000, 1000), (0, most, most)]
        {
            let syn = Segment { mss: Some(mss), pad, ..tcp(client, vip, SYN) };
            let (slot, got) = node.toward_task(&syn);
            assert_eq!((got.mss, got.pad), (Some(expected), pad));
            let answer = Segment { mss: Some(mss), pad, ..tcp(got.dst, got.src, SYN | ACK) };
            assert_eq!(node.toward_client(slot, &answer).mss, Some(expected));
        }
    }
}

#[test]
fn a_tagged_client_gets_tagged_answers() {
    let mut node = Node::new(&World::new(&[1]));
    let syn = tcp(client(40_000), at(VIP), SYN).by_client();
    for vlans in [&[5][..], &[7, 9]] {
        let sent = node.send(&tag(&syn, vlans));
        let (slot, got) = node.unwrap(&sent[0]);
        let sent = node.send_to(1, &tcp(got.dst, got.src, SYN | ACK).by_task(slot));
        let expected =
            Segment { seq: 1_000_000, ack: 7_000_000, ..tcp(at(VIP), client(40_000), SYN | ACK) };
        let expected = tag(&expected.frame(node_mac(0), CLIENT_MAC), vlans);
        assert_eq!(sent[0], expected);
        node.send(&tag(&tcp(client(40_000), at(VIP), RST).by_client(), vlans));
        node.wait(3000);
    }
}

#[test]
fn answers_follow_a_client_whose_router_was_replaced() {
    let mut node = Node::new(&World::new(&[1]));
    let (slot, mesh) = node.connect(client(40_000), at(VIP));
    let other = [2, 0, 0, 0, 0, 0xdd];
    node.send(&tcp(client(40_000), at(VIP), ACK).frame(other, node_mac(0)));
    let sent = node.send(&tcp(task(slot, false), mesh, ACK).by_task(slot));
    assert_eq!(sent[0][..6], other);
}

#[test]
fn checksums_left_to_a_network_card_are_completed_both_ways() {
    let world = World { partial_checksums: true, ..World::new(&[1]) };
    let mut node = Node::new(&world);
    // The field holds the pseudo header's sum, as a sender on this machine leaves it.
    let partial = |frame: &[u8]| {
        let mut frame = frame.to_vec();
        let is_tcp = frame[23] == protocol::TCP;
        let len = (frame.len() - 34) as u16;
        let pseudo = [&frame[26..34], &[0, frame[23]], &len.to_be_bytes()].concat();
        let at = 34 + if is_tcp { 16 } else { 6 };
        frame[at..at + 2].copy_from_slice(&naive_sum(&pseudo).to_be_bytes());
        frame
    };
    for segment in [tcp(client(40_000), at(VIP), SYN), udp(client(40_001), at(VIP))] {
        let sent = node.send(&partial(&segment.by_client()));
        let (slot, got) = node.unwrap(&sent[0]); // its checksum is right
        assert_eq!(got.payload, segment.payload);
        let answer = Segment { src: got.dst, dst: got.src, ..segment.clone() }.with_payload(50);
        let inner = partial(&answer.frame(task_mac(slot), MESH_MAC));
        let sent = node.send(&tunneled(&inner, vtep(slot), VNI));
        assert_eq!(Segment::read(&sent[0]).payload, answer.payload);
    }
    assert_eq!(node.events(Event::ChecksumsCompleted), 4);
}

/// An ICMP error from `from` about a packet that went out in this frame.
fn error_about(frame: &[u8], from: &str, to: IpAddr, v6: bool, stations: [[u8; 6]; 2]) -> Vec<u8> {
    let quote = &frame[14..frame.len().min(14 + 548)];
    let [source, destination] = stations;
    let mut error = Vec::new();
    let builder = PacketBuilder::ethernet2(source, destination);
    match (ip(from), to) {
        (IpAddr::V4(from), IpAddr::V4(to)) if !v6 => builder
            .ipv4(from.octets(), to.octets(), 60)
            .icmpv4(Icmpv4Type::DestinationUnreachable(
                etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded {
                    next_hop_mtu: 1300,
                },
            ))
            .write(&mut error, quote)
            .unwrap(),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder
            .ipv6(from.octets(), to.octets(), 60)
            .icmpv6(Icmpv6Type::PacketTooBig { mtu: 1300 })
            .write(&mut error, quote)
            .unwrap(),
        _ => panic!("one family"),
    }
    error
}

/// Who an ICMP error is from and to, and the packet that it quotes, as a frame. Its checksums are right.
fn quoted(frame: &[u8], v6: bool) -> (IpAddr, IpAddr, Vec<u8>) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let (source, destination, message) = match (&sliced.net, &sliced.transport) {
        (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Icmpv4(icmp))) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(naive_sum(icmp.slice()), 0xffff);
            (header.source.into(), header.destination.into(), icmp.slice())
        }
        (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Icmpv6(icmp))) => {
            let header = ip.header().to_header();
            assert!(icmp.is_checksum_valid(header.source, header.destination));
            (IpAddr::from(header.source), IpAddr::from(header.destination), icmp.slice())
        }
        other => panic!("{other:?}"),
    };
    let mut link = Vec::new();
    let ether_type = if v6 { EtherType::IPV6 } else { EtherType::IPV4 };
    Ethernet2Header { source: [0; 6], destination: [0; 6], ether_type }.write(&mut link).unwrap();
    (source, destination, [&link, &message[8..]].concat())
}

#[test]
fn an_icmp_error_is_translated_with_what_it_quotes() {
    let mut node = Node::new(&World::new(&[1]));
    for v6 in [false, true] {
        for stream in [true, false] {
            let (client, vip) =
                if v6 { (client6(40_000), at(VIP6)) } else { (client(40_000), at(VIP)) };
            let segment = |src, dst| match stream {
                true => tcp(src, dst, ACK).with_payload(100),
                false => udp(src, dst),
            };
            let (slot, mesh) = match stream {
                true => node.connect(client, vip),
                false => {
                    let (slot, got) = node.toward_task(&segment(client, vip));
                    (slot, got.src)
                }
            };
            let task = task(slot, v6);
            // A router on the client's side complains about the VIP's answer.
            let answer = segment(vip, client).frame(node_mac(0), CLIENT_MAC);
            let router = if v6 { "2001:db8:100::1" } else { "192.0.2.99" };
            let error = error_about(&answer, router, vip.ip(), v6, [CLIENT_MAC, node_mac(0)]);
            let sent = node.send(&error);
            let (to, _, inner) = untunneled(&sent[0]);
            assert_eq!(to, vtep(slot));
            let (source, destination, quote) = quoted(&inner, v6);
            assert_eq!((source, destination), (mesh.ip(), task.ip()));
            let quote = Segment::read(&quote);
            assert_eq!((quote.src, quote.dst), (task, mesh));
            // A router in the overlay, or the task itself, complains about the client's packet.
            let question = segment(mesh, task).frame(MESH_MAC, task_mac(slot));
            let from = task.ip().to_string();
            let error = error_about(&question, &from, mesh.ip(), v6, [task_mac(slot), MESH_MAC]);
            let vni = if v6 { VNI6 } else { VNI };
            let sent = node.send(&tunneled(&error, vtep(slot), vni));
            let (source, destination, quote) = quoted(&sent[0], v6);
            assert_eq!((source, destination), (vip.ip(), client.ip()));
            let quote = Segment::read(&quote);
            assert_eq!((quote.src, quote.dst), (client, vip));
        }
    }
    assert_eq!(node.events(Event::IcmpErrorsForwarded), 8);
    assert_eq!(node.drops(), BTreeMap::new());
}

#[test]
fn an_icmp_error_with_a_wrong_checksum_or_about_nothing_is_dropped() {
    let mut node = Node::new(&World::new(&[1]));
    node.connect(client(40_000), at(VIP));
    let about = |port| {
        let answer = tcp(at(VIP), client(port), ACK).frame(node_mac(0), CLIENT_MAC);
        error_about(&answer, "192.0.2.99", at(VIP).ip(), false, [CLIENT_MAC, node_mac(0)])
    };
    let mut wrong = about(40_000);
    wrong[40] ^= 1;
    assert!(node.send(&wrong).is_empty());
    assert!(node.send(&about(40_001)).is_empty());
    assert_eq!(node.drops(), BTreeMap::from([("unknown_protocol", 1), ("icmp_unmatched", 1)]));
}

#[test]
fn what_belongs_to_no_connection_is_reset() {
    let mut node = Node::new(&World::new(&[1]));
    let lost = tcp(client(40_000), at(VIP), ACK).with_payload(10);
    let sent = node.send(&lost.by_client());
    let frame = sent[0].clone();
    let reset = read_reset(&frame);
    // RFC 9293 section 3.10.7.1: what the sender says it expects next.
    assert_eq!((reset.src, reset.dst), (at(VIP), client(40_000)));
    assert_eq!((reset.flags, reset.seq, reset.ack), (Some(RST), lost.ack, 0));
    let sent = node.send(&tcp(client(40_000), at(VIP), FIN).with_payload(10).by_client());
    let reset = read_reset(&sent[0]);
    assert_eq!((reset.flags, reset.seq, reset.ack), (Some(RST | ACK), 0, 1_000_011));
    assert!(node.send(&tcp(client(40_000), at(VIP), RST).by_client()).is_empty());
    assert_eq!(node.drops(), BTreeMap::from([("nat_no_connection", 3)]));
    assert_eq!(node.events(Event::ResetsSent), 2);
}

/// A reset is written by us, with other values in its IP header than the tests' packets have.
fn read_reset(frame: &[u8]) -> Segment {
    let mut frame = frame.to_vec();
    if frame[12..14] == [8, 0] {
        let mut header = etherparse::Ipv4Header::from_slice(&frame[14..]).unwrap().0;
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        (header.time_to_live, header.identification) = (61, 0x4711);
        header.header_checksum = header.calc_header_checksum();
        frame[14..34].copy_from_slice(&header.to_bytes());
    }
    Segment::read(&frame)
}

#[test]
fn a_client_whose_task_is_gone_is_reset_when_it_speaks() {
    let mut node = Node::new(&World::new(&[1, 2]));
    let (slot, mesh) = node.connect(client(40_000), at(VIP));
    let left = World::new(&[if slot == 2 { 2 } else { 1 }]);
    node.publish(&left);
    let question = tcp(client(40_000), at(VIP), ACK).with_payload(5);
    let sent = node.send(&question.by_client());
    assert_eq!(read_reset(&sent[0]).flags, Some(RST));
    assert_eq!(node.drops(), BTreeMap::from([("no_backend", 1)]));
    // A new one goes to the task that is left, by another port.
    let (other, syn) = node.toward_task(&tcp(client(40_000), at(VIP), SYN));
    assert_ne!((other, syn.src), (slot, mesh));
}

#[test]
fn all_clients_of_a_task_that_is_gone_are_told_at_once() {
    let mut node = Node::new(&World::new(&[1]));
    let clients: Vec<_> = (0..600).map(|i| client(20_000 + i)).collect();
    for client in &clients {
        node.connect(*client, at(VIP));
    }
    node.publish(&World::new(&[2]));
    for client in clients {
        let sent = node.send(&tcp(client, at(VIP), ACK).by_client());
        assert!(sent.iter().any(|frame| read_reset(frame).flags == Some(RST)), "{client}");
    }
}

#[test]
fn a_client_that_waits_for_a_task_that_is_gone_is_asked_and_reset() {
    let mut node = Node::new(&World::new(&[1]));
    node.connect(client(40_000), at(VIP));
    node.wait(10_000);
    node.publish(&World::new(&[2]));
    let sent = node.wait(1000);
    let asked = read_reset(&sent[0]);
    assert_eq!((asked.src, asked.dst, asked.flags), (at(VIP), client(40_000), Some(ACK)));
    assert_eq!(sent[0][..12], [CLIENT_MAC, node_mac(0)].concat());
    // It says where it is, and is told.
    let sent = node.send(&tcp(client(40_000), at(VIP), ACK).by_client());
    let reset = read_reset(&sent[0]);
    assert_eq!((reset.flags, reset.seq), (Some(RST), 7_000_000));
    assert_eq!(node.wait(10_000), Vec::<Vec<u8>>::new(), "it is asked no more");
    assert_eq!(node.slots.used(0), 0);
}

#[test]
fn a_client_that_does_not_answer_is_not_asked_for_ever() {
    let mut node = Node::new(&World::new(&[1]));
    node.connect(client(40_000), at(VIP));
    node.publish(&World::new(&[2]));
    let asked = node.wait(60_000).len() as u64;
    assert!((3..10).contains(&asked), "{asked}");
    assert_eq!(node.events(Event::ClientsAsked), asked);
}

#[test]
fn datagrams_go_elsewhere_at_once_when_their_task_is_gone() {
    let mut node = Node::new(&World::new(&[1]));
    let (_, first) = node.toward_task(&udp(client(53), at(VIP)));
    node.publish(&World::new(&[2]));
    let (slot, second) = node.toward_task(&udp(client(53), at(VIP)));
    assert_eq!(slot, 4);
    assert_ne!(first.src, second.src);
    assert_eq!(node.drops(), BTreeMap::new());
}

#[test]
fn a_client_that_its_task_never_answered_is_given_another_once_the_task_cannot_be_reached() {
    let mut node = Node::new(&World::new(&[1]));
    let syn = tcp(client(40_000), at(VIP), SYN);
    node.toward_task(&syn);
    let (answered, _) = node.connect(client(40_001), at(VIP));
    node.publish(&World { lost: vec![1], ..World::new(&[2]) });
    assert_eq!(node.toward_task(&syn).0, 4, "said again, it goes to who is there");
    assert!(node.send(&tcp(client(40_001), at(VIP), ACK).by_client()).is_empty());
    assert_eq!(node.drops(), BTreeMap::from([("next_hop_unresolved", 1)]), "TCP waits");
    node.publish(&World::new(&[1, 2]));
    assert_eq!(node.toward_task(&tcp(client(40_001), at(VIP), ACK)).0, answered);
}

#[test]
fn while_no_task_can_be_reached_a_client_has_one_port() {
    let mut node = Node::new(&World { lost: vec![1], ..World::new(&[1]) });
    for segment in [udp(client(53), at(VIP)), tcp(client(40_000), at(VIP), SYN)] {
        let before = node.slots.used(0);
        for _ in 0..100 {
            assert!(node.send(&segment.by_client()).is_empty());
        }
        assert_eq!(node.slots.used(0), before + 1);
    }
    assert_eq!(node.drops(), BTreeMap::from([("next_hop_unresolved", 200)]));
}

#[test]
fn only_allowed_clients_are_served() {
    let address = ip("198.51.100.0").into();
    let world = World { allow: vec![Prefix { address, len: 96 + 24 }], ..World::new(&[1]) };
    let mut node = Node::new(&world);
    node.toward_task(&tcp(client(40_000), at(VIP), SYN));
    let stranger = SocketAddr::new(ip("198.51.101.7"), 40_000);
    assert!(node.send(&tcp(stranger, at(VIP), SYN).by_client()).is_empty());
    assert!(node.send(&udp(stranger, at(VIP)).by_client()).is_empty());
    assert_eq!(node.drops(), BTreeMap::from([("not_allowed", 2)]));
    assert_eq!(node.slots.used(0), 1);
}

#[test]
fn only_a_connections_own_task_can_answer() {
    let mut node = Node::new(&World::new(&[1, 2]));
    let (slot, mesh) = node.connect(client(40_000), at(VIP));
    let other = if slot == 2 { 4 } else { 2 };
    let answer = tcp(task(slot, false), mesh, ACK);
    let inner = answer.frame(task_mac(slot), MESH_MAC);
    // From another node, or from nobody's.
    assert!(node.send(&tunneled(&inner, vtep(other), VNI)).is_empty());
    assert!(node.send(&tunneled(&inner, ip("192.0.2.200"), VNI)).is_empty());
    assert_eq!(node.drops(), BTreeMap::from([("spoofed_tunnel", 2)]));
    // Another task, another port, another protocol, another of our ports, another network.
    let wrong = [
        tcp(task(other, false), mesh, ACK),
        tcp(SocketAddr::new(task(slot, false).ip(), 81), mesh, ACK),
        udp(task(slot, false), mesh),
        tcp(task(slot, false), SocketAddr::new(mesh.ip(), mesh.port() ^ 1), ACK),
    ];
    for segment in wrong {
        assert!(node.send(&segment.by_task(slot)).is_empty());
    }
    assert!(node.send(&tunneled(&inner, vtep(slot), VNI + 7)).is_empty());
    assert_eq!(node.drops()["nat_unmatched"], 5);
    node.toward_client(slot, &answer);
}

#[test]
fn when_all_ports_are_used_old_connections_go_on_and_new_ones_are_refused() {
    let world = World::new(&[1]);
    let mut node = Node::with(&world, nat::Timeouts::default(), 2000..=2099);
    let clients: Vec<_> = (0..100).map(|i| client(30_000 + i)).collect();
    let connected: Vec<_> = clients.iter().map(|c| node.connect(*c, at(VIP))).collect();
    for extra in 0..50 {
        assert!(node.send(&tcp(client(50_000 + extra), at(VIP), SYN).by_client()).is_empty());
    }
    assert_eq!(node.drops(), BTreeMap::from([("nat_exhausted", 50)]));
    for (client, (slot, mesh)) in clients.iter().zip(&connected) {
        assert!((2000..=2099).contains(&mesh.port()));
        let (same, got) = node.toward_task(&tcp(*client, at(VIP), ACK).with_payload(3));
        assert_eq!((same, got.src), (*slot, *mesh));
        assert_eq!(node.toward_client(*slot, &tcp(got.dst, got.src, ACK)).dst, *client);
    }
    node.send(&tcp(clients[0], at(VIP), RST).by_client());
    node.wait(3000);
    assert_eq!(node.connect(client(50_000), at(VIP)).1, connected[0].1, "the port that was freed");
}

#[test]
fn a_port_rests_as_long_as_late_packets_may_come() {
    for (client_first, free_after_ms, taken_ms) in [(true, 3000, 500), (false, 62_000, 58_000)] {
        let mut node = Node::new(&World::new(&[1]));
        let (slot, mesh) = node.connect(client(40_000), at(VIP));
        node.close(client(40_000), mesh, slot, client_first);
        node.wait(taken_ms);
        assert_eq!(node.slots.used(0), 1, "{client_first}");
        node.wait(free_after_ms - taken_ms);
        assert_eq!(node.slots.used(0), 0, "{client_first}");
    }
}

#[test]
fn a_client_can_use_its_port_again_at_once() {
    let mut node = Node::new(&World::new(&[1]));
    for client_first in [true, false] {
        let (slot, mesh) = node.connect(client(40_000), at(VIP));
        node.close(client(40_000), mesh, slot, client_first);
        let (_, again) = node.connect(client(40_000), at(VIP));
        assert_ne!(mesh, again, "the task may remember the other");
        node.close(client(40_000), again, slot, client_first);
    }
}

#[test]
fn an_idle_connection_lives_for_hours() {
    let mut node = Node::new(&World::new(&[1]));
    let (slot, mesh) = node.connect(client(40_000), at(VIP));
    for _ in 0..3 {
        node.wait(3 * 3600 * 1000 + 1_800_000);
        assert_eq!(node.toward_task(&tcp(client(40_000), at(VIP), ACK)).1.src, mesh);
    }
    let answer = tcp(task(slot, false), mesh, ACK);
    node.toward_client(slot, &answer);
    node.wait(4 * 3600 * 1000 + 5000);
    assert_eq!(node.slots.used(0), 0);
    assert!(node.send(&answer.by_task(slot)).is_empty());
}

#[test]
fn a_question_with_one_answer_has_its_port_for_less_long_than_a_conversation() {
    let mut node = Node::new(&World::new(&[1]));
    let question = udp(client(53), at(VIP));
    let (slot, got) = node.toward_task(&question);
    node.toward_client(slot, &udp(got.dst, got.src));
    node.wait(28_000);
    assert_eq!(node.toward_task(&question).1.src, got.src);
    node.wait(290_000);
    assert_eq!(node.toward_task(&question).1.src, got.src, "it has asked again");
    node.toward_task(&udp(client(54), at(VIP)));
    node.wait(33_000);
    assert_eq!(node.slots.used(0), 1);
}

#[test]
fn a_reset_that_nobody_believes_ends_nothing() {
    let mut node = Node::new(&World::new(&[1]));
    let (_, mesh) = node.connect(client(40_000), at(VIP));
    node.send(&tcp(client(40_000), at(VIP), RST).by_client());
    node.wait(500);
    node.toward_task(&tcp(client(40_000), at(VIP), ACK).with_payload(3));
    node.wait(60_000);
    assert_eq!(node.toward_task(&tcp(client(40_000), at(VIP), ACK)).1.src, mesh);
}

#[test]
fn what_does_not_fit_the_tunnel_is_told_or_cut() {
    let mut node = Node::new(&World::new(&[1]));
    node.connect(client(40_000), at(VIP));
    let big = tcp(client(40_000), at(VIP), ACK).with_payload(1440);
    let sent = node.send(&big.by_client());
    let (source, destination, quote) = quoted(&sent[0], false);
    assert_eq!((source, destination), (at(VIP).ip(), client(40_000).ip()));
    assert_eq!(quote[14..42], big.by_client()[14..42], "as the client knows it");
    assert_eq!(sent[0][40..42], MTU.to_be_bytes());
    let cut = Segment { dont_fragment: false, ..udp(client(53), at(VIP)).with_payload(1440) };
    let sent = node.send(&cut.by_client());
    assert_eq!(sent.len(), 2);
    let inner: Vec<_> = sent.iter().map(|frame| untunneled(frame).2).collect();
    let ip_of = |frame: &[u8]| etherparse::Ipv4Header::from_slice(&frame[14..]).unwrap().0;
    for frame in &inner {
        let header = ip_of(frame);
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!(IpAddr::from(header.source), ip(MESH));
        assert!(header.total_len <= MTU);
    }
    // Put together again, it is whole.
    let mut whole = inner[0].clone();
    whole.extend(&inner[1][34..34 + usize::from(ip_of(&inner[1]).total_len) - 20]);
    let mut header = ip_of(&inner[0]);
    (header.total_len, header.more_fragments) = ((whole.len() - 14) as u16, false);
    header.header_checksum = header.calc_header_checksum();
    whole[14..34].copy_from_slice(&header.to_bytes());
    assert_eq!(Segment::read(&whole).payload, cut.payload);
}

#[test]
fn who_asks_in_a_tunnel_for_our_address_is_told() {
    let mut node = Node::new(&World::new(&[1]));
    let request = arp_request([10, 0, 0, 102], MESH);
    let sent = node.send(&tunneled(&request, vtep(2), VNI));
    let (to, vni, inner) = untunneled(&sent[0]);
    assert_eq!((to, vni), (vtep(2), VNI));
    assert_eq!(sent[0][..12], [[2, 0, 0, 0, 2, 0], node_mac(0)].concat());
    assert_eq!(inner[6..12], MESH_MAC);
    assert_eq!(inner[20..22], [0, 2], "a reply");
    assert_eq!(inner[22..28], MESH_MAC);
    assert_eq!(inner[28..32], [10, 0, 0, 5]);
    assert!(
        node.send(&tunneled(&arp_request([10, 0, 0, 102], "10.0.0.6"), vtep(2), VNI)).is_empty()
    );
    for with_option in [true, false] {
        let request = solicitation("fd00::1:3", MESH6, with_option, 255);
        let sent = node.send(&tunneled(&request, vtep(3), VNI6));
        let (to, vni, inner) = untunneled(&sent[0]);
        assert_eq!((to, vni), (vtep(3), VNI6));
        let sliced = SlicedPacket::from_ethernet(&inner).unwrap();
        let Some(NetSlice::Ipv6(ip)) = &sliced.net else { panic!("IPv6") };
        let Some(TransportSlice::Icmpv6(icmp)) = &sliced.transport else { panic!("ICMPv6") };
        let header = ip.header().to_header();
        assert!(icmp.is_checksum_valid(header.source, header.destination));
        assert_eq!((icmp.slice()[0], &icmp.slice()[26..32]), (136, &MESH_MAC[..]));
    }
}

#[test]
fn who_asks_in_a_tunnel_with_more_options_than_our_answer_has_is_told() {
    let mut node = Node::new(&World::new(&[1]));
    let mut request = solicitation("fd00::1:3", MESH6, true, 255);
    add_nonce(&mut request);
    let sent = node.send(&tunneled(&request, vtep(3), VNI6));
    let (_, _, inner) = untunneled(&sent[0]);
    assert_eq!((inner.len(), inner[54]), (14 + 40 + 32, 136));
    let longest = node.send(&tunneled(&solicitation("fd00::1:3", MESH6, true, 255), vtep(3), VNI6));
    assert_eq!(sent, longest);
}

#[test]
fn what_a_tunnel_brings_that_is_none_of_ours_is_dropped() {
    let mut node = Node::new(&World::new(&[1]));
    let (slot, mesh) = node.connect(client(40_000), at(VIP));
    let good = tcp(task(slot, false), mesh, ACK).with_payload(40).by_task(slot);
    node.send(&good);
    let before: u64 = node.drops().values().sum();
    let mut without_vni = good.clone();
    without_vni[42] = 0;
    assert!(node.send(&without_vni).is_empty());
    // Cut anywhere, it is never more than dropped.
    for len in 14..good.len() {
        let mut cut = good[..len].to_vec();
        let outer = (len - 14) as u16;
        if len >= 34 {
            cut[16..18].copy_from_slice(&outer.to_be_bytes());
        }
        assert!(node.send(&cut).is_empty(), "{len}");
    }
    let dropped: u64 = node.drops().values().sum();
    assert_eq!(dropped - before, (good.len() - 14 + 1) as u64);
    node.toward_client(slot, &tcp(task(slot, false), mesh, ACK));
}

#[test]
fn a_tunnel_is_opened_whatever_its_headers_look_like() {
    let mut node = Node::new(&World::new(&[1]));
    let (slot, mesh) = node.connect(client(40_000), at(VIP));
    let plain = tcp(task(slot, false), mesh, ACK).with_payload(40).by_task(slot);
    let expected = node.send(&plain);
    assert_eq!(expected.len(), 1);
    let changed = |at: usize, byte: u8| {
        let mut frame = plain.clone();
        frame[at] = byte;
        frame
    };
    let longer = (plain.len() - 14 + 4) as u16;
    let mut with_option = changed(14, 0x46);
    with_option[16..18].copy_from_slice(&longer.to_be_bytes());
    with_option.splice(34..34, [1; 4]);
    let padded = [&plain[..], &[0xee; 20]].concat();
    let reserved_bits = changed(42, 0xff);
    for frame in [with_option, padded, reserved_bits, tag(&plain, &[5]), tag(&plain, &[5, 6])] {
        assert_eq!(node.send(&frame), expected);
    }
    assert_eq!(node.drops(), BTreeMap::new());
    // For another station, of another kind, to another port.
    for (frame, reason) in [
        (changed(5, 0x99), "not_for_us"),
        (changed(20, 0x20), "fragment"),
        (changed(36, 0x99), "no_service"),
        (changed(42, 0xf7), "nat_unmatched"),
    ] {
        assert!(node.send(&frame).is_empty());
        assert_eq!(node.drops().get(reason), Some(&1), "{reason}");
    }
}

/// What happens in a random life of a node.
#[derive(Clone, Debug)]
enum Step {
    /// A client's packet, of one of few flows, to one of the workers.
    Client {
        flow: u8,
        flags: u8,
        worker: usize,
    },
    /// A task's answer to what was last seen of a flow.
    Task {
        flow: u8,
        flags: u8,
        worker: usize,
    },
    Wait(u64),
    /// Other tasks take new connections, and those that are not among them are gone.
    Publish(Vec<Slot>),
}

fn step() -> impl Strategy<Value = Step> {
    let flags = prop_oneof![
        4 => Just(ACK), 4 => Just(SYN), 2 => Just(FIN | ACK), 1 => Just(RST), 1 => Just(SYN | ACK)
    ];
    let any = (0_u8..12, flags, 0..2_usize);
    prop_oneof![
        6 => any.clone().prop_map(|(flow, flags, worker)| Step::Client { flow, flags, worker }),
        6 => any.prop_map(|(flow, flags, worker)| Step::Task { flow, flags, worker }),
        2 => prop_oneof![1_u64..900, 900_u64..3000, 30_000_u64..70_000].prop_map(Step::Wait),
        1 => prop::sample::subsequence(vec![1, 2, 3], 1..=3).prop_map(Step::Publish),
    ]
}

/// What the test knows of a flow: who serves it, and as whom.
#[derive(Clone, Copy, Debug)]
struct Known {
    slot: Slot,
    mesh: SocketAddr,
    /// When it was last seen, in milliseconds, and whether anything of its end was.
    at: Tick,
    ended: bool,
    answered: bool,
    /// The client has spoken after an answer.
    established: bool,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The oracle knows only promises: a live connection keeps its task and its port, no two have one port,
    /// what comes back goes to the right client, and nothing comes of what belongs to none.
    #[test]
    fn whatever_happens_a_live_connection_keeps_its_task_and_port(
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut node = Node::with(&World::new(&[1, 2, 3]), nat::Timeouts::default(), 3000..=3015);
        let mut known: BTreeMap<u8, Known> = BTreeMap::new();
        let mut tasks: Vec<Slot> = vec![1, 2, 3];
        for step in steps {
            match step {
                Step::Wait(ms) => {
                    for frame in node.wait(ms) {
                        prop_assert_eq!(read_reset(&frame).flags, Some(ACK), "only questions");
                    }
                }
                Step::Publish(now) => {
                    node.publish(&World::new(&now));
                    // What was a task's connection may end, even if it comes back.
                    known.values_mut().for_each(|k| k.ended |= !now.contains(&(k.slot / 2)));
                    tasks = now;
                    node.turn();
                    node.sent();
                }
                Step::Client { flow, flags, worker } => {
                    // Every third flow is UDP's.
                    let from = client(20_000 + u16::from(flow));
                    let stream = flow % 3 != 0;
                    let segment =
                        if stream { tcp(from, at(VIP), flags) } else { udp(from, at(VIP)) };
                    let sent = node.send_to(worker, &segment.by_client());
                    let before = known.get(&flow).copied();
                    let lives = before.filter(|k| {
                        let idle = node.now.ms_since(k.at);
                        let serves = tasks.contains(&(k.slot / 2));
                        let most = match (stream, k.established) {
                            (false, true) => 290_000,
                            (true, true) => 3_600_000,
                            (_, false) => 29_000,
                        };
                        serves && !k.ended && idle < most
                    });
                    let Some(frame) = sent.first() else { continue };
                    if frame[..6] == CLIENT_MAC {
                        let reset = read_reset(frame);
                        prop_assert!(reset.flags.unwrap() & RST != 0);
                        prop_assert!(lives.is_none(), "a live connection was reset: {:?}", lives);
                        known.remove(&flow);
                        continue;
                    }
                    let (slot, got) = node.unwrap(frame);
                    prop_assert!(tasks.contains(&(slot / 2)), "a task that is gone");
                    if let Some(k) = lives {
                        prop_assert_eq!((slot, got.src), (k.slot, k.mesh), "flow {}", flow);
                    }
                    for (other, k) in &known {
                        prop_assert!(
                            *other == flow || k.mesh != got.src || k.ended
                                || !tasks.contains(&(k.slot / 2))
                                || node.now.ms_since(k.at) > 29_000,
                            "flows {} and {} share {}", flow, other, got.src
                        );
                    }
                    let same = before.filter(|k| k.mesh == got.src && k.slot == slot);
                    let ends = stream && flags & (FIN | RST) != 0;
                    known.insert(flow, Known {
                        slot,
                        mesh: got.src,
                        at: node.now,
                        ended: ends || same.is_some_and(|k| k.ended),
                        answered: lives.is_some_and(|k| k.answered),
                        established: lives.is_some_and(|k| k.answered),
                    });
                }
                Step::Task { flow, flags, worker } => {
                    let Some(k) = known.get(&flow).copied() else { continue };
                    let stream = flow % 3 != 0;
                    let from = task(k.slot, false);
                    let segment =
                        if stream { tcp(from, k.mesh, flags) } else { udp(from, k.mesh) };
                    let sent = node.send_to(worker, &segment.by_task(k.slot));
                    let Some(frame) = sent.first() else { continue };
                    let got = Segment::read(frame);
                    prop_assert_eq!(got.src, at(VIP));
                    let recent = node.now.ms_since(k.at) < 1000;
                    if recent && !k.ended {
                        prop_assert_eq!(got.dst, client(20_000 + u16::from(flow)));
                    }
                    if got.dst == client(20_000 + u16::from(flow)) {
                        let known = known.get_mut(&flow).unwrap();
                        known.at = node.now;
                        known.ended |= stream && flags & (FIN | RST) != 0;
                        known.answered = true;
                    }
                }
            }
            let used = node.slots.used(0);
            prop_assert!(used <= 16);
            let live: Vec<Id> = node.slots.connections().map(|(id, ..)| id).collect();
            prop_assert_eq!(live.len(), used);
        }
    }
}

fn any_steps() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let choice = prop_oneof![3 => 0_u8..5, 4 => 5_u8..10, 6 => 10_u8..16];
    let byte = prop_oneof![2 => Just(0), 3 => any::<u8>()];
    let step = (choice, any::<u8>(), prop::collection::vec(byte, 0..24));
    let step = step.prop_map(|(choice, place, rest)| [vec![choice | place & 0x70], rest].concat());
    prop::collection::vec(step, 1..100)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn whatever_clients_and_tasks_send_each_gets_its_own(
        node in 0_usize..4, steps in any_steps(),
    ) {
        NODES.with_borrow_mut(|nodes| {
            nodes.live(node, |node, worlds| {
                steps.iter().for_each(|bytes| hostile::step(node, &mut Script(bytes), worlds));
            });
        });
    }
}

thread_local! {
    static NODES: RefCell<hostile::Nodes> = RefCell::new(hostile::Nodes::new());
}

#[test]
fn whatever_comes_from_either_side_the_node_does_as_the_reference() {
    let nodes = AssertUnwindSafe(RefCell::new(hostile::Nodes::new()));
    bolero::check!().for_each(move |input: &[u8]| {
        let mut script = Script(input);
        let which = usize::from(script.byte()) % 4;
        nodes.borrow_mut().live(which, |node, worlds| {
            for _ in 0..200 {
                if !script.is_over() {
                    hostile::step(node, &mut script, worlds);
                }
            }
        });
    });
}
