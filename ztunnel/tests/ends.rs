//! How connections end, by every way through the mesh: an end of one direction arrives as that and nothing more, a reset
//! arrives as a reset, and what is half closed and silent is reaped on both sides.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use node::{Lab, Node, Setup, await_inbound};
use ztunnel::relay;

const PATIENCE: Duration = Duration::from_secs(10);
/// More than the buffers on the way.
const MUCH: usize = 8 << 20;
const HALF_OPEN: Duration = Duration::from_millis(600);

/// What one side saw last.
#[derive(Debug, PartialEq, Eq)]
enum Saw {
    /// The end of the stream after so many bytes.
    End(usize),
    /// A failure after so many bytes.
    Broken(ErrorKind, usize),
}

fn drain(tcp: &mut TcpStream) -> Saw {
    let mut buffer = vec![0; 65_536];
    let mut bytes = 0;
    loop {
        match tcp.read(&mut buffer) {
            Ok(0) => return Saw::End(bytes),
            Ok(read) => bytes += read,
            Err(error) => return Saw::Broken(error.kind(), bytes),
        }
    }
}

/// Waits after the end of the stream until the connection breaks. Reads do not tell it then: the kernel keeps a reset that
/// follows an end as an error of writing.
fn await_break(tcp: &mut TcpStream) -> Saw {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match (drain(tcp), tcp.take_error().unwrap()) {
            (Saw::End(bytes), Some(error)) if error.kind() == ErrorKind::BrokenPipe => {
                return Saw::Broken(ErrorKind::ConnectionReset, bytes);
            }
            (Saw::End(_), None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            (saw, _) => return saw,
        }
    }
}

fn reset(tcp: &TcpStream) {
    socket2::SockRef::from(tcp).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Does what the connection's first byte asks for, and tells what it saw.
fn obey(mut tcp: TcpStream) -> Option<Saw> {
    let mut order = [0];
    tcp.set_read_timeout(Some(PATIENCE)).ok()?;
    tcp.read_exact(&mut order).ok()?;
    match order[0] {
        b'r' => {
            reset(&tcp);
            None
        }
        b'x' => {
            drain(&mut tcp);
            reset(&tcp);
            None
        }
        b'a' => {
            drain(&mut tcp);
            tcp.write_all(&vec![1; MUCH]).unwrap();
            None
        }
        b'f' => {
            tcp.shutdown(Shutdown::Write).unwrap();
            Some(drain(&mut tcp))
        }
        b'F' => {
            tcp.shutdown(Shutdown::Write).unwrap();
            Some(await_break(&mut tcp))
        }
        b's' => Some(await_break(&mut tcp)),
        _ => {
            // A client that resets before it is served ends the attempt, and there is nothing to see.
            tcp.write_all(b"!").unwrap();
            Some(drain(&mut tcp))
        }
    }
}

fn serve(listener: TcpListener, told: Sender<Saw>) {
    for tcp in listener.incoming() {
        let told = told.clone();
        std::thread::spawn(move || obey(tcp.unwrap()).map(|saw| told.send(saw)));
    }
}

/// One way through the mesh.
struct Way<'a> {
    lab: &'a Lab,
    name: &'static str,
    from: &'static str,
    to: &'static str,
    told: &'a Receiver<Saw>,
}

