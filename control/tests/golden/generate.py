#!/usr/bin/python3
"""Writes every case's input: `config.toml` and `in.pcap` (or `in.pcapng`).

    control/tests/golden/generate.py               all cases
    WIREMESH_BLESS=1 cargo test -p control golden  then the expected output
    control/tests/golden/verify.py                 and whether that is right

Needs scapy (Debian: python3-scapy). The same script always writes the same bytes. Each frame is
listed with its fate; the engine is not told, only verify.py is.
"""

import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

from scapy.all import (
    ARP, GRE, ICMP, IP, TCP, UDP, Dot1AD, Dot1Q, Ether, ICMPv6DestUnreach, ICMPv6EchoReply,
    ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, ICMPv6PacketTooBig,
    ICMPv6ParamProblem, ICMPv6TimeExceeded, IPOption_NOP, IPOption_RR, IPv6, IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, Raw, RouterAlert, SCTP,
    SCTPChunkData, SCTPChunkInit, fragment, in4_chksum, in6_chksum,
)

HERE = Path(__file__).parent
CLIENT, VIP, OTHER_VIP = "198.51.100.7", "203.0.113.10", "203.0.113.20"
CLIENT6, VIP6 = "2001:db8:7::7", "2001:db8:10::10"
ROUTER_MAC, NODE_MAC = "02:00:00:00:00:fe", "02:00:00:00:00:01"


# Fates.

@dataclass(frozen=True)
class Forwarded:
    """Into the tunnel of one of the service's backends, byte for byte."""
    service: str = "web"
    pieces: int = 1  # cut into that many inner fragments
    completed: bool = False  # its transport checksum was partial and is completed
    error: bool = False  # an ICMP error: belongs to the flow it quotes
    wrong: bool = False  # arrives with a wrong transport checksum, and leaves with it


@dataclass(frozen=True)
class Dropped:
    reason: str
    selected: bool = False  # a backend had been selected by then


@dataclass(frozen=True)
class Answered:
    how: str  # echo, arp, neighbour, or too_big
    mtu: int = 0
    completed: bool = False


@dataclass
class Case:
    name: str
    shows: str
    config: str
    packets: list  # of (frame, fate) or (frame, fate, interface)
    pcapng: bool = False
    names: list = field(default_factory=lambda: ["golden0"])


# Configurations.

def backend(name, vtep="10.0.0.2", last=2, **keys):
    lines = {"name": name, "vtep": vtep, "mac": f"02:42:0a:00:00:{last:02x}", **keys}
    return "[[service.backend]]\n" + toml(lines)


def service(name="web", vip=VIP, ports=("80/tcp",), vni=100, backends=(), **keys):
    lines = {"name": name, "vip": vip, "ports": list(ports), "vni": vni, **keys}
    return "\n".join(["[[service]]\n" + toml(lines), *backends])


def config(*services, node=None, next_hops=True, more=""):
    node = {"interfaces": ["golden0"], "vtep": "10.0.0.1", "vtep6": "fd00::1", **(node or {})}
    parts = ["[node]\n" + toml(node), more, *services]
    if next_hops:
        vteps = [f"10.0.0.{n}" for n in (2, 3, 4)] + [f"fd00::{n}" for n in (2, 3)]
        parts += [next_hop(vtep, f"02:00:00:00:00:{vtep[-1].zfill(2)}") for vtep in vteps
                  if any(f'"{vtep}"' in text for text in services)]
    return "\n".join(part for part in parts if part)


def next_hop(vtep, mac, **keys):
    return "[[next_hop]]\n" + toml({"vtep": vtep, "mac": mac, **keys})


def toml(keys):
    def value(v):
        if isinstance(v, bool):
            return str(v).lower()
        if isinstance(v, list):
            return "[" + ", ".join(value(item) for item in v) + "]"
        return f'"{v}"' if isinstance(v, str) else str(v)
    return "".join(f"{key} = {value(v)}\n" for key, v in keys.items())


ONE = [backend("web-1")]
TWO = [backend("web-1"), backend("web-2", "10.0.0.3", 3)]
WEB = config(service(backends=ONE))
WEB6 = config(service(vip=VIP6, backends=ONE))
ALL = ("80/tcp", "53/udp", "5000/sctp")


# Packets.

def eth(packet, **keys):
    return Ether(src=ROUTER_MAC, dst=NODE_MAC, **keys) / packet


def v4(**keys):
    return IP(**{"src": CLIENT, "dst": VIP, "flags": "DF", "id": 0x1234, **keys})


def v6(**keys):
    return IPv6(**{"src": CLIENT6, "dst": VIP6, **keys})


def tcp(flags="S", sport=40000, dport=80, seq=1000, **keys):
    return TCP(sport=sport, dport=dport, flags=flags, seq=seq, **keys)


def udp(sport=40000, dport=53, **keys):
    return UDP(sport=sport, dport=dport, **keys)


def text(length):
    return Raw(bytes(33 + i % 94 for i in range(length)))


