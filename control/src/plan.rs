//! [`Desired`] + next hops → the snapshot that workers forward by, and what XDP has to steer to them.
//!
//! Pure but for what must not change between snapshots: a backend keeps its slot, and unchanged Maglev
//! tables are shared. It asks nobody and does nothing.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use dataplane::{
    encap::{Template, Tunnel, TunnelError},
    flow::{Address, HashKey},
    forwarding::{self, Common, Forwarding, ForwardingError, Link, Slot, Vip},
    maglev::{Candidate, Maglev, Size},
    time::Tick,
    wire::ethernet::MacAddr,
};

use crate::{
    config::NextHop,
    desired::{Backend, Desired, Service, ServicePort},
    health::{AllDown, OnDown, Verdict, Verdicts},
    link::LinkIndex,
    next_hop::HopState,
};

/// One of our interfaces, in the order of the workers' ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// The kernel's number; `None` if it is not there, as may be offline.
    pub index: Option<LinkIndex>,
    /// Its MAC address; zero if unknown.
    pub mac: MacAddr,
    /// Largest IP packet, in bytes.
    pub mtu: u32,
    /// Whether senders on it may leave checksums to be completed.
    pub partial_checksums: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// Everything a plan is made from.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// What is wanted.
    pub desired: &'a Desired,
    /// What the kernel knows of the way to each VTEP.
    pub hops: &'a HashMap<IpAddr, HopState>,
    /// What is thought of the backends that are checked.
    pub health: &'a Verdicts,
    /// What the operator knows better.
    pub next_hops: &'a [NextHop],
    /// Our interfaces.
    pub interfaces: &'a [Interface],
    /// Tunnel source, if said.
    pub vtep: Option<IpAddr>,
    /// Tunnel source over IPv6, if said.
    pub vtep6: Option<Ipv6Addr>,
    /// Whether ARP and neighbour solicitations for VIPs are answered.
    pub answer_arp: bool,
    /// Whether there is no kernel to ask: a backend without a known way is sent to zero MAC addresses.
    pub offline: bool,
}

/// What XDP steers: address, protocol, port; protocol and port 0 for the address itself.
pub type SteerKey = (Address, u8, u16);

/// The result.
#[derive(Debug)]
pub struct Plan {
    /// For the workers.
    pub forwarding: Forwarding,
    /// For XDP, with each key's "answer ARP" flag.
    pub steer: BTreeMap<SteerKey, bool>,
    /// For people: one for each backend, in order of services and backends.
    pub backends: Vec<Placement>,
}

/// Where a backend ended up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Its number on this node.
    pub slot: Slot,
    /// Why it can't be reached, if so.
    pub unreachable: Option<String>,
    /// What is thought of it, if it is checked.
    pub health: Option<Verdict>,
}

impl Placement {
    /// Whether its checks say that it does not serve.
    pub fn is_down(&self) -> bool {
        self.health.as_ref().is_some_and(Verdict::is_down)
    }
}

/// A state that can't be forwarded by.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// No slot is free.
    #[error(
        "no slot for backend {service}/{backend}: {used} in use and {resting} resting until connections \
         of removed backends have expired; restart with limits.backends ({limit}) raised"
    )]
    NoSlot {
        /// Its service.
        service: String,
        /// Its name.
        backend: String,
        /// Slots of present backends.
        used: usize,
        /// Slots of removed ones.
        resting: usize,
        /// The limit.
        limit: usize,
    },
    /// Two services claim one VIP.
    #[error(transparent)]
    Forwarding(#[from] ForwardingError),
    /// The tunnel's ends don't match.
    #[error("the tunnel to backend {service}/{backend} is impossible")]
    Tunnel {
        /// Its service.
        service: String,
        /// Its name.
        backend: String,
        /// What is wrong.
        source: TunnelError,
    },
}

/// What stays the same for the process's life.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Size of each service's Maglev table.
    pub maglev_size: Size,
    /// What all nodes hash flows and names with.
    pub maglev_key: HashKey,
    /// Slots for backends.
    pub slots: usize,
    /// How long the slot of a removed backend must rest, in milliseconds (I4).
    pub rest_ms: u64,
}

/// A service's table with what it was built from.
type Built = (Vec<(String, u16, Slot)>, Arc<Maglev>);

/// Makes plans, and remembers what must not change from one to the next.
#[derive(Debug)]
pub struct Planner {
    settings: Settings,
    slots: Slots,
    maglevs: HashMap<String, Built>,
}

impl Planner {
    /// A planner that has made no plan yet.
    pub fn new(settings: Settings) -> Self {
        let slots = Slots { limit: settings.slots, rest_ms: settings.rest_ms, ..Slots::default() };
        Self { settings, slots, maglevs: HashMap::new() }
    }

