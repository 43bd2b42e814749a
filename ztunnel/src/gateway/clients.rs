//! Client certificates that the gateway shows to hosts outside: a folder for each, named by the namespace of the policy and by
//! the name that its rule gives, with `tls.crt` and `tls.key` as in a Secret of Kubernetes.
//!
//! The key comes to the gateway as files and goes nowhere else: neither control nor any node has it, and only policies of its
//! namespace can have it used. Files are looked at again when they are used, at most every [`LOOK`], so a Secret that is replaced
//! counts for new connections without a restart. While new files cannot be used (one of the two may be written already) those of
//! before count; files that are gone count no longer. Limits: keys in files only, and a host that asks for no certificate is shown none.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use tokio::sync::Mutex;

use crate::base::unix_now;
use crate::identity::read_file;
use crate::outcome::{Code, Outcome};
use crate::tls;

/// Between two looks at the same files. The kubelet needs some ten times as long to bring a Secret's new content.
const LOOK: Duration = Duration::from_secs(2);
/// Names that are remembered. Certificates are mounted one by one, so there are few.
const MOST: usize = 256;

/// A certificate with its key.
pub struct Shown {
    /// Tells it from any other, SHA-256 in hex of certificates and key.
    pub print: Arc<str>,
    /// What handshakes need.
    pub key: Arc<CertifiedKey>,
    /// End of validity, Unix seconds.
    not_after: i64,
}

/// What is known of a name's files.
#[derive(Default)]
struct Known {
    looked: Option<Instant>,
    shown: Option<Arc<Shown>>,
    /// Why there is nothing, or why what is there was not taken.
    error: String,
}

/// See the module's header.
pub struct ClientCertificates {
    folder: Option<PathBuf>,
    known: Mutex<HashMap<Arc<str>, Known>>,
}

impl ClientCertificates {
    /// Those in `folder`; `None`: there are none.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, known: Mutex::default() }
    }

    /// The certificate `name`: namespace and name.
    ///
    /// # Errors
    /// `NoCertificate`, with the file and what to do.
    pub async fn get(&self, name: &Arc<str>) -> Result<Arc<Shown>, Outcome> {
        let missing = |why: &str| {
            let text = format!("the client certificate {name} that the rule wants shown cannot be used: {why}");
            Outcome::new(Code::NoCertificate, text)
        };
        let Some(folder) = &self.folder else {
            return Err(missing("this gateway has none; set TULLE_GATEWAY_CLIENT_CERTIFICATES to their folder"));
        };
        // Held while files are read: nobody needs them twice.
        let mut all = self.known.lock().await;
        if all.len() >= MOST && !all.contains_key(name) {
            all.clear();
        }
        let known = all.entry(name.clone()).or_default();
        if known.looked.is_none_or(|at| at.elapsed() >= LOOK) {
            known.looked = Some(Instant::now());
            take(known, name, &folder.join(&**name)).await;
        }
        let Some(shown) = &known.shown else { return Err(missing(&known.error)) };
        if unix_now() >= shown.not_after {
            let also = if known.error.is_empty() { String::new() } else { format!("; {}", known.error) };
            return Err(missing(&format!("it is no longer valid; bring a new one into its Secret{also}")));
        }
        Ok(shown.clone())
    }
}

/// Takes over what is in `folder`.
async fn take(known: &mut Known, name: &str, folder: &Path) {
    let before = known.shown.as_ref().map(|shown| shown.print.clone());
    match read(folder, before.as_ref()).await {
        Ok(None) => known.error.clear(),
        Ok(Some(shown)) => {
            tracing::info!(
                certificate = name,
                not_after = shown.not_after,
                "took over a client certificate for hosts outside"
            );
            known.error.clear();
            known.shown = Some(Arc::new(shown));
        }
        Err(Unusable { text, gone }) => {
            if gone {
                known.shown = None;
            }
            if known.error != text && known.shown.is_some() {
                tracing::error!(
                    certificate = name,
                    error = text,
                    "a client certificate cannot be used; the one of before counts"
                );
            }
            known.error = text;
        }
    }
}

/// Why files cannot be used.
struct Unusable {
    text: String,
    /// There are none.
    gone: bool,
}

