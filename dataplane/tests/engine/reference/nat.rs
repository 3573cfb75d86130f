//! Full NAT: what two workers make of what clients and tunnels bring, exactly.
//!
//! It takes part in one decision only by asking: which port a new connection gets, and which task if a scheduler
//! chose. Both are read from the slots after a turn, and must be what they may. All else follows, and must have
//! been so to the byte, in order:
//!
//! - what leaves is the translation of what came in, as [`super::translation`] has it, or an answer, or a
//!   question to a client whose task is gone;
//! - a slot belongs to one connection at a time, from a free port of an address that is used for new ones; it
//!   lives as long as it must and no longer than it may, and its addresses, ports and way back never change but
//!   for a router's that was replaced;
//! - nothing reaches a client but from the task of its slot, in the task's node's tunnel;
//! - every packet leaves or is dropped for the one right reason, whatever rings, pool and slots have room for.
//!
//! Of a burst, clients' packets are translated before those of tasks: an answer does not overtake a reset.
//! What is not translated is [`super::node`]'s. When clients are asked is left open, not who and how.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, VecDeque},
    mem,
    net::IpAddr,
    ops::RangeInclusive,
    rc::Rc,
    sync::Arc,
};

use dataplane::{
    counters::DropReason::{self, *},
    flow::{Address, FlowKey, Kind},
    forwarding::{Forwarding, Slot},
    nat::{Connection, Id, Timeouts, Way},
    port::BURST,
    time::Tick,
    wire::ethernet::MacAddr,
};

use super::{
    node::{Arrival, Fate, Node, is_for_us, is_syn},
    output::{advertisement, arp_reply, cut, segment_of_ours, sent_back},
    parse::{Meaning, behind_tags, parse},
    translation::{translated, translated_error},
};
use crate::rig::{BackendSpec, Equipment, Scheduled, World, hash_key, takers};

/// A slot is not noted anew for a packet that comes so soon after the last one that was, in milliseconds.
const UNNOTED_MS: u64 = 1000;
/// Times of slots are as coarse as this.
const COARSE_MS: u64 = 64;
/// The sweep comes round to each slot in this time, if turns are no further apart than the rest of it.
const SWEPT_MS: u64 = 512 + 200;
/// A client is asked for so long.
const ASKED_MS: u64 = 3000;

/// The reference node.
pub struct Gateway {
    plain: Node,
    halves: [Half; 2],
    lives: BTreeMap<Id, Life>,
    ports: RangeInclusive<u16>,
    timeouts: Timeouts,
}

/// A worker.
struct Half {
    rings: Vec<Rings>,
    pool: usize,
}

/// A worker's port.
#[derive(Default)]
struct Rings {
    arrived: VecDeque<Arrival>,
    fill: usize,
    tx: usize,
    completion: usize,
    leaving: VecDeque<Leaving>,
}

/// What must leave next.
enum Leaving {
    /// A frame in one of these forms.
    Frame(Vec<Vec<u8>>),
    /// The question to one of these clients, that was asked now.
    Question(Tick, Questions),
}

/// Questions of which only how many were asked is known.
type Questions = Rc<RefCell<Vec<(Id, Vec<u8>)>>>;

/// A slot's life so far.
struct Life {
    connection: Connection,
    client_fin: bool,
    task_fin: bool,
    client_first: bool,
    reset: bool,
    answered: bool,
    established: bool,
    /// The client has begun anew.
    detached: bool,
    asked: Option<Tick>,
    /// When it was heard of for certain, and at the latest.
    heard: [Tick; 2],
}

/// What can be seen from outside after a worker's turn.
pub struct Seen<'a> {
    /// All slots in use; empty if no packet was received.
    pub table: Vec<(Id, Connection)>,
    /// The slot that a client's packets find.
    pub found: &'a dyn Fn(&FlowKey) -> Option<Id>,
    /// Frames that each port has for transmission, those included that are through with it.
    pub in_flight: Vec<usize>,
    /// Clients asked in this turn.
    pub asked: u64,
}

/// What a turn must have counted.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Account {
    pub received: u64,
    pub sent: u64,
    pub replies: u64,
    pub resets: u64,
    pub drops: BTreeMap<&'static str, u64>,
}