def connection(ip, sport=40000):
    """SYN, ACK, data, more data of an odd length, FIN and the last ACK."""
    request = Raw(b"GET / HTTP/1.1\r\nHost: vip\r\n\r\n")
    return [
        eth(ip / tcp("S", sport, options=[("MSS", 1460), ("SAckOK", b""), ("WScale", 7)])),
        eth(ip / tcp("A", sport, seq=1001, ack=5000)),
        eth(ip / tcp("PA", sport, seq=1001, ack=5000) / request),
        eth(ip / tcp("PA", sport, seq=1030, ack=5000) / text(1001)),
        eth(ip / tcp("FA", sport, seq=2031, ack=9000)),
        eth(ip / tcp("A", sport, seq=2032, ack=9001)),
    ]


def all_forwarded(frames, **keys):
    return [(frame, Forwarded(**keys)) for frame in frames]


def raw(frame):
    return bytes(frame)


def patched(frame, at, new):
    """The frame with some bytes replaced."""
    frame = bytearray(bytes(frame))
    frame[at:at + len(new)] = new
    return bytes(frame)


def partial(frame):
    """The frame with a transport checksum as a veth hands it over: the pseudo header's sum."""
    frame = Ether(bytes(frame))
    layer = frame.getlayer(TCP) or frame.getlayer(UDP)
    proto, length = (6 if frame.haslayer(TCP) else 17), len(layer)
    # scapy sums pseudo header and payload; of a payload of zeros, the pseudo header remains.
    nothing = bytes(length)
    if frame.haslayer(IPv6):
        checksum = in6_chksum(proto, frame[IPv6], nothing)
    else:
        checksum = in4_chksum(proto, frame[IP], nothing)
    layer.chksum = ~checksum & 0xffff
    return bytes(frame)


def padded(frame):
    return bytes(frame).ljust(60, b"\0")


def wrong_checksum(frame):
    frame = Ether(bytes(frame))
    layer = frame.getlayer(TCP) or frame.getlayer(UDP)
    layer.chksum ^= 0x5555
    return bytes(frame)


# What the VIP sent to the client, and somebody on the way complains about.
def sent(dport=40000, sport=80, **keys):
    return IP(**{"src": VIP, "dst": CLIENT, "ttl": 5, "id": 7, **keys}) / TCP(
        sport=sport, dport=dport, flags="A", seq=77, ack=88)


def sent6(dport=40000, sport=80):
    return IPv6(src=VIP6, dst=CLIENT6, hlim=5) / TCP(
        sport=sport, dport=dport, flags="A", seq=77, ack=88)


def icmp_error(quote, kind=3, code=1, **keys):
    return eth(IP(src="192.0.2.254", dst=VIP, id=9) / ICMP(type=kind, code=code, **keys)
               / Raw(quote))


def icmpv6_error(message, quote):
    return eth(IPv6(src="2001:db8:ff::1", dst=VIP6) / message / Raw(quote))


def quote8(packet, header=20):
    """The IP header and 8 bytes, as RFC 792 has it."""
    return raw(packet)[:header + 8]


# Cases.

def connections():
    many = [eth(v4(src=f"198.51.100.{i}") / tcp(sport=30000 + i)) for i in range(1, 41)]
    weighted = [backend("web-1"), backend("web-2", "10.0.0.3", 3, weight=3),
                backend("web-3", "10.0.0.4", 4, weight=0)]
    yield Case("tcp-connection", "A TCP connection, from SYN to FIN, goes to one of two backends.",
               config(service(backends=TWO)), all_forwarded(connection(v4())))
    yield Case("many-connections-by-weight",
               "Forty connections are shared by weight; the backend that drains gets none.",
               config(service(backends=weighted)), all_forwarded(many))
    yield Case("a-reused-client-port",
               "A second SYN of the same client port is a new connection, decided anew.",
               config(service(backends=TWO)),
               all_forwarded(connection(v4()) + connection(v4())))
    yield Case("a-connection-that-began-elsewhere",
               "Packets without a SYN, as after a reroute, are given Maglev's backend.",
               config(service(backends=TWO)), all_forwarded(connection(v4())[2:]))
    yield Case("udp-datagrams", "UDP, with, without and of an empty payload.",
               config(service(ports=["53/udp"], backends=TWO)),
               all_forwarded([eth(v4() / udp() / text(n)) for n in (32, 33, 0, 1200)]
                             + [eth(v4() / udp(chksum=0) / text(50))]))
    yield Case("sctp", "SCTP is forwarded by its ports.",
               config(service(ports=["5000/sctp"], backends=TWO)),
               all_forwarded([eth(v4() / SCTP(sport=40000, dport=5000) / SCTPChunkInit()),
                              eth(v4() / SCTP(sport=40000, dport=5000, tag=9)
                                  / SCTPChunkData(data=bytes(text(100))))]))
    yield Case("ttl-one-is-forwarded",
               "The tunnel is no hop to the packet inside: TTL 1 gets through unchanged.",
               config(service(backends=ONE), service("six", VIP6, backends=ONE)),
               [(eth(v4(ttl=1) / tcp()), Forwarded()),
                (eth(v6(hlim=1) / tcp()), Forwarded("six"))])


