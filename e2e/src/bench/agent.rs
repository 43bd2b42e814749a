//! The bench's processes inside pods: the server, the load generator, and the client that must be refused.
//!
//! They are processes of their own so that the CPU of the proxies can be told from theirs. A generator that cannot end
//! by itself is ended by a watchdog, so that the bench never hangs. Limits: internal, its arguments may change.

use std::io::Read;
use std::io::Write;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;

use crate::bench::closed;
use crate::bench::http;
use crate::bench::paced;
use crate::bench::scale::attached;
use crate::bench::scale::identity;
use crate::bench::scale::watch;
use crate::bench::server;
use crate::bench::work::Asked;
use crate::bench::work::Order;
use crate::bench::work::PORT_REQUESTS;
use crate::bench::work::Probed;
use crate::bench::work::REQUEST;
use crate::bench::work::Work;

/// Beyond the time of the order, for opening, finishing and a busy machine.
const WATCHDOG: Duration = Duration::from_secs(40);
/// Between two tries of the denied client.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// For one of those tries: they are a second apart.
const ANSWER_PATIENCE: Duration = Duration::from_millis(900);
/// For the first request of a new pod.
const FIRST_PATIENCE: Duration = Duration::from_secs(15);

/// Arguments of `lab bench-agent`.
#[derive(Debug, clap::Subcommand)]
pub enum Agent {
    /// The server.
    Serve {
        /// Text of which answers are made.
        #[arg(long)]
        marker: String,
        /// What it calls itself in answers of HTTP.
        #[arg(long, default_value = "server")]
        name: String,
    },
    /// The load generator.
    Run {
        /// A [`Order`] as JSON.
        #[arg(long)]
        order: String,
    },
    /// The client that must be refused; ends with standard input.
    Probe {
        /// The server.
        #[arg(long)]
        to: IpAddr,
    },
    /// Requests of HTTP, each on a connection of its own: as many as said, or one a second until standard input ends.
    Ask {
        /// The server.
        #[arg(long)]
        to: SocketAddr,
        /// First lines of the request.
        #[arg(long)]
        head: String,
        /// How many.
        #[arg(long)]
        count: Option<u64>,
    },
    /// A client that says when it begins or ceases to be answered.
    Watch {
        /// The server.
        #[arg(long)]
        to: SocketAddr,
    },
    /// One request, timed; then it stays.
    First {
        /// The server.
        #[arg(long)]
        to: SocketAddr,
    },
    /// Simulated node proxies.
    Attach(attached::Options),
}

/// Runs one of them to its end.
pub fn main(agent: &Agent) -> anyhow::Result<()> {
    raise_descriptors();
    match agent {
        Agent::Serve { marker, name } => on_one_thread(server::serve(marker, name)),
        Agent::Run { order } => {
            let order: Order = serde_json::from_str(order).context("the order is not one")?;
            if !matches!(order.work, Work::Hold { .. }) {
                watchdog(Duration::from_millis(order.warm_ms + order.run_ms) + WATCHDOG);
            }
            match order.work {
                Work::Paced { .. } | Work::PacedConnects { .. } => paced::run(order),
                _ => on_one_thread(closed::run(order)),
            }
        }
        Agent::Ask { to, head, count } => ask(*to, head, *count),
        Agent::Watch { to } => watch::run(*to),
        Agent::First { to } => first(*to),
        Agent::Attach(options) => attached::run(options),
        Agent::Probe { to } => probe(SocketAddr::new(*to, PORT_REQUESTS)),
    }
}

fn on_one_thread(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, work)
}

/// Five thousand connections are more than the usual soft limit; the hard one is the machine's word.
fn raise_descriptors() {
    use nix::sys::resource::Resource;
    if let Ok((_, hard)) = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = nix::sys::resource::setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn watchdog(patience: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(patience);
        eprintln!("the load did not end within {patience:?}");
        std::process::exit(3);
    });
}

/// Tries once a second whether the server answers.
fn probe(to: SocketAddr) -> anyhow::Result<()> {
    let mut probed = Probed::default();
    every_second(|| {
        probed.attempts += 1;
        probed.passed += u64::from(answers(to));
    });
    println!("{}", serde_json::to_string(&probed)?);
    Ok(())
}

/// Asks and counts what comes of it.
fn ask(to: SocketAddr, head: &str, count: Option<u64>) -> anyhow::Result<()> {
    let mut asked = Asked::default();
    let mut one = || {
        asked.attempts += 1;
        let answer = TcpStream::connect_timeout(&to, ANSWER_PATIENCE).and_then(|mut stream| {
            stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
            http::exchange_blocking(&mut stream, head, asked.attempts)
        });
        match answer {
            Ok(answer) => {
                http::count(&mut asked.statuses, &answer.status.to_string());
                http::count(&mut asked.servers, &answer.server);
            }
            Err(error) => http::count(&mut asked.statuses, &error.to_string()),
        }
    };
    match count {
        Some(count) => (0..count).for_each(|_| one()),
        None => every_second(one),
    }
    println!("{}", serde_json::to_string(&asked)?);
    Ok(())
}

/// Does it once a second until standard input ends.
fn every_second(mut one: impl FnMut()) {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            ended.store(true, Ordering::SeqCst);
        });
        let mut next = Instant::now();
        while !ended.load(Ordering::SeqCst) {
            one();
            next += PROBE_INTERVAL;
            // Short naps, so that the end is noticed soon.
            while Instant::now() < next && !ended.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    });
}

/// One request, however long it takes within reason.
fn first(to: SocketAddr) -> anyhow::Result<()> {
    let began = Instant::now();
    anyhow::ensure!(answers_within(to, FIRST_PATIENCE), "no answer from {to} after {:?}", began.elapsed());
    println!("{}{}", identity::SAID, began.elapsed().as_micros());
    // Its pod is not to end.
    loop {
        std::thread::park();
    }
}

/// Whether a server answers a request on a connection of its own.
pub(super) fn answers(to: SocketAddr) -> bool {
    answers_within(to, ANSWER_PATIENCE)
}

fn answers_within(to: SocketAddr, patience: Duration) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&to, patience) else { return false };
    let _ = stream.set_read_timeout(Some(patience));
    let _ = stream.write_all(&[b'x'; REQUEST]);
    stream.read(&mut [0; 1]).is_ok_and(|length| length > 0)
}
