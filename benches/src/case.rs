//! What is benchmarked: the mixes of packets that a whole turn is timed with, and what is to be reached.

use dataplane::nat::Side;

use crate::{
    packet::{Family, LARGE, SMALL, Transport},
    snapshot::Underlay,
};

/// Which flows the packets belong to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flows {
    /// This many established connections, each packet of a random one.
    Established(u64),
    /// The same of connections that began a moment ago, as all packets of a short one are: not confirmed yet,
    /// they take the long way through the table.
    Young(u64),
    /// Every packet is the SYN of another connection, at a rate that the table has room for.
    New,
    /// The same as fast as they can be taken: the table is full of unconfirmed ones, and each new one
    /// takes the place of another.
    Flood,
    /// The same under a limit on new flows, as the daemon has by default: hardly any is remembered.
    Refused,
}

/// The most that a packet may cost.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Goal {
    /// So many nanoseconds.
    Ns(f64),
    /// So many times what another case costs in the same run.
    Times(f64, &'static str),
}

/// One mix.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it is called: `turn/family/size`.
    pub name: &'static str,
    /// Whose packets.
    pub flows: Flows,
    /// Their IP's version.
    pub family: Family,
    /// What it carries.
    pub transport: Transport,
    /// What they are wrapped in.
    pub underlay: Underlay,
    /// Their length from the first Ethernet byte, without FCS.
    pub frame_bytes: usize,
    /// What is to be reached in full bursts.
    pub goal: Option<Goal>,
    /// Entries of the connection table.
    pub capacity: usize,
    /// Whether packets are translated, and which way they go.
    pub nat: Option<Side>,
}

/// One million, for tables.
pub const M: u64 = 1 << 20;

/// How many packets come at once: what a worker takes at most, and what it gets when there is little
/// traffic.
pub const BURSTS: [usize; 2] = [64, 1];

impl Case {
    /// Small IPv4 packets of TCP.
    fn new(name: &'static str, flows: Flows, goal: Option<Goal>) -> Self {
        let (family, underlay) = (Family::V4, Underlay::V4);
        let (transport, capacity) = match flows {
            // As small as a table of a power of two of entries can be and be three quarters full at most:
            // a million fill half of theirs, ten million 60 %.
            Flows::Established(flows) | Flows::Young(flows) => {
                (Transport::Tcp, (flows.div_ceil(3) * 4).next_power_of_two())
            }
            Flows::New | Flows::Flood | Flows::Refused => (Transport::TcpSyn, 2 * M),
        };
        let capacity = capacity as usize;
        let (frame_bytes, nat) = (SMALL, None);
        Self { name, flows, family, transport, underlay, frame_bytes, goal, capacity, nat }
    }

    /// All of them.
    pub fn all() -> Vec<Self> {
        use Flows::{Established, Flood, New, Refused, Young};
        let ns = |most| Some(Goal::Ns(most));
        let small = Self::new("turn/established/1M", Established(M), ns(30.0));
        let large = Some(Goal::Times(1.2, small.name));
        // As many as sixteen mesh addresses have ports for.
        let translated = |name, side| {
            let goal = Some(Goal::Times(1.5, "turn/established/1M"));
            Self { nat: Some(side), ..Self::new(name, Established(1_000_000), goal) }
        };
        vec![
            Self::new("turn/established/1", Established(1), ns(15.0)),
            Self::new("turn/established/64Ki", Established(64 << 10), None),
            small,
            Self { frame_bytes: LARGE, ..Self::new("turn/1500-byte/1M", Established(M), large) },
            Self::new("turn/established/10M", Established(10_000_000), ns(45.0)),
            Self {
                family: Family::V6,
                underlay: Underlay::V6,
                ..Self::new("turn/ipv6-in-ipv6/1M", Established(M), ns(40.0))
            },
            // The service's second VIP, too: TCP has the first.
            Self { transport: Transport::Udp, ..Self::new("turn/udp/1M", Established(M), None) },
            translated("turn/nat/to-task/1M", Side::Client),
            translated("turn/nat/to-client/1M", Side::Task),
            Self::new("turn/young/1M", Young(M), None),
            Self::new("turn/new/room", New, ns(80.0)),
            Self::new("turn/new/flood", Flood, None),
            Self::new("turn/new/refused", Refused, None),
        ]
    }

    /// The case of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|case| case.name == name)
    }

    /// The same with a smaller table, where it does not matter that all is in the cache.
    #[must_use]
    pub fn shrunk(mut self) -> Self {
        const MOST: u64 = 64 << 10;
        if let Flows::Established(flows) | Flows::Young(flows) = &mut self.flows {
            *flows = MOST.min(*flows);
        }
        self.capacity = self.capacity.min(2 * MOST as usize);
        self
    }

    /// Connections that exist before anything is timed.
    pub fn established(&self) -> u64 {
        match self.flows {
            Flows::Established(flows) | Flows::Young(flows) => flows,
            Flows::New | Flows::Flood | Flows::Refused => 0,
        }
    }
}
