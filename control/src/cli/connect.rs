//! The way to control: its URL where one is given; else the replicas in the cluster of the kubeconfig, through port-forwards; else
//! this machine's loopback.
//!
//! Control's HTTP port has no authentication and listens on its pod's loopback only, so whoever may forward ports to its pods may
//! ask. `kubectl` does that as a child process, which ends with this command: it knows every way to log in to a cluster. Each
//! ready replica gets one, since a node answers the questions of the replica that it is attached to.
//!
//! Limits: a port-forward has [`PATIENCE`] to come up; at most [`REPLICAS`] replicas are asked.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

use crate::cli::{Failure, fetch, replicas};
use crate::cluster;

/// How long a port-forward may take. Logging in to a cloud's cluster takes some seconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// Replicas that are asked. More than a handful serve nobody.
const REPLICAS: usize = 8;
/// What is kept of what `kubectl` says when it fails, bytes.
const WORDS: u64 = 4096;
/// Control's HTTP port in its pod.
const PORT: u16 = 15014;

/// Flags that say where control and its cluster are.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Flags {
    /// The control plane's HTTP address, as in http://127.0.0.1:15014. Without it: through a port-forward to the cluster of the
    /// kubeconfig; without a kubeconfig: http://127.0.0.1:15014.
    #[arg(long, env = "TULLE_CONTROL", global = true)]
    pub(crate) control: Option<String>,
    /// The kubeconfig [~/.kube/config].
    #[arg(long, env = "KUBECONFIG", global = true)]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig [its current one].
    #[arg(long, global = true)]
    pub(crate) context: Option<String>,
    /// Namespace that control runs in.
    #[arg(long, env = "TULLE_ROOT_NAMESPACE", default_value = "tulle-system", global = true)]
    pub(crate) root_namespace: String,
}

/// Where control is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    Url(String),
    /// In the cluster that this kubeconfig is of.
    Cluster(PathBuf),
}

impl Flags {
    /// The kubeconfig in force; `None`: there is none.
    pub(crate) fn kubeconfig(&self) -> Option<PathBuf> {
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".kube/config")).filter(|file| file.exists());
        self.kubeconfig.clone().filter(|files| !files.as_os_str().is_empty()).or_else(home)
    }

    fn way(&self) -> Way {
        match (&self.control, self.kubeconfig()) {
            (Some(url), _) => Way::Url(url.clone()),
            (None, Some(files)) => Way::Cluster(files),
            (None, None) => Way::Url(format!("http://127.0.0.1:{PORT}")),
        }
    }
}

/// A runtime for the few requests of one command.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let made = tokio::runtime::Builder::new_current_thread().enable_all().build();
    made.map_err(|error| Failure::wrong(error.to_string()))
}

/// Control as this command asks it.
pub(super) struct Mesh {
    bases: Vec<String>,
    /// Child processes, which end with it.
    _forwards: Vec<Forward>,
}

impl Mesh {
    /// Finds the way.
    pub(super) fn open(flags: &Flags) -> Result<Self, Failure> {
        let files = match flags.way() {
            Way::Url(url) => return Ok(Self { bases: vec![url], _forwards: Vec::new() }),
            Way::Cluster(files) => files,
        };
        let pods = runtime()?.block_on(ready_pods(&files, flags))?;
        let mut forwards = Vec::new();
        let mut failure = None;
        for pod in pods.iter().take(REPLICAS) {
            match Forward::to(pod, &files, flags) {
                Ok(forward) => forwards.push(forward),
                // One replica is enough to show something; it says which nodes it does not know.
                Err(error) => failure = Some(error),
            }
        }
        match (forwards.is_empty(), failure) {
            (true, Some(failure)) => Err(failure),
            (_, failure) => {
                if let Some(failure) = failure {
                    eprintln!("tulle: {}; nodes that are attached to that replica are missing", failure.text);
                }
                let bases = forwards.iter().map(|forward| forward.base.clone()).collect();
                Ok(Self { bases, _forwards: forwards })
            }
        }
    }

    /// The JSON that control answers to a path; of several replicas, what they know together.
    pub(super) fn get(&self, path: &str) -> Result<Value, Failure> {
        let answers: Vec<_> = self.bases.iter().map(|base| fetch::get(base, path)).collect();
        replicas::joined(path, answers)
    }
}

