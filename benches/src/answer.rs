//! Packets as tasks answer translated connections with: in a tunnel, to a port of a mesh address.

use dataplane::{
    nat::Slots,
    wire::{ethernet, ipv4, udp, vxlan},
};
use etherparse::PacketBuilder;
use zerocopy::IntoBytes;

use crate::{
    packet::{GATEWAY, Packet},
    snapshot::{MESH, TASK_PORT, VNI, VTEP, task_v4, vtep_v4},
};

/// Where the tunnel's payload begins.
const INNER: usize = ethernet::LEN + ipv4::LEN + udp::LEN + vxlan::LEN;
/// Where its IP packet begins.
const IP: usize = INNER + ethernet::LEN;

/// A frame in a tunnel, of which answers of all connections are made.
#[derive(Clone, Debug)]
pub struct Answers {
    bytes: Vec<u8>,
    /// Whose answers: the backend, and the mesh address and port that it answers to.
    known: Vec<(u32, u16, u16)>,
}

impl Answers {
    /// Answers in all these connections, with frames of `len` bytes in the tunnel.
    ///
    /// # Panics
    /// If they are longer than IP allows.
    pub fn new(slots: &Slots, len: usize) -> Self {
        let known = slots
            .connections()
            .map(|(id, _, connection)| (connection.backend, id.bank(), id.port()));
        let mut known: Vec<_> = known.collect();
        // A flow's number shall say nothing of where its slot is.
        fastrand::Rng::with_seed(2).shuffle(&mut known);
        let payload = vec![0x5a; len.saturating_sub(ethernet::LEN + ipv4::LEN + 20)];
        let mut inner = Vec::new();
        PacketBuilder::ethernet2([2; 6], [2; 6])
            .ipv4([0; 4], [0; 4], 64)
            .tcp(TASK_PORT, 0, 1, 1024)
            .ack(1)
            .write(&mut inner, &payload)
            .expect("a benchmark's packet fits an IP packet");
        let header = vxlan::Header::new(VNI);
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2([2, 0, 0, 0, 0, 3], GATEWAY.0)
            .ipv4([0; 4], VTEP, 64)
            .udp(50_000, vxlan::PORT)
            .write(&mut bytes, &[header.as_bytes(), &inner].concat())
            .expect("and so does its tunnel's");
        Self { bytes, known }
    }

    /// Makes it the answer in another connection. Checksums are left behind, as in [`Packet::set_flow`].
    pub fn set_flow(&mut self, number: u64) {
        let (backend, bank, port) = self.known[number as usize % self.known.len()];
        self.bytes[ethernet::LEN + 12..][..4].copy_from_slice(&vtep_v4(backend));
        self.bytes[IP + 12..][..4].copy_from_slice(&task_v4(backend));
        self.bytes[IP + 16..][..4].copy_from_slice(&MESH[usize::from(bank)]);
        self.bytes[IP + ipv4::LEN + 2..][..2].copy_from_slice(&port.to_be_bytes());
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// What comes to a worker.
#[derive(Clone, Debug)]
pub enum Arriving {
    /// From clients.
    Packet(Packet),
    /// From tasks.
    Answers(Answers),
}

impl Arriving {
    /// Makes it of another flow.
    pub fn set_flow(&mut self, number: u64) {
        match self {
            Self::Packet(packet) => packet.set_flow(number),
            Self::Answers(answers) => answers.set_flow(number),
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Packet(packet) => packet.bytes(),
            Self::Answers(answers) => answers.bytes(),
        }
    }
}
