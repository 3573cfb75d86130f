//! [`Desired`] + next hops → the snapshot that workers forward by, and what XDP has to steer to them.
//!
//! Pure but for what must not change between snapshots, a backend's slot, and what need not be made again:
//! a service that is as it was is taken as it is. It asks nobody and does nothing.

mod banks;
mod slots;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZero,
    panic,
    sync::Arc,
    thread::{self, ScopedJoinHandle},
    time::SystemTime,
};

use dataplane::{
    encap::{Template, Tunnel, TunnelError},
    flow::{Address, HashKey, protocol},
    forwarding::{self, Common, Forwarding, ForwardingError, Link, Mesh, Nat, Prefix, Slot, Vip},
    maglev::{Candidate, Maglev, Size},
    nat,
    schedule::{Schedule, Taker},
    steer,
    time::Tick,
    wire::ethernet::MacAddr,
};

use ipnet::IpNet;

use self::{
    banks::Banks,
    slots::{Full, Slots},
};
use crate::{
    config::NextHop,
    desired::{self, Backend, Desired, Drain, Family, Mode, Overlay, Owner, Scheduler, Service},
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
    /// If this very node is at its other end: its MAC address there.
    pub home: Option<MacAddr>,
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
    /// All addresses of this node that others can send to, those of its other interfaces too.
    pub addresses: &'a [IpAddr],
    /// NAT's slots, of which each mesh address gets a bank; `None` where nothing is ever translated.
    pub nat: Option<&'a nat::Slots>,
    /// Tunnel source, if said.
    pub vtep: Option<IpAddr>,
    /// Tunnel source over IPv6, if said.
    pub vtep6: Option<Ipv6Addr>,
    /// Whether ARP and neighbour solicitations for VIPs are answered.
    pub answer_arp: bool,
    /// Whether VIPs are announced.
    pub announce: bool,
    /// Whether there is no kernel to ask: a backend without a known way is sent to zero MAC addresses.
    pub offline: bool,
    /// What time it is for people: drains may end.
    pub time: SystemTime,
}

/// What XDP steers, each with its flags.
pub type Steering = BTreeMap<steer::Key, u32>;

/// The result.
#[derive(Debug)]
pub struct Plan {
    /// For the workers.
    pub forwarding: Forwarding,
    /// For XDP. The same one again, if nothing of it has changed.
    pub steer: Arc<Steering>,
    /// For routers, if VIPs are announced: those with a backend that serves. No ARP is answered for others.
    pub announced: BTreeSet<IpAddr>,
    /// For people.
    pub placements: Placements,
    /// When the next drain ends.
    pub drained_at: Option<SystemTime>,
    /// Banks of mesh addresses that are translated no more: what is left of their connections is to be ended.
    pub cut: Vec<u16>,
    /// Why a swarm's mesh address has to wait for ports, if one has to.
    pub waits: Option<PlanError>,
}

/// Where all backends ended up, service by service. Those of a service that is as it was are taken as they are.
pub type Placements = Arc<[Arc<[Placement]>]>;

/// Where a backend ended up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Its number on this node.
    pub slot: Slot,
    /// Why it can't be reached, if so.
    pub unreachable: Option<String>,
    /// Whether its drain has ended: workers know it no more, and its connections go to others.
    pub drained: bool,
    /// What is thought of it, if it is checked.
    pub health: Option<Verdict>,
}

impl Placement {
    /// Whether its checks say that it does not serve.
    pub fn is_down(&self) -> bool {
        self.health.as_ref().is_some_and(Verdict::is_down)
    }

    /// Whether it can serve, as far as is known.
    fn is_usable(&self) -> bool {
        self.unreachable.is_none() && !self.is_down()
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
    /// No bank of NAT slots is free.
    #[error(
        "no ports for the mesh address {address} of overlay {vni}: nat.addresses is {limit}, and {resting} \
         of them keep connections of addresses that are gone; restart with it raised"
    )]
    NoBank {
        /// The address's network.
        vni: u32,
        /// The address.
        address: IpAddr,
        /// Banks of addresses that are gone.
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

/// Makes plans, and remembers what must not change from one to the next, and what need not be made again.
#[derive(Debug)]
pub struct Planner {
    settings: Settings,
    slots: Slots,
    /// By name, as of the last plan.
    planned: foldhash::HashMap<String, Arc<Planned>>,
    surroundings: Surroundings,
    hops: HashMap<IpAddr, HopState>,
    steer: Arc<Steering>,
    banks: Banks,
    meshed: Vec<Meshed>,
    waits: bool,
    announced: BTreeSet<IpAddr>,
}

/// A mesh address with its bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Meshed {
    owner: banks::Owner,
    bank: u16,
    /// Whether it gets new connections.
    takes: bool,
}

