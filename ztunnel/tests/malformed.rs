//! What a node must refuse, as tables: CONNECT requests, trace contexts, pod lists, settings, identities, certificates.
//! Each case names a part of the reason, because a refusal that does not say why is half a refusal. Resources from
//! control have their own table beside their decoder, manifests and tokens theirs in `control`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use http::{Method, Request, Uri};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
    date_time_ymd,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tulle_certs::{Crls, Roots, SpiffeId, Usage, VerifyError, verify_chain};
use ztunnel::capture::pods;
use ztunnel::config::duration;
use ztunnel::hbone::headers::{Authority, TraceId, destination};
use ztunnel::outcome::Code;

#[test]
fn malformed_authorities_are_refused_with_the_reason() {
    let long_host = format!("{}:80", "a".repeat(254));
    let very_long = format!("{}:80", "a".repeat(5000));
    let cases = [
        ("", "no port"),
        (":", "port that is not"),
        (":80", "no valid host"),
        ("10.0.0.1", "no port"),
        ("10.0.0.1:", "port that is not"),
        ("10.0.0.1:0", "port 0"),
        ("10.0.0.1:65536", "port that is not"),
        ("10.0.0.1:-1", "port that is not"),
        ("10.0.0.1:+80", "no valid host name or address|port that is not"),
        ("10.0.0.1:80 ", "port that is not"),
        (" 10.0.0.1:80", "no valid host"),
        ("10.0.0.1:8o", "port that is not"),
        ("10.0.0.1:99999999999999999999", "port that is not"),
        ("[fd00::1]", "no valid host|port that is not"),
        ("[fd00::1]:0", "port 0"),
        ("[fd00::1:80", "no valid host"),
        ("fd00::1]:80", "no valid host"),
        ("[fd00::zz]:80", "no valid host"),
        ("[]:80", "no valid host"),
        ("user@10.0.0.1:80", "no valid host"),
        ("user:word@host:80", "no valid host"),
        ("host/path:80", "no valid host"),
        ("http://host:80", "no valid host"),
        ("host name:80", "no valid host"),
        ("host\0:80", "no valid host"),
        ("höst:80", "no valid host"),
        ("host%20:80", "no valid host"),
        ("*.shop:80", "no valid host"),
        (&long_host, "no valid host"),
        (&very_long, "at most 4096"),
    ];
    for (text, reasons) in cases {
        let reason = text.parse::<Authority>().expect_err(text);
        assert!(reasons.split('|').any(|part| reason.contains(part)), "{text:?}: {reason}");
    }
}

#[test]
fn requests_that_are_no_connect_are_refused() {
    for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "BREW"] {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let request = Request::builder().method(method.clone()).uri("http://10.0.0.1:80/").body(()).unwrap();
        let outcome = destination(&request).expect_err("only CONNECT is taken");
        assert_eq!(outcome.code, Code::BadRequest);
        assert!(outcome.detail.contains(method.as_str()), "{}", outcome.detail);
    }
    let request = Request::builder().method(Method::CONNECT).uri(Uri::from_static("/path")).body(()).unwrap();
    assert!(destination(&request).expect_err("no authority").detail.contains("no port"));
}

#[test]
fn malformed_trace_contexts_are_refused_with_the_reason() {
    let two_segments_of_55 = format!("00-{}1", "0".repeat(51));
    let multi_byte = format!("00-{}-00f067aa0ba902b7-01", "ö".repeat(16));
    let cases = [
        ("", "not version-trace-span-flags"),
        ("-", "not version-trace-span-flags"),
        ("---", "not version-trace-span-flags"),
        ("00", "not version-trace-span-flags"),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736", "not version-trace-span-flags"),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7", "not version-trace-span-flags"),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-", "not version-trace-span-flags"),
        ("0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "not version-trace-span-flags"),
        ("000-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "not version-trace-span-flags"),
        ("00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01", "not version-trace-span-flags"),
        ("00-4bf92f3577b34da6a3ce929d0e0e47366-00f067aa0ba902b7-01", "not version-trace-span-flags"),
        ("00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01", "not version-trace-span-flags"),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b-01", "not version-trace-span-flags"),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1", "not version-trace-span-flags"),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x", "not version-trace-span-flags"),
        ("00 4bf92f3577b34da6a3ce929d0e0e4736 00f067aa0ba902b7 01", "not version-trace-span-flags"),
        ("00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "not version-trace-span-flags"),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", "trace id zero"),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "invalid version"),
        ("FF-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "invalid version"),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more", "invalid version"),
        (&two_segments_of_55, "not version-trace-span-flags"),
        (&multi_byte, "not version-trace-span-flags"),
    ];
    for (text, expected) in cases {
        let reason = TraceId::parse(text).expect_err(text);
        assert!(reason.contains(expected), "{text:?}: {reason}");
    }
    assert_eq!(two_segments_of_55.len(), 55, "the length of a good one, with fewer parts");
}

