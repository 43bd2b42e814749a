//! Certificates on request: who may have which ([`grant`]), the service that signs ([`server`]), and
//! when a rotation of the root may go on ([`rotation`]).
//!
//! The decision fits on one screen and knows no certificates; signing is `tulle_certs::ca` and has no opinion.

pub mod grant;
pub mod rotation;
pub mod server;
