//! Which backend a flow goes to: its service, then the connection table, then the service's scheduler, or
//! Maglev.
//!
//! Touches only its arguments, so `explain` runs the very same function on a scratch table.

use crate::{
    connections::{Connections, Found, Remembered, Settled, Traffic, Verdict},
    counters::{Counters, DropReason, Event},
    flow::{Address, Flow, FlowKey, Kind, protocol},
    forwarding::{Backend, Forwarding, Service, Slot, Vip},
    nat::Slots,
    schedule::{Scheduler, Sight},
    time::Tick,
};

/// How a backend was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// The connection was remembered.
    Remembered,
    /// Another worker remembers the connection that an ICMP error is about.
    RememberedElsewhere,
    /// Maglev: the connection is new, or was forgotten.
    Maglev,
    /// The service's scheduler: the connection is new.
    Scheduled,
    /// Maglev: the backend that was remembered is gone.
    Reselected,
}

/// A backend, and how it was found.
#[derive(Clone, Copy, Debug)]
pub struct Selected<'a> {
    /// The backend's slot.
    pub slot: Slot,
    /// The backend.
    pub backend: &'a Backend,
    /// Why this one.
    pub how: How,
}

/// What `select` works with besides the flow and the snapshot.
#[derive(Debug)]
pub struct Context<'a> {
    /// The worker's own table.
    pub connections: &'a mut Connections,
    /// What the worker places new connections by; it knows the other workers' tables.
    pub scheduler: &'a mut Scheduler,
    /// The worker's counters.
    pub counters: &'a Counters,
    /// Now.
    now: Tick,
    settled: Settled,
    asked: Asked,
}

/// What was last asked of the table of VIPs: most packets of a burst that have to ask are for one, above all in a
/// flood.
#[derive(Clone, Copy, Debug)]
struct Asked {
    vip: Vip,
    service: Option<u32>,
    /// The same service, if it is translated.
    translated: Option<u32>,
}

impl<'a> Context<'a> {
    /// What packets that come now are selected with, all by the same snapshot.
    pub fn new(
        connections: &'a mut Connections,
        scheduler: &'a mut Scheduler,
        counters: &'a Counters,
        now: Tick,
    ) -> Self {
        let vip = Vip { address: Address::default(), protocol: 0, port: 0 };
        let asked = Asked { vip, service: None, translated: None };
        Self { connections, scheduler, counters, now, settled: Settled::at(now), asked }
    }

    /// When this is.
    pub fn now(&self) -> Tick {
        self.now
    }

    /// The service that answers on this VIP, as an index.
    #[inline(always)]
    pub(crate) fn service_at(&mut self, forwarding: &Forwarding, vip: Vip) -> Option<u32> {
        self.ask(forwarding, vip);
        self.asked.service
    }

    /// The same, if its packets are translated.
    #[inline(always)]
    pub(crate) fn translated_at(&mut self, forwarding: &Forwarding, vip: Vip) -> Option<u32> {
        self.ask(forwarding, vip);
        self.asked.translated
    }

    #[inline(always)]
    fn ask(&mut self, forwarding: &Forwarding, vip: Vip) {
        if self.asked.vip != vip {
            let service = forwarding.service_at(vip.address, vip.protocol, vip.port);
            let is_translated =
                |index: &u32| forwarding.service(*index).is_some_and(|its| its.nat.is_some());
            self.asked = Asked { vip, service, translated: service.filter(is_translated) };
        }
    }

    /// The backend that the service's scheduler wants for a new flow. `None`: it leaves that to Maglev.
    fn choose<'f>(
        &self,
        sight: Sight<'_>,
        forwarding: &'f Forwarding,
    ) -> Option<(Slot, &'f Backend)> {
        let slot = self.scheduler.choose(sight, self.connections)?;
        Some((slot, forwarding.backend(slot)?))
    }

    /// Whether this service answers on the flow's VIP. Apart, so that those who need not ask have the registers to
    /// themselves.
    #[inline(never)]
    fn is_served_by(&mut self, service: u32, forwarding: &Forwarding, flow: &Flow) -> bool {
        self.service_at(forwarding, vip(flow)) == Some(service)
    }
}

/// Selects the backend for a packet or an ICMP error. `hash` is the flow's, by the tables' key.
///
/// # Errors
/// If there is no such service, or it has no backend that can take the packet.
pub fn select<'a>(
    flow: &Flow,
    hash: u64,
    forwarding: &'a Forwarding,
    context: &mut Context<'_>,
) -> Result<Selected<'a>, DropReason> {
    match settled(flow, hash, forwarding, context) {
        Some(selected) => Ok(selected),
        None => unsettled(flow, hash, forwarding, context),
    }
}

