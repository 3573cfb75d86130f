//! `wiremesh replay`: the workers' own packet path over a capture, on in-memory ports, by the capture's
//! own clock.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::File,
    io::{self, BufWriter, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use dataplane::{
    counters::{Counters, Event},
    flow::HashKey,
    memory::AllocationError,
    port::sim::{self, SimPort},
    publish::Publisher,
    time::Tick,
    worker::{Parts, Worker},
};
use pcap_file::{
    DataLink, Endianness, PcapError, TsResolution,
    pcap::{PcapHeader, PcapPacket, PcapWriter},
};
use serde::Serialize;

use crate::{
    capture::{self, CaptureError, End, Record},
    config::Config,
    desired::{Backend, Service},
    offline::Offline,
    plan::{Placement, Placements, PlanError},
    status::{Drops, drops, events, write_counts, write_drops, write_table},
    view::placed_backends,
};

/// Frames of the in-memory port: one packet's fragments, and some in the rings.
const FRAMES: usize = 256;
const RING: usize = 64;
/// Room for any packet a capture may hold.
const CHUNK_BYTES: usize = u16::MAX as usize;

/// Why a capture can't be replayed.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum ReplayError {
    /// Reading.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Capture(#[from] CaptureError),
    /// Writing.
    #[error("cannot write {path}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The configuration can't be.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// No memory.
    #[error(transparent)]
    Connections(#[from] AllocationError),
    /// It would overwrite what it reads.
    #[error("{0} is both input and output: give another file to write to")]
    SameFile(PathBuf),
}

/// What happened to the packets of a capture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// Packets in the capture.
    pub packets_in: u64,
    /// Packets written.
    pub packets_out: u64,
    /// Packets too long for any frame.
    pub too_long: u64,
    /// Packets of which the capture holds only the beginning.
    pub incomplete: u64,
    /// Whether the capture stops in the middle of a packet.
    pub cut_off: bool,
    /// VTEPs whose next hops are not known here.
    pub unknown_next_hops: BTreeSet<IpAddr>,
    /// What each backend got, in order of services and backends.
    pub backends: Vec<Share>,
    /// What the worker counted, drops excepted.
    pub counters: BTreeMap<String, u64>,
    /// Drops by reason.
    pub drops: BTreeMap<String, Drops>,
}

/// What one backend got.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Share {
    /// Its service.
    pub service: String,
    /// Its name.
    pub backend: String,
    /// The node that runs it.
    pub vtep: IpAddr,
    /// Packets forwarded to it.
    pub packets: u64,
    /// Bytes forwarded to it, outer headers included.
    pub bytes: u64,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dropped: u64 = self.drops.values().map(|drops| drops.count).sum();
        writeln!(f, "{} packets in, {} out, {dropped} dropped", self.packets_in, self.packets_out)?;
        self.write_notes(f)?;
        writeln!(f)?;
        let row = |share: &Share| {
            let Share { service, backend, vtep, packets, bytes } = share;
            let (vtep, packets, bytes) = (vtep.to_string(), packets.to_string(), bytes.to_string());
            [service.clone(), backend.clone(), vtep, packets, bytes]
        };
        let rows: Vec<_> = self.backends.iter().map(row).collect();
        write_table(f, &["SERVICE", "BACKEND", "VTEP", "PACKETS", "BYTES"], &rows)?;
        writeln!(f)?;
        let counted = Event::ALL.iter().map(|event| {
            let count = self.counters.get(event.label()).copied().unwrap_or_default();
            (event.label(), count, event.sentence())
        });
        write_counts(f, "counters", counted)?;
        writeln!(f)?;
        write_drops(f, &self.drops)
    }
}

