//! The CA as it signs now, and what a rotation under way waits for, on all replicas together.
//!
//! Each replica asks the nodes that are attached to it and tells the others (`status::acks`); whoever is asked what a step
//! waits for joins that. So `control rotate` may be run in any replica.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tulle_certs::ca::Authority;
use tulle_certs::ca::rotate::Rotation;
use tulle_certs::fingerprint;
use tulle_proto::node::StatusQuestion;
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_question::Question;

use crate::admin::State;
use crate::base;
use crate::ca::rotation::{self, Word};

/// What is shown at `/debug/ca`.
pub(super) async fn shown(state: &State) -> Value {
    let names = state.view.borrow().nodes.clone().into_iter().chain(state.registry.attached());
    let nodes = ask(state, names.collect()).await;
    let authority = state.authority.load_full();
    let said = match (&state.others, authority.rotation()) {
        (None, _) | (_, Rotation::Settled) => Vec::new(),
        (Some(others), _) => others().await,
    };
    // Of another version, or broken: as if it had said nothing.
    let others: Vec<Word> = said.iter().filter_map(|text| serde_json::from_str(text).ok()).collect();
    let issuer = fingerprint(authority.intermediate());
    let (step, since) = match authority.rotation() {
        Rotation::Settled => ("settled", None),
        Rotation::Announced { since, .. } => ("announced", Some(*since)),
        Rotation::Switched { since, .. } => ("switched", Some(*since)),
    };
    let own = rotation::progress(authority.rotation(), &issuer, &nodes, base::unix_now());
    json!({
        "roots": authority.roots().fingerprints(),
        "intermediate": issuer,
        "intermediateNotAfter": authority.not_after(),
        "rotation": step,
        "since": since,
        "safeAfter": authority.rotation().safe_after(),
        "waitsFor": rotation::waits_for(own, &others, &of(&authority)),
    })
}

/// What this replica says of its nodes, JSON; empty while nothing is rotated.
pub async fn word(state: &State) -> String {
    let authority = state.authority.load_full();
    if *authority.rotation() == Rotation::Settled {
        return String::new();
    }
    let nodes = ask(state, state.registry.attached().into_iter().collect()).await;
    let issuer = fingerprint(authority.intermediate());
    let progress = rotation::progress(authority.rotation(), &issuer, &nodes, base::unix_now());
    serde_json::to_string(&rotation::word(of(&authority), progress)).unwrap_or_default()
}

fn of(authority: &Authority) -> String {
    rotation::state(authority.rotation(), &authority.roots().fingerprints(), &fingerprint(authority.intermediate()))
}

async fn ask(state: &State, names: BTreeSet<String>) -> rotation::Answers {
    let asked = names.into_iter().map(|name| async {
        let answer = match state.registry.ask(&name, Question::Status(StatusQuestion {})).await {
            Ok(Answer::Status(status)) => Ok(status.certificates),
            Ok(_) => Err("it answered another question".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        (name, answer)
    });
    join_all(asked).await.into_iter().collect()
}
