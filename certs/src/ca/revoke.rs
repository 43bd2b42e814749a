//! Taking certificates back: `crl.pem` in the CA directory, which nodes read as `CRL_PATH` (RFC 5280 §5).
//!
//! A leaf is taken back by the intermediate that signed it, an intermediate by its root, so there is a list for each. Only
//! serial numbers are known here, neither to whom they were given (`tulle get certificates` says that) nor by which issuer:
//! each goes into the lists of all issuers that it may be of, the replaced intermediates among them, whose keys are kept for
//! that as long as something that they signed may live. They are random and 16 octets long, so none is two certificates'.
//! Lists of an issuer whose key is gone cannot be added to and stay for a year after they were signed: by then all that
//! they can name has ended. Entries go when what they name has ended anyway, so the file stays small.

use std::path::Path;
use std::time::Duration;

use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::revocation_list::CertificateRevocationList;

use crate::ca::files::{self, CRL};
use crate::ca::replaced;
use crate::ca::{CaError, INTERMEDIATE_LIFE_S, SERVER_LIFE_S, crypto};
use crate::pem;
use crate::{Crls, MAX_CRL_BYTES};

/// Longest serial number, octets (RFC 5280 §4.1.2.2).
const MAX_SERIAL: usize = 20;

/// What serial numbers are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signed {
    /// Leaves; the intermediate takes them back.
    Leaf,
    /// Intermediates; the root takes them back, and with them all that they signed.
    Intermediate,
}

impl Signed {
    /// After this long the certificate has ended by itself, seconds.
    fn life_s(self) -> i64 {
        match self {
            // Control's own lives longest.
            Self::Leaf => SERVER_LIFE_S,
            Self::Intermediate => INTERMEDIATE_LIFE_S,
        }
    }
}

/// A serial number in hex, with or without colons, as certificates show it.
///
/// # Errors
/// What is wrong with the text.
pub fn serial(text: &str) -> Result<Vec<u8>, String> {
    let wrong = || format!("`{text}` is not a serial number in hex, such as 4f:01:c7 or 4f01c7");
    let digits: String = text.trim().chars().filter(|c| *c != ':').collect();
    let digits = if digits.len() % 2 == 1 { format!("0{digits}") } else { digits };
    if digits.is_empty() || digits.len() > 2 * MAX_SERIAL || !digits.bytes().all(|c| c.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| wrong())).collect()
}

/// Adds certificates to `crl.pem` in the directory. `now`: Unix seconds. Gives how many certificates it takes back now.
///
/// # Errors
/// If the directory or the file cannot be used, or the key that must sign is not here.
pub fn revoke(dir: &Path, of: Signed, serials: &[Vec<u8>], now: i64) -> Result<usize, CaError> {
    // Makes what is missing, and takes the lock for it.
    let loaded = files::open(dir, now)?;
    let _lock = files::lock(dir)?;
    let mut issuers: Vec<Signer> = match of {
        Signed::Leaf => {
            let mut all = vec![Signer::new(loaded.intermediate, loaded.intermediate_key)];
            all.extend(replaced::list(dir)?.into_iter().map(|(certificate, key)| Signer::new(certificate, key)));
            all
        }
        Signed::Intermediate => {
            own_intermediate_stays(dir, &loaded.intermediate, serials)?;
            let (certificate, key) = files::signing_root(dir)?;
            let old = files::old_root(dir)?.map(|(certificate, key)| Signer::new(certificate, key));
            std::iter::once(Signer::new(certificate, key)).chain(old).collect()
        }
    };
    let path = dir.join(CRL);
    let content = |reason: String| CaError::Content { path: path.clone(), reason };
    // As much as nodes read.
    let old = files::read_at_most(&path, MAX_CRL_BYTES as u64)?.unwrap_or_default();
    Crls::parse(old.as_bytes()).map_err(|error| content(format!("{error}; move it away to begin anew")))?;
    let mut others = String::new();
    for der in CertificateRevocationListDer::pem_slice_iter(old.as_bytes()) {
        let der = der.map_err(|error| content(format!("{error:?}")))?;
        let list = read(&der).ok_or_else(|| content("a list in it cannot be read".into()))?;
        if let Some(issuer) = issuers.iter_mut().find(|issuer| issuer.has_signed(&der)) {
            issuer.revoked.extend(list.revoked);
        } else if list.last > now - INTERMEDIATE_LIFE_S {
            others.push_str(&pem::encode("X509 CRL", &der));
        }
    }
    let mut text = String::new();
    for issuer in &mut issuers {
        issuer.revoked.extend(serials.iter().map(|serial| (serial.clone(), now)));
        // The oldest entry of a serial number says since when.
        issuer.revoked.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.cmp(&b.1)));
        issuer.revoked.dedup_by(|a, b| a.0 == b.0);
        issuer.revoked.retain(|(_, since)| *since > now - of.life_s());
        text.push_str(&issuer.sign(now)?);
    }
    text.push_str(&others);
    let all = Crls::parse(text.as_bytes()).map_err(|error| content(error.to_string()))?;
    files::write(&path, &text, 0o644)?;
    Ok(all.serials())
}

