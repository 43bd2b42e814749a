//! The parser and the writer of DNS messages against messages that another library makes and reads.
//!
//! What goes out must mean to `hickory-proto` what was meant here, and no bytes may break either direction.

use super::{Body, OwnEdns, normalised, parse, refusal, renamed, without_question};
use hickory_proto::op::{Edns, Message, Query};
use hickory_proto::rr::rdata::{A, SOA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use proptest::prelude::*;

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn query(host: &str, payload: Option<u16>) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = 7;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(host), RecordType::A));
    if let Some(payload) = payload {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        message.set_edns(edns);
    }
    message.to_vec().unwrap()
}

/// A response with `answers` addresses, each for `ttl` seconds.
fn response(host: &str, answers: u8, ttl: u32, edns: bool) -> Vec<u8> {
    let mut message = Message::from_vec(&query(host, edns.then_some(1232))).unwrap().into_response();
    for last in 0..answers {
        message.add_answer(Record::from_rdata(name(host), ttl, RData::A(A::new(10, 0, 0, last))));
    }
    if answers == 0 {
        let soa = SOA::new(name("ns.example."), name("root.example."), 1, 2, 3, 4, 30);
        message.add_authority(Record::from_rdata(name("example."), 60, RData::SOA(soa)));
    }
    message.to_vec().unwrap()
}

fn body(bytes: Vec<u8>) -> Body {
    let message = parse(&bytes).unwrap();
    Body::new(bytes, message).unwrap()
}

#[test]
fn a_question_is_read_as_it_is_spelled_and_compared_without_case() {
    let bytes = query("CaRt.Shop.example.", Some(4096));
    let message = parse(&bytes).unwrap();
    assert_eq!((message.id, message.kind, message.class), (7, 1, 1));
    assert_eq!(message.name.as_deref(), Some("cart.shop.example"));
    assert_eq!(message.edns.as_ref().unwrap().payload, 4096);
    assert!(message.flags.recursion_desired() && !message.rigid);
    let other = query("cart.shop.example.", None);
    assert!(message.same_question(&bytes, &parse(&other).unwrap(), &other));
    let another = query("cart.shop.exampla.", None);
    assert!(!message.same_question(&bytes, &parse(&another).unwrap(), &another));
    for (payload, limit) in [(None, 512), (Some(100), 512), (Some(1232), 1232), (Some(65535), 65535)] {
        assert_eq!(parse(&query("a.", payload)).unwrap().datagram_limit(), limit, "{payload:?}");
    }
}

#[test]
fn an_answer_gets_the_clients_id_spelling_and_edns_and_grows_older() {
    let asked = query("CART.shop.example.", Some(1232));
    let request = parse(&asked).unwrap();
    let mut edns = OwnEdns { dnssec: true, ..OwnEdns::default() };
    edns.explain(3, "old");
    let bytes = body(response("cart.shop.example.", 2, 60, true)).respond(&request, &asked, 45, &edns, 1232);
    let decoded = Message::from_vec(&bytes).unwrap();
    assert_eq!(decoded.metadata.id, 7);
    assert_eq!(decoded.queries[0].name().to_string(), "CART.shop.example.");
    assert_eq!(decoded.answers.iter().map(|record| record.ttl).collect::<Vec<_>>(), [15, 15]);
    let theirs = decoded.edns.unwrap();
    assert!(theirs.flags().dnssec_ok);
    assert_eq!(parse(&bytes).unwrap().edns.unwrap().options.len(), 1);
    let plain = query("cart.shop.example.", None);
    let bytes =
        body(response("cart.shop.example.", 2, 60, true)).respond(&parse(&plain).unwrap(), &plain, 0, &edns, 512);
    assert!(Message::from_vec(&bytes).unwrap().edns.is_none(), "a client without EDNS gets none");
}

#[test]
fn what_does_not_fit_is_cut_at_a_record_and_marked() {
    let asked = query("cart.shop.example.", None);
    let request = parse(&asked).unwrap();
    let large = body(response("cart.shop.example.", 100, 60, false));
    let bytes = large.respond(&request, &asked, 0, &OwnEdns::default(), 512);
    assert!(bytes.len() <= 512);
    let decoded = Message::from_vec(&bytes).unwrap();
    assert!(decoded.metadata.truncation);
    assert_eq!(decoded.answers.len(), (512 - request.question.end) / 16);
    let whole = large.respond(&request, &asked, 0, &OwnEdns::default(), 65535);
    let decoded = Message::from_vec(&whole).unwrap();
    assert!(!decoded.metadata.truncation);
    assert_eq!(decoded.answers.len(), 100);
}

