//! Sockets of one pod: made in its namespace, marked as ours, with every option set before use.
//!
//! A few connected-to-be sockets a family are kept ready ([`STASH`]), so that a new connection does not wait for the
//! namespace thread. A burst of one pod waits for itself, not in front of the others ([`TURNS`]). Options that listeners
//! pass on to accepted sockets are set on the listener, once.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use crate::base::canonical;
use crate::base::conntrack::Conntrack;
use crate::base::netns::{Netns, NetnsThread};
use crate::base::outlet::Outlet;

/// Sockets kept ready for each pod and family. Enough for a burst of connections within one round trip to the
/// namespace thread; 16 idle sockets are some 32 KB of kernel memory a pod.
const STASH: usize = 8;

/// Requests of one pod that the namespace thread may have at a time: some 600 µs, which is what a neighbour waits at most.
const TURNS: usize = 4;

/// Connections waiting to be accepted. The kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Questions of a pod that may wait to be read, in bytes as the kernel counts: some 3,000, which is what a busy pod asks
/// while its worker is away for a moment. A question that finds no room is lost, and asked again after seconds.
const DATAGRAMS_WAITING: usize = 1 << 20;

/// What every socket gets.
#[derive(Clone, Debug)]
pub struct Options {
    /// SO_MARK, so that the capture rules let it pass. 0: none, which needs no privilege.
    pub mark: u32,
    /// TCP keepalive: idle time, interval and number of probes.
    pub keepalive: Option<(Duration, Duration, u32)>,
    /// TCP_USER_TIMEOUT. None: the system's default.
    pub user_timeout: Option<Duration>,
    /// SO_REUSEPORT on listeners, so that a successor can listen beside us.
    pub reuse_port: bool,
}

impl Options {
    fn mark(&self, socket: &Socket) -> io::Result<()> {
        if self.mark == 0 { Ok(()) } else { socket.set_mark(self.mark) }
    }

    fn apply(&self, socket: &Socket) -> io::Result<()> {
        self.mark(socket)?;
        socket.set_tcp_nodelay(true)?;
        if let Some((time, interval, retries)) = self.keepalive {
            let keepalive = TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(retries);
            socket.set_tcp_keepalive(&keepalive)?;
        }
        if self.user_timeout.is_some() {
            socket.set_tcp_user_timeout(self.user_timeout)?;
        }
        Ok(())
    }
}

/// Another TCP keepalive than what every socket gets; what is absent stays. Whole seconds, for that is what systems take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Keepalive {
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Between probes.
    pub interval: Option<Duration>,
    /// Probes without an answer that end the connection.
    pub probes: Option<u32>,
}

impl Keepalive {
    /// Sets it on a connection.
    ///
    /// # Errors
    /// What the system says.
    pub fn set(&self, tcp: &TcpStream) -> io::Result<()> {
        let mut keepalive = TcpKeepalive::new();
        if let Some(time) = self.time {
            keepalive = keepalive.with_time(time);
        }
        if let Some(interval) = self.interval {
            keepalive = keepalive.with_interval(interval);
        }
        if let Some(probes) = self.probes {
            keepalive = keepalive.with_retries(probes);
        }
        SockRef::from(tcp).set_tcp_keepalive(&keepalive)
    }
}

/// Opens the sockets of one pod.
#[derive(Debug)]
pub struct PodSockets {
    netns: Netns,
    thread: NetnsThread,
    options: Options,
    /// IPv4 and IPv6.
    stash: [Mutex<Vec<Socket>>; 2],
    /// Who waits here is a connection, and those have a budget.
    turns: Semaphore,
    /// What lets connections out of the namespace.
    outlet: Option<Outlet>,
}

impl PodSockets {
    /// Sockets in `netns`.
    pub fn new(netns: Netns, thread: NetnsThread, options: Options) -> Self {
        let stash = [Mutex::default(), Mutex::default()];
        Self { netns, thread, options, stash, turns: Semaphore::new(TURNS), outlet: None }
    }

    /// The same sockets, whose connections to others wait until they pass.
    pub fn behind(self, outlet: Outlet) -> Self {
        Self { outlet: Some(outlet), ..self }
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// A socket to connect to `to`'s family with.
    async fn socket(&self, v6: bool) -> io::Result<Socket> {
        let stash = &self.stash[usize::from(v6)];
        let ready = || stash.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(socket) = ready() {
            return Ok(socket);
        }
        let _turn = self.turns.acquire().await.map_err(io::Error::other)?;
        // Whoever had the turn before has left some.
        if let Some(socket) = ready() {
            return Ok(socket);
        }
        let options = self.options.clone();
        let mut made = self
            .thread
            .run(&self.netns, move || (0..STASH).map(|_| new_socket(v6, &options)).collect::<io::Result<Vec<_>>>())
            .await?;
        let socket = made.pop().ok_or_else(|| io::Error::other("no socket was made"))?;
        let mut stash = stash.lock().unwrap_or_else(PoisonError::into_inner);
        // Others may have filled it meanwhile.
        let room = STASH.saturating_sub(stash.len());
        stash.extend(made.into_iter().take(room));
        Ok(socket)
    }

    /// Connects to `to` from the pod's own address.
    ///
    /// # Errors
    /// What the system says.
    pub async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket(to.is_ipv6()).await?;
        finish_connect(socket, to).await
    }

