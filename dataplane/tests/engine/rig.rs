//! A mesh node in memory: a worker over ports of `sim`, and the network around it.
//!
//! What always holds is asserted after every turn here, so that no test can forget it; and that the turn
//! did what the reference allows.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
};

use dataplane::{
    connections::{Connections, Reader, Timeouts},
    counters::{Counters, DropReason, Event},
    encap::{Template, Tunnel},
    flow::{Address, HashKey, protocol},
    forwarding::{Backend, Common, Forwarding, Link, Nat, Overlay, Service, Slot, Vip},
    maglev::{Candidate, Maglev, Size},
    nat::Slots,
    port::{
        HEADROOM,
        sim::{self, SimPort},
    },
    publish::{Publisher, Subscriber},
    schedule::{Schedule, Taker},
    time::Tick,
    wire::ethernet::MacAddr,
    worker::{Parts, Worker},
};

use crate::{
    packets::{self, SYN},
    reference::node::Node,
};

pub const TCP: u8 = protocol::TCP;
pub const UDP: u8 = protocol::UDP;
pub const SCTP: u8 = protocol::SCTP;

/// The client's side of every link, its gateway as it were.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xcc];

pub const VIP4: &str = "203.0.113.10";
pub const VIP6: &str = "2001:db8:113::10";
pub const CLIENT4: &str = "198.51.100.7";
pub const CLIENT6: &str = "2001:db8:100::7";

/// Slots that the counters of a rig know.
pub const SLOTS: usize = 64;

/// What tables and the rig's own expectations hash flows with.
pub fn hash_key() -> HashKey {
    HashKey::from_seed("connections")
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn vip(address: &str, protocol: u8, port: u16) -> Vip {
    Vip { address: Address::from(ip(address)), protocol, port }
}

/// The MAC address of a node's own interface.
pub fn node_mac(link: usize) -> [u8; 6] {
    [2, 0, 0, 0, 1, link as u8]
}

/// A packet for this port's station, if it was made for the first one's.
pub fn addressed(port: usize, mut packet: Vec<u8>) -> Vec<u8> {
    if packet.starts_with(&node_mac(0)) {
        packet[..6].copy_from_slice(&node_mac(port));
    }
    packet
}

/// A service's backend, described.
#[derive(Clone, Debug)]
pub struct BackendSpec {
    pub slot: Slot,
    pub weight: u16,
    pub mtu: u16,
    pub link: u8,
    pub reachable: bool,
    pub tunnel: Tunnel,
    /// What packets to it are translated to, if they are.
    pub task: Address,
}

/// A backend over IPv4 with a full UDP checksum, on the first link, with room for 1,500 bytes.
pub fn backend(slot: Slot) -> BackendSpec {
    BackendSpec {
        slot,
        weight: 1,
        mtu: 1500,
        link: 0,
        reachable: true,
        tunnel: Tunnel {
            src_mac: MacAddr(node_mac(0)),
            dst_mac: MacAddr([2, 0, 0, 0, 2, slot as u8]),
            vlans: Vec::new(),
            src: ip("10.0.0.1"),
            dst: IpAddr::from([10, 0, 1, slot as u8]),
            udp_port: 4789,
            vni: 100 + slot,
            inner_dst_mac: MacAddr([2, 0, 0, 0, 3, slot as u8]),
            inner_src_mac: MacAddr(node_mac(0)),
            inner_v6: false,
            udp_checksum: true,
        },
        task: Address::default(),
    }
}

impl BackendSpec {
    /// For a service with IPv6 clients.
    pub fn inner_v6(mut self) -> Self {
        self.tunnel.inner_v6 = true;
        self
    }

    /// Reached over IPv6.
    pub fn over_v6(mut self) -> Self {
        self.tunnel.src = ip("2001:db8::1");
        self.tunnel.dst = format!("2001:db8:1::{:x}", self.slot).parse().unwrap();
        self
    }
}

/// How services place new flows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scheduled {
    Maglev,
    RoundRobin,
    LeastConnections,
    /// With a timeout in seconds.
    Source(u32),
}

impl Scheduled {
    fn among(self, takers: &[Taker]) -> Schedule {
        match self {
            Self::Maglev => Schedule::Maglev,
            Self::RoundRobin => Schedule::round_robin(takers),
            Self::LeastConnections => Schedule::least_connections(takers),
            Self::Source(timeout_s) => Schedule::source(takers, timeout_s),
        }
    }
}

