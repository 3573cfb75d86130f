//! The stages of full NAT: which slot a packet has, and its translation in place. What goes to a task leaves as
//! if its sender had spoken to the task; what a task answers has come out of its tunnel before.

use zerocopy::FromBytes;

use super::{Burst, Next, Packet, can_be_answered};
use crate::{
    counters::{DropReason, Event},
    encap,
    flow::{Flow, FlowKey, Kind, protocol, tcp_flags},
    forwarding::{self, Backend, Service},
    fragment,
    nat::{Connection, Id, Side, Slots, State, ToTask, translate},
    parse,
    port::{Frame, Frames, Pool},
    reply, select,
    wire::{udp, vxlan},
};

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
        } else if let Some((service, ..)) = self.nat_service(&flow.key) {
            slots.prefetch(*hash);
            *next = Next::Translate(service, None);
        }
    }

    /// The service of a client's packet, if it is translated, and its number.
    #[inline(always)]
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
        frame.set_len(usize::from(flow.ip_offset) + usize::from(flow.ip_len)); // less padding
        let at = usize::from(flow.l4_offset) + udp::LEN;
        let rest = frame.packet().get(at..).ok_or(DropReason::Truncated)?;
        let (header, _) =
            vxlan::Header::ref_from_prefix(rest).map_err(|_| DropReason::Truncated)?;
        if header.flags & vxlan::VALID_VNI == 0 {
            return Err(DropReason::NatUnmatched);
        }
        let (vni, outer_len) = (header.vni(), at + vxlan::LEN);
        packet.outer = flow.key.src;
        frame.shrink_front(outer_len);
        if !parse::plain_ipv4(frame.packet(), &mut packet.flow) {
            parse::any(frame.packet(), &mut packet.flow)?;
        }
        let flow = &packet.flow;
        let mesh = self.forwarding.mesh_at(vni, flow.key.dst);
        let (overlay, bank) = mesh.ok_or(DropReason::NatUnmatched)?;
        match flow.kind {
            Kind::Packet | Kind::IcmpError if translate::is_translatable(flow) => {
                let id = Id::new(bank, flow.key.dst_port);
                slots.prefetch_slot(id);
                Ok(Next::Return(id))
            }
            Kind::Arp | Kind::NeighbourSolicitation => {
                self.answer_in_tunnel(frame, flow, overlay, outer_len)
            }
            _ => Err(DropReason::NatUnmatched),
        }
    }

    /// Answers who asks in a tunnel for our address there.
    #[cold]
    fn answer_in_tunnel(
        &self,
        frame: &mut Frame,
        question: &Flow,
        overlay: u32,
        outer_len: usize,
    ) -> Result<Next, DropReason> {
        let overlay = self.forwarding.overlays().get(overlay as usize);
        let own = overlay.ok_or(DropReason::NatUnmatched)?.mac;
        match question.kind {
            Kind::Arp => reply::arp(frame, question, own)?,
            _ => reply::neighbour(frame, question, own)?,
        }
        frame.grow_front(outer_len).ok_or(DropReason::NoHeadroom)?;
        // The answer may be longer than what the tunnel's headers say, but not shorter.
        let outer = parse::flow(frame.packet())?;
        reply::tunnel(frame, &outer, self.link.mac);
        self.context.counters.count(Event::NeighbourReplies, 1);
        Ok(Next::Send(self.ingress))
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
        for packet in &mut *packets {
            if let Next::Translate(_, likely) = &mut packet.next {
                *likely = slots.likely(packet.hash);
                likely.iter().for_each(|id| slots.prefetch_slot(*id));
            }
        }
        for (frame, packet) in inbound.iter_mut().zip(packets) {
            let next = match packet.next {
                Next::Translate(service, likely) => {
                    self.toward_task(slots, frame, packet, (service, likely))
                }
                Next::Return(id) => self.toward_client(slots, id, frame, packet),
                _ => continue,
            };
            packet.next = next.unwrap_or_else(Next::Drop);
        }
    }

    /// A client's packet becomes one to its task.
    #[inline]
    fn toward_task(
        &mut self,
        slots: &Slots,
        frame: &mut Frame,
        packet: &mut Packet,
        (service, likely): (u32, Option<Id>),
    ) -> Result<Next, DropReason> {
        let flow = &packet.flow;
        if flow.kind == Kind::IcmpError {
            return self.error_to_task(slots, frame, packet);
        }
        self.complete(frame, packet);
        let found = slots.find(likely, packet.hash, &flow.key);
        let (to, backend) = match self.good_for(slots, packet, service, found) {
            Ok(Some(good)) => good,
            Ok(None) => self.open(slots, frame, packet)?,
            Err(reason) => return Ok(Next::Refuse(reason)),
        };
        if flow.ip_len > backend.mtu && !fragment::can_cut(flow, backend.mtu) {
            return Ok(Next::Shrink(to.backend));
        }
        // The station that sent it, and the interface: answers go there.
        let station = frame.packet().get(4..).and_then(|rest| rest.first_chunk());
        let station = u64::from_be_bytes(*station.ok_or(DropReason::Truncated)?) & (!0 >> 16);
        if to.station != station | u64::from(self.link_index) << 48 {
            let way = translate::way_of(frame.packet(), flow.ip_offset, self.link_index);
            slots.redirect(&to, &way);
        }
        let (src, dst) = ((to.mesh, to.id.port()), (to.task, to.task_port));
        translate::packet(frame, flow, src, dst, to.sums);
        if flow.is_syn() {
            translate::clamp_mss(frame, flow, backend.mtu);
        }
        slots.touch(to.id, to.state, Side::Client, flow.tcp_flags, self.context.now());
        let fits = flow.ip_len <= backend.mtu;
        Ok(if fits { Next::Wrap(to.backend) } else { Next::Shrink(to.backend) })
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

    /// Whether the slot that was found is good for a client's packet, with its backend. `None` if the packet
    /// begins a new connection; an error if it belongs to none.
    #[inline]
    fn good_for(
        &mut self,
        slots: &Slots,
        packet: &Packet,
        service: u32,
        found: Option<ToTask>,
    ) -> Result<Option<(ToTask, &'a Backend)>, DropReason> {
        let flow = &packet.flow;
        let is_datagram = flow.protocol == protocol::UDP;
        let begins = is_datagram || flow.is_syn();
        let Some(to) = found else {
            return if begins { Ok(None) } else { Err(DropReason::NatNoConnection) };
        };
        let backend = self.forwarding.backend(to.backend);
        match backend.filter(|backend| backend.service == service) {
            // The client uses its port again: nothing of what was counts.
            Some(_) if flow.is_syn() && to.state.is_closed() => {}
            // TCP waits for a task's return and retransmits; datagrams would be lost.
            Some(backend) if is_datagram && !backend.reachable => {}
            Some(backend) => {
                backend.template.prefetch();
                self.context.counters.count(Event::ConnectionHits, 1);
                return Ok(Some((to, backend)));
            }
            None if begins => {}
            None => {
                slots.reset(to.id, to.state, self.context.now());
                return Err(DropReason::NoBackend);
            }
        }
        slots.detach(to.id, to.state);
        Ok(None)
    }

    /// A slot for a new connection.
    #[inline(never)]
    fn open(
        &mut self,
        slots: &Slots,
        frame: &Frame,
        packet: &Packet,
    ) -> Result<(ToTask, &'a Backend), DropReason> {
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
        let remember = |slot| {
            let task = self.forwarding.task(slot)?;
            slots.open(&overlay.mesh, *hash, now, |mesh| Connection {
                key,
                task,
                task_port,
                mesh,
                backend: slot,
                way,
            })
        };
        let placed = (self.forwarding, service, slots);
        let (_, backend, to) = select::place(flow, placed, &mut self.context, remember)?;
        self.context.counters.count(Event::ConnectionMisses, 1);
        self.context.counters.count(Event::ConnectionInserts, 1);
        Ok((to, backend))
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
        let to = slots.find(slots.likely(*hash), *hash, &flow.key);
        let to = to.ok_or(DropReason::IcmpUnmatched)?;
        let quoted = ((to.task, to.task_port), (to.mesh, to.id.port()));
        translate::icmp_error(frame, flow, (to.mesh, to.task), quoted, to.sums)?;
        self.context.counters.count(Event::IcmpErrorsForwarded, 1);
        let backend = self.forwarding.backend(to.backend).ok_or(DropReason::NoBackend)?;
        let fits = flow.ip_len <= backend.mtu;
        Ok(if fits { Next::Wrap(to.backend) } else { Next::Shrink(to.backend) })
    }

    /// What a task sent becomes what the VIP says.
    #[inline]
    fn toward_client(
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

    /// Tells the sender that there is no such connection. A reset is no longer than its cause, and as many clients
    /// as a task has may need one at the same moment: there is no limit.
    #[cold]
    pub(super) fn refuse(&mut self, mut frame: Frame, packet: &Packet, reason: DropReason) {
        let flow = &packet.flow;
        let tell = flow.protocol == protocol::TCP
            && flow.tcp_flags & tcp_flags::RST == 0
            && can_be_answered(flow);
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
