//! Asking for memory ahead of its use.

/// Bytes in a cache line.
pub const LINE: usize = 64;

/// Begins to fetch the cache line that `value` starts in. Changes nothing but time.
#[inline(always)]
pub fn prefetch<T>(value: &T) {
    prefetch_at(std::ptr::from_ref(value).cast());
}

/// Begins to fetch the cache line before the one that `bytes` start in, for a header that will be written there.
#[inline(always)]
pub fn prefetch_front(bytes: &[u8]) {
    prefetch_at(bytes.as_ptr().wrapping_sub(LINE));
}

#[inline(always)]
#[allow(unsafe_code)]
fn prefetch_at(address: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch never faults, wherever it points.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}
