//! Tests of the configuration as a whole: what is accepted, what is refused and where, and that the
//! documented file tells the truth.

use std::{collections::BTreeSet, sync::Arc};

use super::*;
use crate::desired::{
    Backend, Family, Mode, Owner, PortMapping, Protocol, Scheduler, Service, ServicePort, Vip, Vni,
};

const EXAMPLE: &str = include_str!("../../../config/example.toml");

/// One service with one backend. The tests of errors spoil one line of it.
const GOOD: &str = r#"[node]
name = "n1"                    # default: the host's name
interfaces = ["eth0"]          # default: the interface of the default route
vtep = "10.0.0.1"              # tunnel source; default: the interface's address
workers = "auto"               # one per RX queue, pinned

[[service]]
name = "web"
vip = "203.0.113.10"           # IPv4 or IPv6
ports = ["80/tcp", "443/tcp", "443/udp"]
mode = "dsr"
vni = 100

[[service.backend]]
name = "web-1"
vtep = "10.0.0.2"              # the node that runs it; IPv4 or IPv6
mac = "02:42:0a:00:00:02"      # its vxlan device
weight = 1                     # 0 drains
"#;

/// Another backend of the same name.
const BACKEND: &str = r#"[[service.backend]]
name = "web-1"
vtep = "10.0.0.3"
mac = "02:42:0a:00:00:03"
"#;

fn parse(text: &str) -> (Config, Vec<Warning>) {
    Config::parse("w.toml", text).unwrap_or_else(|errors| panic!("{:#?}", sentences(errors)))
}

fn config(text: &str) -> Config {
    parse(text).0
}

fn errors(text: &str) -> Vec<String> {
    Config::parse("w.toml", text).map_or_else(sentences, |_| Vec::new())
}

fn sentences(errors: ConfigErrors) -> Vec<String> {
    errors.findings().iter().map(Finding::sentence).collect()
}

/// `GOOD` with one part replaced.
fn spoiled(good: &str, bad: &str) -> String {
    assert_eq!(GOOD.matches(good).count(), 1, "{good}");
    GOOD.replace(good, bad)
}

#[test]
fn a_service_as_a_user_writes_it_is_understood() {
    let (config, warnings) = parse(GOOD);
    let port = |port, protocol| PortMapping::from(ServicePort { port, protocol });
    assert!(warnings.is_empty());
    assert_eq!(config.node.name, "n1");
    assert_eq!(config.node.interfaces, ["eth0"]);
    assert_eq!(config.node.vtep, Some("10.0.0.1".parse().unwrap()));
    assert_eq!(
        config.desired.services,
        [Arc::new(Service {
            owner: Owner::File,
            written: None,
            name: "web".to_owned(),
            vip: Vip::Address("203.0.113.10".parse().unwrap()),
            ports: vec![
                port(80, Protocol::Tcp),
                port(443, Protocol::Tcp),
                port(443, Protocol::Udp)
            ],
            mode: Mode::Dsr,
            allow: Vec::new(),
            scheduler: Scheduler::Maglev,
            health: None,
            backends: vec![Backend {
                name: "web-1".to_owned(),
                vtep: "10.0.0.2".parse().unwrap(),
                mac: "02:42:0a:00:00:02".parse().unwrap(),
                weight: 1,
                drain: None,
                vni: Vni::new(100).unwrap(),
                port: 4789,
                mtu: None,
                udp_checksum: None,
                address: None,
            }],
        })]
    );
}

#[test]
fn a_scheduler_has_the_name_that_ipvs_has_for_it_and_is_shown_by_its_own() {
    let scheduler = |line: &str| {
        let text = spoiled("mode = \"dsr\"\n", &format!("{line}\n"));
        let service = config(&text).desired.services[0].clone();
        (service.scheduler, ServiceSpec::from(&*service))
    };
    let shown = |name: &str| {
        let (_, spec) = scheduler(&format!("scheduler = \"{name}\""));
        serde_json::to_value(spec).unwrap()["scheduler"].as_str().unwrap().to_owned()
    };
    for (name, names) in [
        ("maglev", &["mh"][..]),
        ("round-robin", &["rr", "wrr"]),
        ("least-connections", &["lc", "wlc"]),
        ("source", &["sh"]),
    ] {
        assert_eq!(shown(name), name);
        assert!(names.iter().all(|other| shown(other) == name));
    }
    assert_eq!(scheduler("").0, Scheduler::Maglev);
    assert_eq!(scheduler("scheduler = \"sh\"").0, Scheduler::Source { timeout_s: 300 });
    let (with_timeout, spec) = scheduler("scheduler = \"source\"\naffinity_timeout_s = 60");
    assert_eq!(with_timeout, Scheduler::Source { timeout_s: 60 });
    assert_eq!(spec.affinity_timeout_s, Some(60));
}

#[test]
fn a_scheduler_that_cannot_be_is_refused_with_what_would_be_right() {
    let refused = |bad: &str, ports: &str| {
        let text = spoiled("mode = \"dsr\"\n", &format!("{bad}\n"));
        errors(&text.replace("\"443/udp\"", ports))
    };
    assert_eq!(
        refused("scheduler = \"lc\"", "\"443/sctp\""),
        ["w.toml:11:13: `scheduler` is `least-connections`, but 443/sctp is published: \
          for SCTP it is `maglev` or `source`; other ports can be another service's"]
    );
    assert_eq!(refused("scheduler = \"source\"", "\"443/sctp\""), [""; 0]);
    assert_eq!(
        refused("scheduler = \"rr\"\naffinity_timeout_s = 60", "\"443/udp\""),
        ["w.toml:12:22: `affinity_timeout_s` is set, but the scheduler is `round-robin`: \
          leave it out, or have `scheduler = \"source\"`"]
    );
    assert_eq!(
        refused("scheduler = \"source\"\naffinity_timeout_s = 14401", "\"443/udp\""),
        ["w.toml:12:22: `affinity_timeout_s` is 14401, out of its range: 0 to 14400"]
    );
    let unknown = refused("scheduler = \"dh\"", "\"443/udp\"").join("\n");
    for part in ["w.toml:11:13: ", "`dh`", "`maglev`", "`round-robin`", "`source`"] {
        assert!(unknown.contains(part), "no {part} in {unknown}");
    }
}

#[test]
fn a_backend_says_what_differs_from_its_service() {
    let service = "vni = 7\nvxlan_port = 8472\nmtu = 1400\nudp_checksum = true\n";
    let backend = "weight = 0\nvni = 8\nport = 4790\nmtu = 9000\nudp_checksum = false\n";
    let text = spoiled("vni = 100\n", service);
    let of = |text: &str| {
        let backend = config(text).desired.services[0].backends[0].clone();
        (backend.vni.get(), backend.port, backend.mtu, backend.udp_checksum)
    };
    assert_eq!(of(&text), (7, 8472, Some(1400), Some(true)));
    let text = text.replace("weight = 1                     # 0 drains\n", backend);
    assert_eq!(of(&text), (8, 4790, Some(9000), Some(false)));
}

