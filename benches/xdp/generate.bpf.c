// SPDX-License-Identifier: MIT OR GPL-2.0
/* Makes 64-byte packets (with FCS) of 131,072 flows, half UDP and half TCP ACKs, in scattered
 * order. The generator runs it on live frames: what it makes of a frame leaves by the interface.
 * Frames are used again after whoever got them has changed them, so they are written anew from end
 * to end. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
struct xdp_md { u32 data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex; };
enum { XDP_DROP = 1, XDP_TX = 3, TCP = 6, UDP = 17, FLOW_BITS = 17 };

#define SECTION(name) __attribute__((section(name), used))
#define BE16(n) ((u16)__builtin_bswap16(n))

struct frame {
    u8 ethernet[14];
    u8 version, tos;
    u16 ip_len, id, fragment;
    u8 ttl, protocol;
    u16 ip_checksum, src[2], dst[2];
    u16 l4[13]; /* UDP with a payload of zeroes, or TCP and padding */
} __attribute__((packed));

const volatile struct frame template; /* set by the generator */
u32 made;                              /* packets so far */

static inline __attribute__((always_inline)) u16 folded(u32 sum) {
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return ~sum;
}

SECTION("xdp") int generate(struct xdp_md *ctx) {
    struct frame *frame = (void *)(long)ctx->data;
    if ((void *)(frame + 1) > (void *)(long)ctx->data_end) return XDP_DROP;

    /* 2^32 by the golden ratio: its high bits visit all flows, far from one after the other. */
    u32 flow = made++ * 0x9e3779b1u >> (32 - FLOW_BITS);
    u16 tcp = flow & 1, ip_len = tcp ? 40 : 46, l4_len = ip_len - 20;

    *frame = template;
    frame->ip_len = BE16(ip_len);
    frame->protocol = tcp ? TCP : UDP;
    frame->src[1] = BE16(1 + (flow >> 15)); /* a few clients, */
    frame->l4[0] = BE16(1024 + (flow >> 1 & 0x3fff)); /* and 16,384 ports of each */
    frame->l4[2] = tcp ? BE16(1) : BE16(l4_len); /* sequence number, or length */
    frame->l4[5] = tcp ? BE16(1) : 0;      /* acknowledged */
    frame->l4[6] = tcp ? BE16(0x5010) : 0; /* 20 bytes of header, ACK */
    frame->l4[7] = tcp ? BE16(512) : 0;    /* window */

    u16 *ip = (void *)&frame->version;
    u32 sum = 0;
    for (int i = 0; i < 10; i++) sum += ip[i];
    frame->ip_checksum = folded(sum);

    sum = BE16(tcp ? TCP : UDP) + BE16(l4_len);
    for (int i = 6; i < 20; i++) sum += ip[i]; /* addresses, and all of the header */
    if (tcp) frame->l4[8] = folded(sum);
    else frame->l4[3] = folded(sum);
    return XDP_TX;
}
char licence[] SECTION("license") = "Dual MIT/GPL";
