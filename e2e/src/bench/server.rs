//! The server of the bench: four ports of raw TCP, each one thing, and one of HTTP, on one thread so that it stays out
//! of the way.
//!
//! It closes first on the port for single requests, so that the side with the few addresses, the client, keeps no
//! TIME_WAIT and can go on for as long as the bench wants. Limits: it serves whoever connects and never ends by itself.

use std::io;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::rc::Rc;

use socket2::Domain;
use socket2::Socket;
use socket2::Type;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;

use crate::bench::http;
use crate::bench::work::ECHO;
use crate::bench::work::PORT_HTTP;
use crate::bench::work::PORT_ONCE;
use crate::bench::work::PORT_REQUESTS;
use crate::bench::work::PORT_SINK;
use crate::bench::work::PORT_SOURCE;
use crate::bench::work::PORTS;
use crate::bench::work::REQUEST;
use crate::bench::work::RESPONSE;

/// Large enough that system calls do not count, small enough for the processor's cache.
pub(super) const CHUNK: usize = 256 << 10;
/// Bursts of 5,000 connections must not be refused for lack of room.
const BACKLOG: i32 = 8192;

/// Serves for ever. Fails when a port cannot be bound.
pub(super) async fn serve(marker: &str, name: &str) -> anyhow::Result<()> {
    let filler: Rc<[u8]> = super::filler(marker, CHUNK).into();
    let name: Rc<str> = name.into();
    for port in PORTS.into_iter().chain([PORT_HTTP]) {
        let listener = bind(port)?;
        let (filler, name) = (filler.clone(), name.clone());
        tokio::task::spawn_local(async move {
            loop {
                // Out of descriptors, or a client that left at once: the next may do better.
                let Ok((stream, _)) = listener.accept().await else {
                    tokio::task::yield_now().await;
                    continue;
                };
                let (filler, name) = (filler.clone(), name.clone());
                // A client that goes away is its own business; it counts what it misses.
                tokio::task::spawn_local(async move { drop(one(port, stream, &name, &filler).await) });
            }
        });
    }
    std::future::pending().await
}

fn bind(port: u16) -> anyhow::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM.nonblocking(), None)?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into())?)
}

async fn one(port: u16, mut stream: TcpStream, name: &str, filler: &[u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match port {
        PORT_HTTP => http::serve(stream, name, filler).await,
        PORT_REQUESTS => loop {
            answer(&mut stream, filler).await?;
        },
        PORT_ONCE => {
            answer(&mut stream, filler).await?;
            stream.shutdown().await?;
            // Closing with unread bytes would reset; there are none from a well-behaved client.
            Ok(())
        }
        PORT_SINK => {
            let mut buffer = vec![0; CHUNK];
            let mut total = 0_u64;
            loop {
                match stream.read(&mut buffer).await? {
                    0 => break,
                    length => total += length as u64,
                }
            }
            stream.write_all(&total.to_be_bytes()).await?;
            stream.shutdown().await
        }
        PORT_SOURCE => loop {
            stream.write_all(filler).await?;
        },
        _ => Ok(()),
    }
}

async fn answer(stream: &mut TcpStream, filler: &[u8]) -> io::Result<()> {
    let mut request = [0; REQUEST];
    stream.read_exact(&mut request).await?;
    let mut response = [0; RESPONSE];
    response.copy_from_slice(&filler[..RESPONSE]);
    response[..ECHO].copy_from_slice(&request[..ECHO]);
    stream.write_all(&response).await
}
