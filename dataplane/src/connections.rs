//! The connection table of one worker: which backend a flow was given.
//!
//! It is a cache (I5). A flow that is forgotten is answered by Maglev, alike on every worker and node;
//! only while the backend set changes does the table protect connections. So an insert may fail, and an
//! entry may be lost, and nothing breaks.
//!
//! Fixed in size, allocated once. One cache line per lookup: a bucket is 64 bytes with eight entries, and
//! each flow has two candidate buckets, the second of which is read only if the first has once
//! overflowed. One writer, the worker; anyone may read, racily but safely, because an entry is one atomic
//! word:
//!
//! ```text
//!  63            33 32        15 14      5 4    1 0
//! +----------------+------------+---------+------+-+
//! | tag            | slot       | time    | state|o|
//! +----------------+------------+---------+------+-+
//! ```
//!
//! `tag` are 31 bits of the keyed hash beyond the bucket's index; `time` counts in the state's own unit and
//! wraps, so a sweep visits every bucket well within the shortest wrap; `o`, in a bucket's first entry,
//! says that the bucket has overflowed.

use memmap2::{Advice, MmapMut, MmapOptions};
use zerocopy::FromBytes;

use crate::{
    flow::{Flow, protocol, tcp_flags},
    forwarding::{MAX_BACKENDS, Slot},
    prefetch::prefetch,
    sync::{AtomicU64, Ordering},
    time::Tick,
};

/// Entries in a bucket: what fits a cache line.
const LANES: usize = 8;
const LINE: usize = 64;

const TAG_SHIFT: u32 = 33;
const SLOT_SHIFT: u32 = 15;
const TIME_SHIFT: u32 = 5;
const STATE_SHIFT: u32 = 1;
const TIME_MASK: u64 = 0x3ff;
const SLOT_MASK: u64 = MAX_BACKENDS as u64 - 1;
const OVERFLOWED: u64 = 1;
const _: () = assert!(MAX_BACKENDS == 1 << (TAG_SHIFT - SLOT_SHIFT));

/// A flow is worth keeping once a packet comes this long after its first: a flood's does not.
const CONFIRM_AFTER_UNITS: u64 = 3; // of 64 ms: between 128 and 192 ms

/// How often the sweep comes round to each bucket, at the latest, while the worker turns. A power of two,
/// as the number of buckets is: what is due and what was paid for are then exact. Were the latter rounded
/// down, to 0 ms for a large table, each turn would sweep the same millisecond's share again.
const SWEEP_PERIOD_MS: u64 = 16_384;

/// What a connection is known to be doing. The client's direction is all that DSR sees.
///
/// Whether a flow is confirmed decides who must make room for whom, and nothing else: one that is not is
/// remembered as long as any other, while there is room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum State {
    /// Nothing here.
    Empty = 0,
    /// Only a SYN was seen: perhaps a flood's. Forgotten soon.
    Opening = 1,
    /// TCP or SCTP, first seen less than [`CONFIRM_AFTER_UNITS`] ago.
    YoungStream = 2,
    /// UDP, likewise.
    YoungDatagrams = 3,
    /// TCP or SCTP, silent since it was young. Its next packet confirms it.
    QuietStream = 4,
    /// UDP, likewise.
    QuietDatagrams = 5,
    /// TCP or SCTP, confirmed.
    Stream = 6,
    /// UDP, confirmed.
    Datagrams = 7,
    /// Confirmed, but the client sent FIN or RST.
    Closing = 8,
    /// Ended while it was young: most connections. Forgotten soon.
    Ended = 9,
}

impl State {
    #[inline]
    fn of(entry: u64) -> Self {
        match state_bits(entry) {
            1 => Self::Opening,
            2 => Self::YoungStream,
            3 => Self::YoungDatagrams,
            4 => Self::QuietStream,
            5 => Self::QuietDatagrams,
            6 => Self::Stream,
            7 => Self::Datagrams,
            8 => Self::Closing,
            9 => Self::Ended,
            _ => Self::Empty,
        }
    }

