//! The ports of Services that are not TCP, with the endpoints behind them.
//!
//! The mesh does not carry them, but a NetworkPolicy of a client names endpoints, while its packets name the Service. So a
//! node must know which endpoints a virtual address stands for. They are sent only where some policy isolates egress:
//! nobody else looks at them, and they change with every endpoint.

use std::net::SocketAddr;

use tulle_proto::tulle_workload::{DatagramEndpoint, DatagramPort, TransportProtocol};

use crate::model::{EndpointSlice, NamedPort, Service, TargetPort, Transport, World, in_namespace};
use crate::translate::service::octets;

/// Whether anybody needs them.
pub(super) fn needed(world: &World) -> bool {
    world.network_policies.values().any(|policy| policy.egress.is_some())
}

/// The ports of one service that are not TCP; `slices`: its endpoint slices, if there are any.
pub(super) fn of(service: &Service, slices: Option<&[&EndpointSlice]>, world: &World) -> Vec<DatagramPort> {
    let ports = service.names.ports.iter().filter(|port| port.transport != Transport::Tcp);
    ports
        .map(|port| {
            let endpoints = behind(service, slices, port, world);
            let endpoint =
                |at: SocketAddr| DatagramEndpoint { address: octets(&at.ip()).into(), port: at.port().into() };
            DatagramPort {
                protocol: match port.transport {
                    Transport::Tcp => TransportProtocol::TransportTcp.into(),
                    Transport::Udp => TransportProtocol::TransportUdp.into(),
                    Transport::Sctp => TransportProtocol::TransportSctp.into(),
                },
                number: port.number.into(),
                endpoints: endpoints.into_iter().map(endpoint).collect(),
            }
        })
        .collect()
}

/// Address and port of each endpoint of one port, for people who ask.
pub fn endpoints(world: &World, service: &Service, port: &NamedPort) -> Vec<SocketAddr> {
    let of =
        |slice: &&EndpointSlice| slice.meta.namespace == service.meta.namespace && slice.service == service.meta.name;
    let slices: Vec<&EndpointSlice> = world.slices.values().map(|slice| &**slice).filter(of).collect();
    behind(service, (!slices.is_empty()).then_some(&slices), port, world)
}

fn behind(service: &Service, slices: Option<&[&EndpointSlice]>, port: &NamedPort, world: &World) -> Vec<SocketAddr> {
    let mut endpoints = match slices {
        Some(slices) => in_slices(slices, port, service.publish_not_ready),
        None => selected(service, port, world),
    };
    endpoints.sort_unstable();
    endpoints.dedup();
    endpoints
}

fn selected(service: &Service, port: &NamedPort, world: &World) -> Vec<SocketAddr> {
    if service.selector.is_empty() {
        return Vec::new();
    }
    let serves = in_namespace(&world.pods, &service.meta.namespace).filter(|pod| {
        let selected = service.selector.iter().all(|(label, value)| pod.meta.labels.get(label) == Some(value));
        selected && pod.takes_part() && (pod.ready || service.publish_not_ready)
    });
    serves
        .flat_map(|pod| {
            let target = match &port.target {
                TargetPort::Number(number) => Some(*number),
                TargetPort::Name(name) => {
                    let named = pod.ports.iter().find(|own| own.protocol == port.transport && own.name == *name);
                    named.map(|own| own.port)
                }
            };
            target.into_iter().flat_map(|target| pod.addresses.iter().map(move |ip| SocketAddr::new(*ip, target)))
        })
        .collect()
}

fn in_slices(slices: &[&EndpointSlice], port: &NamedPort, not_ready: bool) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for slice in slices {
        let Some((.., number)) =
            slice.datagrams.iter().find(|(name, transport, _)| *name == port.name && *transport == port.transport)
        else {
            continue;
        };
        let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready || not_ready);
        found.extend(ready.flat_map(|endpoint| &endpoint.addresses).map(|ip| SocketAddr::new(*ip, *number)));
    }
    found
}
