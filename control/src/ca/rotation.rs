//! Whether the next step of a rotation is safe yet, from what the nodes say of their certificates.
//!
//! A step that comes too early cuts connections: a node that does not know the new root refuses everybody who has been
//! signed by it. So a step waits until each node with pods says that all its certificates have what the step needs, or
//! until every certificate of before has ended by itself. Nodes that cannot be asked (Istio's ztunnel, a node that lost
//! control) count as not there yet. A node is attached to one replica of control, which alone can ask it; the others hear
//! its [`Word`]. A word about another state of the CA counts as none, so a replica that is behind holds the step up.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tulle_certs::ca::rotate::Rotation;
use tulle_proto::node::CertificateStatus;

/// A word of more nodes is cut: two annotations of 256 KiB together have to hold it. Nodes that are left out are waited for.
const MAX_WORD: usize = 40 * 1024;

/// What a node answered, or why it did not.
pub type Answers = BTreeMap<String, Result<Vec<CertificateStatus>, String>>;

/// How far a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// The next step cuts none of its connections.
    Ready,
    /// It is not there yet, in a sentence.
    Behind(String),
    /// It was not to be asked, in a sentence.
    Unknown(String),
}

/// What a replica says of the nodes that are attached to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// [`state`] of the CA that it is about.
    pub of: String,
    /// By node, why the step would be too early; empty: it would not.
    pub nodes: BTreeMap<String, String>,
}

/// One text for each state that a CA has on the way of a rotation: the step, the roots, the issuer.
pub fn state(rotation: &Rotation, roots: &[String], issuer: &str) -> String {
    let step = match rotation {
        Rotation::Settled => "settled",
        Rotation::Announced { .. } => "announced",
        Rotation::Switched { .. } => "switched",
    };
    format!("{step} {} {issuer}", roots.join(","))
}

/// How far each node is. `issuer` is the intermediate that signs now, SHA-256 in hex; `now` in Unix seconds.
pub fn progress(rotation: &Rotation, issuer: &str, nodes: &Answers, now: i64) -> BTreeMap<String, Progress> {
    let safe = rotation.safe_after().is_none_or(|safe| now >= safe);
    let ready = |certificate: &CertificateStatus| match rotation {
        Rotation::Settled => true,
        Rotation::Announced { new, .. } => certificate.roots.contains(new),
        Rotation::Switched { .. } => certificate.issuer == issuer,
    };
    let wanted = match rotation {
        Rotation::Settled | Rotation::Announced { .. } => "do not know the new root yet",
        Rotation::Switched { .. } => "are not signed under it yet",
    };
    let of = |(node, answer): (&String, &Result<Vec<CertificateStatus>, String>)| match answer {
        _ if safe => Progress::Ready,
        Err(error) => Progress::Unknown(format!("node {node} cannot be asked: {error}")),
        Ok(certificates) => {
            // One that is still awaited comes from the CA as it is now.
            match certificates.iter().filter(|held| held.not_after > 0 && !ready(held)).count() {
                0 => Progress::Ready,
                behind => {
                    Progress::Behind(format!("node {node}: {behind} of {} certificates {wanted}", certificates.len()))
                }
            }
        }
    };
    nodes.iter().map(|pair| (pair.0.clone(), of(pair))).collect()
}

/// What this replica says to the others; of nodes that it could not ask it says nothing.
pub fn word(of: String, progress: BTreeMap<String, Progress>) -> Word {
    let (mut nodes, mut room) = (BTreeMap::new(), MAX_WORD);
    for (node, progress) in progress {
        let why = match progress {
            Progress::Ready => String::new(),
            Progress::Behind(why) => why,
            Progress::Unknown(_) => continue,
        };
        let Some(left) = room.checked_sub(node.len() + why.len() + 6) else { break };
        room = left;
        nodes.insert(node, why);
    }
    Word { of, nodes }
}