/// A service with all that was made of it: the next plan takes it as it is, if nothing about it has changed.
#[derive(Debug)]
struct Planned {
    service: Arc<Service>,
    vips: Vec<Vip>,
    nat: Option<Arc<Nat>>,
    /// Their service's number is the snapshot's to set. `None`: its connections are to go elsewhere.
    backends: Vec<Option<forwarding::Backend>>,
    placements: Arc<[Placement]>,
    maglev: Arc<Maglev>,
    schedule: Schedule,
    /// Whether a backend takes new connections because it can, and not for want of a better one.
    serves: bool,
    /// When the next drain ends.
    drained_at: Option<SystemTime>,
}

/// What all services are planned by, but for the ways to their backends and what is thought of these.
#[derive(Debug, Default, PartialEq)]
struct Surroundings {
    next_hops: Vec<NextHop>,
    interfaces: Vec<Interface>,
    addresses: Vec<IpAddr>,
    overlays: Vec<Overlay>,
    /// What services have that name an address of this node: theirs before those of `vip = "node"`.
    named: HashSet<Vip>,
    vtep: Option<IpAddr>,
    vtep6: Option<Ipv6Addr>,
    answer_arp: bool,
    announce: bool,
    offline: bool,
}

impl Surroundings {
    fn of(inputs: &Inputs<'_>) -> Self {
        Self {
            next_hops: inputs.next_hops.to_vec(),
            interfaces: inputs.interfaces.to_vec(),
            addresses: inputs.addresses.to_vec(),
            overlays: inputs.desired.overlays.clone(),
            named: named(inputs),
            vtep: inputs.vtep,
            vtep6: inputs.vtep6,
            answer_arp: inputs.answer_arp,
            announce: inputs.announce,
            offline: inputs.offline,
        }
    }
}

impl Planned {
    /// Whether it would be made alike again where only the ways to these VTEPs are others.
    fn stays(&self, service: &Arc<Service>, moved: &HashSet<IpAddr>, inputs: &Inputs<'_>) -> bool {
        let judged_alike = |(backend, at): (&Backend, &Placement)| {
            at.health == health_of(inputs.health, service, backend)
        };
        let is_there = |backend: &Backend| !moved.contains(&backend.vtep);
        (Arc::ptr_eq(&self.service, service) || self.service == *service)
            && self.drained_at.is_none_or(|deadline| inputs.time < deadline)
            && (moved.is_empty() || service.backends.iter().all(is_there))
            && (service.health.is_none()
                || service.backends.iter().zip(&*self.placements).all(judged_alike))
    }

    fn slots(&self) -> impl Iterator<Item = (&str, Slot)> {
        let both = self.service.backends.iter().zip(&*self.placements);
        both.map(|(backend, placement)| (backend.name.as_str(), placement.slot))
    }
}

impl Planner {
    /// A planner that has made no plan yet.
    pub fn new(settings: Settings) -> Self {
        let slots = Slots::new(settings.slots, settings.rest_ms);
        Self {
            settings,
            slots,
            planned: Default::default(),
            surroundings: Surroundings::default(),
            hops: HashMap::new(),
            steer: Arc::default(),
            banks: Banks::default(),
            meshed: Vec::new(),
            waits: false,
            announced: BTreeSet::new(),
        }
    }

    /// Makes the next plan.
    ///
    /// # Errors
    /// If what is wanted can't be. Nothing is changed then.
    pub fn plan(&mut self, inputs: &Inputs<'_>, now: Tick) -> Result<Plan, PlanError> {
        self.slots.free_rested(now);
        let surroundings = Surroundings::of(inputs);
        let planned = self.services(inputs, &surroundings, now).and_then(|(services, made)| {
            let (banks, meshed, waits) = self.meshed(inputs)?;
            let forwarding = self.forwarding((inputs, overlays(inputs, &meshed)), &services)?;
            Ok((services, made, forwarding, (banks, meshed, waits)))
        });
        let (services, made, forwarding, (banks, meshed, waits)) = match planned {
            Ok(planned) => planned,
            Err(refused) => {
                self.slots.undo();
                return Err(refused);
            }
        };
        self.slots.keep();
        let cut = cut(inputs.desired, &banks, &meshed);
        (self.banks, self.waits) = (banks, waits.is_some());
        self.remember((inputs, surroundings), (&services, &made), meshed);
        let placements = services.iter().map(|planned| planned.placements.clone()).collect();
        let drained_at = services.iter().filter_map(|planned| planned.drained_at).min();
        let (steer, announced) = (self.steer.clone(), self.announced.clone());
        Ok(Plan { forwarding, steer, announced, placements, drained_at, cut, waits })
    }

