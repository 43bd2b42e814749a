//! The certificate authority of the mesh: a root, an intermediate that signs, and the key that signs tokens.
//!
//! Only the intermediate's key is used while serving; the root's is touched when the intermediate is renewed and may
//! be kept elsewhere in between. Who may get which identity is not decided here: signing has no opinion. Limits: a leaf
//! lives at most 24 hours and never outlives the intermediate; the files are described in [`files`].

pub mod files;
pub mod mirror;
pub mod plugged;
mod replaced;
pub mod revoke;
pub mod rotate;

use std::net::IpAddr;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use rustls::crypto::SecureRandom;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::PrivatePkcs8KeyDer;
use thiserror::Error;

use crate::ParsedCsr;
use crate::Roots;
use crate::RootsError;
use crate::SpiffeId;
use crate::ca::rotate::Rotation;
use crate::issued;
use crate::pem;

const DAY_S: i64 = 24 * 3600;
/// Life of a root, seconds.
pub const ROOT_LIFE_S: i64 = 3650 * DAY_S;
/// Life of an intermediate, seconds. It is renewed when half of it is over.
pub const INTERMEDIATE_LIFE_S: i64 = 365 * DAY_S;
/// Longest life of a leaf, and the one given when none is asked for, seconds.
pub const LEAF_LIFE_S: i64 = DAY_S;
/// Shortest life of a leaf, seconds: below it, clock skew and renewal leave no time to use it.
pub const SHORTEST_LEAF_LIFE_S: i64 = 10;
/// Life of control's own server certificate, seconds. Its holder renews it at half-life.
pub const SERVER_LIFE_S: i64 = 30 * DAY_S;
/// How far back validity begins, so that a node whose clock is a little slow can use a new certificate at once.
const LONGEST_BACKDATE_S: i64 = 60;

/// A loaded authority. Immutable: open it again to pick up what another process renewed.
pub struct Authority {
    roots: Roots,
    issuer: Issuer<'static, KeyPair>,
    intermediate: CertificateDer<'static>,
    not_before: i64,
    not_after: i64,
    serial: String,
    token_key: TokenKey,
    rotation: Rotation,
}

/// The ECDSA P-256 key of the tokens that `control token` prints.
#[derive(Clone)]
pub struct TokenKey {
    /// PKCS#8 in PEM. Secret.
    pub private_pem: String,
    /// SubjectPublicKeyInfo in PEM.
    pub public_pem: String,
}

/// Control's own certificate.
pub struct ServerCertificate {
    /// Leaf, then intermediate.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivatePkcs8KeyDer<'static>,
    /// Its serial number, lower-case hex.
    pub serial: String,
    /// Start of validity, seconds since the Unix epoch.
    pub not_before: i64,
    /// End of it.
    pub not_after: i64,
}

/// Why the authority cannot be opened or cannot sign. Names the file and what to do.
#[derive(Debug, Error)]
pub enum CaError {
    /// A file cannot be read, written or locked.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file's content is not what it must be.
    #[error("{path} cannot be used: {reason}", path = path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The root bundle cannot be used.
    #[error("{path} cannot be used: {source}", path = path.display())]
    Roots {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: RootsError,
    },
    /// The intermediate needs renewal and the root's key is not here.
    #[error(
        "the intermediate {path} {why}, and {key} is missing: restore the root's key, or install an intermediate that it signed",
        path = path.display(), key = key.display()
    )]
    NoRootKey {
        /// The intermediate's file.
        path: PathBuf,
        /// The missing key.
        key: PathBuf,
        /// What is wrong with the intermediate.
        why: String,
    },
    /// The intermediate is over, so nothing can be signed.
    #[error("the intermediate certificate expired at {0} (Unix seconds): restart control or renew it")]
    Expired(i64),
    /// A name for the server certificate is neither DNS name nor address.
    #[error("`{0}` is neither a DNS name nor an IP address")]
    Name(String),
    /// The cryptographic library failed.
    #[error("cannot make a certificate: {0}")]
    Crypto(String),
}

impl Authority {
    /// Opens the authority in a directory and makes what is missing, under a lock. `now`: Unix seconds.
    pub fn open(dir: &Path, now: i64) -> Result<Self, CaError> {
        let loaded = files::open(dir, now)?;
        let facts = issued::facts(&loaded.intermediate).map_err(crypto)?;
        let issuer = Issuer::from_ca_cert_der(&loaded.intermediate, loaded.intermediate_key).map_err(crypto)?;
        Ok(Self {
            roots: loaded.roots,
            issuer,
            intermediate: loaded.intermediate,
            not_before: facts.not_before,
            not_after: facts.not_after,
            serial: facts.serial,
            token_key: loaded.token_key,
            rotation: loaded.rotation,
        })
    }

    /// True once half of the intermediate's life is over: open the directory again, which renews it.
    pub fn wants_renewal(&self, now: i64) -> bool {
        past_half_life(self.not_before, self.not_after, now)
    }

    /// True if the directory holds other certificates than these: another process renewed or rotated. Reads two files.
    pub fn is_stale(&self, dir: &Path) -> Result<bool, CaError> {
        let (roots, intermediate) = files::certificates(dir)?;
        let own = pem::encode("CERTIFICATE", &self.intermediate);
        let same_intermediate = intermediate.is_some_and(|text| text.trim() == own.trim());
        let roots = roots.and_then(|text| Roots::from_pem(text.as_bytes()).ok());
        Ok(!same_intermediate || roots.as_ref() != Some(&self.roots))
    }

    /// Where a rotation stands in the directory now. A switch shows in no certificate until somebody opens it.
    pub fn rotation_in(&self, dir: &Path) -> Result<Rotation, CaError> {
        rotate::state(dir, &self.roots, &self.intermediate)
    }

