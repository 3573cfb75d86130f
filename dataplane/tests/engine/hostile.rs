//! Clients and tunnels that send anything, and a node of two workers that translates between them: the play, and
//! its stage. Every turn is held against [`crate::reference::nat`].

use std::{net::IpAddr, ops::RangeInclusive, slice, sync::Arc};

use dataplane::{
    counters::{Counters, DropReason, Event},
    encap::Tunnel,
    forwarding::{Forwarding, Mesh, Nat, Overlay, Prefix, Slot},
    nat::{Connection, Id, Slots, Timeouts},
    port::{BURST, HEADROOM, Port, sim::SimPort},
    publish::Publisher,
    time::Tick,
    wire::ethernet::MacAddr,
    worker::Worker,
};

use crate::{
    nat::{MESH, MESH_MAC, MESH6, NODE, VNI, VNI6, tunneled},
    packets::{L4, Packet, SYN, add_nonce, answer_to, arp_request, icmp_error, solicitation, tag},
    reference::nat::{Account, Gateway, Seen},
    rig::{
        BackendSpec, Equipment, SHORT_TIMEOUTS, SLOTS, Scheduled, TCP, UDP, World, addressed,
        backend, hash_key, ip, link, vip, without_allocation,
    },
    script::{Script, vlans},
};

/// More addresses of the node in the first network: one that is used, one that comes later.
const SECOND_MESH: &str = "10.0.0.6";
const LATE_MESH: &str = "10.0.0.7";
/// Banks of all of them.
const BANKS: usize = 4;
/// A service on all its ports, for some clients only.
const VIP_ALL: &str = "203.0.113.11";
/// A service that is not translated.
const VIP_PLAIN: &str = "203.0.113.20";

/// Slots live for so long that a script sees them end.
const TIMEOUTS: Timeouts =
    Timeouts { opening_s: 3, tcp_idle_s: 8, half_closed_s: 5, time_wait_s: 2, udp_idle_s: 6 };

/// A snapshot and what it was made of.
pub type Built = (World, Arc<Forwarding>);

/// Where the task in this slot is.
fn task(slot: Slot) -> IpAddr {
    let is_v6 = (10..20).contains(&slot);
    ip(&if is_v6 { format!("fd00::1:{slot}") } else { format!("10.0.0.{}", 100 + slot) })
}

/// The node that runs it.
fn vtep(slot: Slot) -> IpAddr {
    let is_v6 = slot % 5 == 3;
    ip(&if is_v6 { format!("2001:db8:1::{slot}") } else { format!("192.0.2.{}", 10 + slot) })
}

fn serves(slot: Slot, link: u8) -> BackendSpec {
    let is_v6 = task(slot).is_ipv6();
    let plain = backend(slot);
    let tunnel = Tunnel {
        src: ip(if vtep(slot).is_ipv6() { "2001:db8::1" } else { NODE }),
        dst: vtep(slot),
        vni: if is_v6 { VNI6 } else { VNI },
        inner_src_mac: MacAddr(MESH_MAC),
        inner_v6: is_v6,
        udp_checksum: slot.is_multiple_of(2),
        vlans: if slot % 4 == 1 { vec![7] } else { Vec::new() },
        ..plain.tunnel
    };
    BackendSpec { mtu: 1450, link, tunnel, task: task(slot).into(), ..plain }
}

fn mesh(bank: u16, address: &str) -> Mesh {
    Mesh { bank, address: ip(address).into() }
}

fn overlay(vni: u32, mesh: &[Mesh]) -> Overlay {
    Overlay { vni, udp_port: 4789, mac: MacAddr(MESH_MAC), mesh: mesh.to_vec() }
}

