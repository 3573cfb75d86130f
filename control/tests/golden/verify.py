#!/usr/bin/python3
"""Judges every case's expected output by what each frame of its input should have become.

    control/tests/golden/verify.py [CASE]...

Knows nothing of our code: reads `config.toml`, the frames and fates of generate.py, `out.pcap` and
`counters.json`. Checksums are computed by scapy and, where it is installed, by tshark.
"""

import json
import logging
import shutil
import struct
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

from scapy.all import (
    ARP, IP, UDP, VXLAN, Ether, ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6, checksum,
    in4_chksum, in6_chksum,
)

sys.dont_write_bytecode = True  # the folder holds cases, and nothing else

from generate import CLIENT6, HERE, VIP, VIP6, Answered, Dropped, Forwarded, cases, time_ns

ZERO_MAC = "00:00:00:00:00:00"  # of an interface that is not there
LINK_MTU = 1500  # the same
TAGS = (b"\x81\x00", b"\x88\xa8")


def check(holds, *what):
    if not holds:
        raise AssertionError(" ".join(str(item) for item in what))


def same(what, is_, should):
    check(is_ == should, f"{what} is {is_!r} instead of {should!r}")


# Reading frames.

def frames_by_time(path):
    """The frames of a nanosecond pcap, by their time."""
    data = path.read_bytes()
    same("magic", struct.unpack_from("<I", data)[0], 0xa1b23c4d)
    same("link type", struct.unpack_from("<I", data, 20)[0], 1)
    frames, at = defaultdict(list), 24
    while at < len(data):
        seconds, nanoseconds, captured, length = struct.unpack_from("<IIII", data, at)
        same("captured length", captured, length)
        frames[seconds * 10**9 + nanoseconds].append(data[at + 16:at + 16 + length])
        at += 16 + length
    return frames


def link_len(frame):
    at = 12
    while frame[at:at + 2] in TAGS:
        at += 4
    return at + 2


def ip_packet(frame):
    """The IP packet of a frame, without link header, tags and padding."""
    packet = frame[link_len(frame):]
    length = struct.unpack_from(">H", packet, 2)[0] if packet[0] >> 4 == 4 else (
        40 + struct.unpack_from(">H", packet, 4)[0])
    check(length <= len(packet), "the packet is longer than its frame")
    return packet[:length]


def parsed(packet):
    return IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)


def l4_offset(packet):
    """Where the transport or ICMP header starts, and which it is."""
    if packet[0] >> 4 == 4:
        return (packet[0] & 15) * 4, packet[9]
    at, kind = 40, packet[6]
    while kind in (0, 43, 44, 51, 60):
        length = (packet[at + 1] + 2) * 4 if kind == 51 else (packet[at + 1] + 1) * 8
        at, kind = at + (8 if kind == 44 else length), packet[at]
    return at, kind


def flow_key(packet):
    ip = parsed(packet)
    at, kind = l4_offset(packet)
    sport, dport = struct.unpack_from(">HH", packet, at)
    return ip.src, ip.dst, kind, sport, dport


def quoted_key(packet):
    """The key of the flow that an ICMP error is about: the quoted packet runs the other way."""
    at, _ = l4_offset(packet)
    src, dst, kind, sport, dport = flow_key(packet[at + 8:])
    return dst, src, kind, dport, sport


# Checksums.

def check_ip_header(ip):
    if ip.version == 4:
        same("sum of the IP header", checksum(bytes(ip)[:ip.ihl * 4]), 0)


def check_transport(packet):
    """The checksum behind the IP header is right, or UDP's is left out."""
    ip, (at, kind) = parsed(packet), l4_offset(packet)
    segment = packet[at:]
    if kind == 17 and segment[6:8] == b"\0\0":
        check(ip.version == 4, "a zero UDP checksum over IPv6")
    elif kind in (6, 17) and ip.version == 4:
        same("transport sum", in4_chksum(kind, ip, segment), 0)
    elif kind in (6, 17, 58):
        same("transport sum", in6_chksum(kind, ip, segment), 0)
    elif kind == 1:
        same("ICMP sum", checksum(segment), 0)


def with_whole_checksum(packet):
    """The packet with the transport checksum that it should have had."""
    at, kind = l4_offset(packet)
    field = at + (16 if kind == 6 else 6)
    packet = packet[:field] + b"\0\0" + packet[field + 2:]
    ip = parsed(packet)
    chksum = in4_chksum if ip.version == 4 else in6_chksum
    return packet[:field] + struct.pack(">H", chksum(kind, ip, packet[at:])) + packet[field + 2:]


# Meaning.

