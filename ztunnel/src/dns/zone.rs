//! What names mean by the mesh's own knowledge: pure, one snapshot in, records out.
//!
//! The rule that keeps "labelling changes nothing" true: a name is answered only where everything that the cluster's DNS
//! would say is known, and then the same way (the Kubernetes DNS specification, as CoreDNS carries it out). All else is
//! [`Found::Unknown`], and the pod's own name server is asked, whose answer stands: an unknown name in the cluster's
//! domain, a headless Service without endpoints, a type that the mesh knows nothing about.
//!
//! Names are whole: search paths belong to the client's resolver, which asks for each candidate.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tulle_proto::names::EXTERNAL_NAME_PREFIX;

use crate::state::{Port, Record, Service, Snapshot, Transport};

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Its namespace: decides which of several services of one name is meant, and which are visible.
    pub namespace: &'a str,
    /// Its network: addresses of others are not its to dial.
    pub network: &'a str,
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Port and name of each server.
    Srv,
    /// Name of an address.
    Ptr,
    /// The alias itself.
    Cname,
    /// Anything else: never answered here.
    Other,
}

impl From<u16> for Kind {
    fn from(code: u16) -> Self {
        match code {
            1 => Self::A,
            28 => Self::Aaaa,
            33 => Self::Srv,
            12 => Self::Ptr,
            5 => Self::Cname,
            _ => Self::Other,
        }
    }
}

/// The content of a record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Data {
    /// An address of either family.
    Address(IpAddr),
    /// A server.
    Server {
        /// 1 to 100, as CoreDNS shares it out.
        weight: u16,
        /// Its port.
        port: u16,
        /// Its name.
        target: String,
    },
    /// The name of an address.
    Name(String),
}

/// What the mesh knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// All records of the asked type; none: the name exists without that type.
    Records {
        /// The answer.
        answers: Vec<Data>,
        /// Addresses of the servers in it.
        extra: Vec<(String, IpAddr)>,
    },
    /// Another name has what is asked for.
    Alias(String),
    /// Not ours to answer.
    Unknown,
}

impl Found {
    fn of(answers: Vec<Data>) -> Self {
        Self::Records { answers, extra: Vec::new() }
    }
}

/// Looks up `name` (lower case, no final dot) in the cluster with the domain `domain`.
pub fn lookup(snapshot: &Snapshot, client: Client<'_>, domain: &str, name: &str, kind: Kind) -> Found {
    let zone = Zone { snapshot, client, domain };
    match kind {
        Kind::Other => Found::Unknown,
        Kind::Ptr => reversed(name).map_or(Found::Unknown, |ip| zone.name_of(ip)),
        kind => zone.by_name(name, kind),
    }
}

struct Zone<'a> {
    snapshot: &'a Snapshot,
    client: Client<'a>,
    domain: &'a str,
}