/// The same services in different times: tasks drain, are lost or gone, addresses come and go.
fn worlds() -> [Built; 8] {
    let plain = BackendSpec { mtu: 1450, ..backend(40) };
    let world = |web: &[BackendSpec], web6: &[BackendSpec], all: &[BackendSpec]| {
        let ports = |address: &str, port| [vip(address, TCP, port), vip(address, UDP, port)];
        let mut world = World::new()
            .web4(web)
            .web6(web6)
            .service(&ports(VIP_ALL, 0), all)
            .service(&ports(VIP_PLAIN, 80), slice::from_ref(&plain));
        let nat = |overlay, allow: &[Prefix]| Nat {
            overlay,
            targets: vec![8080, 5353],
            allow: allow.to_vec(),
        };
        let some = Prefix { address: ip("198.51.100.0").into(), len: 96 + 24 };
        world.nat = vec![nat(0, &[]), nat(1, &[]), nat(0, &[some])];
        world.links = (0..3).map(link).collect();
        world.overlays = vec![
            overlay(VNI, &[mesh(0, MESH), mesh(1, SECOND_MESH)]),
            overlay(VNI6, &[mesh(2, MESH6)]),
        ];
        world
    };
    let drained = |backend: BackendSpec| BackendSpec { weight: 0, ..backend };
    let lost = |backend: BackendSpec| BackendSpec { reachable: false, ..backend };
    let narrow = |mtu: u16, backend: BackendSpec| BackendSpec { mtu, ..backend };
    let (web, web6) = ([serves(1, 0), serves(2, 1), serves(3, 2)], [serves(11, 0), serves(13, 1)]);
    let all = world(&web, &web6, &[serves(21, 0), serves(22, 9)]);

    // One drains, one is lost, one is gone, one has come. An address is leaving.
    let mut changed = world(
        &[drained(serves(1, 0)), drained(lost(serves(2, 1))), serves(4, 0)],
        &[drained(serves(11, 0)), serves(12, 2)],
        &[narrow(200, serves(21, 0))],
    );
    changed.overlays[0] = overlay(VNI, &[mesh(0, MESH), mesh(3, LATE_MESH)]);
    changed.overlays.push(overlay(VNI, &[mesh(1, SECOND_MESH)]));
    // Nobody serves, and only the latest address is left.
    let mut gone = world(&[], &[], &[]);
    gone.overlays[0] = overlay(VNI, &[mesh(3, LATE_MESH)]);
    gone.overlays[1].mesh.clear();
    // Senders leave checksums to network cards, and ways are narrow.
    let mut partial = world(
        &[narrow(700, serves(1, 0)), narrow(60, serves(2, 1))],
        &[narrow(1280, serves(11, 0))],
        &[narrow(36, serves(21, 0))],
    );
    partial.links.iter_mut().for_each(|link| link.partial_checksums = true);
    // All are lost, so that new connections have no better choice.
    let unreachable =
        world(&web.clone().map(lost), &web6.clone().map(lost), &[lost(serves(21, 0))]);
    let bare = World { nat: Vec::new(), overlays: Vec::new(), ..all.clone() };
    let bare = World { services: vec![bare.services[3].clone()], ..bare };
    let fewest = World { answer_arp: true, ..all.clone() }.scheduled(Scheduled::LeastConnections);
    let bound = World { links: partial.links.clone(), ..all.clone() };
    let bound = bound.scheduled(Scheduled::Source(1));
    let turns = changed.scheduled(Scheduled::RoundRobin);
    [all, turns, gone, partial, unreachable, bare, fewest, bound].map(|world| {
        let forwarding = world.forwarding();
        (world, forwarding)
    })
}

/// Nodes that can do much, or little, and the ports that they use of each address.
fn nodes() -> [(Equipment, RangeInclusive<u16>); 4] {
    let node = |frames, ring_size, ports: usize| Equipment {
        frames,
        ring_size,
        connections: 64,
        links: (0..ports).collect(),
        timeouts: SHORT_TIMEOUTS,
        ..Equipment::default()
    };
    [
        (node(256, 64, 3), 3000..=3007),
        (Equipment { icmp_errors_per_s: 0, ..node(512, 128, 2) }, 1_024..=1_087),
        (node(24, 4, 3), 60_000..=60_001),
        (Equipment { chunk_bytes: 2048, ..node(6, 2, 1) }, 65_535..=65_535),
    ]
}