#[test]
fn settings_are_read_from_their_keys() {
    let config = config(concat!(
        "[node]\nvtep6 = '2001:db8::1'\nworkers = 3\ncores = [1, 5, 4]\nanswer_arp = true\n",
        "announce_table = 4294967295\nlocal_link = 'never'\n",
        "[dataplane]\nxdp_mode = 'generic'\ncopy_mode = 'zero-copy'\nidle = 'busy-poll'\n",
        "huge_pages = 'require'\nframe_size_bytes = 4096\nneed_wakeup = false\n",
        "busy_poll_us = 50\nbusy_poll_budget = 8\nprefer_busy_poll = false\n",
        "[maglev]\ntable_size = 7\nseed = ''\n",
        "[[next_hop]]\nvtep = '2001:db8::2'\nmac = '02-00-00-00-00-01'\ninterface = 'eth1'\n",
    ));
    assert_eq!(config.node.vtep6, Some("2001:db8::1".parse().unwrap()));
    assert_eq!(config.node.workers, Workers::Count(3));
    assert_eq!(config.node.cores, Cores::List(vec![1, 5, 4]));
    assert!(config.node.answer_arp);
    assert_eq!(config.node.announce_table, Some(u32::MAX));
    assert_eq!(config.node.local_link, LocalLink::Never);
    assert_eq!(config.dataplane.xdp_mode, XdpMode::Generic);
    assert_eq!(config.dataplane.copy_mode, CopyMode::ZeroCopy);
    assert_eq!(config.dataplane.idle, Idle::BusyPoll);
    assert_eq!(config.dataplane.huge_pages, HugePages::Require);
    assert_eq!(config.dataplane.frame_size_bytes, 4096);
    assert!(!config.dataplane.need_wakeup);
    assert_eq!(config.dataplane.busy_poll_budget, 8);
    assert!(!config.dataplane.prefer_busy_poll);
    assert_eq!(config.maglev, Maglev { table_size: 7, seed: String::new() });
    let mac = "02:00:00:00:00:01".parse().unwrap();
    let vtep = "2001:db8::2".parse().unwrap();
    let next_hop = NextHop { vtep, mac, interface: Some("eth1".to_owned()), mtu: None };
    assert_eq!(config.next_hops, [next_hop]);
}

#[test]
fn a_ring_has_its_own_size_or_the_common_one() {
    let rings = |keys: &str| config(&format!("[dataplane]\n{keys}")).dataplane.rings();
    let all = |size| Rings { rx: size, tx: size, fill: size, completion: size };
    assert_eq!(rings(""), all(2048));
    assert_eq!(rings("ring_size = 1024"), all(1024));
    assert_eq!(
        rings("ring_size = 512\nrx_ring_size = 4096\nfill_ring_size = 1024"),
        Rings { rx: 4096, fill: 1024, ..all(512) }
    );
    assert_eq!(
        rings("tx_ring_size = 256\ncompletion_ring_size = 128"),
        Rings { tx: 256, completion: 128, ..all(2048) }
    );
}

