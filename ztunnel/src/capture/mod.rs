//! Redirecting a pod's TCP traffic to the proxy, inside the pod's own network namespace.
//!
//! Rules are data ([`rules::Rules`]) rendered to one nftables transaction, so a pod is captured wholly or not at all,
//! and applying them again is harmless. Whether they work is found out by probing ([`probe`]), never assumed: a pod is
//! `Captured` only after a connection of its own really arrived at the proxy. The rules outlive the proxy on purpose:
//! while it is dead, enrolled traffic fails closed.
//!
//! Capture is not a fence. A container with CAP_NET_RAW can mark its own packets and walk past these rules; what must
//! hold against the pod itself is held in the node's namespace.

pub mod datagrams;
pub mod fence;
pub mod pods;
pub mod preexisting;
pub mod probe;
pub mod probes;
pub mod rules;
pub mod zds;

use std::io::{self, Read, Write as _};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::base::netns::{Netns, run_blocking};
use rules::Rules;

/// Brings the namespace's rules to `rules`, and its filter of datagrams to `filter` where one is given, in one transaction:
/// most of what a capture costs is the start of `nft`.
///
/// # Errors
/// What `nft` or the kernel said. No table was changed by a failed transaction; but if the two were refused together, each
/// was tried alone, so that a filter that cannot be installed keeps no redirect away.
pub async fn apply(netns: &Netns, rules: Rules, filter: Option<String>) -> io::Result<()> {
    run_blocking(netns, move || {
        for v6 in rules.routed() {
            let unrouted = |error| io::Error::other(format!("cannot route the application's replies here: {error}"));
            rules::ROUTING.deliver(v6).map_err(unrouted)?;
        }
        let Some(filter) = filter else { return nft(&rules.render()) };
        nft(&(rules.render() + &filter)).or_else(|_| nft(&rules.render()).and_then(|()| nft(&filter)))
    })
    .await
}

/// How long the kernel may take, after the last rule that needs it, to stop tracking connections. While it tracks them, an
/// answer to a look-up of names is lost whose question came from a port of one that we have answered within the last 30 s.
pub const SETTLE: Duration = Duration::from_millis(500);

/// Removes everything that [`apply`] made.
///
/// # Errors
/// What `nft` said. A namespace without the tables is fine.
pub async fn remove(netns: &Netns) -> io::Result<()> {
    if run_blocking(netns, let_go_here).await? {
        tokio::time::sleep(SETTLE).await;
    }
    run_blocking(netns, remove_here).await
}

/// The first part of a removal in the current network namespace: no connection is tracked any more after [`SETTLE`].
/// Whether there is a second part.
///
/// # Errors
/// What `nft` said.
pub fn let_go_here() -> io::Result<bool> {
    if run("nft", &["list", "table", "inet", rules::TABLE], None).is_err() {
        return Ok(false);
    }
    nft(&(rules::names_only() + datagrams::REMOVE)).map(|()| true)
}

/// The same in the current network namespace.
///
/// # Errors
/// What `nft` said.
pub fn remove_here() -> io::Result<()> {
    nft(&[rules::REMOVE, datagrams::REMOVE].concat())?;
    for v6 in [false, true] {
        // A kernel without IPv6 has nothing to take back.
        let _ = rules::ROUTING.release(v6);
    }
    Ok(())
}

/// Removes the tables that the proxy made in the current network namespace, the node's.
///
/// # Errors
/// What `nft` said. A namespace without the tables is fine.
pub fn remove_from_node() -> io::Result<()> {
    let tables = [fence::TABLE, probes::TABLE];
    let removed = |family: &str| {
        nft(&tables.map(|name| format!("table {family} {name}\ndelete table {family} {name}\n")).concat())
    };
    // A kernel without tables for bridges has nothing to take back.
    let _ = removed("bridge");
    removed("inet")
}

/// The rules as the kernel has them, or an error if there are none.
///
/// # Errors
/// What `nft` said.
pub async fn installed(netns: &Netns) -> io::Result<String> {
    run_blocking(netns, || run("nft", &["list", "table", "inet", rules::TABLE], None)).await
}

fn nft(script: &str) -> io::Result<()> {
    run("nft", &["-f", "-"], Some(script)).map(drop)
}

/// Most that a tool may say, bytes. Our own tables take some kilobytes; a pod that may change its namespace's rules could
/// make `nft` list any number of them into our memory.
const OUTPUT: usize = 16 << 20;

/// Runs a system tool in the current namespace and gives its output.
fn run(tool: &str, args: &[&str], input: Option<&str>) -> io::Result<String> {
    let mut child = Command::new(tool)
        .args(args)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::new(
                error.kind(),
                format!("the program `{tool}` is not installed on this node; install nftables"),
            ),
            _ => io::Error::new(error.kind(), format!("cannot run `{tool}`: {error}")),
        })?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(input.as_bytes())?;
    }
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (output, said) = thread::scope(|scope| {
        let said = scope.spawn(|| bounded(stderr));
        (bounded(stdout), said.join().unwrap_or_default())
    });
    // A tool that was cut off finds its pipe closed, and ends.
    let status = child.wait()?;
    if output.len() > OUTPUT {
        return Err(io::Error::other(format!(
            "`{tool} {}` says more than {OUTPUT} bytes: somebody has filled this namespace's rules",
            args.join(" ")
        )));
    }
    if status.success() {
        return Ok(String::from_utf8_lossy(&output).into_owned());
    }
    let said = String::from_utf8_lossy(&said);
    let first = said.lines().next().unwrap_or("no message").trim();
    Err(io::Error::other(format!("`{tool} {}` failed: {first}", args.join(" "))))
}

/// What a tool says, and one byte more if it says too much.
fn bounded(pipe: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // What came before an error is judged by the tool's status.
        let _ = pipe.take(OUTPUT as u64 + 1).read_to_end(&mut bytes);
    }
    bytes
}