/// A node of two workers, and the network around it.
pub struct Pair {
    workers: [Worker<SimPort>; 2],
    counters: [Arc<Counters>; 2],
    slots: Arc<Slots>,
    publisher: Publisher<Forwarding>,
    reference: Gateway,
    equipment: Equipment,
    ports: RangeInclusive<u16>,
    expected: [Account; 2],
    now: Tick,
}

impl Pair {
    fn new(
        (world, forwarding): &Built,
        (equipment, ports): &(Equipment, RangeInclusive<u16>),
    ) -> Self {
        let mut publisher = Publisher::new(Arc::clone(forwarding));
        let slots = Arc::new(Slots::new(BANKS, TIMEOUTS, ports.clone()).unwrap());
        let [(one, by_one), (other, by_other)] = equipment.pair(&mut publisher, &slots);
        let forwarding = Arc::clone(forwarding);
        let reference = Gateway::new(world, forwarding, equipment, TIMEOUTS, ports.clone());
        let mut pair = Self {
            workers: [one, other],
            counters: [by_one, by_other],
            slots,
            publisher,
            reference,
            equipment: equipment.clone(),
            ports: ports.clone(),
            expected: Default::default(),
            now: Tick::from_s(1000),
        };
        pair.turn(); // fills the fill rings
        pair
    }

    fn publish(&mut self, (world, forwarding): &Built) {
        self.reference.publish(world, Arc::clone(forwarding));
        self.publisher.publish(Arc::clone(forwarding));
        self.publisher.retire();
    }

    /// The network brings a packet to a worker, at `start` in a frame, if there is one for it.
    fn deliver(&mut self, worker: usize, port: usize, start: usize, packet: &[u8]) {
        let packet = addressed(port, packet.to_vec());
        if self.workers[worker].ports_mut()[port].deliver_at(start, &packet) {
            self.reference.arrives(worker, port, start, &packet);
        }
    }

    fn turn(&mut self) -> u64 {
        (0..2).map(|worker| self.turn_of(worker, BURST)).sum()
    }

    /// One turn of a worker, which takes so many packets of each port at most.
    fn turn_of(&mut self, worker: usize, most: usize) -> u64 {
        let has_arrivals = self.reference.has_arrivals(worker);
        if has_arrivals {
            self.look(); // who is still there
        }
        let burst = self.reference.burst(worker, most);
        let node = &mut self.workers[worker];
        node.ports_mut().iter_mut().for_each(|port| port.receive_at_most(burst));
        let asked = self.counters[worker].events(Event::ClientsAsked);

        without_allocation(|| node.turn(self.now));

        let found = |key: &_| {
            let hash = dataplane::flow::FlowKey::hash(key, &hash_key());
            self.slots.find(hash, key).map(|found| found.id)
        };
        let node = &self.workers[worker];
        let seen = Seen {
            table: if has_arrivals { self.table() } else { Vec::new() },
            found: &found,
            in_flight: node.ports().iter().map(Port::in_flight).collect(),
            asked: self.counters[worker].events(Event::ClientsAsked) - asked,
        };
        let account = self.reference.turn(worker, burst, self.now, &seen);
        let received = account.received;
        self.expected[worker].add(account);
        self.check(worker);
        if has_arrivals {
            self.look();
        }
        received
    }

    /// All slots in use, of those that may be.
    fn table(&self) -> Vec<(Id, Connection)> {
        let banks = 0..BANKS as u16;
        let ids = banks.flat_map(|bank| self.ports.clone().map(move |port| Id::new(bank, port)));
        ids.filter_map(|id| Some((id, self.slots.connection(id)?.1))).collect()
    }

    /// Holds the slots against the reference's. That takes long, so it is done only when it matters.
    fn look(&mut self) {
        self.reference.look(&self.table(), self.now);
        for slot in 0..SLOTS as Slot {
            assert_eq!(self.slots.open_of(slot) as usize, self.reference.open_of(slot));
        }
    }

