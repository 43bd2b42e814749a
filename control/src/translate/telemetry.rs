//! The names under which a pod appears in metrics and logs: canonical service and revision, owner.
//!
//! The label order is Istio's, so that dashboards keep working. A ReplicaSet's Deployment is found by cutting the
//! template hash, because the ReplicaSet itself is not read.

use tulle_proto::workload::WorkloadType;

use crate::model::Meta;

/// Canonical name.
pub(super) fn canonical_name(meta: &Meta) -> String {
    first(meta, &["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]).unwrap_or_else(|| owner(meta).1)
}

/// Canonical revision.
pub(super) fn canonical_revision(meta: &Meta) -> String {
    first(meta, &["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
        .unwrap_or_else(|| "latest".into())
}

fn first(meta: &Meta, labels: &[&str]) -> Option<String> {
    labels.iter().find_map(|label| meta.label(label).filter(|value| !value.is_empty())).map(str::to_owned)
}

/// Kind and name of the owner; the pod itself if nobody owns it.
pub(super) fn owner(meta: &Meta) -> (WorkloadType, String) {
    let Some(owner) = &meta.owner else {
        return (WorkloadType::Pod, meta.name.clone());
    };
    match owner.kind.as_str() {
        "Deployment" => (WorkloadType::Deployment, owner.name.clone()),
        "ReplicaSet" => {
            let hash = meta.label("pod-template-hash").unwrap_or_default();
            let name = owner.name.strip_suffix(hash).and_then(|name| name.strip_suffix('-'));
            match name.filter(|_| !hash.is_empty()) {
                Some(name) => (WorkloadType::Deployment, name.to_owned()),
                None => (WorkloadType::Deployment, owner.name.clone()),
            }
        }
        "CronJob" => (WorkloadType::Cronjob, owner.name.clone()),
        "Job" => (WorkloadType::Job, owner.name.clone()),
        _ => (WorkloadType::Pod, owner.name.clone()),
    }
}