    /// One unit of `time` in this state, as a power of two of milliseconds.
    #[inline]
    fn unit_shift(self) -> u32 {
        UNIT_SHIFTS[self as usize]
    }

    /// Whether it must make room for a new flow.
    #[inline]
    fn is_unconfirmed(self) -> bool {
        !matches!(self, Self::Empty | Self::Stream | Self::Datagrams | Self::Closing)
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

/// All numbers that an entry's state bits can be: arrays of so many are indexed without a check.
const STATES: usize = 16;

/// [`State::unit_shift`], by the state's number.
const UNIT_SHIFTS: [u32; STATES] = [
    6,  // empty
    6,  // opening: 64 ms, wraps after 65 s
    6,  // young stream
    6,  // young datagrams
    16, // quiet stream: 66 s, wraps after 18.6 h
    13, // quiet datagrams: 8 s, wraps after 2.3 h
    16, // stream
    13, // datagrams
    10, // closing: 1 s, wraps after 17 min
    6,  // ended
    6, 6, 6, 6, 6, 6, // no state has these numbers
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
        Self { unconfirmed_s: 30, tcp_idle_s: 4 * 3600, tcp_closing_s: 60, udp_idle_s: 300 }
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
#[derive(Debug)]
#[cfg_attr(not(loom), derive(FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout))]
#[repr(C, align(64))]
struct Bucket([AtomicU64; LANES]);

#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket>() == LINE);

impl Bucket {
    #[inline]
    fn entry(&self, lane: usize) -> u64 {
        self.0[lane].load(Ordering::Relaxed)
    }

    /// Writes an entry, keeping the overflow mark, which belongs to the bucket.
    #[inline]
    fn set(&self, lane: usize, entry: u64) {
        let mark = self.entry(lane) & OVERFLOWED;
        self.0[lane].store(entry & !OVERFLOWED | mark, Ordering::Relaxed);
    }

    #[inline]
    fn overflowed(&self) -> bool {
        self.entry(0) & OVERFLOWED != 0
    }

    fn mark_overflowed(&self) {
        self.0[0].store(self.entry(0) | OVERFLOWED, Ordering::Relaxed);
    }

    /// Bit i is set if entry i has this tag. Free of branches: which lane it is can't be predicted.
    #[inline]
    fn matching(&self, tag: u64) -> u32 {
        let mut lanes = 0;
        for lane in 0..LANES {
            lanes |= u32::from(self.entry(lane) >> TAG_SHIFT == tag) << lane;
        }
        lanes
    }
}

/// Where an entry is.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    bucket: usize,
    lane: usize,
}

/// What a lookup found.
#[derive(Clone, Copy, Debug)]
pub enum Found {
    /// The connection's backend.
    Live(Slot, Place),
    /// The connection is remembered, but its backend is gone.
    Orphan,
    /// Nothing.
    Nothing,
}

/// What a lookup asks about a backend slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It serves the packet's service.
    Serves,
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
}

/// No memory for the table.
#[derive(Debug, thiserror::Error)]
#[error("cannot allocate {bytes} bytes for a connection table; lower connections.capacity")]
pub struct AllocationError {
    bytes: usize,
    source: std::io::Error,
}

impl Connections {
    /// A table of at least `capacity` entries (rounded up to a power of two of buckets), on huge pages if
    /// there are some. It lives as long as the process, since others may read it at any time.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(capacity: usize, timeouts: &Timeouts) -> Result<Self, AllocationError> {
        let count = capacity.div_ceil(LANES).next_power_of_two().max(2);
        let (buckets, huge_pages) = allocate(count)?;
        let reader = Reader { buckets, lifetimes: Lifetimes::new(timeouts) };
        Ok(Self { reader, huge_pages, swept_until: Tick(0), sweep_owed: 0, sweep_at: 0 })
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

    /// Looks a connection up; see [`Reader::find`].
    #[inline(always)]
    pub fn find(&self, hash: u64, now: Tick, judge: impl Fn(Slot) -> Verdict) -> Found {
        self.reader.find(hash, now, judge)
    }

