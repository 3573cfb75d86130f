//! The connection table of one worker: which backend a flow was given.
//!
//! It is a cache (I5). A flow that is forgotten is answered by Maglev, alike on every worker and node;
//! only while the backend set changes does the table protect connections. So an insert may fail, and an
//! entry may be lost, and nothing breaks.
//!
//! Fixed in size, allocated once. One cache line per lookup: a bucket is 64 bytes with eight entries, and
//! each flow has two candidate buckets. The second is read only while the first is marked as overflowed. One
//! writer, the worker; anyone may read, racily but safely, because an entry is one atomic word:
//!
//! ```text
//!  63            33 32 29 28     19 18         1 0
//! +----------------+-----+---------+------------+-+
//! | tag            |state| time    | slot       |o|
//! +----------------+-----+---------+------------+-+
//! ```
//!
//! `tag` are 31 bits of the keyed hash beyond the bucket's index; `time` counts in the state's own unit and
//! wraps, so a sweep visits every bucket well within the shortest wrap.
//!
//! `o` has to do with overflow. In a bucket's first two entries it makes up the bucket's mark: 0, or in which
//! round of the sweep, modulo 3, the mark was last renewed. In the others it says that the entry is away from
//! home, the first of its two buckets. The sweep renews the marks of those homes, and removes a mark that was
//! not renewed in the whole round before: nothing that lives is away from there.

use crate::{
    flow::{Flow, protocol, tcp_flags},
    forwarding::{MAX_BACKENDS, Slot},
    memory::{self, AllocationError},
    prefetch::{self, prefetch},
    rate_limit::RateLimit,
    sync::{AtomicU64, Ordering},
    time::Tick,
};

/// Entries in a bucket: what fits a cache line.
const LANES: usize = 1 << LANE_BITS;
const LANE_BITS: u32 = 3;

const TAG_SHIFT: u32 = 33;
const STATE_SHIFT: u32 = 29;
const TIME_SHIFT: u32 = 19;
const SLOT_SHIFT: u32 = 1;
const TAG_MASK: u64 = !0 << TAG_SHIFT;
const SLOT_MASK: u64 = MAX_BACKENDS as u64 - 1;
const TIME_BITS: u32 = 10;
const TIME_MASK: u64 = (1 << TIME_BITS) - 1;
const STATE_MASK: u64 = (STATES as u64 - 1) << STATE_SHIFT;
/// State and time: all that passing time and packets change.
const AGE_MASK: u64 = (1 << TAG_SHIFT) - (1 << TIME_SHIFT);
/// In the first [`MARK_LANES`] entries, part of the bucket's mark.
const MARK: u64 = 1;
/// In the others: this is not the first of the entry's two buckets.
const AWAY: u64 = 1;
const MARK_LANES: usize = 2;
const _: () = assert!(MAX_BACKENDS == 1 << (TIME_SHIFT - SLOT_SHIFT));

/// A flow is worth keeping once a packet comes this long after its first: a flood's does not.
const CONFIRM_AFTER_UNITS: u64 = 3; // of 64 ms: between 128 and 192 ms

/// How often the sweep comes round to each bucket, at the latest, while the worker turns. A power of two,
/// as the number of buckets is: what is due and what was paid for are then exact. Were the latter rounded
/// down, to 0 ms for a large table, each turn would sweep the same millisecond's share again.
const SWEEP_PERIOD_MS: u64 = 16_384;

/// What a connection is known to be doing. The client's direction is all that DSR sees.
///
/// In the order of their worth: what comes first makes room for a new flow first, and what is confirmed
/// never does. That is all that being confirmed is good for: while there is room, a flow that is not is
/// remembered as long as any other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum State {
    /// Nothing here.
    Empty = 0,
    /// Ended while it was young: most connections. Forgotten soon.
    Ended = 1,
    /// Only a SYN was seen: perhaps a flood's. Forgotten soon.
    Opening = 2,
    /// No connection, but where a client's next one goes. A forged SYN leaves one too, and it only matters
    /// once the backends change: it gives way to nearly all.
    Affinity = 3,
    /// TCP or SCTP, first seen less than [`CONFIRM_AFTER_UNITS`] ago.
    YoungStream = 4,
    /// UDP, likewise.
    YoungDatagrams = 5,
    /// TCP or SCTP, silent since it was young. Its next packet confirms it.
    QuietStream = 6,
    /// UDP, likewise.
    QuietDatagrams = 7,
    /// Confirmed, but the client sent FIN or RST.
    Closing = 8,
    /// TCP or SCTP, confirmed.
    Stream = 9,
    /// UDP, confirmed.
    Datagrams = 10,
}

impl State {
    #[inline]
    fn of(entry: u64) -> Self {
        match state_bits(entry) {
            1 => Self::Ended,
            2 => Self::Opening,
            3 => Self::Affinity,
            4 => Self::YoungStream,
            5 => Self::YoungDatagrams,
            6 => Self::QuietStream,
            7 => Self::QuietDatagrams,
            8 => Self::Closing,
            9 => Self::Stream,
            10 => Self::Datagrams,
            _ => Self::Empty,
        }
    }

    /// One unit of `time` in this state, as a power of two of milliseconds.
    #[inline]
    fn unit_shift(self) -> u32 {
        UNIT_SHIFTS[self as usize]
    }

    /// Whether its time is that of the first packet, to be confirmed by, rather than the last.
    fn keeps_time(self) -> bool {
        matches!(self, Self::Ended | Self::Opening | Self::YoungStream | Self::YoungDatagrams)
    }

    /// What it becomes by a packet, at this age.
    fn after(self, traffic: Traffic, age: u64) -> Self {
        let young = self.keeps_time() && age < CONFIRM_AFTER_UNITS;
        match (self, traffic) {
            (Self::Opening | Self::YoungStream, Traffic::End) if young => Self::Ended,
            (Self::Opening, _) if young => Self::YoungStream,
            _ if young => self,
            (_, Traffic::End) => Self::Closing,
            // A half-closed connection may still acknowledge for long.
            (Self::Closing | Self::Ended, _) => Self::Closing,
            (_, Traffic::Datagram) => Self::Datagrams,
            (_, Traffic::Syn | Traffic::Stream) => Self::Stream,
        }
    }

    /// What a young flow becomes when it falls silent.
    fn grown(self) -> Option<Self> {
        match self {
            Self::YoungStream => Some(Self::QuietStream),
            Self::YoungDatagrams => Some(Self::QuietDatagrams),
            _ => None,
        }
    }
}

/// The states of connections that have not ended, a bit each.
const OPEN: u32 = 1 << State::Opening as u32
    | 1 << State::YoungStream as u32
    | 1 << State::YoungDatagrams as u32
    | 1 << State::QuietStream as u32
    | 1 << State::QuietDatagrams as u32
    | 1 << State::Stream as u32
    | 1 << State::Datagrams as u32;

/// All numbers that an entry's state bits can be: arrays of so many are indexed without a check.
const STATES: usize = 16;

/// [`State::unit_shift`], by the state's number.
const UNIT_SHIFTS: [u32; STATES] = [
    6,  // empty
    6,  // ended: 64 ms, wraps after 65 s
    6,  // opening
    14, // affinity: 16 s, wraps after 4.6 h
    6,  // young stream
    6,  // young datagrams
    16, // quiet stream: 66 s, wraps after 18.6 h
    13, // quiet datagrams: 8 s, wraps after 2.3 h
    10, // closing: 1 s, wraps after 17 min
    16, // stream
    13, // datagrams
    6, 6, 6, 6, 6, // no state has these numbers
];

/// How long a silent connection is remembered, in seconds. Counted in coarse units: a minute for
/// established TCP, 8 s for UDP; never forgotten earlier than said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP of which only a SYN was seen, or that ended within a moment. At most [`Timeouts::MAX_UNCONFIRMED_S`].
    pub unconfirmed_s: u32,
    /// TCP and SCTP. At most [`Timeouts::MAX_TCP_IDLE_S`].
    pub tcp_idle_s: u32,
    /// TCP after the client's FIN or RST. At most [`Timeouts::MAX_TCP_CLOSING_S`].
    pub tcp_closing_s: u32,
    /// UDP. At most [`Timeouts::MAX_UDP_IDLE_S`].
    pub udp_idle_s: u32,
    /// A client's affinity: the longest that any service asks for. At most [`Timeouts::MAX_AFFINITY_S`].
    pub affinity_s: u32,
}

