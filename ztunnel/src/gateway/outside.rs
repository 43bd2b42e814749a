//! Reaching a host outside: the gateway's own resolution of its name, without addresses that are inside, and one
//! connection to one of what is left.
//!
//! The families are tried in turn, beginning with that of the tunnel, whose network is known to carry it. Everything is
//! bounded: addresses tried, the time for each and for all.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::base::sockets::PodSockets;
use crate::dns::own::{OwnResolver, Unresolved};
use crate::outcome::{Code, Outcome};
use crate::policy::inside::inside;
use crate::state::Snapshot;

/// Addresses of one name that are tried.
const TRIED: usize = 6;
/// How long one address is waited for while there are others. A lost SYN is sent again after a second.
const SHORT: Duration = Duration::from_millis(2500);
/// How long all of them may take: what a client waits for one.
const LONGEST: Duration = Duration::from_secs(10);

/// Looks `host` up.
///
/// # Errors
/// `NoEndpoint` if it has no address.
pub async fn resolve(names: &OwnResolver, host: &str, first_v6: bool) -> Result<Vec<IpAddr>, Outcome> {
    let (one, two) = tokio::join!(names.addresses(host, first_v6), names.addresses(host, !first_v6));
    let unresolved = match (&one, &two) {
        // A name that has the other family only is a usual one.
        (Err(Unresolved::NoAddress), Err(other)) | (Err(other), _) => Some(other.clone()),
        _ => None,
    };
    let (mut one, mut two) = (one.unwrap_or_default().into_iter(), two.unwrap_or_default().into_iter());
    let mut all = Vec::new();
    loop {
        match (one.next(), two.next()) {
            (None, None) => break,
            (first, second) => all.extend(first.into_iter().chain(second)),
        }
    }
    match (all.is_empty(), unresolved) {
        (true, Some(why)) => Err(Outcome::new(Code::NoEndpoint, format!("{host}: {why}"))),
        (true, None) => Err(Outcome::new(Code::NoEndpoint, format!("{host}: {}", Unresolved::NoAddress))),
        _ => Ok(all),
    }
}

/// Those of `addresses` that may be dialled for a name: of the Internet, or named by the rule itself. Pure.
///
/// # Errors
/// `EgressDenied` if there is none, which says what the first one is.
pub fn outside(
    snapshot: &Snapshot,
    network: &str,
    host: &str,
    addresses: Vec<IpAddr>,
    named: &[IpNet],
) -> Result<Vec<IpAddr>, Outcome> {
    let mut refused = None;
    let left: Vec<IpAddr> = addresses
        .into_iter()
        .filter(|ip| {
            let why = inside(snapshot, network, *ip).filter(|_| !named.iter().any(|net| net.contains(ip)));
            if let Some(why) = why {
                refused.get_or_insert((*ip, why));
            }
            why.is_none()
        })
        .collect();
    match refused {
        Some((ip, why)) if left.is_empty() => {
            let text = format!(
                "{host} leads to {ip}, {why}, and a name may lead to the Internet only; name the address in the rule's \
                 cidrs if it is meant"
            );
            Err(Outcome::new(Code::EgressDenied, text))
        }
        _ => Ok(left),
    }
}

/// Connects to the first of `addresses` that takes it, from `from`, of which there is at most one of a family; none: as the
/// system chooses.
///
/// # Errors
/// How the last one failed.
pub async fn connect(
    sockets: &PodSockets,
    addresses: &[SocketAddr],
    from: &[IpAddr],
    patience: Duration,
) -> Result<(TcpStream, SocketAddr), Outcome> {
    let end = Instant::now() + LONGEST;
    let mut last = Outcome::new(Code::NoEndpoint, "the host has no address of a family that this gateway leaves by");
    let usable = |to: &&SocketAddr| from.is_empty() || from.iter().any(|ip| ip.is_ipv6() == to.is_ipv6());
    let tried: Vec<&SocketAddr> = addresses.iter().filter(usable).take(TRIED).collect();
    for (index, to) in tried.iter().enumerate() {
        let left = end.saturating_duration_since(Instant::now());
        let patience = if index + 1 < tried.len() { patience.min(SHORT) } else { patience }.min(left);
        let own = from.iter().find(|ip| ip.is_ipv6() == to.is_ipv6());
        let dial = async {
            match own {
                Some(own) => sockets.connect_as(*own, **to).await,
                None => sockets.connect(**to).await,
            }
        };
        match timeout(patience, dial).await {
            Ok(Ok(tcp)) => return Ok((tcp, **to)),
            Ok(Err(error)) => last = Outcome::new(Code::ConnectFailed, format!("{to}: {error}")),
            Err(_) => last = Outcome::new(Code::ConnectTimeout, format!("{to} did not answer")),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::outside;
    use crate::outcome::Code;
    use crate::state::fixtures::snapshot;

    #[test]
    fn a_name_that_leads_inside_is_dialled_only_where_the_rule_names_the_address() {
        let snapshot = snapshot([]);
        let ips = |list: &[&str]| list.iter().map(|ip| ip.parse::<IpAddr>().unwrap()).collect::<Vec<_>>();
        let named = ["10.1.0.0/16".parse().unwrap()];
        for (addresses, expected) in [
            (&["203.0.113.1"][..], Ok(&["203.0.113.1"][..])),
            (&["203.0.113.1", "169.254.169.254"], Ok(&["203.0.113.1"])),
            (&["10.1.2.3"], Ok(&["10.1.2.3"])),
            (&["10.2.2.3"], Err(Code::EgressDenied)),
            (&["::ffff:169.254.169.254"], Err(Code::EgressDenied)),
        ] {
            let found = outside(&snapshot, "", "api.example.com", ips(addresses), &named);
            assert_eq!(found.map_err(|outcome| outcome.code), expected.map(ips), "{addresses:?}");
        }
    }
}