    /// The same to another pod, once that passes what is around this one, and with another keepalive where one is given.
    ///
    /// # Errors
    /// What the system says.
    pub async fn connect_out(&self, to: SocketAddr, keepalive: Option<Keepalive>) -> io::Result<TcpStream> {
        if let Some(outlet) = &self.outlet {
            outlet.wait(to).await;
        }
        let tcp = self.connect(to).await?;
        keepalive.map_or(Ok(()), |keepalive| keepalive.set(&tcp))?;
        Ok(tcp)
    }

    /// Connects to `to` with the source address `from`, which may belong to somebody else (IP_TRANSPARENT): the
    /// application sees its real client. The port is chosen by the system.
    ///
    /// # Errors
    /// What the system says; `PermissionDenied` without CAP_NET_ADMIN.
    pub async fn connect_from(&self, from: std::net::IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket(to.is_ipv6()).await?;
        if from.is_ipv6() == to.is_ipv6() {
            if to.is_ipv6() {
                socket.set_ip_transparent_v6(true)?;
            } else {
                socket.set_ip_transparent_v4(true)?;
            }
            socket.bind(&SocketAddr::new(from, 0).into())?;
        }
        finish_connect(socket, to).await
    }

    /// Connects to `to` from one of the own addresses. The port is chosen by the system.
    ///
    /// # Errors
    /// What the system says; `AddrNotAvailable` if `from` is nobody's here.
    pub async fn connect_as(&self, from: std::net::IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket(to.is_ipv6()).await?;
        socket.bind(&SocketAddr::new(from, 0).into())?;
        finish_connect(socket, to).await
    }

    /// A listener on all addresses, both families where the system has IPv6.
    ///
    /// # Errors
    /// What the system says; `AddrInUse` if something else in the pod has the port.
    pub async fn listen(&self, port: u16) -> io::Result<std::net::TcpListener> {
        let options = self.options.clone();
        self.thread.run(&self.netns, move || new_listener(port, &options)).await
    }

    /// Gives a listener that another process opened here the options of ours.
    ///
    /// # Errors
    /// What the system says.
    pub fn adopt(&self, listener: &std::net::TcpListener) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        self.options.apply(&SockRef::from(listener))
    }

    /// The pod's tracking table.
    ///
    /// # Errors
    /// What the system says.
    pub async fn conntrack(&self) -> io::Result<Conntrack> {
        self.thread.run(&self.netns, Conntrack::open).await
    }
}

impl PodSockets {
    /// A datagram socket that speaks to `to` only: the kernel drops what others send it, and chooses a random port.
    ///
    /// # Errors
    /// What the system says.
    pub async fn datagrams(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let options = self.options.clone();
        let _turn = self.turns.acquire().await.map_err(io::Error::other)?;
        let make = move || {
            let domain = if to.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
            let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
            socket.set_nonblocking(true)?;
            options.mark(&socket)?;
            socket.connect(&to.into())?;
            Ok(std::net::UdpSocket::from(socket))
        };
        UdpSocket::from_std(self.thread.run(&self.netns, make).await?)
    }

