//! EgressPolicy of tulle.dev, and ServiceEntry of networking.istio.io as the policy that it amounts to.
//!
//! Both only ever allow, so the first error of either makes it allow nothing; a ceiling that cannot be read lets nothing pass.
//! An unknown field of an EgressPolicy is an error, since it may be a restriction. Of a ServiceEntry it is told and left out, as
//! people bring theirs along. Names are checked and brought into the form in which they are compared; a name that is not ASCII
//! is an error that asks for its A-label, so that nobody has to guess which mapping applies.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tulle_certs::Roots;

use crate::base::is_dns_name;
use crate::model::{
    EgressEndpoint, EgressHttp, EgressKind, EgressPods, EgressPolicy, EgressPort, EgressProtocol, EgressRule, Meta,
    Object, Origination,
};
use crate::source::decode::network::{net, selector};
use crate::source::decode::policy::PolicyResult;
use crate::source::tree::{Cursor, FieldError, Read};

/// Most rules of an object, and most hosts, addresses or ports of a rule: ServiceEntry's own limit of hosts, for all.
const MAX_ITEMS: usize = 256;

pub(super) fn policy(at: &Cursor<'_>, meta: Meta, error: Option<FieldError>) -> PolicyResult {
    let spec = at.get("spec");
    let pods = pods(&spec.get("selector"));
    // What cannot be read may have been one.
    let ceiling = spec.map().and_then(|_| spec.get("ceiling").boolean()).map_or(true, Option::unwrap_or_default);
    let read = error.map_or_else(|| policy_spec(&spec), Err);
    let failed = read.as_ref().err().cloned().or_else(|| pods.as_ref().err().cloned());
    let (record_only, rules) = match (&failed, read) {
        (None, Ok(read)) => read,
        _ => (false, Vec::new()),
    };
    let policy = EgressPolicy {
        meta,
        kind: EgressKind::Policy,
        pods: pods.ok(),
        record_only,
        ceiling,
        own_namespace: false,
        rules,
        unreadable: failed.as_ref().map(ToString::to_string),
        ignored: Vec::new(),
    };
    Ok((Object::EgressPolicy(Arc::new(policy)), failed))
}

fn pods(at: &Cursor<'_>) -> Read<EgressPods> {
    at.only(&["matchLabels", "matchExpressions", "serviceAccounts"])?;
    let accounts = at.get("serviceAccounts");
    let names: Vec<String> = bounded(&accounts)?
        .iter()
        .map(|item| match item.required_text()? {
            name if is_dns_name(name) => Ok(name.to_owned()),
            other => Err(item.error(format!("`{other}` is no name of a service account"))),
        })
        .collect::<Read<_>>()?;
    if names.is_empty() && !accounts.is_absent() {
        return Err(accounts.error("is empty, which selects nobody; leave it out to select every account"));
    }
    Ok(EgressPods { labels: selector(at, &["serviceAccounts"])?, accounts: names })
}

fn policy_spec(spec: &Cursor<'_>) -> Read<(bool, Vec<EgressRule>)> {
    spec.only(&["selector", "action", "ceiling", "rules"])?;
    let action = spec.get("action");
    let record_only = match action.text()? {
        None | Some("Enforce") => false,
        Some("Audit") => true,
        Some(other) => return Err(action.error(format!("`{other}` is neither Enforce nor Audit"))),
    };
    let ceiling = spec.get("ceiling").boolean()? == Some(true);
    let rules = bounded(&spec.get("rules"))?.iter().map(rule).collect::<Read<Vec<_>>>()?;
    if ceiling && rules.iter().any(|rule| rule.proof.is_some()) {
        let text = "verify is for rules that allow, and a ceiling allows nothing";
        return Err(spec.get("rules").error(text));
    }
    Ok((record_only, rules))
}

fn bounded<'a>(at: &Cursor<'a>) -> Read<Vec<Cursor<'a>>> {
    let items = at.list()?;
    if items.len() > MAX_ITEMS {
        return Err(at.error(format!("has {} items; at most {MAX_ITEMS} are read", items.len())));
    }
    Ok(items)
}

