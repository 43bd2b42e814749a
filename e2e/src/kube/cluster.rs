//! A cluster as tests speak to it: manifests in, objects out, every wait with a deadline.
//!
//! Objects are plain JSON and kinds are found by asking the server, so that any kind works, custom ones too. Calls are
//! blocking: the connection lives on a small runtime of its own ([`Cluster::run`] is for what needs the client itself).
//! Limits: names are `namespace/name`, or `name` for kinds without a namespace; a kind of two groups is written
//! `Gateway.networking.istio.io`.

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use http::{Method, Request};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::discovery::{Discovery, Scope};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use crate::eventually::eventually;
use crate::manifest;

/// A request of a busy machine's API server; a stopped one never answers.
const ANSWER: Duration = Duration::from_secs(60);
/// Waits of tests: long enough for a slow machine under load.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Who owns fields that tests set.
const FIELD_MANAGER: &str = "tulle-test";

/// One kind that the server knows.
#[derive(Clone, Debug)]
struct Kind {
    group: String,
    version: String,
    kind: String,
    plural: String,
    namespaced: bool,
}

/// A connection to an API server.
#[derive(Clone)]
pub struct Cluster {
    runtime: Arc<Runtime>,
    client: kube::Client,
    kinds: Arc<Mutex<Vec<Kind>>>,
}

