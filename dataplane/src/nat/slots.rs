//! NAT's slots: which port of which mesh address stands for which connection.
//!
//! A slot *is* an address and a port: a task's answer names it by its destination. The table is the authority,
//! not a cache: a live slot is never evicted, and if none is free, a new connection is refused and no old one
//! harmed. All workers share it, without locks, for an answer comes to whatever queue the network card puts
//! its tunnel's packet on.
//!
//! Who sets a slot's bit in `taken` owns it until it clears the bit. A record is read by others while it is
//! written, so its state, which carries a generation, is read before and after (a seqlock of atomics; Boehm,
//! "Can seqlocks get along with programming language memory models?", MSPC 2012).
//!
//! A client's packet finds its slot by an index of the flow's hash: two candidate buckets, all a quarter full at
//! most. The first packets of one flow may come to two workers at the same moment
//! only if the network card moves flows between queues; then each makes a slot, all later packets use the
//! one that is found first, and the other runs out.

use std::{ops::RangeInclusive, sync::OnceLock};

use crate::{
    flow::{Address, FlowKey, protocol, tcp_flags},
    forwarding::{self, MAX_BACKENDS, Mesh},
    memory::{self, AllocationError},
    prefetch::prefetch,
    sync::{AtomicU32, AtomicU64, Ordering, fence},
    time::Tick,
    wire::{checksum::Sum, ethernet::MacAddr},
};

/// Ports of one address, as a power of two. Loom can't have so many.
const PORT_BITS: u32 = if cfg!(loom) { 1 } else { 16 };
/// Slots in a bank: the ports of one address.
pub const BANK: usize = 1 << PORT_BITS;
/// The most banks that an index entry can name.
pub const MAX_BANKS: usize = 16;
/// Copies that can be kept of which slots are in use: one for each interface.
const MAX_MIRRORS: usize = 64;
/// Bits in a word of `taken`.
const WORD: usize = 64;
/// Words of `taken` for a bank.
const BANK_WORDS: usize = BANK.div_ceil(WORD);

/// Entries of an index bucket: half a cache line, for all are compared.
const LANES: usize = if cfg!(loom) { 2 } else { 8 };
/// Bits of an index entry that say which slot.
const ID_BITS: u32 = 20;
const ID_MASK: u32 = (1 << ID_BITS) - 1;
const _: () = assert!(MAX_BANKS << PORT_BITS <= 1 << ID_BITS);

/// How often the sweep comes round to each slot while workers turn, in milliseconds.
const SWEEP_PERIOD_MS: u64 = 512;

/// One unit of a state's time, as a power of two of milliseconds: 64 ms, wraps after 8 years.
const TIME_SHIFT: u32 = 6;
/// A silent moment that is too short to be noted, in units: a second.
const UNNOTED: u32 = 1000 >> TIME_SHIFT;

/// A slot's number: its bank times 65,536, plus its port. Port 0 is nobody's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Id(u32);

impl Id {
    /// Port 0 of the first bank.
    pub const NOBODYS: Self = Self(0);

    /// The slot of a bank's port.
    #[inline]
    pub fn new(bank: u16, port: u16) -> Self {
        Self(u32::from(bank) << PORT_BITS | u32::from(port))
    }

    /// Which address it belongs to.
    pub fn bank(self) -> u16 {
        (self.0 >> PORT_BITS) as u16
    }

    /// Which port of that.
    #[inline]
    pub fn port(self) -> u16 {
        (self.0 & (BANK as u32 - 1)) as u16
    }
}

/// How long a silent slot lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// TCP before the client has acknowledged the task's answer, and UDP before it has sent more after one, in
    /// seconds.
    pub opening_s: u32,
    /// Established TCP, in seconds.
    pub tcp_idle_s: u32,
    /// TCP of which one side has sent FIN, in seconds.
    pub half_closed_s: u32,
    /// TCP that the task has closed first, in seconds: it remembers the port for so long (TIME-WAIT).
    pub time_wait_s: u32,
    /// UDP after that, in seconds.
    pub udp_idle_s: u32,
}

/// A client whose task is gone is asked to speak for so long.
const ASK_MS: u64 = 3000;

/// TCP that was reset, or closed by the client first, in milliseconds: late packets may still come.
const LINGER_MS: u64 = 1000;

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            opening_s: 30,
            tcp_idle_s: 4 * 3600,
            half_closed_s: 300,
            time_wait_s: 60,
            udp_idle_s: 300,
        }
    }
}

/// Which end a packet comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Who connected.
    Client,
    /// Who was connected to.
    Task,
}

/// A slot's state: whether it is live, its generation, what was seen, and when last.
///
/// ```text
///  63   62      48 47    40 39    32 31            0
/// +----+----------+--------+--------+--------------+
/// |live|generation| flags           | time         |
/// +----+----------+-----------------+--------------+
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct State(u64);

impl State {
    const LIVE: u64 = 1 << 63;
    const GENERATION: u64 = 0x7fff << 48;
    const TIME: u64 = 0xffff_ffff;

    const CLIENT_FIN: u64 = 1 << 32;
    const TASK_FIN: u64 = 1 << 33;
    const RESET: u64 = 1 << 34;
    /// The client's FIN came before the task's.
    const CLIENT_FIRST: u64 = 1 << 35;
    /// The task has sent something.
    const ANSWERED: u64 = 1 << 36;
    /// The client has sent something after that.
    const ESTABLISHED: u64 = Self::ANSWERED << 1;
    const DATAGRAMS: u64 = 1 << 38;
    /// The client's packets no longer find it: it only keeps its port from being used again too soon.
    const DETACHED: u64 = 1 << 39;
    /// Its task is gone, and the client was asked to speak.
    const ASKED: u64 = 1 << 40;

    const BOTH_FIN: u64 = Self::CLIENT_FIN | Self::TASK_FIN;

    #[inline]
    fn has(self, flag: u64) -> bool {
        self.0 & flag != 0
    }

    #[inline]
    fn is_live(self) -> bool {
        self.has(Self::LIVE)
    }

    /// Whether this and `later` are states of the same life of a slot.
    #[inline]
    fn is_same_life(self, later: Self) -> bool {
        const LIFE: u64 = State::LIVE | State::GENERATION;
        self.0 & LIFE == later.0 & LIFE
    }

    fn units(now: Tick) -> u64 {
        now.0 >> TIME_SHIFT & Self::TIME
    }

    /// Time without a packet that was noted, in units.
    #[inline]
    fn silent(self, now: Tick) -> u32 {
        // A state that another worker has just renewed may be ahead of this worker's clock.
        self.age(now).max(0) as u32
    }

    #[inline(always)]
    fn age(self, now: Tick) -> i32 {
        (Self::units(now) as u32).wrapping_sub(self.0 as u32) as i32
    }

    /// Whether both sides are through with the connection.
    pub fn is_closed(self) -> bool {
        self.has(Self::RESET) || self.0 & Self::BOTH_FIN == Self::BOTH_FIN
    }

    /// Whether the task has sent something.
    pub fn is_answered(self) -> bool {
        self.has(Self::ANSWERED)
    }