    /// Whether a mesh address waits for ports and there are some now.
    pub fn has_ports_for_waiting(&self, slots: &nat::Slots) -> bool {
        let takes = |bank| self.meshed.iter().any(|meshed| meshed.takes && meshed.bank == bank);
        let is_free = |bank: &u16| !takes(*bank) && slots.used(*bank) == 0;
        self.waits && (0..).take(slots.banks()).any(|bank| is_free(&bank))
    }

    /// All services, in order: as they were, or made anew. And which are the latter, by their index.
    fn services(
        &mut self,
        inputs: &Inputs<'_>,
        surroundings: &Surroundings,
        now: Tick,
    ) -> Result<(Vec<Arc<Planned>>, Vec<usize>), PlanError> {
        let moved = (self.surroundings == *surroundings).then(|| self.moved(inputs.hops));
        let stays = |before: &Arc<Planned>, service| {
            moved.as_ref().is_some_and(|moved| before.stays(service, moved, inputs))
        };
        let wanted = &inputs.desired.services;
        let before: Vec<Option<Arc<Planned>>> =
            wanted.iter().map(|service| self.planned.get(&service.name).cloned()).collect();
        // All that is given up is given up before anything is taken: the order must not matter.
        self.give_up(wanted, &before, now);
        let said: Said<'_> = inputs.next_hops.iter().map(|hop| (hop.vtep, hop)).collect();
        let (mut services, mut made) = (Vec::with_capacity(wanted.len()), Vec::new());
        for (service, before) in wanted.iter().zip(before) {
            services.push(match before {
                Some(before) if stays(&before, service) => before,
                before => {
                    made.push(services.len());
                    let vips = vips(inputs, &surroundings.named, service);
                    Arc::new(self.service((inputs, &said), (service, vips), before.as_deref())?)
                }
            });
        }
        self.build_tables(&mut services, &made);
        Ok((services, made))
    }

    /// The VTEPs that the way is another one to now.
    fn moved(&self, hops: &HashMap<IpAddr, HopState>) -> HashSet<IpAddr> {
        let either = self.hops.keys().chain(hops.keys());
        either.filter(|vtep| self.hops.get(vtep) != hops.get(vtep)).copied().collect()
    }

    /// Builds the tables of those that were made without one.
    fn build_tables(&self, services: &mut [Arc<Planned>], made: &[usize]) {
        let is_without = |at: &usize| services[*at].maglev.is_empty();
        let without: Vec<usize> = made.iter().copied().filter(is_without).collect();
        let build = |at: &usize| {
            let planned = &services[*at];
            let takers = takers(&planned.service, &planned.placements);
            let candidate = |&(name, weight, slot)| Candidate { name, weight, slot };
            let candidates: Vec<_> = takers.iter().map(candidate).collect();
            let Settings { maglev_size, maglev_key, .. } = &self.settings;
            Arc::new(Maglev::build(*maglev_size, &candidates, maglev_key))
        };
        for (at, table) in without.iter().zip(on_all_cores(&without, build)) {
            Arc::get_mut(&mut services[*at]).expect("it was just made").maglev = table;
        }
    }

    /// Lets the slots of backends that are wanted no more rest.
    fn give_up(&mut self, wanted: &[Arc<Service>], before: &[Option<Arc<Planned>>], now: Tick) {
        let mut give_up = |service: &str, backend: &str, slot| {
            self.slots.give_up((service.to_owned(), backend.to_owned()), slot, now);
        };
        for (service, before) in wanted.iter().zip(before) {
            let Some(before) = before else { continue };
            if Arc::ptr_eq(service, &before.service) {
                continue;
            }
            let names: HashSet<&str> = service.backends.iter().map(|b| b.name.as_str()).collect();
            let gone = before.slots().filter(|(name, _)| !names.contains(name));
            gone.for_each(|(name, slot)| give_up(&service.name, name, slot));
        }
        if before.iter().flatten().count() < self.planned.len() {
            let names: HashSet<&str> = wanted.iter().map(|service| service.name.as_str()).collect();
            let gone = self.planned.values().filter(|b| !names.contains(b.service.name.as_str()));
            for before in gone {
                before.slots().for_each(|(name, slot)| give_up(&before.service.name, name, slot));
            }
        }
    }