def underlays():
    frames4 = connection(v4()) + [eth(v4() / udp() / text(99)),
                                  eth(v4() / udp(chksum=0) / text(99)),
                                  eth(v4() / SCTP(dport=5000) / SCTPChunkData(data=b"sctp")),
                                  eth(v4(options=[IPOption_NOP()]) / tcp("A", 5))]
    frames6 = connection(v6()) + [eth(v6() / udp() / text(99)),
                                  eth(v6() / SCTP(dport=5000) / SCTPChunkData(data=b"sctp")),
                                  eth(v6() / IPv6ExtHdrDestOpt() / tcp("A", 5) / text(7))]
    over4, over6 = "10.0.0.2", "fd00::2"
    for name, shows, vip, frames, vtep, keys in [
        ("ipv6-over-ipv4", "IPv6 clients over an IPv4 underlay.", VIP6, frames6, over4, {}),
        ("ipv6-over-ipv6", "IPv6 clients over an IPv6 underlay, whose UDP checksum is computed.",
         VIP6, frames6, over6, {}),
        ("ipv4-over-ipv6", "IPv4 clients over an IPv6 underlay, whose UDP checksum is computed.",
         VIP, frames4, over6, {}),
        ("udp-checksum-over-ipv4", "`udp_checksum = true` computes the outer one over IPv4, too.",
         VIP, frames4, over4, {"udp_checksum": True}),
        ("no-udp-checksum-over-ipv6", "`udp_checksum = false` leaves it out over IPv6, too.",
         VIP6, frames6, over6, {"udp_checksum": False}),
    ]:
        web = service(vip=vip, ports=ALL, backends=[backend("web-1", vtep, **keys)])
        yield Case(name, shows, config(web), all_forwarded(frames))
    yield Case("a-wrong-checksum-stays-wrong",
               "A packet that arrived damaged is not repaired, whatever the outer checksum.",
               config(service(ports=ALL, backends=[backend("web-1", over6)])),
               [(wrong_checksum(eth(v4() / tcp() / text(20))), Forwarded(wrong=True)),
                (wrong_checksum(eth(v4() / udp() / text(20))), Forwarded(wrong=True))])
    values = [(dscp << 2 | ecn) for dscp in (0, 46, 63) for ecn in range(4)]
    yield Case("dscp-and-ecn", "DSCP and ECN of the packet are those of the tunnel.",
               config(service(backends=ONE), service("six", VIP6, backends=[
                   backend("six-1", "fd00::2")])),
               [(eth(v4(tos=tos) / tcp("A")), Forwarded()) for tos in values]
               + [(eth(v6(tc=tos, fl=0xfffff) / tcp("A")), Forwarded("six")) for tos in values])


def link_layers():
    ip = v4() / tcp()
    yield Case("vlan-tags", "One VLAN tag or two are taken off; three are too many.", WEB,
               all_forwarded([eth(Dot1Q(vlan=5, prio=3) / ip), eth(Dot1Q(vlan=0) / ip),
                              eth(Dot1AD(vlan=7) / Dot1Q(vlan=5) / ip),
                              eth(Dot1Q(vlan=7) / Dot1Q(vlan=5) / ip)])
               + [(eth(Dot1Q() / Dot1Q() / Dot1Q() / ip), Dropped("not_ip"))])
    yield Case("padding-is-stripped", "What Ethernet added to reach 60 bytes is not carried on.",
               config(service(ports=ALL, backends=[backend("web-1", "fd00::2")]),
                      service("six", VIP6, ports=ALL, backends=ONE)),
               [(padded(eth(v4() / tcp("A"))), Forwarded()),
                (padded(eth(v4() / udp())), Forwarded()),
                (padded(eth(v6() / udp())) + b"\xff" * 9, Forwarded("six"))])
    yield Case("unknown-ethertypes", "What is neither IP nor ARP is dropped.", WEB,
               [(eth(text(46), type=0x88cc), Dropped("not_ip")),
                (eth(text(46), type=0x8847), Dropped("not_ip")),
                (eth(text(46), type=46), Dropped("not_ip"))])  # a length: IEEE 802.3 with LLC