/// Slots that have been taken since the last turn.
type Fresh = HashMap<FlowKey, VecDeque<(Id, Connection)>>;

/// How a packet is dealt with.
enum Task {
    Done(Fate),
    /// A client's packet for this service.
    Question(Meaning, usize),
    /// A task's, in a tunnel from there.
    Answer(Arrival, Meaning, Id, IpAddr),
}

/// What a client's packet has to do with the connections there are.
enum Claim {
    Has(Id),
    Begins,
    Refused(DropReason),
}

impl Account {
    /// What was counted after this comes on top.
    pub fn add(&mut self, later: Self) {
        self.received += later.received;
        self.sent += later.sent;
        self.replies += later.replies;
        self.resets += later.resets;
        for (reason, count) in later.drops {
            *self.drops.entry(reason).or_default() += count;
        }
    }

    fn dropped(&mut self, reason: DropReason) {
        *self.drops.entry(reason.label()).or_default() += 1;
    }
}

impl Life {
    fn new(connection: Connection, now: Tick) -> Self {
        Self {
            connection,
            client_fin: false,
            task_fin: false,
            client_first: false,
            reset: false,
            answered: false,
            established: false,
            detached: false,
            asked: None,
            heard: [now; 2],
        }
    }

    fn is_closed(&self) -> bool {
        self.reset || self.client_fin && self.task_fin
    }

    /// A packet of either end passes.
    fn hears(&mut self, by_client: bool, flags: u8, now: Tick) {
        self.heard = [now; 2];
        let [fin, rst] = [0x01, 0x04].map(|flag| flags & flag != 0);
        self.reset = rst;
        if rst {
            return;
        }
        if by_client {
            self.client_first |= fin && !self.client_fin && !self.task_fin;
            self.client_fin |= fin;
            self.established |= self.answered;
        } else {
            self.task_fin |= fin;
            self.answered = true;
        }
    }

    fn lifetime_ms(&self, timeouts: &Timeouts) -> u64 {
        let Timeouts { opening_s, tcp_idle_s, half_closed_s, time_wait_s, udp_idle_s } = *timeouts;
        let s = match self.connection.key.protocol {
            _ if self.reset => 1,
            17 if self.established => udp_idle_s,
            17 => opening_s.min(udp_idle_s),
            _ if self.is_closed() && self.client_first => 1,
            _ if self.is_closed() => time_wait_s,
            _ if self.client_fin || self.task_fin => half_closed_s,
            _ if self.established => tcp_idle_s,
            _ => opening_s,
        };
        1000 * u64::from(s)
    }

    /// Whether its client may be asked to speak if its task is gone.
    fn may_be_asked(&self, now: Tick) -> bool {
        let over = self.is_closed() || self.connection.key.protocol == 17 || self.detached;
        let latest = self.asked.map(|at| at.max(self.heard[1]));
        !over && latest.is_none_or(|at| now.ms_since(at) < ASKED_MS + COARSE_MS)
    }
}

impl Gateway {
    pub fn new(
        world: &World,
        forwarding: Arc<Forwarding>,
        equipment: &Equipment,
        timeouts: Timeouts,
        ports: RangeInclusive<u16>,
    ) -> Self {
        let half = || Half {
            rings: equipment.links.iter().map(|_| Rings::default()).collect(),
            pool: equipment.frames,
        };
        let plain = Node::new(world, forwarding, equipment.clone());
        Self { plain, halves: [half(), half()], lives: BTreeMap::new(), timeouts, ports }
    }

    pub fn publish(&mut self, world: &World, forwarding: Arc<Forwarding>) {
        self.plain.publish(world, forwarding);
    }

    /// Live connections, by their slots.
    pub fn connections(&self) -> impl ExactSizeIterator<Item = (Id, &Connection)> {
        self.lives.iter().map(|(id, life)| (*id, &life.connection))
    }

    /// A packet is received, at `start` in its frame.
    pub fn arrives(&mut self, worker: usize, port: usize, start: usize, bytes: &[u8]) {
        let rings = &mut self.halves[worker].rings[port];
        rings.fill -= 1;
        rings.arrived.push_back(Arrival { start, bytes: bytes.to_vec() });
    }

