//! Services from the API, on the real daemon with real traffic.

use std::{fs, io::Write, process::Stdio, thread, time::Duration};

use serde_json::{Value, json};

use crate::{
    client::{
        Held, Load, NO_ERRORS, VIP4, assert_drains, get, load, parse, start_holding, start_load,
    },
    daemon::Daemon,
    lab::{Lab, bounded, wait_until},
};

/// A lab whose file has no services.
pub fn bare_lab() -> Lab {
    bare_lab_of(&["--nodes", "1", "--backends", "2"])
}

/// The same, laid out by these options.
pub fn bare_lab_of(options: &[&str]) -> Lab {
    let lab = Lab::up(options);
    let config = lab.file("n1.toml");
    let text = fs::read_to_string(&config).unwrap();
    let (settings, _) = text.split_once("[[service]]").unwrap();
    fs::write(&config, settings).unwrap();
    lab
}

/// What the lab's file calls `web`.
fn web(weights: [u16; 2]) -> Value {
    let backend = |(index, weight): (usize, &u16)| {
        let number = index + 1;
        json!({
            "name": format!("b{number}"),
            "vtep": format!("10.77.0.10{number}"),
            "mac": format!("02:00:00:00:02:0{number}"),
            "weight": weight,
        })
    };
    json!({
        "name": "web", "vip": VIP4.address, "ports": ["80/tcp"], "vni": 100,
        "backends": weights.iter().enumerate().map(backend).collect::<Vec<_>>(),
    })
}

/// One of many that nobody talks to.
fn other(number: u32) -> Value {
    json!({
        "name": format!("other-{number}"), "vip": "192.0.2.1", "vni": 100,
        "ports": [format!("{}/tcp", 1000 + number)],
        "backends": [{ "name": "b1", "vtep": "10.77.0.101", "mac": "02:00:00:00:02:01" }],
    })
}

#[test]
fn a_service_lives_from_create_to_drain_to_rm() {
    let lab = bare_lab();
    let daemon = Daemon::start(&lab, "n1");
    let (status, created) = daemon.call("POST", "/v1/services", &web([1, 1]), "");
    assert_eq!(status, 201, "{created}");
    // Acknowledged: the next packet finds it.
    assert_eq!(load(&lab, VIP4, 50).errors, NO_ERRORS);

    let (holding, loading) = (start_holding(&lab, VIP4, 18, 6), start_load(&lab, VIP4, 6));
    let version = created["version"].as_str().unwrap();
    let (status, drained) = daemon.call("PUT", "/v1/services/web", &web([1, 0]), version);
    assert_eq!((status, &drained["backends"]["draining"]), (200, &json!(1)), "{drained}");
    assert_drains(&lab, "b2", loading, holding);

    let version = drained["version"].as_str().unwrap();
    assert_eq!(daemon.call("DELETE", "/v1/services/web", &Value::Null, version).0, 204);
    assert_eq!(daemon.status()["services"], json!([]));
    let before = daemon.counter("rx_packets");
    let url = format!("{}/", VIP4.url);
    let asked = lab.run("client", &["curl", "-sS", "--max-time", "1", &url]);
    assert!(!asked.status.success() && daemon.counter("rx_packets") == before, "no longer steered");
}

#[test]
fn kill_9_loses_nothing_that_was_acknowledged() {
    let lab = bare_lab();
    let mut acknowledged: Vec<u32> = Vec::new();
    let mut next = 0;
    for round in 0..3 {
        let daemon = Daemon::start(&lab, "n1");
        let names = names(&daemon);
        let kept = acknowledged.iter().filter(|number| names.contains(&format!("other-{number}")));
        assert_eq!(kept.count(), acknowledged.len(), "round {round}: {names:?}");
        // At most the one that was under way when it was killed.
        assert!(names.len() <= acknowledged.len() + 1, "{names:?}");
        if round == 0 {
            assert_eq!(daemon.call("POST", "/v1/services", &web([1, 1]), "").0, 201);
            assert_eq!(daemon.call("DELETE", "/v1/services/web", &Value::Null, "*").0, 204);
        }
        // What the last round left unacknowledged may be there.
        acknowledged = names.iter().map(|name| name["other-".len()..].parse().unwrap()).collect();
        let pid = daemon.pid();
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(400 + 130 * round));
            std::process::Command::new("kill").args(["-9", &pid]).status().unwrap();
        });
        loop {
            let (status, answer) = daemon.call("POST", "/v1/services", &other(next), "");
            match status {
                201 => acknowledged.push(next),
                0 => break,
                _ => panic!("{status}: {answer}"),
            }
            next += 1;
        }
        next += 1;
        killer.join().unwrap();
        daemon.kill_9();
    }
    assert!(acknowledged.len() > 5, "{acknowledged:?}");
    let daemon = Daemon::start(&lab, "n1");
    assert!(names(&daemon).len() >= acknowledged.len());
    assert_eq!(daemon.call("POST", "/v1/services", &web([1, 1]), "").0, 201);
    get(&lab, VIP4);
}

