//! Every setting of the proxy: a flag and an environment variable each, named as Istio's ztunnel names them where it has
//! them.
//!
//! The only reader of the environment. Modules get their part by value and never import this one.

pub mod cluster;
pub mod cni;
pub mod gateway;
pub mod istio;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::config::cluster::Cluster;

/// What to do with connections from before capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preexisting {
    /// They live on, counted.
    Keep,
    /// They are reset.
    Reset,
}

/// Whether something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It is.
    On,
    /// It is not.
    Off,
}

/// Log line format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Plain,
    /// One JSON object a line.
    Json,
}

/// Settings of `ztunnel node`.
#[derive(Clone, Debug, Args)]
pub struct Node {
    /// Name of this node, as Kubernetes knows it.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// Name of the proxy's own pod.
    #[arg(long, env = "POD_NAME", default_value = "ztunnel")]
    pub pod_name: String,
    /// Namespace of the proxy's own pod.
    #[arg(long, env = "POD_NAMESPACE", default_value = "tulle-system")]
    pub pod_namespace: String,
    /// Service account of the proxy.
    #[arg(long, env = "SERVICE_ACCOUNT", default_value = "ztunnel")]
    pub service_account: String,
    /// Address of the proxy's own pod.
    #[arg(long, env = "INSTANCE_IP", default_value = "1.1.1.1")]
    pub instance_ip: String,
    /// Network of this node. Empty: the one network of the cluster.
    #[arg(long, env = "NETWORK", default_value = "")]
    pub network: String,
    /// Cluster id.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Trust domain of pods that control has not described yet.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Other names of the trust domain, as while it is renamed, comma-separated: peers that prove an identity there count
    /// as those of the own domain.
    #[arg(long, env = "TULLE_TRUST_DOMAIN_ALIASES", value_delimiter = ',')]
    pub trust_domain_aliases: Vec<String>,
    /// File of revocation lists, PEM or DER; replaced by rename, watched. Empty: nothing was taken back.
    #[arg(long, env = "CRL_PATH")]
    pub crl_path: Option<PathBuf>,
    /// Where discovery comes from.
    #[arg(long, env = "XDS_ADDRESS", default_value = "https://control.tulle-system.svc:15012")]
    pub xds_address: String,
    /// File that says what the mesh is, in the place of discovery: workloads, services and policies in Istio's YAML;
    /// watched.
    #[arg(long, env = "LOCAL_XDS_PATH")]
    pub local_xds: Option<PathBuf>,
    /// Where certificates come from.
    #[arg(long, env = "CA_ADDRESS", default_value = "https://control.tulle-system.svc:15012")]
    pub ca_address: String,
    /// Roots that control's certificate is checked with: a file, PEM text, or SYSTEM.
    #[arg(long, env = "XDS_ROOT_CA", default_value = "./var/run/secrets/istio/root-cert.pem")]
    pub xds_root_ca: String,
    /// The same for the CA.
    #[arg(long, env = "CA_ROOT_CA", default_value = "./var/run/secrets/istio/root-cert.pem")]
    pub ca_root_ca: String,
    /// Another host name that control's certificate may carry.
    #[arg(long, env = "ALT_XDS_HOSTNAME")]
    pub alt_xds_hostname: Option<String>,
    /// The same for the CA.
    #[arg(long, env = "ALT_CA_HOSTNAME")]
    pub alt_ca_hostname: Option<String>,
    /// Token for control: a file, read for each stream, or the token itself.
    #[arg(long, env = "AUTH_TOKEN", default_value = "./var/run/secrets/tokens/istio-token", hide_env_values = true)]
    pub auth_token: String,
    /// Wanted life of certificates.
    #[arg(long, env = "SECRET_TTL", default_value = "24h", value_parser = duration)]
    pub secret_ttl: Duration,
    /// File that lists the node's pods; replaced by rename, watched.
    #[arg(long, env = "TULLE_PODS")]
    pub pods: Option<PathBuf>,
    /// Socket of the CNI agent that hands the node's pods over (ZDS) and installs the redirect rules, in the place of a
    /// list.
    #[arg(long, env = "INPOD_UDS")]
    pub inpod_uds: Option<PathBuf>,
    #[command(flatten)]
    pub cluster: Cluster,
    /// Connections from before capture: keep or reset.
    #[arg(long, env = "TULLE_PREEXISTING", default_value = "keep")]
    pub preexisting: Preexisting,
    /// Learn workloads and services when a pod of this node first needs them, instead of all: true or false.
    #[arg(long, env = "XDS_ON_DEMAND", default_value = "false", value_parser = clap::builder::BoolishValueParser::new(), action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub xds_on_demand: bool,
    /// Enforce NetworkPolicies, if control offers them; off where the cluster's network does it.
    #[arg(long, env = "TULLE_NETWORK_POLICY", default_value = "on")]
    pub network_policy: Switch,
    /// Connections of one pod, both directions.
    #[arg(long, env = "TULLE_POD_MAX_CONNECTIONS", default_value_t = 16_384)]
    pub pod_max_connections: usize,
    /// Inbound TLS handshakes of one pod under way.
    #[arg(long, env = "TULLE_POD_MAX_HANDSHAKES", default_value_t = 128)]
    pub pod_max_handshakes: usize,
    /// Inbound TLS handshakes of one pod a second; twice as many at once.
    #[arg(long, env = "TULLE_POD_MAX_HANDSHAKE_RATE", default_value_t = 1000)]
    pub pod_max_handshake_rate: u32,
    /// The same of one source.
    #[arg(long, env = "TULLE_SOURCE_MAX_HANDSHAKE_RATE", default_value_t = 200)]
    pub source_max_handshake_rate: u32,
    /// Open inbound tunnels of one pod.
    #[arg(long, env = "TULLE_POD_MAX_TUNNELS", default_value_t = 2048)]
    pub pod_max_tunnels: usize,
    /// Bytes that the flows of one pod may buffer, windows that peers were given included.
    #[arg(long, env = "TULLE_POD_MAX_BUFFER", default_value_t = 64 << 20)]
    pub pod_max_buffer: usize,
    /// How long a half-closed connection may stay silent.
    #[arg(long, env = "TULLE_HALF_OPEN_TIMEOUT", default_value = "5m", value_parser = duration)]
    pub half_open_timeout: Duration,
    /// Domain of the cluster's names.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Name look-ups of captured pods are answered by the proxy.
    #[arg(long, env = "ISTIO_META_DNS_CAPTURE", default_value_t = true, action = clap::ArgAction::Set)]
    pub dns: bool,
    /// Where it answers, in each pod: localhost (both families) or a loopback address, and a port.
    #[arg(long, env = "ISTIO_META_DNS_PROXY_ADDR", default_value = "localhost:15053")]
    pub dns_address: String,
    /// Name servers that the proxy asks for names outside the cluster, addresses with or without port, comma-separated. Empty: those
    /// of its own resolv.conf.
    #[arg(long, env = "TULLE_NAME_SERVERS", value_delimiter = ',')]
    pub name_servers: Vec<String>,
    /// Hold pods whose egress is closed in the node's own network too, so that a privileged container cannot walk around the proxy.
    #[arg(long, env = "TULLE_FENCE", default_value = "on")]
    pub fence: Switch,
    /// SO_MARK of the proxy's sockets.
    #[arg(long, env = "PACKET_MARK", default_value_t = 1337)]
    pub packet_mark: u32,
    /// SO_REUSEPORT on listeners.
    #[arg(long, env = "INPOD_PORT_REUSE", default_value_t = true, action = clap::ArgAction::Set)]
    pub port_reuse: bool,
    /// Data-plane workers: a number, a percentage of the cores, or 0 for all cores.
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", default_value = "2")]
    pub worker_threads: String,
    /// Streams on a tunnel before another is opened.
    #[arg(long, env = "POOL_MAX_STREAMS_PER_CONNECTION", default_value_t = 100)]
    pub pool_max_streams: usize,
    /// How long an unused tunnel stays open, if it is the only one of its kind between two pods; others are closed soon.
    #[arg(long, env = "POOL_UNUSED_RELEASE_TIMEOUT", default_value = "5m", value_parser = duration)]
    pub pool_idle: Duration,
    /// Receive window of a stream, bytes.
    #[arg(long, env = "HTTP2_STREAM_WINDOW_SIZE", default_value_t = 256 << 10)]
    pub stream_window: u32,
    /// Receive window of a tunnel, bytes.
    #[arg(long, env = "HTTP2_CONNECTION_WINDOW_SIZE", default_value_t = 32 << 20)]
    pub connection_window: u32,
    /// Largest DATA frame, bytes.
    #[arg(long, env = "HTTP2_FRAME_SIZE", default_value_t = 1 << 20)]
    pub frame_size: u32,
    /// TCP keepalive.
    #[arg(long, env = "KEEPALIVE_ENABLED", default_value_t = true, action = clap::ArgAction::Set)]
    pub keepalive: bool,
    /// Idle time before the first probe.
    #[arg(long, env = "KEEPALIVE_TIME", default_value = "180s", value_parser = duration)]
    pub keepalive_time: Duration,
    /// Time between probes.
    #[arg(long, env = "KEEPALIVE_INTERVAL", default_value = "180s", value_parser = duration)]
    pub keepalive_interval: Duration,
    /// Probes before giving up.
    #[arg(long, env = "KEEPALIVE_RETRIES", default_value_t = 9)]
    pub keepalive_retries: u32,
    /// TCP_USER_TIMEOUT from the keepalive settings.
    #[arg(long, env = "USER_TIMEOUT_ENABLED", default_value_t = false, action = clap::ArgAction::Set)]
    pub user_timeout: bool,
    /// How long connections may go on after SIGTERM, or once a successor serves.
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", default_value = "30s", value_parser = duration)]
    pub termination_deadline: Duration,
    /// Unix socket at which a new process takes the listeners of the one before it over. Absent: it opens its own.
    #[arg(long, env = "TULLE_HANDOVER")]
    pub handover: Option<PathBuf>,
    /// Address of admin, loopback.
    #[arg(long, env = "TULLE_ADMIN_ADDRESS", default_value = "127.0.0.1:15000")]
    pub admin_address: std::net::SocketAddr,
    /// Address of metrics.
    #[arg(long, env = "TULLE_METRICS_ADDRESS", default_value = "[::]:15020")]
    pub metrics_address: std::net::SocketAddr,
    /// Address of readiness.
    #[arg(long, env = "TULLE_READINESS_ADDRESS", default_value = "[::]:15021")]
    pub readiness_address: std::net::SocketAddr,
    /// Collector of traces, OTLP over HTTP: `http://<host>:4318`. Empty: no spans, and requests keep their headers.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", default_value = "")]
    pub otlp_endpoint: String,
    /// Of the traces that begin at this node, so many percent are sampled; others go on as they began.
    #[arg(long, env = "TULLE_TRACE_SAMPLING", default_value_t = 1.0)]
    pub trace_sampling: f64,
    /// Log filter.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    pub log: String,
    /// Log format.
    #[arg(long, env = "LOG_FORMAT", default_value = "plain")]
    pub log_format: LogFormat,
}