impl Timeouts {
    // Each is what its unit's wrap allows, less two rounds of the sweep.
    /// Most for `unconfirmed_s`.
    pub const MAX_UNCONFIRMED_S: u32 = 30;
    /// Most for `tcp_idle_s`.
    pub const MAX_TCP_IDLE_S: u32 = 16 * 3600;
    /// Most for `tcp_closing_s`.
    pub const MAX_TCP_CLOSING_S: u32 = 900;
    /// Most for `udp_idle_s`.
    pub const MAX_UDP_IDLE_S: u32 = 2 * 3600;
    /// Most for `affinity_s`.
    pub const MAX_AFFINITY_S: u32 = 4 * 3600;

    /// The longest that any entry can live without a packet, in milliseconds: how long a freed slot must
    /// rest (I4). Longer than the longest timeout, for that is counted in whole units.
    pub fn longest_ms(&self) -> u64 {
        let lives = Lifetimes::new(self).0.into_iter().zip(UNIT_SHIFTS);
        let longest = lives.map(|(units, shift)| units << shift).max().unwrap_or_default();
        // A young flow's idle time begins anew when the sweep lets it grow quiet.
        longest + 2 * SWEEP_PERIOD_MS
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            unconfirmed_s: 30,
            tcp_idle_s: 4 * 3600,
            tcp_closing_s: 60,
            udp_idle_s: 300,
            affinity_s: Self::MAX_AFFINITY_S,
        }
    }
}

/// By the state's number, the age in the state's own unit at which an entry is dead: its timeout, rounded
/// up, plus one for the unit already begun, plus one. What is no connection is dead at any age.
#[derive(Clone, Copy, Debug)]
struct Lifetimes([u64; STATES]);

impl Lifetimes {
    fn new(timeouts: &Timeouts) -> Self {
        let units = |state: State, seconds: u32, most: u32| {
            (u64::from(seconds.min(most)) * 1000).div_ceil(1 << state.unit_shift()) + 2
        };
        let mut lifetimes = [0; STATES];
        let mut set = |state: State, seconds: u32, most: u32| {
            lifetimes[state as usize] = units(state, seconds, most);
        };
        for state in [State::Opening, State::Ended] {
            set(state, timeouts.unconfirmed_s, Timeouts::MAX_UNCONFIRMED_S);
        }
        for state in [State::Stream, State::QuietStream] {
            set(state, timeouts.tcp_idle_s, Timeouts::MAX_TCP_IDLE_S);
        }
        for state in [State::Datagrams, State::QuietDatagrams] {
            set(state, timeouts.udp_idle_s, Timeouts::MAX_UDP_IDLE_S);
        }
        set(State::Closing, timeouts.tcp_closing_s, Timeouts::MAX_TCP_CLOSING_S);
        set(State::Affinity, timeouts.affinity_s, Timeouts::MAX_AFFINITY_S);
        // The sweep lets them grow quiet long before.
        for state in [State::YoungStream, State::YoungDatagrams] {
            lifetimes[state as usize] = TIME_MASK;
        }
        Self(lifetimes)
    }
}

/// What a packet tells about its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Traffic {
    /// A connection begins.
    Syn,
    /// It goes on.
    Stream,
    /// It ends, as far as the client is concerned.
    End,
    /// A packet of a protocol without connections.
    Datagram,
}

impl Traffic {
    /// What this flow's packet tells.
    #[inline]
    pub fn of(flow: &Flow) -> Self {
        if flow.protocol == protocol::UDP {
            return Self::Datagram;
        }
        if flow.is_syn() {
            return Self::Syn;
        }
        if flow.tcp_flags & (tcp_flags::FIN | tcp_flags::RST) != 0 {
            return Self::End;
        }
        Self::Stream
    }
}

/// Eight entries in one cache line.
#[derive(Debug, Default)]
#[cfg_attr(not(loom), derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout))]
#[repr(C, align(64))]
struct Bucket([AtomicU64; LANES]);

#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket>() == prefetch::LINE);

impl Bucket {
    #[inline]
    fn entry(&self, lane: usize) -> u64 {
        self.0[lane].load(Ordering::Relaxed)
    }

    /// Writes an entry, keeping the mark, which belongs to the bucket.
    #[inline]
    fn set(&self, lane: usize, entry: u64) {
        let mark = if lane < MARK_LANES { self.entry(lane) & MARK } else { 0 };
        self.0[lane].store(entry | mark, Ordering::Relaxed);
    }

    /// The round in which it was last known that an entry of this bucket is in another; 0 for none.
    #[inline]
    fn mark(&self) -> u64 {
        self.entry(0) & MARK | (self.entry(1) & MARK) << 1
    }

    fn set_mark(&self, round: u64) {
        for lane in 0..MARK_LANES {
            let mark = round >> lane & MARK;
            self.0[lane].store(self.entry(lane) & !MARK | mark, Ordering::Relaxed);
        }
    }

    /// The least exclusive or of this entry and any of the bucket's, from which that one can be had again.
    /// Free of branches, too.
    #[inline(always)]
    fn least_difference(&self, wanted: u64) -> u64 {
        let different = |lane| self.entry(lane) ^ wanted;
        let least = |a: u64, b: u64| a.min(b);
        least(
            least(least(different(0), different(1)), least(different(2), different(3))),
            least(least(different(4), different(5)), least(different(6), different(7))),
        )
    }

    /// Bit i is set if entry i has this tag.
    #[inline]
    fn matching(&self, tag: u64) -> u32 {
        self.lanes_below(1 << TAG_SHIFT, |entry| entry ^ tag << TAG_SHIFT)
    }

    /// Bit i is set if there is no entry in lane i.
    #[inline]
    fn vacant(&self) -> u32 {
        self.lanes_below(1, |entry| entry & STATE_MASK)
    }

    /// Whether three entries or more will be forgotten soon. In a full bucket that speaks of a flood.
    #[inline]
    fn is_flooded(&self) -> bool {
        let passing = (State::YoungStream as u64) << STATE_SHIFT;
        let passing = self.lanes_below(passing, |entry| entry & STATE_MASK);
        passing.count_ones() >= 3
    }

    /// Bit i is set if `bits` of entry i are below the limit. Free of branches, as which lane it is can't be
    /// predicted, and in this form a load and three instructions a lane. SSE2 takes 23 instructions less for
    /// all, and 1 ns a packet more.
    #[inline]
    fn lanes_below(&self, limit: u64, bits: impl Fn(u64) -> u64) -> u32 {
        (0..LANES)
            .rev()
            .fold(0, |lanes, lane| lanes << 1 | u32::from(bits(self.entry(lane)) < limit))
    }
}

/// The state and time of entries in which a packet changes nothing: confirmed, and in the present unit of
/// time.
///
/// A tag, a state and a time are compared at once, and nothing else is to be asked. What that saves over
/// [`Connections::find`] and [`Connections::touch`] is the difference between `turn/established/64Ki` and
/// `turn/young/1M` in `benches/instructions.toml`.
#[derive(Clone, Copy, Debug)]
pub struct Settled {
    stream: u64,
    datagrams: u64,
}

impl Settled {
    /// For packets that come now.
    pub fn at(now: Tick) -> Self {
        Self { stream: age_bits(State::Stream, now), datagrams: age_bits(State::Datagrams, now) }
    }
}

/// Where a lookup found an entry, what it was, and how old.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    bucket: usize,
    entry: u64,
    age: u64,
}

impl Place {
    /// Whether the connection has not ended, as far as the client is concerned.
    pub fn is_open(&self) -> bool {
        is_open(self.entry)
    }

    /// Whether nothing but its SYN was seen.
    pub fn is_opening(&self) -> bool {
        State::of(self.entry) == State::Opening
    }
}

/// What a lookup found.
#[derive(Clone, Copy, Debug)]
pub enum Found<T> {
    /// The connection: what was said of its backend, and where it is remembered.
    Live(T, Place),
    /// The connection is remembered, but its backend is gone.
    Orphan,
    /// Nothing.
    Nothing,
}

