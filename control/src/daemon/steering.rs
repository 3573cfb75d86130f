//! What XDP steers, as far as control knows: the difference to what is wanted, written key by key.

use std::collections::BTreeMap;

use crate::plan::SteerKey;

/// All keys that some interface may steer, each with its "answer ARP" flag; `None` if the kernel refused
/// a change of it, so that it may be there on one interface and not on another.
#[derive(Debug, Default)]
pub struct Steered(BTreeMap<SteerKey, Option<bool>>);

impl Steered {
    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Gives up what is not `wanted`. Says whether there was anything.
    ///
    /// # Errors
    /// The first of `remove`'s.
    pub fn less<E>(
        &mut self,
        wanted: &BTreeMap<SteerKey, bool>,
        mut remove: impl FnMut(SteerKey) -> Result<(), E>,
    ) -> Result<bool, E> {
        let gone: Vec<SteerKey> =
            self.0.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        for key in &gone {
            self.0.insert(*key, None);
            remove(*key)?;
            self.0.remove(key);
        }
        Ok(!gone.is_empty())
    }

    /// Adds what is `wanted` and not known to be there.
    ///
    /// # Errors
    /// The first of `add`'s.
    pub fn more<E>(
        &mut self,
        wanted: &BTreeMap<SteerKey, bool>,
        mut add: impl FnMut(SteerKey, bool) -> Result<(), E>,
    ) -> Result<(), E> {
        for (key, answer_arp) in wanted {
            if self.0.get(key) == Some(&Some(*answer_arp)) {
                continue;
            }
            self.0.insert(*key, None);
            add(*key, *answer_arp)?;
            self.0.insert(*key, Some(*answer_arp));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::BTreeSet, net::IpAddr};

    use super::*;

    fn key(port: u16) -> SteerKey {
        (IpAddr::from([203, 0, 113, 10]).into(), 6, port)
    }

    fn wanted(ports: &[u16]) -> BTreeMap<SteerKey, bool> {
        ports.iter().map(|port| (key(*port), false)).collect()
    }

    #[test]
    fn a_change_that_failed_half_way_is_undone_by_wanting_the_state_before() {
        // Two interfaces, of which the second has room for two keys.
        let maps = RefCell::new([BTreeSet::new(), BTreeSet::new()]);
        let add = |key: SteerKey, _| {
            let [first, second] = &mut *maps.borrow_mut();
            first.insert(key.2);
            (second.len() < 2).then(|| second.insert(key.2)).map(|_| ()).ok_or("full")
        };
        let remove = |key: SteerKey| {
            maps.borrow_mut().iter_mut().for_each(|map| {
                map.remove(&key.2);
            });
            Ok::<(), &str>(())
        };
        let mut steered = Steered::default();
        steered.more(&wanted(&[80, 443]), add).unwrap();

        steered.less(&wanted(&[80, 81, 82]), remove).unwrap();
        assert_eq!(steered.more(&wanted(&[80, 81, 82]), add), Err("full"));
        assert!(steered.less(&wanted(&[80, 443]), remove).unwrap());
        steered.more(&wanted(&[80, 443]), add).unwrap();
        assert_eq!(*maps.borrow(), [BTreeSet::from([80, 443]), BTreeSet::from([80, 443])]);
        assert_eq!(steered.len(), 2);
    }

    #[test]
    fn what_is_steered_already_is_not_written_again() {
        let mut steered = Steered::default();
        steered.more(&wanted(&[80]), |_, _| Ok::<(), ()>(())).unwrap();
        steered.more(&wanted(&[80]), |_, _| Err("written again")).unwrap();
        assert!(!steered.less(&wanted(&[80]), |_| Err("removed")).unwrap());
    }
}
