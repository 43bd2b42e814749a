//! Promise: in an enrolled pod names are answered as without the mesh: the mesh's own at once, all else by the name server
//! that the pod asked, by datagram and stream, IPv4 and IPv6; and an old answer serves while that one is dead.

use std::collections::BTreeMap;
use std::io::Write;

use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::lab::Running;
use e2e::scenario;

/// Clients on node 1, two pods behind a headless and a usual Service on node 2, aliases, and a host outside.
fn world() -> String {
    let mut text = scenario::namespace("shop", true);
    let named =
        scenario::server("shop", "db-0", "db", 2).replace("spec:\n", "spec:\n  hostname: db-0\n  subdomain: db\n");
    for part in [
        scenario::client("shop", "web", 1),
        scenario::client("shop", "other", 1),
        named,
        scenario::server("shop", "db-1", "db", 2),
        scenario::namespace("plain", false),
        scenario::client("plain", "guest", 1),
    ] {
        text.push_str(&part);
    }
    text.push_str(
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: shop}\n\
         spec: {clusterIP: None, selector: {app: db}, ports: [{name: http, port: 80, targetPort: 8080}]}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\n\
         spec:\n  selector: {app: db}\n  ports: [{name: http, port: 80, targetPort: 8080}, {name: raw, port: 9000}]\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {name: nobody, namespace: shop}\n\
         spec: {clusterIP: None, selector: {app: nobody}, ports: [{name: http, port: 80}]}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {name: alias, namespace: shop}\n\
         spec: {type: ExternalName, externalName: cart.shop.svc.cluster.local}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {name: away, namespace: shop}\n\
         spec: {type: ExternalName, externalName: www.nowhere.test}\n\
         ---\napiVersion: v1\nkind: Namespace\nmetadata: {name: out, annotations: {lab.tulle.dev/outside: 'true'}}\n\
         ---\napiVersion: v1\nkind: Pod\nmetadata: {name: resolver, namespace: out}\n\
         spec: {containers: [{name: main, image: none}]}\n",
    );
    text
}

/// The lab, unless a tool is missing: a failure where `CI` is set, a loud skip elsewhere.
fn lab(tools: &[&str]) -> Option<Lab> {
    if !scenario::has_tools(tools) {
        return None;
    }
    scenario::lab(LabConfig::of(&world()).env("ztunnel", "RUST_LOG", "info,dns=debug"))
}

/// One answer as dig shows it: outcome, flags, records without their times to live, explanation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Answer {
    status: String,
    truncated: bool,
    records: Vec<String>,
    explained: String,
}

/// Runs dig in a pod; one answer for each of `questions`, in their order.
fn dig(lab: &Lab, place: &str, options: &[&str], questions: &[&str]) -> anyhow::Result<Vec<Answer>> {
    let mut argv = vec!["dig", "+noall", "+comments", "+answer", "+nocookie", "+tries=1", "+time=6"];
    argv.extend(options);
    argv.extend(questions.iter().flat_map(|question| question.split(' ')));
    let output = lab.exec(place, &argv)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut answers: Vec<Answer> = Vec::new();
    for line in text.lines() {
        if let Some((_, rest)) = line.split_once("status: ") {
            let status = rest.split(',').next().unwrap_or_default().to_owned();
            answers.push(Answer { status, ..Answer::default() });
        }
        let Some(last) = answers.last_mut() else { continue };
        if let Some(flags) = line.strip_prefix(";; flags: ") {
            last.truncated = flags.split(';').next().is_some_and(|flags| flags.split(' ').any(|flag| flag == "tc"));
        } else if let Some(explained) = line.strip_prefix("; EDE: ") {
            explained.clone_into(&mut last.explained);
        } else if !line.starts_with(';') && !line.is_empty() {
            let mut fields: Vec<&str> = line.split_whitespace().collect();
            if fields.len() > 4 {
                fields.remove(1);
            }
            last.records.push(fields.join(" "));
        }
    }
    answers.iter_mut().for_each(|answer| answer.records.sort());
    anyhow::ensure!(answers.len() == questions.len(), "{argv:?} in {place} said:\n{text}");
    Ok(answers)
}

