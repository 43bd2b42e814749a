//! One node with the real `bridge` and `host-local` plugins, ours installed behind them by its own installer, and a peer that
//! speaks for the node's agent.

#![allow(dead_code, unreachable_pub, reason = "two programs share this file, and neither needs all of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::fs;
use std::io::BufRead as _;
use std::io::BufReader;
use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Output;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;

use anyhow::Context as _;
use e2e::lab::programs_dir;
use e2e::netns::NetNs;
use e2e::runtime::Runtime;
use e2e::runtime::Sandbox;
use serde_json::Value;
use serde_json::json;
use tempfile::TempDir;

/// Where distributions put the plugins of the CNI project.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// Runs `test` as a root: as this process if it is one, and else in a user namespace of its own. Says so and does nothing where that
/// or the plugins are missing, which is a failure where `CI` is set.
///
/// # Panics
/// When the test fails, or cannot run and `CI` is set.
pub fn as_root(name: &str, test: fn() -> anyhow::Result<()>) {
    root(name, &["--net"], test);
}

/// The same for a test that needs what listens on this machine's loopback.
///
/// # Panics
/// When the test fails, or cannot run and `CI` is set.
pub fn as_root_here(name: &str, test: fn() -> anyhow::Result<()>) {
    root(name, &[], test);
}

fn root(name: &str, more: &[&str], test: fn() -> anyhow::Result<()>) {
    if let Err(why) = plugins() {
        assert!(std::env::var_os("CI").is_none(), "{why}");
        eprintln!("SKIPPED: {why}");
        return;
    }
    if nix::unistd::geteuid().is_root() {
        test().unwrap();
        return;
    }
    let own = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount"]).args(more).arg(own).args(["--exact", name, "--nocapture"]);
    // Its verdict is shown only if it failed: else each test would be counted twice.
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{name} failed in a user namespace:\n{said}");
}

fn plugins() -> Result<PathBuf, String> {
    let has = |folder: &PathBuf| ["bridge", "host-local"].iter().all(|name| folder.join(name).exists());
    let found = PLUGINS.iter().map(PathBuf::from).find(has);
    found.ok_or_else(|| "the CNI project's bridge and host-local plugins are missing; run .ci/tools.sh all".to_owned())
}

/// See the module's header.
pub struct World {
    folder: TempDir,
    /// The container runtime.
    pub runtime: Runtime,
    /// The node's network namespace.
    pub node: NetNs,
}

