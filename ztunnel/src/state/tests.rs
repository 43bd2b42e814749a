//! Tests of the store: staging, zombies, stand-ins, indexes. Table-driven where the cases are alike.
//!
//! The property test at the end holds that an incrementally kept store equals one built from scratch.
