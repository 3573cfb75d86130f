//! Sends 64-byte packets of many flows out of a veth interface, faster than anything can forward
//! them, until it is killed. What is in them is `xdp/generate.bpf.c`'s affair.
//!
//! The kernel runs that program on live frames (`BPF_PROG_RUN`) and hands them to the interface's
//! peer as a driver would: no socket buffers, no system call per burst. An AF_XDP sender would be
//! slower than the forwarders that it is to saturate.

use std::{error::Error, fs, net::Ipv4Addr, path::PathBuf};

use aya::{
    EbpfLoader, TestRun,
    programs::{ProgramError, TestRunAttrs, TestRunOptions, Xdp},
};
use clap::Parser;
use dataplane::wire::ethernet::MacAddr;

/// Frames that the kernel hands over at once; the most it takes is 256.
const BATCH: u32 = 64;
/// A run costs some 25 ms before its first frame and after its last, so it has to be long.
const FRAMES_PER_RUN: u32 = 1 << 30;
/// Without FCS.
const FRAME_LEN: usize = 60;
/// The kernel's `struct xdp_md`.
const CONTEXT_LEN: usize = 24;

/// Sends packets until it is killed.
#[derive(Parser)]
struct Arguments {
    /// The compiled `generate.bpf.c`
    program: PathBuf,
    /// The interface to send by
    interface: String,
    /// The station to send to
    station: MacAddr,
    /// The address to send to
    vip: Ipv4Addr,
    /// The port to send to, of UDP and TCP
    port: u16,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let net = format!("/sys/class/net/{}", arguments.interface);
    let index: u32 = fs::read_to_string(format!("{net}/ifindex"))?.trim().parse()?;
    let own: MacAddr = fs::read_to_string(format!("{net}/address"))?.trim().parse()?;

    let frame = template(&arguments, own);
    let mut ebpf = EbpfLoader::new()
        .override_global("template", &frame, true)
        .load_file(&arguments.program)?;
    let program: &mut Xdp =
        ebpf.program_mut("generate").ok_or("there is no such program in it")?.try_into()?;
    program.load()?;

    let context = context(index);
    loop {
        let run = program.test_run(TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&context),
            repeat: FRAMES_PER_RUN,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::new()
        });
        run.map_err(|error: ProgramError| format!("the kernel runs no live frames: {error}"))?;
    }
}

/// What all packets have in common: Ethernet, the constant part of IPv4, the port.
fn template(arguments: &Arguments, own: MacAddr) -> [u8; FRAME_LEN] {
    let mut frame = [0; FRAME_LEN];
    frame[..6].copy_from_slice(&arguments.station.0);
    frame[6..12].copy_from_slice(&own.0);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45; // version 4, no options
    frame[22] = 64; //   TTL
    frame[26..30].copy_from_slice(&[198, 18, 0, 0]); // for benchmarks, RFC 2544
    frame[30..34].copy_from_slice(&arguments.vip.octets());
    frame[36..38].copy_from_slice(&arguments.port.to_be_bytes());
    frame
}

/// A packet that came in by this interface, by which it will leave.
fn context(index: u32) -> [u8; CONTEXT_LEN] {
    let mut context = [0; CONTEXT_LEN];
    context[4..8].copy_from_slice(&(FRAME_LEN as u32).to_ne_bytes()); // data_end
    context[12..16].copy_from_slice(&index.to_ne_bytes()); //            ingress_ifindex
    context
}
