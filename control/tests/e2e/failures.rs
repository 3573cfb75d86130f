//! The daemon dies, or may not start at all: what is left behind, and what it says.

use std::{fs, os::unix::fs::chown, process::Output};

use crate::{
    client::{VIP4, VIP6, get, start_slow_download},
    daemon::{Daemon, WIREMESH},
    lab::{Lab, PEER, assert_same_content, wait_until},
};

/// The user and group of nobody in particular.
const NOBODY: u32 = 65534;

/// Makes the kernel refuse them to what follows, whatever the machine has.
const WITHOUT_HUGE_PAGES: [&str; 4] = [PEER, "without", "--huge-pages", "--"];

#[test]
fn after_kill_9_the_kernel_has_the_traffic_and_a_restart_works() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    lab.fallback("n1", "b1");
    let daemon = Daemon::start(&lab, "n1");
    let download = start_slow_download(&lab, VIP4);
    assert!(lab.has_xdp("n1") && daemon.counter("rx_packets") > 0);

    daemon.kill_9();
    wait_until("no XDP program is attached", 2, || !lab.has_xdp("n1"));
    for vip in [VIP4, VIP6] {
        assert_eq!(get(&lab, vip).client, vip.client, "by the kernel's route");
    }

    let daemon = Daemon::start(&lab, "n1");
    assert!(lab.has_xdp("n1"));
    get(&lab, VIP4);
    assert!(daemon.counter("rx_packets") > 0, "the daemon has the traffic back");
    download.finish();
    assert_same_content(&lab.file("slow"), &lab.file("big"));
}

#[test]
fn sigterm_ends_the_daemon_and_leaves_nothing_attached() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let daemon = Daemon::start(&lab, "n1");
    assert!(lab.has_xdp("n1"));
    daemon.terminate();
    assert!(!lab.has_xdp("n1"));
    assert!(!lab.file("n1.sock").exists(), "the control socket is removed");
}

#[test]
fn an_unprivileged_user_is_told_which_privileges_are_missing() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    // Everything but the privileges is there: a binary to execute, a directory for the socket.
    let (home, binary) = (lab.file("nobody"), lab.file("nobody/wiremesh"));
    fs::create_dir(&home).unwrap();
    chown(&home, Some(NOBODY), Some(NOBODY)).unwrap();
    fs::copy(WIREMESH, &binary).unwrap();
    let config = lab.write_config("n1", "nobody/n1.toml", "/n1.sock", "/nobody/n1.sock");
    let nobody = NOBODY.to_string();
    let mut run = vec!["setpriv", "--reuid", &nobody, "--regid", &nobody, "--clear-groups"];
    run.extend([binary.to_str().unwrap(), "run", "-c", &config]);
    let said = refusal(&lab.run("n1", &run));
    assert!(said.contains("CAP_") || said.contains("root"), "{said}");
}

#[test]
fn a_missing_interface_is_named() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let config = lab.write_config("n1", "missing.toml", "eth0", "eth7");
    let said = refusal(&lab.run("n1", &[WIREMESH, "run", "-c", &config]));
    assert!(said.contains("eth7"), "{said}");
    assert!(!lab.has_xdp("n1"));
}

#[test]
fn a_hung_worker_leaves_its_packets_to_the_kernel_until_it_turns_again() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    lab.fallback("n1", "b1");
    lab.write_config("n1", "n1.toml", "hang_timeout_ms = 10000", "hang_timeout_ms = 1000");
    let daemon = Daemon::start(&lab, "n1");
    get(&lab, VIP4);
    let before = daemon.counter("rx_packets");
    let hung = || daemon.status()["workers"][0]["hung"] == true;

    let hang = ["hang", "--thread", "worker-0", "--seconds", "8", "--pid", &daemon.pid()];
    let hang = lab.start("n1", &[&[PEER], &hang[..]].concat());
    wait_until("the worker is known to hang", 6, hung);
    assert_eq!(get(&lab, VIP4).client, VIP4.client, "by the kernel's route");
    assert_eq!(daemon.counter("rx_packets"), before);

    hang.finish();
    wait_until("the worker turns again", 6, || !hung());
    get(&lab, VIP4);
    assert!(daemon.counter("rx_packets") > before, "the worker has its packets back");
}

#[test]
fn a_kernel_without_af_xdp_is_told_from_a_missing_privilege() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let config = lab.file("n1.toml");
    let run = [WIREMESH, "run", "-c", config.to_str().unwrap()];
    let without = [PEER, "without", "--family", "44", "--"];
    let said = refusal(&lab.run("n1", &[&without[..], &run].concat()));
    assert!(said.contains("CONFIG_XDP_SOCKETS"), "{said}");
    assert!(!lab.has_xdp("n1"));
}

#[test]
fn a_busy_interface_is_named_and_its_owner_goes_on() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let owner = Daemon::start(&lab, "n1");
    let config = lab.write_config("n1", "second.toml", "/n1.sock", "/second.sock");
    let said = refusal(&lab.run("n1", &[WIREMESH, "run", "-c", &config]));
    assert!(said.contains("eth0"), "{said}");
    assert!(said.contains("another XDP program"), "{said}");
    get(&lab, VIP4);
    assert!(owner.counter("tx_packets") > 0);
}

#[test]
fn a_queue_that_another_socket_owns_is_named() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let (config, ready) = (lab.file("n1.toml"), lab.file("occupied"));
    let occupy = ["occupy", "--interface", "eth0", "--queue", "0", "--ready"];
    let occupy = [&[PEER], &occupy[..], &[ready.to_str().unwrap()]].concat();
    let _owner = lab.start("n1", &occupy);
    wait_until("the queue is occupied", 10, || ready.exists());
    let said = refusal(&lab.run("n1", &[WIREMESH, "run", "-c", config.to_str().unwrap()]));
    assert!(said.contains("queue 0 of eth0 is in use by another AF_XDP socket"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(!lab.has_xdp("n1"));
}

#[test]
fn without_huge_pages_it_works_and_the_log_says_how_to_get_some() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let daemon = Daemon::start_by(&lab, "n1", &WITHOUT_HUGE_PAGES);
    let log = daemon.log();
    assert!(log.contains("not on huge pages: no 8388608 bytes of huge pages"), "{log}");
    assert!(log.contains("vm.nr_hugepages"), "{log}");
    assert_eq!(daemon.status()["workers"][0]["ports"][0]["huge_pages"], false);
    get(&lab, VIP4);
}

#[test]
fn required_huge_pages_that_are_not_there_are_refused_with_the_remedy() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let require = "[dataplane]\nhuge_pages = \"require\"";
    let config = lab.write_config("n1", "require.toml", "[dataplane]", require);
    let run = [WIREMESH, "run", "-c", &config];
    let said = refusal(&lab.run("n1", &[&WITHOUT_HUGE_PAGES[..], &run].concat()));
    assert!(said.contains("bytes of huge pages") && said.contains("vm.nr_hugepages"), "{said}");
    assert!(!lab.has_xdp("n1"));
}

/// What the daemon said when it refused to start: one clear message, and nothing like a backtrace.
fn refusal(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code();
    assert!(code.is_some_and(|code| (1..100).contains(&code)), "exit status {code:?}: {said}");
    assert!(!said.contains("panicked") && said.lines().count() <= 8, "{said}");
    said
}