const QUESTIONS: &[&str] = &[
    "cart.shop.svc.cluster.local A",
    "cart.shop.svc.cluster.local AAAA",
    "CART.Shop.svc.cluster.local A",
    "cart.shop.svc.cluster.local TXT",
    "cart.shop.svc.cluster.local SRV",
    "_http._tcp.cart.shop.svc.cluster.local SRV",
    "_raw._tcp.cart.shop.svc.cluster.local SRV",
    "_none._tcp.cart.shop.svc.cluster.local SRV",
    "db.shop.svc.cluster.local A",
    "db.shop.svc.cluster.local AAAA",
    "_http._tcp.db.shop.svc.cluster.local SRV",
    "db-0.db.shop.svc.cluster.local A",
    "db-0.db.shop.svc.cluster.local AAAA",
    "nobody.shop.svc.cluster.local A",
    "alias.shop.svc.cluster.local A",
    "alias.shop.svc.cluster.local AAAA",
    "alias.shop.svc.cluster.local CNAME",
    "away.shop.svc.cluster.local A",
    "cart.shop.svc.cluster.local.shop.svc.cluster.local A",
    "nosuch.shop.svc.cluster.local A",
    "cart.shop A",
    "cart A",
    "www.example.test MX",
];

#[test]
fn captured_pods_hear_what_others_hear() -> anyhow::Result<()> {
    let Some(lab) = lab(&["dig"]) else { return Ok(()) };
    let mut questions: Vec<String> = QUESTIONS.iter().map(|&question| question.to_owned()).collect();
    for pod in ["db-0", "db-1"] {
        let view = lab.view()?;
        let addresses = view.pod("shop", pod).map(|pod| pod.addresses.clone()).unwrap_or_default();
        for address in addresses {
            let (label, kind) = (address.replace(['.', ':'], "-"), if address.contains(':') { "AAAA" } else { "A" });
            questions.push(format!("{label}.shop.pod.cluster.local {kind}"));
            // One that has a name of its own has none by its address.
            questions.push(format!("{label}.db.shop.svc.cluster.local {kind}"));
            questions.push(format!("{} PTR", reverse(&address)));
        }
    }
    let service =
        dig(&lab, "plain/guest", &[], &["cart.shop.svc.cluster.local A", "cart.shop.svc.cluster.local AAAA"])?;
    for record in service.iter().flat_map(|answer| &answer.records) {
        questions.push(format!("{} PTR", reverse(record.split(' ').next_back().unwrap_or_default())));
    }
    let questions: Vec<&str> = questions.iter().map(String::as_str).collect();
    let mut wrong = Vec::new();
    for server in ["@10.20.1.1", "@fd00:10:20:1::1"] {
        for options in [&["+notcp"][..], &["+tcp"], &["+notcp", "+noedns"], &["+tcp", "+noedns"]] {
            let options: Vec<&str> = [server].iter().chain(options).copied().collect();
            let (plain, captured) =
                (dig(&lab, "plain/guest", &options, &questions)?, dig(&lab, "shop/web", &options, &questions)?);
            for ((question, plain), captured) in questions.iter().zip(&plain).zip(&captured) {
                if plain != captured {
                    wrong.push(format!("{options:?} {question}: {plain:?} without the mesh, {captured:?} with it"));
                }
            }
        }
    }
    anyhow::ensure!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    for (name, source) in [
        ("cart.shop.svc.cluster.local", "mesh"),
        ("_http._tcp.db.shop.svc.cluster.local", "mesh"),
        ("alias.shop.svc.cluster.local", "mesh"),
        ("nosuch.shop.svc.cluster.local", "upstream"),
    ] {
        let (name_word, source_word) = (format!("name=\"{name}\""), format!("source=\"{source}\""));
        let words = [name_word.as_str(), source_word.as_str(), "pod=shop/web"];
        scenario::await_log(&lab, "node-1", &words)?;
    }
    let (_, metrics) = lab.get("node-1", 15020, "/metrics")?;
    assert!(
        metrics.contains("istio_dns_requests_total{request_query_type=\"SRV\",request_protocol=\"tcp\""),
        "{metrics}"
    );
    Ok(())
}

