//! The session alone: cutting, nonces, acknowledgement, dry runs, limits, and a seeded walk in which a model node must
//! end up with exactly what is published, whatever it dropped on the way.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;
use tulle_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Status};
use tulle_proto::security;

use crate::resource::{Audience, Kind, Resource, ResourceSet};
use crate::xds::Published;
use crate::xds::session::{Abilities, MAX_NAMES, MAX_RESPONSE_BYTES, Session, Violation};

fn resource(kind: Kind, name: &str, content: &str) -> Resource {
    let message = security::Authorization { name: content.to_owned(), ..Default::default() };
    Resource::new(kind, name.to_owned(), &message, Vec::new())
}

fn published(generation: u64, resources: Vec<Resource>) -> Published {
    let set = Arc::new(resources.into_iter().collect::<ResourceSet>());
    Published { generation, set, ..Published::default() }
}

impl Session {
    /// A batch as it goes out.
    fn poll_batch(&mut self, published: &Published) -> Vec<DeltaDiscoveryResponse> {
        self.next_batch(published).into_iter().map(DeltaDiscoveryResponse::from).collect()
    }
}

fn subscribe(kind: Kind) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: kind.type_url().into(), ..Default::default() }
}

fn answer(response: &DeltaDiscoveryResponse, reject: bool) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        error_detail: reject.then(|| Status { code: 3, message: "no".into(), details: Vec::new() }),
        ..Default::default()
    }
}

/// A stream of a proxy that knows dry runs and takes no own type.
fn session() -> Session {
    Session::new(Abilities { dry_run: true, ..Abilities::default() })
}

fn both(session: &mut Session) {
    for kind in [Kind::Address, Kind::Authorization] {
        session.handle_request(&subscribe(kind)).expect("good");
    }
}

#[test]
fn nothing_is_sent_before_anything_is_published() {
    let mut session = session();
    both(&mut session);
    assert!(session.poll_batch(&Published::default()).is_empty());
    let batch = session.poll_batch(&published(1, Vec::new()));
    assert_eq!(batch.len(), 2, "the empty first answer of each type is sent");
    assert_eq!(batch[0].type_url, Kind::Authorization.type_url());
}

#[test]
fn next_batch_waits_for_all_answers_and_stale_nonces_answer_nothing() {
    let mut session = session();
    both(&mut session);
    let one = published(1, vec![resource(Kind::Address, "a", "1"), resource(Kind::Authorization, "p", "1")]);
    let two = published(2, vec![resource(Kind::Address, "a", "2")]);
    let batch = session.poll_batch(&one);
    assert_eq!(batch.len(), 2);
    session.handle_request(&answer(&batch[0], false)).expect("good");
    let mut stale = answer(&batch[1], false);
    stale.response_nonce = "0-99".into();
    session.handle_request(&stale).expect("good");
    assert!(session.poll_batch(&two).is_empty());
    assert_eq!(session.acked_generation(), 0);
    session.handle_request(&answer(&batch[1], true)).expect("good");
    assert_eq!((session.acked_generation(), session.nacks().len()), (1, 1));
    let batch = session.poll_batch(&two);
    assert_eq!(batch[0].removed_resources, ["p"]);
    assert_eq!(batch[1].resources[0].name, "a");
    for response in &batch {
        session.handle_request(&answer(response, false)).expect("good");
    }
    assert_eq!((session.acked_generation(), session.nacks().len()), (2, 0));
    assert!(session.poll_batch(&published(3, vec![resource(Kind::Address, "a", "2")])).is_empty());
    assert_eq!(session.acked_generation(), 3, "nothing to send counts as acknowledged");
}

#[test]
fn big_sets_are_cut_into_responses_that_every_peer_accepts() {
    let text = "x".repeat(1000);
    let many = (0..8000).map(|i| resource(Kind::Address, &format!("w{i}"), &text)).collect();
    let mut session = session();
    session.handle_request(&subscribe(Kind::Address)).expect("good");
    let batch = session.poll_batch(&published(1, many));
    assert!(batch.len() >= 3);
    assert_eq!(batch.iter().map(|r| r.resources.len()).sum::<usize>(), 8000);
    for response in &batch {
        let size = prost::Message::encoded_len(response);
        assert!(size <= MAX_RESPONSE_BYTES + 1024, "{size}");
    }
}

#[test]
fn proxies_that_would_enforce_dry_runs_do_not_get_them() {
    let mut dry = resource(Kind::Authorization, "p", "dry");
    dry.audience = Audience::KnowsDryRun;
    for knows in [true, false] {
        let mut session = Session::new(Abilities { dry_run: knows, ..Abilities::default() });
        session.handle_request(&subscribe(Kind::Authorization)).expect("good");
        let first = session.poll_batch(&published(1, vec![resource(Kind::Authorization, "p", "wet")]));
        session.handle_request(&answer(&first[0], false)).expect("good");
        let second = session.poll_batch(&published(2, vec![dry.clone()]));
        assert_eq!(second[0].resources.len(), usize::from(knows));
        assert_eq!(second[0].removed_resources.len(), usize::from(!knows));
    }
}