    /// A service that is new, or not as it was.
    fn service(
        &mut self,
        surroundings: (&Inputs<'_>, &Said<'_>),
        (service, vips): (&Arc<Service>, Vec<(Vip, u16)>),
        before: Option<&Planned>,
    ) -> Result<Planned, PlanError> {
        let slots: HashMap<&str, Slot> = before.into_iter().flat_map(Planned::slots).collect();
        let mut backends = Vec::with_capacity(service.backends.len());
        let mut placements = Vec::with_capacity(service.backends.len());
        for backend in &service.backends {
            let slot = match slots.get(backend.name.as_str()) {
                Some(slot) => *slot,
                None => self.take(service, backend)?,
            };
            let (rendered, unreachable) = render(surroundings, service, backend)?;
            backends.push(Some(rendered));
            let deadline = backend.drain.and_then(Drain::deadline);
            let drained = deadline.is_some_and(|deadline| deadline <= surroundings.0.time);
            let health = health_of(surroundings.0.health, service, backend);
            placements.push(Placement { slot, unreachable, drained, health });
        }
        for left_out in left_to_others(service, &placements) {
            backends[left_out] = None;
        }
        let deadlines = service.backends.iter().filter_map(|backend| backend.drain?.deadline());
        let drained_at = deadlines.filter(|deadline| *deadline > surroundings.0.time).min();
        let (maglev, schedule) = self.chosen_from(service, &placements, before);
        let serves = serves(service, &placements);
        let (vips, targets) = vips.into_iter().unzip();
        let nat = nat(&surroundings.0.desired.overlays, service, targets);
        Ok(Planned {
            service: service.clone(),
            vips,
            nat,
            backends,
            placements: placements.into(),
            maglev,
            schedule,
            serves,
            drained_at,
        })
    }

    fn take(&mut self, service: &Service, backend: &Backend) -> Result<Slot, PlanError> {
        let identity = (service.name.clone(), backend.name.clone());
        self.slots.take(identity).map_err(|Full { used, resting, limit }| PlanError::NoSlot {
            service: service.name.clone(),
            backend: backend.name.clone(),
            used,
            resting,
            limit,
        })
    }

    /// The table and schedule of those that take new connections. The old ones, if nothing changed; else the
    /// table is yet to be built.
    fn chosen_from(
        &self,
        service: &Service,
        placements: &[Placement],
        before: Option<&Planned>,
    ) -> (Arc<Maglev>, Schedule) {
        let takers = takers(service, placements);
        let before =
            before.filter(|before| self::takers(&before.service, &before.placements) == takers);
        let schedule = match before {
            Some(before) if before.service.scheduler == service.scheduler => {
                before.schedule.clone()
            }
            _ => schedule(service.scheduler, &takers),
        };
        let maglev = before.map_or_else(|| Arc::new(Maglev::empty()), |b| b.maglev.clone());
        (maglev, schedule)
    }

    /// Who has which bank, and the mesh addresses that packets are translated at: those that are wanted, and
    /// those that are leaving and still have connections. And why one has to wait for its ports.
    fn meshed(
        &self,
        inputs: &Inputs<'_>,
    ) -> Result<(Banks, Vec<Meshed>, Option<PlanError>), PlanError> {
        let Some(slots) = inputs.nat else { return Ok(Default::default()) };
        let overlays = &inputs.desired.overlays;
        let of = |overlay: &Overlay, addresses: &[IpAddr]| {
            let vni = overlay.vni.get();
            addresses.iter().map(move |address| (vni, *address)).collect::<Vec<_>>()
        };
        let wanted: Vec<_> = overlays.iter().flat_map(|o| of(o, &o.addresses)).collect();
        let is_empty = |bank| slots.used(bank) == 0;
        let (banks, short) = self.banks.given(&wanted, slots.banks(), is_empty);
        // An operator who asks for too many is told. A swarm's come and go by themselves: they wait.
        let mut of_file = overlays.iter().filter(|overlay| overlay.owner == Owner::File);
        let missing = |overlay: &Overlay| {
            of(overlay, &overlay.addresses).iter().any(|owner| banks.of(*owner).is_none())
        };
        let short = match short {
            Some(refused) if of_file.any(missing) => return Err(refused),
            short => short,
        };
        let leaving = overlays.iter().flat_map(|o| of(o, &leaving(inputs.desired, o)));
        let (takes, leaves) = (wanted.iter().map(|o| (*o, true)), leaving.map(|o| (o, false)));
        let meshed = takes
            .chain(leaves)
            .filter_map(|(owner, takes)| Some(Meshed { owner, bank: banks.of(owner)?, takes }));
        let meshed = meshed.collect();
        Ok((banks, meshed, short))
    }

