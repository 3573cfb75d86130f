//! How many connections a change of the backends breaks: "broken connections" is our quality figure, next
//! to speed. With a table full to some degree, with none, and with one of connections at risk only.

use dataplane::forwarding::Slot;

use crate::{
    node::{Node, Sent, Stateless},
    snapshot::{BACKENDS, Backends},
};

/// What becomes of the backends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// There is one more.
    Added,
    /// One takes no new connections any more.
    Drained,
    /// One is gone, and its connections have to go elsewhere.
    Removed,
}

impl Change {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Added, Self::Drained, Self::Removed];

    fn of(self, backends: &Backends) -> Backends {
        match self {
            Self::Added => backends.clone().and(BACKENDS),
            Self::Drained => backends.clone().drained(0),
            Self::Removed => backends.clone().without(0),
        }
    }
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Connections that were established.
    pub connections: u64,
    /// Those whose backend is gone.
    pub unavoidable: u64,
    /// Those that went to another without need.
    pub broken: u64,
    /// The same, if nothing were remembered.
    pub broken_by_maglev: u64,
}

/// Establishes as many connections as are `percent` of the table's entries, changes the backends, and
/// sends a packet of each.
pub fn run(change: Change, capacity: usize, percent: u64) -> Outcome {
    let backends = Backends::new(BACKENDS);
    let changed = change.of(&backends);
    // The default's proportion to the table.
    let admissions_per_s = (capacity / 20) as u32;
    let mut node = Node::new(&backends, capacity, admissions_per_s);
    let connections = capacity as u64 * percent / 100;
    let slots = node.establish(connections, u64::from(admissions_per_s) * 4 / 5);
    node.idle(20_000); // more than a round of the sweep
    node.publish(&changed);

    let mut stateless = Stateless::new(&changed);
    let mut outcome = Outcome { connections, unavoidable: 0, broken: 0, broken_by_maglev: 0 };
    let packets: Vec<_> = (0..connections).map(Sent::Ack).collect();
    node.forward(&packets, |sent, slot| {
        let (Sent::Syn(flow) | Sent::Ack(flow)) = sent;
        let was = Slot::from(slots[flow as usize]);
        if !changed.existing.contains(&was) {
            outcome.unavoidable += 1;
            return;
        }
        outcome.broken += u64::from(slot != was);
        outcome.broken_by_maglev += u64::from(stateless.slot_of(flow) != was);
    });
    outcome
}

/// Tracking only connections at risk (JET, CoNEXT 2021): those that would go elsewhere if all backends of
/// the horizon, which may be added, were there.
#[derive(Clone, Copy, Debug)]
pub struct AtRisk {
    /// Connections.
    pub connections: u64,
    /// Those that would be remembered.
    pub remembered: u64,
    /// Of the others, those that move when a single backend of the horizon is added.
    pub broken_by_adding: u64,
    /// Of the others, those that move when a backend is removed that was not theirs.
    pub broken_by_removing: u64,
}

/// Counts, for a horizon of so many backends.
pub fn at_risk(connections: u64, horizon: u32) -> AtRisk {
    let backends = Backends::new(BACKENDS);
    let mut now = Stateless::new(&backends);
    let mut all = Stateless::new(&Backends::new(BACKENDS + horizon));
    let mut added = Stateless::new(&backends.clone().and(BACKENDS));
    let mut removed = Stateless::new(&backends.without(0));
    let mut found =
        AtRisk { connections, remembered: 0, broken_by_adding: 0, broken_by_removing: 0 };
    for flow in 0..connections {
        let slot = now.slot_of(flow);
        if all.slot_of(flow) != slot {
            found.remembered += 1;
            continue;
        }
        found.broken_by_adding += u64::from(added.slot_of(flow) != slot);
        found.broken_by_removing += u64::from(slot != 0 && removed.slot_of(flow) != slot);
    }
    found
}
