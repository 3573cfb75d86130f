//! What XDP steers, as far as control knows: the difference to what is wanted, written key by key.

use std::collections::BTreeMap;

use dataplane::steer::Key;

use crate::plan::Steering;

/// All keys that some interface may steer, each with its flags; `None` if the kernel refused a change of it,
/// so that it may be there on one interface and not on another.
#[derive(Debug, Default)]
pub struct Steered(BTreeMap<Key, Option<u32>>);

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
        wanted: &Steering,
        mut remove: impl FnMut(Key) -> Result<(), E>,
    ) -> Result<bool, E> {
        let gone: Vec<Key> =
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
        wanted: &Steering,
        mut add: impl FnMut(Key, u32) -> Result<(), E>,
    ) -> Result<(), E> {
        for (key, flags) in wanted {
            if self.0.get(key) == Some(&Some(*flags)) {
                continue;
            }
            self.0.insert(*key, None);
            add(*key, *flags)?;
            self.0.insert(*key, Some(*flags));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::BTreeSet, net::IpAddr};

    use super::*;

    fn key(port: u16) -> Key {
        Key::Port { address: IpAddr::from([203, 0, 113, 10]).into(), protocol: 6, port }
    }

    fn wanted(ports: &[u16]) -> Steering {
        ports.iter().map(|port| (key(*port), 0)).collect()
    }

    #[test]
    fn a_change_that_failed_half_way_is_undone_by_wanting_the_state_before() {
        // Two interfaces, of which the second has room for two keys.
        let maps = RefCell::new([BTreeSet::new(), BTreeSet::new()]);
        let add = |key: Key, _| {
            let [first, second] = &mut *maps.borrow_mut();
            first.insert(key);
            (second.len() < 2).then(|| second.insert(key)).map(|_| ()).ok_or("full")
        };
        let remove = |key: Key| {
            maps.borrow_mut().iter_mut().for_each(|map| {
                map.remove(&key);
            });
            Ok::<(), &str>(())
        };
        let mut steered = Steered::default();
        steered.more(&wanted(&[80, 443]), add).unwrap();

        steered.less(&wanted(&[80, 81, 82]), remove).unwrap();
        assert_eq!(steered.more(&wanted(&[80, 81, 82]), add), Err("full"));
        assert!(steered.less(&wanted(&[80, 443]), remove).unwrap());
        steered.more(&wanted(&[80, 443]), add).unwrap();
        let both = BTreeSet::from([80, 443].map(key));
        assert_eq!(*maps.borrow(), [both.clone(), both]);
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