class Judge:
    def __init__(self, case):
        self.case = case
        self.folder = HERE / case.name
        config = tomllib.loads((self.folder / "config.toml").read_text())
        self.node = config["node"]
        self.services = {service["name"]: service for service in config.get("service", [])}
        self.hops = {hop["vtep"]: hop for hop in config.get("next_hop", [])}
        self.chosen = {}  # flow → backend and UDP source port
        self.seen = set()
        self.events, self.drops = Counter(), Counter()
        self.backends = {f"{service['name']}/{backend['name']}": Counter(packets=0, bytes=0)
                         for service in self.services.values()
                         for backend in service.get("backend", [])}

    def run(self):
        out = frames_by_time(self.folder / "out.pcap")
        counters = json.loads((self.folder / "counters.json").read_text())
        for index, (frame, fate, *_) in enumerate(self.case.packets):
            frame, left = bytes(frame), out.pop(time_ns(index), [])
            self.events.update(rx_packets=1, rx_bytes=len(frame))
            self.events.update(tx_packets=len(left), tx_bytes=sum(map(len, left)))
            try:
                self.judge(frame, fate, left)
            except Exception as error:
                raise AssertionError(f"{self.case.name}, packet {index + 1}: {error}") from error
        check(not out, "frames at times when none came in")
        self.check_spread()
        same("packets_in", counters["packets_in"], len(self.case.packets))
        same("packets_out", counters["packets_out"], self.events["tx_packets"])
        same("too_long", counters["too_long"], 0)
        same("backends", counters["backends"], self.backends)
        for kind, expected in [("events", self.events), ("drops", self.drops)]:
            for name, count in counters[kind].items():
                same(f"{self.case.name}: {name}", count, expected.pop(name, 0))
            check(not +expected, "not counted at all:", dict(expected))

    def judge(self, frame, fate, left):
        match fate:
            case Dropped():
                same("frames out", len(left), 0)
                self.drops[fate.reason] += 1
                if fate.selected:
                    self.count_selection(ip_packet(frame))
                if fate.reason == "too_big_silent" and not fate.selected:
                    self.events["icmp_errors_forwarded"] += 1
            case Answered():
                same("frames out", len(left), 1)
                getattr(self, "judge_" + fate.how)(frame, fate, left[0])
            case Forwarded():
                same("frames out", len(left), fate.pieces)
                self.judge_tunnel(frame, fate, left)

    def judge_tunnel(self, frame, fate, left):
        packet = ip_packet(frame)
        if fate.completed:
            packet = with_whole_checksum(packet)
            self.events["checksums_completed"] += 1
        if fate.error:
            key = quoted_key(packet)
            self.events["icmp_errors_forwarded"] += 1
        else:
            key = flow_key(packet)
            self.count_selection(packet)
        tunnels = [self.decapsulate(out, fate) for out in left]
        backends = {(backend["name"], sport) for backend, sport, _ in tunnels}
        same("tunnels", len(backends), 1)
        same("tunnel of the flow", backends.pop(), self.chosen.setdefault(
            key, (tunnels[0][0]["name"], tunnels[0][1])))
        if fate.pieces == 1:
            same("packet inside", tunnels[0][2].hex(), packet.hex())
            if not fate.wrong:
                check_transport(packet)
        else:
            self.events["fragmented"] += 1
            backend = tunnels[0][0]
            self.judge_pieces(packet, [inner for *_, inner in tunnels], self.mtu(backend))

    def count_selection(self, packet):
        """What the connection table counts: a SYN never asks it, whoever misses is remembered."""
        key, (at, kind) = flow_key(packet), l4_offset(packet)
        syn = kind == 6 and packet[at + 13] & 0x12 == 2
        self.events["connection_hits" if key in self.seen and not syn else "connection_misses"] += 1
        self.events["connection_inserts"] += key not in self.seen
        self.seen.add(key)

    def decapsulate(self, frame, fate):
        """Checks all that is around the packet. Returns backend, source port and packet."""
        ether = Ether(frame)
        ip, packet = parsed(ip_packet(frame)), ip_packet(frame)
        same("frame length", len(frame), 14 + len(packet))
        service = self.services[fate.service]
        udp, at = ip[UDP], 20 if ip.version == 4 else 40
        vxlan = VXLAN(packet[at + 8:])
        inner_ether, inner = Ether(packet[at + 16:at + 30]), packet[at + 30:]
        backend = self.backend(service, ip.dst, inner_ether.dst)

        same("outer source MAC", ether.src, ZERO_MAC)
        hop = self.hops.get(ip.dst, {"mac": ZERO_MAC})
        same("outer destination MAC", ether.dst, hop["mac"])
        same("tunnel source", ip.src, self.node["vtep" if ip.version == 4 else "vtep6"])
        self.check_outer_ip(ip, inner)
        check(49152 <= udp.sport, "source port", udp.sport)
        same("tunnel port", udp.dport, backend.get("port", service.get("vxlan_port", 4789)))
        same("UDP length", udp.len, len(packet) - at)
        computed = backend.get("udp_checksum", ip.version == 6)
        same("outer UDP checksum there", udp.chksum != 0, computed)
        if computed and not fate.wrong:
            check_transport(packet)
        same("VXLAN flags", int(vxlan.flags), 8)
        same("VXLAN reserved", (vxlan.reserved1, vxlan.reserved2), (0, 0))
        same("VNI", vxlan.vni, backend.get("vni", service["vni"]))
        same("inner source MAC", inner_ether.src, ZERO_MAC)
        same("inner EtherType", inner_ether.type, 0x800 if inner[0] >> 4 == 4 else 0x86dd)
        check(len(inner) <= self.mtu(backend), "the packet inside does not fit")
        self.backends[f"{service['name']}/{backend['name']}"].update(packets=1, bytes=len(frame))
        return backend, udp.sport, inner

    def check_outer_ip(self, ip, inner):
        inside = parsed(inner)
        tos = inside.tos if inside.version == 4 else inside.tc
        if ip.version == 4:
            same("outer header", (ip.ihl, ip.tos, ip.id, str(ip.flags), ip.frag, ip.ttl, ip.proto),
                 (5, tos, 0, "DF", 0, 64, 17))
        else:
            same("outer header", (ip.tc, ip.nh, ip.hlim), (tos, 17, 64))
        check_ip_header(ip)

    def backend(self, service, vtep, mac):
        found = [backend for backend in service["backend"]
                 if (backend["vtep"], backend["mac"]) == (vtep, mac)]
        check(found, "no backend at", vtep, mac)
        check(found[0].get("weight", 1) > 0, found[0]["name"], "drains")
        return found[0]

    def mtu(self, backend):
        link = self.hops.get(backend["vtep"], {}).get("mtu", LINK_MTU)
        overhead = 70 if ":" in backend["vtep"] else 50  # IP, UDP, VXLAN, Ethernet
        return min(link - overhead, backend.get("mtu", 65535))

    def judge_pieces(self, packet, pieces, mtu):
        """The pieces are fragments that make up the packet, none larger than need be."""
        whole = parsed(packet)
        payload = b""
        for ip in sorted((parsed(piece) for piece in pieces), key=lambda ip: ip.frag):
            same("fragment offset", ip.frag * 8, len(payload))
            payload += bytes(ip.payload)
            more = len(payload) < len(packet) - 20
            same("flags", str(ip.flags), "MF" if more else "")
            check(not more or ip.len > mtu - 8, "a fragment of", ip.len, "could be larger")
            same("header", (ip.id, ip.tos, ip.ttl, ip.proto, ip.src, ip.dst),
                 (whole.id, whole.tos, whole.ttl, whole.proto, whole.src, whole.dst))
            check_ip_header(ip)
        same("reassembled", payload.hex(), packet[20:].hex())
        check_transport(packet)

    def check_spread(self):
        """Where many flows have a choice, they make use of it."""
        takers = [b for s in self.services.values() for b in s.get("backend", [])
                  if b.get("weight", 1) > 0]
        if len(self.chosen) >= 8 and len(self.services) == 1 and len(takers) > 1:
            same("backends in use", {name for name, _ in self.chosen.values()},
                 {backend["name"] for backend in takers})
            ports = {port for _, port in self.chosen.values()}
            check(len(ports) >= len(self.chosen) - 1, "little entropy:", ports)

    # Answers.

    def check_way_back(self, frame, out):
        same("destination MAC", out[:6], frame[6:12])
        same("source MAC", out[6:12], bytes(6))
        same("tags and type", out[12:link_len(out)], frame[12:link_len(frame)])
        if out[link_len(out) - 2:link_len(out)] != b"\x08\x06":
            same("padding", len(out) - link_len(out), len(ip_packet(out)))

    def judge_echo(self, frame, _fate, out):
        self.events["echo_replies"] += 1
        self.check_way_back(frame, out)
        asked, answer = ip_packet(frame), ip_packet(out)
        question, reply = parsed(asked), parsed(answer)
        same("addresses", (reply.src, reply.dst), (question.dst, question.src))
        same("TTL", reply.ttl if reply.version == 4 else reply.hlim, 64)
        check_ip_header(reply)
        check_transport(answer)
        at, kind = l4_offset(answer)
        same("type", answer[at], 0 if kind == 1 else 129)
        same("identifier, number and payload", answer[at + 4:], asked[at + 4:])

    def judge_arp(self, frame, _fate, out):
        self.events["neighbour_replies"] += 1
        self.check_way_back(frame, out)
        question, reply = Ether(frame)[ARP], Ether(out)[ARP]
        same("answer", (reply.op, reply.psrc, reply.hwsrc, reply.pdst, reply.hwdst),
             (2, VIP, ZERO_MAC, question.psrc, question.hwsrc))

    def judge_neighbour(self, frame, _fate, out):
        self.events["neighbour_replies"] += 1
        question, reply = Ether(frame)[IPv6], Ether(out)[IPv6]
        probing = question.src == "::"
        same("link", (Ether(out).dst, Ether(out).src),
             ("33:33:00:00:00:01" if probing else Ether(frame).src, ZERO_MAC))
        same("addresses", (reply.src, reply.dst, reply.hlim),
             (VIP6, "ff02::1" if probing else CLIENT6, 255))
        answer = reply[ICMPv6ND_NA]
        same("answer", (answer.tgt, answer.R, answer.S, answer.O),
             (VIP6, 0, 0 if probing else 1, 1))
        same("option", answer[ICMPv6NDOptDstLLAddr].lladdr, ZERO_MAC)
        check_transport(ip_packet(out))

    def judge_too_big(self, frame, fate, out):
        self.events["too_big_sent"] += 1
        self.drops["too_big"] += 1
        self.check_way_back(frame, out)
        packet = ip_packet(frame)
        self.count_selection(packet)
        if fate.completed:
            packet = with_whole_checksum(packet)
            self.events["checksums_completed"] += 1
        error = ip_packet(out)
        ip, whole = parsed(error), parsed(packet)
        same("addresses", (ip.src, ip.dst), (whole.dst, whole.src))
        check_ip_header(ip)
        check_transport(error)
        at, most = (20, 576) if ip.version == 4 else (40, 1280)
        same("header", (ip.ttl, ip.proto, ip.tos) if at == 20 else (ip.hlim, ip.nh, ip.tc),
             (64, 1, 0xc0) if at == 20 else (64, 58, 0))
        same("type and code", error[at:at + 2], b"\x03\x04" if at == 20 else b"\x02\x00")
        same("MTU", struct.unpack_from(">I", error, at + 4)[0], fate.mtu)
        same("quote", error[at + 8:].hex(), packet[:most - at - 8].hex())


