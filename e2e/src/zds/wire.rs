//! The packets between a CNI agent and a node proxy: one protobuf message each, on a unix socket of SOCK_SEQPACKET, the
//! pod's network namespace beside it as a descriptor.
//!
//! Both sides read into 1024 bytes, so a longer packet is an error and never half a message. Limits: descriptors that
//! come in are not taken; the agent only hands them out.

use std::io;
use std::io::IoSlice;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::AddressFamily;
use nix::sys::socket::Backlog;
use nix::sys::socket::ControlMessage;
use nix::sys::socket::MsgFlags;
use nix::sys::socket::SockFlag;
use nix::sys::socket::SockType;
use nix::sys::socket::UnixAddr;
use prost::Message;

/// Longest packet: what either side of the protocol has room for.
pub(super) const PACKET_MAX: usize = 1024;
/// Connections that wait to be accepted; a node has one proxy, two while it is replaced.
const BACKLOG: i32 = 8;

/// Listens at `path`, in place of whatever file is there.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = nix::sys::socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    nix::sys::socket::listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(UnixListener::from(socket))
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Packets(UnixStream);

impl Packets {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// Sends one message, with a descriptor or without, within `patience`.
    pub(super) fn send(
        &self,
        message: &impl Message,
        descriptor: Option<BorrowedFd<'_>>,
        patience: Duration,
    ) -> io::Result<()> {
        let bytes = message.encode_to_vec();
        if bytes.len() > PACKET_MAX {
            return Err(io::Error::other(format!("a message of {} bytes; {PACKET_MAX} are the limit", bytes.len())));
        }
        self.0.set_write_timeout(Some(patience))?;
        let raw: Vec<i32> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        nix::sys::socket::sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }

    /// The next message. None: the other side has closed. `TimedOut` or `WouldBlock` when nothing came in time.
    pub(super) fn receive<M: Message + Default>(&self, patience: Duration) -> io::Result<Option<M>> {
        self.0.set_read_timeout(Some(patience))?;
        // One more byte than may come, so that a longer packet is noticed.
        let mut packet = [0; PACKET_MAX + 1];
        let length = (&self.0).read(&mut packet)?;
        match length {
            // No message of the protocol is empty.
            0 => Ok(None),
            length if length > PACKET_MAX => Err(io::Error::other("a packet longer than 1024 bytes")),
            length => match M::decode(&packet[..length]) {
                Ok(message) => Ok(Some(message)),
                Err(error) => Err(io::Error::other(format!("a packet that is no message of the protocol: {error}"))),
            },
        }
    }
}

/// Whether an error only says that nothing came in time.
pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use nix::sys::socket::AddressFamily;
    use nix::sys::socket::SockFlag;
    use nix::sys::socket::SockType;
    use tulle_proto::workload::zds;

    use crate::zds::wire::PACKET_MAX;
    use crate::zds::wire::Packets;
    use crate::zds::wire::is_timeout;

    const SOON: Duration = Duration::from_millis(10);

    fn pair() -> anyhow::Result<(UnixStream, Packets)> {
        let (near, far) =
            nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((UnixStream::from(near), Packets::new(UnixStream::from(far))))
    }

    #[test]
    fn what_is_no_message_of_the_protocol_is_an_error_and_silence_is_not() -> anyhow::Result<()> {
        // Field 1 with wire type 7, a length beyond the end, a packet that is too long, and bytes of chance.
        let cases: [&[u8]; 4] = [&[0x0f], &[0x0a, 0x7f, 1], &[0; PACKET_MAX + 1], &[0xff; 40]];
        for bytes in cases {
            let (mut near, far) = pair()?;
            near.write_all(bytes)?;
            let received = far.receive::<zds::WorkloadResponse>(SOON);
            assert!(received.is_err_and(|error| !is_timeout(&error)), "{bytes:?}");
        }
        let (near, far) = pair()?;
        assert!(far.receive::<zds::WorkloadResponse>(SOON).is_err_and(|error| is_timeout(&error)));
        drop(near);
        assert_eq!(far.receive::<zds::WorkloadResponse>(SOON)?, None);
        Ok(())
    }

    #[test]
    fn a_message_beyond_the_limit_is_not_sent() -> anyhow::Result<()> {
        let (_near, far) = pair()?;
        let long = zds::Ack { error: "x".repeat(PACKET_MAX) };
        assert!(far.send(&long, None, SOON).is_err());
        assert!(far.send(&zds::Ack::default(), Some(std::io::stdin().as_fd()), SOON).is_ok());
        Ok(())
    }
}