impl Cluster {
    /// Connects as the user of a kubeconfig; `agent` is what the audit log will call it. Nothing is sent yet.
    pub fn connect(kubeconfig: &Path, agent: &str) -> anyhow::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let read = Kubeconfig::read_from(kubeconfig).with_context(|| format!("{}", kubeconfig.display()))?;
        let client = runtime.block_on(async {
            let mut config = kube::Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
            config.headers.push((http::header::USER_AGENT, agent.parse()?));
            // A test that asks a stopped server wants to hear of it.
            config.default_retry = false;
            anyhow::Ok(kube::Client::try_from(config)?)
        })?;
        Ok(Self { runtime: Arc::new(runtime), client, kinds: Arc::default() })
    }

    /// The client, for use inside [`Cluster::run`].
    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// Runs a future where the client's connections live.
    pub fn run<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Any request; `content` is the type of the body, if there is one. Refusals are errors with the server's words
    /// (`kube::Error::Api` below).
    pub fn ask(&self, method: Method, uri: &str, content: &str, body: &Value) -> anyhow::Result<Value> {
        self.run(self.asked(method, uri, content, body))
    }

    /// The same for use inside [`Cluster::run`].
    pub async fn asked(&self, method: Method, uri: &str, content: &str, body: &Value) -> anyhow::Result<Value> {
        let bytes = if body.is_null() { Vec::new() } else { serde_json::to_vec(body)? };
        let mut request = Request::builder().method(method.clone()).uri(uri).header("accept", "application/json");
        if !body.is_null() {
            request = request.header("content-type", content);
        }
        let answer = tokio::time::timeout(ANSWER, self.client.request::<Value>(request.body(bytes)?)).await;
        answer
            .with_context(|| format!("{method} {uri}: no answer in {} s", ANSWER.as_secs()))?
            .with_context(|| format!("{method} {uri}"))
    }

    /// Makes objects as the manifests say, whoever else has set their fields; returns them as the server has them.
    /// Waits for kinds that a CustomResourceDefinition among them defines.
    pub fn apply(&self, manifests: &str) -> anyhow::Result<Vec<Value>> {
        self.apply_with(manifests, "")
    }

    /// What the server would say to the manifests, unknown fields being errors; nothing is changed.
    pub fn dry_run(&self, manifests: &str) -> anyhow::Result<Vec<Value>> {
        self.apply_with(manifests, "&dryRun=All&fieldValidation=Strict")
    }

    fn apply_with(&self, manifests: &str, query: &str) -> anyhow::Result<Vec<Value>> {
        let mut made = Vec::new();
        for (key, object) in manifest::parse("the manifests", manifests)? {
            let uri = self.uri_of(&object)?;
            let uri = format!("{uri}?fieldManager={FIELD_MANAGER}&force=true{query}");
            let answer = self
                .ask(Method::PATCH, &uri, "application/apply-patch+yaml", &object)
                .with_context(|| format!("{key} is not accepted"))?;
            if key.kind == "CustomResourceDefinition" && query.is_empty() {
                self.wait("CustomResourceDefinition", &key.name, "it is established", |it| {
                    condition(it, "/status/conditions", "Established") == Some("True")
                })?;
            }
            made.push(answer);
        }
        Ok(made)
    }

    /// An object; none if there is none.
    pub fn get(&self, kind: &str, name: &str) -> anyhow::Result<Option<Value>> {
        let uri = self.uri(kind, name)?;
        match self.ask(Method::GET, &uri, "", &Value::Null) {
            Err(error) if code(&error) == Some(404) => Ok(None),
            answer => answer.map(Some),
        }
    }

    /// All objects of a kind; of one namespace, or of all when that is empty.
    pub fn list(&self, kind: &str, namespace: &str) -> anyhow::Result<Vec<Value>> {
        let kind = self.kind(kind)?;
        let mut answer = self.ask(Method::GET, &kind.uri(namespace, ""), "", &Value::Null)?;
        match answer["items"].take() {
            Value::Array(items) => Ok(items),
            other => anyhow::bail!("a list of {} is {other}", kind.kind),
        }
    }

    /// Merges `change` into an object (null takes a field away).
    pub fn patch(&self, kind: &str, name: &str, change: &Value) -> anyhow::Result<Value> {
        let uri = format!("{}?fieldManager={FIELD_MANAGER}", self.uri(kind, name)?);
        self.ask(Method::PATCH, &uri, "application/merge-patch+json", change)
    }

    /// The same with its status.
    pub fn patch_status(&self, kind: &str, name: &str, change: &Value) -> anyhow::Result<Value> {
        let uri = format!("{}/status?fieldManager={FIELD_MANAGER}", self.uri(kind, name)?);
        self.ask(Method::PATCH, &uri, "application/merge-patch+json", change)
    }

    /// Sets a label, or takes it away.
    pub fn label(&self, kind: &str, name: &str, label: &str, value: Option<&str>) -> anyhow::Result<()> {
        self.patch(kind, name, &json!({"metadata": {"labels": {label: value}}})).map(drop)
    }

    /// Deletes an object as a user would. A pod on a node then waits for its kubelet, which is whoever plays it; a
    /// Namespace goes with everything in it, since no controller manager runs.
    pub fn delete(&self, kind: &str, name: &str) -> anyhow::Result<()> {
        let uri = self.uri(kind, name)?;
        self.ask(Method::DELETE, &uri, "", &Value::Null)?;
        if self.kind(kind)?.kind == "Namespace" { self.finish_namespace(name) } else { Ok(()) }
    }

    /// Deletes an object at once, as a kubelet does whose pod has ended; it may be gone already.
    pub fn remove(&self, kind: &str, name: &str) -> anyhow::Result<()> {
        let uri = self.uri(kind, name)?;
        let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0});
        match self.ask(Method::DELETE, &uri, "application/json", &options) {
            Err(error) if code(&error) == Some(404) => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// What the controller manager does when a Namespace is deleted.
    fn finish_namespace(&self, name: &str) -> anyhow::Result<()> {
        let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0});
        for kind in self.kinds()?.into_iter().filter(|kind| kind.namespaced) {
            let deleted = self.ask(Method::DELETE, &kind.uri(name, ""), "application/json", &options);
            // Kinds that cannot be deleted all at once, such as reviews and Bindings.
            if let Err(error) = deleted
                && !matches!(code(&error), Some(404 | 405))
            {
                return Err(error);
            }
        }
        let Some(mut namespace) = self.get("Namespace", name)? else { return Ok(()) };
        namespace["spec"]["finalizers"] = json!([]);
        let uri = format!("{}/finalize", self.uri("Namespace", name)?);
        self.ask(Method::PUT, &uri, "application/json", &namespace)?;
        self.wait("Namespace", name, "it is gone", Value::is_null).map(drop)
    }

    /// Waits until an object is as `probe` wants it (null: there is none); returns it.
    pub fn wait(&self, kind: &str, name: &str, what: &str, probe: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        eventually(&format!("{kind} {name}: {what}"), PATIENCE, || {
            let object = self.get(kind, name)?.unwrap_or_default();
            if probe(&object) { Ok(object) } else { Err(anyhow::anyhow!("{object}")) }
        })
    }

    /// A token of a service account, which must exist; bound to a pod when one is named.
    pub fn token(&self, account: &str, audience: &str, pod: Option<&str>) -> anyhow::Result<String> {
        let mut spec = json!({"expirationSeconds": 3600});
        if !audience.is_empty() {
            spec["audiences"] = json!([audience]);
        }
        if let Some(pod) = pod {
            let name = pod.rsplit('/').next().unwrap_or_default();
            let object = self.get("Pod", pod)?.with_context(|| format!("there is no pod {pod}"))?;
            spec["boundObjectRef"] =
                json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": object["metadata"]["uid"]});
        }
        let uri = format!("{}/token", self.uri("ServiceAccount", account)?);
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec});
        let answer = self.ask(Method::POST, &uri, "application/json", &request)?;
        Ok(answer["status"]["token"].as_str().context("an answer without a token")?.to_owned())
    }

    /// Path of an object.
    pub fn uri(&self, kind: &str, name: &str) -> anyhow::Result<String> {
        let kind = self.kind(kind)?;
        let (namespace, name) = name.split_once('/').unwrap_or(("", name));
        anyhow::ensure!(
            kind.namespaced != namespace.is_empty(),
            "{} {namespace}/{name}: a kind {} a namespace",
            kind.kind,
            if kind.namespaced { "that needs" } else { "without" }
        );
        Ok(kind.uri(namespace, name))
    }

    /// `plural.group` of a kind, `plural` in the core.
    pub fn resource(&self, kind: &str) -> anyhow::Result<String> {
        let kind = self.kind(kind)?;
        Ok(match kind.group.as_str() {
            "" => kind.plural,
            group => format!("{}.{group}", kind.plural),
        })
    }

    /// Path of an object as a manifest has it, in the version that it names.
    fn uri_of(&self, object: &Value) -> anyhow::Result<String> {
        let text = |pointer| manifest::text(object, pointer).to_owned();
        let (api, kind) = (text("/apiVersion"), text("/kind"));
        let (group, version) = api.rsplit_once('/').unwrap_or(("", &api));
        let mut known = self.kind(&format!("{kind}.{group}"))?;
        version.clone_into(&mut known.version);
        let namespace = match (known.namespaced, text("/metadata/namespace")) {
            (false, _) => String::new(),
            (true, own) if own.is_empty() => "default".to_owned(),
            (true, own) => own,
        };
        Ok(known.uri(&namespace, &text("/metadata/name")))
    }

    /// A kind by name, with its group where two have one of that name; the server is asked again for one that is new.
    fn kind(&self, name: &str) -> anyhow::Result<Kind> {
        let (kind, group) = match name.split_once('.') {
            Some((kind, group)) => (kind, Some(group)),
            None => (name, None),
        };
        let fits = |it: &&Kind| it.kind == kind && group.is_none_or(|group| it.group == group);
        let known = self.kinds.lock().unwrap_or_else(PoisonError::into_inner).iter().find(fits).cloned();
        if let Some(kind) = known {
            return Ok(kind);
        }
        // A definition that was established just now is not listed at once.
        eventually(&format!("the server knows the kind {name}"), Duration::from_secs(10), || {
            let kinds = self.kinds()?;
            kinds.iter().find(fits).cloned().with_context(|| format!("it knows {} kinds", kinds.len()))
        })
    }

    /// Every kind that the server knows now, those of the core first.
    fn kinds(&self) -> anyhow::Result<Vec<Kind>> {
        let found = self.run(async {
            let asked = tokio::time::timeout(ANSWER, Discovery::new(self.client.clone()).run_aggregated()).await;
            anyhow::Ok(asked.context("the server does not say which kinds it knows")??)
        })?;
        let mut kinds: Vec<Kind> = found
            .groups()
            .flat_map(|group| group.resources_by_stability())
            .map(|(resource, about)| Kind {
                group: resource.group,
                version: resource.version,
                kind: resource.kind,
                plural: resource.plural,
                namespaced: about.scope == Scope::Namespaced,
            })
            .collect();
        kinds.sort_by(|a, b| (&a.group, &a.kind).cmp(&(&b.group, &b.kind)));
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&kinds);
        Ok(kinds)
    }
}

