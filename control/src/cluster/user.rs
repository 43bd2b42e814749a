//! The connection to a cluster for a person's command: as kubectl chooses it.
//!
//! `--kubeconfig`, else `KUBECONFIG`, else `~/.kube/config`, with `--context` or the current one; without any of these files
//! the command runs in a pod and is its service account. Its requests end after a minute without a byte.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// Commands ask for lists and single objects, which come in seconds even from afar.
const SILENCE: Duration = Duration::from_secs(60);

/// A client, and the server that it asks, for messages.
///
/// # Errors
/// The configuration cannot be read, or has no such context. Whether the server answers is not tried.
pub async fn user(kubeconfig: Option<&Path>, context: Option<&str>) -> anyhow::Result<(Client, String)> {
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    let mut config = match kubeconfig {
        Some(file) => {
            let read = Kubeconfig::read_from(file)
                .with_context(|| format!("cannot read the kubeconfig {}", file.display()))?;
            Config::from_custom_kubeconfig(read, &options)
                .await
                .with_context(|| format!("the kubeconfig {} cannot be used", file.display()))?
        }
        None => match Config::from_kubeconfig(&options).await {
            Ok(config) => config,
            Err(error) if context.is_some() => {
                return Err(error).with_context(|| "the kubeconfig (KUBECONFIG, ~/.kube/config) cannot be used");
            }
            Err(error) => Config::incluster()
                .map_err(|_| error)
                .context("no cluster is known: name one by --kubeconfig, KUBECONFIG or ~/.kube/config")?,
        },
    };
    config.connect_timeout = Some(Duration::from_secs(10));
    config.read_timeout = Some(SILENCE);
    config.default_retry = false;
    let server = config.cluster_url.to_string();
    let client = Client::try_from(config).with_context(|| format!("cannot make a client for {server}"))?;
    Ok((client, server))
}

#[cfg(test)]
mod tests {
    use super::user;

    #[tokio::test]
    async fn a_context_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config");
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n\
                    clusters: [{name: k, cluster: {server: 'http://127.0.0.1:1'}}]\nusers: [{name: u, user: {token: t}}]\n";
        std::fs::write(&file, text).unwrap();
        let (_, server) = user(Some(&file), None).await.unwrap();
        assert_eq!(server, "http://127.0.0.1:1/");
        let error = user(Some(&file), Some("absent")).await.err().map(|error| format!("{error:#}")).unwrap();
        assert!(error.contains("absent"), "{error}");
    }
}
