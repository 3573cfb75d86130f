//! Memory for tables: zeroed, for the rest of the process's life, on huge pages if there are any.

#[cfg(not(loom))]
use memmap2::{Advice, MmapMut, MmapOptions};
#[cfg(not(loom))]
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// No memory for a table.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot allocate {bytes} bytes for a table; lower connections.capacity, or nat.addresses if NAT is used"
)]
pub struct AllocationError {
    bytes: usize,
    source: std::io::Error,
}

/// So many zeroed elements, and whether they are on huge pages of their own (transparent ones may come later).
///
/// # Errors
/// If there is no memory for them.
///
/// # Panics
/// If they are to be aligned to more than a page.
#[cfg(not(loom))]
pub fn zeroed<T: FromBytes + IntoBytes + KnownLayout>(
    count: usize,
) -> Result<(&'static [T], bool), AllocationError> {
    let bytes = count * size_of::<T>();
    let huge = |len| MmapOptions::new().len(len).huge(Some(21)).populate().map_anon();
    let (mut map, huge_pages) = match huge(bytes.next_multiple_of(1 << 21)) {
        Ok(map) => (map, true),
        Err(_) => {
            let map =
                MmapMut::map_anon(bytes).map_err(|source| AllocationError { bytes, source })?;
            let _ = map.advise(Advice::HugePage); // worth 3 to 8 ns a packet; fine without
            (map, false)
        }
    };
    // Touched now, lest the first packet of each page wait for it.
    map[..bytes].fill(0);
    let memory: &'static mut [u8] = &mut Box::leak(Box::new(map))[..bytes];
    let elements = <[T]>::mut_from_bytes(memory).expect("pages are aligned and so are elements");
    Ok((elements, huge_pages))
}

/// So many zeroed elements that not everybody needs: a page becomes memory when it is first written, which takes the
/// writer a microsecond.
///
/// # Errors
/// As [`zeroed`].
///
/// # Panics
/// As [`zeroed`].
#[cfg(not(loom))]
pub fn untouched<T: FromBytes + IntoBytes + KnownLayout>(
    count: usize,
) -> Result<&'static [T], AllocationError> {
    let bytes = count * size_of::<T>();
    let map = MmapMut::map_anon(bytes).map_err(|source| AllocationError { bytes, source })?;
    let memory: &'static mut [u8] = &mut Box::leak(Box::new(map))[..];
    Ok(<[T]>::mut_from_bytes(memory).expect("pages are aligned and so are elements"))
}

/// The same of loom's atomics, which are no plain bytes.
#[cfg(loom)]
pub fn zeroed<T: Default>(count: usize) -> Result<(&'static [T], bool), AllocationError> {
    Ok((Vec::leak((0..count).map(|_| T::default()).collect()), false))
}

/// Likewise.
#[cfg(loom)]
pub fn untouched<T: Default>(count: usize) -> Result<&'static [T], AllocationError> {
    Ok(zeroed(count)?.0)
}
