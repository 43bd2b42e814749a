//! Identities of the mesh: SPIFFE ids, certificate requests, chain verification, revocation lists, and the certificate
//! authority.
//!
//! Control and node proxy decide with the same code whether an identity may exist and whether a certificate proves
//! it, so that no string is read in two ways. There is no async code here and, outside of [`ca`], no I/O; the time is
//! always an argument. All cryptography is aws-lc-rs through rcgen, rustls and webpki.

pub mod ca;
mod crl;
mod issued;
pub mod pem;
mod request;
mod roots;
mod spiffe;
mod trust;
mod verify;

pub use crl::{CrlError, Crls, MAX_CRL_BYTES};
pub use issued::{Issued, IssuedError, not_after};
pub use request::{CsrError, MAX_CSR_BYTES, ParsedCsr, Request, RequestError, parse_csr, request};
pub use roots::{MAX_ROOTS, Roots, RootsError, fingerprint};
pub use spiffe::{SpiffeId, SpiffeIdError, trust_domain};
pub use trust::{Aliases, Bundles, Trusted, verify_peer};
pub use verify::{Usage, VerifyError, leaf_identity, server_not_revoked, verify_chain};
