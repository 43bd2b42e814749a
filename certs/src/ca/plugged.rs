//! An intermediate that another CA made, as cert-manager or an administrator leaves it in a Secret: taken into a CA
//! directory, again whenever it is renewed.
//!
//! The root's key stays where it is: nothing here can renew such an intermediate, or rotate its root. It is taken only if
//! it may sign, fits its key, is signed by a root of its bundle, and that bundle also holds the root of the intermediate that
//! signs until now: otherwise everybody with a certificate of before would be cut off at once. Limits: the root signs
//! it directly; ECDSA, as the proxies' certificates are.

use std::collections::BTreeMap;
use std::path::Path;

use rcgen::KeyPair;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::Roots;
use crate::ca::files::{self, CA_CERT, CA_KEY, NEXT_ROOT_KEY, OLD_ROOT_KEY, ROOT_CERT, ROOT_KEY};
use crate::ca::{CaError, replaced};
use crate::pem;

/// Names of root, certificate and key: as Istio's plugged-in CA has them, and as cert-manager writes them.
const NAMES: [[&str; 3]; 2] = [[ROOT_CERT, CA_CERT, CA_KEY], ["ca.crt", "tls.crt", "tls.key"]];

/// What was given. No `Debug`: there is a key in it.
pub struct Given {
    roots: Roots,
    certificate: CertificateDer<'static>,
    key: KeyPair,
    /// The names under which it was found.
    names: [&'static str; 3],
}

impl Given {
    /// Reads it from the keys of a Secret.
    ///
    /// # Errors
    /// What is missing or cannot be read, by its name.
    pub fn read(secret: &BTreeMap<String, String>) -> Result<Self, CaError> {
        let whole = |names: &&[&'static str; 3]| names.iter().all(|name| secret.contains_key(*name));
        let Some(names) = NAMES.iter().find(whole) else {
            let sets = NAMES.map(|names| names.join(", ")).join("; or ");
            return Err(bad("the Secret", &format!("it has not all of {sets}")));
        };
        let text = |at: usize| secret.get(names[at]).map_or("", String::as_str);
        let roots = Roots::from_pem(text(0).as_bytes())
            .map_err(|source| CaError::Roots { path: Path::new(names[0]).to_owned(), source })?;
        let certificate = CertificateDer::from_pem_slice(text(1).as_bytes())
            .map_err(|_| bad(names[1], "it has no certificate in PEM"))?;
        // What the parser says could quote the key.
        let key = KeyPair::from_pem(text(2)).map_err(|_| bad(names[2], "it is not a PKCS#8 private key in PEM"))?;
        Ok(Self { roots, certificate, key, names: *names })
    }
}

/// Makes the directory hold it; `now` in Unix seconds. False: it held it already.
///
/// # Errors
/// If it cannot be used, or not without cutting off whom the directory's authority signed; nothing has changed then.
pub fn take(dir: &Path, given: &Given, now: i64) -> Result<bool, CaError> {
    std::fs::create_dir_all(dir).map_err(|source| files::io("create", dir, source))?;
    let _lock = files::lock(dir)?;
    let before = files::read_roots(dir)?;
    let current = match &before {
        // The root's own word about the intermediate matters here, not whether it may still sign.
        Some(_) => {
            files::read(&dir.join(CA_CERT))?.and_then(|text| CertificateDer::from_pem_slice(text.as_bytes()).ok())
        }
        None => None,
    };
    let own_root =
        [ROOT_KEY, NEXT_ROOT_KEY, OLD_ROOT_KEY].map(|name| dir.join(name)).into_iter().filter(|it| it.exists());
    let own_root: Vec<_> = own_root.collect();
    let key_fits = files::read_key(&dir.join(CA_KEY))?.is_some_and(|key| files::fits(&given.certificate, &key));
    let same = current.as_ref() == Some(&given.certificate) && before.as_ref() == Some(&given.roots);
    if same && key_fits && own_root.is_empty() {
        return Ok(false);
    }
    let [roots, certificate, key] = given.names;
    if !files::fits(&given.certificate, &given.key) {
        return Err(bad(key, &format!("it is not the key of {certificate}")));
    }
    files::chains(&given.certificate, given.roots.certificates(), now)
        .map_err(|why| bad(certificate, &format!("it cannot be used with {roots}: {why}")))?;
    if let Some(current) = current
        && !files::is_signed(&current, given.roots.certificates())
    {
        let reason = "it has not the root of the intermediate that signs now, and everybody who was signed by that would be cut \
                      off: add that root, and take it away a day after the new intermediate signs";
        return Err(bad(roots, reason));
    }
    if !key_fits {
        replaced::keep(dir)?;
    }
    files::write(&dir.join(ROOT_CERT), &given.roots.to_pem(), 0o644)?;
    for path in own_root {
        std::fs::remove_file(&path).map_err(|source| files::io("remove", &path, source))?;
    }
    files::write(&dir.join(CA_KEY), &given.key.serialize_pem(), 0o600)?;
    files::write(&dir.join(CA_CERT), &pem::encode("CERTIFICATE", &given.certificate), 0o644)?;
    Ok(true)
}

fn bad(name: &str, reason: &str) -> CaError {
    CaError::Content { path: Path::new(name).to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::{Authority, new_key, self_signed_root, signed_intermediate};
    use crate::issued;

    const NOW: i64 = 1_800_000_000;

    /// A CA outside: its root, and the key of that.
    struct Outside {
        root: CertificateDer<'static>,
        key: KeyPair,
    }

    impl Outside {
        fn new() -> Self {
            let key = new_key().unwrap();
            Self { root: self_signed_root(&key, NOW).unwrap().into(), key }
        }

        /// A new intermediate, with a bundle of `roots`.
        fn secret(&self, roots: &[&Self], names: [&str; 3]) -> BTreeMap<String, String> {
            let key = new_key().unwrap();
            let root_key = KeyPair::from_pem(&self.key.serialize_pem()).unwrap();
            let issuer = rcgen::Issuer::from_ca_cert_der(&self.root, root_key).unwrap();
            let end = issued::facts(&self.root).unwrap().not_after;
            let certificate = signed_intermediate(&key, &issuer, end, NOW).unwrap();
            let bundle: String = roots.iter().map(|it| pem::encode("CERTIFICATE", &it.root)).collect();
            let texts = [bundle, certificate.pem(), key.serialize_pem()];
            names.into_iter().map(str::to_owned).zip(texts).collect()
        }
    }

    fn said<T>(result: Result<T, CaError>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn an_intermediate_of_another_ca_signs_and_is_renewed_and_its_root_is_replaced_in_two_steps() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (Outside::new(), Outside::new());
        let give = |secret: BTreeMap<String, String>| take(dir.path(), &Given::read(&secret)?, NOW);
        let open = || Authority::open(dir.path(), NOW).unwrap();
        let first = one.secret(&[&one], NAMES[0]);
        assert!(give(first.clone()).unwrap());
        let before = open();
        assert_eq!(before.roots().certificates(), std::slice::from_ref(&one.root));
        assert!(!give(first).unwrap(), "it is there already");
        assert!(!dir.path().join(ROOT_KEY).exists(), "the root's key is nobody's business here");

        // As cert-manager renews it.
        assert!(give(one.secret(&[&one], NAMES[1])).unwrap());
        let renewed = open();
        assert_ne!(renewed.intermediate(), before.intermediate());
        assert_eq!(renewed.token_key().public_pem, before.token_key().public_pem, "tokens of before are still good");
        assert_eq!(replaced::list(dir.path()).unwrap().len(), 1, "what it signed can still be taken back");

        let refused = said(give(two.secret(&[&two], NAMES[0])));
        assert!(refused.contains("would be cut off"), "{refused}");
        assert_eq!(open().intermediate(), renewed.intermediate());
        assert!(give(two.secret(&[&one, &two], NAMES[0])).unwrap());
        assert_eq!(open().roots().certificates().len(), 2);
        assert!(give(two.secret(&[&two], NAMES[0])).unwrap());
        assert_eq!(open().roots().certificates(), std::slice::from_ref(&two.root));
    }

    #[test]
    fn an_authority_that_made_its_own_root_goes_over_to_another_ca() {
        let dir = tempfile::tempdir().unwrap();
        let own = Authority::open(dir.path(), NOW).unwrap();
        let outside = Outside::new();
        let mut secret = outside.secret(&[&outside], NAMES[0]);
        assert!(said(take(dir.path(), &Given::read(&secret).unwrap(), NOW)).contains("would be cut off"));
        assert!(dir.path().join(ROOT_KEY).exists(), "nothing has changed");
        secret.entry(ROOT_CERT.to_owned()).or_default().push_str(&own.roots().to_pem());
        assert!(take(dir.path(), &Given::read(&secret).unwrap(), NOW).unwrap());
        let after = Authority::open(dir.path(), NOW).unwrap();
        assert_ne!(after.intermediate(), own.intermediate());
        assert_eq!(after.roots().certificates().len(), 2);
        assert!(!dir.path().join(ROOT_KEY).exists(), "its own root signs no more");
        // Past half of its life nothing is made in its place.
        let late = Authority::open(dir.path(), NOW + 300 * 24 * 3600).unwrap();
        assert_eq!(late.intermediate(), after.intermediate());
    }

    #[test]
    fn what_cannot_sign_is_refused_by_name() {
        let (one, two) = (Outside::new(), Outside::new());
        let good = one.secret(&[&one], NAMES[1]);
        let with = |name: &str, text: &str| {
            let mut secret = good.clone();
            secret.insert(name.to_owned(), text.to_owned());
            secret
        };
        let other = two.secret(&[&two], NAMES[1]);
        let leaf = {
            let key = new_key().unwrap();
            let root_key = KeyPair::from_pem(&one.key.serialize_pem()).unwrap();
            let issuer = rcgen::Issuer::from_ca_cert_der(&one.root, root_key).unwrap();
            let params = crate::ca::leaf_params((NOW - 60, NOW + 3600)).unwrap();
            let texts = [
                pem::encode("CERTIFICATE", &one.root),
                params.signed_by(&key, &issuer).unwrap().pem(),
                key.serialize_pem(),
            ];
            NAMES[1].into_iter().map(str::to_owned).zip(texts).collect::<BTreeMap<_, _>>()
        };
        for (name, secret, now, expected) in [
            ("nothing", BTreeMap::new(), NOW, "ca.crt, tls.crt, tls.key"),
            ("no root", with("ca.crt", ""), NOW, "ca.crt"),
            ("no certificate", with("tls.crt", "x"), NOW, "tls.crt cannot be used"),
            ("no key", with("tls.key", "x"), NOW, "tls.key cannot be used"),
            ("another key", with("tls.key", &other["tls.key"]), NOW, "not the key of tls.crt"),
            ("another root", with("ca.crt", &other["ca.crt"]), NOW, "no root signed it"),
            ("it has ended", good.clone(), NOW + 400 * 24 * 3600, "not valid now"),
            ("no CA", leaf, NOW, "not a CA certificate"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let refused = said(Given::read(&secret).and_then(|given| take(dir.path(), &given, now)));
            assert!(refused.contains(expected), "{name}: {refused}");
            assert!(!dir.path().join(CA_CERT).exists(), "{name}");
        }
    }
}
