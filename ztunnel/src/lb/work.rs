//! Counts the rows that choices look at, in test builds only. What a choice costs is held by a number, not by a clock: a
//! slow machine must not fail the test, and a fast one must not hide a scan of all endpoints.

#[cfg(test)]
thread_local!(static ROWS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) });

/// Rows of a table were looked at.
#[inline]
pub(super) fn looked_at(rows: usize) {
    #[cfg(test)]
    ROWS.with(|all| all.set(all.get() + rows));
    let _ = rows;
}

/// Rows looked at by this thread so far.
#[cfg(test)]
pub(super) fn rows() -> usize {
    ROWS.with(std::cell::Cell::get)
}