    /// Sockets for datagrams and streams at each of `addresses`, and the tracking table behind them. An IPv6 address
    /// that the pod does not have is left out.
    ///
    /// # Errors
    /// What the system says; `AddrInUse` if something else in the pod has the port.
    pub async fn listen_local(&self, addresses: Vec<SocketAddr>) -> io::Result<LocalSockets> {
        let options = self.options.clone();
        let make = move || {
            let mut sockets =
                LocalSockets { datagrams: Vec::new(), streams: Vec::new(), conntrack: Conntrack::open()? };
            for address in addresses {
                let pair = new_datagrams(address, &options).and_then(|udp| {
                    let domain = if address.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
                    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
                    Ok((udp, bind_listener(socket, address, &options)?))
                });
                match pair {
                    Ok((udp, tcp)) => {
                        sockets.datagrams.push(udp);
                        sockets.streams.push(tcp);
                    }
                    Err(error) if address.is_ipv6() && no_such_address(&error) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(sockets)
        };
        self.thread.run(&self.netns, make).await
    }
}

/// What [`PodSockets::listen_local`] opened.
#[derive(Debug)]
pub struct LocalSockets {
    /// One for each address.
    pub datagrams: Vec<std::net::UdpSocket>,
    /// The same for streams.
    pub streams: Vec<std::net::TcpListener>,
    /// Tells where redirected datagrams were going.
    pub conntrack: Conntrack,
}

fn no_such_address(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn new_datagrams(address: SocketAddr, options: &Options) -> io::Result<std::net::UdpSocket> {
    let domain = if address.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if options.reuse_port {
        socket.set_reuse_port(true)?;
    }
    // Without the privilege the usual size does; a burst then costs some clients a second question.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &DATAGRAMS_WAITING);
    // Not marked: an answer to a client whose own port is 53 must not be taken for a question of ours.
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn new_socket(v6: bool, options: &Options) -> io::Result<Socket> {
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    options.apply(&socket)?;
    // Without it a bound socket takes a port for all destinations at once, and one client has 28,000 connections at most.
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true).map_err(io::Error::from)?;
    Ok(socket)
}

fn new_listener(port: u16, options: &Options) -> io::Result<std::net::TcpListener> {
    let v6 = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).and_then(|socket| {
        socket.set_only_v6(false)?;
        bind_listener(socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), options)
    });
    match v6 {
        Err(error) if no_such_address(&error) => {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            bind_listener(socket, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), options)
        }
        other => other,
    }
}

fn bind_listener(socket: Socket, addr: SocketAddr, options: &Options) -> io::Result<std::net::TcpListener> {
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    if options.reuse_port {
        socket.set_reuse_port(true)?;
    }
    options.apply(&socket)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

async fn finish_connect(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    let stream = match socket.connect(&to.into()) {
        Ok(()) => return TcpStream::from_std(socket.into()),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => TcpStream::from_std(socket.into())?,
        Err(error) => return Err(error),
    };
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

/// Where the client of a redirected connection wanted to go.
///
/// # Errors
/// If the connection was not redirected.
pub fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let v4 = canonical(stream.local_addr()?).is_ipv4();
    let addr = if v4 { socket.original_dst_v4() } else { socket.original_dst_v6() }?;
    addr.as_socket().map(canonical).ok_or_else(|| io::Error::other("the original destination is not an address"))
}

/// Closes `stream` with a reset, so that the other side learns that bytes may be missing.
pub fn reset(stream: TcpStream) {
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    debug_assert!(stream.as_raw_fd() >= 0);
    drop(stream);
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::{Options, PodSockets};
    use crate::base::netns::{Netns, NetnsThread};

    #[tokio::test]
    async fn a_burst_of_one_pod_leaves_room_for_the_others() {
        let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        let thread = NetnsThread::start().unwrap();
        let options = Options { mark: 0, keepalive: None, user_timeout: None, reuse_port: false };
        let pod = || Arc::new(PodSockets::new(netns.clone(), thread.clone(), options.clone()));
        let (busy, quiet) = (pod(), pod());
        // The thread is held up, so that everything that is asked for now stands in its queue.
        let (go, wait) = channel::<()>();
        let held = tokio::spawn({
            let (thread, netns) = (thread.clone(), netns.clone());
            async move { thread.run(&netns, move || wait.recv().map_err(std::io::Error::other)).await }
        });
        tokio::task::yield_now().await;
        let mut burst = tokio::task::JoinSet::new();
        for _ in 0..5000 {
            let busy = busy.clone();
            burst.spawn(async move { busy.socket(false).await.map(drop) });
        }
        tokio::task::yield_now().await;
        let neighbour = tokio::spawn(async move { quiet.socket(false).await.map(drop) });
        tokio::task::yield_now().await;
        go.send(()).unwrap();
        held.await.unwrap().unwrap();
        let neighbour = tokio::time::timeout(Duration::from_secs(10), neighbour).await.unwrap().unwrap();
        assert!(neighbour.is_ok(), "the burst took the whole queue: {neighbour:?}");
        while let Some(done) = burst.join_next().await {
            done.unwrap().unwrap();
        }
    }
    #[tokio::test]
    async fn what_a_listener_accepts_is_probed_for_life() {
        let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        let probes = (Duration::from_secs(7), Duration::from_secs(3), 2);
        let options = Options { mark: 0, keepalive: Some(probes), user_timeout: None, reuse_port: false };
        let pod = PodSockets::new(netns, NetnsThread::start().unwrap(), options);
        let listener = pod.listen(0).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // Whoever connects and then says nothing at all, before TLS and HTTP/2 could ask whether it is there.
        let _silent = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let accepted = socket2::SockRef::from(&accepted);
        assert!(accepted.keepalive().unwrap());
        let found = (
            accepted.tcp_keepalive_time().unwrap(),
            accepted.tcp_keepalive_interval().unwrap(),
            accepted.tcp_keepalive_retries().unwrap(),
        );
        assert_eq!(found, probes);
    }
}
