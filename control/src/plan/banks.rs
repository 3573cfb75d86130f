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

    /// The same with a bank for all that are wanted. Who has one keeps it; that of one who is wanted no more
    /// is given to others once it `is_empty`.
    ///
    /// # Errors
    /// If none is free.
    pub fn given(
        &self,
        wanted: &[Owner],
        limit: usize,
        is_empty: impl Fn(u16) -> bool,
    ) -> Result<Self, PlanError> {
        let mut banks = self.0.clone();
        banks.retain(|owner, bank| wanted.contains(owner) || !is_empty(*bank));
        for owner in wanted {
            if banks.contains_key(owner) {
                continue;
            }
            let is_free = |bank: &u16| !banks.values().any(|taken| taken == bank);
            let free = (0..).take(limit).find(is_free);
            let bank = free.ok_or_else(|| PlanError::NoBank {
                vni: owner.0,
                address: owner.1,
                resting: banks.keys().filter(|owner| !wanted.contains(owner)).count(),
                limit,
            })?;
            banks.insert(*owner, bank);
        }
        Ok(Self(banks))
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
        let banks = Banks::default().given(&[a, b], 2, |_| true).unwrap();
        assert_eq!((banks.of(a), banks.of(b)), (Some(0), Some(1)));
        // In another order, and without the first, which still has connections.
        let refused = banks.given(&[c, b], 2, |bank| bank != 0).unwrap_err().to_string();
        assert!(
            refused.contains("10.99.1.3") && refused.contains("nat.addresses is 2"),
            "{refused}"
        );
        let banks = banks.given(&[b], 2, |bank| bank != 0).unwrap();
        assert_eq!(banks.of(a), Some(0), "it may come back");
        let banks = banks.given(&[c, b], 2, |_| true).unwrap();
        assert_eq!((banks.of(a), banks.of(b), banks.of(c)), (None, Some(1), Some(0)));
    }
}