    /// What it is called.
    pub fn label(self) -> &'static str {
        match self {
            _ if self.has(Self::DATAGRAMS) => "datagrams",
            _ if self.has(Self::RESET) => "reset",
            _ if self.is_closed() => "closed",
            _ if self.0 & Self::BOTH_FIN != 0 => "closing",
            _ if self.has(Self::ESTABLISHED) => "established",
            _ => "opening",
        }
    }

    /// Whether a packet is as the last ones were, so that there is nothing to note. If not, there may yet be nothing.
    #[inline(always)]
    fn is_settled(self, side: Side, flags: u8, now: Tick) -> bool {
        let news = match side {
            // As soon as the task has answered, the client establishes the connection.
            Side::Client => (self.0 ^ self.0 >> 1) & Self::ANSWERED,
            Side::Task => !self.0 & Self::ANSWERED,
        };
        let ends = u64::from(flags & (tcp_flags::FIN | tcp_flags::RST));
        news | self.0 & Self::RESET | ends == 0 && self.age(now) < UNNOTED as i32
    }

    /// What it becomes by a packet. Equal to itself if nothing is worth noting.
    fn after(self, side: Side, flags: u8, now: Tick) -> Self {
        let mut state = self.0;
        if flags & tcp_flags::RST != 0 {
            state |= Self::RESET;
        } else {
            // A reset that was not believed, or was forged: the connection goes on.
            state &= !Self::RESET;
            if flags & tcp_flags::FIN != 0 {
                state |= match side {
                    Side::Client if state & Self::BOTH_FIN == 0 => {
                        Self::CLIENT_FIN | Self::CLIENT_FIRST
                    }
                    Side::Client => Self::CLIENT_FIN,
                    Side::Task => Self::TASK_FIN,
                };
            }
            match side {
                Side::Task => state |= Self::ANSWERED,
                Side::Client if state & Self::ANSWERED != 0 => state |= Self::ESTABLISHED,
                Side::Client => {}
            }
        }
        if state != self.0 || self.silent(now) >= UNNOTED {
            state = state & !Self::TIME | Self::units(now);
        }
        Self(state)
    }
}

/// Where a client's packets come from, and answers to it go: the way back is the way it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Way {
    /// The station that sent its first packet.
    pub mac: MacAddr,
    /// Index of the interface that it came in by.
    pub link: u8,
    /// VLAN tags, outermost first, each with its ethertype; 0 for none.
    pub tags: [u32; 2],
}

/// What a slot stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    /// From the client to the VIP.
    pub key: FlowKey,
    /// Who serves it.
    pub task: Address,
    /// At which port.
    pub task_port: u16,
    /// Who the task takes for its client; the port is the slot's.
    pub mesh: Address,
    /// The task as a backend.
    pub backend: forwarding::Slot,
    /// The way to the client.
    pub way: Way,
}

/// What changes in a packet's checksums by translation, as ones'-complement sums.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sums {
    /// Addresses: in IPv4's header.
    pub addresses: u16,
    /// Addresses and ports: in the transport's.
    pub all: u16,
}

impl Sums {
    /// What changes by the way back.
    #[inline(always)]
    pub fn reversed(self) -> Self {
        Self { addresses: !self.addresses, all: !self.all }
    }

    fn of(connection: &Connection, port: u16) -> Self {
        let Connection { key, task, task_port, mesh, .. } = connection;
        let add = |sum: Sum, address: &Address| sum.add_bytes(&address.0.to_be_bytes());
        let sum = |one, other| add(add(Sum::default(), one), other);
        let (old, new) = (sum(&key.src, &key.dst), sum(mesh, task));
        let addresses = new.add_u16(!old.fold());
        let all = addresses.add_u16(port).add_u16(*task_port);
        let all = all.add_u16(!key.src_port).add_u16(!key.dst_port);
        Self { addresses: addresses.fold(), all: all.fold() }
    }
}

/// A slot's words: one cache line, the only one that IPv4 needs.
#[derive(Debug, Default)]
#[cfg_attr(not(loom), derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout))]
#[repr(C, align(64))]
struct Record([AtomicU64; 8]);

/// Which word of a record is what.
mod word {
    pub const STATE: usize = 0;
    /// The client's and the VIP's address, if they are IPv4.
    pub const ENDS: usize = 1;
    pub const PORTS: usize = 2;
    /// The mesh address and the task's, likewise.
    pub const INSIDE: usize = 3;
    /// The backend, and what changes in checksums.
    pub const BACKEND: usize = 4;
    pub const STATION: usize = 5;
    pub const TAGS: usize = 6;
    pub const HASH: usize = 7;
}

/// The addresses of a slot's connection, if they are IPv6: two words each, the upper half first.
#[derive(Debug, Default)]
#[cfg_attr(not(loom), derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout))]
#[repr(C, align(64))]
struct Wide([AtomicU64; 8]);

/// Two addresses of IPv4 in one word.
#[inline(always)]
fn narrow(pair: [Address; 2]) -> u64 {
    let [one, other] = pair.map(|Address(address)| u64::from(address as u32));
    one << 32 | other
}

/// Client's and VIP's port, family, protocol and the task's port in one word; the last does not name the flow.
#[inline(always)]
fn ports(key: &FlowKey, is_v6: bool, task_port: u16) -> u64 {
    // In the key's own order, so that it takes two loads.
    u64::from(key.src_port)
        | u64::from(key.dst_port) << 16
        | u64::from(key.protocol) << 32
        | if is_v6 { IS_V6 } else { 0 }
        | u64::from(task_port) << TASK_PORT
}

/// In [`ports`]: the addresses are IPv6.
const IS_V6: u64 = 1 << 40;
/// Likewise: where the task's port is.
const TASK_PORT: u32 = 48;

/// Interface and MAC address of a way in one word.
#[inline(always)]
fn station(way: &Way) -> u64 {
    let [a, b, c, d, e, f] = way.mac.0;
    u64::from_le_bytes([way.link, 0, a, b, c, d, e, f])
}

/// What [`station`] has packed.
#[inline(always)]
fn unpacked(station: u64) -> (u8, MacAddr) {
    let [link, _, mac @ ..] = station.to_le_bytes();
    (link, MacAddr(mac))
}

fn tags(way: &Way) -> u64 {
    u64::from(way.tags[0]) << 32 | u64::from(way.tags[1])
}

/// The bits of [`ports`] that name a flow.
const FLOW_PORTS: u64 = (1 << TASK_PORT) - 1;

impl Record {
    #[inline(always)]
    fn word(&self, at: usize) -> u64 {
        self.0[at].load(Ordering::Relaxed)
    }

    fn set(&self, at: usize, value: u64) {
        self.0[at].store(value, Ordering::Relaxed);
    }

    #[inline(always)]
    fn state(&self) -> State {
        State(self.0[word::STATE].load(Ordering::Acquire))
    }

    /// The state of a live record. What is read next counts if the record then [lives on](Self::lives_on).
    #[inline(always)]
    fn live(&self) -> Option<State> {
        let state = self.state();
        state.is_live().then_some(state)
    }

    /// Whether all that was read since [`Self::live`] is of the same life.
    #[inline(always)]
    fn lives_on(&self, state: State) -> bool {
        fence(Ordering::Acquire);
        state.is_same_life(State(self.word(word::STATE)))
    }

    fn way(&self) -> Way {
        let (link, mac) = unpacked(self.word(word::STATION));
        let tags = self.word(word::TAGS);
        Way { mac, link, tags: [(tags >> 32) as u32, tags as u32] }
    }