/// Whoever takes back the intermediate in use takes back every certificate there is.
fn own_intermediate_stays(dir: &Path, own: &[u8], serials: &[Vec<u8>]) -> Result<(), CaError> {
    let (_, parsed) = X509Certificate::from_der(own).map_err(crypto)?;
    if serials.iter().any(|serial| same(serial, parsed.raw_serial())) {
        let reason = "it is the intermediate in use: first replace it (control rotate intermediate) and wait until all \
                      nodes have certificates of the new one";
        return Err(CaError::Content { path: dir.join(files::CA_CERT), reason: reason.into() });
    }
    Ok(())
}

/// Serial numbers are integers: zeros in front say nothing.
fn same(one: &[u8], other: &[u8]) -> bool {
    let digits = |bytes: &[u8]| bytes.iter().copied().skip_while(|byte| *byte == 0).collect::<Vec<u8>>();
    digits(one) == digits(other)
}

/// An issuer, and what it takes back: serial numbers and since when.
struct Signer {
    certificate: CertificateDer<'static>,
    key: KeyPair,
    revoked: Vec<(Vec<u8>, i64)>,
}

impl Signer {
    fn new(certificate: CertificateDer<'static>, key: KeyPair) -> Self {
        Self { certificate, key, revoked: Vec::new() }
    }

    fn has_signed(&self, list: &[u8]) -> bool {
        let Ok((_, list)) = CertificateRevocationList::from_der(list) else { return false };
        let Ok((_, certificate)) = X509Certificate::from_der(&self.certificate) else { return false };
        list.verify_signature(certificate.public_key()).is_ok()
    }

    /// Its list, PEM.
    fn sign(&self, now: i64) -> Result<String, CaError> {
        let at = |unix_s: i64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(unix_s.max(0).unsigned_abs());
        let entry = |(serial, since): &(Vec<u8>, i64)| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: at(*since),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: at(now),
            next_update: at(now + INTERMEDIATE_LIFE_S),
            // Grows with each list, as RFC 5280 §5.2.3 wants it.
            crl_number: SerialNumber::from(now.max(1).unsigned_abs()),
            issuing_distribution_point: None,
            revoked_certs: self.revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key).map_err(crypto)?;
        params.signed_by(&issuer).map_err(crypto)?.pem().map_err(crypto)
    }
}

struct List {
    /// Serial number and since when.
    revoked: Vec<(Vec<u8>, i64)>,
    /// When it was signed.
    last: i64,
}

fn read(der: &[u8]) -> Option<List> {
    let (_, list) = CertificateRevocationList::from_der(der).ok()?;
    let entries = list.iter_revoked_certificates();
    let revoked = entries.map(|entry| (entry.raw_serial().to_vec(), entry.revocation_date.timestamp())).collect();
    Some(List { revoked, last: list.last_update().timestamp() })
}

