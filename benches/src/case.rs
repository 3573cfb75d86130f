//! What is benchmarked: the mixes of packets that a whole turn is timed with.

use crate::{
    packet::{Family, LARGE, SMALL},
    snapshot::Underlay,
};

/// Which flows the packets belong to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flows {
    /// This many established connections, each packet of a random one.
    Established(u64),
    /// Every packet is the SYN of another connection, at a rate that the table has room for.
    New,
    /// The same as fast as they can be taken: the table is full of unconfirmed ones, and each new one
    /// takes the place of another.
    Flood,
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
    /// What they are wrapped in.
    pub underlay: Underlay,
    /// Their length from the first Ethernet byte, without FCS.
    pub frame_bytes: usize,
    /// How many come at once.
    pub burst: usize,
}

/// One million, for tables.
pub const M: u64 = 1 << 20;

impl Case {
    /// Small IPv4 packets in full bursts.
    const fn new(name: &'static str, flows: Flows) -> Self {
        let (family, underlay) = (Family::V4, Underlay::V4);
        Self { name, flows, family, underlay, frame_bytes: SMALL, burst: 64 }
    }

    /// All of them.
    pub fn all() -> Vec<Self> {
        use Flows::{Established, Flood, New};
        vec![
            Self::new("turn/established/1", Established(1)),
            Self::new("turn/established/64Ki", Established(64 << 10)),
            Self::new("turn/established/1M", Established(M)),
            Self { burst: 1, ..Self::new("turn/burst-of-1/1M", Established(M)) },
            Self { frame_bytes: LARGE, ..Self::new("turn/1500-byte/1M", Established(M)) },
            Self {
                family: Family::V6,
                underlay: Underlay::V6,
                ..Self::new("turn/ipv6-in-ipv6/1M", Established(M))
            },
            Self::new("turn/new/room", New),
            Self::new("turn/new/flood", Flood),
        ]
    }

    /// Connections that exist before anything is timed.
    pub fn established(&self) -> u64 {
        match self.flows {
            Flows::Established(flows) => flows,
            Flows::New | Flows::Flood => 0,
        }
    }

    /// Entries of the connection table: half full in the end.
    pub fn capacity(&self) -> usize {
        match self.flows {
            Flows::Established(flows) => 2 * flows as usize,
            Flows::New | Flows::Flood => 2 * M as usize,
        }
    }
}