    /// Notes a packet of a connection just found.
    #[inline]
    pub fn touch(&mut self, place: Place, traffic: Traffic, now: Tick) {
        let bucket = &self.reader.buckets[place.bucket];
        let entry = bucket.entry(place.lane);
        let state = next_state(entry, traffic, now);
        let renewed = match state {
            // The time of the first packet stays, to be confirmed by.
            State::Opening | State::YoungStream | State::YoungDatagrams | State::Ended => {
                relabelled(entry, state)
            }
            _ => with_state(entry, state, now),
        };
        // Most packets change nothing: no store, and the line stays clean.
        if renewed != entry {
            bucket.0[place.lane].store(renewed, Ordering::Relaxed);
        }
    }

    /// Remembers the backend a flow was given just now, as unconfirmed.
    #[inline]
    pub fn remember(&mut self, hash: u64, slot: Slot, traffic: Traffic, now: Tick) -> Remembered {
        let tag = hash >> TAG_SHIFT;
        let entry = tag << TAG_SHIFT | (u64::from(slot) & SLOT_MASK) << SLOT_SHIFT;
        let state = match traffic {
            Traffic::Syn => State::Opening,
            Traffic::Stream => State::YoungStream,
            Traffic::End => State::Ended,
            Traffic::Datagram => State::YoungDatagrams,
        };
        let entry = with_state(entry, state, now);
        let buckets = self.reader.buckets;
        let (first, second) = (self.reader.first(hash), self.reader.second(hash));

        let home = Candidate::look(&buckets[first], tag, &self.reader.lifetimes, now);
        let Some(lane) = home.same.or(home.free) else {
            return self.remember_in_second(first, second, home.unconfirmed, tag, entry, now);
        };
        if home.same.is_none() && buckets[first].overflowed() {
            // An older entry of this flow may be in the second bucket: it must not come to light again.
            let other = Candidate::look(&buckets[second], tag, &self.reader.lifetimes, now);
            if let Some(lane) = other.same {
                buckets[second].set(lane, entry);
                return Remembered::Renewed;
            }
        }
        buckets[first].set(lane, entry);
        if home.same.is_some() { Remembered::Renewed } else { Remembered::Inserted }
    }

    /// The first bucket is full.
    #[cold]
    fn remember_in_second(
        &mut self,
        first: usize,
        second: usize,
        unconfirmed: Option<usize>,
        tag: u64,
        entry: u64,
        now: Tick,
    ) -> Remembered {
        let (home, other) = (&self.reader.buckets[first], &self.reader.buckets[second]);
        let away = Candidate::look(other, tag, &self.reader.lifetimes, now);
        if let Some(lane) = away.same.filter(|_| home.overflowed()) {
            other.set(lane, entry);
            return Remembered::Renewed;
        }
        if let Some(lane) = away.free {
            home.mark_overflowed();
            other.set(lane, entry);
            return Remembered::Inserted;
        }
        // A new flow is worth less than a confirmed one, and no less than an older unconfirmed one.
        if let Some(lane) = unconfirmed {
            home.set(lane, entry);
            return Remembered::Evicted;
        }
        if let Some(lane) = away.unconfirmed {
            home.mark_overflowed();
            other.set(lane, entry);
            return Remembered::Evicted;
        }
        Remembered::Full
    }

    /// Visits a few buckets: clears expired entries, so that no `time` wraps round unseen, and lets young
    /// flows grow quiet. To be called each turn.
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
            self.sweep_at = (self.sweep_at + 1) & (self.reader.buckets.len() - 1);
        }
    }

    fn sweep_bucket(&self, now: Tick) {
        let bucket = &self.reader.buckets[self.sweep_at];
        for lane in 0..LANES {
            let entry = bucket.entry(lane);
            let state = State::of(entry);
            if state == State::Empty {
                continue;
            }
            if expired(entry, &self.reader.lifetimes, now) {
                bucket.set(lane, 0);
            } else if let Some(quiet) = state.grown()
                && age(entry, now) >= CONFIRM_AFTER_UNITS
            {
                bucket.set(lane, with_state(entry, quiet, now));
            }
        }
    }
}

