//! Figures held against their floors and goals, printed when all are known.

use std::{
    fmt,
    hint::black_box,
    time::{Duration, Instant},
};

use crate::{
    case::{Case, Flows, Goal},
    memory::Resident,
    rotation::ROTATION,
};

/// Nanoseconds per packet, of each rotation.
#[derive(Default, Debug)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a rotation.
    pub fn add(&mut self, spent: Duration) {
        self.add_packets(spent, ROTATION);
    }

    /// Adds so many packets; nothing if there are none.
    pub fn add_packets(&mut self, spent: Duration, packets: usize) {
        if packets > 0 {
            self.0.push(spent.as_nanos() as f64 / packets as f64);
        }
    }

    /// The middle one: on a shared machine the mean says more about the neighbours. Not a number if there
    /// is none.
    pub fn median(&mut self) -> f64 {
        self.0.sort_by(f64::total_cmp);
        self.0.get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// A turn and its floor, measured by turns.
#[derive(Default, Debug)]
pub struct Measured {
    /// The whole turn.
    pub turn: Samples,
    /// Memory alone.
    pub floor: Samples,
}

/// A case's figures.
#[derive(Debug)]
pub struct Line {
    /// The case.
    pub case: Case,
    /// In full bursts, and one by one: as [`crate::case::BURSTS`].
    pub bursts: [Measured; 2],
    /// The share of packets whose connection was remembered.
    pub hit_share: f64,
    /// The connection table's size in bytes.
    pub table_bytes: usize,
    /// What the connection table lies on.
    pub table: Resident,
    /// What the frames lie on.
    pub frames: Resident,
}

/// How two workers on two cores scale.
#[derive(Debug)]
pub struct Scaling {
    /// The name of the case that each of them has.
    pub name: &'static str,
    /// The rate of both, as a share of twice one's.
    pub turn: f64,
    /// The same of their floors.
    pub floor: f64,
}

/// The share of the floors' scaling that workers have to reach.
const SCALING_GOAL: f64 = 0.95;

/// The most memory that ten million connections may take.
pub const MEMORY_GOAL_BYTES: u64 = 256_000_000;

/// Ten million.
const MANY: u64 = 10_000_000;

/// Whether a goal was reached.
struct Verdict(bool);

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(if self.0 { "reached" } else { "MISSED" })
    }
}

/// Prints each case's nanoseconds per packet beside its floor's and its goal, and what else there is a goal
/// for.
pub fn print(lines: &mut [Line], scalings: &[Scaling]) {
    println!(
        "\n{:<22}{:>7}{:>7}{:>7}{:>8}  {:<9}{:>8}{:>8}{:>7}   {:<12}frames on",
        "ns/packet, medians",
        "turn",
        "floor",
        "ratio",
        "goal",
        "",
        "burst 1",
        "floor",
        "ratio",
        "table on",
    );
    let in_bursts: Vec<_> =
        lines.iter_mut().map(|line| (line.case.name, line.bursts[0].turn.median())).collect();
    let of = |name: &str| {
        let other = in_bursts.iter().find(|(case, ns)| *case == name && !ns.is_nan());
        other.map(|(_, ns)| *ns)
    };
    for Line { case, bursts, table, frames, .. } in &mut *lines {
        let [(turn, floor), (turn_1, floor_1)] =
            bursts.each_mut().map(|burst| (burst.turn.median(), burst.floor.median()));
        let most = match case.goal {
            Some(Goal::Ns(most)) => Some(most),
            Some(Goal::Times(times, name)) => of(name).map(|ns| times * ns),
            None => None,
        };
        let goal = most.map(|most| format!("≤ {most:.1}")).unwrap_or_default();
        // What was not asked for is neither reached nor missed.
        let verdict = most.filter(|_| !turn.is_nan()).map(|most| Verdict(turn <= most).to_string());
        let verdict = verdict.unwrap_or_default();
        println!(
            "{:<22}{:>7}{:>7}{:>7}{goal:>8}  {verdict:<9}{:>8}{:>8}{:>7}   {table:<12}{frames}",
            case.name,
            cell(turn, 1),
            cell(floor, 1),
            cell(turn / floor, 2),
            cell(turn_1, 1),
            cell(floor_1, 1),
            cell(turn_1 / floor_1, 2),
        );
    }
    println!();
    for line in lines {
        print_ratio(line, of);
        print_memory(line);
    }
    for Scaling { name, turn, floor } in scalings {
        let ratio = turn / floor;
        println!(
            "two workers, {name} each: {turn:.3} of twice one's rate, floors {floor:.3}: {ratio:.3} (goal \
             ≥ {SCALING_GOAL}: {})",
            Verdict(ratio >= SCALING_GOAL)
        );
    }
    println!("allocations: 0 (counted in every turn of every case but two workers')");
    println!("included once per turn: one reading of the clock, {:.1} ns", clock_ns());
}

/// A figure, if it was measured.
fn cell(value: f64, digits: usize) -> String {
    if value.is_nan() { "-".into() } else { format!("{value:.digits$}") }
}

/// What a case costs beside the one that its goal names.
fn print_ratio(line: &mut Line, of: impl Fn(&str) -> Option<f64>) {
    if let Some(Goal::Times(times, name)) = line.case.goal
        && let Some(other) = of(name)
        && let ratio = line.bursts[0].turn.median() / other
        && !ratio.is_nan()
    {
        println!(
            "{}: {ratio:.2} times {name} (goal ≤ {times}: {})",
            line.case.name,
            Verdict(ratio <= times)
        );
    }
}

/// What many connections take.
fn print_memory(line: &Line) {
    if line.case.flows == Flows::Established(MANY) {
        let bytes = line.table.bytes.max(line.table_bytes as u64);
        println!(
            "memory for {MANY} connections: table {:.1} MB, {:.1} bytes each, resident {:.1} MB (goal ≤ {:.0} \
             MB: {}); {:.2} % of them remembered",
            line.table_bytes as f64 / 1e6,
            line.table_bytes as f64 / MANY as f64,
            line.table.bytes as f64 / 1e6,
            MEMORY_GOAL_BYTES as f64 / 1e6,
            Verdict(bytes <= MEMORY_GOAL_BYTES),
            100.0 * line.hit_share,
        );
    }
}

/// What one reading of the clock takes.
fn clock_ns() -> f64 {
    const READINGS: u32 = 1 << 20;
    let start = Instant::now();
    for _ in 0..READINGS {
        black_box(Instant::now());
    }
    start.elapsed().as_nanos() as f64 / f64::from(READINGS)
}
