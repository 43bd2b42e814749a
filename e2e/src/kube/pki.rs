//! Certificates of a test cluster: one authority, the API server's own certificate, certificates of users, and the key
//! that signs tokens of service accounts.
//!
//! Made anew for every server and gone with its folder. Limits: everything is valid for a day, and one authority
//! stands for all of a real cluster's.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType,
};

use crate::address;

/// Names under which pods and tests ask for the API server.
const NAMES: [&str; 4] = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];
/// The address of the Service `kubernetes`: the first one of the range.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// Longer than any test runs.
const VALID: Duration = Duration::from_secs(24 * 3600);

/// The authority, and where its files are.
pub struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    /// Makes everything that the API server needs in `dir`: `ca.crt`, `apiserver.crt`, `apiserver.key`, `sa.pub`,
    /// `sa.key`.
    pub fn create(dir: &Path) -> anyhow::Result<Self> {
        let mut params = params("tulle-test", &[])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = key()?;
        let certificate = params.self_signed(&key).context("the authority cannot sign itself")?;
        let pki = Self { dir: dir.to_path_buf(), issuer: Issuer::new(params, key) };
        pki.write("ca.crt", &certificate.pem())?;
        let mut server = leaf("kube-apiserver", &[], ExtendedKeyUsagePurpose::ServerAuth)?;
        for name in NAMES {
            server.subject_alt_names.push(SanType::DnsName(name.try_into()?));
        }
        let [lab4, lab6] = address::CONTROL.both();
        let own: [IpAddr; 5] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), SERVICE.into(), lab4, lab6];
        server.subject_alt_names.extend(own.map(SanType::IpAddress));
        pki.issue("apiserver", server)?;
        let tokens = self::key()?;
        pki.write("sa.pub", &tokens.public_key_pem())?;
        pki.write("sa.key", &tokens.serialize_pem())?;
        Ok(pki)
    }

    /// A file of the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes `<name>.crt` and `<name>.key` of a user and the groups that it is in.
    pub fn user(&self, name: &str, user: &str, groups: &[&str]) -> anyhow::Result<()> {
        self.issue(name, leaf(user, groups, ExtendedKeyUsagePurpose::ClientAuth)?)
    }

    /// Makes `<name>.crt` and `<name>.key` of a node's kubelet, which is a client of the API server and its server, too.
    pub fn node(&self, name: &str, address: IpAddr) -> anyhow::Result<()> {
        let mut params = leaf(&format!("system:node:{name}"), &["system:nodes"], ExtendedKeyUsagePurpose::ClientAuth)?;
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        params.subject_alt_names = vec![SanType::DnsName(name.try_into()?), SanType::IpAddress(address)];
        self.issue(name, params)
    }

    fn issue(&self, name: &str, params: CertificateParams) -> anyhow::Result<()> {
        let key = key()?;
        let certificate = params.signed_by(&key, &self.issuer).with_context(|| format!("no certificate of {name}"))?;
        self.write(&format!("{name}.crt"), &certificate.pem())?;
        self.write(&format!("{name}.key"), &key.serialize_pem())
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        write_secret(&self.file(name), text)
    }
}

/// Writes a file that only its owner reads.
pub fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let mut file = file.with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(file.write_all(text.as_bytes())?)
}

fn key() -> anyhow::Result<KeyPair> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("no key can be made")
}

fn leaf(user: &str, groups: &[&str], usage: ExtendedKeyUsagePurpose) -> anyhow::Result<CertificateParams> {
    let mut params = params(user, groups)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn params(user: &str, groups: &[&str]) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, user);
    anyhow::ensure!(groups.len() <= 1, "{user}: a subject made here has one organisation at most");
    for group in groups {
        params.distinguished_name.push(DnType::OrganizationName, *group);
    }
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    params.not_before = epoch + now.saturating_sub(Duration::from_secs(60));
    params.not_after = epoch + now + VALID;
    Ok(params)
}
