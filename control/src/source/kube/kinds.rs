//! The kinds that are watched: those that [`decode`](crate::source::decode) reads, and where the API server has them.
//!
//! Endpoints are not among them, though files may hold them: a cluster keeps EndpointSlices for each of them, kube-proxy
//! reads only those, and every pod behind a Service would be held twice.

use std::fmt::Write as _;

/// One kind.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// As in manifests.
    pub name: &'static str,
    /// API group; empty for the core.
    pub group: &'static str,
    /// Resource, as in paths and RBAC rules.
    pub plural: &'static str,
    /// Versions that can be read, the best one first.
    pub versions: &'static [&'static str],
    /// Whether a cluster may not have it: custom resources, and what the API server does not serve by default.
    pub optional: bool,
}

const GATEWAY: &str = "gateway.networking.k8s.io";
const SECURITY: &str = "security.istio.io";
const NETWORKING: &str = "networking.istio.io";
const OURS: &str = "tulle.dev";
const ISTIO_VERSIONS: &[&str] = &["v1", "v1beta1", "v1alpha3"];

const fn builtin(name: &'static str, group: &'static str, plural: &'static str) -> Kind {
    Kind { name, group, plural, versions: &["v1"], optional: false }
}

const fn custom(
    name: &'static str,
    group: &'static str,
    plural: &'static str,
    versions: &'static [&'static str],
) -> Kind {
    Kind { name, group, plural, versions, optional: true }
}

/// All of them.
pub static KINDS: &[Kind] = &[
    builtin("Namespace", "", "namespaces"),
    builtin("Node", "", "nodes"),
    builtin("ServiceAccount", "", "serviceaccounts"),
    builtin("Pod", "", "pods"),
    builtin("Service", "", "services"),
    builtin("EndpointSlice", "discovery.k8s.io", "endpointslices"),
    builtin("NetworkPolicy", "networking.k8s.io", "networkpolicies"),
    custom("ClusterTrustBundle", "certificates.k8s.io", "clustertrustbundles", &["v1", "v1beta1", "v1alpha1"]),
    custom("HTTPRoute", GATEWAY, "httproutes", &["v1", "v1beta1"]),
    custom("GRPCRoute", GATEWAY, "grpcroutes", &["v1"]),
    custom("ReferenceGrant", GATEWAY, "referencegrants", &["v1", "v1beta1"]),
    custom("AuthorizationPolicy", SECURITY, "authorizationpolicies", ISTIO_VERSIONS),
    custom("PeerAuthentication", SECURITY, "peerauthentications", ISTIO_VERSIONS),
    custom("RequestAuthentication", SECURITY, "requestauthentications", ISTIO_VERSIONS),
    custom("DestinationRule", NETWORKING, "destinationrules", ISTIO_VERSIONS),
    custom("ServiceEntry", NETWORKING, "serviceentries", ISTIO_VERSIONS),
    custom("EgressPolicy", OURS, "egresspolicies", &["v1alpha1"]),
    custom("HTTPFault", OURS, "httpfaults", &["v1alpha1"]),
    custom("HTTPRateLimit", OURS, "httpratelimits", &["v1alpha1"]),
];

impl Kind {
    /// `apiVersion` of its objects.
    pub fn api_version(&self, version: &str) -> String {
        if self.group.is_empty() { version.to_owned() } else { format!("{}/{version}", self.group) }
    }

    /// Path of all its objects, in all namespaces.
    pub fn path(&self, version: &str) -> String {
        let root = if self.group.is_empty() { "/api" } else { "/apis" };
        format!("{root}/{}/{}", self.api_version(version), self.plural)
    }

    /// Resource and group as `kubectl` has them: `httproutes.gateway.networking.k8s.io`.
    pub fn resource(&self) -> String {
        let mut text = self.plural.to_owned();
        if !self.group.is_empty() {
            let _ = write!(text, ".{}", self.group);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::KINDS;
    use crate::source::decode;
    use crate::source::tree;

    #[test]
    fn each_kind_can_be_decoded_in_each_version_and_has_its_own_path() {
        let mut paths = BTreeSet::new();
        for kind in KINDS {
            for version in kind.versions {
                let text = format!(
                    "apiVersion: {}\nkind: {}\nmetadata: {{name: x, labels: {{tulle.dev/trust-domain: a}}}}\n",
                    kind.api_version(version),
                    kind.name
                );
                let decoded = decode::document(&tree::parse(&text).unwrap());
                assert!(decoded.unknown.is_empty(), "{text}");
                assert!(paths.insert(kind.path(version)), "{text}");
                for object in decoded.objects {
                    assert_eq!(object.kind(), kind.name);
                }
            }
        }
        assert!(paths.contains("/api/v1/pods"));
        assert!(paths.contains("/apis/gateway.networking.k8s.io/v1/httproutes"));
    }
}
