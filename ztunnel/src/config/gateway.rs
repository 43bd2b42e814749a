//! Settings of `ztunnel gateway`: those of a node that concern tunnels, control and status, and its own. The node's are taken
//! whole, so that one name means one thing in both.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;

use crate::config::Node;

/// Settings of `ztunnel gateway`. Those of a node's pods have no effect.
#[derive(Clone, Debug, Args)]
pub struct Gateway {
    #[command(flatten)]
    pub node: Node,
    /// Name of the Service that stands for this gateway, in its own namespace: what EgressPolicies name in `via`.
    #[arg(long, env = "TULLE_GATEWAY_NAME")]
    pub gateway_name: String,
    /// Port for tunnels of pods.
    #[arg(long, env = "TULLE_GATEWAY_PORT", default_value_t = 15_008)]
    pub gateway_port: u16,
    /// Addresses that hosts outside see, at most one of each family, comma-separated; a family without one is not used
    /// then. Empty: as the system chooses.
    #[arg(long, env = "TULLE_GATEWAY_SOURCE", value_delimiter = ',')]
    pub gateway_source: Vec<IpAddr>,
    /// Roots that hosts' certificates are checked with where a rule asks for TLS and has none of its own: SYSTEM, PEM text
    /// or a file.
    #[arg(long, env = "TULLE_GATEWAY_ROOT_CA", default_value = "SYSTEM")]
    pub gateway_root_ca: String,
    /// Folder of the certificates that rules may have shown to hosts outside: `<namespace of the policy>/<name>/tls.crt` and
    /// `tls.key`, which are read again when they change. Unset: there are none.
    #[arg(long, env = "TULLE_GATEWAY_CLIENT_CERTIFICATES")]
    pub gateway_client_certificates: Option<PathBuf>,
    /// Open connections to one host outside.
    #[arg(long, env = "TULLE_GATEWAY_HOST_MAX_CONNECTIONS", default_value_t = 4096)]
    pub host_max_connections: usize,
    /// New connections to one host outside a second; twice as many at once. 0: any number.
    #[arg(long, env = "TULLE_GATEWAY_HOST_MAX_RATE", default_value_t = 500)]
    pub host_max_rate: u32,
}

impl Gateway {
    /// Checks what the command line cannot.
    ///
    /// # Errors
    /// The setting to change.
    pub fn check(&self) -> Result<(), String> {
        let families = |v6: bool| self.gateway_source.iter().filter(|ip| ip.is_ipv6() == v6).count();
        if families(false) > 1 || families(true) > 1 {
            return Err("TULLE_GATEWAY_SOURCE has two addresses of one family; give one of each at most".to_owned());
        }
        if self.gateway_name.is_empty() {
            return Err("TULLE_GATEWAY_NAME is empty; give the name of the Service in front of this gateway".to_owned());
        }
        if self.node.xds_on_demand {
            let text = "XDS_ON_DEMAND is set, and a gateway has to know every pod that may use it; unset it";
            return Err(text.to_owned());
        }
        Ok(())
    }
}
