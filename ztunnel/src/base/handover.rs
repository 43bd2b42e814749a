//! Passing open sockets from one process to its successor: a unix socket of packets, with descriptors beside the bytes.
//!
//! A listening socket that is closed takes the connections in its queue with it, also where another one listens beside
//! it (SO_REUSEPORT). Passed as a descriptor it is never closed. Both sides must be the same user: whoever connects
//! gets sockets, and whoever answers is believed. Blocking, for a thread of its own; every call has a time limit, and a
//! packet has at most [`LARGEST`] bytes and [`MOST_FDS`] descriptors.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use socket2::{SockAddr, Socket};

use crate::base::packets::{self, MOST_FDS};

/// Largest packet, bytes. The kernel's own limit for this kind of socket is about 200 KB.
pub const LARGEST: usize = 128 * 1024;

/// How long the other side may take for one packet.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Where successors ask.
#[derive(Debug)]
pub struct Desk(Socket);

/// One conversation.
#[derive(Debug)]
pub struct Channel(Socket);

impl Desk {
    /// Listens at `path`, in the place of whoever listened there before.
    ///
    /// # Errors
    /// What the system says; the path is longer than 107 bytes, or its directory cannot be written.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let _ = fs::remove_file(&fresh);
        let socket = packets::socket()?;
        socket.bind(&SockAddr::unix(&fresh)?)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
        socket.listen(1)?;
        // From here on successors find us, and not the one before.
        fs::rename(&fresh, path)?;
        Ok(Self(socket))
    }

    /// Waits for the next successor.
    ///
    /// # Errors
    /// What the system says, or that it is another user's process.
    pub fn accept(&self) -> io::Result<Channel> {
        Channel::new(self.0.accept()?.0)
    }
}

impl Channel {
    /// Asks whoever listens at `path`. `None`: nobody does.
    ///
    /// # Errors
    /// What the system says, or that it is another user's process.
    pub fn connect(path: &Path) -> io::Result<Option<Self>> {
        let socket = packets::socket()?;
        // Bounds the wait in its queue, too.
        socket.set_write_timeout(Some(PATIENCE))?;
        match socket.connect(&SockAddr::unix(path)?) {
            Ok(()) => Self::new(socket).map(Some),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn new(socket: Socket) -> io::Result<Self> {
        let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
        let own = nix::unistd::geteuid();
        if peer.uid() != own.as_raw() {
            let text = format!("the process at the other end belongs to user {}, this one to {own}", peer.uid());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// Process id of the other side as it is seen from here, 0 if it is not.
    pub fn peer(&self) -> i32 {
        getsockopt(&self.0, sockopt::PeerCredentials).map_or(0, |peer| peer.pid())
    }

    /// Ends the conversation for both sides, whoever else holds it here.
    pub fn close(&self) {
        // Gone already is as good.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// What the system says; the other side is gone or does not read.
    pub fn send(&self, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if body.is_empty() || body.len() > LARGEST || fds.len() > MOST_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a packet that is empty or too large"));
        }
        packets::send(&self.0, body, fds)
    }

    /// Waits for a packet. `None`: the other side is gone.
    ///
    /// # Errors
    /// What the system says; a packet that is too large.
    pub fn receive(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        match packets::receive(&self.0, LARGEST)? {
            None => Ok(None),
            Some(packet) if packet.cut => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "a packet with more bytes or sockets than allowed"))
            }
            Some(packet) => Ok(Some((packet.body, packet.fds))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::{Channel, Desk};
    use crate::base::packets::MOST_FDS;

    #[test]
    fn a_listener_that_is_passed_on_loses_nobody_from_its_queue() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.sock");
        assert!(Channel::connect(&path).unwrap().is_none(), "nobody is there yet");
        let desk = Desk::open(&path).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        // In the queue, not accepted by anybody.
        let mut waiting = TcpStream::connect(to).unwrap();
        let old = std::thread::spawn(move || {
            let channel = desk.accept().unwrap();
            assert_eq!(channel.receive().unwrap().unwrap().0, b"please");
            channel.send(b"here", &[listener.as_fd()]).unwrap();
            assert!(channel.receive().unwrap().is_none(), "the successor has gone its way");
        });
        let channel = Channel::connect(&path).unwrap().unwrap();
        channel.send(b"please", &[]).unwrap();
        let (body, mut fds) = channel.receive().unwrap().unwrap();
        assert_eq!((&body[..], fds.len()), (&b"here"[..], 1));
        drop(channel);
        old.join().unwrap();
        let listener = TcpListener::from(fds.pop().unwrap());
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.write_all(b"welcome").unwrap();
        drop(accepted);
        let mut greeting = String::new();
        waiting.read_to_string(&mut greeting).unwrap();
        assert_eq!(greeting, "welcome");
    }

    #[test]
    fn a_successor_takes_the_path_over_and_odd_packets_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.sock");
        let first = Desk::open(&path).unwrap();
        let second = Desk::open(&path).unwrap();
        drop(first);
        let channel = Channel::connect(&path).unwrap().unwrap();
        let served = second.accept().unwrap();
        let many = vec![channel.0.as_fd(); MOST_FDS + 1];
        assert!(channel.send(b"x", &many).is_err());
        assert!(channel.send(b"", &[]).is_err());
        channel.send(b"x", &many[1..]).unwrap();
        assert_eq!(served.receive().unwrap().unwrap().1.len(), MOST_FDS);
        drop(second);
        assert!(Channel::connect(&path).unwrap().is_none(), "a path that a dead process left");
    }
}