/// What a snapshot is built from.
#[derive(Clone, Debug)]
pub struct World {
    pub links: Vec<Link>,
    pub services: Vec<(Vec<Vip>, Vec<BackendSpec>)>,
    pub answer_arp: bool,
    /// All its services'.
    pub scheduled: Scheduled,
    /// Whether its services reset connections whose backend is gone.
    pub resets: bool,
    /// How each service is translated, by its index; one that is not here is not.
    pub nat: Vec<Nat>,
    pub overlays: Vec<Overlay>,
}

impl World {
    /// One link, nothing on it.
    pub fn new() -> Self {
        Self {
            links: vec![link(0)],
            services: Vec::new(),
            answer_arp: false,
            scheduled: Scheduled::Maglev,
            resets: false,
            nat: Vec::new(),
            overlays: Vec::new(),
        }
    }

    pub fn service(mut self, vips: &[Vip], backends: &[BackendSpec]) -> Self {
        self.services.push((vips.to_vec(), backends.to_vec()));
        self
    }

    pub fn scheduled(mut self, scheduled: Scheduled) -> Self {
        self.scheduled = scheduled;
        self
    }

    /// Service on TCP and UDP port 80 of the IPv4 VIP.
    pub fn web4(self, backends: &[BackendSpec]) -> Self {
        self.service(&[vip(VIP4, TCP, 80), vip(VIP4, UDP, 80)], backends)
    }

    /// The same for IPv6.
    pub fn web6(self, backends: &[BackendSpec]) -> Self {
        let backends: Vec<_> = backends.iter().cloned().map(BackendSpec::inner_v6).collect();
        self.service(&[vip(VIP6, TCP, 80), vip(VIP6, UDP, 80)], &backends)
    }

    /// The snapshot.
    pub fn forwarding(&self) -> Arc<Forwarding> {
        let maglev_key = HashKey::from_seed("maglev");
        let mut slots: Vec<Option<Backend>> = vec![None; SLOTS];
        let mut tasks = vec![Address::default(); SLOTS];
        let mut services = Vec::new();
        for (service, (vips, backends)) in self.services.iter().enumerate() {
            let names: Vec<_> = backends.iter().map(|b| format!("backend-{}", b.slot)).collect();
            let candidates: Vec<_> = backends
                .iter()
                .zip(&names)
                .map(|(b, name)| Candidate { name, weight: b.weight, slot: b.slot })
                .collect();
            let maglev = Maglev::build(Size::new(251).unwrap(), &candidates, &maglev_key);
            let takers: Vec<_> = takers(backends).collect();
            let schedule = self.scheduled.among(&takers);
            services.push(Service {
                vips: vips.clone(),
                maglev: Arc::new(maglev),
                schedule,
                resets: self.resets,
                nat: self.nat.get(service).cloned().map(Arc::new),
            });
            for spec in backends {
                tasks[spec.slot as usize] = spec.task;
                slots[spec.slot as usize] = Some(Backend {
                    template: Template::render(&spec.tunnel).unwrap(),
                    service: service as u32,
                    mtu: spec.mtu,
                    link: spec.link,
                    reachable: spec.reachable,
                });
            }
        }
        let (links, answer_arp) = (self.links.clone(), self.answer_arp);
        let overlays = self.overlays.clone();
        let common = Common { links, answer_arp, maglev_key, overlays, tasks };
        Arc::new(Forwarding::new(common, services, slots).unwrap())
    }
}

/// Those backends that take new flows.
pub fn takers(backends: &[BackendSpec]) -> impl Iterator<Item = Taker> {
    let taker = |backend: &BackendSpec| Taker { slot: backend.slot, weight: backend.weight };
    backends.iter().map(taker).filter(|taker| taker.weight > 0)
}

/// A link without partial checksums.
pub fn link(index: usize) -> Link {
    Link { mac: MacAddr(node_mac(index)), partial_checksums: false }
}

/// How the worker is equipped.
#[derive(Clone, Debug)]
pub struct Equipment {
    pub frames: usize,
    pub chunk_bytes: usize,
    pub ring_size: usize,
    /// The link of each port.
    pub links: Vec<usize>,
    pub icmp_errors_per_s: u32,
    pub connections: usize,
    pub admissions_per_s: u32,
    pub timeouts: Timeouts,
    pub peers: Vec<Reader>,
}

impl Default for Equipment {
    fn default() -> Self {
        Self {
            frames: 256,
            chunk_bytes: 4096,
            ring_size: 64,
            links: vec![0],
            icmp_errors_per_s: 1_000_000,
            connections: 1024,
            admissions_per_s: u32::MAX,
            timeouts: Timeouts::default(),
            peers: Vec::new(),
        }
    }
}

