//! Reaching a host outside: the gateway's own resolution of its name, without addresses that are inside, and one
//! connection to one of what is left.
//!
//! The families are tried in turn, beginning with that of the tunnel, whose network is known to carry it. Everything is
//! bounded: addresses tried, the time for each and for all.

use std::hash::Hash;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::dns::own::{OwnResolver, Unresolved};
use crate::gateway::Gateway;
use crate::gateway::decide::{Asked, To, targets};
use crate::gateway::limits::Place;
use crate::gateway::originate::Originator;
use crate::http::{BoxIo, Framing};
use crate::outcome::{Code, Outcome};
use crate::policy::egress::{Grant, Spoken, may_dial};
use crate::state::Snapshot;

/// Addresses of one name that are tried.
const TRIED: usize = 6;
/// How long one address is waited for while there are others. A lost SYN is sent again after a second.
const SHORT: Duration = Duration::from_millis(2500);
/// How long all of them may take: what a client waits for one.
const LONGEST: Duration = Duration::from_secs(10);

/// Why a host was not reached.
pub(super) struct Failed {
    /// What happened.
    pub(super) outcome: Outcome,
    /// It is the host that failed, and any other gateway would fail alike.
    pub(super) beyond: bool,
}

impl From<Outcome> for Failed {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, beyond: false }
    }
}

/// A host that was reached.
pub(super) enum Server {
    /// As it is.
    Plain(TcpStream),
    /// In TLS that was added.
    Sealed(BoxIo),
}

impl Server {
    /// Either, as bytes.
    pub(super) fn into_io(self) -> BoxIo {
        match self {
            Self::Plain(tcp) => Box::new(tcp),
            Self::Sealed(io) => io,
        }
    }
}

impl Gateway {
    /// Reaches what `asked` asks for as `grant` says, and counts it in `place`. `framing`: the HTTP that will be spoken; `spoken`:
    /// what else the client speaks.
    ///
    /// A failure that settings of the rule may explain counts for these alone: others go to the host in another way.
    pub(super) async fn reach(
        &self,
        asked: &Asked,
        grant: &Grant,
        framing: Option<Framing>,
        spoken: Spoken<'_>,
        prefer_v6: bool,
        place: &Place,
    ) -> Result<(Server, SocketAddr), Failed> {
        let beyond = |outcome| Failed { outcome, beyond: true };
        let rule = grant.rule();
        let ruled = |outcome| Outcome { policy: Some(grant.policy.id.clone()), rule: Some(grant.rule), ..outcome };
        let way = place.by_rule(settings(grant)).map_err(ruled)?;
        let by_name = if own_choice(asked, grant) { None } else { Some(place.by_name()?) };
        // What this gateway lacks is said before anybody is asked anything.
        let sealed = match &rule.originate {
            None => None,
            Some(tls) => Some((tls, self.tls.prepare(tls, framing).await?)),
        };
        let (tcp, at) = match self.dialled(asked, grant, spoken, prefer_v6).await {
            Ok(reached) => reached,
            Err(failed) => {
                if failed.beyond {
                    by_name.unwrap_or(way).ended(false);
                }
                return Err(failed);
            }
        };
        if let Some(by_name) = by_name {
            by_name.ended(true);
        }
        let Some((tls, config)) = sealed else {
            way.ended(true);
            return Ok((Server::Plain(tcp), at));
        };
        let host = asked.name();
        let name = tls.server_name.as_deref().unwrap_or(&host);
        let late = |_| Outcome::new(Code::TlsFailed, format!("TLS with {name} was not finished in time"));
        let shaken = timeout(self.shared.hbone.handshake_timeout, Originator::handshake(config, tcp, name, framing));
        let shaken = shaken.await.map_err(late).flatten();
        way.ended(shaken.is_ok());
        Ok((Server::Sealed(Box::new(shaken.map_err(beyond)?)), at))
    }

    /// Resolves what `asked` asks for as `grant` says, and connects to it.
    async fn dialled(
        &self,
        asked: &Asked,
        grant: &Grant,
        spoken: Spoken<'_>,
        prefer_v6: bool,
    ) -> Result<(TcpStream, SocketAddr), Failed> {
        let mut found = Vec::new();
        for to in targets(asked, grant) {
            match to {
                To::Address(at) => found.push(at),
                To::Name(host, port) => {
                    let ips = resolve(&self.names, &host, prefer_v6).await;
                    let ips = ips.map_err(|outcome| Failed { outcome, beyond: true })?;
                    found.extend(ips.into_iter().map(|ip| SocketAddr::new(ip, port)));
                }
            }
        }
        let addresses = outside(&self.shared.reader.load(), &self.shared.network, &asked.name(), found, grant)?;
        let reached = self.connect(asked, &addresses, (grant, spoken), self.shared.hbone.connect_timeout).await;
        // What a rule wants proven says nothing of the host for others.
        reached
            .map_err(|outcome| Failed { beyond: !matches!(outcome.code, Code::EgressDenied | Code::Overflow), outcome })
    }

