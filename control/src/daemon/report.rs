//! What the daemon shows of itself, and what it logs.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use dataplane::{forwarding::Slot, port::xsk::BindReport, steer};
use tokio::sync::watch;
use tracing::{info, warn};

use super::Daemon;
use crate::{
    plan::{Interface, Placements},
    status::PortStatus,
    view::{Observed, View, placed_backends},
    workers::Handle,
};

impl Daemon {
    /// What others may look at for as long as the process lives.
    pub(super) fn observed(&self) -> Observed {
        let ports = |worker: &Handle| worker.ports.iter().map(|p| self.port_status(p)).collect();
        let ports = self.fleet.workers.iter().map(ports).collect();
        Observed::new(&self.config, &self.fleet, ports, self.checks.board().clone())
    }

    /// Shows what is new, if anything is.
    pub(super) fn show(&self, shown: &watch::Sender<Arc<View>>) {
        let same = |view: &View| {
            view.generation == self.generation.get()
                && Arc::ptr_eq(&view.placements, &self.placements)
                && view.refused == self.refused
                && Arc::ptr_eq(&view.local_refused, &self.local_refused.borrow())
                && Arc::ptr_eq(&view.standings, &self.standings.borrow())
                && view.link_missing == self.missing.is_some()
                && view.swarm.as_ref().map(Arc::as_ptr)
                    == self.swarming.shown.as_ref().map(Arc::as_ptr)
        };
        if !same(&shown.borrow()) {
            shown.send_replace(self.view());
        }
    }

    /// What can be seen now.
    pub(super) fn view(&self) -> Arc<View> {
        Arc::new(View {
            generation: self.generation.get(),
            desired: self.placed.clone(),
            placements: self.placements.clone(),
            vteps: self.config.node.vteps(),
            addresses: self.addresses.clone(),
            forwarding: self.publisher.current().clone(),
            refused: self.refused.clone(),
            local_refused: self.local_refused.borrow().clone(),
            standings: self.standings.borrow().clone(),
            link_missing: self.missing.is_some(),
            swarm: self.swarming.shown.clone(),
        })
    }

    fn port_status(&self, report: &BindReport) -> PortStatus {
        let at = self.interfaces.iter().position(|i| i.name == report.interface).unwrap_or(0);
        let steer = &self.fleet.steers()[at];
        let native = steer.mode() == steer::Mode::Native;
        let why = [
            steer.why_not_native().map(|why| format!("not native XDP: {why}")),
            report.why_copy.as_ref().map(|why| format!("not zero-copy: {why}")),
            report.why_not_huge_pages.as_ref().map(|why| format!("not on huge pages: {why}")),
        ];
        PortStatus {
            interface: report.interface.clone(),
            queue: report.queue,
            xdp_mode: if native { "native" } else { "generic" }.to_owned(),
            copy_mode: report.copy.to_string(),
            huge_pages: report.huge_pages,
            why: why.into_iter().flatten().collect(),
            lost_in_kernel: BTreeMap::new(),
        }
    }

    pub(super) fn log_start(&self) {
        for (id, worker) in self.fleet.workers.iter().enumerate() {
            for report in &worker.ports {
                let port = self.port_status(report);
                info!(
                    worker = id,
                    core = worker.core,
                    interface = port.interface,
                    queue = port.queue,
                    xdp = port.xdp_mode,
                    copy = port.copy_mode,
                    huge_pages = port.huge_pages,
                    why = port.why.join("; "),
                    "bound"
                );
            }
        }
    }

    /// Says which backends became unreachable or reachable.
    pub(super) fn log_unreachable(&self, before: &Placements) {
        let unreachable = before.iter().flat_map(|own| &**own);
        let before: HashMap<Slot, &String> =
            unreachable.filter_map(|was| Some((was.slot, was.unreachable.as_ref()?))).collect();
        for (service, backend, placement) in placed_backends(&self.placed, &self.placements) {
            let (service, backend) = (&service.name, &backend.name);
            let was = before.get(&placement.slot).copied();
            match &placement.unreachable {
                Some(reason) if was != Some(reason) => {
                    warn!(service, backend, "unreachable: {reason}");
                }
                None if was.is_some() => info!(service, backend, "reachable again"),
                _ => {}
            }
        }
    }
}

/// Ethernet header and two VLAN tags, in bytes.
const MAX_HEADER: u32 = 14 + 8;
/// What lies in front of a packet in its frame, in bytes: dataplane's headroom.
const HEADROOM: u32 = dataplane::port::HEADROOM as u32;

/// Warns of interfaces that receive packets which don't fit into a frame.
pub(super) fn warn_too_large(interfaces: &[Interface], frame_size: u32) {
    for sentence in interfaces.iter().filter_map(|interface| too_large(interface, frame_size)) {
        warn!("{sentence}");
    }
}

fn too_large(Interface { name, mtu, .. }: &Interface, frame_size: u32) -> Option<String> {
    let largest = |frame_size: u32| frame_size - HEADROOM - MAX_HEADER;
    let fits = largest(frame_size);
    let remedy = match *mtu {
        mtu if mtu <= fits => return None,
        mtu if mtu <= largest(4096) => "set dataplane.frame_size_bytes = 4096, or ",
        _ => "",
    };
    Some(format!(
        "{name} has an MTU of {mtu} bytes, and the kernel drops what does not fit into a frame of \
         {frame_size}: {remedy}lower the MTU to {fits}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_mtu_beyond_the_frames_is_warned_of_with_the_remedy() {
        let warning = |mtu, frame_size| {
            let interface = Interface {
                name: "eth0".to_owned(),
                index: None,
                mac: Default::default(),
                mtu,
                partial_checksums: false,
                addresses: Vec::new(),
                home: None,
            };
            too_large(&interface, frame_size)
        };
        assert_eq!(warning(1642, 2048), None);
        let small = warning(1643, 2048).unwrap();
        assert!(small.contains("frame_size_bytes = 4096") && small.contains("to 1642"), "{small}");
        assert_eq!(warning(3690, 4096), None);
        let large = warning(9000, 4096).unwrap();
        assert!(!large.contains("frame_size_bytes") && large.contains("to 3690"), "{large}");
    }
}
