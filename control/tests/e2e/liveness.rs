//! Nodes that fall silent: new connections avoid them at once, long before the kernel gives their neighbour
//! entries up.

use std::{fs, thread, time::Duration};

use crate::{
    client::{Held, NO_ERRORS, load, outage, parse, start_holding, start_talking},
    daemon::Daemon,
    lab::wait_until,
    nat::{Mesh, NODE, ONE_ARMED},
};

const VTEPS: [&str; 2] = ["10.77.0.101", "10.77.0.102"];

/// A node of ours before two backends, both of which are watched.
fn watched() -> (Mesh, Daemon) {
    let mesh = Mesh::up(&ONE_ARMED, &["b1", "b2"]);
    let daemon = Daemon::start(&mesh.lab, "n1");
    daemon.wait_for_liveness(&VTEPS, "alive");
    (mesh, daemon)
}

#[test]
fn a_node_that_is_cut_off_is_avoided_within_a_second_and_back_within_three() {
    for underlay in ["4", "6"] {
        let mesh = Mesh::up(&[&ONE_ARMED[..], &["--underlay", underlay]].concat(), &["b1", "b2"]);
        let daemon = Daemon::start(&mesh.lab, "n1");
        let vteps = if underlay == "4" { VTEPS } else { ["2001:db8:77::101", "2001:db8:77::102"] };
        daemon.wait_for_liveness(&vteps, "alive");
        let cut = |cut| mesh.lab.cut_off("b1", cut);
        let outage = outage(&mesh.lab, NODE, "b1", Duration::from_secs(3), cut);
        assert!(outage.avoided_s <= 1.0 && outage.back_s <= 3.0);
        let log = daemon.log();
        let reason = format!("{} has not answered 3 pings in 600 ms", vteps[0]);
        assert!(log.contains(&reason) && log.contains("answers pings again"), "{log}");
    }
}

#[test]
fn a_node_whose_neighbour_entry_has_failed_meanwhile_is_back_within_three_seconds_too() {
    let (mesh, daemon) = watched();
    let reason = || daemon.node(VTEPS[0])["reason"].to_string();
    let outage = outage(&mesh.lab, NODE, "b1", Duration::from_secs(14), |cut| {
        if !cut {
            assert!(reason().contains("FAILED"), "{}", reason());
        }
        mesh.lab.cut_off("b1", cut);
    });
    assert!(outage.avoided_s <= 1.0 && outage.back_s <= 3.0);
    daemon.wait_for_liveness(&VTEPS, "alive");
}

#[test]
fn open_connections_wait_for_a_silent_node_and_datagrams_go_elsewhere() {
    let (mesh, daemon) = watched();
    let holding = start_holding(&mesh.lab, NODE, 8, 9);
    let talking = start_talking(&mesh.lab, NODE, "b1");
    thread::sleep(Duration::from_secs(1));
    mesh.lab.cut_off("b1", true);
    wait_until("it is silent", 2, || daemon.node(VTEPS[0])["liveness"] == "silent");
    let ls = daemon.wiremesh("node ls");
    assert!(ls.contains("unreachable") && ls.contains("has not answered 3 pings"), "{ls}");
    let metrics = daemon.get("/metrics");
    assert!(metrics.contains("wiremesh_vtep_alive{vtep=\"10.77.0.101\"} 0"), "{metrics}");
    let after = load(&mesh.lab, NODE, 50);
    assert_eq!((&after.errors, after.backends.get("b1")), (&NO_ERRORS, None), "{after:?}");
    mesh.lab.cut_off("b1", false);
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
    assert!(held.iter().any(|connection| connection.backend.as_deref() == Some("b1")));
    let said = talking.finish();
    assert!(said.contains("b1 b1") && said.contains("b2 b2"), "{said}");
    // Each lost one takes 0.4 s.
    assert!(said.matches('-').count() <= 3, "{said}");
}

#[test]
fn a_node_that_has_never_answered_a_ping_is_not_judged_by_them_and_pings_can_be_switched_off() {
    let mesh = Mesh::up(&ONE_ARMED, &["b1", "b2"]);
    let answer = |ignore: &str| {
        let key = format!("net.ipv4.icmp_echo_ignore_all={ignore}");
        mesh.lab.succeed("b1", &["sysctl", "-qw", &key]);
    };
    answer("1");
    let daemon = Daemon::start(&mesh.lab, "n1");
    daemon.wait_for_liveness(&VTEPS[1..], "alive");
    // That it pings us is no answer.
    mesh.lab.succeed("b1", &["ping", "-c", "10", "-i", "0.2", "-W", "5", NODE.address]);
    let node = daemon.node(VTEPS[0]);
    assert_eq!((&node["liveness"], &node["state"]), (&"unknown".into(), &"active".into()));
    assert_eq!(load(&mesh.lab, NODE, 50).backends.len(), 2);

    answer("0");
    daemon.wait_for_liveness(&VTEPS, "alive");
    answer("1");
    daemon.wait_for_liveness(&VTEPS[..1], "silent");
    assert_eq!(daemon.node(VTEPS[0])["state"], "unreachable");
    let path = mesh.lab.file("n1.toml");
    let on = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{on}\n[liveness]\nenabled = false\n")).unwrap();
    wait_until("it has connections again", 5, || daemon.node(VTEPS[0])["state"] == "active");
    assert_eq!(daemon.node(VTEPS[0])["liveness"], serde_json::Value::Null);
    assert!(!daemon.log().contains("restart to change"), "{}", daemon.log());
    assert_eq!(load(&mesh.lab, NODE, 50).backends.len(), 2);
}

#[test]
fn a_daemon_that_stood_still_takes_nobody_for_silent() {
    let (mesh, daemon) = watched();
    for _ in 0..3 {
        daemon.freeze(Duration::from_secs(2));
        thread::sleep(Duration::from_millis(700));
    }
    daemon.wait_for_liveness(&VTEPS, "alive");
    assert!(!daemon.log().contains("silent"), "{}", daemon.log());
    assert_eq!(load(&mesh.lab, NODE, 50).errors, NO_ERRORS);
}

#[test]
fn a_link_of_our_own_that_is_down_is_told_as_that() {
    let (mesh, daemon) = watched();
    mesh.lab.succeed("n1", &["ip", "link", "set", "eth0", "down"]);
    wait_until("it is told", 3, || {
        let reasons = VTEPS.map(|vtep| daemon.node(vtep)["reason"].to_string());
        reasons.iter().all(|reason| reason.contains("eth0") || reason.contains("no route"))
    });
    thread::sleep(Duration::from_secs(2));
    assert!(!daemon.log().contains("silent"), "{}", daemon.log());
    mesh.lab.succeed("n1", &["ip", "link", "set", "eth0", "up"]);
    daemon.wait_for_liveness(&VTEPS, "alive");
}
