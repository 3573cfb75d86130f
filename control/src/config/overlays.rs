//! `[[overlay]]` tables to overlays: the VXLAN networks that this node has addresses in.

use std::{collections::HashMap, net::IpAddr};

use dataplane::wire::vxlan;
use toml::Spanned;

use super::{
    file,
    finding::{Report, Span},
    services::{mac, mtu, port, required, vni},
    settings,
};
use crate::desired::{Family, Overlay, Owner, container_mac};

pub fn overlays(written: &[Spanned<file::Overlay>], report: &mut Report) -> Vec<Overlay> {
    let mut vnis = HashMap::new();
    written.iter().filter_map(|written| overlay(written, &mut vnis, report)).collect()
}

fn overlay(
    written: &Spanned<file::Overlay>,
    vnis: &mut HashMap<u32, Span>,
    report: &mut Report,
) -> Option<Overlay> {
    let keys = written.get_ref();
    let at = written.span();
    let vni = required(&keys.vni, "overlay", "vni = 100", &at, report)
        .and_then(|key| Some((vni(key, report)?, key.span())));
    let addresses =
        required(&keys.addresses, "overlay", "addresses = [\"10.99.1.250\"]", &at, report)
            .map(|key| addresses(key, report));
    if let Some((vni, span)) = &vni
        && let Some(first) = vnis.insert(vni.get(), span.clone())
    {
        let message = format!("there are two overlays {}", vni.get());
        report.conflict(span.clone(), message, "one of them, with all `addresses`", first);
    }
    let addresses = addresses?;
    let first = addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    let mac = match (&keys.mac, first) {
        (None, Some(address)) => Some(container_mac(address)),
        (key, _) => required(key, "overlay", "mac = \"02:42:0a:63:01:fa\"", &at, report)
            .and_then(|key| mac(key, report)),
    };
    let mtu = mtu(&keys.mtu, family(&addresses), report);
    let port = port("port", &keys.port, vxlan::PORT, report);
    Some(Overlay {
        owner: Owner::File,
        vni: vni?.0,
        addresses,
        leaving: Vec::new(),
        mac: mac?,
        mtu,
        port,
    })
}

/// IPv6 if any of the addresses is: it asks more of a network.
fn family(addresses: &[IpAddr]) -> Family {
    addresses.iter().copied().map(Family::of).max().unwrap_or(Family::V4)
}

fn addresses(written: &Spanned<Vec<Spanned<String>>>, report: &mut Report) -> Vec<IpAddr> {
    let list = written.get_ref();
    if list.is_empty() {
        let remedy = "an address that nobody else has in the overlay";
        report.error(written.span(), "the overlay has no addresses", remedy);
    }
    for (index, address) in list.iter().enumerate() {
        // An IPv6 address can be written in many ways.
        let same = |first: &&Spanned<String>| {
            let [first, second] = [first, address].map(|text| text.get_ref().parse::<IpAddr>());
            first.is_ok() && first == second
        };
        let first = list[..index].iter().find(same);
        if let Some(first) = first {
            let message = format!("{} is given twice", address.get_ref());
            report.conflict(address.span(), message, "leave it out here", first.span());
        }
    }
    list.iter().filter_map(|address| settings::address("addresses", address, report)).collect()
}
