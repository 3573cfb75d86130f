//! Mode `nat`, against stock vxlan devices that have an address and nothing else: nothing of ours, and no
//! VIP, is on a backend.

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::{
    client::{
        Held, NO_ERRORS, VIP4, Vip, exchange_ten_megabytes, get, load, parse, send_datagrams,
        start_holding, start_talking,
    },
    daemon::Daemon,
    lab::{Background, Lab, PEER, bounded, wait_until},
    wire::{Translated, forge_reset, start_capture, tshark},
};

/// What backends take for their client.
const MESH: &str = "10.99.1.250";
const MESH6: &str = "fd00:99::250";
/// A service's own address.
const VIP: Vip = Vip { address: "203.0.113.20", url: "http://203.0.113.20", client: MESH };
const VIP6: Vip =
    Vip { address: "2001:db8:113::20", url: "http://[2001:db8:113::20]:8080", client: MESH6 };
/// One of the node's.
pub const NODE: Vip = Vip { address: "10.77.0.11", url: "http://10.77.0.11:8080", client: MESH };
const NODE6: Vip =
    Vip { address: "2001:db8:77::11", url: "http://[2001:db8:77::11]:8080", client: MESH6 };

pub const ONE_ARMED: [&str; 4] = ["--nodes", "1", "--backends", "2"];

/// A lab whose backends are in an overlay, and whose first node publishes them.
pub struct Mesh {
    pub lab: Lab,
    /// The config as the lab has written it.
    plain: String,
    /// What backends' tunnels end at, but for the last digit.
    vteps: &'static str,
    _echoes: Vec<Background>,
}

impl Mesh {
    pub fn up(options: &[&str], backends: &[&str]) -> Self {
        let lab = Lab::up(options);
        lab.succeed("router", &["ip", "route", "add", VIP.address, "via", NODE.address]);
        lab.succeed("router", &["ip", "route", "add", VIP6.address, "via", NODE6.address]);
        let v6 = options.windows(2).any(|two| two == ["--underlay", "6"]);
        let vteps = if v6 { "2001:db8:77::10" } else { "10.77.0.10" };
        let echoes = backends.iter().map(|backend| join(&lab, backend, vteps)).collect();
        let plain = fs::read_to_string(lab.file("n1.toml")).unwrap();
        let mesh = Self { lab, plain, vteps, _echoes: echoes };
        mesh.serve_by(backends, "");
        mesh
    }

    /// Has the services served by these backends; `keys` are of the overlay.
    fn serve_by(&self, backends: &[&str], keys: &str) {
        self.serve(backends, keys, "");
    }

    /// `allow` is a key of the services.
    fn serve(&self, backends: &[&str], keys: &str, allow: &str) {
        let backend = |name: &&str, prefix: &str| {
            let number = &name[1..];
            format!(
                "[[service.backend]]\nname = \"{name}\"\nvtep = \"{}{number}\"\n\
                 address = \"{prefix}{number}\"\nmac = \"{}\"\n",
                self.vteps,
                mac(number)
            )
        };
        let service = |name: &str, vip: Vip, address: &str, ports: &str| {
            let prefix = mesh_prefix(vip);
            let backends: String = backends.iter().map(|name| backend(name, prefix)).collect();
            format!(
                "[[service]]\nname = \"{name}\"\nvip = \"{address}\"\nports = [{ports}]\nmode = \"nat\"\n\
                 vni = 200\n{allow}\n{backends}"
            )
        };
        let many = "\"8080:80/tcp\", \"5353/udp\", \"5301:5999/udp\", \"8000-8001:80-81/tcp\"";
        let text = format!(
            "{}\n[[overlay]]\nvni = 200\naddresses = [\"{MESH}\", \"{MESH6}\"]\n{keys}\n{}{}{}{}",
            self.plain,
            service("shop", NODE, "node", many),
            service("shop-vip", VIP, VIP.address, "\"80/tcp\", \"5353/udp\""),
            service("shop6", NODE6, "node6", many),
            service("shop-vip6", VIP6, VIP6.address, many),
        );
        let (path, new) = (self.lab.file("n1.toml"), self.lab.file("n1.toml.new"));
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }

