//! Where a new flow goes, in services that want another answer than Maglev's: in turns, to who has the fewest
//! connections, or to where its client's others went.
//!
//! Only flows that begin are scheduled, and only if they are remembered: what no table knows is Maglev's, alike
//! on every worker and node (I5). What a scheduler goes by is its worker's own; workers share nothing but, for
//! reading, their tables.

use std::{cmp::Reverse, collections::BinaryHeap, sync::Arc};

use crate::{
    connections::{Connections, Reader, Traffic},
    flow::{FlowKey, HashKey},
    forwarding::{Service, Slot},
    maglev::reduce,
    nat::Slots,
    time::Tick,
};

/// The longest cycle of turns, unless there are more backends: larger weights are rounded to fit.
pub const MAX_CYCLE: u32 = 1 << 14;

/// Of more backends than this, the fewest connections are sought among two: to ask all would take too long.
pub const MOST_COMPARED: usize = 32;

/// A backend that takes new connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taker {
    /// Where it is.
    pub slot: Slot,
    /// Its share, at least 1.
    pub weight: u16,
}

/// How a service's new flows are placed.
#[derive(Clone, Debug, Default)]
pub enum Schedule {
    /// By Maglev alone.
    #[default]
    Maglev,
    /// In turns.
    RoundRobin(Arc<Cycle>),
    /// To the backend with the fewest open connections for its weight.
    LeastConnections(Arc<[Taker]>),
    /// By the client's address.
    Source(Arc<Affinity>),
}

/// Turns in their order, every backend as often as its weight says.
#[derive(PartialEq, Eq, Debug)]
pub struct Cycle {
    /// Stands for the service where a worker keeps its position: the first of its slots.
    anchor: Slot,
    order: Box<[Slot]>,
}

/// What binds a client to a backend beyond Maglev's answer.
#[derive(PartialEq, Eq, Debug)]
pub struct Affinity {
    /// For so long after a client's latest new flow its next one goes to the same backend; 0 for never.
    timeout_s: u32,
    /// Who takes new flows: no other backend keeps its clients.
    takers: Box<[Slot]>,
}

impl Cycle {
    /// Who has each turn.
    pub fn order(&self) -> &[Slot] {
        &self.order
    }
}

impl Schedule {
    /// Turns among these backends. Within a cycle of so many flows as the weights sum up to, without their
    /// common divisor, each gets exactly its weight, and is never a whole flow away from its share.
    pub fn round_robin(takers: &[Taker]) -> Self {
        match takers.iter().map(|taker| taker.slot).min() {
            Some(anchor) => Self::RoundRobin(Arc::new(Cycle { anchor, order: turns(takers) })),
            None => Self::Maglev,
        }
    }

    /// The fewest connections among these backends.
    pub fn least_connections(takers: &[Taker]) -> Self {
        let mut takers = takers.to_vec();
        takers.sort_unstable_by_key(|taker| taker.slot);
        Self::LeastConnections(takers.into())
    }

    /// A client's address decides; for `timeout_s` after its latest new flow it keeps its backend even if
    /// Maglev's answer changes. 0 for no such memory.
    pub fn source(takers: &[Taker], timeout_s: u32) -> Self {
        let mut takers: Vec<_> = takers.iter().map(|taker| taker.slot).collect();
        takers.sort_unstable();
        Self::Source(Arc::new(Affinity { timeout_s, takers: takers.into() }))
    }

    /// Whether Maglev's answer is the only one.
    #[inline]
    pub fn is_plain(&self) -> bool {
        matches!(self, Self::Maglev)
    }

    /// How long a client keeps its backend, if it does.
    pub fn affinity_timeout_s(&self) -> Option<u32> {
        match self {
            Self::Source(affinity) if affinity.timeout_s > 0 => Some(affinity.timeout_s),
            _ => None,
        }
    }

    /// What Maglev is asked with: a hash of the flow, or of its client.
    #[inline]
    pub fn maglev_hash(&self, flow: &FlowKey, key: &HashKey) -> u64 {
        match self {
            Self::Source(_) => hash_of_addresses(flow, key),
            _ => flow.hash(key),
        }
    }
}

/// Apart, so that others' flows are not copied.
#[inline(never)]
fn hash_of_addresses(flow: &FlowKey, key: &HashKey) -> u64 {
    FlowKey { src_port: 0, dst_port: 0, protocol: 0, ..*flow }.hash(key)
}

