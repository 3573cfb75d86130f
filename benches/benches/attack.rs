//! The connection table under attack and under change: how many connections go to another backend than
//! their own, and what a packet costs in a flood. Takes some minutes; the figures are printed as tables.
//!
//! ```text
//! cargo bench -p benches --bench attack               a million connections, a hundred million tuples
//! cargo bench -p benches --bench attack -- 100        a hundredth of all that
//! ```

use std::env;

use benches::{
    attack::{self, Flood, Scale},
    change::{self, Change},
};

fn main() {
    benches::pin();
    // Cargo adds an argument of its own.
    let parts = env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(1);
    floods(Scale::one_in(parts));
    changes((1 << 20) / parts.next_power_of_two() as usize);
    at_risk(1_000_000 / parts);
}

fn share(part: u64, of: u64) -> String {
    format!("{part} ({:.2} %)", 100.0 * part as f64 / of as f64)
}

fn floods(scale: Scale) {
    println!("{scale:?}");
    println!(
        "\n{:<8}{:>13}{:>9}{:>19}{:>13}{:>18}{:>19}",
        "flood",
        "established",
        "changed",
        "by Maglev alone",
        "newcomers",
        "changed",
        "by Maglev alone"
    );
    let mut outcomes = Flood::ALL.map(|flood| (flood, attack::run(flood, scale)));
    for (flood, outcome) in &outcomes {
        let (old, new) = (outcome.established, outcome.newcomers);
        println!(
            "{:<8}{:>13}{:>9}{:>19}{:>13}{:>18}{:>19}",
            format!("{flood:?}"),
            old.of,
            old.changed,
            share(old.by_maglev, old.of),
            new.of,
            share(new.changed, new.of),
            share(new.by_maglev, new.of),
        );
    }
    println!(
        "\n{:<8}{:>10}{:>10}{:>10}{:>8}{:>13}{:>15}{:>13}{:>13}",
        "flood",
        "before",
        "between",
        "flood",
        "ratio",
        "remembered",
        "not admitted",
        "no place",
        "in use"
    );
    for (flood, outcome) in &mut outcomes {
        let [before, between, flooded] =
            [&mut outcome.before, &mut outcome.between, &mut outcome.flooded].map(|s| s.median());
        println!(
            "{:<8}{before:>7.1} ns{between:>7.1} ns{flooded:>7.1} ns{:>8.2}{:>13}{:>15}{:>13}{:>13}",
            format!("{flood:?}"),
            flooded / between,
            outcome.inserted,
            outcome.not_admitted,
            outcome.no_place,
            share(outcome.live, scale.capacity as u64),
        );
    }
}

fn changes(capacity: usize) {
    println!(
        "\n{:<6}{:<10}{:>12}{:>18}{:>18}{:>20}",
        "full", "backend", "connections", "unavoidable", "broken", "by Maglev alone"
    );
    for percent in [50, 80, 95, 120] {
        for change in Change::ALL {
            let outcome = change::run(change, capacity, percent);
            println!(
                "{:<6}{:<10}{:>12}{:>18}{:>18}{:>20}",
                format!("{percent} %"),
                format!("{change:?}"),
                outcome.connections,
                share(outcome.unavoidable, outcome.connections),
                share(outcome.broken, outcome.connections),
                share(outcome.broken_by_maglev, outcome.connections),
            );
        }
    }
}

fn at_risk(connections: u64) {
    println!(
        "\n{:<10}{:>18}{:>26}{:>26}",
        "horizon", "at risk", "broken though safe: add 1", "remove 1"
    );
    for horizon in [1, 5, 10, 50] {
        let found = change::at_risk(connections, horizon);
        println!(
            "{horizon:<10}{:>18}{:>26}{:>26}",
            share(found.remembered, connections),
            share(found.broken_by_adding, connections),
            share(found.broken_by_removing, connections),
        );
    }
}
