//! A lab as a value: started, changed, asked, and gone when dropped. Scenario tests, the demo and the `lab` program
//! all go through here.
//!
//! Everything inside the lab's namespaces is done by its supervisor or by a `lab exec` child, so the caller needs no
//! privilege and its threads stay where they are. Limits: the `lab` program must have been built beside the caller.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Output;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use serde_json::Value;
use tulle_proto::names;

use crate::eventually::eventually;
use crate::kube::ApiServer;
use crate::sniff::Sniffed;
use crate::state::Api;
use crate::state::Config;
use crate::state::Paths;
use crate::state::View;
use crate::supervise::Reply;
use crate::supervise::Request;
use crate::topology;

/// What a test wants of its lab.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// A directory to run and to watch.
    pub dir: Option<PathBuf>,
    /// Manifests applied at once, as YAML.
    pub objects: String,
    /// Number of nodes.
    pub nodes: u16,
    /// Where the programs are; none = beside the caller.
    pub bin_dir: Option<PathBuf>,
    /// Where state goes; none = a temporary directory.
    pub state: Option<PathBuf>,
    /// Time for each change.
    pub timeout: Duration,
    /// Whether control and ztunnel run.
    pub mesh: bool,
    /// Variables by component: `control`, `ztunnel` (all nodes), `node-1`.
    pub env: BTreeMap<String, BTreeMap<String, String>>,
    /// Arguments by component.
    pub args: BTreeMap<String, Vec<String>>,
    /// Programs by component, in place of the usual.
    pub programs: BTreeMap<String, PathBuf>,
    /// Nodes whose proxy is handed its pods by an agent, as Istio's is.
    pub handed: BTreeSet<String>,
    /// The API server in which the lab's objects live; none = files are control's source.
    pub api: Option<Api>,
}

impl Default for LabConfig {
    fn default() -> Self {
        Self {
            dir: None,
            objects: String::new(),
            nodes: 2,
            bin_dir: None,
            state: None,
            timeout: Duration::from_secs(60),
            mesh: true,
            env: BTreeMap::new(),
            args: BTreeMap::new(),
            programs: BTreeMap::new(),
            handed: BTreeSet::new(),
            api: None,
        }
    }
}

impl LabConfig {
    /// A lab of these manifests on two nodes.
    pub fn of(objects: &str) -> Self {
        Self { objects: objects.into(), ..Self::default() }
    }

    /// Sets a variable of a component.
    #[must_use]
    pub fn env(mut self, component: &str, name: &str, value: &str) -> Self {
        self.env.entry(component.into()).or_default().insert(name.into(), value.into());
        self
    }

    /// Lets the objects live in an API server, which control watches. With `agents`, the nodes' proxies find their pods
    /// there too; otherwise the lab hands them a file.
    pub fn in_cluster(mut self, api: &ApiServer, agents: bool) -> anyhow::Result<Self> {
        let kubeconfig = api.kubeconfig();
        let inside = api.in_lab(&kubeconfig)?;
        let agent = agents.then(|| inside.clone());
        self.api = Some(Api { server: api.address(), kubeconfig, control: inside, agent });
        Ok(self)
    }
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    paths: Paths,
    program: PathBuf,
    timeout: Duration,
    supervisor: Option<Child>,
}

impl Lab {
    /// Starts a lab that ends with this value or this process, and waits until everything is as wanted.
    pub fn up(config: LabConfig) -> anyhow::Result<Self> {
        let lab = Self::start(&config, true)?;
        if !config.objects.is_empty() {
            lab.apply_yaml(&config.objects)?;
        } else {
            require_settled(lab.settle(config.timeout, &mut |_| {})?)?;
        }
        Ok(lab)
    }

