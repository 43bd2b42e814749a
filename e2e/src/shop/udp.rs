//! Datagrams: an echo that says who asked, and a client that reports whether an answer came.
//!
//! One datagram each way, tried again within the time given, since a first one may be lost without anybody's fault. A
//! stream is one datagram and [`STREAM`] answers, with which replies can be watched that nothing is sent for.

use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use serde_json::Value;
use serde_json::json;
use tokio::net::UdpSocket;

use crate::shop::Family;
use crate::shop::Udp;
use crate::shop::client::look_up;
use crate::shop::now_us;

/// Longest datagram.
const LONGEST: usize = 2048;
/// What asks for a stream.
const ASK: &str = "stream";
/// Answers of a stream.
const STREAM: u32 = 200;
/// Pause between two of them.
const PACE: Duration = Duration::from_millis(50);
/// Pause before a datagram is sent again.
const AGAIN: Duration = Duration::from_millis(250);

/// Echoes each datagram after its sender's address until the process ends.
pub(super) async fn echo(port: u16) -> anyhow::Result<()> {
    let socket = UdpSocket::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await;
    let socket = socket.with_context(|| format!("UDP port {port} cannot be bound"))?;
    let socket = Rc::new(socket);
    tokio::task::spawn_local(async move {
        let mut buffer = [0; LONGEST];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            let said = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let answer = format!("{} {said}", peer.ip().to_canonical());
            if said == ASK {
                tokio::task::spawn_local(stream(socket.clone(), peer, answer));
            } else {
                // A peer that is gone needs no answer.
                let _ = socket.send_to(answer.as_bytes(), peer).await;
            }
        }
    });
    Ok(())
}

async fn stream(socket: Rc<UdpSocket>, peer: SocketAddr, answer: String) {
    for _ in 0..STREAM {
        let _ = socket.send_to(answer.as_bytes(), peer).await;
        tokio::time::sleep(PACE).await;
    }
}

/// One exchange; true if it was answered.
pub(super) async fn call(options: &Udp) -> anyhow::Result<bool> {
    let timeout = Duration::from_millis(options.timeout_ms);
    if options.stream {
        return watch(&options.address, timeout).await;
    }
    let report = attempt(&options.address, &options.send, Family::Any, timeout).await;
    match (options.json, &report["error"]) {
        (true, _) => println!("{report}"),
        (false, Value::Null) => println!("answered"),
        (false, error) => println!("failed: {}", error.as_str().unwrap_or_default()),
    }
    Ok(report["ok"] == true)
}

/// One exchange, reported.
pub(super) async fn attempt(address: &str, send: &str, family: Family, timeout: Duration) -> Value {
    let began = Instant::now();
    let result = tokio::time::timeout(timeout, exchange(address, send, family)).await;
    let result = result.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {} ms", timeout.as_millis())));
    let ms = began.elapsed().as_secs_f64() * 1000.0;
    match result {
        Ok(source) => json!({"t_us": now_us(), "ok": true, "ms": ms, "source": source}),
        Err(error) => json!({"t_us": now_us(), "ok": false, "ms": ms, "error": format!("{error:#}")}),
    }
}

/// Watches a stream: a line when it opens, and one with the number of answers when it ends. True if it ended by itself.
async fn watch(address: &str, timeout: Duration) -> anyhow::Result<bool> {
    let socket = connected(address, Family::Any).await?;
    socket.send(ASK.as_bytes()).await?;
    let mut buffer = [0; LONGEST];
    let mut answers = 0;
    // An error is told of an earlier datagram, or that the server refuses; either way no answer has come.
    while let Ok(Ok(_)) = tokio::time::timeout(timeout, socket.recv(&mut buffer)).await {
        answers += 1;
        if answers == 1 {
            println!("{}", json!({"t_us": now_us(), "kind": "open"}));
        }
    }
    println!("{}", json!({"t_us": now_us(), "kind": "closed", "answers": answers, "whole": answers == STREAM}));
    Ok(answers == STREAM)
}

async fn connected(address: &str, family: Family) -> anyhow::Result<UdpSocket> {
    let target = look_up(address, family).await?;
    let any = if target.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(target).await?;
    Ok(socket)
}

async fn exchange(address: &str, send: &str, family: Family) -> anyhow::Result<String> {
    let socket = connected(address, family).await?;
    let mut buffer = [0; LONGEST];
    loop {
        socket.send(send.as_bytes()).await?;
        let Ok(received) = tokio::time::timeout(AGAIN, socket.recv(&mut buffer)).await else { continue };
        let answer = String::from_utf8_lossy(&buffer[..received?]).into_owned();
        let (source, echoed) = answer.split_once(' ').context("an answer of another form")?;
        anyhow::ensure!(echoed == send, "sent {send:?}, got {echoed:?} back");
        return Ok(source.to_owned());
    }
}
