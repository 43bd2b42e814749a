//! `control revoke`: takes certificates back, by their serial numbers, in the CA directory.
//!
//! It works on the file `crl.pem` there. Nodes read a copy of it as `CRL_PATH`; who brings it to them is the same that
//! brings them `root-cert.pem`.

use anyhow::Context;
use tulle_certs::ca::revoke::{Signed, revoke as take_back, serial};

use crate::base;
use crate::cli::kept;
use crate::config::Revoke;

/// Adds to the list and says what it holds.
///
/// # Errors
/// If a serial number is none, or the directory cannot be used.
pub fn revoke(options: &Revoke) -> anyhow::Result<String> {
    let serials: Result<Vec<_>, String> = options.serials.iter().map(|text| serial(text)).collect();
    let serials = serials.map_err(anyhow::Error::msg)?;
    let (of, holds) = if options.intermediate {
        (Signed::Intermediate, "the root in use signed, and the one before it until that is retired")
    } else {
        (Signed::Leaf, "the intermediate in use signed, and those that were replaced in the last 30 days")
    };
    kept::change(&options.kept, &options.ca_dir, |dir| {
        let all = take_back(dir, of, &serials, base::unix_now()).context("cannot revoke")?;
        Ok(format!(
            "crl.pem takes back {all} certificate(s); nodes whose CRL_PATH is a copy of it follow once they have it\n\
         This holds for what {holds}"
        ))
    })
}