fn rule(at: &Cursor<'_>) -> Read<EgressRule> {
    at.only(&["hosts", "cidrs", "ports", "http", "via", "tls", "originate", "verify"])?;
    let hosts: Vec<String> = bounded(&at.get("hosts"))?.iter().map(|item| host(item, true)).collect::<Read<_>>()?;
    let cidrs: Vec<IpNet> =
        bounded(&at.get("cidrs"))?.iter().map(|item| net(item.required_text()?, item)).collect::<Read<_>>()?;
    if hosts.is_empty() && cidrs.is_empty() {
        return Err(at.error("names neither hosts nor cidrs, and would allow nothing"));
    }
    let ports = bounded(&at.get("ports"))?.iter().map(port).collect::<Read<Vec<_>>>()?;
    let http = http(&at.get("http"))?;
    let originate = origination(at)?;
    if http.is_some() && originate.is_none() {
        let sealed = |port: &&EgressPort| matches!(port.protocol, EgressProtocol::Tls | EgressProtocol::Https);
        if ports.iter().any(|port| sealed(&port)) {
            let text =
                "cannot be seen inside TLS that passes through; set tls: originate, or a port with protocol HTTP";
            return Err(at.get("http").error(text));
        }
        if ports.iter().any(|port| port.protocol == EgressProtocol::Tcp) {
            return Err(at.get("http").error("says nothing of a port with protocol TCP"));
        }
    }
    let proof = proof(&at.get("verify"))?;
    if proof.is_some() {
        let wrong = |why: &str| Err(at.get("verify").error(why));
        if originate.is_some() {
            return wrong("is of TLS that passes through; what tls: originate speaks with is checked anyway");
        }
        if ports.iter().any(|port| matches!(port.protocol, EgressProtocol::Tcp | EgressProtocol::Http)) {
            return wrong("says nothing of a port with protocol TCP or HTTP");
        }
        if http.is_some() {
            return wrong("allows TLS only, in which http cannot be seen");
        }
    }
    let gateway = gateway(&at.get("via"))?;
    Ok(EgressRule { hosts, cidrs, ports, http, gateway, originate, proof, ..EgressRule::default() })
}

fn proof(at: &Cursor<'_>) -> Read<Option<Vec<Vec<u8>>>> {
    if at.is_absent() {
        return Ok(None);
    }
    at.only(&["caBundle"])?;
    authorities(&at.get("caBundle")).map(Some)
}

/// The certificates of a bundle; none if it is absent.
fn authorities(at: &Cursor<'_>) -> Read<Vec<Vec<u8>>> {
    let Some(pem) = at.text()? else { return Ok(Vec::new()) };
    let roots = Roots::from_pem(pem.as_bytes()).and_then(Roots::of_authorities);
    let roots = roots.map_err(|error| at.error(error.to_string()))?;
    Ok(roots.certificates().iter().map(|root| root.to_vec()).collect())
}

/// A name in the form in which names are compared.
fn host(at: &Cursor<'_>, any: bool) -> Read<String> {
    let text = at.required_text()?;
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if !name.is_ascii() {
        return Err(
            at.error(format!("`{text}` is not ASCII; write it as DNS has it, with labels that begin with xn--"))
        );
    }
    if name == "*" {
        return if any { Ok(name) } else { Err(at.error("`*` is not a host")) };
    }
    let base = name.strip_prefix("*.").unwrap_or(&name);
    // Underscores are in names that people dial, though not in names of hosts.
    if !is_dns_name(&base.replace('_', "a")) {
        return Err(
            at.error(format!("`{text}` is not a host name; it may begin with `*.` and has no port and no scheme"))
        );
    }
    if base.parse::<IpAddr>().is_ok()
        || base.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()))
    {
        return Err(at.error(format!("`{text}` is an address; put it in cidrs")));
    }
    Ok(name)
}

fn port(at: &Cursor<'_>) -> Read<EgressPort> {
    at.only(&["port", "protocol"])?;
    let number = at.get("port");
    let protocol = at.get("protocol");
    Ok(EgressPort {
        number: number.port()?.ok_or_else(|| number.error("is missing"))?,
        protocol: match protocol.text()? {
            None => EgressProtocol::Detected,
            Some("TCP") => EgressProtocol::Tcp,
            Some("TLS") => EgressProtocol::Tls,
            Some("HTTP") => EgressProtocol::Http,
            Some("HTTPS") => EgressProtocol::Https,
            Some(other) => return Err(protocol.error(format!("`{other}` is none of TCP, TLS, HTTP, HTTPS"))),
        },
        target: 0,
    })
}

