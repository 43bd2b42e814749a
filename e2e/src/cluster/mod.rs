//! A real Kubernetes cluster on one machine: etcd, the API server and its controllers, and nodes with containerd, runc,
//! the CNI's own plugins, kubelet and kube-proxy, each on a machine of its own made of namespaces.
//!
//! Nothing is asked of a container engine or a registry: programs come from the user's cache (`.ci/kube.sh all`) and from
//! the system's packages (`.ci/tools.sh kube`), images are archives of files of this machine. No link or route leads
//! out. Whatever runs ends with its machine ([`machine`]), and a machine that ended can be started again on the same
//! disk, which is how a reboot is played. Limits: root; one control plane; IPv4.

pub mod cli;
pub mod config;
pub mod dns;
pub mod image;
pub mod layout;
pub mod machine;
pub mod spec;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Output;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use serde_json::Value;

use crate::cluster::layout::Folder;
use crate::cluster::machine::Spec;
use crate::eventually::eventually;
use crate::kube::programs;
use crate::lab::programs_dir;
use crate::topology;

/// Long enough for a slow and busy machine; nothing waits that long when all is well.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its folder; everything that it writes is below.
    pub folder: PathBuf,
    /// Number of nodes.
    pub nodes: u16,
    /// It ends with the caller.
    pub tied: bool,
    /// Its proxies are those that can be broken on purpose (`ztunnel-sabotage`).
    pub sabotaged: bool,
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    folder: Folder,
    nodes: u16,
    tied: bool,
    /// Keepers that this process started; by machine.
    keepers: Vec<(String, Child)>,
    programs: PathBuf,
}

impl Cluster {
    /// Starts one and waits until its nodes are ready; `say` is told what is going on.
    ///
    /// # Errors
    /// What is missing on this machine, or which program did not start, with its log's place. What was started is ended.
    pub fn up(plan: &Plan, say: &mut dyn FnMut(&str)) -> anyhow::Result<Self> {
        anyhow::ensure!(nix::unistd::geteuid().is_root(), "a cluster takes root: its nodes mount file systems");
        anyhow::ensure!((1..=layout::NODES_MAX).contains(&plan.nodes), "1 to {} nodes", layout::NODES_MAX);
        missing_tools()?;
        let programs = kube_programs()?;
        let folder = Folder(plan.folder.clone());
        anyhow::ensure!(
            !folder.0.join("cluster.json").exists(),
            "{} holds a cluster already; end it with `lab cluster down`",
            folder.0.display()
        );
        for path in [&folder.0, &programs, &programs_dir()?] {
            let hidden = machine::HIDDEN.iter().find(|place| path.starts_with(place));
            anyhow::ensure!(hidden.is_none(), "{} is not visible on the nodes; choose another place", path.display());
        }
        fs::create_dir_all(folder.images())?;
        fs::write(folder.0.join("cluster.json"), format!("{{\"nodes\": {}}}", plan.nodes))?;
        let mut cluster = Self { folder, nodes: plan.nodes, tied: plan.tied, keepers: Vec::new(), programs };
        match cluster.start(plan.sabotaged, say) {
            Ok(()) => Ok(cluster),
            Err(error) => {
                let kept = std::env::var_os("KEEP_LOGS").is_some();
                if !kept && let Err(more) = cluster.down() {
                    eprintln!("what was started could not be ended cleanly: {more:#}");
                }
                Err(error)
            }
        }
    }

    fn start(&mut self, sabotaged: bool, say: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
        spec::secrets(&self.folder, self.nodes)?;
        let control = spec::control(&self.folder, &self.programs, self.nodes)?;
        self.begin(layout::CONTROL, &control)?;
        // Written while the API server starts.
        spec::images(&self.folder, sabotaged)?;
        say("images are made");
        self.booted(layout::CONTROL)?;
        say("the control plane runs");
        self.begin(layout::OUTSIDE, &spec::outside(self.nodes)?)?;
        for node in 1..=self.nodes {
            let spec = spec::node(&self.folder, &self.programs, node, self.nodes)?;
            self.begin(&layout::node_name(node), &spec)?;
        }
        self.booted(layout::OUTSIDE)?;
        for node in 1..=self.nodes {
            self.booted(&layout::node_name(node))?;
        }
        say("the nodes' programs run");
        self.apply(&config::dns_objects())?;
        for node in 1..=self.nodes {
            self.await_ready(&layout::node_name(node))?;
        }
        say("the nodes are ready");
        Ok(())
    }

    /// A cluster that runs already.
    pub fn attach(folder: &Path) -> anyhow::Result<Self> {
        let folder = Folder(folder.to_path_buf());
        let text = fs::read_to_string(folder.0.join("cluster.json"))
            .with_context(|| format!("no cluster runs at {}; start one with `lab cluster up`", folder.0.display()))?;
        let nodes = serde_json::from_str::<Value>(&text)?["nodes"].as_u64().unwrap_or(1);
        Ok(Self { folder, nodes: nodes as u16, tied: false, keepers: Vec::new(), programs: kube_programs()? })
    }