    /// Starts the supervisor only. Not `tied`: it lives on until `lab down`.
    pub fn start(config: &LabConfig, tied: bool) -> anyhow::Result<Self> {
        if let Some(missing) = topology::missing_tools() {
            anyhow::bail!("{missing}");
        }
        let bin_dir = match &config.bin_dir {
            Some(dir) => dir.canonicalize().with_context(|| format!("{} does not exist", dir.display()))?,
            // Another build of the same programs, such as the release one.
            None => std::env::var_os("LAB_BIN_DIR").map(PathBuf::from).map_or_else(programs_dir, Ok)?,
        };
        let program = lab_program(&bin_dir)?;
        let state = config.state.clone().unwrap_or_else(temporary_state);
        let paths = Paths(state);
        refuse_second(&paths)?;
        prepare(&paths, &program)?;
        let told = Config {
            dir: config.dir.as_deref().map(canonical).transpose()?,
            nodes: config.nodes,
            bin_dir,
            timeout_s: config.timeout.as_secs_f64(),
            mesh: config.mesh,
            env: config.env.clone(),
            args: config.args.clone(),
            programs: config.programs.clone(),
            handed: config.handed.clone(),
            api: config.api.clone(),
            tied,
        };
        std::fs::write(paths.config(), serde_json::to_string_pretty(&told)?)?;
        let log = std::fs::File::create(paths.log("lab"))?;
        let mut command = Command::new(&program);
        command.arg("supervise").arg("--state").arg(&paths.0);
        command.stdin(if tied { Stdio::piped() } else { Stdio::null() });
        command.stdout(log.try_clone()?).stderr(log).process_group(0);
        let supervisor = command.spawn().with_context(|| format!("{} cannot be started", program.display()))?;
        let mut lab = Self { paths, program, timeout: config.timeout, supervisor: Some(supervisor) };
        lab.await_supervisor()?;
        Ok(lab)
    }

    /// The lab whose state is at `state`, to be used but not ended.
    pub fn attach(state: &Path) -> anyhow::Result<Self> {
        let paths = Paths(state.to_path_buf());
        View::read(&paths)?;
        let program = lab_program(&programs_dir()?)?;
        Ok(Self { paths, program, timeout: Duration::from_secs(60), supervisor: None })
    }

    /// Leaves the lab running when this value goes. Only for labs that were started untied.
    pub fn leave(mut self) {
        self.supervisor = None;
    }

    fn await_supervisor(&mut self) -> anyhow::Result<()> {
        let log = self.paths.log("lab");
        let Some(supervisor) = self.supervisor.as_mut() else { return Ok(()) };
        let deadline = Instant::now() + self.timeout;
        while UnixStream::connect(self.paths.socket()).is_err() {
            let ended = supervisor.try_wait()?;
            anyhow::ensure!(
                ended.is_none() && Instant::now() < deadline,
                "the lab did not start: {}",
                std::fs::read_to_string(&log).unwrap_or_default().trim()
            );
            std::thread::sleep(crate::eventually::INTERVAL);
        }
        Ok(())
    }

    /// Paths of the state directory.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The view as of now.
    pub fn view(&self) -> anyhow::Result<View> {
        match self.request(&Request::Status, &mut |_| {})? {
            Reply::View(view) => Ok(*view),
            other => anyhow::bail!("unexpected answer {other:?}"),
        }
    }

    /// Waits until everything wanted is so; returns what is missing when time is up.
    pub fn settle(&self, timeout: Duration, say: &mut dyn FnMut(&str)) -> anyhow::Result<Vec<String>> {
        missing(self.request(&Request::Settle { timeout_s: timeout.as_secs_f64() }, say)?)
    }

    /// Applies manifests and waits until they are in force. An error names what is missing.
    pub fn apply_yaml(&self, text: &str) -> anyhow::Result<()> {
        require_settled(self.try_apply("the applied text", text, self.timeout)?)
    }

    /// Applies manifests; returns what is not in force within `timeout`.
    pub fn try_apply(&self, origin: &str, text: &str, timeout: Duration) -> anyhow::Result<Vec<String>> {
        let (origin, text) = (origin.to_owned(), text.to_owned());
        missing(self.request(&Request::Apply { origin, text, timeout_s: timeout.as_secs_f64() }, &mut |_| {})?)
    }

