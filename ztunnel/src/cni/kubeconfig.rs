//! How the plugin reaches the API server while the node's agent is away: a kubeconfig of its own in the state folder.
//!
//! The installer writes it ([`Access::render`]) from what the agent itself uses, in the form that every tool of Kubernetes reads,
//! with everything inside of it, since the plugin runs where the agent's mounts are not. Only what the installer can be given is
//! read: a server, its roots, and a token or a client certificate. Exec and auth-provider plugins would start programs of a
//! user inside a container runtime; they are refused with that reason. Reading files is left to the caller.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tulle_certs::pem::base64;

/// Name of the file in the state folder.
pub const FILE: &str = "kubeconfig";
/// Largest kubeconfig, token or certificate that is read.
pub const FILE_MAX: u64 = 1 << 20;

/// How to reach the API server, with everything inside.
#[derive(Clone, PartialEq, Eq)]
pub struct Access {
    /// `https://host:port`.
    pub server: String,
    /// The name that its certificate must carry, if not the host's.
    pub tls_server_name: Option<String>,
    /// Roots that its certificate is checked with, PEM.
    pub roots: String,
    /// Bearer token.
    pub token: Option<String>,
    /// Client certificate and key, PEM.
    pub certificate: Option<(String, String)>,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Nothing of what is secret.
        f.debug_struct("Access").field("server", &self.server).finish_non_exhaustive()
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawConfig {
    #[serde(default, rename = "apiVersion")]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    clusters: Vec<Named<Slot>>,
    #[serde(default)]
    users: Vec<Named<Slot>>,
    #[serde(default)]
    contexts: Vec<Named<Slot>>,
    #[serde(default)]
    current_context: String,
}

#[derive(Default, Serialize, Deserialize)]
struct Named<T> {
    #[serde(default)]
    name: String,
    #[serde(flatten)]
    slot: T,
}

/// The one of the three that a list is about.
#[derive(Default, Serialize, Deserialize)]
struct Slot {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cluster: Option<Cluster>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user: Option<User>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    context: Option<Context>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    #[serde(default)]
    server: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tls_server_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    certificate_authority: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    certificate_authority_data: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    insecure_skip_tls_verify: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    proxy_url: Option<String>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    #[serde(default, rename = "tokenFile", skip_serializing_if = "Option::is_none")]
    token_file: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_certificate: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_certificate_data: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_key: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_key_data: Option<String>,
}

#[derive(Default, Serialize, Deserialize)]
struct Context {
    #[serde(default)]
    cluster: String,
    #[serde(default)]
    user: String,
}

impl Access {
    /// Reads a kubeconfig. Files that it names are read by `load`; relative ones are below `folder`.
    ///
    /// # Errors
    /// What is missing or cannot be used.
    pub fn read(text: &str, folder: &Path, load: impl Fn(&Path) -> Result<String, String>) -> Result<Self, String> {
        // Ours is JSON, with letters that YAML would want to have escaped.
        let raw = serde_json::from_str(text).or_else(|_| serde_saphyr::from_str(text));
        let raw: RawConfig = raw.map_err(|error| format!("it is no kubeconfig: {error}"))?;
        let current = raw.contexts.into_iter().find(|it| it.name == raw.current_context);
        let context = current
            .and_then(|it| it.slot.context)
            .ok_or_else(|| format!("it has no context {:?}, which current-context names", raw.current_context))?;
        let cluster = raw.clusters.into_iter().find(|it| it.name == context.cluster).and_then(|it| it.slot.cluster);
        let cluster = cluster.ok_or_else(|| format!("it has no cluster {:?}", context.cluster))?;
        let user = raw.users.into_iter().find(|it| it.name == context.user).and_then(|it| it.slot.user);
        let user = user.ok_or_else(|| format!("it has no user {:?}", context.user))?;
        if cluster.insecure_skip_tls_verify || cluster.proxy_url.is_some() {
            return Err("insecure-skip-tls-verify and proxy-url are not used here; name the server's roots".to_owned());
        }
        let either = |data: Option<String>, file: Option<PathBuf>| match (data, file) {
            (Some(data), _) => decode_base64(&data).map(Some),
            (None, Some(file)) => load(&folder.join(file)).map(Some),
            (None, None) => Ok(None),
        };
        let roots = either(cluster.certificate_authority_data, cluster.certificate_authority)?;
        let token = match (user.token, user.token_file) {
            (Some(token), _) => Some(token),
            (None, Some(file)) => Some(load(&folder.join(file))?),
            (None, None) => None,
        };
        let certificate = either(user.client_certificate_data, user.client_certificate)?;
        let certificate = certificate.zip(either(user.client_key_data, user.client_key)?);
        if token.is_none() && certificate.is_none() {
            return Err(format!(
                "its user {:?} has neither token nor client certificate, and a plugin starts no other programs for it",
                context.user
            ));
        }
        Ok(Self {
            server: cluster.server,
            tls_server_name: cluster.tls_server_name.filter(|name| !name.is_empty()),
            roots: roots.ok_or("its cluster has no certificate-authority")?,
            token: token.map(|token| token.trim().to_owned()),
            certificate,
        })
    }

