//! What operators type, as a user of the binary sees it: exit code, stdout and stderr.

use std::{
    fs,
    process::{Command, Output},
};

use crate::{
    api::bare_lab,
    client::{Held, NO_ERRORS, VIP4, get, load, parse, start_holding},
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
    printed(run.arg(command).arg("-c").arg(&file).args(arguments).output().unwrap())
}

/// Exit code, stdout and stderr.
fn printed(Output { status, stdout, stderr }: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// Asks the lab's daemon.
fn asked(lab: &Lab, words: &str) -> (Option<i32>, String, String) {
    let mut run = Command::new(WIREMESH);
    run.args(words.split(' ')).arg("--socket").arg(lab.file("n1.sock"));
    printed(run.output().unwrap())
}

/// Asks the lab's daemon for what it does without a complaint. What it says.
fn done(lab: &Lab, words: &str) -> String {
    let (code, said, complaint) = asked(lab, words);
    assert_eq!((code, &*complaint), (Some(0), ""), "{words}");
    said
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
fn a_reader_that_has_gone_changes_no_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("wiremesh.toml");
    let gone = || std::io::pipe().unwrap().1;
    for (config, code) in [(CONFIG, 0), ("nonsense", 1)] {
        fs::write(&file, config).unwrap();
        let mut run = Command::new(WIREMESH);
        let run = run.arg("check").arg("-c").arg(&file).stdout(gone()).stderr(gone());
        assert_eq!(run.status().unwrap().code(), Some(code));
    }
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

#[test]
fn a_service_lives_on_the_command_line() {
    let lab = bare_lab();
    let _daemon = Daemon::start(&lab, "n1");
    let asked = |words: &str| asked(&lab, words);
    let done = |words: &str| done(&lab, words);
    let said = done(
        "service create --name web --vip 203.0.113.10 --publish published=80,target=80 --vni 100 \
         --backend vtep=10.77.0.101,mac=02:00:00:00:02:01 --backend vtep=10.77.0.102,mac=02:00:00:00:02:02",
    );
    assert!(said.starts_with("web created, version "), "{said}");
    let list = done("service ls");
    let line = list.lines().nth(1).unwrap();
    assert_eq!(
        line.split_whitespace().collect::<Vec<_>>(),
        ["web", "api", "203.0.113.10", "80/tcp", "maglev", "2/2", "active"]
    );
    assert!(done("service inspect web").contains("name = \"web-2\""));
    let nodes = done("node ls");
    assert!(nodes.contains("n1") && nodes.contains("10.77.0.102  active"), "{nodes}");

    // One flow whose port is known: the table has it, and its backend is what the server said.
    let curl = ["curl", "-sSf", "--max-time", "10", "--local-port", "45000", VIP4.url];
    let answer = lab.succeed("client", &curl);
    let backend = if answer.contains("backend=b1") { "web-1" } else { "web-2" };
    let tuple = "explain tcp 198.51.100.7:45000 203.0.113.10:80";
    let said = done(tuple);
    assert!(said.contains(&format!("backend  {backend}, weight 1 of 2")), "{said}");
    assert!(said.contains(&format!("remembers {backend}, which is active")), "{said}");
    let unknown = done("explain tcp 198.51.100.7:45001 203.0.113.10:80");
    assert!(unknown.contains("no worker remembers it"), "{unknown}");

    // Drained: what is remembered stays, what is new goes to the other.
    let said = done(&format!("service update web --weight {backend}=0"));
    assert!(said.starts_with("web updated, version "), "{said}");
    let said = done(tuple);
    let other = if backend == "web-1" { "web-2" } else { "web-1" };
    assert!(said.contains(&format!("backend  {other}, weight 1 of 1")), "{said}");
    assert!(said.contains(&format!("remembers {backend}, which is draining")), "{said}");
    let after = load(&lab, VIP4, 50);
    assert_eq!((after.errors, after.backends.len()), (NO_ERRORS, 1));
    assert!(done("service ps web").contains("draining"));
    let flows = done("flows --service web --top 1 --interval 0.2 --json");
    let flows: serde_json::Value = serde_json::from_str(&flows).unwrap();
    assert_eq!((flows.as_array().unwrap().len(), &flows[0]["service"]), (1, &"web".into()));
    let drops = done("drops --interval 0.1");
    assert_eq!(drops.lines().count(), 1 + dataplane::counters::DropReason::ALL.len(), "{drops}");

    for (words, code, complaint) in [
        ("service inspect nosuch", 3, "error: there is no service `nosuch`\n"),
        (
            "service update web --weight web-1=5 --if-version 00",
            4,
            "error: `web` has changed meanwhile: read it again\n",
        ),
        (
            "service update web --weight web-1=1001",
            1,
            "error: `weight` is 1001, out of its range\nhelp: /backends/0/weight: 0 to 1000\n",
        ),
        (
            "service create --name more --vip 203.0.113.10 --publish 80",
            4,
            "error: the api's `more` and the api's `web` both publish 80/tcp of 203.0.113.10\n\
             help: /ports: another port or VIP\n",
        ),
        (
            "service update web --backend-rm web-9",
            1,
            "error: web has no backend `web-9`\nhelp: it has web-1, web-2\n",
        ),
        ("explain tcp 198.51.100.7:45000 203.0.113.10:81", 1, ""),
    ] {
        let (was, _, said) = asked(words);
        assert_eq!((was, &*said), (Some(code), complaint), "{words}");
    }
    let other =
        asked("service create --name x --vip 203.0.113.9 --publish published=80,target=8080");
    assert_eq!(other.0, Some(1));
    assert!(other.2.contains("the mode is `dsr`") && other.2.contains("/ports/0"), "{}", other.2);
    let (code, said, complaint) = asked("service rm nobody web noone");
    assert_eq!((code, &*said), (Some(3), "web removed\n"));
    assert!(complaint.contains("`nobody`") && complaint.contains("`noone`"), "{complaint}");
    assert_eq!(done("service ls").lines().count(), 1);
}

#[test]
fn another_scheduler_places_the_next_connections_and_moves_no_open_one() {
    let lab = bare_lab();
    let _daemon = Daemon::start(&lab, "n1");
    let asked = |words: &str| asked(&lab, words);
    let done = |words: &str| done(&lab, words);
    done(
        "service create --name web --vip 203.0.113.10 --publish 80 --vni 100 --scheduler wrr \
         --backend name=b1,weight=3,vtep=10.77.0.101,mac=02:00:00:00:02:01 \
         --backend name=b2,vtep=10.77.0.102,mac=02:00:00:00:02:02",
    );
    assert!(done("service ls").contains("round-robin"));
    // One worker, and nothing is lost: each turn is taken once.
    let turns = load(&lab, VIP4, 80);
    assert_eq!(turns.errors, NO_ERRORS);
    assert_eq!((turns.backends["b1"], turns.backends["b2"]), (60, 20));
    let tuple = "explain tcp 198.51.100.7:45001 203.0.113.10:80";
    let said = done(tuple);
    assert!(said.contains("backend  any of 2; b") && said.contains("in turn"), "{said}");

    let holding = start_holding(&lab, VIP4, 12, 6);
    done("service update web --scheduler lc --weight b1=1");
    let spread = load(&lab, VIP4, 60);
    // Of the twelve b1 has nine, b2 three; and what ends counts no more.
    assert_eq!((spread.errors, spread.backends), (NO_ERRORS, [("b2".to_owned(), 60)].into()));
    done("service update web --scheduler source --affinity-timeout 60");
    let bound = load(&lab, VIP4, 30);
    assert_eq!((bound.errors, bound.backends.len()), (NO_ERRORS, 1), "one client, one backend");
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
    let of = |name| held.iter().filter(|held| held.backend.as_deref() == Some(name)).count();
    assert_eq!((of("b1"), of("b2")), (9, 3));

    let [backend] = bound.backends.keys().collect::<Vec<_>>()[..] else { panic!("there is one") };
    let said = done(tuple);
    assert!(said.contains(&format!("backend  {backend}")), "{said}");
    assert!(said.contains("as worker 0 remembers, no longer ago than 60 s"), "{said}");
    let inspected = done("service inspect web");
    assert!(inspected.contains("scheduler = \"source\"\n"), "{inspected}");
    assert!(inspected.contains("affinity_timeout_s = 60\n"), "{inspected}");

    done("service update web --scheduler maglev");
    assert!(!done("service inspect web").contains("affinity_timeout_s"));
    let (code, _, complaint) = asked("service update web --affinity-timeout 60");
    assert_eq!(code, Some(1));
    assert!(
        complaint.contains("`affinity_timeout_s` is set, but the scheduler is `maglev`")
            && complaint.contains("/affinity_timeout_s: leave it out"),
        "{complaint}"
    );
}

#[test]
fn without_a_daemon_the_socket_is_named() {
    let mut run = Command::new(WIREMESH);
    let run = run.args(["service", "ls", "--socket", "/nowhere/api.sock"]).output().unwrap();
    let (code, said, complaint) = printed(run);
    assert_eq!((code, &*said), (Some(5), ""));
    assert!(
        complaint.starts_with("error: no daemon answers on /nowhere/api.sock: "),
        "{complaint}"
    );
    assert!(complaint.contains("help: is it running"), "{complaint}");
}