    /// Runs a program of Python's on a host. Returns what it printed.
    pub fn python(&self, host: &str, program: &str) -> String {
        self.lab.succeed(host, &["python3", "-c", program])
    }
}

/// What backends' addresses in the overlay begin with, of a VIP's family.
fn mesh_prefix(vip: Vip) -> &'static str {
    if vip.is_v6() { "fd00:99::" } else { "10.99.1." }
}

/// A backend's MAC address in the overlay.
fn mac(number: &str) -> String {
    format!("02:42:0a:63:01:0{number}")
}

/// Gives a backend a stock vxlan device with an address of each family, and an echo server there.
pub fn join(lab: &Lab, backend: &str, vteps: &str) -> Background {
    let number = &backend[1..];
    let local = format!("{vteps}{number}");
    let [address, wide] = [NODE, VIP6].map(|vip| format!("{}{number}", mesh_prefix(vip)));
    let words = format!(
        "ip link add vx200 address {} type vxlan id 200 local {local} dstport 4789 dev eth0",
        mac(number)
    );
    lab.succeed(backend, &words.split(' ').collect::<Vec<_>>());
    lab.succeed(backend, &["ip", "address", "add", &format!("{address}/24"), "dev", "vx200"]);
    // Without asking first whether it is anybody's: there is nobody to ask.
    let wide_net = format!("{wide}/64");
    lab.succeed(backend, &["ip", "address", "add", &wide_net, "dev", "vx200", "nodad"]);
    lab.succeed(backend, &["ip", "link", "set", "vx200", "up"]);
    let ready = lab.file(&format!("{backend}-mesh.ready"));
    let ready_path = ready.to_str().unwrap();
    let echo = [PEER, "echo", "--name", backend, "--port", "5353", "--ready", ready_path];
    let echo = lab.start(backend, &[&echo[..], &["--bind", &address, "--bind", &wide]].concat());
    wait_until("the echo server listens", 10, || ready.exists());
    echo
}

#[test]
fn every_address_of_the_node_and_a_vip_lead_to_other_ports_of_stock_devices() {
    let mesh = Mesh::up(&[&ONE_ARMED[..], &["--two-armed"]].concat(), &["b1", "b2"]);
    let lab = &mesh.lab;
    // What faces clients is another address here than what faces backends.
    lab.succeed("router", &["ip", "route", "replace", VIP.address, "via", "10.76.0.11"]);
    let _daemon = Daemon::start(lab, "n1");
    let front = Vip { address: "10.76.0.11", url: "http://10.76.0.11:8080", client: MESH };
    let range = Vip { url: "http://10.76.0.11:8000", ..front };
    for vip in [front, range, NODE, VIP] {
        assert_eq!(get(lab, vip).client, MESH, "{}", vip.url);
        let datagrams = send_datagrams(lab, vip, 20, 512);
        assert_eq!(datagrams.lost, 0, "{}", vip.address);
        for answer in &datagrams.answers {
            assert!(answer.intact && answer.client == MESH, "{answer:?}");
        }
    }
    let front6 = Vip { address: "2001:db8:76::11", url: "http://[2001:db8:76::11]:8080", ..NODE6 };
    for vip in [front6, NODE6, VIP6] {
        assert_eq!(get(lab, vip).client, MESH6, "{}", vip.url);
        let datagrams = send_datagrams(lab, vip, 20, 512);
        assert_eq!(datagrams.lost, 0, "{}", vip.address);
        assert!(datagrams.answers.iter().all(|answer| answer.intact && answer.client == MESH6));
    }
    // Untranslated, beside it.
    assert_eq!(get(lab, VIP4).client, VIP4.client);
    // An address that comes later counts as well.
    lab.succeed("n1", &["ip", "address", "add", "192.0.2.11/32", "dev", "lo"]);
    lab.succeed("router", &["ip", "route", "add", "192.0.2.11", "via", "10.76.0.11"]);
    let late = "http://192.0.2.11:8080";
    wait_until("the new address answers", 10, || {
        lab.run("client", &["curl", "-sSf", "--max-time", "1", late]).status.success()
    });
}