/// What a client's affinity is remembered by: its address and the service, which may share its own address
/// with others. No flow's key is the same.
pub fn client(service: &Service, flow: &FlowKey) -> FlowKey {
    let (src_port, dst_port) =
        service.vips.first().map_or((0, 0), |vip| (vip.protocol.into(), vip.port));
    FlowKey { src_port, dst_port, protocol: 0, ..*flow }
}

/// What one worker goes by besides its table.
#[derive(Debug)]
pub struct Scheduler {
    /// Whose turn it is, by the cycle's anchor. A slot is one service's only, and a snapshot that leaves a
    /// service alone leaves its slots alone.
    positions: Box<[u32]>,
    /// The tables of the other workers.
    peers: Box<[Reader]>,
    hash_key: HashKey,
}

/// What a choice is made from.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// The flow's service.
    pub service: &'a Service,
    /// The flow.
    pub key: &'a FlowKey,
    /// Its hash by Maglev's key.
    pub maglev_hash: u64,
    /// Now.
    pub now: Tick,
    /// Where its connections are if they are translated; they are in no connection table then.
    pub slots: Option<&'a Slots>,
}

impl Scheduler {
    /// For so many slots. `worker` is the worker's number: the cycles of workers begin one turn apart, lest
    /// the first flow of each go to one backend. `hash_key` is that of all tables.
    pub fn new(slots: usize, worker: usize, peers: Vec<Reader>, hash_key: HashKey) -> Self {
        Self { positions: vec![worker as u32; slots].into(), peers: peers.into(), hash_key }
    }

    /// The tables of the other workers.
    pub fn peers(&self) -> &[Reader] {
        &self.peers
    }

    /// The backend that a flow should begin with; `None` if Maglev knows best.
    pub fn choose(&self, sight: Sight<'_>, connections: &Connections) -> Option<Slot> {
        match &sight.service.schedule {
            Schedule::Maglev => None,
            Schedule::RoundRobin(cycle) => {
                let position = *self.positions.get(cycle.anchor as usize)?;
                Some(cycle.order[position as usize % cycle.order.len()])
            }
            Schedule::LeastConnections(takers) => fewest(takers, sight, connections),
            Schedule::Source(affinity) => self.affine(affinity, sight, connections),
        }
    }

    /// Notes that a flow was remembered with the backend chosen for it.
    pub fn placed(
        &mut self,
        sight: Sight<'_>,
        (slot, traffic): (Slot, Traffic),
        connections: &mut Connections,
    ) {
        match &sight.service.schedule {
            Schedule::RoundRobin(cycle) => {
                if let Some(position) = self.positions.get_mut(cycle.anchor as usize) {
                    *position = (*position + 1) % cycle.order.len() as u32;
                }
            }
            Schedule::Source(affinity) if affinity.timeout_s > 0 => {
                let hash = client(sight.service, sight.key).hash(&self.hash_key);
                connections.remember_affinity(hash, slot, traffic, sight.now);
            }
            _ => {}
        }
    }

    /// The backend that the client's last flow went to, whichever worker it came to.
    fn affine(
        &self,
        Affinity { timeout_s, takers }: &Affinity,
        Sight { service, key, now, .. }: Sight<'_>,
        connections: &Connections,
    ) -> Option<Slot> {
        if *timeout_s == 0 {
            return None;
        }
        let hash = client(service, key).hash(&self.hash_key);
        let known = |table: &Reader| {
            let slot = table.affine(hash, now, *timeout_s)?;
            takers.binary_search(&slot).is_ok().then_some(slot)
        };
        known(&connections.reader()).or_else(|| self.peers.iter().find_map(known))
    }
}

/// The taker with the fewest open connections for its weight, the new one counted in.
fn fewest(takers: &[Taker], sight: Sight<'_>, connections: &Connections) -> Option<Slot> {
    let open = |slot| match sight.slots {
        Some(slots) => slots.open_of(slot),
        None => connections.open(slot),
    };
    let load = |taker: &Taker| u64::from(open(taker.slot)) + 1;
    let lesser = |one: Taker, other: Taker| {
        let less = load(&other) * u64::from(one.weight) < load(&one) * u64::from(other.weight);
        if less { other } else { one }
    };
    let hash = sight.maglev_hash;
    if takers.len() <= MOST_COMPARED {
        // From anywhere, or the first would get whatever ends before the next begins.
        let (before, from) = takers.split_at(reduce(hash, takers.len() as u32) as usize);
        return from.iter().chain(before).copied().reduce(lesser).map(|taker| taker.slot);
    }
    // Mitzenmacher, "The Power of Two Choices", 2001. Drawn by weight, as Maglev does.
    let drawn = [hash, hash.rotate_left(32)].into_iter().filter_map(|hash| {
        let slot = sight.service.maglev.pick(hash)?;
        let at = takers.binary_search_by_key(&slot, |taker| taker.slot).ok()?;
        Some(takers[at])
    });
    drawn.reduce(lesser).map(|taker| taker.slot)
}

