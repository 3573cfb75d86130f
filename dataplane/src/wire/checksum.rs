//! The Internet checksum, RFC 1071, and its incremental update, RFC 1624.
//!
//! A checksum, a word and a sum are plain numbers here: the 16-bit field as the RFC draws it, first
//! byte most significant. A `U16` field of a view gives and takes exactly that with `get` and
//! `set`. What a zero means is the caller's to know: UDP sends a computed 0 as `0xffff` (RFC 768).

/// A ones'-complement sum in the making.
///
/// Kept wide, and folded to 16 bits only when asked: since 2^16 is 1 modulo 2^16 − 1, it doesn't
/// matter when carries are added back (RFC 1071 section 2, "deferred carries").
#[derive(Clone, Copy, Default, Debug)]
#[must_use]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes as big-endian 16-bit words. An odd last byte counts as if a zero followed it, so
    /// only the last piece of a packet may have an odd length.
    #[inline]
    pub fn add_bytes(self, bytes: &[u8]) -> Self {
        // The sum comes out byte-swapped if the words are read byte-swapped (RFC 1071 section 2B),
        // so read in the machine's order and swap once. 128 bits hold every carry of 64-bit words,
        // which is one `adc` per 8 bytes.
        let (words, rest) = bytes.as_chunks();
        let wide: u128 = words.iter().map(|word| u128::from(u64::from_ne_bytes(*word))).sum();
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        let wide = wide + u128::from(u64::from_ne_bytes(last));

        self.add_u16(u16::from_be(fold(wide)))
    }

    /// Adds one word.
    #[inline]
    pub fn add_u16(self, word: u16) -> Self {
        Self(self.0 + u64::from(word))
    }

    /// Adds two words, the more significant one first.
    #[inline]
    pub fn add_u32(self, words: u32) -> Self {
        Self(self.0 + u64::from(words))
    }

    /// The sum in 16 bits, *not* complemented: what stands in a checksum field that the sender left
    /// to its network card. `0xffff` over a packet whose checksum is right.
    #[inline]
    #[must_use]
    pub fn fold(self) -> u16 {
        fold(u128::from(self.0))
    }

    /// The sum's complement: what belongs in the checksum field, if that was zero when summed.
    #[inline]
    #[must_use]
    pub fn checksum(self) -> u16 {
        !self.fold()
    }
}