    /// Deletes an object, named `namespace/name`, and waits until that is in force.
    pub fn delete(&self, kind: &str, name: &str) -> anyhow::Result<()> {
        require_settled(self.try_delete(kind, name, self.timeout)?)
    }

    /// The same; returns what is not in force within `timeout`.
    pub fn try_delete(&self, kind: &str, name: &str, timeout: Duration) -> anyhow::Result<Vec<String>> {
        let (namespace, name) = name.split_once('/').unwrap_or(("", name));
        let request = Request::Delete {
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
            timeout_s: timeout.as_secs_f64(),
        };
        missing(self.request(&request, &mut |_| {})?)
    }

    /// GET of control's HTTP, as JSON.
    pub fn control_get(&self, path: &str) -> anyhow::Result<Value> {
        self.get_json("control", names::PORT_CONTROL_HTTP, path)
    }

    /// GET of a node's admin, as JSON.
    pub fn node_admin(&self, node: &str, path: &str) -> anyhow::Result<Value> {
        self.get_json(node, names::PORT_ADMIN, path)
    }

    /// GET on loopback inside a component's namespace: status and body.
    pub fn get(&self, component: &str, port: u16, path: &str) -> anyhow::Result<(u16, String)> {
        let request = Request::Get { component: component.into(), port, path: path.into() };
        match self.request(&request, &mut |_| {})? {
            Reply::Answer { status, body } => Ok((status, body)),
            other => anyhow::bail!("unexpected answer {other:?}"),
        }
    }

    fn get_json(&self, component: &str, port: u16, path: &str) -> anyhow::Result<Value> {
        let (status, body) = self.get(component, port, path)?;
        anyhow::ensure!(status == 200, "{component}{path} answers {status}: {}", body.trim());
        serde_json::from_str(&body).with_context(|| format!("{component}{path} does not answer JSON"))
    }

    /// Sends a signal (`KILL`, `TERM`, …) to `control`, `node-1` or `namespace/pod`, and waits until it is gone when the
    /// signal is one that ends it.
    pub fn kill(&self, component: &str, signal: &str) -> anyhow::Result<()> {
        self.request(&Request::Kill { component: component.into(), signal: signal.into() }, &mut |_| {})?;
        if !["KILL", "TERM"].contains(&signal) || component.contains('/') {
            return Ok(());
        }
        eventually(&format!("{component} ends"), Duration::from_secs(60), || {
            let view = self.view()?;
            let alive = view.nodes.iter().chain([&view.control]).any(|it| it.name == component && it.pid.is_some());
            if alive { Err(anyhow::anyhow!("it still runs")) } else { Ok(()) }
        })
    }

    /// Starts `control` or a node's proxy again; does not wait for readiness.
    pub fn restart(&self, component: &str) -> anyhow::Result<()> {
        self.restart_with(component, None, &[])
    }

    /// The same with another program and further variables.
    pub fn restart_with(&self, component: &str, program: Option<&Path>, env: &[(&str, &str)]) -> anyhow::Result<()> {
        let request = Request::Start {
            component: component.into(),
            program: program.map(Path::to_path_buf),
            env: env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        };
        self.request(&request, &mut |_| {})?;
        Ok(())
    }

    /// Starts the process that is to replace a node's proxy; does not wait until it does.
    pub fn begin_replacing(&self, node: &str) -> anyhow::Result<()> {
        self.begin_replacing_with(node, None)
    }

    fn begin_replacing_with(&self, node: &str, program: Option<&Path>) -> anyhow::Result<()> {
        let request = Request::Replace { component: node.into(), program: program.map(Path::to_path_buf) };
        self.request(&request, &mut |_| {})?;
        Ok(())
    }

    /// Replaces a node's proxy while it serves: a new process takes its listeners over, and it drains. Returns once the
    /// new one serves.
    pub fn replace(&self, node: &str) -> anyhow::Result<()> {
        self.replace_with(node, None)
    }