fn http(at: &Cursor<'_>) -> Read<Option<EgressHttp>> {
    if at.is_absent() {
        return Ok(None);
    }
    at.only(&["methods", "paths"])?;
    let methods = bounded(&at.get("methods"))?.into_iter().map(|item| {
        let text = item.required_text()?;
        let known = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'-');
        if known { Ok(text.to_owned()) } else { Err(item.error(format!("`{text}` is no method, such as GET"))) }
    });
    let paths = bounded(&at.get("paths"))?.into_iter().map(|item| {
        let text = item.required_text()?;
        let body = text.strip_suffix("/*").unwrap_or(text);
        let good = text == "*" || (text.starts_with('/') && !body.contains(['*', '?', '#', '%', ' ']));
        if good { Ok(text.to_owned()) } else { Err(item.error(format!("`{text}` is neither `/a`, `/a/*` nor `*`"))) }
    });
    Ok(Some(EgressHttp { methods: methods.collect::<Read<_>>()?, paths: paths.collect::<Read<_>>()? }))
}

fn gateway(at: &Cursor<'_>) -> Read<Option<(String, String)>> {
    if at.is_absent() {
        return Ok(None);
    }
    if let Ok(Some(text)) = at.text() {
        return if text == "direct" {
            Ok(None)
        } else {
            Err(at.error(format!("`{text}` is neither direct nor a gateway")))
        };
    }
    at.only(&["gateway"])?;
    let gateway = at.get("gateway");
    gateway.only(&["namespace", "name"])?;
    let part = |key: &str| -> Read<String> {
        let field = gateway.get(key);
        match field.required_text()? {
            name if is_dns_name(name) => Ok(name.to_owned()),
            other => Err(field.error(format!("`{other}` is not a Kubernetes name"))),
        }
    };
    Ok(Some((part("namespace")?, part("name")?)))
}

fn origination(at: &Cursor<'_>) -> Read<Option<Origination>> {
    let (tls, more) = (at.get("tls"), at.get("originate"));
    match tls.text()? {
        None | Some("passthrough") if more.is_absent() => return Ok(None),
        None | Some("passthrough") => return Err(more.error("needs tls: originate")),
        Some("originate") => {}
        Some(other) => return Err(tls.error(format!("`{other}` is neither passthrough nor originate"))),
    }
    more.only(&["serverName", "caBundle", "clientCertificate"])?;
    let name = more.get("serverName");
    let server_name = if name.is_absent() { String::new() } else { host(&name, false)? };
    let roots = authorities(&more.get("caBundle"))?;
    let shown = more.get("clientCertificate");
    let client_certificate = match shown.text()? {
        None => String::new(),
        Some(name) if is_dns_name(name) && !name.contains('.') => name.to_owned(),
        Some(other) => return Err(shown.error(format!("`{other}` is no name of a certificate, such as bank-client"))),
    };
    Ok(Some(Origination { server_name, roots, client_certificate }))
}

/// Fields of a ServiceEntry that are read.
const ENTRY: [&str; 8] =
    ["hosts", "addresses", "ports", "location", "resolution", "endpoints", "exportTo", "workloadSelector"];