    /// How many packets a worker may take at once, of so many. A flow that begins three times in a turn would
    /// take three slots, of which nobody could tell the order.
    pub fn burst(&self, worker: usize, most: usize) -> usize {
        let mut begins: HashMap<FlowKey, usize> = HashMap::new();
        for rings in &self.halves[worker].rings {
            for arrival in rings.arrived.iter().take(BURST) {
                if let Ok(packet) = parse(&arrival.bytes)
                    && is_syn(&packet)
                {
                    *begins.entry(packet.key).or_default() += 1;
                }
            }
        }
        if begins.values().any(|count| *count > 2) { 1 } else { most }
    }

    /// A worker has taken a turn, with at most `burst` packets of each port: what it must have counted.
    pub fn turn(&mut self, worker: usize, burst: usize, now: Tick, seen: &Seen<'_>) -> Account {
        let mut account = Account::default();
        let mut fresh = self.fresh(seen);
        let ring_size = self.plain.equipment.ring_size;
        for port in 0..self.plain.equipment.links.len() {
            let Half { rings, pool } = &mut self.halves[worker];
            let rings = &mut rings[port];
            *pool += mem::take(&mut rings.completion);
            let taken = rings.arrived.len().min(burst).min(BURST);
            let arrivals: Vec<_> = rings.arrived.drain(..taken).collect();
            let filled = (ring_size - rings.fill).min(*pool);
            rings.fill += filled;
            *pool -= filled;
            if !arrivals.is_empty() {
                account.received += arrivals.len() as u64;
                let fates = self.fates(port, &arrivals, now, &mut fresh, &mut account);
                self.dispatch(worker, fates, &mut account);
            }
        }
        assert!(fresh.values().all(VecDeque::is_empty), "slots taken for nobody: {fresh:?}");
        self.ask(worker, now, seen, &mut account);
        account
    }

    /// Whether packets wait for a worker's next turn.
    pub fn has_arrivals(&self, worker: usize) -> bool {
        self.halves[worker].rings.iter().any(|rings| !rings.arrived.is_empty())
    }

    /// Frames that a worker's pool must hold now.
    pub fn pooled(&self, worker: usize) -> usize {
        self.halves[worker].pool
    }

    fn fresh(&self, seen: &Seen<'_>) -> Fresh {
        let mut fresh = Fresh::new();
        for (id, connection) in &seen.table {
            if !self.lives.contains_key(id) {
                fresh.entry(connection.key).or_default().push_back((*id, *connection));
            }
        }
        for (key, slots) in &mut fresh {
            assert!(slots.len() <= 2, "{key:?} has taken {slots:?}");
            let latest = (seen.found)(key);
            if slots.len() == 2 && latest == Some(slots[0].0) {
                slots.swap(0, 1);
            }
        }
        fresh
    }

    /// What becomes of each packet of a burst.
    fn fates(
        &mut self,
        port: usize,
        arrivals: &[Arrival],
        now: Tick,
        fresh: &mut Fresh,
        account: &mut Account,
    ) -> Vec<Fate> {
        let mut tasks: Vec<_> =
            arrivals.iter().map(|arrival| self.classify(port, arrival, now)).collect();
        for (task, arrival) in tasks.iter_mut().zip(arrivals) {
            if let Task::Question(packet, service) = task {
                let fate = self.question((port, arrival), packet, *service, now, fresh);
                *task = Task::Done(fate.unwrap_or_else(Fate::dropped));
            }
        }
        for task in &mut tasks {
            if let Task::Answer(arrival, packet, id, from) = task {
                let fate = self.answer((port, arrival), packet, (*id, *from), now);
                account.replies += u64::from(fate.is_ok());
                *task = Task::Done(fate.unwrap_or_else(Fate::dropped));
            }
        }
        let done = |task| match task {
            Task::Done(fate) => fate,
            _ => unreachable!("questions and answers are done with"),
        };
        tasks.into_iter().map(done).collect()
    }

