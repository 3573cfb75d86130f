//! When which backend is checked: a heap of what is due, and a bounded number of checks under way. One
//! that is not under way costs its place in the heap and no task, so that there may be tens of thousands.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tracing::warn;

use super::{Board, Name, News, Outcome, Probe, Streak, Target, Verdict, Wanted, probe::Probes};

/// The first checks are spread over so much time, or over an interval if that is shorter.
const SPREAD: Duration = Duration::from_secs(5);
/// How late a check may begin before that is worth a warning, and how often it is.
const LATE: Duration = Duration::from_secs(1);
const WARN_AGAIN: Duration = Duration::from_secs(60);

/// Names one target for as long as the question asked of it is the same.
type Id = u64;

/// One backend's checks.
struct Checked {
    name: Name,
    target: Target,
    streak: Streak,
    /// When the next check begins; `None` while one is under way.
    due: Option<Instant>,
}

/// A check that has ended.
struct Done {
    id: Id,
    outcome: Outcome,
    begun: Instant,
}

type Running = FuturesUnordered<Pin<Box<dyn Future<Output = Done>>>>;

/// Checks what is wanted until nobody can want anything any more.
pub async fn run(
    mut wanted: watch::Receiver<Arc<Wanted>>,
    limit: usize,
    news: &News,
    board: &Board,
) {
    let mut scheduler = Scheduler {
        checks: HashMap::new(),
        ids: HashMap::new(),
        next_id: 0,
        queue: BinaryHeap::new(),
        probes: Rc::new(Probes::default()),
        warned: None,
        news,
        board,
    };
    let mut running = Running::new();
    loop {
        let now = Instant::now();
        while running.len() < limit
            && let Some(id) = scheduler.take_due(now)
        {
            running.push(scheduler.check(id, now));
        }
        let next = scheduler.queue.peek().map(|Reverse((due, _))| *due);
        let next = next.filter(|_| running.len() < limit);
        tokio::select! {
            changed = wanted.changed() => match changed {
                Ok(()) => {
                    let wanted = wanted.borrow_and_update().clone();
                    scheduler.want(&wanted);
                }
                Err(_) => return,
            },
            Some(done) = running.next() => scheduler.finish(done),
            () = time::sleep_until(next.unwrap_or(now)), if next.is_some() => {}
        }
    }
}

struct Scheduler<'a> {
    checks: HashMap<Id, Checked>,
    ids: HashMap<Name, Id>,
    next_id: Id,
    /// May hold entries that are out of date: what counts is `Checked::due`.
    queue: BinaryHeap<Reverse<(Instant, Id)>>,
    probes: Rc<Probes>,
    warned: Option<Instant>,
    news: &'a News,
    board: &'a Board,
}

impl Scheduler<'_> {
    fn want(&mut self, wanted: &Wanted) {
        self.probes.live_at(&wanted.home);
        let mut before = std::mem::take(&mut self.ids);
        for target in &wanted.targets {
            let name: Name =
                (target.service.name.as_str().into(), target.backend().name.as_str().into());
            let same = before.remove_entry(&name).filter(|(_, id)| {
                let known = self.checks.get(id).is_some_and(|was| was.target.asks_the_same(target));
                if !known {
                    self.checks.remove(id);
                }
                known
            });
            match same {
                // The name that is there already is kept, rather than two of each.
                Some((name, id)) => {
                    self.go_on(id, target);
                    self.ids.insert(name, id);
                }
                None => self.begin(name, target),
            }
        }
        for ((service, backend), id) in before {
            self.checks.remove(&id);
            self.board.forget(&service, &backend);
        }
    }

    fn begin(&mut self, name: Name, target: &Target) {
        let id = self.next_id;
        self.next_id += 1;
        let spread = target.health().pace.interval.min(SPREAD);
        let due = Instant::now() + spread.mul_f64(fastrand::f64());
        self.queue.push(Reverse((due, id)));
        self.board.begin(&name.0, &name.1);
        // Whatever was thought of one of this name before was about another question.
        self.news.tell(&name.0, &name.1, Verdict::Unknown);
        let checked = Checked {
            name: name.clone(),
            target: target.clone(),
            streak: Streak::default(),
            due: Some(due),
        };
        self.checks.insert(id, checked);
        self.ids.insert(name, id);
    }

    /// The same question, perhaps at another pace.
    fn go_on(&mut self, id: Id, target: &Target) {
        let check = self.checks.get_mut(&id).expect("looked up before");
        let before = check.target.health().pace.interval;
        check.target = target.clone();
        let interval = target.health().pace.interval;
        // A shorter interval counts from now, not from the end of the old one.
        if let Some(due) = &mut check.due
            && interval < before
        {
            *due = (*due).min(Instant::now() + interval.mul_f64(fastrand::f64()));
            self.queue.push(Reverse((*due, id)));
        }
    }

    /// The next one that is to begin now.
    fn take_due(&mut self, now: Instant) -> Option<Id> {
        loop {
            let Reverse((due, id)) = *self.queue.peek().filter(|Reverse((due, _))| *due <= now)?;
            self.queue.pop();
            if let Some(check) = self.checks.get_mut(&id)
                && check.due == Some(due)
            {
                check.due = None;
                self.warn_if_late(now - due);
                return Some(id);
            }
        }
    }

    fn check(&self, id: Id, begun: Instant) -> Pin<Box<dyn Future<Output = Done>>> {
        let target = self.checks[&id].target.clone();
        let probes = self.probes.clone();
        Box::pin(async move {
            let timeout = target.health().pace.timeout;
            let outcome = match time::timeout(timeout, probes.probe(&target)).await {
                Ok(outcome) => outcome,
                Err(_) => Outcome::Failed(silence(&target, timeout)),
            };
            Done { id, outcome, begun }
        })
    }

    fn finish(&mut self, Done { id, outcome, begun }: Done) {
        // It is not wanted any more, or another question is asked now.
        let Some(check) = self.checks.get_mut(&id) else { return };
        let pace = check.target.health().pace;
        let changed = check.streak.count(&outcome, &pace);
        let due = begun + pace.wait(check.streak.is_suspicious(), fastrand::f64());
        check.due = Some(due);
        self.queue.push(Reverse((due, id)));
        let ((service, backend), verdict) = (&check.name, check.streak.verdict());
        self.board.note((service, backend), verdict, outcome, begun.elapsed());
        if changed {
            self.news.tell(service, backend, verdict.clone());
        }
    }

    fn warn_if_late(&mut self, late: Duration) {
        if late > LATE && self.warned.is_none_or(|warned| warned.elapsed() > WARN_AGAIN) {
            self.warned = Some(Instant::now());
            warn!(
                "health checks begin {late:.1?} late, and what they find is told late: raise \
                 limits.health_checks, or the services' interval_ms"
            );
        }
    }
}

fn silence(target: &Target, timeout: Duration) -> String {
    let silence = format!("no answer within {} ms", timeout.as_millis());
    match target.health().check.probe {
        Probe::Tunnel(_) => format!(
            "{silence} by the tunnel: is its network there, is the VIP on the backend, and can it \
             answer this node?"
        ),
        _ => silence,
    }
}
