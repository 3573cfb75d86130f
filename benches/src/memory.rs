//! Memory that lives as long as the process, on huge pages if there are some, as the worker's own does.

use memmap2::{Advice, MmapMut, MmapOptions};

/// What memory came to lie on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pages {
    /// 2 MiB pages set aside by `vm.nr_hugepages`.
    Huge,
    /// Ordinary ones, transparently huge if the kernel took the advice.
    Advised,
}

/// Zeroed bytes.
///
/// # Panics
/// If there is no memory: no benchmark goes on without.
pub fn leak(bytes: usize) -> (&'static mut [u8], Pages) {
    let huge = bytes.next_multiple_of(1 << 21);
    let (mut map, pages) = match MmapOptions::new().len(huge).huge(Some(21)).populate().map_anon() {
        Ok(map) => (map, Pages::Huge),
        Err(_) => {
            let map = MmapMut::map_anon(huge).expect("there is memory for a benchmark");
            let _ = map.advise(Advice::HugePage); // refused by some kernels, and fine without
            (map, Pages::Advised)
        }
    };
    map.fill(0); // page faults now, not while timed
    let map: &'static mut MmapMut = Box::leak(Box::new(map));
    (&mut map[..bytes], pages)
}
