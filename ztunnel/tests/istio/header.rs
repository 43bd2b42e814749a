//! Promise: an application that takes the pod's tunnels learns by a PROXY header who called whom; it is reached at the pod's
//! loopback only, and policies hold before it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::mpsc::channel;

use tulle_proto::workload::address::Type;
use tulle_proto::workload::application_tunnel::Protocol;
use tulle_proto::workload::{ApplicationTunnel, Service, Workload};

use crate::node::Lab;
use crate::{CALL, World, cart, gateway, id, ip, pod};

/// An application at the pod's loopback that greets with what the header says, and with who connected.
fn reader(lab: &Lab) {
    let (ready, is_ready) = channel();
    drop(lab.within("b", move || {
        let listener = TcpListener::bind("127.0.0.1:15088").unwrap();
        ready.send(()).unwrap();
        for tcp in listener.incoming() {
            let mut tcp = tcp.unwrap();
            std::thread::spawn(move || {
                let mut head = [0; 16];
                tcp.read_exact(&mut head).unwrap();
                assert_eq!(&head[..13], b"\r\n\r\n\0\r\nQUIT\n\x21", "version 2 of PROXY");
                assert_eq!(head[13], 0x11, "TCP over IPv4");
                let mut rest = vec![0; usize::from(u16::from_be_bytes([head[14], head[15]]))];
                tcp.read_exact(&mut rest).unwrap();
                let address = |ip: usize, port: usize| {
                    let octets: [u8; 4] = rest[ip..ip + 4].try_into().unwrap();
                    SocketAddr::from((Ipv4Addr::from(octets), u16::from_be_bytes([rest[port], rest[port + 1]])))
                };
                let (from, to) = (address(0, 8), address(4, 10));
                assert_eq!(rest[12], 0xd0, "the identity");
                assert_eq!(usize::from(u16::from_be_bytes([rest[13], rest[14]])), rest.len() - 15, "and nothing else");
                let identity = std::str::from_utf8(&rest[15..]).unwrap();
                let peer = tcp.peer_addr().unwrap().ip();
                writeln!(tcp, "{} {to} {identity} by {peer}", from.ip()).unwrap();
                let mut buffer = [0; 65_536];
                while let Ok(size @ 1..) = tcp.read(&mut buffer) {
                    tcp.write_all(&buffer[..size]).unwrap();
                }
            });
        }
    }));
    is_ready.recv().unwrap();
}

fn mesh(tunnel: Option<ApplicationTunnel>, cart: Service) -> Vec<Type> {
    let b = Workload { application_tunnel: tunnel, ..pod("b") };
    vec![Type::Workload(pod("a")), Type::Workload(b), Type::Workload(pod("c")), Type::Service(cart)]
}

#[test]
fn an_application_learns_by_a_proxy_header_who_called_whom() {
    let mut world = World::new("x");
    reader(&world.lab);
    let proxy = ApplicationTunnel { protocol: i32::from(Protocol::Proxy), port: 15088 };
    world.tell(mesh(Some(proxy), cart()));
    let greeting = |dialled: &str| format!("{} {dialled} {} by 127.0.0.1", ip("a"), id("a"));
    let endpoint = format!("{}:8080", ip("b"));
    assert_eq!(world.call("a", CALL, 100_000).unwrap(), greeting(&endpoint), "the endpoint of a Service");
    assert_eq!(world.call("a", &endpoint, 0).unwrap(), greeting(&endpoint));

    // As a waypoint behind its own node's proxy, it is asked for addresses of others.
    let waypoint = Some(gateway("", &ip("b"), 15008));
    world.tell(mesh(Some(proxy), Service { waypoint, ..cart() }));
    assert_eq!(world.call("a", CALL, 1000).unwrap(), greeting(CALL), "what the client dialled");

    // Plaintext is not a tunnel, and gets no header.
    assert_eq!(world.call("c", &endpoint, 1000).unwrap(), ip("c"));
    world.node.deny("a");
    let denied = world.call("a", CALL, 1);
    assert!(denied.is_err(), "{denied:?}");
}

#[test]
fn an_application_tunnel_may_only_change_the_port() {
    let mut world = World::new("y");
    let port_only = ApplicationTunnel { protocol: i32::from(Protocol::None), port: 8080 };
    world.tell(mesh(Some(port_only), cart()));
    let other = format!("{}:9999", ip("b"));
    assert_eq!(
        world.call("a", &other, 100_000).unwrap(),
        ip("a"),
        "any port is the application's, its client the real one"
    );
}