    fn classify(&mut self, port: usize, arrival: &Arrival, now: Tick) -> Task {
        let world = &self.plain.world;
        let link = world.links[self.plain.equipment.links[port]];
        let packet = match parse(&arrival.bytes) {
            Ok(packet) => packet,
            Err(reason) => return Task::Done(Fate::dropped(reason)),
        };
        if is_for_us(&arrival.bytes, packet.kind, link) {
            let is_tunnel = |udp_port| world.overlays.iter().any(|own| own.udp_port == udp_port);
            let (key, kind) = (&packet.key, packet.kind);
            if kind == Kind::Packet && packet.protocol == 17 && is_tunnel(key.dst_port) {
                let inside = self.inside(port, arrival, &packet, link.mac);
                return inside.unwrap_or_else(|reason| Task::Done(Fate::dropped(reason)));
            }
            let service = self.plain.service(key);
            if matches!(kind, Kind::Packet | Kind::IcmpError)
                && let Some(service) = service.filter(|service| *service < world.nat.len())
            {
                return Task::Question(packet, service);
            }
        }
        let mut fates = self.plain.fates(port, arrival, &packet, now, &mut None);
        assert_eq!(fates.len(), 1, "what is not translated has one backend: {fates:?}");
        Task::Done(fates.remove(0))
    }

    /// What was in a tunnel, RFC 7348 section 5.
    fn inside(
        &self,
        port: usize,
        arrival: &Arrival,
        outer: &Meaning,
        own: MacAddr,
    ) -> Result<Task, DropReason> {
        let payload = &arrival.bytes[outer.l4_offset + 8..outer.ip.end];
        let header = payload.get(..8).ok_or(Truncated)?;
        if header[0] & 8 == 0 {
            return Err(NatUnmatched);
        }
        let vni = u32::from_be_bytes([0, header[4], header[5], header[6]]);
        let at = outer.l4_offset + 16;
        let inner = Arrival { start: arrival.start + at, bytes: payload[8..].to_vec() };
        let packet = parse(&inner.bytes)?;
        let overlays = self.plain.world.overlays.iter().filter(|overlay| overlay.vni == vni);
        let mut addresses = overlays.flat_map(|own| own.mesh.iter().map(move |mesh| (own, mesh)));
        let ours = addresses.find(|(_, mesh)| mesh.address == packet.key.dst);
        let (overlay, mesh) = ours.ok_or(NatUnmatched)?;
        let answer = match packet.kind {
            Kind::Packet | Kind::IcmpError if [6, 17].contains(&packet.key.protocol) => {
                let id = Id::new(mesh.bank, packet.key.dst_port);
                return Ok(Task::Answer(inner, packet, id, outer.key.src.into()));
            }
            Kind::Arp => {
                let (_, arp) = behind_tags(&inner.bytes).expect("it was parsed");
                arp_reply(&inner.bytes, arp, overlay.mac)
            }
            Kind::NeighbourSolicitation => {
                let answer = advertisement(&inner.bytes, &packet, overlay.mac);
                if inner.start + answer.len() > self.plain.equipment.chunk_bytes {
                    return Err(NoHeadroom);
                }
                answer
            }
            _ => return Err(NatUnmatched),
        };
        let back = sent_back(&arrival.bytes[..at], outer, &answer, own);
        Ok(Task::Done(Fate::answer(port, back)))
    }

    /// The backend in this slot, whatever it serves.
    fn backend(&self, slot: Slot) -> Option<(usize, &BackendSpec)> {
        let services = self.plain.world.services.iter().enumerate();
        let mut all = services.flat_map(|(i, (_, backends))| backends.iter().map(move |b| (i, b)));
        all.find(|(_, backend)| backend.slot == slot)
    }