    /// Its folders.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Names of its nodes.
    pub fn nodes(&self) -> Vec<String> {
        (1..=self.nodes).map(layout::node_name).collect()
    }

    /// Starts a machine: its keeper, and its link.
    fn begin(&mut self, name: &str, spec: &Spec) -> anyhow::Result<()> {
        let machine = self.folder.machine(name);
        fs::create_dir_all(&machine.0)?;
        fs::write(machine.spec(), serde_json::to_string_pretty(spec)?)?;
        for stale in [machine.init(), machine.booted()] {
            if stale.exists() {
                fs::remove_file(stale)?;
            }
        }
        let log = fs::OpenOptions::new().create(true).append(true).open(machine.0.join("machine.log"))?;
        let mut command = Command::new(programs_dir()?.join("lab"));
        command.args(["cluster", "keep"]).arg(&machine.0).process_group(0).stdout(log.try_clone()?).stderr(log);
        match self.tied {
            true => command.arg("--tied").stdin(Stdio::piped()),
            false => command.stdin(Stdio::null()),
        };
        let keeper = command.spawn().context("a machine cannot be started")?;
        fs::write(machine.keeper(), keeper.id().to_string())?;
        self.keepers.push((name.to_owned(), keeper));
        let init = eventually(&format!("{name} begins"), PATIENCE, || self.init(name))?;
        if spec.linked {
            let control = self.netns(layout::CONTROL)?;
            // The end of one that was there before goes when the kernel has taken its namespace apart.
            let _ = topology::ip(&control, &format!("link del {name}\n"));
            let script =
                format!("link add {name} type veth peer name eth0 netns {init}\nlink set {name} master br0 up\n");
            eventually(&format!("the link of {name}"), PATIENCE, || topology::ip(&control, &script))?;
        }
        Ok(())
    }

    /// Waits until the programs of a machine were started.
    fn booted(&mut self, name: &str) -> anyhow::Result<()> {
        let machine = self.folder.machine(name);
        let keeper = self.keepers.iter_mut().find(|(it, _)| it == name).map(|(_, keeper)| keeper);
        let keeper = keeper.with_context(|| format!("{name} was not started"))?;
        let logs = machine.logs();
        let said = eventually(&format!("{name} boots; its logs are in {}", logs.display()), PATIENCE, || {
            match fs::read_to_string(machine.booted()) {
                Ok(said) if !said.is_empty() => Ok(Ok(said)),
                _ if keeper.try_wait().is_ok_and(|ended| ended.is_some()) => Ok(Err("it has ended".to_owned())),
                other => Err(format!("{other:?}")),
            }
        })?;
        match said {
            Ok(said) if said == "ok" => Ok(()),
            Ok(said) | Err(said) => anyhow::bail!("{name} did not boot: {said}; its logs are in {}", logs.display()),
        }
    }

    /// Process id of a machine's first process, if it runs.
    fn init(&self, name: &str) -> anyhow::Result<u32> {
        let machine = self.folder.machine(name);
        let pid: u32 = fs::read_to_string(machine.init()).with_context(|| format!("{name} does not run"))?.parse()?;
        // Numbers are used again.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let own = String::from_utf8_lossy(&line).contains(&machine.0.display().to_string());
        anyhow::ensure!(own, "{name} has ended");
        Ok(pid)
    }

    /// The network namespace of a machine.
    pub fn netns(&self, name: &str) -> anyhow::Result<PathBuf> {
        Ok(PathBuf::from(format!("/proc/{}/ns/net", self.init(name)?)))
    }

    /// Cuts a machine's power and waits until nothing of it is left but its disk.
    pub fn power_off(&mut self, name: &str) -> anyhow::Result<()> {
        if let Ok(init) = self.init(name) {
            machine::end(init);
        }
        if let Some(at) = self.keepers.iter().position(|(it, _)| it == name) {
            let (_, mut keeper) = self.keepers.swap_remove(at);
            drop(keeper.stdin.take());
            keeper.wait()?;
        }
        eventually(&format!("{name} ends"), PATIENCE, || match self.init(name) {
            Ok(pid) => Err(format!("process {pid} is there")),
            Err(_) => Ok(()),
        })?;
        let cgroup = spec::cgroup(&self.folder, name);
        eventually(&format!("the cgroups of {name} are empty"), PATIENCE, || match machine::remove_cgroup(&cgroup) {
            true => Ok(()),
            false => Err(format!("{:?}", machine::cgroups(&cgroup))),
        })
    }

    /// Starts a node again on the same disk.
    pub fn power_on(&mut self, name: &str) -> anyhow::Result<()> {
        let spec = serde_json::from_str(&fs::read_to_string(self.folder.machine(name).spec())?)?;
        self.begin(name, &spec)?;
        self.booted(name)
    }

