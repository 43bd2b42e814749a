//! What the names of `tulle explain` mean: a client, the addresses that it would dial, and the pods behind an address.
//!
//! Pure, on the objects and resources of one moment. A headless Service's name means the addresses of its endpoints, all
//! of them, as its clients find them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use prost::Message;
use tulle_proto::node;
use tulle_proto::node::EndpointChoice;
use tulle_proto::workload;

use crate::admin::names::{self, Meaning};
use crate::admin::{View, absent};
use crate::model::{NamedPort, Pod, Service, Transport, in_namespace};
use crate::resource::{Kind, ResourceSet};
use crate::translate::{Settings, datagram_endpoints};

/// What kind of connection is meant.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) transport: Transport,
    /// IPv6 if true; none: whatever comes first.
    v6: Option<bool>,
}

/// Who connects.
pub(super) enum Source<'a> {
    /// A pod.
    Pod(&'a Pod),
    /// Somebody who is none.
    Address(IpAddr),
}

/// What is dialled.
pub(super) struct Target {
    /// One, or those of a headless Service's endpoints.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) port: u16,
    /// `<namespace>/<hostname>` of the Service that was named; else empty.
    pub(super) service: String,
    /// A name outside the cluster; then there are no addresses.
    pub(super) host: Option<String>,
}

impl Asked {
    /// Reads the words of a query.
    pub(super) fn parse(transport: Option<&str>, family: Option<&str>) -> Result<Self, String> {
        let transport = match transport.unwrap_or("tcp") {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            "sctp" => Transport::Sctp,
            other => return Err(format!("`{other}` is none of tcp, udp, sctp")),
        };
        let v6 = match family {
            None => None,
            Some("v4") => Some(false),
            Some("v6") => Some(true),
            Some(other) => return Err(format!("`{other}` is none of v4, v6")),
        };
        Ok(Self { transport, v6 })
    }

    /// As the nodes are asked.
    pub(super) fn on_wire(self) -> node::Transport {
        match self.transport {
            Transport::Tcp => node::Transport::Tcp,
            Transport::Udp => node::Transport::Udp,
            Transport::Sctp => node::Transport::Sctp,
        }
    }

    fn fits(self, ip: IpAddr) -> bool {
        self.v6.is_none_or(|v6| v6 == ip.is_ipv6())
    }

    fn pick(self, addresses: &[IpAddr]) -> Option<IpAddr> {
        addresses.iter().copied().find(|ip| self.fits(*ip))
    }

    fn missing(self, what: &str) -> String {
        let family = match self.v6 {
            None => "",
            Some(false) => "IPv4 ",
            Some(true) => "IPv6 ",
        };
        format!("{what} has no {family}address")
    }
}

impl Source<'_> {
    /// A client that is known by one address talks in its family.
    pub(super) fn narrow(&self, asked: Asked) -> Asked {
        match self {
            Self::Pod(_) => asked,
            Self::Address(ip) => Asked { v6: Some(ip.is_ipv6()), ..asked },
        }
    }
}

/// `tcp`, `udp`, `sctp`.
pub(super) fn word(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
        Transport::Sctp => "sctp",
    }
}

/// `ns/pod`, `ns/deployment` meaning its first running pod, or an address, which may be a pod's.
pub(super) fn source<'a>(view: &'a View, text: &str) -> Result<Source<'a>, String> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        let ip = ip.to_canonical();
        return Ok(pod_at(view, ip).map_or(Source::Address(ip), Source::Pod));
    }
    let pod = find_pod(view, text).ok_or_else(|| format!("there is no running pod or deployment {text}"))?;
    Ok(Source::Pod(pod))
}