impl Outcome {
    /// What an operator should know before believing the numbers.
    fn write_notes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { too_long, incomplete, unknown_next_hops, .. } = self;
        if *too_long > 0 {
            writeln!(f, "note: packets too long for any frame, and left out: {too_long}")?;
        }
        if *incomplete > 0 {
            writeln!(
                f,
                "note: packets that the capture holds only the beginning of: {incomplete}; \
                 capture with `tcpdump -s 0`"
            )?;
        }
        if self.cut_off {
            writeln!(
                f,
                "note: the capture stops in the middle of a packet; all before it was replayed"
            )?;
        }
        if !unknown_next_hops.is_empty() {
            let vteps: Vec<_> = unknown_next_hops.iter().map(IpAddr::to_string).collect();
            writeln!(
                f,
                "note: outer MAC addresses are zero where no [[next_hop]] tells them: {}",
                vteps.join(", ")
            )?;
        }
        Ok(())
    }
}

/// Replays `input` and writes what would leave to `output`.
///
/// # Errors
/// If a file can't be read or written, or the configuration can't be forwarded by.
pub fn replay(config: &Config, input: &Path, output: &Path) -> Result<Outcome, ReplayError> {
    if let (Ok(input), Ok(output)) = (input.canonicalize(), output.canonicalize())
        && input == output
    {
        return Err(ReplayError::SameFile(input));
    }
    let write = |source| ReplayError::Write { path: output.to_owned(), source };
    let mut rig = Rig::new(config)?;
    // Created once the input has proved readable, so that a typo leaves no empty file behind.
    let mut writer = None;
    let end = capture::read(input, |record| {
        let writer = match &mut writer {
            Some(writer) => writer,
            none => none.insert(create(output).map_err(write)?),
        };
        rig.pass(&record, writer).map_err(write)
    })?;
    let writer = match writer {
        Some(writer) => writer,
        None => create(output).map_err(write)?,
    };
    writer.into_writer().flush().map_err(write)?;
    Ok(rig.outcome(config, end))
}

fn create(path: &Path) -> io::Result<PcapWriter<BufWriter<File>>> {
    let header = PcapHeader {
        datalink: DataLink::ETHERNET,
        ts_resolution: TsResolution::NanoSecond,
        endianness: Endianness::Little, // the same file, whatever the machine
        ..PcapHeader::default()
    };
    PcapWriter::with_header(BufWriter::new(File::create(path)?), header).map_err(io_error)
}

fn io_error(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}

/// One worker on in-memory ports.
struct Rig {
    worker: Worker<SimPort>,
    counters: Arc<Counters>,
    names: Vec<String>,
    placements: Placements,
    /// Time of the first packet.
    start: Option<Duration>,
    now: Tick,
    packets_in: u64,
    packets_out: u64,
    too_long: u64,
    incomplete: u64,
    /// Kept until the worker is gone: control frees snapshots.
    _publisher: Publisher<dataplane::forwarding::Forwarding>,
}

impl Rig {
    fn new(config: &Config) -> Result<Self, ReplayError> {
        let nat = Arc::new(config.nat.slots()?);
        let offline = Offline::new(config, Some(&nat))?;
        let mut publisher = Publisher::new(offline.forwarding);
        let counters = Arc::new(Counters::new(config.limits.backends as usize));
        let ports = offline.interfaces.len();
        let mut worker = Worker::new(Parts {
            ports: (0..ports).map(|_| SimPort::new(FRAMES * ports, RING)).collect(),
            links: (0..ports).collect(),
            pool: sim::pool(FRAMES * ports, CHUNK_BYTES),
            connections: config.connections.table()?,
            peers: Vec::new(),
            published: publisher.subscribe(),
            counters: counters.clone(),
            // Replayed twice, the same packets must leave.
            hash_key: HashKey::from_seed("replay"),
            icmp_errors_per_s: config.dataplane.icmp_errors_per_s,
            id: 0,
            nat: Some(nat),
        });
        worker.turn(Tick(0)); // fills the fill rings
        Ok(Self {
            worker,
            counters,
            names: offline.interfaces.into_iter().map(|interface| interface.name).collect(),
            placements: offline.placements,
            start: None,
            now: Tick(0),
            packets_in: 0,
            packets_out: 0,
            too_long: 0,
            incomplete: 0,
            _publisher: publisher,
        })
    }

