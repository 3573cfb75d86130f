//! The scheduler with real checks, on loopback.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use tokio::net::{TcpListener, UdpSocket};

use super::*;
use crate::desired::{Mode, Owner, Protocol, Scheduler, ServicePort, Vni};

fn health(probe: Probe, port: u16, interval_ms: u64) -> Health {
    let interval = Duration::from_millis(interval_ms);
    let protocol = if matches!(probe, Probe::Udp(_)) { Protocol::Udp } else { Protocol::Tcp };
    Health {
        check: Check { probe, port: ServicePort { port, protocol } },
        pace: Pace { interval, timeout: interval / 2, rise: 2, fall: 2, jitter_percent: 10 },
        on_down: OnDown::Reselect,
        all_down: AllDown::KeepLast,
    }
}

fn service(name: &str, health: Option<Health>, backends: usize) -> Arc<Service> {
    let address = IpAddr::from(Ipv4Addr::LOCALHOST);
    let backend = |number: usize| Backend {
        name: format!("{name}-{number}"),
        vtep: address,
        mac: MacAddr([2, 0, 0, 0, 0, 1]),
        weight: 1,
        drain: None,
        vni: Vni::new(1).unwrap(),
        port: 4789,
        mtu: None,
        udp_checksum: None,
        address: Some(address),
    };
    Arc::new(Service {
        owner: Owner::File,
        written: None,
        name: name.to_owned(),
        vip: IpAddr::from([203, 0, 113, 10]).into(),
        ports: Vec::new(),
        mode: Mode::Dsr,
        allow: Vec::new(),
        scheduler: Scheduler::Maglev,
        health,
        backends: (0..backends).map(backend).collect(),
    })
}

fn want(checks: &Checks, services: &[Arc<Service>]) {
    checks.want(&Desired { services: services.to_vec(), overlays: Vec::new() }, Home::default());
}

/// The next news of a backend; panics if there are none for long.
async fn verdict(checks: &Checks, service: &str, backend: &str) -> Verdict {
    let mut told = checks.subscribe();
    told.mark_changed();
    let news = async {
        loop {
            told.changed().await.unwrap();
            if let Some(verdict) = checks.news().remove(&(service.into(), backend.into())) {
                return verdict;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), news).await.expect("there are news")
}

async fn wait_for(checks: &Checks, word: &str) -> Verdict {
    loop {
        let verdict = verdict(checks, "web", "web-0").await;
        if verdict.word() == word {
            return verdict;
        }
    }
}

#[tokio::test]
async fn a_server_that_comes_and_goes_is_seen_to() {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = server.local_addr().unwrap().port();
    let checks = Checks::start(8).unwrap();
    let web = service("web", Some(health(Probe::Tcp, port, 200)), 1);
    want(&checks, &[web]);
    assert_eq!(verdict(&checks, "web", "web-0").await, Verdict::Unknown);
    wait_for(&checks, "up").await;
    drop(server);
    let begun = Instant::now();
    let Verdict::Down { reason } = wait_for(&checks, "down").await else { panic!() };
    assert!(begun.elapsed() < Duration::from_millis(2 * 200 + 100), "{:?}", begun.elapsed());
    assert!(reason.contains("refused"), "{reason}");
    let report = checks.board().of("web").remove("web-0").unwrap();
    assert!(report.verdict == "down" && report.result.as_ref().unwrap().contains("refused"));
    assert!(report.age().unwrap() < Duration::from_secs(1));
    let _server = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    wait_for(&checks, "up").await;
}

#[tokio::test]
async fn silence_is_down_within_interval_times_fall() {
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let checks = Checks::start(8).unwrap();
    let exchange = Exchange { send: "ping".to_owned(), expect: Some("pong".to_owned()) };
    want(&checks, &[service("web", Some(health(Probe::Udp(exchange), port, 400)), 1)]);
    let mut buffer = [0; 64];
    let mut answer = async |with: &[u8]| {
        let (len, from) = silent.recv_from(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..len], b"ping");
        silent.send_to(with, from).await.unwrap();
    };
    answer(b"say pong").await;
    answer(b"say pong").await;
    let begun = Instant::now();
    wait_for(&checks, "up").await;
    // Another answer is as good as none.
    answer(b"what?").await;
    let Verdict::Down { reason } = wait_for(&checks, "down").await else { panic!() };
    assert!(begun.elapsed() < Duration::from_millis(2 * 400 + 100), "{:?}", begun.elapsed());
    assert_eq!(&*reason, "no answer within 200 ms");
    drop(silent);
    loop {
        let result = checks.board().of("web").remove("web-0").unwrap().result.unwrap();
        if result.contains("refused") {
            break; // ICMP "port unreachable"
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_verdict_outlives_what_has_nothing_to_do_with_it_and_ends_with_its_question() {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = server.local_addr().unwrap().port();
    let checks = Checks::start(8).unwrap();
    let with = |health: Health, weight: u16| {
        let mut web = (*service("web", Some(health), 1)).clone();
        web.backends[0].weight = weight;
        [Arc::new(web)]
    };
    let slow = health(Probe::Tcp, port, 60_000);
    let quick = health(Probe::Tcp, port, 100);
    want(&checks, &with(quick.clone(), 1));
    wait_for(&checks, "up").await;
    // Another weight, and another pace.
    want(&checks, &with(quick.clone(), 5));
    want(&checks, &with(slow, 5));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let report = || checks.board().of("web").remove("web-0");
    assert_eq!(report().unwrap().verdict, "up");
    assert!(checks.news().is_empty(), "nothing is thought otherwise");
    // A shorter interval counts at once, not after a minute.
    let seen = report().unwrap().checked_unix_ms;
    want(&checks, &with(quick, 5));
    while report().unwrap().checked_unix_ms == seen {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Another port is another question; were the first one free by now, it could be given again.
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    drop(server);
    let port = other.local_addr().unwrap().port();
    want(&checks, &with(health(Probe::Tcp, port, 100), 5));
    assert_eq!(verdict(&checks, "web", "web-0").await, Verdict::Unknown);
    // And who is not to be checked any more is not.
    want(&checks, &[service("web", None, 1)]);
    while report().is_some() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let counts = checks.board().counts();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(checks.board().counts(), counts);
}

/// The process's resident memory, in bytes.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[tokio::test]
async fn twenty_thousand_backends_are_checked_without_a_thread_or_task_each() {
    const BACKENDS: usize = 20_000;
    let server = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.unwrap();
    let port = server.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = server.accept().await {
            drop(stream);
        }
    });
    let services: Vec<_> = (0..BACKENDS / 10)
        .map(|number| {
            let mut health = health(Probe::Tcp, port, 20_000);
            health.pace.rise = 1;
            service(&format!("web{number}"), Some(health), 10)
        })
        .collect();
    let threads = || fs::read_dir("/proc/self/task").unwrap().count();
    let (before, threads_before) = (resident(), threads());
    let checks = Checks::start(256).unwrap();
    want(&checks, &services);
    let begun = Instant::now();
    while checks.board().counts()[0].1 < BACKENDS as u64 {
        assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", checks.board().counts());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let each = resident().saturating_sub(before) / BACKENDS as u64;
    println!("{BACKENDS} checks within {:.1?}, {each} bytes each", begun.elapsed());
    assert!(each < 4096, "{each} bytes for each check");
    // Other tests of this process have threads too.
    assert!(threads() < threads_before + 50);
    let up = services.iter().flat_map(|service| checks.board().of(&service.name).into_values());
    assert_eq!(up.filter(|report| report.verdict == "up").count(), BACKENDS);
}
