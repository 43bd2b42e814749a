//! The CA directory: `root-cert.pem` (a bundle of all trusted roots), `root-key.pem` (of the one that signs), `ca-cert.pem`
//! and `ca-key.pem` (the intermediate), `token-key.pem`; during a rotation also `next-root-key.pem` or `old-root-key.pem`;
//! `crl.pem`, what was taken back (empty at first); and `replaced-ca.pem`, intermediates of before (see [`replaced`]).
//!
//! Several processes may come first at once (`control serve` twice, `control token`), so everything happens under an
//! exclusive lock on `.lock`, and files are replaced by rename. An interrupted run leaves at worst a key without its
//! certificate; the next run completes it. A root that exists is never replaced: that would cut off every node.

use std::fs::File;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::Roots;
use crate::ca::replaced;
use crate::ca::rotate::{self, Rotation};
use crate::ca::{CaError, TokenKey, crypto, new_key, past_half_life, self_signed_root, signed_intermediate};
use crate::issued;

/// Trusted roots, PEM; may be shown to anybody.
pub const ROOT_CERT: &str = "root-cert.pem";
/// The root's key. May be absent while the intermediate is good.
pub const ROOT_KEY: &str = "root-key.pem";
/// The intermediate.
pub const CA_CERT: &str = "ca-cert.pem";
/// The intermediate's key.
pub const CA_KEY: &str = "ca-key.pem";
/// The key that signs tokens.
pub const TOKEN_KEY: &str = "token-key.pem";
/// Key of a root that is announced and does not sign yet; see [`crate::ca::rotate`].
pub const NEXT_ROOT_KEY: &str = "next-root-key.pem";
/// Key of the root that signed before, until it is retired.
pub const OLD_ROOT_KEY: &str = "old-root-key.pem";

/// What was taken back; see [`crate::ca::revoke`].
pub const CRL: &str = "crl.pem";

/// Largest file that is read, bytes: a bundle of 64 roots has about 100 KiB.
pub(super) const MAX_FILE_BYTES: u64 = 1024 * 1024;

pub(super) struct Loaded {
    pub(super) roots: Roots,
    pub(super) intermediate: CertificateDer<'static>,
    pub(super) intermediate_key: KeyPair,
    pub(super) token_key: TokenKey,
    pub(super) rotation: Rotation,
}

/// Loads the directory and makes what is missing.
pub(super) fn open(dir: &Path, now: i64) -> Result<Loaded, CaError> {
    std::fs::create_dir_all(dir).map_err(|source| io("create", dir, source))?;
    let _lock = lock(dir)?;
    let root = open_root(dir, now)?;
    let roots = root.roots.clone();
    let (intermediate, intermediate_key) = open_intermediate(dir, root, now)?;
    replaced::prune(dir, &intermediate, now)?;
    let token_key = open_token_key(dir)?;
    let crl = dir.join(CRL);
    if !crl.exists() {
        // There for copies from the beginning; empty takes nothing back.
        write(&crl, "", 0o644)?;
    }
    let rotation = rotate::state(dir, &roots, &intermediate)?;
    Ok(Loaded { roots, intermediate, intermediate_key, token_key, rotation })
}

/// The two certificate files as they are now, for noticing that another process replaced them.
pub(super) fn certificates(dir: &Path) -> Result<(Option<String>, Option<String>), CaError> {
    Ok((read(&dir.join(ROOT_CERT))?, read(&dir.join(CA_CERT))?))
}