    /// Makes the next plan.
    ///
    /// # Errors
    /// If what is wanted can't be. Nothing is changed then.
    pub fn plan(&mut self, inputs: &Inputs<'_>, now: Tick) -> Result<Plan, PlanError> {
        let mut slots = self.slots.clone();
        slots.keep_only(inputs.desired, now);
        let mut services = Vec::new();
        let mut placements = Vec::new();
        let mut backends: Vec<Option<forwarding::Backend>> = Vec::new();
        let mut maglevs = HashMap::new();
        let said: Said<'_> = inputs.next_hops.iter().map(|hop| (hop.vtep, hop)).collect();
        for (index, service) in inputs.desired.services.iter().enumerate() {
            let first = placements.len();
            for backend in &service.backends {
                let slot = slots.take(service, backend)?;
                let (rendered, unreachable) =
                    render((inputs, &said), index as u32, service, backend)?;
                let at = slot as usize;
                if backends.len() <= at {
                    backends.resize(at + 1, None);
                }
                backends[at] = Some(rendered);
                placements.push(Placement {
                    slot,
                    unreachable,
                    health: health_of(inputs, service, backend),
                });
            }
            let own = &placements[first..];
            let takes = takers(service, own);
            for left_out in left_to_others(service, own, &takes) {
                backends[left_out as usize] = None;
            }
            let built = self.maglev(service, own, &takes);
            services.push(forwarding::Service { vips: vips(service), maglev: built.1.clone() });
            maglevs.insert(service.name.clone(), built);
        }
        let common = Common {
            links: inputs.interfaces.iter().map(link).collect(),
            answer_arp: inputs.answer_arp,
            maglev_key: self.settings.maglev_key,
        };
        let forwarding = Forwarding::new(common, services, backends)?;
        self.slots = slots;
        self.maglevs = maglevs;
        Ok(Plan { forwarding, steer: steer(inputs), backends: placements })
    }

    /// The table of those that take new connections. The old one, if nothing changed.
    fn maglev(&self, service: &Service, placements: &[Placement], takes: &[bool]) -> Built {
        let all = service.backends.iter().zip(placements).zip(takes);
        let takers: Vec<(String, u16, Slot)> = all
            .filter(|(_, takes)| **takes)
            .map(|((backend, at), _)| (backend.name.clone(), backend.weight, at.slot))
            .collect();
        match self.maglevs.get(&service.name) {
            Some((before, maglev)) if *before == takers => (takers, maglev.clone()),
            _ => {
                let candidates: Vec<_> = takers
                    .iter()
                    .map(|(name, weight, slot)| Candidate { name, weight: *weight, slot: *slot })
                    .collect();
                let Settings { maglev_size, maglev_key, .. } = &self.settings;
                let maglev = Maglev::build(*maglev_size, &candidates, maglev_key);
                (takers, Arc::new(maglev))
            }
        }
    }
}

/// What is thought of a backend, if its service has checks.
pub fn health_of(inputs: &Inputs<'_>, service: &Service, backend: &Backend) -> Option<Verdict> {
    service.health.as_ref().map(|_| inputs.health.of(&service.name, &backend.name))
}

/// Which backends may take new connections, their weight permitting: those that are up, and reachable as
/// far as any is. If there is none, it is for the service to say whether the checks still count.
fn takers(service: &Service, placements: &[Placement]) -> Vec<bool> {
    let all = || service.backends.iter().zip(placements);
    let reachable = |placement: &Placement| placement.unreachable.is_none();
    let usable = |placement: &Placement| reachable(placement) && !placement.is_down();
    if all().any(|(backend, placement)| backend.weight > 0 && usable(placement)) {
        return placements.iter().map(usable).collect();
    }
    if service.health.as_ref().is_some_and(|health| health.all_down == AllDown::Stop) {
        return placements.iter().map(|placement| !placement.is_down()).collect();
    }
    let some = all().any(|(backend, placement)| backend.weight > 0 && reachable(placement));
    placements.iter().map(|placement| !some || reachable(placement)).collect()
}

/// The slots of down backends whose connections are to go elsewhere: workers know nothing of them, as if
/// they had been removed.
fn left_to_others(
    service: &Service,
    placements: &[Placement],
    takes: &[bool],
) -> impl Iterator<Item = Slot> {
    let reselect = service.health.as_ref().is_some_and(|health| health.on_down == OnDown::Reselect);
    let down = placements.iter().zip(takes).filter(|(at, takes)| at.is_down() && !**takes);
    down.filter(move |_| reselect).map(|(at, _)| at.slot)
}

/// A backend's identity: names of its service and itself.
type Identity = (String, String);

