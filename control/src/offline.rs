//! A snapshot without a kernel, for `replay` and `explain`: interfaces as far as they can be read without
//! privileges, next hops as far as the configuration knows them.

use std::{collections::HashMap, fs, sync::Arc, time::SystemTime};

use dataplane::{forwarding::Forwarding, nat::Slots, time::Tick};

use crate::{
    config::Config,
    daemon,
    plan::{Inputs, Interface, Placements, PlanError},
};

/// What an absent interface counts as, in bytes.
const MTU: u32 = 1500;

/// A snapshot, and what it was made of.
#[derive(Debug)]
pub struct Offline {
    /// The snapshot.
    pub forwarding: Arc<Forwarding>,
    /// Where each backend is.
    pub placements: Placements,
    /// The interfaces.
    pub interfaces: Vec<Interface>,
}

impl Offline {
    /// Plans what a daemon with this configuration would, if it knew no more than the configuration says. To
    /// translate packets by it takes NAT's slots.
    ///
    /// # Errors
    /// If what is wanted can't be.
    pub fn new(config: &Config, nat: Option<&Slots>) -> Result<Self, PlanError> {
        let interfaces: Vec<Interface> = match &config.node.interfaces[..] {
            [] => vec![interface("default")],
            names => names.iter().map(|name| interface(name)).collect(),
        };
        let inputs = Inputs {
            desired: &config.desired,
            hops: &HashMap::new(),
            health: &Default::default(),
            next_hops: &config.next_hops,
            interfaces: &interfaces,
            // As far as they are configured: it may be another node's.
            addresses: &config.node.vteps(),
            nat,
            vtep: config.node.vtep,
            vtep6: config.node.vtep6,
            answer_arp: config.node.answer_arp,
            announce: config.node.announce_table.is_some(),
            offline: true,
            time: SystemTime::now(),
        };
        let plan = daemon::planner(config).plan(&inputs, Tick(0))?;
        Ok(Self { forwarding: Arc::new(plan.forwarding), placements: plan.placements, interfaces })
    }
}

/// An interface as far as it is known. Its MAC address is left unknown even if it is there, so that
/// a capture from another node is not taken for another station's packets. A capture may come from
/// a veth, so checksums may be partial.
fn interface(name: &str) -> Interface {
    let mtu = fs::read_to_string(format!("/sys/class/net/{name}/mtu")).ok();
    Interface {
        name: name.to_owned(),
        index: None,
        mac: Default::default(),
        mtu: mtu.and_then(|text| text.trim().parse().ok()).unwrap_or(MTU),
        partial_checksums: true,
        addresses: Vec::new(),
        home: None,
    }
}
