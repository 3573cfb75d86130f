//! Snapshots on their way from control to the workers: swap, acknowledge, retire.
//!
//! Control publishes whole snapshots. Each worker takes the newest once per burst, without a lock
//! or a contended cache line, and acknowledges it afterwards. Control keeps every snapshot until
//! all workers have acknowledged a newer one, and only then drops it: a worker never frees one
//! (I3), for that would stall it for as long as ten thousand tables take to free.
//!
//! It doesn't know what a snapshot is, and doesn't wait: control asks again later.

use std::collections::VecDeque;

use crossbeam::utils::CachePadded;

use crate::sync::{Arc, AtomicU64, Ordering};

/// How many snapshots had been published when this one was.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Generation(u64);

impl Generation {
    /// The number, for display.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// A snapshot and its place in the order of all.
#[derive(Debug)]
struct Version<T> {
    generation: Generation,
    snapshot: Arc<T>,
}

/// Where a worker writes what it has seen: the last generation, or [`GONE`]. Padded, since each has
/// another writer.
type Seen = CachePadded<AtomicU64>;

/// What a worker that is gone has seen: everything.
const GONE: u64 = u64::MAX;

/// Control's end.
///
/// Must outlive its subscribers' threads, or the last of them frees what is left.
#[derive(Debug)]
pub struct Publisher<T> {
    newest: swap::Swap<Version<T>>,
    /// All versions that a worker may still hold, oldest first, and the newest: while they are in
    /// here, nobody else drops the last reference.
    kept: VecDeque<Arc<Version<T>>>,
    workers: Vec<Arc<Seen>>,
}

impl<T> Publisher<T> {
    /// Starts with a first snapshot.
    pub fn new(snapshot: Arc<T>) -> Self {
        let version = Arc::new(Version { generation: Generation(1), snapshot });
        Self {
            newest: swap::Swap::new(Arc::clone(&version)),
            kept: VecDeque::from([version]),
            workers: Vec::new(),
        }
    }

    /// A worker's end, which begins with the newest snapshot.
    pub fn subscribe(&mut self) -> Subscriber<T> {
        let generation = self.newest().generation;
        let seen = Arc::new(CachePadded::new(AtomicU64::new(generation.0)));
        self.workers.push(Arc::clone(&seen));
        Subscriber { cache: self.newest.cache(), loaded: generation, seat: Seat(seen) }
    }

    /// Gives all workers a new snapshot, from their next burst on.
    pub fn publish(&mut self, snapshot: Arc<T>) -> Generation {
        let generation = Generation(self.newest().generation.0 + 1);
        let version = Arc::new(Version { generation, snapshot });
        // Kept first: from here on a worker may hold it.
        self.kept.push_back(Arc::clone(&version));
        self.newest.store(version);
        generation
    }

    /// The snapshot published last.
    pub fn current(&self) -> &Arc<T> {
        &self.newest().snapshot
    }

    /// The generation of the snapshot published last.
    pub fn generation(&self) -> Generation {
        self.newest().generation
    }

    /// Drops the snapshots that no worker can hold any more. Returns how many old ones are left, so
    /// that the caller knows whether to come back.
    pub fn retire(&mut self) -> usize {
        let slowest = self.slowest();
        self.workers.retain(|seen| seen.load(Ordering::Acquire) != GONE);
        while self.kept.len() > 1 && self.kept[0].generation.0 < slowest {
            self.kept.pop_front();
        }
        self.kept.len() - 1
    }

    /// Whether every worker has acknowledged this generation or a newer one: none will decide by an
    /// older one again.
    pub fn acknowledged(&self, generation: Generation) -> bool {
        self.slowest() >= generation.0
    }

    /// The oldest generation that a worker may hold.
    fn slowest(&self) -> u64 {
        // Acquire: what a worker did with a snapshot before it acknowledged the next, dropping its
        // reference included, has happened before control drops its own.
        self.workers.iter().map(|seen| seen.load(Ordering::Acquire)).min().unwrap_or(GONE)
    }

    fn newest(&self) -> &Version<T> {
        self.kept.back().expect("the newest version is always kept")
    }
}

/// A worker's end.
#[derive(Debug)]
pub struct Subscriber<T> {
    // Fields are dropped in this order: the snapshot is let go before the worker is said to be
    // gone.
    cache: swap::Cache<Version<T>>,
    loaded: Generation,
    seat: Seat,
}

impl<T> Subscriber<T> {
    /// Does what has to be done once, on the worker's own thread, before it must not allocate any
    /// more: arc-swap allocates a thread's bookkeeping when that thread first fetches something.
    pub fn prepare(&self) {
        self.cache.prepare();
    }

    /// The newest snapshot. A plain read if there is no newer one than last time.
    #[inline]
    pub fn load(&mut self) -> &T {
        let version = self.cache.load();
        self.loaded = version.generation;
        &version.snapshot
    }

    /// Tells control that nothing older than the snapshot loaded last is used here any more.
    #[inline]
    pub fn acknowledge(&self) {
        // Release: see `Publisher::slowest`. The line is this worker's own, so storing what is
        // already there costs less than asking.
        self.seat.0.store(self.loaded.0, Ordering::Release);
    }

