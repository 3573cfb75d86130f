//! The world changes under way: configs, backends, neighbours. Clients should not notice.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::{
    client::{
        Held, Load, NO_ERRORS, VIP4, VIP6, assert_drains, get, load, parse, start_holding,
        start_load, start_slow_download,
    },
    daemon::{Daemon, WIREMESH},
    lab::{Lab, assert_same_content, wait_until},
};

/// Three times six connections: that a backend gets none of them happens once in a thousand runs.
const CONNECTIONS: u32 = 18;

#[test]
fn reloading_under_load_fails_no_request() {
    let lab = Lab::up(&["--nodes", "1"]);
    let daemon = Daemon::start(&lab, "n1");
    let generation = daemon.status()["generation"].as_u64().unwrap();
    let (holding, loading) = (start_holding(&lab, VIP4, CONNECTIONS, 6), start_load(&lab, VIP4, 6));
    for weight in [2, 3, 4, 1] {
        lab.weight("b1", weight);
        daemon.reload();
        daemon.wait_for_weight("b1", Some(weight));
    }
    let load: Load = parse(&loading.finish());
    assert!(load.errors.is_empty() && load.ok > 100, "{load:?}");
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
    assert!(daemon.status()["generation"].as_u64().unwrap() > generation);
}

#[test]
fn draining_under_load_fails_no_request_and_keeps_every_connection() {
    let lab = Lab::up(&["--nodes", "1"]);
    let daemon = Daemon::start(&lab, "n1");
    let download = start_slow_download(&lab, VIP4);
    let (holding, loading) = (start_holding(&lab, VIP4, CONNECTIONS, 6), start_load(&lab, VIP4, 6));
    // Without SIGHUP: the daemon watches the file.
    lab.weight("b2", 0);
    daemon.wait_for_weight("b2", Some(0));

    assert_drains(&lab, "b2", loading, holding);
    download.finish();
    assert_same_content(&lab.file("slow"), &lab.file("big"));
}

#[test]
fn a_removed_backends_connections_are_reselected_and_no_others() {
    let lab = Lab::up(&["--nodes", "1"]);
    let daemon = Daemon::start(&lab, "n1");
    let holding = start_holding(&lab, VIP4, CONNECTIONS, 6);
    lab.remove("b2");
    daemon.wait_for_weight("b2", None);

    let after = load(&lab, VIP4, 200);
    assert!(after.errors.is_empty() && !after.backends.contains_key("b2"), "{after:?}");
    let held: Vec<Held> = parse(&holding.finish());
    for connection in &held {
        // The new backend knows nothing of the connection and resets it: better than a hang.
        let removed = connection.backend.as_deref() == Some("b2");
        assert_eq!(connection.outcome, if removed { "reset" } else { "kept" }, "{held:?}");
    }
    assert!(daemon.counter("connection_reselects") > 0);
}

#[test]
fn a_bad_config_is_refused_with_its_line_and_the_running_state_stays() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let daemon = Daemon::start(&lab, "n1");
    let generation = daemon.status()["generation"].clone();
    let (config, logged) = (lab.file("n1.toml"), daemon.log().len());
    let good = fs::read_to_string(&config).unwrap();
    fs::write(&config, good.replace("vni = 100", "vni = 16777216")).unwrap();
    daemon.reload();

    wait_until("the refusal is logged", 10, || daemon.log()[logged..].contains("vni"));
    let log = &daemon.log()[logged..];
    let line = 1 + good.lines().position(|line| line == "vni = 100").unwrap();
    assert!(log.contains(&line.to_string()), "no line {line} in: {log}");
    assert_eq!(daemon.status()["generation"], generation);
    assert_eq!(get(&lab, VIP4).backend, "b1");
}

#[test]
fn a_backend_that_changes_its_mac_address_keeps_its_connections() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let _daemon = Daemon::start(&lab, "n1");
    let before = lab.mac("b1");
    let holding = start_holding(&lab, VIP4, 6, 6);
    // As a machine does that took over an address: it announces itself by gratuitous ARP.
    lab.succeed("b1", &["sysctl", "-qw", "net.ipv4.conf.eth0.arp_notify=1"]);
    lab.succeed("b1", &["ip", "link", "set", "eth0", "address", "02:00:00:00:99:01"]);
    assert_ne!(lab.mac("b1"), before);
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
    assert_eq!(load(&lab, VIP4, 50).errors, NO_ERRORS);
}

#[test]
fn a_config_beyond_the_running_limits_is_refused_whole() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    // As many as the lab has.
    let limit = |vips: u32| format!("[limits]\nvips = {vips}\n\n[node]");
    let config = lab.file("n1.toml");
    let good = fs::read_to_string(&config).unwrap();
    fs::write(&config, good.replace("[node]", &limit(6))).unwrap();
    let daemon = Daemon::start(&lab, "n1");
    let generation = daemon.status()["generation"].clone();

    let more = good.replace("\"80/tcp\", ", "\"80/tcp\", \"8000-8010/tcp\", ");
    fs::write(&config, more.replace("[node]", &limit(100))).unwrap();
    daemon.reload();
    wait_until("the refusal is told", 10, || {
        daemon.status()["refused"].as_str().is_some_and(|said| said.contains("limits.vips"))
    });
    assert!(daemon.log().contains("the running state stays"), "{}", daemon.log());
    assert_eq!(daemon.status()["generation"], generation);
    let before = daemon.counter("rx_packets");
    assert_eq!(load(&lab, VIP4, 50).errors, NO_ERRORS);
    assert!(daemon.counter("rx_packets") > before, "still steered");
}

