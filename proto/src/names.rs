//! Names, ports and marks that are part of the contract. One place, so that nothing spells them twice.

/// Outbound capture, in the pod's network namespace.
pub const PORT_OUTBOUND: u16 = 15001;
/// Inbound plaintext capture, in the pod's network namespace.
pub const PORT_INBOUND_PLAINTEXT: u16 = 15006;
/// HBONE, in the pod's network namespace.
pub const PORT_HBONE: u16 = 15008;
/// DNS proxy, in the pod's network namespace.
pub const PORT_DNS: u16 = 15053;
/// Admin of the node proxy, on the node's loopback.
pub const PORT_ADMIN: u16 = 15000;
/// Metrics of the node proxy.
pub const PORT_METRICS: u16 = 15020;
/// Readiness of the node proxy.
pub const PORT_READINESS: u16 = 15021;
/// xDS and CA of control, TLS.
pub const PORT_CONTROL_GRPC: u16 = 15012;
/// Control's own HTTP, on loopback.
pub const PORT_CONTROL_HTTP: u16 = 15014;

/// Mark of every socket that the proxy opens in a pod; the capture rules let it pass.
pub const MARK_PROXY: u32 = 0x539;
/// Connection mark of the proxy's own connections to the application.
pub const CONNMARK_PROXY: u32 = 0x111;
/// Mask of both marks.
pub const MARK_MASK: u32 = 0xfff;
/// Source address of kubelet probes, as the node's rules rewrite it.
pub const PROBE_V4: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 7, 127);
/// The same for IPv6.
pub const PROBE_V6: std::net::Ipv6Addr =
    std::net::Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);

/// Type URL of `istio.workload.Address`.
pub const TYPE_ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of `istio.security.Authorization`.
pub const TYPE_AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
/// Type URL of [`crate::mesh::NetworkPolicy`].
pub const TYPE_NETWORK_POLICY: &str = "type.googleapis.com/tulle.mesh.v1alpha1.NetworkPolicy";
/// Type URL of [`crate::mesh::TrustBundle`].
pub const TYPE_TRUST_BUNDLE: &str = "type.googleapis.com/tulle.mesh.v1alpha1.TrustBundle";
/// Beginning of the resource names of TrustBundles; the trust domain follows.
pub const TRUST_BUNDLE: &str = "TrustBundle/";
/// Type URL of [`crate::mesh::Route`].
pub const TYPE_ROUTE: &str = "type.googleapis.com/tulle.mesh.v1alpha1.Route";
/// Type URL of [`crate::mesh::TrafficPolicy`].
pub const TYPE_TRAFFIC_POLICY: &str = "type.googleapis.com/tulle.mesh.v1alpha1.TrafficPolicy";
/// Type URL of [`crate::mesh::RequestAuth`].
pub const TYPE_REQUEST_AUTH: &str = "type.googleapis.com/tulle.mesh.v1alpha1.RequestAuth";
/// Type URL of [`crate::mesh::EgressPolicy`].
pub const TYPE_EGRESS_POLICY: &str = "type.googleapis.com/tulle.mesh.v1alpha1.EgressPolicy";
/// Type URL of [`crate::mesh::HttpAuthorization`].
pub const TYPE_HTTP_AUTHORIZATION: &str = "type.googleapis.com/tulle.mesh.v1alpha1.HttpAuthorization";
/// Beginning of the names of Authorizations that stand in for NetworkPolicies, for proxies that do not take those.
pub const NETWORK_STAND_IN: &str = "tulle_network_";
/// Type URL of [`crate::tulle_workload::WorkloadInfo`].
pub const TYPE_WORKLOAD_INFO: &str = "type.googleapis.com/tulle.workload.v1alpha1.WorkloadInfo";
/// Name of the workload extension that carries it.
pub const EXTENSION_WORKLOAD: &str = "tulle.dev/workload";
/// Type URL of [`crate::tulle_workload::ServiceInfo`].
pub const TYPE_SERVICE_INFO: &str = "type.googleapis.com/tulle.workload.v1alpha1.ServiceInfo";
/// Name of the service extension that carries it.
pub const EXTENSION_SERVICE: &str = "tulle.dev/service";
/// In front of the host name of a Service of type ExternalName, so that peers which do not know the type do not take it
/// for a headless Service.
pub const EXTERNAL_NAME_PREFIX: &str = "_external.";
/// Name of the authorization extension that carries the whole L7 policy.
pub const EXTENSION_L7: &str = "tulle.dev/l7";
/// Name of the authorization extension that marks a stand-in for an unreadable policy.
pub const EXTENSION_DENIES_ALL: &str = "tulle.dev/denies-all";
/// gRPC response header in which a server lists the own types that it serves.
pub const HEADER_TULLE_TYPES: &str = "x-tulle-types";
/// At the end of `system_version_info`: this response is not the last one of its type and generation.
pub const MORE: char = '+';
/// After it, in responses with NetworkPolicies: workloads of the same generation follow, and both take effect together.
pub const TOGETHER: char = '&';
/// Node metadata key with the proxy's version.
pub const METADATA_TULLE_VERSION: &str = "TULLE_VERSION";
/// Node metadata key with the own types that the proxy will subscribe to where they are offered, as in
/// [`HEADER_TULLE_TYPES`]: type URLs, separated by commas.
pub const METADATA_TULLE_TYPES: &str = "TULLE_TYPES";
/// Node metadata key with the name of the egress gateway that the proxy is, in its pod's namespace.
pub const METADATA_TULLE_GATEWAY: &str = "TULLE_GATEWAY";
/// Metadata key of a certificate request made on behalf of a pod.
pub const METADATA_IMPERSONATED: &str = "ImpersonatedIdentity";