pub(super) fn entry(at: &Cursor<'_>, meta: Meta, error: Option<FieldError>) -> PolicyResult {
    let mut ignored = Vec::new();
    let read = error.map_or_else(|| entry_spec(&at.get("spec"), &mut ignored), Err);
    let (rules, failed) = match read {
        Ok(rules) => (rules, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    let policy = EgressPolicy {
        meta,
        kind: EgressKind::Entry,
        pods: Some(EgressPods::default()),
        record_only: false,
        ceiling: false,
        own_namespace: !exported_to_all(&at.get("spec")),
        rules,
        unreadable: failed.as_ref().map(ToString::to_string),
        ignored,
    };
    Ok((Object::EgressPolicy(Arc::new(policy)), failed))
}

/// What cannot be read is for its own namespace.
fn exported_to_all(spec: &Cursor<'_>) -> bool {
    spec.get("exportTo").texts().is_ok_and(|to| to.is_empty() || to.iter().any(|(to, _)| *to == "*"))
}

fn entry_spec(spec: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<Vec<EgressRule>> {
    for (key, field) in spec.map()? {
        if !ENTRY.contains(&key) && !field.is_absent() {
            ignored.push(format!("{} has no effect", field.error("").field));
        }
    }
    if spec.get("location").text()? == Some("MESH_INTERNAL") || !spec.get("workloadSelector").is_absent() {
        ignored.push("workloads of the mesh behind a ServiceEntry are not served, so it allows nothing".to_owned());
        return Ok(Vec::new());
    }
    let exported = spec.get("exportTo").texts()?;
    if exported.iter().any(|(to, _)| !matches!(*to, "." | "*")) {
        ignored.push(
            "exportTo: only pods of its own namespace (of the root namespace: all) are given anything".to_owned(),
        );
    }
    let hosts: Vec<String> = bounded(&spec.get("hosts"))?.iter().map(|item| host(item, false)).collect::<Read<_>>()?;
    if hosts.is_empty() {
        return Err(spec.get("hosts").error("is missing"));
    }
    let addresses: Vec<IpNet> = bounded(&spec.get("addresses"))?
        .iter()
        .map(|item| address(item.required_text()?, item))
        .collect::<Read<_>>()?;
    let ports = bounded(&spec.get("ports"))?;
    let names: Vec<(String, u16)> = ports
        .iter()
        .filter_map(|port| Some((port.get("name").text().ok()??.to_owned(), port.get("number").port().ok()??)))
        .collect();
    let ports = ports.iter().map(entry_port).collect::<Read<Vec<_>>>()?;
    let endpoints =
        bounded(&spec.get("endpoints"))?.iter().map(|item| endpoint(item, &names)).collect::<Read<Vec<_>>>()?;
    let resolution = spec.get("resolution");
    let plain = match resolution.text()? {
        None | Some("NONE") => true,
        Some("STATIC" | "DNS" | "DNS_ROUND_ROBIN") => false,
        Some("DYNAMIC_DNS") => {
            let wrong = |why: String| {
                Err(resolution.error(format!("DYNAMIC_DNS is for names that are not known before: {why}")))
            };
            if let Some(host) = hosts.iter().find(|host| !host.starts_with("*.")) {
                return wrong(format!("`{host}` is one name; give it an entry with resolution DNS"));
            }
            if !addresses.is_empty() || !endpoints.is_empty() {
                return wrong("leave addresses and endpoints out".to_owned());
            }
            false
        }
        Some(other) => return Err(resolution.error(format!("`{other}` is no resolution"))),
    };
    if resolution.text()? == Some("STATIC") && (endpoints.is_empty() || endpoints.iter().any(|one| one.at.is_err())) {
        return Err(resolution.error("STATIC needs endpoints that are addresses"));
    }
    // NONE: the addresses themselves are meant. Otherwise they stand for the host.
    let (cidrs, stands_for) = if plain { (addresses, Vec::new()) } else { (Vec::new(), addresses) };
    Ok(vec![EgressRule { hosts, cidrs, ports, endpoints, stands_for, ..EgressRule::default() }])
}

/// An address or a block.
fn address(text: &str, at: &Cursor<'_>) -> Read<IpNet> {
    text.parse::<IpAddr>().map_or_else(|_| net(text, at), |ip| Ok(IpNet::from(ip.to_canonical())))
}

fn entry_port(at: &Cursor<'_>) -> Read<EgressPort> {
    let (number, protocol) = (at.get("number"), at.get("protocol"));
    Ok(EgressPort {
        number: number.port()?.ok_or_else(|| number.error("is missing"))?,
        protocol: match protocol.text()?.unwrap_or("TCP").to_ascii_uppercase().as_str() {
            "HTTP" | "HTTP2" | "GRPC" => EgressProtocol::Http,
            "HTTPS" => EgressProtocol::Https,
            "TLS" => EgressProtocol::Tls,
            "TCP" | "MONGO" => EgressProtocol::Tcp,
            other => return Err(protocol.error(format!("`{other}` is no protocol"))),
        },
        target: at.get("targetPort").port()?.unwrap_or_default(),
    })
}

fn endpoint(at: &Cursor<'_>, names: &[(String, u16)]) -> Read<EgressEndpoint> {
    let address = at.get("address");
    let text = address.required_text()?;
    let at_host = match text.parse::<IpAddr>() {
        Ok(ip) => Ok(ip.to_canonical()),
        Err(_) => match host(&address, false)? {
            name if name.starts_with("*.") => return Err(address.error("an endpoint cannot be a wildcard")),
            name => Err(name),
        },
    };
    let mut ports = BTreeMap::new();
    for (name, target) in at.get("ports").map()? {
        let Some((_, number)) = names.iter().find(|(known, _)| known == name) else {
            return Err(target.error(format!("the entry has no port `{name}`")));
        };
        ports.insert(*number, target.port()?.ok_or_else(|| target.error("is missing"))?);
    }
    Ok(EgressEndpoint { at: at_host, ports })
}
