//! Proof that a pod is captured: connections and datagrams that only the rules can bring to the proxy.
//!
//! Outbound: from inside the pod, to an address nobody has, with a hop limit of one so that a packet that is not
//! redirected dies at the first router; to port 53 too, over UDP and TCP, where names are answered here. Inbound: from the proxy's own namespace to a port of the pod that nobody
//! listens on; where the proxy has no route to the pod, the kernel's copy of the rules is read instead, if they are ours.
//! The listeners answer a probe with [`TOKEN`].

use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

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
/// Port of name servers.
pub const PORT_NAMES: u16 = 53;

/// How long a redirected connection, which never leaves the machine, may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How soon a datagram is sent again: one may meet a full queue, or a predecessor that does not know it.
const AGAIN: Duration = Duration::from_millis(100);

/// Whether an outbound connection or datagram is our own probe.
pub fn is_outbound_probe(destination: SocketAddr) -> bool {
    matches!(destination.port(), PORT | PORT_NAMES)
        && (destination.ip() == IpAddr::V4(OUTBOUND_V4) || destination.ip() == IpAddr::V6(OUTBOUND_V6))
}

/// What must be proven of a pod.
#[derive(Clone, Copy, Debug)]
pub struct Claims<'a> {
    /// Its addresses.
    pub addresses: &'a [IpAddr],
    /// Where names are answered in it; nothing: they are not redirected.
    pub names: &'a [SocketAddr],
    /// The rules are somebody else's, in words of theirs, and may leave names alone.
    pub by_agent: bool,
}

/// Proves that connections of the pod arrive at the proxy, and its questions for names.
///
/// # Errors
/// Which direction and family is not redirected, and what was seen instead.
pub async fn verify(netns: &Netns, claims: Claims<'_>) -> Result<(), String> {
    let Claims { addresses, names, by_agent } = claims;
    let probes = [IpAddr::V4(OUTBOUND_V4), IpAddr::V6(OUTBOUND_V6)].into_iter();
    let targets: Vec<(IpAddr, Option<u16>)> = probes
        .filter(|probe| addresses.iter().any(|ip| ip.is_ipv4() == probe.is_ipv4()))
        .map(|probe| {
            let here = names.iter().find(|at| !by_agent && at.is_ipv4() == probe.is_ipv4());
            (probe, here.map(SocketAddr::port))
        })
        .collect();
    run_blocking(netns, move || outbound(&targets)).await.map_err(|error| error.to_string())?;
    for address in addresses {
        let to = SocketAddr::new(*address, PORT);
        let (reply, answer) = tokio::sync::oneshot::channel();
        std::thread::Builder::new()
            .name("probe".into())
            .spawn(move || {
                let _ = reply.send(ask(to, Far::AsFarAsItGoes));
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

/// How far a probe may go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Far {
    OneHop,
    AsFarAsItGoes,
}

/// From inside the pod: to each address, and to its port 53 where names are answered at a port of ours.
fn outbound(targets: &[(IpAddr, Option<u16>)]) -> io::Result<()> {
    let failed = |what: &str, port: u16, error: &io::Error| {
        io::Error::other(format!("{what} was not redirected to port {port}: {error}"))
    };
    for (target, names) in targets {
        ask(SocketAddr::new(*target, PORT), Far::OneHop)
            .map_err(|error| failed("an outbound probe", PORT_OUTBOUND, &error))?;
        let Some(port) = names else { continue };
        let to = SocketAddr::new(*target, PORT_NAMES);
        ask_by_datagram(to).map_err(|error| failed("a datagram to port 53", *port, &error))?;
        ask(to, Far::OneHop).map_err(|error| failed("a connection to port 53", *port, &error))?;
    }
    Ok(())
}

/// Sends the token and expects it back.
fn ask_by_datagram(to: SocketAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    one_hop(&socket, to)?;
    socket.connect(&to.into())?;
    socket.set_read_timeout(Some(AGAIN))?;
    let until = Instant::now() + PATIENCE;
    let mut answer = [0; TOKEN.len() + 1];
    loop {
        // What refuses it now may be gone in a moment, as the listener of a predecessor.
        let received = socket.send(TOKEN).and_then(|_| (&socket).read(&mut answer));
        match received {
            Ok(length) if answer[..length] == *TOKEN => return Ok(()),
            Ok(_) => return Err(io::Error::other("something else answered")),
            Err(error) if Instant::now() < until => std::thread::sleep(match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Duration::ZERO,
                _ => AGAIN,
            }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error),
        }
    }
}

fn one_hop(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    if to.is_ipv6() { socket.set_unicast_hops_v6(1) } else { socket.set_ttl_v4(1) }
}

/// Connects and expects the token.
fn ask(to: SocketAddr, far: Far) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    if far == Far::OneHop {
        one_hop(&socket, to)?;
    }
    socket.connect_timeout(&to.into(), PATIENCE)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = vec![0; TOKEN.len()];
    stream.read_exact(&mut answer)?;
    if answer == TOKEN { Ok(()) } else { Err(io::Error::other("something else answered")) }
}
