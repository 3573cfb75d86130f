//! AF_XDP ports and the steering program on real sockets.
//!
//! Each test runs itself again in a network namespace with two veth pairs, a0—a1 and b0—b1. We are
//! at a0 and b0; packet sockets at a1 and b1 (`wire.py`) send and see what Linux sends and sees.
//! Needs root, `ip` and python3. Zero-copy is not tested: veth has none.
#![cfg(feature = "xdp")]

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, UdpSocket},
    os::{fd::AsFd, unix::fs::MetadataExt},
    process::{self, Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use dataplane::{
    flow::{Address, protocol},
    port::{
        Frame, Frames, HEADROOM, Pool, Port,
        xsk::{self, CopyMode, HugePages, Queue, Settings, XskError, XskPort},
    },
    steer::{self, ANSWER_ARP, DEFAULT_CAPACITY, Key, Mode, Steer, SteerError, TUNNEL},
    wire::ethernet::MacAddr,
};

/// Names the role in which a test runs itself again.
const ROLE: &str = "XSK_TEST_ROLE";
const VIP: &str = "203.0.113.10";
const VIP6: &str = "2001:db8::10";
const NODE: &str = "10.99.0.1";

/// Runs `body` in a namespace of its own, in another process.
fn in_namespace(test: &str, body: fn(&mut Wire)) {
    match env::var(ROLE).as_deref() {
        Ok("body") => return body(&mut Wire::new()),
        Ok(_) => return hold(),
        Err(_) => {}
    }
    let user = fs::metadata("/proc/self").unwrap().uid();
    assert!(user == 0, "needs root: run scripts/test as root");
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let namespace = Namespace(format!("xsk-{}-{number}", process::id()));
    ip(&format!("netns add {}", namespace.0));
    let inside = |command: &str| ip(&format!("-n {} {command}", namespace.0));
    for pair in ["a", "b"] {
        inside(&format!("link add {pair}0 type veth peer name {pair}1"));
        inside(&format!("link set {pair}0 up"));
        inside(&format!("link set {pair}1 up"));
    }
    inside("link set lo up");
    inside(&format!("addr add {NODE}/24 dev a0"));
    inside("route add default dev a0");
    let mut command = Command::new("timeout");
    command.args(["60", "ip", "netns", "exec", &namespace.0]).arg(env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]).env(ROLE, "body");
    assert!(command.status().unwrap().success(), "{test} fails in its namespace");
}

/// Deletes a namespace and all in it.
struct Namespace(String);