#[cfg(test)]
mod tests {
    use rustls_pki_types::UnixTime;

    use super::*;
    use crate::ca::{Authority, rotate};
    use crate::{Issued, SpiffeId, Usage, VerifyError, parse_csr, request, verify_chain};

    const NOW: i64 = 1_800_000_000;

    fn leaf(dir: &Path) -> Issued {
        let authority = Authority::open(dir, NOW).unwrap();
        let id = SpiffeId::new("cluster.local", "shop", "cart").unwrap();
        let csr = parse_csr(&request(&id).unwrap().csr_pem).unwrap();
        Issued::parse(&authority.sign(&csr, &id, 0, NOW).unwrap(), &id).unwrap()
    }

    /// Whether it was taken back; any other failure is one of the test.
    fn taken_back(dir: &Path, leaf: &Issued) -> bool {
        let text = std::fs::read(dir.join(CRL)).unwrap_or_default();
        let crls = Crls::parse(&text).unwrap();
        let at = UnixTime::since_unix_epoch(Duration::from_secs(NOW.unsigned_abs()));
        match verify_chain(&leaf.chain, &leaf.roots, &crls, Usage::Client, at) {
            Ok(_) => false,
            Err(VerifyError::Revoked { .. }) => true,
            Err(other) => panic!("{other}"),
        }
    }

    fn serial_of(leaf: &Issued) -> Vec<u8> {
        serial(&leaf.serial).unwrap()
    }

