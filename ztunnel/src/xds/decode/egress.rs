//! Decodes `tulle.mesh.v1alpha1.EgressPolicy`.
//!
//! A rule only ever allows, but a part of it that is skipped may be what narrows it. So nothing is skipped: an unknown field,
//! wherever it is, rejects the policy. Whether it is a ceiling is read on its own, since a ceiling that is not there is open.

use std::sync::Arc;

use prost::Message;
use tulle_proto::mesh as wire;

use crate::state::{
    EGRESS_POLICY, EgressEndpoint, EgressHttp, EgressPath, EgressPlace, EgressPolicy, EgressPort, EgressProtocol,
    EgressRule, HostPattern, Origination, SERVICE_ENTRY, ServiceName,
};
use crate::xds::decode::field;
use crate::xds::decode::schemas::whole;
use crate::xds::wire::Schema;

const CIDR: Schema = Schema { scalars: &[1, 2], messages: &[] };
const PORT: Schema = Schema { scalars: &[1, 2, 3], messages: &[] };
const HTTP: Schema = Schema { scalars: &[1, 2], messages: &[] };
const SERVICE: Schema = Schema { scalars: &[1, 2], messages: &[] };
const GATEWAY: Schema = Schema { scalars: &[], messages: &[(1, &SERVICE)] };
const ORIGINATION: Schema = Schema { scalars: &[1, 2, 3], messages: &[] };
const PROOF: Schema = Schema { scalars: &[1], messages: &[] };
const MAP: Schema = Schema { scalars: &[1, 2], messages: &[] };
const ENDPOINT: Schema = Schema { scalars: &[1, 2], messages: &[(3, &MAP)] };
const RULE: Schema = Schema {
    scalars: &[1],
    messages: &[
        (2, &CIDR),
        (3, &PORT),
        (4, &HTTP),
        (5, &GATEWAY),
        (6, &ORIGINATION),
        (7, &ENDPOINT),
        (8, &CIDR),
        (9, &PROOF),
    ],
};
const POLICY: Schema = Schema { scalars: &[1, 2, 3, 4, 6], messages: &[(5, &RULE)] };

/// Longest name (RFC 1035 §2.3.4, as text).
const MAX_NAME: usize = 253;

/// See the module's header. The error is whether it is a ceiling, and what is wrong, as one clause.
pub(super) fn policy(bytes: &[u8], id: &str, version: &str) -> Result<EgressPolicy, (bool, String)> {
    // What cannot be read at all may have been one.
    let from = wire::EgressPolicy::decode(bytes).map_err(|error| (true, format!("it is no EgressPolicy: {error}")))?;
    let ceiling = from.ceiling;
    read(from, bytes, id, version).map_err(|reason| (ceiling, reason))
}

fn read(from: wire::EgressPolicy, bytes: &[u8], id: &str, version: &str) -> Result<EgressPolicy, String> {
    let path = format!("{}/{}", from.namespace, from.name);
    if ![EGRESS_POLICY, SERVICE_ENTRY].iter().any(|kind| id.strip_prefix(kind) == Some(&path)) {
        return Err("its content has another name than the resource".to_owned());
    }
    whole(bytes, &POLICY)?;
    if !from.rules.is_empty() && !from.unreadable.is_empty() {
        return Err("it has rules, and says that it could not be read".to_owned());
    }
    Ok(EgressPolicy {
        id: id.into(),
        version: version.into(),
        record_only: match field::known("action", from.action)? {
            wire::EgressAction::Enforce => false,
            wire::EgressAction::Record => true,
        },
        ceiling: from.ceiling,
        rules: from.rules.iter().map(|one| rule(one, &from.namespace)).collect::<Result<_, _>>()?,
        unreadable: Some(from.unreadable).filter(|reason| !reason.is_empty()).map(Into::into),
    })
}

fn rule(from: &wire::EgressRule, namespace: &str) -> Result<EgressRule, String> {
    let net = |name: &str, cidr: &wire::Cidr| field::net(name, &cidr.address, Some(cidr.length));
    let nets = |name: &str, list: &[wire::Cidr]| list.iter().map(|cidr| net(name, cidr)).collect::<Result<_, _>>();
    Ok(EgressRule {
        hosts: from.hosts.iter().map(|text| pattern(text)).collect::<Result<_, _>>()?,
        cidrs: nets("cidrs", &from.cidrs)?,
        ports: from.ports.iter().map(port).collect::<Result<_, _>>()?,
        http: from.http.as_ref().map(http).transpose()?,
        gateway: from.gateway.as_ref().map(gateway).transpose()?,
        originate: from.originate.as_ref().map(|tls| origination(tls, namespace)).transpose()?,
        endpoints: from.endpoints.iter().map(endpoint).collect::<Result<_, _>>()?,
        stands_for: nets("stands_for", &from.stands_for)?,
        proof: from.proof.as_ref().map(|proof| ders(&proof.roots)),
    })
}

fn pattern(text: &str) -> Result<HostPattern, String> {
    if text == "*" {
        return Ok(HostPattern::Any);
    }
    match text.strip_prefix("*.") {
        Some(parent) => Ok(HostPattern::Below(name(parent)?.into())),
        None => Ok(HostPattern::Exact(name(text)?.into())),
    }
}

/// A name in the form in which names are compared.
fn name(text: &str) -> Result<&str, String> {
    let label = |label: &str| {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
        (1..=63).contains(&label.len()) && label.bytes().all(plain)
    };
    if text.len() <= MAX_NAME && text.split('.').all(label) {
        Ok(text)
    } else {
        Err(format!("{text:?} is no host name"))
    }
}