    /// The generation of the snapshot loaded last.
    pub fn generation(&self) -> Generation {
        self.loaded
    }
}

/// A worker's place among those that control waits for; given up when dropped.
#[derive(Debug)]
struct Seat(Arc<Seen>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.store(GONE, Ordering::Release);
    }
}

/// A reference that one thread replaces and others follow: arc-swap's.
#[cfg(not(loom))]
mod swap {
    use std::sync::Arc;

    use arc_swap::ArcSwap;

    #[derive(Debug)]
    pub struct Swap<V>(Arc<ArcSwap<V>>);

    impl<V> Swap<V> {
        pub fn new(value: Arc<V>) -> Self {
            Self(Arc::new(ArcSwap::new(value)))
        }

        pub fn store(&self, value: Arc<V>) {
            self.0.store(value);
        }

        pub fn cache(&self) -> Cache<V> {
            Cache(arc_swap::Cache::new(Arc::clone(&self.0)))
        }
    }

    #[derive(Debug)]
    pub struct Cache<V>(arc_swap::Cache<Arc<ArcSwap<V>>, Arc<V>>);

    impl<V> Cache<V> {
        pub fn prepare(&self) {
            drop(self.0.arc_swap().load_full());
        }

        #[inline]
        pub fn load(&mut self) -> &Arc<V> {
            self.0.load()
        }
    }
}

/// The same with a mutex, since loom doesn't see into arc-swap.
#[cfg(loom)]
mod swap {
    use loom::sync::Mutex;

    use crate::sync::Arc;

    const UNPOISONED: &str = "no thread panics while it holds the lock";

    #[derive(Debug)]
    pub struct Swap<V>(Arc<Mutex<Arc<V>>>);

    impl<V> Swap<V> {
        pub fn new(value: Arc<V>) -> Self {
            Self(Arc::new(Mutex::new(value)))
        }

        pub fn store(&self, value: Arc<V>) {
            *self.0.lock().expect(UNPOISONED) = value;
        }

        pub fn cache(&self) -> Cache<V> {
            let cached = Arc::clone(&self.0.lock().expect(UNPOISONED));
            Cache { newest: Arc::clone(&self.0), cached }
        }
    }

    #[derive(Debug)]
    pub struct Cache<V> {
        newest: Arc<Mutex<Arc<V>>>,
        cached: Arc<V>,
    }

    impl<V> Cache<V> {
        pub fn prepare(&self) {}