/// Puts turns in order by Tijdeman's rule, "The chairman assignment problem", 1980: of those whose share of the
/// turns so far is not yet met, the one that would be too late first. Nobody is ever a whole turn away from it.
fn turns(takers: &[Taker]) -> Box<[Slot]> {
    let [_, _, ..] = takers else { return takers.iter().map(|taker| taker.slot).collect() };
    let weights = reduced(takers);
    let total: u64 = weights.iter().sum();
    let parts = 2 * takers.len() as u64 - 2;
    // In turns counted from 1: the first that a backend's turn after `had` others may be, and the last.
    let release = |of: usize, had: u64| ((parts * had + 1) * total).div_ceil(parts * weights[of]);
    let deadline = |of: usize, had: u64| (parts * (had + 1) - 1) * total / (parts * weights[of]);

    let mut waiting: BinaryHeap<_> =
        (0..takers.len()).map(|of| Reverse((release(of, 0), of, 0))).collect();
    let mut ready = BinaryHeap::new();
    let turn = |turn: u64| {
        while let Some(&Reverse((from, of, had))) = waiting.peek()
            && from <= turn
        {
            waiting.pop();
            ready.push(Reverse((deadline(of, had), of, had)));
        }
        let Reverse((_, of, had)) = ready.pop().expect("the shares of all sum up to every turn");
        waiting.push(Reverse((release(of, had + 1), of, had + 1)));
        takers[of].slot
    };
    (1..=total).map(turn).collect()
}

/// The weights without their common divisor, made smaller if they sum up to too long a cycle.
fn reduced(takers: &[Taker]) -> Vec<u64> {
    let gcd = |weights: &[u64]| {
        weights.iter().fold(0, |a, &b| {
            let (mut a, mut b) = (a, b);
            while b > 0 {
                (a, b) = (b, a % b);
            }
            a
        })
    };
    let divided = |weights: Vec<u64>| -> Vec<u64> {
        let by = gcd(&weights);
        weights.into_iter().map(|weight| weight / by).collect()
    };
    let weights = divided(takers.iter().map(|taker| u64::from(taker.weight.max(1))).collect());
    let (total, most) = (weights.iter().sum::<u64>(), u64::from(MAX_CYCLE));
    if total <= most {
        return weights;
    }
    divided(weights.into_iter().map(|weight| (weight * most / total).max(1)).collect())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn takers(weights: &[u16]) -> Vec<Taker> {
        (0..).zip(weights).map(|(slot, &weight)| Taker { slot, weight }).collect()
    }

    /// Turns of these backends, numbered in their order.
    fn order(weights: &[u16]) -> Vec<Slot> {
        turns(&takers(weights)).into_vec()
    }

    #[test]
    fn heavy_backends_have_their_turns_between_the_others() {
        assert_eq!(order(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(order(&[3, 1]), [0, 0, 1, 0]);
        assert_eq!(order(&[2, 4]), [1, 0, 1]);
        assert_eq!(order(&[7]), [0]);
    }

    #[test]
    fn a_cycle_is_no_longer_than_its_limit_and_leaves_nobody_out() {
        let weights: Vec<u16> = (0..200).map(|i| 1000 - i % 7).chain([1]).collect();
        let order = order(&weights);
        assert!(order.len() <= MAX_CYCLE as usize + 1, "{}", order.len());
        assert!(order.contains(&200));
    }

    proptest! {
        #[test]
        fn a_cycle_has_exactly_the_weights_and_no_prefix_is_a_whole_turn_off(
            weights in prop::collection::vec(prop_oneof![1_u16..6, 1_u16..1000], 1..12),
        ) {
            let order = order(&weights);
            let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            let repeats = total / order.len() as u64;
            prop_assert_eq!(repeats * order.len() as u64, total);
            let mut had: BTreeMap<Slot, u64> = BTreeMap::new();
            for (turn, slot) in (1..).zip(&order) {
                *had.entry(*slot).or_default() += 1;
                for (slot, &weight) in (0..).zip(&weights) {
                    let had = had.get(&slot).copied().unwrap_or(0);
                    let share = turn * u64::from(weight);
                    prop_assert!((had * total).abs_diff(share) < total, "{slot} at {turn}");
                }
            }
            for (slot, &weight) in (0..).zip(&weights) {
                prop_assert_eq!(had[&slot] * repeats, u64::from(weight));
            }
        }
    }
}
