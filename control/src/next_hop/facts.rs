//! What the kernel said, and what follows from it for a VTEP: pure, so it needs no kernel to be
//! tested.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use dataplane::wire::ethernet::MacAddr;

use super::{HopState, Resolved};
use crate::link::{Device, LinkIndex, VlanTag};

/// A neighbour's name: addresses may repeat on different links.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NeighbourKey {
    /// The link the kernel routes by: the VLAN device, not its parent.
    pub link: LinkIndex,
    /// The gateway, or the VTEP itself when it is on the link.
    pub address: IpAddr,
}

/// An entry of the neighbour table, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Where the kernel stands with it.
    pub state: NeighbourState,
    /// The MAC address, of which the state says whether it may be used.
    pub mac: Option<MacAddr>,
    /// Someone else keeps it: the kernel (`managed`) or a routing daemon (`extern_learn`).
    pub kept: bool,
}

/// The kernel's states (NUD_*), by what they mean for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighbourState {
    /// REACHABLE or STALE: usable, and worth confirming from time to time.
    Known,
    /// DELAY or PROBE: usable, and being confirmed.
    Probing,
    /// PERMANENT or NOARP: usable, and nobody's to question.
    Fixed,
    /// INCOMPLETE or NONE: asked for, not answered yet.
    Asking,
    /// FAILED: asked for, and never answered.
    Failed,
}

impl Neighbour {
    /// The MAC address, if the kernel would send to it.
    pub fn usable(&self) -> Option<MacAddr> {
        match self.state {
            NeighbourState::Asking | NeighbourState::Failed => None,
            _ => self.mac,
        }
    }

    /// What is known of an entry after `newer` was heard of it, `None` being that it is gone. Only
    /// an answer undoes a failure: neither that the kernel asks anew nor that it collects the dead
    /// entry, lest a dead neighbour look like one still to be waited for.
    pub fn followed_by(newer: Option<Self>, older: Option<Self>) -> Option<Self> {
        let unanswered = newer.is_none_or(|newer| newer.state == NeighbourState::Asking);
        let failed = older.filter(|older| unanswered && older.state == NeighbourState::Failed);
        failed.or(newer)
    }
}

/// The kernel's answer to "by which way would you send to this address?".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// By a link, directly or through a gateway.
    Via {
        /// Whom to find on which link.
        neighbour: NeighbourKey,
        /// What the kernel would send from.
        source: Option<IpAddr>,
        /// The route's own limit: an `mtu` metric, or what path MTU discovery learnt.
        mtu: Option<u32>,
    },
    /// Not at all, for the reason in this sentence.
    Nowhere(String),
}

/// All that was read.
#[derive(Debug, Default)]
pub struct Facts {
    /// Every interface.
    pub devices: HashMap<LinkIndex, Device>,
    /// The wanted VTEPs' routes.
    pub routes: HashMap<IpAddr, Route>,
    /// The neighbours on those routes.
    pub neighbours: HashMap<NeighbourKey, Neighbour>,
}

/// How frames for a link get out of a port of ours.
#[derive(Debug, PartialEq, Eq)]
struct Egress {
    link: LinkIndex,
    tags: Vec<VlanTag>,
    mtu: u32,
}

impl Facts {
    /// The neighbours that the routes lead to through links of ours. Through another no frame of
    /// ours can go, so its neighbours are none of our business.
    pub fn neighbours_to_know(&self, owned: &BTreeSet<LinkIndex>) -> BTreeSet<NeighbourKey> {
        let neighbours = self.routes.values().filter_map(|route| match route {
            Route::Via { neighbour, .. } => Some(*neighbour),
            Route::Nowhere(_) => None,
        });
        let ours = |key: &NeighbourKey| {
            self.devices.get(&key.link).is_some_and(|device| self.egress(device, owned).is_some())
        };
        neighbours.filter(ours).collect()
    }

