//! The ways to control: of discovery and its questions, and of the CA. Both are one connection where they lead to the same
//! place by the same roots, as they do unless somebody sets them apart.

use crate::config::Node;
use crate::identity::{Control, Link, RootCa, TokenSource};
use crate::tls::Revoked;

/// How control is reached.
pub(super) struct Ways {
    /// For discovery, and for the questions of control.
    pub(super) xds: Control,
    /// For certificates.
    pub(super) ca: Control,
}

impl Ways {
    /// As the settings say. `revoked`: certificates that control must not show.
    pub(super) fn new(config: &Node, revoked: &Revoked) -> Self {
        let way = |address: &str, root: &str, alt: &Option<String>, headers: &str| {
            let mut headers = Node::headers(headers);
            headers.push(("clusterid".to_owned(), config.cluster_id.clone()));
            Control {
                address: address.to_owned(),
                root_ca: RootCa::parse(root),
                alt_hostname: alt.clone(),
                token: TokenSource::parse(&config.auth_token),
                headers,
                link: Link::new(revoked.clone()),
            }
        };
        let xds = way(&config.xds_address, &config.xds_root_ca, &config.alt_xds_hostname, "XDS_HEADER_");
        let mut ca = way(&config.ca_address, &config.ca_root_ca, &config.alt_ca_hostname, "CA_HEADER_");
        if (&ca.address, &ca.root_ca, &ca.alt_hostname) == (&xds.address, &xds.root_ca, &xds.alt_hostname) {
            ca.link = xds.link.clone();
        }
        Self { xds, ca }
    }
}