def extensions():
    yield Case("ipv4-options", "IPv4 options are carried on as they are.", WEB,
               all_forwarded([eth(v4(options=[IPOption_NOP()]) / tcp() / text(10)),
                              eth(v4(options=[IPOption_RR(length=39, pointer=4,
                                                          routers=["0.0.0.0"] * 9)])
                                  / tcp("A") / text(11))]))
    hop = IPv6ExtHdrHopByHop(options=[RouterAlert()])
    chain = [v6() / hop, v6() / IPv6ExtHdrDestOpt(),
             v6() / IPv6ExtHdrRouting(type=4, segleft=0, addresses=[VIP6]),
             v6() / IPv6ExtHdrFragment(id=9),
             v6() / hop / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(addresses=[VIP6])
             / IPv6ExtHdrFragment(id=9) / IPv6ExtHdrDestOpt()]
    frames = [eth(ip / tcp() / text(13)) for ip in chain] + [eth(ip / udp() / text(13))
                                                             for ip in chain]
    # RFC 4302: its length is in words of four bytes, less two.
    ah = bytes([6, 4]) + bytes(2 + 4 + 4 + 12)
    frames.append(eth(v6(nh=51) / Raw(ah + raw(tcp(chksum=0)))))
    nine = v6()
    for _ in range(9):
        nine = nine / IPv6ExtHdrDestOpt()
    cut = eth(v6() / IPv6ExtHdrDestOpt() / tcp())
    for name, vtep in [("ipv6-extension-headers", "10.0.0.2"),
                       ("ipv6-extension-headers-over-ipv6", "fd00::2")]:
        fates = all_forwarded(frames)
        fates[-1] = (frames[-1], Forwarded(wrong=True))  # the test's AH packet carries no checksum
        yield Case(name, "Extension headers are walked through, eight at most, to the ports.",
                   config(service(vip=VIP6, ports=ALL, backends=[backend("web-1", vtep)])),
                   fates
                   + [(eth(nine / tcp()), Dropped("bad_ip_header")),
                      (patched(cut, 55, b"\xff"), Dropped("truncated")),  # its length
                      (eth(v6(nh=59)), Dropped("unknown_protocol"))])


def fragments():
    whole = v4(flags=0) / udp() / text(3000)
    yield Case("ipv4-fragments", "Fragments carry no ports, or not all do: dropped and counted.",
               config(service(ports=ALL, backends=ONE)),
               [(eth(piece), Dropped("fragment")) for piece in fragment(whole, 1400)])
    first = v6() / IPv6ExtHdrFragment(m=1, id=5, nh=17) / Raw(raw(udp(len=1408)) + bytes(1000))
    later = v6() / IPv6ExtHdrFragment(offset=126, id=5, nh=17) / Raw(bytes(400))
    yield Case("ipv6-fragments", "The same over IPv6.",
               config(service(vip=VIP6, ports=ALL, backends=ONE)),
               [(eth(piece), Dropped("fragment")) for piece in (first, later)])


def malformed():
    syn, syn6 = raw(eth(v4() / tcp())), raw(eth(v6() / tcp()))
    tagged = raw(eth(Dot1Q() / v4() / tcp()))
    udp4 = raw(eth(v4() / udp(dport=80)))
    cuts = [(syn[:n], Dropped("truncated")) for n in (0, 1, 13, 14, 20, 33, 34, 41, 53)]
    cuts += [(syn6[:n], Dropped("truncated")) for n in (14, 53, 54, 73)]
    cuts += [(tagged[:n], Dropped("truncated")) for n in (15, 17, 18, 30)]
    # Headers that say they are whole, of packets that are too short for their transport.
    short = lambda n: eth(v4(proto=6) / Raw(raw(tcp())[:n]))
    cuts += [(short(n), Dropped("truncated")) for n in (0, 3, 19)]
    cuts += [(patched(udp4[:41], 16, b"\0\x1b"), Dropped("truncated")),
             (eth(v6(plen=0) / tcp()), Dropped("truncated")),
             (eth(v6(nh=60) / Raw(b"\x06")), Dropped("truncated")),
             (eth(v6(nh=44) / Raw(b"\x06\0\0\0")), Dropped("truncated")),
             (eth(v4(proto=1) / Raw(b"\x08\0\0\0")), Dropped("truncated"))]
    both = config(service(backends=ONE), service("six", VIP6, backends=ONE))
    yield Case("truncated-frames", "Frames that end too early, at every header.", both, cuts)
    bad = Dropped("bad_ip_header")
    yield Case("malformed-ip-headers", "IP headers that contradict themselves.", both, [
        (patched(syn, 14, b"\x55"), bad),  # version 5
        (patched(syn, 14, b"\x65"), bad),  # IPv6 under IPv4's EtherType
        (patched(syn, 14, b"\x44"), bad),  # a header of 16 bytes
        (patched(syn, 14, b"\x40"), bad),
        (patched(syn, 14, b"\x4f"), bad),  # a header longer than the packet
        (patched(syn, 16, b"\0\0"), bad),  # no length
        (patched(syn, 16, b"\0\x13"), bad),  # shorter than the header
        (patched(syn, 16, b"\0\x29"), Dropped("truncated")),  # beyond the frame
        (patched(syn, 16, b"\xff\xff"), Dropped("truncated")),
        (patched(syn6, 14, b"\x45"), bad),
        (patched(syn6, 14, b"\x00"), bad),
        (patched(syn6, 18, b"\0\x15"), Dropped("truncated")),
        (patched(syn6, 18, b"\xff\xff"), Dropped("truncated")),
    ])
    yield Case("other-protocols", "Protocols without ports that we know.", WEB,
               [(eth(v4() / GRE()), Dropped("unknown_protocol")),
                (eth(v4(proto=50) / text(40)), Dropped("unknown_protocol")),
                (eth(v4(proto=41) / v6() / tcp()), Dropped("unknown_protocol"))])