    /// The same by another program.
    pub fn replace_with(&self, node: &str, program: Option<&Path>) -> anyhow::Result<()> {
        self.begin_replacing_with(node, program)?;
        eventually(&format!("a new process serves {node}"), Duration::from_secs(60), || {
            let view = self.view()?;
            let pid = view.nodes.iter().find(|it| it.name == node).and_then(|it| it.pid);
            let pid = pid.with_context(|| format!("the new process of {node} has ended; see its log"))?;
            let status = self.node_admin(node, "/status")?;
            anyhow::ensure!(status["pid"] == pid && status["ready"] == true, "process {pid} is wanted: {status}");
            Ok(())
        })
    }

    /// A command that will run in a pod (`namespace/pod` or `namespace/deployment`), on a node, in `control` or in the
    /// `fabric`.
    pub fn command(&self, place: &str, argv: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("exec").arg("--state").arg(&self.paths.0).arg(place).arg("--").args(argv);
        command
    }

    /// Runs a command to its end; its exit code is in the output.
    pub fn exec(&self, place: &str, argv: &[&str]) -> anyhow::Result<Output> {
        let output = self.command(place, argv).stdin(Stdio::null()).output();
        output.with_context(|| format!("{argv:?} cannot be run in {place}"))
    }

    /// Runs a command that must succeed; returns its standard output.
    pub fn exec_ok(&self, place: &str, argv: &[&str]) -> anyhow::Result<String> {
        let output = self.exec(place, argv)?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        anyhow::ensure!(output.status.success(), "{argv:?} in {place}: {}\n{out}{err}", output.status);
        Ok(out.into_owned())
    }

    /// Starts a command whose output and input the caller gets; it is killed when dropped.
    pub fn spawn(&self, place: &str, argv: &[&str]) -> anyhow::Result<Running> {
        Running::start(self.command(place, argv), &format!("{argv:?} in {place}"))
    }

    /// Starts capturing on a node's link to the fabric; `markers` are counted. Returns once it captures.
    pub fn sniff(&self, node: &str, markers: &[&str]) -> anyhow::Result<Sniffer> {
        Sniffer::start(markers, |argv| self.spawn(node, argv))
    }

    /// Starts `shop load` in a pod; it runs until [`Load::finish`].
    pub fn load(&self, from: &str, targets: &[&str], rate: f64, more: &[&str]) -> anyhow::Result<Load> {
        Load::start(targets, rate, more, |argv| self.spawn(from, argv))
    }

    /// The log of a component: `control`, `node-1`, `lab`, or `namespace_pod`.
    pub fn log(&self, component: &str) -> String {
        let bytes = std::fs::read(self.paths.log(&component.replace('/', "_"))).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// First IPv4 address of a pod.
    pub fn pod_ip(&self, namespace: &str, pod: &str) -> anyhow::Result<String> {
        let view = self.view()?;
        let pod = view.pod(namespace, pod).with_context(|| format!("there is no pod {namespace}/{pod}"))?;
        pod.addresses.first().cloned().context("a pod without an address")
    }

    fn request(&self, request: &Request, say: &mut dyn FnMut(&str)) -> anyhow::Result<Reply> {
        let stream = UnixStream::connect(self.paths.socket()).with_context(|| {
            format!("no lab runs at {}; start one with `lab up <dir>`, or name its --state", self.paths.0.display())
        })?;
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        (&stream).write_all(line.as_bytes())?;
        for line in BufReader::new(&stream).lines() {
            match serde_json::from_str(&line?).context("the supervisor is of another version")? {
                Reply::Progress(text) => say(&text),
                Reply::Error(text) => anyhow::bail!("{text}"),
                reply => return Ok(reply),
            }
        }
        anyhow::bail!("the lab ended without an answer; its log is {}", self.paths.log("lab").display())
    }

    /// Ends the lab and removes its state; `keep_logs` leaves the logs.
    pub fn down(&mut self, keep_logs: bool) -> anyhow::Result<()> {
        let view = View::read(&self.paths).ok();
        let asked = self.request(&Request::Down, &mut |_| {});
        if let Some(mut supervisor) = self.supervisor.take() {
            // Its standard input ends here, which ends it too if the request did not reach it.
            drop(supervisor.stdin.take());
            if asked.is_err() {
                let _ = supervisor.kill();
            }
            supervisor.wait()?;
        } else if let Some(view) = &view {
            end_supervisor(view.pid, asked.is_err())?;
        }
        remove_state(&self.paths, keep_logs)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.supervisor.is_none() {
            return;
        }
        // A failed test wants its logs.
        let keep = std::thread::panicking() || std::env::var_os("KEEP_LOGS").is_some();
        if keep {
            eprintln!("logs are kept in {}", self.paths.logs().display());
        }
        if let Err(error) = self.down(keep) {
            eprintln!("the lab at {} did not end cleanly: {error:#}", self.paths.0.display());
        }
    }
}

/// A command that runs in the lab.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
}