    /// What holds after every turn of a worker besides what the reference says of each packet.
    fn check(&self, worker: usize) {
        let (counters, node) = (&self.counters[worker], &self.workers[worker]);
        let event = |event| counters.events(event);
        let drops = DropReason::ALL.iter().map(|reason| (reason.label(), counters.drops(*reason)));
        let counted = Account {
            received: event(Event::RxPackets),
            sent: event(Event::TxPackets),
            replies: event(Event::NatReplies),
            resets: event(Event::ResetsSent),
            drops: drops.filter(|(_, count)| *count > 0).collect(),
        };
        assert_eq!(counted, self.expected[worker]);
        assert_eq!(node.frames(), self.equipment.frames, "frames are conserved");
        let held: usize = node.ports().iter().map(Port::held).sum();
        assert_eq!(self.reference.pooled(worker) + held, self.equipment.frames);
    }

    /// Time goes by, in turns of at most 100 ms.
    fn wait(&mut self, ms: u64) {
        let until = self.now + ms;
        while self.now < until {
            for _ in 0..5 {
                self.now = self.now + 100.min(until.ms_since(self.now));
                self.turn();
            }
            self.look();
        }
    }

    /// The network takes at most `most` packets from a port.
    fn take(&mut self, worker: usize, port: usize, most: usize) -> u64 {
        let sim = &mut self.workers[worker].ports_mut()[port];
        let mut taken = 0;
        while taken < most as u64
            && let Some(bytes) = sim.take_sent(<[u8]>::to_vec)
        {
            self.reference.leaves(worker, port, &bytes);
            taken += 1;
        }
        taken
    }

    /// A patient network takes everything in the end.
    fn drain(&mut self) {
        let ports = self.equipment.links.len();
        let all = || (0..2).flat_map(move |worker| (0..ports).map(move |port| (worker, port)));
        for _ in 0..1000 {
            let received = self.turn();
            let taken: u64 = all().map(|(worker, port)| self.take(worker, port, usize::MAX)).sum();
            let in_flight: usize = self.workers.iter().map(Worker::in_flight).sum();
            if received + taken == 0 && in_flight == 0 {
                self.look();
                let used: usize = (0..BANKS).map(|bank| self.slots.used(bank as u16)).sum();
                assert_eq!(used, self.reference.connections().len(), "each slot is somebody's");
                return self.reference.all_has_left();
            }
        }
        panic!("what comes in is never done with");
    }

    /// All slots run out, and each life begins alike.
    fn forget(&mut self, first: &Built) {
        self.publish(first);
        self.now = self.now + 20_000;
        for _ in 0..3 {
            self.now = self.now + 600;
            for worker in &mut self.workers {
                worker.turn(self.now);
            }
        }
        self.now = Tick((self.now.0 | ((1 << 20) - 1)) + 1);
        self.workers.iter_mut().for_each(|worker| _ = worker.turn(self.now));
        self.reference.forget();
        self.look();
    }
}

/// Some nodes, and all times they live through. Memory of a node is never given back, so each serves many lives;
/// one that failed serves no more.
pub struct Nodes {
    worlds: [Built; 8],
    equipment: [(Equipment, RangeInclusive<u16>); 4],
    pairs: [Option<Pair>; 4],
}

impl Nodes {
    pub fn new() -> Self {
        Self { worlds: worlds(), equipment: nodes(), pairs: Default::default() }
    }

    /// A node lives from the first world on, until all that came in is done with.
    pub fn live(&mut self, which: usize, play: impl FnOnce(&mut Pair, &[Built])) {
        let (worlds, equipment) = (&self.worlds, &self.equipment[which]);
        let pair = self.pairs[which].take();
        let mut pair = pair.unwrap_or_else(|| Pair::new(&worlds[0], equipment));
        pair.forget(&worlds[0]);
        play(&mut pair, worlds);
        pair.drain();
        self.pairs[which] = Some(pair);
    }
}

