//! The stages of full NAT: which slot a packet has, and its translation in place. What goes to a task leaves as
//! if its sender had spoken to the task; what a task answers has come out of its tunnel before.

use zerocopy::FromBytes;

use super::{Burst, Next, Packet, can_be_answered, port_of};
use crate::{
    counters::{DropReason, Event},
    flow::{Flow, Kind, protocol, tcp_flags},
    forwarding::{self, Backend},
    fragment,
    nat::{Connection, Id, Side, Slots, State, ToTask, translate},
    parse,
    port::{Frame, Frames, Pool},
    prefetch, reply, select,
    wire::{ethernet, udp, vxlan},
};

/// What there is in a burst: a stage that has nothing to do is skipped.
#[derive(Clone, Copy, Default)]
pub(super) struct Seen {
    /// Packets of clients to translate.
    questions: bool,
    /// Packets out of tunnels.
    answers: bool,
    /// Packets to select a backend for.
    others: bool,
}

impl<'a> Burst<'a> {
    /// [`Burst::parse`] where tunnels end: takes packets out of them, and asks for slots instead of connections.
    #[inline(never)]
    fn parse_tunneled(&mut self, slots: &Slots, inbound: &mut Frames, packets: &mut [Packet]) {
        // Behind a tunnel's headers the next cache line begins.
        for frame in &*inbound {
            frame.prefetch_at(parse::TUNNEL_LEN + ethernet::LEN);
        }
        let mut total = 0;
        for (frame, packet) in inbound.iter_mut().zip(packets) {
            let bytes = frame.packet();
            total += bytes.len() as u64;
            if let Some(tunnel) = parse::plain_tunnel(bytes, &mut packet.flow)
                && self.forwarding.is_tunnel_port(tunnel.udp_port)
                && self.link.accepts(bytes, Kind::Packet)
            {
                packet.outer = tunnel.src;
                frame.set(frame.start() + parse::TUNNEL_LEN, tunnel.inner_len);
                let next = self.inside(slots, frame, &packet.flow, (tunnel.vni, parse::TUNNEL_LEN));
                packet.next = next.unwrap_or_else(Next::Drop);
            } else if parse::plain_ipv4(bytes, &mut packet.flow) {
                self.classify_nat(slots, frame, packet);
            } else {
                self.parse_any_tunneled(slots, frame, packet);
            }
        }
        self.received(inbound, total);
    }

    /// Apart, so that the plain packets' way has the registers to itself.
    #[inline(never)]
    fn parse_any_tunneled(&mut self, slots: &Slots, frame: &mut Frame, packet: &mut Packet) {
        match parse::any(frame.packet(), &mut packet.flow) {
            Ok(()) => self.classify_nat(slots, frame, packet),
            Err(reason) => packet.next = Next::Drop(reason),
        }
    }

    /// Says what is next for a parsed packet.
    #[inline(always)]
    fn classify_nat(&mut self, slots: &Slots, frame: &mut Frame, packet: &mut Packet) {
        if !self.is_to_be_forwarded(frame.packet(), packet) {
            return;
        }
        let flow = &packet.flow;
        if flow.kind == Kind::Packet
            && flow.protocol == protocol::UDP
            && self.forwarding.is_tunnel_port(flow.key.dst_port)
        {
            let next = self.open_tunnel(slots, frame, packet);
            packet.next = next.unwrap_or_else(Next::Drop);
            return;
        }
        packet.hash = flow.key.hash(&self.hash_key);
        let vip = select::vip_of(&flow.key);
        packet.next = match self.context.translated_at(self.forwarding, vip) {
            Some(service) => {
                self.seen.questions = true;
                slots.prefetch(packet.hash);
                prefetch::prefetch_front(frame.packet());
                Next::Translate(service, Id::NOBODYS)
            }
            None => {
                self.seen.others = true;
                self.context.connections.prefetch(packet.hash);
                Next::Select
            }
        };
    }

    /// Takes the tunnel's headers off, whatever they are, and looks what is inside.
    #[inline(never)]
    fn open_tunnel(
        &mut self,
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
        let (vni, len) = (header.vni(), at + vxlan::LEN);
        packet.outer = flow.key.src;
        frame.shrink_front(len);
        packet.flow = parse::flow(frame.packet())?;
        self.inside(slots, frame, &packet.flow, (vni, len))
    }

    /// Says what is next for a packet that was in a tunnel of this network, behind headers of `outer_len` bytes.
    #[inline(always)]
    fn inside(
        &mut self,
        slots: &Slots,
        frame: &mut Frame,
        flow: &Flow,
        (vni, outer_len): (u32, usize),
    ) -> Result<Next, DropReason> {
        self.seen.answers = true;
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
        let question_len = frame.len();
        match question.kind {
            Kind::Arp => reply::arp(frame, question, own)?,
            _ => reply::neighbour(frame, question, own)?,
        }
        let answer_len = frame.len();
        // The tunnel's headers are still the question's, which may have been longer.
        frame.set_len(answer_len.max(question_len));
        frame.grow_front(outer_len).ok_or(DropReason::NoHeadroom)?;
        let outer = parse::flow(frame.packet())?;
        frame.set_len(outer_len + answer_len);
        reply::tunnel(frame, &outer, self.link.mac);
        self.context.counters.count(Event::NeighbourReplies, 1);
        Ok(Next::Send(self.ingress))
    }