impl Running {
    /// Starts it; `what` it is goes into the error.
    pub fn start(mut command: Command, what: &str) -> anyhow::Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().with_context(|| format!("{what} cannot be run"))?;
        Ok(Self { child: Some(child) })
    }

    /// The child process.
    pub fn child(&mut self) -> Option<&mut Child> {
        self.child.as_mut()
    }

    /// Closes its standard input and waits for its end.
    pub fn finish(mut self) -> anyhow::Result<Output> {
        let mut child = self.child.take().context("it has ended already")?;
        drop(child.stdin.take());
        Ok(child.wait_with_output()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A capture under way.
#[derive(Debug)]
pub struct Sniffer {
    running: Running,
    lines: BufReader<std::process::ChildStdout>,
}

impl Sniffer {
    /// Starts one on interface `eth0` of where `spawn` runs things, and returns once it captures.
    pub fn start(markers: &[&str], spawn: impl FnOnce(&[&str]) -> anyhow::Result<Running>) -> anyhow::Result<Self> {
        let mut argv = vec!["lab", "sniff", "--interface", "eth0"];
        for marker in markers {
            argv.extend(["--marker", marker]);
        }
        let mut running = spawn(&argv)?;
        let stdout = running.child().and_then(|child| child.stdout.take()).context("no output of the capture")?;
        let mut lines = BufReader::new(stdout);
        let mut line = String::new();
        lines.read_line(&mut line)?;
        anyhow::ensure!(line.contains("capturing"), "the capture did not start");
        Ok(Self { running, lines })
    }

    /// Ends the capture; an error if it lost frames, since then it proves nothing.
    pub fn finish(mut self) -> anyhow::Result<Sniffed> {
        if let Some(child) = self.running.child() {
            drop(child.stdin.take());
        }
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        let sniffed: Sniffed = serde_json::from_str(&line).with_context(|| format!("the capture said {line:?}"))?;
        anyhow::ensure!(sniffed.lost == 0, "the capture lost {} frames and proves nothing", sniffed.lost);
        Ok(sniffed)
    }
}

/// A load under way.
#[derive(Debug)]
pub struct Load {
    running: Running,
    reader: std::thread::JoinHandle<Vec<Value>>,
}

impl Load {
    /// Starts one where `spawn` runs things.
    pub fn start(
        targets: &[&str],
        rate: f64,
        more: &[&str],
        spawn: impl FnOnce(&[&str]) -> anyhow::Result<Running>,
    ) -> anyhow::Result<Self> {
        let rate = rate.to_string();
        let argv = [&["shop", "load", "--until-eof", "--rate", &rate], more, targets].concat();
        let mut running = spawn(&argv)?;
        let stdout = running.child().and_then(|child| child.stdout.take()).context("no output of the load")?;
        // The lines are kept here: a full pipe would stall the load, which a test would take for the mesh's fault.
        let reader = std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).filter_map(|l| serde_json::from_str(&l).ok()).collect()
        });
        Ok(Self { running, reader })
    }

    /// Ends the load; one report a request that was answered or failed.
    pub fn finish(self) -> anyhow::Result<Vec<Value>> {
        self.running.finish()?;
        self.reader.join().map_err(|_| anyhow::anyhow!("the reader of the load panicked"))
    }
}