/// One thing that happens, as the script has it.
pub fn step(pair: &mut Pair, script: &mut Script<'_>, worlds: &[Built]) {
    let choice = script.byte();
    let worker = usize::from(choice >> 4 & 1);
    let port = usize::from(choice >> 5 & 3) % pair.equipment.links.len();
    let start = |script: &mut Script<'_>| match choice >> 7 {
        0 => HEADROOM,
        _ => usize::from(script.word()) % 4097,
    };
    match choice % 16 {
        0..5 => {
            let (start, frame) = (start(script), client_frame(script));
            pair.deliver(worker, port, start, &frame);
        }
        5..10 => {
            let (start, frame) = (start(script), tunnel_frame(pair, script));
            pair.deliver(worker, port, start, &frame);
        }
        10 => _ = pair.turn(),
        11 => _ = pair.turn_of(worker, 1 + usize::from(script.byte()) % BURST),
        12 => _ = pair.take(worker, port, script.byte().into()),
        13 => pair.wait(16 * u64::from(script.byte())),
        14 => pair.publish(&worlds[usize::from(script.byte()) % worlds.len()]),
        // What leaves makes room.
        _ => {
            pair.turn();
            for worker in 0..2 {
                for port in 0..pair.equipment.links.len() {
                    pair.take(worker, port, usize::MAX);
                }
            }
        }
    }
}

/// What a client's side brings.
fn client_frame(script: &mut Script<'_>) -> Vec<u8> {
    let (form, shape, who) = (script.byte(), script.byte(), script.byte());
    let vlans = vlans(shape);
    let mut bytes = match form % 8 {
        0..4 => client_packet(script.packet(form, shape), who, script).tagged(vlans).bytes(),
        4 => client_packet(script.fragment(form, shape), who, script).tagged(vlans).bytes(),
        5 => {
            let about = client_packet(script.packet(form, shape), who, script);
            tag(&error_about(&answer_to(&about), script), vlans)
        }
        6 => tag(&script.question(), vlans),
        _ => {
            let len = script.byte();
            return script.bytes(len.into()).to_vec();
        }
    };
    if who >> 6 == 3 {
        bytes[11] = 0xdd; // another router's
    }
    script.disturbed(form, shape, bytes)
}

/// A packet of one of few flows.
fn client_packet(mut packet: Packet, who: u8, script: &mut Script<'_>) -> Packet {
    packet.src.set_port(1 + packet.src.port() % 4);
    if packet.src.is_ipv4() {
        match who & 7 {
            0..5 => {}
            5 => packet.dst = (ip(VIP_ALL), 1000 + u16::from(who)).into(),
            6 => packet.dst.set_ip(ip(VIP_PLAIN)),
            _ => packet.dst.set_port(81),
        }
        match who >> 3 & 7 {
            0..5 => {}
            5 => packet.src.set_ip(ip("203.0.113.99")),
            6 => packet.src.set_ip(ip("127.0.0.1")),
            _ => packet.src.set_ip(packet.dst.ip()),
        }
    }
    with_options(packet, script)
}

/// A SYN says how it wants its segments.
fn with_options(mut packet: Packet, script: &mut Script<'_>) -> Packet {
    if matches!(packet.l4, L4::Tcp { flags } if flags & 2 != 0) {
        let choice = script.byte();
        packet.tcp_option_words = choice % 11;
        let mut options = vec![1; usize::from(choice >> 4 & 3)];
        match choice >> 6 {
            0 | 1 => options.extend([2, 4, script.byte(), script.byte()]),
            2 => options.extend(script.bytes(12)),
            _ => {}
        }
        packet.payload.splice(..0, options);
    }
    packet
}