    /// The backend, and what changes in checksums on the way to it.
    #[inline(always)]
    fn backend(&self) -> (forwarding::Slot, Sums) {
        let word = self.word(word::BACKEND);
        ((word >> 32) as u32, Sums { addresses: (word >> 16) as u16, all: word as u16 })
    }
}

impl Wide {
    fn set(&self, at: usize, addresses: [Address; 2]) {
        let words = addresses.map(|Address(all)| [(all >> 64) as u64, all as u64]);
        for (place, word) in self.0[at..].iter().zip(words.as_flattened()) {
            place.store(*word, Ordering::Relaxed);
        }
    }

    fn get(&self, at: usize) -> [Address; 2] {
        let word = |at: usize| u128::from(self.0[at].load(Ordering::Relaxed));
        [at, at + 2].map(|at| Address(word(at) << 64 | word(at + 1)))
    }
}

/// Where a slot's connection stands.
#[derive(Clone, Copy)]
struct Place<'a> {
    record: &'a Record,
    wide: &'a [Wide],
    id: Id,
}

impl Place<'_> {
    #[inline(always)]
    fn is_v6(&self) -> bool {
        self.record.word(word::PORTS) & IS_V6 != 0
    }

    #[inline(always)]
    fn task_port(&self) -> u16 {
        (self.record.word(word::PORTS) >> TASK_PORT) as u16
    }

    /// The two addresses of a word of the record, which are elsewhere if they are IPv6.
    #[inline(always)]
    fn addresses(&self, at: usize, is_v6: bool) -> [Address; 2] {
        if is_v6 {
            return self.wide_addresses(at);
        }
        let pair = self.record.word(at);
        [(pair >> 32) as u32, pair as u32].map(|address| Address::v4(address.to_be_bytes()))
    }

    /// Apart, so that IPv4 has the registers to itself.
    #[inline(never)]
    fn wide_addresses(&self, at: usize) -> [Address; 2] {
        let at = if at == word::ENDS { 0 } else { 4 };
        self.wide.get(self.id.0 as usize).map_or([Address(0); 2], |wide| wide.get(at))
    }

    /// Whether this is a flow's slot, which is of this family.
    #[inline(always)]
    fn is_of(&self, key: &FlowKey, is_v6: bool) -> bool {
        let differing = self.record.word(word::PORTS) ^ ports(key, is_v6, 0);
        differing & FLOW_PORTS == 0 && self.addresses(word::ENDS, is_v6) == [key.src, key.dst]
    }

    #[inline(always)]
    fn key(&self, is_v6: bool) -> FlowKey {
        let ports = self.record.word(word::PORTS);
        let [src, dst] = self.addresses(word::ENDS, is_v6);
        FlowKey {
            src,
            dst,
            src_port: ports as u16,
            dst_port: (ports >> 16) as u16,
            protocol: (ports >> 32) as u8,
        }
    }

    fn connection(&self) -> Connection {
        let is_v6 = self.is_v6();
        let [mesh, task] = self.addresses(word::INSIDE, is_v6);
        Connection {
            key: self.key(is_v6),
            task,
            task_port: self.task_port(),
            mesh,
            backend: self.record.backend().0,
            way: self.record.way(),
        }
    }

    /// Writes a new life into a slot that the caller has just taken.
    fn begin(&self, connection: &Connection, hash: u64, now: Tick) {
        let Connection { key, task, task_port, mesh, backend, way } = connection;
        let record = self.record;
        let generation = record.word(word::STATE).wrapping_add(1 << 48) & State::GENERATION;
        record.set(word::STATE, generation);
        // Whoever reads one of the words below and then the state again sees that it changed.
        fence(Ordering::Release);
        let (ends, inside) = ([key.src, key.dst], [*mesh, *task]);
        let is_v6 = key.is_v6();
        if is_v6 && let Some(wide) = self.wide.get(self.id.0 as usize) {
            wide.set(0, ends);
            wide.set(4, inside);
        }
        record.set(word::ENDS, narrow(ends));
        record.set(word::INSIDE, narrow(inside));
        record.set(word::PORTS, ports(key, is_v6, *task_port));
        let Sums { addresses, all } = Sums::of(connection, self.id.port());
        let sums = u64::from(addresses) << 16 | u64::from(all);
        record.set(word::BACKEND, u64::from(*backend) << 32 | sums);
        record.set(word::STATION, station(way));
        record.set(word::TAGS, tags(way));
        record.set(word::HASH, hash);
        let flags = if key.protocol == protocol::UDP { State::DATAGRAMS } else { 0 };
        let state = State::LIVE | generation | flags | State::units(now);
        record.0[word::STATE].store(state, Ordering::Release);
    }
}

/// The slot that a client's packet has, and what the packet becomes.
#[derive(Clone, Copy, Debug)]
pub struct ToTask {
    /// The slot.
    pub id: Id,
    /// What it was found in.
    pub state: State,
    /// Who serves the connection.
    pub backend: forwarding::Slot,
    /// Its new source.
    pub mesh: Address,
    /// Its new destination.
    pub task: Address,
    /// The task's port.
    pub task_port: u16,
    /// What changes in its checksums.
    pub sums: Sums,
    /// Where answers go, as [`station`] gives it.
    station: u64,
}

impl ToTask {
    /// Whether answers go to the station that sent this packet, by the interface that it came in by.
    pub fn is_way_of(&self, packet: &[u8], link: u8) -> bool {
        is_way_of(packet, link, self.station)
    }
}

/// Whether a packet that came in by this interface is from this station, as [`station`] gives it.
#[inline(always)]
fn is_way_of(packet: &[u8], link: u8, station: u64) -> bool {
    // The source address, with the end of the destination's before it.
    let source = packet.get(4..).and_then(|rest| rest.first_chunk());
    source.is_some_and(|source| u64::from_le_bytes(*source) & !0xffff | u64::from(link) == station)
}

/// What a packet of plain IPv4 becomes, as it stands in its slot's record: nothing is unpacked but to be written.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    /// What it was found in.
    pub state: State,
    /// Who serves the connection.
    pub backend: forwarding::Slot,
    /// Its new source address above its new destination.
    pub addresses: u64,
    /// Its new source port above its new destination.
    pub ports: u32,
    /// What changes in its checksums.
    pub sums: Sums,
    station: u64,
}

impl Plain {
    /// As [`ToTask::is_way_of`].
    #[inline(always)]
    pub fn is_way_of(&self, packet: &[u8], link: u8) -> bool {
        is_way_of(packet, link, self.station)
    }

    /// Where answers go: the interface, and the station.
    #[inline(always)]
    pub fn way(&self) -> (u8, MacAddr) {
        unpacked(self.station)
    }
}

/// What a task's packet becomes.
#[derive(Clone, Copy, Debug)]
pub struct ToClient {
    /// From the client to the VIP: the packet goes the other way.
    pub key: FlowKey,
    /// What changes in its checksums.
    pub sums: Sums,
    /// Who sent it.
    pub backend: forwarding::Slot,
    /// Where it goes.
    pub way: Way,
}

/// Index entries: bits of the hash, and the slot. 0: none.
#[derive(Debug, Default)]
#[cfg_attr(not(loom), derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout))]
#[repr(C, align(32))]
struct Bucket([AtomicU32; LANES]);