#[test]
fn ten_megabytes_are_translated_intact_both_ways_through_a_narrow_tunnel() {
    for client_mtu in ["1500", "1400"] {
        let narrow = ["--underlay-mtu", "1500", "--client-mtu", client_mtu];
        let mesh = Mesh::up(&[&ONE_ARMED[..], &narrow].concat(), &["b1", "b2"]);
        let _daemon = Daemon::start(&mesh.lab, "n1");
        for vip in [VIP, NODE, VIP6, NODE6] {
            exchange_ten_megabytes(&mesh.lab, vip, &["b1", "b2"]);
        }
    }
}

#[test]
fn an_ipv6_underlay_carries_what_is_translated() {
    let mesh = Mesh::up(&[&ONE_ARMED[..], &["--underlay", "6"]].concat(), &["b1", "b2"]);
    let _daemon = Daemon::start(&mesh.lab, "n1");
    for vip in [VIP, NODE, VIP6, NODE6] {
        assert_eq!(get(&mesh.lab, vip).client, vip.client);
        assert_eq!(send_datagrams(&mesh.lab, vip, 20, 512).lost, 0);
        exchange_ten_megabytes(&mesh.lab, vip, &["b1", "b2"]);
    }
}

#[test]
fn the_mss_is_lowered_to_what_the_overlay_carries_both_ways() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1"]);
    mesh.serve_by(&["b1"], "mtu = 1300");
    let _daemon = Daemon::start(&mesh.lab, "n1");
    let ends = [("b1", "udp port 4789"), ("client", "tcp port 8080")];
    let of = |vip: Vip| ends.map(|(host, filter)| (vip, host, filter));
    for (vip, host, filter) in [of(NODE), of(NODE6)].concat() {
        let file = mesh.lab.file(&format!("{host}-{}.pcap", vip.address));
        let capture = start_capture(&mesh.lab, host, &file, filter);
        get(&mesh.lab, vip);
        // The kernel hands over what it has captured a block at a time.
        wait_until("it is captured", 10, || fs::metadata(&file).unwrap().len() > 1000);
        capture.stop();
        // Of the SYN in the tunnel, and of the SYN-ACK that the client gets.
        let from = if host == "b1" { vip.client } else { vip.address };
        let (ip, most) = if vip.is_v6() { ("ipv6", "1240") } else { ("ip", "1260") };
        let wanted = format!("tcp.flags.syn == 1 && {ip}.src == {from}");
        let shown = tshark(&file, &["-Y", &wanted, "-T", "fields", "-e", "tcp.options.mss_val"]);
        assert!(shown.lines().count() > 0 && shown.lines().all(|mss| mss == most), "{shown}");
    }
}

#[test]
fn a_datagram_that_must_not_be_cut_and_is_too_big_is_answered_and_not_swallowed() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1"]);
    mesh.serve_by(&["b1"], "mtu = 1300");
    let daemon = Daemon::start(&mesh.lab, "n1");
    // IP_MTU_DISCOVER, always with DF, and IP_MTU; and the same of IPv6.
    for (vip, options) in [(NODE, "IPPROTO_IP, 10, 14"), (NODE6, "IPPROTO_IPV6, 23, 24")] {
        let before = daemon.counter("too_big_sent");
        let said = mesh.python(
            "client",
            &format!(
                "import socket, time\n\
                 level, discover, mtu = socket.{options}\n\
                 family = socket.getaddrinfo('{0}', 5353)[0][0]\n\
                 s = socket.socket(family, socket.SOCK_DGRAM)\n\
                 s.setsockopt(level, discover, 2)\n\
                 s.connect(('{0}', 5353))\n\
                 s.send(bytes(1400))\n\
                 time.sleep(1)\n\
                 print(s.getsockopt(level, mtu))\n",
                vip.address
            ),
        );
        assert_eq!(said.trim(), "1300", "{}", vip.address);
        assert!(daemon.counter("too_big_sent") > before, "{}", vip.address);
    }
}

