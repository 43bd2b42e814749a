//! Definitions of other projects' kinds that the mesh reads, without their schemas: any spec is taken, and status is a
//! subresource as theirs is.
//!
//! The real definitions belong to whoever runs a cluster. What they would refuse is not the mesh's business, so a test
//! of the mesh needs the kinds and no more. Limits: nothing is validated.

use anyhow::Context as _;

use crate::kube::Cluster;

/// Group, kind, plural, versions (the first one is stored), namespaced.
type Definition = (&'static str, &'static str, &'static str, &'static [&'static str], bool);

/// Kinds of the Gateway API.
pub const GATEWAY_API: &[Definition] = &[
    ("gateway.networking.k8s.io", "GatewayClass", "gatewayclasses", &["v1", "v1beta1"], false),
    ("gateway.networking.k8s.io", "Gateway", "gateways", &["v1", "v1beta1"], true),
    ("gateway.networking.k8s.io", "HTTPRoute", "httproutes", &["v1", "v1beta1"], true),
    ("gateway.networking.k8s.io", "GRPCRoute", "grpcroutes", &["v1"], true),
    ("gateway.networking.k8s.io", "ReferenceGrant", "referencegrants", &["v1", "v1beta1"], true),
];

/// Istio's kinds.
pub const ISTIO: &[Definition] = &[
    ("security.istio.io", "AuthorizationPolicy", "authorizationpolicies", &["v1", "v1beta1"], true),
    ("security.istio.io", "PeerAuthentication", "peerauthentications", &["v1", "v1beta1"], true),
    ("security.istio.io", "RequestAuthentication", "requestauthentications", &["v1", "v1beta1"], true),
    ("networking.istio.io", "DestinationRule", "destinationrules", &["v1", "v1beta1", "v1alpha3"], true),
    ("networking.istio.io", "ServiceEntry", "serviceentries", &["v1", "v1beta1", "v1alpha3"], true),
];

/// A definition without a schema.
pub fn definition((group, kind, plural, versions, namespaced): Definition) -> String {
    let versions: Vec<String> = versions
        .iter()
        .enumerate()
        .map(|(at, version)| {
            format!(
                "{{name: {version}, served: true, storage: {}, subresources: {{status: {{}}}}, \
                 schema: {{openAPIV3Schema: {{type: object, x-kubernetes-preserve-unknown-fields: true}}}}}}",
                at == 0
            )
        })
        .collect();
    let scope = if namespaced { "Namespaced" } else { "Cluster" };
    // The API server wants a reason for definitions in a group of Kubernetes' own.
    let approved = "api-approved.kubernetes.io: 'unapproved, a definition for tests'";
    format!(
        "---\napiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\n\
         metadata: {{name: {plural}.{group}, annotations: {{{approved}}}}}\n\
         spec:\n  group: {group}\n  scope: {scope}\n  names: {{kind: {kind}, plural: {plural}, singular: {}}}\n  \
         versions: [{}]\n",
        kind.to_lowercase(),
        versions.join(", ")
    )
}

/// The project's own definitions, as they are installed.
pub fn own() -> anyhow::Result<String> {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    let mut text = String::new();
    for path in crate::manifest::files(&dir)? {
        text.push_str("---\n");
        text.push_str(&std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?);
        text.push('\n');
    }
    Ok(text)
}

/// Installs every kind that the mesh reads.
pub fn install(cluster: &Cluster) -> anyhow::Result<()> {
    let foreign: String = GATEWAY_API.iter().chain(ISTIO).map(|it| definition(*it)).collect();
    cluster.apply(&foreign)?;
    cluster.apply(&own()?)?;
    Ok(())
}