impl Equipment {
    /// A connection table.
    pub fn table(&self) -> Connections {
        let table = Connections::new(self.connections, &self.timeouts).unwrap();
        table.admitting(self.admissions_per_s)
    }

    /// The worker with this number, and what it counts in.
    pub fn worker(
        self,
        id: usize,
        connections: Connections,
        published: Subscriber<Forwarding>,
        nat: Option<Arc<Slots>>,
    ) -> (Worker<SimPort>, Arc<Counters>) {
        let Self { frames, chunk_bytes, ring_size, links, peers, icmp_errors_per_s, .. } = self;
        let counters = Arc::new(Counters::new(SLOTS));
        let worker = Worker::new(Parts {
            ports: links.iter().map(|_| SimPort::new(frames, ring_size)).collect(),
            links,
            pool: sim::pool(frames, chunk_bytes),
            connections,
            peers,
            published,
            counters: Arc::clone(&counters),
            hash_key: hash_key(),
            icmp_errors_per_s,
            id,
            nat,
        });
        worker.prepare();
        (worker, counters)
    }

    /// Two workers that share the slots of NAT and know each other's connections.
    pub fn pair(
        &self,
        publisher: &mut Publisher<Forwarding>,
        slots: &Arc<Slots>,
    ) -> [(Worker<SimPort>, Arc<Counters>); 2] {
        let tables = [self.table(), self.table()];
        let peers = [tables[1].reader(), tables[0].reader()];
        let mut each = tables.into_iter().zip(peers);
        [0, 1].map(|id| {
            let (table, peer) = each.next().expect("there are two");
            let equipment = Self { peers: vec![peer], ..self.clone() };
            equipment.worker(id, table, publisher.subscribe(), Some(Arc::clone(slots)))
        })
    }
}

/// What is forgotten is forgotten soon.
pub const SHORT_TIMEOUTS: Timeouts =
    Timeouts { unconfirmed_s: 1, tcp_idle_s: 1, tcp_closing_s: 1, udp_idle_s: 1, affinity_s: 1 };

/// A packet that left, and by which port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    pub port: usize,
    pub bytes: Vec<u8>,
}

/// The node.
pub struct Rig {
    pub worker: Worker<SimPort>,
    pub now: Tick,
    pub connections: Reader,
    counters: Arc<Counters>,
    publisher: Publisher<Forwarding>,
    reference: Node,
    frames: usize,
    pub ports: usize,
    /// What the counters said when they were last asked.
    counted: BTreeMap<String, u64>,
    received: (u64, u64),
    sent: (u64, u64),
}

/// The only place that knows how a worker comes by its snapshots.
fn publish(forwarding: Arc<Forwarding>) -> (Publisher<Forwarding>, Subscriber<Forwarding>) {
    let mut publisher = Publisher::new(forwarding);
    let subscriber = publisher.subscribe();
    (publisher, subscriber)
}

/// A table as workers have it.
pub fn table(capacity: usize) -> Connections {
    Connections::new(capacity, &Timeouts::default()).unwrap()
}

impl Rig {
    pub fn new(world: &World) -> Self {
        Self::equipped(world, Equipment::default())
    }

    pub fn equipped(world: &World, equipment: Equipment) -> Self {
        let forwarding = world.forwarding();
        let reference = Node::new(world, Arc::clone(&forwarding), equipment.clone());
        let (frames, ports) = (equipment.frames, equipment.links.len());
        let (publisher, published) = publish(forwarding);
        let table = equipment.table();
        let connections = table.reader();
        let (worker, counters) = equipment.worker(0, table, published, None);
        let mut rig = Self {
            worker,
            now: Tick::from_s(1000),
            connections,
            counters,
            publisher,
            reference,
            frames,
            ports,
            counted: BTreeMap::new(),
            received: (0, 0),
            sent: (0, 0),
        };
        rig.turn(); // fills the fill rings
        rig.counted = rig.totals();
        rig
    }

    /// Gives the worker another view of the world, from its next turn on.
    pub fn publish(&mut self, world: &World) {
        self.publish_built(world, &world.forwarding());
    }

    /// The same, with the snapshot that is built from it.
    pub fn publish_built(&mut self, world: &World, forwarding: &Arc<Forwarding>) {
        self.reference.publish(world, Arc::clone(forwarding));
        self.publisher.publish(Arc::clone(forwarding));
        self.publisher.retire();
    }

    /// Time goes by, in turns of at most 100 ms, as a sleeping worker's does.
    pub fn wait(&mut self, ms: u64) {
        let until = self.now + ms;
        while self.now < until {
            self.now = self.now + 100.min(until.ms_since(self.now));
            self.turn();
        }
    }

