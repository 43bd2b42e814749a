//! Whether the next step of a rotation is safe yet, from what the nodes say of their certificates.
//!
//! A step that comes too early cuts connections: a node that does not know the new root refuses everybody who has been
//! signed by it. So a step waits until each node with pods says that all its certificates have what the step needs, or
//! until every certificate of before has ended by itself. Nodes that cannot be asked (Istio's ztunnel, a node that lost
//! control) count as not there yet.

use std::collections::BTreeMap;

use tulle_certs::ca::rotate::Rotation;
use tulle_proto::node::CertificateStatus;

/// What a node answered, or why it did not.
pub type Answers = BTreeMap<String, Result<Vec<CertificateStatus>, String>>;

/// What the next step waits for, a sentence each; empty: it is safe. `issuer` is the intermediate that signs now, SHA-256
/// in hex; `now` in Unix seconds.
pub fn waits_for(rotation: &Rotation, issuer: &str, nodes: &Answers, now: i64) -> Vec<String> {
    if rotation.safe_after().is_none_or(|safe| now >= safe) {
        return Vec::new();
    }
    let ready = |certificate: &CertificateStatus| match rotation {
        Rotation::Settled => true,
        Rotation::Announced { new, .. } => certificate.roots.contains(new),
        Rotation::Switched { .. } => certificate.issuer == issuer,
    };
    let wanted = match rotation {
        Rotation::Settled | Rotation::Announced { .. } => "do not know the new root yet",
        Rotation::Switched { .. } => "are not signed under it yet",
    };
    let sentence = |(node, answer): (&String, &Result<Vec<CertificateStatus>, String>)| match answer {
        Err(error) => Some(format!("node {node} cannot be asked: {error}")),
        Ok(certificates) => {
            // One that is still awaited comes from the CA as it is now.
            let behind = certificates.iter().filter(|held| held.not_after > 0 && !ready(held)).count();
            (behind > 0).then(|| format!("node {node}: {behind} of {} certificates {wanted}", certificates.len()))
        }
    };
    nodes.iter().filter_map(sentence).collect()
}

#[cfg(test)]
mod tests {
    use tulle_certs::ca::LEAF_LIFE_S;

    use super::*;

    fn certificate(roots: &[&str], issuer: &str) -> CertificateStatus {
        CertificateStatus {
            identity: "spiffe://cluster.local/ns/shop/sa/cart".into(),
            state: "Available".into(),
            not_after: 1,
            error: String::new(),
            roots: roots.iter().map(|root| (*root).to_owned()).collect(),
            issuer: issuer.into(),
            serial: String::new(),
        }
    }

    #[test]
    fn a_step_waits_for_every_node_and_not_longer_than_a_leaf_lives() {
        let announced = Rotation::Announced { new: "new".into(), since: 1000 };
        let switched = Rotation::Switched { old: "old".into(), since: 1000 };
        let awaited = CertificateStatus { not_after: 0, ..certificate(&[], "") };
        let knows = certificate(&["old", "new"], "i");
        let signed = certificate(&["old", "new"], "j");
        let behind = certificate(&["old"], "i");
        let cases: Vec<(&str, &Rotation, Vec<CertificateStatus>, Option<&str>)> = vec![
            ("nothing under way", &Rotation::Settled, vec![behind.clone()], None),
            ("no pods", &announced, vec![], None),
            ("all know it", &announced, vec![knows.clone(), awaited.clone()], None),
            ("one does not", &announced, vec![knows.clone(), behind], Some("node n: 1 of 2 certificates do not know")),
            ("not signed under it", &switched, vec![knows], Some("1 of 1 certificates are not signed")),
            ("signed under it", &switched, vec![signed, awaited], None),
        ];
        for (name, rotation, certificates, expected) in cases {
            let nodes = Answers::from([("n".to_owned(), Ok(certificates))]);
            let waits = waits_for(rotation, "j", &nodes, 2000);
            match expected {
                None => assert!(waits.is_empty(), "{name}: {waits:?}"),
                Some(text) => assert!(waits.len() == 1 && waits[0].contains(text), "{name}: {waits:?}"),
            }
            assert!(waits_for(rotation, "j", &nodes, 1000 + LEAF_LIFE_S).is_empty(), "{name}: time is over");
        }
        let silent = Answers::from([("n".to_owned(), Err("node n is not attached".to_owned()))]);
        assert!(waits_for(&announced, "j", &silent, 2000)[0].contains("not attached"));
    }
}
