//! Decodes `tulle.mesh.v1alpha1.NetworkPolicy`.
//!
//! A rule only ever allows, but a part of it that is skipped may be what narrows it. So nothing is skipped: an unknown
//! field, wherever it is, rejects the policy.

use prost::Message;
use tulle_proto::mesh as wire;
use tulle_proto::mesh::network_peer::Peer;

use crate::state::{IpBlock, NETWORK_POLICY, NetworkPeers, NetworkPolicy, NetworkPort, NetworkRule, Transport};
use crate::xds::decode::field;
use crate::xds::decode::schemas::whole;
use crate::xds::wire::Schema;

const CIDR: Schema = Schema { scalars: &[1, 2], messages: &[] };
const BLOCK: Schema = Schema { scalars: &[], messages: &[(1, &CIDR), (2, &CIDR)] };
const PEER: Schema = Schema { scalars: &[1], messages: &[(2, &BLOCK)] };
const PORT: Schema = Schema { scalars: &[1, 2, 3, 4], messages: &[] };
const RULE: Schema = Schema { scalars: &[], messages: &[(1, &PEER), (2, &PORT)] };
const POLICY: Schema = Schema { scalars: &[1, 2, 3, 4, 7], messages: &[(5, &RULE), (6, &RULE)] };

/// See the module's header. The error is what is wrong, as one clause.
pub(super) fn policy(bytes: &[u8], id: &str, version: &str) -> Result<NetworkPolicy, String> {
    let from = wire::NetworkPolicy::decode(bytes).map_err(|error| format!("it is no NetworkPolicy: {error}"))?;
    if format!("{NETWORK_POLICY}{}/{}", from.namespace, from.name) != id {
        return Err("its content has another name than the resource".to_owned());
    }
    whole(bytes, &POLICY)?;
    let rules = |isolates: bool, rules: &[wire::NetworkRule]| -> Result<Option<Vec<NetworkRule>>, String> {
        isolates.then(|| rules.iter().map(rule).collect()).transpose()
    };
    let has_rules = !(from.ingress_rules.is_empty() && from.egress_rules.is_empty());
    if has_rules && !from.unreadable.is_empty() {
        return Err("it has rules, and says that it could not be read".to_owned());
    }
    Ok(NetworkPolicy {
        id: id.into(),
        version: version.into(),
        ingress: rules(from.ingress, &from.ingress_rules)?,
        egress: rules(from.egress, &from.egress_rules)?,
        unreadable: Some(from.unreadable).filter(|reason| !reason.is_empty()).map(Into::into),
    })
}

fn rule(from: &wire::NetworkRule) -> Result<NetworkRule, String> {
    let mut peers = NetworkPeers::default();
    for peer in &from.peers {
        match &peer.peer {
            Some(Peer::Group(id)) => peers.groups.push(*id),
            Some(Peer::Block(from)) => peers.blocks.push(block(from)?),
            None => return Err("a peer is neither a group nor a block".to_owned()),
        }
    }
    let ports = from.ports.iter().map(port).collect::<Result<Vec<_>, _>>()?;
    Ok(NetworkRule { peers: (!from.peers.is_empty()).then_some(peers), ports: (!ports.is_empty()).then_some(ports) })
}

fn block(from: &wire::IpBlock) -> Result<IpBlock, String> {
    let net = |name: &str, cidr: &wire::Cidr| field::net(name, &cidr.address, Some(cidr.length));
    let cidr = from.cidr.as_ref().ok_or_else(|| "a block has no cidr".to_owned())?;
    Ok(IpBlock {
        net: net("cidr", cidr)?,
        except: from.except.iter().map(|part| net("except", part)).collect::<Result<_, _>>()?,
    })
}

fn port(from: &wire::NetworkPort) -> Result<NetworkPort, String> {
    Ok(NetworkPort {
        protocol: match field::known("protocol", from.protocol)? {
            wire::TransportProtocol::Tcp => Transport::Tcp,
            wire::TransportProtocol::Udp => Transport::Udp,
            wire::TransportProtocol::Sctp => Transport::Sctp,
        },
        first: field::port_or_zero("first", from.first)?,
        last: field::port_or_zero("last", from.last)?,
        destination_group: Some(from.destination_group).filter(|id| *id != 0),
    })
}
