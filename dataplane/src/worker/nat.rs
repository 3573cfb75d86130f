//! The stages of full NAT: which slot a packet has, and its translation in place. What goes to a task leaves as
//! if its sender had spoken to the task; what a task answers has come out of its tunnel before.

use zerocopy::FromBytes;

use super::{Burst, Next, Packet, can_be_answered};
use crate::{
    counters::{DropReason, Event},
    encap,
    flow::{FlowKey, Kind, protocol, tcp_flags},
    forwarding::{self, Backend, Service, Slot},
    fragment,
    nat::{Connection, Id, Side, Slots, State, translate},
    parse,
    port::{Frame, Frames, Pool},
    reply, select,
    wire::{udp, vxlan},
};

/// A slot that is good for a packet.
struct Placed<'a> {
    id: Id,
    state: State,
    slot: Slot,
    backend: &'a Backend,
}

impl<'a> Burst<'a> {
    /// Says what is next for a packet that a backend would be selected for, if it is NAT's.
    fn classify_nat(&mut self, slots: &Slots, frame: &mut Frame, packet: &mut Packet) {
        let Packet { flow, hash, next, .. } = packet;
        if flow.kind == Kind::Packet
            && flow.protocol == protocol::UDP
            && self.forwarding.is_tunnel_port(flow.key.dst_port)
        {
            packet.next = match self.open_tunnel(slots, frame, packet) {
                Ok(next) => next,
                Err(reason) => Next::Drop(reason),
            };
        } else if self.nat_service(&flow.key).is_some() {
            slots.prefetch(*hash);
            *next = Next::Translate;
        }
    }

    /// The service of a client's packet, if it is translated, and its number.
    #[inline]
    fn nat_service(&mut self, key: &FlowKey) -> Option<(u32, &'a Service, &'a forwarding::Nat)> {
        let index = self.context.service_at(self.forwarding, select::vip_of(key))?;
        let service = self.forwarding.service(index)?;
        Some((index, service, service.nat.as_deref()?))
    }

    /// Takes the tunnel's headers off, and looks what is inside.
    fn open_tunnel(
        &self,
        slots: &Slots,
        frame: &mut Frame,
        packet: &mut Packet,
    ) -> Result<Next, DropReason> {
        let flow = &packet.flow;
        let udp_port = flow.key.dst_port;
        frame.set_len(usize::from(flow.ip_offset) + usize::from(flow.ip_len)); // less padding
        let at = usize::from(flow.l4_offset) + udp::LEN;
        let rest = frame.packet().get(at..).ok_or(DropReason::Truncated)?;
        let (header, _) =
            vxlan::Header::ref_from_prefix(rest).map_err(|_| DropReason::Truncated)?;
        let (has_vni, vni) = (header.flags & vxlan::VALID_VNI != 0, header.vni());
        let mut overlays = self.forwarding.overlays().iter();
        let overlay = overlays
            .find(|overlay| has_vni && overlay.vni == vni && overlay.udp_port == udp_port)
            .ok_or(DropReason::NatUnmatched)?;
        let outer = *flow;
        packet.outer = outer.key.src;
        let outer_len = at + vxlan::LEN;
        frame.shrink_front(outer_len);
        packet.flow = parse::flow(frame.packet())?;
        let flow = &packet.flow;
        let mut mesh = overlay.mesh.iter();
        let mesh =
            mesh.find(|mesh| mesh.address == flow.key.dst).ok_or(DropReason::NatUnmatched)?;
        match flow.kind {
            Kind::Packet | Kind::IcmpError if translate::is_translatable(flow) => {
                let id = Id::new(mesh.bank, flow.key.dst_port);
                slots.prefetch_slot(id);
                Ok(Next::Return(id))
            }
            Kind::Arp | Kind::NeighbourSolicitation => {
                match flow.kind {
                    Kind::Arp => reply::arp(frame, flow, overlay.mac)?,
                    _ => reply::neighbour(frame, flow, overlay.mac)?,
                }
                frame.grow_front(outer_len).ok_or(DropReason::NoHeadroom)?;
                reply::tunnel(frame, &outer, self.link.mac);
                self.context.counters.count(Event::NeighbourReplies, 1);
                Ok(Next::Send(self.ingress))
            }
            _ => Err(DropReason::NatUnmatched),
        }
    }

    /// Takes what is NAT's out of its tunnel, and translates what has a slot or gets one.
    #[inline(never)]
    pub(super) fn translate(
        &mut self,
        slots: &Slots,
        inbound: &mut Frames,
        packets: &mut [Packet],
    ) {
        for (frame, packet) in inbound.iter_mut().zip(&mut *packets) {
            if packet.next == Next::Select {
                self.classify_nat(slots, frame, packet);
            }
        }
        for packet in &*packets {
            if packet.next == Next::Translate {
                slots.prefetch_found(packet.hash);
            }
        }
        for (frame, packet) in inbound.iter_mut().zip(packets) {
            let next = match packet.next {
                Next::Translate => self.to_task(slots, frame, packet),
                Next::Return(id) => self.to_client(slots, id, frame, packet),
                _ => continue,
            };
            packet.next = next.unwrap_or_else(Next::Drop);
        }
    }

