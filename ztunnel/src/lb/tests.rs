//! Placeholder. Filled in below.
