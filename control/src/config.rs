//! Flags and environment of `control`. The only reader of either.
//!
//! Each flag has a variable `TULLE_CONTROL_<FLAG>`; `LOG_FORMAT` and `RUST_LOG` are those of the node proxy. Values are
//! checked here once, and modules take what they need by value.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::Parser;
use clap::Subcommand;
use ipnet::IpNet;
use tulle_proto::names;
use tulle_proto::tulle_workload::EgressMode;

use crate::keys;
use crate::translate::Settings;

/// Tulle's control plane: xDS, certificates, status.
#[derive(Debug, Parser)]
#[command(name = "control", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Log lines as `plain` text or `json`.
    #[arg(long, env = "LOG_FORMAT", default_value = "plain", global = true)]
    pub log_format: LogFormat,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Plain,
    /// One JSON object a line.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve nodes until stopped.
    Serve(Box<Serve>),
    /// Print a token for a node proxy or a service account.
    Token(Token),
    /// Replace the root (in three steps, one a call) or the intermediate, without dropping a connection.
    Rotate(Rotate),
    /// Take certificates back: adds serial numbers to crl.pem, the file that nodes read as CRL_PATH.
    Revoke(Revoke),
    /// Ask the control plane in this pod whether it works, for kubelet: exit code 0 or 1.
    Probe(Probe),
}

/// `control serve`.
#[derive(Debug, Clone, Args)]
pub struct Serve {
    /// Where objects come from: `files:<dir>` or `kube`.
    #[arg(long, env = "TULLE_CONTROL_SOURCE")]
    pub source: Source,
    /// How to reach the API server with `--source kube`. Without it: as the service account of control's own pod.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Secret of the root namespace that holds the CA with `--source kube`, of which --ca-dir is a copy then; empty: --ca-dir
    /// alone holds it.
    #[arg(long, env = "TULLE_CONTROL_CA_SECRET", default_value = "tulle-ca")]
    pub ca_secret: String,
    /// Secret of the root namespace with an intermediate of another CA (Istio's names or cert-manager's) that the mesh's CA follows
    /// with `--source kube`; empty: none.
    #[arg(long, env = "TULLE_CONTROL_CA_PLUGGED_SECRET", default_value = "")]
    pub ca_plugged_secret: String,
    /// Whether the roots are published as a ClusterTrustBundle, too, with `--source kube` and a `--ca-secret`: `auto` (where the
    /// cluster serves that kind) or `off`.
    #[arg(long, env = "TULLE_CONTROL_CLUSTER_TRUST_BUNDLE", default_value = "auto")]
    pub cluster_trust_bundle: Published,
    /// Audience of service accounts' tokens that are believed with `--source kube`.
    #[arg(long, env = "TULLE_CONTROL_TOKEN_AUDIENCE", default_value = names::TOKEN_AUDIENCE)]
    pub token_audience: String,
    /// xDS and certificates, TLS.
    #[arg(long, env = "TULLE_CONTROL_GRPC_LISTEN", default_value = "0.0.0.0:15012")]
    pub grpc_listen: SocketAddr,
    /// Metrics, health and debugging, plain HTTP: keep it local.
    #[arg(long, env = "TULLE_CONTROL_HTTP_LISTEN", default_value = "127.0.0.1:15014")]
    pub http_listen: SocketAddr,
    /// Metrics alone, plain HTTP, where a collector reaches them; without a port: 15014. Default: at --http-listen only.
    #[arg(long, env = "TULLE_CONTROL_METRICS_LISTEN", value_parser = metrics_address)]
    pub metrics_listen: Option<SocketAddr>,
    /// Keys and certificates of the CA; made if missing.
    #[arg(long, env = "TULLE_CONTROL_CA_DIR")]
    pub ca_dir: PathBuf,
    /// Further DNS names and addresses of control's certificate.
    #[arg(long, env = "TULLE_CONTROL_TLS_SAN", value_delimiter = ',')]
    pub tls_san: Vec<String>,
    /// Trust domain of all identities.
    #[arg(long, env = "TULLE_CONTROL_TRUST_DOMAIN", default_value = names::DEFAULT_DOMAIN)]
    pub trust_domain: String,
    /// Other names of the trust domain, as while it is renamed: principals of policies that name one of them hold for all.
    #[arg(long, env = "TULLE_CONTROL_TRUST_DOMAIN_ALIASES", value_delimiter = ',')]
    pub trust_domain_aliases: Vec<String>,
    /// Suffix of service names.
    #[arg(long, env = "TULLE_CONTROL_CLUSTER_DOMAIN", default_value = names::DEFAULT_DOMAIN)]
    pub cluster_domain: String,
    /// First part of workload ids.
    #[arg(long, env = "TULLE_CONTROL_CLUSTER_ID", default_value = names::DEFAULT_CLUSTER)]
    pub cluster_id: String,
    /// Namespace of mesh-wide policies and of the node account.
    #[arg(long, env = "TULLE_CONTROL_ROOT_NAMESPACE", default_value = names::DEFAULT_ROOT_NAMESPACE)]
    pub root_namespace: String,
    /// A second namespace of mesh-wide policies, for those written for Istio; empty: none.
    #[arg(long, env = "TULLE_CONTROL_ISTIO_ROOT_NAMESPACE", default_value = "istio-system")]
    pub istio_root_namespace: String,
    /// What may leave namespaces without the label tulle.dev/egress: `allow`, `audit` or `deny`.
    #[arg(long, env = "TULLE_CONTROL_EGRESS_DEFAULT", default_value = "allow")]
    pub egress_default: EgressDefault,
    /// Between two fetches of a key set that a RequestAuthentication names by `jwksUri`.
    #[arg(long, env = "TULLE_CONTROL_JWKS_REFRESH", default_value = "5m", value_parser = duration)]
    pub jwks_refresh: Duration,
    /// Roots (PEM) for the servers of key sets, besides the system's.
    #[arg(long, env = "TULLE_CONTROL_JWKS_CA")]
    pub jwks_ca: Option<PathBuf>,
    /// Addresses that no key set is fetched from: those of the machine itself and of cloud metadata.
    #[arg(
        long,
        env = "TULLE_CONTROL_JWKS_BLOCKED_CIDRS",
        value_delimiter = ',',
        default_value = "0.0.0.0/8,127.0.0.0/8,169.254.0.0/16,::/128,::1/128,fe80::/10"
    )]
    pub jwks_blocked_cidrs: Vec<String>,
}

