//! Reading captures: pcap and pcapng alike, as packets with their time and interface.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek},
    path::{Path, PathBuf},
    time::Duration,
};

use pcap_file::{
    DataLink, PcapError, TsResolution,
    pcap::PcapReader,
    pcapng::{
        Block, PcapNgReader,
        blocks::interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
    },
};

/// The first bytes of a pcapng file: its section header's type.
const PCAPNG: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// The first bytes of a pcap file: of microseconds or nanoseconds, of either byte order.
const PCAP: [[u8; 4]; 4] = [
    [0xa1, 0xb2, 0xc3, 0xd4],
    [0xd4, 0xc3, 0xb2, 0xa1],
    [0xa1, 0xb2, 0x3c, 0x4d],
    [0x4d, 0x3c, 0xb2, 0xa1],
];

/// Why a capture can't be read.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum CaptureError {
    /// The file.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else.
    #[error("{path} is no capture: it is neither pcap nor pcapng")]
    #[diagnostic(help("a compressed capture has to be unpacked first"))]
    NoCapture {
        /// Which.
        path: PathBuf,
    },
    /// Its contents.
    #[error("{path} is damaged behind its first {packets} packets")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How many could be read.
        packets: u64,
        /// Why.
        source: PcapError,
    },
    /// Not of Ethernet.
    #[error("{path} holds {link:?} frames, and only Ethernet is understood")]
    #[diagnostic(help("capture on one interface, as in `tcpdump -i eth0`, not on `any`"))]
    Link {
        /// Which.
        path: PathBuf,
        /// On what.
        link: DataLink,
    },
}

/// A captured packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// When, since 1970.
    pub time: Duration,
    /// Where, if the capture says.
    pub interface: Option<String>,
    /// Its bytes, as far as they were captured.
    pub data: Vec<u8>,
    /// How many there were.
    pub original_len: usize,
}

/// How a capture ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As it should.
    Whole,
    /// In the middle of a packet, as one does whose writer was killed.
    CutOff,
}

/// Calls `each` with every packet of a capture.
///
/// # Errors
/// If it can't be read, is not of Ethernet, or `each` fails.
pub fn read<E: From<CaptureError>>(
    path: &Path,
    each: impl FnMut(Record) -> Result<(), E>,
) -> Result<End, E> {
    let failed = |source| CaptureError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut magic = [0; 4];
    match file.read_exact(&mut magic) {
        // Too short for any capture, which the magic bytes will tell.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        result => result.map_err(failed)?,
    }
    file.rewind().map_err(failed)?;
    let reader = BufReader::new(file);
    match magic {
        PCAPNG => read_pcapng(path, reader, each),
        magic if PCAP.contains(&magic) => read_pcap(path, reader, each),
        _ => Err(CaptureError::NoCapture { path: path.to_owned() }.into()),
    }
}

fn read_pcap<E: From<CaptureError>>(
    path: &Path,
    reader: impl Read,
    mut each: impl FnMut(Record) -> Result<(), E>,
) -> Result<End, E> {
    let mut packets = 0;
    let mut reader = match PcapReader::new(reader) {
        Ok(reader) => reader,
        Err(error) => return Ok(ended(path, packets, error)?),
    };
    let header = reader.header();
    check_link(path, header.datalink)?;
    let nanos = match header.ts_resolution {
        TsResolution::MicroSecond => 1000,
        TsResolution::NanoSecond => 1,
    };
    // Raw, since the library refuses packets that the capture holds only the beginning of.
    while let Some(packet) = reader.next_raw_packet() {
        let packet = match packet {
            Ok(packet) => packet,
            Err(error) => return Ok(ended(path, packets, error)?),
        };
        packets += 1;
        let rest = Duration::from_nanos(u64::from(packet.ts_frac) * nanos);
        each(Record {
            time: Duration::from_secs(packet.ts_sec.into()) + rest,
            interface: None,
            data: packet.data.into_owned(),
            original_len: packet.orig_len as usize,
        })?;
    }
    Ok(End::Whole)
}

fn read_pcapng<E: From<CaptureError>>(
    path: &Path,
    reader: impl Read,
    mut each: impl FnMut(Record) -> Result<(), E>,
) -> Result<End, E> {
    let mut packets = 0;
    let mut reader = match PcapNgReader::new(reader) {
        Ok(reader) => reader,
        Err(error) => return Ok(ended(path, packets, error)?),
    };
    let mut interfaces: Vec<(Option<String>, u32)> = Vec::new();
    while let Some(block) = reader.next_block() {
        let block = match block {
            Ok(block) => block,
            Err(error) => return Ok(ended(path, packets, error)?),
        };
        let (time, interface, data, original_len) = match block {
            Block::SectionHeader(_) => {
                interfaces.clear();
                continue;
            }
            Block::InterfaceDescription(description) => {
                check_link(path, description.linktype)?;
                interfaces.push((name(&description), resolution(&description)));
                continue;
            }
            Block::EnhancedPacket(packet) => {
                let at = packet.interface_id as usize;
                let (interface, resolution) = interfaces.get(at).cloned().unwrap_or((None, 6));
                // The library takes every timestamp for nanoseconds.
                let time = scale(packet.timestamp.as_nanos(), resolution);
                (time, interface, packet.data, packet.original_len)
            }
            Block::SimplePacket(packet) => {
                let interface = interfaces.first().and_then(|first| first.0.clone());
                (Duration::ZERO, interface, packet.data, packet.original_len)
            }
            _ => continue,
        };
        packets += 1;
        let (data, original_len) = (data.into_owned(), original_len as usize);
        each(Record { time, interface, data, original_len })?;
    }
    Ok(End::Whole)
}

