//! From the table, and this node's own place in the swarm, to what this node is to do: pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    net::IpAddr,
    sync::Arc,
};

use super::{
    Further, Local,
    table::{Locality, Node, Published, Table, Task},
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
    /// This node's addresses in the ingress network.
    pub overlays: Vec<Overlay>,
}

/// Without an address in the ingress network this node can't be answered: then it does nothing. Services
/// that are as they were `before` are the very same.
pub fn wanted(
    table: &Table,
    (local, further): (&Local, &Further),
    before: &Wanted,
    maglev: &Maglev,
) -> Wanted {
    let (Some(ingress), Some(address)) = (&table.ingress, local.mesh_address) else {
        return Wanted::default();
    };
    let Some(vni) = Vni::new(ingress.vni) else { return Wanted::default() };
    let overlay = Overlay {
        owner: Owner::Swarm,
        vni,
        addresses: iter::once(address)
            .chain(further.used.iter().copied())
            .map(IpAddr::V4)
            .collect(),
        leaving: further.leaving.iter().copied().map(IpAddr::V4).collect(),
        mac: container_mac(address),
        mtu: Some(ingress.mtu),
        port: ingress.port,
    };
    let ends = ends(table, local);
    let services = table.services.iter().filter_map(|published| {
        let mut spec = published.spec.clone();
        spec.backends = backends(published, &ends, local);
        // Judged already but for its backends, which Docker has named and numbered.
        let (service, _) = spec.understand(maglev).ok()?;
        let service = Service { owner: Owner::Swarm, ..service };
        let same = before.services.iter().find(|before| ***before == service);
        Some(same.cloned().unwrap_or_else(|| Arc::new(service)))
    });
    Wanted { services: services.collect(), overlays: vec![overlay] }
}

/// Where tunnels to each node end: mostly at the address that it is known by, but in a swarm with a
/// `--data-path-addr` elsewhere, as nodes tell each other with each task. One of such a swarm that has told
/// nothing yet can't be reached.
fn ends<'a>(table: &'a Table, local: &Local) -> BTreeMap<&'a str, IpAddr> {
    let all: BTreeSet<IpAddr> = local.ends.values().copied().map(IpAddr::V4).collect();
    let tasks = table.services.iter().flat_map(|service| &service.tasks);
    let told = tasks.filter_map(|task| Some((&*task.node, *local.ends.get(&task.address)?)));
    let told: BTreeMap<&str, IpAddr> = told.map(|(node, end)| (node, end.into())).collect();
    let elsewhere =
        |node: &Node| told.get(&*node.id).copied().filter(|_| !all.contains(&node.address));
    let is_plain = table.nodes.iter().all(|node| elsewhere(node).is_none());
    let end = |node: &'a Node| {
        let is_known = is_plain || all.contains(&node.address);
        Some((&*node.id, elsewhere(node).or_else(|| is_known.then_some(node.address))?))
    };
    table.nodes.iter().filter_map(end).collect()
}

fn backends(
    published: &Published,
    ends: &BTreeMap<&str, IpAddr>,
    local: &Local,
) -> Vec<BackendSpec> {
    let is_own = |task: &&Task| task.node == local.node;
    let own_serve = published.tasks.iter().any(|task| is_own(&task) && task.weight > 0);
    let backend = |task: &Task| {
        let weight = match published.locality {
            Locality::Prefer if own_serve && task.node != local.node => 0,
            _ => task.weight,
        };
        // Docker's device answers by the link that leads to us, and so with this node's address there. What
        // comes from anywhere but the tunnel's far end is dropped.
        let vtep = match is_own(&task) {
            true => NODE_ADDRESS.into(),
            false => *ends.get(&*task.node)?,
        };
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
    use std::net::Ipv4Addr;

    use super::{
        super::table::{table, tests::recorded},
        *,
    };
    use crate::desired::{Family, Mode, Vip};

    fn local(node: usize) -> Local {
        let node = recorded().nodes[node].id.clone();
        Local { node, mesh_address: Some([10, 0, 0, 2].into()), ..Local::default() }
    }

    fn of(table: &Table, local: &Local) -> Wanted {
        wanted(table, (local, &Further::default()), &Wanted::default(), &Maglev::default())
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
        assert_eq!(
            (web.owner, web.mode, web.vip),
            (Owner::Swarm, Mode::Nat, Vip::Node(Family::V4))
        );
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
    fn further_addresses_stand_beside_dockers_and_those_that_leave_apart() {
        let further = Further {
            used: vec![[10, 0, 0, 254].into()],
            leaving: vec![[10, 0, 0, 253].into()],
            lack: None,
        };
        let place = (&local(0), &further);
        let wanted = wanted(&table(&recorded()), place, &Wanted::default(), &Maglev::default());
        let overlay = &wanted.overlays[0];
        let address = |last| IpAddr::from([10, 0, 0, last]);
        assert_eq!(
            (&*overlay.addresses, &*overlay.leaving),
            (&[address(2), address(254)][..], &[address(253)][..])
        );
        assert_eq!(overlay.mac, container_mac([10, 0, 0, 2].into()), "one for all");
    }

    #[test]
    fn a_task_is_reached_where_its_node_says_that_its_tunnels_end() {
        // Tasks of `dns`, one on each node, and `web`'s first on the second node.
        let ends = |told: &[(u8, u8)]| {
            let address = |(task, end): &(u8, u8)| {
                (Ipv4Addr::from([10, 0, 0, *task]), Ipv4Addr::from([10, 79, 0, *end]))
            };
            let local = Local { ends: told.iter().map(address).collect(), ..local(0) };
            let wanted = of(&table(&recorded()), &local);
            let backends = ["dns", "web"].map(|name| service(&wanted, name).backends.clone());
            let far =
                backends.concat().into_iter().filter(|b| b.vtep != IpAddr::from(NODE_ADDRESS));
            far.map(|backend| backend.vtep.to_string()).collect::<Vec<_>>()
        };
        let known = ends(&[]);
        assert!(known.iter().all(|end| end.starts_with("10.78.0.1")), "{known:?}");
        assert_eq!(
            ends(&[(10, 12), (11, 13)]).iter().filter(|end| end.starts_with("10.79.")).count(),
            known.len()
        );
        // The second node's end is told of one task, and that of the third not yet.
        let some = ends(&[(10, 12)]);
        assert!(some.len() < known.len() && some.iter().all(|end| end == "10.79.0.12"), "{some:?}");
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
        let place = (&local(0), &Further::default());
        let after = wanted(&table, place, &before, &Maglev::default());
        assert!(!Arc::ptr_eq(&before.services[0], &after.services[0]));
        assert!(Arc::ptr_eq(&before.services[1], &after.services[1]));
    }
}
