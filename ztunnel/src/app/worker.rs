//! What a worker owns: its tunnels, the tables of its live connections, and what it knows of dead endpoints.
//!
//! None of it is ever seen by another thread: a flow is placed once, at accept, and its tunnel is found on the same worker.

use std::rc::Rc;
use std::sync::Arc;

use crate::base::drain::Drained;
use crate::base::workers::{Accepted, Listening, Workers, spawn};
use crate::flow::{LocalPod, Shared};
use crate::inbound;
use crate::outbound;

/// Lives on one thread.
pub struct Worker {
    /// Its live inbound connections.
    pub entered: Rc<inbound::recheck::Live>,
    /// What its outbound connections are made with.
    pub out: outbound::Means,
}

impl Worker {
    /// An idle worker.
    pub fn new(shared: &Shared, outside: outbound::Outside) -> Self {
        Self { entered: inbound::recheck::live(), out: outbound::Means::new(shared.hbone, outside) }
    }
}

/// The three listeners of a captured pod.
#[derive(Debug)]
pub struct Listeners {
    /// Port 15001.
    pub outbound: std::net::TcpListener,
    /// Port 15006.
    pub plaintext: std::net::TcpListener,
    /// Port 15008.
    pub hbone: std::net::TcpListener,
}

/// Starts serving a pod on the worker `home`. `captured` ends the redirected listeners, `tunnels` the tunnel's. Returns
/// the listeners as others may see them, in the order of [`Listeners`].
///
/// # Errors
/// If the worker takes no more jobs.
pub fn serve_pod(
    workers: &Workers<Worker>,
    home: usize,
    shared: &Shared,
    pod: &Arc<LocalPod>,
    listeners: Listeners,
    captured: &Drained,
    tunnels: &Drained,
) -> std::io::Result<[Listening; 3]> {
    let shared = Arc::new(shared.clone());
    let outgoing: Accepted<Worker> = {
        let (shared, pod) = (shared.clone(), pod.clone());
        Arc::new(move |worker, tcp, load| {
            let (shared, pod) = (shared.clone(), pod.clone());
            // Made within the task: a future that is moved into another one is there twice.
            spawn(async move {
                outbound::serve(shared, worker.out.clone(), pod, tcp).await;
                drop(load);
            });
        })
    };
    let plaintext: Accepted<Worker> = {
        let (shared, pod) = (shared.clone(), pod.clone());
        Arc::new(move |worker, tcp, load| {
            let (shared, pod) = (shared.clone(), pod.clone());
            spawn(async move {
                inbound::serve_plaintext(shared, worker.entered.clone(), pod, tcp).await;
                drop(load);
            });
        })
    };
    let hbone: Accepted<Worker> = {
        let (shared, pod) = (shared.clone(), pod.clone());
        Arc::new(move |worker, tcp, load| {
            let (shared, pod) = (shared.clone(), pod.clone());
            spawn(async move {
                inbound::serve_tunnel(shared, worker.entered.clone(), pod, tcp).await;
                drop(load);
            });
        })
    };
    Ok([
        workers.accept(home, listeners.outbound, captured.clone(), outgoing)?,
        workers.accept(home, listeners.plaintext, captured.clone(), plaintext)?,
        workers.accept(home, listeners.hbone, tunnels.clone(), hbone)?,
    ])
}