/// Label of namespaces and pods: `enabled` or `disabled`.
pub const LABEL_MESH: &str = "tulle.dev/mesh";
/// Istio's label of the same meaning: `ambient` or `none`. Ours wins.
pub const LABEL_ISTIO_MESH: &str = "istio.io/dataplane-mode";
/// Label of pods that end tunnels themselves, with the value `http`, as Istio has it: waypoints and gateways. They are reached over
/// HBONE without being captured.
pub const LABEL_TUNNEL: &str = "networking.istio.io/tunnel";
/// Label of namespaces: `deny`, `audit` or `allow`.
pub const LABEL_EGRESS: &str = "tulle.dev/egress";
/// Label of ClusterTrustBundles: the trust domain whose roots they hold.
pub const LABEL_TRUST_DOMAIN: &str = "tulle.dev/trust-domain";
/// Annotation with the pod's actual capture state: `enabled` or `pending`.
pub const ANNOTATION_REDIRECTION: &str = "ambient.istio.io/redirection";
/// Token claim with the caller's node.
pub const CLAIM_NODE: &str = "tulle.dev/node";
/// Audience of tokens.
pub const TOKEN_AUDIENCE: &str = "istio-ca";
/// Issuer of `control token`.
pub const TOKEN_ISSUER: &str = "tulle";
/// Default trust domain and cluster domain.
pub const DEFAULT_DOMAIN: &str = "cluster.local";
/// Default cluster id.
pub const DEFAULT_CLUSTER: &str = "Kubernetes";
/// Default root namespace.
pub const DEFAULT_ROOT_NAMESPACE: &str = "tulle-system";
/// Service account of the node proxy in the root namespace.
pub const NODE_SERVICE_ACCOUNT: &str = "ztunnel";
/// DaemonSet of the proxies of nodes that try another version first, in the root namespace.
pub const PROXY_CANARY: &str = "ztunnel-canary";
/// Label of nodes, for which proxies they have: none, the usual one; `beside`, that and the canary; `canary`, the canary alone.
pub const LABEL_PROXY: &str = "tulle.dev/proxy";

/// Before the name of a node, in an on-demand subscription: everything on that node. Ours; others answer that there is no
/// such resource (istiod sends what is on the node by itself).
pub const ALL_OF_NODE: &str = "node/";
/// Before 16 hexadecimal digits, in an on-demand subscription: everything in that group of NetworkPolicies. Ours.
pub const ALL_OF_GROUP: &str = "group/";
/// Label of every object that control makes in a cluster.
pub const LABEL_MANAGED: &str = "app.kubernetes.io/managed-by";
/// Its value.
pub const MANAGED: &str = "tulle";
/// Beginning of the names of the NetworkPolicies that control makes for the network plugins of others.
pub const BESIDE: &str = "tulle-mesh";