/// A port-forward that lives as long as this.
struct Forward {
    child: Child,
    base: String,
}

impl Drop for Forward {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Forward {
    fn to(pod: &str, files: &Path, flags: &Flags) -> Result<Self, Failure> {
        let mut command = Command::new("kubectl");
        command.args(arguments(pod, files, flags));
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Failure::wrong(format!(
                "control of the cluster is asked through `kubectl port-forward`, and there is no kubectl on PATH: install it, or \
                 forward port {PORT} of a pod of deployment {}/control by other means and say --control http://127.0.0.1:PORT",
                flags.root_namespace
            )),
            _ => Failure::wrong(format!("cannot start kubectl: {error}")),
        })?;
        let (said, words) = (child.stdout.take(), child.stderr.take());
        let (sender, receiver) = mpsc::channel();
        // Ends with the child. The rest is read so that a port-forward that talks never stops.
        std::thread::spawn(move || {
            for line in said.into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok) {
                if let Some(port) = forwarded(&line) {
                    let _ = sender.send(port);
                }
            }
        });
        let waited = receiver.recv_timeout(PATIENCE);
        if let Ok(port) = waited {
            return Ok(Self { child, base: format!("http://127.0.0.1:{port}") });
        }
        let _ = child.kill();
        let _ = child.wait();
        let text = said_in_vain(words);
        let why = match (waited, text.trim()) {
            (Err(mpsc::RecvTimeoutError::Timeout), "") => format!("nothing came within {} s", PATIENCE.as_secs()),
            (_, "") => "it ended without a word".to_owned(),
            (_, text) => text.lines().map(str::trim).collect::<Vec<_>>().join("; "),
        };
        Err(Failure::wrong(format!(
            "kubectl port-forward to pod {}/{pod} failed: {why}. It needs the right to create pods/portforward there",
            flags.root_namespace
        )))
    }
}

/// What a child that has ended wrote. Something that it started may hold its end open, so that is not waited for.
fn said_in_vain(words: Option<ChildStderr>) -> String {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(words) = words {
            let _ = words.take(WORDS).read_to_string(&mut text);
        }
        let _ = sender.send(text);
    });
    receiver.recv_timeout(Duration::from_secs(1)).unwrap_or_default()
}

fn arguments(pod: &str, files: &Path, flags: &Flags) -> Vec<OsString> {
    let mut argv: Vec<OsString> = vec!["port-forward".into(), "--address".into(), "127.0.0.1".into()];
    argv.extend([OsString::from("--namespace"), flags.root_namespace.clone().into()]);
    // Several files are for the environment alone, which the child has.
    if flags.kubeconfig.is_some() && std::env::split_paths(files).count() == 1 {
        argv.extend([OsString::from("--kubeconfig"), files.as_os_str().to_owned()]);
    }
    if let Some(context) = &flags.context {
        argv.extend([OsString::from("--context"), context.into()]);
    }
    argv.extend([OsString::from(format!("pod/{pod}")), format!(":{PORT}").into()]);
    argv
}

/// The local port of `Forwarding from 127.0.0.1:40123 -> 15014`.
fn forwarded(line: &str) -> Option<u16> {
    let (address, _) = line.strip_prefix("Forwarding from ")?.split_once(" -> ")?;
    address.strip_prefix("127.0.0.1:")?.parse().ok()
}

