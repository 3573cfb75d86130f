//! Which backend a flow goes to: its service, then the connection table, then Maglev.
//!
//! Touches only its arguments, so `explain` runs the very same function on a scratch table.

use crate::{
    connections::{Connections, Found, Reader, Remembered, Traffic, Verdict},
    counters::{Counters, DropReason, Event},
    flow::{Flow, Kind},
    forwarding::{Backend, Forwarding, Slot},
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
    /// The other workers' tables.
    pub peers: &'a [Reader],
    /// The worker's counters.
    pub counters: &'a Counters,
    /// Now.
    pub now: Tick,
}

/// Selects the backend for a packet or an ICMP error. `hash` is the flow's, by the tables' key.
///
/// # Errors
/// If there is no such service, or it has no backend that can take the packet.
#[inline]
pub fn select<'a>(
    flow: &Flow,
    hash: u64,
    forwarding: &'a Forwarding,
    context: &mut Context<'_>,
) -> Result<Selected<'a>, DropReason> {
    let key = &flow.key;
    let error = flow.kind == Kind::IcmpError;
    let missing = if error { DropReason::IcmpUnmatched } else { DropReason::NoService };
    let service = forwarding.service_at(key.dst, key.protocol, key.dst_port).ok_or(missing)?;
    let traffic = Traffic::of(flow);
    let judge = |slot: Slot| match forwarding.backend(slot) {
        // TCP waits for a backend's return and retransmits; datagrams would be lost for as long as they
        // come. Maglev has no unreachable backend unless all are.
        Some(backend) if !backend.reachable && traffic == Traffic::Datagram => Verdict::Gone,
        Some(backend) if backend.service == service => Verdict::Serves,
        Some(_) => Verdict::Stranger,
        None => Verdict::Gone,
    };
    if error {
        return select_for_error(hash, flow, service, forwarding, context, judge);
    }

    // A new connection gets a new decision, whatever its addresses and ports meant before.
    let mut how = How::Maglev;
    if traffic != Traffic::Syn {
        match context.connections.find(hash, context.now, judge) {
            Found::Live(slot, place) => {
                context.connections.touch(place, traffic, context.now);
                context.counters.count(Event::ConnectionHits, 1);
                let backend = forwarding.backend(slot).ok_or(DropReason::NoBackend)?;
                return Ok(Selected { slot, backend, how: How::Remembered });
            }
            Found::Orphan => how = How::Reselected,
            Found::Nothing => {}
        }
    }
    let (slot, backend) = pick(flow, service, forwarding)?;
    context.counters.count(Event::ConnectionMisses, 1);
    let remembered = context.connections.remember(hash, slot, traffic, context.now);
    context.counters.count(
        match remembered {
            Remembered::Inserted | Remembered::Evicted => Event::ConnectionInserts,
            Remembered::Renewed if how == How::Reselected => Event::ConnectionReselects,
            Remembered::Renewed => return Ok(Selected { slot, backend, how }),
            Remembered::Full => Event::ConnectionTableFull,
        },
        1,
    );
    if remembered == Remembered::Evicted {
        context.counters.count(Event::ConnectionEvictions, 1);
    }
    Ok(Selected { slot, backend, how })
}

/// An ICMP error comes from anywhere and lands on any queue: the flow it quotes may be another worker's.
/// It tells nothing about the connection, so nothing is remembered.
#[cold]
fn select_for_error<'a>(
    hash: u64,
    flow: &Flow,
    service: u32,
    forwarding: &'a Forwarding,
    context: &Context<'_>,
    judge: impl Fn(Slot) -> Verdict + Copy,
) -> Result<Selected<'a>, DropReason> {
    let own = context.connections.find(hash, context.now, judge);
    let elsewhere = || context.peers.iter().map(|peer| peer.find(hash, context.now, judge));
    let mut found = std::iter::once((own, How::Remembered))
        .chain(elsewhere().map(|found| (found, How::RememberedElsewhere)));
    let live = found.find_map(|(found, how)| match found {
        Found::Live(slot, _) => Some((slot, how)),
        _ => None,
    });
    if let Some((slot, how)) = live {
        let backend = forwarding.backend(slot).ok_or(DropReason::NoBackend)?;
        return Ok(Selected { slot, backend, how });
    }
    let (slot, backend) = pick(flow, service, forwarding)?;
    Ok(Selected { slot, backend, how: How::Maglev })
}

/// Asks Maglev, which answers alike on every worker and node (I5).
#[inline]
fn pick<'a>(
    flow: &Flow,
    service: u32,
    forwarding: &'a Forwarding,
) -> Result<(Slot, &'a Backend), DropReason> {
    let hash = flow.key.hash(forwarding.maglev_key());
    let slot = forwarding.service(service).and_then(|service| service.maglev.pick(hash));
    let slot = slot.ok_or(DropReason::NoBackend)?;
    let backend = forwarding.backend(slot).ok_or(DropReason::NoBackend)?;
    Ok((slot, backend))
}
