//! The connection to a Kubernetes API server: whom to ask, as whom, and how long an answer may take.
//!
//! Without a kubeconfig control is a pod and uses its service account; the token and the CA are read again as the kubelet
//! renews them. One client is made at the start and cloned: its clones share connections and the token. Its own retries
//! are off, because whoever asks knows better when to ask again, and must know at once that the server does not answer.
//! Limits: a request without a deadline of its own ends after [`SILENCE`] without a byte.

pub mod authority;
pub mod bundle;
pub mod lease;
pub mod plugged;
pub mod tokens;
mod user;

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use http::HeaderValue;
use http::header::USER_AGENT;
use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig};

pub use kube::Client;

pub use user::user;

/// A server in the same cluster answers in milliseconds; further away it is at most some seconds.
const CONNECT: Duration = Duration::from_secs(10);
/// A connection without a byte for this long is given up. A watch brings a bookmark each minute.
const SILENCE: Duration = Duration::from_secs(180);
/// A request that cannot be written for this long is given up.
const WRITE: Duration = Duration::from_secs(30);

/// Who writes, in the managed fields of objects.
pub const FIELD_MANAGER: &str = "tulle";

/// A client for the API server. `kubeconfig` is what `--kubeconfig` says: a file, or several with `:` between them as in
/// `KUBECONFIG`; without it the service account of the pod is used.
///
/// # Errors
/// The configuration cannot be read, or names credentials that cannot be used. Whether the server answers is not tried.
pub async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let mut config = config(kubeconfig, None).await?;
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(SILENCE);
    config.write_timeout = Some(WRITE);
    config.default_retry = false;
    let agent = concat!("tulle-control/", env!("CARGO_PKG_VERSION"));
    config.headers.push((USER_AGENT, HeaderValue::from_static(agent)));
    let server = config.cluster_url.to_string();
    let client = Client::try_from(config).with_context(|| format!("cannot make a client for {server}"))?;
    tracing::info!(server, "uses this Kubernetes API server");
    Ok(client)
}

async fn config(kubeconfig: Option<&Path>, context: Option<&str>) -> anyhow::Result<Config> {
    let Some(files) = kubeconfig else {
        return Config::incluster().context(
            "there is no --kubeconfig (KUBECONFIG), and this is no pod with a service account: \
             name a kubeconfig, or run control in the cluster with automountServiceAccountToken",
        );
    };
    let shown = files.display();
    let mut merged = Kubeconfig::default();
    for file in std::env::split_paths(files).filter(|file| !file.as_os_str().is_empty()) {
        let one =
            Kubeconfig::read_from(&file).with_context(|| format!("cannot read the kubeconfig {}", file.display()))?;
        merged = merged.merge(one).with_context(|| format!("--kubeconfig {shown}: its files do not fit together"))?;
    }
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    Config::from_custom_kubeconfig(merged, &options)
        .await
        .with_context(|| format!("--kubeconfig {shown} cannot be used"))
}

/// An error of a request in one sentence, without what the request carried.
pub(crate) fn words(error: &kube::Error) -> String {
    use std::error::Error;
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        kube::Error::Api(status) => format!("{} {}", status.code, status.reason),
        other => {
            // The innermost cause says what happened; the layers around it do not.
            let mut cause: &dyn Error = other;
            while let Some(inner) = cause.source() {
                cause = inner;
            }
            cause.to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::client;

    #[tokio::test]
    async fn a_kubeconfig_that_cannot_be_used_is_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let (absent, empty, other) = (dir.path().join("absent"), dir.path().join("empty"), dir.path().join("other"));
        std::fs::write(&empty, "").unwrap();
        std::fs::write(&other, "kind: Pod\napiVersion: v1\nclusters: 5\n").unwrap();
        for file in [absent, empty, other] {
            let error = client(Some(&file)).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
            assert!(error.contains(&file.display().to_string()), "{error}");
        }
    }

    #[tokio::test]
    async fn files_of_a_list_are_joined() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        std::fs::write(
            &first,
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n",
        )
        .unwrap();
        std::fs::write(
            &second,
            "apiVersion: v1\nkind: Config\nclusters: [{name: k, cluster: {server: 'http://127.0.0.1:1'}}]\n\
             users: [{name: u, user: {token: t}}]\n",
        )
        .unwrap();
        let both = std::env::join_paths([&first, &second]).unwrap();
        client(Some(Path::new(&both))).await.unwrap();
        assert!(client(Some(&first)).await.is_err(), "one alone names no server");
    }
}