/// Held until dropped; the kernel releases it if the process dies.
pub(super) fn lock(dir: &Path) -> Result<File, CaError> {
    let path = dir.join(".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| io("open", &path, source))?;
    file.lock().map_err(|source| io("lock", &path, source))?;
    Ok(file)
}

/// The trusted roots, and which of them signs.
struct Root {
    roots: Roots,
    /// The certificate that belongs to the key. Without a key any root may have signed.
    signing: Option<(CertificateDer<'static>, KeyPair)>,
}

fn open_root(dir: &Path, now: i64) -> Result<Root, CaError> {
    let cert_path = dir.join(ROOT_CERT);
    let key_path = dir.join(ROOT_KEY);
    let key = read_key(&key_path)?;
    if let Some(roots) = read_roots(dir)? {
        let Some(key) = key else { return Ok(Root { roots, signing: None }) };
        let Some(own) = of_key(&roots, &key) else {
            let reason =
                format!("it is the key of no certificate in {ROOT_CERT}; add the certificate of this key there");
            return Err(CaError::Content { path: key_path, reason });
        };
        return Ok(Root { signing: Some((own, key)), roots });
    }
    let key = match key {
        Some(key) => key,
        None => make_key(&key_path)?,
    };
    let certificate = self_signed_root(&key, now)?;
    write(&cert_path, &certificate.pem(), 0o644)?;
    let certificate = CertificateDer::from(certificate);
    let roots =
        Roots::from_der(vec![certificate.clone()]).map_err(|source| CaError::Roots { path: cert_path, source })?;
    Ok(Root { roots, signing: Some((certificate, key)) })
}

/// The bundle. `None`: there is no file.
pub(super) fn read_roots(dir: &Path) -> Result<Option<Roots>, CaError> {
    let path = dir.join(ROOT_CERT);
    let Some(bundle) = read(&path)? else { return Ok(None) };
    Roots::from_pem(bundle.as_bytes()).map(Some).map_err(|source| CaError::Roots { path, source })
}

/// The root that signs, with its key.
pub(super) fn signing_root(dir: &Path) -> Result<(CertificateDer<'static>, KeyPair), CaError> {
    let missing = |file: &str, reason: &str| CaError::Content { path: dir.join(file), reason: reason.to_owned() };
    let here = "it is missing; this needs the certificate and the key of the root";
    let roots = read_roots(dir)?.ok_or_else(|| missing(ROOT_CERT, here))?;
    let key = read_key(&dir.join(ROOT_KEY))?.ok_or_else(|| missing(ROOT_KEY, here))?;
    let own =
        of_key(&roots, &key).ok_or_else(|| missing(ROOT_KEY, "it is the key of no certificate in root-cert.pem"))?;
    Ok((own, key))
}

/// The root that signed before the one that does, with its key, until it is retired.
pub(super) fn old_root(dir: &Path) -> Result<Option<(CertificateDer<'static>, KeyPair)>, CaError> {
    let (Some(roots), Some(key)) = (read_roots(dir)?, read_key(&dir.join(OLD_ROOT_KEY))?) else { return Ok(None) };
    let (signing, _) = signing_root(dir)?;
    // A key that signs still: the last rename of a switch was lost.
    Ok(of_key(&roots, &key).filter(|old| *old != signing).map(|old| (old, key)))
}

/// The root of the bundle that belongs to a key.
pub(super) fn of_key(roots: &Roots, key: &KeyPair) -> Option<CertificateDer<'static>> {
    roots.certificates().iter().find(|root| fits(root, key)).cloned()
}

pub(super) fn make_key(path: &Path) -> Result<KeyPair, CaError> {
    let key = new_key()?;
    write(path, &key.serialize_pem(), 0o600)?;
    Ok(key)
}

fn open_intermediate(dir: &Path, root: Root, now: i64) -> Result<(CertificateDer<'static>, KeyPair), CaError> {
    let cert_path = dir.join(CA_CERT);
    // With the key at hand only its own root counts: that is how the intermediate follows when the root is rotated.
    let signers = match &root.signing {
        Some((own, _)) => std::slice::from_ref(own),
        None => root.roots.certificates(),
    };
    let why = match load_intermediate(dir, signers, now)? {
        Ok((certificate, key, half_over)) if !half_over || root.signing.is_none() => {
            return Ok((certificate, key));
        }
        Ok(_) => "is past half of its life".to_owned(),
        Err(why) => why,
    };
    let Some((own, root_key)) = root.signing else {
        return Err(CaError::NoRootKey { path: cert_path, key: dir.join(ROOT_KEY), why });
    };
    let root_not_after = issued::facts(&own).map_err(crypto)?.not_after;
    let issuer = Issuer::from_ca_cert_der(&own, root_key).map_err(crypto)?;
    let key = new_key()?;
    let certificate = signed_intermediate(&key, &issuer, root_not_after, now)?;
    replaced::keep(dir)?;
    write(&dir.join(CA_KEY), &key.serialize_pem(), 0o600)?;
    write(&cert_path, &certificate.pem(), 0o644)?;
    Ok((certificate.into(), key))
}

/// The stored intermediate, its key, and whether half its life is over; or why there is none to use.
pub(super) type Stored = Result<(CertificateDer<'static>, KeyPair, bool), String>;

pub(super) fn load_intermediate(dir: &Path, signers: &[CertificateDer<'_>], now: i64) -> Result<Stored, CaError> {
    let cert_path = dir.join(CA_CERT);
    let (Some(text), Some(key)) = (read(&cert_path)?, read_key(&dir.join(CA_KEY))?) else {
        return Ok(Err("or its key is missing".into()));
    };
    let certificate = CertificateDer::from_pem_slice(text.as_bytes()).map_err(|error| CaError::Content {
        path: cert_path.clone(),
        reason: format!("it has no certificate in PEM: {error:?}"),
    })?;
    if !fits(&certificate, &key) {
        return Ok(Err(format!("does not fit {CA_KEY}")));
    }
    if let Err(error) = chains(&certificate, signers, now) {
        return Ok(Err(format!("cannot be used with {ROOT_CERT} ({error})")));
    }
    let facts = issued::facts(&certificate).map_err(crypto)?;
    let half_over = past_half_life(facts.not_before, facts.not_after, now);
    Ok(Ok((certificate, key, half_over)))
}

fn open_token_key(dir: &Path) -> Result<TokenKey, CaError> {
    let path = dir.join(TOKEN_KEY);
    let key = match read_key(&path)? {
        Some(key) => key,
        None => make_key(&path)?,
    };
    Ok(TokenKey { private_pem: key.serialize_pem(), public_pem: key.public_key_pem() })
}

/// One signature and the validity: webpki has no entry point for a CA certificate on its own.
pub(super) fn chains(certificate: &CertificateDer<'_>, signers: &[CertificateDer<'_>], now: i64) -> Result<(), String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
    let validity = parsed.validity();
    if now < validity.not_before.timestamp() || now >= validity.not_after.timestamp() {
        return Err("it is not valid now".into());
    }
    if !parsed.is_ca() {
        return Err("it is not a CA certificate".into());
    }
    if is_signed(certificate, signers) { Ok(()) } else { Err("no root signed it".into()) }
}

/// Whether one of them signed it.
pub(super) fn is_signed(certificate: &CertificateDer<'_>, signers: &[CertificateDer<'_>]) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return false };
    signers.iter().any(|root| {
        X509Certificate::from_der(root).is_ok_and(|(_, root)| parsed.verify_signature(Some(root.public_key())).is_ok())
    })
}