/// What `service ps` is told of a backend.
fn backend(daemon: &Daemon, name: &str) -> Value {
    let (_, backends) = daemon.call("GET", "/v1/services/web/backends", &Value::Null, "");
    backends.as_array().unwrap().iter().find(|backend| backend["name"] == name).unwrap().clone()
}

#[test]
fn a_drain_keeps_connections_until_its_deadline_and_then_moves_what_is_left() {
    let lab = bare_lab();
    let daemon = Daemon::start(&lab, "n1");
    assert_eq!(daemon.call("POST", "/v1/services", &web([1, 1]), "").0, 201);
    let holding = start_holding(&lab, VIP4, 18, 14);
    let before = backend(&daemon, "b2");
    let said = daemon.wiremesh("service update web --backend-drain b2 --deadline 6s");
    assert!(said.starts_with("web updated"), "{said}");
    let draining = backend(&daemon, "b2");
    assert_eq!(draining["state"], "draining", "{draining}");
    assert!(draining["drain_left_s"].as_u64().is_some_and(|left| left <= 6), "{draining}");
    assert!(daemon.wiremesh("service ps web").contains("b2 keeps its connections for "));
    // New connections go elsewhere, those it has go on.
    let new = load(&lab, VIP4, 100);
    assert!(new.errors.is_empty() && !new.backends.contains_key("b2"), "{new:?}");
    wait_until("the connections left are counted", 4, || {
        backend(&daemon, "b2")["connections"].as_u64().is_some_and(|left| left > 0)
    });
    let packets = |backend: &Value| backend["packets"].as_u64().unwrap();
    let kept = backend(&daemon, "b2");
    assert_eq!(kept["state"], "draining", "the deadline has not come: {kept}");
    assert!(packets(&kept) > packets(&before), "{kept}");

    wait_until("the drain has ended", 10, || backend(&daemon, "b2")["state"] == "drained");
    let ended = packets(&backend(&daemon, "b2"));
    let held: Vec<Held> = parse(&holding.finish());
    let of = |name| move |held: &&Held| held.backend.as_deref() == Some(name);
    assert!(held.iter().any(|held| of("b2")(&held)), "{held:?}");
    assert!(held.iter().filter(of("b2")).all(|held| held.outcome != "kept"), "{held:?}");
    assert!(held.iter().filter(of("b1")).all(|held| held.outcome == "kept"), "{held:?}");
    assert_eq!(packets(&backend(&daemon, "b2")), ended, "nothing goes there any more");

    daemon.wiremesh("service update web --backend-undrain b2");
    let again = load(&lab, VIP4, 100);
    assert!(again.errors.is_empty() && again.backends.contains_key("b2"), "{again:?}");
}

#[test]
fn a_drain_and_its_deadline_outlive_the_daemon() {
    let lab = bare_lab();
    let daemon = Daemon::start(&lab, "n1");
    assert_eq!(daemon.call("POST", "/v1/services", &web([1, 1]), "").0, 201);
    daemon.wiremesh("service update web --backend-drain b2 --deadline 1h");
    let until = backend(&daemon, "b2")["drain_until"].clone();
    assert!(until.is_string());
    daemon.kill_9();
    let daemon = Daemon::start(&lab, "n1");
    let draining = backend(&daemon, "b2");
    assert_eq!((&draining["state"], &draining["drain_until"]), (&json!("draining"), &until));
    let new = load(&lab, VIP4, 50);
    assert!(new.errors.is_empty() && !new.backends.contains_key("b2"), "{new:?}");
}