def judge_by_tshark(judged):
    """Another's dissectors find no wrong checksum and nothing malformed in any frame."""
    if not shutil.which("tshark"):
        print("no tshark: checksums were judged by scapy alone")
        return
    whole, names = b"", []
    for case in judged:
        wrong = {time_ns(index) for index, (_, fate, *_) in enumerate(case.packets)
                 if isinstance(fate, Forwarded) and fate.wrong}
        for time, frames in frames_by_time(HERE / case.name / "out.pcap").items():
            for frame in frames if time not in wrong else []:
                names.append(f"{case.name}, packet {(time - time_ns(0)) // 10**6 + 1}")
                whole += struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame
    with tempfile.NamedTemporaryFile(suffix=".pcap") as file:
        file.write(struct.pack("<IHHIIII", 0xa1b2c3d4, 2, 4, 0, 0, 0xffff, 1) + whole)
        file.flush()
        # Frames of all cases are in one file: reassembly would mix them up. Payloads are not of
        # the protocol that their port suggests.
        options = [f"{layer}.check_checksum:TRUE" for layer in ("ip", "udp", "tcp")]
        options += ["sctp.checksum:TRUE", "ip.defragment:FALSE"]
        bad = lambda *layers: " || ".join(f"{layer}.checksum.status == 0" for layer in layers)
        # It takes what our ICMP errors quote for whole segments, even where they had to be cut.
        wrong = (f"{bad('ip', 'icmp', 'icmpv6', 'sctp')} || _ws.malformed"
                 f" || (({bad('tcp', 'udp')}) && (vxlan || !(icmp || icmpv6)))")
        command = ["tshark", "-r", file.name, "-d", "udp.port==8472,vxlan",
                   "-d", "udp.port==4790,vxlan", "--disable-protocol", "dns",
                   *[word for option in options for word in ("-o", option)], "-T", "fields",
                   "-e", "frame.number", "-Y"]
        run = lambda wanted: subprocess.run([*command, wanted], check=True, capture_output=True,
                                            text=True).stdout.split()
        found = [names[int(number) - 1] for number in run(wrong)]
        check(not found, "tshark finds fault with:\n" + "\n".join(found))
        # Lest the filter finds nothing because it looks at nothing.
        check(len(run("vxlan && ip")) > len(names) / 2, "tshark sees no tunnels")


def main():
    logging.getLogger("scapy").setLevel(logging.ERROR)  # it takes our payloads for DNS
    wanted = sys.argv[1:]
    judged = [case for case in cases() if not wanted or case.name in wanted]
    failed = 0
    for case in judged:
        try:
            Judge(case).run()
        except AssertionError as error:
            failed += 1
            print(f"WRONG {error}", file=sys.stderr)
    judge_by_tshark(judged)
    print(f"{len(judged) - failed} of {len(judged)} cases are right")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