#[test]
fn a_stand_in_is_only_for_proxies_that_do_not_take_the_type() {
    let mut stand_in = resource(Kind::Authorization, "shop/tulle_network_p", "denies");
    stand_in.audience = Audience::Without(Kind::NetworkPolicy);
    let set = published(1, vec![stand_in, resource(Kind::NetworkPolicy, "NetworkPolicy/shop/p", "p")]);
    for takes in [true, false] {
        let takes: BTreeSet<Kind> = takes.then_some(Kind::NetworkPolicy).into_iter().collect();
        let mut session = Session::new(Abilities { takes: takes.clone(), ..Abilities::default() });
        for kind in Kind::BASIC.iter().chain(&takes) {
            session.handle_request(&subscribe(*kind)).expect("good");
        }
        let batch = session.poll_batch(&set);
        let sent: Vec<&str> = batch.iter().flat_map(|r| &r.resources).map(|r| r.name.as_str()).collect();
        assert_eq!(sent, [if takes.is_empty() { "shop/tulle_network_p" } else { "NetworkPolicy/shop/p" }]);
    }
}

#[test]
fn network_policies_say_whether_workloads_of_the_same_batch_follow() {
    let mut session = Session::new(Abilities { takes: [Kind::NetworkPolicy].into(), ..Abilities::default() });
    for kind in Kind::ALL {
        session.handle_request(&subscribe(kind)).expect("good");
    }
    let (policy, pod) = (|to| resource(Kind::NetworkPolicy, "p", to), |to| resource(Kind::Address, "a", to));
    let steps =
        [(vec![policy("1"), pod("1")], "1&"), (vec![policy("2"), pod("1")], "2"), (vec![policy("3"), pod("2")], "3&")];
    for (generation, (resources, info)) in (1..).zip(steps) {
        let batch = session.poll_batch(&published(generation, resources));
        let of_policies = batch.iter().find(|r| r.type_url == Kind::NetworkPolicy.type_url()).expect("sent");
        assert_eq!(of_policies.system_version_info, info);
        batch.iter().for_each(|response| session.handle_request(&answer(response, false)).expect("good"));
        assert_eq!(session.acked_generation(), generation);
    }
}

#[test]
fn a_generation_has_not_arrived_before_every_type_that_the_proxy_takes_is_subscribed() {
    let mut session = Session::new(Abilities { takes: [Kind::NetworkPolicy].into(), ..Abilities::default() });
    both(&mut session);
    let set = published(1, Vec::new());
    for response in session.poll_batch(&set) {
        session.handle_request(&answer(&response, false)).expect("good");
    }
    assert_eq!(session.acked_generation(), 0);
    session.handle_request(&subscribe(Kind::NetworkPolicy)).expect("good");
    for response in session.poll_batch(&set) {
        session.handle_request(&answer(&response, false)).expect("good");
    }
    assert_eq!(session.acked_generation(), 1);
}

#[test]
fn greedy_requests_end_the_stream() {
    let mut many = subscribe(Kind::Address);
    many.resource_names_subscribe = (0..=MAX_NAMES).map(|i| i.to_string()).collect();
    assert_eq!(session().handle_request(&many), Err(Violation::TooManyNames));
    let mut long = subscribe(Kind::Address);
    long.resource_names_subscribe = vec!["x".repeat(2000)];
    assert_eq!(session().handle_request(&long), Err(Violation::LongName));
    let mut unknown = subscribe(Kind::Address);
    unknown.type_url = "type.googleapis.com/nothing".into();
    assert_eq!(session().handle_request(&unknown), Ok(()));
}

/// What a node holds: name to version, by type.
type Held = BTreeMap<String, BTreeMap<String, String>>;

fn take(held: &mut Held, response: &DeltaDiscoveryResponse) {
    let of_type = held.entry(response.type_url.clone()).or_default();
    for resource in &response.resources {
        of_type.insert(resource.name.clone(), resource.version.clone());
    }
    for name in &response.removed_resources {
        of_type.remove(name);
    }
}

fn reconnect(held: &Held) -> Session {
    let mut session = session();
    for kind in Kind::ALL {
        let mut request = subscribe(kind);
        request.initial_resource_versions = held.get(kind.type_url()).cloned().unwrap_or_default();
        session.handle_request(&request).expect("good");
    }
    session
}

proptest! {
    /// Each step publishes a random set; the node reads some responses, answers some, or loses the stream.
    #[test]
    fn node_converges_through_lost_streams(
        steps in proptest::collection::vec((proptest::collection::btree_map(0..6u8, 0..4u8, 0..6), 0..4u8), 1..30)
    ) {
        let mut held = Held::new();
        let mut session = reconnect(&held);
        let mut last = Published::default();
        for (content, what) in steps {
            let resources = content.iter().flat_map(|(name, version)| Kind::ALL.map(|kind| {
                resource(kind, &format!("r{name}"), &format!("{version}"))
            }));
            last = last.next(resources.collect());
            let batch = session.poll_batch(&last);
            // 0: the stream breaks after the first response; otherwise all are read and answered.
            let read = if what == 0 { 1 } else { batch.len() };
            for response in batch.iter().take(read) {
                take(&mut held, response);
                session.handle_request(&answer(response, false)).expect("good");
            }
            if what == 0 {
                session = reconnect(&held);
            }
        }
        for response in session.poll_batch(&last) {
            take(&mut held, &response);
            session.handle_request(&answer(&response, false)).expect("good");
        }
        for kind in Kind::ALL {
            let wanted: BTreeMap<String, String> = last.set.of(kind).values().map(|r| (r.name.to_string(), r.version.to_string())).collect();
            prop_assert_eq!(held.get(kind.type_url()).cloned().unwrap_or_default(), wanted);
        }
        prop_assert_eq!(session.acked_generation(), last.generation);
    }
}
