//! Relays over loopback: what passes, how it ends, and that nothing is left hanging.

use std::future::pending;
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::base::Counts;
use crate::base::budget::Budget;
use crate::outcome::Code;
use crate::relay::{Limits, Terms, tcp};

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

#[tokio::test]
async fn bytes_and_half_close_pass_both_ways() {
    let (mut client, client_proxy) = pair().await;
    let (server_proxy, mut server) = pair().await;
    let counts = Counts::default();
    let budget = Budget::new(1 << 20);
    let terms = Terms { counts: &counts, limits: Limits::default(), budget: &budget };
    let stop = pin!(pending());
    let relay = tcp(client_proxy, server_proxy, terms, stop);
    let talk = async {
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"question");
        server.write_all(&vec![7; 300_000]).await.unwrap();
        drop(server);
        let mut back = Vec::new();
        client.read_to_end(&mut back).await.unwrap();
        assert_eq!(back.len(), 300_000);
    };
    let (outcome, ()) = tokio::join!(relay, talk);
    assert_eq!(outcome.code, Code::Ok);
    assert_eq!((counts.up.get(), counts.down.get()), (8, 300_000));
}

#[tokio::test]
async fn a_reset_is_carried_as_a_reset() {
    let (client, client_proxy) = pair().await;
    let (server_proxy, mut server) = pair().await;
    let counts = Counts::default();
    let budget = Budget::new(1 << 20);
    let terms = Terms { counts: &counts, limits: Limits::default(), budget: &budget };
    let stop = pin!(pending());
    let relay = tcp(client_proxy, server_proxy, terms, stop);
    let talk = async {
        crate::base::sockets::reset(client);
        let error = server.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    };
    let (outcome, ()) = tokio::join!(relay, talk);
    assert_eq!(outcome.code, Code::ClientReset);
}

#[tokio::test]
async fn a_silent_half_open_connection_is_reaped() {
    let (mut client, client_proxy) = pair().await;
    let (server_proxy, _server) = pair().await;
    let counts = Counts::default();
    client.shutdown().await.unwrap();
    let limits = Limits { half_open: Duration::from_millis(50) };
    let terms = Terms { counts: &counts, limits, budget: &Budget::new(1 << 20) };
    let outcome = tcp(client_proxy, server_proxy, terms, pin!(pending())).await;
    assert_eq!(outcome.code, Code::HalfOpen);
}
