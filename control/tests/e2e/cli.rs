//! What operators type, as a user of the binary sees it: exit code, stdout and stderr.

use std::{
    fs,
    process::{Command, Output},
};

use crate::{
    client::{VIP4, get},
    daemon::{Daemon, WIREMESH},
    lab::Lab,
};

const CONFIG: &str = r#"[node]
interfaces = ["absent0"]
vtep = "10.0.0.1"

[[service]]
name = "four"
vip = "203.0.113.10"
ports = ["80/tcp"]
vni = 100
backend = [{ name = "four-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02" }]

[[service]]
name = "six"
vip = "2001:db8::10"
ports = ["80/tcp"]
vni = 100
backend = [{ name = "six-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02" }]
"#;

/// Runs a command on a config. Returns its exit code, stdout and stderr.
fn wiremesh(command: &str, config: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("wiremesh.toml");
    fs::write(&file, config).unwrap();
    let mut run = Command::new(WIREMESH);
    let Output { status, stdout, stderr } =
        run.arg(command).arg("-c").arg(&file).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn check_of_a_good_file_succeeds() {
    let (code, said, complaint) = wiremesh("check", CONFIG, &[]);
    assert_eq!((code, complaint.as_str()), (Some(0), ""));
    assert!(said.contains("is valid: 2 services, 2 backends"), "{said}");
}

#[test]
fn check_of_a_bad_file_points_at_line_and_column_and_says_why() {
    let bad = CONFIG.replacen("vni = 100", "vni = 16777216", 1);
    let (code, said, complaint) = wiremesh("check", &bad, &[]);
    assert_eq!((code, said.as_str()), (Some(1), ""), "{complaint}");
    // The ninth line, at the value.
    assert!(complaint.contains("wiremesh.toml:9:7"), "{complaint}");
    assert!(complaint.contains("does not fit in 24 bits"), "{complaint}");
}

#[test]
fn explain_names_the_backend_of_either_family() {
    for (client, vip, backend) in [
        ("198.51.100.7:40000", "203.0.113.10:80", "four-1"),
        ("[2001:db8:7::7]:40000", "[2001:db8::10]:80", "six-1"),
    ] {
        let (code, said, complaint) = wiremesh("explain", CONFIG, &["tcp", client, vip]);
        assert_eq!(code, Some(0), "{complaint}");
        assert!(said.contains(&format!("backend  {backend}")), "{said}");
        assert!(said.contains("because  it is the only backend"), "{said}");
    }
}

#[test]
fn explain_of_an_unknown_port_fails_and_says_which_ports_there_are() {
    let tuple = ["tcp", "198.51.100.7:40000", "203.0.113.10:81"];
    let (code, said, complaint) = wiremesh("explain", CONFIG, &tuple);
    assert_eq!(code, Some(1), "{complaint}");
    assert!(said.contains("dropped  no_service"), "{said}");
    assert!(said.contains("serves four on 80/tcp, not 81/tcp"), "{said}");
}

#[test]
fn status_shows_workers_services_and_drops_to_people() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let _daemon = Daemon::start(&lab, "n1");
    get(&lab, VIP4);
    let socket = lab.file("n1.sock");
    let said = lab.succeed("n1", &[WIREMESH, "status", "--socket", socket.to_str().unwrap()]);
    for part in ["n1: wiremesh", ", ready,", "worker 0 on core", "eth0 queue 0:", "drops"] {
        assert!(said.contains(part), "no {part:?} in:\n{said}");
    }
    let line = |start: &str| said.lines().find(|line| line.trim_start().starts_with(start));
    assert!(line("service web on").is_some_and(|line| line.contains("80/tcp")), "{said}");
    let backend = line("b1").expect("a line for the backend");
    assert!(backend.contains("10.77.0.101") && backend.contains("active"), "{said}");
}