impl Zone<'_> {
    fn by_name(&self, name: &str, kind: Kind) -> Found {
        if let Some(service) = self.snapshot.service_by_hostname(name, self.client.namespace) {
            return self.of_service(service, kind);
        }
        let alias = format!("{EXTERNAL_NAME_PREFIX}{name}");
        if let Some(service) = self.snapshot.service_by_hostname(&alias, self.client.namespace) {
            let target = service.info.as_ref().map(|info| info.external_name.to_string());
            return match (target, kind) {
                // Ports and endpoints of an alias are its target's.
                (Some(target), Kind::A | Kind::Aaaa | Kind::Cname) if !target.is_empty() => Found::Alias(target),
                _ => Found::Unknown,
            };
        }
        let below = match self.labels_below("svc", name).as_deref() {
            Some([endpoint, service, namespace]) => self.of_endpoint(endpoint, service, namespace, kind),
            Some([port, transport, service, namespace]) => self.of_port([port, transport], service, namespace, kind),
            _ => None,
        };
        below.or_else(|| self.of_pod(name, kind)).or_else(|| self.of_wildcard(name, kind)).unwrap_or(Found::Unknown)
    }

    /// Labels of `name` in front of `<part>.<cluster domain>`.
    fn labels_below<'n>(&self, part: &str, name: &'n str) -> Option<Vec<&'n str>> {
        let rest = name.strip_suffix(self.domain)?.strip_suffix('.')?.strip_suffix(part)?.strip_suffix('.')?;
        Some(rest.split('.').collect())
    }

    fn hostname(&self, service: &str, namespace: &str) -> String {
        format!("{service}.{namespace}.svc.{}", self.domain)
    }

    /// It is the Service whose name it has, and not somebody's entry for the same host.
    fn is_kubernetes(&self, service: &Service) -> bool {
        *service.hostname == *self.hostname(&service.name, &service.namespace)
    }

    /// Where the name of `service` leads, both families, in the client's network. Empty: headless.
    fn addresses(&self, service: &Service) -> Vec<IpAddr> {
        let all = service.vips.iter().filter(|(network, _)| **network == *self.client.network);
        let hosts = all.filter(|(_, net)| net.prefix_len() == net.max_prefix_len()).map(|(_, net)| net.addr());
        match service.info.as_ref().filter(|info| !info.cluster_addresses.is_empty()) {
            Some(info) => hosts.filter(|ip| info.cluster_addresses.contains(ip)).collect(),
            None => hosts.collect(),
        }
    }

    fn of_service(&self, service: &Service, kind: Kind) -> Found {
        if kind == Kind::Srv && self.is_kubernetes(service) {
            return self.servers(service, None);
        }
        if !matches!(kind, Kind::A | Kind::Aaaa) {
            return Found::Unknown;
        }
        let addresses = self.addresses(service);
        if !addresses.is_empty() {
            let usable = addresses.into_iter().filter(|ip| service.ip_families.allow(*ip));
            return Found::of(of_family(usable, kind));
        }
        // Addresses that are all in other networks, or another kind of definition: nothing that we can say whole.
        if !service.vips.is_empty() || !self.is_kubernetes(service) {
            return Found::Unknown;
        }
        let endpoints: Vec<IpAddr> = self.endpoints(service).map(|(_, ip)| ip).collect();
        if endpoints.is_empty() { Found::Unknown } else { Found::of(of_family(endpoints.into_iter(), kind)) }
    }

    /// Endpoints that may be dialled, once for each address.
    fn endpoints<'s>(&'s self, service: &'s Service) -> impl Iterator<Item = (&'s Record, IpAddr)> {
        let usable =
            service.endpoints.all.iter().filter(|endpoint| {
                service.endpoints.admits(endpoint) && *endpoint.place().network == *self.client.network
            });
        usable.flat_map(|endpoint| {
            let addresses = endpoint.addresses().filter(|ip| service.ip_families.allow(*ip));
            addresses.map(move |ip| (&**endpoint, ip))
        })
    }

    /// `<endpoint>.<service>.<namespace>.svc`: a pod by its name below the Service, or by its address.
    fn of_endpoint(&self, endpoint: &str, service: &str, namespace: &str, kind: Kind) -> Option<Found> {
        if !matches!(kind, Kind::A | Kind::Aaaa) {
            return None;
        }
        let hostname = self.hostname(service, namespace);
        let service = self.snapshot.service_by_hostname(&hostname, self.client.namespace)?;
        if !self.is_kubernetes(service) {
            return None;
        }
        let named: Vec<IpAddr> = self
            .endpoints(service)
            .filter(|(found, ip)| endpoint_name(service, found, *ip) == endpoint)
            .map(|(_, ip)| ip)
            .collect();
        (!named.is_empty()).then(|| Found::of(of_family(named.into_iter(), kind)))
    }

    /// `_port._transport.<service>.<namespace>.svc`.
    fn of_port(&self, named: [&str; 2], service: &str, namespace: &str, kind: Kind) -> Option<Found> {
        let named = (named[0].strip_prefix('_')?, named[1].strip_prefix('_')?);
        let hostname = self.hostname(service, namespace);
        let service = self.snapshot.service_by_hostname(&hostname, self.client.namespace)?;
        (kind == Kind::Srv).then(|| self.servers(service, Some(named)))
    }

    /// `10-0-1-5.<namespace>.pod`. Only for pods that there are.
    fn of_pod(&self, name: &str, kind: Kind) -> Option<Found> {
        let labels = self.labels_below("pod", name)?;
        let [dashed, namespace] = labels.as_slice() else { return None };
        let ip = undashed(dashed)?;
        let pod = self.snapshot.workload_by_ip(self.client.network, ip)?;
        let asked = matches!(kind, Kind::A | Kind::Aaaa) && pod.is_pod() && *pod.namespace == **namespace;
        asked.then(|| Found::of(of_family(std::iter::once(ip), kind)))
    }

    /// Entries for `*.b.c`, the longest first. They are hosts outside, which have nothing but addresses here.
    fn of_wildcard(&self, name: &str, kind: Kind) -> Option<Found> {
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            let wildcard = format!("*.{parent}");
            if let Some(service) = self.snapshot.service_by_hostname(&wildcard, self.client.namespace) {
                return Some(self.of_service(service, kind));
            }
            rest = parent;
        }
        None
    }

    /// SRV records of the ports that are `named` (port, transport), or of all of them.
    fn servers(&self, service: &Service, named: Option<(&str, &str)>) -> Found {
        let Some(info) = service.info.as_ref().filter(|_| self.is_kubernetes(service)) else { return Found::Unknown };
        let mut ports = Vec::new();
        for port in &info.ports {
            let wanted =
                named.is_none_or(|(name, transport)| *port.name == *name && port.transport.as_str() == transport);
            if wanted {
                ports.push(port);
            }
        }
        let mut servers: Vec<(u16, String, IpAddr)> = Vec::new();
        let own = self.addresses(service);
        if !own.is_empty() {
            let each =
                ports.iter().flat_map(|port| own.iter().map(|ip| (port.number, service.hostname.to_string(), *ip)));
            servers.extend(each);
        } else if service.vips.is_empty() {
            // Endpoints of other transports are not known.
            if ports.iter().any(|port| port.transport != Transport::Tcp) {
                return Found::Unknown;
            }
            let key = service.key();
            for (endpoint, ip) in self.endpoints(service) {
                let target = format!("{}.{}", endpoint_name(service, endpoint, ip), service.hostname);
                let numbers = ports.iter().filter_map(|port| endpoint_port(service, endpoint, &key, port.number));
                servers.extend(numbers.map(|number| (number, target.clone(), ip)));
            }
        }
        if servers.is_empty() {
            return Found::Unknown;
        }
        records_of(servers)
    }

    /// The name of a Service's address, or of a pod that has a name below a Service.
    fn name_of(&self, ip: IpAddr) -> Found {
        let known = self.snapshot.service_by_vip(self.client.network, ip, self.client.namespace);
        if let Some(service) = known {
            let is_its_name = self.is_kubernetes(service) && self.addresses(service).contains(&ip);
            return if is_its_name {
                Found::of(vec![Data::Name(service.hostname.to_string())])
            } else {
                Found::Unknown
            };
        }
        let named = self.snapshot.workload_by_ip(self.client.network, ip).and_then(|workload| {
            let name = workload.dns_name.as_ref()?;
            let hostname = self.hostname(&name.subdomain, &workload.namespace);
            workload.services.contains_key(&format!("{}/{hostname}", workload.namespace)).then_some(())?;
            Some(format!("{}.{hostname}", name.hostname))
        });
        named.map_or(Found::Unknown, |name| Found::of(vec![Data::Name(name)]))
    }
}

