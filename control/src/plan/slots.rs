//! Which slots are free, and which must rest. Who has one, the planner knows.

use std::collections::HashMap;

use dataplane::{forwarding::Slot, time::Tick};

/// A backend's identity: names of its service and itself.
type Identity = (String, String);

/// Slots, and how to take back what was done to them for a plan that can't be.
#[derive(Debug, Default)]
pub struct Slots {
    limit: usize,
    rest_ms: u64,
    used: usize,
    /// Given up, and since when. Its backend gets it back if it returns; nobody else does for `rest_ms`.
    resting: HashMap<Identity, (Slot, Tick)>,
    /// The lowest last.
    free: Vec<Slot>,
    next: Slot,
    undo: Vec<Undo>,
}

/// What is done to take something back.
#[derive(Debug)]
enum Undo {
    GiveUp(Identity),
    TakeBack(Identity, Slot, Tick),
    TakeFree(Slot),
    TakeNext,
}

/// How many slots there are, when none is free.
#[derive(Debug)]
pub struct Full {
    /// Slots of present backends.
    pub used: usize,
    /// Slots of removed ones.
    pub resting: usize,
    /// The limit.
    pub limit: usize,
}

impl Slots {
    /// None is used yet.
    pub fn new(limit: usize, rest_ms: u64) -> Self {
        Self { limit, rest_ms, ..Self::default() }
    }

    /// Above all that were ever taken.
    pub fn end(&self) -> usize {
        self.next as usize
    }

    /// Frees those that have rested.
    pub fn free_rested(&mut self, now: Tick) {
        let (free, before) = (&mut self.free, self.resting.len());
        self.resting.retain(|_, (slot, since)| {
            let rested = now.ms_since(*since) >= self.rest_ms;
            if rested {
                free.push(*slot);
            }
            !rested
        });
        if self.resting.len() != before {
            // The map's order is another one in every process; the lowest is taken first in all.
            free.sort_unstable_by(|a, b| b.cmp(a));
        }
    }

    /// Lets the slot of a backend that is wanted no more rest.
    pub fn give_up(&mut self, identity: Identity, slot: Slot, now: Tick) {
        self.used -= 1;
        self.undo.push(Undo::GiveUp(identity.clone()));
        self.resting.insert(identity, (slot, now));
    }

    /// A slot for a backend that has none.
    ///
    /// # Errors
    /// If none is free.
    pub fn take(&mut self, identity: Identity) -> Result<Slot, Full> {
        let (slot, undo) = if let Some((slot, since)) = self.resting.remove(&identity) {
            (slot, Undo::TakeBack(identity, slot, since))
        } else if let Some(slot) = self.free.pop() {
            (slot, Undo::TakeFree(slot))
        } else if self.end() < self.limit {
            self.next += 1;
            (self.next - 1, Undo::TakeNext)
        } else {
            let Self { used, limit, .. } = *self;
            return Err(Full { used, resting: self.resting.len(), limit });
        };
        self.used += 1;
        self.undo.push(undo);
        Ok(slot)
    }

    /// What was done is for good.
    pub fn keep(&mut self) {
        self.undo.clear();
    }

    /// Takes back what was done since the last [`keep`](Self::keep), last things first.
    pub fn undo(&mut self) {
        while let Some(undo) = self.undo.pop() {
            match undo {
                Undo::GiveUp(identity) => {
                    self.resting.remove(&identity);
                    self.used += 1;
                    continue;
                }
                Undo::TakeBack(identity, slot, since) => {
                    self.resting.insert(identity, (slot, since));
                }
                Undo::TakeFree(slot) => self.free.push(slot),
                Undo::TakeNext => self.next -= 1,
            }
            self.used -= 1;
        }
    }
}