#[test]
fn a_range_publishes_each_of_its_ports() {
    let config = config(&spoiled(r#""80/tcp", "443/tcp""#, r#""65533-65535/tcp""#));
    let ports: Vec<_> = config.desired.services[0].ports.iter().map(|port| port.target).collect();
    assert_eq!(ports, [65533, 65534, 65535, 443]);
}

#[test]
fn what_is_not_our_toml_is_refused_at_its_place() {
    let cases = [
        ("[nodde]", "1:2: unknown key `nodde`: did you mean `node`?"),
        ("[node]\nvtpe = ''", "2:1: unknown key `vtpe`: did you mean `vtep`?"),
        ("[maglev]\nxyz = 1", "2:1: unknown key `xyz`: expected `table_size` or `seed`"),
        (
            "[dataplane]\nidle = 'spin'",
            "2:8: unknown value `spin`: did you mean `spin-then-sleep`?",
        ),
        ("[dataplane]\nidle = 3", "2:8: wrong type: expected a string"),
        (
            "[dataplane]\ncopy_mode = 'x'",
            "2:13: unknown value `x`: expected one of `auto`, `zero-copy`, `copy`",
        ),
        (
            "[dataplane]\ntx_budget = '1'",
            "2:13: invalid type: string \"1\": expected a whole number",
        ),
        (
            "[dataplane]\ntx_budget = 99999999999999999999",
            "2:13: invalid type: integer `99999999999999999999`: expected a whole number",
        ),
        ("[node]\nanswer_arp = 1", "2:14: invalid type: integer `1`: expected true or false"),
        ("[node]\ninterfaces = 'a'", "2:14: invalid type: string \"a\": expected a list"),
        (
            "[node]\nworkers = true",
            "2:11: wrong type: expected \"auto\", a whole number or a list of them",
        ),
        ("node = 3", "1:8: invalid type: integer `3`: expected a table, [node]"),
        ("[node]\nname = 'a'\nname = 'b'", "3:1: this key is given twice: keep one of them"),
        ("[node]\nname 'a'", "2:6: key with no value: expected `=`"),
        ("[node]\nname = 'a", "2:9: invalid literal string: expected `'`"),
    ];
    for (text, expected) in cases {
        assert_eq!(errors(text), [format!("w.toml:{expected}")], "{text}");
    }
}

#[test]
fn a_routing_table_that_the_kernel_forwards_by_is_refused() {
    let cases = [
        (0, "no routing table's number"),
        (-1, "no routing table's number"),
        (1_i64 << 32, "no routing table's number"),
        (253, "the kernel's table `default`"),
        (254, "the kernel's table `main`"),
        (255, "the kernel's table `local`"),
    ];
    for (table, kind) in cases {
        let expected = format!(
            "w.toml:2:18: `announce_table` is {table}, {kind}: a table that no `ip rule` names: 1 to \
             4294967295, but 253 to 255"
        );
        assert_eq!(errors(&format!("[node]\nannounce_table = {table}")), [expected]);
    }
}

#[test]
fn a_setting_out_of_its_range_is_refused_at_its_place() {
    let cases = [
        (
            "[node]\nname = ''",
            "2:8: `name` is no usable name: \
             1 to 128 bytes, without blanks around it and without control characters",
        ),
        (
            "[node]\ninterfaces = ['a', 'b/c']",
            "2:20: no interface can be named `b/c`: \
             a name as `ip link` shows it, of at most 15 bytes",
        ),
        (
            "[node]\ninterfaces = ['a', 'a']",
            "2:20: the interface `a` is given twice: leave it out here",
        ),
        (
            "[node]\nvtep = '10.0.0.300'",
            "2:8: `vtep` is `10.0.0.300`, which is not an IP address: \
             as in 192.0.2.1 or 2001:db8::1",
        ),
        (
            "[node]\nvtep = '0.0.0.0'",
            "2:8: `vtep` is 0.0.0.0, the unspecified address: \
             an address that one host on the network can have",
        ),
        (
            "[node]\nvtep6 = '10.0.0.1'",
            "2:9: `vtep6` is 10.0.0.1, an IPv4 address: \
             an IPv6 address; IPv4 goes into `vtep`",
        ),
        (
            "[node]\nvtep = '2001:db8::1'\nvtep6 = '2001:db8::2'",
            "3:9: there are two sources for tunnels over IPv6: \
             leave it out, for `vtep` is an IPv6 address already",
        ),
        ("[node]\nworkers = 0", "2:11: `workers` is 0, out of its range: 1 to 1024, or \"auto\""),
        ("[node]\nworkers = 'all'", "2:11: `workers` is \"all\": \"auto\" or a whole number"),
        ("[node]\ncores = 'all'", "2:9: `cores` is \"all\": \"auto\" or a list of numbers"),
        (
            "[node]\ncores = [1, 2, 1]",
            "2:9: `cores` is no list of cores: \
             different core numbers from 0 to 1023, at least one, or \"auto\"",
        ),
        (
            "[api]\nsocket = 'run/x'",
            "2:10: `socket` is no path that a socket can have: \
             an absolute path of at most 107 bytes",
        ),
        (
            "[api]\nlisten = ['9180']",
            "2:11: `9180` is no address to listen on: \
             an address and a port, as in 127.0.0.1:9180",
        ),
        (
            "[api]\nlisten = ['127.0.0.1:9180', '0.0.0.0:9180']",
            "2:29: 0.0.0.0:9180 can be reached from elsewhere: \
             a loopback address, or `certificate`, `key` and `client_ca` for TLS",
        ),
        (
            "[api]\ncertificate = '/c'\nclient_ca = '/a'",
            "2:15: TLS needs `key`, too: add `key`, a file in PEM",
        ),
        (
            "[api]\nstate_directory = 'state'",
            "2:19: `state_directory` is `state`: an absolute path, as in /var/lib/wiremesh",
        ),
        (
            "[api]\nsocket_mode = '0066'",
            "2:15: `socket_mode` is `0066`: \
             an octal mode that its owner can read and write by, as in \"0660\"",
        ),
        (
            "[dataplane]\nframe_size_bytes = 1024",
            "2:20: `frame_size_bytes` is 1024, out of its range: a power of two from 2048 to 4096",
        ),
        (
            "[dataplane]\nframes_per_queue = 5000",
            "2:20: `frames_per_queue` is 5000, out of its range: \
             a power of two from 512 to 65536",
        ),
        (
            "[dataplane]\nframes_per_queue = 1024",
            "2:20: 1024 frames do not fill a fill ring of 2048 and a tx ring of 2048: \
             make these 1024 together at most, or set more `frames_per_queue`",
        ),
        (
            "[dataplane]\ntx_ring_size = 4096",
            "2:16: 4096 frames do not fill a fill ring of 2048 and a tx ring of 4096: \
             make these 4096 together at most, or set more `frames_per_queue`",
        ),
        (
            "[dataplane]\nrx_ring_size = 100",
            "2:16: `rx_ring_size` is 100, out of its range: a power of two from 64 to 65536",
        ),
        (
            "[dataplane]\ncompletion_ring_size = 32",
            "2:24: `completion_ring_size` is 32, out of its range: a power of two from 64 to 65536",
        ),
        ("[dataplane]\nfill_batch = 0", "2:14: `fill_batch` is 0, out of its range: 1 to 65536"),
        (
            "[dataplane]\nfill_batch = 128\nfill_ring_size = 64",
            "2:14: `fill_batch` is 128, more than the 64 places of a fill ring: \
             set `fill_batch` to at most 64, or a larger `fill_ring_size`",
        ),
        (
            "[dataplane]\nbusy_poll_budget = 2000",
            "2:20: `busy_poll_budget` is 2000, out of its range: 1 to 1024",
        ),
        (
            "[dataplane]\nring_size = 64",
            "2:13: `tx_budget` is 128, more than the 64 places of a tx ring: \
             set `tx_budget` to at most 64, or a larger `tx_ring_size`",
        ),
        ("[dataplane]\ntx_budget = 31", "2:13: `tx_budget` is 31, out of its range: 32 to 65536"),
        (
            "[dataplane]\nidle_spin_us = -1",
            "2:16: `idle_spin_us` is -1, out of its range: 0 to 10000",
        ),
        (
            "[dataplane]\nbusy_poll_us = 20000",
            "2:16: `busy_poll_us` is 20000, out of its range: 0 to 10000",
        ),
        (
            "[dataplane]\nicmp_errors_per_s = 0",
            "2:21: `icmp_errors_per_s` is 0, out of its range: 1 to 1000000",
        ),
        (
            "[dataplane]\nhang_timeout_ms = 1",
            "2:19: `hang_timeout_ms` is 1, out of its range: 300 to 60000",
        ),
        (
            "[connections]\ncapacity = 1000",
            "2:12: `capacity` is 1000, out of its range: a power of two from 1024 to 134217728",
        ),
        (
            "[connections]\nadmissions_per_s = 0",
            "2:20: `admissions_per_s` is 0, out of its range: 1 to 100000000",
        ),
        (
            "[connections]\nunconfirmed_s = 0",
            "2:17: `unconfirmed_s` is 0, out of its range: 1 to 30",
        ),
        ("[connections]\ntcp_idle_s = 0", "2:14: `tcp_idle_s` is 0, out of its range: 1 to 57600"),
        (
            "[connections]\ntcp_closing_s = 901",
            "2:17: `tcp_closing_s` is 901, out of its range: 1 to 900",
        ),
        ("[connections]\nudp_idle_s = 0", "2:14: `udp_idle_s` is 0, out of its range: 1 to 7200"),
        (
            "[maglev]\ntable_size = 5000",
            "2:14: `table_size` is 5000, which is not prime: 4999 and 5003 are",
        ),
        ("[maglev]\ntable_size = 5", "2:14: `table_size` is 5, out of its range: 7 to 655373"),
        ("[limits]\nbackends = 0", "2:12: `backends` is 0, out of its range: 1 to 262144"),
        ("[limits]\nvips = 2000000", "2:8: `vips` is 2000000, out of its range: 1 to 1048576"),
        (
            "[liveness]\ninterval_ms = 49",
            "2:15: `interval_ms` is 49, out of its range: 50 to 10000",
        ),
        ("[liveness]\nfall = 0", "2:8: `fall` is 0, out of its range: 1 to 100"),
        ("[liveness]\nenabled = 1", "2:11: invalid type: integer `1`: expected true or false"),
    ];
    for (text, expected) in cases {
        assert_eq!(errors(text), [format!("w.toml:{expected}")], "{text}");
    }
}

#[test]
fn a_service_that_cannot_be_is_refused_at_its_place() {
    let cases = [
        ("name = \"web\"\n", "", "7:1: the service has no `name`: add one, as in `name = \"web\"`"),
        (
            "vip = \"203.0.113.10\"",
            "",
            "7:1: the service has no `vip`: add one, as in `vip = \"192.0.2.10\"`",
        ),
        (
            "\"203.0.113.10\"",
            "\"224.0.0.1\"",
            "9:7: `vip` is 224.0.0.1, a multicast address: \
             an address that one host on the network can have",
        ),
        (
            "\"203.0.113.10\"",
            "\"::\"",
            "9:7: `vip` is ::, the unspecified address: \
             an address that one host on the network can have",
        ),
        (
            "\"203.0.113.10\"",
            "\"127.0.0.1\"",
            "9:7: `vip` is 127.0.0.1, a loopback address: \
             an address that one host on the network can have",
        ),
        (
            "\"203.0.113.10\"",
            "\"255.255.255.255\"",
            "9:7: `vip` is 255.255.255.255, the broadcast address: \
             an address that one host on the network can have",
        ),
        (
            "\"203.0.113.10\"",
            "\"::ffff:192.0.2.1\"",
            "9:7: `vip` is ::ffff:192.0.2.1, an IPv4-mapped address: write 192.0.2.1",
        ),
        (
            "\"80/tcp\", \"443/tcp\", \"443/udp\"",
            "",
            "10:9: no port is published: at least one, as in [\"80/tcp\"]",
        ),
        (
            "ports = [\"80/tcp\", \"443/tcp\", \"443/udp\"]\n",
            "",
            "7:1: the service has no `ports`: add one, as in `ports = [\"80/tcp\"]`",
        ),
        (
            "443/udp",
            "0/udp",
            "10:31: `0/udp` is not a port: \
             1 to 65535 over tcp, udp or sctp, as in \"80/tcp\", \"8000-8010/udp\" or \"80:8080/tcp\"",
        ),
        (
            "443/udp",
            "443",
            "10:31: `443` is not a port: \
             1 to 65535 over tcp, udp or sctp, as in \"80/tcp\", \"8000-8010/udp\" or \"80:8080/tcp\"",
        ),
        (
            "443/udp",
            "9-8/udp",
            "10:31: `9-8/udp` is not a port: \
             1 to 65535 over tcp, udp or sctp, as in \"80/tcp\", \"8000-8010/udp\" or \"80:8080/tcp\"",
        ),
        ("443/udp", "70-90/tcp", "10:31: 80/tcp is published twice: leave it out here"),
        (
            "vni = 100",
            "vni = 16777216",
            "12:7: `vni` is 16777216, which does not fit in 24 bits: 0 to 16777215",
        ),
        (
            "vni = 100\n",
            "",
            "13:1: the backend has no VNI: add `vni = 100` to it, or to its service",
        ),
        (
            "vni = 100",
            "vni = 1\nvxlan_port = 0",
            "13:14: `vxlan_port` is 0, out of its range: 1 to 65535",
        ),
        ("vni = 100", "vni = 1\nmtu = 575", "13:7: `mtu` is 575, out of its range: 576 to 9216"),
        (
            "\"203.0.113.10\"           # IPv4 or IPv6",
            "\"2001:db8::1\"\nmtu = 1279",
            "10:7: `mtu` is 1279, out of its range: 1280 to 9216",
        ),
    ];
    check_spoiled(&cases);
}

#[test]
fn a_backend_that_cannot_be_is_refused_at_its_place() {
    let cases = [
        (
            "name = \"web-1\"\n",
            "",
            "14:1: the backend has no `name`: add one, as in `name = \"web-1\"`",
        ),
        (
            "vtep = \"10.0.0.2\"",
            "",
            "14:1: the backend has no `vtep`: add one, as in `vtep = \"192.0.2.1\"`",
        ),
        (
            "\"10.0.0.2\"",
            "\"0.0.0.0\"",
            "16:8: `vtep` is 0.0.0.0, the unspecified address: \
             an address that one host on the network can have",
        ),
        (
            "\"10.0.0.2\"",
            "\"ff02::1\"",
            "16:8: `vtep` is ff02::1, a multicast address: \
             an address that one host on the network can have",
        ),
        (
            "\"10.0.0.2\"",
            "\"203.0.113.10\"",
            "16:8: `vtep` is 203.0.113.10, the VIP of `web`: \
             the node's own address, at which its tunnel ends",
        ),
        (
            "\"10.0.0.1\"",
            "\"203.0.113.10\"",
            "4:8: `vtep` is 203.0.113.10, the VIP of `web`: \
             the node's own address, at which its tunnel ends",
        ),
        (
            "mac = \"02:42:0a:00:00:02\"",
            "",
            "14:1: the backend has no `mac`: add one, as in `mac = \"02:42:0a:00:00:02\"`",
        ),
        (
            "02:42:0a:00:00:02",
            "02:42:0a:00:00",
            "17:7: `mac` is `02:42:0a:00:00`, which is not a MAC address: \
             six pairs of hex digits, as in 02:42:0a:00:00:02",
        ),
        (
            "02:42:0a:00:00:02",
            "00:00:00:00:00:00",
            "17:7: `mac` is 00:00:00:00:00:00, which no device can have: \
             not zero, and its first byte an even number",
        ),
        (
            "02:42:0a:00:00:02",
            "01:00:5e:00:00:01",
            "17:7: `mac` is 01:00:5e:00:00:01, which no device can have: \
             not zero, and its first byte an even number",
        ),
        ("weight = 1 ", "weight = 1001 ", "18:10: `weight` is 1001, out of its range: 0 to 1000"),
        ("weight = 1 ", "weight = -1 ", "18:10: `weight` is -1, out of its range: 0 to 1000"),
        (
            "weight = 1 ",
            "drain_until = \"tomorrow\" ",
            "18:15: `drain_until` is `tomorrow`, which is not a time in UTC: \
             as in \"2026-11-21T15:00:00Z\", or \"forever\"",
        ),
        ("weight = 1 ", "port = 65536 ", "18:8: `port` is 65536, out of its range: 1 to 65535"),
        ("weight = 1 ", "mtu = 9217 ", "18:7: `mtu` is 9217, out of its range: 576 to 9216"),
        (
            "weight = 1 ",
            "target_port = 0 ",
            "18:15: `target_port` is 0, out of its range: 1 to 65535",
        ),
        (
            "weight = 1 ",
            "target_port = 8080 ",
            "18:15: `target_port` is 8080, but 80 is published: \
             listen on 80: mode `dsr` keeps ports, another needs `nat`",
        ),
    ];
    check_spoiled(&cases);
}

/// A NAT service, and what it needs.
const NAT: &str = r#"[[overlay]]
vni = 100
addresses = ["10.99.1.250", "10.99.1.251"]

[[service]]
name = "shop"
vip = "node"
ports = ["80:8081/tcp", "8000-8001:9000-9001/udp", "53/udp"]
mode = "nat"
allow = ["198.51.100.0/24", "192.0.2.7"]
vni = 100

[[service.backend]]
name = "shop-1"
vtep = "10.0.0.2"
address = "10.99.1.2"
"#;

#[test]
fn a_nat_service_says_where_packets_are_translated_to() {
    let desired = config(NAT).desired;
    let overlay = &desired.overlays[0];
    assert_eq!(
        overlay.addresses,
        ["10.99.1.250", "10.99.1.251"].map(|a| a.parse::<IpAddr>().unwrap())
    );
    assert_eq!(overlay.mac.to_string(), "02:42:0a:63:01:fa");
    assert_eq!((overlay.vni.get(), overlay.port, overlay.mtu), (100, 4789, None));
    let service = &desired.services[0];
    assert_eq!((service.mode, service.vip), (Mode::Nat, Vip::Node(Family::V4)));
    let port =
        |port, target, protocol| PortMapping { published: ServicePort { port, protocol }, target };
    assert_eq!(
        service.ports,
        [
            port(80, 8081, Protocol::Tcp),
            port(8000, 9000, Protocol::Udp),
            port(8001, 9001, Protocol::Udp),
            port(53, 53, Protocol::Udp),
        ]
    );
    assert_eq!(service.allow, ["198.51.100.0/24", "192.0.2.7/32"].map(|n| n.parse().unwrap()));
    let backend = &service.backends[0];
    assert_eq!(backend.address, Some("10.99.1.2".parse().unwrap()));
    assert_eq!(backend.mac.to_string(), "02:42:0a:63:01:02");
    // A check goes to the server, as translated packets do.
    let checked = NAT.replace("[[service.backend]]", "health.check = \"tcp\"\n[[service.backend]]");
    let health = config(&checked).desired.services[0].health.clone().unwrap();
    assert_eq!(health.check.port.to_string(), "8081/tcp");
    // As it is shown it means the same again.
    let mut shown = ServiceSpec::from(&**service);
    assert_eq!(shown.ports.as_ref().unwrap()[..2], ["80:8081/tcp", "8000-8001:9000-9001/udp"]);
    shown.name = Some("shop".to_owned());
    let (again, _) = shown.understand(&Maglev::default()).unwrap();
    assert_eq!(Service { owner: Owner::File, written: None, ..again }, **service,);
}

#[test]
fn a_nat_service_of_an_ipv6_vip_is_translated_to_ipv6_addresses() {
    let text = NAT
        .replace("\"10.99.1.251\"", "\"fd00:99::250\"")
        .replace("vip = \"node\"", "vip = \"2001:db8::1\"")
        .replace(
            "address = \"10.99.1.2\"",
            "address = \"fd00:99::2\"\nmac = \"02:00:00:00:00:02\"",
        );
    let node = config(&text.replace("2001:db8::1", "node6")).desired;
    assert_eq!(node.services[0].vip, Vip::Node(Family::V6));
    let desired = config(&text).desired;
    let overlay = &desired.overlays[0];
    assert_eq!(overlay.mac.to_string(), "02:42:0a:63:01:fa", "one for both families");
    let backend = &desired.services[0].backends[0];
    assert_eq!(backend.address, Some("fd00:99::2".parse().unwrap()));
    let without = text.replace("mac = \"02:00:00:00:00:02\"", "");
    let expected =
        "w.toml:13:1: the backend has no `mac`: add one, as in `mac = \"02:42:0a:00:00:02\"`";
    assert_eq!(errors(&without), [expected], "nothing follows from an IPv6 address");
}

#[test]
fn a_nat_service_that_cannot_be_is_refused_with_what_would_be_right() {
    let nat = |good: &str, bad: &str| {
        assert_eq!(NAT.matches(good).count(), 1, "{good}");
        NAT.replace(good, bad)
    };
    for (good, bad, expected) in [
        (
            "mode = \"nat\"\nallow = [\"198.51.100.0/24\", \"192.0.2.7\"]\n",
            "",
            "7:7: `vip` is `node`, and the mode is `dsr`: an address, or `mode = \"nat\"`",
        ),
        (
            "vip = \"node\"\nports = [\"80:8081/tcp\", \"8000-8001:9000-9001/udp\", \"53/udp\"]\nmode = \"nat\"\n",
            "vip = \"node6\"\nports = [\"53/udp\"]\n",
            "7:7: `vip` is `node6`, and the mode is `dsr`: an address, or `mode = \"nat\"`",
        ),
        (
            "mode = \"nat\"",
            "",
            "8:10: 80 is published and 8081 its target, and the mode is `dsr`: the same port, for \
             `dsr` can't translate; or `mode = \"nat\"`",
        ),
        (
            "mode = \"nat\"",
            "",
            "10:9: `allow` is set, and the mode is `dsr`: leave it out, or have `mode = \"nat\"`",
        ),
        (
            "\"53/udp\"",
            "\"53/sctp\"",
            "8:52: 53/sctp is published, and the mode is `nat`: tcp or udp: SCTP can't be translated, \
             only sent by `dsr`",
        ),
        (
            "8000-8001:9000-9001",
            "8000-8001:9000-9002",
            "8:25: `8000-8001:9000-9002/udp` publishes 2 ports, and has 3 targets: as many, as in \
             \"8000-8010:9000-9010/tcp\"",
        ),
        (
            "\"53/udp\"",
            "\"4789/udp\"",
            "8:9: 4789/udp is published, and tunnels of this node end at that port: another port",
        ),
        (
            "\"192.0.2.7\"",
            "\"192.0.2.7/24\"",
            "10:29: `192.0.2.7/24` has bits set behind its prefix: 192.0.2.0/24 for all of it, or 192.0.2.7",
        ),
        (
            "\"192.0.2.7\"",
            "\"localhost\"",
            "10:29: `localhost` is not a network: as in \"192.0.2.0/24\" or \"2001:db8::/32\"",
        ),
        (
            "[\"198.51.100.0/24\", \"192.0.2.7\"]",
            "[]",
            "10:9: `allow` is empty, so that nobody could connect: leave it out to let everybody in",
        ),
        (
            "address = \"10.99.1.2\"",
            "",
            "13:1: the backend has no `address`: add one, as in `address = \"10.1.0.2\"`",
        ),
        (
            "address = \"10.99.1.2\"",
            "address = \"2001:db8::2\"\nmac = \"02:00:00:00:00:02\"",
            "16:11: `address` is 2001:db8::2, and clients of `node` speak IPv4: the server's IPv4 address, \
             or another service for its IPv6 one: `nat` keeps the family",
        ),
        (
            "vip = \"node\"",
            "vip = \"2001:db8::1\"",
            "16:11: `address` is 10.99.1.2, and clients of `2001:db8::1` speak IPv6: the server's IPv6 \
             address, or another service for its IPv4 one: `nat` keeps the family",
        ),
        (
            "address = \"10.99.1.2\"\n",
            "address = \"10.99.1.2\"\n[[service.backend]]\nname = \"b\"\nvtep = \"10.0.0.3\"\n\
             address = \"10.99.1.3\"\nvni = 101\n",
            "17:1: the backend is in the overlay 101, and others of the service in 100: one overlay for all \
             of them, or two services",
        ),
        (
            "addresses = [\"10.99.1.250\", \"10.99.1.251\"]",
            "addresses = [\"fd00:99::250\"]\nmac = \"02:00:00:00:00:01\"",
            "14:1: `shop-1` can't be reached by nat: it has 10.99.1.2, and this node has no IPv4 address in \
             the overlay 100: add an IPv4 address of its own for this node to the overlay's `addresses`",
        ),
        (
            "addresses = [\"10.99.1.250\", \"10.99.1.251\"]",
            "addresses = [\"fd00:99::250\"]",
            "1:1: the overlay has no `mac`: add one, as in `mac = \"02:42:0a:63:01:fa\"`",
        ),
        (
            "\"10.99.1.251\"]",
            "\"fd00:99::250\"]\nmtu = 1200",
            "4:7: `mtu` is 1200, out of its range: 1280 to 9216",
        ),
        (
            "address = \"10.99.1.2\"",
            "address = \"10.99.1.250\"",
            "13:1: `shop-1` can't be reached by nat: 10.99.1.250 is an address of this node in the overlay \
             100: the server's own address",
        ),
        (
            "allow = [\"198.51.100.0/24\", \"192.0.2.7\"]\nvni = 100",
            "vni = 101",
            "12:1: `shop-1` can't be reached by nat: this node has no address in the overlay 101: add \
             [[overlay]] with `vni = 101` and an address of its own for this node",
        ),
        (
            "address = \"10.99.1.2\"",
            "address = \"10.99.1.2\"\nport = 4790",
            "13:1: `shop-1` can't be reached by nat: its tunnel has port 4790, and this node's in the overlay \
             100 has 4789: the same `port` in both",
        ),
        (
            "address = \"10.99.1.2\"",
            "address = \"10.99.1.2\"\ntarget_port = 8081",
            "17:15: `target_port` is 8081, but 8000 goes to 9000: leave it out, and publish \
             \"8000:8081/udp\"",
        ),
        (
            "[[service.backend]]",
            "[service.health]\ncheck = \"tunnel\"\n[[service.backend]]",
            "14:9: `check` is `tunnel`, and the mode is `nat`: tcp, http, https or udp: no backend has \
             the VIP that a check through the tunnel goes to",
        ),
        (
            "addresses = [\"10.99.1.250\", \"10.99.1.251\"]",
            "addresses = [\"10.99.1.250\", \"10.99.1.250\"]",
            "3:29: 10.99.1.250 is given twice: leave it out here",
        ),
        (
            "addresses = [\"10.99.1.250\", \"10.99.1.251\"]",
            "addresses = [\"10.99.1.250\", \"fd00:99::1\", \"fd00:99:0::1\"]",
            "3:43: fd00:99:0::1 is given twice: leave it out here",
        ),
        (
            "addresses = [\"10.99.1.250\", \"10.99.1.251\"]",
            "addresses = []\nmac = \"02:00:00:00:00:01\"",
            "3:13: the overlay has no addresses: an address that nobody else has in the overlay",
        ),
        (
            "addresses = [\"10.99.1.250\", \"10.99.1.251\"]",
            "",
            "1:1: the overlay has no `addresses`: add one, as in `addresses = [\"10.99.1.250\"]`",
        ),
        (
            "\n[[service]]",
            "[[overlay]]\nvni = 100\naddresses = [\"10.99.1.9\"]\n[[service]]",
            "5:7: there are two overlays 100: one of them, with all `addresses`",
        ),
    ] {
        let errors = errors(&nat(good, bad));
        assert!(errors.contains(&format!("w.toml:{expected}")), "{good} → {bad}: {errors:#?}");
    }
    let second = NAT[NAT.find("[[service]]").unwrap()..].replace("shop", "other");
    let twice = errors(&format!("{NAT}{second}"));
    assert!(twice[0].contains("80/tcp of this node is published by two services"), "{twice:#?}");
}

fn check_spoiled(cases: &[(&str, &str, &str)]) {
    for (good, bad, expected) in cases {
        assert_eq!(errors(&spoiled(good, bad)), [format!("w.toml:{expected}")], "{good} → {bad}");
    }
}

#[test]
fn what_contradicts_itself_is_refused_where_it_does() {
    let second = "[[service]]\nname = 'dns'\nvip = '203.0.113.11'\nports = ['53/udp']\n";
    let cases = [
        (
            format!("{GOOD}{}", second.replace("dns", "web")),
            "20:8: two services are named `web`: choose another name",
        ),
        (
            format!("{GOOD}{}", second.replace("113.11", "113.10").replace("53/", "400-500/")),
            "22:10: 443/udp of 203.0.113.10 is published by two services: \
             another port or VIP, for `web` has this one",
        ),
        (
            "[node]\nlocal_link = 'always'\n[dataplane]\ncopy_mode = 'zero-copy'\n".to_owned(),
            "2:14: there is no `local_link` without copying, and `copy_mode` is \"zero-copy\": \
             \"never\", or another `copy_mode`",
        ),
        (
            format!("{GOOD}{BACKEND}"),
            "20:8: two backends of the service are named `web-1`: choose another name",
        ),
        (
            format!("[limits]\nbackends = 1\n{GOOD}{}", BACKEND.replace("web-1", "web-2")),
            "9:1: the limit of 1 backends is passed here: \
             raise `backends` in [limits]; up to here there are 2",
        ),
        (
            format!("[limits]\nvips = 3\n{GOOD}{second}"),
            "21:1: the limit of 3 vips is passed here: \
             raise `vips` in [limits]; up to here there are 4",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(errors(&text), [format!("w.toml:{expected}")], "{text}");
    }
}

#[test]
fn a_next_hop_that_cannot_be_is_refused_at_its_place() {
    let good = "[[next_hop]]\nvtep = '10.0.0.2'\nmac = '02:00:00:00:00:01'\n";
    let cases = [
        (
            good.replace("vtep = '10.0.0.2'\n", ""),
            "1:1: the next hop has no `vtep`: add one, as in `vtep = \"192.0.2.1\"`",
        ),
        (
            good.replace("mac = '02:00:00:00:00:01'\n", ""),
            "1:1: the next hop has no `mac`: add one, as in `mac = \"02:42:0a:00:00:02\"`",
        ),
        (format!("{good}{good}"), "5:8: 10.0.0.2 has two next hops: keep one of them"),
        (format!("{good}mtu = 100\n"), "4:7: `mtu` is 100, out of its range: 576 to 9216"),
        (
            format!("{good}interface = ''\n"),
            "4:13: no interface can be named ``: a name as `ip link` shows it, of at most 15 bytes",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(errors(&text), [format!("w.toml:{expected}")], "{text}");
    }
}

#[test]
fn a_swarm_that_cannot_be_read_is_refused_at_its_place() {
    let tls = "[api]\ncertificate = \"/a\"\nkey = \"/b\"\nclient_ca = \"/c\"\n";
    for (keys, message) in [
        ("socket = \"docker.sock\"", "`socket` is no path that a socket can have"),
        ("socket = \"tcp://10.0.0.1\"", "as in tcp://10.0.0.1:2376"),
        ("socket = \"tcp://10.0.0.1:2376\"", "add `cert_path`"),
        ("cert_path = \"/etc/docker\"", "leave it out, or have `socket = \"tcp://HOST:2376\"`"),
        ("cert_path = \"etc\"\nsocket = \"tcp://h:1\"", "`cert_path` is `etc`: an absolute path"),
        ("managers = [\"10.0.0.1:9443\"]", "as in https://10.0.0.1:9443"),
        ("managers = [\"http://10.0.0.1:9443\"]", "https://, or a loopback address"),
        ("managers = [\"https://10.0.0.1:9443\"]", "add `certificate`, `key` and `client_ca`"),
        ("poll_ms = 19", "`poll_ms` is 19"),
        ("mesh_addresses = 0", "`mesh_addresses` is 0, out of its range: 1 to 16"),
        ("mesh_addresses = 5", "nat.addresses leaves room for 4: nat.addresses = 5 or more"),
        ("poll = 200", "unknown key `poll`: did you mean `poll_ms`?"),
    ] {
        let errors = errors(&format!("[source.swarm]\n{keys}\n"));
        assert!(errors.len() == 1 && errors[0].contains(message), "{keys}: {errors:?}");
    }
    let overlay = "[[overlay]]\nvni = 9\naddresses = [\"10.9.0.9\"]\n";
    let errors =
        errors(&format!("[nat]\naddresses = 16\n{overlay}[source.swarm]\nmesh_addresses = 16\n"));
    let message = "room for 15: at most 16, with those of [[overlay]]";
    assert!(errors.len() == 1 && errors[0].contains(message), "{errors:?}");
    let good = "socket = \"tcp://[::1]:2375\"\n\
                managers = [\"https://m1:9443/\", \"http://127.0.0.1:9180\"]\n";
    let swarm = config(&format!("{tls}[source.swarm]\n{good}")).source.swarm.unwrap();
    let engine = Engine::Tcp { address: "[::1]:2375".to_owned(), certificates: None };
    assert_eq!((swarm.engine, swarm.poll_ms), (engine, 200));
    let managers: Vec<_> = swarm.managers.into_iter().map(|m| (m.address, m.tls)).collect();
    assert_eq!(managers, [("m1:9443".to_owned(), true), ("127.0.0.1:9180".to_owned(), false),]);
}

#[test]
fn all_errors_are_reported_at_once_in_the_order_of_the_file() {
    let text = spoiled("\"n1\"", "\"\"")
        .replace("\"203.0.113.10\"", "\"::1\"")
        .replace("weight = 1 ", "weight = 5000 ");
    let places: Vec<_> = Config::parse("w.toml", &text)
        .unwrap_err()
        .findings()
        .iter()
        .map(|finding| (finding.line(), finding.column()))
        .collect();
    assert_eq!(places, [(2, 8), (9, 7), (18, 10)]);
}

#[test]
fn columns_count_characters_not_bytes() {
    let text = "service = [{ name = 'größe', vip = 'x' }]";
    assert!(errors(text).iter().any(|error| error.starts_with("w.toml:1:36: `vip` is `x`")));
}

#[test]
fn what_is_odd_but_possible_is_a_warning() {
    let cases = [
        (
            GOOD.split("[[service.backend]]").next().unwrap().to_owned(),
            "7:1: the service `web` has no backends: \
             its packets are dropped; add a backend",
        ),
        (
            spoiled("weight = 1 ", "weight = 0 "),
            "7:1: all backends of `web` have weight 0: \
             new connections are dropped; give one a weight",
        ),
        (
            format!("[maglev]\ntable_size = 197\n{GOOD}{}", BACKEND.replace("web-1", "web-2")),
            "9:1: the 2 backends of `web` will not share evenly: \
             set `table_size` in [maglev] to 211; it is 197",
        ),
    ];
    for (text, expected) in cases {
        let warnings: Vec<_> = parse(&text).1.iter().map(Finding::sentence).collect();
        assert_eq!(warnings, [format!("w.toml:{expected}")], "{text}");
    }
}

#[test]
fn an_error_is_drawn_under_its_place() {
    let text = spoiled("weight = 1 ", "weihgt = 1 ");
    let errors = Config::parse("w.toml", &text).unwrap_err();
    let mut drawn = String::new();
    let theme = miette::GraphicalTheme::unicode_nocolor();
    let handler = miette::GraphicalReportHandler::new_themed(theme);
    handler.render_report(&mut drawn, &LoadError::from(errors)).unwrap();
    for part in [
        "w.toml cannot be used: 1 error",
        "unknown key `weihgt`",
        "[w.toml:18:1]",
        "did you mean `weight`?",
    ] {
        assert!(drawn.contains(part), "{part} in\n{drawn}");
    }
}

#[test]
fn a_file_that_is_not_there_or_says_nothing_is_told_in_a_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.toml");
    let error = || load(&path).unwrap_err();
    assert_eq!(error().sentences(), [format!("there is no file {}", path.display())]);
    fs::write(&path, " \n").unwrap();
    assert_eq!(error().sentences(), [format!("{} is empty", path.display())]);
    fs::write(&path, b"\xff").unwrap();
    let expected = format!("{} cannot be read: stream did not contain valid UTF-8", path.display());
    assert_eq!(error().sentences(), [expected]);
    fs::write(&path, "# nothing yet\n").unwrap();
    assert_eq!(load(&path).unwrap().0, Config::default());
}

#[test]
fn only_services_next_hops_pings_and_arp_change_without_a_restart() {
    let old = config(GOOD);
    let mut new = old.clone();
    new.desired.services.clear();
    new.next_hops = config("[[next_hop]]\nvtep = '10.0.0.2'\nmac = '02:00:00:00:00:01'").next_hops;
    new.node.answer_arp = true;
    new.liveness.enabled = false;
    assert!(old.restart_needed(&new).is_empty());
    new.node.workers = Workers::Count(2);
    new.node.announce_table = Some(100);
    new.nat.timeouts.udp_idle_s = 1;
    new.limits.vips = 1;
    let keys = ["node.workers", "node.announce_table", "nat.udp_idle_s", "limits.vips"];
    assert_eq!(old.restart_needed(&new), keys);
}

/// The example with keys taken out of their comments.
fn uncommented(wanted: impl Fn(&str) -> bool) -> String {
    let is_key = |line: &str| {
        let name = line.split(" = ").next().unwrap_or_default();
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        line.contains(" = ") && name.chars().all(is_name)
            || line.starts_with("[[")
            || line.starts_with("[source")
    };
    EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest) if is_key(rest) && wanted(rest) => rest,
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// Whether a line of the example has no key that means nothing to this kind of health check.
fn suits(kind: CheckKind, line: &str) -> bool {
    let name = line.split(" = ").next().unwrap_or_default();
    let others = CheckKind::ALL.iter().any(|other| other.keys().contains(&name));
    !others || kind.keys().contains(&name)
}

#[test]
fn the_example_shows_the_defaults() {
    let has_default = |line: &str| {
        !["# default: ", "# required", "[["].iter().any(|mark| line.contains(mark))
            && suits(CheckKind::Http, line)
    };
    let shown = config(&uncommented(has_default));
    assert_eq!(shown, config(EXAMPLE), "the defaults of services and backends");
    let defaults = Config { desired: shown.desired.clone(), ..Config::default() };
    assert_eq!(shown, defaults);
}

#[test]
fn the_example_has_every_key_and_is_valid_with_all_of_them() {
    for kind in CheckKind::ALL {
        // Its only backend would drain, and the daemon warn of that.
        let drains = |line: &str| line.contains("drain_until");
        for mode in [Mode::Dsr, Mode::Nat] {
            if (mode, *kind) == (Mode::Nat, CheckKind::Tunnel) {
                continue;
            }
            let of_mode = |line: &str| mode == Mode::Nat || !line.starts_with("allow = ");
            let suiting = uncommented(|line| suits(*kind, line) && of_mode(line) && !drains(line));
            let check = format!("check = \"{}\"", kind.name());
            let suiting = match mode {
                Mode::Dsr => suiting,
                Mode::Nat => suiting.replace("mode = \"dsr\"", "mode = \"nat\""),
            };
            let (config, warnings) = parse(
                &suiting
                    .replace("check = \"http\"", &check)
                    .replace("ports = [\"80/tcp\"]", "ports = [\"80/tcp\", \"80/udp\"]"),
            );
            assert!(warnings.is_empty());
            assert_eq!(config.desired.services[0].mode, mode);
        }
    }
    let all = uncommented(|_| true);
    let tables: toml::Table = all.parse().unwrap();
    let nested = |path: &[&str]| {
        path.iter()
            .fold(&toml::Value::Table(tables.clone()), |value, name| {
                let value = value.get(name).unwrap();
                value.get(0).unwrap_or(value)
            })
            .as_table()
            .unwrap()
            .keys()
            .cloned()
            .collect::<BTreeSet<_>>()
    };
    let places: [(&[&str], &str); 16] = [
        (&[], ""),
        (&["node"], "[node]"),
        (&["api"], "[api]"),
        (&["dataplane"], "[dataplane]"),
        (&["connections"], "[connections]"),
        (&["nat"], "[nat]"),
        (&["maglev"], "[maglev]"),
        (&["limits"], "[limits]"),
        (&["liveness"], "[liveness]"),
        (&["source"], "[source]"),
        (&["source", "swarm"], "[source.swarm]"),
        (&["next_hop"], "[[next_hop]]"),
        (&["overlay"], "[[overlay]]"),
        (&["service"], "[[service]]"),
        (&["service", "health"], "[[service]]\n[service.health]"),
        (&["service", "backend"], "[[service]]\n[[service.backend]]"),
    ];
    for (path, header) in places {
        assert_eq!(nested(path), keys_of(header), "{header}");
    }
}

/// The keys that a table may have: serde lists them when it meets another.
fn keys_of(header: &str) -> BTreeSet<String> {
    let errors = errors(&format!("{header}\n'?' = 0\n"));
    errors[0].split('`').skip(1).step_by(2).skip(1).map(str::to_owned).collect()
}

#[test]
fn the_table_of_translated_connections_has_defaults_and_bounds() {
    let nat = |keys: &str| config(&format!("[nat]\n{keys}\n")).nat;
    assert_eq!(nat(""), Nat::default());
    assert_eq!(nat("").longest_ms(), (4 * 60 * 60 + 2) * 1000);
    assert_eq!(nat("tcp_idle_s = 604800").longest_ms(), 604_802_000);
    for (keys, expected) in [
        ("addresses = 17", "2:13: `addresses` is 17, out of its range: 1 to 16"),
        ("first_port = 0", "2:14: `first_port` is 0, out of its range: 1 to 65535"),
        (
            "first_port = 2000\nlast_port = 1999",
            "3:13: `last_port` is 1999, out of its range: 2000 to 65535",
        ),
        ("tcp_idle_s = 604801", "2:14: `tcp_idle_s` is 604801, out of its range: 1 to 604800"),
        ("time_wait_s = 0", "2:15: `time_wait_s` is 0, out of its range: 1 to 600"),
    ] {
        assert_eq!(errors(&format!("[nat]\n{keys}\n")), [format!("w.toml:{expected}")]);
    }
}

#[test]
fn a_service_on_the_node_counts_on_each_of_its_addresses() {
    let limits = Limits { vips: 8, ..Limits::default() };
    let own = ["10.0.0.1", "10.0.0.2", "fd00::1"].map(|address| address.parse().unwrap());
    let desired = config(NAT).desired;
    assert_eq!(desired.services[0].ports.len(), 4);
    limits.admit(&desired, &own).unwrap();
    let more = [&own[..], &["10.0.0.3".parse().unwrap()]].concat();
    let refused = limits.admit(&desired, &more).unwrap_err().to_string();
    assert!(refused.contains("there are 12 ports"), "{refused}");
}

#[test]
fn the_limits_of_the_start_hold_for_what_comes_later() {
    let service = |ports: &str| {
        let text = format!(
            "[limits]\nvips = 100\n[[service]]\nname = \"a\"\nvip = \"203.0.113.1\"\nports = [{ports}]\n\
             vni = 1\nbackend = [{{ name = \"b\", vtep = \"10.0.0.2\", mac = \"02:00:00:00:00:02\" }}]\n"
        );
        Config::parse("test", &text).unwrap().0.desired
    };
    let started = Limits { vips: 6, backends: 1, ..Limits::default() };
    started.admit(&service("\"80-85/tcp\""), &[]).unwrap();
    let refused = started.admit(&service("\"80-86/tcp\""), &[]).unwrap_err().to_string();
    assert!(refused.contains("limits.vips") && refused.contains("restart"), "{refused}");
    let refused = Limits { backends: 0, ..started }.admit(&service("\"80/tcp\""), &[]).unwrap_err();
    assert!(refused.to_string().contains("limits.backends"));
}