    /// A client's packet.
    fn question(
        &mut self,
        (port, arrival): (usize, &Arrival),
        packet: &Meaning,
        service: usize,
        now: Tick,
        fresh: &mut Fresh,
    ) -> Result<Fate, DropReason> {
        let ip = self.plain.meant(port, arrival, packet);
        let is_its = |(_, life): &(&Id, &Life)| life.connection.key == packet.key && !life.detached;
        let found = self.lives.iter().find(is_its).map(|(id, _)| *id);
        if packet.kind == Kind::IcmpError {
            let id = found.ok_or(IcmpUnmatched)?;
            return self.error_to_task((port, arrival), packet, &ip, id);
        }
        let way = self.way_of(port, arrival, packet);
        let picked = self.picked(service, packet);
        let id = match self.claim(service, packet, found, picked) {
            Claim::Has(id) => id,
            Claim::Begins => {
                if let Some(life) = found.and_then(|id| self.lives.get_mut(&id)) {
                    life.detached = true;
                }
                self.open(service, packet, (picked, way), now, fresh)?
            }
            Claim::Refused(reason) => {
                if let Some(life) = found.and_then(|id| self.lives.get_mut(&id)) {
                    life.hears(false, 0x04, now);
                }
                let own = self.plain.world.links[usize::from(way.link)].mac;
                return Ok(Fate::refused(port, &arrival.bytes, packet, own, reason));
            }
        };
        let life = &self.lives[&id];
        let (_, backend) = self.backend(life.connection.backend).expect("it serves");
        let (backend, hash) = (backend.clone(), packet.key.hash(&hash_key()));
        if ip.len() > backend.mtu.into() && cut(packet, &ip, backend.mtu).is_none() {
            return Ok(self.plain.wrapped(port, arrival, (packet, &ip), &backend, hash));
        }
        let life = self.lives.get_mut(&id).expect("it was found");
        let known = &mut life.connection.way;
        // Only another station or interface is news: tags alone do not move a router.
        if (known.mac, known.link) != (way.mac, way.link) {
            *known = way;
        }
        life.hears(true, packet.tcp_flags, now);
        let Connection { mesh, task, task_port, .. } = life.connection;
        let ends = ((mesh, id.port()), (task, task_port));
        let mtu = is_syn(packet).then_some(backend.mtu);
        let forms = translated(packet, &ip, ends, mtu);
        Ok(self.wrapped((port, arrival), packet, (mesh, task), forms, &backend))
    }

    /// Whether a client's packet, whose flow was found to have this slot, is of that connection.
    fn claim(
        &self,
        service: usize,
        packet: &Meaning,
        found: Option<Id>,
        picked: Option<Slot>,
    ) -> Claim {
        let (is_syn, is_datagram) = (is_syn(packet), packet.protocol == 17);
        let begins = is_syn || is_datagram;
        let Some((id, life)) = found.map(|id| (id, &self.lives[&id])) else {
            return if begins { Claim::Begins } else { Claim::Refused(NatNoConnection) };
        };
        let backend = self.backend(life.connection.backend).filter(|(of, _)| *of == service);
        let Some((_, backend)) = backend else {
            return if begins { Claim::Begins } else { Claim::Refused(NoBackend) };
        };
        // It goes elsewhere if anybody is there.
        let is_reachable = |slot| self.backend(slot).is_some_and(|(_, backend)| backend.reachable);
        let waits = !is_datagram && (!is_syn || life.answered);
        let moves = !backend.reachable && !waits && picked.is_some_and(is_reachable);
        if is_syn && life.is_closed() || moves { Claim::Begins } else { Claim::Has(id) }
    }

    /// What becomes of a packet that was translated to run between these addresses.
    fn wrapped(
        &self,
        (port, arrival): (usize, &Arrival),
        packet: &Meaning,
        (src, dst): (Address, Address),
        forms: Vec<Vec<u8>>,
        backend: &BackendSpec,
    ) -> Fate {
        let hash = packet.key.hash(&hash_key());
        let inner = Meaning { key: FlowKey { src, dst, ..packet.key }, ..packet.clone() };
        let fate = |ip: Vec<u8>| self.plain.wrapped(port, arrival, (&inner, &ip), backend, hash);
        let mut fates = forms.into_iter().map(fate);
        let mut all = fates.next().expect("there is a form");
        for other in fates {
            for (frame, forms) in all.frames.iter_mut().zip(other.frames) {
                frame.extend(forms);
            }
        }
        all
    }

    /// An error about what a client was sent.
    fn error_to_task(
        &self,
        from: (usize, &Arrival),
        packet: &Meaning,
        ip: &[u8],
        id: Id,
    ) -> Result<Fate, DropReason> {
        let Connection { mesh, task, task_port, backend, .. } = self.lives[&id].connection;
        let quoted = ((task, task_port), (mesh, id.port()));
        let forms = translated_error(packet, ip, &packet.key, (mesh, task), quoted)?;
        let (_, backend) = self.backend(backend).ok_or(NoBackend)?;
        Ok(self.wrapped(from, packet, (mesh, task), forms, backend))
    }