#[test]
fn a_new_backend_whose_node_is_silent_delays_nothing() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let daemon = Daemon::start(&lab, "n1");
    let config = lab.file("n1.toml");
    let silent = "\n[[service.backend]]\nname = \"silent\"\nvtep = \"10.77.0.250\"\n\
                  mac = \"02:00:00:00:02:09\"\n";
    let good = fs::read_to_string(&config).unwrap();
    fs::write(&config, good + silent).unwrap();
    let begun = Instant::now();
    daemon.reload();
    wait_until("the new backend is known", 2, || {
        daemon.status()["services"][1]["backends"][1]["state"] == "unreachable"
    });
    assert!(begun.elapsed() < Duration::from_secs(2), "the kernel takes 3 s to give it up");
    assert_eq!(load(&lab, VIP6, 50).errors, NO_ERRORS);
    daemon.terminate();
}

#[test]
fn ports_services_and_backends_come_and_go_without_a_failed_request_on_another_service() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "2"]);
    let daemon = Daemon::start(&lab, "n1");
    let config = lab.file("n1.toml");
    let good = fs::read_to_string(&config).unwrap();
    // All changes are the second service's; the first is the one under load.
    let at = good.rfind("[[service]]").unwrap();
    let (first, second) = good.split_at(at);
    let port = second.replace("\"80/tcp\"", "\"80/tcp\", \"8080/tcp\"");
    let one_backend = &second[..second.rfind("[[service.backend]]").unwrap()];
    let third = second.replace("web6", "more").replace("2001:db8:113::10", "2001:db8:113::11");
    let both = format!("{second}\n{third}");

    let loading = start_load(&lab, VIP4, 8);
    let unchanged = (second, [2, 6, 4]);
    for (changed, counts) in [
        (&*port, [2, 7, 4]),
        unchanged,
        (&*both, [3, 9, 6]),
        unchanged,
        (one_backend, [2, 6, 3]),
        unchanged,
        ("", [1, 3, 2]),
        unchanged,
    ] {
        fs::write(&config, format!("{first}{changed}")).unwrap();
        daemon.reload();
        wait_until("the change is taken over", 5, || sizes(&daemon) == counts);
    }
    let load: Load = parse(&loading.finish());
    assert!(load.errors.is_empty() && load.ok > 100, "{load:?}");
    assert!(daemon.status()["refused"].is_null());
    assert_eq!(crate::client::load(&lab, VIP6, 50).errors, NO_ERRORS);
}

/// How many services the daemon works with, and ports and backends of all.
fn sizes(daemon: &Daemon) -> [usize; 3] {
    let status = daemon.status();
    let services = status["services"].as_array().unwrap();
    let sum = |what| services.iter().map(|service| service[what].as_array().unwrap().len()).sum();
    [services.len(), sum("ports"), sum("backends")]
}

#[test]
fn an_interface_that_is_made_anew_ends_the_daemon_with_a_sentence() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let config = lab.file("n1.toml");
    let socket = lab.file("n1.sock");
    let mut run = lab.command("n1", &[WIREMESH, "run", "-c", config.to_str().unwrap()]);
    let child = run.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the daemon listens", 10, || socket.exists());
    wait_until("it is steering", 10, || lab.has_xdp("n1"));
    lab.succeed("n1", &["ip", "link", "del", "eth0"]);
    let peer = ["type", "veth", "peer", "name", "other0"];
    lab.succeed("n1", &[&["ip", "link", "add", "eth0"], &peer[..]].concat());

    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: interface eth0 was deleted and made anew"), "{said}");
    assert!(!socket.exists(), "the control socket is removed");
}

#[test]
fn a_stopped_daemons_status_is_an_error_with_a_sentence() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let daemon = Daemon::start(&lab, "n1");
    let config = lab.file("n1.toml");
    let status = [WIREMESH, "status", "-c", config.to_str().unwrap()];
    assert!(lab.succeed("n1", &status).contains("ready"), "the socket is found by the config");
    lab.succeed("n1", &["kill", "-STOP", &daemon.pid()]);
    let output = lab.run("n1", &status);
    lab.succeed("n1", &["kill", "-CONT", &daemon.pid()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("does not answer"), "{said}");
}

#[test]
fn a_refused_plan_takes_no_backend_out_of_service() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let config = lab.file("n1.toml");
    let good = fs::read_to_string(&config).unwrap();
    let good = good.replace("[node]", "[limits]\nbackends = 2\n\n[node]");
    fs::write(&config, &good).unwrap();
    let daemon = Daemon::start(&lab, "n1");
    // Other backends on another node: no slot is free for them until the old ones' have rested.
    let other = good.replace("\"b1\"", "\"b9\"").replace("10.77.0.101", "10.77.0.102");
    fs::write(&config, other).unwrap();
    daemon.reload();
    wait_until("the refusal is told", 10, || {
        daemon.status()["refused"].as_str().is_some_and(|said| said.contains("restart"))
    });
    assert_eq!(load(&lab, VIP4, 100).errors, NO_ERRORS);
    assert!(!daemon.log().contains("unreachable"), "{}", daemon.log());
}