fn of_family(addresses: impl Iterator<Item = IpAddr>, kind: Kind) -> Vec<Data> {
    let mut list: Vec<Data> = addresses.filter(|ip| ip.is_ipv4() == (kind == Kind::A)).map(Data::Address).collect();
    list.sort();
    list.dedup();
    list
}

/// CoreDNS's arithmetic: a hundred shared by all entries, rounded down; equal records once.
fn records_of(servers: Vec<(u16, String, IpAddr)>) -> Found {
    let weight = u16::try_from(100 / servers.len()).unwrap_or(1).max(1);
    let mut answers: Vec<Data> = Vec::new();
    let mut extra = Vec::new();
    for (port, target, ip) in servers {
        extra.push((target.clone(), ip));
        answers.push(Data::Server { weight, port, target });
    }
    answers.sort();
    answers.dedup();
    extra.sort();
    extra.dedup();
    Found::Records { answers, extra }
}

/// The label of an endpoint below its Service.
fn endpoint_name(service: &Service, endpoint: &Record, ip: IpAddr) -> String {
    let own = endpoint.dns_name();
    match own.filter(|(_, subdomain)| ***subdomain == *service.name && *endpoint.namespace() == service.namespace) {
        Some((hostname, _)) => hostname,
        None => ip.to_string().replace(['.', ':'], "-"),
    }
}

/// Where `workload` serves a port of the service; its own mapping comes first, then the service's.
fn endpoint_port(service: &Service, endpoint: &Record, key: &str, number: u16) -> Option<u16> {
    let of = |ports: &[Port]| ports.iter().find(|port| port.service_port == number).map(|p| p.target_port);
    let own = endpoint.services().get(key).and_then(of)?;
    Some(own).filter(|port| *port != 0).or_else(|| of(&service.ports).filter(|port| *port != 0))
}

/// `10-0-1-5` or `fd00--5`.
fn undashed(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse::<Ipv4Addr>().ok().map(IpAddr::V4);
    v4.or_else(|| label.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::V6))
}

/// The address in `5.1.0.10.in-addr.arpa` or in the 32 digits before `ip6.arpa`.
fn reversed(name: &str) -> Option<IpAddr> {
    if let Some(rest) = name.strip_suffix(".in-addr.arpa") {
        let mut octets: Vec<&str> = rest.split('.').collect();
        octets.reverse();
        return (octets.len() == 4).then(|| octets.join("."))?.parse::<Ipv4Addr>().ok().map(IpAddr::V4);
    }
    let digits: Vec<&str> = name.strip_suffix(".ip6.arpa")?.split('.').collect();
    if digits.len() != 32 || digits.iter().any(|digit| digit.len() != 1) {
        return None;
    }
    let number = u128::from_str_radix(&digits.iter().rev().copied().collect::<String>(), 16).ok()?;
    Some(IpAddr::V6(Ipv6Addr::from(number)).to_canonical())
}

#[cfg(test)]
mod tests;