fn port(from: &wire::EgressPort) -> Result<EgressPort, String> {
    let number = field::port("number", from.number)?;
    Ok(EgressPort {
        number,
        protocol: match field::known("protocol", from.protocol)? {
            wire::EgressProtocol::Detected => EgressProtocol::Detected,
            wire::EgressProtocol::Bytes => EgressProtocol::Bytes,
            wire::EgressProtocol::Tls => EgressProtocol::Tls,
            wire::EgressProtocol::PlainHttp => EgressProtocol::Http,
            wire::EgressProtocol::Https => EgressProtocol::Https,
        },
        target: Some(field::port_or_zero("target", from.target)?).filter(|port| *port != 0).unwrap_or(number),
    })
}

fn http(from: &wire::EgressHttp) -> Result<EgressHttp, String> {
    let path = |text: &String| match (text.as_str(), text.strip_suffix('*')) {
        ("*", _) => Ok(EgressPath::Below("/".into())),
        (text, None) if text.starts_with('/') => Ok(EgressPath::Exact(text.into())),
        (_, Some(parent)) if parent.starts_with('/') && parent.ends_with('/') => Ok(EgressPath::Below(parent.into())),
        (text, _) => Err(format!("{text:?} is no pattern of a path")),
    };
    Ok(EgressHttp {
        methods: from.methods.iter().map(|method| method.as_str().into()).collect(),
        paths: from.paths.iter().map(path).collect::<Result<_, _>>()?,
    })
}

fn gateway(from: &wire::EgressGateway) -> Result<ServiceName, String> {
    match &from.service {
        Some(service) if !service.namespace.is_empty() && !service.hostname.is_empty() => {
            Ok(ServiceName { namespace: service.namespace.as_str().into(), hostname: service.hostname.as_str().into() })
        }
        _ => Err("a gateway has no service".to_owned()),
    }
}

fn origination(from: &wire::EgressOrigination, namespace: &str) -> Result<Origination, String> {
    // Both become a part of a path of the gateway, so they have to be names.
    let shown = match from.client_certificate.as_str() {
        "" => None,
        text => Some(format!("{}/{}", name(namespace)?, name(text)?).into()),
    };
    let server_name = Some(from.server_name.as_str()).filter(|text| !text.is_empty());
    Ok(Origination {
        server_name: server_name.map(name).transpose()?.map(Into::into),
        roots: ders(&from.roots),
        client_certificate: shown,
    })
}

fn ders(roots: &[bytes::Bytes]) -> Vec<Arc<[u8]>> {
    roots.iter().map(|root| root.as_ref().into()).collect()
}

fn endpoint(from: &wire::EgressEndpoint) -> Result<EgressEndpoint, String> {
    use wire::egress_endpoint::At;
    let at = match &from.at {
        Some(At::Address(bytes)) => EgressPlace::Address(field::ip("address", bytes)?),
        Some(At::Host(host)) => EgressPlace::Host(name(host)?.into()),
        None => return Err("an endpoint is neither an address nor a name".to_owned()),
    };
    let port = |(from, to): (&u32, &u32)| Ok::<_, String>((field::port("ports", *from)?, field::port("ports", *to)?));
    Ok(EgressEndpoint { at, ports: from.ports.iter().map(port).collect::<Result<_, _>>()? })
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use tulle_proto::mesh as wire;

    use super::policy;

    #[test]
    fn a_policy_is_taken_whole_or_not_at_all() {
        let of = |rule: wire::EgressRule| wire::EgressPolicy {
            namespace: "shop".into(),
            name: "p".into(),
            rules: vec![rule],
            ..wire::EgressPolicy::default()
        };
        let host = |host: &str| of(wire::EgressRule { hosts: vec![host.into()], ..wire::EgressRule::default() });
        let id = "EgressPolicy/shop/p";
        let taken = policy(&host("*.example.com").encode_to_vec(), id, "v1").unwrap();
        assert_eq!(taken.rules.len(), 1);
        assert!(policy(&host("a.example").encode_to_vec(), "ServiceEntry/shop/p", "v1").is_ok());
        let ports = |number, protocol| {
            let port = wire::EgressPort { number, protocol, target: 0 };
            of(wire::EgressRule { ports: vec![port], ..wire::EgressRule::default() })
        };
        let more: Vec<u8> = host("a.example").encode_to_vec().into_iter().chain([0x78, 1]).collect();
        let ceiling = wire::EgressPolicy { ceiling: true, action: 7, ..host("a.example") };
        for (bytes, id, ceiling, expected) in [
            (host("a.example").encode_to_vec(), "EgressPolicy/shop/q", false, "another name"),
            (host("A.example").encode_to_vec(), id, false, "no host name"),
            (host("a..example").encode_to_vec(), id, false, "no host name"),
            (host("").encode_to_vec(), id, false, "no host name"),
            (host("*.*.example").encode_to_vec(), id, false, "no host name"),
            (ports(0, 0).encode_to_vec(), id, false, "a port is 1 to 65535"),
            (ports(1, 9).encode_to_vec(), id, false, "does not know"),
            (more, id, false, "must not ignore"),
            (ceiling.encode_to_vec(), id, true, "does not know"),
            (vec![0xff], id, true, "no EgressPolicy"),
        ] {
            let (was_ceiling, error) = policy(&bytes, id, "v1").unwrap_err();
            assert!(error.contains(expected) && was_ceiling == ceiling, "{error}, ceiling {was_ceiling}");
        }
    }
}