    /// Parses a burst, and translates what is to be translated. Says whether there is more for a backend.
    #[inline(always)]
    pub(super) fn translate(
        &mut self,
        slots: &Slots,
        inbound: &mut Frames,
        packets: &mut [Packet],
    ) -> bool {
        self.parse_tunneled(slots, inbound, packets);
        let Seen { questions, answers, others } = self.seen;
        if questions {
            self.translate_questions(slots, inbound, packets);
        }
        if answers {
            self.translate_answers(slots, inbound, packets);
        }
        others
    }

    /// Translates what clients have sent and has a slot or gets one.
    #[inline(never)]
    fn translate_questions(&mut self, slots: &Slots, inbound: &mut Frames, packets: &mut [Packet]) {
        for packet in &mut *packets {
            if let Next::Translate(_, likely) = &mut packet.next {
                *likely = slots.likely(packet.hash);
                slots.prefetch_slot(*likely);
            }
        }
        for (frame, packet) in inbound.iter_mut().zip(packets) {
            let Next::Translate(service, likely) = packet.next else { continue };
            self.complete(frame, &packet.flow);
            if !self.toward_plain_task(slots, frame, packet, (service, likely))
                && let Err(reason) = self.toward_task(slots, frame, packet, service)
            {
                packet.next = Next::Drop(reason);
            }
        }
    }

    /// Translates what tasks have sent.
    #[inline(never)]
    fn translate_answers(&self, slots: &Slots, inbound: &mut Frames, packets: &mut [Packet]) {
        for (frame, packet) in inbound.iter_mut().zip(packets) {
            if let Next::Return(id) = packet.next {
                self.complete(frame, &packet.flow);
                packet.next = match self.toward_plain_client(slots, id, frame, packet) {
                    Some(port) => Next::Send(port),
                    None => self
                        .toward_client(slots, id, frame, packet)
                        .map_or_else(Next::Drop, Next::Send),
                };
            }
        }
    }

    /// A client's packet becomes one to its task, as nearly every one does that is plain, has a slot and fits. What
    /// is translated here is wrapped at once, since what that takes is at hand. Says whether it was so; if not,
    /// the packet is as it was.
    ///
    /// Others take a way of their own, so that these have the registers to themselves, constant offsets, and
    /// nothing that is unpacked but to be written: 110 instructions less.
    #[inline(always)]
    fn toward_plain_task(
        &mut self,
        slots: &Slots,
        frame: &mut Frame,
        packet: &mut Packet,
        (service, likely): (u32, Id),
    ) -> bool {
        let flow = &packet.flow;
        if flow.is_plain()
            && !flow.is_syn()
            && let Some(to) = slots.find_plain(likely, &flow.key)
            && let Some((backend, port)) = self.reach(to.backend)
            && backend.service == service
            && flow.ip_len <= backend.mtu
            && let Some(headers) = frame.packet_mut().first_chunk_mut()
            && to.is_way_of(headers, self.link_index)
        {
            translate::plain(headers, flow.protocol, &to);
            slots.touch(likely, to.state, Side::Client, flow.tcp_flags, self.context.now());
            self.context.counters.count(Event::ConnectionHits, 1);
            self.wrap(frame, packet, to.backend, (backend, port));
            return true;
        }
        false
    }

    /// A client's packet becomes one to its task, whatever it is.
    #[inline(never)]
    fn toward_task(
        &mut self,
        slots: &Slots,
        frame: &mut Frame,
        packet: &mut Packet,
        service: u32,
    ) -> Result<(), DropReason> {
        let flow = &packet.flow;
        if flow.kind == Kind::IcmpError {
            return self.error_to_task(slots, frame, packet);
        }
        let found = slots.find(packet.hash, &flow.key);
        let (to, backend) = match self.good_for(slots, packet, service, found) {
            Ok(Some(good)) => good,
            Ok(None) => self.open(slots, frame, packet)?,
            Err(reason) => {
                packet.next = Next::Refuse(reason);
                return Ok(());
            }
        };
        if flow.ip_len > backend.mtu && !fragment::can_cut(flow, backend.mtu) {
            packet.next = Next::Shrink(to.backend);
            return Ok(());
        }
        self.rewrite(slots, frame, flow, &to);
        if flow.is_syn() {
            translate::clamp_mss(frame, flow, backend.mtu);
        }
        self.wrap_translated(frame, packet, to.backend, backend);
        Ok(())
    }