impl Drop for Namespace {
    fn drop(&mut self) {
        let _best_effort = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The far ends.
struct Wire {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Wire {
    fn new() -> Self {
        // Nothing but our own frames on the wires, and no doubts about their source addresses.
        for (setting, value) in
            [("ipv6/conf/all/disable_ipv6", "1"), ("ipv4/conf/all/rp_filter", "0")]
        {
            fs::write(format!("/proc/sys/net/{setting}"), value).unwrap();
        }
        let mut command = Command::new("python3");
        command.args([concat!(env!("CARGO_MANIFEST_DIR"), "/tests/wire.py"), "a1", "b1"]);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = process.stdin.take().unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        output.read_line(&mut String::new()).unwrap();
        Self { process, input, output }
    }

    fn send(&mut self, interface: &str, frame: &[u8]) {
        writeln!(self.input, "send {interface} {}", hex(frame)).unwrap();
        self.output.read_line(&mut String::new()).unwrap();
    }

    fn seen(&mut self, interface: &str, patience_s: f32) -> Vec<String> {
        writeln!(self.input, "seen {interface} {patience_s}").unwrap();
        let lines = self.output.by_ref().lines().map(Result::unwrap);
        lines.take_while(|line| !line.is_empty()).collect()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An Ethernet frame to a0 with these tags and this payload.
fn ethernet(tags: &[[u8; 4]], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mac = fs::read_to_string("/sys/class/net/a0/address").unwrap();
    let octet = |part| u8::from_str_radix(part, 16).unwrap();
    let destination: Vec<u8> = mac.trim().split(':').map(octet).collect();
    let source = [2, 0, 0, 0, 0, 9];
    [&destination, &source[..], &tags.concat(), &ethertype.to_be_bytes(), payload].concat()
}

/// An IP packet around an L4 one, with IPv6 extension headers or IPv4 options in between.
fn ip_packet(destination: &str, protocol: u8, middle: &[u8], l4: &[u8]) -> (u16, Vec<u8>) {
    let len = (middle.len() + l4.len()) as u16;
    match destination.parse().unwrap() {
        IpAddr::V4(destination) => {
            let mut header = vec![0x45 + middle.len() as u8 / 4, 0, 0, 0, 0, 1, 0, 0, 64, protocol];
            header[2..4].copy_from_slice(&(20 + len).to_be_bytes());
            header.extend([0, 0, 198, 51, 100, 7]);
            header.extend(destination.octets());
            header.extend(middle);
            let words =
                header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
            let sum = words.sum::<u32>();
            let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            (0x0800, [&header, l4].concat())
        }
        IpAddr::V6(destination) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
            header[4..6].copy_from_slice(&len.to_be_bytes());
            header.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
            header.extend(destination.octets());
            (0x86dd, [&header, middle, l4].concat())
        }
    }
}

/// A UDP packet without checksum, of 30 bytes of payload.
fn udp(port: u16) -> Vec<u8> {
    let mut packet = vec![0x9c, 0x40, 0, 0, 0, 38, 0, 0];
    packet[2..4].copy_from_slice(&port.to_be_bytes());
    packet.extend(0..30);
    packet
}

/// A UDP packet to this address and port, as a frame.
fn udp_frame(destination: &str, port: u16) -> Vec<u8> {
    let (ethertype, packet) = ip_packet(destination, protocol::UDP, &[], &udp(port));
    ethernet(&[], ethertype, &packet)
}

/// One of which more follow.
fn fragment(destination: &str) -> Vec<u8> {
    let mut frame = udp_frame(destination, 9);
    frame[20] = 0x20;
    frame
}

/// Asks for the MAC address that has this address, RFC 4861 section 4.3.
fn solicitation(address: &str) -> Vec<u8> {
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend(address.parse::<std::net::Ipv6Addr>().unwrap().octets());
    message
}

fn address(text: &str) -> Address {
    text.parse::<IpAddr>().unwrap().into()
}

/// What the tests steer: UDP to port 80 of two VIPs, and what belongs to their addresses.
fn steer(interface: &str, mode: Mode) -> Steer {
    let mut steer = Steer::attach(interface, mode, DEFAULT_CAPACITY).unwrap();
    for vip in [VIP, VIP6] {
        let key = Key::Port { address: address(vip), protocol: protocol::UDP, port: 80 };
        steer.add_vip(key, 0).unwrap();
        steer.add_vip(Key::Address(address(vip)), 0).unwrap();
    }
    steer
}

fn settings() -> Settings {
    Settings {
        frame_count: 512.try_into().unwrap(),
        tx_ring: 128,
        fill_ring: 128,
        ..Settings::default()
    }
}

/// Ports of a0 and b0, their pool, and the program on a0.
fn open(mode: Mode) -> (Vec<XskPort>, Pool, Steer) {
    let (mut ports, mut pool, _) =
        xsk::open(&settings(), &[Queue::here("a0", 0), Queue::here("b0", 0)]).unwrap();
    let mut steer = steer("a0", mode);
    steer.set_socket(0, ports[0].fd()).unwrap();
    ports[0].refill(&mut pool);
    (ports, pool, steer)
}

/// What a port receives within half a second, or nothing.
fn receive(port: &mut XskPort) -> Frames {
    let deadline = Instant::now() + Duration::from_millis(500);
    let mut inbound = Frames::new();
    while inbound.is_empty() && Instant::now() < deadline {
        xsk::wait(std::slice::from_ref(port), None, 50).unwrap();
        port.receive(&mut inbound);
    }
    inbound
}

/// Sends all frames, and waits until they are back in the pool.
fn transmit(port: &mut XskPort, pool: &mut Pool, mut outbound: Frames) {
    let deadline = Instant::now() + Duration::from_secs(2);
    port.transmit(&mut outbound);
    assert!(outbound.is_empty(), "the ring has room");
    while port.in_flight() > 0 {
        assert!(Instant::now() < deadline, "{} packets are stuck", port.in_flight());
        port.reclaim(pool);
    }
}

fn give_back(pool: &mut Pool, inbound: Frames) {
    inbound.into_iter().for_each(|frame| pool.put(frame));
}

/// Whether a frame comes to the port, and not to the kernel.
fn steers(wire: &mut Wire, (port, pool): (&mut XskPort, &mut Pool), frame: &[u8]) -> bool {
    wire.send("a1", frame);
    let inbound = receive(port);
    let steered = !inbound.is_empty();
    give_back(pool, inbound);
    steered
}

fn steered_bytes_are_exact(wire: &mut Wire, mode: Mode) {
    let (mut ports, mut pool, steer) = open(mode);
    assert_eq!(steer.mode(), mode);
    let tag = [0x81, 0, 0, 5];
    let (ipv4, over_ipv4) = ip_packet(VIP, protocol::UDP, &[1; 8], &udp(80));
    let (ipv6, over_ipv6) =
        ip_packet(VIP6, 0, &[60, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0], &udp(80));
    for frame in [
        udp_frame(VIP, 80),
        udp_frame(VIP6, 80),
        ethernet(&[tag], ipv4, &over_ipv4),
        ethernet(&[[0x88, 0xa8, 0, 7], tag], ipv6, &over_ipv6),
    ] {
        wire.send("a1", &frame);
        let inbound = receive(&mut ports[0]);
        assert_eq!(inbound.len(), 1, "{}", hex(&frame));
        assert_eq!(hex(inbound[0].packet()), hex(&frame));
        assert_eq!(inbound[0].start(), HEADROOM);
        give_back(&mut pool, inbound);
    }
}

#[test]
fn packets_for_a_vip_arrive_byte_exact_in_native_mode() {
    in_namespace("packets_for_a_vip_arrive_byte_exact_in_native_mode", |wire| {
        steered_bytes_are_exact(wire, Mode::Native);
    });
}

#[test]
fn packets_for_a_vip_arrive_byte_exact_in_generic_mode() {
    in_namespace("packets_for_a_vip_arrive_byte_exact_in_generic_mode", |wire| {
        steered_bytes_are_exact(wire, Mode::Generic);
    });
}

#[test]
fn only_what_belongs_to_a_vip_is_steered() {
    in_namespace("only_what_belongs_to_a_vip_is_steered", |wire| {
        let (mut ports, mut pool, mut steer) = open(Mode::Auto);
        let all_ports =
            Key::Port { address: address("203.0.113.11"), protocol: protocol::TCP, port: 0 };
        steer.add_vip(all_ports, 0).unwrap();
        steer.add_vip(Key::Address(address("203.0.113.12")), ANSWER_ARP).unwrap();
        let ip = |destination, protocol, middle: &[u8], l4: &[u8]| {
            let (ethertype, packet) = ip_packet(destination, protocol, middle, l4);
            ethernet(&[], ethertype, &packet)
        };
        let icmp = |kind| [kind; 30];
        // What a router says about the VIP's answer: its source port tells the flow.
        let error = |kind: u8, vip, protocol, middle: &[u8], port: u8| {
            let other_end = if vip == VIP { "198.51.100.7" } else { "2001:db8::7" };
            let (_, answer) =
                ip_packet(other_end, protocol, middle, &[0, port, 0x9c, 0x40, 0, 8, 0, 0]);
            let icmp = if vip == VIP { protocol::ICMP } else { protocol::ICMPV6 };
            ip(vip, icmp, &[], &[&[kind, 0, 0, 0, 0, 0, 0, 0], &answer[..]].concat())
        };
        let first_fragment = [17, 0, 0, 1, 0, 0, 0, 1];
        let later_fragment = [17, 0, 5, 1, 0, 0, 0, 1];
        let eight_extensions = [[60, 0, 0, 0, 0, 0, 0, 0]; 7].concat();
        let eight_extensions = [&eight_extensions[..], &[17, 0, 0, 0, 0, 0, 0, 0]].concat();
        let authenticated = [17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let arp = |last| {
            let mut request = vec![0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 9, 10, 99, 0, 9];
            request.extend([0, 0, 0, 0, 0, 0, 203, 0, 113, last]);
            ethernet(&[], 0x0806, &request)
        };
        let solicit = ip("ff02::1:ff00:10", protocol::ICMPV6, &[], &solicitation(VIP6));

        let mut steers = |frame: &[u8]| steers(wire, (&mut ports[0], &mut pool), frame);
        let fragment_header = [17, 0, 0, 1, 0, 0, 0, 1];
        for (what, frame, expected) in [
            ("the VIP's port", udp_frame(VIP, 80), true),
            ("another port", udp_frame(VIP, 81), false),
            ("another protocol", ip(VIP, protocol::TCP, &[], &udp(80)), false),
            ("another address", udp_frame(NODE, 80), false),
            ("all ports", ip("203.0.113.11", protocol::TCP, &[], &udp(7)), true),
            ("all ports, address", ip("203.0.113.11", protocol::ICMP, &[], &icmp(8)), false),
            ("a VIP's fragment", fragment(VIP), true),
            ("another's fragment", fragment(NODE), false),
            ("a VIP's IPv6 fragment", ip(VIP6, 44, &fragment_header, &udp(9)), true),
            ("a ping", ip(VIP, protocol::ICMP, &[], &icmp(8)), true),
            ("a ping's reply", ip(VIP, protocol::ICMP, &[], &icmp(0)), false),
            ("an ICMP error", error(3, VIP, protocol::UDP, &[], 80), true),
            ("an ICMP error about options", error(11, VIP, protocol::UDP, &[1; 8], 80), true),
            ("an ICMP error about the kernel's port", error(3, VIP, protocol::UDP, &[], 22), false),
            ("an ICMP error about TCP", error(3, VIP, protocol::TCP, &[], 80), false),
            ("an ICMP error about nothing", ip(VIP, protocol::ICMP, &[], &icmp(3)), false),
            ("an ICMPv6 error", error(2, VIP6, protocol::UDP, &[], 80), true),
            ("about the kernel's port", error(2, VIP6, protocol::UDP, &[], 22), false),
            ("about a first fragment", error(2, VIP6, 44, &first_fragment, 80), true),
            ("about a later fragment", error(2, VIP6, 44, &later_fragment, 80), false),
            ("eight extension headers", ip(VIP6, 60, &eight_extensions, &udp(80)), true),
            ("an authentication header", ip(VIP6, 51, &authenticated, &udp(80)), true),
            ("an ICMPv6 reply", ip(VIP6, protocol::ICMPV6, &[], &icmp(129)), false),
            ("ARP for an owned VIP", arp(12), true),
            ("ARP for another VIP", arp(10), false),
            ("a solicitation for another VIP", solicit.clone(), false),
        ] {
            assert_eq!(steers(&frame), expected, "{what}");
        }
        steer.add_vip(Key::Address(address(VIP6)), ANSWER_ARP).unwrap();
        assert!(steers(&solicit), "a solicitation for an owned VIP");
        steer.set_mac(MacAddr([2, 0, 0, 0, 0, 1])).unwrap();
        assert!(!steers(&udp_frame(VIP, 80)), "another station's packet");
        assert!(!steers(&solicit), "another station's question");
        let to = |mac: [u8; 6], frame: &[u8]| [&mac[..], &frame[6..]].concat();
        assert!(steers(&to([2, 0, 0, 0, 0, 1], &udp_frame(VIP, 80))), "our packet");
        assert!(steers(&to([0xff; 6], &arp(12))), "a question to all");
        assert!(!steers(&to([0xff; 6], &udp_frame(VIP, 80))), "a packet to all");
        steer.set_mac(MacAddr::default()).unwrap();
        let vip = Key::Port { address: address(VIP), protocol: protocol::UDP, port: 80 };
        steer.remove_vip(vip).unwrap();
        steer.remove_vip(vip).unwrap();
        assert!(!steers(&udp_frame(VIP, 80)), "a VIP removed");
        steer.clear_socket(0).unwrap();
        assert!(!steers(&udp_frame(VIP6, 80)), "a queue without socket");
    });
}

#[test]
fn of_a_tunnel_only_what_is_for_our_address_inside_is_steered() {
    in_namespace("of_a_tunnel_only_what_is_for_our_address_inside_is_steered", |wire| {
        let (mut ports, mut pool, mut steer) = open(Mode::Auto);
        let (mesh, mesh6) = ("10.0.0.5", "fd00::5");
        for end in [NODE, "2001:db8::9"] {
            let (address, protocol) = (address(end), protocol::UDP);
            steer.add_vip(Key::Port { address, protocol, port: 4789 }, TUNNEL).unwrap();
        }
        steer.add_vip(Key::Mesh { vni: 0x01_0203, address: address(mesh) }, 0).unwrap();
        steer.add_vip(Key::Mesh { vni: 0x01_0203, address: address(mesh6) }, ANSWER_ARP).unwrap();
        let ip = |destination, protocol, l4: &[u8]| {
            let (ethertype, packet) = ip_packet(destination, protocol, &[], l4);
            ethernet(&[], ethertype, &packet)
        };
        let tunnel = |end, flags: u8, vni: u32, inner: &[u8]| {
            let [_, vni @ ..] = vni.to_be_bytes();
            let mut payload = vec![0xc0, 0, 0x12, 0xb5];
            payload.extend(((16 + inner.len()) as u16).to_be_bytes());
            payload.extend([0, 0, flags, 0, 0, 0, vni[0], vni[1], vni[2], 0]);
            payload.extend(inner);
            ip(end, protocol::UDP, &payload)
        };
        let ours = |inner: &[u8]| tunnel(NODE, 8, 0x01_0203, inner);
        let arp = |target: [u8; 4]| {
            let mut request = vec![0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 9, 10, 0, 0, 9];
            request.extend([0; 6]);
            request.extend(target);
            ethernet(&[], 0x0806, &request)
        };
        let error = {
            let (_, quoted) = ip_packet("10.0.0.9", protocol::TCP, &[], &[0, 9, 0, 80, 0, 0, 0, 0]);
            ip(mesh, protocol::ICMP, &[&[3, 4, 0, 0, 0, 0, 0, 0], &quoted[..]].concat())
        };
        let mut steers = |frame: &[u8]| steers(wire, (&mut ports[0], &mut pool), frame);
        let answer = ip(mesh, protocol::TCP, &[0; 20]);
        for (what, frame, expected) in [
            ("a task's answer", ours(&answer), true),
            ("a datagram", ours(&udp_frame(mesh, 7)), true),
            ("IPv6 inside", ours(&udp_frame(mesh6, 7)), true),
            ("IPv6 outside", tunnel("2001:db8::9", 8, 0x01_0203, &answer), true),
            ("an ICMP error", ours(&error), true),
            ("another address", ours(&udp_frame("10.0.0.6", 7)), false),
            ("another network", tunnel(NODE, 8, 0x01_0204, &answer), false),
            ("no network", tunnel(NODE, 0, 0x01_0203, &answer), false),
            ("another tunnel's end", tunnel("198.51.100.9", 8, 0x01_0203, &answer), false),
            ("the same without tunnel", answer.clone(), false),
            ("a ping", ours(&ip(mesh, protocol::ICMP, &[8; 30])), false),
            ("a fragment", ours(&fragment(mesh)), false),
            ("ARP that the kernel answers", ours(&arp([10, 0, 0, 5])), false),
            ("a question for us", ours(&ip("ff02::1:ff00:5", 58, &solicitation(mesh6))), true),
            ("the kernel's tunnel", ours(&[0; 60]), false),
        ] {
            assert_eq!(steers(&frame), expected, "{what}");
        }
        steer.add_vip(Key::Mesh { vni: 0x01_0203, address: address(mesh) }, ANSWER_ARP).unwrap();
        assert!(steers(&ours(&arp([10, 0, 0, 5]))), "ARP for us");
        // Of an address that the kernel has too, only the ports that are taken.
        let taken = steer.taken().unwrap();
        let key = Key::Mesh { vni: 0x01_0203, address: address(mesh) };
        steer.add_vip(key, steer::taken(3)).unwrap();
        let to = |port: u16| ours(&udp_frame(mesh, port));
        assert!(!steers(&to(7777)));
        taken[(3 * 65_536 + 7777) / 64].fetch_or(1 << (7777 % 64), Ordering::Relaxed);
        assert!(steers(&to(7777)), "a port that is taken");
        assert!(!steers(&to(7778)), "its neighbour");
        assert!(!steers(&ours(&error)), "an error about another's port");
        taken[3 * 65_536 / 64].fetch_or(1 << 9, Ordering::Relaxed);
        assert!(steers(&ours(&error)), "an error about a port that is taken");
        for len in 14..ours(&answer).len() {
            wire.send("a1", &ours(&answer)[..len.max(60)]); // the verifier's bounds, seen to hold
        }
    });
}

#[test]
fn what_is_not_steered_reaches_the_kernel() {
    in_namespace("what_is_not_steered_reaches_the_kernel", |wire| {
        let (_ports, _pool, mut steer) = open(Mode::Auto);
        let node = Key::Port { address: address(NODE), protocol: protocol::UDP, port: 80 };
        steer.add_vip(node, 0).unwrap();
        let kernel = |port| {
            let socket = UdpSocket::bind((NODE, port)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            socket
        };
        let (http, other) = (kernel(80), kernel(5353));
        let mut buffer = [0; 64];
        wire.send("a1", &udp_frame(NODE, 5353));
        assert_eq!(other.recv(&mut buffer).unwrap(), 30);
        wire.send("a1", &udp_frame(NODE, 80));
        assert!(http.recv(&mut buffer).is_err(), "steered past the kernel");
        // As a watchdog does with a worker that hangs.
        steer.clear_socket(0).unwrap();
        steer.clear_socket(0).unwrap();
        wire.send("a1", &udp_frame(NODE, 80));
        assert_eq!(http.recv(&mut buffer).unwrap(), 30);
    });
}

#[test]
fn a_packet_received_at_one_port_leaves_another_with_a_longer_front() {
    in_namespace("a_packet_received_at_one_port_leaves_another_with_a_longer_front", |wire| {
        let (mut ports, mut pool, _steer) = open(Mode::Auto);
        let total = |ports: &[XskPort], pool: &Pool| {
            pool.len() + ports.iter().map(Port::held).sum::<usize>()
        };
        assert_eq!(total(&ports, &pool), 512);
        let frame = udp_frame(VIP, 80);
        let front: Vec<u8> = (100..200).collect();
        // Starts that have descriptors, some that are moved up or down, and a shorter front.
        for grow in [50, 54, 58, 70, 74, 78, 28, 0, 46, 51, 100, -4, -8, -50_i32] {
            wire.send("a1", &frame);
            let mut inbound = receive(&mut ports[0]);
            let mut packet = inbound.pop().unwrap();
            let mut expected = frame.clone();
            if let Ok(bytes) = usize::try_from(grow) {
                packet.grow_front(bytes).unwrap();
                packet.packet_mut()[..bytes].copy_from_slice(&front[..bytes]);
                expected.splice(..0, front[..bytes].iter().copied());
            } else {
                packet.shrink_front(-grow as usize);
                expected.drain(..-grow as usize);
            }
            assert_eq!(total(&ports, &pool), 511, "one is in our hands");
            transmit(&mut ports[1], &mut pool, Frames::from_iter([packet]));
            assert_eq!(wire.seen("b1", 1.0), [hex(&expected)], "grown by {grow}");
            assert_eq!(total(&ports, &pool), 512);
        }
        ports[0].refill(&mut pool);
        assert_eq!(total(&ports, &pool), 512);
        let statistics = ports[1].statistics().unwrap();
        assert_eq!((statistics.tx_invalid, statistics.kick_errors), (0, 0));
    });
}

#[test]
fn a_packet_received_in_one_namespace_leaves_in_another() {
    in_namespace("a_packet_received_in_one_namespace_leaves_in_another", |wire| {
        let far = Namespace(format!("xsk-{}-far", process::id()));
        ip(&format!("netns add {}", far.0));
        ip(&format!("link set b0 netns {}", far.0));
        ip(&format!("-n {} link set b0 up", far.0));
        let namespace = fs::File::open(format!("/run/netns/{}", far.0)).unwrap();
        let there = Queue { namespace: Some(namespace.as_fd()), ..Queue::here("b0", 0) };
        let queues = [Queue::here("a0", 0), there];
        let (mut ports, mut pool, _) = xsk::open(&settings(), &queues).unwrap();
        let mut steer = steer("a0", Mode::Auto);
        steer.set_socket(0, ports[0].fd()).unwrap();
        ports[0].refill(&mut pool);
        ports[1].refill(&mut pool);

        let frame = udp_frame(VIP, 80);
        wire.send("a1", &frame);
        let inbound = receive(&mut ports[0]);
        assert_eq!(inbound.len(), 1);
        transmit(&mut ports[1], &mut pool, inbound);
        // The other namespace has IPv6, which says something of its own.
        assert!(wire.seen("b1", 1.0).contains(&hex(&frame)));
        assert!(!ip("link show").contains("b0"), "it is only there");
    });
}

#[test]
fn a_full_ring_takes_what_fits_and_gets_rid_of_it() {
    in_namespace("a_full_ring_takes_what_fits_and_gets_rid_of_it", |wire| {
        let (mut ports, mut pool, _steer) = open(Mode::Auto);
        let packet = |pool: &mut Pool, number: u8| -> Frame {
            let mut frame = pool.take().unwrap();
            frame.set_len(60);
            frame.packet_mut().fill(number);
            frame
        };
        // The interface is down, so that a kick sends nothing and the ring of 128 fills up.
        ip("link set b0 down");
        let mut outbound: Frames = (0..128).map(|number| packet(&mut pool, number)).collect();
        outbound.pop().into_iter().for_each(|last| pool.put(last));
        ports[1].transmit(&mut outbound);
        assert_eq!((outbound.len(), ports[1].in_flight()), (0, 127));
        outbound.extend([200, 201].map(|number| packet(&mut pool, number)));
        ports[1].transmit(&mut outbound);
        assert_eq!((outbound.len(), ports[1].in_flight()), (1, 128));
        assert_eq!(outbound[0].packet()[0], 201, "the first is taken first");

        ip("link set b0 up");
        transmit(&mut ports[1], &mut pool, Frames::new());
        let seen = wire.seen("b1", 1.0);
        let first_bytes = seen.iter().map(|frame| u8::from_str_radix(&frame[..2], 16).unwrap());
        assert!(first_bytes.eq((0..127).chain([200])), "all, in order: {seen:?}");
    });
}

#[test]
fn an_interface_that_goes_away_hurts_nobody() {
    in_namespace("an_interface_that_goes_away_hurts_nobody", |_| {
        let (mut ports, mut pool, _steer) = open(Mode::Auto);
        ip("link del b0");
        let mut frame = pool.take().unwrap();
        frame.set_len(60);
        let mut outbound = Frames::from_iter([frame]);
        ports[1].transmit(&mut outbound);
        ports[1].reclaim(&mut pool);
        ports[1].refill(&mut pool);
        ports[1].receive(&mut Frames::new());
        assert!(ports[1].statistics().unwrap().kick_errors > 0);
        assert!(!xsk::wait(&ports, None, 10).unwrap());
    });
}

#[test]
fn a_refusal_is_explained() {
    in_namespace("a_refusal_is_explained", |_| {
        let fails =
            |settings: &Settings, queue| xsk::open(settings, &[queue]).map(|_| ()).unwrap_err();
        let (ports, pool, reports) = xsk::open(&settings(), &[Queue::here("a0", 0)]).unwrap();
        assert_eq!((reports[0].copy, pool.len()), (CopyMode::Copy, 512));
        assert!(reports[0].why_copy.as_ref().unwrap().contains("not supported"), "{reports:?}");

        let begin = Instant::now();
        let busy = fails(&settings(), Queue::here("a0", 0));
        assert!(matches!(busy, XskError::Busy { queue: 0, .. }), "{busy}");
        assert!(begin.elapsed() < Duration::from_millis(500));
        drop(ports);
        xsk::open(&settings(), &[Queue::here("a0", 0)]).expect("the queue is free again");

        let error = fails(&settings(), Queue::here("absent", 0));
        assert!(matches!(error, XskError::NoInterface(_)), "{error}");
        let error = fails(&settings(), Queue::here("b0", 9));
        assert!(matches!(error, XskError::NoQueue { queue: 9, .. }), "{error}");
        let zero_copy = Settings { copy: CopyMode::ZeroCopy, ..settings() };
        let error = fails(&zero_copy, Queue::here("b0", 0));
        assert!(matches!(error, XskError::NoZeroCopy(_)), "{error}");
        let odd = Settings { huge_pages: HugePages::Require, ..settings() };
        let odd = Settings { frame_count: 513.try_into().unwrap(), ..odd };
        let error = fails(&odd, Queue::here("b0", 0));
        assert!(matches!(error, XskError::NoHugePages(_)), "{error}");

        let _first = Steer::attach("a0", Mode::Auto, 16).unwrap();
        for mode in [Mode::Auto, Mode::Native, Mode::Generic] {
            let error = Steer::attach("a0", mode, 16).err().unwrap();
            assert!(matches!(error, SteerError::InUse(_)), "{error}");
        }
        let error = Steer::attach("absent", Mode::Auto, 16).err().unwrap();
        assert!(matches!(error, SteerError::NoInterface(_)), "{error}");
        ip("link set b1 mtu 9000");
        let steer = Steer::attach("b0", Mode::Auto, 16).unwrap();
        assert_eq!(steer.mode(), Mode::Generic);
        assert!(steer.why_not_native().is_some());
    });
}

#[test]
fn nothing_stays_attached_after_the_end_or_a_kill() {
    in_namespace("nothing_stays_attached_after_the_end_or_a_kill", |_| {
        let attached = || ip("-d link show dev a0").contains("xdp");
        let (ports, pool, steer) = open(Mode::Auto);
        assert!(attached());
        drop((ports, pool, steer));
        assert!(!attached());

        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["nothing_stays_attached_after_the_end_or_a_kill", "--exact", "--nocapture"]);
        let mut holder = command.env(ROLE, "hold").stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("attached")));
        assert!(attached());
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert!(!attached());
    });
}

/// A process that holds program and sockets until it is killed.
fn hold() {
    let _all = open(Mode::Auto);
    println!("attached");
    thread::sleep(Duration::from_secs(10));
}
