//! A door from the lab's network to a server on this machine's loopback: the API server of a test, which control and the
//! nodes see at control's address.
//!
//! It listens inside the namespace and dials outside of it. Bytes are copied as they are; TLS is between the two ends.
//! Limits: 512 connections at a time, which is many times what a lab's programs open; further ones wait.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;

use anyhow::Context as _;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

use crate::netns::NetNs;

/// See above.
const CONNECTIONS_MAX: usize = 512;

/// An open door; closed when dropped.
#[derive(Debug)]
pub struct Relay {
    runtime: Option<Runtime>,
}

impl Relay {
    /// Listens at `addresses` and `port` inside `netns`, and passes every connection on to `to`.
    pub fn start(netns: &NetNs, addresses: [IpAddr; 2], port: u16, to: SocketAddr) -> anyhow::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let open = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        for address in addresses {
            let at = SocketAddr::new(address, port);
            let listener =
                netns.run(|| TcpListener::bind(at))?.with_context(|| format!("{at} cannot be listened at"))?;
            listener.set_nonblocking(true)?;
            let _inside = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener)?;
            runtime.spawn(accept(listener, to, Arc::clone(&open)));
        }
        Ok(Self { runtime: Some(runtime) })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: tokio::net::TcpListener, to: SocketAddr, open: Arc<Semaphore>) {
    loop {
        let Ok(permit) = Arc::clone(&open).acquire_owned().await else { return };
        let Ok((mut inner, _)) = listener.accept().await else { continue };
        tokio::spawn(async move {
            let _permit = permit;
            // Nobody there: the client finds its connection closed, as behind a load balancer whose server is gone.
            if let Ok(mut outer) = TcpStream::connect(to).await {
                let _ = tokio::io::copy_bidirectional(&mut inner, &mut outer).await;
            }
        });
    }
}
