//! Health checks against real servers: who does not serve gets no connections, and gets them again.

use std::{
    fs,
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

use crate::{
    api::{bare_lab, bare_lab_of},
    client::{
        ECHO_PORT, Held, NO_ERRORS, VIP4, VIP6, Vip, load, parse, send_datagrams, start_holding,
    },
    daemon::{Daemon, WIREMESH},
    lab::{Background, Lab, PEER, wait_until},
};

const INTERVAL_MS: u64 = 500;
const FALL: u64 = 2;
/// When a backend that fell silent has to be out.
const BOUND: Duration = Duration::from_millis(INTERVAL_MS * FALL + 100);
/// What a test's own looking costs on a machine that does something else meanwhile.
const GRACE: Duration = Duration::from_millis(500);

/// A service of `b1` and `b2`, with these keys of its checks besides the pace.
pub fn service(vip: Vip, ports: &[&str], keys: &Value) -> Value {
    let backend = |number: u32| {
        json!({
            "name": format!("b{number}"),
            "vtep": format!("10.77.0.10{number}"),
            "mac": format!("02:00:00:00:02:0{number}"),
            "address": format!("10.77.0.10{number}"),
        })
    };
    let mut health = json!({ "interval_ms": INTERVAL_MS, "rise": 2, "fall": FALL });
    health.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    let name = if vip.is_v6() { "web6" } else { "web" };
    json!({
        "name": name, "vip": vip.address, "ports": ports, "vni": 100,
        "backends": [backend(1), backend(2)], "health": health,
    })
}

pub fn create(daemon: &Daemon, service: &Value) {
    let (status, answer) = daemon.call("POST", "/v1/services", service, "");
    assert_eq!(status, 201, "{answer}");
}

fn replace(daemon: &Daemon, service: &Value) {
    let path = format!("/v1/services/{}", service["name"].as_str().unwrap());
    let (status, answer) = daemon.call("PUT", &path, service, "*");
    assert_eq!(status, 200, "{answer}");
}

fn backend(daemon: &Daemon, service: &str, name: &str) -> Value {
    let backends = daemon.get(&format!("/v1/services/{service}/backends"));
    let backends: Value = serde_json::from_str(&backends).unwrap();
    backends.as_array().unwrap().iter().find(|found| found["name"] == name).unwrap().clone()
}

/// Waits until a backend's checks say this. Returns how long that took.
fn wait_for(daemon: &Daemon, service: &str, name: &str, verdict: &str) -> Duration {
    let begun = Instant::now();
    wait_until(&format!("{service}/{name} is {verdict}"), 20, || {
        backend(daemon, service, name)["health"]["verdict"] == verdict
    });
    begun.elapsed()
}

fn wait_for_both(daemon: &Daemon, service: &str, verdict: &str) {
    wait_for(daemon, service, "b1", verdict);
    wait_for(daemon, service, "b2", verdict);
}

fn assert_in_time(what: &str, took: Duration) {
    println!("{what}: out after {took:?}, where {BOUND:?} is promised");
    assert!(took < BOUND + GRACE, "{what}: {took:?}");
}

fn assert_only(lab: &Lab, vip: Vip, backend: &str) {
    let load = load(lab, vip, 100);
    assert!(load.errors.is_empty() && load.backends.keys().eq([backend]), "{load:?}");
}

fn assert_both(lab: &Lab, vip: Vip) {
    let load = load(lab, vip, 200);
    assert!(load.errors == NO_ERRORS && load.backends.len() == 2, "{load:?}");
}

#[test]
fn a_backend_whose_server_dies_is_out_in_time_and_back_when_it_is() {
    let lab = bare_lab();
    let daemon = Daemon::start(&lab, "n1");
    let (socket, told) = (lab.file("n1.sock"), lab.file("events"));
    let events = format!("{WIREMESH} events --socket {} >{}", socket.display(), told.display());
    let watching = lab.start("n1", &["sh", "-c", &format!("exec {events}")]);
    create(&daemon, &service(VIP4, &["80/tcp"], &json!({ "check": "tcp" })));
    wait_for_both(&daemon, "web", "up");
    assert_both(&lab, VIP4);

    lab.stop("b2-nginx");
    assert_in_time("a dead server", wait_for(&daemon, "web", "b2", "down"));
    // Whoever sees that it is down sees it out of selection.
    assert_only(&lab, VIP4, "b1");
    let b2 = backend(&daemon, "web", "b2");
    let refused = |value: &Value| value.as_str().unwrap().contains("Connection refused");
    assert!(b2["state"] == "down" && refused(&b2["reason"]), "{b2}");
    assert!(refused(&b2["health"]["result"]), "{b2}");
    assert!(b2["health"]["checked_unix_ms"].as_u64().unwrap() > 1_700_000_000_000, "{b2}");
    let shown = lab
        .succeed("n1", &[WIREMESH, "service", "ps", "web", "--socket", socket.to_str().unwrap()]);
    assert!(shown.contains("b2 is down: no connection to 10.77.0.102:80"), "{shown}");
    assert!(shown.contains("10.77.0.101:80 accepts connections"), "{shown}");
    let metrics = daemon.get("/metrics");
    for series in [
        "wiremesh_backend_up{service=\"web\",backend=\"b1\"} 1",
        "wiremesh_backend_up{service=\"web\",backend=\"b2\"} 0",
        "wiremesh_backends{state=\"down\"} 1",
        "wiremesh_health_checks_total{result=\"failed\"} ",
    ] {
        assert!(metrics.contains(series), "no {series} in {metrics}");
    }

    lab.start_nginx("b2");
    let took = wait_for(&daemon, "web", "b2", "up");
    println!("a server that returned: back after {took:?}");
    assert_both(&lab, VIP4);
    wait_until("all has been told", 5, || {
        let told = fs::read_to_string(&told).unwrap();
        let of_b2: Vec<&str> = told
            .lines()
            .filter_map(|line| line.split_once("web/b2: ").map(|(_, what)| what))
            .map(|what| what.split(", ").nth(2).unwrap())
            .collect();
        of_b2 == ["health unknown", "health up", "health down", "health up"]
    });
    watching.stop();
    let log = daemon.log();
    assert!(log.contains("down: no connection to 10.77.0.102:80"), "{log}");
}

#[test]
fn a_wrong_status_or_body_takes_a_backend_out_and_its_connections_as_the_service_says() {
    let lab = bare_lab();
    let daemon = Daemon::start(&lab, "n1");
    let page = |backend: &str| lab.file(&format!("{backend}/upload/health"));
    for backend in ["b1", "b2"] {
        fs::write(page(backend), "all is well").unwrap();
    }
    let checked = |on_down: &str, body: &str| {
        let keys = json!({
            "check": "http", "path": "/upload/health", "status": ["200-204"], "body": body,
            "on_down": on_down,
        });
        service(VIP4, &["80/tcp"], &keys)
    };
    create(&daemon, &checked("keep", "well"));
    for (on_down, outcome, by_us) in
        [("keep", "kept", false), ("reselect", "reset", false), ("reset", "reset", true)]
    {
        let before = daemon.drops("backend_gone");
        replace(&daemon, &checked(on_down, "well"));
        wait_for_both(&daemon, "web", "up");
        let _ = fs::remove_file(lab.file("holding"));
        let holding = start_holding(&lab, VIP4, 18, 6);
        fs::remove_file(page("b2")).unwrap();
        assert_in_time("status 404", wait_for(&daemon, "web", "b2", "down"));
        let reason = backend(&daemon, "web", "b2")["reason"].clone();
        assert_eq!(reason, "status 404 Not Found, where 200-204 is expected");
        assert_only(&lab, VIP4, "b1");
        let held: Vec<Held> = parse(&holding.finish());
        for connection in &held {
            let other = connection.backend.as_deref() == Some("b1");
            assert_eq!(connection.outcome, if other { "kept" } else { outcome }, "{held:?}");
        }
        assert!(held.iter().any(|connection| connection.backend.as_deref() == Some("b2")));
        assert_eq!(daemon.drops("backend_gone") > before, by_us, "{on_down}");
        fs::write(page("b2"), "all is well").unwrap();
    }
    wait_for_both(&daemon, "web", "up");
    fs::write(page("b1"), "all is lost").unwrap();
    wait_for(&daemon, "web", "b1", "down");
    let reason = backend(&daemon, "web", "b1")["reason"].clone();
    assert_eq!(reason, "status 200 OK, but no `well` in 11 bytes of body");
    assert_only(&lab, VIP4, "b2");
    // Another question: what was thought is no answer to it.
    replace(&daemon, &checked("keep", "lost"));
    wait_for(&daemon, "web", "b1", "up");
    wait_for(&daemon, "web", "b2", "down");
}

#[test]
fn while_all_are_down_a_service_goes_on_or_stops_as_it_says() {
    let lab = bare_lab();
    let daemon = Daemon::start(&lab, "n1");
    // Nobody listens there: the check is what is wrong.
    let keys = json!({ "check": "tcp", "port": 81 });
    create(&daemon, &service(VIP4, &["80/tcp"], &keys));
    wait_for_both(&daemon, "web", "down");
    assert_both(&lab, VIP4);

    let socket = lab.file("n1.sock");
    let socket = socket.to_str().unwrap();
    let update = |flags: &[&str]| {
        let update = [WIREMESH, "service", "update", "web", "--socket", socket];
        lab.succeed("n1", &[&update[..], flags].concat());
    };
    update(&["--health-all-down", "stop"]);
    assert_eq!(backend(&daemon, "web", "b1")["state"], "down", "the question is the same");
    let dropped = || daemon.drops("no_backend");
    let before = dropped();
    let asked = lab.run("client", &["curl", "-sS", "--max-time", "1", VIP4.url]);
    assert!(!asked.status.success() && dropped() > before, "{} drops", dropped() - before);
    let explain =
        [WIREMESH, "explain", "tcp", "198.51.100.7:40000", "203.0.113.10:80", "--socket", socket];
    // Its exit code says "dropped".
    let explained = lab.run("n1", &explain);
    let explained = String::from_utf8(explained.stdout).unwrap();
    assert!(
        explained.contains("all backends of web are down, and all_down is stop"),
        "{explained}"
    );

    update(&["--no-healthcheck"]);
    assert_both(&lab, VIP4);
    assert_eq!(backend(&daemon, "web", "b1")["health"], Value::Null);
}

/// RSTs that a host's kernel has sent.
fn resets(lab: &Lab, host: &str) -> u64 {
    let snmp = lab.succeed(host, &["cat", "/proc/net/snmp"]);
    let mut tcp = snmp.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let at = tcp.next().unwrap().split(' ').position(|name| name == "OutRsts").unwrap();
    tcp.next().unwrap().split(' ').nth(at).unwrap().parse().unwrap()
}

#[test]
fn a_broken_tunnel_or_a_missing_vip_is_found_though_the_port_is_open() {
    let lab = bare_lab();
    let daemon = Daemon::start(&lab, "n1");
    let before = resets(&lab, "n1");
    for vip in [VIP4, VIP6] {
        create(&daemon, &service(vip, &["80/tcp"], &json!({ "check": "tunnel" })));
    }
    for service in ["web", "web6"] {
        wait_for_both(&daemon, service, "up");
    }
    assert_both(&lab, VIP4);
    let open = || {
        let curl = ["curl", "-sS", "--max-time", "2", "-o", "/dev/null", "http://10.77.0.102/"];
        lab.succeed("n1", &curl);
    };

    lab.succeed("b2", &["ip", "address", "del", "203.0.113.10/32", "dev", "lo"]);
    open();
    assert_in_time("a missing VIP", wait_for(&daemon, "web", "b2", "down"));
    let reason = backend(&daemon, "web", "b2")["reason"].as_str().unwrap().to_owned();
    assert!(reason.starts_with("no answer within 250 ms by the tunnel"), "{reason}");
    assert_only(&lab, VIP4, "b1");
    assert_eq!(backend(&daemon, "web6", "b2")["health"]["verdict"], "up", "it has that one");
    lab.succeed("b2", &["ip", "address", "add", "203.0.113.10/32", "dev", "lo"]);
    wait_for(&daemon, "web", "b2", "up");

    lab.succeed("b2", &["ip", "link", "set", "vx100", "down"]);
    open();
    assert_in_time("a broken tunnel", wait_for(&daemon, "web", "b2", "down"));
    wait_for(&daemon, "web6", "b2", "down");
    assert_only(&lab, VIP6, "b1");
    lab.succeed("b2", &["ip", "link", "set", "vx100", "up"]);
    wait_for(&daemon, "web", "b2", "up");
    wait_for(&daemon, "web6", "b2", "up");

    // As when the server is gone, and the tunnel there.
    lab.stop("b2-nginx");
    assert_in_time("a closed port", wait_for(&daemon, "web", "b2", "down"));
    let reason = backend(&daemon, "web", "b2")["reason"].clone();
    assert_eq!(reason, "203.0.113.10:80 refuses connections by the tunnel");

    // The kernel kept silent, and no connection was left half open.
    assert_eq!(resets(&lab, "n1"), before);
    let half_open = lab.succeed("b1", &["ss", "-Htn", "state", "syn-recv"]);
    assert_eq!(half_open, "");
}

#[test]
fn answers_through_the_tunnel_count_where_the_kernel_would_not_take_them() {
    let lab = bare_lab_of(&["--nodes", "1", "--backends", "2", "--two-armed"]);
    // The VIP is not routed by the interface that backends answer by.
    lab.succeed("n1", &["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"]);
    let daemon = Daemon::start(&lab, "n1");
    create(&daemon, &service(VIP4, &["80/tcp"], &json!({ "check": "tunnel" })));
    wait_for_both(&daemon, "web", "up");
    lab.succeed("b2", &["ip", "link", "set", "vx100", "down"]);
    wait_for(&daemon, "web", "b2", "down");
    assert_only(&lab, VIP4, "b1");
}

/// An echo server at a backend's own address.
fn start_echo(lab: &Lab, backend: &str, port: &str) -> Background {
    let address = format!("10.77.0.10{}", &backend[1..]);
    let ready = lab.file(&format!("{backend}.echo"));
    let _ = fs::remove_file(&ready);
    let echo = [
        PEER,
        "echo",
        "--name",
        backend,
        "--port",
        port,
        "--ready",
        ready.to_str().unwrap(),
        "--bind",
        &address,
    ];
    let echo = lab.start(backend, &echo);
    wait_until("the server is ready", 10, || ready.exists());
    echo
}

#[test]
fn datagrams_are_asked_for_at_the_address_and_through_the_tunnel() {
    let lab = bare_lab();
    let daemon = Daemon::start(&lab, "n1");
    let keys = json!({ "check": "udp", "port": 5454, "send": "ping", "expect": "ping" });
    let [_one, two] = ["b1", "b2"].map(|backend| start_echo(&lab, backend, "5454"));
    create(&daemon, &service(VIP4, &["5353/udp"], &keys));
    wait_for_both(&daemon, "web", "up");
    two.stop();
    assert_in_time("no UDP server", wait_for(&daemon, "web", "b2", "down"));
    let reason = backend(&daemon, "web", "b2")["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("Connection refused"), "ICMP port unreachable: {reason}");
    assert_eq!(ECHO_PORT, "5353");
    let sent = send_datagrams(&lab, VIP4, 20, 64);
    assert_eq!(sent.lost, 0);
    assert!(sent.answers.iter().all(|answer| answer.backend == "b1"), "{sent:?}");

    // The servers at the VIP are another matter.
    for (expect, verdict) in [("ping", "up"), ("pong", "down")] {
        let keys = json!({ "check": "tunnel", "send": "ping", "expect": expect });
        replace(&daemon, &service(VIP4, &["5353/udp"], &keys));
        wait_for_both(&daemon, "web", verdict);
    }
    let keys = json!({ "check": "tunnel", "send": "ping" });
    replace(&daemon, &service(VIP4, &["5353/udp"], &keys));
    wait_for_both(&daemon, "web", "up");
    lab.stop("b2-echo");
    assert_in_time("no UDP server at the VIP", wait_for(&daemon, "web", "b2", "down"));
    let reason = backend(&daemon, "web", "b2")["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("Connection refused"), "ICMP port unreachable: {reason}");
}

/// A certificate for `shop.example`, its key, and who signed it, as files of the lab.
fn certificates(lab: &Lab) -> [String; 3] {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().unwrap();
    let signed = authority.self_signed(&authority_key).unwrap();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().unwrap();
    let server = CertificateParams::new(["shop.example".to_owned()]).unwrap();
    let server = server.signed_by(&key, &issuer).unwrap();
    let files = [("crt", server.pem()), ("key", key.serialize_pem()), ("ca", signed.pem())];
    files.map(|(name, text)| {
        let file = lab.file(name);
        fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    })
}

#[test]
fn certificates_are_verified_unless_the_service_says_otherwise() {
    const SERVER: &str = "import http.server, ssl, sys
address, certificate, key = sys.argv[1:]
server = http.server.ThreadingHTTPServer((address, 8443), http.server.SimpleHTTPRequestHandler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()";
    let lab = bare_lab();
    let [certificate, key, authority] = certificates(&lab);
    let serve = |backend: &str| {
        let address = format!("10.77.0.10{}", &backend[1..]);
        lab.start(backend, &["python3", "-c", SERVER, &address, &certificate, &key])
    };
    let _servers = ["b1", "b2"].map(serve);
    let trusted = format!("SSL_CERT_FILE={authority}");
    let daemon = Daemon::start_by(&lab, "n1", &["env", &trusted]);
    let checked = |host: &str, verify: bool| {
        let keys = json!({ "check": "https", "port": 8443, "host": host, "tls_verify": verify });
        service(VIP4, &["80/tcp"], &keys)
    };
    create(&daemon, &checked("shop.example", true));
    wait_for_both(&daemon, "web", "up");
    replace(&daemon, &checked("other.example", true));
    wait_for_both(&daemon, "web", "down");
    let reason = backend(&daemon, "web", "b1")["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("no TLS with") && reason.contains("certificate"), "{reason}");
    replace(&daemon, &checked("other.example", false));
    wait_for_both(&daemon, "web", "up");
}
