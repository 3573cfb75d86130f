//! Runs one case of the turn benchmark for so many rotations, for profilers to look at.
//!
//! ```text
//! turns turn/established/1M 1000
//! valgrind --tool=callgrind --toggle-collect='*Rig::turn*' turns turn/established/64Ki 4
//! ```

use std::{env, time::Duration};

use benches::{
    case::Case,
    rig::{ROTATION, Rig},
};

fn main() {
    let mut args = env::args().skip(1);
    let name = args.next();
    let case = Case::all().into_iter().find(|case| Some(case.name) == name.as_deref());
    let rotations = args.next().map_or(Some(100), |arg| arg.parse().ok());
    let (Some(case), Some(rotations)) = (case, rotations) else {
        eprintln!("usage: turns CASE [ROTATIONS]");
        for case in Case::all() {
            eprintln!("  {}", case.name);
        }
        std::process::exit(2);
    };
    benches::pin();
    let mut rig = Rig::new(&case);
    let spent: Duration = (0..rotations).map(|_| rig.rotation()).sum();
    let packets = rotations as f64 * ROTATION as f64;
    println!(
        "{}: {:.1} ns/packet, on {:?}",
        case.name,
        spent.as_nanos() as f64 / packets,
        rig.pages
    );
}
