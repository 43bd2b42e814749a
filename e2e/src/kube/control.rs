//! One control plane as a child process on loopback, reading an API server or a folder, for tests without nodes.
//!
//! It says its ports in its log. Limits: children end with the thread that started them, so a test keeps it to itself.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::client::{self, Answer};
use crate::eventually::eventually;
use crate::lab::programs_dir;
use crate::place::Placement;
use crate::supervise::process::{Process, Start, signal_group};

/// Waits of tests: long enough for a slow machine under load.
const PATIENCE: Duration = Duration::from_secs(120);
/// A local answer takes milliseconds.
const ASK: Duration = Duration::from_secs(20);

/// A running control plane.
pub struct Control {
    process: Process,
    http: SocketAddr,
    grpc: SocketAddr,
}

impl Control {
    /// Starts one with `--source` and further arguments; its keys and its log are in `dir`. Returns when it listens.
    pub fn start(dir: &Path, source: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let program = programs_dir()?.join("control");
        anyhow::ensure!(program.is_file(), "{} does not exist; build it first", program.display());
        let ca = dir.join("ca").display().to_string();
        let usual = ["serve", "--source", source, "--ca-dir", &ca, "--log-format", "json"];
        let listen = ["--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"];
        let mut argv = vec![program.display().to_string()];
        argv.extend(usual.iter().chain(&listen).chain(arguments).map(|text| (*text).to_owned()));
        let log = dir.join("control.log");
        let env = BTreeMap::from([("HOME".to_owned(), "/".to_owned())]);
        let placement = Placement::default();
        let start = Start { argv: &argv, env: &env, bin: &programs_dir()?, placement: &placement, log: &log };
        let mut process = Process::start(&start)?;
        let (grpc, http) = eventually("control says where it listens", PATIENCE, || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(code) = process.exited() {
                return Err(format!("it ended with {code}:\n{text}"));
            }
            addresses(&text).ok_or(text)
        })?;
        Ok(Self { process, http, grpc })
    }

    /// One that follows an API server.
    pub fn of_cluster(dir: &Path, kubeconfig: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let kubeconfig = kubeconfig.display().to_string();
        let mut all = vec!["--kubeconfig", &kubeconfig];
        all.extend(arguments);
        Self::start(dir, "kube", &all)
    }

    /// Where its HTTP pages are.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Where nodes connect.
    pub fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// Process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// A page as text.
    pub fn page(&self, path: &str) -> anyhow::Result<Answer> {
        client::get(self.http, path, ASK)
    }

    /// A page as JSON.
    pub fn json(&self, path: &str) -> anyhow::Result<Value> {
        let answer = self.page(path)?;
        serde_json::from_str(&answer.body).with_context(|| format!("{path}: {}", answer.body))
    }

    /// Waits until `/readyz` says yes.
    pub fn await_ready(&self) -> anyhow::Result<()> {
        eventually("control is ready", PATIENCE, || {
            let answer = self.page("/readyz")?;
            if answer.status == 200 { Ok(()) } else { Err(anyhow::anyhow!("{}", answer.body)) }
        })
    }

    /// Waits until a page is as `probe` wants it, and returns it.
    pub fn wait(&self, path: &str, what: &str, probe: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        eventually(what, PATIENCE, || {
            let page = self.json(path)?;
            if probe(&page) { Ok(page) } else { Err(anyhow::anyhow!("{page}")) }
        })
    }

    /// Stops the process without ending it.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Ends a pause.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Ends it in order.
    pub fn stop(mut self) {
        self.process.ask_to_end();
        self.process.end(Instant::now() + Duration::from_secs(20));
    }

    /// Kills it.
    pub fn kill(mut self) {
        self.process.end(Instant::now());
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.process.pid() {
            signal_group(pid, signal);
        }
    }
}

/// gRPC's and HTTP's, from the line that says that control is up.
fn addresses(log: &str) -> Option<(SocketAddr, SocketAddr)> {
    log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find_map(|line| {
        let of = |name: &str| line.pointer(name)?.as_str()?.parse().ok();
        Some((of("/fields/grpc")?, of("/fields/http")?))
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn ports_are_read_from_the_log() {
        let log = "plain\n{\"fields\":{\"message\":\"x\"}}\n\
                   {\"fields\":{\"message\":\"control is up\",\"grpc\":\"127.0.0.1:1\",\"http\":\"127.0.0.1:2\"}}\n";
        let found = super::addresses(log).unwrap();
        assert_eq!((found.0.port(), found.1.port()), (1, 2));
        assert!(super::addresses("{}").is_none());
    }
}
