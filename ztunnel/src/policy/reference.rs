//! A slow, literal evaluator, to test the fast one against. It follows the words of `authorization.proto`.
//!
//! Filled in with the property test; kept apart so that it shares no helper with what it checks.
