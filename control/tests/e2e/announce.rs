//! VIPs announced by a real BIRD: the router has a route while a backend serves, and none otherwise.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    api::bare_lab,
    client::{VIP4, VIP6, VIPS, Vip},
    daemon::Daemon,
    health,
    lab::{Background, Lab, wait_until},
};

const TABLE: &str = "100";
const INTERVAL_MS: u64 = 200;
/// When the router has to know after a server's end or return: two checks, of which the first may just have
/// been, and BIRD.
const BOUND: Duration = Duration::from_millis(1000);
/// What a test's own looking costs on a machine that does something else meanwhile.
const GRACE: Duration = Duration::from_millis(500);

/// What README tells to write, and a session to the router.
const NODE: &str = r#"
router id 10.77.0.11;
ipv4 table vips4;
ipv6 table vips6;
protocol device {}
protocol kernel { kernel table 100; learn; ipv4 { table vips4; import all; export none; }; }
protocol kernel { kernel table 100; learn; ipv6 { table vips6; import all; export none; }; }
protocol bgp upstream {
    local 10.77.0.11 as 65001;
    neighbor 10.77.0.1 as 65000;
    connect delay time 1;
    connect retry time 1;
    ipv4 { table vips4; import none; export all; };
    ipv6 { table vips6; import none; export all; next hop address 2001:db8:77::11; };
}
"#;

const ROUTER: &str = r#"
router id 10.77.0.1;
protocol device {}
protocol kernel { ipv4 { import none; export all; }; }
protocol kernel { ipv6 { import none; export all; }; }
protocol bgp node {
    local 10.77.0.1 as 65000;
    neighbor 10.77.0.11 as 65001;
    passive;
    ipv4 { import all; export none; };
    ipv6 { import all; export none; };
}
"#;

/// BIRD on a host, with everything of its own in the lab's directory.
fn start_bird(lab: &Lab, host: &str, config: &str) -> Background {
    let file = |kind: &str| lab.file(&format!("{host}.bird.{kind}")).to_str().unwrap().to_owned();
    fs::write(file("conf"), config).unwrap();
    let (conf, control, pid) = (file("conf"), file("ctl"), file("pid"));
    lab.start(host, &["bird", "-f", "-c", &conf, "-s", &control, "-P", &pid])
}

/// A lab whose router has routes to the VIPs by BIRD only.
fn announcing_lab() -> (Lab, [Background; 2]) {
    let lab = bare_lab();
    for vip in VIPS {
        lab.succeed("router", &["ip", "route", "del", vip.address]);
    }
    lab.write_config("n1", "n1.toml", "[node]\n", &format!("[node]\nannounce_table = {TABLE}\n"));
    let birds = [start_bird(&lab, "router", ROUTER), start_bird(&lab, "n1", NODE)];
    (lab, birds)
}

/// A service of both backends on this VIP; checks that its web servers listen.
fn create(daemon: &Daemon, vip: Vip) {
    let keys = json!({ "check": "tcp", "interval_ms": INTERVAL_MS });
    health::create(daemon, &health::service(vip, &["80/tcp"], &keys));
}

/// What the router has to this VIP.
fn route(lab: &Lab, vip: Vip) -> String {
    let family = if vip.is_v6() { "-6" } else { "-4" };
    lab.succeed("router", &["ip", family, "route", "show", vip.address])
}

/// Waits until the router has routes to all VIPs, or to none. Returns how long that took.
fn wait_for_routes(lab: &Lab, there: bool) -> Duration {
    let begun = Instant::now();
    let what = if there { "has" } else { "has not" };
    wait_until(&format!("the router {what} its routes"), 20, || {
        VIPS.iter().all(|vip| route(lab, *vip).is_empty() != there)
    });
    begun.elapsed()
}

fn assert_in_time(what: &str, took: Duration) {
    println!("{what}: {took:?}, where {BOUND:?} is promised");
    assert!(took < BOUND + GRACE, "{what}: {took:?}");
}

/// What of ours is in the node's table.
fn ours(lab: &Lab) -> String {
    let shown = ["-4", "-6"].map(|family| {
        // There is no table before its first route: no success then.
        let show = ["ip", family, "route", "show", "table", TABLE, "proto", "87"];
        String::from_utf8(lab.run("n1", &show).stdout).unwrap()
    });
    shown.concat()
}