    /// The way that a packet came.
    fn way_of(&self, port: usize, arrival: &Arrival, packet: &Meaning) -> Way {
        let tag = |at: usize| match at < packet.ip.start - 2 {
            true => u32::from_be_bytes(arrival.bytes[at..at + 4].try_into().unwrap()),
            false => 0,
        };
        Way {
            mac: MacAddr(arrival.bytes[6..12].try_into().unwrap()),
            link: self.plain.equipment.links[port] as u8,
            tags: [tag(12), tag(16)],
        }
    }

    /// Maglev's answer.
    fn picked(&self, service: usize, packet: &Meaning) -> Option<Slot> {
        let forwarding = &self.plain.forwarding;
        let maglev = &forwarding.service(service as u32).expect("it is there").maglev;
        let asked = match self.plain.world.scheduled {
            Scheduled::Source(_) => FlowKey { src_port: 0, dst_port: 0, protocol: 0, ..packet.key },
            _ => packet.key,
        };
        maglev.pick(asked.hash(forwarding.maglev_key()))
    }

    /// A new connection.
    fn open(
        &mut self,
        service: usize,
        packet: &Meaning,
        (picked, way): (Option<Slot>, Way),
        now: Tick,
        fresh: &mut Fresh,
    ) -> Result<Id, DropReason> {
        let key = packet.key;
        let world = &self.plain.world;
        let (nat, (vips, backends)) = (&world.nat[service], &world.services[service]);
        let within = |len: u8, differing: u128| len == 0 || differing >> (128 - len) == 0;
        let mut allowed = nat.allow.iter().map(|p| within(p.len, p.address.0 ^ key.src.0));
        if !nat.allow.is_empty() && !allowed.any(|allows| allows) {
            return Err(NotAllowed);
        }
        let picked = picked.ok_or(NoBackend)?;
        let mesh = &world.overlays[nat.overlay as usize].mesh;
        if mesh.iter().all(|mesh| self.used(mesh.bank) == self.ports.len()) {
            return Err(NatExhausted);
        }
        let (id, told) = fresh
            .get_mut(&key)
            .and_then(VecDeque::pop_front)
            .unwrap_or_else(|| panic!("no slot was taken for {key:?}"));
        assert!(self.ports.contains(&id.port()), "{id:?} is not ours to use");
        assert!(mesh.iter().any(|m| (m.bank, m.address) == (id.bank(), told.mesh)), "{told:?}");
        let fewest = |slot: &Slot| {
            let all = takers(backends).map(|taker| self.open_of(taker.slot));
            Some(self.open_of(*slot)) == all.min()
        };
        let may_serve = match world.scheduled {
            Scheduled::Maglev => told.backend == picked,
            Scheduled::RoundRobin => takers(backends).any(|taker| taker.slot == told.backend),
            Scheduled::LeastConnections => fewest(&told.backend),
            Scheduled::Source(_) => {
                told.backend == picked || takers(backends).any(|taker| taker.slot == told.backend)
            }
        };
        assert!(may_serve, "{told:?} has a task that it should not have");
        let named = vips.iter().position(|vip| {
            (vip.address, vip.protocol, vip.port) == (key.dst, key.protocol, key.dst_port)
        });
        let connection = Connection {
            key,
            task: backends.iter().find(|b| b.slot == told.backend).expect("it may serve").task,
            task_port: named.map_or(key.dst_port, |at| nat.targets[at]),
            mesh: told.mesh,
            backend: told.backend,
            way,
        };
        assert!(self.lives.insert(id, Life::new(connection, now)).is_none(), "{id:?} is taken");
        Ok(id)
    }

    fn used(&self, bank: u16) -> usize {
        self.lives.keys().filter(|id| id.bank() == bank).count()
    }

    /// Connections that a backend has.
    pub fn open_of(&self, slot: Slot) -> usize {
        self.lives.values().filter(|life| life.connection.backend == slot).count()
    }

