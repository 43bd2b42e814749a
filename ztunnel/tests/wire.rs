//! Promise: what this proxy says to others is, byte for byte, what Istio's ztunnel says: its node, its CONNECT requests,
//! its words to a CNI agent, the names of its metrics and of its log's fields.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use http::HeaderMap;
use prometheus_client::registry::Registry;
use prost_types::value::Kind;
use serde_json::json;
use ztunnel::hbone::headers::{self, Authority, Baggage, Forwarded, TraceId};
use ztunnel::identity::{Control, Link, RootCa, TokenSource};
use ztunnel::outcome::{Code, Outcome};
use ztunnel::telemetry::metrics::Metrics;
use ztunnel::telemetry::{ConnRecord, Direction};
use ztunnel::xds::Config;

#[test]
fn the_node_is_told_as_istiod_parses_it() {
    let control = Control {
        address: "https://istiod.istio-system.svc:15012".into(),
        root_ca: RootCa::System,
        alt_hostname: None,
        token: TokenSource::None,
        headers: vec![("clusterid".into(), "c1".into())],
        link: Link::default(),
    };
    let config = Config {
        control,
        node_name: "node-1".into(),
        instance_ip: "10.0.0.9".into(),
        pod_name: "ztunnel-x".into(),
        pod_namespace: "istio-system".into(),
        metadata: BTreeMap::from([
            ("CLUSTER_ID".to_owned(), json!("c1")),
            ("LABELS".to_owned(), json!({"app": "ztunnel", "n": [1, true, null]})),
        ]),
        network_policy: true,
        on_demand: false,
        cluster_domain: "cluster.local".into(),
    };
    let node = config.node();
    assert_eq!(node.id, "ztunnel~10.0.0.9~ztunnel-x.istio-system~istio-system.svc.cluster.local");
    assert_eq!(node.cluster, "");
    let fields = node.metadata.unwrap().fields;
    let text = |key: &str| match fields[key].kind.clone() {
        Some(Kind::StringValue(text)) => text,
        other => panic!("{key} is {other:?}"),
    };
    for (key, value) in [
        ("NAME", "ztunnel-x"),
        ("NAMESPACE", "istio-system"),
        ("INSTANCE_IPS", "10.0.0.9"),
        ("NODE_NAME", "node-1"),
        ("CLUSTER_ID", "c1"),
    ] {
        assert_eq!(text(key), value, "{key}");
    }
    // ISTIO_METAJSON_LABELS stays what it is in JSON.
    let Some(Kind::StructValue(labels)) = fields["LABELS"].kind.clone() else { panic!("{fields:?}") };
    assert_eq!(labels.fields["app"].kind, Some(Kind::StringValue("ztunnel".into())));
    assert!(matches!(&labels.fields["n"].kind, Some(Kind::ListValue(list)) if list.values.len() == 3));
    assert_eq!(fields.len(), 6, "and nothing else: {:?}", fields.keys());
}

#[test]
fn a_connect_request_has_istio_s_headers_in_its_words() {
    let text = |text: &str| Some(text.to_owned());
    let baggage = Baggage {
        cluster: text("c1"),
        namespace: text("shop"),
        workload: text("cart"),
        service: text("cart"),
        version: text("v1"),
        region: text("r1"),
        zone: text("z1"),
    };
    let client: SocketAddr = "10.0.0.1:4000".parse().unwrap();
    let forwarded = Forwarded { client: Some(client), host: text("cart.shop.svc.cluster.local") };
    let trace = TraceId::new(0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
    let mut map = HeaderMap::new();
    for (name, value) in [
        (headers::BAGGAGE, baggage.to_header("deployment")),
        (headers::FORWARDED, forwarded.to_header()),
        (headers::TRACEPARENT, trace.to_header(0x00f0_67aa_0ba9_02b7)),
    ] {
        map.insert(name, value.unwrap());
    }
    let request = headers::connect_request("[fd00::2]:8080", map).unwrap();
    assert_eq!((request.method().as_str(), request.uri().to_string().as_str()), ("CONNECT", "[fd00::2]:8080"));
    assert!(request.uri().scheme().is_none() && request.uri().path().is_empty());
    let destination = headers::destination(&request).unwrap();
    assert_eq!(destination, Authority::Address("[fd00::2]:8080".parse().unwrap()));
    for (name, expected) in [
        (
            "baggage",
            "k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart,service.version=v1,\
             cloud.region=r1,cloud.availability_zone=z1",
        ),
        ("forwarded", "for=\"10.0.0.1:4000\";host=cart.shop.svc.cluster.local"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),
    ] {
        assert_eq!(request.headers()[name], expected);
    }
    assert_eq!(request.headers().len(), 3);
    assert_eq!(Baggage::parse(request.headers()["baggage"].to_str().unwrap()), baggage, "and ours reads theirs");
}

#[test]
fn metrics_have_istio_s_names_and_labels() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let address = SocketAddr::from(([192, 0, 2, 1], 1));
    let mut record = ConnRecord::new(metrics.into(), Direction::Inbound, address, address);
    record.opened();
    record.finish(&Outcome::new(Code::ConnectFailed, ""));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for name in [
        "istio_tcp_connections_opened_total",
        "istio_tcp_connections_closed_total",
        "istio_tcp_connections_failed_total",
        "istio_tcp_received_bytes_total",
        "istio_tcp_sent_bytes_total",
    ] {
        let line = text.lines().find(|line| line.starts_with(&format!("{name}{{"))).unwrap();
        let labels: BTreeSet<&str> =
            line.split(['{', ',']).skip(1).filter_map(|part| part.split_once('=')).map(|(label, _)| label).collect();
        let expected = BTreeSet::from([
            "reporter",
            "source_workload",
            "source_canonical_service",
            "source_canonical_revision",
            "source_workload_namespace",
            "source_principal",
            "source_app",
            "source_version",
            "source_cluster",
            "destination_service",
            "destination_service_namespace",
            "destination_service_name",
            "destination_workload",
            "destination_canonical_service",
            "destination_canonical_revision",
            "destination_workload_namespace",
            "destination_principal",
            "destination_app",
            "destination_version",
            "destination_cluster",
            "request_protocol",
            "response_flags",
            "connection_security_policy",
        ]);
        assert_eq!(labels, expected, "{name}");
    }
    assert!(text.contains("istio_build{component=\"ztunnel\""), "{text}");
}