    /// Where a rotation of the root stood when this was opened.
    pub fn rotation(&self) -> &Rotation {
        &self.rotation
    }

    /// The certificate that signs leaves.
    pub fn intermediate(&self) -> &CertificateDer<'static> {
        &self.intermediate
    }

    /// Its serial number, lower-case hex.
    pub fn intermediate_serial(&self) -> &str {
        &self.serial
    }

    /// All trusted roots.
    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    /// The key for tokens.
    pub fn token_key(&self) -> &TokenKey {
        &self.token_key
    }

    /// End of the intermediate's validity, Unix seconds.
    pub fn not_after(&self) -> i64 {
        self.not_after
    }

    /// Signs a leaf for `identity` with the request's key. `life_s` seconds are capped to [`LEAF_LIFE_S`] and raised
    /// to [`SHORTEST_LEAF_LIFE_S`]; 0 or less means the default. Returns leaf, intermediate, and all roots in one
    /// string, each PEM, as the CA protocol wants it.
    pub fn sign(&self, csr: &ParsedCsr, identity: &SpiffeId, life_s: i64, now: i64) -> Result<Vec<String>, CaError> {
        let mut params = leaf_params(self.leaf_validity(life_s, now)?)?;
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().map_err(crypto)?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&csr.public_key, &self.issuer).map_err(crypto)?;
        Ok(vec![leaf.pem(), pem::encode("CERTIFICATE", &self.intermediate), self.roots.to_pem()])
    }

    /// Makes a key and a serverAuth certificate for control itself. `names` are DNS names and addresses.
    pub fn server_certificate(&self, names: &[String], now: i64) -> Result<ServerCertificate, CaError> {
        let (not_before, not_after) = self.validity(SERVER_LIFE_S, now)?;
        let key = new_key()?;
        let mut params = leaf_params((not_before, not_after))?;
        params.distinguished_name = common_name("tulle control");
        params.subject_alt_names = names.iter().map(|name| server_name(name)).collect::<Result<_, _>>()?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params.signed_by(&key, &self.issuer).map_err(crypto)?;
        let leaf = CertificateDer::from(leaf);
        Ok(ServerCertificate {
            serial: issued::facts(&leaf).map_err(crypto)?.serial,
            chain: vec![leaf, self.intermediate.clone()],
            key: key.into(),
            not_before,
            not_after,
        })
    }

    fn leaf_validity(&self, life_s: i64, now: i64) -> Result<(i64, i64), CaError> {
        let life_s = if life_s <= 0 { LEAF_LIFE_S } else { life_s.clamp(SHORTEST_LEAF_LIFE_S, LEAF_LIFE_S) };
        self.validity(life_s, now)
    }

    fn validity(&self, life_s: i64, now: i64) -> Result<(i64, i64), CaError> {
        if now >= self.not_after {
            return Err(CaError::Expired(self.not_after));
        }
        // A tenth at most: clients renew at half-life, counted from the backdated start.
        let backdate_s = (life_s / 10).min(LONGEST_BACKDATE_S);
        Ok((now - backdate_s, (now + life_s).min(self.not_after)))
    }
}

/// True once half of a validity is over.
pub fn past_half_life(not_before: i64, not_after: i64, now: i64) -> bool {
    now >= not_before.saturating_add(not_after.saturating_sub(not_before) / 2)
}

pub(crate) fn crypto(error: impl std::fmt::Display) -> CaError {
    CaError::Crypto(error.to_string())
}

fn new_key() -> Result<KeyPair, CaError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto)
}

fn self_signed_root(key: &KeyPair, now: i64) -> Result<Certificate, CaError> {
    let mut params = ca_params("Tulle root CA", (now - LONGEST_BACKDATE_S, now + ROOT_LIFE_S))?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.self_signed(key).map_err(crypto)
}

fn signed_intermediate(
    key: &KeyPair,
    root: &Issuer<'_, KeyPair>,
    root_not_after: i64,
    now: i64,
) -> Result<Certificate, CaError> {
    let not_after = (now + INTERMEDIATE_LIFE_S).min(root_not_after);
    let mut params = ca_params("Tulle intermediate CA", (now - LONGEST_BACKDATE_S, not_after))?;
    // It signs leaves only.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.use_authority_key_identifier_extension = true;
    params.signed_by(key, root).map_err(crypto)
}

fn ca_params(name: &str, validity: (i64, i64)) -> Result<CertificateParams, CaError> {
    let mut params = base_params(validity)?;
    params.distinguished_name = common_name(name);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn leaf_params(validity: (i64, i64)) -> Result<CertificateParams, CaError> {
    let mut params = base_params(validity)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn base_params((not_before, not_after): (i64, i64)) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    let at = |unix_s: i64| {
        // 9999-12-31: the last moment that X.509 can say.
        let unix_s = unix_s.clamp(0, 253_402_300_799).unsigned_abs();
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(unix_s)
    };
    params.not_before = at(not_before);
    params.not_after = at(not_after);
    params.serial_number = Some(random_serial()?);
    Ok(params)
}

fn common_name(name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    subject
}

fn random_serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0u8; 16];
    random().fill(&mut bytes).map_err(|_| CaError::Crypto("the system has no randomness".into()))?;
    // A positive number without a leading zero byte.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn random() -> &'static dyn SecureRandom {
    rustls::crypto::aws_lc_rs::default_provider().secure_random
}

fn server_name(name: &str) -> Result<SanType, CaError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    rustls_pki_types::DnsName::try_from(name).map_err(|_| CaError::Name(name.to_owned()))?;
    Ok(SanType::DnsName(name.try_into().map_err(crypto)?))
}

#[cfg(test)]
mod tests;
