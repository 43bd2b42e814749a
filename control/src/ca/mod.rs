//! Certificates on request: who may have which ([`grant`]), and the service that signs ([`server`]).
//!
//! The decision fits on one screen and knows no certificates; signing is `tulle_certs::ca` and has no opinion.

pub mod grant;
pub mod server;