    /// What came out of a tunnel from there, for this slot.
    fn answer(
        &mut self,
        (port, arrival): (usize, &Arrival),
        packet: &Meaning,
        (id, from): (Id, IpAddr),
        now: Tick,
    ) -> Result<Fate, DropReason> {
        let key = &packet.key;
        let is_its = |life: &&Life| {
            let Connection { mesh, task, task_port, .. } = life.connection;
            (mesh, task, task_port) == (key.dst, key.src, key.src_port)
                && life.connection.key.protocol == key.protocol
        };
        let life = self.lives.get(&id).filter(is_its).ok_or(NatUnmatched)?;
        let Connection { key: flow, backend, way, .. } = life.connection;
        let (_, backend) = self.backend(backend).ok_or(NoBackend)?;
        if backend.tunnel.dst != from {
            return Err(SpoofedTunnel);
        }
        let mtu = backend.mtu;
        let ip = self.plain.meant(port, arrival, packet);
        let (client, vip) = ((flow.src, flow.src_port), (flow.dst, flow.dst_port));
        let forms = if packet.kind == Kind::IcmpError {
            translated_error(packet, &ip, key, (vip.0, client.0), (client, vip))?
        } else {
            let life = self.lives.get_mut(&id).expect("it was found");
            life.hears(false, packet.tcp_flags, now);
            translated(packet, &ip, (vip, client), Some(mtu))
        };
        let port = self.plain.port_of(way.link.into()).ok_or(NextHopUnresolved)?;
        let link = self.link_header(&way, flow.src);
        Ok(Fate::leaves(port, forms.iter().map(|ip| [&link, &ip[..]].concat()).collect()))
    }

    /// The way back.
    fn link_header(&self, way: &Way, client: Address) -> Vec<u8> {
        let own = self.plain.world.links[usize::from(way.link)].mac;
        let tags = way.tags.iter().filter(|tag| **tag != 0).flat_map(|tag| tag.to_be_bytes());
        let ethertype = if client.as_v4().is_some() { [8, 0] } else { [0x86, 0xdd] };
        [way.mac.0, own.0].into_iter().flatten().chain(tags).chain(ethertype).collect()
    }

    /// Hands on what became of a burst.
    fn dispatch(&mut self, worker: usize, fates: Vec<Fate>, account: &mut Account) {
        let tells = self.plain.equipment.icmp_errors_per_s > 0;
        let ring_size = self.plain.equipment.ring_size;
        let Half { rings, pool } = &mut self.halves[worker];
        let mut outbound: Vec<Vec<Vec<Vec<u8>>>> = rings.iter().map(|_| Vec::new()).collect();
        for fate in fates {
            let port = fate.port;
            let (frames, drops) = settled(fate, *pool, tells);
            let is_reset = |r: &DropReason| matches!(r, NatNoConnection | NoBackend | BackendGone);
            account.resets += u64::from(!frames.is_empty() && drops.iter().any(is_reset));
            drops.iter().for_each(|reason| account.dropped(*reason));
            // One came in; the others were the pool's.
            *pool = *pool + 1 - frames.len();
            for frame in frames {
                if outbound[port].len() < BURST {
                    outbound[port].push(frame);
                } else {
                    account.dropped(TxRingFull);
                    *pool += 1;
                }
            }
        }
        for (rings, outbound) in rings.iter_mut().zip(outbound) {
            let room = ring_size - rings.tx;
            for (i, frame) in outbound.into_iter().enumerate() {
                if i < room {
                    rings.tx += 1;
                    account.sent += 1;
                    rings.leaving.push_back(Leaving::Frame(frame));
                } else {
                    account.dropped(TxRingFull);
                    *pool += 1;
                }
            }
        }
    }

    /// These are all slots in use: others end when they may and must.
    pub fn look(&mut self, table: &[(Id, Connection)], now: Tick) {
        let table: BTreeMap<_, _> = table.iter().copied().collect();
        let timeouts = self.timeouts;
        self.lives.retain(|id, life| {
            let lifetime = life.lifetime_ms(&timeouts);
            let [surely, latest] = life.heard.map(|at| now.ms_since(at));
            match table.get(id) {
                None => assert!(
                    surely + UNNOTED_MS + COARSE_MS > lifetime,
                    "{:?} was ended {surely} ms after it was heard of",
                    life.connection
                ),
                Some(connection) => {
                    assert_eq!(*connection, life.connection, "{id:?}");
                    assert!(
                        latest <= lifetime + 2 * COARSE_MS + SWEPT_MS,
                        "{id:?} should have ended"
                    );
                }
            }
            table.contains_key(id)
        });
    }