impl Bucket {
    /// The slot that an entry names, if it has this tag.
    #[inline(always)]
    fn tagged(&self, lane: usize, tag: u32) -> Option<Id> {
        let entry = self.0[lane].load(Ordering::Acquire);
        ((entry ^ tag) & !ID_MASK == 0).then_some(Id(entry & ID_MASK))
    }

    /// Which entries have this tag, a bit each.
    #[inline(always)]
    fn lanes(&self, tag: u32) -> u32 {
        let mut found = 0;
        for (lane, entry) in self.0.iter().enumerate() {
            let differs = (entry.load(Ordering::Relaxed) ^ tag) & !ID_MASK;
            found |= u32::from(differs == 0) << lane;
        }
        found
    }

    /// The slot that an entry names. What it is of was written before.
    #[inline(always)]
    fn id(&self, lane: usize) -> Id {
        Id(self.0[lane].load(Ordering::Acquire) & ID_MASK)
    }
}

/// The slots of all mesh addresses.
#[derive(Debug)]
pub struct Slots {
    taken: &'static [AtomicU64],
    /// Copies of `taken`.
    mirrors: [OnceLock<&'static [AtomicU64]>; MAX_MIRRORS],
    records: &'static [Record],
    wide: &'static [Wide],
    index: &'static [Bucket],
    /// Connections of each backend, by its slot.
    open: &'static [AtomicU32],
    timeouts: Timeouts,
    ports: RangeInclusive<u16>,
}

impl Slots {
    /// Free slots for so many mesh addresses, rounded up to a power of two of at most [`MAX_BANKS`], of the
    /// ports within `ports`: 5.3 MB for each address, and as much as 4.2 MB more once IPv6 is translated.
    ///
    /// # Errors
    /// If there is not enough memory.
    ///
    /// # Panics
    /// If `ports` begins with 0 or holds nothing.
    pub fn new(
        banks: usize,
        timeouts: Timeouts,
        ports: RangeInclusive<u16>,
    ) -> Result<Self, AllocationError> {
        assert!(*ports.start() > 0 && !ports.is_empty(), "port 0 is nobody's");
        let slots = banks.clamp(1, MAX_BANKS).next_power_of_two() * BANK;
        let (taken, _) = memory::zeroed(slots.div_ceil(WORD))?;
        let (records, _) = memory::zeroed(slots)?;
        let wide = memory::untouched(slots)?;
        let (index, _) = memory::zeroed((4 * slots / LANES).max(2))?;
        let (open, _) = memory::zeroed(if cfg!(loom) { 4 } else { MAX_BACKENDS })?;
        let mirrors = [const { OnceLock::new() }; MAX_MIRRORS];
        Ok(Self { taken, mirrors, records, wide, index, open, timeouts, ports })
    }

    /// Keeps a copy of which slots are in use in this memory too, a bit for each number. `false` if there are too
    /// many copies, or the memory is too short.
    pub fn mirror(&self, memory: &'static [AtomicU64]) -> bool {
        let fits = memory.len() >= self.taken.len();
        let kept = fits && self.mirrors.iter().any(|mirror| mirror.set(memory).is_ok());
        // What was taken before; what is taken meanwhile is noted twice.
        for (word, copy) in self.taken.iter().zip(memory).filter(|_| kept) {
            copy.fetch_or(word.load(Ordering::Acquire), Ordering::Relaxed);
        }
        kept
    }

    /// The same word of all copies.
    fn copies(&self, at: usize) -> impl Iterator<Item = &AtomicU64> {
        self.mirrors.iter().map_while(move |mirror| mirror.get()?.get(at))
    }

    /// Mesh addresses that there are slots for.
    pub fn banks(&self) -> usize {
        self.records.len() / BANK
    }

    /// Memory that packets of IPv4 may read at any place, in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(self.records) + size_of_val(self.index)
    }

    /// Slots that can be in use at once, of one mesh address.
    pub fn capacity(&self) -> usize {
        self.ports.len()
    }

    /// Slots in use of a bank.
    pub fn used(&self, bank: u16) -> usize {
        let of_bank = self.taken.iter().skip(usize::from(bank) * BANK_WORDS).take(BANK_WORDS);
        of_bank.map(|word| word.load(Ordering::Relaxed).count_ones() as usize).sum()
    }

    /// All live connections with their slots, racily: one that begins or ends meanwhile may be left out.
    pub fn connections(&self) -> impl Iterator<Item = (Id, State, Connection)> {
        let ids = self.taken.iter().enumerate().flat_map(|(at, word)| {
            let taken = word.load(Ordering::Relaxed);
            bits(taken).map(move |bit| Id((at * WORD + bit) as u32))
        });
        ids.filter_map(|id| self.connection(id).map(|(state, connection)| (id, state, connection)))
    }

    /// Connections that a backend has: those that clients' packets find, and those that ended a moment ago.
    pub fn open_of(&self, backend: forwarding::Slot) -> u32 {
        self.open.get(backend as usize).map_or(0, |open| open.load(Ordering::Relaxed))
    }

    /// What a slot stands for.
    pub fn connection(&self, id: Id) -> Option<(State, Connection)> {
        let place = self.place(id)?;
        let state = place.record.live()?;
        let connection = place.connection();
        place.record.lives_on(state).then_some((state, connection))
    }

    /// Time since a packet was noted, in milliseconds: up to a second more than since the last packet.
    pub fn silent_ms(&self, state: State, now: Tick) -> u64 {
        u64::from(state.silent(now)) << TIME_SHIFT
    }

    /// How long a silent slot lives in this state, in milliseconds.
    fn lifetime_ms(&self, state: State) -> u64 {
        let Timeouts { opening_s, tcp_idle_s, half_closed_s, time_wait_s, udp_idle_s } =
            self.timeouts;
        let seconds = match state {
            _ if state.has(State::RESET) => return LINGER_MS,
            // Most are one question and one answer.
            _ if state.has(State::DATAGRAMS) && !state.has(State::ESTABLISHED) => {
                opening_s.min(udp_idle_s)
            }
            _ if state.has(State::DATAGRAMS) => udp_idle_s,
            _ if state.is_closed() && state.has(State::CLIENT_FIRST) => return LINGER_MS,
            _ if state.is_closed() => time_wait_s,
            _ if state.0 & State::BOTH_FIN != 0 => half_closed_s,
            _ if state.has(State::ESTABLISHED) => tcp_idle_s,
            _ => opening_s,
        };
        u64::from(seconds) * 1000
    }

    fn is_expired(&self, state: State, now: Tick) -> bool {
        // One more for the unit already begun.
        u64::from(state.silent(now)) << TIME_SHIFT > self.lifetime_ms(state) + (1 << TIME_SHIFT)
    }

    #[inline(always)]
    fn record(&self, id: Id) -> Option<&Record> {
        self.records.get(id.0 as usize)
    }