fn names(daemon: &Daemon) -> Vec<String> {
    let (_, services) = daemon.call("GET", "/v1/services", &Value::Null, "");
    let services = services.as_array().unwrap();
    services.iter().map(|service| service["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_file_that_claims_what_the_api_has_is_refused_and_both_go_on() {
    let lab = bare_lab();
    let daemon = Daemon::start(&lab, "n1");
    assert_eq!(daemon.call("POST", "/v1/services", &web([1, 0]), "").0, 201);
    let config = lab.file("n1.toml");
    let good = fs::read_to_string(&config).unwrap();
    let clash = format!(
        "{good}\n[[service]]\nname = \"mine\"\nvip = \"{}\"\nports = [\"80/tcp\"]\n",
        VIP4.address
    );
    fs::write(&config, &clash).unwrap();
    daemon.reload();
    wait_until("the refusal is told", 10, || {
        daemon.status()["refused"].as_str().is_some_and(|said| {
            said == "the file's `mine` and the api's `web` both publish 80/tcp of 203.0.113.10"
        })
    });
    assert_eq!(get(&lab, VIP4).backend, "b1");
    daemon.terminate();
    // At the start there is no running state to keep.
    let config = config.to_str().unwrap();
    let refused = lab.run("n1", &[crate::daemon::WIREMESH, "run", "-c", config]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("both publish 80/tcp"), "{said}");
    assert!(said.contains("help: change the configuration file"), "{said}");
}

#[test]
fn a_flood_of_calls_drops_no_packet() {
    let lab = bare_lab();
    let daemon = Daemon::start(&lab, "n1");
    assert_eq!(daemon.call("POST", "/v1/services", &web([1, 1]), "").0, 201);
    let loading = start_load(&lab, VIP4, 6);
    let asked = thread::scope(|scope| {
        let asking: Vec<_> = (0..3)
            .map(|asker| {
                let daemon = &daemon;
                scope.spawn(move || {
                    let mut asked = 0;
                    for round in 0..20 {
                        for path in ["/v1/status", "/v1/services", "/v1/services/web/backends"] {
                            assert_eq!(daemon.call("GET", path, &Value::Null, "").0, 200);
                            asked += 1;
                        }
                        let number = asker * 100 + round;
                        assert_eq!(daemon.call("POST", "/v1/services", &other(number), "").0, 201);
                    }
                    asked
                })
            })
            .collect();
        asking.into_iter().map(|asking| asking.join().unwrap()).sum::<u32>()
    });
    assert_eq!(asked, 180);
    let load: Load = parse(&loading.finish());
    assert!(load.errors.is_empty() && load.ok > 100, "{load:?}");
    let status = daemon.status();
    for reason in ["no_service", "no_backend", "next_hop_unresolved", "no_frame", "tx_ring_full"] {
        assert_eq!(status["drops"][reason]["count"], 0, "{reason}");
    }
    assert_eq!(status["services"].as_array().unwrap().len(), 61);
}

#[test]
fn prometheus_finds_nothing_wrong_with_the_metrics() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let daemon = Daemon::start(&lab, "n1");
    assert_eq!(load(&lab, VIP4, 20).errors, NO_ERRORS);
    let text = daemon.get("/metrics");
    let mut promtool = bounded("promtool");
    let mut checked = promtool
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    checked.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = checked.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));

    // And they agree with what everybody else is told.
    let value = |series: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(&format!("{series} ")));
        line.unwrap_or_else(|| panic!("no {series} in {text}"))
            .rsplit_once(' ')
            .unwrap()
            .1
            .parse()
            .unwrap()
    };
    let backend = &daemon.status()["services"][0]["backends"][0];
    let packets = value("wiremesh_backend_packets_total{service=\"web\",backend=\"b1\"}");
    assert!(packets <= backend["packets"].as_u64().unwrap(), "told later");
    assert!(packets >= 20 && value("wiremesh_rx_packets_total{worker=\"0\"}") >= packets);
    let bursts = value("wiremesh_worker_burst_seconds_count{worker=\"0\"}");
    assert!((1..=value("wiremesh_rx_packets_total{worker=\"0\"}")).contains(&bursts));
    assert_eq!(value("wiremesh_worker_burst_seconds_bucket{worker=\"0\",le=\"+Inf\"}"), bursts);
    let place = "interface=\"eth0\",queue=\"0\",worker=\"0\"";
    assert_eq!(
        value(&format!("wiremesh_queue_lost_packets_total{{{place},reason=\"rx_ring_full\"}}")),
        0
    );
    assert!(text.contains("wiremesh_connection_table_entries{worker=\"0\"}"));
}