/// The first half of [`select`]: what nearly every packet is, one of a connection in which it changes nothing.
/// `None` says nothing.
#[inline(always)]
pub fn settled<'a>(
    flow: &Flow,
    hash: u64,
    forwarding: &'a Forwarding,
    context: &mut Context<'_>,
) -> Option<Selected<'a>> {
    if flow.kind != Kind::IcmpError
        && let Some(slot) = context.connections.settled(hash, flow, &context.settled)
        && let Some((backend, is_first_vip)) = forwarding.backend_for(slot, vip(flow))
        && (is_first_vip || context.is_served_by(backend.service, forwarding, flow))
        && backend.reachable
    {
        context.counters.count(Event::ConnectionHits, 1);
        return Some(Selected { slot, backend, how: How::Remembered });
    }
    None
}

/// The other half, right for any packet. Apart, so that settled connections' packets have the registers to
/// themselves.
///
/// # Errors
/// As [`select`].
#[inline(never)]
pub fn unsettled<'a>(
    flow: &Flow,
    hash: u64,
    forwarding: &'a Forwarding,
    context: &mut Context<'_>,
) -> Result<Selected<'a>, DropReason> {
    let traffic = Traffic::of(flow);
    let service = context.service_at(forwarding, vip(flow));
    let judge = move |slot: Slot| match forwarding.backend(slot) {
        None => Verdict::Gone,
        Some(backend) if Some(backend.service) != service => Verdict::Stranger,
        // TCP waits for a backend's return and retransmits; datagrams would be lost for as long as they
        // come. Maglev has no unreachable backend unless all are.
        Some(backend) if !backend.reachable && traffic == Traffic::Datagram => Verdict::Gone,
        Some(backend) => Verdict::Serves((slot, backend)),
    };
    if flow.kind == Kind::IcmpError {
        return select_for_error(hash, flow, (forwarding, service), context, judge);
    }

    // A new connection gets a new decision, whatever its addresses and ports meant before.
    let mut how = How::Maglev;
    let mut is_new = false;
    if traffic != Traffic::Syn {
        match context.connections.find(hash, context.now, judge) {
            Found::Live((slot, backend), place) => {
                context.connections.touch(place, traffic, context.now);
                context.counters.count(Event::ConnectionHits, 1);
                return Ok(Selected { slot, backend, how: How::Remembered });
            }
            Found::Orphan => how = How::Reselected,
            Found::Nothing => is_new = true,
        }
    }
    let service =
        service.and_then(|index| forwarding.service(index)).ok_or(DropReason::NoService)?;
    if how == How::Reselected && service.resets && flow.protocol == protocol::TCP {
        return Err(DropReason::BackendGone);
    }
    if !service.schedule.is_plain() && matches!(traffic, Traffic::Syn | Traffic::Datagram) {
        return begin(flow, hash, (forwarding, service), how, context, judge);
    }
    let Picked { slot, backend, .. } = pick(flow, forwarding, service)?;
    context.counters.count(Event::ConnectionMisses, 1);
    let remembered = if is_new {
        context.connections.remember_new(hash, slot, traffic, context.now)
    } else {
        context.connections.remember(hash, slot, traffic, context.now)
    };
    count(remembered, how, context.counters);
    Ok(Selected { slot, backend, how })
}

/// A flow begins in a service with a scheduler of its own. Where the scheduler puts it is where it stays only
/// if it is remembered: else its next packet is Maglev's, and so is this one.
#[inline(never)]
fn begin<'a>(
    flow: &Flow,
    hash: u64,
    (forwarding, service): (&'a Forwarding, &'a Service),
    mut how: How,
    context: &mut Context<'_>,
    judge: impl Fn(Slot) -> Verdict<(Slot, &'a Backend)> + Copy,
) -> Result<Selected<'a>, DropReason> {
    let (traffic, now) = (Traffic::of(flow), context.now);
    // A SYN that is said again must not have another turn: the client may hold the first one's answer by
    // now. Nor may one that anybody can forge move a connection.
    if traffic == Traffic::Syn
        && let Found::Live((slot, backend), place) = context.connections.find(hash, now, judge)
        && place.is_open()
        && backend.reachable
    {
        if place.is_opening() {
            context.connections.remember(hash, slot, traffic, now);
        }
        context.counters.count(Event::ConnectionHits, 1);
        return Ok(Selected { slot, backend, how: How::Remembered });
    }
    let picked = pick(flow, forwarding, service)?;
    let sight = Sight { service, key: &flow.key, maglev_hash: picked.hash, now, slots: None };
    let chosen = context.choose(sight, forwarding);
    let (slot, backend) = chosen.unwrap_or((picked.slot, picked.backend));
    context.counters.count(Event::ConnectionMisses, 1);
    let remembered = context.connections.remember(hash, slot, traffic, now);
    count(remembered, how, context.counters);
    if matches!(remembered, Remembered::Full | Remembered::NotAdmitted) {
        return Ok(Selected { slot: picked.slot, backend: picked.backend, how });
    }
    context.scheduler.placed(sight, (slot, traffic), context.connections);
    if chosen.is_some() && how == How::Maglev {
        how = How::Scheduled;
    }
    Ok(Selected { slot, backend, how })
}