def neighbours():
    ask = lambda who, **keys: ARP(hwsrc=ROUTER_MAC, psrc="203.0.113.1", pdst=who, **keys)
    broadcast = lambda arp: padded(Ether(src=ROUTER_MAC, dst="ff:ff:ff:ff:ff:ff") / arp)
    tagged = padded(Ether(src=ROUTER_MAC, dst="ff:ff:ff:ff:ff:ff") / Dot1Q(vlan=5) / ask(VIP))
    others = [(broadcast(ask("203.0.113.99")), Dropped("not_ip")),
              (broadcast(ask(VIP, op=2)), Dropped("not_ip")),
              (broadcast(ask(VIP, ptype=0x86dd)), Dropped("not_ip")),
              (broadcast(ask(VIP))[:40], Dropped("truncated"))]
    probe = ARP(hwsrc=ROUTER_MAC, psrc="0.0.0.0", pdst=VIP)
    yield Case("arp-is-not-answered", "ARP for a VIP is not answered unless it is asked for.", WEB,
               [(broadcast(ask(VIP)), Dropped("not_ip")), *others])
    yield Case("arp-is-answered", "`answer_arp = true` makes this node the owner of its VIPs.",
               config(service(backends=ONE), node={"answer_arp": True}),
               [(broadcast(ask(VIP)), Answered("arp")), (tagged, Answered("arp")),
                (broadcast(probe), Answered("arp")), *others])

    def solicit(target=VIP6, src=CLIENT6, hlim=255, options=True, code=0):
        message = ICMPv6ND_NS(tgt=target, code=code)
        if options:
            message = message / ICMPv6NDOptSrcLLAddr(lladdr=ROUTER_MAC)
        return Ether(src=ROUTER_MAC, dst="33:33:ff:00:00:10") / IPv6(
            src=src, dst="ff02::1:ff00:10", hlim=hlim) / message
    unserved = Dropped("unknown_protocol")
    announce = eth(IPv6(src=CLIENT6, dst=VIP6, hlim=255) / ICMPv6ND_NA(tgt=CLIENT6))
    others = [(solicit("2001:db8:10::99"), unserved), (solicit(hlim=254), unserved),
              (solicit(code=1), unserved), (announce, unserved),
              (eth(v6(nh=58, hlim=255) / Raw(b"\x87\0\0\0\0\0\0\0" + bytes(15))),
               Dropped("truncated"))]
    yield Case("neighbour-solicitation-is-not-answered", "The same for IPv6.", WEB6,
               [(solicit(), unserved), *others])
    yield Case("neighbour-solicitation-is-answered",
               "`answer_arp = true` answers for IPv6 VIPs, also those who probe for duplicates.",
               config(service(vip=VIP6, backends=ONE), node={"answer_arp": True}),
               [(solicit(), Answered("neighbour")),
                (solicit(src="::", options=False), Answered("neighbour")), *others])


def ping():
    ask = lambda **keys: ICMP(type=8, id=77, seq=3, **keys)
    yield Case("ping", "A VIP answers ping, with the question's payload and tags.",
               config(service(backends=ONE), service("six", VIP6, backends=ONE)),
               [(eth(v4() / ask() / text(56)), Answered("echo")),
                (padded(eth(v4(ttl=1) / ask() / text(3))), Answered("echo")),
                # Of a message that is all zero the checksum is 0xffff, never 0.
                (eth(v4() / ICMP(type=8)), Answered("echo")),
                (eth(v4() / ICMP(type=8) / Raw(bytes(7))), Answered("echo")),
                (eth(Dot1Q(vlan=5) / v4(options=[IPOption_NOP()]) / ask() / text(8)),
                 Answered("echo")),
                (eth(v6() / ICMPv6EchoRequest(id=77, seq=3, data=b"x" * 57)), Answered("echo")),
                (eth(v6() / IPv6ExtHdrDestOpt() / ICMPv6EchoRequest(id=77, data=b"x")),
                 Answered("echo")),
                (eth(v4(dst=OTHER_VIP) / ask()), Dropped("no_service")),
                (eth(v4() / ICMP(type=0)), Dropped("unknown_protocol")),
                (eth(v4() / ask(code=1)), Dropped("unknown_protocol")),
                (eth(v4() / ICMP(type=13, ts_ori=0, ts_rx=0, ts_tx=0)),
                 Dropped("unknown_protocol")),
                (eth(v6() / ICMPv6EchoReply()), Dropped("unknown_protocol"))])


