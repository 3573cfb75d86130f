//! What it must stand: ten thousand services with ten backends each. Takes half a minute and gigabytes, so
//! it runs only when asked for, and prints the figures:
//!
//! ```text
//! cargo test --release -p control --test e2e -- --ignored --nocapture ten_thousand
//! ```

use std::{
    fmt::Write as _,
    fs, thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    api::bare_lab,
    daemon::Daemon,
    lab::{Lab, bounded},
};

const SERVICES: u32 = 10_000;
const BACKENDS: u32 = 10;
/// Nodes that the backends are on, all behind one gateway.
const NODES: u32 = 1_000;
const CHANGES: usize = 40;

const LOAD_GOAL: Duration = Duration::from_secs(2);
const CHANGE_GOAL: Duration = Duration::from_millis(50);

fn service(number: u32, weight: u16) -> Value {
    let backend = |index: u32| {
        let node = (number * BACKENDS + index) % NODES;
        json!({
            "name": format!("s{number}-{index}"),
            "vtep": format!("10.99.{}.{}", node / 250, 1 + node % 250),
            "mac": format!("02:00:00:00:{:02x}:{:02x}", node / 256, node % 256),
            "weight": if index == 0 { weight } else { 1 },
        })
    };
    json!({
        "name": format!("s{number}"), "vni": 100, "ports": ["80/tcp"],
        "vip": format!("198.18.{}.{}", number / 250, 1 + number % 250),
        "backends": (0..BACKENDS).map(backend).collect::<Vec<_>>(),
    })
}

/// A lab whose API has been given them all before.
fn large_lab() -> Lab {
    let lab = bare_lab();
    let limits = "[limits]\nbackends = 131072\nvips = 16384\n\n[dataplane]";
    lab.write_config("n1", "n1.toml", "[dataplane]", limits);
    let folder = lab.file("n1.state/services");
    fs::create_dir_all(&folder).unwrap();
    for number in 0..SERVICES {
        fs::write(folder.join(format!("s{number}.json")), service(number, 1).to_string()).unwrap();
    }
    lab
}

/// Starts the daemon, and says how long it took until packets were steered.
fn timed_start(lab: &Lab) -> (Duration, Daemon) {
    let (start, log) = (Instant::now(), lab.file("n1.log"));
    thread::scope(|scope| {
        let ready = scope.spawn(move || {
            let said = || fs::read_to_string(&log).unwrap_or_default().contains(" ready ");
            while !said() && start.elapsed() < Duration::from_secs(30) {
                thread::sleep(Duration::from_millis(2));
            }
            start.elapsed()
        });
        let daemon = Daemon::start(lab, "n1");
        (ready.join().unwrap(), daemon)
    })
}

/// How long the daemon took to answer, as curl sees it.
fn timed_change(lab: &Lab, number: u32, weight: u16) -> Duration {
    let mut curl = bounded("curl");
    curl.args(["-sSf", "-o", "/dev/null", "-w", "%{time_total}", "-X", "PUT", "--unix-socket"])
        .arg(lab.file("n1.sock"))
        .args(["-H", "Content-Type: application/json", "-H", "If-Match: *"])
        .args(["-d", &service(number, weight).to_string()])
        .arg(format!("http://localhost/v1/services/s{number}"));
    let output = curl.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let seconds = String::from_utf8(output.stdout).unwrap().parse().unwrap();
    Duration::from_secs_f64(seconds)
}

/// Resident memory of a process, in megabytes: now, and at most so far.
fn memory_mb(pid: &str) -> [u64; 2] {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    ["VmRSS:", "VmHWM:"].map(|key| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1000
    })
}

/// Processor time of a process's main thread, which is control's.
fn control_time(pid: &str) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{pid}/schedstat")).unwrap();
    Duration::from_nanos(stat.split_whitespace().next().unwrap().parse().unwrap())
}

#[test]
#[ignore = "takes half a minute, and says something only on a release build"]
fn ten_thousand_services_are_loaded_in_two_seconds_and_changed_in_fifty_milliseconds() {
    let lab = large_lab();
    let (loaded, daemon) = timed_start(&lab);
    let idle = memory_mb(&daemon.pid());
    let before = control_time(&daemon.pid());
    let mut took: Vec<Duration> = (0..CHANGES)
        .map(|change| {
            // At another moment of an idle worker's sleep each time.
            thread::sleep(Duration::from_millis(150 + 13 * (change as u64 % 11)));
            timed_change(&lab, change as u32 * 97 % SERVICES, 2 + change as u16)
        })
        .collect();
    let spent = (control_time(&daemon.pid()) - before) / CHANGES as u32;
    took.sort_unstable();
    let after = memory_mb(&daemon.pid());
    let mut report = String::new();
    let [first, median, last] = [0, CHANGES / 2, CHANGES - 1].map(|at| took[at]);
    writeln!(report, "{SERVICES} services of {BACKENDS} backends on {NODES} nodes").unwrap();
    writeln!(report, "loaded in {loaded:?} (goal {LOAD_GOAL:?})").unwrap();
    writeln!(
        report,
        "a change from call to acknowledgement: {first:?} at best, median {median:?}, {last:?} at worst \
         of {CHANGES} (goal {CHANGE_GOAL:?})"
    )
    .unwrap();
    writeln!(
        report,
        "resident: {} MB loaded, {} MB changed, {} MB at most",
        idle[0], after[0], after[1]
    )
    .unwrap();
    writeln!(report, "control's processor time for each: {spent:?} on average").unwrap();
    println!("{report}");
    let changed = daemon.call("GET", "/v1/services/s97", &Value::Null, "").1;
    assert_eq!(changed["spec"]["backends"][0]["weight"], 3, "{changed}");
    // Without optimisation, or beside other builds, the figures mean nothing.
    if !cfg!(debug_assertions) {
        assert!(loaded <= LOAD_GOAL && median <= CHANGE_GOAL, "{report}");
    }
}