/// `ip:port`, `ns/service[:port]`, `ns/pod:port`, or a name as `source` would look it up, with a port.
pub(super) fn find(
    view: &View,
    set: &ResourceSet,
    settings: &Settings,
    source: &Source<'_>,
    asked: Asked,
    text: &str,
) -> Result<Target, String> {
    if let Ok(socket) = text.parse::<SocketAddr>() {
        let address = socket.ip().to_canonical();
        if !asked.fits(address) {
            return Err(format!("{address} is not of the address family that is asked about"));
        }
        return Ok(Target { addresses: vec![address], port: socket.port(), service: String::new(), host: None });
    }
    let (path, port) = match text.rsplit_once(':') {
        Some((path, port)) => {
            let port = port.parse::<u16>().map_err(|_| format!("`{port}` is not a port"))?;
            (path, Some(port))
        }
        None => (text, None),
    };
    let known;
    let path = match source {
        Source::Pod(pod) if !path.contains('/') && names::is_name(path) => {
            known = match names::meaning(view.world(), settings, pod, path)? {
                Meaning::Service(namespace, name) | Meaning::Pod(namespace, name) => format!("{namespace}/{name}"),
                Meaning::Outside(host) => {
                    let port = port
                        .ok_or_else(|| format!("{host} is outside the cluster: a port is needed, as in {host}:443"))?;
                    return Ok(Target { addresses: Vec::new(), port, service: String::new(), host: Some(host) });
                }
            };
            known.as_str()
        }
        _ => path,
    };
    let shape = || format!("`{text}` is none of ns/service[:port], ns/pod:port, name[:port], ip:port");
    let (namespace, name) = path.split_once('/').ok_or_else(shape)?;
    if let Some(service) = view.world().services.get(&(namespace.to_owned(), name.to_owned()))
        && (!service.addresses.is_empty() || service.names.headless)
    {
        // Without a port the first one is meant; the answer shows which.
        let port = port.or_else(|| first_port(service, asked.transport));
        let port = port.ok_or_else(|| {
            format!("{path} has no {} port; name one, as in {path}:80", word(asked.transport).to_uppercase())
        })?;
        let key = format!("{namespace}/{}", settings.hostname(&service.meta));
        let addresses = if service.addresses.is_empty() {
            endpoints_of(set, &key).filter_map(|(workload, _)| asked.pick(&addresses(&workload))).collect()
        } else {
            vec![asked.pick(&service.addresses).ok_or_else(|| asked.missing(path))?]
        };
        if addresses.is_empty() {
            let hints = absent::hints(view.world(), service, port, asked.transport);
            return Err(format!("{path} is headless and has no ready endpoint{}", absent::clause(&hints)));
        }
        return Ok(Target { addresses, port, service: key, host: None });
    }
    let pod = find_pod(view, path).ok_or_else(|| nothing(view, namespace, name))?;
    let port = port.ok_or_else(|| format!("{path} is a pod: a port is needed, as in {path}:8080"))?;
    let address = asked.pick(&pod.addresses).ok_or_else(|| asked.missing(path))?;
    Ok(Target { addresses: vec![address], port, service: String::new(), host: None })
}

/// There is no such thing to connect to.
fn nothing(view: &View, namespace: &str, name: &str) -> String {
    let world = view.world();
    if let Some(service) = world.services.get(&(namespace.to_owned(), name.to_owned())) {
        let target = &service.names.external_name;
        return match service.external_name {
            true => format!("{namespace}/{name} is of type ExternalName: ask about {target} with a port"),
            false => format!("{namespace}/{name} has no address yet"),
        };
    }
    let services = in_namespace(&world.services, namespace).map(|service| service.meta.name.as_str());
    let alike = names::closest(services, name)
        .map_or_else(String::new, |own| format!("; there is a service {namespace}/{own}"));
    format!("there is no service or running pod {namespace}/{name}{alike}")
}

fn first_port(service: &Service, transport: Transport) -> Option<u16> {
    service.names.ports.iter().find(|port| port.transport == transport).map(|port| port.number)
}