    /// A client's packet becomes one to its task.
    #[inline]
    fn to_task(
        &mut self,
        slots: &Slots,
        frame: &mut Frame,
        packet: &mut Packet,
    ) -> Result<Next, DropReason> {
        let flow = &packet.flow;
        if flow.kind == Kind::IcmpError {
            return self.error_to_task(slots, frame, packet);
        }
        self.complete(frame, packet);
        let placed = match self.find(slots, packet) {
            Ok(Some(placed)) => placed,
            Ok(None) => self.open(slots, frame, packet)?,
            Err(reason) => return Ok(Next::Refuse(reason)),
        };
        let Placed { id, state, slot, backend } = placed;
        if flow.ip_len > backend.mtu && !fragment::can_cut(flow, backend.mtu) {
            return Ok(Next::Shrink(slot));
        }
        let way = translate::way_of(frame.packet(), flow.ip_offset, self.link_index);
        let to = slots.to_task(id, state, &way).ok_or(DropReason::NatUnmatched)?;
        let [port, task_port] = to.ports;
        translate::packet(frame, flow, (to.mesh, port), (to.task, task_port), to.sums);
        if flow.is_syn() {
            translate::clamp_mss(frame, flow, backend.mtu);
        }
        slots.touch(id, state, Side::Client, flow.tcp_flags, self.context.now());
        Ok(if flow.ip_len > backend.mtu { Next::Shrink(slot) } else { Next::Wrap(slot) })
    }

    /// Completes a checksum that the sender left to its network card: what is known of it is of the packet as
    /// it came.
    #[inline]
    fn complete(&self, frame: &mut Frame, packet: &Packet) {
        if self.link.partial_checksums && encap::complete_checksum(frame.packet_mut(), &packet.flow)
        {
            self.context.counters.count(Event::ChecksumsCompleted, 1);
        }
    }