/// Whether something is published for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Published {
    /// Where the cluster can hold it.
    Auto,
    /// Nowhere.
    Off,
}

/// As the label has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum EgressDefault {
    /// Everything.
    Allow,
    /// Everything, and it is recorded.
    Audit,
    /// What a policy allows.
    Deny,
}

impl Serve {
    /// How key sets are fetched.
    ///
    /// # Errors
    /// A flag that cannot be used, in words.
    pub fn keys(&self) -> Result<keys::Settings, String> {
        let range = |text: &&String| !text.is_empty();
        let net = |text: &String| {
            text.parse::<IpNet>().map_err(|_| format!("--jwks-blocked-cidrs: `{text}` is no range of addresses"))
        };
        let blocked = self.jwks_blocked_cidrs.iter().filter(range).map(net).collect::<Result<_, _>>()?;
        Ok(keys::Settings { refresh: self.jwks_refresh, ca: self.jwks_ca.clone(), blocked })
    }

    /// What translation needs.
    pub fn settings(&self) -> Settings {
        Settings {
            cluster_id: self.cluster_id.clone(),
            cluster_domain: self.cluster_domain.clone(),
            trust_domain: self.trust_domain.clone(),
            trust_domain_aliases: self.trust_domain_aliases.clone(),
            root_namespace: self.root_namespace.clone(),
            istio_root_namespace: self.istio_root_namespace.clone(),
            egress_default: match self.egress_default {
                EgressDefault::Allow => EgressMode::Allow,
                EgressDefault::Audit => EgressMode::Audit,
                EgressDefault::Deny => EgressMode::Deny,
            },
            captured_unless_told: matches!(self.source, Source::Files(_)),
            now: 0,
        }
    }

    /// All names of control's own certificate.
    pub fn server_names(&self) -> Vec<String> {
        let mut names = vec![
            "localhost".to_owned(),
            "127.0.0.1".into(),
            "::1".into(),
            format!("control.{}.svc", self.root_namespace),
        ];
        names.extend(self.tls_san.iter().filter(|name| !name.is_empty()).cloned());
        names
    }
}

/// `control token`.
#[derive(Debug, Clone, Args)]
pub struct Token {
    /// The CA directory of the control plane; its key is made if missing.
    #[arg(long, env = "TULLE_CONTROL_CA_DIR")]
    pub ca_dir: PathBuf,
    /// Node that the token is bound to. Alone: for that node's proxy.
    #[arg(long, required_unless_present = "service_account")]
    pub node: Option<String>,
    /// `<namespace>/<account>`; default the node account.
    #[arg(long)]
    pub service_account: Option<String>,
    /// How long it is valid: `90s`, `15m`, `24h`.
    #[arg(long, default_value = "24h", value_parser = duration)]
    pub ttl: Duration,
    /// Namespace of the node account.
    #[arg(long, env = "TULLE_CONTROL_ROOT_NAMESPACE", default_value = names::DEFAULT_ROOT_NAMESPACE)]
    pub root_namespace: String,
}

