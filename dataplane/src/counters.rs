//! What a worker counts: one block per worker, one writer each, summed by control.
//!
//! Every drop has a [`DropReason`]; its name, metric label and sentence are declared here, once.

use std::time::Duration;

use crossbeam::utils::CachePadded;

use crate::sync::{AtomicU64, Ordering};

macro_rules! labelled {
    ($(#[$doc:meta])* $name:ident { $($(#[doc = $sentence:literal])+ $variant:ident => $label:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum $name { $($(#[doc = $sentence])+ $variant,)+ }

        impl $name {
            /// All of them, in order of declaration.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name in metrics and JSON.
            pub fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }

            /// What it means, as a sentence.
            pub fn sentence(self) -> &'static str {
                match self { $(Self::$variant => concat!($($sentence,)+).trim_ascii(),)+ }
            }
        }
    };
}

labelled! {
    /// Why a packet was dropped.
    DropReason {
        /// The packet ends before its headers do, or before its IP header says it does.
        Truncated => "truncated",
        /// The frame carries neither IPv4 nor IPv6, or ARP that we do not answer.
        NotIp => "not_ip",
        /// The IP header contradicts itself (version, header length or total length), or has IPv4 addresses in IPv6.
        BadIpHeader => "bad_ip_header",
        /// The frame is addressed to another station: it was flooded, or the interface is promiscuous.
        NotForUs => "not_for_us",
        /// An IP fragment addressed to a VIP: fragments carry no ports and are not supported.
        Fragment => "fragment",
        /// The transport protocol is none of TCP, UDP and SCTP, or an ICMP message we do not serve or that is invalid.
        UnknownProtocol => "unknown_protocol",
        /// No service is configured for the destination address, protocol and port.
        NoService => "no_service",
        /// The service has no backend that takes new connections.
        NoBackend => "no_backend",
        /// The backend's next hop has no known MAC address, or there is no route to it.
        NextHopUnresolved => "next_hop_unresolved",
        /// The connection's backend is down or gone, and the service has such connections reset; the sender was told by a reset.
        BackendGone => "backend_gone",
        /// The client is not among those that the service allows.
        NotAllowed => "not_allowed",
        /// Every slot of the node's mesh addresses is in use: no new connection can be translated.
        NatExhausted => "nat_exhausted",
        /// TCP to a translated service that begins no connection and belongs to none that is known; the sender was told by a reset.
        NatNoConnection => "nat_no_connection",
        /// A packet out of a tunnel that belongs to no translated connection.
        NatUnmatched => "nat_unmatched",
        /// A packet out of a tunnel that does not come from its connection's backend.
        SpoofedTunnel => "spoofed_tunnel",
        /// The packet does not fit the backend's link; the sender was told the usable MTU by ICMP.
        TooBig => "too_big",
        /// The packet does not fit the backend's link, and an ICMP answer was not allowed or over its rate limit.
        TooBigSilent => "too_big_silent",
        /// An ICMP error that quotes no flow of a service here.
        IcmpUnmatched => "icmp_unmatched",
        /// The frame had no room for the outer header in front, or for a longer answer.
        NoHeadroom => "no_headroom",
        /// All frames were in use.
        NoFrame => "no_frame",
        /// The tx ring had no room for the frame: packets arrive faster than the egress interface sends.
        TxRingFull => "tx_ring_full",
    }
}

labelled! {
    /// What else a worker counts.
    Event {
        /// Packets received.
        RxPackets => "rx_packets",
        /// Bytes received, Ethernet header included.
        RxBytes => "rx_bytes",
        /// Packets handed to a tx ring.
        TxPackets => "tx_packets",
        /// Bytes handed to a tx ring, Ethernet header included.
        TxBytes => "tx_bytes",
        /// Packets whose connection was remembered.
        ConnectionHits => "connection_hits",
        /// Packets whose backend Maglev chose.
        ConnectionMisses => "connection_misses",
        /// Connections remembered.
        ConnectionInserts => "connection_inserts",
        /// Connections forgotten early, to remember another.
        ConnectionEvictions => "connection_evictions",
        /// Connections not remembered, because the bucket was full of more valuable ones.
        ConnectionTableFull => "connection_table_full",
        /// Packets of new connections that were not remembered, because more came than connections.admissions_per_s.
        ConnectionNotAdmitted => "connection_not_admitted",
        /// Remembered connections given another backend, because theirs was removed.
        ConnectionReselects => "connection_reselects",
        /// Inner transport checksums completed: the sender had left them to its network card.
        ChecksumsCompleted => "checksums_completed",
        /// Packets cut into inner fragments, because they were too big and allowed it.
        Fragmented => "fragmented",
        /// ICMP errors about a VIP's flow forwarded to the backend that owns it.
        IcmpErrorsForwarded => "icmp_errors_forwarded",
        /// ICMP "fragmentation needed" or "packet too big" sent.
        TooBigSent => "too_big_sent",
        /// Packets of backends translated and sent to clients.
        NatReplies => "nat_replies",
        /// TCP resets sent, for connections that are not known or whose backend is gone.
        ResetsSent => "resets_sent",
        /// Clients asked to speak, so that they can be told that their backend is gone.
        ClientsAsked => "clients_asked",
        /// Pings answered.
        EchoReplies => "echo_replies",
        /// ARP requests and neighbour solicitations answered.
        NeighbourReplies => "neighbour_replies",
    }
}

