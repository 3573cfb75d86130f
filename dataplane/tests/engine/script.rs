//! A fuzzer's bytes, read as choices: packets that come further than bytes would by themselves, because
//! they are valid but for what is changed in them.

use dataplane::encap::Tunnel;

use crate::{
    packets::{
        self, ACK, Extensions, FIN, L4, Packet, SYN, answer_to, arp_request, icmp_error, ping,
        seal_icmpv6, solicitation, tag,
    },
    rig::{BackendSpec, VIP4, VIP6, backend},
};

/// What is left of the bytes. When they are used up, zeros follow.
pub struct Script<'a>(pub &'a [u8]);

impl<'a> Script<'a> {
    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    pub fn word(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// As many as there are, at most.
    pub fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (taken, left) = self.0.split_at(most.min(self.0.len()));
        self.0 = left;
        taken
    }

    /// A frame for the node.
    pub fn frame(&mut self) -> Vec<u8> {
        let (form, shape) = (self.byte(), self.byte());
        let vlans = vlans(shape);
        let bytes = match form % 8 {
            0..4 => self.packet(form, shape).tagged(vlans).bytes(),
            4 => self.fragment(form, shape).tagged(vlans).bytes(),
            5 => tag(&icmp_error(&answer_to(&self.packet(form, shape)).ip_packet()), vlans),
            6 => tag(&self.question(), vlans),
            _ => {
                let len = self.byte();
                return self.bytes(len.into()).to_vec();
            }
        };
        self.disturbed(form, shape, bytes)
    }

    /// Some bytes of a frame are changed, or it ends early, if its shape says so.
    pub fn disturbed(&mut self, form: u8, shape: u8, mut bytes: Vec<u8>) -> Vec<u8> {
        let has = |bit: u8| shape >> bit & 1 == 1;
        if has(2) {
            for _ in 0..=self.byte() % 4 {
                let (at, value) = (usize::from(self.byte()), self.byte());
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            if form % 8 == 6 && has(7) {
                // Else few changed ones would be looked at.
                let at = 14 + 4 * vlans(shape).len();
                if bytes[at] >> 4 == 6 && bytes.len() > at + 48 {
                    seal_icmpv6(&mut bytes, at);
                }
            }
        }
        if has(3) {
            bytes.truncate(self.word().into());
        }
        bytes
    }

    pub fn fragment(&mut self, form: u8, shape: u8) -> Packet {
        let fragment = Some((self.word() % 8192, shape & 0x80 != 0));
        Packet { fragment, ..self.packet(form, shape) }
    }

    pub fn packet(&mut self, form: u8, shape: u8) -> Packet {
        let has = |bit: u8| shape >> bit & 1 == 1;
        let port = 1 + u16::from(self.byte());
        let l4 = match form >> 3 & 7 {
            0 => SYN,
            1 | 2 => ACK,
            3 => FIN,
            4 => L4::Tcp { flags: self.byte() },
            5 => L4::Udp { checksum: true },
            6 => L4::Udp { checksum: false },
            _ => L4::Sctp,
        };
        let mut packet = if has(4) { packets::v6(port, l4) } else { packets::v4(port, l4) };
        packet.tos = self.byte();
        packet.dont_fragment = form & 0x40 == 0;
        packet.partial = form & 0x80 != 0;
        if has(5) {
            let options = self.byte();
            let has = |bit: u8| options >> bit & 1 == 1;
            packet.extensions = Extensions {
                hop_by_hop: has(0),
                destination: has(1),
                routing: has(2),
                atomic_fragment: has(3),
                authentication: has(4),
            };
            packet.option_words = if packet.dst.is_ipv4() { usize::from(options % 11) } else { 0 };
            packet.padding = usize::from(options >> 5);
        }
        if has(6) {
            packet = packet.with_payload(usize::from(self.word() % 3600));
        }
        packet
    }

    /// Something that the node answers itself.
    pub fn question(&mut self) -> Vec<u8> {
        let (kind, id) = (self.byte() % 5, self.byte().into());
        let payload: Vec<u8> = (0..self.byte()).collect();
        match kind {
            0 => ping(VIP4, id, 0, 9, &payload),
            1 => ping(VIP6, id, 0, 9, &payload),
            2 => arp_request([198, 51, 100, 7], VIP4),
            3 => solicitation("2001:db8:100::7", VIP6, true, 255),
            _ => solicitation("::", VIP6, false, 255),
        }
    }

    /// A tunnel that a configuration can ask for.
    pub fn tunnel(&mut self) -> Tunnel {
        let shape = self.byte();
        let has = |bit: u8| shape >> bit & 1 == 1;
        let spec: BackendSpec = if has(0) { backend(1).over_v6() } else { backend(1) };
        Tunnel {
            inner_v6: has(1),
            udp_checksum: has(2),
            vlans: [1_u16, 4094][..usize::from(shape >> 3 & 3).min(2)].to_vec(),
            vni: u32::from(self.word()) << 8 | u32::from(self.byte()),
            udp_port: self.word(),
            ..spec.tunnel
        }
    }

    pub fn number(&mut self) -> u64 {
        (0..8).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }
}

/// The tags of a frame of this shape.
pub fn vlans(shape: u8) -> &'static [u16] {
    &[5, 6][..usize::from(shape % 4).min(2)]
}
