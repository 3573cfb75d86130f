//! Which backend a flow goes to: its service, then the connection table, then the service's scheduler, or
//! Maglev.
//!
//! Touches only its arguments, so `explain` runs the very same function on a scratch table.

use crate::{
    connections::{Connections, Found, Remembered, Settled, Traffic, Verdict},
    counters::{Counters, DropReason, Event},
    flow::{Flow, Kind},
    forwarding::{Backend, Forwarding, Service, Slot, Vip},
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
}

impl<'a> Context<'a> {
    /// What packets that come now are selected with.
    pub fn new(
        connections: &'a mut Connections,
        scheduler: &'a mut Scheduler,
        counters: &'a Counters,
        now: Tick,
    ) -> Self {
        Self { connections, scheduler, counters, now, settled: Settled::at(now) }
    }

    /// When this is.
    pub fn now(&self) -> Tick {
        self.now
    }
}

/// Selects the backend for a packet or an ICMP error. `hash` is the flow's, by the tables' key.
///
/// # Errors
/// If there is no such service, or it has no backend that can take the packet.
#[inline(always)]
pub fn select<'a>(
    flow: &Flow,
    hash: u64,
    forwarding: &'a Forwarding,
    context: &mut Context<'_>,
) -> Result<Selected<'a>, DropReason> {
    if flow.kind != Kind::IcmpError
        && let Some(slot) = context.connections.settled(hash, flow, &context.settled)
        && let Some((backend, true)) = forwarding.backend_for(slot, vip(flow))
        && backend.reachable
    {
        context.counters.count(Event::ConnectionHits, 1);
        return Ok(Selected { slot, backend, how: How::Remembered });
    }
    select_unsettled(flow, hash, forwarding, context)
}

/// The rest, apart, so that settled connections' packets have the registers to themselves.
#[inline(never)]
fn select_unsettled<'a>(
    flow: &Flow,
    hash: u64,
    forwarding: &'a Forwarding,
    context: &mut Context<'_>,
) -> Result<Selected<'a>, DropReason> {
    let traffic = Traffic::of(flow);
    let vip = vip(flow);
    let judge = move |slot: Slot| match forwarding.backend_for(slot, vip) {
        // TCP waits for a backend's return and retransmits; datagrams would be lost for as long as they
        // come. Maglev has no unreachable backend unless all are.
        Some((backend, _)) if !backend.reachable && traffic == Traffic::Datagram => Verdict::Gone,
        Some((backend, true)) => Verdict::Serves((slot, backend)),
        Some((_, false)) => Verdict::Stranger,
        None => Verdict::Gone,
    };
    if flow.kind == Kind::IcmpError {
        return select_for_error(hash, flow, forwarding, context, judge);
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
    let service = service(flow, forwarding, DropReason::NoService)?;
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
    let (key, maglev_hash) = (&flow.key, picked.hash);
    let sight = Sight { service, key, maglev_hash, now };
    let chosen = context.scheduler.choose(sight, context.connections);
    let chosen = chosen.and_then(|slot| Some((slot, forwarding.backend(slot)?)));
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
    let key = &flow.key;
    Vip { address: key.dst, protocol: key.protocol, port: key.dst_port }
}

/// An ICMP error comes from anywhere and lands on any queue: the flow it quotes may be another worker's.
/// It tells nothing about the connection, so nothing is remembered.
#[cold]
fn select_for_error<'a>(
    hash: u64,
    flow: &Flow,
    forwarding: &'a Forwarding,
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
    let service = service(flow, forwarding, DropReason::IcmpUnmatched)?;
    let Picked { slot, backend, .. } = pick(flow, forwarding, service)?;
    Ok(Selected { slot, backend, how: How::Maglev })
}

/// The service that the packet is for. `missing` is the error if there is none.
#[inline(always)]
fn service<'a>(
    flow: &Flow,
    forwarding: &'a Forwarding,
    missing: DropReason,
) -> Result<&'a Service, DropReason> {
    let Vip { address, protocol, port } = vip(flow);
    let service = forwarding.service_at(address, protocol, port);
    service.and_then(|service| forwarding.service(service)).ok_or(missing)
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