impl Reader {
    #[inline]
    fn first(&self, hash: u64) -> usize {
        hash as usize & (self.buckets.len() - 1)
    }

    /// The other candidate: never the first one. It depends on the tag too, so that flows of one bucket
    /// overflow into many.
    #[inline]
    fn second(&self, hash: u64) -> usize {
        let step = (hash >> TAG_SHIFT).wrapping_mul(0x9e37_79b1) as usize | 1;
        (self.first(hash) ^ step) & (self.buckets.len() - 1)
    }

    /// Looks a connection up by its flow's hash. `judge` says whether a slot's backend serves the packet's
    /// service.
    #[inline(always)]
    pub fn find(&self, hash: u64, now: Tick, judge: impl Fn(Slot) -> Verdict) -> Found {
        let first = self.first(hash);
        match self.find_in(first, hash, now, &judge) {
            Found::Nothing if self.buckets[first].overflowed() => {
                self.find_in_second(hash, now, &judge)
            }
            found => found,
        }
    }

    /// Apart, so that the search of the first bucket stays in line: 32 instructions, 4 ns a packet.
    #[cold]
    fn find_in_second(&self, hash: u64, now: Tick, judge: &impl Fn(Slot) -> Verdict) -> Found {
        self.find_in(self.second(hash), hash, now, judge)
    }

    #[inline(always)]
    fn find_in(
        &self,
        bucket: usize,
        hash: u64,
        now: Tick,
        judge: &impl Fn(Slot) -> Verdict,
    ) -> Found {
        let entries = &self.buckets[bucket];
        let mut lanes = entries.matching(hash >> TAG_SHIFT);
        while lanes != 0 {
            let lane = lanes.trailing_zeros() as usize;
            lanes &= lanes - 1;
            let entry = entries.entry(lane);
            // Another worker's table may have given the lane to another flow since it was matched.
            let taken = entry >> TAG_SHIFT != hash >> TAG_SHIFT;
            if taken || expired(entry, &self.lifetimes, now) {
                continue;
            }
            let slot = slot_of(entry);
            match judge(slot) {
                Verdict::Serves => {
                    return Found::Live(slot, Place { bucket, lane });
                }
                Verdict::Gone => return Found::Orphan,
                Verdict::Stranger => {}
            }
        }
        Found::Nothing
    }

    /// Calls `each` with the backend slot of every connection that has not ended, unconfirmed ones included.
    /// Reads the whole table: for operators, not for packets.
    pub fn for_each(&self, now: Tick, mut each: impl FnMut(Slot)) {
        for bucket in self.buckets {
            for lane in 0..LANES {
                let entry = bucket.entry(lane);
                let ended = matches!(State::of(entry), State::Closing | State::Ended);
                if !ended && !expired(entry, &self.lifetimes, now) {
                    each(slot_of(entry));
                }
            }
        }
    }
}

/// What one bucket offers to a flow that is to be remembered.
struct Candidate {
    /// The lane with the flow's own tag.
    same: Option<usize>,
    /// A lane with nothing alive in it.
    free: Option<usize>,
    /// The lane of the unconfirmed flow that is worth least.
    unconfirmed: Option<usize>,
}

