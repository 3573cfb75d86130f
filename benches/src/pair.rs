//! Two workers on two cores, alone and at the same time.

use std::{
    hint, process,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use core_affinity::CoreId;
use crossbeam::utils::CachePadded;

use crate::{case::BURSTS, report::Samples, rotation::Rotate};

/// Two of a kind, each with a core of its own.
pub struct Pair<T> {
    // On lines of their own, as a thread's stack is.
    workers: [CachePadded<T>; 2],
    cores: [CoreId; 2],
    /// What a rotation took each of them with the other core idle.
    pub alone: [Samples; 2],
    /// What it took them at the same time.
    pub together: [Samples; 2],
}

impl<T: Rotate + Send> Pair<T> {
    /// Not measured yet.
    pub fn new(workers: [T; 2], cores: [CoreId; 2]) -> Self {
        let workers = workers.map(CachePadded::new);
        Self { workers, cores, alone: Default::default(), together: Default::default() }
    }

    /// Measures so many rotations of each alone, then of both at the same time. Returns how long the latter
    /// took, in the mean of both.
    pub fn measure(&mut self, rotations: u64) -> Duration {
        let (workers, cores) = (&mut self.workers, &self.cores);
        for (one, samples) in self.alone.iter_mut().enumerate() {
            run(
                &mut workers[one..=one],
                &cores[one..=one],
                std::slice::from_mut(samples),
                rotations,
            );
        }
        run(workers, cores, &mut self.together, rotations) / 2
    }

    /// The rate of both together, as a share of twice what one reaches alone.
    pub fn scaling(&mut self) -> f64 {
        let rate = |samples: &mut [Samples; 2]| -> f64 {
            samples.iter_mut().map(|samples| 1.0 / samples.median()).sum()
        };
        rate(&mut self.together) / rate(&mut self.alone)
    }
}

/// One that waits for another would wait for ever if that panicked.
struct EndOnPanic;

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            process::abort();
        }
    }
}

/// Runs each on its core. What is timed of a rotation begins at the same time on all. Returns the sum of
/// that time.
fn run<T: Rotate + Send>(
    workers: &mut [CachePadded<T>],
    cores: &[CoreId],
    samples: &mut [Samples],
    rotations: u64,
) -> Duration {
    let (count, ready) = (workers.len(), &AtomicUsize::new(0));
    let timed = |worker: &mut T, samples: &mut Samples| {
        let _guard = EndOnPanic;
        let mut sum = Duration::ZERO;
        for rotation in 1..=rotations as usize {
            worker.refill();
            // Spinning: to be woken takes a good part of a rotation.
            ready.fetch_add(1, Ordering::AcqRel);
            while ready.load(Ordering::Acquire) < rotation * count {
                hint::spin_loop();
            }
            let spent = worker.handle(BURSTS[0]);
            samples.add(spent);
            sum += spent;
        }
        sum
    };
    thread::scope(|scope| {
        let threads: Vec<_> = workers
            .iter_mut()
            .zip(samples)
            .zip(cores)
            .map(|((worker, samples), core)| {
                scope.spawn(move || {
                    core_affinity::set_for_current(*core);
                    timed(worker, samples)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a worker does not panic")).sum()
    })
}