    /// Wraps what was translated for the task in this slot, if it fits.
    fn wrap_translated(
        &self,
        frame: &mut Frame,
        packet: &mut Packet,
        slot: forwarding::Slot,
        backend: &Backend,
    ) {
        match self.reach(slot) {
            _ if packet.flow.ip_len > backend.mtu => packet.next = Next::Shrink(slot),
            Some(reached) => self.wrap(frame, packet, slot, reached),
            None => packet.next = Next::Drop(DropReason::NextHopUnresolved),
        }
    }

    /// Gives a client's packet the addresses and ports of its slot, and notes it there.
    fn rewrite(&self, slots: &Slots, frame: &mut Frame, flow: &Flow, to: &ToTask) {
        let packet = frame.packet_mut();
        if !to.is_way_of(packet, self.link_index) {
            // The router next to us was replaced: answers leave by the way that this packet came, from now on.
            let way = translate::way_of(packet, flow.ip_offset, self.link_index);
            slots.redirect((to.id, to.state), &way);
        }
        let (src, dst) = ((to.mesh, to.id.port()), (to.task, to.task_port));
        translate::packet(packet, flow, src, dst, to.sums);
        slots.touch(to.id, to.state, Side::Client, flow.tcp_flags, self.context.now());
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
            // TCP waits for a task's return and retransmits; datagrams would be lost, and who has never heard of the
            // task need not wait for it. But if none can be reached, each packet would use up another port, for nothing.
            Some(backend)
                if !backend.reachable
                    && (is_datagram || flow.is_syn() && !to.state.is_answered())
                    && select::is_anybody_there(flow, self.forwarding, service) => {}
            Some(backend) => {
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
        let vip = select::vip_of(&key);
        let index = self.context.translated_at(self.forwarding, vip);
        let service = index.and_then(|index| self.forwarding.service(index));
        let service = service.ok_or(DropReason::NoService)?;
        let nat = service.nat.as_deref().ok_or(DropReason::NoService)?;
        if !nat.allows(key.src) {
            return Err(DropReason::NotAllowed);
        }
        let overlay = self.forwarding.overlays().get(nat.overlay as usize);
        let overlay = overlay.ok_or(DropReason::NoService)?;
        let at = service.vips.iter().position(|its| *its == vip);
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
    ) -> Result<(), DropReason> {
        let Packet { flow, hash, .. } = packet;
        let to = slots.find(*hash, &flow.key);
        let to = to.ok_or(DropReason::IcmpUnmatched)?;
        let quoted = ((to.task, to.task_port), (to.mesh, to.id.port()));
        translate::icmp_error(frame, flow, (to.mesh, to.task), quoted, to.sums)?;
        self.context.counters.count(Event::IcmpErrorsForwarded, 1);
        let backend = self.forwarding.backend(to.backend).ok_or(DropReason::NoBackend)?;
        self.wrap_translated(frame, packet, to.backend, backend);
        Ok(())
    }

    /// What a task sent becomes what the VIP says, as nearly all does that is plain and begins no connection.
    /// Returns the port that it leaves by. `None`: it is as it was, less padding. 80 instructions less than
    /// [`Self::toward_client`].
    #[inline(always)]
    fn toward_plain_client(
        &self,
        slots: &Slots,
        id: Id,
        frame: &mut Frame,
        packet: &Packet,
    ) -> Option<u32> {
        let flow = &packet.flow;
        if !flow.is_plain() || flow.tcp_flags & tcp_flags::SYN != 0 {
            return None;
        }
        let to = slots.plain_to_client(id, &flow.key)?;
        let backend = self.forwarding.backend(to.backend)?;
        if backend.template.far_end() != packet.outer {
            return None;
        }
        let (link, station) = to.way();
        let port = port_of(self.egress, link)?;
        frame.set_len(ethernet::LEN + usize::from(flow.ip_len)); // less padding
        let headers = frame.packet_mut().first_chunk_mut()?;
        translate::plain(headers, flow.protocol, &to);
        translate::send_plain_to(headers, station, self.forwarding.link(link.into()).mac);
        slots.touch(id, to.state, Side::Task, flow.tcp_flags, self.context.now());
        self.context.counters.count(Event::NatReplies, 1);
        Some(port)
    }

    /// What a task sent becomes what the VIP says, whatever it is. Returns the port that it leaves by.
    #[inline(never)]
    fn toward_client(
        &self,
        slots: &Slots,
        id: Id,
        frame: &mut Frame,
        packet: &Packet,
    ) -> Result<u32, DropReason> {
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
            translate::packet(frame.packet_mut(), flow, vip, client, to.sums);
            if flow.tcp_flags & tcp_flags::SYN != 0 {
                translate::clamp_mss(frame, flow, backend.mtu);
            }
            slots.touch(id, state, Side::Task, flow.tcp_flags, self.context.now());
        }
        let port = port_of(self.egress, to.way.link).ok_or(DropReason::NextHopUnresolved)?;
        let own = self.forwarding.link(to.way.link.into()).mac;
        translate::send_by(frame, flow, &to.way, own)?;
        self.context.counters.count(Event::NatReplies, 1);
        Ok(port)
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