#[test]
fn icmp_errors_are_translated_both_ways() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1"]);
    let lab = &mesh.lab;
    let daemon = Daemon::start(lab, "n1");
    // Nobody listens at the target: what the backend's kernel says of it is about a packet of the client's.
    for vip in [NODE, NODE6] {
        let said = mesh.python(
            "client",
            &format!(
                "import socket\n\
                 s = socket.socket(socket.getaddrinfo('{0}', 5301)[0][0], socket.SOCK_DGRAM)\n\
                 s.settimeout(5)\n\
                 s.connect(('{0}', 5301))\n\
                 s.send(b'x')\n\
                 try: s.recv(1)\n\
                 except ConnectionRefusedError: print('refused')\n",
                vip.address
            ),
        );
        assert_eq!(said.trim(), "refused", "{}", vip.address);
    }
    // The last link narrows without the client's knowledge: the router tells whoever sends from the VIP.
    lab.succeed("router", &["ip", "link", "set", "client", "mtu", "1400"]);
    let copy = lab.file("copy");
    for vip in [NODE, NODE6] {
        let url = format!("{}/big", vip.url);
        let fetch = ["curl", "-sSf", "--max-time", "60", "-o", copy.to_str().unwrap(), &url];
        lab.succeed("client", &fetch);
        let route = lab.succeed("b1", &["ip", "route", "get", vip.client]);
        assert!(route.contains("mtu 1400"), "{route}");
    }
    assert!(daemon.counter("icmp_errors_forwarded") >= 4);
}

#[test]
fn a_backend_that_asks_whether_a_mesh_address_is_still_there_is_answered() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1"]);
    let lab = &mesh.lab;
    let _daemon = Daemon::start(lab, "n1");
    for vip in [NODE, NODE6] {
        let neighbour = ["ip", "neigh", "show", vip.client, "dev", "vx200"];
        wait_until("the backend is taught", 10, || {
            lab.succeed("b1", &neighbour).contains("02:42:0a:63:01:fa")
        });
        let probe = ["ip", "neigh", "change", vip.client, "dev", "vx200", "nud", "probe"];
        lab.succeed("b1", &probe);
        wait_until("its question is answered", 5, || {
            lab.succeed("b1", &neighbour).contains("REACHABLE")
        });
    }
}

#[test]
fn a_client_that_is_not_allowed_gets_no_connection_and_others_do() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1"]);
    mesh.serve(&["b1"], "", "allow = [\"192.0.2.0/24\"]");
    let daemon = Daemon::start(&mesh.lab, "n1");
    let refused = mesh.lab.run("client", &["curl", "-sS", "--max-time", "2", NODE.url]);
    assert!(!refused.status.success());
    assert!(daemon.drops("not_allowed") >= 1);
    let socket = mesh.lab.file("n1.sock");
    let explain = ["explain", "tcp", "198.51.100.7:5000", "10.77.0.11:8080", "--socket"];
    let why = bounded(crate::daemon::WIREMESH).args(explain).arg(socket).output().unwrap();
    let why = String::from_utf8_lossy(&why.stdout).into_owned();
    assert!(why.contains("not_allowed") && why.contains("192.0.2.0/24"), "{why}");
    mesh.serve(&["b1"], "", "allow = [\"192.0.2.0/24\", \"198.51.100.7\"]");
    wait_until("the client is allowed", 10, || {
        mesh.lab.run("client", &["curl", "-sSf", "--max-time", "1", NODE.url]).status.success()
    });
}

