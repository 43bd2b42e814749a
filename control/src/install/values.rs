//! Values: what can be chosen when Tulle is installed. They are those of the Helm chart, whose values.yaml is part of this program.
//!
//! They are merged as Helm merges them (maps key by key, lists as a whole, null takes a key away), and then read into exact
//! types, where a key that nobody knows is an error: a misspelt value must not silently be the default.
//! Limits: a file of values of at most 1 MiB.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};
use tulle_proto::names;

use crate::base::is_dns_name;

/// The chart's values.yaml: every value with its default.
pub const DEFAULTS: &str = include_str!("../../../deploy/chart/tulle/values.yaml");
/// Larger files of values are a mistake.
const MAX_BYTES: usize = 1 << 20;

/// All values. docs/install.md says what each of them means.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Values {
    /// Where images come from.
    pub image: Image,
    /// Trust domain of all identities.
    pub trust_domain: String,
    /// Suffix of service names.
    pub cluster_domain: String,
    /// First part of workload ids.
    pub cluster_id: String,
    /// Log lines.
    pub log: Log,
    /// The control plane.
    pub control: Control,
    /// The proxy of each node.
    pub ztunnel: Ztunnel,
    /// The gateway, if there is one.
    pub egress_gateway: EgressGateway,
    /// Whether node proxies are held to their own node.
    pub node_restriction: NodeRestriction,
    /// Whether the definitions of tulle.dev are part of it.
    pub crds: Crds,
}

/// Where images come from.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Image {
    /// Prefix; empty: none.
    pub registry: String,
    /// Name of the image with control and tulle.
    pub control: String,
    /// Name of the image with ztunnel.
    pub ztunnel: String,
    /// Empty: this program's version.
    pub tag: String,
    /// When kubelet pulls.
    pub pull_policy: PullPolicy,
    /// Names of Secrets.
    pub pull_secrets: Vec<String>,
}

/// When kubelet pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum PullPolicy {
    /// If the node has none.
    IfNotPresent,
    /// Before each start.
    Always,
    /// Never.
    Never,
}

impl PullPolicy {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::IfNotPresent => "IfNotPresent",
            Self::Always => "Always",
            Self::Never => "Never",
        }
    }
}

/// Log lines.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Log {
    /// Filter.
    pub level: String,
    /// plain or json.
    pub format: String,
}

/// The control plane.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Control {
    /// How many.
    pub replicas: u32,
    /// How many stay.
    pub min_available: u32,
    /// allow, audit or deny.
    pub egress_default: String,
    /// Secret of the CA.
    pub ca_secret: String,
    /// Secret of another CA; empty: none.
    pub plugged_ca_secret: String,
    /// Metrics for collectors.
    pub metrics: Metrics,
    /// auto or off.
    pub cluster_trust_bundle: String,
    /// Further names of its certificate.
    pub tls_san: Vec<String>,
    /// Further settings.
    pub env: BTreeMap<String, String>,
    /// Requests and limits.
    pub resources: Value,
    /// Of its pods.
    pub pod_annotations: BTreeMap<String, String>,
    /// Of its pods.
    pub node_selector: BTreeMap<String, String>,
    /// Of its pods.
    pub tolerations: Vec<Value>,
    /// Of its pods.
    pub priority_class_name: String,
}

/// Control's metrics for collectors.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metrics {
    /// Whether there are any outside of the pod.
    pub enabled: bool,
    /// Who may ask for them: peers of a NetworkPolicy. Empty: everybody.
    pub from: Vec<Value>,
}

/// The proxy of each node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ztunnel {
    /// on or off.
    pub network_policy: String,
    /// Further settings.
    pub env: BTreeMap<String, String>,
    /// Requests and limits.
    pub resources: Value,
    /// Of its pods.
    pub pod_annotations: BTreeMap<String, String>,
    /// Of its pods.
    pub node_selector: BTreeMap<String, String>,
    /// Of its pods.
    pub tolerations: Vec<Value>,
    /// Of its pods.
    pub priority_class_name: String,
    /// Seconds.
    pub termination_grace_period_seconds: u32,
    /// Empty: the runtime's.
    pub se_linux_type: String,
    /// How one replaces another.
    pub update: Update,
    /// Another version for labelled nodes.
    pub canary: Canary,
    /// Folders of the container runtime.
    pub cni: Cni,
}

