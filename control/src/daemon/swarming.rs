//! How what a Docker Swarm wants stands beside what the file and the API want: these go first.

use std::sync::Arc;

use tokio::sync::watch;
use tracing::warn;

use super::{Daemon, Wanted};
use crate::{
    causes,
    desired::{Claim, Conflict, Owner, TunnelEnds},
    source::swarm::{self, State},
};

/// The Docker Swarm as the daemon knows it.
#[derive(Default)]
pub struct Swarming {
    /// As it is read.
    read: Option<Arc<State>>,
    /// What of that is not done, because of what others want.
    left_out: Vec<String>,
    /// As it is shown: both.
    pub shown: Option<Arc<State>>,
}

/// The newest state of the swarm, once there is a newer one; never if none is read.
pub async fn newest(states: &mut Option<watch::Receiver<Arc<State>>>) -> Option<Arc<State>> {
    let Some(states) = states else { return std::future::pending().await };
    states.changed().await.ok()?;
    Some(states.borrow_and_update().clone())
}

impl Daemon {
    /// The swarm wants something else, or is read otherwise.
    pub(super) async fn follow_swarm(&mut self, state: Arc<State>) {
        let before = self.swarming.read.replace(state.clone());
        if before.is_none_or(|before| before.wanted != state.wanted) {
            self.fit_swarm(&state).await;
        }
        self.show_swarm(&state);
    }

    /// The others want something else: what was in the way may be gone.
    pub(super) async fn refit_swarm(&mut self) {
        let Some(state) = self.swarming.read.clone() else { return };
        if self.wanted.swarm != state.wanted {
            self.fit_swarm(&state).await;
            self.show_swarm(&state);
        }
    }

    /// Takes over as much as there is room for.
    async fn fit_swarm(&mut self, state: &State) {
        let wanted = Wanted { swarm: state.wanted.clone(), ..self.wanted.clone() };
        let (wanted, mut left_out) = fit(wanted, &self.config.node.vteps());
        if wanted.swarm != self.wanted.swarm
            && let Err(refused) = self.take_over(self.config.clone(), wanted, None).await
        {
            let sentence = causes::line(&refused);
            left_out.push(format!("what the swarm wants now is not taken over: {sentence}"));
        }
        let new = left_out.iter().filter(|sentence| !self.swarming.left_out.contains(sentence));
        new.for_each(|sentence| warn!("swarm: {sentence}"));
        self.swarming.left_out = left_out;
    }

    fn show_swarm(&mut self, state: &Arc<State>) {
        let mut status = state.status.clone();
        status.remarks.extend(self.swarming.left_out.iter().cloned());
        let same = |shown: &Arc<State>| {
            shown.status == status && shown.news == state.news && shown.wanted == state.wanted
        };
        if !self.swarming.shown.as_ref().is_some_and(same) {
            let (wanted, news) = (state.wanted.clone(), state.news.clone());
            self.swarming.shown = Some(Arc::new(State { wanted, news, status }));
        }
    }
}

/// Leaves out what of the swarm's can't stand beside the others', each with a sentence: one service must
/// not keep all others from being followed.
pub(super) fn fit(mut wanted: Wanted, vteps: &[std::net::IpAddr]) -> (Wanted, Vec<String>) {
    let (mut left_out, mut ends) = (Vec::new(), TunnelEnds::default());
    while let Err(conflict) = wanted.join(vteps, &mut ends) {
        if !leave_out(&mut wanted.swarm, &conflict) {
            // Not about the swarm's at all: that is for `take_over` to say.
            break;
        }
        left_out.push(format!("left out: {conflict}"));
    }
    (wanted, left_out)
}

/// Whether there was something to leave out.
fn leave_out(swarm: &mut swarm::Wanted, conflict: &Conflict) -> bool {
    let before = swarm.services.len() + swarm.overlays.len();
    let parties = [Some(&conflict.one), conflict.other.as_ref()];
    let ours = |(owner, _): &&(Owner, String)| *owner == Owner::Swarm;
    match (parties.into_iter().flatten().rfind(ours), conflict.claim) {
        // Without its network none of its services can be reached.
        (_, Claim::Overlay(_)) => *swarm = swarm::Wanted::default(),
        (Some((_, name)), _) => swarm.services.retain(|service| service.name != *name),
        (None, _) => {}
    }
    swarm.services.len() + swarm.overlays.len() < before
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Config, ServiceSpec},
        desired::Service,
    };

    /// A service of the swarm's on all addresses of the node.
    fn published(name: &str, ports: &str) -> Arc<Service> {
        let spec = ServiceSpec {
            name: Some(name.to_owned()),
            vip: Some("node".to_owned()),
            ports: Some(vec![ports.to_owned()]),
            mode: Some(crate::desired::Mode::Nat),
            vni: Some(4096),
            ..ServiceSpec::default()
        };
        let (service, _) = spec.understand(&Default::default()).unwrap();
        Arc::new(Service { owner: Owner::Swarm, ..service })
    }

    fn wanted(file: &str, swarm: &[Arc<Service>]) -> Wanted {
        let (config, _) = Config::parse("test", file).unwrap();
        Wanted {
            file: config.desired.services,
            overlays: config.desired.overlays,
            swarm: swarm::Wanted { services: swarm.to_vec(), overlays: Vec::new() },
            ..Wanted::default()
        }
    }

    const FILE: &str = "[[overlay]]\nvni = 4096\naddresses = [\"10.0.0.2\"]\n\
        [[service]]\nname = \"web\"\nvip = \"node\"\nports = [\"80/tcp\"]\nmode = \"nat\"\nvni = 4096\n";

    #[test]
    fn what_is_in_the_way_of_the_files_is_left_out_of_the_swarms_and_the_rest_is_not() {
        let swarm =
            [published("web", "81/tcp"), published("shop", "80/tcp"), published("dns", "53/udp")];
        let (fitted, left_out) = fit(wanted(FILE, &swarm), &[]);
        assert_eq!(fitted.swarm.services, swarm[2..]);
        assert_eq!(
            left_out,
            [
                "left out: the file's `web` and the swarm's `web` have the same name",
                "left out: the file's `web` and the swarm's `shop` both publish 80/tcp of node",
            ]
        );
        fitted.join(&[], &mut TunnelEnds::default()).unwrap();
    }

    #[test]
    fn a_swarm_whose_network_the_file_has_is_left_out_as_a_whole() {
        let mut wanted = wanted(FILE, &[published("dns", "53/udp")]);
        wanted.swarm.overlays = wanted
            .overlays
            .iter()
            .map(|o| crate::desired::Overlay { owner: Owner::Swarm, ..o.clone() })
            .collect();
        let (fitted, left_out) = fit(wanted, &[]);
        assert_eq!(fitted.swarm, swarm::Wanted::default());
        assert_eq!(left_out.len(), 1, "{left_out:?}");
    }
}