def icmp_errors():
    error, unmatched = Forwarded(error=True), Dropped("icmp_unmatched")
    options = IP(src=VIP, dst=CLIENT, options=[IPOption_NOP()]) / TCP(sport=80, dport=40000)
    later = IP(src=VIP, dst=CLIENT, frag=100, proto=6) / text(64)
    yield Case("icmp-errors-ipv4",
               "ICMP errors go to the backend of the flow they quote, in full or by 8 bytes.",
               config(service(backends=TWO)), [
                   (eth(v4() / tcp()), Forwarded()),
                   (icmp_error(quote8(sent())), error),
                   (icmp_error(raw(sent() / text(500))), error),
                   (icmp_error(quote8(sent()), 3, 4, nexthopmtu=1400), error),
                   (icmp_error(quote8(sent()), 11, 0), error),
                   (icmp_error(quote8(sent()), 12, 0), error),
                   (icmp_error(quote8(options, 24)), error),
                   (icmp_error(quote8(sent(frag=0, flags="MF"))), error),
                   (icmp_error(quote8(sent(41000))), error),  # of a flow never seen
                   (icmp_error(quote8(sent(sport=81))), unmatched),
                   (icmp_error(quote8(sent(src=OTHER_VIP))), unmatched),
                   (icmp_error(raw(later)), unmatched),
                   (icmp_error(quote8(IP(src=VIP, dst=CLIENT) / GRE() / text(9))), unmatched),
                   (icmp_error(b"\x65" + raw(sent())[1:]), unmatched),
                   (icmp_error(raw(sent())[:23]), Dropped("truncated")),
                   (icmp_error(raw(sent())[:19]), Dropped("truncated")),
                   (icmp_error(quote8(sent()), 5, 1), Dropped("unknown_protocol")),
                   (icmp_error(quote8(sent()), 4, 0), Dropped("unknown_protocol")),
               ])
    extended = IPv6(src=VIP6, dst=CLIENT6) / IPv6ExtHdrDestOpt() / TCP(sport=80, dport=40000)
    later = IPv6(src=VIP6, dst=CLIENT6) / IPv6ExtHdrFragment(offset=10, nh=6) / text(64)
    unreachable = ICMPv6DestUnreach(code=3)
    yield Case("icmp-errors-ipv6", "The same for ICMPv6.",
               config(service(vip=VIP6, backends=[backend("web-1"),
                                                  backend("web-2", "fd00::3", 3)])), [
                   (eth(v6() / tcp()), Forwarded()),
                   (icmpv6_error(unreachable, raw(sent6() / text(900))), error),
                   (icmpv6_error(ICMPv6PacketTooBig(mtu=1400), raw(sent6())), error),
                   (icmpv6_error(ICMPv6TimeExceeded(), raw(sent6())), error),
                   (icmpv6_error(ICMPv6ParamProblem(), raw(extended)), error),
                   (icmpv6_error(unreachable, quote8(sent6(), 40)), error),
                   (icmpv6_error(unreachable, raw(sent6(sport=81))), unmatched),
                   (icmpv6_error(unreachable, raw(later)), unmatched),
                   (icmpv6_error(unreachable, raw(sent6())[:43]), Dropped("truncated")),
                   (icmpv6_error(unreachable, raw(sent6())[:39]), Dropped("truncated")),
               ])