/// Counts what became of a flow that was not found.
#[inline(always)]
fn count(remembered: Remembered, how: How, counters: &Counters) {
    let event = match remembered {
        Remembered::Inserted | Remembered::Evicted => Event::ConnectionInserts,
        Remembered::Renewed if how == How::Reselected => Event::ConnectionReselects,
        Remembered::Renewed => return,
        Remembered::Full => Event::ConnectionTableFull,
        Remembered::NotAdmitted => Event::ConnectionNotAdmitted,
    };
    counters.count(event, 1);
    if remembered == Remembered::Evicted {
        counters.count(Event::ConnectionEvictions, 1);
    }
}

/// What the packet is for.
#[inline(always)]
fn vip(flow: &Flow) -> Vip {
    vip_of(&flow.key)
}

/// What the flow is for.
#[inline(always)]
pub(crate) fn vip_of(key: &FlowKey) -> Vip {
    Vip { address: key.dst, protocol: key.protocol, port: key.dst_port }
}

/// Places a new flow of a service whose connections are remembered elsewhere: `remember` is told the backend.
///
/// # Errors
/// If the service has no backend, or the flow can't be remembered.
pub fn place<'a, T>(
    flow: &Flow,
    (forwarding, service, slots): (&'a Forwarding, &'a Service, &Slots),
    context: &mut Context<'_>,
    remember: impl FnOnce(Slot) -> Option<T>,
) -> Result<(Slot, &'a Backend, T), DropReason> {
    let picked = pick(flow, forwarding, service)?;
    let (now, slots) = (context.now, Some(slots));
    let sight = Sight { service, key: &flow.key, maglev_hash: picked.hash, now, slots };
    let chosen = context.choose(sight, forwarding);
    let (slot, backend) = chosen.unwrap_or((picked.slot, picked.backend));
    let remembered = remember(slot).ok_or(DropReason::NatExhausted)?;
    context.scheduler.placed(sight, (slot, Traffic::of(flow)), context.connections);
    Ok((slot, backend, remembered))
}

/// An ICMP error comes from anywhere and lands on any queue: the flow it quotes may be another worker's.
/// It tells nothing about the connection, so nothing is remembered.
#[cold]
fn select_for_error<'a>(
    hash: u64,
    flow: &Flow,
    (forwarding, service): (&'a Forwarding, Option<u32>),
    context: &Context<'_>,
    judge: impl Fn(Slot) -> Verdict<(Slot, &'a Backend)> + Copy,
) -> Result<Selected<'a>, DropReason> {
    if let Found::Live((slot, backend), _) = context.connections.find(hash, context.now, judge) {
        return Ok(Selected { slot, backend, how: How::Remembered });
    }
    let elsewhere =
        context.scheduler.peers().iter().find_map(|peer| peer.find(hash, context.now, judge));
    if let Some((slot, backend)) = elsewhere {
        return Ok(Selected { slot, backend, how: How::RememberedElsewhere });
    }
    let service = service.and_then(|index| forwarding.service(index));
    let service = service.ok_or(DropReason::IcmpUnmatched)?;
    let Picked { slot, backend, .. } = pick(flow, forwarding, service)?;
    Ok(Selected { slot, backend, how: How::Maglev })
}

/// Whether the backend that Maglev has for a flow can be reached: it has no other unless none can.
#[cold]
pub(crate) fn is_anybody_there(flow: &Flow, forwarding: &Forwarding, service: u32) -> bool {
    let picked = forwarding.service(service).map(|service| pick(flow, forwarding, service));
    picked.is_some_and(|picked| picked.is_ok_and(|picked| picked.backend.reachable))
}

/// Maglev's answer.
struct Picked<'a> {
    slot: Slot,
    backend: &'a Backend,
    /// What it was asked with.
    hash: u64,
}

/// Asks Maglev, which answers alike on every worker and node (I5).
#[inline(always)]
fn pick<'a>(
    flow: &Flow,
    forwarding: &'a Forwarding,
    service: &Service,
) -> Result<Picked<'a>, DropReason> {
    let hash = service.schedule.maglev_hash(&flow.key, forwarding.maglev_key());
    let slot = service.maglev.pick(hash).ok_or(DropReason::NoBackend)?;
    let backend = forwarding.backend(slot).ok_or(DropReason::NoBackend)?;
    Ok(Picked { slot, backend, hash })
}
