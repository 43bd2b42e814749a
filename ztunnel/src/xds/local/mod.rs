//! The mesh from a file instead of discovery (`LOCAL_XDS_PATH`): workloads, services and policies in the YAML that Istio's
//! ztunnel reads, for trying a proxy without a control plane and for tests.
//!
//! The file becomes the very resources that discovery would send and goes through the same decoder, so nothing is
//! understood in two ways. It is looked at again and again, and only what changed is applied. A file that is no such
//! document changes nothing; a bad entry is reported by its place and leaves its last good version in force, and a policy
//! that never had one denies what its namespace has, as it would from discovery.

mod parse;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use prost_types::Any;
use tulle_proto::discovery::Resource;
use tulle_proto::names::TYPE_AUTHORIZATION;

use crate::base::unix_now_us;
use crate::state::{Change, Writer};
use crate::xds::decode::{self, Strings};
use crate::xds::monitor::{Monitor, Termination};

pub use parse::{Document, Entry, parse};

/// How often the file is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// Largest file that is read: a hundred thousand workloads.
const LARGEST: u64 = 64 << 20;

/// What of the file is in force: the version of each resource by type and name.
#[derive(Debug, Default)]
pub struct Local {
    known: BTreeMap<(&'static str, String), String>,
    synced: bool,
    strings: Strings,
}

impl Local {
    /// What a document changes, and what is wrong with it, each by its place.
    pub fn changes(&mut self, document: Document) -> (Vec<Change>, Vec<String>) {
        let Document { entries, mut errors } = document;
        // An entry without a readable name may be any of those in force.
        let unnamed = entries.iter().any(|entry| entry.name.is_none());
        let named: BTreeSet<(&'static str, String)> =
            entries.iter().filter_map(|entry| Some((entry.type_url, entry.name.clone()?))).collect();
        let mut changes = Vec::new();
        let gone: Vec<_> = self.known.keys().filter(|key| !unnamed && !named.contains(*key)).cloned().collect();
        for key in gone {
            self.known.remove(&key);
            let (type_url, name) = key;
            changes.push(match type_url {
                TYPE_AUTHORIZATION => Change::PolicyRemoved(name.into()),
                _ => Change::AddressRemoved(name.into()),
            });
        }
        let mut seen = BTreeSet::new();
        // Policies come first in a document: then workloads find theirs.
        for Entry { type_url, name, place, value } in entries {
            let Some(name) = name else { continue };
            if !seen.insert((type_url, name.clone())) {
                errors.push(format!("{place}: {name} is there twice; the first one counts"));
                continue;
            }
            let mut hasher = DefaultHasher::new();
            value.hash(&mut hasher);
            let version = format!("{:016x}", hasher.finish());
            if self.known.get(&(type_url, name.clone())) == Some(&version) {
                continue;
            }
            // Bytes that are nothing stand for an entry that cannot be read: the decoder makes a stand-in of a policy.
            let bytes = value.unwrap_or_else(|| vec![0xff]);
            let resource = Resource {
                name: name.clone(),
                version: version.clone(),
                resource: Some(Any { type_url: type_url.to_owned(), value: bytes }),
                ..Resource::default()
            };
            let decoded = match type_url {
                TYPE_AUTHORIZATION => decode::authorization_resource(&resource),
                _ => decode::address_resource(&resource, &mut self.strings),
            };
            match decoded {
                Ok(change) => {
                    changes.push(change);
                    self.known.insert((type_url, name), version);
                }
                Err((rejected, stand_in)) => {
                    changes.extend(stand_in);
                    // Not what is in force, but a name whose removal means something.
                    self.known.entry((type_url, name)).or_default();
                    if resource.resource.is_some_and(|any| any.value[..] != [0xff]) {
                        errors.push(format!("{place}: {}", rejected.reason));
                    }
                }
            }
        }
        if !self.synced {
            self.synced = true;
            changes.extend([Change::PoliciesSynced, Change::AddressesSynced]);
        }
        (changes, errors)
    }
}

/// Keeps the store as the file says, until `shutdown` completes.
pub async fn run(path: PathBuf, mut writer: Writer, monitor: Monitor, shutdown: impl Future<Output = ()>) {
    tokio::pin!(shutdown);
    let mut local = Local::default();
    let mut last = None;
    let mut problem = String::new();
    loop {
        let found = match read(&path, &mut last) {
            Ok(Some(text)) => match parse(&text) {
                Ok(document) => {
                    let (changes, errors) = local.changes(document);
                    let applied = writer.apply(changes, unix_now_us());
                    tracing::info!(file = %path.display(), generation = applied.generation, errors = errors.len(), "the mesh is as the file says");
                    errors.iter().for_each(|error| tracing::error!(file = %path.display(), "{error}"));
                    Some(errors.join("; "))
                }
                Err(error) => Some(format!("{}: {error}; what it said before stays", path.display())),
            },
            Ok(None) => None,
            Err(error) => Some(format!("{}: {error}; what it said before stays", path.display())),
        };
        if let Some(found) = found.filter(|found| *found != problem) {
            monitor.terminated(Termination::Error, &found, unix_now_us());
            if !found.is_empty() {
                tracing::error!(problem = found, "LOCAL_XDS_PATH");
            }
            problem = found;
        }
        tokio::select! { () = &mut shutdown => return, () = tokio::time::sleep(LOOK) => {} }
    }
}

type Stamp = (u64, SystemTime, u64);

/// The text, if the file is another than the last time.
fn read(path: &Path, last: &mut Option<Stamp>) -> std::io::Result<Option<String>> {
    let meta = std::fs::metadata(path)?;
    let stamp = (meta.ino(), meta.modified()?, meta.len());
    if *last == Some(stamp) {
        return Ok(None);
    }
    if meta.len() > LARGEST {
        return Err(std::io::Error::other(format!("{} bytes; at most {LARGEST} are read", meta.len())));
    }
    let text = std::fs::read_to_string(path)?;
    *last = Some(stamp);
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use super::{Local, parse};
    use crate::state::{Action, GatewayTarget, Protocol, Snapshot, store};

    const MESH: &str = "
workloads:
- uid: c1//Pod/shop/web
  name: web
  namespace: shop
  serviceAccount: web
  workloadIps: [10.0.0.1]
  protocol: HBONE
  node: node-1
- name: cart
  namespace: shop
  workloadIps: [10.0.0.2, 'fd00::2']
  protocol: HBONE
  waypoint: {destination: infra/way.infra.svc.cluster.local, hbone_mtls_port: 15008}
  authorizationPolicies: [shop/no-web]
  services:
    shop/cart.shop.svc.cluster.local: {80: 8080}
services:
- name: cart
  namespace: shop
  hostname: cart.shop.svc.cluster.local
  vips: [/10.96.0.1, 'far/10.96.0.2']
  ports: {80: 8080}
  subjectAltNames: ['spiffe://cluster.local/ns/shop/sa/other']
  waypoint: {destination: /10.0.9.9, hboneMtlsPort: 15018}
  canonical: true
policies:
- name: no-web
  namespace: shop
  scope: WorkloadSelector
  action: Deny
  dryRun: false
  rules: [[[{principals: [{Exact: cluster.local/ns/shop/sa/web}], notDestinationPorts: [9999]}]]]
";

    fn load(local: &mut Local, writer: &mut crate::state::Writer, text: &str) -> Vec<String> {
        let (changes, errors) = local.changes(parse(text).unwrap());
        writer.apply(changes, 1);
        errors
    }

    /// The policy of the pod: what it does, for whom, not at which ports; or that it denies all.
    fn in_force(snapshot: &Snapshot) -> String {
        let cart = snapshot.workload("Kubernetes//Pod/shop/cart").unwrap();
        let policy = snapshot.policies_for(cart).next().unwrap();
        if policy.stand_in.is_some() {
            return "denies all".to_owned();
        }
        let only = &policy.rules[0].clauses[0].matches[0];
        let action = if policy.action == Action::Deny { "denies" } else { "allows" };
        format!("{action} {:?} but at {:?}", only.principals, only.not_destination_ports)
    }

    const IN_FORCE: &str = "denies [Exact(\"cluster.local/ns/shop/sa/web\")] but at [9999]";

    #[test]
    fn a_file_means_what_it_means_to_istio_s_ztunnel() {
        let (mut writer, reader) = store();
        let mut local = Local::default();
        assert_eq!(load(&mut local, &mut writer, MESH), Vec::<String>::new());
        let snapshot = reader.load();
        assert!(snapshot.synced());
        let cart = snapshot.workload("Kubernetes//Pod/shop/cart").unwrap();
        assert_eq!((cart.protocol, cart.addresses.len()), (Protocol::Hbone, 2));
        assert_eq!(cart.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/default");
        let way = cart.waypoint.as_ref().unwrap();
        assert!(matches!(&way.target, GatewayTarget::Hostname { namespace, .. } if **namespace == *"infra"));
        let to: SocketAddr = "10.96.0.1:80".parse().unwrap();
        let service = snapshot.service_at("", to, "shop").unwrap().clone();
        assert_eq!(service.endpoints.all.len(), 1);
        assert_eq!(service.waypoint.as_ref().unwrap().hbone_port, 15018);
        assert!(snapshot.service_at("far", "10.96.0.2:80".parse().unwrap(), "shop").is_some());
        assert_eq!(in_force(&snapshot), IN_FORCE);
        // The same again changes nothing; what is left out is gone.
        let generation = reader.load().generation();
        load(&mut local, &mut writer, MESH);
        assert_eq!(reader.load().generation(), generation);
        load(&mut local, &mut writer, &MESH[MESH.find("services:\n-").unwrap()..]);
        assert_eq!(reader.load().workloads().count(), 0);
    }

    #[test]
    fn a_bad_entry_is_reported_by_its_place_and_what_it_said_before_stays() {
        let (mut writer, reader) = store();
        let mut local = Local::default();
        load(&mut local, &mut writer, MESH);
        for (from, to, says) in [
            ("workloadIps: [10.0.0.1]", "workloadIps: [10.0.0.256]", "workloads[0] (c1//Pod/shop/web)"),
            ("protocol: HBONE\n  node", "protcol: HBONE\n  node", "protcol"),
            ("{80: 8080}\nservices", "{80: 80800}\nservices", "workloads[1] (Kubernetes//Pod/shop/cart)"),
            ("[/10.96.0.1,", "[10.96.0.1,", "services[0] (shop/cart.shop.svc.cluster.local)"),
            ("action: Deny", "action: Audit", "policies[0] (shop/no-web)"),
            ("notDestinationPorts", "notDestinationPortz", "notDestinationPortz"),
            ("  name: web\n", "  name: web\n  capacity: x\n", "workloads[0]"),
        ] {
            let text = MESH.replacen(from, to, 1);
            assert_ne!(text, MESH, "{from}");
            let errors = load(&mut local, &mut writer, &text);
            assert!(errors.len() == 1 && errors[0].contains(says), "{to}: {errors:?}");
            let snapshot = reader.load();
            assert_eq!(in_force(&snapshot), IN_FORCE, "{to}");
            assert_eq!(snapshot.counts(), (2, 1, 1), "{to}");
        }
        for text in ["", "- a", "workloads: 3", "workload: []"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_policy_that_was_never_readable_denies_what_its_namespace_has() {
        let (mut writer, reader) = store();
        let mut local = Local::default();
        let errors = load(&mut local, &mut writer, &MESH.replace("Exact", "Exactly"));
        assert!(errors[0].contains("policies[0] (shop/no-web)"), "{errors:?}");
        let snapshot: Arc<Snapshot> = reader.load();
        assert_eq!(in_force(&snapshot), "denies all");
        assert_eq!(load(&mut local, &mut writer, MESH), Vec::<String>::new());
        assert_eq!(in_force(&reader.load()), IN_FORCE, "once it can be read");
    }
}