def sizes():
    fits4, fits6 = 1450, 1430  # what 1500 leaves over IPv4 and IPv6
    of = lambda ip, l4, size: eth(ip / l4 / text(size - len(ip) - len(l4)))
    told = lambda mtu: Answered("too_big", mtu)
    yield Case("too-big-with-df", "Too big and not to be cut: ICMP tells the MTU that would fit.",
               config(service(backends=ONE), service("udp", OTHER_VIP, ports=ALL, backends=[
                   backend("udp-1", "fd00::2")])),
               [(of(v4(), tcp("A"), fits4), Forwarded()),
                (of(v4(), tcp("A"), fits4 + 1), told(fits4)),
                (of(v4(), tcp("A", 40001), 1500), told(fits4)),
                (eth(Dot1Q(vlan=5) / of(v4(), tcp("A"), 1500).payload), told(fits4)),
                (of(v4(dst=OTHER_VIP), udp(), fits6), Forwarded("udp")),
                (of(v4(dst=OTHER_VIP), udp(), fits6 + 1), told(fits6))])
    yield Case("too-big-ipv6", "IPv6 is never cut: \"packet too big\" tells the MTU.",
               config(service(vip=VIP6, ports=ALL, backends=ONE)),
               [(of(v6(), tcp("A"), fits4), Forwarded()),
                (of(v6(), tcp("A"), fits4 + 1), told(fits4)),
                (of(v6(), udp(), 1500), told(fits4)),
                (eth(v6() / IPv6ExtHdrDestOpt() / udp() / text(1440)), told(fits4))])
    free = lambda **keys: v4(flags=0, **keys)
    for name, keys in [("too-big-is-cut", {}), ("too-big-is-cut-with-udp-checksum",
                                                {"udp_checksum": True})]:
        yield Case(name, "Too big, but may be cut: the packet inside is, never the tunnel's.",
                   config(service(ports=ALL, backends=[backend("web-1", **keys)])),
                   [(of(free(), udp(), fits4), Forwarded()),
                    (of(free(), udp(), fits4 + 1), Forwarded(pieces=2)),
                    (of(free(), tcp("A"), 1500), Forwarded(pieces=2)),
                    (of(free(), udp(), 1448), Forwarded()),
                    (of(free(id=2), udp(), 8000), Forwarded(pieces=6)),
                    (partial(of(free(id=3), udp(), 2000)), Forwarded(pieces=2, completed=True)),
                    # Too many pieces, or options that would have to be copied: the sender is told.
                    (of(free(id=4), udp(), 12000), told(fits4)),
                    (of(free(options=[IPOption_NOP()]), udp(), 1500), told(fits4))])
    yield Case("a-backend-with-a-small-mtu", "A backend's own `mtu` counts where it is smaller.",
               config(service(ports=ALL, backends=[backend("web-1", mtu=576)]),
                      service("six", VIP6, backends=[backend("six-1", "fd00::2", mtu=1280)]),
                      service("large", OTHER_VIP, backends=[backend("large-1", mtu=9000)])),
               [(of(v4(), tcp("A"), 576), Forwarded()), (of(v4(), tcp("A"), 577), told(576)),
                (of(free(), udp(), 1500), Forwarded(pieces=3)),
                (of(v6(), tcp("A"), 1280), Forwarded("six")),
                (of(v6(), tcp("A"), 1281), told(1280)),
                (of(v4(dst=OTHER_VIP), tcp("A"), 1451), told(fits4))])
    hop = next_hop("10.0.0.2", "02:00:00:00:00:02", mtu=1400)
    jumbo = next_hop("10.0.0.3", "02:00:00:00:00:03", mtu=9000)
    yield Case("a-next-hop-with-an-mtu", "A next hop's `mtu` stands for the interface's.",
               config(service(backends=ONE), service("jumbo", OTHER_VIP, backends=[
                   backend("jumbo-1", "10.0.0.3", 3)]), hop, jumbo, next_hops=False),
               [(of(v4(), tcp("A"), 1350), Forwarded()), (of(v4(), tcp("A"), 1351), told(1350)),
                (of(v4(dst=OTHER_VIP), tcp("A"), 8950), Forwarded("jumbo")),
                (of(v4(dst=OTHER_VIP), tcp("A"), 8951), told(8950))])
    yield Case("icmp-about-size-is-limited",
               "Answers are rate-limited, and no ICMP error is answered with another.",
               config(service(backends=ONE), more="[dataplane]\n" + toml({"icmp_errors_per_s": 1})),
               [(of(v4(), tcp("A"), 1500), told(fits4)),
                (of(v4(), tcp("A"), 1500), Dropped("too_big_silent", selected=True)),
                (eth(IP(src="192.0.2.254", dst=VIP, flags="DF") / ICMP(type=3, code=1)
                     / Raw(raw(sent() / text(1432)))),
                 Dropped("too_big_silent", selected=False))])


def partial_checksums():
    frames = [v4() / tcp("A") / text(100), v4() / udp() / text(101), v4() / tcp("S"),
              v4(options=[IPOption_NOP()]) / tcp("A") / text(3), v6() / tcp("A") / text(100),
              v6() / udp() / text(101), v6() / IPv6ExtHdrDestOpt() / tcp("A") / text(4)]
    fate = lambda ip: Forwarded("six" if IPv6 in ip else "web", completed=True)
    for name, vtep in [("partial-checksums", "10.0.0.2"),
                       ("partial-checksums-over-ipv6", "fd00::2")]:
        yield Case(name, "Checksums that the sender left to its network card are completed.",
                   config(service(ports=ALL, backends=[backend("web-1", vtep)]),
                          service("six", VIP6, ports=ALL, backends=[backend("six-1", vtep)])),
                   [(partial(eth(ip)), fate(ip)) for ip in frames]
                   + [(padded(partial(eth(v4() / udp() / text(5)))), Forwarded(completed=True)),
                      (partial(eth(v4() / tcp("A") / text(1450))),
                       Answered("too_big", 1450 if vtep[0] == "1" else 1430, completed=True))])