/// Which backend has which slot, and which slots must rest.
#[derive(Clone, Debug, Default)]
struct Slots {
    limit: usize,
    rest_ms: u64,
    taken: HashMap<Identity, Slot>,
    /// Given up, and since when. Its backend gets it back if it returns; nobody else does for `rest_ms`.
    resting: HashMap<Identity, (Slot, Tick)>,
    free: Vec<Slot>,
    next: Slot,
}

impl Slots {
    /// Lets the slots of backends that are wanted no more rest, and frees those that have.
    fn keep_only(&mut self, desired: &Desired, now: Tick) {
        let wanted: HashSet<(&str, &str)> =
            desired.backends().map(|(s, b)| (s.name.as_str(), b.name.as_str())).collect();
        let resting = &mut self.resting;
        self.taken.retain(|identity, slot| {
            let keep = wanted.contains(&(identity.0.as_str(), identity.1.as_str()));
            if !keep {
                resting.insert(identity.clone(), (*slot, now));
            }
            keep
        });
        let free = &mut self.free;
        self.resting.retain(|_, (slot, since)| {
            let rested = now.ms_since(*since) >= self.rest_ms;
            if rested {
                free.push(*slot);
            }
            !rested
        });
        // The map's order is another one in every process; the lowest is taken first in all.
        free.sort_unstable_by(|a, b| b.cmp(a));
    }

    fn take(&mut self, service: &Service, backend: &Backend) -> Result<Slot, PlanError> {
        let identity = (service.name.clone(), backend.name.clone());
        if let Some(slot) = self.taken.get(&identity) {
            return Ok(*slot);
        }
        let slot = match self.resting.remove(&identity) {
            Some((slot, _)) => slot,
            None => match self.free.pop() {
                Some(slot) => slot,
                None if (self.next as usize) < self.limit => {
                    self.next += 1;
                    self.next - 1
                }
                None => {
                    return Err(PlanError::NoSlot {
                        service: identity.0,
                        backend: identity.1,
                        used: self.taken.len(),
                        resting: self.resting.len(),
                        limit: self.limit,
                    });
                }
            },
        };
        self.taken.insert(identity, slot);
        Ok(slot)
    }
}

fn link(interface: &Interface) -> Link {
    Link { mac: interface.mac, partial_checksums: interface.partial_checksums }
}

fn vips(service: &Service) -> Vec<Vip> {
    let vip = |port: &ServicePort| Vip {
        address: service.vip.into(),
        protocol: port.protocol.number(),
        port: port.port,
    };
    service.ports.iter().map(vip).collect()
}

fn steer(inputs: &Inputs<'_>) -> BTreeMap<SteerKey, bool> {
    let mut keys = BTreeMap::new();
    for service in &inputs.desired.services {
        for vip in vips(service) {
            keys.insert((vip.address, vip.protocol, vip.port), false);
        }
        // An address that the node itself has keeps its pings, fragments and ARP.
        let own = inputs.interfaces.iter().any(|i| i.addresses.contains(&service.vip));
        if !own {
            keys.insert((service.vip.into(), 0, 0), inputs.answer_arp);
        }
    }
    keys
}

/// What every IPv6 link carries, in bytes, RFC 8200 section 5.
const IPV6_MIN_MTU: u32 = 1280;

/// What the operator says of the ways to VTEPs.
type Said<'a> = HashMap<IpAddr, &'a NextHop>;

/// Where a tunnel leaves.
struct Way {
    interface: usize,
    src_mac: MacAddr,
    dst_mac: MacAddr,
    vlans: Vec<u16>,
    mtu: u32,
    src_ip: Option<IpAddr>,
}

/// The way to a VTEP: what the operator says of it, else what the kernel says. Or why there is none.
fn way(inputs: &Inputs<'_>, said: &Said<'_>, vtep: IpAddr) -> Result<Way, String> {
    let said = said.get(&vtep);
    let resolved = match inputs.hops.get(&vtep) {
        Some(HopState::Resolved(resolved)) => Ok(resolved),
        Some(HopState::Unresolved { reason }) => Err(reason.clone()),
        Some(HopState::Pending) | None => Err(format!("{vtep} is still being resolved")),
    };
    let routed_by = |index: LinkIndex| {
        inputs.interfaces.iter().position(|interface| interface.index == Some(index))
    };
    if let Some(said) = said {
        let named =
            said.interface.as_ref().map(|name| {
                inputs.interfaces.iter().position(|interface| interface.name == *name).ok_or_else(
                    || format!("next_hop of {vtep}: {name} is not one of node.interfaces"),
                )
            });
        let routed = resolved.as_ref().ok().and_then(|resolved| routed_by(resolved.link));
        let interface = named.transpose()?.or(routed).unwrap_or(0);
        let ours = inputs.interfaces.get(interface).ok_or("there is no interface")?;
        return Ok(Way {
            interface,
            src_mac: ours.mac,
            dst_mac: said.mac,
            vlans: Vec::new(),
            mtu: said.mtu.map_or(ours.mtu, u32::from),
            src_ip: resolved.ok().filter(|_| routed == Some(interface)).map(|hop| hop.src_ip),
        });
    }
    let resolved = resolved?;
    let interface = routed_by(resolved.link)
        .ok_or_else(|| format!("{vtep} is routed by an interface that is not ours"))?;
    Ok(Way {
        interface,
        src_mac: resolved.src_mac,
        dst_mac: resolved.dst_mac,
        vlans: resolved.tags.iter().map(|tag| tag.id).collect(),
        mtu: resolved.mtu,
        src_ip: Some(resolved.src_ip),
    })
}