/// How a proxy replaces another.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Update {
    /// Started beside old ones.
    pub max_surge: u32,
    /// Missing meanwhile.
    pub max_unavailable: u32,
    /// Seconds.
    pub min_ready_seconds: u32,
}

/// The proxies of nodes labelled tulle.dev/proxy.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Canary {
    /// Empty: as all others.
    pub tag: String,
}

/// Folders of the container runtime on the node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Cni {
    /// Of plugins.
    pub bin_dir: String,
    /// Of their configuration.
    pub conf_dir: String,
}

/// The egress gateway.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressGateway {
    /// Whether there is one.
    pub enabled: bool,
    /// Name of all its objects.
    pub name: String,
    /// How many.
    pub replicas: u32,
    /// How many stay.
    pub min_available: u32,
    /// Which replicas are preferred; empty: all alike.
    pub traffic_distribution: String,
    /// What it may show to hosts outside.
    pub client_certificates: Vec<ClientCertificate>,
    /// Further settings.
    pub env: BTreeMap<String, String>,
    /// Requests and limits.
    pub resources: Value,
    /// Of its pods.
    pub pod_annotations: BTreeMap<String, String>,
    /// Of its pods.
    pub node_selector: BTreeMap<String, String>,
    /// Of its pods.
    pub tolerations: Vec<Value>,
}

/// A certificate that policies of a namespace may have shown to hosts outside.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClientCertificate {
    /// Of the policies.
    pub namespace: String,
    /// As they name it.
    pub name: String,
    /// Secret of the gateway's namespace.
    pub secret: String,
}

/// Whether node proxies are held to their own node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeRestriction {
    /// Whether.
    pub enabled: bool,
}

/// Whether the definitions of tulle.dev are part of it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Crds {
    /// Whether.
    pub install: bool,
}

impl Values {
    /// The defaults, then `files` (their text), then `sets` (`path.to.key=value`), each over what was before.
    ///
    /// # Errors
    /// What cannot be read, in words that name the value.
    pub fn read(files: &[String], sets: &[String]) -> Result<Self, String> {
        let mut merged = yaml(DEFAULTS).map_err(|error| format!("the chart's values.yaml: {error}"))?;
        for text in files {
            if text.len() > MAX_BYTES {
                return Err(format!("a file of values of {} bytes is more than {MAX_BYTES}", text.len()));
            }
            let mut over = yaml(text).map_err(|error| format!("the file of values cannot be read: {error}"))?;
            match &mut over {
                Value::Null => {}
                // Helm hands it to charts below this one; there are none.
                Value::Object(map) => {
                    map.remove("global");
                    merge(&mut merged, over);
                }
                _ => return Err("the file of values is not a map".to_owned()),
            }
        }
        for assignment in sets {
            let assigned = set(assignment, &merged)?;
            merge(&mut merged, assigned);
        }
        let values: Self = serde_path(&merged)?;
        values.check()?;
        Ok(values)
    }