def services():
    two = config(
        service(ports=["80/tcp", "443/tcp"], backends=ONE),
        service("quic", ports=["443/udp"], vni=200, backends=[
            backend("quic-1", "10.0.0.3", 3, vni=0xffffff, port=8472)]),
        service("other", OTHER_VIP, vni=300, vxlan_port=4790, backends=[
            backend("other-1", "10.0.0.4", 4)]))
    yield Case("several-services", "Each packet to its own service, VNI and UDP port.", two,
               [(eth(v4() / tcp()), Forwarded()), (eth(v4() / tcp(dport=443)), Forwarded()),
                (eth(v4() / udp(dport=443) / text(9)), Forwarded("quic")),
                (eth(v4(dst=OTHER_VIP) / tcp()), Forwarded("other"))])
    yield Case("every-port", "A service on all ports of its VIP.",
               config(service(ports=["1-65535/tcp"], backends=TWO)),
               [(eth(v4() / tcp(dport=port)), Forwarded()) for port in (1, 80, 65535)]
               + [(eth(v4() / udp(dport=80)), Dropped("no_service"))])
    yield Case("nobody-listens", "Ports and addresses without a service.", WEB,
               [(eth(v4() / tcp(dport=81)), Dropped("no_service")),
                (eth(v4() / udp(dport=80)), Dropped("no_service")),
                (eth(v4(dst=OTHER_VIP) / tcp()), Dropped("no_service")),
                (eth(v6() / tcp()), Dropped("no_service")),
                # The mapped form of an IPv4 address is no address that a packet may have.
                (eth(v6(dst="::ffff:" + VIP) / tcp()), Dropped("bad_ip_header")),
                (eth(v6(src="::ffff:" + CLIENT) / tcp()), Dropped("bad_ip_header"))])
    yield Case("a-service-without-backends", "It has a VIP, and nobody to forward to.",
               config(service()), [(eth(v4() / tcp()), Dropped("no_backend")),
                                   (eth(v4() / tcp("A")), Dropped("no_backend")),
                                   (icmp_error(quote8(sent())), Dropped("no_backend")),
                                   (eth(v4() / ICMP(type=8)), Answered("echo"))])
    draining = [backend("web-1", weight=0), backend("web-2", "10.0.0.3", 3, weight=0)]
    yield Case("all-backends-drain", "With no weight left nobody takes what is new.",
               config(service(backends=draining)),
               [(eth(v4() / tcp()), Dropped("no_backend")),
                (eth(v4() / tcp("A")), Dropped("no_backend"))])
    yield Case("next-hops-unknown", "Without [[next_hop]] the outer MAC addresses are zero.",
               config(service(backends=TWO), node={}, next_hops=False),
               all_forwarded([eth(v4(src=f"198.51.100.{i}") / tcp()) for i in range(1, 9)]))


def capture_formats():
    hops = [next_hop("10.0.0.2", "02:00:00:00:00:02", interface="golden0"),
            next_hop("10.0.0.3", "02:00:00:00:00:03", interface="golden1", mtu=1400)]
    names = ["golden0", "golden1"]
    syn = lambda i: eth(v4(src=f"198.51.100.{i}") / tcp())
    packets = [(syn(i), Forwarded(), i % 2) for i in range(8)]
    packets += [(eth(v4() / ICMP(type=8) / text(4)), Answered("echo"), 1)]
    yield Case("pcapng-of-two-interfaces",
               "pcapng: two interfaces, one with times in microseconds, one in nanoseconds.",
               config(service(backends=TWO), *hops, node={"interfaces": names}, next_hops=False),
               packets, pcapng=True, names=names)


def cases():
    for group in (connections, underlays, link_layers, extensions, fragments, malformed,
                  neighbours, ping, icmp_errors, sizes, partial_checksums, services,
                  capture_formats):
        yield from group()


# Files.

START_NS = 1_700_000_000 * 10**9


def time_ns(index):
    """A packet each millisecond."""
    return START_NS + index * 1_000_000


def pcap(case):
    yield struct.pack("<IHHIIII", 0xa1b2c3d4, 2, 4, 0, 0, 0xffff, 1)
    for index, (frame, *_) in enumerate(case.packets):
        seconds, rest = divmod(time_ns(index), 10**9)
        data = raw(frame)
        yield struct.pack("<IIII", seconds, rest // 1000, len(data), len(data)) + data


def block(kind, body):
    body += bytes(-len(body) % 4)
    length = len(body) + 12
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)


def option(code, value):
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def pcapng(case):
    yield block(0x0a0d0d0a, struct.pack("<IHHq", 0x1a2b3c4d, 1, 0, -1))
    resolutions = [6, 9]
    for name, resolution in zip(case.names, resolutions):
        options = option(2, name.encode())
        if resolution != 6:  # six is what it is if not said
            options += option(9, bytes([resolution]))
        yield block(1, struct.pack("<HHI", 1, 0, 0xffff) + options + option(0, b""))
    for index, (frame, _, interface) in enumerate(case.packets):
        time = time_ns(index) // 10**(9 - resolutions[interface])
        data = raw(frame)
        head = struct.pack("<IIIII", interface, time >> 32, time & 0xffffffff, len(data), len(data))
        yield block(6, head + data)


def main():
    present = {path.name for path in HERE.iterdir() if path.is_dir() and path.name[0] not in "._"}
    wanted = {case.name: case for case in cases()}
    for name in present - set(wanted):
        shutil.rmtree(HERE / name)
    for name, case in wanted.items():
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(f"# {case.shows}\n\n{case.config}")
        suffix, write = ("pcapng", pcapng) if case.pcapng else ("pcap", pcap)
        (folder / f"in.{suffix}").write_bytes(b"".join(write(case)))
    print(f"{len(wanted)} cases")


if __name__ == "__main__":
    main()