    /// What all this means for one VTEP, given the links that have our ports.
    pub fn judge(&self, vtep: IpAddr, owned: &BTreeSet<LinkIndex>) -> HopState {
        let (key, source, route_mtu) = match self.routes.get(&vtep) {
            None => return HopState::Pending,
            Some(Route::Nowhere(reason)) => return unresolved(reason.clone()),
            Some(Route::Via { neighbour, source, mtu }) => (neighbour, *source, *mtu),
        };
        let Some(device) = self.devices.get(&key.link) else {
            return unresolved(format!("{vtep} is routed through an interface that just vanished"));
        };
        let name = &device.name;
        let Some(egress) = self.egress(device, owned) else {
            return unresolved(format!(
                "{vtep} is routed through {name}, which is not one of node.interfaces"
            ));
        };
        if !device.up {
            return unresolved(format!("{vtep} is routed through {name}, which is down"));
        }
        let Some(src_ip) = source else {
            return unresolved(format!("{name} has no address to send to {vtep} from"));
        };
        let address = key.address;
        match self.neighbours.get(key) {
            Some(Neighbour { state: NeighbourState::Failed, .. }) => {
                unresolved(format!("neighbour {address} on {name} does not answer (FAILED)"))
            }
            neighbour => match neighbour.and_then(Neighbour::usable) {
                None => HopState::Pending,
                Some(dst_mac) => HopState::Resolved(Resolved {
                    link: egress.link,
                    tags: egress.tags,
                    src_mac: device.mac,
                    dst_mac,
                    mtu: route_mtu.map_or(egress.mtu, |mtu| mtu.min(egress.mtu)),
                    src_ip,
                }),
            },
        }
    }

    /// Goes down from the link the kernel routes by, through VLANs and at most one bond, to a link
    /// of ours. `None` if there is none below.
    fn egress(&self, device: &Device, owned: &BTreeSet<LinkIndex>) -> Option<Egress> {
        // Kernels nest VLANs at most 8 deep (MAX_NEST_DEV), so no chain is cut short here.
        const DEEPEST: usize = 8;
        let mut egress = Egress { link: device.index, tags: Vec::new(), mtu: device.mtu };
        let mut device = device;
        for _ in 0..=DEEPEST {
            egress.link = device.index;
            egress.mtu = egress.mtu.min(device.mtu);
            if owned.contains(&device.index) {
                return Some(egress);
            }
            let below = match device.vlan {
                Some(vlan) => {
                    // The lowest device writes the outermost tag.
                    egress.tags.insert(0, vlan.tag);
                    vlan.parent
                }
                None => self.bond_member(device, owned)?,
            };
            device = self.devices.get(&below)?;
        }
        None
    }

    /// The member of a bond that frames should leave by: the active one, or where all send the
    /// first that is up. Which one a flow takes is free: a bond receives on all.
    fn bond_member(&self, bond: &Device, owned: &BTreeSet<LinkIndex>) -> Option<LinkIndex> {
        if bond.kind.as_deref() != Some("bond") {
            return None;
        }
        match bond.active_member {
            Some(active) => owned.contains(&active).then_some(active),
            None => owned.iter().copied().find(|index| {
                let member = self.devices.get(index);
                member.is_some_and(|member| member.up && member.master == Some(bond.index))
            }),
        }
    }
}

fn unresolved(reason: String) -> HopState {
    HopState::Unresolved { reason }
}

#[cfg(test)]
mod tests {
    use dataplane::wire::ethernet;

    use super::*;
    use crate::link::Vlan;

