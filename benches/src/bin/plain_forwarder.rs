//! An AF_XDP forwarder that does no work, to compare Wiremesh with: same ports, settings and
//! steering and sleep, but a packet only gets other MAC addresses. Runs on the core that it was started
//! on, until it is killed. What Wiremesh costs beyond it is Wiremesh's own.

use std::{
    error::Error,
    fs,
    net::IpAddr,
    num::NonZeroU32,
    time::{Duration, Instant},
};

use clap::Parser;
use dataplane::{
    flow::{Address, protocol},
    port::{
        Frame, Frames, Port,
        xsk::{self, Queue, Rest, Settings},
    },
    steer::{DEFAULT_CAPACITY, Key, Mode, Steer},
    wire::ethernet::MacAddr,
};

/// One of each interface.
const QUEUES: NonZeroU32 = NonZeroU32::new(2).unwrap();

/// Forwards a VIP's packets between two interfaces, as they are.
#[derive(Parser)]
struct Arguments {
    /// The interface to receive from
    ingress: String,
    /// The interface to send by
    egress: String,
    /// The station to send to
    station: MacAddr,
    /// The address whose packets are forwarded
    vip: IpAddr,
    /// Their port, of UDP and TCP
    port: u16,
    /// UMEM chunks for each queue, as the daemon's setting of that name
    #[arg(long)]
    frames_per_queue: NonZeroU32,
    /// Places in each of a queue's rings, likewise
    #[arg(long)]
    ring_size: u32,
    /// Frames that one system call may send, likewise
    #[arg(long)]
    tx_budget: u32,
    /// How long it spins before it sleeps, likewise
    #[arg(long)]
    idle_spin_us: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let (ingress, egress) = (arguments.ingress.as_str(), arguments.egress.as_str());
    let own: MacAddr =
        fs::read_to_string(format!("/sys/class/net/{egress}/address"))?.trim().parse()?;
    let mut addresses = [0; 12];
    addresses[..6].copy_from_slice(&arguments.station.0);
    addresses[6..].copy_from_slice(&own.0);

    // A program on both, as the daemon has it: it changes how veth delivers.
    let mut steer = Steer::attach(ingress, Mode::Native, DEFAULT_CAPACITY)?;
    let _egress = Steer::attach(egress, Mode::Native, DEFAULT_CAPACITY)?;
    let ring = arguments.ring_size;
    let settings = Settings {
        frame_count: arguments.frames_per_queue.saturating_mul(QUEUES),
        rx_ring: ring,
        tx_ring: ring,
        fill_ring: ring,
        completion_ring: ring,
        tx_budget: arguments.tx_budget,
        ..Settings::default()
    };
    let (mut ports, mut pool, _reports) =
        xsk::open(&settings, &[Queue::here(ingress, 0), Queue::here(egress, 0)])?;
    steer.set_socket(0, ports[0].fd())?;
    for protocol in [protocol::TCP, protocol::UDP] {
        let address = Address::from(arguments.vip);
        steer.add_vip(Key::Port { address, protocol, port: arguments.port }, 0)?;
    }
    println!("ready");

    let mut burst = Frames::new();
    let spin = Duration::from_micros(arguments.idle_spin_us);
    let mut rest = Rest::new(spin, Instant::now());
    loop {
        let mut received = 0;
        // Every port has its turn, as with the daemon; only one ever receives something.
        for port in 0..ports.len() {
            ports[port].reclaim(&mut pool);
            ports[port].receive(&mut burst);
            ports[port].refill(&mut pool);
            if burst.is_empty() {
                continue;
            }
            received += burst.len();
            burst.iter().for_each(Frame::prefetch);
            // In their place, as the worker does where all leave by one port: moving them costs time, too.
            for frame in &mut burst {
                frame.packet_mut()[..12].copy_from_slice(&addresses);
            }
            ports[1].transmit(&mut burst);
            burst.drain(..).for_each(|frame| pool.put(frame));
        }
        let in_flight = || ports.iter().map(Port::in_flight).sum();
        if let Some(timeout_ms) = rest.after(received, in_flight, Instant::now()) {
            xsk::wait(&ports, None, timeout_ms)?;
        }
    }
}
