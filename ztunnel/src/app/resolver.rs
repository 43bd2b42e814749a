//! The name server of each captured pod: its sockets, and who serves them.
//!
//! It serves until the pod's capture is forced to end, and not only until it is drained: a pod keeps its redirect rules
//! while the proxy stops, and without names it could not even reach what needs no proxy. A successor that has the same
//! sockets ends that: then every question is left to it.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::app::pods::Environment;
use crate::app::worker::Worker;
use crate::base::drain::Drained;
use crate::base::sockets::LocalSockets;
use crate::base::workers::{Accepted, Listening, spawn};
use crate::capture::pods::Pod;
use crate::dns::cache::Cache;
use crate::dns::own::OwnResolver;
use crate::dns::{Node, PodDns};
use crate::flow::LocalPod;
use crate::outbound;

/// Most of a resolv.conf that is read, bytes.
const RESOLV_CONF: usize = 64 << 10;

/// How names are answered on this node.
#[derive(Clone)]
pub struct Names {
    node: Node,
    addresses: Vec<SocketAddr>,
}

impl Names {
    /// Answers at `addresses` of each pod, for a cluster with the domain `domain`. There is at least one address, and
    /// all have one port.
    pub fn new(domain: &str, addresses: Vec<SocketAddr>, own: OwnResolver) -> Self {
        let domain = domain.trim_end_matches('.').to_ascii_lowercase();
        Self { node: Node { domain: domain.into(), cache: Cache::default(), own }, addresses }
    }

    /// The port that is redirected to.
    pub fn port(&self) -> u16 {
        self.addresses.first().map_or(0, SocketAddr::port)
    }

    /// Where names are answered in each pod that has the family.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Starts answering in a pod, at the `sockets` of the process before this one where they fit. Returns what it listens
    /// at: datagrams, then streams.
    ///
    /// # Errors
    /// Why it cannot listen there.
    pub async fn serve(
        &self,
        environment: &Environment,
        home: usize,
        listed: &Pod,
        pod: &Arc<LocalPod>,
        sockets: Option<GivenNames>,
        ends: NamesEnd<'_>,
    ) -> Result<Vec<Listening>, String> {
        let port = self.port();
        let failed = |error: std::io::Error| {
            format!(
                "cannot listen on port {port} in the pod for names: {error}; ISTIO_META_DNS_PROXY_ADDR sets another"
            )
        };
        let sockets = match sockets.filter(|given| given.are_at(&self.addresses)) {
            Some(GivenNames { datagrams, streams }) => {
                let conntrack = pod.sockets.conntrack().await.map_err(failed)?;
                LocalSockets { datagrams, streams, conntrack }
            }
            None => pod.sockets.listen_local(self.addresses.clone()).await.map_err(failed)?,
        };
        let shared = Arc::new(environment.shared.clone());
        let fallback = name_server(listed);
        let dns = Arc::new(PodDns::new((*shared).clone(), self.node.clone(), pod.clone(), sockets.conntrack, fallback));
        let mut listening = Vec::new();
        for datagrams in sockets.datagrams {
            let (dns, end, shown) = (dns.clone(), ends.datagrams.clone(), Listening::default());
            listening.push(shown.clone());
            let serve = move |_| spawn(dns.serve_datagrams(datagrams, shown, end));
            environment.workers.run(home, serve).map_err(failed)?;
        }
        for listener in sockets.streams {
            let (dns, shared, pod) = (dns.clone(), shared.clone(), pod.clone());
            let accepted: Accepted<Worker> = Arc::new(move |worker, tcp, load| {
                let (dns, shared, pod) = (dns.clone(), shared.clone(), pod.clone());
                let means = worker.out.clone();
                spawn(async move {
                    match dns.takes(&tcp).await {
                        Some(upstream) => dns.serve_stream(tcp, upstream).await,
                        None => outbound::serve(shared, means, pod, tcp).await,
                    }
                    drop(load);
                });
            });
            listening.push(environment.workers.accept(home, listener, ends.streams.clone(), accepted).map_err(failed)?);
        }
        Ok(listening)
    }
}

/// Sockets of a pod's name server that the process before this one opened.
#[derive(Debug, Default)]
pub struct GivenNames {
    /// One for each address.
    pub datagrams: Vec<UdpSocket>,
    /// The same for streams.
    pub streams: Vec<TcpListener>,
}

impl GivenNames {
    /// Whether they are where this process would listen. An IPv6 address that the pod does not have is left out there, too.
    fn are_at(&self, addresses: &[SocketAddr]) -> bool {
        let v4 = |all: &[SocketAddr]| all.iter().filter(|address| address.is_ipv4()).count();
        let at: Vec<SocketAddr> = self.datagrams.iter().filter_map(|socket| socket.local_addr().ok()).collect();
        let streams: Vec<SocketAddr> = self.streams.iter().filter_map(|socket| socket.local_addr().ok()).collect();
        !at.is_empty() && at == streams && at.iter().all(|one| addresses.contains(one)) && v4(&at) == v4(addresses)
    }
}

/// When a pod's name server ends.
#[derive(Clone, Copy)]
pub struct NamesEnd<'a> {
    /// Streams end as this drains.
    pub streams: &'a Drained,
    /// Datagrams are read until this is forced.
    pub datagrams: &'a Drained,
}

/// The first name server of the pod's resolv.conf, where that can be read: as the list says, or as `ip netns exec` finds it.
fn name_server(pod: &Pod) -> Option<SocketAddr> {
    let path = pod.resolv_conf.clone().or_else(|| of_named_netns(&pod.netns))?;
    let text = std::fs::read(path).ok()?;
    first_name_server(&String::from_utf8_lossy(&text[..text.len().min(RESOLV_CONF)]))
}

fn of_named_netns(netns: &Path) -> Option<PathBuf> {
    let named = netns.strip_prefix("/run/netns").or_else(|_| netns.strip_prefix("/var/run/netns")).ok()?;
    Some(Path::new("/etc/netns").join(named).join("resolv.conf"))
}

fn first_name_server(text: &str) -> Option<SocketAddr> {
    let mut servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    let address = servers.find_map(|rest| rest.split_whitespace().next()?.parse::<IpAddr>().ok())?;
    Some(SocketAddr::new(address, 53))
}

#[cfg(test)]
mod tests {
    use super::{first_name_server, of_named_netns};
    use std::path::Path;

    #[test]
    fn the_first_name_server_that_is_an_address_counts() {
        for (text, server) in [
            ("search a b\nnameserver 10.96.0.10\nnameserver 10.96.0.11\n", Some("10.96.0.10:53")),
            ("nameserver fe80::1%eth0\n  nameserver\tfd00::a # comment\n", Some("[fd00::a]:53")),
            ("# nameserver 1.1.1.1\noptions ndots:5\n", None),
            ("", None),
        ] {
            assert_eq!(first_name_server(text), server.map(|server| server.parse().unwrap()), "{text:?}");
        }
    }

    #[test]
    fn a_named_namespace_has_a_resolv_conf_of_its_own() {
        let expected = Path::new("/etc/netns/cart/resolv.conf").to_path_buf();
        assert_eq!(of_named_netns(Path::new("/run/netns/cart")), Some(expected.clone()));
        assert_eq!(of_named_netns(Path::new("/var/run/netns/cart")), Some(expected));
        assert_eq!(of_named_netns(Path::new("/proc/1/ns/net")), None);
    }
}