/// The name under which an address is looked up.
fn reverse(address: &str) -> String {
    match address.parse() {
        Ok(std::net::IpAddr::V4(v4)) => {
            let [a, b, c, d] = v4.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        Ok(std::net::IpAddr::V6(v6)) => {
            let nibbles = v6.octets().into_iter().rev().flat_map(|byte| [byte & 15, byte >> 4]);
            nibbles.map(|nibble| format!("{nibble:x}.")).collect::<String>() + "ip6.arpa"
        }
        Err(_) => String::new(),
    }
}

/// A real server with a zone of its own, on the host outside.
fn unbound(lab: &Lab, folder: &std::path::Path) -> anyhow::Result<Running> {
    let mut text = String::from(
        "server:\n  interface: 0.0.0.0\n  interface: ::0\n  access-control: 0.0.0.0/0 allow\n  access-control: ::/0 allow\n\
         \x20 chroot: \"\"\n  username: \"\"\n  pidfile: \"\"\n  use-syslog: no\n  do-daemonize: no\n  num-threads: 1\n\
         \x20 module-config: \"iterator\"\n  local-zone: \"corp.test.\" static\n\
         \x20 local-data: \"corp.test. 3 IN SOA ns.corp.test. root.corp.test. 1 2 3 4 2\"\n\
         \x20 local-data: \"www.corp.test. 2 IN A 192.0.2.1\"\n  local-data: \"www.corp.test. 2 IN AAAA 2001:db8::1\"\n\
         \x20 local-data: \"www.corp.test. 60 IN MX 10 mail.corp.test.\"\n\
         \x20 local-data: \"kept.corp.test. 300 IN A 192.0.2.3\"\n  local-data: 'text.corp.test. 60 IN TXT \"some words\"'\n",
    );
    for last in 1..=150 {
        text.push_str(&format!("  local-data: \"big.corp.test. 60 IN A 198.51.100.{last}\"\n"));
    }
    let path = folder.join("unbound.conf");
    std::fs::File::create(&path)?.write_all(text.as_bytes())?;
    lab.spawn("out/resolver", &["unbound", "-d", "-c", &path.display().to_string()])
}

#[test]
fn the_pods_own_name_server_is_asked_and_its_answer_stands() -> anyhow::Result<()> {
    let Some(lab) = lab(&["dig", "unbound"]) else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let mut server = unbound(&lab, folder.path())?;
    let view = lab.view()?;
    let addresses = view.pod("out", "resolver").map(|pod| pod.addresses.clone()).unwrap_or_default();
    let at: Vec<String> = addresses.iter().map(|address| format!("@{address}")).collect();
    eventually("unbound answers", scenario::PATIENCE, || {
        let answers = dig(&lab, "plain/guest", &[&at[0]], &["www.corp.test A"]).map_err(|error| error.to_string())?;
        if answers[0].records.is_empty() { Err(format!("{answers:?}")) } else { Ok(()) }
    })?;
    let questions = [
        "www.corp.test A",
        "www.corp.test AAAA",
        "www.corp.test MX",
        "www.corp.test NAPTR",
        "text.corp.test TXT",
        "no.corp.test A",
        "kept.corp.test A",
    ];
    for server in &at {
        for options in [&["+notcp"][..], &["+tcp"], &["+notcp", "+noedns"], &["+dnssec"], &["+cdflag", "+adflag"]] {
            let options: Vec<&str> = [&**server].iter().chain(options).copied().collect();
            let plain = dig(&lab, "plain/guest", &options, &questions)?;
            assert_eq!(dig(&lab, "shop/web", &options, &questions)?, plain, "{options:?}");
            assert_eq!(dig(&lab, "shop/web", &options, &questions)?, plain, "{options:?} again, from the cache");
        }
    }
    scenario::await_log(&lab, "node-1", &["name=\"kept.corp.test\"", "source=\"cache\""])?;
    let elsewhere = dig(&lab, "shop/web", &["@10.20.1.1"], &["www.corp.test A", "kept.corp.test A"])?;
    assert!(
        elsewhere.iter().all(|answer| answer.status == "NXDOMAIN"),
        "another server, another answer: {elsewhere:?}"
    );
    large_answers(&lab, &at[0])?;
    // Dead: what was known serves, what was not fails and says why.
    dig(&lab, "shop/web", &[&at[0]], &["www.corp.test A"])?;
    let child = server.child().map(|child| child.id()).unwrap_or_default();
    drop(server);
    eventually("unbound is gone", scenario::PATIENCE, || {
        let answers = dig(&lab, "shop/web", &[&at[0]], &[&format!("gone{}.corp.test A", rand::random::<u32>())])
            .map_err(|error| error.to_string())?;
        let failed = answers[0].status == "SERVFAIL" && answers[0].explained.starts_with("22");
        if failed { Ok(()) } else { Err(format!("{answers:?} (process {child})")) }
    })?;
    eventually("the old answer serves after its time", scenario::PATIENCE, || {
        let answers = dig(&lab, "shop/web", &[&at[0]], &["www.corp.test A"]).map_err(|error| error.to_string())?;
        let good = answers[0].records == ["www.corp.test. IN A 192.0.2.1"] && answers[0].explained.starts_with('3');
        if good { Ok(()) } else { Err(format!("{answers:?}")) }
    })?;
    let alive = dig(&lab, "shop/web", &[&at[0]], &["cart.shop.svc.cluster.local A"])?;
    assert_eq!(alive[0].status, "NOERROR", "the mesh's own names need no name server");
    Ok(())
}

/// An answer of 150 addresses: marked and cut by datagram, whole by stream and for clients that take it.
fn large_answers(lab: &Lab, server: &str) -> anyhow::Result<()> {
    let expected: BTreeMap<&[&str], (bool, bool)> = BTreeMap::from([
        (&["+notcp", "+noedns", "+ignore"][..], (true, false)),
        (&["+notcp", "+noedns"][..], (false, true)),
        (&["+notcp", "+bufsize=4096"][..], (false, true)),
        (&["+notcp", "+bufsize=1232", "+ignore"][..], (true, false)),
        (&["+tcp"][..], (false, true)),
    ]);
    for (options, (truncated, whole)) in expected {
        for _ in 0..2 {
            let options: Vec<&str> = [server].iter().chain(options).copied().collect();
            let answers = dig(lab, "shop/web", &options, &["big.corp.test A"])?;
            let count = answers[0].records.len();
            assert_eq!((answers[0].truncated, count == 150), (truncated, whole), "{options:?}: {count} records");
        }
    }
    Ok(())
}

#[test]
fn names_are_looked_up_where_nothing_else_may_leave() -> anyhow::Result<()> {
    let Some(lab) = lab(&["dig"]) else { return Ok(()) };
    lab.apply_yaml(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/mesh: enabled, tulle.dev/egress: deny}}\n",
    )?;
    for options in [&["+notcp"][..], &["+tcp"]] {
        let answers = dig(&lab, "shop/web", options, &["cart.shop.svc.cluster.local A", "www.example.test A"])?;
        let outcomes: Vec<&str> = answers.iter().map(|answer| answer.status.as_str()).collect();
        assert_eq!(outcomes, ["NOERROR", "NXDOMAIN"], "{options:?}");
    }
    Ok(())
}

#[test]
fn who_answers_is_in_the_status_and_can_be_turned_off_for_a_node() -> anyhow::Result<()> {
    let config = LabConfig::of(&scenario::world(true)).env("node-2", "ISTIO_META_DNS_CAPTURE", "false");
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    for (node, pod, expected) in [("node-1", "web", "on"), ("node-2", "cart", "off"), ("node-1", "guest", "")] {
        let status = scenario::pod_status(&lab, node, pod)?;
        anyhow::ensure!(status["dns"].as_str().unwrap_or_default() == expected, "{pod}: {status}");
    }
    let table = lab.exec_ok("control", &["tulle", "status"])?;
    let of = |pod: &str| table.lines().find(|line| line.starts_with(pod)).map(|line| line.split_whitespace().nth(3));
    anyhow::ensure!(of("shop/web") == Some(Some("on")) && of("shop/cart") == Some(Some("off")), "{table}");
    // Either way names are found.
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")
}