    #[inline(always)]
    fn place(&self, id: Id) -> Option<Place<'_>> {
        Some(Place { record: self.record(id)?, wide: self.wide, id })
    }

    #[inline(always)]
    fn buckets(&self, hash: u64) -> [usize; 2] {
        let mask = self.index.len() - 1;
        let [one, other] = [hash as usize & mask, (hash >> 20) as usize & mask];
        // Two of one kind would be one.
        [one, if other == one { other ^ 1 } else { other }]
    }

    /// Bits of the hash beyond the buckets' numbers, as they stand in an index entry.
    #[inline(always)]
    fn tag(hash: u64) -> u32 {
        (hash >> 32) as u32 & !ID_MASK
    }

    /// Which entry of a bucket is tried first: at a quarter full, it is nearly always free, so that one is compared
    /// and not eight.
    #[inline(always)]
    fn lane(hash: u64) -> usize {
        (hash >> 40) as usize % LANES
    }

    /// Begins to fetch what [`Self::find`] reads first.
    #[inline]
    pub fn prefetch(&self, hash: u64) {
        prefetch(&self.index[self.buckets(hash)[0]]);
    }

    /// The slot that a flow with this hash most probably has, if it has any; else any that is nobody's.
    #[inline(always)]
    pub fn likely(&self, hash: u64) -> Id {
        let bucket = &self.index[self.buckets(hash)[0]];
        let tag = Self::tag(hash);
        bucket.tagged(Self::lane(hash), tag).unwrap_or_else(|| {
            let lanes = bucket.lanes(tag);
            if lanes == 0 {
                Id::NOBODYS
            } else {
                bucket.id(lanes.trailing_zeros() as usize % LANES)
            }
        })
    }

    /// Begins to fetch a slot, as far as IPv4 needs it.
    #[inline]
    pub fn prefetch_slot(&self, id: Id) {
        if let Some(record) = self.record(id) {
            prefetch(record);
        }
    }

    /// Slots with the same tag.
    #[inline(always)]
    fn candidates(&self, hash: u64) -> impl Iterator<Item = Id> {
        let tag = Self::tag(hash);
        let buckets = self.buckets(hash).into_iter().map(|at| &self.index[at]);
        buckets
            .flat_map(move |bucket| bits(u64::from(bucket.lanes(tag))).map(|lane| bucket.id(lane)))
    }

    /// The slot that a client's packets have, and what they become.
    pub fn find(&self, hash: u64, key: &FlowKey) -> Option<ToTask> {
        self.candidates(hash).find_map(|id| self.to_task(id, key, key.is_v6()))
    }

    /// The same of a plain packet, if it is in this slot: for nearly every packet, in the one that is [`Self::likely`].
    #[inline(always)]
    pub fn find_plain(&self, id: Id, key: &FlowKey) -> Option<Plain> {
        let record = self.record(id)?;
        let state = record.live()?;
        let ports_word = record.word(word::PORTS);
        let is_its = record.word(word::ENDS) == narrow([key.src, key.dst])
            && (ports_word ^ ports(key, false, 0)) & FLOW_PORTS == 0
            && !state.has(State::DETACHED);
        let (backend, sums) = record.backend();
        let addresses = record.word(word::INSIDE);
        let ports = u32::from(id.port()) << 16 | (ports_word >> TASK_PORT) as u32;
        let station = record.word(word::STATION);
        let plain = Plain { state, backend, addresses, ports, sums, station };
        (is_its && record.lives_on(state)).then_some(plain)
    }

    #[inline(always)]
    fn to_task(&self, id: Id, key: &FlowKey, is_v6: bool) -> Option<ToTask> {
        let place = self.place(id)?;
        let record = place.record;
        let state = record.live()?;
        let [mesh, task] = place.addresses(word::INSIDE, is_v6);
        let (backend, sums) = record.backend();
        let task_port = place.task_port();
        let station = record.word(word::STATION);
        let is_its =
            place.is_of(key, is_v6) && !state.has(State::DETACHED) && record.lives_on(state);
        is_its.then_some(ToTask { id, state, backend, mesh, task, task_port, sums, station })
    }

    /// Sends answers another way from now on.
    pub fn redirect(&self, (id, state): (Id, State), way: &Way) {
        if let Some(record) = self.record(id)
            && state.is_same_life(record.state())
        {
            record.set(word::STATION, station(way));
            record.set(word::TAGS, tags(way));
        }
    }

    /// The backend of a slot, if it still lives the life that `state` is of.
    pub fn backend(&self, id: Id, state: State) -> Option<forwarding::Slot> {
        let record = self.record(id)?;
        let backend = record.backend().0;
        record.lives_on(state).then_some(backend)
    }

    /// What a task's packet becomes, if `answer`, which runs from the task to the mesh address, is of the
    /// connection that this slot stands for.
    pub fn to_client(&self, id: Id, answer: &FlowKey) -> Option<(State, ToClient)> {
        let place = self.place(id)?;
        let record = place.record;
        let state = record.live()?;
        let is_v6 = answer.is_v6();
        let key = place.key(is_v6);
        let is_its = place.is_v6() == is_v6
            && place.addresses(word::INSIDE, is_v6) == [answer.dst, answer.src]
            && place.task_port() == answer.src_port
            && key.protocol == answer.protocol;
        let (backend, sums) = record.backend();
        let (sums, way) = (sums.reversed(), record.way());
        (is_its && record.lives_on(state)).then_some((state, ToClient { key, sums, backend, way }))
    }

    /// The same of a plain packet whose client is not behind VLAN tags: [`Self::to_client`] for nearly every packet.
    #[inline(always)]
    pub fn plain_to_client(&self, id: Id, answer: &FlowKey) -> Option<Plain> {
        let record = self.record(id)?;
        let state = record.live()?;
        let ports = record.word(word::PORTS);
        // All but the client's and the VIP's port.
        let (its, all) =
            (ports >> 32, u64::from(answer.protocol) | u64::from(answer.src_port) << 16);
        let is_its = record.word(word::INSIDE) == narrow([answer.dst, answer.src])
            && its == all
            && record.word(word::TAGS) == 0;
        let (backend, sums) = record.backend();
        let addresses = record.word(word::ENDS).rotate_left(32);
        let station = record.word(word::STATION);
        let ports = ports as u32;
        let plain = Plain { state, backend, addresses, ports, sums: sums.reversed(), station };
        (is_its && record.lives_on(state)).then_some(plain)
    }

    /// Notes a packet. `state` is what the slot was found in.
    #[inline(always)]
    pub fn touch(&self, id: Id, state: State, side: Side, flags: u8, now: Tick) {
        if !state.is_settled(side, flags, now) {
            self.touch_unsettled(id, state, side, flags, now);
        }
    }

    #[inline(never)]
    fn touch_unsettled(&self, id: Id, state: State, side: Side, flags: u8, now: Tick) {
        if state.after(side, flags, now) != state {
            self.note(id, state, |state| state.after(side, flags, now));
        }
    }

    /// Changes the state, unless that life has ended. Says whether it has not.
    fn note(&self, id: Id, mut state: State, change: impl Fn(State) -> State) -> bool {
        let Some(record) = self.record(id) else { return false };
        let life = state;
        let word = &record.0[word::STATE];
        loop {
            let changed = change(state);
            let (all, relaxed) = (Ordering::AcqRel, Ordering::Relaxed);
            match word.compare_exchange(state.0, changed.0, all, relaxed) {
                Ok(_) => return true,
                Err(other) if life.is_same_life(State(other)) => state = State(other),
                Err(_) => return false,
            }
        }
    }

    /// Takes a free slot of one of these addresses for a new connection, which `connection` tells once it is
    /// known which. `None` if no slot is free.
    pub fn open(
        &self,
        mesh: &[Mesh],
        hash: u64,
        now: Tick,
        connection: impl FnOnce(Address) -> Connection,
    ) -> Option<ToTask> {
        // From anywhere, lest the ports of one address be used up before the next one's begin.
        let (before, from) = mesh.split_at((hash >> 8) as usize % mesh.len().max(1));
        let (id, address) = from
            .iter()
            .chain(before)
            .find_map(|mesh| self.take(mesh.bank, hash).map(|id| (id, mesh.address)))?;
        let place = self.place(id)?;
        let connection = connection(address);
        if let Some(open) = self.open.get(connection.backend as usize) {
            open.fetch_add(1, Ordering::Relaxed);
        }
        place.begin(&connection, hash, now);
        let state = place.record.state();
        if !self.enter(id, hash) {
            self.close(id, state);
            return None;
        }
        self.to_task(id, &connection.key, connection.key.is_v6())
    }

    /// Takes any free slot of a bank.
    fn take(&self, bank: u16, hash: u64) -> Option<Id> {
        let first = usize::from(bank) * BANK_WORDS;
        let taken = self.taken.get(first..first + BANK_WORDS)?;
        // Not the next port: who can't guess it can't forge an answer, RFC 6056.
        let (start, turn) = ((hash >> 32) as usize % BANK_WORDS, hash as u32 % WORD as u32);
        let order = (start..BANK_WORDS).chain(0..start);
        for at in order {
            let usable = self.usable(at);
            loop {
                let free = !taken[at].load(Ordering::Relaxed) & usable;
                if free == 0 {
                    break;
                }
                let bit = (free.rotate_right(turn).trailing_zeros() + turn) % WORD as u32;
                // Who had it before is through with it.
                if taken[at].fetch_or(1 << bit, Ordering::AcqRel) & 1 << bit == 0 {
                    for copy in self.copies(first + at) {
                        copy.fetch_or(1 << bit, Ordering::Relaxed);
                    }
                    return Some(Id::new(bank, (at * WORD) as u16 + bit as u16));
                }
            }
        }
        None
    }

    /// The ports of a word of `taken` that are ours to use.
    fn usable(&self, at: usize) -> u64 {
        let (from, to) = (usize::from(*self.ports.start()), usize::from(*self.ports.end()));
        let low = from.saturating_sub(at * WORD).min(WORD);
        let high = (to + 1).saturating_sub(at * WORD).min(WORD);
        let below = |bit: usize| if bit == WORD { !0 } else { (1_u64 << bit) - 1 };
        below(high) & !below(low)
    }

    /// Lets packets with this hash find the slot. `false` if there is no room.
    fn enter(&self, id: Id, hash: u64) -> bool {
        let entry = Self::tag(hash) | id.0;
        let lanes = |at: usize| {
            let (before, from) = self.index[at].0.split_at(Self::lane(hash));
            from.iter().chain(before)
        };
        let entries = self.buckets(hash).into_iter().flat_map(lanes);
        let mut vacant = entries.filter(|entry| entry.load(Ordering::Relaxed) == 0);
        vacant.any(|vacant| {
            vacant.compare_exchange(0, entry, Ordering::Release, Ordering::Relaxed).is_ok()
        })
    }

    fn leave(&self, id: Id, hash: u64) {
        let entry = Self::tag(hash) | id.0;
        for lane in self.buckets(hash).into_iter().flat_map(|at| &self.index[at].0) {
            let _ = lane.compare_exchange(entry, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Ends a slot's life, if that is still the one that `state` is of. Its port is free at once.
    fn close(&self, id: Id, state: State) {
        let Some(record) = self.record(id) else { return };
        // One worker wins.
        if !self.note(id, state, |state| State(state.0 & State::GENERATION)) {
            return;
        }
        self.leave(id, record.word(word::HASH));
        if let Some(open) = self.open.get(record.backend().0 as usize) {
            open.fetch_sub(1, Ordering::Relaxed);
        }
        let (at, bit) = (id.0 as usize / WORD, id.0 as usize % WORD);
        for copy in self.copies(at) {
            copy.fetch_and(!(1 << bit), Ordering::Relaxed);
        }
        self.taken[at].fetch_and(!(1 << bit), Ordering::Release);
    }

    /// Lets the client's packets find the slot no more: they begin anew. Its port stays taken until it runs
    /// out, for late packets of the task.
    pub fn detach(&self, id: Id, state: State) {
        if self.note(id, state, |state| State(state.0 | State::DETACHED))
            && let Some(record) = self.record(id)
        {
            self.leave(id, record.word(word::HASH));
        }
    }

    /// Whether the client should be asked to speak if its task is gone.
    pub fn is_to_be_asked(&self, state: State, now: Tick) -> bool {
        let over = state.is_closed() || state.0 & (State::DATAGRAMS | State::DETACHED) != 0;
        !over && (!state.has(State::ASKED) || self.silent_ms(state, now) < ASK_MS)
    }

    /// Notes that the client was asked to speak, when first.
    pub fn asked(&self, id: Id, state: State, now: Tick) {
        if !state.has(State::ASKED) {
            let asked = |state: State| state.0 & !State::TIME | State::ASKED | State::units(now);
            self.note(id, state, |state| State(asked(state)));
        }
    }

    /// As if the task had reset the connection.
    pub fn reset(&self, id: Id, state: State, now: Tick) {
        self.touch(id, state, Side::Task, tcp_flags::RST, now);
    }
}

/// The numbers of the bits that are set, lowest first.
#[inline(always)]
fn bits(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = set.trailing_zeros() as usize;
        (set != 0).then(|| {
            set &= set - 1;
            bit
        })
    })
}