    #[test]
    fn only_the_named_leaves_are_taken_back_and_again_adds_to_them() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two, three) = (leaf(dir.path()), leaf(dir.path()), leaf(dir.path()));
        assert!(!taken_back(dir.path(), &one), "without a file nothing is");
        assert_eq!(revoke(dir.path(), Signed::Leaf, &[serial_of(&one)], NOW).unwrap(), 1);
        assert_eq!(revoke(dir.path(), Signed::Leaf, &[serial_of(&two), serial_of(&one)], NOW + 5).unwrap(), 2);
        assert!(taken_back(dir.path(), &one) && taken_back(dir.path(), &two));
        assert!(!taken_back(dir.path(), &three));
    }

    #[test]
    fn a_renewed_intermediate_of_the_same_name_leaves_the_list_of_its_predecessor_in_force() {
        let dir = tempfile::tempdir().unwrap();
        let old = leaf(dir.path());
        revoke(dir.path(), Signed::Leaf, &[serial_of(&old)], NOW).unwrap();
        rotate::renew_intermediate(dir.path()).unwrap();
        let new = leaf(dir.path());
        assert!(taken_back(dir.path(), &old));
        assert!(!taken_back(dir.path(), &new), "a list is not asked about what another key signed");
        assert_eq!(revoke(dir.path(), Signed::Leaf, &[serial_of(&new)], NOW + 5).unwrap(), 2);
        assert!(taken_back(dir.path(), &old) && taken_back(dir.path(), &new));
    }

    #[test]
    fn an_intermediate_takes_all_that_it_signed_along_and_the_one_in_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let old = leaf(dir.path());
        let (_, intermediate) = X509Certificate::from_der(&old.chain[1]).unwrap();
        let serial = intermediate.raw_serial().to_vec();
        let refused = revoke(dir.path(), Signed::Intermediate, std::slice::from_ref(&serial), NOW).unwrap_err();
        assert!(refused.to_string().contains("in use"), "{refused}");
        rotate::renew_intermediate(dir.path()).unwrap();
        let new = leaf(dir.path());
        revoke(dir.path(), Signed::Intermediate, &[serial], NOW).unwrap();
        assert!(taken_back(dir.path(), &old) && !taken_back(dir.path(), &new));
    }

    #[test]
    fn what_has_ended_by_itself_leaves_the_list() {
        let dir = tempfile::tempdir().unwrap();
        revoke(dir.path(), Signed::Leaf, &[vec![1]], NOW).unwrap();
        assert_eq!(revoke(dir.path(), Signed::Leaf, &[vec![2]], NOW + SERVER_LIFE_S).unwrap(), 1);
    }

    #[test]
    fn leaves_of_replaced_intermediates_are_taken_back_by_their_numbers_as_long_as_they_live() {
        let dir = tempfile::tempdir().unwrap();
        let mut leaves = Vec::new();
        for _ in 0..3 {
            leaves.push(leaf(dir.path()));
            rotate::renew_intermediate(dir.path()).unwrap();
        }
        let spared = leaf(dir.path());
        let serials: Vec<Vec<u8>> = leaves.iter().map(serial_of).collect();
        assert_eq!(revoke(dir.path(), Signed::Leaf, &serials[..2], NOW).unwrap(), 2);
        assert!(taken_back(dir.path(), &leaves[0]) && taken_back(dir.path(), &leaves[1]));
        assert!(!taken_back(dir.path(), &leaves[2]) && !taken_back(dir.path(), &spared));
        assert_eq!(revoke(dir.path(), Signed::Leaf, &serials[2..], NOW).unwrap(), 3);
        assert!(leaves.iter().all(|leaf| taken_back(dir.path(), leaf)) && !taken_back(dir.path(), &spared));
    }

    #[test]
    fn an_intermediate_of_the_root_before_is_taken_back_until_that_is_retired() {
        let dir = tempfile::tempdir().unwrap();
        let old = leaf(dir.path());
        let (_, intermediate) = X509Certificate::from_der(&old.chain[1]).unwrap();
        rotate::announce(dir.path(), NOW).unwrap();
        rotate::switch(dir.path()).unwrap();
        let new = leaf(dir.path());
        revoke(dir.path(), Signed::Intermediate, &[intermediate.raw_serial().to_vec()], NOW).unwrap();
        assert!(taken_back(dir.path(), &old) && !taken_back(dir.path(), &new));
    }

    #[test]
    fn a_list_that_somebody_else_signed_in_the_issuers_name_takes_nothing_back() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let leaf = leaf(ours.path());
        revoke(theirs.path(), Signed::Leaf, &[serial_of(&leaf)], NOW).unwrap();
        std::fs::copy(theirs.path().join(CRL), ours.path().join(CRL)).unwrap();
        assert!(!taken_back(ours.path(), &leaf));
    }

    #[test]
    fn a_damaged_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CRL), "not a list").unwrap();
        let error = revoke(dir.path(), Signed::Leaf, &[vec![1]], NOW).unwrap_err().to_string();
        assert!(error.contains("crl.pem") && error.contains("begin anew"), "{error}");
        assert_eq!(std::fs::read_to_string(dir.path().join(CRL)).unwrap(), "not a list");
    }

    #[test]
    fn a_file_is_added_to_as_long_as_nodes_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CRL);
        revoke(dir.path(), Signed::Leaf, &[vec![1]], NOW).unwrap();
        let list = std::fs::read_to_string(&path).unwrap();
        // Text around lists is skipped, so it is good for filling up.
        let filled = |bytes: usize| std::fs::write(&path, format!("{list}{}", "#\n".repeat(bytes / 2))).unwrap();
        filled(2 << 20);
        assert_eq!(revoke(dir.path(), Signed::Leaf, &[vec![2]], NOW).unwrap(), 2);
        filled(MAX_CRL_BYTES);
        let error = revoke(dir.path(), Signed::Leaf, &[vec![3]], NOW).unwrap_err().to_string();
        assert!(error.contains("at most 8388608 are read"), "{error}");
    }

    #[test]
    fn serial_numbers_are_hex_with_or_without_colons() {
        assert_eq!(serial("4f:01:C7"), Ok(vec![0x4f, 1, 0xc7]));
        assert_eq!(serial(" f01c7 "), Ok(vec![0x0f, 1, 0xc7]));
        for wrong in ["", ":", "4g", "-1", &"ab".repeat(21)] {
            assert!(serial(wrong).is_err(), "{wrong}");
        }
    }
}