    /// Puts the snapshot together.
    fn forwarding(
        &self,
        (inputs, overlays): (&Inputs<'_>, Vec<forwarding::Overlay>),
        services: &[Arc<Planned>],
    ) -> Result<Forwarding, ForwardingError> {
        // Each is copied once, for there may be as many as fill the processor's caches.
        let mut owners: Vec<Option<(u32, u32)>> = vec![None; self.slots.end()];
        let mut tasks = vec![Address::default(); self.slots.end()];
        for (index, planned) in (0..).zip(services) {
            for (at, placement) in (0..).zip(&*planned.placements) {
                owners[placement.slot as usize] = Some((index, at));
            }
            let translated = planned.nat.iter().flat_map(|_| &planned.service.backends);
            for (backend, placement) in translated.zip(&*planned.placements) {
                tasks[placement.slot as usize] =
                    backend.address.map(Address::from).unwrap_or_default();
            }
        }
        let backend = |owner: Option<(u32, u32)>| {
            let (service, at) = owner?;
            let backend = services[service as usize].backends[at as usize].clone()?;
            Some(forwarding::Backend { service, ..backend })
        };
        let service = |planned: &Arc<Planned>| forwarding::Service {
            vips: planned.vips.clone(),
            maglev: planned.maglev.clone(),
            schedule: planned.schedule.clone(),
            resets: planned.service.health.as_ref().is_some_and(|h| h.on_down == OnDown::Reset),
            nat: planned.nat.clone(),
        };
        let common = Common {
            links: inputs.interfaces.iter().map(link).collect(),
            answer_arp: inputs.answer_arp,
            maglev_key: self.settings.maglev_key,
            overlays,
            tasks,
        };
        let backends = owners.into_iter().map(backend);
        Forwarding::new(common, services.iter().map(service).collect(), backends)
    }

    /// Notes what the next plan is to start from.
    fn remember(
        &mut self,
        (inputs, surroundings): (&Inputs<'_>, Surroundings),
        (services, made): (&[Arc<Planned>], &[usize]),
        meshed: Vec<Meshed>,
    ) {
        let still = self.surroundings == surroundings;
        // An address may get its ports, or lose them, while all else is as it was.
        let same_mesh = self.meshed == meshed;
        self.meshed = meshed;
        let made = || made.iter().map(|index| &services[*index]);
        let steers_like = |planned: &Arc<Planned>| {
            let before = self.planned.get(&planned.service.name);
            before.is_some_and(|before| before.vips == planned.vips)
        };
        let same_vips = services.len() == self.planned.len() && made().all(steers_like);
        let announced = match inputs.announce {
            true => services
                .iter()
                .filter(|p| p.serves)
                .filter_map(|p| p.service.vip.address())
                .collect(),
            false => BTreeSet::new(),
        };
        if !(still && same_vips && same_mesh && announced == self.announced) {
            self.steer = Arc::new(steer((inputs, &self.meshed), services, &announced));
        }
        self.announced = announced;
        for planned in made() {
            self.planned.insert(planned.service.name.clone(), planned.clone());
        }
        if self.planned.len() > services.len() {
            let names: HashSet<&str> = services.iter().map(|p| p.service.name.as_str()).collect();
            self.planned.retain(|name, _| names.contains(name.as_str()));
        }
        self.surroundings = surroundings;
        if self.hops != *inputs.hops {
            self.hops = inputs.hops.clone();
        }
    }
}

/// Maps each of them, side by side on the cores that this thread may run on if there are many: ten thousand
/// tables take one core the better part of a second.
fn on_all_cores<'a, T: Sync, R: Send>(items: &'a [T], map: impl Fn(&T) -> R + Sync) -> Vec<R> {
    /// What is worth a thread's start.
    const MANY: usize = 64;
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let each = items.len().div_ceil(cores).max(MANY);
    if items.len() <= each {
        return items.iter().map(map).collect();
    }
    thread::scope(|scope| {
        let map = &map;
        let start = |part: &'a [T]| scope.spawn(move || part.iter().map(map).collect());
        let parts: Vec<_> = items.chunks(each).map(start).collect();
        let finish = |part: ScopedJoinHandle<'_, Vec<R>>| {
            part.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
        };
        parts.into_iter().flat_map(finish).collect()
    })
}

/// The mesh addresses that an overlay had and that nobody has needed since.
fn leaving(desired: &Desired, overlay: &Overlay) -> Vec<IpAddr> {
    if overlay.leaving.is_empty() {
        return Vec::new();
    }
    let all = desired.backends().filter(|(_, backend)| backend.vni == overlay.vni);
    let tasks: HashSet<IpAddr> = all.filter_map(|(_, backend)| backend.address).collect();
    let free = |address: &&IpAddr| !tasks.contains(address) && !overlay.addresses.contains(address);
    overlay.leaving.iter().filter(free).copied().collect()
}