#[test]
fn an_answer_lives_as_long_as_its_shortest_record_and_absence_as_its_soa_says() {
    for (answers, ttl, lifetime) in [(3, 45, Some(45)), (1, 0, Some(0)), (0, 0, Some(30))] {
        let bytes = response("a.example.", answers, ttl, true);
        assert_eq!(parse(&bytes).unwrap().lifetime(&bytes), lifetime, "{answers} answers of {ttl} s");
    }
    let mut bare = query("a.example.", None);
    bare[2] |= 0x80;
    assert_eq!(parse(&bare).unwrap().lifetime(&bare), None, "without SOA nobody says how long");
}

#[test]
fn what_goes_upstream_has_the_clients_flags_and_no_options() {
    let mut message = Message::from_vec(&query("Cart.example.", Some(1400))).unwrap();
    let mut edns = Edns::new();
    edns.set_max_payload(1400).set_dnssec_ok(true);
    edns.options_mut().insert(hickory_proto::rr::rdata::opt::EdnsOption::Unknown(10, vec![1; 8]));
    message.set_edns(edns);
    message.metadata.checking_disabled = true;
    let asked = message.to_vec().unwrap();
    let request = parse(&asked).unwrap();
    assert_eq!(request.edns.as_ref().unwrap().options[0].0, 10);
    let sent = Message::from_vec(&normalised(&request, &asked)).unwrap();
    assert!(sent.metadata.recursion_desired && sent.metadata.checking_disabled);
    assert_eq!(sent.queries[0].name().to_string(), "Cart.example.");
    let edns = sent.edns.unwrap();
    assert_eq!((edns.max_payload(), edns.flags().dnssec_ok, edns.options().options.len()), (1400, true, 0));
    let other = renamed(&request, &asked, name("db.elsewhere.").iter());
    let sent = Message::from_vec(&other).unwrap();
    assert_eq!(
        (sent.queries[0].name().to_string(), sent.queries[0].query_type()),
        ("db.elsewhere.".into(), RecordType::A)
    );
}

#[test]
fn refusals_are_responses_that_say_why() {
    let asked = query("cart.example.", Some(1232));
    let request = parse(&asked).unwrap();
    let mut edns = OwnEdns::default();
    edns.explain(22, "nobody answers");
    let refused = refusal(&request, &asked, 2, &edns);
    let decoded = Message::from_vec(&refused).unwrap();
    assert_eq!(u16::from(decoded.metadata.response_code), 2);
    assert!(refused.ends_with(b"nobody answers"));
    assert!(parse(&refused).unwrap().flags.is_response());
    assert_eq!(Message::from_vec(&without_question(9, request.flags, 1)).unwrap().metadata.id, 9);
}

#[test]
fn what_is_signed_or_strange_is_left_alone() {
    let with_tail = [query("a.example.", None), vec![0]].concat();
    assert!(parse(&with_tail).unwrap().rigid);
    let mut signed = query("a.example.", None);
    signed[11] = 1;
    signed.extend([0, 0, 250, 0, 255, 0, 0, 0, 0, 0, 0]);
    assert!(parse(&signed).unwrap().rigid);
    for (bytes, why) in [
        (vec![0; 11], "ends in the middle"),
        (vec![0; 12], "one question"),
        ([&query("a.", None)[..12], &[0xc0, 12, 0, 1, 0, 1]].concat(), "compressed"),
    ] {
        assert!(parse(&bytes).unwrap_err().to_string().contains(why), "{why}");
    }
}

proptest! {
    #[test]
    fn bytes_never_panic_and_what_is_cut_is_still_a_message(bytes in prop::collection::vec(any::<u8>(), 0..300), limit in 0usize..400) {
        if let Ok(message) = parse(&bytes) {
            let _ = message.lifetime(&bytes);
            if let Some(body) = Body::new(bytes.clone(), message.clone()) {
                let answer = body.respond(&message, &bytes, 1, &OwnEdns::default(), limit);
                prop_assert!(parse(&answer).is_ok());
            }
        }
    }

    #[test]
    fn damaged_answers_never_panic(at in 0usize..200, value in any::<u8>(), limit in 12usize..600) {
        let mut bytes = response("cart.shop.example.", 8, 60, true);
        let at = at % bytes.len();
        bytes[at] = value;
        let asked = query("cart.shop.example.", Some(512));
        let request = parse(&asked).unwrap();
        if let Ok(message) = parse(&bytes)
            && let Some(body) = Body::new(bytes, message)
        {
            let answer = body.respond(&request, &asked, 1, &OwnEdns::default(), limit);
            prop_assert!(answer.len() <= limit.max(12 + 255 + 4 + 11));
        }
    }
}