/// What to make of a capture that can't be read on: if it just stops, what came before is good.
fn ended(path: &Path, packets: u64, error: PcapError) -> Result<End, CaptureError> {
    match error {
        PcapError::IoError(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Ok(End::CutOff)
        }
        PcapError::IoError(source) => Err(CaptureError::Read { path: path.to_owned(), source }),
        source => Err(CaptureError::Damaged { path: path.to_owned(), packets, source }),
    }
}

fn check_link(path: &Path, link: DataLink) -> Result<(), CaptureError> {
    match link {
        DataLink::ETHERNET => Ok(()),
        link => Err(CaptureError::Link { path: path.to_owned(), link }),
    }
}

fn name(description: &InterfaceDescriptionBlock<'_>) -> Option<String> {
    description.options.iter().find_map(|option| match option {
        InterfaceDescriptionOption::IfName(name) => Some(name.to_string()),
        _ => None,
    })
}

/// The negative power of ten that timestamps count in; six if not said.
fn resolution(description: &InterfaceDescriptionBlock<'_>) -> u32 {
    let said = description.options.iter().find_map(|option| match option {
        InterfaceDescriptionOption::IfTsResol(resolution) => Some(u32::from(*resolution)),
        _ => None,
    });
    said.unwrap_or(6)
}

/// A count of `10^-resolution` seconds, or of `2^-n` where the top bit is set.
fn scale(count: u128, resolution: u32) -> Duration {
    let per_s = match resolution {
        0..=18 => 10_u128.pow(resolution),
        _ => 1 << (resolution & 0x7f).min(63),
    };
    let nanos = count * 1_000_000_000 / per_s;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What is read of a file with these bytes.
    fn records(bytes: &[u8]) -> Result<(Vec<Record>, End), CaptureError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("capture");
        fs::write(&path, bytes).unwrap();
        let mut records = Vec::new();
        let end = read(&path, |record| {
            records.push(record);
            Ok::<(), CaptureError>(())
        })?;
        Ok((records, end))
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn pcap(magic: u32, link: u32, packets: &[[u32; 5]]) -> Vec<u8> {
        let header = [magic, 4 << 16 | 2, 0, 0, 96, link];
        let packets = packets.iter().flatten().copied();
        words(&header.into_iter().chain(packets).collect::<Vec<_>>())
    }

    #[test]
    fn a_packet_of_which_the_capture_holds_only_the_beginning_is_read() {
        // As by `tcpdump -s 96`: longer than the header's limit, which the library takes amiss.
        let (records, end) =
            records(&pcap(0xa1b2_c3d4, 1, &[[7, 5, 4, 1514, 0x0403_0201]])).unwrap();
        assert_eq!(end, End::Whole);
        let [record] = &records[..] else { panic!("{records:?}") };
        assert_eq!((&record.data[..], record.original_len), (&[1, 2, 3, 4][..], 1514));
        assert_eq!(record.time, Duration::from_micros(7_000_005));
    }

    #[test]
    fn a_pcap_of_nanoseconds_is_read_as_such() {
        let (records, _) = records(&pcap(0xa1b2_3c4d, 1, &[[7, 5, 4, 4, 0]])).unwrap();
        assert_eq!(records[0].time, Duration::from_nanos(7_000_000_005));
    }

    #[test]
    fn a_capture_that_stops_in_a_packet_gives_what_came_before() {
        let whole = pcap(0xa1b2_c3d4, 1, &[[1, 0, 4, 4, 0], [2, 0, 4, 4, 0]]);
        for missing in [1, 4, 5, 19] {
            let (records, end) = records(&whole[..whole.len() - missing]).unwrap();
            assert_eq!((records.len(), end), (1, End::CutOff), "without the last {missing} bytes");
        }
        assert_eq!(records(&whole[..20]).unwrap(), (vec![], End::CutOff));
    }

    #[test]
    fn a_capture_without_packets_is_a_capture() {
        assert_eq!(records(&pcap(0xa1b2_c3d4, 1, &[])).unwrap(), (vec![], End::Whole));
    }

    #[test]
    fn what_is_no_capture_is_refused_by_name() {
        for bytes in [&b""[..], b"no", b"[node]\n", &[0x1f, 0x8b, 8, 0, 0]] {
            let error = records(bytes).unwrap_err().to_string();
            assert!(
                error.ends_with("capture is no capture: it is neither pcap nor pcapng"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_capture_of_another_link_is_refused() {
        let error = records(&pcap(0xa1b2_c3d4, 276, &[])).unwrap_err().to_string();
        assert!(error.contains("LINUX_SLL2 frames, and only Ethernet is understood"), "{error}");
    }

    #[test]
    fn a_missing_file_and_a_folder_are_named_with_the_reason() {
        let each = |_| Ok::<(), CaptureError>(());
        let missing = read(Path::new("/nonexistent.pcap"), each).unwrap_err();
        assert_eq!(missing.to_string(), "cannot read /nonexistent.pcap");
        assert!(matches!(read(Path::new("/"), each), Err(CaptureError::Read { .. })));
    }

    #[test]
    fn timestamps_are_scaled_by_the_resolution_of_their_interface() {
        assert_eq!(scale(1_500_000, 6), Duration::from_millis(1500));
        assert_eq!(scale(1_500_000_000, 9), Duration::from_millis(1500));
        assert_eq!(scale(3 << 19, 0x80 | 20), Duration::from_millis(1500));
    }
}