impl Candidate {
    #[inline]
    fn look(bucket: &Bucket, tag: u64, lifetimes: &Lifetimes, now: Tick) -> Self {
        let mut found = Self { same: None, free: None, unconfirmed: None };
        let mut least = u64::MAX;
        for lane in 0..LANES {
            let entry = bucket.entry(lane);
            if expired(entry, lifetimes, now) {
                found.free = found.free.or(Some(lane));
            } else if entry >> TAG_SHIFT == tag {
                found.same = Some(lane);
            } else if State::of(entry).is_unconfirmed() {
                // A lone SYN before a young flow before a quiet one; of alike ones the oldest.
                let worth = (state_bits(entry) as u64) << 32 | (TIME_MASK - age(entry, now));
                if worth < least {
                    (found.unconfirmed, least) = (Some(lane), worth);
                }
            }
        }
        found
    }
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

#[inline]
fn with_state(entry: u64, state: State, now: Tick) -> u64 {
    let time = (now.0 >> state.unit_shift()) & TIME_MASK;
    relabelled(entry & !(TIME_MASK << TIME_SHIFT) | time << TIME_SHIFT, state)
}

/// The entry in another state that counts time in the same unit.
#[inline]
fn relabelled(entry: u64, state: State) -> u64 {
    entry & !((STATES as u64 - 1) << STATE_SHIFT) | (state as u64) << STATE_SHIFT
}

#[inline]
fn next_state(entry: u64, traffic: Traffic, now: Tick) -> State {
    let state = State::of(entry);
    let young = UNIT_SHIFTS[state as usize] == UNIT_SHIFTS[State::Opening as usize]
        && age(entry, now) < CONFIRM_AFTER_UNITS;
    match (state, traffic) {
        (State::Opening | State::YoungStream, Traffic::End) if young => State::Ended,
        (State::Opening, _) if young => State::YoungStream,
        _ if young => state,
        (_, Traffic::End) => State::Closing,
        // A half-closed connection may still acknowledge for long.
        (State::Closing | State::Ended, _) => State::Closing,
        (_, Traffic::Datagram) => State::Datagrams,
        (_, Traffic::Syn | Traffic::Stream) => State::Stream,
    }
}

/// Zeroed buckets for the rest of the process's life, and whether they are on huge pages.
#[cfg(not(loom))]
fn allocate(count: usize) -> Result<(&'static [Bucket], bool), AllocationError> {
    let bytes = count * LINE;
    let huge = |len| MmapOptions::new().len(len).huge(Some(21)).populate().map_anon();
    let (mut map, huge_pages) = match huge(bytes.next_multiple_of(1 << 21)) {
        Ok(map) => (map, true),
        Err(_) => {
            let map =
                MmapMut::map_anon(bytes).map_err(|source| AllocationError { bytes, source })?;
            let _ = map.advise(Advice::HugePage); // worth 3 to 8 ns a packet; fine without
            (map, false)
        }
    };
    // Touched now, lest the first packet of each page wait for it.
    map[..bytes].fill(0);
    let memory: &'static mut [u8] = &mut Box::leak(Box::new(map))[..bytes];
    let buckets =
        <[Bucket]>::mut_from_bytes(memory).expect("pages are aligned and buckets are bytes");
    Ok((buckets, huge_pages))
}

#[cfg(loom)]
fn allocate(count: usize) -> Result<(&'static [Bucket], bool), AllocationError> {
    let buckets = (0..count).map(|_| Bucket(std::array::from_fn(|_| AtomicU64::new(0))));
    Ok((Vec::leak(buckets.collect()), false))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const SERVES: fn(Slot) -> Verdict = |_| Verdict::Serves;

    fn table(capacity: usize) -> Connections {
        Connections::new(capacity, &Timeouts::default()).unwrap()
    }

    fn found(connections: &Connections, hash: u64, now: Tick) -> Option<Slot> {
        match connections.find(hash, now, SERVES) {
            Found::Live(slot, _) => Some(slot),
            _ => None,
        }
    }

    fn touch(connections: &mut Connections, hash: u64, traffic: Traffic, now: Tick) {
        let Found::Live(_, place) = connections.find(hash, now, SERVES) else { panic!("found") };
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
    fn the_slot_of_a_removed_backend_is_an_orphan_and_a_strangers_counts_for_nothing() {
        let mut connections = table(1024);
        connections.remember(hash(3, 77), 42, Traffic::Syn, Tick(0));
        let look = |verdict| connections.find(hash(3, 77), Tick(1), move |_| verdict);
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
