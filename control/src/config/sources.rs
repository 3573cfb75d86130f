//! `[source.swarm]`: which Docker engine is read, and who reads it for us.

use std::{net::IpAddr, path::PathBuf};

use dataplane::nat::MAX_BANKS;
use toml::Spanned;

use super::{
    Api, Engine, Manager, Nat, Sources, Swarm,
    file::{self, Key},
    finding::Report,
    settings::{absolute, number, socket_path},
};

/// Daemons of managers: a swarm has 7 of these at most, if it follows Docker's advice.
const MAX_MANAGERS: usize = 16;

/// `of_overlays` are the mesh addresses that [[overlay]] tables have.
pub fn sources(
    written: &file::Sources,
    api: &Api,
    (nat, of_overlays): (&Nat, usize),
    report: &mut Report,
) -> Sources {
    let swarm = written.swarm.as_ref().map(|written| {
        let swarm = swarm(written.get_ref(), api, report);
        let room = (nat.addresses as usize).saturating_sub(of_overlays);
        if swarm.mesh_addresses as usize > room {
            let key = &written.get_ref().mesh_addresses;
            let at = key.as_ref().map_or_else(|| written.span(), Spanned::span);
            let message = format!(
                "`mesh_addresses` is {}, and nat.addresses leaves room for {room}",
                swarm.mesh_addresses
            );
            let needed = of_overlays + swarm.mesh_addresses as usize;
            let remedy = match needed {
                ..=MAX_BANKS => format!("nat.addresses = {needed} or more"),
                _ => format!("at most {MAX_BANKS}, with those of [[overlay]]"),
            };
            report.error(at, message, remedy);
        }
        swarm
    });
    Sources { swarm }
}

fn swarm(written: &file::Swarm, api: &Api, report: &mut Report) -> Swarm {
    let defaults = Swarm::default();
    let folder = written.cert_path.as_ref();
    let certificates = folder.map(|key| absolute("cert_path", key, report));
    let engine = written.socket.as_ref();
    let engine = engine.map_or(defaults.engine, |key| engine_at(key, certificates, report));
    if let (Some(key), Engine::Unix(_)) = (folder, &engine) {
        let message = "`cert_path` is set, but the engine is asked without TLS";
        report.error(key.span(), message, "leave it out, or have `socket = \"tcp://HOST:2376\"`");
    }
    let poll = (defaults.poll_ms, 20..=10_000);
    let addresses = (defaults.mesh_addresses, 1..=MAX_BANKS as u32);
    Swarm {
        engine,
        managers: managers(&written.managers, api, report),
        poll_ms: number("poll_ms", &written.poll_ms, poll, report),
        mesh_addresses: number("mesh_addresses", &written.mesh_addresses, addresses, report),
    }
}

fn engine_at(key: &Spanned<String>, certificates: Option<PathBuf>, report: &mut Report) -> Engine {
    let text = key.get_ref();
    let Some(address) = text.strip_prefix("tcp://") else {
        return Engine::Unix(socket_path(key, report));
    };
    match host_of(address) {
        None => {
            let message = format!("`socket` is `{text}`");
            report.error(key.span(), message, "a host and a port, as in tcp://10.0.0.1:2376");
        }
        Some(host) if certificates.is_none() && !is_here(host) => {
            let message = format!("`socket` is `{text}`, and whoever is in between could answer");
            let remedy = "add `cert_path`, a directory with Docker's ca.pem, cert.pem and key.pem";
            report.error(key.span(), message, remedy);
        }
        Some(_) => {}
    }
    Engine::Tcp { address: address.to_owned(), certificates }
}

fn managers(written: &Key<Vec<Spanned<String>>>, api: &Api, report: &mut Report) -> Vec<Manager> {
    let Some(all) = written else { return Vec::new() };
    if all.get_ref().len() > MAX_MANAGERS {
        let message = format!("`managers` has {} entries", all.get_ref().len());
        report.error(all.span(), message, format!("at most {MAX_MANAGERS}"));
    }
    all.get_ref().iter().filter_map(|key| manager(key, api, report)).collect()
}

fn manager(key: &Spanned<String>, api: &Api, report: &mut Report) -> Option<Manager> {
    let text = key.get_ref();
    let (tls, address) = match text.split_once("://") {
        Some(("https", address)) => (true, address),
        Some(("http", address)) => (false, address),
        _ => (false, ""),
    };
    let address = address.trim_end_matches('/');
    let Some(host) = host_of(address) else {
        let message = format!("`{text}` is not where a manager's API is");
        report.error(key.span(), message, "as in https://10.0.0.1:9443");
        return None;
    };
    if tls && api.tls.is_none() {
        let message = format!("{text} asks who we are, and we have no certificate");
        let remedy = "add `certificate`, `key` and `client_ca` to [api]: they are shown to it, too";
        report.error(key.span(), message, remedy);
    }
    if !tls && !is_here(host) {
        let message = format!("`{text}`: whoever is in between could answer");
        report.error(key.span(), message, "https://, or a loopback address");
    }
    Some(Manager { address: address.to_owned(), tls })
}

/// The host of `host:port`, if it is one.
fn host_of(address: &str) -> Option<&str> {
    let (host, port) = address.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let named = |byte: u8| byte.is_ascii_alphanumeric() || b".-".contains(&byte);
    let good = bare.parse::<IpAddr>().is_ok() || !host.is_empty() && host.bytes().all(named);
    (port != 0 && good).then_some(bare)
}

fn is_here(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}
