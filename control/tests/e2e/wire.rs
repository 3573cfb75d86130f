//! What our frames look like to others: a capture read by tshark, and frames no local stack would send.

use std::{collections::HashSet, fs, net::SocketAddr, path::Path};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    client::{ECHO_PORT, VIP4, VIPS, exchange_ten_megabytes, get, send_datagrams},
    daemon::Daemon,
    lab::{Background, Lab, PEER, bounded, wait_until},
};

/// What the client's only connection to a port is inside the tunnel.
#[derive(Debug, Deserialize)]
pub struct Translated {
    /// This node's end.
    pub mesh: SocketAddr,
    /// The server's.
    pub target: SocketAddr,
    /// Who that is.
    pub backend: String,
    pub state: String,
}

impl Translated {
    pub fn of(lab: &Lab, daemon: &Daemon, node: &str, port: &str) -> Self {
        let ss = ["ss", "-tnH", "state", "established", "dport", "=", port];
        let connections = lab.succeed("client", &ss);
        let client = connections.split_whitespace().nth(2).unwrap();
        let explained = daemon.wiremesh(&format!("explain --json tcp {client} {node}:{port}"));
        let explained: Value = serde_json::from_str(&explained).unwrap();
        serde_json::from_value(explained["translated"].clone()).unwrap()
    }
}

/// Sends a node what the server of a connection would send to reset it: right in all, but where the tunnel
/// comes from.
pub fn forge_reset(lab: &Lab, host: &str, connection: &Translated, to: &str, vni: u32) {
    let Translated { mesh, target, .. } = connection;
    let reset = format!(
        "import ipaddress, socket, struct\n\
         def sum16(d):\n\
         \x20   t = sum(struct.unpack('!%dH' % (len(d) // 2), d))\n\
         \x20   while t >> 16: t = (t & 0xffff) + (t >> 16)\n\
         \x20   return ~t & 0xffff\n\
         src, dst = (ipaddress.IPv4Address(a).packed for a in ('{}', '{}'))\n\
         tcp = struct.pack('!HHIIBBHHH', {}, {}, 1, 1, 0x50, 4, 0, 0, 0)\n\
         tcp = tcp[:16] + struct.pack('!H', sum16(src + dst + struct.pack('!HH', 6, 20) + tcp)) + tcp[18:]\n\
         ip = struct.pack('!BBHHHBBH', 0x45, 0, 40, 1, 0, 64, 6, 0) + src + dst\n\
         ip = ip[:10] + struct.pack('!H', sum16(ip)) + ip[12:]\n\
         eth = b'\\x02\\x42' + dst + b'\\x02\\x42' + src + b'\\x08\\x00'\n\
         vxlan = struct.pack('!II', 0x08000000, {vni} << 8)\n\
         s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         s.sendto(vxlan + eth + ip + tcp, ('{to}', 4789))\n",
        target.ip(),
        mesh.ip(),
        target.port(),
        mesh.port()
    );
    lab.succeed(host, &["python3", "-c", &reset]);
}