/// One worker's share of the sweep: each of several sweeps its own part of the slots.
#[derive(Debug)]
pub struct Sweep {
    worker: usize,
    workers: usize,
    at: usize,
    owed: u64,
    until: Tick,
}

impl Sweep {
    /// The share of a worker among so many.
    pub fn new(worker: usize, workers: usize) -> Self {
        Self { worker, workers: workers.max(1), at: 0, owed: 0, until: Tick(0) }
    }

    /// Visits as many slots as are due: frees those that have run out, and tells `each` of the others. To be
    /// called each turn.
    #[inline]
    pub fn run(&mut self, slots: &Slots, now: Tick, each: impl FnMut(Id, State)) {
        let elapsed_ms = now.ms_since(self.until);
        if elapsed_ms > 0 {
            self.run_for(elapsed_ms, slots, now, each);
        }
    }

    #[inline(never)]
    fn run_for(
        &mut self,
        elapsed_ms: u64,
        slots: &Slots,
        now: Tick,
        mut each: impl FnMut(Id, State),
    ) {
        let words = slots.taken.len();
        let share = words.div_ceil(self.workers);
        let (first, end) = (self.worker * share, ((self.worker + 1) * share).min(words));
        self.until = now;
        self.owed += elapsed_ms.min(SWEEP_PERIOD_MS) * share as u64;
        let due = self.owed / SWEEP_PERIOD_MS;
        self.owed -= due * SWEEP_PERIOD_MS;
        for _ in 0..due {
            if !(first..end).contains(&self.at) {
                self.at = first;
            }
            if let Some(word) = slots.taken.get(self.at) {
                for bit in bits(word.load(Ordering::Acquire)) {
                    let id = Id((self.at * WORD + bit) as u32);
                    visit(slots, id, now, &mut each);
                }
            }
            self.at += 1;
        }
    }
}

