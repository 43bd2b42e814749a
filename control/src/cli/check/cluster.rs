//! Reading a cluster for checks: lists of objects, the API server's version, and what the one who asks may do.
//!
//! Lists come in pages and one kind after another, each with a deadline. A kind that the server does not have is empty; one that
//! may not be listed is unknown, and a finding says so. Nothing is written: a SelfSubjectAccessReview is a question.

use std::time::Duration;

use http::Request;
use kube::Client;
use serde_json::{Value, json};

use crate::base::causes;
use crate::cli::Failure;
use crate::cli::check::objects::{MOST, Objects};
use crate::cli::connect::{Flags, runtime};
use crate::cli::fetch::escape;
use crate::cluster;

/// For one page.
const PATIENCE: Duration = Duration::from_secs(30);
/// Objects of a page.
const PAGE: usize = 500;

/// What is listed: kind, and path below the server's root. A kind that is not served is one that nobody has.
const LISTS: &[(&str, &str)] = &[
    ("Namespace", "/api/v1/namespaces"),
    ("Node", "/api/v1/nodes"),
    ("Pod", "/api/v1/pods"),
    ("Service", "/api/v1/services"),
    ("Deployment", "/apis/apps/v1/deployments"),
    ("DaemonSet", "/apis/apps/v1/daemonsets"),
    ("StatefulSet", "/apis/apps/v1/statefulsets"),
    ("NetworkPolicy", "/apis/networking.k8s.io/v1/networkpolicies"),
    ("Ingress", "/apis/networking.k8s.io/v1/ingresses"),
    ("CustomResourceDefinition", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"),
    ("APIService", "/apis/apiregistration.k8s.io/v1/apiservices"),
    ("MutatingWebhookConfiguration", "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"),
    ("ValidatingWebhookConfiguration", "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"),
    ("PeerAuthentication", "/apis/security.istio.io/v1/peerauthentications"),
    ("CiliumNetworkPolicy", "/apis/cilium.io/v2/ciliumnetworkpolicies"),
    ("CiliumClusterwideNetworkPolicy", "/apis/cilium.io/v2/ciliumclusterwidenetworkpolicies"),
    ("GlobalNetworkPolicy", "/apis/crd.projectcalico.org/v1/globalnetworkpolicies"),
    ("ServiceMonitor", "/apis/monitoring.coreos.com/v1/servicemonitors"),
    ("PodMonitor", "/apis/monitoring.coreos.com/v1/podmonitors"),
];

/// ConfigMaps that are looked at. Others are nobody's business here.
const CONFIG_MAPS: &[&str] = &["cilium-config", "tulle-ca-root-cert"];

/// What an installation does: verb, group, resource.
const NEEDED: &[(&str, &str, &str)] = &[
    ("create", "", "namespaces"),
    ("create", "apps", "deployments"),
    ("create", "apps", "daemonsets"),
    ("create", "", "serviceaccounts"),
    ("create", "rbac.authorization.k8s.io", "clusterroles"),
    ("create", "rbac.authorization.k8s.io", "clusterrolebindings"),
    ("create", "apiextensions.k8s.io", "customresourcedefinitions"),
];

/// What is no object.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// `/version`.
    pub(super) version: Value,
    /// `verb resource.group`, and whether the one who asks may. `Err`: it could not be asked.
    pub(super) access: Vec<(String, Result<bool, String>)>,
}

/// Reads everything.
pub(super) fn read(flags: &Flags) -> Result<(Objects, Facts), Failure> {
    let files = flags.kubeconfig();
    // In a pod, its account serves.
    if files.is_none() && std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
        return Err(Failure::unsupported(
            "check needs a kubeconfig (--kubeconfig, KUBECONFIG, or ~/.kube/config), or the manifests of --files DIR",
        ));
    }
    runtime()?.block_on(async {
        let client = cluster::user(files.as_deref(), flags.context.as_deref());
        let (client, _) =
            client.await.map_err(|error| Failure::wrong(format!("check cannot ask the cluster: {error:#}")))?;
        let version = get(&client, "/version")
            .await
            .map_err(|error| Failure::wrong(format!("the API server does not answer: {}", error.text)))?;
        let mut objects = Objects::default();
        for (kind, path) in LISTS {
            list(&client, kind, path, &mut objects).await;
        }
        for name in CONFIG_MAPS {
            let path = format!("/api/v1/configmaps?fieldSelector=metadata.name%3D{name}");
            list(&client, "ConfigMap", &path, &mut objects).await;
        }
        let mut access = Vec::new();
        for (verb, group, resource) in NEEDED {
            let text =
                if group.is_empty() { format!("{verb} {resource}") } else { format!("{verb} {resource}.{group}") };
            access.push((text, may(&client, verb, group, resource).await));
        }
        Ok((objects, Facts { version, access }))
    })
}

/// Why a request failed.
struct Refused {
    /// HTTP status; 0: there was none.
    code: u16,
    text: String,
}

async fn get(client: &Client, path: &str) -> Result<Value, Refused> {
    send(client, Request::get(path).body(Vec::new())).await
}

async fn send(client: &Client, request: http::Result<Request<Vec<u8>>>) -> Result<Value, Refused> {
    let refused = |text: String| Refused { code: 0, text };
    let request = request.map_err(|error| refused(error.to_string()))?;
    match tokio::time::timeout(PATIENCE, client.request::<Value>(request)).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(kube::Error::Api(status))) => Err(Refused { code: status.code, text: status.message.clone() }),
        Ok(Err(error)) => Err(refused(causes(&error))),
        Err(_) => Err(refused(format!("no answer within {} s", PATIENCE.as_secs()))),
    }
}

async fn list(client: &Client, kind: &str, path: &str, objects: &mut Objects) {
    let mut next = String::new();
    for _ in 0..MOST / PAGE {
        let mark = if path.contains('?') { '&' } else { '?' };
        let page = match get(client, &format!("{path}{mark}limit={PAGE}{next}")).await {
            Ok(page) => page,
            Err(refused) if refused.code == 404 => return,
            Err(refused) => return objects.cannot(kind, refused.text),
        };
        for item in page["items"].as_array().cloned().unwrap_or_default() {
            objects.add(kind, item);
        }
        match page["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) {
            Some(token) => next = format!("&continue={}", escape(token)),
            None => return,
        }
    }
}

/// Whether the one who asks may do something in the whole cluster.
async fn may(client: &Client, verb: &str, group: &str, resource: &str) -> Result<bool, String> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {"verb": verb, "group": group, "resource": resource}},
    });
    let request = Request::post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews")
        .header("content-type", "application/json")
        .body(review.to_string().into_bytes());
    let answer = send(client, request).await.map_err(|refused| refused.text)?;
    Ok(answer["status"]["allowed"] == true)
}