/// What a lookup is told about a backend slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict<T> {
    /// It serves the packet's service. This is what the lookup is to bring back.
    Serves(T),
    /// It serves another: the tags are alike by chance.
    Stranger,
    /// There is none in the slot any more.
    Gone,
}

/// What became of a connection to be remembered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remembered {
    /// It had been remembered before; the entry was renewed.
    Renewed,
    /// In a free place.
    Inserted,
    /// In the place of an unconfirmed one.
    Evicted,
    /// Not at all: only confirmed connections around.
    Full,
    /// Not at all: more are new than [`Connections::admitting`] allows.
    NotAdmitted,
}

/// Read access to a table, for control and for other workers.
#[derive(Clone, Copy, Debug)]
pub struct Reader {
    buckets: &'static [Bucket],
    lifetimes: Lifetimes,
}

/// A worker's own table.
#[derive(Debug)]
pub struct Connections {
    reader: Reader,
    huge_pages: bool,
    swept_until: Tick,
    sweep_owed: u64,
    sweep_at: usize,
    /// Of the sweep: 1, 2, 3, 1 and so on.
    round: u64,
    /// For SYNs and for others, if there is a limit.
    admissions: Option<[RateLimit; 2]>,
    /// Open connections by their backend's slot, of as many slots as are counted.
    open: Box<[u32]>,
}

impl Connections {
    /// A table of at least `capacity` entries (rounded up to a power of two of buckets), on huge pages if
    /// there are some. It lives as long as the process, since others may read it at any time.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(capacity: usize, timeouts: &Timeouts) -> Result<Self, AllocationError> {
        let count = capacity.div_ceil(LANES).next_power_of_two().max(2);
        let (buckets, huge_pages) = memory::zeroed(count)?;
        let reader = Reader { buckets, lifetimes: Lifetimes::new(timeouts) };
        Ok(Self {
            reader,
            huge_pages,
            swept_until: Tick(0),
            sweep_owed: 0,
            sweep_at: 0,
            round: 1,
            admissions: None,
            open: Box::default(),
        })
    }

    /// The table with a bound on how many new flows it remembers in a second: so many that begin with a
    /// SYN, and so many others, in bursts of a tenth. A flood of SYNs leaves the others' share alone, and a
    /// connection refused at its SYN is remembered by its next packet.
    #[must_use]
    pub fn admitting(mut self, per_s: u32) -> Self {
        self.admissions = Some([RateLimit::new(per_s), RateLimit::new(per_s)]);
        self
    }

    /// The table with a count of open connections for each of so many slots. It has to be empty.
    #[must_use]
    pub fn counting(mut self, slots: usize) -> Self {
        self.open = vec![0; slots].into();
        self
    }

    /// How many connections to this slot's backend have not ended, as far as the client's packets tell. One
    /// that fell silent counts until its timeout, and until the sweep has come by. 0 if they aren't counted.
    #[inline]
    pub fn open(&self, slot: Slot) -> u32 {
        self.open.get(slot as usize).copied().unwrap_or(0)
    }

    /// Writes an entry. Whatever begins, ends or moves an entry is written here, or the counts would go astray.
    #[inline]
    fn put(&mut self, bucket: usize, lane: usize, entry: u64) {
        let bucket = &self.reader.buckets[bucket];
        recount(&mut self.open, bucket.entry(lane), entry);
        bucket.set(lane, entry);
    }

    /// Whether the table got huge pages of its own (transparent ones may come later).
    pub fn huge_pages(&self) -> bool {
        self.huge_pages
    }

    /// Entries it has room for.
    pub fn capacity(&self) -> usize {
        self.reader.buckets.len() * LANES
    }

    /// Read access for others.
    pub fn reader(&self) -> Reader {
        self.reader
    }

    /// Begins to fetch what [`Self::find`] will read.
    #[inline]
    pub fn prefetch(&self, hash: u64) {
        prefetch(&self.reader.buckets[self.reader.first(hash)]);
    }

    /// The same for a flow's second bucket, if its first says that it would be read.
    #[inline]
    pub fn prefetch_second(&self, hash: u64) {
        if self.reader.buckets[self.reader.first(hash)].mark() != 0 {
            prefetch(&self.reader.buckets[self.reader.second(hash)]);
        }
    }

    /// The slot of a connection in which a packet changes nothing: most packets'. `None` says nothing.
    #[inline(always)]
    pub fn settled(&self, hash: u64, flow: &Flow, settled: &Settled) -> Option<Slot> {
        let bucket = &self.reader.buckets[self.reader.first(hash)];
        let unsettling = tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST;
        if flow.tcp_flags & unsettling != 0 {
            return None;
        }
        let age = if flow.protocol == protocol::UDP { settled.datagrams } else { settled.stream };
        let wanted = hash & TAG_MASK | age;
        // Of the entry that is wanted, the slot is all that differs.
        let difference = bucket.least_difference(wanted);
        (difference < 1 << TIME_SHIFT).then(|| slot_of(difference))
    }

    /// Looks a connection up by its flow's hash. `judge` says whether a slot's backend serves the packet's
    /// service.
    #[inline]
    pub fn find<T>(&self, hash: u64, now: Tick, judge: impl Fn(Slot) -> Verdict<T>) -> Found<T> {
        self.reader.search(hash, now, judge)
    }

    /// Notes a packet of a connection just found, at the same time, the table unchanged since.
    pub fn touch(&mut self, place: Place, traffic: Traffic, now: Tick) {
        let Place { entry, age, .. } = place;
        let state = State::of(entry).after(traffic, age);
        let touched = if state.keeps_time() {
            entry & !STATE_MASK | (state as u64) << STATE_SHIFT
        } else {
            with_state(entry, state, now)
        };
        // Often nothing changes: no store, and the line stays clean.
        if touched != entry {
            self.rewrite(place, touched);
        }
    }

    /// Overwrites the entry that was found there.
    fn rewrite(&mut self, place: Place, entry: u64) {
        let bucket = &self.reader.buckets[place.bucket];
        if let Some(lane) = (0..LANES).find(|&lane| bucket.entry(lane) == place.entry) {
            recount(&mut self.open, place.entry, entry);
            bucket.0[lane].store(entry, Ordering::Relaxed);
        }
    }

    /// Remembers the backend a flow was given just now, as unconfirmed. What is remembered of it already gives
    /// way in any case: a flow that gets a new decision never goes by the old one.
    #[inline]
    pub fn remember(&mut self, hash: u64, slot: Slot, traffic: Traffic, now: Tick) -> Remembered {
        if let Found::Live((), place) = self.find(hash, now, |_| Verdict::Serves(())) {
            self.renew(place, entry_of(hash, slot, traffic, now));
            return Remembered::Renewed;
        }
        self.remember_new(hash, slot, traffic, now)
    }

    /// Writes a new entry of the flow in the place where its former one was found.
    fn renew(&mut self, place: Place, entry: u64) {
        self.rewrite(place, entry | place.entry & (MARK | AWAY));
    }

    /// The same for a flow of which a lookup has just found nothing.
    #[inline]
    pub fn remember_new(
        &mut self,
        hash: u64,
        slot: Slot,
        traffic: Traffic,
        now: Tick,
    ) -> Remembered {
        if !self.admits(traffic, now) {
            return Remembered::NotAdmitted;
        }
        self.insert(hash, entry_of(hash, slot, traffic, now), now)
    }

    /// Whether one more new flow may be remembered.
    #[inline]
    fn admits(&mut self, traffic: Traffic, now: Tick) -> bool {
        let admissions = self.admissions.as_mut();
        admissions.is_none_or(|limits| limits[usize::from(traffic == Traffic::Syn)].take(now))
    }

    /// Remembers that a client's next connections go to this backend, as [`Reader::affine`] finds by the hash.
    /// `traffic` is what its latest begins with: it counts as one more such flow.
    pub fn remember_affinity(&mut self, hash: u64, slot: Slot, traffic: Traffic, now: Tick) {
        let entry = with_state(entry_of(hash, slot, traffic, now), State::Affinity, now);
        match self.find(hash, now, |_| Verdict::Serves(())) {
            Found::Live((), place) => self.renew(place, entry),
            _ if self.admits(traffic, now) => {
                self.insert(hash, entry, now);
            }
            _ => {}
        }
    }

    #[inline]
    fn insert(&mut self, hash: u64, entry: u64, now: Tick) -> Remembered {
        let home = self.reader.first(hash);
        let vacant = self.reader.buckets[home].vacant();
        if vacant == 0 {
            return self.make_room(hash, entry, now);
        }
        self.put(home, vacant.trailing_zeros() as usize, entry);
        Remembered::Inserted
    }

    /// Puts an entry in its second bucket, or in the place of another.
    #[inline(never)]
    fn make_room(&mut self, hash: u64, entry: u64, now: Tick) -> Remembered {
        let buckets = self.reader.buckets;
        let (first, second) = (self.reader.first(hash), self.reader.second(hash));
        let home = &buckets[first];
        let at_home = self.least(home, 0, now);
        // In a flood: another bucket would cost a miss now, and every later lookup that misses here.
        if at_home.worth == 0 || home.is_flooded() {
            return self.replace(first, at_home, entry);
        }
        let away = self.least(&buckets[second], MARK_LANES, now);
        if away.worth == 0 {
            home.set_mark(self.round);
            return self.replace(second, away, entry | AWAY);
        }
        if at_home.worth >= rank(State::Opening)
            && let Some(lane) = self.move_one_out(first)
        {
            self.put(first, lane, entry);
            return Remembered::Inserted;
        }
        if at_home.worth < CONFIRMED {
            return self.replace(first, at_home, entry);
        }
        if away.worth < CONFIRMED {
            home.set_mark(self.round);
            return self.replace(second, away, entry | AWAY);
        }
        Remembered::Full
    }

    /// Writes an entry in the place of a bucket's least worthy.
    fn replace(&mut self, bucket: usize, least: Candidate, entry: u64) -> Remembered {
        self.put(bucket, least.lane, entry);
        if least.worth == 0 { Remembered::Inserted } else { Remembered::Evicted }
    }

    /// Copies an entry of a full bucket to its other one, if one of the eight has room there. Tells which
    /// lane may be overwritten now.
    fn move_one_out(&mut self, from: usize) -> Option<usize> {
        let buckets = self.reader.buckets;
        let bucket = &buckets[from];
        for lane in 0..LANES {
            prefetch(&buckets[self.reader.other(from, bucket.entry(lane))]);
        }
        for lane in 0..LANES {
            let entry = bucket.entry(lane);
            let other = self.reader.other(from, entry);
            let comes_home = lane >= MARK_LANES && entry & AWAY != 0;
            let first_lane = if comes_home { 0 } else { MARK_LANES };
            let vacant = buckets[other].vacant() >> first_lane << first_lane;
            if vacant == 0 {
                continue;
            }
            let entry = entry & !(MARK | AWAY) | if comes_home { 0 } else { AWAY };
            self.put(other, vacant.trailing_zeros() as usize, entry);
            if !comes_home {
                bucket.set_mark(self.round);
            }
            return Some(lane);
        }
        None
    }

    /// The lane that is worth least, from this one on: of alike ones the oldest.
    fn least(&self, bucket: &Bucket, first_lane: usize, now: Tick) -> Candidate {
        let worth = |lane: usize| {
            let entry = bucket.entry(lane);
            let age = age(entry, now);
            let alive = age < self.reader.lifetimes.0[state_bits(entry)];
            if alive { (state_bits(entry) as u64) << TIME_BITS | (TIME_MASK - age) } else { 0 }
        };
        let ranked = (first_lane..LANES).map(|lane| worth(lane) << LANE_BITS | lane as u64);
        let least = ranked.min().expect("a bucket has lanes");
        Candidate { worth: least >> LANE_BITS, lane: least as usize % LANES }
    }

    /// Visits a few buckets: clears expired entries, so that no `time` wraps round unseen, lets young flows
    /// grow quiet, and sees to the marks. To be called each turn.
    #[inline]
    pub fn sweep(&mut self, now: Tick) {
        let elapsed_ms = now.ms_since(self.swept_until);
        if elapsed_ms > 0 {
            self.sweep_for(elapsed_ms, now);
        }
    }

    #[inline(never)]
    fn sweep_for(&mut self, elapsed_ms: u64, now: Tick) {
        let count = self.reader.buckets.len() as u64;
        self.swept_until = now;
        // In bucket-milliseconds, so that fractions of a bucket add up. A worker that slept 100 ms owes
        // that much at once; more than a second's is not paid back.
        self.sweep_owed += elapsed_ms.min(1000) * count;
        let due = self.sweep_owed / SWEEP_PERIOD_MS;
        self.sweep_owed -= due * SWEEP_PERIOD_MS;
        for _ in 0..due {
            self.sweep_bucket(now);
            self.sweep_at += 1;
            if self.sweep_at == self.reader.buckets.len() {
                (self.sweep_at, self.round) = (0, next(self.round));
            }
        }
    }

    fn sweep_bucket(&mut self, now: Tick) {
        let bucket = &self.reader.buckets[self.sweep_at];
        for lane in 0..LANES {
            let mut entry = bucket.entry(lane);
            let state = State::of(entry);
            if state == State::Empty {
                continue;
            }
            if expired(entry, &self.reader.lifetimes, now) {
                self.put(self.sweep_at, lane, 0);
                continue;
            }
            if let Some(quiet) = state.grown()
                && age(entry, now) >= CONFIRM_AFTER_UNITS
            {
                entry = with_state(entry, quiet, now);
                bucket.set(lane, entry);
            }
            if lane >= MARK_LANES && entry & AWAY != 0 {
                self.bring_home(lane, entry);
            }
        }
        // Each entry away from here has been visited since the round before last, or came later.
        if bucket.mark() == next(self.round) {
            bucket.set_mark(0);
        }
    }

    /// Brings an entry home if there is room by now, or else renews the mark there.
    fn bring_home(&mut self, lane: usize, entry: u64) {
        let at = self.reader.other(self.sweep_at, entry);
        let home = &self.reader.buckets[at];
        let vacant = home.vacant();
        if vacant == 0 {
            home.set_mark(self.round);
            return;
        }
        self.put(at, vacant.trailing_zeros() as usize, entry & !AWAY);
        self.put(self.sweep_at, lane, 0);
    }
}

