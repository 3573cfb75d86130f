// SPDX-License-Identifier: MIT OR GPL-2.0
/* Steers what belongs to a VIP, and what tunnels bring for our addresses in overlays, to its queue's AF_XDP socket, and leaves all else to the kernel.
 * It decides by addresses alone and changes no byte; what it can't parse, the kernel gets.
 * A queue without a socket passes everything: without us the node is an ordinary host. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct xdp_md { u32 data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex; };
enum { XDP_PASS = 2 };

#define SECTION(name) __attribute__((section(name), used))
#define PART static inline __attribute__((always_inline)) enum wanted
#define BE16(n) ((u16)__builtin_bswap16(n))
static void *(*map_lookup)(void *map, const void *key) = (void *)1;
static long (*redirect_map)(void *map, unsigned long index, unsigned long absent) = (void *)51;

/* An entry with port 0 stands for all ports; with protocol 0 too, for the address itself. With mesh 1, port
 * and protocol are a VXLAN network's identifier, and the address is ours in that network. */
struct vip {
    u8 address[16]; /* IPv4 mapped into ::ffff:0:0/96 */
    u16 port;       /* network byte order */
    u8 protocol, mesh;
};
enum { ANSWER_ARP = 2, TUNNEL = 4, TAKEN = 8, BANK = 16 }; /* bits of an entry's flags, and the first of its bank */
/* A hash, not preallocated: memory follows the number of VIPs. And a socket for each queue. */
struct { int (*type)[1], (*max_entries)[65536], (*map_flags)[1]; struct vip *key; u32 *value; }
    vips SECTION(".maps");
struct { int (*type)[17], (*max_entries)[256]; u32 *key; u32 *value; } xsks SECTION(".maps");
/* Our MAC address, first byte lowest; 0: not known, so any will do. */
struct { int (*type)[2], (*max_entries)[1]; u32 *key; u64 *value; } own SECTION(".maps");
/* Which ports of our addresses in overlays are ours at the moment, a bit each: workers write it. The others are
 * the kernel's, if the address is its too. */
struct { int (*type)[2], (*max_entries)[16384], (*map_flags)[1024]; u32 *key; u64 *value; } taken SECTION(".maps");
/* The entry that steers a packet: its port's, its address's, or one of an ARP owner. */
enum wanted { NOTHING, VIP, ADDRESS, OWNER };

/* Walks to the transport header: hop-by-hop, routing, destination options, authentication. */
static inline __attribute__((always_inline)) u8 *transport_of(u8 *ip, u8 *end, u8 *next) {
    u8 *at = ip + 40;
    *next = at > end ? 59 : ip[6]; /* 59: nothing follows */
    for (int i = 0; i < 8; i++) {
        if (*next != 0 && *next != 43 && *next != 60 && *next != 51) break;
        if (at + 8 > end) {
            *next = 59;
            break;
        }
        int len = *next == 51 ? at[1] * 4 + 8 : at[1] * 8 + 8;
        *next = at[0];
        at += len;
    }
    return at;
}

PART by_port(u8 protocol, u8 *port, u8 *end, struct vip *key) {
    if (protocol != 6 && protocol != 17 && protocol != 132) return NOTHING; /* TCP, UDP, SCTP */
    if (port + 2 > end) return NOTHING;
    key->port = *(u16 *)port;
    key->protocol = protocol;
    return VIP;
}

PART ipv4(u8 *ip, u8 *end, struct vip *key) {
    key->address[10] = key->address[11] = 0xff;
    __builtin_memcpy(key->address + 12, ip + 16, 4);
    if (*(u16 *)(ip + 6) & BE16(0x3fff)) return ADDRESS; /* a fragment: more follow, or an offset */
    u8 *at = ip + (ip[0] & 15) * 4;
    if (ip[9] != 1) return by_port(ip[9], at + 2, end, key);
    if (at + 8 > end) return NOTHING;
    if (at[0] == 8) return ADDRESS; /* echo request */
    /* An error belongs to the flow it quotes: the VIP's answer, so its source port counts. */
    if ((at[0] != 3 && at[0] != 11 && at[0] != 12) || at + 28 > end) return NOTHING;
    if (*(u16 *)(at + 14) & BE16(0x1fff)) return NOTHING; /* a later fragment has no ports */
    return by_port(at[17], at + 8 + (at[8] & 15) * 4, end, key);
}

PART arp(u8 *arp, struct vip *key) {
    key->address[10] = key->address[11] = 0xff;
    __builtin_memcpy(key->address + 12, arp + 24, 4);
    return *(u16 *)(arp + 6) == BE16(1) ? OWNER : NOTHING; /* a request, for its target */
}