/// Where `control rotate` and `control revoke` find the CA.
#[derive(Debug, Clone, Args)]
pub struct Kept {
    /// As `control serve` has it. `kube`: the CA is in a Secret, and --ca-dir a copy of it.
    #[arg(long, env = "TULLE_CONTROL_SOURCE")]
    pub source: Option<Source>,
    /// How to reach the API server with `--source kube`. Without it: as the service account of control's own pod.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// The Secret; empty: there is none.
    #[arg(long, env = "TULLE_CONTROL_CA_SECRET", default_value = "tulle-ca")]
    pub ca_secret: String,
    /// Namespace of the Secret.
    #[arg(long, env = "TULLE_CONTROL_ROOT_NAMESPACE", default_value = names::DEFAULT_ROOT_NAMESPACE)]
    pub root_namespace: String,
}

/// `control rotate`.
#[derive(Debug, Clone, Args)]
pub struct Rotate {
    /// What to replace.
    pub what: Replaced,
    /// The CA directory of the control plane.
    #[arg(long, env = "TULLE_CONTROL_CA_DIR")]
    pub ca_dir: PathBuf,
    #[command(flatten)]
    pub kept: Kept,
    /// The running control plane's HTTP address: it knows whether every node is ready for the next step.
    #[arg(long, env = "TULLE_CONTROL", default_value = "http://127.0.0.1:15014")]
    pub control: String,
    /// Wait this long for the step to become safe, and for control to take it over. Default: not at all.
    #[arg(long, value_parser = duration, conflicts_with = "force")]
    pub wait: Option<Duration>,
    /// Do not ask the nodes: those that are behind lose connections until they have caught up.
    #[arg(long)]
    pub force: bool,
}

/// `control revoke`.
#[derive(Debug, Clone, Args)]
pub struct Revoke {
    /// Serial numbers in hex, as `tulle get certificates` shows them.
    #[arg(required = true)]
    pub serials: Vec<String>,
    /// The CA directory of the control plane.
    #[arg(long, env = "TULLE_CONTROL_CA_DIR")]
    pub ca_dir: PathBuf,
    #[command(flatten)]
    pub kept: Kept,
    /// The serial numbers are those of intermediates: all that they signed is taken back.
    #[arg(long)]
    pub intermediate: bool,
}

/// `control probe`.
#[derive(Debug, Clone, Args)]
pub struct Probe {
    /// What to ask.
    pub what: Asked,
    /// Where control's HTTP listens.
    #[arg(long, env = "TULLE_CONTROL_HTTP_LISTEN", default_value = "127.0.0.1:15014")]
    pub http_listen: SocketAddr,
}

/// What kubelet wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Asked {
    /// Whether it lives (`/healthz`).
    Live,
    /// Whether it serves (`/readyz`).
    Ready,
}

/// What can be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Replaced {
    /// The root: announced first, then it signs, then the old one goes.
    Root,
    /// The intermediate that signs leaves.
    Intermediate,
}

/// Where objects come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A folder of manifests.
    Files(PathBuf),
    /// The API server of a Kubernetes cluster.
    Kube,
}

impl std::str::FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("files", dir)) if !dir.is_empty() => Ok(Self::Files(dir.into())),
            _ if text == "kube" => Ok(Self::Kube),
            _ => Err(format!("`{text}` is neither files:<dir> nor kube")),
        }
    }
}

/// An address with or without a port, as the address of a pod is given to it.
fn metrics_address(text: &str) -> Result<SocketAddr, String> {
    let alone = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, names::PORT_CONTROL_HTTP));
    alone.or_else(|_| text.parse()).map_err(|_| format!("`{text}` is neither an address nor address:port"))
}

/// A whole number with a unit of s, m, h or d; without a unit: seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        _ if digits.is_empty() => return Err(format!("`{text}` is not a duration such as 90s, 15m or 24h")),
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        other => return Err(format!("`{other}` is none of the units s, m, h, d")),
    };
    let count: u64 = digits.parse().map_err(|_| format!("`{text}` is not a duration such as 90s, 15m or 24h"))?;
    match count.checked_mul(unit) {
        // Ten years: as long as the root lives.
        Some(seconds @ 1..=315_360_000) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("`{text}` is not between 1 s and ten years")),
    }
}