    /// What types cannot say.
    fn check(&self) -> Result<(), String> {
        one_of("log.format", &self.log.format, &["plain", "json"])?;
        one_of("control.egressDefault", &self.control.egress_default, &["allow", "audit", "deny"])?;
        one_of("control.clusterTrustBundle", &self.control.cluster_trust_bundle, &["auto", "off"])?;
        one_of("ztunnel.networkPolicy", &self.ztunnel.network_policy, &["on", "off"])?;
        for (name, path) in
            [("ztunnel.cni.binDir", &self.ztunnel.cni.bin_dir), ("ztunnel.cni.confDir", &self.ztunnel.cni.conf_dir)]
        {
            if !path.starts_with('/') || path.len() < 2 {
                return Err(format!("{name}: `{path}` is no absolute path of a folder"));
            }
        }
        let update = &self.ztunnel.update;
        if (update.max_surge == 0) == (update.max_unavailable == 0) {
            let text =
                "ztunnel.update: one of maxSurge and maxUnavailable is 0, and only one, as the API server has it";
            return Err(text.to_owned());
        }
        if self.control.ca_secret.is_empty() {
            return Err("control.caSecret is empty; name the Secret that holds the keys of the CA".to_owned());
        }
        if self.control.plugged_ca_secret == self.control.ca_secret {
            return Err(
                "control.pluggedCaSecret is control.caSecret; the one is followed, the other written".to_owned()
            );
        }
        if self.control.replicas == 0 || (self.egress_gateway.enabled && self.egress_gateway.replicas == 0) {
            return Err("replicas is 0; at least one is needed".to_owned());
        }
        let gateway = &self.egress_gateway.name;
        let is_label = |name: &str| is_dns_name(name) && name.len() <= 63 && !name.contains('.');
        if !is_label(gateway) {
            return Err(format!("egressGateway.name: `{gateway}` is no name of a Service"));
        }
        if matches!(gateway.as_str(), "control" | "ztunnel" | names::PROXY_CANARY | "tulle-uninstall") {
            return Err(format!("egressGateway.name: `{gateway}` is the name of another part"));
        }
        let near = &self.egress_gateway.traffic_distribution;
        if !["", "PreferClose", "PreferSameZone", "PreferSameNode"].contains(&near.as_str()) {
            let text = "is none of PreferClose, PreferSameZone, PreferSameNode";
            return Err(format!("egressGateway.trafficDistribution: `{near}` {text}"));
        }
        for one in &self.egress_gateway.client_certificates {
            if let Some(wrong) = [&one.namespace, &one.name].into_iter().find(|part| !is_label(part)) {
                return Err(format!("egressGateway.clientCertificates: `{wrong}` is no name, such as bank-client"));
            }
            if one.secret.is_empty() {
                let of = format!("{}/{}", one.namespace, one.name);
                return Err(format!("egressGateway.clientCertificates: `secret` of {of} is empty"));
            }
        }
        Ok(())
    }
}

fn one_of(name: &str, value: &str, known: &[&str]) -> Result<(), String> {
    if known.contains(&value) {
        return Ok(());
    }
    Err(format!("{name}: `{value}` is none of {}", known.join(", ")))
}

fn serde_path(merged: &Value) -> Result<Values, String> {
    Values::deserialize(merged).map_err(|error| {
        format!("values: {error}; `tulle install --show-values` prints all values with their defaults")
    })
}

fn yaml(text: &str) -> Result<Value, String> {
    // YAML 1.2: `off` is a word.
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_str_with_options::<Value>(text, options)
        .map_err(|error| error.without_snippet().to_string().lines().next().unwrap_or_default().to_owned())
}

