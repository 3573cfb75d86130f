//! The connection table under attack and under change, one part in a thousand of what `--bench attack` runs.

use benches::{
    attack::{self, Flood, Scale},
    change::{self, Change},
};

#[test]
fn no_flood_moves_an_established_connection() {
    for flood in Flood::ALL {
        let scale = Scale::one_in(1000);
        let outcome = attack::run(flood, scale);
        assert_eq!(outcome.established.of, 1000);
        assert_eq!(outcome.established.changed, 0, "{flood:?}");
        // That is no wonder but for these.
        assert!(outcome.established.by_maglev > 10, "{:?}", outcome.established);
        assert!(outcome.newcomers.of > 50, "{:?}", outcome.newcomers);
        assert!(outcome.not_admitted + outcome.no_place > 90_000, "{outcome:?}");
        let newly = 12 * u64::from(scale.admissions_per_s);
        assert!(outcome.inserted > newly / 2, "{outcome:?}");
        assert!(outcome.live > scale.connections, "{outcome:?}");
    }
}

#[test]
fn with_room_in_the_table_only_a_removed_backends_connections_break() {
    for change in Change::ALL {
        let outcome = change::run(change, 1 << 12, 50);
        assert_eq!(outcome.broken, 0, "{change:?}");
        assert!(outcome.broken_by_maglev > 0, "{outcome:?}");
        assert_eq!(outcome.unavoidable > 0, change == Change::Removed);
    }
}