/// An ICMP error about a packet, of which it quotes more or less, and perhaps not as it was.
fn error_about(packet: &Packet, script: &mut Script<'_>) -> Vec<u8> {
    let mut about = packet.ip_packet();
    let choice = script.byte();
    if choice & 1 != 0 {
        about.truncate(24 + usize::from(choice >> 2));
    }
    if choice & 2 != 0 {
        let (at, value) = (1 + usize::from(script.byte()), script.byte());
        if let Some(byte) = about.get_mut(at) {
            *byte = value;
        }
    }
    icmp_error(&about)
}

/// What a tunnel brings: most often of a task to its slot, if there is any.
fn tunnel_frame(pair: &Pair, script: &mut Script<'_>) -> Vec<u8> {
    let (form, shape) = (script.byte(), script.byte());
    let (which, outside, lie) = (script.byte(), script.byte(), script.byte());
    let lies = |bit: u8| lie & 3 == 3 && lie >> (2 + bit) & 1 == 1;
    let known: Vec<(Id, &Connection)> = pair.reference.connections().collect();
    let (slot, src, dst, protocol) = match known.len() {
        0 => {
            let v6 = which & 1 == 1;
            let (slot, mesh) = if v6 { (11, MESH6) } else { (1, MESH) };
            (slot, (task(slot), 8080), (ip(mesh), 3000 + u16::from(which)), TCP)
        }
        len => {
            let (id, known) = known[usize::from(which) % len];
            let (task, mesh) = (known.task.into(), known.mesh.into());
            (known.backend, (task, known.task_port), (mesh, id.port()), known.key.protocol)
        }
    };
    let answer = |packet: Packet, script: &mut Script<'_>| {
        let l4 = match packet.l4 {
            l4 if lies(0) => l4,
            L4::Udp { .. } if protocol == UDP => packet.l4,
            _ if protocol == UDP => L4::Udp { checksum: true },
            SYN => L4::Tcp { flags: 0x12 },
            L4::Tcp { .. } => packet.l4,
            _ => L4::Tcp { flags: 0x10 },
        };
        let mut packet = Packet { src: src.into(), dst: dst.into(), l4, ..packet };
        packet.src.set_port(src.1 ^ u16::from(lies(1)));
        packet.dst.set_port(dst.1 ^ u16::from(lies(2)));
        if packet.dst.is_ipv6() {
            packet.option_words = 0;
        } else if lies(3) {
            packet.dst.set_ip(ip([SECOND_MESH, LATE_MESH, NODE][usize::from(which) % 3]));
        }
        with_options(packet, script)
    };
    let tags = vlans(shape);
    let inner = match form % 8 {
        0..4 => answer(script.packet(form, shape), script).tagged(tags).bytes(),
        4 => answer(script.fragment(form, shape), script).tagged(tags).bytes(),
        5 => {
            let about = answer(script.packet(form, shape), script);
            tag(&error_about(&answer_to(&about), script), tags)
        }
        6 => tag(&question_in_tunnel(script), tags),
        _ => {
            let len = script.byte();
            script.bytes(len.into()).to_vec()
        }
    };
    let inner = script.disturbed(form, shape, inner);
    let from = vtep(slot + Slot::from(lies(4)));
    let vni = if task(slot).is_ipv6() { VNI6 } else { VNI };
    let frame = tunneled(&inner, from, vni ^ u32::from(lies(5)));
    script.disturbed(0, outside, tag(&frame, vlans(outside)))
}

/// Who has our address? Or another one.
fn question_in_tunnel(script: &mut Script<'_>) -> Vec<u8> {
    let (choice, which) = (script.byte(), usize::from(script.byte()));
    if choice & 1 == 0 {
        return arp_request([10, 0, 0, 102], [MESH, SECOND_MESH, LATE_MESH, NODE][which % 4]);
    }
    let src = if choice & 2 == 0 { "fd00::1:13" } else { "::" };
    let target = [MESH6, "fd00::6"][which % 2];
    let mut bytes =
        solicitation(src, target, choice & 4 != 0, if choice & 8 == 0 { 255 } else { 64 });
    for _ in 0..choice >> 4 & 3 {
        add_nonce(&mut bytes);
    }
    bytes
}
