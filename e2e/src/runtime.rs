//! A container runtime as CNI plugins see it: it reads a folder of configurations, takes the first that is valid, and runs the
//! plugins of it for a container, each with the result of the one before.
//!
//! For tests of the plugin beside the real ones of other projects, without kubelet and without images. It does what the CNI
//! specification demands of runtimes, and what the common ones do where that leaves a choice (order of files, the first valid
//! one, a DEL of the whole chain after an ADD that failed). Limits: it keeps results in memory, so that dropping it is a reboot;
//! capabilities are not passed.

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Mutex;

use anyhow::Context as _;
use serde_json::Value;
use serde_json::json;

use crate::netns::in_netns;

/// A container and the pod that it is for.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// CNI_CONTAINERID.
    pub id: String,
    /// CNI_NETNS.
    pub netns: PathBuf,
    /// metadata.namespace of the pod.
    pub namespace: String,
    /// metadata.name of the pod.
    pub name: String,
    /// metadata.uid of the pod.
    pub uid: String,
}

impl Sandbox {
    /// A sandbox of `pod` (`namespace/name`) with its own id.
    pub fn new(pod: &str, netns: &Path) -> Self {
        let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
        let (id, uid) = (format!("sandbox-{namespace}-{name}"), format!("uid-{namespace}-{name}"));
        Self { id, netns: netns.to_owned(), namespace: namespace.to_owned(), name: name.to_owned(), uid }
    }

    fn args(&self) -> String {
        let Self { id, namespace, name, uid, .. } = self;
        format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID={uid}"
        )
    }
}

/// What a plugin said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its exit status was 0.
    pub success: bool,
    /// Standard output, which is JSON or empty.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Said {
    /// Standard output as JSON; null if empty.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or(Value::Null)
    }
}

/// A chain of plugins that failed: which of them, and its error object.
#[derive(Clone, Debug)]
pub struct Failed {
    /// `type` of the plugin.
    pub plugin: String,
    /// What it printed.
    pub error: Value,
}

/// A runtime on one node.
#[derive(Debug)]
pub struct Runtime {
    /// The node's network namespace.
    pub node: PathBuf,
    /// Folder of configurations.
    pub conf_dir: PathBuf,
    /// Folder of plugins.
    pub bin_dir: PathBuf,
    results: Mutex<HashMap<String, Value>>,
}

impl Runtime {
    /// A runtime that has run nothing yet.
    pub fn new(node: &Path, conf_dir: &Path, bin_dir: &Path) -> Self {
        let [node, conf_dir, bin_dir] = [node, conf_dir, bin_dir].map(Path::to_owned);
        Self { node, conf_dir, bin_dir, results: Mutex::default() }
    }

    /// The configuration that is in force: the first valid one by name.
    pub fn configuration(&self) -> anyhow::Result<Value> {
        let mut paths: Vec<PathBuf> = fs::read_dir(&self.conf_dir)?.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in &paths {
            let extension = path.extension().unwrap_or_default().to_string_lossy();
            let Ok(conf) = serde_json::from_slice::<Value>(&fs::read(path).unwrap_or_default()) else { continue };
            match extension.as_ref() {
                "conflist" if conf["plugins"].as_array().is_some_and(|plugins| !plugins.is_empty()) => return Ok(conf),
                "conf" | "json" if conf["type"].is_string() => {
                    return Ok(json!({"cniVersion": conf["cniVersion"], "name": conf["name"], "plugins": [conf]}));
                }
                _ => {}
            }
        }
        anyhow::bail!("no valid configuration in {}", self.conf_dir.display())
    }