/// The round after this one; also, of three, the one before last.
fn next(round: u64) -> u64 {
    round % 3 + 1
}

impl Reader {
    #[inline]
    fn first(&self, hash: u64) -> usize {
        hash as usize & (self.buckets.len() - 1)
    }

    /// The other candidate of a flow of which one is `bucket`: never the same. It depends on the tag too, so
    /// that flows of one bucket overflow into many.
    #[inline]
    fn other(&self, bucket: usize, hash_or_entry: u64) -> usize {
        let step = (hash_or_entry >> TAG_SHIFT).wrapping_mul(0x9e37_79b1) as usize | 1;
        (bucket ^ step) & (self.buckets.len() - 1)
    }

    #[inline]
    fn second(&self, hash: u64) -> usize {
        self.other(self.first(hash), hash)
    }

    /// What was said of a connection's backend, if it is remembered and has one; as
    /// [`Connections::find`], for other threads than the table's owner.
    pub fn find<T>(&self, hash: u64, now: Tick, judge: impl Fn(Slot) -> Verdict<T>) -> Option<T> {
        match self.search(hash, now, judge) {
            Found::Live(backend, _) => Some(backend),
            Found::Orphan | Found::Nothing => None,
        }
    }

    /// The backend that a client's connections went to, if the latest began no longer ago than this, and no
    /// more than 33 s longer.
    pub fn affine(&self, hash: u64, now: Tick, timeout_s: u32) -> Option<Slot> {
        let Found::Live(slot, place) = self.search(hash, now, Verdict::Serves) else { return None };
        let units = (u64::from(timeout_s) * 1000).div_ceil(1 << State::Affinity.unit_shift());
        (State::of(place.entry) == State::Affinity && place.age <= units).then_some(slot)
    }