    /// Connects to the first of `addresses` that takes it, and proves what the grant wants proven.
    ///
    /// # Errors
    /// How the last one failed.
    async fn connect(
        &self,
        asked: &Asked,
        addresses: &[SocketAddr],
        (grant, spoken): (&Grant, Spoken<'_>),
        patience: Duration,
    ) -> Result<(TcpStream, SocketAddr), Outcome> {
        let end = Instant::now() + LONGEST;
        let mut last =
            Outcome::new(Code::NoEndpoint, "the host has no address of a family that this gateway leaves by");
        let from = &self.from;
        let usable = |to: &&SocketAddr| from.is_empty() || from.iter().any(|ip| ip.is_ipv6() == to.is_ipv6());
        let tried: Vec<&SocketAddr> = addresses.iter().filter(usable).take(TRIED).collect();
        for (index, to) in tried.iter().enumerate() {
            let left = || end.saturating_duration_since(Instant::now());
            let late = || Outcome::new(Code::ConnectTimeout, format!("{to} did not answer"));
            let proven =
                timeout(left(), self.proofs.check(asked.identity.namespace(), (grant, &spoken), **to, self.dial(**to)))
                    .await;
            if let Err(outcome) = proven.unwrap_or_else(|_| Err(late())) {
                last = outcome;
                continue;
            }
            let patience = if index + 1 < tried.len() { patience.min(SHORT) } else { patience }.min(left());
            match timeout(patience, self.dial(**to)).await {
                Ok(Ok(tcp)) => return Ok((tcp, **to)),
                Ok(Err(error)) => last = Outcome::new(Code::ConnectFailed, format!("{to}: {error}")),
                Err(_) => last = late(),
            }
        }
        Err(last)
    }

    /// Connects to `to` from the address that this gateway leaves by; if it has none of that family: as the system chooses.
    async fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        match self.from.iter().find(|ip| ip.is_ipv6() == to.is_ipv6()) {
            Some(own) => self.pod.sockets.connect_as(*own, to).await,
            None => self.pod.sockets.connect(to).await,
        }
    }
}

/// What of a rule may decide whether a host is reached.
fn settings(grant: &Grant) -> impl Hash {
    let rule = grant.rule();
    (&rule.originate, &rule.proof, &rule.endpoints, grant.target)
}

/// Whether the rule says where the host is, or what it has to prove before it counts as connected: others who ask for the host
/// may find it where this rule does not.
fn own_choice(asked: &Asked, grant: &Grant) -> bool {
    let rule = grant.rule();
    !rule.endpoints.is_empty() || rule.proof.is_some() || grant.target != asked.port
}

/// Looks `host` up.
///
/// # Errors
/// `NoEndpoint` if it has no address.
async fn resolve(names: &OwnResolver, host: &str, first_v6: bool) -> Result<Vec<IpAddr>, Outcome> {
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

/// Those of `addresses` that the rule of `grant` lets be dialled for `host`. Pure.
///
/// # Errors
/// `EgressDenied` if there is none, which says why the first one may not.
fn outside(
    snapshot: &Snapshot,
    network: &str,
    host: &str,
    addresses: impl IntoIterator<Item = SocketAddr>,
    grant: &Grant,
) -> Result<Vec<SocketAddr>, Outcome> {
    let (mut left, mut refused) = (Vec::new(), None);
    for at in addresses {
        match may_dial(snapshot, network, grant.rule(), at.ip()) {
            Ok(()) => left.push(at),
            Err(why) => drop(refused.get_or_insert(why)),
        }
    }
    match refused {
        Some(why) if left.is_empty() => {
            let mut outcome =
                Outcome::new(Code::EgressDenied, format!("{host} leads nowhere that may be dialled: {why}"));
            (outcome.policy, outcome.rule) = (Some(grant.policy.id.clone()), Some(grant.rule));
            Err(outcome)
        }
        _ => Ok(left),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use super::outside;
    use crate::outcome::Code;
    use crate::policy::egress::Grant;
    use crate::state::fixtures::snapshot;
    use crate::state::{EgressPolicy, EgressRule};

    #[test]
    fn a_name_that_leads_inside_is_dialled_only_where_the_rule_names_the_address() {
        let snapshot = snapshot([]);
        let at = |list: &[&str]| list.iter().map(|at| at.parse::<SocketAddr>().unwrap()).collect::<Vec<_>>();
        let rule = EgressRule { cidrs: vec!["10.1.0.0/16".parse().unwrap()], ..EgressRule::default() };
        let mut policy = EgressPolicy::allows_nothing(&"EgressPolicy/shop/api".into(), &"1".into(), false, "");
        (policy.rules, policy.unreadable) = (vec![rule], None);
        let grant = Grant { policy: Arc::new(policy), rule: 0, target: 443 };
        for (addresses, expected) in [
            (&["203.0.113.1:443"][..], Ok(&["203.0.113.1:443"][..])),
            (&["203.0.113.1:443", "169.254.169.254:443"], Ok(&["203.0.113.1:443"])),
            (&["10.1.2.3:443"], Ok(&["10.1.2.3:443"])),
            (&["10.2.2.3:443"], Err(Code::EgressDenied)),
            (&["[::ffff:169.254.169.254]:443"], Err(Code::EgressDenied)),
        ] {
            let found = outside(&snapshot, "", "api.example.com", at(addresses), &grant);
            assert_eq!(found.map_err(|outcome| outcome.code), expected.map(at), "{addresses:?}");
        }
    }
}