/// Adds the carries back in until they are gone.
#[inline]
fn fold(sum: u128) -> u16 {
    // 128 → 65 → 34 → 19 → 17 → 16 bits: five steps whatever the number, so no branch.
    let sum = (sum >> 64) + (sum & 0xffff_ffff_ffff_ffff);
    let sum = (sum >> 32) as u64 + (sum as u64 & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

/// The IPv4 pseudo header of TCP and UDP, RFC 9293 section 3.1. `len` is that of the transport
/// header and what follows it, in bytes.
#[inline]
pub fn pseudo_header_v4(src: [u8; 4], dst: [u8; 4], protocol: u8, len: u16) -> Sum {
    Sum::default()
        .add_u32(u32::from_be_bytes(src))
        .add_u32(u32::from_be_bytes(dst))
        .add_u16(u16::from(protocol))
        .add_u16(len)
}

/// The IPv6 pseudo header of TCP, UDP and ICMPv6, RFC 8200 section 8.1. `len` is that of the
/// transport header and what follows it, in bytes; `protocol` is the *last* next header.
#[inline]
pub fn pseudo_header_v6(src: [u8; 16], dst: [u8; 16], protocol: u8, len: u32) -> Sum {
    Sum::default().add_bytes(&src).add_bytes(&dst).add_u16(u16::from(protocol)).add_u32(len)
}

/// The ones'-complement sum of two words: less work than a [`Sum`] where there are few.
#[inline(always)]
#[must_use]
pub fn plus(one: u16, other: u16) -> u16 {
    let (sum, carry) = one.overflowing_add(other);
    sum + u16::from(carry) // after a carry there is room for it
}

/// The checksum after the sum of what it covers has changed by `change`, RFC 1624 equation 3. As [`update`], never
/// turns a right checksum into a wrong one.
#[inline]
#[must_use]
pub fn shift(old_checksum: u16, change: u16) -> u16 {
    !plus(!old_checksum, change)
}

/// The checksum after one of the words under it changed, RFC 1624 equation 3.
///
/// Never turns a right checksum into a wrong one, unlike RFC 1141's; but sees only the word, so a
/// wrong checksum stays as wrong as it was.
#[inline]
#[must_use]
pub fn update(old_checksum: u16, old_word: u16, new_word: u16) -> u16 {
    Sum::default().add_u16(!old_checksum).add_u16(!old_word).add_u16(new_word).checksum()
}

#[cfg(test)]
mod tests {
    use etherparse::{Icmpv6Slice, Icmpv6Type, Ipv4Header, PacketBuilder, UdpHeader};
    use proptest::prelude::*;

    use super::*;
    use crate::flow::protocol;

    /// RFC 1071 section 4.1, as written there.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
        }
        sum as u16
    }

    #[test]
    fn the_example_of_rfc_1071_sums_to_ddf2() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().add_bytes(&bytes).fold(), 0xddf2);
    }

    #[test]
    fn the_example_of_rfc_1624_updates_to_zero() {
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn no_number_of_carries_is_lost() {
        for len in 0..=300 {
            let ones = vec![0xff; len];
            assert_eq!(Sum::default().add_bytes(&ones).fold(), naive(&ones), "{len} bytes");
        }
        assert_eq!(fold(u128::MAX), 0xffff);
        assert_eq!(fold(0xffff_0000_0001 << 64), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_at_any_alignment_sum_as_the_naive_loop_does(
            bytes in proptest::collection::vec(any::<u8>(), 0..2000), skip in 0_usize..9,
        ) {
            let bytes = &bytes[skip.min(bytes.len())..];
            prop_assert_eq!(Sum::default().add_bytes(bytes).fold(), naive(bytes));
        }

        #[test]
        fn pieces_sum_as_the_whole_does(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0_usize..100,
            word: u16, words: u32,
        ) {
            let (front, back) = bytes.split_at((2 * cut).min(bytes.len()));
            let pieces =
                Sum::default().add_u32(words).add_bytes(front).add_u16(word).add_bytes(back);
            let mut whole = words.to_be_bytes().to_vec();
            whole.extend(word.to_be_bytes());
            whole.extend(&bytes);
            prop_assert_eq!(pieces.fold(), naive(&whole));
        }

        #[test]
        fn an_updated_checksum_is_the_one_computed_anew(
            mut words in proptest::collection::vec(any::<u16>(), 1..40),
            at: prop::sample::Index, new: u16,
        ) {
            let sum = |words: &[u16]| words.iter().fold(Sum::default(), |sum, w| sum.add_u16(*w));
            let old_checksum = sum(&words).checksum();
            let at = at.index(words.len());
            let updated = update(old_checksum, std::mem::replace(&mut words[at], new), new);
            // All words zero is the one sum that +0 has to itself, and no IP header adds up to it.
            prop_assume!(words.iter().any(|word| *word != 0));
            prop_assert_eq!(updated, sum(&words).checksum());
        }

        #[test]
        fn a_shifted_checksum_is_the_one_that_is_folded(old: u16, change: u16) {
            let folded = Sum::default().add_u16(!old).add_u16(change).checksum();
            prop_assert_eq!(shift(old, change), folded);
        }

        #[test]
        fn an_ipv4_headers_checksum_is_etherparses(
            src: [u8; 4], dst: [u8; 4], ttl: u8, id: u16, len in 0_u16..1480,
        ) {
            let mut header = Ipv4Header::new(len, ttl, 17.into(), src, dst).unwrap();
            header.identification = id;
            header.header_checksum = 0;
            let sum = Sum::default().add_bytes(&header.to_bytes());
            prop_assert_eq!(sum.checksum(), header.calc_header_checksum());
        }

        #[test]
        fn a_udp_checksum_over_ipv4_is_etherparses(
            src: [u8; 4], dst: [u8; 4], ports: (u16, u16),
            payload in proptest::collection::vec(any::<u8>(), 0..1500),
        ) {
            let theirs = UdpHeader::with_ipv4_checksum(
                ports.0, ports.1, &Ipv4Header::new(0, 64, 17.into(), src, dst).unwrap(), &payload,
            ).unwrap();
            let ours = pseudo_header_v4(src, dst, protocol::UDP, theirs.length)
                .add_u16(ports.0).add_u16(ports.1).add_u16(theirs.length)
                .add_bytes(&payload)
                .checksum();
            prop_assert_eq!(if ours == 0 { 0xffff } else { ours }, theirs.checksum);
        }

        #[test]
        fn a_tcp_segment_over_ipv6_with_etherparses_checksum_sums_to_ffff(
            src: [u8; 16], dst: [u8; 16], seq: u32,
            payload in proptest::collection::vec(any::<u8>(), 0..1400),
        ) {
            let mut packet = Vec::new();
            PacketBuilder::ipv6(src, dst, 64).tcp(40000, 80, seq, 1024)
                .write(&mut packet, &payload).unwrap();
            let segment = &packet[40..];
            let pseudo = pseudo_header_v6(src, dst, protocol::TCP, segment.len() as u32);
            prop_assert_eq!(pseudo.add_bytes(segment).fold(), 0xffff);
        }

        #[test]
        fn an_icmpv6_checksum_is_valid_to_etherparse(
            src: [u8; 16], dst: [u8; 16],
            mut message in proptest::collection::vec(any::<u8>(), 8..200),
        ) {
            message[..4].copy_from_slice(&[128, 0, 0, 0]);
            let pseudo = pseudo_header_v6(src, dst, protocol::ICMPV6, message.len() as u32);
            let checksum = pseudo.add_bytes(&message).checksum();
            message[2..4].copy_from_slice(&checksum.to_be_bytes());
            let theirs = Icmpv6Slice::from_slice(&message).unwrap();
            prop_assert!(matches!(theirs.icmp_type(), Icmpv6Type::EchoRequest(_)));
            prop_assert!(theirs.is_checksum_valid(src, dst));
        }
    }
}
