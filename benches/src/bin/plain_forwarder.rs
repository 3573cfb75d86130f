//! An AF_XDP forwarder that does no work, to compare Wiremesh with: same ports, settings and
//! steering, but a packet only gets other MAC addresses. Runs on the core that it was started on,
//! until it is killed. What Wiremesh costs beyond it is Wiremesh's own.

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
        Frame, Inbound, Outbound, Port,
        xsk::{self, Settings},
    },
    steer::{DEFAULT_CAPACITY, Key, Mode, Steer},
    wire::ethernet::MacAddr,
};

/// The daemon's defaults: frames of each queue, places of each ring, frames of one kick, spinning.
const FRAMES: u32 = 2 * 4096;
const RING: u32 = 2048;
const TX_BUDGET: u32 = 128;
const SPIN: Duration = Duration::from_micros(50);
const SLEEP_MS: i32 = 100;
const SLEEP_IN_FLIGHT_MS: i32 = 1;

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
    let settings = Settings {
        frame_count: NonZeroU32::new(FRAMES).ok_or("no frames")?,
        rx_ring: RING,
        tx_ring: RING,
        fill_ring: RING,
        completion_ring: RING,
        tx_budget: TX_BUDGET,
        ..Settings::default()
    };
    let (mut ports, mut pool, _reports) = xsk::open(&settings, &[(ingress, 0), (egress, 0)])?;
    steer.set_socket(0, ports[0].fd())?;
    for protocol in [protocol::TCP, protocol::UDP] {
        let address = Address::from(arguments.vip);
        steer.add_vip(Key { address, protocol, port: arguments.port }, 0)?;
    }
    println!("ready");

    let (mut inbound, mut outbound) = (Inbound::new(), Outbound::new());
    let mut busy = Instant::now();
    loop {
        let mut received = 0;
        // Every port has its turn, as with the daemon; only one ever receives something.
        for port in 0..ports.len() {
            ports[port].reclaim(&mut pool);
            ports[port].receive(&mut inbound);
            ports[port].refill(&mut pool);
            if inbound.is_empty() {
                continue;
            }
            received += inbound.len();
            inbound.iter().for_each(Frame::prefetch);
            for mut frame in inbound.drain(..) {
                frame.packet_mut()[..12].copy_from_slice(&addresses);
                outbound.push(frame);
            }
            ports[1].transmit(&mut outbound);
            outbound.drain(..).for_each(|frame| pool.put(frame));
        }
        if received > 0 {
            busy = Instant::now();
        } else if busy.elapsed() >= SPIN {
            let in_flight = ports.iter().any(|port| port.in_flight() > 0);
            xsk::wait(&ports, if in_flight { SLEEP_IN_FLIGHT_MS } else { SLEEP_MS })?;
        }
    }
}
