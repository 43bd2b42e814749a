//! Proof that a pod is captured: connections that only the rules can bring to the proxy.
//!
//! Outbound: from inside the pod, to an address nobody has, with a hop limit of one so that a packet that is not
//! redirected dies at the first router. Inbound: from the proxy's own namespace to a port of the pod that nobody
//! listens on; where the proxy has no route to the pod, the kernel's copy of the rules is read instead, if they are ours.
//! The listeners answer a probe with [`TOKEN`].

use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tulle_proto::names::{PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND};

use crate::base::netns::{Netns, run_blocking};
use crate::capture::installed;

/// What a listener answers.
pub const TOKEN: &[u8] = b"tulle-captured";
/// Destination of outbound probes: link-local, next to the probe address, used by nobody.
pub const OUTBOUND_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 126);
/// The same for IPv6.
pub const OUTBOUND_V6: Ipv6Addr = Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xfffe);
/// Port of probes in both directions.
pub const PORT: u16 = 15_009;

/// How long a redirected connection, which never leaves the machine, may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether an outbound connection is our own probe.
pub fn is_outbound_probe(destination: SocketAddr) -> bool {
    destination.port() == PORT
        && (destination.ip() == IpAddr::V4(OUTBOUND_V4) || destination.ip() == IpAddr::V6(OUTBOUND_V6))
}

/// Proves that connections of the pod arrive at the proxy. `by_agent`: the rules are somebody else's, in words of theirs.
///
/// # Errors
/// Which direction and family is not redirected, and what was seen instead.
pub async fn verify(netns: &Netns, addresses: &[IpAddr], by_agent: bool) -> Result<(), String> {
    let families: Vec<IpAddr> = [IpAddr::V4(OUTBOUND_V4), IpAddr::V6(OUTBOUND_V6)]
        .into_iter()
        .filter(|probe| addresses.iter().any(|ip| ip.is_ipv4() == probe.is_ipv4()))
        .collect();
    for target in families {
        let to = SocketAddr::new(target, PORT);
        run_blocking(netns, move || ask(to, Some(1)))
            .await
            .map_err(|error| format!("an outbound probe was not redirected to port {PORT_OUTBOUND}: {error}"))?;
    }
    for address in addresses {
        let to = SocketAddr::new(*address, PORT);
        let (reply, answer) = tokio::sync::oneshot::channel();
        std::thread::Builder::new()
            .name("probe".into())
            .spawn(move || {
                let _ = reply.send(ask(to, None));
            })
            .map_err(|error| format!("no thread for a probe: {error}"))?;
        let Err(error) = answer.await.unwrap_or_else(|_| Err(io::Error::other("the probe was lost"))) else { continue };
        if by_agent {
            return Err(format!(
                "an inbound probe of {address} was not redirected to port {PORT_INBOUND_PLAINTEXT}: {error}"
            ));
        }
        // No route from here to the pod: what remains is to read the rules back.
        let rules = installed(netns).await.map_err(|error| error.to_string())?;
        if !rules.contains(&format!("redirect to :{PORT_INBOUND_PLAINTEXT}")) {
            return Err(format!(
                "an inbound probe of {address} was not redirected ({error}), nor is there a rule for it"
            ));
        }
    }
    Ok(())
}

/// Connects and expects the token.
fn ask(to: SocketAddr, hops: Option<u32>) -> io::Result<()> {
    let domain = if to.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if let Some(hops) = hops {
        if to.is_ipv6() { socket.set_unicast_hops_v6(hops)? } else { socket.set_ttl_v4(hops)? }
    }
    socket.connect_timeout(&to.into(), PATIENCE)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = vec![0; TOKEN.len()];
    stream.read_exact(&mut answer)?;
    if answer == TOKEN { Ok(()) } else { Err(io::Error::other("something else answered")) }
}