#[test]
fn connections_of_a_removed_backend_are_reset_and_its_datagrams_go_to_another() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1", "b2"]);
    let daemon = Daemon::start(&mesh.lab, "n1");
    let holding = start_holding(&mesh.lab, NODE, 12, 10);
    // One flow of datagrams, which is not to notice but by who answers.
    let talk = start_talking(&mesh.lab, NODE, "b1");
    wait_until("both hold connections", 5, || {
        let status = daemon.status();
        let shop = status["services"].as_array().unwrap().iter().find(|s| s["name"] == "shop");
        let backends = shop.unwrap()["backends"].as_array().unwrap().clone();
        backends.iter().map(|b| b["connections"].as_u64().unwrap()).sum::<u64>() >= 12
    });
    mesh.serve_by(&["b2"], "");
    let held: Vec<Held> = parse(&holding.finish());
    let (mut kept, mut reset) = (0, 0);
    for Held { backend, outcome, after_s } in &held {
        match backend.as_deref() {
            Some("b2") => {
                assert_eq!(outcome, "kept");
                kept += 1;
            }
            _ => {
                assert_eq!(outcome, "reset", "and not a hang");
                assert!(*after_s < 5.0, "{after_s}");
                reset += 1;
            }
        }
    }
    assert!(kept > 0 && reset > 0, "{held:?}");
    let said = talk.finish();
    let last: Vec<&str> = said.split_whitespace().rev().take(10).collect();
    assert!(last.iter().all(|name| *name == "b2"), "{said}");
    assert!(said.matches('-').count() <= 1, "one may have been under way: {said}");
}

#[test]
fn a_mesh_address_that_is_taken_out_keeps_its_connections_and_gets_no_new_ones() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1", "b2"]);
    let _daemon = Daemon::start(&mesh.lab, "n1");
    let holding = start_holding(&mesh.lab, NODE, 10, 10);
    let other = "10.99.1.251";
    mesh.lab.write_config("n1", "n1.toml", MESH, other);
    wait_until("new connections come from the other address", 5, || {
        get(&mesh.lab, NODE).client == other
    });
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
}

#[test]
fn more_connections_of_one_client_than_a_kernel_has_ports_meet_no_pause_in_a_minute() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1", "b2"]);
    let daemon = Daemon::start(&mesh.lab, "n1");
    // Closed by the client first; the others by the server.
    let load = load(&mesh.lab, NODE, 2000);
    assert_eq!((load.errors, load.ok), (NO_ERRORS, 2000));
    // A port that is used again too soon costs the second after which a SYN is repeated.
    assert!(load.slowest_s < 0.9, "{} s", load.slowest_s);
    let (begun, mut all) = (Instant::now(), 0);
    while all <= 28_232 {
        assert!(begun.elapsed() < Duration::from_secs(55), "only {all} within a minute");
        let wrk = ["wrk", "-t1", "-c8", "-d4s", "-H", "Connection: close", NODE.url];
        let said = mesh.lab.succeed("client", &wrk);
        let word_before = |mark: &str| {
            let (before, _) = said.split_once(mark).unwrap_or_else(|| panic!("{said}"));
            before.split_whitespace().next_back().unwrap().to_owned()
        };
        all += word_before(" requests in").parse::<u32>().unwrap();
        let latency = said.lines().find(|line| line.trim_start().starts_with("Latency")).unwrap();
        let slowest = latency.split_whitespace().nth(3).unwrap();
        let seconds = slowest.trim_end_matches("us").trim_end_matches("ms");
        let quick =
            seconds != slowest || slowest.trim_end_matches('s').parse::<f64>().unwrap() < 0.9;
        assert!(quick && !said.contains("Socket errors"), "{said}");
    }
    let metrics = daemon.get("/metrics");
    let value = |name: &str| {
        let label = format!("wiremesh_{name}{{vni=\"200\",address=\"{MESH}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&label));
        line.unwrap_or_else(|| panic!("no {label} in {metrics}")).parse::<u64>().unwrap()
    };
    assert_eq!(value("nat_slots"), 64_512);
    // What the server closed first rests for a minute, for it remembers the port; a few were reset instead.
    let (used, all) = (value("nat_slots_used"), u64::from(all));
    assert!((all * 9 / 10..all + 2000).contains(&used), "{used} after {all}");
}