/// In how many classes turns with packets are counted by their time: class i is for those of less than 2^i
/// microseconds, the last for all longer ones.
pub const TURN_TIMES: usize = 20;

/// What one backend got from one worker.
#[derive(Debug, Default)]
struct Forwarded {
    packets: AtomicU64,
    bytes: AtomicU64,
}

/// One worker's counters. Written by the worker alone, read by anyone at any time.
#[derive(Debug)]
pub struct Counters {
    drops: CachePadded<[AtomicU64; DropReason::ALL.len()]>,
    events: CachePadded<[AtomicU64; Event::ALL.len()]>,
    turns: CachePadded<AtomicU64>,
    turn_times: CachePadded<[AtomicU64; TURN_TIMES]>,
    turn_ns: AtomicU64,
    backends: Box<[Forwarded]>,
}

/// Adds without a bus lock: only the owner writes.
#[inline]
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

impl Counters {
    /// Counters for backends in slots below `backends`.
    pub fn new(backends: usize) -> Self {
        Self {
            drops: CachePadded::new(std::array::from_fn(|_| AtomicU64::new(0))),
            events: CachePadded::new(std::array::from_fn(|_| AtomicU64::new(0))),
            turns: CachePadded::new(AtomicU64::new(0)),
            turn_times: CachePadded::new(std::array::from_fn(|_| AtomicU64::new(0))),
            turn_ns: AtomicU64::new(0),
            backends: (0..backends).map(|_| Forwarded::default()).collect(),
        }
    }

    /// Slots of backends that are counted.
    pub fn backends(&self) -> usize {
        self.backends.len()
    }

    /// Counts a drop. For the owning worker only.
    #[inline]
    pub fn dropped(&self, reason: DropReason) {
        add(&self.drops[reason as usize], 1);
    }

    /// Counts events. For the owning worker only.
    #[inline]
    pub fn count(&self, event: Event, amount: u64) {
        add(&self.events[event as usize], amount);
    }

    /// Counts a packet to the backend in this slot. For the owning worker only.
    #[inline]
    pub fn forwarded(&self, slot: usize, bytes: usize) {
        // A slot beyond the array is control's mistake; it must not take the worker down.
        if let Some(backend) = self.backends.get(slot) {
            add(&backend.packets, 1);
            add(&backend.bytes, bytes as u64);
        }
    }

    /// Marks one more turn. For the owning worker only.
    #[inline]
    pub fn turned(&self) {
        add(&self.turns, 1);
    }

    /// Notes how long a turn took that had packets. For the owning worker only.
    #[inline]
    pub fn took(&self, time: Duration) {
        let ns = time.as_nanos() as u64;
        let class = (u64::BITS - (ns / 1000).leading_zeros()) as usize;
        add(&self.turn_times[class.min(TURN_TIMES - 1)], 1);
        add(&self.turn_ns, ns);
    }

    /// Turns that had packets, by [`TURN_TIMES`], and the time of all in nanoseconds.
    pub fn turn_times(&self) -> ([u64; TURN_TIMES], u64) {
        let count = |class: usize| self.turn_times[class].load(Ordering::Relaxed);
        (std::array::from_fn(count), self.turn_ns.load(Ordering::Relaxed))
    }

    /// Drops for this reason.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize].load(Ordering::Relaxed)
    }

    /// Events of this kind.
    pub fn events(&self, event: Event) -> u64 {
        self.events[event as usize].load(Ordering::Relaxed)
    }

    /// Turns so far: a worker whose number stands still is hung.
    pub fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// Packets and bytes encapsulated toward the backend in this slot, outer headers included.
    pub fn backend(&self, slot: usize) -> (u64, u64) {
        self.backends.get(slot).map_or((0, 0), |backend| {
            (backend.packets.load(Ordering::Relaxed), backend.bytes.load(Ordering::Relaxed))
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_sentence_and_a_label_of_its_own() {
        let labels: std::collections::HashSet<_> =
            DropReason::ALL.iter().map(|r| r.label()).collect();
        assert_eq!(labels.len(), DropReason::ALL.len());
        for reason in DropReason::ALL {
            assert!(reason.sentence().ends_with('.'), "{}", reason.sentence());
        }
    }

    #[test]
    fn a_turns_time_is_counted_below_the_next_power_of_two_of_microseconds() {
        let counters = Counters::new(0);
        for ns in [999, 1_000, 1_999, 2_000, 3_999, 1 << 50] {
            counters.took(Duration::from_nanos(ns));
        }
        let (classes, ns) = counters.turn_times();
        assert_eq!(classes[..4], [1, 2, 2, 0]);
        assert_eq!((classes[TURN_TIMES - 1], classes.iter().sum()), (1, 6));
        assert_eq!(ns, 9_997 + (1 << 50));
    }

    #[test]
    fn counters_of_different_kinds_do_not_mix() {
        let counters = Counters::new(2);
        counters.dropped(DropReason::Fragment);
        counters.count(Event::RxBytes, 60);
        counters.forwarded(1, 110);
        counters.forwarded(2, 110); // no such slot: ignored
        assert_eq!(counters.drops(DropReason::Fragment), 1);
        assert_eq!(counters.drops(DropReason::Truncated), 0);
        assert_eq!(counters.events(Event::RxBytes), 60);
        assert_eq!(counters.backend(1), (1, 110));
        assert_eq!(counters.backend(0), (0, 0));
    }
}