    /// Adds a container to the network; the result of the last plugin. When one fails, all are told to delete it.
    pub fn add(&self, sandbox: &Sandbox) -> anyhow::Result<Result<Value, Failed>> {
        let list = self.configuration()?;
        let mut result = None;
        for plugin in list["plugins"].as_array().into_iter().flatten() {
            let conf = prepared(&list, plugin, result.as_ref());
            let said = self.run("ADD", plugin, &conf, sandbox)?;
            if !said.success {
                let failed = Failed { plugin: kind(plugin), error: said.json() };
                // What that says changes nothing about the failure.
                let _ = self.del(sandbox)?;
                return Ok(Err(failed));
            }
            anyhow::ensure!(said.json().is_object(), "{} printed no result: {said:?}", kind(plugin));
            result = Some(said.json());
        }
        let result = result.context("a list has plugins")?;
        self.lock().insert(sandbox.id.clone(), result.clone());
        Ok(Ok(result))
    }

    /// Deletes a container from the network, plugin by plugin from the end; the first failure, as a runtime reports it.
    pub fn del(&self, sandbox: &Sandbox) -> anyhow::Result<Result<(), Failed>> {
        let list = self.configuration()?;
        let result = self.lock().get(&sandbox.id).cloned();
        for plugin in list["plugins"].as_array().into_iter().flatten().rev() {
            let conf = prepared(&list, plugin, result.as_ref());
            let said = self.run("DEL", plugin, &conf, sandbox)?;
            if !said.success {
                return Ok(Err(Failed { plugin: kind(plugin), error: said.json() }));
            }
        }
        self.lock().remove(&sandbox.id);
        Ok(Ok(()))
    }

    /// Checks a container, plugin by plugin.
    pub fn check(&self, sandbox: &Sandbox) -> anyhow::Result<Result<(), Failed>> {
        let list = self.configuration()?;
        let result = self.lock().get(&sandbox.id).cloned();
        for plugin in list["plugins"].as_array().into_iter().flatten() {
            let conf = prepared(&list, plugin, result.as_ref());
            let said = self.run("CHECK", plugin, &conf, sandbox)?;
            if !said.success {
                return Ok(Err(Failed { plugin: kind(plugin), error: said.json() }));
            }
        }
        Ok(Ok(()))
    }

    /// The result that is kept of a container.
    pub fn result(&self, sandbox: &Sandbox) -> Option<Value> {
        self.lock().get(&sandbox.id).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Value>> {
        self.results.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Runs one plugin of a list with a configuration of the caller's.
    pub fn run(&self, command: &str, plugin: &Value, conf: &Value, sandbox: &Sandbox) -> anyhow::Result<Said> {
        said(self.start(command, plugin, &conf.to_string(), sandbox)?)
    }

    /// Starts one plugin, its configuration given.
    pub fn start(&self, command: &str, plugin: &Value, conf: &str, sandbox: &Sandbox) -> anyhow::Result<Child> {
        let program = self.bin_dir.join(kind(plugin));
        let mut child = in_netns(&self.node, || {
            Command::new(&program)
                .env_clear()
                .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
                .env("CNI_COMMAND", command)
                .env("CNI_CONTAINERID", &sandbox.id)
                .env("CNI_NETNS", &sandbox.netns)
                .env("CNI_IFNAME", "eth0")
                .env("CNI_ARGS", sandbox.args())
                .env("CNI_PATH", &self.bin_dir)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
        })?
        .with_context(|| format!("{} cannot be run", program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A plugin that does not read is one that has answered already.
            let _ = stdin.write_all(conf.as_bytes());
        }
        Ok(child)
    }
}

/// Waits for a plugin's end.
pub fn said(child: Child) -> anyhow::Result<Said> {
    let output = child.wait_with_output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Said { success: output.status.success(), stdout: text(&output.stdout), stderr: text(&output.stderr) })
}

/// A plugin's configuration as a runtime hands it over.
pub fn prepared(list: &Value, plugin: &Value, previous: Option<&Value>) -> Value {
    let mut conf = plugin.clone();
    conf["cniVersion"] = list["cniVersion"].clone();
    conf["name"] = list["name"].clone();
    if let Some(previous) = previous {
        conf["prevResult"] = previous.clone();
    }
    conf
}

fn kind(plugin: &Value) -> String {
    plugin["type"].as_str().unwrap_or_default().to_owned()
}