    /// Clients whose task is gone may be asked.
    fn ask(&mut self, worker: usize, now: Tick, seen: &Seen<'_>, account: &mut Account) {
        let mut extra = 0;
        for port in 0..seen.in_flight.len() {
            let link = self.plain.equipment.links[port];
            let is_way =
                |life: &Life| self.plain.port_of(life.connection.way.link.into()) == Some(port);
            let to_be_asked = self.lives.iter().filter(|(_, life)| {
                let gone = self.backend(life.connection.backend).is_none();
                gone && life.may_be_asked(now) && is_way(life)
            });
            let questions: Vec<_> =
                to_be_asked.map(|(id, life)| (*id, self.keepalive(life))).collect();
            if seen.asked > 0 {
                for (id, _) in &questions {
                    self.lives.get_mut(id).expect("it lives").heard[1] = now;
                }
            }
            let rings = &mut self.halves[worker].rings[port];
            let asked = seen.in_flight[port].saturating_sub(rings.tx + rings.completion);
            assert!(asked <= questions.len(), "{asked} questions by link {link}, {questions:?}");
            let questions = Rc::new(RefCell::new(questions));
            for _ in 0..asked {
                rings.leaving.push_back(Leaving::Question(now, Rc::clone(&questions)));
            }
            rings.tx += asked;
            extra += asked;
            self.halves[worker].pool -= asked;
        }
        account.sent += extra as u64;
        for _ in extra as u64..seen.asked {
            account.dropped(TxRingFull);
        }
    }

    fn keepalive(&self, life: &Life) -> Vec<u8> {
        let Connection { key, way, .. } = &life.connection;
        let own = self.plain.world.links[usize::from(way.link)].mac;
        let bytes = segment_of_ours(key.reversed(), own, &way.mac.0, false, (0, Some(0)));
        [&self.link_header(way, key.src), &bytes[14..]].concat()
    }

    /// A frame leaves: it must be the next.
    pub fn leaves(&mut self, worker: usize, port: usize, bytes: &[u8]) {
        let rings = &mut self.halves[worker].rings[port];
        (rings.tx, rings.completion) = (rings.tx - 1, rings.completion + 1);
        match rings.leaving.pop_front().expect("something leaves") {
            Leaving::Frame(forms) => assert!(
                forms.iter().any(|form| form == bytes),
                "what leaves by port {port} of worker {worker}\n{bytes:02x?}\nshould be\n{:02x?}",
                forms
            ),
            Leaving::Question(at, questions) => {
                let mut questions = questions.borrow_mut();
                let which = questions.iter().position(|(_, question)| question == bytes);
                let which = which.unwrap_or_else(|| panic!("{bytes:02x?} asks nobody"));
                let (id, _) = questions.remove(which);
                if let Some(life) = self.lives.get_mut(&id) {
                    life.asked.get_or_insert(at);
                }
            }
        }
    }

    /// Nothing more is to leave.
    pub fn all_has_left(&self) {
        let mut rings = self.halves.iter().flat_map(|half| &half.rings);
        assert!(rings.all(|rings| rings.leaving.is_empty() && rings.arrived.is_empty()));
    }

    /// All connections have ended and are forgotten.
    pub fn forget(&mut self) {
        self.plain.forget();
        self.lives.clear();
    }
}

/// What becomes of a packet when so many frames are in the pool, and senders are told what is too big or not: what
/// leaves, and what is counted.
fn settled(fate: Fate, pool: usize, tells: bool) -> (Vec<Vec<Vec<u8>>>, Vec<DropReason>) {
    let Fate { frames, drops, .. } = fate;
    let count = |reason| drops.iter().filter(|drop| **drop == reason).count();
    let nothing = |reason| (Vec::new(), vec![reason]);
    if count(NoFrame) > 0 {
        let lost = count(NoHeadroom);
        let borrowed = frames.len() + lost - 1;
        return match borrowed <= pool {
            true => (frames, vec![NoHeadroom; lost]),
            false => nothing(NoFrame),
        };
    }
    if count(TooBigSilent) > 0 && drops.len() > 1 {
        return match (tells, frames.is_empty()) {
            (false, _) => nothing(TooBigSilent),
            (true, true) => nothing(NoHeadroom),
            (true, false) => (frames, vec![TooBig]),
        };
    }
    let counted = drops.iter().copied().filter(|reason| frames.is_empty() || *reason != TxRingFull);
    (frames.clone(), counted.collect())
}