/// Banks of addresses that this node has no more in an overlay that it is in. One that is gone as a whole may
/// only be gone for a moment, as while Docker starts again, and its services with it.
fn cut(desired: &Desired, banks: &Banks, meshed: &[Meshed]) -> Vec<u16> {
    let is_here = |vni| desired.overlays.iter().any(|overlay| overlay.vni.get() == vni);
    let gone = banks.iter().filter(|(owner, bank)| {
        is_here(owner.0) && meshed.iter().all(|meshed| meshed.bank != *bank)
    });
    gone.map(|(_, bank)| bank).collect()
}

/// Whom a service can refer to: a connection is given any mesh address of what its service refers to, so there is
/// one for each family that an overlay has.
fn referred(overlays: &[Overlay]) -> impl Iterator<Item = (&Overlay, Family)> {
    let both = |overlay| Family::ALL.map(|family| (overlay, family));
    overlays.iter().flat_map(both).filter(|(overlay, family)| overlay.has(*family))
}

/// The overlays for workers. What is leaving is in further ones behind them, which no service refers to: so
/// answers find it, and new connections don't.
fn overlays(inputs: &Inputs<'_>, meshed: &[Meshed]) -> Vec<forwarding::Overlay> {
    if inputs.nat.is_none() {
        return Vec::new();
    }
    let of = |overlay: &Overlay, is_in: &dyn Fn(&Meshed) -> bool| {
        let vni = overlay.vni.get();
        let its = meshed.iter().filter(|meshed| meshed.owner.0 == vni && is_in(meshed));
        forwarding::Overlay {
            vni,
            udp_port: overlay.port,
            mac: overlay.mac,
            mesh: its.map(|m| Mesh { bank: m.bank, address: m.owner.1.into() }).collect(),
        }
    };
    let overlays = &inputs.desired.overlays;
    let takes = referred(overlays).map(|(overlay, family)| {
        of(overlay, &|meshed| meshed.takes && Family::of(meshed.owner.1) == family)
    });
    let leaves = overlays.iter().map(|overlay| of(overlay, &|meshed| !meshed.takes));
    takes.chain(leaves.filter(|overlay| !overlay.mesh.is_empty())).collect()
}

/// What is thought of a backend, if its service has checks.
pub fn health_of(health: &Verdicts, service: &Service, backend: &Backend) -> Option<Verdict> {
    service.health.as_ref().map(|_| health.of(&service.name, &backend.name))
}

/// Those that take new connections, with their weights.
fn takers<'a>(service: &'a Service, placements: &[Placement]) -> Vec<(&'a str, u16, Slot)> {
    let all = service.backends.iter().zip(placements).zip(takes(service, placements));
    all.filter(|(_, takes)| *takes)
        .map(|((backend, at), _)| (backend.name.as_str(), backend.weight, at.slot))
        .collect()
}

/// Which backends may take new connections, their weight permitting: those that are up, and reachable as
/// far as any is. If there is none, it is for the service to say whether the checks still count.
fn takes(service: &Service, placements: &[Placement]) -> Vec<bool> {
    let all = || service.backends.iter().zip(placements);
    let reachable = |placement: &Placement| placement.unreachable.is_none();
    if serves(service, placements) {
        return placements.iter().map(Placement::is_usable).collect();
    }
    if service.health.as_ref().is_some_and(|health| health.all_down == AllDown::Stop) {
        return placements.iter().map(|placement| !placement.is_down()).collect();
    }
    let some = all().any(|(backend, placement)| backend.weight > 0 && reachable(placement));
    placements.iter().map(|placement| !some || reachable(placement)).collect()
}

/// Whether there is a backend that new connections are given to because it can serve them.
fn serves(service: &Service, placements: &[Placement]) -> bool {
    let mut all = service.backends.iter().zip(placements);
    all.any(|(backend, placement)| backend.weight > 0 && placement.is_usable())
}

/// Which of a service's backends workers are to know nothing of, as if they had been removed, so that their
/// connections end or go elsewhere: those that have drained, and those that are down.
fn left_to_others(service: &Service, placements: &[Placement]) -> impl Iterator<Item = usize> {
    let let_go = service.health.as_ref().is_some_and(|health| health.on_down != OnDown::Keep);
    let both = placements.iter().zip(takes(service, placements)).enumerate();
    let left =
        both.filter(move |(_, (at, takes))| at.drained || (let_go && at.is_down() && !takes));
    left.map(|(index, _)| index)
}