    /// The network brings a packet; `false` if there was no frame for it.
    pub fn deliver(&mut self, port: usize, packet: &[u8]) -> bool {
        self.deliver_at(port, HEADROOM, packet)
    }

    /// The same, at `start` in the frame.
    pub fn deliver_at(&mut self, port: usize, start: usize, packet: &[u8]) -> bool {
        let delivered = self.worker.ports_mut()[port].deliver_at(start, packet);
        if delivered {
            self.reference.arrives(port, start, packet);
        }
        delivered
    }

    /// One turn of the worker. Returns how many packets it took.
    pub fn turn(&mut self) -> usize {
        let (expected, drops) = self.reference.turn(self.now);
        let dropped = |rig: &Self| drops.iter().map(|&(reason, _)| rig.drops(reason)).collect();
        let dropped_before: Vec<u64> = dropped(self);
        let rx_bytes = self.event(Event::RxBytes);

        let received = without_allocation(|| self.worker.turn(self.now));

        assert_eq!(received, expected);
        let dropped_now: Vec<u64> = dropped(self);
        let since = dropped_now.iter().zip(&dropped_before).map(|(now, before)| now - before);
        for ((reason, [least, most]), count) in drops.into_iter().zip(since) {
            assert!((least..=most).contains(&count), "{count} × {reason:?}, not {least} to {most}");
        }
        self.received.0 += received as u64;
        self.received.1 += self.event(Event::RxBytes) - rx_bytes;
        self.check();
        received
    }

    /// The network takes at most `most` packets from a port.
    pub fn take(&mut self, port: usize, most: usize) -> Vec<Sent> {
        let mut sent = Vec::new();
        while sent.len() < most {
            let Some(bytes) = self.worker.ports_mut()[port].take_sent(<[u8]>::to_vec) else {
                break;
            };
            self.reference.leaves(port, &bytes);
            self.sent.0 += 1;
            self.sent.1 += bytes.len() as u64;
            sent.push(Sent { port, bytes });
        }
        sent
    }

    /// One packet in by the first port; everything that it made leave.
    pub fn send(&mut self, packet: &[u8]) -> Vec<Sent> {
        self.send_by(0, packet)
    }

    /// One packet in by this port; everything that it made leave, by whatever port.
    pub fn send_by(&mut self, port: usize, packet: &[u8]) -> Vec<Sent> {
        assert!(self.deliver(port, packet), "there is room for one packet");
        self.turn();
        let sent: Vec<_> = (0..self.ports).flat_map(|port| self.take(port, usize::MAX)).collect();
        self.all_is_taken();
        self.turn(); // reclaims
        sent
    }

    /// A patient network takes everything in the end, and all frames serve again.
    pub fn drain(&mut self) {
        let mut turns = 0;
        loop {
            let received = self.turn();
            let taken: usize = (0..self.ports).map(|port| self.take(port, usize::MAX).len()).sum();
            if received + taken + self.worker.in_flight() == 0 {
                break;
            }
            turns += 1;
            assert!(turns < 1000, "what came in is never done with");
        }
        self.all_is_taken();
    }

    /// All connections are forgotten, the first backend has the next turn, and it is the same time of day as
    /// whenever that happens: each life begins alike. For timeouts of a second. In the world given a single backend
    /// of each service, the first, has all turns.
    pub fn forget(&mut self, (world, forwarding): &(World, Arc<Forwarding>)) {
        // The sweep first lets young ones grow quiet.
        self.forget_after(20_000);
        self.forget_after(300_000);
        // A cycle of one turn ends where it began.
        self.publish_built(world, forwarding);
        let inserts = self.event(Event::ConnectionInserts);
        for syn in [packets::v4(1, SYN), packets::v6(1, SYN)] {
            self.send(&syn.bytes());
        }
        assert_eq!(self.event(Event::ConnectionInserts), inserts + 2);
        self.forget_after(2_000);
        let mut left = 0;
        self.connections.for_each(self.now, |_| left += 1);
        assert_eq!(left, 0);
        self.reference.forget();
        // All times of connections wrap round in this period.
        self.now = Tick((self.now.0 | ((1 << 26) - 1)) + 1);
    }

    /// Time goes by, and the sweep comes round, which takes 17 s.
    fn forget_after(&mut self, ms: u64) {
        self.now = self.now + ms;
        for _ in 0..17 {
            self.now = self.now + 1000;
            self.turn();
        }
    }

    /// The network got exactly the packets and bytes that were counted as sent.
    pub fn all_is_taken(&mut self) {
        assert_eq!((self.event(Event::TxPackets), self.event(Event::TxBytes)), self.sent);
        self.reference.all_has_left();
    }