        pub fn load(&mut self) -> &Arc<V> {
            let newest = self.newest.lock().expect(UNPOISONED);
            if !Arc::ptr_eq(&newest, &self.cached) {
                self.cached = Arc::clone(&newest);
            }
            &self.cached
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::{
        sync::atomic::AtomicBool,
        thread::{self, ThreadId},
    };

    use super::*;

    #[test]
    fn a_worker_sees_what_was_published_last() {
        let mut publisher = Publisher::new(Arc::new("a"));
        let mut worker = publisher.subscribe();
        assert_eq!(*worker.load(), "a");
        publisher.publish(Arc::new("b"));
        let last = publisher.publish(Arc::new("c"));
        assert_eq!(*worker.load(), "c");
        assert_eq!(worker.generation(), last);
        assert_eq!(**publisher.current(), "c");
        assert_eq!(*publisher.subscribe().load(), "c");
    }

    #[test]
    fn a_snapshot_is_kept_until_the_slowest_worker_has_acknowledged_a_newer_one() {
        let first = Arc::new(1);
        let held = || Arc::strong_count(&first) > 1;
        let mut publisher = Publisher::new(Arc::clone(&first));
        let (mut quick, mut slow) = (publisher.subscribe(), publisher.subscribe());

        let second = publisher.publish(Arc::new(2));
        quick.load();
        quick.acknowledge();
        slow.acknowledge(); // what it loaded last: the first
        assert!(!publisher.acknowledged(second));
        assert_eq!((publisher.retire(), held()), (1, true));

        slow.load(); // loaded, but its burst is not over
        assert!(!publisher.acknowledged(second));
        assert_eq!((publisher.retire(), held()), (1, true));

        slow.acknowledge();
        assert!(publisher.acknowledged(second));
        assert_eq!((publisher.retire(), held()), (0, false));
    }

    #[test]
    fn a_worker_that_is_gone_holds_nothing_back() {
        let mut publisher = Publisher::new(Arc::new(1));
        let worker = publisher.subscribe();
        let second = publisher.publish(Arc::new(2));
        assert!(!publisher.acknowledged(second));
        drop(worker);
        assert!(publisher.acknowledged(second));
        assert_eq!(publisher.retire(), 0);
    }

    #[test]
    fn a_worker_that_came_later_has_seen_what_was_newest_then() {
        let mut publisher = Publisher::new(Arc::new(1));
        let second = publisher.publish(Arc::new(2));
        let _late = publisher.subscribe();
        assert!(publisher.acknowledged(second));
        assert_eq!(publisher.retire(), 0);
    }

    /// Fails the test if another thread than its maker drops it.
    struct DroppedBy(ThreadId);

    impl Drop for DroppedBy {
        fn drop(&mut self) {
            assert_eq!(thread::current().id(), self.0);
        }
    }

    #[test]
    fn arc_swap_leaves_the_last_drop_to_control_too() {
        let snapshot = || Arc::new(DroppedBy(thread::current().id()));
        let mut publisher = Publisher::new(snapshot());
        let workers = [publisher.subscribe(), publisher.subscribe()];
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for mut worker in workers {
                let stop = &stop;
                scope.spawn(move || {
                    worker.prepare();
                    while !stop.load(Ordering::Relaxed) {
                        worker.load();
                        worker.acknowledge();
                    }
                });
            }
            for _ in 0..50_000 {
                publisher.publish(snapshot());
                publisher.retire();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(publisher.retire(), 0);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    // The tests' own notes are std's atomics, which loom runs in one order that all threads agree
    // on: it explores the orders of what is tested, not of these.
    use std::sync::{
        Arc as Shared,
        atomic::{AtomicBool, AtomicU64 as Note, Ordering::SeqCst},
    };

    use loom::thread::{self, ThreadId};

    use super::*;

    /// A snapshot that notes when it is freed, and fails the test if control didn't do it.
    struct Tracked {
        number: u64,
        control: ThreadId,
        last_freed: Shared<Note>,
    }

    impl Drop for Tracked {
        fn drop(&mut self) {
            assert_eq!(thread::current().id(), self.control, "a worker freed {}", self.number);
            self.last_freed.store(self.number, SeqCst);
        }
    }

    /// Makes snapshots, to be called by control.
    fn tracker() -> impl Fn(u64) -> Arc<Tracked> {
        let last_freed = Shared::new(Note::new(0));
        let control = thread::current().id();
        move |number| Arc::new(Tracked { number, control, last_freed: Shared::clone(&last_freed) })
    }

    /// What a worker does, with what must hold throughout.
    fn bursts(mut worker: Subscriber<Tracked>, count: usize) {
        let mut seen = 0;
        for _ in 0..count {
            let snapshot = worker.load();
            assert!(snapshot.number >= seen, "{} after {seen}", snapshot.number);
            seen = snapshot.number;
            thread::yield_now(); // the burst
            assert!(snapshot.last_freed.load(SeqCst) < seen, "{seen} was freed in use");
            worker.acknowledge();
        }
    }

    #[test]
    fn no_worker_goes_back_reads_what_is_freed_or_frees() {
        loom::model(|| {
            let snapshot = tracker();
            let mut publisher = Publisher::new(snapshot(1));
            let worker = publisher.subscribe();
            let worker = thread::spawn(move || bursts(worker, 3));
            for number in 2..=3 {
                publisher.publish(snapshot(number));
                publisher.retire();
            }
            worker.join().unwrap();
            assert_eq!(publisher.retire(), 0, "a worker that is gone holds nothing back");
        });
    }

    #[test]
    fn the_slower_of_two_workers_decides() {
        // All orders of three threads take longer than anyone waits; these, a second.
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let snapshot = tracker();
            let mut publisher = Publisher::new(snapshot(1));
            let workers = [publisher.subscribe(), publisher.subscribe()]
                .map(|worker| thread::spawn(move || bursts(worker, 1)));
            publisher.publish(snapshot(2));
            publisher.retire();
            workers.into_iter().for_each(|worker| worker.join().unwrap());
            assert_eq!(publisher.retire(), 0);
        });
    }

    #[test]
    fn what_all_have_acknowledged_can_be_withdrawn() {
        loom::model(|| {
            let mut publisher = Publisher::new(Arc::new(1));
            let mut worker = publisher.subscribe();
            let withdrawn = Shared::new(AtomicBool::new(false));
            let observed = Shared::clone(&withdrawn);
            let worker = thread::spawn(move || {
                for _ in 0..2 {
                    let needs_it = *worker.load() == 1;
                    thread::yield_now(); // the burst
                    assert!(!(needs_it && observed.load(SeqCst)), "withdrawn in use");
                    worker.acknowledge();
                }
            });
            let second = publisher.publish(Arc::new(2));
            if publisher.acknowledged(second) {
                withdrawn.store(true, SeqCst);
            }
            worker.join().unwrap();
            assert!(publisher.acknowledged(second));
        });
    }

    #[test]
    fn what_a_worker_did_before_it_acknowledged_has_happened_for_control() {
        // Stands for the references a worker drops: loom doesn't reorder those of its own `Arc`.
        loom::model(|| {
            let mut publisher = Publisher::new(Arc::new(1));
            let mut worker = publisher.subscribe();
            let done = Arc::new(AtomicU64::new(0));
            let doing = Arc::clone(&done);
            let worker = thread::spawn(move || {
                let number = *worker.load();
                doing.store(number, Ordering::Relaxed);
                worker.acknowledge();
                worker // kept alive: one that is gone has acknowledged everything
            });
            let second = publisher.publish(Arc::new(2));
            if publisher.acknowledged(second) {
                assert_eq!(done.load(Ordering::Relaxed), 2);
            }
            drop(worker.join().unwrap());
        });
    }
}