fn assert_reached(lab: &Lab) {
    for vip in VIPS {
        let answer = lab.succeed("client", &["curl", "-sSf", "--max-time", "2", vip.url]);
        assert!(answer.starts_with("backend="), "{answer}");
    }
}

#[test]
fn routers_have_a_route_to_a_vip_while_a_backend_serves() {
    let (lab, _birds) = announcing_lab();
    let daemon = Daemon::start(&lab, "n1");
    assert_eq!(ours(&lab), "");
    VIPS.iter().for_each(|vip| create(&daemon, *vip));
    // BGP has to come up first.
    wait_for_routes(&lab, true);
    assert!(route(&lab, VIP4).contains("via 10.77.0.11"), "{}", route(&lab, VIP4));
    assert!(route(&lab, VIP6).contains("via 2001:db8:77::11"), "{}", route(&lab, VIP6));
    assert_reached(&lab);

    lab.stop("b1-nginx");
    wait_until("b1 is down", 5, || {
        let backends: Value =
            serde_json::from_str(&daemon.get("/v1/services/web/backends")).unwrap();
        backends[0]["state"] == "down"
    });
    wait_for_routes(&lab, true);
    assert_reached(&lab);

    for _ in 0..3 {
        lab.stop("b2-nginx");
        assert_in_time("gone after the last server", wait_for_routes(&lab, false));
        assert_eq!(ours(&lab), "");
        lab.start_nginx("b2");
        assert_in_time("back after a server", wait_for_routes(&lab, true));
        assert_reached(&lab);
    }

    daemon.terminate();
    assert_in_time("gone after the daemon", wait_for_routes(&lab, false));
    assert_eq!(ours(&lab), "");
}

#[test]
fn routes_of_an_earlier_life_stay_if_they_are_wanted_and_others_stay_in_any_case() {
    let (lab, _birds) = announcing_lab();
    let daemon = Daemon::start(&lab, "n1");
    VIPS.iter().for_each(|vip| create(&daemon, *vip));
    let anothers = ["192.0.2.7", "proto", "static", "table", TABLE];
    lab.succeed("n1", &[&["ip", "route", "add", "blackhole"], &anothers[..]].concat());
    // Changed by somebody else: put right.
    lab.succeed("n1", &["ip", "route", "flush", "table", TABLE, "proto", "87"]);
    wait_until("the route is there again", 5, || ours(&lab).contains(VIP4.address));
    wait_for_routes(&lab, true);

    daemon.kill_9();
    assert!(ours(&lab).contains(VIP4.address) && ours(&lab).contains(VIP6.address));
    // As if it had been removed on another day.
    fs::remove_file(lab.file("n1.state/services/web6.json")).unwrap();
    let _daemon = Daemon::start(&lab, "n1");
    wait_until("what is not wanted is gone", 5, || !ours(&lab).contains(VIP6.address));
    wait_until("the router knows", 5, || route(&lab, VIP6).is_empty());
    assert!(ours(&lab).contains(VIP4.address) && !route(&lab, VIP4).is_empty());
    let shown = lab.succeed("n1", &["ip", "route", "show", "table", TABLE]);
    assert!(shown.contains("blackhole 192.0.2.7 proto static"), "{shown}");
}

#[test]
fn a_route_of_somebody_else_is_left_and_named_and_gives_way_to_ours_later() {
    let lab = bare_lab();
    lab.write_config("n1", "n1.toml", "[node]\n", &format!("[node]\nannounce_table = {TABLE}\n"));
    let anothers = [VIP4.address, "proto", "static", "table", TABLE];
    lab.succeed("n1", &[&["ip", "route", "add", "blackhole"], &anothers[..]].concat());
    let daemon = Daemon::start(&lab, "n1");
    VIPS.iter().for_each(|vip| create(&daemon, *vip));
    wait_until("the other VIP is announced", 5, || ours(&lab).contains(VIP6.address));
    assert!(!ours(&lab).contains(VIP4.address));
    let expected = "the kernel does not take a route to 203.0.113.10 in table 100";
    assert!(daemon.log().contains(expected), "{}", daemon.log());
    // Packets are none the worse for it.
    assert_reached(&lab);
    lab.succeed("n1", &[&["ip", "route", "del", "blackhole"], &anothers[..]].concat());
    wait_until("it is announced", 5, || ours(&lab).contains(VIP4.address));
    assert!(daemon.log().contains("VIPs are announced again"), "{}", daemon.log());
}
