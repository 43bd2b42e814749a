//! `shop`: the small server and client that the lab's pods run, so that a demonstration needs no image and no network.
//!
//! One program says what it saw (peer address, headers, its own name) and counts what it got back, which is all that
//! the mesh's promises need to be checked from outside. Limits: HTTP/1.1 and a line-based raw protocol; bodies up to 64
//! MiB.

mod client;
mod secure;
mod server;
mod udp;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use clap::Parser;
use clap::Subcommand;

/// A small server and client for trying a mesh.
#[derive(Debug, Parser)]
#[command(name = "shop", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve HTTP and a raw TCP protocol until asked to end.
    Serve(Serve),
    /// Send HTTP requests and report each; fails when one fails.
    Call(Call),
    /// Connect, read the greeting, and have lines echoed; fails when one connection fails.
    Tcp(Tcp),
    /// Send a datagram and wait for its echo; fails when none comes.
    Udp(Udp),
    /// Send requests until standard input ends or asked to end; one JSON line each.
    Load(Load),
}

#[derive(Debug, Args)]
struct Serve {
    /// Name to answer with.
    #[arg(long, default_value = "shop")]
    name: String,
    /// HTTP ports.
    #[arg(long)]
    http: Vec<u16>,
    /// Raw TCP ports.
    #[arg(long)]
    tcp: Vec<u16>,
    /// Ports of the same protocol within TLS.
    #[arg(long)]
    tls: Vec<u16>,
    /// UDP ports that echo.
    #[arg(long)]
    udp: Vec<u16>,
}

#[derive(Clone, Debug, Args)]
struct Call {
    /// http://host[:port]/path
    url: String,
    /// Number of requests.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Requests per second; 0 = one after the other without pause.
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    /// One connection for all requests instead of one each.
    #[arg(long)]
    keep_alive: bool,
    /// Time for one request, in milliseconds.
    #[arg(long, default_value_t = 5000)]
    timeout_ms: u64,
    /// `name: value`.
    #[arg(long)]
    header: Vec<String>,
    /// Body; makes it a POST.
    #[arg(long)]
    data: Option<String>,
    /// One JSON line a request instead of text.
    #[arg(long)]
    json: bool,
    /// IPv4 only.
    #[arg(short = '4', long)]
    v4: bool,
    /// IPv6 only.
    #[arg(short = '6', long)]
    v6: bool,
}

#[derive(Clone, Debug, Args)]
struct Tcp {
    /// host:port
    address: String,
    /// Line to send.
    #[arg(long, default_value = "ping")]
    send: String,
    /// Within TLS, asking for this server name; any certificate is believed.
    #[arg(long, conflicts_with = "hold_ms")]
    tls: Option<String>,
    /// Connections, one after the other.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Keep the connection, sending a line every so many milliseconds until standard input ends.
    #[arg(long)]
    hold_ms: Option<u64>,
    /// Time for one step, in milliseconds.
    #[arg(long, default_value_t = 5000)]
    timeout_ms: u64,
    /// One JSON line a connection instead of text.
    #[arg(long)]
    json: bool,
    /// IPv4 only.
    #[arg(short = '4', long)]
    v4: bool,
    /// IPv6 only.
    #[arg(short = '6', long)]
    v6: bool,
}

#[derive(Clone, Debug, Args)]
struct Udp {
    /// host:port
    address: String,
    /// What to send.
    #[arg(long, default_value = "ping")]
    send: String,
    /// Time to wait for the echo, in milliseconds.
    #[arg(long, default_value_t = 2000)]
    timeout_ms: u64,
    /// Send once and be answered again and again; ends when answers stay away for the time of one.
    #[arg(long)]
    stream: bool,
    /// One JSON line instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, Args)]
struct Load {
    /// http://host[:port]/path, tcp://host:port, or udp://host:port
    target: Vec<String>,
    /// Requests per second and target.
    #[arg(long, default_value_t = 20.0)]
    rate: f64,
    /// Requests in all and per target; 0 = until asked to end.
    #[arg(long, default_value_t = 0)]
    count: u64,
    /// One connection for all requests to a target instead of one each.
    #[arg(long)]
    keep_alive: bool,
    /// Time for one request, in milliseconds.
    #[arg(long, default_value_t = 5000)]
    timeout_ms: u64,
    /// End when standard input ends.
    #[arg(long)]
    until_eof: bool,
    /// IPv4 only.
    #[arg(short = '4', long)]
    v4: bool,
    /// IPv6 only.
    #[arg(short = '6', long)]
    v6: bool,
}

/// Which addresses a client may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Any,
    V4,
    V6,
}

fn family(v4: bool, v6: bool) -> Family {
    match (v4, v6) {
        (true, false) => Family::V4,
        (false, true) => Family::V6,
        _ => Family::Any,
    }
}

/// Runs the program with these arguments.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let cli = Cli::parse_from(arguments);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("shop: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let local = tokio::task::LocalSet::new();
    let result = local.block_on(&runtime, async {
        match cli.command {
            Command::Serve(options) => {
                for port in &options.udp {
                    udp::echo(*port).await?;
                }
                server::serve(&options.name, &options.http, &options.tcp, &options.tls).await.map(|()| true)
            }
            Command::Call(options) => client::call(&options).await,
            Command::Tcp(options) => client::tcp(&options).await,
            Command::Udp(options) => udp::call(&options).await,
            Command::Load(options) => client::load(&options).await,
        }
    });
    // A thread may still sit in a read of standard input.
    runtime.shutdown_timeout(Duration::ZERO);
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("shop: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Microseconds since the Unix epoch, for logs that are compared with others.
fn now_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