    /// The slot of a client's packet. `None` if it begins a new connection; an error if it belongs to none.
    #[inline]
    fn find(&mut self, slots: &Slots, packet: &Packet) -> Result<Option<Placed<'a>>, DropReason> {
        let Packet { flow, hash, .. } = packet;
        let is_datagram = flow.protocol == protocol::UDP;
        let begins = is_datagram || flow.is_syn();
        let Some((id, state)) = slots.find(*hash, &flow.key) else {
            return if begins { Ok(None) } else { Err(DropReason::NatNoConnection) };
        };
        let (index, ..) = self.nat_service(&flow.key).ok_or(DropReason::NoService)?;
        let serves = |slot: &Slot| Some((*slot, self.forwarding.backend(*slot)?));
        let alive = slots.backend(id, state).as_ref().and_then(serves);
        let alive = alive.filter(|(_, backend)| backend.service == index);
        match alive {
            // The client uses its port again: nothing of what was counts.
            Some(_) if flow.is_syn() && state.is_closed() => {}
            // TCP waits for a task's return and retransmits; datagrams would be lost.
            Some((_, backend)) if is_datagram && !backend.reachable => {}
            Some((slot, backend)) => {
                self.context.counters.count(Event::ConnectionHits, 1);
                return Ok(Some(Placed { id, state, slot, backend }));
            }
            None if begins => {}
            None => {
                slots.reset(id, state, self.context.now());
                return Err(DropReason::NoBackend);
            }
        }
        slots.detach(id, state);
        Ok(None)
    }

    /// A slot for a new connection.
    #[inline(never)]
    fn open(
        &mut self,
        slots: &Slots,
        frame: &Frame,
        packet: &Packet,
    ) -> Result<Placed<'a>, DropReason> {
        let Packet { flow, hash, .. } = packet;
        let key = flow.key;
        let (_, service, nat) = self.nat_service(&key).ok_or(DropReason::NoService)?;
        if !nat.allows(key.src) {
            return Err(DropReason::NotAllowed);
        }
        let overlay = self.forwarding.overlays().get(nat.overlay as usize);
        let overlay = overlay.ok_or(DropReason::NoService)?;
        let at = service.vips.iter().position(|vip| *vip == select::vip_of(&key));
        // A VIP on all ports keeps them.
        let task_port = at.and_then(|at| nat.targets.get(at).copied()).unwrap_or(key.dst_port);
        let way = translate::way_of(frame.packet(), flow.ip_offset, self.link_index);
        let now = self.context.now();
        let (id, state, slot, backend) =
            select::place(flow, (self.forwarding, service), &mut self.context, |slot| {
                let task = self.forwarding.task(slot)?;
                slots.open(&overlay.mesh, *hash, now, |mesh| Connection {
                    key,
                    task,
                    task_port,
                    mesh,
                    backend: slot,
                    way,
                })
            })
            .map(|(slot, backend, (id, state))| (id, state, slot, backend))?;
        self.context.counters.count(Event::ConnectionMisses, 1);
        self.context.counters.count(Event::ConnectionInserts, 1);
        Ok(Placed { id, state, slot, backend })
    }

    /// An error about what a client was sent becomes one about what its task has sent.
    #[cold]
    fn error_to_task(
        &mut self,
        slots: &Slots,
        frame: &mut Frame,
        packet: &mut Packet,
    ) -> Result<Next, DropReason> {
        let Packet { flow, hash, .. } = packet;
        let (id, state) = slots.find(*hash, &flow.key).ok_or(DropReason::IcmpUnmatched)?;
        let slot = slots.backend(id, state).ok_or(DropReason::IcmpUnmatched)?;
        let (_, Connection { task, task_port, mesh, way, .. }) =
            slots.connection(id).ok_or(DropReason::IcmpUnmatched)?;
        let to = slots.to_task(id, state, &way).ok_or(DropReason::IcmpUnmatched)?;
        let quoted = ((task, task_port), (mesh, id.port()));
        translate::icmp_error(frame, flow, (mesh, task), quoted, to.sums)?;
        self.context.counters.count(Event::IcmpErrorsForwarded, 1);
        let backend = self.forwarding.backend(slot).ok_or(DropReason::NoBackend)?;
        Ok(if flow.ip_len > backend.mtu { Next::Shrink(slot) } else { Next::Wrap(slot) })
    }

    /// What a task sent becomes what the VIP says.
    #[inline]
    fn to_client(
        &mut self,
        slots: &Slots,
        id: Id,
        frame: &mut Frame,
        packet: &mut Packet,
    ) -> Result<Next, DropReason> {
        let flow = &packet.flow;
        let (state, to) = slots.to_client(id, &flow.key).ok_or(DropReason::NatUnmatched)?;
        let backend = self.forwarding.backend(to.backend).ok_or(DropReason::NoBackend)?;
        if backend.template.far_end() != packet.outer {
            return Err(DropReason::SpoofedTunnel);
        }
        let (client, vip) = ((to.key.src, to.key.src_port), (to.key.dst, to.key.dst_port));
        if flow.kind == Kind::IcmpError {
            let quoted = (client, vip);
            translate::icmp_error(frame, flow, (vip.0, client.0), quoted, to.sums)?;
            self.context.counters.count(Event::IcmpErrorsForwarded, 1);
        } else {
            self.complete(frame, packet);
            translate::packet(frame, flow, vip, client, to.sums);
            if flow.tcp_flags & tcp_flags::SYN != 0 {
                translate::clamp_mss(frame, flow, backend.mtu);
            }
            slots.touch(id, state, Side::Task, flow.tcp_flags, self.context.now());
        }
        let link = usize::from(to.way.link);
        let port = *self.egress.get(link).ok_or(DropReason::NextHopUnresolved)?;
        if port == super::NO_PORT {
            return Err(DropReason::NextHopUnresolved);
        }
        let own = self.forwarding.link(link).mac;
        translate::send_by(frame, flow, &to.way, own)?;
        self.context.counters.count(Event::NatReplies, 1);
        Ok(Next::Send(port))
    }

    /// Tells the sender that there is no such connection.
    #[cold]
    pub(super) fn refuse(&mut self, mut frame: Frame, packet: &Packet, reason: DropReason) {
        let flow = &packet.flow;
        let tell = flow.protocol == protocol::TCP
            && flow.tcp_flags & tcp_flags::RST == 0
            && can_be_answered(flow)
            && self.icmp_limit.take(self.context.now());
        if !tell || reply::reset(&mut frame, flow, self.link.mac).is_err() {
            return self.discard(frame, reason);
        }
        self.context.counters.dropped(reason);
        self.context.counters.count(Event::ResetsSent, 1);
        self.send(frame, self.ingress);
    }
}

/// A client whose task is gone and that waits for an answer would wait for ever: it is made to speak, and then
/// told. It acknowledges a segment that is none of its connection's (RFC 9293 section 3.10.7.4), and that
/// acknowledgement says which reset it would believe.
pub(super) fn ask_client(
    slots: &Slots,
    (id, state): (Id, State),
    (forwarding, now): (&forwarding::Forwarding, crate::time::Tick),
    pool: &mut Pool,
) -> Option<(Frame, u8)> {
    if !slots.is_to_be_asked(state, now) || forwarding.backend(slots.backend(id, state)?).is_some()
    {
        return None;
    }
    let (_, connection) = slots.connection(id)?;
    let mut frame = pool.take()?;
    slots.asked(id, state, now);
    let link = connection.way.link;
    let own = forwarding.link(usize::from(link)).mac;
    match reply::keepalive(&mut frame, &connection.key, &connection.way, own) {
        Ok(()) => Some((frame, link)),
        Err(_) => {
            pool.put(frame);
            None
        }
    }
}
