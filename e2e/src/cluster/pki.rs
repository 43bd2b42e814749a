//! Certificates and keys of a cluster, made anew for each.
//!
//! One authority signs servers and clients; who a client is stands in its certificate's subject, as Kubernetes reads it.
//! Limits: P-256 only; nothing is renewed, and everything lives for a day.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use rcgen::BasicConstraints;
use rcgen::CertificateParams;
use rcgen::DnType;
use rcgen::ExtendedKeyUsagePurpose;
use rcgen::IsCa;
use rcgen::Issuer;
use rcgen::KeyPair;
use rcgen::KeyUsagePurpose;
use rcgen::PKCS_ECDSA_P256_SHA256;

/// An authority that writes what it signs into a folder.
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new one; its certificate and key are `ca.crt` and `ca.key`.
    pub fn create(folder: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params("lab-cluster", "")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        fs::write(folder.join("ca.crt"), certificate.pem())?;
        write_key(&folder.join("ca.key"), &key.serialize_pem())?;
        Ok(Self { folder: folder.to_path_buf(), issuer: Issuer::new(params, key) })
    }

    /// A certificate `name.crt` with `name.key` for both directions; `names` are DNS names and addresses.
    pub fn issue(&self, name: &str, user: &str, group: &str, names: &[String]) -> anyhow::Result<()> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(user, group)?;
        params.subject_alt_names = CertificateParams::new(names.to_vec())?.subject_alt_names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::write(self.folder.join(format!("{name}.crt")), certificate.pem())?;
        write_key(&self.folder.join(format!("{name}.key")), &key.serialize_pem())
    }
}

/// A key pair `name.key` and `name.pub`, for tokens of service accounts.
pub fn key_pair(folder: &Path, name: &str) -> anyhow::Result<()> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    write_key(&folder.join(format!("{name}.key")), &key.serialize_pem())?;
    fs::write(folder.join(format!("{name}.pub")), key.public_key_pem()).context("a public key cannot be written")
}

fn params(user: &str, group: &str) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, user);
    if !group.is_empty() {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    let now = jiff::Timestamp::now().as_second();
    let at = |second: i64| rcgen::date_time_ymd(1970, 1, 1) + std::time::Duration::from_secs(second.unsigned_abs());
    // A clock that is behind by some minutes is no reason to fail.
    params.not_before = at(now - 600);
    params.not_after = at(now + 24 * 3600);
    Ok(params)
}

fn write_key(path: &Path, pem: &str) -> anyhow::Result<()> {
    fs::write(path, pem)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}
