// SPDX-License-Identifier: MIT OR GPL-2.0
/* Drops all packets, in the driver: the cheapest end of a benchmark. The driver counts them. */
struct xdp_md;
enum { XDP_DROP = 1 };

__attribute__((section("xdp"), used)) int sink(struct xdp_md *ctx) {
    (void)ctx;
    return XDP_DROP;
}
char licence[] __attribute__((section("license"), used)) = "Dual MIT/GPL";