    /// The one packet that leaves for this one.
    pub fn send_for_one(&mut self, packet: &[u8]) -> Vec<u8> {
        let mut sent = self.send(packet);
        assert_eq!(sent.len(), 1, "one packet leaves; {:?}", self.counted());
        sent.remove(0).bytes
    }

    /// The client of this packet is bound to this backend, as another worker knows.
    pub fn allow(&mut self, packet: &[u8], slot: Slot) {
        self.reference.bind(packet, slot);
    }

    /// The slot of the backend that this packet goes to.
    pub fn backend_of(&mut self, packet: &[u8]) -> Option<Slot> {
        let before: Vec<_> = (0..SLOTS).map(|slot| self.counters.backend(slot).0).collect();
        self.send(packet);
        (0..SLOTS).find(|&slot| self.counters.backend(slot).0 > before[slot]).map(|s| s as Slot)
    }

    /// All that was counted since this was last asked, but for packets and bytes received and
    /// sent, which are checked with every turn. What counted nothing is left out.
    pub fn counted(&mut self) -> BTreeMap<String, u64> {
        let totals = self.totals();
        let since = totals
            .iter()
            .map(|(name, count)| (name.clone(), count - self.counted.get(name).unwrap_or(&0)))
            .filter(|&(ref name, count)| {
                count > 0
                    && !name.starts_with("rx_")
                    && !name.starts_with("tx_p")
                    && name != "tx_bytes"
            })
            .collect();
        self.counted = totals;
        since
    }

    pub fn event(&self, event: Event) -> u64 {
        self.counters.events(event)
    }

    pub fn drops(&self, reason: DropReason) -> u64 {
        self.counters.drops(reason)
    }

    pub fn all_drops(&self) -> u64 {
        DropReason::ALL.iter().map(|&reason| self.drops(reason)).sum()
    }

    /// Packets encapsulated, pieces of cut ones included.
    pub fn encapsulated(&self) -> u64 {
        (0..SLOTS).map(|slot| self.counters.backend(slot).0).sum()
    }

    fn totals(&self) -> BTreeMap<String, u64> {
        let events = Event::ALL.iter().map(|&e| (e.label().to_owned(), self.event(e)));
        let drops = DropReason::ALL.iter().map(|&r| (r.label().to_owned(), self.drops(r)));
        let backends = (0..SLOTS).map(|s| (format!("backend {s}"), self.counters.backend(s).0));
        events.chain(drops).chain(backends).collect()
    }

    /// What holds after every turn: frames are conserved (I1), and every packet is accounted for.
    fn check(&self) {
        assert_eq!(self.worker.frames(), self.frames, "frames are conserved");
        assert_eq!(self.event(Event::RxPackets), self.received.0);
        assert_eq!(self.event(Event::RxBytes), self.received.1);

        let answered = self.event(Event::EchoReplies) + self.event(Event::NeighbourReplies);
        let too_big = self.event(Event::TooBigSent);
        let resets = self.event(Event::ResetsSent);
        let made = self.encapsulated() + answered + too_big + resets;
        let lost_late = self.drops(DropReason::TxRingFull);
        // All that was made either left or found no room in a tx ring.
        assert_eq!(self.event(Event::TxPackets) + lost_late, made, "{:?}", self.totals());

        // Every packet received is encapsulated, answered or dropped. An ICMP error or
        // a reset is about a drop, and the later pieces of a packet that was cut come on top.
        let ended = self.encapsulated() + answered + self.all_drops() - lost_late;
        let extra = ended - self.event(Event::RxPackets);
        let cut = self.event(Event::Fragmented);
        assert!((cut..=7 * cut).contains(&extra), "{extra} pieces of {cut}; {:?}", self.totals());
        assert_eq!(self.drops(DropReason::TooBig), too_big);
        assert!(self.drops(DropReason::BackendGone) >= resets, "resets are not answered");
    }
}

/// What a worker does after its start (I7).
pub fn without_allocation<T>(turn: impl FnOnce() -> T) -> T {
    let mut result = None;
    // The count does not survive a panic by itself.
    let run = || result = Some(catch_unwind(AssertUnwindSafe(turn)));
    let allocations = allocation_counter::measure(run);
    let result = result.expect("it ran").unwrap_or_else(|panic| resume_unwind(panic));
    assert_eq!(allocations.count_total, 0, "allocations in a turn");
    result
}

/// What [`Rig::counted`] should say.
pub fn counts<const N: usize>(expected: [(&str, u64); N]) -> BTreeMap<String, u64> {
    expected.into_iter().map(|(name, count)| (name.to_owned(), count)).collect()
}
