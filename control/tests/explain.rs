//! `explain` and the packet path agree: whatever backend `explain` names for a connection is the one
//! that `replay` sends its first packet to.

use std::{
    collections::HashMap,
    fs::File,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use control::{
    capture::{self, CaptureError},
    config::Config,
    desired::Protocol,
    explain::{self, Explanation},
    replay,
};
use etherparse::PacketBuilder;
use pcap_file::pcap::{PcapPacket, PcapWriter};
use proptest::prelude::*;

const CONFIG: &str = r#"
    node.interfaces = ["absent0"]
    node.vtep = "10.0.0.1"

    [[service]]
    name = "web"
    vip = "203.0.113.10"
    ports = ["80/tcp", "53/udp"]
    vni = 100
    backend = [
        { name = "web-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02" },
        { name = "web-2", vtep = "10.0.0.2", mac = "02:42:0a:00:00:03", weight = 5 },
        { name = "web-3", vtep = "10.0.0.4", mac = "02:42:0a:00:00:04", weight = 0 },
        { name = "web-4", vtep = "10.0.0.4", mac = "02:42:0a:00:00:05" },
    ]

    [[service]]
    name = "six"
    vip = "2001:db8::10"
    ports = ["1-999/tcp"]
    vni = 100
    backend = [
        { name = "six-1", vtep = "10.0.0.2", mac = "02:42:0a:00:01:02" },
        { name = "six-2", vtep = "10.0.0.3", mac = "02:42:0a:00:01:03" },
    ]

    [[service]]
    name = "draining"
    vip = "203.0.113.10"
    ports = ["81/tcp"]
    vni = 100
    backend = [{ name = "web-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02", weight = 0 }]
"#;

type Tuple = (Protocol, SocketAddr, SocketAddr);

fn tuple() -> impl Strategy<Value = Tuple> {
    let v4 = (any::<[u8; 4]>(), prop_oneof![Just([203, 0, 113, 10]), any::<[u8; 4]>()])
        .prop_map(|(client, vip)| (IpAddr::from(client), IpAddr::from(vip)));
    let vip6 = "2001:db8::10".parse::<IpAddr>().unwrap();
    let v6 = any::<[u8; 16]>().prop_map(move |client| (IpAddr::from(client), vip6));
    let protocol = prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)];
    let port = prop_oneof![Just(80), Just(81), Just(53), 0_u16..1500];
    (protocol, prop_oneof![v4, v6], any::<u16>(), port).prop_map(
        |(protocol, (client, vip), client_port, port)| {
            (protocol, SocketAddr::new(client, client_port), SocketAddr::new(vip, port))
        },
    )
}

/// The connection's first packet.
fn packet((protocol, client, vip): Tuple) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
    let ip = match (client.ip(), vip.ip()) {
        (IpAddr::V4(client), IpAddr::V4(vip)) => ethernet.ipv4(client.octets(), vip.octets(), 9),
        (IpAddr::V6(client), IpAddr::V6(vip)) => ethernet.ipv6(client.octets(), vip.octets(), 9),
        mixed => panic!("{mixed:?}"),
    };
    let mut packet = Vec::new();
    match protocol {
        Protocol::Udp => ip.udp(client.port(), vip.port()).write(&mut packet, b"hello").unwrap(),
        _ => ip.tcp(client.port(), vip.port(), 7, 9).syn().write(&mut packet, b"").unwrap(),
    }
    packet
}

/// The inner destination MAC of what leaves, by the time in seconds at which the packet came.
fn sent(config: &Config, tuples: &[Tuple], folder: &Path) -> HashMap<u64, String> {
    let (input, output) = (folder.join("in.pcap"), folder.join("out.pcap"));
    let mut writer = PcapWriter::new(File::create(&input).unwrap()).unwrap();
    for (at, tuple) in tuples.iter().enumerate() {
        let (time, data) = (Duration::from_secs(at as u64), packet(*tuple));
        writer.write_packet(&PcapPacket::new_owned(time, data.len() as u32, data)).unwrap();
    }
    drop(writer);
    replay::replay(config, &input, &output).unwrap();
    let mut sent = HashMap::new();
    capture::read(&output, |record| {
        let mac: Vec<_> = record.data[50..56].iter().map(|byte| format!("{byte:02x}")).collect();
        sent.insert(record.time.as_secs(), mac.join(":"));
        Ok::<(), CaptureError>(())
    })
    .unwrap();
    sent
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    #[test]
    fn explain_names_the_backend_that_the_packet_goes_to(
        tuples in proptest::collection::vec(tuple(), 64),
    ) {
        let config = Config::parse("test", CONFIG).unwrap().0;
        let folder = tempfile::tempdir().unwrap();
        let sent = sent(&config, &tuples, folder.path());
        for (at, (protocol, client, vip)) in tuples.into_iter().enumerate() {
            let explained = match explain::explain(&config, protocol, client, vip).unwrap() {
                Explanation::Forwarded { mac, .. } => Some(mac),
                Explanation::Dropped { .. } => None,
            };
            let sent = sent.get(&(at as u64));
            prop_assert_eq!(explained.as_ref(), sent, "{} {} {}", protocol, client, vip);
        }
    }
}