/// The pods of Service `control` that are ready.
async fn ready_pods(files: &Path, flags: &Flags) -> Result<Vec<String>, Failure> {
    let namespace = &flags.root_namespace;
    let cannot = |error: String| Failure::wrong(format!("cannot find control in the cluster: {error}"));
    let client = cluster::user(Some(files), flags.context.as_deref());
    let (client, _) = client.await.map_err(|error| cannot(format!("{error:#}")))?;
    let get = async |path: String| {
        let request = http::Request::get(path).body(Vec::new()).map_err(|error| cannot(error.to_string()))?;
        match tokio::time::timeout(PATIENCE, client.request::<Value>(request)).await {
            Ok(Ok(value)) => Ok(Some(value)),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => Ok(None),
            Ok(Err(error)) => Err(cannot(error.to_string())),
            Err(_) => Err(cannot(format!("the API server did not answer within {} s", PATIENCE.as_secs()))),
        }
    };
    let Some(service) = get(format!("/api/v1/namespaces/{namespace}/services/control")).await? else {
        return Err(Failure::wrong(format!(
            "there is no Service control in namespace {namespace} of the cluster: install Tulle (`tulle install`), name its \
             namespace by --root-namespace, another cluster by --context, or control itself by --control URL"
        )));
    };
    let selector = selector(&service);
    if selector.is_empty() {
        return Err(cannot(format!("Service {namespace}/control has no selector")));
    }
    let pods = get(format!("/api/v1/namespaces/{namespace}/pods?labelSelector={}", fetch::escape(&selector))).await?;
    let pods = pods.unwrap_or_default();
    let all = pods["items"].as_array().cloned().unwrap_or_default();
    let ready: Vec<String> = all.iter().filter(|pod| is_ready(pod)).filter_map(name).collect();
    if ready.is_empty() {
        return Err(Failure::wrong(format!(
            "no pod of control is ready in namespace {namespace} ({} there are): `kubectl -n {namespace} get pods` and \
             `kubectl -n {namespace} logs deployment/control` say why",
            all.len()
        )));
    }
    Ok(ready)
}

fn selector(service: &Value) -> String {
    let pairs = service["spec"]["selector"].as_object().into_iter().flatten();
    let pairs: Vec<String> = pairs.filter_map(|(key, value)| Some(format!("{key}={}", value.as_str()?))).collect();
    pairs.join(",")
}

fn name(pod: &Value) -> Option<String> {
    pod["metadata"]["name"].as_str().map(str::to_owned)
}

/// Condition Ready, and not on its way out.
fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    let ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    pod["metadata"]["deletionTimestamp"].is_null() && conditions.is_some_and(|all| all.iter().any(ready))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use serde_json::json;

    use super::{Flags, Way, arguments, forwarded, is_ready, selector};

    fn flags(control: Option<&str>, kubeconfig: Option<&str>, context: Option<&str>) -> Flags {
        Flags {
            control: control.map(str::to_owned),
            kubeconfig: kubeconfig.map(PathBuf::from),
            context: context.map(str::to_owned),
            root_namespace: "tulle-system".into(),
        }
    }

    #[test]
    fn a_url_comes_before_a_kubeconfig() {
        let url = Way::Url("http://[::1]:1".into());
        assert_eq!(flags(Some("http://[::1]:1"), Some("/k"), None).way(), url);
        assert_eq!(flags(None, Some("/k"), None).way(), Way::Cluster("/k".into()));
    }

    #[test]
    fn kubectl_is_told_the_same_cluster() {
        let shown = |flags: &Flags, files: &str| {
            let argv = arguments("control-0", Path::new(files), flags);
            argv.iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            shown(&flags(None, Some("/k"), Some("c")), "/k"),
            "port-forward --address 127.0.0.1 --namespace tulle-system --kubeconfig /k --context c pod/control-0 :15014"
        );
        assert!(!shown(&flags(None, None, None), "/home/u/.kube/config").contains("--kubeconfig"));
        assert!(!shown(&flags(None, Some("/a:/b"), None), "/a:/b").contains("--kubeconfig"));
    }

    #[test]
    fn the_local_port_is_what_kubectl_says() {
        for (line, expected) in [
            ("Forwarding from 127.0.0.1:40123 -> 15014", Some(40123)),
            ("Forwarding from [::1]:40123 -> 15014", None),
            ("Handling connection for 40123", None),
            ("Forwarding from 127.0.0.1:x -> 15014", None),
        ] {
            assert_eq!(forwarded(line), expected, "{line}");
        }
    }

    #[test]
    fn only_ready_pods_are_asked() {
        let pod = |ready: &str, deleted: Option<&str>| json!({"metadata": {"deletionTimestamp": deleted}, "status": {"conditions": [{"type": "Ready", "status": ready}]}});
        assert!(is_ready(&pod("True", None)));
        assert!(!is_ready(&pod("False", None)) && !is_ready(&pod("True", Some("2026-01-01T00:00:00Z"))));
        assert!(!is_ready(&json!({})));
        assert_eq!(selector(&json!({"spec": {"selector": {"a": "b", "c": "d"}}})), "a=b,c=d");
    }
}