    #[inline]
    fn search<T>(&self, hash: u64, now: Tick, judge: impl Fn(Slot) -> Verdict<T>) -> Found<T> {
        let bucket = self.first(hash);
        let home = &self.buckets[bucket];
        let tag = hash & TAG_MASK;
        let difference = home.least_difference(tag);
        let lanes = if difference < 1 << TAG_SHIFT {
            // Nearly always the flow's: it is not even to be known in which lane it is.
            let entry = tag | difference;
            let place = Place { bucket, entry, age: age(entry, now) };
            if self.is_alive(place)
                && let Verdict::Serves(backend) = judge(slot_of(entry))
            {
                return Found::Live(backend, place);
            }
            home.matching(hash >> TAG_SHIFT)
        } else if home.mark() == 0 {
            return Found::Nothing;
        } else {
            0
        };
        self.search_on(lanes, hash, now, judge)
    }

    /// Apart, so that what is found at once has the registers to itself.
    #[inline(never)]
    fn search_on<T>(
        &self,
        mut lanes: u32,
        hash: u64,
        now: Tick,
        judge: impl Fn(Slot) -> Verdict<T>,
    ) -> Found<T> {
        let mut bucket = self.first(hash);
        loop {
            while lanes != 0 {
                let lane = lanes.trailing_zeros() as usize;
                lanes &= lanes - 1;
                let Some(place) = self.live(bucket, lane, hash, now) else { continue };
                match judge(slot_of(place.entry)) {
                    Verdict::Serves(backend) => return Found::Live(backend, place),
                    Verdict::Gone => return Found::Orphan,
                    Verdict::Stranger => {}
                }
            }
            if bucket != self.first(hash) || self.buckets[bucket].mark() == 0 {
                return Found::Nothing;
            }
            bucket = self.second(hash);
            lanes = self.buckets[bucket].matching(hash >> TAG_SHIFT);
        }
    }

    /// The place, if an entry of this flow is alive there.
    #[inline]
    fn live(&self, bucket: usize, lane: usize, hash: u64, now: Tick) -> Option<Place> {
        let entry = self.buckets[bucket].entry(lane);
        let place = Place { bucket, entry, age: age(entry, now) };
        // Another worker may have given the lane of its table to another flow since it was matched.
        let taken = entry >> TAG_SHIFT != hash >> TAG_SHIFT;
        (!taken && self.is_alive(place)).then_some(place)
    }

    #[inline]
    fn is_alive(&self, place: Place) -> bool {
        place.age < self.lifetimes.0[state_bits(place.entry)]
    }

    /// Calls `each` with the backend slot of every connection that has not ended, unconfirmed ones included.
    /// Reads the whole table: for operators, not for packets.
    pub fn for_each(&self, now: Tick, mut each: impl FnMut(Slot)) {
        for bucket in self.buckets {
            for lane in 0..LANES {
                let entry = bucket.entry(lane);
                if is_open(entry) && !expired(entry, &self.lifetimes, now) {
                    each(slot_of(entry));
                }
            }
        }
    }
}

/// A lane that may give way to a new flow.
struct Candidate {
    /// 0 if nothing alive is in it; else its state's [`rank`] and more, the younger the more.
    worth: u64,
    lane: usize,
}

const fn rank(state: State) -> u64 {
    (state as u64) << TIME_BITS
}

/// Whoever is worth this, or more, gives way to nobody.
const CONFIRMED: u64 = rank(State::Closing);

/// Corrects the counts of open connections for an entry that replaces another.
#[inline]
fn recount(open: &mut [u32], former: u64, entry: u64) {
    for (entry, by) in [(former, -1), (entry, 1)] {
        if is_open(entry)
            && let Some(count) = open.get_mut(slot_of(entry) as usize)
        {
            *count = count.wrapping_add_signed(by);
        }
    }
}

#[inline]
fn is_open(entry: u64) -> bool {
    OPEN >> state_bits(entry) & 1 == 1
}

#[inline]
fn slot_of(entry: u64) -> Slot {
    ((entry >> SLOT_SHIFT) & SLOT_MASK) as Slot
}

/// The number of the entry's state.
#[inline]
fn state_bits(entry: u64) -> usize {
    (entry >> STATE_SHIFT) as usize & (STATES - 1)
}

/// Time since the entry's, in its state's units, modulo the wrap.
#[inline]
fn age(entry: u64, now: Tick) -> u64 {
    let now = now.0 >> UNIT_SHIFTS[state_bits(entry)];
    now.wrapping_sub(entry >> TIME_SHIFT) & TIME_MASK
}

/// Whether there is nothing alive here: never was, or silent for too long.
#[inline]
fn expired(entry: u64, lifetimes: &Lifetimes, now: Tick) -> bool {
    age(entry, now) >= lifetimes.0[state_bits(entry)]
}

/// What is remembered of a flow at first.
#[inline]
fn entry_of(hash: u64, slot: Slot, traffic: Traffic, now: Tick) -> u64 {
    let state = match traffic {
        Traffic::Syn => State::Opening,
        Traffic::Stream => State::YoungStream,
        Traffic::End => State::Ended,
        Traffic::Datagram => State::YoungDatagrams,
    };
    let entry = hash & TAG_MASK | (u64::from(slot) & SLOT_MASK) << SLOT_SHIFT;
    with_state(entry, state, now)
}

#[inline]
fn with_state(entry: u64, state: State, now: Tick) -> u64 {
    entry & !AGE_MASK | age_bits(state, now)
}

