//! Tests of the certificate task with a CA in memory and paused time.
//!
//! Real keys and certificates, made by `tulle_certs::ca`, with no socket in between.
