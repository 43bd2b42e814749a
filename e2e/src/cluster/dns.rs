//! The cluster's name server: Services and ready endpoints as the API server has them, and the hosts outside.
//!
//! It is the lab's own small server with names that a watch keeps; a change is in force as soon as the watch says it.
//! Limits: as the lab's; ExternalName Services and SRV records are left out.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::RwLock;

use futures_util::StreamExt;
use futures_util::stream::select;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::Client;
use kube::ResourceExt;
use kube::config::KubeConfigOptions;
use kube::config::Kubeconfig;
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector;
use kube::runtime::reflector::Store;
use kube::runtime::watcher;

use crate::cluster::layout;
use crate::dns;
use crate::dns::Server;
use crate::dns::Zone;

/// Arguments of `lab cluster dns`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// How to reach the API server.
    #[arg(long)]
    kubeconfig: PathBuf,
    /// Where to answer.
    #[arg(long)]
    listen: IpAddr,
}

/// Answers until it is ended.
///
/// # Errors
/// When port 53 is taken, or the kubeconfig cannot be read.
pub fn serve(options: &Options) -> anyhow::Result<()> {
    let zone = Arc::new(RwLock::new(outside()));
    let _server = Server::here(options.listen, zone.clone())?;
    // Another part of the program may have chosen it already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(follow(options, &zone))
}

async fn follow(options: &Options, zone: &RwLock<Zone>) -> anyhow::Result<()> {
    let kubeconfig = Kubeconfig::read_from(&options.kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let (services, service_writer) = reflector::store::<Service>();
    let (slices, slice_writer) = reflector::store::<EndpointSlice>();
    let watch_services = watcher(Api::all(client.clone()), watcher::Config::default());
    let watch_slices = watcher(Api::all(client), watcher::Config::default());
    let service_changes = reflector(service_writer, watch_services).default_backoff().map(|event| event.map(drop));
    let slice_changes = reflector(slice_writer, watch_slices).default_backoff().map(|event| event.map(drop));
    let mut changes = std::pin::pin!(select(service_changes, slice_changes));
    while let Some(change) = changes.next().await {
        match change {
            Ok(()) => *zone.write().unwrap_or_else(PoisonError::into_inner) = names(&services, &slices),
            Err(error) => eprintln!("the watch: {error}; it goes on"),
        }
    }
    anyhow::bail!("the watch has ended")
}

fn outside() -> Zone {
    dns::plain(hosts())
}

fn hosts() -> impl Iterator<Item = (String, IpAddr)> {
    (0..).zip(layout::HOSTS).map(|(index, name)| (name.to_owned(), IpAddr::V4(layout::host_address(index))))
}

fn names(services: &Store<Service>, slices: &Store<EndpointSlice>) -> Zone {
    let mut names: Vec<(String, IpAddr)> = hosts().collect();
    for service in services.state() {
        let of = format!("{}.{}.svc.cluster.local", service.name_any(), service.namespace().unwrap_or_default());
        let own = service.spec.as_ref().and_then(|spec| spec.cluster_ips.clone()).unwrap_or_default();
        if own.iter().any(|address| address == "None") {
            let ready = slices.state().into_iter().filter(|slice| {
                slice.namespace() == service.namespace()
                    && slice.labels().get("kubernetes.io/service-name") == Some(&service.name_any())
            });
            let ready = ready.flat_map(|slice| {
                let endpoints = slice.endpoints.iter();
                let ready = endpoints.filter(|it| it.conditions.as_ref().and_then(|it| it.ready) != Some(false));
                ready.flat_map(|endpoint| endpoint.addresses.clone()).collect::<Vec<_>>()
            });
            names.extend(ready.filter_map(|address| Some((of.clone(), address.parse().ok()?))));
        } else {
            names.extend(own.iter().filter_map(|address| Some((of.clone(), address.parse().ok()?))));
        }
    }
    dns::plain(names)
}