#[test]
fn tshark_reads_our_output_without_a_warning() {
    for (underlay, outer_ttl) in [("4", "ip.ttl"), ("6", "ipv6.hlim")] {
        let lab = Lab::up(&["--nodes", "1", "--backends", "1", "--underlay", underlay]);
        let _daemon = Daemon::start(&lab, "n1");
        let file = lab.file("output.pcap");
        let capture = start_capture(&lab, "b1", &file, "udp port 4789");
        for vip in VIPS {
            get(&lab, vip);
            exchange_ten_megabytes(&lab, vip, &["b1"]);
            send_datagrams(&lab, vip, 10, 100);
        }
        capture.stop();

        // Warnings and errors of any dissector, wrong checksums among them; but not what TCP makes of
        // reordering between its own ends.
        let tcps_own = "tcp.analysis.flags || tcp.options.sack.dsack";
        let bad = format!("_ws.malformed || _ws.expert.severity >= 0x600000 && !({tcps_own})");
        let bad = tshark(&file, &["-Y", &bad]);
        assert!(bad.is_empty(), "{bad}");
        let fields = ["vxlan.vni", "udp.srcport", outer_ttl];
        let fields = fields.iter().flat_map(|field| ["-e", field]);
        let options = ["-T", "fields", "-E", "occurrence=f"].into_iter().chain(fields);
        let packets = tshark(&file, &options.collect::<Vec<_>>());
        let mut ports = HashSet::new();
        for packet in packets.lines() {
            let [vni, port, ttl] = packet.split('\t').collect::<Vec<_>>()[..] else {
                panic!("{packet}")
            };
            assert_eq!((vni, ttl), ("100", "64"), "{packet}");
            ports.insert(port.parse::<u16>().unwrap());
        }
        assert!(packets.lines().count() > 1000);
        // RFC 7348 section 5: from the dynamic range, and as different as the flows are.
        assert!(ports.iter().all(|port| *port >= 49152) && ports.len() > 10, "{ports:?}");
    }
}

#[test]
fn a_tagged_packet_reaches_the_backend() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let _daemon = Daemon::start(&lab, "n1");
    for (source_port, tags) in [("40000", &[][..]), ("40001", &["7"]), ("40002", &["7", "8"])] {
        let mut command = vec![PEER, "inject", "--interface", "n1"];
        let mac = lab.mac("n1");
        command.extend(["--mac", &mac, "--source", VIP4.client, "--source-port", source_port]);
        command.extend(["--to", VIP4.address, "--port", ECHO_PORT, "--payload", "by hand"]);
        command.extend(tags.iter().flat_map(|tag| ["--vlan", tag]));

        let file = lab.file(&format!("{source_port}.pcap"));
        let capture =
            start_capture(&lab, "client", &file, &format!("udp and dst port {source_port}"));
        // Straight into the node's cable: the bridge in between may know no VLANs.
        lab.succeed("router", &command);
        let answer = format!("b1 {} {source_port} by hand", VIP4.client);
        wait_until(&format!("the answer to a packet with tags {tags:?} is seen"), 10, || {
            let captured = fs::read(&file).unwrap();
            captured.windows(answer.len()).any(|bytes| bytes == answer.as_bytes())
        });
        capture.stop();
    }
}

/// Captures what a host's `eth0` sees; returns once it does.
pub fn start_capture(lab: &Lab, host: &str, file: &Path, filter: &str) -> Background {
    let file = file.to_str().unwrap();
    // Unbuffered; and not by a user who may not write here, which tcpdump would become. A capture
    // buffer of 32 MB, because 10 MB arrive within a few milliseconds.
    let options = ["-i", "eth0", "-n", "-U", "-B", "32768", "-Z", "root", "-w", file, filter];
    let capture = lab.start(host, &[&["tcpdump"], &options[..]].concat());
    // The file's header is written when the socket is open and filtering.
    wait_until("the capture has begun", 10, || fs::metadata(file).is_ok_and(|file| file.len() > 0));
    capture
}

/// What tshark prints about a capture. Every checksum is verified, but TCP's sequence is not: the
/// capture has one direction only. What streams carry is not read, for they would be put together for it, and
/// what was sent twice on a busy machine would be "overlapping".
pub fn tshark(file: &Path, options: &[&str]) -> String {
    let preferences = [
        "ip.check_checksum:TRUE",
        "udp.check_checksum:TRUE",
        "tcp.check_checksum:TRUE",
        "tcp.analyze_sequence_numbers:FALSE",
    ];
    let preferences = preferences.iter().flat_map(|preference| ["-o", preference]);
    let mut command = bounded("tshark");
    // By its number the echo port is multicast DNS, which our payload is not.
    let echo = format!("udp.port=={ECHO_PORT},data");
    command.arg("-n").arg("-r").arg(file).args(["-d", &echo, "-d", "tcp.port==0-65535,data"]);
    command.args(preferences).args(options);
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