    const VTEP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));
    const US: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const PEER: MacAddr = MacAddr([2, 0, 0, 0, 0, 9]);

    fn device(index: u32, name: &str, mtu: u32) -> Device {
        Device {
            name: name.to_owned(),
            mac: MacAddr([2, 0, 0, 0, 0, index as u8]),
            mtu,
            up: true,
            ..Device::nameless(LinkIndex(index))
        }
    }

    fn vlan(index: u32, parent: u32, protocol: u16, id: u16) -> Device {
        let tag = VlanTag { protocol, id };
        let vlan = Some(Vlan { parent: LinkIndex(parent), tag });
        Device { vlan, ..device(index, &format!("vlan{id}"), 1496) }
    }

    /// The VTEP is a reachable neighbour on the last device; the first is ours.
    fn facts(devices: Vec<Device>) -> Facts {
        let link = devices.last().expect("a device to route by").index;
        let neighbour = NeighbourKey { link, address: VTEP };
        let known = Neighbour { state: NeighbourState::Known, mac: Some(PEER), kept: false };
        Facts {
            devices: devices.into_iter().map(|device| (device.index, device)).collect(),
            routes: [(VTEP, Route::Via { neighbour, source: Some(US), mtu: None })].into(),
            neighbours: [(neighbour, known)].into(),
        }
    }

    fn judge(facts: &Facts) -> HopState {
        facts.judge(VTEP, &[LinkIndex(1)].into())
    }

    fn resolved(facts: &Facts) -> Resolved {
        match judge(facts) {
            HopState::Resolved(resolved) => resolved,
            other => panic!("not resolved: {other:?}"),
        }
    }

    fn reason(facts: &Facts) -> String {
        match judge(facts) {
            HopState::Unresolved { reason } => reason,
            other => panic!("not unresolved: {other:?}"),
        }
    }

    #[test]
    fn a_neighbour_on_our_own_link_is_sent_to_untagged() {
        let facts = facts(vec![device(1, "eth0", 1600)]);
        let expected = Resolved {
            link: LinkIndex(1),
            tags: vec![],
            src_mac: MacAddr([2, 0, 0, 0, 0, 1]),
            dst_mac: PEER,
            mtu: 1600,
            src_ip: US,
        };
        assert_eq!(resolved(&facts), expected);
    }

    #[test]
    fn stacked_vlans_give_their_tags_outermost_first() {
        let outer = vlan(2, 1, ethernet::QINQ, 20);
        let inner = vlan(3, 2, ethernet::VLAN, 30);
        let hop = resolved(&facts(vec![device(1, "eth0", 1500), outer, inner]));
        let tags: Vec<_> = hop.tags.iter().map(|tag| (tag.protocol, tag.id)).collect();
        assert_eq!(tags, [(ethernet::QINQ, 20), (ethernet::VLAN, 30)]);
        assert_eq!(hop.link, LinkIndex(1));
        assert_eq!(hop.src_mac, MacAddr([2, 0, 0, 0, 0, 3]), "of the device with the address");
        assert_eq!(hop.mtu, 1496, "the smallest on the way");
    }

    #[test]
    fn a_bond_sends_by_its_active_member_only() {
        let member = Device { master: Some(LinkIndex(9)), ..device(1, "eth0", 1500) };
        let bond = Device { kind: Some("bond".to_owned()), ..device(9, "bond0", 1500) };
        assert_eq!(resolved(&facts(vec![member.clone(), bond.clone()])).link, LinkIndex(1));

        let elsewhere = Device { active_member: Some(LinkIndex(2)), ..bond };
        assert!(reason(&facts(vec![member, elsewhere])).contains("not one of node.interfaces"));
    }

    #[test]
    fn a_route_through_a_foreign_link_is_named() {
        let facts = facts(vec![device(7, "docker0", 1500)]);
        let expected = "10.0.0.2 is routed through docker0, which is not one of node.interfaces";
        assert_eq!(reason(&facts), expected);
    }

    #[test]
    fn the_routes_mtu_only_ever_lowers_the_links() {
        let mut facts = facts(vec![device(1, "eth0", 1500)]);
        for (route_mtu, expected) in [(1400, 1400), (9000, 1500)] {
            let Some(Route::Via { mtu, .. }) = facts.routes.get_mut(&VTEP) else {
                panic!("the VTEP has a route");
            };
            *mtu = Some(route_mtu);
            assert_eq!(resolved(&facts).mtu, expected);
        }
    }

    #[test]
    fn a_neighbour_that_failed_stays_failed_while_it_is_asked_again() {
        let mut facts = facts(vec![device(1, "eth0", 1500)]);
        let state = |state| Some(Neighbour { state, mac: None, kept: false });
        let (asking, failed) = (state(NeighbourState::Asking), state(NeighbourState::Failed));
        assert_eq!(Neighbour::followed_by(asking, failed), failed);
        assert_eq!(Neighbour::followed_by(None, failed), failed, "collected as garbage");
        assert_eq!(Neighbour::followed_by(asking, None), asking);
        assert_eq!(Neighbour::followed_by(None, asking), None);

        let key = *facts.neighbours.keys().next().expect("one neighbour");
        facts.neighbours.extend(failed.map(|failed| (key, failed)));
        assert_eq!(reason(&facts), "neighbour 10.0.0.2 on eth0 does not answer (FAILED)");
        facts.neighbours.extend(asking.map(|asking| (key, asking)));
        assert_eq!(judge(&facts), HopState::Pending);
    }

    #[test]
    fn a_link_that_is_down_resolves_nothing() {
        let facts = facts(vec![Device { up: false, ..device(1, "eth0", 1500) }]);
        assert_eq!(reason(&facts), "10.0.0.2 is routed through eth0, which is down");
    }
}