PART ipv6(u8 *ip, u8 *end, struct vip *key) {
    u8 next, *at = transport_of(ip, end, &next);
    if (ip + 40 > end) return NOTHING;
    __builtin_memcpy(key->address, ip + 24, 16);
    if (next == 44) return ADDRESS; /* a fragment */
    if (next != 58) return by_port(next, at + 2, end, key);
    if (at + 8 > end) return NOTHING;
    if (at[0] == 128) return ADDRESS; /* echo request */
    if (at[0] == 135 && at + 24 <= end) { /* a neighbour solicitation names its target */
        __builtin_memcpy(key->address, at + 8, 16);
        return OWNER;
    }
    if (at[0] < 1 || at[0] > 4) return NOTHING;
    at = transport_of(at + 8, end, &next);
    if (next == 44 && at + 8 <= end) { /* a first fragment still has its ports */
        if (*(u16 *)(at + 2) & BE16(0xfff8)) return NOTHING;
        next = at[0];
        at += 8;
    }
    return by_port(next, at, end, key);
}

/* What a tunnel brings: no fragment, and no ping, which the kernel may answer. */
PART tunnel(u8 *udp, u8 *end, struct vip *key, u16 *to) {
    u8 *vxlan = udp + 8, *inner = vxlan + 8, *at = inner + 14;
    if (at + 28 > end || !(vxlan[0] & 8)) return NOTHING; /* the I bit: the identifier counts */
    struct vip inside = {};
    enum wanted wanted = NOTHING;
    u16 type = *(u16 *)(at - 2);
    if (type == BE16(0x0800)) wanted = ipv4(at, end, &inside);
    if (type == BE16(0x86dd)) wanted = ipv6(at, end, &inside);
    if (type == BE16(0x0806)) wanted = arp(at, &inside);
    *to = __builtin_bswap16(inside.port);
    inside.port = *(u16 *)(vxlan + 4);
    inside.protocol = vxlan[6];
    inside.mesh = 1;
    *key = inside;
    return wanted == ADDRESS ? NOTHING : wanted;
}

SECTION("xdp") int steer(struct xdp_md *ctx) {
    u8 *ethernet = (u8 *)(long)ctx->data, *end = (u8 *)(long)ctx->data_end, *at = ethernet + 14;
    if (at + 28 > end) return XDP_PASS; /* ARP, IPv4 and UDP need no less */
    u16 type = *(u16 *)(at - 2);
    for (int i = 0; i < 2 && (type == BE16(0x8100) || type == BE16(0x88a8)); i++, at += 4)
        type = *(u16 *)(at + 2);
    if (at + 28 > end) return XDP_PASS;

    struct vip key = {};
    enum wanted wanted = NOTHING;
    if (type == BE16(0x0800)) wanted = ipv4(at, end, &key);
    if (type == BE16(0x86dd)) wanted = ipv6(at, end, &key);
    if (type == BE16(0x0806)) wanted = arp(at, &key);
    if (wanted == NOTHING) return XDP_PASS;

    u32 *flags = map_lookup(&vips, &key);
    if (!flags && wanted == VIP && key.port) {
        key.port = 0;
        flags = map_lookup(&vips, &key);
    }
    if (flags && *flags & TUNNEL) {
        u8 *udp = type == BE16(0x0800) ? at + (at[0] & 15) * 4 : at + 40;
        if (type == BE16(0x86dd) && at[6] != 17) return XDP_PASS;
        u16 port = 0;
        wanted = tunnel(udp, end, &key, &port);
        flags = wanted == NOTHING ? 0 : map_lookup(&vips, &key);
        if (flags && wanted == OWNER && !(*flags & ANSWER_ARP)) return XDP_PASS;
        if (flags && wanted == VIP && *flags & TAKEN) {
            u32 at = (*flags >> BANK) * 1024 + port / 64;
            u64 *word = map_lookup(&taken, &at);
            if (!word || !(*word >> port % 64 & 1)) return XDP_PASS;
        }
        wanted = VIP; /* who asks inside a tunnel sends it to us alone */
    }
    if (!flags || (wanted == OWNER && !(*flags & ANSWER_ARP))) return XDP_PASS;

    /* What a switch flooded here, or a bridge passes on, is another station's; questions go to all. */
    u32 first = 0;
    u64 *mac = map_lookup(&own, &first), to = *(u32 *)ethernet | (u64)*(u16 *)(ethernet + 4) << 32;
    if (mac && *mac && to != *mac && (wanted != OWNER || !(ethernet[0] & 1))) return XDP_PASS;
    return redirect_map(&xsks, ctx->rx_queue_index, XDP_PASS);
}
char licence[] SECTION("license") = "Dual MIT/GPL";