impl Node {
    /// Number of workers on a machine with `cores`.
    ///
    /// # Errors
    /// If the setting is neither a number nor a percentage.
    pub fn workers(&self, cores: usize) -> Result<usize, String> {
        let wrong = || {
            format!(
                "ZTUNNEL_WORKER_THREADS is {:?}; give a number, a percentage such as 50%, or 0",
                self.worker_threads
            )
        };
        let count = match self.worker_threads.strip_suffix('%') {
            Some(percent) => {
                let percent: usize = percent.trim().parse().map_err(|_| wrong())?;
                (cores * percent.min(100)).div_ceil(100)
            }
            None => match self.worker_threads.trim().parse().map_err(|_| wrong())? {
                0 => cores,
                count => count,
            },
        };
        Ok(count.clamp(1, 1024))
    }

    /// Where names are answered in each pod; at least one address, all of one port. `None`: nowhere.
    ///
    /// # Errors
    /// If the setting is no loopback address with a port.
    pub fn dns_addresses(&self) -> Result<Option<Vec<SocketAddr>>, String> {
        let text = &self.dns_address;
        let wrong =
            || format!("ISTIO_META_DNS_PROXY_ADDR is {text:?}; give localhost:<port> or <loopback address>:<port>");
        let addresses = match text.strip_prefix("localhost:") {
            Some(port) => {
                let port: u16 = port.parse().map_err(|_| wrong())?;
                vec![SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))]
            }
            None => vec![text.parse::<SocketAddr>().map_err(|_| wrong())?],
        };
        let good = addresses.iter().all(|address| address.ip().is_loopback() && address.port() != 0);
        if good { Ok(self.dns.then_some(addresses)) } else { Err(wrong()) }
    }

    /// Node metadata for discovery: our own, and every `ISTIO_META_*` and `ISTIO_METAJSON_*` variable.
    pub fn metadata(&self) -> BTreeMap<String, serde_json::Value> {
        let mut metadata: BTreeMap<String, serde_json::Value> = BTreeMap::new();
        for (key, value) in std::env::vars() {
            if let Some(name) = key.strip_prefix("ISTIO_METAJSON_") {
                match serde_json::from_str(&value) {
                    Ok(value) => drop(metadata.insert(name.to_owned(), value)),
                    Err(error) => tracing::warn!(%key, %error, "the variable is not JSON and is ignored"),
                }
            } else if let Some(name) = key.strip_prefix("ISTIO_META_") {
                metadata.insert(name.to_owned(), value.into());
            }
        }
        metadata
    }

    /// Headers that `prefix` adds to requests, `XDS_HEADER_x=y` → `x: y`.
    pub fn headers(prefix: &str) -> Vec<(String, String)> {
        std::env::vars()
            .filter_map(|(key, value)| Some((key.strip_prefix(prefix)?.to_ascii_lowercase(), value)))
            .collect()
    }
}

/// `1h30m`, `250ms`, `10s`; a bare number is seconds.
///
/// # Errors
/// What is wrong with it.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration such as 250ms, 10s, 5m or 24h");
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let millis = match &rest[..letters] {
            "ms" => 1,
            "s" | "" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        total = number
            .checked_mul(millis)
            .and_then(|millis| total.checked_add(Duration::from_millis(millis)))
            .ok_or_else(wrong)?;
        rest = &rest[letters..];
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::duration;
    use std::time::Duration;

    #[test]
    fn durations_have_units() {
        for (text, millis) in [("250ms", 250), ("10s", 10_000), ("10", 10_000), ("1h30m", 5_400_000), ("0s", 0)] {
            assert_eq!(duration(text).unwrap(), Duration::from_millis(millis), "{text}");
        }
        for text in ["", "s", "1x", "-1s", "1.5s", "99999999999999999999s", "18446744073709551615d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