/// Renders a backend's tunnel. One without a way is rendered too, with zero MAC addresses, and marked.
fn render(
    (inputs, said): (&Inputs<'_>, &Said<'_>),
    service_index: u32,
    service: &Service,
    backend: &Backend,
) -> Result<(forwarding::Backend, Option<String>), PlanError> {
    let (way, unreachable) = match way(inputs, said, backend.vtep) {
        Ok(way) => (way, None),
        Err(reason) => {
            let reason = (!inputs.offline).then_some(reason);
            let mtu = inputs.interfaces.first().map_or(1500, |interface| interface.mtu);
            let zero = MacAddr::default();
            let nowhere = Way {
                interface: 0,
                src_mac: zero,
                dst_mac: zero,
                vlans: Vec::new(),
                mtu,
                src_ip: None,
            };
            (nowhere, reason)
        }
    };
    let v6 = backend.vtep.is_ipv6();
    let src = source(inputs, way.interface, v6, way.src_ip);
    let unspecified = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let tunnel = Tunnel {
        src_mac: way.src_mac,
        dst_mac: way.dst_mac,
        vlans: way.vlans,
        src: src.unwrap_or(unspecified),
        dst: backend.vtep,
        udp_port: backend.port,
        vni: backend.vni.get(),
        inner_dst_mac: backend.mac,
        inner_v6: service.vip.is_ipv6(),
        udp_checksum: backend.udp_checksum.unwrap_or(v6),
    };
    let template = Template::render(&tunnel).map_err(|source| PlanError::Tunnel {
        service: service.name.clone(),
        backend: backend.name.clone(),
        source,
    })?;
    let fits = way.mtu.saturating_sub(u32::from(Template::overhead(v6)));
    let mtu = backend.mtu.map_or(fits, |mtu| fits.min(mtu.into()));
    let too_narrow = || {
        format!(
            "the way there carries {mtu} bytes, and IPv6 needs {IPV6_MIN_MTU}: raise the MTU of {} to {}",
            inputs.interfaces.get(way.interface).map_or("the interface", |i| &i.name),
            IPV6_MIN_MTU + u32::from(Template::overhead(v6)),
        )
    };
    // No client would believe a smaller MTU, RFC 8201 section 4: its large packets would vanish.
    let narrow = service.vip.is_ipv6() && mtu < IPV6_MIN_MTU;
    let unreachable = unreachable.or_else(|| narrow.then(too_narrow));
    // A receiver drops what comes from the unspecified address.
    let homeless = src.is_none() && !inputs.offline;
    let unreachable =
        unreachable.or_else(|| homeless.then(|| no_source(inputs, way.interface, v6)));
    let rendered = forwarding::Backend {
        template,
        service: service_index,
        mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        link: way.interface as u8,
        reachable: unreachable.is_none(),
    };
    Ok((rendered, unreachable))
}

/// The tunnel's source: what is configured, else what the kernel would take, else the interface's.
fn source(
    inputs: &Inputs<'_>,
    interface: usize,
    v6: bool,
    routed: Option<IpAddr>,
) -> Option<IpAddr> {
    let configured = [inputs.vtep, inputs.vtep6.map(IpAddr::V6)];
    let own =
        inputs.interfaces.get(interface).into_iter().flat_map(|i| i.addresses.iter().copied());
    let mut all = configured.into_iter().flatten().chain(routed).chain(own);
    all.find(|address| address.is_ipv6() == v6)
}

fn no_source(inputs: &Inputs<'_>, interface: usize, v6: bool) -> String {
    let (family, key) = if v6 { ("IPv6", "node.vtep6") } else { ("IPv4", "node.vtep") };
    let interface = inputs.interfaces.get(interface).map_or("the interface", |i| &i.name);
    format!("{interface} has no {family} address to send tunnels from: give it one, or set {key}")
}

#[cfg(test)]
mod tests;