/// How new connections are placed among these.
fn schedule(scheduler: Scheduler, takers: &[(&str, u16, Slot)]) -> Schedule {
    let taker = |&(_, weight, slot): &(&str, u16, Slot)| Taker { slot, weight };
    let takers: Vec<_> = takers.iter().map(taker).filter(|taker| taker.weight > 0).collect();
    match scheduler {
        Scheduler::Maglev => Schedule::Maglev,
        Scheduler::RoundRobin => Schedule::round_robin(&takers),
        Scheduler::LeastConnections => Schedule::least_connections(&takers),
        Scheduler::Source { timeout_s } => Schedule::source(&takers, timeout_s),
    }
}

fn link(interface: &Interface) -> Link {
    Link { mac: interface.mac, partial_checksums: interface.partial_checksums }
}

/// A service's VIPs at one address, each with its target.
fn at(service: &Service, address: IpAddr) -> impl Iterator<Item = (Vip, u16)> {
    service.ports.iter().map(move |port| {
        let (protocol, number) = (port.published.protocol.number(), port.published.port);
        (Vip { address: address.into(), protocol, port: number }, port.target)
    })
}

/// What services publish that name an address of this node.
fn named(inputs: &Inputs<'_>) -> HashSet<Vip> {
    let named = |service: &Arc<Service>| {
        let address = service.vip.address();
        let own = address.filter(|address| inputs.addresses.contains(address));
        own.into_iter().flat_map(|own| at(service, own)).map(|(vip, _)| vip).collect::<Vec<_>>()
    };
    inputs.desired.services.iter().flat_map(named).collect()
}

/// All VIPs of a service, with their targets. Who names an address has it before who has all.
fn vips(inputs: &Inputs<'_>, named: &HashSet<Vip>, service: &Service) -> Vec<(Vip, u16)> {
    match service.vip {
        desired::Vip::Address(address) => at(service, address).collect(),
        desired::Vip::Node(family) => {
            let own = inputs.addresses.iter().filter(|own| Family::of(**own) == family);
            let all = own.flat_map(|address| at(service, *address));
            all.filter(|(vip, _)| !named.contains(vip)).collect()
        }
    }
}

/// What workers have to know to translate a service's packets.
fn nat(overlays: &[Overlay], service: &Service, targets: Vec<u16>) -> Option<Arc<Nat>> {
    if service.mode != Mode::Nat {
        return None;
    }
    // One without backends is in none, which makes no difference to anybody.
    let vni = service.backends.first().map(|backend| backend.vni);
    let is_its = |(overlay, family): (&Overlay, Family)| {
        Some(overlay.vni) == vni && family == service.vip.family()
    };
    let overlay = referred(overlays).position(is_its).unwrap_or_default();
    let allow = service.allow.iter().map(prefix).collect();
    Some(Arc::new(Nat { overlay: overlay as u32, targets, allow }))
}

fn prefix(network: &IpNet) -> Prefix {
    let above = if network.addr().is_ipv4() { 128 - 32 } else { 0 };
    Prefix { address: network.addr().into(), len: above + network.prefix_len() }
}

