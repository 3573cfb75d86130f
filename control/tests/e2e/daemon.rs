//! The daemon under test, on one of the lab's nodes.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::lab::{Lab, bounded, signal, wait_until};

/// The binary that cargo built for this test run.
pub const WIREMESH: &str = env!("CARGO_BIN_EXE_wiremesh");

/// A running daemon; ended when dropped.
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts it with the lab's config for this node, and waits until it is ready.
    pub fn start(lab: &Lab, node: &str) -> Self {
        Self::start_by(lab, node, &[])
    }

    /// The same by a command that becomes the daemon it is given.
    pub fn start_by(lab: &Lab, node: &str, by: &[&str]) -> Self {
        let (config, log) = (lab.file(&format!("{node}.toml")), lab.file(&format!("{node}.log")));
        let child = Command::new("ip")
            .args(["netns", "exec", &lab.namespace(node)])
            .args(by)
            .args([WIREMESH, "run", "-c"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::options().create(true).append(true).open(&log).unwrap())
            .spawn()
            .unwrap();
        let mut daemon = Self { child, socket: lab.file(&format!("{node}.sock")), log };
        wait_until("the daemon is ready", 30, || {
            let ended = daemon.child.try_wait().unwrap();
            assert!(ended.is_none(), "the daemon ended with {ended:?}");
            daemon.try_status().is_some_and(|status| status["ready"] == true)
        });
        daemon
    }

    /// One on each of these nodes.
    pub fn start_all<const N: usize>(lab: &Lab, nodes: [&str; N]) -> [Self; N] {
        nodes.map(|node| Self::start(lab, node))
    }

    /// Its process.
    pub fn pid(&self) -> String {
        self.child.id().to_string()
    }

    /// What `wiremesh status --json` says.
    pub fn status(&self) -> Value {
        self.try_status().expect("a ready daemon answers")
    }

    fn try_status(&self) -> Option<Value> {
        let socket = self.socket.to_str()?;
        let output =
            bounded(WIREMESH).args(["status", "--socket", socket, "--json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).ok()
    }

    /// What its API has at a path, as text.
    pub fn get(&self, path: &str) -> String {
        let mut curl = bounded("curl");
        let curl = curl.args(["-sSf", "--unix-socket"]).arg(&self.socket);
        let output = curl.arg(format!("http://localhost{path}")).output().unwrap();
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Asks its API by curl: the HTTP status, 0 if there was no answer, and the body. A `version` becomes
    /// `If-Match`.
    pub fn call(&self, method: &str, path: &str, body: &Value, version: &str) -> (u16, Value) {
        let mut curl = bounded("curl");
        curl.args(["-s", "-w", "\n%{http_code}", "-X", method, "--unix-socket"]).arg(&self.socket);
        if !body.is_null() {
            curl.args(["-H", "Content-Type: application/json", "-d", &body.to_string()]);
        }
        if !version.is_empty() {
            let version = if version == "*" { "*".to_owned() } else { format!("\"{version}\"") };
            curl.args(["-H", &format!("If-Match: {version}")]);
        }
        let output = curl.arg(format!("http://localhost{path}")).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, status) = text.rsplit_once('\n').unwrap();
        (status.parse().unwrap(), serde_json::from_str(body).unwrap_or_default())
    }

    /// Says something to it on the command line, which must succeed. Returns what was printed.
    pub fn wiremesh(&self, words: &str) -> String {
        let mut run = bounded(WIREMESH);
        let run = run.args(words.split(' ')).arg("--socket").arg(&self.socket);
        let output = run.output().unwrap();
        assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// One of the workers' counters, summed.
    pub fn counter(&self, name: &str) -> u64 {
        let status = self.status();
        let workers = status["workers"].as_array().unwrap();
        workers.iter().map(|worker| worker["counters"][name].as_u64().unwrap_or(0)).sum()
    }

    /// How many packets were dropped for a reason.
    pub fn drops(&self, reason: &str) -> u64 {
        self.status()["drops"][reason]["count"].as_u64().unwrap()
    }

    /// Waits until the daemon works with this weight for this backend; `None`: without it.
    pub fn wait_for_weight(&self, backend: &str, weight: Option<u16>) {
        wait_until(&format!("the weight of {backend} is {weight:?}"), 10, || {
            let status = self.status();
            let services = status["services"].as_array().unwrap();
            services.iter().all(|service| {
                let backends = service["backends"].as_array().unwrap();
                let found = backends.iter().find(|found| found["name"] == backend);
                found.map(|found| found["weight"].clone()) == weight.map(Value::from)
            })
        });
    }

    /// What it says of the node whose tunnels end there: its state, and what pings say of it.
    pub fn node(&self, vtep: &str) -> Value {
        let nodes: Value = serde_json::from_str(&self.get("/v1/nodes")).unwrap();
        let found = nodes.as_array().unwrap().iter().find(|node| node["vtep"] == vtep);
        found.cloned().unwrap_or_default()
    }

    /// Waits until pings say this of all these.
    pub fn wait_for_liveness(&self, vteps: &[&str], liveness: &str) {
        wait_until(&format!("{vteps:?} are {liveness}"), 10, || {
            vteps.iter().all(|vtep| self.node(vtep)["liveness"] == liveness)
        });
    }

    /// Everything it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Stands still for so long, all its threads at once.
    pub fn freeze(&self, time: Duration) {
        signal(&self.child, "STOP");
        thread::sleep(time);
        signal(&self.child, "CONT");
    }

    /// SIGHUP: read the config again.
    pub fn reload(&self) {
        signal(&self.child, "HUP");
    }

    /// The death that leaves no time to clean up.
    pub fn kill_9(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; it must end by itself, and well.
    pub fn terminate(mut self) {
        signal(&self.child, "TERM");
        wait_until("the daemon has ended", 10, || self.child.try_wait().unwrap().is_some());
        let status = self.child.wait().unwrap();
        assert!(status.success(), "SIGTERM: {status}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            // Printed with the test's failure.
            println!(
                "--- {}\n{}",
                self.log.display(),
                fs::read_to_string(&self.log).unwrap_or_default()
            );
        }
        signal(&self.child, "TERM");
        for _ in 0..100 {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(50)),
                _ => return,
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
