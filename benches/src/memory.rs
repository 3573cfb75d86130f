//! Memory that lives as long as the process, on huge pages if there are some, as the worker's own does; and
//! what memory the process came to have.

use std::{fmt, fs, ops::Sub};

use memmap2::{Advice, MmapMut, MmapOptions};

/// Zeroed bytes.
///
/// # Panics
/// If there is no memory: no benchmark goes on without.
pub fn leak(bytes: usize) -> &'static mut [u8] {
    let huge = bytes.next_multiple_of(1 << 21);
    let reserved = MmapOptions::new().len(huge).huge(Some(21)).populate().map_anon();
    let mut map = reserved.unwrap_or_else(|_| {
        let map = MmapMut::map_anon(huge).expect("there is memory for a benchmark");
        let _ = map.advise(Advice::HugePage); // refused by some kernels, and fine without
        map
    });
    map.fill(0); // page faults now, not while timed
    let map: &'static mut MmapMut = Box::leak(Box::new(map));
    &mut map[..bytes]
}

/// What the process has in memory, in bytes. All zero where the kernel does not tell.
#[derive(Clone, Copy, Default, Debug)]
pub struct Resident {
    /// All of it.
    pub bytes: u64,
    /// On 2 MiB pages that were set aside by `vm.nr_hugepages`.
    pub reserved: u64,
    /// On 2 MiB pages that the kernel put together by itself.
    pub transparent: u64,
}

impl Resident {
    /// What it is now.
    pub fn now() -> Self {
        let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
        let bytes = |key: &str| {
            let kib = rollup.lines().find_map(|line| line.strip_prefix(key)?.strip_suffix("kB"));
            kib.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or_default() << 10
        };
        let reserved = bytes("Private_Hugetlb:") + bytes("Shared_Hugetlb:");
        // What was set aside is not in the kernel's sum.
        let bytes_in_all = bytes("Rss:") + reserved;
        Self { bytes: bytes_in_all, reserved, transparent: bytes("AnonHugePages:") }
    }
}

impl Sub for Resident {
    type Output = Self;

    /// What came to it since.
    fn sub(self, before: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_sub(before.bytes),
            reserved: self.reserved.saturating_sub(before.reserved),
            transparent: self.transparent.saturating_sub(before.transparent),
        }
    }
}

/// The kind of pages that most of it is on.
impl fmt::Display for Resident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self { bytes: 0, .. } => "?",
            Self { bytes, reserved, .. } if 2 * reserved > *bytes => "2 MiB",
            Self { bytes, transparent, .. } if 2 * transparent > *bytes => "2 MiB, THP",
            _ => "4 KiB",
        })
    }
}