#[test]
fn what_a_stranger_puts_into_a_tunnel_is_dropped_and_counted_and_the_connection_goes_on() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1"]);
    let lab = &mesh.lab;
    let daemon = Daemon::start(lab, "n1");
    let holding = start_holding(lab, NODE, 1, 6);
    let connection = Translated::of(lab, &daemon, NODE.address, "8080");
    assert_eq!((&*connection.backend, &*connection.state), ("b1", "established"));
    assert_eq!(connection.mesh.ip().to_string(), MESH);
    forge_reset(lab, "b2", &connection, NODE.address, 200);
    wait_until("the drop is counted", 5, || daemon.drops("spoofed_tunnel") == 1);
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
    let ps = daemon.wiremesh("service ps shop");
    assert!(ps.contains("b1"), "{ps}");
}

#[test]
fn a_service_of_the_apis_is_translated_in_the_words_of_docker() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1"]);
    let daemon = Daemon::start(&mesh.lab, "n1");
    daemon.wiremesh(
        "service create --name api --mode nat --vip node --publish published=9200,target=80 --vni 200 \
         --backend vtep=10.77.0.101,address=10.99.1.1",
    );
    let vip = Vip { url: "http://10.77.0.11:9200", ..NODE };
    assert_eq!(get(&mesh.lab, vip).client, MESH);
    let shown = daemon.wiremesh("service inspect api");
    assert!(shown.contains("ports = [\"9200:80/tcp\"]"), "{shown}");
    daemon.wiremesh(
        "service create --name api6 --mode nat --vip node6 --publish published=9200,target=80 --vni 200 \
         --backend vtep=10.77.0.101,address=fd00:99::1,mac=02:42:0a:63:01:01",
    );
    let vip6 = Vip { url: "http://[2001:db8:77::11]:9200", ..NODE6 };
    assert_eq!(get(&mesh.lab, vip6).client, MESH6);
    assert_eq!(get(&mesh.lab, vip).client, MESH, "the same port, over IPv4");
    let holding = start_holding(&mesh.lab, vip6, 1, 4);
    let connection = Translated::of(&mesh.lab, &daemon, "[2001:db8:77::11]", "9200");
    assert_eq!(connection.mesh.ip().to_string(), MESH6);
    assert_eq!(connection.target.to_string(), "[fd00:99::1]:80");
    assert_eq!((&*connection.backend, &*connection.state), ("api6-1", "established"));
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
    // The file can't take the overlay away from it.
    fs::write(mesh.lab.file("n1.toml"), &mesh.plain).unwrap();
    wait_until("the file is refused", 10, || {
        let refused = daemon.status()["refused"].as_str().unwrap_or_default().to_owned();
        refused.contains("the api's `api` can't be reached by nat")
    });
    assert_eq!(get(&mesh.lab, vip).client, MESH);
    // In an overlay that the node is not in it can't be.
    let socket = mesh.lab.file("n1.sock");
    let output = bounded(crate::daemon::WIREMESH)
        .args(["service", "create", "--name", "lost", "--mode", "nat", "--vip", "node"])
        .args(["--publish", "9300:80", "--vni", "201", "--socket"])
        .arg(socket)
        .args(["--backend", "vtep=10.77.0.101,address=10.99.1.1"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("no address in the overlay 201"), "{said}");
}
