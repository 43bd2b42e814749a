//! The habits of glibc's allocator, so that memory falls after a peak and does not depend on which thread was busy.
//!
//! By itself it gives each thread a heap of its own (eight a core), raises its own thresholds as large blocks come by,
//! and keeps what has become free below them: after a burst that is most of the process. With other C libraries nothing
//! is done.

use std::time::Duration;

/// From which size a block is a mapping of its own, and how much free memory the end of a heap may have, bytes. Smaller
/// would ask the kernel for pages on the path of bytes: buffers are at most 256 KiB.
const THRESHOLD: i32 = 1 << 20;
/// How often it is looked whether a peak is over.
const LOOK: Duration = Duration::from_secs(2);
/// Peaks of fewer connections, at some 10 KB each, are not worth a walk through the heaps.
const PEAK: usize = 64;

/// To be called before threads start; `heaps` is how many threads are busy at once.
#[allow(unsafe_code)]
pub fn tame(heaps: usize) {
    #[cfg(target_env = "gnu")]
    {
        let heaps = i32::try_from(heaps).unwrap_or(i32::MAX).max(1);
        for (what, value) in
            [(libc::M_ARENA_MAX, heaps), (libc::M_MMAP_THRESHOLD, THRESHOLD), (libc::M_TRIM_THRESHOLD, THRESHOLD)]
        {
            // SAFETY: takes two numbers; it may be called at any time and refuses what it does not know.
            unsafe { libc::mallopt(what, value) };
        }
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = heaps;
}

/// Looks after the end of a peak at which free pages are given back: at once, and when the tunnels that were opened for it
/// have been closed too (`hbone::pool`).
const AFTER: [u32; 3] = [0, 3, 10];

/// Gives free pages of all heaps back, once `load` (open connections) has fallen to half of its last peak. Never ends.
/// The walk holds each heap for a moment, which is why it waits for the load to have gone.
pub async fn give_back_after_peaks(load: impl Fn() -> usize) {
    let mut peak = 0;
    let mut since = u32::MAX;
    loop {
        tokio::time::sleep(LOOK).await;
        let now = load();
        peak = peak.max(now);
        since = since.saturating_add(1);
        if peak >= PEAK && now <= peak / 2 {
            peak = now;
            since = 0;
        }
        if AFTER.contains(&since) {
            give_back();
        }
    }
}

/// Gives free pages of all heaps back now.
#[allow(unsafe_code)]
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number and touches only the allocator's own free memory, under its locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