impl World {
    /// A node whose network is a bridge; ours is not installed yet.
    pub fn new() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let node = NetNs::create(folder.path(), "node")?;
        // A bridge without an address of its own takes the lowest of its ports', which changes as pods come and go; the plugin's CHECK
        // calls that a fault.
        for args in ["set lo up", "add tulle-test0 address 02:00:00:00:00:58 type bridge"] {
            let done = node.run(|| Command::new("ip").arg("link").args(args.split(' ')).status())??;
            anyhow::ensure!(done.success(), "ip link {args}");
        }
        let at = |name: &str| folder.path().join(name);
        for name in ["bin", "net.d", "ipam", "pods"] {
            fs::create_dir(at(name))?;
        }
        let plugins = plugins().map_err(anyhow::Error::msg)?;
        for name in ["bridge", "host-local"] {
            std::os::unix::fs::symlink(plugins.join(name), at("bin").join(name))?;
        }
        let runtime = Runtime::new(node.path(), &at("net.d"), &at("bin"));
        let world = Self { folder, runtime, node };
        fs::write(world.conf("10-net.conflist"), world.network("1.0.0"))?;
        Ok(world)
    }

    /// The same, with ours installed.
    pub fn installed() -> anyhow::Result<Self> {
        let world = Self::new()?;
        let output = world.cni(&["install"])?;
        anyhow::ensure!(output.status.success(), "install: {output:?}");
        Ok(world)
    }

    /// The network's own configuration.
    pub fn network(&self, version: &str) -> String {
        let ipam = json!({"type": "host-local", "dataDir": self.at("ipam"), "ranges": [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]});
        let bridge = json!({"type": "bridge", "bridge": "tulle-test0", "isGateway": true, "ipam": ipam});
        json!({"cniVersion": version, "name": "net", "plugins": [bridge]}).to_string()
    }

    /// A path below the world's folder.
    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A path in the folder of configurations.
    pub fn conf(&self, name: &str) -> PathBuf {
        self.runtime.conf_dir.join(name)
    }

    /// Our part of the configuration that is in force.
    pub fn own(&self) -> anyhow::Result<Value> {
        let list = self.runtime.configuration()?;
        let own = list["plugins"].as_array().into_iter().flatten().find(|plugin| plugin["type"] == "tulle-cni");
        own.cloned().with_context(|| format!("{list} does not end in ours"))
    }

    /// `ztunnel cni …` as a process, on this node.
    pub fn command(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(programs_dir()?.join("ztunnel"));
        command.arg("cni").args(args).stdin(Stdio::null());
        for (variable, name) in [
            ("TULLE_CNI_BIN_DIR", "bin"),
            ("TULLE_CNI_CONF_DIR", "net.d"),
            ("TULLE_CNI_STATE_DIR", "state"),
            ("TULLE_CNI_SOCKET", "cni.sock"),
        ] {
            command.env(variable, self.at(name));
        }
        // Pods of others have nothing to fear from a test: only its own processes are looked through.
        command.env("TULLE_PROC", self.at("proc")).env_remove("KUBECONFIG").env_remove("KUBERNETES_SERVICE_HOST");
        Ok(command)
    }

    /// Runs `ztunnel cni …` on this node.
    pub fn cni(&self, args: &[&str]) -> anyhow::Result<Output> {
        let mut command = self.command(args)?;
        Ok(self.node.run(|| command.output())??)
    }

    /// The network namespace of a new pod, with its loopback up, as a runtime leaves it to the plugins; it is there as long as
    /// the value.
    pub fn pod(&self, name: &str) -> anyhow::Result<(NetNs, Sandbox)> {
        let netns = NetNs::create(&self.at("pods"), &name.replace('/', "-"))?;
        netns.run(|| Command::new("ip").args(["link", "set", "lo", "up"]).status())??;
        let sandbox = Sandbox::new(name, netns.path());
        Ok((netns, sandbox))
    }

    /// What the agent would have written of namespaces: `shop` is in the mesh, `office` and `mixed` are not, and some of the
    /// pods of the last one enrol themselves.
    pub fn know(&self) -> anyhow::Result<()> {
        let known = json!({
            "version": 1,
            "rootNamespace": "tulle-system",
            "namespaces": {"shop": {"tulle.dev/mesh": "enabled"}, "office": {}, "mixed": {}},
            "selfEnrolling": ["mixed"],
        });
        fs::create_dir_all(self.at("state"))?;
        fs::write(self.at("state/namespaces.json"), known.to_string())?;
        Ok(())
    }

    /// Starts somebody who answers for the agent, until the value is dropped.
    pub fn agent(&self, answer: impl Fn(&Value) -> Option<Value> + Send + Sync + 'static) -> anyhow::Result<Agent> {
        Agent::start(&self.at("cni.sock"), answer)
    }

    /// Every file of the folders of the node's network, with its content.
    pub fn folders(&self) -> anyhow::Result<Vec<(PathBuf, Vec<u8>)>> {
        let mut found = Vec::new();
        for name in ["bin", "net.d"] {
            for entry in fs::read_dir(self.at(name))?.flatten() {
                found.push((entry.path(), fs::read(entry.path())?));
            }
        }
        found.sort();
        Ok(found)
    }
}

/// An agent: takes requests, remembers them, and answers as it is told to.
pub struct Agent {
    socket: PathBuf,
    heard: Arc<Mutex<Vec<Value>>>,
}

impl Agent {
    fn start(socket: &Path, answer: impl Fn(&Value) -> Option<Value> + Send + Sync + 'static) -> anyhow::Result<Self> {
        let _ = fs::remove_file(socket);
        let listener = UnixListener::bind(socket)?;
        let heard: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (answer, hears) = (Arc::new(answer), heard.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answer, hears) = (answer.clone(), hears.clone());
                std::thread::spawn(move || talk(stream, answer.as_ref(), &hears));
            }
        });
        Ok(Self { socket: socket.to_owned(), heard })
    }

    /// Every request so far.
    pub fn heard(&self) -> Vec<Value> {
        self.heard.lock().unwrap().clone()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The listener's thread goes with the process; nobody finds the socket any more.
        let _ = fs::remove_file(&self.socket);
    }
}

fn talk(stream: UnixStream, answer: &dyn Fn(&Value) -> Option<Value>, hears: &Mutex<Vec<Value>>) {
    let mut line = String::new();
    let Ok(1..) = BufReader::new(&stream).read_line(&mut line) else { return };
    let request: Value = serde_json::from_str(&line).unwrap_or(Value::Null);
    hears.lock().unwrap().push(request.clone());
    if let Some(answer) = answer(&request) {
        let _ = (&stream).write_all(format!("{answer}\n").as_bytes());
    }
}