#[test]
fn lists_of_pods_that_are_none_are_refused_whole() {
    for text in
        ["5", "true", "pods", "{}", "{uid: a}", "[", "[}", "[{uid: a]", "\t- a", "- a: [", "&a [*a, *b]", "!!binary x"]
    {
        let result = pods::parse(text);
        let refused = result.as_ref().map_or(true, |pods| pods.pods.is_empty() && !pods.errors.is_empty());
        assert!(refused, "{text:?}: {result:?}");
    }
}

#[test]
fn a_bad_pod_rejects_itself_only_with_the_reason() {
    let good = r#"{uid: good, name: g, namespace: shop, netns: /run/netns/g, ips: ["10.0.0.9"]}"#;
    let cases = [
        ("5", "map|object|struct|invalid type"),
        ("[]", "map|object|struct|invalid"),
        ("{}", "missing field"),
        ("{name: a, namespace: shop, netns: /n}", "uid"),
        ("{uid: a, namespace: shop, netns: /n}", "name"),
        ("{uid: a, name: a, netns: /n}", "namespace"),
        ("{uid: a, name: a, namespace: shop}", "netns"),
        ("{uid: a, name: a, namespace: shop, netns: /n, more: 1}", "more"),
        ("{uid: 5, name: a, namespace: shop, netns: /n}", "string"),
        ("{uid: a, name: a, namespace: shop, netns: /n, ips: 10.0.0.1}", "sequence|array|invalid type"),
        ("{uid: a, name: a, namespace: shop, netns: /n, ips: [10.0.0]}", "IP address"),
        ("{uid: a, name: a, namespace: shop, netns: /n, ips: [10.0.0.1/32]}", "IP address"),
        ("{uid: a, name: a, namespace: shop, netns: /n, enrolled: maybe}", "boolean"),
        ("{uid: a, name: a, namespace: shop, netns: /n, probePorts: [70000]}", "u16"),
        ("{uid: a, name: a, namespace: shop, netns: /n, probePorts: [-1]}", "u16|invalid"),
        (r#"{uid: good, name: b, namespace: shop, netns: /n, ips: ["10.0.0.8"]}"#, "listed twice"),
    ];
    for (entry, reasons) in cases {
        let list = pods::parse(&format!("- {good}\n- {entry}\n")).expect(entry);
        assert_eq!(list.pods.len(), 1, "{entry}: {list:?}");
        assert_eq!(list.errors.len(), 1, "{entry}: {list:?}");
        let reason = &list.errors[0];
        assert!(reason.starts_with("entry 1: "), "{entry}: {reason}");
        assert!(reasons.split('|').any(|part| reason.contains(part)), "{entry}: {reason}");
    }
}

#[test]
fn malformed_durations_are_refused_with_an_example() {
    let cases = [
        "",
        " ",
        "s",
        "ms",
        "1x",
        "x1",
        "-1s",
        "+1s",
        "1.5s",
        "1 s",
        "1h-2m",
        "0x10s",
        "1sms",
        "٣s",
        "∞",
        "99999999999999999999s",
    ];
    for text in cases {
        let reason = duration(text).expect_err(text);
        assert!(reason.contains("is not a duration such as"), "{text:?}: {reason}");
    }
}

#[test]
fn malformed_identities_are_refused() {
    let long = format!("spiffe://cluster.local/ns/{}/sa/cart", "a".repeat(300));
    let cases = [
        "",
        "spiffe://",
        "spiffe:///ns/shop/sa/cart",
        "spiffe://cluster.local",
        "spiffe://cluster.local/",
        "spiffe://cluster.local/ns/shop",
        "spiffe://cluster.local/ns/shop/sa",
        "spiffe://cluster.local/ns/shop/sa/",
        "spiffe://cluster.local/ns//sa/cart",
        "spiffe://cluster.local/ns/shop/sa/cart/",
        "spiffe://cluster.local/ns/shop/sa/cart/more",
        "spiffe://cluster.local/sa/cart/ns/shop",
        "spiffe://cluster.local/namespace/shop/sa/cart",
        "spiffe://cluster.local/ns/shop/sa/cart?x=1",
        "spiffe://cluster.local/ns/shop/sa/cart#x",
        "spiffe://cluster.local:443/ns/shop/sa/cart",
        "spiffe://user@cluster.local/ns/shop/sa/cart",
        "spiffe://cluster.local/ns/shop/../sa/cart",
        "spiffe://cluster.local/ns/sh%6Fp/sa/cart",
        "spiffe://cluster.local/ns/shop /sa/cart",
        "SPIFFE://cluster.local/ns/shop/sa/cart",
        "https://cluster.local/ns/shop/sa/cart",
        "cluster.local/ns/shop/sa/cart",
        "spiffe://cluster.local/ns/shop/sa/cart\n",
        "spiffe://cluster.local/ns/shop/sa/cärt",
        &long,
    ];
    for text in cases {
        let reason = text.parse::<SpiffeId>().expect_err(text).to_string();
        assert!(!reason.is_empty(), "{text:?}");
    }
}

/// An authority of the test's own, because the real one refuses to sign what these cases need.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn roots(&self) -> Roots {
        Roots::from_der(vec![self.0.der().clone()]).unwrap()
    }

    /// A leaf that is good but for what `change` does to it.
    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.not_before = date_time_ymd(2026, 1, 1);
        params.not_after = date_time_ymd(2028, 1, 1);
        params.subject_alt_names = vec![uri("spiffe://cluster.local/ns/shop/sa/cart")];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        params.signed_by(&KeyPair::generate().unwrap(), &self.0).unwrap().der().clone()
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// In 2027.
const NOW: Duration = Duration::from_secs(1_800_000_000);