    /// Host and port of the server.
    ///
    /// # Errors
    /// That it is not `https://host[:port]`.
    pub fn host_and_port(&self) -> Result<(String, u16), String> {
        let wrong = || format!("the server {:?} is not https://host:port", self.server);
        let rest = self.server.strip_prefix("https://").ok_or_else(wrong)?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match rest.rsplit_once(':') {
            // The colons of an IPv6 address without port are inside of its brackets.
            Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| wrong())?),
            _ => (rest, 443),
        };
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let foreign = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '@' | '?' | '#' | '[' | ']');
        if host.is_empty() || host.contains(foreign) {
            return Err(wrong());
        }
        Ok((host.to_owned(), port))
    }

    /// The kubeconfig with everything inside. JSON, which every reader of YAML reads.
    pub fn render(&self) -> String {
        let user = User {
            token: self.token.clone(),
            client_certificate_data: self.certificate.as_ref().map(|(certificate, _)| base64(certificate.as_bytes())),
            client_key_data: self.certificate.as_ref().map(|(_, key)| base64(key.as_bytes())),
            ..User::default()
        };
        let cluster = Cluster {
            server: self.server.clone(),
            tls_server_name: self.tls_server_name.clone(),
            certificate_authority_data: Some(base64(self.roots.as_bytes())),
            ..Cluster::default()
        };
        let name = || "tulle-cni".to_owned();
        let named = |slot| vec![Named { name: name(), slot }];
        let config = RawConfig {
            api_version: "v1".to_owned(),
            kind: "Config".to_owned(),
            clusters: named(Slot { cluster: Some(cluster), ..Slot::default() }),
            users: named(Slot { user: Some(user), ..Slot::default() }),
            contexts: named(Slot { context: Some(Context { cluster: name(), user: name() }), ..Slot::default() }),
            current_context: name(),
        };
        serde_json::to_string_pretty(&config).unwrap_or_default() + "\n"
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn decode_base64(text: &str) -> Result<String, String> {
    let wrong = || "it has data that is not base64 of a text".to_owned();
    let (mut out, mut bits, mut count) = (Vec::with_capacity(text.len() / 4 * 3), 0_u32, 0);
    for byte in text.bytes().filter(|byte| !byte.is_ascii_whitespace() && *byte != b'=') {
        let six = ALPHABET.iter().position(|letter| *letter == byte).ok_or_else(wrong)?;
        bits = (bits << 6 | u32::try_from(six).map_err(|_| wrong())?) & 0xff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count & 0xff) as u8);
        }
    }
    String::from_utf8(out).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tulle_certs::pem::base64;

    use super::{Access, decode_base64};

    fn none(path: &Path) -> Result<String, String> {
        Err(format!("{} was to be read", path.display()))
    }

    fn access() -> Access {
        Access {
            server: "https://10.96.0.1:443".into(),
            tls_server_name: Some("kubernetes".into()),
            roots: "-----BEGIN CERTIFICATE-----\nAA==\n".into(),
            token: Some("t.o.k".into()),
            certificate: None,
        }
    }

    #[test]
    fn what_is_written_is_read_again_and_shows_no_secret() {
        for certificate in [None, Some(("cert".to_owned(), "key".to_owned()))] {
            let access = Access { certificate, ..access() };
            assert_eq!(Access::read(&access.render(), Path::new("/"), none), Ok(access.clone()));
            assert!(!format!("{access:?}").contains("t.o.k"));
        }
    }

    #[test]
    fn files_that_it_names_are_beside_it() {
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: b\ncontexts: [{name: a, context: {}}, {name: b, context: {cluster: c, user: u, namespace: x}}]\nclusters: [{name: c, cluster: {server: 'https://[fd00::1]:6443', certificate-authority: ca.crt}}]\nusers: [{name: u, user: {tokenFile: /run/token}}]\npreferences: {}\n";
        let load = |path: &Path| Ok(format!("<{}>\n", path.display()));
        let access = Access::read(text, Path::new("/etc/x"), load).unwrap();
        assert_eq!((access.roots.as_str(), access.token.as_deref()), ("</etc/x/ca.crt>\n", Some("</run/token>")));
        assert_eq!(access.host_and_port(), Ok(("fd00::1".into(), 6443)));
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        let good = access().render();
        let exec = good.replace("\"token\": \"t.o.k\"", "\"exec\": {\"command\": \"aws\"}");
        let unchecked = good.replace("\"tls-server-name\"", "\"insecure-skip-tls-verify\": true, \"tls-server-name\"");
        for (text, says) in [
            ("{", "no kubeconfig"),
            ("{}", "no context"),
            (&good.replace("\"cluster\": \"tulle-cni\"", "\"cluster\": \"other\""), "no cluster"),
            (&exec, "neither token nor"),
            (&unchecked, "insecure"),
            (&good.replace("certificate-authority-data", "unknown"), "certificate-authority"),
        ] {
            let error = Access::read(text, Path::new("/"), none).unwrap_err();
            assert!(error.contains(says), "{says}: {error}");
        }
        for server in ["http://a:1", "https://", "https://a:x", "https://a:1/path", "https://a b:1", "a:1"] {
            assert!(Access { server: server.into(), ..access() }.host_and_port().is_err(), "{server}");
        }
    }

    #[test]
    fn base64_is_what_others_write() {
        for (text, encoded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(text.as_bytes()), encoded);
            assert_eq!(decode_base64(encoded).as_deref(), Ok(text));
        }
        assert!(decode_base64("Zm9!").is_err());
    }
}