impl Way<'_> {
    fn client(&self, order: u8, work: impl FnOnce(TcpStream) -> Saw + Send + 'static) -> Saw {
        let to: SocketAddr = self.to.parse().unwrap();
        let client = self.lab.within(self.from, move || {
            let mut tcp = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
            tcp.set_read_timeout(Some(PATIENCE)).unwrap();
            tcp.write_all(&[order]).unwrap();
            work(tcp)
        });
        client.join().unwrap()
    }

    fn server(&self) -> Saw {
        self.told.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{}: the server saw nothing", self.name))
    }

    fn ends_are_carried(&self) {
        let name = self.name;
        let saw = self.client(b'a', |mut tcp| {
            tcp.shutdown(Shutdown::Write).unwrap();
            drain(&mut tcp)
        });
        assert_eq!(saw, Saw::End(MUCH), "{name}: an answer after the client's end");
        let saw = self.client(b'f', |mut tcp| {
            let saw = drain(&mut tcp);
            tcp.write_all(&vec![2; MUCH]).unwrap();
            saw
        });
        assert_eq!(saw, Saw::End(0), "{name}: the server's end");
        assert_eq!(self.server(), Saw::End(MUCH), "{name}: what the client said after it");
    }

    fn resets_are_carried(&self) {
        let name = self.name;
        let saw = self.client(b'r', |mut tcp| drain(&mut tcp));
        assert_eq!(saw, Saw::Broken(ErrorKind::ConnectionReset, 0), "{name}: the server's reset");
        let saw = self.client(b'x', |mut tcp| {
            tcp.shutdown(Shutdown::Write).unwrap();
            drain(&mut tcp)
        });
        assert_eq!(saw, Saw::Broken(ErrorKind::ConnectionReset, 0), "{name}: a reset after the client's end");
        self.client(b'c', |mut tcp| {
            tcp.read_exact(&mut [0]).unwrap();
            reset(&tcp);
            Saw::End(0)
        });
        assert_eq!(self.server(), Saw::Broken(ErrorKind::ConnectionReset, 0), "{name}: the client's reset");
        // With bytes on their way, which the reset may overtake; it must not become an end.
        self.client(b'c', |mut tcp| {
            tcp.read_exact(&mut [0]).unwrap();
            tcp.write_all(&[3; 1000]).unwrap();
            reset(&tcp);
            Saw::End(0)
        });
        let saw = self.server();
        assert!(matches!(saw, Saw::Broken(ErrorKind::ConnectionReset, _)), "{name}: a reset behind bytes: {saw:?}");
    }

    fn silence_is_reaped(&self) {
        let name = self.name;
        let began = Instant::now();
        let saw = self.client(b's', |mut tcp| {
            tcp.shutdown(Shutdown::Write).unwrap();
            drain(&mut tcp)
        });
        assert_eq!(saw, Saw::Broken(ErrorKind::ConnectionReset, 0), "{name}: silence after the client's end");
        assert_eq!(self.server(), Saw::Broken(ErrorKind::ConnectionReset, 0), "{name}: the same, at the server");
        assert!(began.elapsed() >= HALF_OPEN, "{name}: not before its time");
        let saw = self.client(b'F', |mut tcp| await_break(&mut tcp));
        assert_eq!(saw, Saw::Broken(ErrorKind::ConnectionReset, 0), "{name}: silence after the server's end");
        assert_eq!(self.server(), Saw::Broken(ErrorKind::ConnectionReset, 0), "{name}: the same, at the server");
    }
}

#[test]
fn ends_resets_and_silence_are_carried_by_every_way() {
    let lab = Lab::new("e");
    let (tell, told) = channel();
    for pod in ["b", "c"] {
        let tell = tell.clone();
        let (ready, is_ready) = channel();
        drop(lab.within(pod, move || {
            let listener = TcpListener::bind("[::]:8080").unwrap();
            ready.send(()).unwrap();
            serve(listener, tell);
        }));
        is_ready.recv().unwrap();
    }
    let limits = relay::Limits { half_open: HALF_OPEN };
    let mut node =
        Node::start_with(lab.dir.path(), lab.pods_file(&["a", "b"]), Setup { relay: limits, ..Setup::default() });
    node.describe(&["a", "b"]);
    node.wait(&[("a", "Captured"), ("b", "Captured"), ("c", "Uncaptured")]);
    for (name, from, to) in [
        ("tunnel", "a", "10.99.0.2:8080"),
        ("tunnel, IPv6", "a", "[fd99::2]:8080"),
        ("plaintext in", "c", "10.99.0.2:8080"),
        ("plaintext out", "a", "10.99.0.3:8080"),
    ] {
        let way = Way { lab: &lab, name, from, to, told: &told };
        way.ends_are_carried();
        way.resets_are_carried();
        way.silence_is_reaped();
    }
    await_inbound(&node, 0, PATIENCE);
    assert_eq!(node.pods.connections(), (0, 0), "nothing is left");
}
