//! Giving memory back after a burst: when nodes are told of the whole mesh, and after the first reading of it.
//!
//! glibc's allocator keeps what has become free between blocks that are still in use, which after a burst is a good part
//! of the process. It is given back once it is quiet, since the walk through the heap stops every other use of it for some
//! milliseconds. With other C libraries nothing is done.

use std::time::Duration;

use crate::base::Stop;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// So much work between two looks is a burst. Telling one node of 10,000 workloads is more than a hundred responses.
const BURST: u64 = 100;

/// Gives free memory back whenever `work`, a counter, has grown fast and no longer does; the start counts as a burst.
pub async fn give_back_after_bursts(work: impl Fn() -> u64, mut stop: Stop) {
    let (mut last, mut busy) = (work(), true);
    loop {
        tokio::select! {
            () = stop.requested() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        let now = work();
        let burst = now.saturating_sub(last) >= BURST;
        if busy && !burst {
            give_back();
        }
        (last, busy) = (now, burst);
    }
}

#[allow(unsafe_code)]
fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number and touches only the allocator's own free memory, under its locks.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
