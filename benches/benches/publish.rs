//! What a packet costs while control publishes twenty snapshots a second, of ten thousand services with ten
//! backends each, beside what it costs while nothing changes. Windows of both take turns, so that a noisy
//! neighbour disturbs both alike; the ratio is what to track.
//!
//! A third kind of window has the snapshots built and not published: what differs then is the machine's, not
//! the packet path's. Snapshots are built by another thread, as control does, on another core if there is one. What that takes
//! from the worker in memory bandwidth and shared cache is included, and so is the first look at each
//! snapshot's memory. Handing one over is control's work, and not timed.
//!
//! ```text
//! cargo bench -p benches --no-default-features --bench publish
//! cargo bench -p benches --no-default-features --bench publish -- 200    so many pairs of windows
//! ```

use std::{
    collections::VecDeque,
    env,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use benches::{
    case::{BURSTS, Case},
    rig::Rig,
    rotation::{ROTATION, Rotate},
    snapshot,
};

const CASE: &str = "turn/established/1M";
const OTHERS: u32 = 9_990;
const EVERY: Duration = Duration::from_millis(50);
/// Changes of a window.
const CHANGES: u32 = 4;
/// Snapshots that control keeps: so many that the worker's side is done with older ones, and control, not
/// the worker's core, frees them.
const KEPT: usize = 4;
const GOAL: f64 = 1.05;

fn main() {
    let cores = benches::pin();
    // Cargo adds an argument of its own.
    let windows = env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(50);
    let case = Case::named(CASE).expect("it is one of them");
    let mut rig = Rig::new(&case);
    let build = move || Arc::new(snapshot::among(OTHERS, case.family, case.underlay));
    rig.publish(build());

    let (begin, begun) = mpsc::channel::<()>();
    let (built, snapshots) = mpsc::channel();
    let other = cores.first().copied();
    let control = thread::spawn(move || {
        other.map(core_affinity::set_for_current);
        let mut kept = VecDeque::new();
        while begun.recv().is_ok() {
            for change in 0..CHANGES {
                let start = Instant::now();
                let snapshot = build();
                let _ = built.send(snapshot.clone());
                kept.push_back(snapshot);
                if kept.len() > KEPT {
                    kept.pop_front();
                }
                if change + 1 < CHANGES {
                    thread::sleep(EVERY.saturating_sub(start.elapsed()));
                }
            }
        }
    });
    let [mut quiet, mut building, mut changing] = [const { Vec::new() }; 3];
    for _ in 0..windows {
        quiet.push(window(&mut rig, |_| ()));
        for (publish, figures) in [(false, &mut building), (true, &mut changing)] {
            begin.send(()).expect("control goes on");
            let mut taken = 0;
            let mut take = |rig: &mut Rig, snapshot| {
                taken += 1;
                if publish {
                    rig.publish(snapshot);
                }
            };
            figures.push(window(&mut rig, |rig| {
                if let Ok(snapshot) = snapshots.try_recv() {
                    take(rig, snapshot);
                }
            }));
            // The last may come late on a busy machine, but every window has had its changes.
            while taken < CHANGES {
                taken += 1;
                rig.publish(snapshots.recv().expect("control goes on"));
            }
        }
    }
    drop(begin);
    control.join().expect("control does not panic");
    let ratio = |to: &[f64]| median(changing.iter().zip(to).map(|(of, to)| of / to).collect());
    let (to_quiet, to_building) = (ratio(&quiet), ratio(&building));
    let verdict = if to_quiet <= GOAL { "reached" } else { "missed" };
    println!(
        "{CASE}, {} changes a second of {} services, medians of {windows} windows each:\n{:.1} ns a packet \
         while nothing changes, {:.1} ns while snapshots are built, {:.1} ns while they are published too\n\
         {to_quiet:.3} times that without changes (goal {GOAL}: {verdict}), {to_building:.3} times that beside \
         a control that only builds",
        1000 / EVERY.as_millis(),
        OTHERS + 1,
        median(quiet),
        median(building),
        median(changing),
    );
}

/// Nanoseconds a packet, for as long as so many changes take.
fn window(rig: &mut Rig, mut meanwhile: impl FnMut(&mut Rig)) -> f64 {
    let start = Instant::now();
    let (mut spent, mut rotations) = (Duration::ZERO, 0);
    while start.elapsed() < EVERY * CHANGES {
        meanwhile(rig);
        spent += rig.rotation(BURSTS[0]);
        rotations += 1;
    }
    spent.as_nanos() as f64 / (rotations * ROTATION) as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