/// What the next step waits for, a sentence each; empty: it is safe. `own` is what this replica found out, `others` what
/// those say that other nodes are attached to, and `of` the [`state`] of the CA here.
pub fn waits_for(own: BTreeMap<String, Progress>, others: &[Word], of: &str) -> Vec<String> {
    let mut all = own;
    for (node, why) in others.iter().filter(|word| word.of == of).flat_map(|word| &word.nodes) {
        let known = all.get(node);
        let said = if why.is_empty() { Progress::Ready } else { Progress::Behind(why.clone()) };
        match known {
            // It moved from one replica to another: whoever has it now says what it has now.
            Some(Progress::Behind(_)) => {}
            Some(Progress::Ready) if said != Progress::Ready => {}
            _ => drop(all.insert(node.clone(), said)),
        }
    }
    let sentence = |progress| match progress {
        Progress::Ready => None,
        Progress::Behind(why) | Progress::Unknown(why) => Some(why),
    };
    all.into_values().filter_map(sentence).collect()
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
            let waits = alone(rotation, &nodes, 2000);
            match expected {
                None => assert!(waits.is_empty(), "{name}: {waits:?}"),
                Some(text) => assert!(waits.len() == 1 && waits[0].contains(text), "{name}: {waits:?}"),
            }
            assert!(alone(rotation, &nodes, 1000 + LEAF_LIFE_S).is_empty(), "{name}: time is over");
        }
        let silent = Answers::from([("n".to_owned(), Err("node n is not attached".to_owned()))]);
        assert!(alone(&announced, &silent, 2000)[0].contains("not attached"));
    }

    fn alone(rotation: &Rotation, nodes: &Answers, now: i64) -> Vec<String> {
        waits_for(progress(rotation, "j", nodes, now), &[], "")
    }

    #[test]
    fn a_node_of_another_replica_is_as_that_one_says_of_the_same_state() {
        let unknown = || Progress::Unknown("node b cannot be asked: not attached".into());
        let (ready, behind) = (|| Progress::Ready, || Progress::Behind("node b: behind here".into()));
        let own = |of_b: Progress| BTreeMap::from([("a".to_owned(), Progress::Ready), ("b".to_owned(), of_b)]);
        let said =
            |of: &str, node: &str, why: &str| Word { of: of.into(), nodes: [(node.to_owned(), why.to_owned())].into() };
        let none: Vec<String> = Vec::new();
        for (name, own, others, expected) in [
            ("nobody knows it", own(unknown()), vec![], vec!["node b cannot be asked: not attached"]),
            ("its replica says that it is ready", own(unknown()), vec![said("now", "b", "")], vec![]),
            ("its replica says that it is not", own(unknown()), vec![said("now", "b", "b: behind")], vec!["b: behind"]),
            (
                "its replica is behind itself",
                own(unknown()),
                vec![said("before", "b", "")],
                vec!["node b cannot be asked: not attached"],
            ),
            ("it came here from there", own(behind()), vec![said("now", "b", "")], vec!["node b: behind here"]),
            ("it came here from there, late", own(ready()), vec![said("now", "b", "b: behind")], vec![]),
            ("one that only the other knows", own(ready()), vec![said("now", "c", "c: behind")], vec!["c: behind"]),
            (
                "two, of which one is ready",
                own(unknown()),
                vec![said("now", "b", ""), said("now", "c", "x")],
                vec!["x"],
            ),
            ("all are", own(ready()), vec![said("now", "c", "")], vec![]),
        ] {
            assert_eq!(waits_for(own, &others, "now"), expected, "{name}");
        }
        assert_eq!(waits_for(own(ready()), &[], "now"), none);
    }

    #[test]
    fn a_word_tells_what_was_asked_and_is_cut_before_it_is_too_long() {
        let all = BTreeMap::from([
            ("a".to_owned(), Progress::Ready),
            ("b".to_owned(), Progress::Behind("late".into())),
            ("c".to_owned(), Progress::Unknown("not attached".into())),
        ]);
        let said = word("now".into(), all);
        assert_eq!(serde_json::to_string(&said).unwrap(), r#"{"of":"now","nodes":{"a":"","b":"late"}}"#);
        let many = (0..100_000).map(|at| (format!("node-{at}"), Progress::Ready)).collect();
        let said = serde_json::to_string(&word("now".into(), many)).unwrap();
        assert!(said.len() < MAX_WORD + 100 && said.len() > MAX_WORD / 2, "{}", said.len());
    }
}
