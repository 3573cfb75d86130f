//! Golden captures: each folder of `golden/` is a configuration, a capture, and what the packet path
//! makes of it: frames byte for byte, and all counters, those that stayed zero included.
//!
//! `golden/generate.py` writes the inputs, `WIREMESH_BLESS=1` the expected output, and
//! `golden/verify.py` judges that output without knowing our code: by what each frame of the input
//! should become, with checksums computed by scapy and by tshark.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use control::{config, replay};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn cases() -> Vec<PathBuf> {
    let entries = fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<_> = entries.filter(|path| path.join("config.toml").exists()).collect();
    cases.sort();
    cases
}

/// Replays a case: the frames as they leave, and the counters as text.
fn outcome(case: &Path, folder: &Path) -> (Vec<u8>, String) {
    let (config, _) = config::load(&case.join("config.toml")).unwrap();
    let input = ["in.pcap", "in.pcapng"].map(|name| case.join(name));
    let input = input.iter().find(|path| path.exists()).expect("a case has an input");
    let output = folder.join("out.pcap");
    let outcome = replay::replay(&config, input, &output).unwrap();
    let drops = outcome.drops.iter().map(|(label, drops)| (label.as_str(), drops.count));
    let share = |share: &replay::Share| {
        let name = format!("{}/{}", share.service, share.backend);
        (name, serde_json::json!({ "packets": share.packets, "bytes": share.bytes }))
    };
    let counters = serde_json::json!({
        "packets_in": outcome.packets_in,
        "packets_out": outcome.packets_out,
        "too_long": outcome.too_long,
        "backends": outcome.backends.iter().map(share).collect::<BTreeMap<_, _>>(),
        "events": outcome.counters,
        "drops": drops.collect::<BTreeMap<_, _>>(),
    });
    (fs::read(output).unwrap(), format!("{counters:#}\n"))
}

#[test]
fn every_capture_leaves_as_expected_with_all_counters() {
    let folder = tempfile::tempdir().unwrap();
    let mut differing = Vec::new();
    for case in cases() {
        let (frames, counters) = outcome(&case, folder.path());
        if env::var_os("WIREMESH_BLESS").is_some() {
            fs::write(case.join("out.pcap"), &frames).unwrap();
            fs::write(case.join("counters.json"), &counters).unwrap();
        }
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        if fs::read(case.join("out.pcap")).unwrap_or_default() != frames {
            differing.push(format!("{name}: other frames than in out.pcap"));
        }
        let expected = fs::read_to_string(case.join("counters.json")).unwrap_or_default();
        for (line, was) in counters.lines().zip(expected.lines().chain(std::iter::repeat(""))) {
            if line != was {
                differing.push(format!("{name}: {} instead of {}", line.trim(), was.trim()));
            }
        }
    }
    assert!(differing.is_empty(), "{}\nWIREMESH_BLESS=1 accepts this", differing.join("\n"));
}

#[test]
fn no_case_was_lost() {
    assert!(cases().len() >= 40, "only {} golden captures", cases().len());
}

#[test]
fn the_expected_captures_are_right_by_the_judgement_of_scapy_and_tshark() {
    let has_scapy = |python: &&str| {
        let mut command = Command::new(python);
        command.args(["-c", "import scapy, tomllib"]).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    // Debian's scapy belongs to Debian's Python, which need not be the first in PATH.
    let python = ["python3", "/usr/bin/python3"].into_iter().find(has_scapy);
    let python = python.expect("python3-scapy is missing: run scripts/deps --lab");
    let verify = Command::new(python).arg("-B").arg(golden().join("verify.py")).output().unwrap();
    let said = String::from_utf8_lossy(&verify.stdout);
    assert!(verify.status.success(), "{said}{}", String::from_utf8_lossy(&verify.stderr));
}