    /// One packet in, and whatever leaves for it out.
    fn pass<W: Write>(&mut self, record: &Record, writer: &mut PcapWriter<W>) -> io::Result<()> {
        self.packets_in += 1;
        self.incomplete += u64::from(record.data.len() < record.original_len);
        let since_start = record.time.saturating_sub(*self.start.get_or_insert(record.time));
        // A capture of several queues may go back a little; the workers' clock never does. It starts
        // late enough for the rate limit of ICMP errors to have filled.
        self.now = self.now.max(Tick::from_s(1) + since_start.as_millis() as u64);
        let named = |name: &String| self.names.iter().position(|own| own == name);
        let port = record.interface.as_ref().and_then(named).unwrap_or(0);
        if !self.worker.ports_mut()[port].deliver(&record.data) {
            self.too_long += 1;
            return Ok(());
        }
        self.worker.turn(self.now);
        for port in self.worker.ports_mut() {
            while let Some(data) = port.take_sent(<[u8]>::to_vec) {
                self.packets_out += 1;
                let packet = PcapPacket {
                    timestamp: record.time,
                    orig_len: data.len() as u32,
                    data: Cow::Owned(data),
                };
                writer.write_packet(&packet).map_err(io_error)?;
            }
        }
        Ok(())
    }

    fn outcome(&self, config: &Config, end: End) -> Outcome {
        let all = placed_backends(&config.desired, &self.placements);
        let share = |(service, backend, placement): (&Service, &Backend, &Placement)| {
            let (packets, bytes) = self.counters.backend(placement.slot as usize);
            let (service, vtep) = (service.name.clone(), backend.vtep);
            Share { service, backend: backend.name.clone(), vtep, packets, bytes }
        };
        let shares: Vec<Share> = all.map(share).collect();
        let known = |vtep: &IpAddr| config.next_hops.iter().any(|hop| hop.vtep == *vtep);
        let used = shares.iter().filter(|share| share.packets > 0).map(|share| share.vtep);
        Outcome {
            packets_in: self.packets_in,
            packets_out: self.packets_out,
            too_long: self.too_long,
            incomplete: self.incomplete,
            cut_off: end == End::CutOff,
            unknown_next_hops: used.filter(|vtep| !known(vtep)).collect(),
            backends: shares,
            counters: events(&self.counters),
            drops: drops(std::iter::once(&*self.counters)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const CONFIG: &str = r#"
        node.interfaces = ["absent0"]
        node.vtep = "10.0.0.1"

        [[service]]
        name = "web"
        vip = "203.0.113.10"
        ports = ["80/tcp"]
        vni = 100
        backend = [{ name = "web-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02" }]
    "#;

    /// A folder with a capture of these packets, each with its time and original length.
    fn folder(packets: &[(Duration, usize, Vec<u8>)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut writer =
            PcapWriter::new(File::create(folder.path().join("in.pcap")).unwrap()).unwrap();
        for (timestamp, orig_len, data) in packets {
            let (timestamp, orig_len) = (*timestamp, *orig_len as u32);
            writer.write_packet(&PcapPacket { timestamp, orig_len, data: data.into() }).unwrap();
        }
        folder
    }

    /// A SYN to the VIP, and that many bytes.
    fn syn(payload: usize) -> Vec<u8> {
        let mut packet = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([198, 51, 100, 7], [203, 0, 113, 10], 64)
            .tcp(40000, 80, 1, 1024)
            .syn()
            .write(&mut packet, &vec![0; payload])
            .unwrap();
        packet
    }

    fn config() -> Config {
        Config::parse("test", CONFIG).unwrap().0
    }

    fn run(folder: &tempfile::TempDir) -> Result<Outcome, ReplayError> {
        let at = |name| folder.path().join(name);
        replay(&config(), &at("in.pcap"), &at("out.pcap"))
    }

    #[test]
    fn the_output_is_never_the_input() {
        let folder = folder(&[]);
        let input = folder.path().join("in.pcap");
        std::os::unix::fs::symlink(&input, folder.path().join("out.pcap")).unwrap();
        let before = fs::read(&input).unwrap();
        assert!(matches!(run(&folder), Err(ReplayError::SameFile(_))));
        assert_eq!(fs::read(&input).unwrap(), before);
    }

    #[test]
    fn an_input_that_cannot_be_read_leaves_no_output() {
        let folder = folder(&[]);
        for wrong in ["missing", "text"] {
            let (input, output) = (folder.path().join(wrong), folder.path().join("out.pcap"));
            if wrong == "text" {
                fs::write(&input, "no capture").unwrap();
            }
            replay(&config(), &input, &output).unwrap_err();
            assert!(!output.exists(), "{wrong}");
        }
    }

    #[test]
    fn an_empty_capture_gives_an_empty_one() {
        let folder = folder(&[]);
        let outcome = run(&folder).unwrap();
        assert_eq!((outcome.packets_in, outcome.packets_out), (0, 0));
        let count = |_| -> Result<(), CaptureError> { panic!("no packet") };
        assert_eq!(capture::read(&folder.path().join("out.pcap"), count).unwrap(), End::Whole);
    }

    #[test]
    fn what_limits_the_result_is_said() {
        let incomplete = (Duration::ZERO, 1514, syn(0));
        let too_long = (Duration::ZERO, 65_300, vec![0; 65_300]);
        let outcome = run(&folder(&[incomplete, too_long])).unwrap();
        assert_eq!((outcome.incomplete, outcome.too_long), (1, 1));
        let text = outcome.to_string();
        for note in [
            "2 packets in, 1 out, 0 dropped\n",
            "note: packets too long for any frame, and left out: 1\n",
            "note: packets that the capture holds only the beginning of: 1; capture with `tcpdump -s 0`\n",
            "note: outer MAC addresses are zero where no [[next_hop]] tells them: 10.0.0.2\n",
        ] {
            assert!(text.contains(note), "{text}");
        }
    }

    #[test]
    fn a_capture_at_the_epoch_gets_its_icmp_errors_too() {
        let mut packet = syn(1480);
        packet[20] = 0x40; // don't fragment
        let outcome = run(&folder(&[(Duration::ZERO, packet.len(), packet)])).unwrap();
        assert_eq!(outcome.counters["too_big_sent"], 1, "{outcome}");
    }

    #[test]
    fn times_that_go_back_are_taken_for_now() {
        let packets = [5, 3, 9].map(|s| (Duration::from_secs(s), 54, syn(0)));
        assert_eq!(run(&folder(&packets)).unwrap().packets_out, 3);
    }

    #[test]
    fn an_outcome_is_printed_with_a_sentence_for_each_count() {
        let other = Duration::from_secs(1);
        let mut closed = syn(0);
        closed[37] = 81; // another port
        let packets = [(other, 54, syn(0)), (other, 54, closed)];
        assert_eq!(run(&folder(&packets)).unwrap().to_string(), SNAPSHOT);
    }

    const SNAPSHOT: &str = "\
2 packets in, 1 out, 1 dropped
note: outer MAC addresses are zero where no [[next_hop]] tells them: 10.0.0.2

  SERVICE  BACKEND  VTEP      PACKETS  BYTES
  web      web-1    10.0.0.2        1    104

counters:
  rx_packets            2  Packets received.
  rx_bytes            108  Bytes received, Ethernet header included.
  tx_packets            1  Packets handed to a tx ring.
  tx_bytes            104  Bytes handed to a tx ring, Ethernet header included.
  connection_misses     1  Packets whose backend Maglev chose.
  connection_inserts    1  Connections remembered.

drops:
  no_service  1  No service is configured for the destination address, protocol and port.
";
}