/// As Helm merges values.
fn merge(into: &mut Value, over: Value) {
    match (into, over) {
        (Value::Object(into), Value::Object(over)) => {
            for (key, value) in over {
                if value.is_null() {
                    into.remove(&key);
                } else {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (into, over) => *into = over,
    }
}

/// `a.b=value` as `{a: {b: value}}`. A dot of a key is written `\.`; the value is YAML, so `[a, b]` is a list. Where a text
/// is wanted, `1.10` is one, and not the number.
fn set(assignment: &str, merged: &Value) -> Result<Value, String> {
    let Some((path, text)) = assignment.split_once('=') else {
        return Err(format!("--set {assignment}: write it as path.to.value=VALUE"));
    };
    let keys = keys(path);
    if keys.iter().any(String::is_empty) || keys.len() > 16 {
        return Err(format!("--set {assignment}: `{path}` is no path of a value"));
    }
    let mut value = match text {
        "" => Value::from(""),
        text => yaml(text).map_err(|error| format!("--set {path}: the value cannot be read: {error}"))?,
    };
    if (value.is_number() || value.is_boolean()) && wants_text(&keys, merged) {
        value = Value::from(text);
    }
    Ok(keys.into_iter().rev().fold(value, |value, key| Value::Object(Map::from_iter([(key, value)]))))
}

/// The keys of a path.
fn keys(path: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut key = String::new();
    let mut characters = path.chars();
    while let Some(character) = characters.next() {
        match character {
            '.' => keys.push(std::mem::take(&mut key)),
            '\\' => key.extend(characters.next()),
            other => key.push(other),
        }
    }
    keys.push(key);
    keys
}

/// Whether a value is a text: its default is one, or it is in a map of texts.
fn wants_text(keys: &[String], merged: &Value) -> bool {
    let default = keys.iter().try_fold(merged, |value, key| value.get(key));
    let of_texts = |key: &String| matches!(key.as_str(), "env" | "podAnnotations" | "nodeSelector");
    default.is_some_and(Value::is_string) || keys.iter().rev().nth(1).is_some_and(of_texts)
}

#[cfg(test)]
mod tests {
    use super::Values;

    fn read(files: &[&str], sets: &[&str]) -> Result<Values, String> {
        let own = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        Values::read(&own(files), &own(sets))
    }

    #[test]
    fn the_defaults_are_values() {
        let values = read(&[], &[]).unwrap();
        assert_eq!(values.control.replicas, 2);
        assert_eq!(values.ztunnel.network_policy, "on");
        assert_eq!(values.ztunnel.pod_annotations["prometheus.io/scrape"], "true");
    }

    #[test]
    fn files_come_before_sets_and_maps_are_merged() {
        let values = read(
            &["control: {replicas: 3, env: {A: '1'}}", "control: {tlsSan: [a.example, b.example]}\nglobal: {x: 1}", ""],
            &[
                "control.env.B=2",
                "image.tag=1.10",
                "trustDomain=true",
                "control.replicas=5",
                "ztunnel.networkPolicy=off",
                r"ztunnel.podAnnotations.prometheus\.io/scrape='false'",
                "ztunnel.nodeSelector={pool: mesh}",
                "ztunnel.tolerations=[]",
            ],
        )
        .unwrap();
        assert_eq!(values.control.replicas, 5);
        assert_eq!(values.control.env.len(), 2);
        assert_eq!(values.control.env["B"], "2");
        assert_eq!((values.image.tag.as_str(), values.trust_domain.as_str()), ("1.10", "true"), "texts stay texts");
        assert_eq!(values.control.tls_san.len(), 2);
        assert_eq!(values.ztunnel.network_policy, "off");
        assert_eq!(values.ztunnel.pod_annotations["prometheus.io/scrape"], "false");
        assert_eq!(values.ztunnel.node_selector["pool"], "mesh");
        assert_eq!(values.ztunnel.node_selector.len(), 2, "maps are merged, not replaced");
        assert!(values.ztunnel.tolerations.is_empty());
    }

    #[test]
    fn values_that_cannot_be_meant_are_refused_by_name() {
        for (set, word) in [
            ("control.replica=3", "replica"),
            ("control.replicas=many", "many"),
            ("control.replicas=0", "replicas"),
            ("control.env.A=[1]", "string"),
            ("control", "path.to.value"),
            ("=1", "path"),
            ("a..b=1", "path"),
            ("image.pullPolicy=Sometimes", "Sometimes"),
            ("log.format=xml", "log.format"),
            ("control.egressDefault=maybe", "control.egressDefault"),
            ("ztunnel.networkPolicy=perhaps", "ztunnel.networkPolicy"),
            ("ztunnel.cni.binDir=opt/cni", "ztunnel.cni.binDir"),
            ("ztunnel.update.maxSurge=0", "maxUnavailable"),
            ("egressGateway.name=Not A Name", "egressGateway.name"),
            ("egressGateway.name=control", "another part"),
            ("egressGateway.clientCertificates=[{namespace: a, name: ../b, secret: c}]", "clientCertificates"),
            ("egressGateway.clientCertificates=[{namespace: a, name: b-, secret: c}]", "`b-`"),
            ("egressGateway.clientCertificates=[{namespace: a, name: b}]", "secret"),
            ("egressGateway.clientCertificates=[{namespace: a, name: b, secret: ''}]", "secret"),
            ("egressGateway.trafficDistribution=Far", "trafficDistribution"),
            ("control.tlsSan=[", "--set control.tlsSan"),
            ("control=null", "control"),
        ] {
            let error = read(&[], &[set]).map(|_| ()).unwrap_err();
            assert!(error.contains(word), "{set}: {error}");
        }
        assert!(read(&["control: {env: {A: 1}}"], &[]).unwrap_err().contains("string"));
        assert!(read(&["- a"], &[]).is_err());
        assert!(read(&["a: ["], &[]).is_err());
    }
}