fn missing(reply: Reply) -> anyhow::Result<Vec<String>> {
    match reply {
        Reply::Done { missing } => Ok(missing),
        other => anyhow::bail!("unexpected answer {other:?}"),
    }
}

fn require_settled(missing: Vec<String>) -> anyhow::Result<()> {
    anyhow::ensure!(missing.is_empty(), "not everything is as wanted:\n  {}", missing.join("\n  "));
    Ok(())
}

/// The directory with the programs: that of this one, or its parent for a test.
pub fn programs_dir() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("the path of this program is unknown")?;
    let dir = own.parent().context("a program without a directory")?;
    let dir = if dir.ends_with("deps") || dir.ends_with("examples") { dir.parent().unwrap_or(dir) } else { dir };
    Ok(dir.to_path_buf())
}

fn lab_program(bin_dir: &Path) -> anyhow::Result<PathBuf> {
    let beside = programs_dir()?.join("lab");
    let path = if beside.is_file() { beside } else { bin_dir.join("lab") };
    anyhow::ensure!(path.is_file(), "{} does not exist; build it with `cargo build -p e2e`", path.display());
    Ok(path)
}

fn canonical(dir: &Path) -> anyhow::Result<PathBuf> {
    dir.canonicalize().with_context(|| format!("{} cannot be read", dir.display()))
}

/// A directory that no other lab uses: process and count.
fn temporary_state() -> PathBuf {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    std::env::temp_dir().join(format!("tulle-lab-{}-{count}", std::process::id()))
}

fn refuse_second(paths: &Paths) -> anyhow::Result<()> {
    if UnixStream::connect(paths.socket()).is_ok() {
        anyhow::bail!("a lab runs at {} already; end it with `lab down`, or choose another --state", paths.0.display());
    }
    // Left by a killed lab; its processes died with it.
    remove_state(paths, false)
}

fn prepare(paths: &Paths, program: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    for dir in [&paths.0, &paths.objects(), &paths.netns(), &paths.logs(), &paths.ca(), &paths.bin()] {
        builder.create(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    }
    for name in ["shop", "lab"] {
        std::os::unix::fs::symlink(program, paths.bin().join(name))?;
    }
    Ok(())
}

fn end_supervisor(pid: u32, unreachable: bool) -> anyhow::Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
    let is_lab = || {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).any(|word| word == b"supervise")
    };
    // The number may belong to another process by now.
    if unreachable && is_lab() {
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
    eventually("the supervisor ends", Duration::from_secs(20), || {
        if is_lab() { Err(format!("process {pid} still runs")) } else { Ok(()) }
    })
}

/// Beginnings of names of further files of the state.
const STATE_PREFIXES: [&str; 9] = [
    "pods-node-",
    "agent-node-",
    "agent-state-node-",
    "proc-node-",
    "handover-node-",
    "token-node-",
    ".pods-node-",
    ".token-node-",
    ".lab.json",
];

/// Removes what the lab made, entry by entry: a wrong path must not cost anybody else's files.
fn remove_state(paths: &Paths, keep_logs: bool) -> anyhow::Result<()> {
    let Ok(entries) = std::fs::read_dir(&paths.0) else { return Ok(()) };
    let ours = ["objects", "netns", "logs", "ca", "bin", "etc", "lab.sock", "lab.json", "config.json", "lock"];
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let known = ours.contains(&name.as_str()) || STATE_PREFIXES.iter().any(|p| name.starts_with(p));
        if !known || (keep_logs && name == "logs") {
            continue;
        }
        let path = entry.path();
        let removed = if path.is_dir() && !path.is_symlink() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        removed.with_context(|| format!("{} cannot be removed", path.display()))?;
    }
    // Not empty: the logs, or something that is not ours.
    let _ = std::fs::remove_dir(&paths.0);
    Ok(())
}
