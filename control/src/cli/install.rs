//! `tulle install` and `tulle uninstall`: flags, and what is printed on the way.
//!
//! Both go on where they were interrupted when they are run again. Exit code 1 with a sentence that says what is missing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::time::Instant;
use tulle_proto::names;

use crate::cli::Failure;
use crate::cluster;
use crate::config::duration;
use crate::install::manifests::Input;
use crate::install::values::{DEFAULTS, Values};
use crate::install::{MANAGER, apply, manifests, uninstall};

/// Flags of `tulle install`.
#[derive(Debug, Args)]
pub(super) struct Install {
    /// A value of the chart, `path.to.value=VALUE`; the value is YAML. May come several times.
    #[arg(long, value_name = "PATH=VALUE")]
    set: Vec<String>,
    /// A file of values of the chart; may come several times, later ones win.
    #[arg(long, short = 'f', value_name = "FILE")]
    values: Vec<PathBuf>,
    /// Where it goes; the mesh's root namespace.
    #[arg(long, short, default_value = names::DEFAULT_ROOT_NAMESPACE)]
    namespace: String,
    /// Change nothing: print the objects as YAML (`client`), or let the API server check them (`server`).
    #[arg(long, value_name = "WHO", num_args = 0..=1, require_equals = true, default_missing_value = "client")]
    dry_run: Option<DryRun>,
    /// Print all values with their defaults, and do nothing else.
    #[arg(long)]
    show_values: bool,
    /// How long it may take.
    #[arg(long, default_value = "5m", value_parser = duration)]
    timeout: Duration,
    /// Do not wait until everything is ready.
    #[arg(long)]
    no_wait: bool,
    /// Take over fields that somebody else set.
    #[arg(long)]
    force_conflicts: bool,
}

/// Who checks a dry run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DryRun {
    /// Nobody: the objects are printed.
    Client,
    /// The API server, which keeps nothing.
    Server,
}

/// Flags of `tulle uninstall`.
#[derive(Debug, Args)]
pub(super) struct Uninstall {
    /// Where Tulle is.
    #[arg(long, short, default_value = names::DEFAULT_ROOT_NAMESPACE)]
    namespace: String,
    /// Namespaces labelled tulle.dev/egress=deny may open. Without it, uninstalling stops if there are any.
    #[arg(long)]
    open_egress: bool,
    /// Release all pods and clean the nodes; leave the objects to whoever made them.
    #[arg(long)]
    nodes_only: bool,
    /// Delete the definitions of tulle.dev with all objects of users, the keys of the CA and the namespace, too.
    #[arg(long, conflicts_with = "nodes_only")]
    purge: bool,
    /// Go on when pods are not released, or nodes not cleaned, in time.
    #[arg(long)]
    force: bool,
    /// How long the release of pods may take, and then the cleaning of nodes.
    #[arg(long, default_value = "5m", value_parser = duration)]
    timeout: Duration,
}

/// Which cluster.
pub(super) struct Where<'a> {
    pub(super) kubeconfig: Option<&'a Path>,
    pub(super) context: Option<&'a str>,
}

/// Lines appear as they come: the steps take minutes.
fn say(line: String) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    // A closed pipe is not an error worth words.
    let _ = writeln!(out, "{line}");
}

pub(super) fn install(options: &Install, at: &Where<'_>) -> Result<String, Failure> {
    if options.show_values {
        return Ok(DEFAULTS.to_owned());
    }
    let read = |file: &PathBuf| {
        std::fs::read_to_string(file)
            .map_err(|error| Failure::wrong(format!("--values: cannot read {}: {error}", file.display())))
    };
    let files = options.values.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let values = Values::read(&files, &options.set).map_err(Failure::wrong)?;
    let input = Input { values: &values, namespace: &options.namespace, managed_by: MANAGER };
    let mut objects = vec![manifests::namespace(&options.namespace, MANAGER)];
    objects.extend(manifests::objects(&input).map_err(Failure::wrong)?);
    if options.dry_run == Some(DryRun::Client) {
        return documents(&objects);
    }
    in_cluster(at, async |client, server| {
        say(format!("installing into {} of {server}", options.namespace));
        let deadline = Instant::now() + options.timeout;
        let dry_run = options.dry_run.is_some();
        let how = apply::Options { dry_run, force: options.force_conflicts, deadline };
        apply::apply(client, &objects, how, &mut say).await?;
        if dry_run {
            return Ok(());
        }
        apply::prune(client, &options.namespace, &objects, &mut say).await?;
        if values.control.cluster_trust_bundle == "off" {
            uninstall::unpublish(client, &mut say).await;
        }
        if !options.no_wait {
            apply::ready(client, &objects, deadline, &mut say).await?;
            say("installed. Put a namespace into the mesh: kubectl label namespace NAME tulle.dev/mesh=enabled".into());
        }
        Ok(())
    })
}

/// Objects as one stream of YAML documents.
fn documents(objects: &[serde_json::Value]) -> Result<String, Failure> {
    let mut text = String::new();
    for object in objects {
        let one =
            serde_saphyr::to_string(object).map_err(|error| Failure::wrong(format!("cannot write YAML: {error}")))?;
        text.push_str("---\n");
        text.push_str(one.trim_end());
        text.push('\n');
    }
    Ok(text)
}

pub(super) fn uninstall(options: &Uninstall, at: &Where<'_>) -> Result<String, Failure> {
    in_cluster(at, async |client, server| {
        say(format!("uninstalling from {} of {server}", options.namespace));
        let how = uninstall::Options {
            namespace: options.namespace.clone(),
            open_egress: options.open_egress,
            nodes_only: options.nodes_only,
            purge: options.purge,
            force: options.force,
            timeout: options.timeout,
        };
        uninstall::uninstall(client, &how, &mut say).await?;
        say("done".to_owned());
        Ok(())
    })
}

/// Runs the steps with a client.
fn in_cluster(
    at: &Where<'_>,
    steps: impl AsyncFnOnce(&kube::Client, &str) -> anyhow::Result<()>,
) -> Result<String, Failure> {
    // `tulle` has no use for a provider elsewhere; a second installation could only be ours, too.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::wrong(error.to_string()))?;
    let done = runtime.block_on(async {
        let (client, server) = cluster::user(at.kubeconfig, at.context).await?;
        steps(&client, &server).await
    });
    done.map(|()| String::new()).map_err(|error| Failure::wrong(format!("{error:#}")))
}
