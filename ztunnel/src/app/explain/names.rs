//! What becomes of a connection to a name outside the cluster, by the decision that connections get where egress is closed.
//!
//! The name is judged and not an address: where egress is closed the pod gets a virtual address for an allowed name and none for
//! others, and elsewhere its address is for the pod's own name server to say.

use tulle_proto::node::{OutboundAnswer, OutboundQuestion};

use crate::app::explain::{leave, octets, port, transport};
use crate::outbound;
use crate::state::{EgressMode, Protocol, Snapshot, Transport, Workload};

/// A connection to a name outside.
pub(super) fn outbound(
    snapshot: &Snapshot,
    network: &str,
    source: &Workload,
    question: &OutboundQuestion,
) -> Result<OutboundAnswer, String> {
    let (host, port) = (question.host.as_str(), port(question.port)?);
    let mut answer = OutboundAnswer {
        source_address: source.addresses.first().map(|ip| octets(*ip)).unwrap_or_default().into(),
        generation: snapshot.generation(),
        transport: question.transport,
        plan: "plain".to_owned(),
        ..OutboundAnswer::default()
    };
    if transport(question.transport)? != Transport::Tcp {
        return Err(format!("what becomes of datagrams is known by address only; ask for the address of {host}"));
    }
    let is_in = source.protocol == Protocol::Hbone;
    match outbound::leaving_by_name(snapshot, source, network, host, port).filter(|_| is_in) {
        Some(way) => leave(snapshot, way, source, &mut answer),
        None if !is_in => {
            let text = "is not in the mesh; nothing intercepts it";
            answer.text = format!("{}/{} {text}", source.namespace, source.name);
        }
        None => {
            let audited = if source.egress == EgressMode::Audit { ", which is recorded" } else { "" };
            answer.text = format!(
                "plain TCP: {host} is outside the mesh, and what leaves namespace {} is open{audited}; its address is \
                 what the pod's name server says",
                source.namespace
            );
        }
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use tulle_proto::node::OutboundQuestion;

    use super::outbound;
    use crate::state::fixtures::{snapshot, workload};
    use crate::state::{Change, EgressMode, Protocol, Workload};

    #[test]
    fn a_name_outside_is_plain_where_nothing_is_closed_and_refused_where_no_rule_has_it() {
        let question = OutboundQuestion { host: "api.example".into(), port: 443, ..OutboundQuestion::default() };
        for (egress, protocol, plan, text) in [
            (EgressMode::Allow, Protocol::Hbone, "plain", "what leaves namespace shop is open;"),
            (EgressMode::Audit, Protocol::Hbone, "plain", "is open, which is recorded;"),
            (EgressMode::Deny, Protocol::Hbone, "refuse", ""),
            (EgressMode::Deny, Protocol::Plain, "plain", "shop/web is not in the mesh"),
        ] {
            let source = Workload { egress, protocol, ..workload("shop", "web", "10.0.0.9") };
            let snapshot = snapshot([Change::Workload(source.clone().into())]);
            let answer = outbound(&snapshot, "", &source, &question).unwrap();
            assert_eq!(answer.plan, plan, "{egress:?}");
            assert!(answer.text.contains(text), "{egress:?}: {}", answer.text);
        }
        let source = workload("shop", "web", "10.0.0.9");
        let datagram = OutboundQuestion { transport: 1, ..question };
        assert!(outbound(&snapshot([]), "", &source, &datagram).is_err());
    }
}