/// What is in `folder`; `None`: the same as `before`.
async fn read(folder: &Path, before: Option<&Arc<str>>) -> Result<Option<Shown>, Unusable> {
    let (certificates, key) = (folder.join("tls.crt"), folder.join("tls.key"));
    let file = async |path: &Path| {
        read_file(path).await.map_err(|error| Unusable {
            text: format!("{}: {error}; mount the Secret there, or correct `clientCertificate`", path.display()),
            gone: error.kind() == io::ErrorKind::NotFound,
        })
    };
    let (chain, secret) = (file(&certificates).await?, file(&key).await?);
    let print: Arc<str> = tulle_certs::fingerprint(&[&chain[..], &[0], &secret].concat()).into();
    if before == Some(&print) {
        return Ok(None);
    }
    // What a parser says may quote what it read, which may be a key.
    let unusable = |path: &Path, why: &str| Unusable { text: format!("{}: {why}", path.display()), gone: false };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&chain)
        .collect::<Result<_, _>>()
        .map_err(|_| unusable(&certificates, "it is no PEM"))?;
    let leaf = chain.first().ok_or_else(|| unusable(&certificates, "there is no certificate in it"))?;
    let not_after = tulle_certs::not_after(leaf).ok_or_else(|| unusable(&certificates, "its first one is none"))?;
    let secret = PrivateKeyDer::from_pem_slice(&secret)
        .map_err(|_| unusable(&key, "there is no private key of PKCS#8, PKCS#1 or SEC1 in it that is not encrypted"))?;
    let certified = CertifiedKey::from_der(chain, secret, &tls::provider())
        .map_err(|error| unusable(&key, &format!("it does not fit {}: {error}", certificates.display())))?;
    Ok(Some(Shown { print, key: Arc::new(certified), not_after }))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::{ClientCertificates, LOOK};
    use crate::outcome::Code;

    /// Writes a certificate of `name`, with another one's key if `torn`.
    fn write(folder: &Path, name: &str, torn: bool) {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let key = if torn { rcgen::KeyPair::generate().unwrap() } else { made.signing_key };
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("tls.crt"), made.cert.pem()).unwrap();
        std::fs::write(folder.join("tls.key"), key.serialize_pem()).unwrap();
    }

    /// What the certificate `bank/api` is after the next look.
    async fn look(all: &ClientCertificates) -> Result<Arc<str>, (Code, String)> {
        let name: Arc<str> = "bank/api".into();
        if let Some(known) = all.known.lock().await.get_mut(&name) {
            known.looked = known.looked.and_then(|at| at.checked_sub(LOOK));
        }
        let got = all.get(&name).await;
        got.map(|shown| shown.print.clone()).map_err(|outcome| (outcome.code, outcome.detail.to_string()))
    }

    #[tokio::test]
    async fn files_are_followed_and_half_written_ones_are_not_taken() {
        let none = look(&ClientCertificates::new(None)).await.unwrap_err();
        assert!(none.0 == Code::NoCertificate && none.1.contains("TULLE_GATEWAY_CLIENT_CERTIFICATES"), "{none:?}");
        let dir = tempfile::tempdir().unwrap();
        let all = ClientCertificates::new(Some(dir.path().to_owned()));
        let folder = dir.path().join("bank/api");
        let missing = look(&all).await.unwrap_err();
        assert!(missing.1.contains("bank/api/tls.crt") && missing.1.contains("clientCertificate"), "{missing:?}");

        write(&folder, "one.example", false);
        let first = look(&all).await.unwrap();
        assert_eq!(look(&all).await.unwrap(), first);
        write(&folder, "two.example", true);
        assert_eq!(look(&all).await.unwrap(), first, "a key that does not fit was taken");
        std::fs::write(folder.join("tls.crt"), "not PEM").unwrap();
        assert_eq!(look(&all).await.unwrap(), first);
        write(&folder, "two.example", false);
        let second = look(&all).await.unwrap();
        assert_ne!(second, first);
        std::fs::remove_file(folder.join("tls.key")).unwrap();
        let gone = look(&all).await.unwrap_err();
        assert!(gone.1.contains("tls.key"), "{gone:?}");
        // Another name, and never what is beside the folder.
        assert!(all.get(&"shop/api".into()).await.is_err());
    }

    #[tokio::test]
    async fn what_is_wrong_names_the_file_and_no_secret() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("bank/api");
        write(&folder, "one.example", true);
        let secret = std::fs::read_to_string(folder.join("tls.key")).unwrap();
        let error = look(&ClientCertificates::new(Some(dir.path().to_owned()))).await.unwrap_err();
        assert!(error.1.contains("tls.key") && error.1.contains("does not fit"), "{error:?}");
        let lines = secret.lines().filter(|line| !line.starts_with("-----"));
        assert!(lines.into_iter().all(|line| !error.1.contains(line)), "{error:?}");
    }
}