/// The pods that a packet to an address may reach when no proxy sends it: the address's own, or a Service's endpoints.
pub(super) fn behind(
    view: &View,
    set: &ResourceSet,
    settings: &Settings,
    asked: Asked,
    address: IpAddr,
    port: u16,
) -> Vec<EndpointChoice> {
    let world = view.world();
    let services = || world.services.values();
    let external = |service: &&Arc<Service>| {
        let has = |own: &NamedPort| own.transport == asked.transport && own.number == port;
        service.external.contains(&address) && service.names.ports.iter().any(has)
    };
    // A pod's address is never a Service's, whatever that says.
    let service = services()
        .find(|service| service.addresses.contains(&address))
        .or_else(|| services().find(external).filter(|_| pod_at(view, address).is_none()));
    let found: Vec<SocketAddr> = match (service, asked.transport) {
        (None, _) => vec![SocketAddr::new(address, port)],
        (Some(service), Transport::Tcp) => {
            let key = format!("{}/{}", service.meta.namespace, settings.hostname(&service.meta));
            let target = |ports: &[workload::Port]| {
                let own = ports.iter().find(|own| own.service_port == u32::from(port))?;
                u16::try_from(own.target_port).ok()
            };
            endpoints_of(set, &key)
                .filter_map(|(workload, ports)| {
                    let ip = addresses(&workload).into_iter().find(|ip| ip.is_ipv6() == address.is_ipv6())?;
                    Some(SocketAddr::new(ip, target(&ports)?))
                })
                .collect()
        }
        (Some(service), transport) => {
            let named = service.names.ports.iter().find(|own| own.transport == transport && own.number == port);
            let all = named.map(|named| datagram_endpoints(world, service, named)).unwrap_or_default();
            all.into_iter().filter(|at| at.is_ipv6() == address.is_ipv6()).collect()
        }
    };
    let share = 100.0 / found.len().max(1) as f64;
    found.into_iter().filter_map(|at| choice(view, settings, at, share)).collect()
}

/// A pod as an endpoint that is reached without a tunnel.
fn choice(view: &View, settings: &Settings, at: SocketAddr, share: f64) -> Option<EndpointChoice> {
    let pod = pod_at(view, at.ip())?;
    Some(EndpointChoice {
        uid: settings.pod_uid(&pod.meta),
        name: pod.meta.name.clone(),
        namespace: pod.meta.namespace.clone(),
        node: pod.node.clone(),
        address: octets(at.ip()).into(),
        port: at.port().into(),
        share_percent: share,
        protocol: "plain".into(),
        ..EndpointChoice::default()
    })
}

/// The healthy endpoints of a service, with their ports for it.
fn endpoints_of<'a>(
    set: &'a ResourceSet,
    key: &'a str,
) -> impl Iterator<Item = (workload::Workload, Vec<workload::Port>)> + use<'a> {
    set.of(Kind::Address).values().filter_map(move |resource| {
        let address = workload::Address::decode(resource.body.clone()).ok()?;
        let Some(workload::address::Type::Workload(workload)) = address.r#type else { return None };
        let ports = workload.services.get(key)?.ports.clone();
        (workload.status() == workload::WorkloadStatus::Healthy).then_some((workload, ports))
    })
}

fn addresses(workload: &workload::Workload) -> Vec<IpAddr> {
    let read = |bytes: &[u8]| {
        let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
        v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
    };
    workload.addresses.iter().filter_map(|bytes| read(bytes)).collect()
}

/// Bytes of an address in network order.
pub(super) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The pod that has an address; one on the host network has its node's.
fn pod_at(view: &View, ip: IpAddr) -> Option<&Pod> {
    let mut pods = view.world().pods.values().map(|pod| &**pod);
    pods.find(|pod| pod.takes_part() && !pod.host_network && pod.addresses.contains(&ip))
}

/// `ns/pod`, or `ns/deployment` meaning its first running pod.
fn find_pod<'a>(view: &'a View, name: &str) -> Option<&'a Pod> {
    let (namespace, name) = name.split_once('/')?;
    let pods = &view.world().pods;
    if let Some(pod) = pods.get(&(namespace.to_owned(), name.to_owned())) {
        return pod.takes_part().then_some(pod);
    }
    pods.values()
        .map(|pod| &**pod)
        .find(|pod| pod.meta.namespace == namespace && pod.takes_part() && belongs_to(pod, name))
}

/// By owner, or by the names that Deployments and the lab give their pods.
fn belongs_to(pod: &Pod, deployment: &str) -> bool {
    let owned = pod.meta.owner.as_ref().is_some_and(|owner| {
        let hash = pod.meta.label("pod-template-hash").unwrap_or_default();
        owner.name == deployment || owner.name == format!("{deployment}-{hash}")
    });
    let numbered = || {
        let rest = pod.meta.name.strip_prefix(deployment)?.strip_prefix('-')?;
        (!rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit())).then_some(())
    };
    owned || numbered().is_some()
}