fn verify(chain: &[CertificateDer<'_>], roots: &Roots) -> Result<SpiffeId, VerifyError> {
    verify_chain(chain, roots, &Crls::default(), Usage::Client, UnixTime::since_unix_epoch(NOW))
}

#[test]
fn certificates_with_wrong_names_usages_times_or_signers_are_refused() {
    let (ca, other) = (Ca::new(), Ca::new());
    assert!(verify(&[ca.leaf(|_| {})], &ca.roots()).is_ok(), "the case that the others differ from");
    let names = |names: Vec<SanType>| ca.leaf(|params| params.subject_alt_names = names);
    let dns = || SanType::DnsName("cart.shop".try_into().unwrap());
    let usages = |usages: Vec<ExtendedKeyUsagePurpose>| ca.leaf(|params| params.extended_key_usages = usages);
    let good = ca.leaf(|_| {});
    let cut = CertificateDer::from(good[..good.len() - 10].to_vec());
    let mut longer = good.to_vec();
    longer.push(0);
    let mut changed = good.to_vec();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    let cases = [
        ("no name", vec![names(vec![])], "no identity|names no|no URI"),
        ("a DNS name only", vec![names(vec![dns()])], "no identity|names no|no URI"),
        (
            "two identities",
            vec![names(vec![
                uri("spiffe://cluster.local/ns/shop/sa/cart"),
                uri("spiffe://cluster.local/ns/shop/sa/web"),
            ])],
            "2 URIs",
        ),
        (
            "an identity and a web address",
            vec![names(vec![uri("spiffe://cluster.local/ns/shop/sa/cart"), uri("https://a")])],
            "2 URIs",
        ),
        ("a web address", vec![names(vec![uri("https://cart.shop/")])], "no usable identity"),
        ("another shape", vec![names(vec![uri("spiffe://cluster.local/workload/cart")])], "no usable identity"),
        ("no account", vec![names(vec![uri("spiffe://cluster.local/ns/shop/sa/")])], "no usable identity"),
        ("a query", vec![names(vec![uri("spiffe://cluster.local/ns/shop/sa/cart?a=b")])], "no usable identity"),
        ("for servers only", vec![usages(vec![ExtendedKeyUsagePurpose::ServerAuth])], ""),
        ("for signing code", vec![usages(vec![ExtendedKeyUsagePurpose::CodeSigning])], ""),
        ("expired", vec![ca.leaf(|params| params.not_after = date_time_ymd(2026, 6, 1))], ""),
        ("not yet valid", vec![ca.leaf(|params| params.not_before = date_time_ymd(2027, 12, 1))], ""),
        ("of another authority", vec![other.leaf(|_| {})], ""),
        ("an authority itself", vec![ca.leaf(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))], ""),
        ("cut short", vec![cut], ""),
        ("with a byte more", vec![CertificateDer::from(longer)], ""),
        ("with a bit changed", vec![CertificateDer::from(changed)], ""),
        ("no bytes", vec![CertificateDer::from(vec![])], ""),
        ("noise", vec![CertificateDer::from(vec![0x30; 300])], ""),
        ("no certificate at all", vec![], "no certificate"),
        ("a long chain", std::iter::repeat_n(good, 40).collect(), "40"),
    ];
    for (name, chain, reasons) in cases {
        let reason = verify(&chain, &ca.roots()).expect_err(name).to_string();
        assert!(reasons.split('|').any(|part| reason.contains(part)) && reason.len() > 10, "{name}: {reason}");
    }
}