    /// Waits until a node is ready.
    pub fn await_ready(&self, node: &str) -> anyhow::Result<()> {
        eventually(&format!("{node} is ready"), PATIENCE, || {
            let said =
                self.kubectl(&["get", "node", node, "-o", "jsonpath={.status.conditions[?(@.type=='Ready')]}"])?;
            if said.contains("\"status\":\"True\"") { Ok(()) } else { Err(anyhow::anyhow!("{said}")) }
        })
    }

    /// A command on a machine; it finds `kubectl` and the cluster.
    pub fn command(&self, place: &str, argv: &[&str]) -> anyhow::Result<Command> {
        let init = self.init(place)?;
        let mut path = self.programs.clone().into_os_string();
        path.push(":");
        path.push(programs_dir()?);
        path.push(":");
        path.push(topology::search_path());
        let mut command = Command::new("nsenter");
        command.args(["--target", &init.to_string(), "--mount", "--net", "--uts", "--pid", "--"]).args(argv);
        command.env("PATH", path).env("KUBECONFIG", self.folder.kubeconfig("admin"));
        Ok(command)
    }

    /// `kubectl` as the cluster's administrator; what it printed.
    pub fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let argv = [&["kubectl"], arguments].concat();
        let output = self.command(layout::CONTROL, &argv)?.stdin(Stdio::null()).output()?;
        said(&argv, &output)
    }

    /// The same, as JSON.
    pub fn get(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = self.kubectl(&[&["get"], arguments, &["-o", "json"]].concat())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// `kubectl apply` of manifests.
    pub fn apply(&self, yaml: &str) -> anyhow::Result<String> {
        let argv = ["kubectl", "apply", "--server-side", "--force-conflicts", "-f", "-"];
        let mut command = self.command(layout::CONTROL, &argv)?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // An early end of kubectl shows in its exit status below.
            let _ = std::io::Write::write_all(&mut stdin, yaml.as_bytes());
        }
        said(&argv, &child.wait_with_output()?)
    }

    /// A command in a container of a pod.
    pub fn exec(&self, namespace: &str, pod: &str, argv: &[&str]) -> anyhow::Result<Output> {
        Ok(self.exec_command(namespace, pod, argv)?.stdin(Stdio::null()).output()?)
    }

    /// The same, to be started by the caller; its input reaches the command.
    pub fn exec_command(&self, namespace: &str, pod: &str, argv: &[&str]) -> anyhow::Result<Command> {
        self.command(layout::CONTROL, &[&["kubectl", "exec", "-i", "-n", namespace, pod, "--"], argv].concat())
    }

    /// Ends all of it and removes its folder.
    pub fn down(&mut self) -> anyhow::Result<()> {
        let mut machines = self.nodes();
        machines.extend([layout::OUTSIDE.to_owned(), layout::CONTROL.to_owned()]);
        let results: Vec<_> = machines.iter().map(|name| self.power_off(name)).collect();
        results.into_iter().collect::<anyhow::Result<Vec<()>>>()?;
        fs::remove_dir_all(&self.folder.0).with_context(|| format!("{} cannot be removed", self.folder.0.display()))
    }

    /// Lets it run on without this process.
    pub fn leave(mut self) {
        self.keepers.clear();
    }
}

fn said(argv: &[&str], output: &Output) -> anyhow::Result<String> {
    let complaint = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{argv:?}: {}: {}", output.status, complaint.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Fails when this machine lacks a program, and says how to get it.
fn missing_tools() -> anyhow::Result<()> {
    let needed = ["ip", "nft", "nsenter", "ldd", "etcd", "containerd", "ctr", "runc", "busybox"];
    let path = topology::search_path();
    let found = |name: &&str| std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    let missing: Vec<&str> = needed.into_iter().filter(|name| !found(name)).collect();
    anyhow::ensure!(missing.is_empty(), "this machine lacks {}; run `.ci/tools.sh kube`", missing.join(", "));
    anyhow::ensure!(
        Path::new(spec::CNI_PROGRAMS).join("ptp").is_file(),
        "this machine lacks the CNI plugins ({}); run `.ci/tools.sh kube`",
        spec::CNI_PROGRAMS
    );
    Ok(())
}

/// The folder of Kubernetes' own programs.
fn kube_programs() -> anyhow::Result<PathBuf> {
    let needed = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"];
    let found = needed.map(programs::find).into_iter().collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| anyhow::anyhow!("{error} (a cluster takes `.ci/kube.sh all`)"))?;
    let folder = found[0].parent().context("a folder")?.to_path_buf();
    let apart = found.iter().find(|program| program.parent() != Some(&folder));
    anyhow::ensure!(
        apart.is_none(),
        "{apart:?} is not in {}; a cluster's programs are in one folder",
        folder.display()
    );
    Ok(folder)
}