pub(super) fn fits(certificate: &CertificateDer<'_>, key: &KeyPair) -> bool {
    X509Certificate::from_der(certificate)
        .is_ok_and(|(_, parsed)| *parsed.public_key().subject_public_key.data == *key.der_bytes())
}

pub(super) fn read_key(path: &Path) -> Result<Option<KeyPair>, CaError> {
    let Some(text) = read(path)? else {
        return Ok(None);
    };
    // What the parser says could quote the key.
    KeyPair::from_pem(&text).map(Some).map_err(|_| CaError::Content {
        path: path.to_owned(),
        reason: "it is not a PKCS#8 private key in PEM; restore it, or remove it to have a new one made".to_owned(),
    })
}

pub(super) fn read(path: &Path) -> Result<Option<String>, CaError> {
    read_at_most(path, MAX_FILE_BYTES)
}

pub(super) fn read_at_most(path: &Path, most: u64) -> Result<Option<String>, CaError> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(io("read", path, source)),
        Ok(meta) if meta.len() > most => {
            return Err(CaError::Content {
                path: path.to_owned(),
                reason: format!("it has {} bytes; at most {most} are read", meta.len()),
            });
        }
        Ok(_) => {}
    }
    std::fs::read_to_string(path).map(Some).map_err(|source| io("read", path, source))
}

pub(super) fn write(path: &Path, text: &str, mode: u32) -> Result<(), CaError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    // One left by a run that died may have another mode.
    let _ = std::fs::remove_file(&temporary);
    let fail = |source| io("write", &temporary, source);
    let mut file = OpenOptions::new().create_new(true).write(true).mode(mode).open(&temporary).map_err(fail)?;
    file.write_all(text.as_bytes()).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    std::fs::rename(&temporary, path).map_err(|source| io("rename to", path, source))
}

pub(super) fn io(action: &'static str, path: &Path, source: std::io::Error) -> CaError {
    CaError::Io { action, path: PathBuf::from(path), source }
}