fn visit(slots: &Slots, id: Id, now: Tick, each: &mut impl FnMut(Id, State)) {
    let Some(record) = slots.record(id) else { return };
    let state = record.state();
    if !state.is_live() {
        return; // it is just being taken or freed
    }
    if slots.is_expired(state, now) {
        slots.close(id, state);
    } else {
        each(id, state);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A connection told apart by its number.
    fn connection(number: u16) -> Connection {
        Connection {
            key: FlowKey {
                src: Address::v4([198, 51, 100, 7]),
                dst: Address::v4([203, 0, 113, 10]),
                src_port: number,
                dst_port: 80,
                protocol: protocol::TCP,
            },
            task: Address::v4([10, 0, 0, 9]),
            task_port: 8080,
            mesh: Address::v4([10, 0, 0, 5]),
            backend: 3,
            way: Way::default(),
        }
    }

    const MESH: Mesh = Mesh { bank: 0, address: Address(5) };

    proptest! {
        #[test]
        fn what_is_settled_would_change_nothing(
            state: u64, flags: u8, by_task: bool, since in 0_u64..5000,
        ) {
            let side = if by_task { Side::Task } else { Side::Client };
            let state = State(state);
            let now = Tick(((state.0 & State::TIME) << TIME_SHIFT) + since);
            if state.is_settled(side, flags, now) {
                prop_assert_eq!(state.after(side, flags, now), state);
            }
        }
    }

    #[test]
    fn the_packets_of_a_conversation_settle() {
        let (syn, ack) = (tcp_flags::SYN, tcp_flags::ACK);
        let mut state = State(State::LIVE);
        for (side, flags) in [(Side::Client, syn), (Side::Task, syn | ack), (Side::Client, ack)] {
            state = state.after(side, flags, Tick(0));
        }
        for side in [Side::Client, Side::Task] {
            assert!(state.is_settled(side, ack, Tick(900)));
            assert!(!state.is_settled(side, ack, Tick(1000)), "to be noted: it is not silent");
            assert!(!state.is_settled(side, ack | tcp_flags::FIN, Tick(0)));
            assert!(!state.is_settled(side, tcp_flags::RST, Tick(0)));
        }
    }

    #[test]
    fn every_port_of_the_range_can_be_used_and_no_other() {
        for ports in [1..=65_535, 1024..=1024, 1000..=1100, 64..=127, 65_535..=65_535] {
            let slots = Slots::new(1, Timeouts::default(), ports.clone()).unwrap();
            let mut used = Vec::new();
            let mut hash = 1_u64;
            while let Some(ToTask { id, .. }) =
                slots.open(&[MESH], hash, Tick(0), |_| connection(hash as u16))
            {
                hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
                used.push(id.port());
            }
            used.sort_unstable();
            // Hardly ever has the index no room for the last few.
            let missing = ports.len() - used.len();
            assert!(missing <= ports.len() / 1000, "{missing} of {ports:?}");
            used.dedup();
            assert!(used.len() == slots.used(0) && used.iter().all(|port| ports.contains(port)));
        }
    }

    #[test]
    fn a_slot_gives_back_what_was_put_into_it_whatever_it_had_before() {
        let slots = Slots::new(1, Timeouts::default(), 1024..=1024).unwrap();
        let tags = [0x88a8_0007, 0x8100_0009];
        let narrow = Connection {
            way: Way { mac: MacAddr([2, 0, 0, 0, 0, 9]), link: 3, tags },
            ..connection(1)
        };
        // Addresses that end as those do.
        let wide = |Address(address)| Address(0x2001_0db8 << 96 | u128::from(address as u32));
        let FlowKey { src, dst, .. } = narrow.key;
        let wide = Connection {
            key: FlowKey { src: wide(src), dst: wide(dst), ..narrow.key },
            task: wide(narrow.task),
            mesh: wide(narrow.mesh),
            ..narrow
        };
        for (one, other) in [(narrow, wide), (wide, narrow), (narrow, wide)] {
            let opened = slots.open(&[MESH], 7, Tick(0), |_| one).unwrap();
            assert_eq!(slots.connection(opened.id), Some((opened.state, one)));
            assert_eq!((opened.mesh, opened.task, opened.task_port), (one.mesh, one.task, 8080));
            assert!(slots.find(7, &one.key).is_some());
            assert!(slots.find(7, &other.key).is_none());
            let answered = |Connection { key, task, mesh, task_port, .. }: Connection| {
                let (src, dst, src_port, dst_port) = (task, mesh, task_port, 1024);
                let answer = FlowKey { src, dst, src_port, dst_port, ..key };
                slots.to_client(opened.id, &answer)
            };
            let (_, to) = answered(one).unwrap();
            assert_eq!((to.key, to.way, to.backend), (one.key, one.way, one.backend));
            assert!(answered(other).is_none());
            slots.close(opened.id, opened.state);
        }
    }

    #[test]
    fn a_plain_packet_finds_in_a_slot_what_any_packet_does() {
        let slots = Slots::new(1, Timeouts::default(), 1024..=1024).unwrap();
        let untagged = Way { mac: MacAddr([2, 0, 0, 0, 0, 9]), link: 3, tags: [0; 2] };
        let one = Connection { way: untagged, ..connection(1) };
        let Connection { key, task, task_port, mesh, .. } = one;
        let answer = FlowKey { src: task, dst: mesh, src_port: task_port, dst_port: 1024, ..key };
        let both = |src: u16, dst: u16| u32::from(src) << 16 | u32::from(dst);
        let opened = slots.open(&[MESH], 7, Tick(0), |_| one).unwrap();
        let id = opened.id;

        let to = slots.find_plain(id, &key).unwrap();
        assert_eq!((to.state, to.backend, to.sums), (opened.state, one.backend, opened.sums));
        assert_eq!((to.addresses, to.ports), (narrow([mesh, task]), both(1024, task_port)));
        let from_there = [[0; 6], untagged.mac.0].concat();
        assert!(to.is_way_of(&from_there, 3) && !to.is_way_of(&from_there, 2));

        let to = slots.plain_to_client(id, &answer).unwrap();
        assert_eq!(
            (to.state, to.backend, to.sums),
            (opened.state, one.backend, opened.sums.reversed())
        );
        let ports = both(key.dst_port, key.src_port);
        assert_eq!((to.addresses, to.ports), (narrow([key.dst, key.src]), ports));
        assert_eq!(to.way(), (3, untagged.mac));

        for (other, answer) in [
            (FlowKey { src: mesh, ..key }, FlowKey { src: mesh, ..answer }),
            (FlowKey { dst: mesh, ..key }, FlowKey { dst: task, ..answer }),
            (FlowKey { src_port: 2, ..key }, FlowKey { src_port: 2, ..answer }),
            (
                FlowKey { protocol: protocol::UDP, ..key },
                FlowKey { protocol: protocol::UDP, ..answer },
            ),
        ] {
            assert!(slots.find_plain(id, &other).is_none());
            assert!(slots.plain_to_client(id, &answer).is_none());
        }
        slots.detach(id, opened.state);
        assert!(slots.find_plain(id, &key).is_none());
        assert!(slots.plain_to_client(id, &answer).is_some());

        let tagged = Connection { way: Way { tags: [7, 0], ..untagged }, ..one };
        let wide = |Address(address)| Address(0x2001_0db8 << 96 | u128::from(address as u32));
        let wide = Connection {
            key: FlowKey { src: wide(key.src), dst: wide(key.dst), ..key },
            task: wide(task),
            mesh: wide(mesh),
            ..one
        };
        for (other, is_found) in [(tagged, true), (wide, false)] {
            let state = slots.connection(id).unwrap().0;
            slots.close(id, state);
            slots.open(&[MESH], 7, Tick(0), |_| other).unwrap();
            assert_eq!(slots.find_plain(id, &key).is_some(), is_found);
            assert!(slots.plain_to_client(id, &answer).is_none());
        }
    }

    #[test]
    fn a_slot_that_was_given_away_does_not_answer_to_its_former_state() {
        let slots = Slots::new(1, Timeouts::default(), 1024..=1024).unwrap();
        let open = |number| slots.open(&[MESH], 7, Tick(0), |_| connection(number));
        let ToTask { id, state, .. } = open(1).unwrap();
        assert!(open(2).is_none());
        slots.close(id, state);
        assert_eq!(open(2).unwrap().id, id);
        assert!(slots.backend(id, state).is_none());
        slots.close(id, state);
        slots.detach(id, state);
        slots.touch(id, state, Side::Client, tcp_flags::RST, Tick(0));
        let (now, connection) = slots.connection(id).unwrap();
        assert!(!now.is_closed() && connection.key.src_port == 2);
        assert!(slots.find(7, &connection.key).is_some());
    }

    #[test]
    fn a_copy_says_which_ports_are_taken_as_long_as_they_are() {
        let slots = Slots::new(2, Timeouts::default(), 1024..=1100).unwrap();
        let memory = || memory::zeroed::<AtomicU64>(4 * BANK_WORDS).unwrap().0;
        let is_taken = |memory: &[AtomicU64], id: Id| {
            memory[id.0 as usize / WORD].load(Ordering::Relaxed) >> (id.0 as usize % WORD) & 1 == 1
        };
        let mesh = [Mesh { bank: 1, address: Address(5) }];
        let open = |number: u16| {
            slots.open(&mesh, number.into(), Tick(0), |_| connection(number)).unwrap()
        };
        let copies = [memory(), memory()];
        let before = open(1);
        copies.iter().for_each(|copy| assert!(slots.mirror(copy)));
        let after = open(2);
        for copy in copies {
            assert!(is_taken(copy, before.id) && is_taken(copy, after.id));
            let count = |word: &AtomicU64| word.load(Ordering::Relaxed).count_ones();
            assert_eq!(copy.iter().map(count).sum::<u32>(), 2);
        }
        slots.close(after.id, after.state);
        assert!(copies.iter().all(|copy| is_taken(copy, before.id) && !is_taken(copy, after.id)));
        assert!(!slots.mirror(&[]), "too short");
    }

    #[test]
    fn addresses_share_the_connections_and_one_that_is_full_leaves_them_to_the_others() {
        let slots = Slots::new(4, Timeouts::default(), 1024..=1123).unwrap();
        let mesh = [0, 1, 2].map(|bank| Mesh { bank, address: Address(bank.into()) });
        for number in 0..300_u16 {
            let hash = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let opened =
                slots.open(&mesh, hash, Tick(0), |_| connection(number)).expect("there is room");
            let found = slots.find(hash, &connection(number).key).unwrap();
            assert_eq!((found.id, found.state), (opened.id, opened.state));
        }
        assert_eq!([0, 1, 2, 3].map(|bank| slots.used(bank)), [100, 100, 100, 0]);
        assert!(slots.open(&mesh, 1, Tick(0), |_| connection(1)).is_none());
        assert!(slots.open(&[], 1, Tick(0), |_| connection(1)).is_none(), "no address at all");
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::{sync::Arc, thread};

    use super::*;

    const MESH: Mesh = Mesh { bank: 0, address: Address(5) };

    /// One whose every part says which it is.
    fn connection(number: u16) -> Connection {
        let address = Address(u128::from(number) << 64 | u128::from(number));
        Connection {
            key: FlowKey {
                src: address,
                dst: address,
                src_port: number,
                dst_port: number,
                protocol: protocol::TCP,
            },
            task: address,
            task_port: number,
            mesh: MESH.address,
            backend: number.into(),
            way: Way { link: number as u8, ..Way::default() },
        }
    }

    /// A table of one port.
    fn slots() -> Arc<Slots> {
        Arc::new(Slots::new(1, Timeouts::default(), 1..=1).unwrap())
    }

    fn open(slots: &Slots, number: u16) -> Option<(Id, State)> {
        let opened = slots.open(&[MESH], 0, Tick(0), |_| connection(number))?;
        Some((opened.id, opened.state))
    }

    fn explore(model: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.max_branches = 100_000;
        builder.check(model);
    }

    #[test]
    fn a_port_that_is_given_to_another_is_never_read_as_half_of_each() {
        explore(|| {
            let slots = slots();
            let (id, state) = open(&slots, 1).unwrap();
            let writer = {
                let slots = Arc::clone(&slots);
                thread::spawn(move || {
                    slots.close(id, state);
                    assert!(open(&slots, 2).is_some());
                })
            };
            // Any two words stand for all, one of each part: each way that loads can go is tried.
            let place = slots.place(id).unwrap();
            let wide = || place.wide[id.0 as usize].0[1].load(Ordering::Relaxed);
            let seen = place.record.live().map(|state| (state, place.record.backend().0, wide()));
            if let Some((state, backend, client)) = seen
                && place.record.lives_on(state)
            {
                assert!((1..=2).contains(&backend), "{backend}");
                assert_eq!(client, u64::from(backend));
            }
            if let Some(backend) = slots.backend(id, state) {
                assert_eq!(backend, 1, "the life that was asked for");
            }
            writer.join().unwrap();
        });
    }

    #[test]
    fn a_port_is_never_two_connections() {
        explore(|| {
            let slots = slots();
            let other = {
                let slots = Arc::clone(&slots);
                thread::spawn(move || open(&slots, 2).is_some())
            };
            let one = open(&slots, 1).is_some();
            assert_ne!(one, other.join().unwrap(), "one of them has it");
            assert_eq!(slots.connections().count(), 1);
        });
    }

    #[test]
    fn of_two_that_free_a_port_one_does() {
        explore(|| {
            let slots = slots();
            let (id, state) = open(&slots, 1).unwrap();
            let other = {
                let slots = Arc::clone(&slots);
                thread::spawn(move || {
                    slots.close(id, state);
                    open(&slots, 2).is_some()
                })
            };
            slots.close(id, state);
            let again = open(&slots, 3).is_some();
            let theirs = other.join().unwrap();
            // Who came second may have found the port taken, but never freed another's.
            assert!(again || theirs);
            assert_eq!(slots.connections().count(), usize::from(again) + usize::from(theirs));
            assert!(!(again && theirs));
        });
    }
}
