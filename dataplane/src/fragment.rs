//! Cutting an IPv4 packet that is too big and may be cut, RFC 791 section 3.2. It is always the *inner*
//! packet that is cut: the outer one must arrive whole (RFC 7348 section 4.3).

use crate::{
    flow::Flow,
    port::{Frame, Pool},
    wire::ipv4,
};

/// More fragments than this are not worth making: the sender should learn its MTU.
pub const MAX_FRAGMENTS: usize = 8;

/// Whether [`cut`] can cut this packet: IPv4 without options that fits a few fragments of `mtu` bytes.
pub fn can_cut(flow: &Flow, mtu: u16) -> bool {
    let plain = usize::from(flow.l4_offset - flow.ip_offset) == ipv4::LEN;
    let pieces = usize::from(flow.ip_len - ipv4::LEN as u16).div_ceil(piece_len(mtu).max(1));
    !flow.dont_fragment && !flow.is_v6() && plain && piece_len(mtu) > 0 && pieces <= MAX_FRAGMENTS
}

/// Payload bytes of every fragment but the last: a multiple of 8.
fn piece_len(mtu: u16) -> usize {
    usize::from(mtu).saturating_sub(ipv4::LEN) & !7
}

/// Cuts the packet in `frame`, which keeps its last part. The others go to `each`, in order, in frames of
/// the pool and with the flow that describes them: who filters on the way knows the rest of a packet by
/// its first fragment. Returns the flow of the last, or `None`, with nothing sent, if the pool has too few
/// frames.
pub fn cut(
    frame: &mut Frame,
    flow: &Flow,
    mtu: u16,
    pool: &mut Pool,
    mut each: impl FnMut(Frame, Flow, &mut Pool),
) -> Option<Flow> {
    let ip_offset = usize::from(flow.ip_offset);
    let payload_at = ip_offset + ipv4::LEN;
    let payload_len = usize::from(flow.ip_len) - ipv4::LEN;
    let piece_len = piece_len(mtu);
    if pool.len() < payload_len.div_ceil(piece_len) - 1 {
        return None;
    }
    let mut at = 0;
    while at + piece_len < payload_len {
        let mut piece = pool.take()?;
        // Where the whole one starts there is room for a part of it.
        piece.set(frame.start(), payload_at + piece_len);
        let packet = piece.packet_mut();
        packet[..payload_at].copy_from_slice(&frame.packet()[..payload_at]);
        packet[payload_at..].copy_from_slice(&frame.packet()[payload_at + at..][..piece_len]);
        let flow = finish(packet, flow, at, piece_len, true);
        each(piece, flow, pool);
        at += piece_len;
    }
    // The headers move up to the last part, over what has gone ahead.
    frame.set_len(payload_at + payload_len);
    frame.packet_mut().copy_within(..payload_at, at);
    frame.shrink_front(at);
    Some(finish(frame.packet_mut(), flow, at, payload_len - at, false))
}

/// Writes length, offset and checksum of one fragment, and describes it.
fn finish(packet: &mut [u8], flow: &Flow, at: usize, len: usize, more: bool) -> Flow {
    let header = &mut packet[usize::from(flow.ip_offset)..][..ipv4::LEN];
    let ip_len = (ipv4::LEN + len) as u16;
    let more = if more { ipv4::MORE_FRAGMENTS } else { 0 };
    header[2..4].copy_from_slice(&ip_len.to_be_bytes());
    header[6..8].copy_from_slice(&(more | (at / 8) as u16).to_be_bytes());
    ipv4::seal(header);
    // No transport checksum covers a fragment alone: the outer one must be computed in full.
    Flow { ip_len, protocol: 0, ..*flow }
}
