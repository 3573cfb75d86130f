//! What the daemon tells of itself, in its status and its log.

use std::collections::{BTreeMap, HashMap};

use dataplane::{forwarding::Slot, port::xsk::BindReport, steer};
use tracing::{info, warn};

use super::Daemon;
use crate::{
    desired::port_ranges,
    plan::{Interface, Placement},
    status::{
        BackendStatus, PortStatus, ServiceStatus, Status, WorkerStatus, drops, events, losses,
        own_drops,
    },
};

impl Daemon {
    /// Whether packets are being steered to workers that forward them.
    fn ready(&self) -> bool {
        let all_hang = (0..self.fleet.workers.len()).all(|id| self.fleet.hung(id));
        self.missing.is_none() && !all_hang
    }

    pub(super) fn status(&self) -> Status {
        let now = self.fleet.now();
        let mut connections = vec![0_u64; self.config.limits.backends as usize];
        for worker in &self.fleet.workers {
            worker.connections.for_each(now, |slot| {
                if let Some(count) = connections.get_mut(slot as usize) {
                    *count += 1;
                }
            });
        }
        let counters = self.fleet.workers.iter().map(|worker| &*worker.counters);
        let mut placements = self.backends.iter();
        let mut backend = |backend: &crate::desired::Backend| {
            let placement = placements.next().cloned();
            let placement = placement.unwrap_or(Placement { slot: 0, unreachable: None });
            let slot = placement.slot as usize;
            let (packets, bytes) = counters
                .clone()
                .map(|counters| counters.backend(slot))
                .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
            let state = match (&placement.unreachable, backend.weight) {
                (Some(_), _) => "unreachable",
                (None, 0) => "draining",
                (None, _) => "active",
            };
            BackendStatus {
                name: backend.name.clone(),
                vtep: backend.vtep.to_string(),
                weight: backend.weight,
                state: state.to_owned(),
                reason: placement.unreachable,
                packets,
                bytes,
                connections: connections.get(slot).copied().unwrap_or_default(),
            }
        };
        let services = self.config.desired.services.iter().map(|service| ServiceStatus {
            name: service.name.clone(),
            vip: service.vip.to_string(),
            ports: port_ranges(&service.ports),
            backends: service.backends.iter().map(&mut backend).collect(),
        });
        Status {
            node: self.config.node.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: self.generation.get(),
            ready: self.ready(),
            refused: self.refused.clone(),
            services: services.collect(),
            drops: drops(counters.clone()),
            workers: (0..self.fleet.workers.len()).map(|id| self.worker_status(id)).collect(),
        }
    }

    fn worker_status(&self, id: usize) -> WorkerStatus {
        let worker = &self.fleet.workers[id];
        let ports =
            worker.ports.iter().zip(self.fleet.losses(id)).map(|(report, lost)| PortStatus {
                lost_in_kernel: lost.as_ref().map(losses).unwrap_or_default(),
                ..self.port_status(report)
            });
        WorkerStatus {
            id,
            core: worker.core,
            hung: self.fleet.hung(id),
            turns: worker.counters.turns(),
            ports: ports.collect(),
            counters: events(&worker.counters),
            drops: own_drops(&worker.counters),
        }
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
    pub(super) fn log_unreachable(&self, before: &[Placement]) {
        let before: HashMap<Slot, &Placement> = before.iter().map(|was| (was.slot, was)).collect();
        let names = self.config.desired.backends().map(|(s, b)| (&s.name, &b.name));
        for ((service, backend), placement) in names.zip(&self.backends) {
            let was = before.get(&placement.slot);
            let was = was.and_then(|was| was.unreachable.as_ref());
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
