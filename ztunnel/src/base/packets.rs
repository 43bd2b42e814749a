//! Packets with open descriptors beside their bytes, over a unix socket of SOCK_SEQPACKET.
//!
//! The kernel keeps their boundaries, so a packet that makes no sense costs nothing but itself. One that was cut short is
//! given as such and never as half a message; descriptors are closed again unless the caller keeps them.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use socket2::{Domain, Socket, Type};

/// Most descriptors of a packet that are taken; with more it counts as cut short.
pub const MOST_FDS: usize = 8;

/// Most that the kernel passes in one packet (SCM_MAX_FD). There is room for all of them, because those that came in a
/// message which was cut short could not be closed again.
const ROOM_FDS: usize = 253;

/// What came.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes.
    pub body: Vec<u8>,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
    /// There were more bytes or descriptors than fit.
    pub cut: bool,
}

/// A socket for packets, blocking, connected to nothing yet.
///
/// # Errors
/// What the system says.
pub fn socket() -> io::Result<Socket> {
    Socket::new(Domain::UNIX, Type::SEQPACKET, None)
}

/// Sends a packet.
///
/// # Errors
/// What the system says; the other side is gone or does not read.
pub fn send(socket: &impl AsRawFd, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(body)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Takes the next packet, of at most `largest` bytes. `None`: the other side is gone.
///
/// # Errors
/// What the system says; `WouldBlock` if there is none and the socket does not wait.
pub fn receive(socket: &impl AsRawFd, largest: usize) -> io::Result<Option<Packet>> {
    let mut body = vec![0; largest];
    let mut room = nix::cmsg_space!([RawFd; ROOM_FDS]);
    let mut into = [IoSliceMut::new(&mut body)];
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut into, Some(&mut room), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            fds.extend(raw.into_iter().map(own));
        }
    }
    let cut = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) || fds.len() > MOST_FDS;
    let bytes = message.bytes;
    body.truncate(bytes);
    Ok((bytes > 0).then_some(Packet { body, fds, cut }))
}

/// A descriptor that the kernel has just made for us.
#[allow(unsafe_code)]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: recvmsg has installed this descriptor in our table for this message alone; nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use socket2::{Domain, Socket, Type};

    use super::{MOST_FDS, receive, send};

    #[test]
    fn a_packet_that_does_not_fit_says_so_and_the_next_one_is_whole() {
        let (near, far) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let one = near.as_fd();
        for (body, fds, cut) in [
            (&b"fits"[..], vec![], false),
            (b"too long for it", vec![], true),
            (b"many", vec![one; MOST_FDS], false),
            (b"more", vec![one; MOST_FDS + 4], true),
            (b"fits", vec![one], false),
        ] {
            send(&near, body, &fds).unwrap();
            let packet = receive(&far, 8).unwrap().unwrap();
            assert_eq!(packet.cut, cut, "{body:?}");
            assert_eq!(packet.body, body[..body.len().min(8)], "{body:?}");
            assert!(cut || packet.fds.len() == fds.len(), "{body:?}");
        }
        drop(near);
        assert!(receive(&far, 8).unwrap().is_none());
    }
}
