//! Compiles the XDP program into the library, so that a daemon is one file.
//!
//! The program declares the few kernel types it needs itself: only clang is required, and the
//! result is the same on every machine.

use std::{env, io, path::Path, process::Command};

const SOURCE: &str = "xdp/steer.bpf.c";

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-env-changed=CLANG");
    if env::var_os("CARGO_FEATURE_XDP").is_some()
        && let Err(why) = compile()
    {
        println!("cargo::error={why}");
    }
}

fn compile() -> Result<(), String> {
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".into());
    let out = env::var("OUT_DIR").map_err(|_| "cargo sets OUT_DIR")?;
    let status = Command::new(&clang)
        // The loader learns the maps' shapes from BTF, which -g produces.
        .args(["-O2", "-g", "-target", "bpf", "-Wall", "-Wextra", "-Werror", "-c", SOURCE, "-o"])
        .arg(Path::new(&out).join("steer.o"))
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            Err(format!("{clang} can't compile {SOURCE} ({status}): see its message above"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!(
            "{clang} is needed to compile {SOURCE}: install it (Debian, Ubuntu: apt install \
             clang), or build without the feature `xdp`"
        )),
        Err(error) => Err(format!("{clang} can't be run: {error}")),
    }
}
