//! From the table, and this node's own place in the swarm, to what this node is to do: pure.

use std::sync::Arc;

use super::{
    Local,
    table::{Locality, Published, Table, Task},
};
use crate::{
    config::{BackendSpec, Maglev},
    desired::{Overlay, Owner, Service, Vni, container_mac},
    local::NODE_ADDRESS,
};

/// What this node is to do for the swarm.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Services, each of the owner `swarm`.
    pub services: Vec<Arc<Service>>,
    /// This node's address in the ingress network.
    pub overlays: Vec<Overlay>,
}

/// Without an address in the ingress network this node can't be answered: then it does nothing. Services
/// that are as they were `before` are the very same.
pub fn wanted(table: &Table, local: &Local, before: &Wanted, maglev: &Maglev) -> Wanted {
    let (Some(ingress), Some(address)) = (&table.ingress, local.mesh_address) else {
        return Wanted::default();
    };
    let Some(vni) = Vni::new(ingress.vni) else { return Wanted::default() };
    let overlay = Overlay {
        owner: Owner::Swarm,
        vni,
        addresses: vec![address.into()],
        leaving: Vec::new(),
        mac: container_mac(address),
        mtu: Some(ingress.mtu),
        port: ingress.port,
    };
    let services = table.services.iter().filter_map(|published| {
        let mut spec = published.spec.clone();
        spec.backends = backends(published, table, local);
        // Judged already but for its backends, which Docker has named and numbered.
        let (service, _) = spec.understand(maglev).ok()?;
        let service = Service { owner: Owner::Swarm, ..service };
        let same = before.services.iter().find(|before| ***before == service);
        Some(same.cloned().unwrap_or_else(|| Arc::new(service)))
    });
    Wanted { services: services.collect(), overlays: vec![overlay] }
}

fn backends(published: &Published, table: &Table, local: &Local) -> Vec<BackendSpec> {
    let is_own = |task: &&Task| task.node == local.node;
    let own_serve = published.tasks.iter().any(|task| is_own(&task) && task.weight > 0);
    let backend = |task: &Task| {
        let node = table.nodes.iter().find(|node| node.id == task.node)?;
        let weight = match published.locality {
            Locality::Prefer if own_serve && task.node != local.node => 0,
            _ => task.weight,
        };
        // Docker's device answers by the link that leads to us, and so with this node's address there. What
        // comes from anywhere but the tunnel's far end is dropped.
        let vtep = if is_own(&task) { NODE_ADDRESS.into() } else { node.address };
        Some(BackendSpec {
            name: Some(task.name.clone()),
            vtep: Some(vtep.to_string()),
            address: Some(task.address.to_string()),
            weight: Some(weight.into()),
            ..BackendSpec::default()
        })
    };
    let tasks = published.tasks.iter();
    match published.locality {
        Locality::Require => tasks.filter(is_own).filter_map(backend).collect(),
        Locality::Prefer | Locality::None => tasks.filter_map(backend).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::table::{table, tests::recorded},
        *,
    };
    use crate::desired::{Mode, Vip};

    fn local(node: usize) -> Local {
        let node = recorded().nodes[node].id.clone();
        Local { node, mesh_address: Some([10, 0, 0, 2].into()) }
    }

    fn of(table: &Table, local: &Local) -> Wanted {
        wanted(table, local, &Wanted::default(), &Maglev::default())
    }

    fn service<'a>(wanted: &'a Wanted, name: &str) -> &'a Service {
        wanted.services.iter().find(|service| service.name == name).unwrap()
    }

    fn weights(wanted: &Wanted, name: &str) -> Vec<u16> {
        service(wanted, name).backends.iter().map(|backend| backend.weight).collect()
    }

    #[test]
    fn a_node_is_to_forward_all_that_is_published_into_the_ingress_network() {
        let wanted = of(&table(&recorded()), &local(0));
        assert_eq!(wanted.services.len(), 3);
        let overlay = &wanted.overlays[0];
        assert_eq!((overlay.vni.get(), overlay.port, overlay.mtu), (4096, 4789, Some(1450)));
        assert_eq!(overlay.addresses, [std::net::IpAddr::from([10, 0, 0, 2])]);
        let web = service(&wanted, "web");
        assert_eq!((web.owner, web.mode, web.vip), (Owner::Swarm, Mode::Nat, Vip::Node));
        let task = &web.backends[0];
        assert_eq!(task.vtep.to_string(), "10.78.0.12");
        assert_eq!(task.address.unwrap().to_string(), "10.0.0.6");
        assert_eq!((task.mac.to_string(), task.mtu), ("02:42:0a:00:00:06".to_owned(), Some(1450)));
        // All of it can stand side by side, and finds its overlay.
        crate::desired::join(&[&wanted.services], &wanted.overlays, &[], &mut Default::default())
            .unwrap();
        // What runs here answers by the link of our own.
        let own = &service(&wanted, "dns").backends[0];
        assert_eq!(own.vtep, std::net::IpAddr::from(NODE_ADDRESS));
    }

    #[test]
    fn without_an_address_in_the_ingress_network_a_node_forwards_nothing() {
        let nowhere = Local { mesh_address: None, ..local(0) };
        assert_eq!(of(&table(&recorded()), &nowhere), Wanted::default());
    }

    #[test]
    fn own_tasks_go_first_where_a_label_says_so() {
        let mut table = table(&recorded());
        let dns =
            table.services.iter_mut().find(|s| s.spec.name.as_deref() == Some("dns")).unwrap();
        dns.locality = Locality::Prefer;
        assert_eq!(weights(&of(&table, &local(0)), "dns"), [1, 0, 0]);
        let dns =
            table.services.iter_mut().find(|s| s.spec.name.as_deref() == Some("dns")).unwrap();
        dns.tasks[0].weight = 0;
        assert_eq!(weights(&of(&table, &local(0)), "dns"), [0, 1, 1], "its own one leaves");
        let dns =
            table.services.iter_mut().find(|s| s.spec.name.as_deref() == Some("dns")).unwrap();
        dns.locality = Locality::Require;
        assert_eq!(weights(&of(&table, &local(0)), "dns"), [0]);
        assert_eq!(weights(&of(&table, &local(1)), "dns"), [1]);
    }

    #[test]
    fn what_has_not_changed_is_the_very_same() {
        let mut table = table(&recorded());
        let before = of(&table, &local(0));
        table.services[0].tasks.pop();
        let after = wanted(&table, &local(0), &before, &Maglev::default());
        assert!(!Arc::ptr_eq(&before.services[0], &after.services[0]));
        assert!(Arc::ptr_eq(&before.services[1], &after.services[1]));
    }
}