impl Kind {
    fn uri(&self, namespace: &str, name: &str) -> String {
        let mut uri = match self.group.as_str() {
            "" => format!("/api/{}", self.version),
            group => format!("/apis/{group}/{}", self.version),
        };
        if !namespace.is_empty() {
            uri.push_str(&format!("/namespaces/{namespace}"));
        }
        uri.push('/');
        uri.push_str(&self.plural);
        if !name.is_empty() {
            uri.push('/');
            uri.push_str(name);
        }
        uri
    }
}

/// HTTP status with which the server refused, if that is what went wrong.
pub fn code(error: &anyhow::Error) -> Option<u16> {
    error.chain().find_map(|cause| match cause.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    })
}

/// Status of a condition in the list at `pointer`.
pub fn condition<'a>(object: &'a Value, pointer: &str, kind: &str) -> Option<&'a str> {
    let list = object.pointer(pointer)?.as_array()?;
    list.iter().find(|it| it["type"] == kind)?["status"].as_str()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::kube::cluster::{Kind, condition};

    #[test]
    fn paths_are_those_of_the_api() {
        let kind = |group: &str, version: &str, plural: &str| Kind {
            group: group.into(),
            version: version.into(),
            kind: String::new(),
            plural: plural.into(),
            namespaced: true,
        };
        assert_eq!(kind("", "v1", "pods").uri("shop", "a"), "/api/v1/namespaces/shop/pods/a");
        assert_eq!(kind("", "v1", "nodes").uri("", ""), "/api/v1/nodes");
        let route = kind("gateway.networking.k8s.io", "v1", "httproutes").uri("shop", "");
        assert_eq!(route, "/apis/gateway.networking.k8s.io/v1/namespaces/shop/httproutes");
    }

    #[test]
    fn a_condition_is_found_by_its_type() {
        let object = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
        assert_eq!(condition(&object, "/status/conditions", "Ready"), Some("False"));
        assert_eq!(condition(&object, "/status/conditions", "Other"), None);
    }
}