fn steer(
    (inputs, meshed): (&Inputs<'_>, &[Meshed]),
    services: &[Arc<Planned>],
    announced: &BTreeSet<IpAddr>,
) -> Steering {
    let mut keys = Steering::new();
    for planned in services {
        for Vip { address, protocol, port } in &planned.vips {
            let (address, protocol, port) = (*address, *protocol, *port);
            keys.insert(steer::Key::Port { address, protocol, port }, 0);
        }
        let Some(vip) = planned.service.vip.address() else { continue };
        // An address that the node itself has keeps its pings, fragments and ARP.
        if !inputs.addresses.contains(&vip) {
            // To answer is to announce, on the network next to us.
            let here = !inputs.announce || announced.contains(&vip);
            let flags = if inputs.answer_arp && here { steer::ANSWER_ARP } else { 0 };
            keys.insert(steer::Key::Address(vip.into()), flags);
        }
    }
    for overlay in inputs.desired.overlays.iter().filter(|_| inputs.nat.is_some()) {
        // Who sends to us chooses which of our addresses it knows us by.
        for address in inputs.addresses {
            let (address, protocol, port) = ((*address).into(), protocol::UDP, overlay.port);
            keys.insert(steer::Key::Port { address, protocol, port }, steer::TUNNEL);
        }
    }
    for Meshed { owner: (vni, address), bank, takes } in meshed {
        // Whoever asks for one that is leaving is to find its next owner.
        let flags = steer::taken(*bank) | if *takes { steer::ANSWER_ARP } else { 0 };
        keys.insert(steer::Key::Mesh { vni: *vni, address: (*address).into() }, flags);
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

/// The way home, to tasks on this very node: as to any other node, but by a link that ends here. `None` if
/// the VTEP is another node's, or there is no such link.
fn way_home(inputs: &Inputs<'_>, vtep: IpAddr) -> Option<Way> {
    let (interface, link) = home(inputs.interfaces)?;
    own_vteps(inputs).any(|own| own == vtep).then(|| Way {
        interface,
        src_mac: link.mac,
        dst_mac: link.home.unwrap_or_default(),
        vlans: Vec::new(),
        mtu: link.mtu,
        src_ip: None,
    })
}

/// The interface that this very node is at the other end of, and which one it is.
fn home(interfaces: &[Interface]) -> Option<(usize, &Interface)> {
    interfaces.iter().enumerate().find(|(_, interface)| interface.home.is_some())
}

/// Where tunnels to this node may end.
fn own_vteps<'a>(inputs: &Inputs<'a>) -> impl Iterator<Item = IpAddr> + 'a {
    let configured = inputs.vtep.into_iter().chain(inputs.vtep6.map(IpAddr::V6));
    let far = home(inputs.interfaces).map_or(&[][..], |(_, link)| &link.addresses[..]);
    configured.chain(inputs.addresses.iter().copied().filter(|own| !far.contains(own)))
}

/// The way to a VTEP: what the operator says of it, else what the kernel says. Or why there is none.
fn way(inputs: &Inputs<'_>, said: &Said<'_>, vtep: IpAddr) -> Result<Way, String> {
    if let Some(way) = way_home(inputs, vtep) {
        return Ok(way);
    }
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
    let is_its = |overlay: &&Overlay| service.mode == Mode::Nat && overlay.vni == backend.vni;
    let overlay = inputs.desired.overlays.iter().find(is_its);
    let tunnel = Tunnel {
        src_mac: way.src_mac,
        dst_mac: way.dst_mac,
        vlans: way.vlans,
        src: src.unwrap_or(unspecified),
        dst: backend.vtep,
        udp_port: backend.port,
        vni: backend.vni.get(),
        inner_dst_mac: backend.mac,
        inner_src_mac: overlay.map_or(way.src_mac, |overlay| overlay.mac),
        inner_v6: service.vip.is_ipv6(),
        udp_checksum: backend.udp_checksum.unwrap_or(v6),
    };
    let template = Template::render(&tunnel).map_err(|source| PlanError::Tunnel {
        service: service.name.clone(),
        backend: backend.name.clone(),
        source,
    })?;
    let fits = way.mtu.saturating_sub(u32::from(Template::overhead(v6)));
    let said = backend.mtu.into_iter().chain(overlay.and_then(|overlay| overlay.mtu));
    let mtu = said.map(u32::from).fold(fits, u32::min);
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
        service: 0,
        mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        link: way.interface as u8,
        reachable: unreachable.is_none(),
    };
    Ok((rendered, unreachable))
}

/// The tunnel's source: what is configured, else what the kernel would take, else the interface's. On the
/// way home it is the link's in any case: the kernel takes nothing that claims to be from itself.
fn source(
    inputs: &Inputs<'_>,
    interface: usize,
    v6: bool,
    routed: Option<IpAddr>,
) -> Option<IpAddr> {
    let link = inputs.interfaces.get(interface);
    let own = link.into_iter().flat_map(|i| i.addresses.iter().copied());
    let configured = [inputs.vtep, inputs.vtep6.map(IpAddr::V6)].into_iter().flatten();
    let configured = configured.filter(|_| link.is_none_or(|link| link.home.is_none()));
    let mut all = configured.chain(routed).chain(own);
    all.find(|address| address.is_ipv6() == v6)
}

fn no_source(inputs: &Inputs<'_>, interface: usize, v6: bool) -> String {
    if inputs.interfaces.get(interface).is_some_and(|link| link.home.is_some()) {
        return "a backend on this very node is reached over IPv4 only: give it an IPv4 vtep"
            .to_owned();
    }
    let (family, key) = if v6 { ("IPv6", "node.vtep6") } else { ("IPv4", "node.vtep") };
    let interface = inputs.interfaces.get(interface).map_or("the interface", |i| &i.name);
    format!("{interface} has no {family} address to send tunnels from: give it one, or set {key}")
}

#[cfg(test)]
mod tests;
