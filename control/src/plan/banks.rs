//! Which bank of NAT slots each mesh address has.

use std::{collections::BTreeMap, net::IpAddr};

use super::PlanError;

/// A mesh address: its overlay's VNI, and itself.
pub type Owner = (u32, IpAddr);

/// Banks and their owners, also those that are wanted no more but whose connections still live.
#[derive(Clone, Debug, Default)]
pub struct Banks(BTreeMap<Owner, u16>);

impl Banks {
    /// Its bank, if it has one.
    pub fn of(&self, owner: Owner) -> Option<u16> {
        self.0.get(&owner).copied()
    }

    /// All that are somebody's.
    pub fn iter(&self) -> impl Iterator<Item = (Owner, u16)> {
        self.0.iter().map(|(owner, bank)| (*owner, *bank))
    }

    /// The same with a bank for all that are wanted. Who has one keeps it; that of one who is wanted no more
    /// is given to others once it `is_empty`. And why the first one got none for whom none is free.
    pub fn given(
        &self,
        wanted: &[Owner],
        limit: usize,
        is_empty: impl Fn(u16) -> bool,
    ) -> (Self, Option<PlanError>) {
        let mut short = None;
        let mut banks = self.0.clone();
        banks.retain(|owner, bank| wanted.contains(owner) || !is_empty(*bank));
        for owner in wanted {
            if banks.contains_key(owner) {
                continue;
            }
            let is_free = |bank: &u16| !banks.values().any(|taken| taken == bank);
            let Some(bank) = (0..).take(limit).find(is_free) else {
                short.get_or_insert_with(|| PlanError::NoBank {
                    vni: owner.0,
                    address: owner.1,
                    resting: banks.keys().filter(|owner| !wanted.contains(owner)).count(),
                    limit,
                });
                continue;
            };
            banks.insert(*owner, bank);
        }
        (Self(banks), short)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(last: u8) -> Owner {
        (100, IpAddr::from([10, 99, 1, last]))
    }

    #[test]
    fn a_bank_is_given_to_another_address_only_when_its_last_connection_has_ended() {
        let [a, b, c] = [owner(1), owner(2), owner(3)];
        let (banks, short) = Banks::default().given(&[a, b], 2, |_| true);
        assert!(short.is_none());
        assert_eq!((banks.of(a), banks.of(b)), (Some(0), Some(1)));
        // In another order, and without the first, which still has connections.
        let (others, short) = banks.given(&[c, b], 2, |bank| bank != 0);
        let why = short.unwrap().to_string();
        assert!(why.contains("10.99.1.3") && why.contains("nat.addresses is 2"), "{why}");
        assert_eq!((others.of(b), others.of(c)), (Some(1), None));
        let (banks, _) = banks.given(&[b], 2, |bank| bank != 0);
        assert_eq!(banks.of(a), Some(0), "it may come back");
        let (banks, _) = banks.given(&[c, b], 2, |_| true);
        assert_eq!((banks.of(a), banks.of(b), banks.of(c)), (None, Some(1), Some(0)));
    }
}