/// The bits of [`AGE_MASK`] for an entry that comes into this state now.
#[inline]
fn age_bits(state: State, now: Tick) -> u64 {
    let time = (now.0 >> state.unit_shift()) & TIME_MASK;
    time << TIME_SHIFT | (state as u64) << STATE_SHIFT
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn table(capacity: usize) -> Connections {
        Connections::new(capacity, &Timeouts::default()).unwrap()
    }

    fn found(connections: &Connections, hash: u64, now: Tick) -> Option<Slot> {
        match connections.find(hash, now, Verdict::Serves) {
            Found::Live(slot, _) => Some(slot),
            _ => None,
        }
    }

    fn touch(connections: &mut Connections, hash: u64, traffic: Traffic, now: Tick) {
        let Found::Live(_, place) = connections.find(hash, now, Verdict::Serves) else {
            panic!("found")
        };
        connections.touch(place, traffic, now);
    }

    /// A hash with the given bucket (of few) and tag.
    fn hash(bucket: u64, tag: u64) -> u64 {
        tag << TAG_SHIFT | bucket
    }

    #[test]
    fn a_connection_is_found_until_its_timeout_and_not_after_the_sweep() {
        let mut connections = table(1024);
        let start = Tick(5_000_000);
        connections.remember(hash(3, 77), 42, Traffic::Syn, start);
        assert_eq!(found(&connections, hash(3, 77), start), Some(42));
        assert_eq!(found(&connections, hash(3, 78), start), None);
        assert_eq!(found(&connections, hash(3, 77), start + 30_000), Some(42));
        assert_eq!(found(&connections, hash(3, 77), start + 30_200), None);
    }

    #[test]
    fn a_confirmed_tcp_connection_lives_for_hours() {
        let mut connections = table(1024);
        let start = Tick(1);
        connections.remember(hash(3, 77), 42, Traffic::Syn, start);
        touch(&mut connections, hash(3, 77), Traffic::Stream, start + 500);
        let later = start + 500 + 4 * 3600 * 1000;
        assert_eq!(found(&connections, hash(3, 77), later), Some(42));
        assert_eq!(found(&connections, hash(3, 77), later + 200_000), None);
    }

    /// Turns the clock as a worker does.
    fn sweep_until(connections: &mut Connections, from: Tick, until: Tick) {
        let mut now = from;
        while now < until {
            now = now + 100;
            connections.sweep(now);
        }
    }

    #[test]
    fn a_packet_within_100_ms_of_the_first_confirms_nothing() {
        for offset in 0..64 {
            let start = Tick(10_000 + offset);
            for (later, confirmed) in [(100, false), (192, true)] {
                let mut connections = table(16);
                connections.remember(hash(0, 77), 42, Traffic::Syn, start);
                touch(&mut connections, hash(0, 77), Traffic::Stream, start + later);
                for tag in 100..132 {
                    connections.remember(hash(tag % 2, tag), 1, Traffic::Stream, start + 300);
                }
                let kept = found(&connections, hash(0, 77), start + 400) == Some(42);
                assert_eq!(kept, confirmed, "{offset} {later}");
            }
        }
    }

    #[test]
    fn a_connection_that_opened_within_a_moment_is_remembered_as_long_as_any() {
        let hour = 3_600_000;
        for (first, second, remembered_ms) in [
            (Traffic::Syn, Traffic::Stream, 4 * hour),
            (Traffic::Stream, Traffic::Stream, 4 * hour),
            (Traffic::Datagram, Traffic::Datagram, 300_000),
        ] {
            let mut connections = table(1024);
            let start = Tick(1_000_000);
            connections.remember(hash(3, 77), 42, first, start);
            touch(&mut connections, hash(3, 77), second, start + 1);
            sweep_until(&mut connections, start, start + remembered_ms);
            assert_eq!(found(&connections, hash(3, 77), start + remembered_ms), Some(42));
            let dead = start + Timeouts::default().longest_ms();
            sweep_until(&mut connections, start + remembered_ms, dead);
            assert_eq!(found(&connections, hash(3, 77), dead), None);
        }
    }

    #[test]
    fn a_connection_that_ended_within_a_moment_is_forgotten_soon() {
        let mut connections = table(1024);
        let start = Tick(1_000_000);
        connections.remember(hash(3, 77), 42, Traffic::Syn, start);
        for traffic in [Traffic::Stream, Traffic::End, Traffic::Stream] {
            touch(&mut connections, hash(3, 77), traffic, start + 1);
        }
        sweep_until(&mut connections, start, start + 31_000);
        assert_eq!(found(&connections, hash(3, 77), start + 31_000), None);
    }

    #[test]
    fn no_entry_outlives_the_longest_lifetime() {
        for tcp_idle_s in [1, 66, 3600, 14_400] {
            let timeouts = Timeouts { tcp_idle_s, udp_idle_s: 1, ..Timeouts::default() };
            for offset in [0, 1, 40_000, 65_535] {
                let mut connections = Connections::new(16, &timeouts).unwrap();
                let start = Tick(65_536 * 10 + offset);
                connections.remember(hash(0, 77), 42, Traffic::Stream, start);
                connections.swept_until = start;
                sweep_until(&mut connections, start, start + 32_000);
                let end = start + timeouts.longest_ms();
                assert_eq!(found(&connections, hash(0, 77), end), None, "{tcp_idle_s} {offset}");
            }
        }
    }

    #[test]
    fn a_second_sweep_at_the_same_time_visits_nothing() {
        let mut connections = table(1 << 20);
        connections.sweep(Tick(1_000));
        let at = connections.sweep_at;
        connections.sweep(Tick(1_000));
        assert_eq!(connections.sweep_at, at);
        connections.sweep(Tick(1_001));
        assert_ne!(connections.sweep_at, at);
    }

    #[test]
    fn a_closed_connection_is_forgotten_soon() {
        let mut connections = table(1024);
        connections.remember(hash(3, 77), 42, Traffic::Syn, Tick(0));
        touch(&mut connections, hash(3, 77), Traffic::Stream, Tick(1_000));
        touch(&mut connections, hash(3, 77), Traffic::End, Tick(2_000));
        assert_eq!(found(&connections, hash(3, 77), Tick(60_000)), Some(42));
        assert_eq!(found(&connections, hash(3, 77), Tick(66_000)), None);
    }

    #[test]
    fn a_flood_of_new_flows_evicts_no_confirmed_connection() {
        let mut connections = table(1024);
        let now = Tick(1_000_000);
        let confirmed: Vec<u64> = (0..512).map(|i| hash(i % 128, 1_000 + i)).collect();
        for (slot, &hash) in confirmed.iter().enumerate() {
            connections.remember(hash, slot as Slot, Traffic::Syn, now);
            touch(&mut connections, hash, Traffic::Stream, now + 200);
        }
        for i in 0..100_000 {
            let traffic = [Traffic::Syn, Traffic::Stream, Traffic::End, Traffic::Datagram];
            let traffic = traffic[i as usize % 4];
            connections.remember(hash(i % 128, 1_000_000 + i), 9, traffic, now + 300);
        }
        for (slot, &hash) in confirmed.iter().enumerate() {
            assert_eq!(found(&connections, hash, now + 400), Some(slot as Slot));
        }
    }

    #[test]
    fn a_bucket_of_confirmed_connections_takes_no_new_one() {
        let mut connections = table(16);
        let now = Tick(0);
        for tag in 0..16 {
            assert_ne!(
                connections.remember(hash(tag % 2, 100 + tag), 1, Traffic::Syn, now),
                Remembered::Full
            );
            touch(&mut connections, hash(tag % 2, 100 + tag), Traffic::Stream, now + 300);
        }
        assert_eq!(
            connections.remember(hash(0, 999), 2, Traffic::Syn, now + 400),
            Remembered::Full
        );
        assert_eq!(found(&connections, hash(0, 999), now + 400), None);
    }

    #[test]
    fn no_more_new_flows_are_remembered_in_a_second_than_are_admitted() {
        let mut connections = table(1 << 14).admitting(1000);
        let mut inserted = [0, 0];
        for ms in 0..4000 {
            for flow in 0..10 {
                let hash = hash(ms % 2048, ms * 10 + flow + 1);
                let traffic = if flow < 5 { Traffic::Syn } else { Traffic::Stream };
                if connections.remember(hash, 1, traffic, Tick(ms)) != Remembered::NotAdmitted {
                    inserted[usize::from(flow < 5)] += 1;
                }
            }
        }
        assert_eq!(
            inserted,
            [4099, 4099],
            "four seconds and a burst, but for the last millisecond"
        );
    }

    #[test]
    fn what_is_worth_least_gives_way_first_and_of_alike_ones_the_oldest() {
        let mut connections = table(16);
        let start = Tick(1_000_000);
        let mut now = start;
        // In the order in which they are to give way.
        let flows: [(u64, &[Traffic]); 7] = [
            (1, &[Traffic::End]),
            (2, &[Traffic::Syn, Traffic::End]),
            (3, &[Traffic::Syn]),
            (4, &[Traffic::Syn]),
            (5, &[Traffic::Stream]),
            (6, &[Traffic::Syn, Traffic::Stream]),
            (7, &[Traffic::Datagram]),
        ];
        for bucket in [0, 1] {
            for (tag, packets) in flows {
                connections.remember(hash(bucket, tag), 1, packets[0], now);
                for &packet in &packets[1..] {
                    touch(&mut connections, hash(bucket, tag), packet, now);
                }
                now = now + 64; // the unit in which the age of such flows is counted
            }
            connections.remember(hash(bucket, 8), 1, Traffic::Syn, start);
            touch(&mut connections, hash(bucket, 8), Traffic::Stream, start + 300);
        }
        for given_way in 1..=7 {
            let newcomer = hash(0, 100 + given_way);
            assert_eq!(
                connections.remember(newcomer, 2, Traffic::Stream, now),
                Remembered::Evicted
            );
            touch(&mut connections, newcomer, Traffic::Stream, now + 300); // it stays
            for tag in 1..=8 {
                let kept = found(&connections, hash(0, tag), now).is_some();
                assert_eq!(kept, tag > given_way, "{tag} when {given_way} gave way");
            }
        }
        for tag in 1..=8 {
            assert_eq!(found(&connections, hash(1, tag), now), Some(1), "the other bucket's stay");
        }
    }

    #[test]
    fn a_flood_of_syns_marks_no_bucket_as_overflowed() {
        let mut connections = table(1024);
        for tag in 0..10_000 {
            connections.remember(hash(tag % 128, 1 + tag), 1, Traffic::Syn, Tick(1_000));
        }
        assert_eq!(marked(&connections), 0);
    }

    /// Ten confirmed connections of one bucket, tagged 1 to 10.
    fn overflowed(start: Tick) -> Connections {
        let mut connections = table(1024);
        connections.swept_until = start;
        for tag in 1..=10 {
            connections.remember(hash(3, tag), 1, Traffic::Syn, start);
            touch(&mut connections, hash(3, tag), Traffic::Stream, start + 300);
        }
        assert_eq!(marked(&connections), 1);
        connections
    }

    fn marked(connections: &Connections) -> usize {
        connections.reader.buckets.iter().filter(|bucket| bucket.mark() != 0).count()
    }

    /// What of [`overflowed`] is found.
    fn tags(connections: &Connections, now: Tick) -> Vec<u64> {
        (1..=10).filter(|&tag| found(connections, hash(3, tag), now).is_some()).collect()
    }

    const FORGOTTEN_MS: u64 = 62_000;

    #[test]
    fn a_bucket_is_marked_while_an_entry_of_it_is_elsewhere_and_no_longer() {
        let mut now = Tick(1_000_000);
        let mut connections = overflowed(now);
        let mut wait = |connections: &mut Connections, ms| {
            sweep_until(connections, now, now + ms);
            now = now + ms;
            now
        };
        wait(&mut connections, 3 * 3_600_000);
        assert_eq!(marked(&connections), 1);
        let now = wait(&mut connections, 0);
        assert_eq!(tags(&connections, now), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        for tag in [9, 10] {
            touch(&mut connections, hash(3, tag), Traffic::End, now);
        }
        let now = wait(&mut connections, FORGOTTEN_MS + 3 * SWEEP_PERIOD_MS);
        assert_eq!(tags(&connections, now), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(marked(&connections), 0);
    }

    #[test]
    fn an_entry_comes_home_when_there_is_room() {
        let start = Tick(1_000_000);
        let mut connections = overflowed(start);
        for tag in [3, 4] {
            touch(&mut connections, hash(3, tag), Traffic::End, start + 300);
        }
        let now = start + FORGOTTEN_MS + 4 * SWEEP_PERIOD_MS;
        sweep_until(&mut connections, start, now);
        assert_eq!(marked(&connections), 0);
        assert_eq!(tags(&connections, now), [1, 2, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn a_table_that_is_nearly_full_takes_nearly_all_new_connections() {
        let capacity = 1 << 14;
        let mut random = random_numbers(1);
        for (percent, most_lost) in [(80, 0), (90, 20), (95, 150)] {
            let mut connections = table(capacity);
            let flows: Vec<u64> = (0..capacity * percent / 100).map(|_| random()).collect();
            for &hash in &flows {
                let remembered = connections.remember(hash, 1, Traffic::Syn, Tick(1_000));
                if remembered != Remembered::Full {
                    touch(&mut connections, hash, Traffic::Stream, Tick(1_300));
                }
            }
            let now = Tick(1_400);
            let lost =
                flows.iter().filter(|&&hash| found(&connections, hash, now).is_none()).count();
            assert!(lost <= most_lost, "{lost} of {percent} %");
        }
    }

    /// Every entry is in one of its flow's buckets and says which, and its home says if it is not there.
    fn all_can_be_found(connections: &Connections, flows: &[u64]) {
        let reader = connections.reader;
        for (at, bucket) in reader.buckets.iter().enumerate() {
            for lane in 0..LANES {
                let entry = bucket.entry(lane);
                if State::of(entry) == State::Empty {
                    continue;
                }
                let flow = flows.iter().find(|&&hash| hash & TAG_MASK == entry & TAG_MASK);
                let home = reader.first(*flow.unwrap());
                let away = lane >= MARK_LANES && entry & AWAY != 0;
                assert_eq!(at, if away { reader.other(home, entry) } else { home });
                assert!(!away || reader.buckets[home].mark() != 0, "nobody looks for it");
                let mark = reader.buckets[home].mark();
                assert!(!away || mark != next(connections.round), "the mark lasts for a round");
            }
        }
    }

    #[test]
    fn however_entries_come_and_go_and_move_all_can_be_found() {
        let mut random = random_numbers(2);
        for flows in [40, 64, 80, 200] {
            let mut connections = table(64);
            let mut now = Tick(1_000);
            connections.sweep(now);
            let flows: Vec<u64> = (0..flows).map(|_| random()).collect();
            for _ in 0..20_000 {
                let hash = flows[random() as usize % flows.len()];
                match (random() % 8, connections.find(hash, now, Verdict::Serves)) {
                    (0, Found::Live(_, place)) => {
                        connections.rewrite(place, place.entry & MARK);
                    }
                    (1, _) => {
                        now = now + random() % 4_000;
                        connections.sweep(now);
                    }
                    (2, Found::Live(..)) => {
                        connections.remember(hash, 2, Traffic::Syn, now);
                    }
                    (_, Found::Live(_, place)) => connections.touch(place, Traffic::Stream, now),
                    (kind, _) => {
                        let traffic = if kind < 4 { Traffic::Syn } else { Traffic::Stream };
                        connections.remember(hash, 1, traffic, now);
                    }
                }
                all_can_be_found(&connections, &flows);
            }
        }
    }

    /// Numbers that look random.
    fn random_numbers(mut state: u64) -> impl FnMut() -> u64 {
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
    }

    #[test]
    fn the_counts_of_open_connections_are_what_a_look_into_the_table_would_find() {
        for seed in 0..20 {
            let mut random = random_numbers(seed);
            let mut connections = table(64).counting(6);
            let mut now = Tick(1_000_000);
            for _ in 0..3000 {
                let hash = hash(random() % 8, random() % 24);
                let (slot, kind) = ((random() % 8) as Slot, random() % 12);
                let traffic = [Traffic::Syn, Traffic::Stream, Traffic::End, Traffic::Datagram];
                let traffic = traffic[(random() % 4) as usize];
                match kind {
                    0 => connections.remember_affinity(hash, slot, traffic, now),
                    1 => now = now + random() % 20_000,
                    2..6 => connections.sweep(now),
                    6..9 if found(&connections, hash, now).is_some() => {
                        touch(&mut connections, hash, traffic, now);
                    }
                    _ => {
                        connections.remember(hash, slot, traffic, now);
                    }
                }
                let entries = || connections.reader.buckets.iter().flat_map(|bucket| &bucket.0);
                for slot in 0..8 {
                    let there = entries().map(|entry| entry.load(Ordering::Relaxed));
                    let open = there.filter(|&e| is_open(e) && slot_of(e) == slot).count();
                    let expected = if slot < 6 { open as u32 } else { 0 };
                    assert_eq!(connections.open(slot), expected, "seed {seed}");
                }
            }
        }
    }

    #[test]
    fn an_affinity_is_no_connection_and_lives_as_long_as_is_asked_and_33_s_more_at_most() {
        for (timeout_s, offset) in [(1, 0), (300, 5_000), (Timeouts::MAX_AFFINITY_S, 16_000)] {
            let mut connections = table(1024).counting(64);
            let start = Tick(1 << 30) + offset;
            connections.remember_affinity(hash(3, 77), 42, Traffic::Syn, start);
            assert_eq!(connections.open(42), 0);
            let reader = connections.reader();
            reader.for_each(start, |_| panic!("it is no connection"));
            let end = start + 1000 * u64::from(timeout_s);
            sweep_until(&mut connections, start, end);
            assert_eq!(reader.affine(hash(3, 77), end, timeout_s), Some(42));
            assert_eq!(reader.affine(hash(3, 78), end, timeout_s), None);
            assert_eq!(reader.affine(hash(3, 77), end + 33_000, timeout_s), None);
        }
    }

    #[test]
    fn affinities_give_way_to_connections_and_a_lone_syn_gives_way_to_them() {
        let mut connections = table(16);
        let start = Tick(1 << 30);
        let all = || (0..16).map(|tag| hash(tag % 2, 100 + tag));
        all().for_each(|hash| connections.remember_affinity(hash, 1, Traffic::Syn, start));
        let reader = connections.reader();
        assert!(all().all(|hash| reader.affine(hash, start, 60).is_some()));
        for tag in 0..16 {
            connections.remember(hash(tag % 2, 200 + tag), 2, Traffic::Stream, start + 1);
        }
        assert!(all().all(|hash| reader.affine(hash, start + 1, 60).is_none()));

        let mut connections = table(16);
        for tag in 0..16 {
            connections.remember(hash(tag % 2, 200 + tag), 2, Traffic::Syn, start);
        }
        all().for_each(|hash| connections.remember_affinity(hash, 1, Traffic::Syn, start + 1));
        let reader = connections.reader();
        assert!(all().all(|hash| reader.affine(hash, start + 1, 60).is_some()));
    }

    #[test]
    fn the_slot_of_a_removed_backend_is_an_orphan_and_a_strangers_counts_for_nothing() {
        let mut connections = table(1024);
        connections.remember(hash(3, 77), 42, Traffic::Syn, Tick(0));
        let look = |verdict: Verdict<()>| connections.find(hash(3, 77), Tick(1), move |_| verdict);
        assert!(matches!(look(Verdict::Gone), Found::Orphan));
        assert!(matches!(look(Verdict::Stranger), Found::Nothing));
    }

    #[test]
    fn the_sweep_visits_every_bucket_within_its_period_however_often_it_is_called() {
        for step_ms in [1, 7, 100, 900] {
            let mut connections = table(4096);
            for bucket in 0..512 {
                connections.remember(hash(bucket, 1 + bucket), 1, Traffic::Syn, Tick(0));
            }
            let mut now = Tick(31_000);
            connections.swept_until = now;
            while now < Tick(31_000 + SWEEP_PERIOD_MS + 1_000) {
                now = now + step_ms;
                connections.sweep(now);
            }
            let left = (0..512).filter(|&b| connections.reader.buckets[b].entry(0) != 0).count();
            assert_eq!(left, 0, "step {step_ms}");
        }
    }

    #[test]
    fn a_millisecond_of_many_turns_is_swept_once() {
        for capacity in [1 << 10, 1 << 17, 1 << 21] {
            let mut connections = table(capacity);
            let buckets = capacity as u64 / LANES as u64;
            for ms in 1..=64 {
                for _turn in 0..100 {
                    connections.sweep(Tick(ms));
                }
            }
            assert_eq!(connections.sweep_at as u64, 64 * buckets / SWEEP_PERIOD_MS, "{capacity}");
        }
    }

    #[test]
    fn a_wrapped_time_does_not_revive_a_swept_entry() {
        let mut connections = table(1024);
        connections.remember(hash(3, 77), 42, Traffic::Syn, Tick(0));
        let mut now = Tick(0);
        while now < Tick(70_000) {
            now = now + 100;
            connections.sweep(now);
        }
        assert_eq!(found(&connections, hash(3, 77), now), None);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::thread;

    use super::*;

    const NOW: Tick = Tick(1_000_000);

    fn found(reader: Reader, hash: u64, now: Tick) -> Option<Slot> {
        reader.find(hash, now, Verdict::Serves)
    }

    fn touch(connections: &mut Connections, hash: u64, traffic: Traffic, now: Tick) {
        let Found::Live(_, place) = connections.find(hash, now, Verdict::Serves) else {
            panic!("found")
        };
        connections.touch(place, traffic, now);
    }

    fn sweep_round(connections: &mut Connections, start: Tick) {
        for second in 0..=SWEEP_PERIOD_MS.div_ceil(1000) {
            connections.sweep(start + 1000 * second);
        }
    }

    /// A hash of the first bucket, with this tag.
    fn hash(tag: u64) -> u64 {
        tag << TAG_SHIFT
    }

    /// An owner with a table of two buckets that has done something, and then does something else while
    /// another thread reads: in every order, and with every value that relaxed loads may return.
    fn read_while(before: fn(&mut Connections), owner: fn(&mut Connections), peer: fn(Reader)) {
        let mut model = loom::model::Builder::new();
        model.max_branches = 100_000; // what comes before counts, too
        model.check(move || {
            let mut connections = Connections::new(2 * LANES, &Timeouts::default()).unwrap();
            before(&mut connections);
            let reader = connections.reader();
            let peer = thread::spawn(move || peer(reader));
            owner(&mut connections);
            peer.join().unwrap();
        });
    }

    /// Remembers flows of the first bucket by these tags, in slots of the same numbers.
    fn fill(connections: &mut Connections, tags: std::ops::Range<u64>) {
        for tag in tags {
            connections.remember(hash(tag), tag as Slot, Traffic::Stream, NOW);
        }
    }

    #[test]
    fn a_new_decision_is_seen_as_a_whole_and_not_taken_back() {
        read_while(
            |_| {},
            |connections| {
                connections.remember(hash(1), 1, Traffic::Syn, NOW);
                connections.remember(hash(1), 2, Traffic::Syn, NOW + 64);
            },
            |reader| {
                let seen = [(); 2].map(|()| found(reader, hash(1), NOW + 64));
                assert!([None, Some(1), Some(2)].contains(&seen[0]), "{seen:?}");
                assert!(seen.is_sorted(), "{seen:?}");
            },
        );
    }

    #[test]
    fn a_connection_is_found_at_every_moment_of_its_life() {
        read_while(
            |connections| {
                connections.remember(hash(1), 1, Traffic::Stream, NOW);
            },
            |connections| {
                // It grows quiet, and is confirmed.
                sweep_round(connections, NOW);
                touch(connections, hash(1), Traffic::Stream, NOW + 20_000);
            },
            |reader| assert_eq!(found(reader, hash(1), NOW + 20_000), Some(1)),
        );
    }

    #[test]
    fn a_lane_given_to_another_flow_is_not_taken_for_the_former_ones() {
        read_while(
            |connections| {
                // Three that will be forgotten soon: the second bucket is not asked.
                for tag in [1, 3, 4] {
                    connections.remember(hash(tag), tag as Slot, Traffic::Syn, NOW);
                }
                fill(connections, 13..10 + LANES as u64);
                assert_eq!(found(connections.reader(), hash(1), NOW), Some(1));
            },
            |connections| {
                let remembered = connections.remember(hash(2), 2, Traffic::Syn, NOW + 64);
                assert_eq!(remembered, Remembered::Evicted);
            },
            |reader| {
                let former = found(reader, hash(1), NOW + 64);
                assert!([None, Some(1)].contains(&former), "{former:?}");
                let latter = found(reader, hash(2), NOW + 64);
                assert!([None, Some(2)].contains(&latter), "{latter:?}");
            },
        );
    }

    /// A bucket full of confirmed flows.
    fn fill_for_good(connections: &mut Connections) {
        let tags = 10..10 + LANES as u64;
        fill(connections, tags.clone());
        tags.for_each(|tag| touch(connections, hash(tag), Traffic::Stream, NOW + 300));
    }

    /// One more flow, which has to be away from there.
    fn overflow(connections: &mut Connections, traffic: Traffic) {
        let remembered = connections.remember(hash(2), 2, traffic, NOW + 300);
        assert_eq!(remembered, Remembered::Inserted);
    }

    /// In this time a bucket is visited so often that its mark, if it is not needed, goes.
    fn sweep_marks(connections: &mut Connections, start: Tick) {
        (0..3).for_each(|round| sweep_round(connections, start + round * SWEEP_PERIOD_MS));
        assert_eq!(connections.reader.buckets[0].mark(), 0);
    }

    #[test]
    fn an_overflow_hides_nobody_at_home() {
        read_while(
            fill_for_good,
            |connections| overflow(connections, Traffic::Syn),
            |reader| {
                assert_eq!(found(reader, hash(10), NOW + 300), Some(10));
                let away = found(reader, hash(2), NOW + 300);
                assert!([None, Some(2)].contains(&away), "{away:?}");
            },
        );
    }

    #[test]
    fn the_end_of_an_overflow_hides_nobody_at_home() {
        const LATER: Tick = Tick(NOW.0 + 40_000); // what is away has expired
        read_while(
            |connections| {
                fill_for_good(connections);
                overflow(connections, Traffic::Syn);
            },
            |connections| sweep_marks(connections, LATER),
            |reader| assert_eq!(found(reader, hash(10), LATER), Some(10)),
        );
    }

    #[test]
    fn a_flow_that_comes_home_is_not_taken_for_another() {
        const LATER: Tick = Tick(NOW.0 + 70_000); // there is room at home
        read_while(
            |connections| {
                fill_for_good(connections);
                overflow(connections, Traffic::Stream);
                touch(connections, hash(10), Traffic::End, NOW + 300);
            },
            |connections| {
                sweep_marks(connections, LATER);
                assert_eq!(found(connections.reader(), hash(2), LATER), Some(2));
            },
            |reader| {
                let coming = found(reader, hash(2), LATER);
                assert!([None, Some(2)].contains(&coming), "{coming:?}");
            },
        );
    }
}
