//! One call of the plugin, as a container runtime makes it.
//!
//! Everything is over within [`LIMIT`], whatever hangs: the work is done on a thread, and who waits for it gives up. On standard
//! output stands the result of the plugins before ours, word for word, or one error object; nothing else ever. The agent's word
//! decides. Without it, `away` finds out whether the pod belongs in the mesh, and only such a pod is refused. A DEL never fails
//! for anything that is ours: a pod that cannot be deleted is worse than a record that is forgotten late.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::base::netns::{Netns, local_addresses, run_waiting};
use crate::cni::api::{self, ApiError};
use crate::cni::away::{self, Asked, Verdict};
use crate::cni::conf::{self, Conf, Environment, VERSIONS};
use crate::cni::enrolment::{KNOWN_MAX, Known};
use crate::cni::kubeconfig::{self, Access};
use crate::cni::wire::{
    self, Answer, CANNOT_DECODE, CHECK_FAILED, Command, DEADLINE, INVALID_ENVIRONMENT, IO_FAILURE, MESSAGE_MAX,
    NOT_AVAILABLE, PATIENCE, Refusal, Request, TRY_AGAIN_LATER, WRONG_NETNS,
};
use crate::cni::{KNOWN_FILE, files, journal};

/// A whole call.
pub const LIMIT: Duration = Duration::from_secs(20);
/// What the agent gets of it where the pod must not wait for the answer: a DEL and a GC succeed without.
const SHORT: Duration = Duration::from_secs(5);
/// Pause before the next try to reach an agent that so many want something of that no more may wait.
const FULL: Duration = Duration::from_millis(20);
/// What the API server gets of it.
const API: Duration = Duration::from_millis(2500);

/// What a call says, and whether it succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// For standard output.
    pub stdout: String,
    /// The exit status is 0.
    pub success: bool,
}

/// Runs one call. `stdin` has the configuration.
pub fn run(env: Environment, mut stdin: impl io::Read + Send + 'static) -> Said {
    let (reply, answer) = sync_channel(1);
    let del = env.command == "DEL";
    let work = move || {
        let mut text = String::new();
        let most = conf::CONF_MAX as u64 + 1;
        let read = stdin.by_ref().take(most).read_to_string(&mut text);
        let result = match read {
            Ok(length) if length > conf::CONF_MAX => Err(Refusal::new(
                CANNOT_DECODE,
                format!("the network configuration has more than {} bytes", conf::CONF_MAX),
            )),
            Ok(_) => call(&env, &text),
            Err(error) => Err(Refusal::new(IO_FAILURE, format!("the network configuration cannot be read: {error}"))),
        };
        let _ = reply.send((conf::version_of(&text), result));
    };
    let started = thread::Builder::new().name("call".into()).spawn(work);
    let ended = match started {
        Ok(_) => answer.recv_timeout(LIMIT),
        Err(_) => Err(RecvTimeoutError::Disconnected),
    };
    let (version, result) = ended.unwrap_or_else(|error| {
        let text = match error {
            RecvTimeoutError::Timeout => format!("the call took longer than {} s", LIMIT.as_secs()),
            RecvTimeoutError::Disconnected => "the call broke off; standard error has the reason".to_owned(),
        };
        // A pod that cannot be deleted helps nobody.
        let result = if del { Ok(String::new()) } else { Err(Refusal::new(TRY_AGAIN_LATER, text)) };
        (VERSIONS[4].to_owned(), result)
    });
    match result {
        Ok(stdout) => Said { stdout, success: true },
        Err(refusal) => Said { stdout: error(&version, &refusal), success: false },
    }
}

/// The error object of the specification.
fn error(version: &str, refusal: &Refusal) -> String {
    let mut object = json!({"cniVersion": version, "code": refusal.code, "msg": refusal.message});
    if !refusal.details.is_empty() {
        object["details"] = refusal.details.as_str().into();
    }
    format!("{object}\n")
}

fn call(env: &Environment, stdin: &str) -> Result<String, Refusal> {
    let command = match env.command.as_str() {
        "ADD" => Command::Add,
        "DEL" => Command::Del,
        "CHECK" => Command::Check,
        "STATUS" => Command::Status,
        "GC" => Command::Gc,
        "VERSION" => {
            let versions = json!({"cniVersion": VERSIONS[4], "supportedVersions": VERSIONS});
            return Ok(format!("{versions}\n"));
        }
        other => {
            let text = format!("CNI_COMMAND is {other:?}; ADD, DEL, CHECK, GC, STATUS and VERSION are known");
            return Err(Refusal::new(INVALID_ENVIRONMENT, text));
        }
    };
    let conf = conf::read(stdin)?;
    let begun = Instant::now();
    let result = conf::request(command, env, &conf).and_then(|request| match request {
        Some(request) => answer(&request, &conf, begun),
        None => Ok("no pod of Kubernetes".to_owned()),
    });
    let about = format!("{} {} {}", env.command, env.container_id, env.args);
    let took = begun.elapsed().as_millis();
    match &result {
        Ok(how) => journal::add(&conf.state_dir, &format!("{about}: {how} ({took} ms)")),
        Err(Refusal { code, message, details }) => {
            journal::add(&conf.state_dir, &format!("{about}: refused with {code}: {message} {details} ({took} ms)"));
        }
    }
    result.map(|_| if command == Command::Add { conf.prev_result.unwrap_or_default() + "\n" } else { String::new() })
}

/// Carries a request out; how, for the log.
fn answer(request: &Request, conf: &Conf, begun: Instant) -> Result<String, Refusal> {
    match request.command {
        Command::Del | Command::Gc => {
            let told = ask(&conf.socket, request, begun + SHORT);
            // What an agent that is away does not hear, it finds out from the API and from what is left of the pod.
            Ok(told.map_or_else(|why| format!("without the agent: {why}"), |answer| format!("{answer:?}")))
        }
        Command::Status => status(request, conf, begun),
        Command::Add | Command::Check => {
            if let Err(wrong) = own_netns(request) {
                return excused(request, conf, begun, wrong);
            }
            match ask(&conf.socket, request, begun + DEADLINE + PATIENCE) {
                Ok(Ok(done)) => Ok(if done.enrolled { "enrolled".to_owned() } else { "not to be enrolled".to_owned() }),
                Ok(Err(refusal)) => Err(refusal),
                Err(why) => excused(request, conf, begun, away(conf, &why)),
            }
        }
    }
}

/// Nobody but a pod of the mesh is refused.
fn excused(request: &Request, conf: &Conf, begun: Instant, refusal: Refusal) -> Result<String, Refusal> {
    let Refusal { code, message, details } = refusal;
    let name = format!("{}/{}", request.pod_namespace, request.pod_name);
    match verdict(request, conf, begun) {
        Verdict::Out => Ok(format!("not to be enrolled, though {message}")),
        Verdict::In(why) => {
            let details = format!("the pod belongs in the mesh: {why}. {details}");
            Err(Refusal { code, message: format!("pod {name} has to wait: {message}"), details })
        }
        Verdict::Unknown(why) => {
            let text = format!("pod {name} has to wait: {message}, and {why}");
            Err(Refusal { code: TRY_AGAIN_LATER, message: text, details })
        }
    }
}

fn away(conf: &Conf, why: &str) -> Refusal {
    Refusal {
        code: TRY_AGAIN_LATER,
        message: format!("the node's agent does not answer at {} ({why})", conf.socket.display()),
        details: format!(
            "Look at the ztunnel pod of this node: kubectl -n {} get pods -l 'app.kubernetes.io/name in (ztunnel, ztunnel-canary)' -o wide. The runtime tries again by itself.",
            conf.root_namespace
        ),
    }
}

/// Whether the pod belongs in the mesh, by the API server and what the agent wrote.
fn verdict(request: &Request, conf: &Conf, begun: Instant) -> Verdict {
    let known = files::read_bounded(&conf.state_dir.join(KNOWN_FILE), KNOWN_MAX).and_then(|text| Known::decode(&text));
    let until = (Instant::now() + API).min(begun + LIMIT - Duration::from_millis(200));
    let (namespace, pod) = (&request.pod_namespace, &request.pod_name);
    // They become a part of a path.
    let plain = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.'));
    let asked = match access(&conf.state_dir) {
        Ok(access) if plain(namespace) && plain(pod) => {
            let of_namespace = api::labels(&access, &format!("/api/v1/namespaces/{namespace}"), until);
            let of_pod = match &of_namespace {
                // It would only fail again, and later.
                Err(ApiError::Failed(why)) => Err(ApiError::Failed(why.clone())),
                _ => api::labels(&access, &format!("/api/v1/namespaces/{namespace}/pods/{pod}"), until),
            };
            Asked { namespace: of_namespace, pod: of_pod }
        }
        Ok(_) => failed("its name is not one of Kubernetes"),
        Err(why) => failed(&why),
    };
    away::decide(namespace, &conf.root_namespace, &known, &asked)
}

fn failed(why: &str) -> Asked {
    let failed = || Err(ApiError::Failed(why.to_owned()));
    Asked { namespace: failed(), pod: failed() }
}

fn access(state_dir: &Path) -> Result<Access, String> {
    let path = state_dir.join(kubeconfig::FILE);
    let named = |why: String| format!("the plugin's kubeconfig {}: {why}", path.display());
    let text = |path: &Path| {
        let bytes = files::read_bounded(path, kubeconfig::FILE_MAX)?;
        String::from_utf8(bytes).map_err(|_| format!("{} is no text", path.display()))
    };
    let content = text(&path).map_err(named)?;
    Access::read(&content, state_dir, text).map_err(named)
}

/// Could an ADD succeed now? While the agent is away pods outside of the mesh still start, so that the node must not count as
/// one without network as long as the plugin can tell them apart.
fn status(request: &Request, conf: &Conf, begun: Instant) -> Result<String, Refusal> {
    let why = match ask(&conf.socket, request, begun + SHORT) {
        Ok(Ok(_)) => return Ok("the agent takes pods".to_owned()),
        Ok(Err(refusal)) => refusal.message,
        Err(why) => away(conf, &why).message,
    };
    let known = files::read_bounded(&conf.state_dir.join(KNOWN_FILE), KNOWN_MAX).and_then(|text| Known::decode(&text));
    match known {
        Ok(_) => Ok(format!("pods outside of the mesh can start, others wait: {why}")),
        Err(error) => {
            let text = format!("{why}, and which namespaces are in the mesh is not known ({error})");
            Err(Refusal::new(NOT_AVAILABLE, text))
        }
    }
}

/// The network namespace is one, is not the node's own, and has the addresses that the plugins before ours gave the pod.
fn own_netns(request: &Request) -> Result<(), Refusal> {
    let code = if request.command == Command::Check { CHECK_FAILED } else { WRONG_NETNS };
    let wrong = |why: String| Refusal::new(code, format!("CNI_NETNS {} {why}", request.netns));
    let path = Path::new(&request.netns);
    // Opening a pipe would wait for its other end.
    let meta = std::fs::metadata(path).map_err(|error| wrong(format!("cannot be opened: {error}")))?;
    if !meta.is_file() {
        return Err(wrong("is no network namespace".to_owned()));
    }
    let netns = Netns::open(path).map_err(|error| wrong(format!("cannot be opened: {error}")))?;
    let own = Netns::open(Path::new("/proc/self/ns/net"))
        .map_err(|error| Refusal::new(IO_FAILURE, format!("/proc/self/ns/net cannot be opened: {error}")))?;
    if netns == own {
        return Err(wrong(
            "is the node's own network namespace; a pod with the node's network is never enrolled".to_owned(),
        ));
    }
    let found = run_waiting(&netns, local_addresses)
        .map_err(|error| wrong(format!("is no network namespace that can be entered: {error}")))?;
    let missing: Vec<String> = request.ips.iter().filter(|ip| !found.contains(ip)).map(ToString::to_string).collect();
    if !missing.is_empty() {
        return Err(wrong(format!("has no interface with {}, which prevResult gives the pod", missing.join(", "))));
    }
    Ok(())
}

/// Asks the agent.
///
/// # Errors
/// Why there is no answer of its.
pub fn ask(socket: &Path, request: &Request, until: Instant) -> Result<Answer, String> {
    let line = request.encode()?;
    let mut stream = connect(socket, until).map_err(|error| error.to_string())?;
    let limit = |stream: &UnixStream| -> io::Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        stream.set_write_timeout(Some(left))
    };
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "it did not answer in time".to_owned(),
        _ => error.to_string(),
    };
    limit(&stream).and_then(|()| stream.write_all(&line)).map_err(failed)?;
    // It may read to the end as well as to the newline.
    stream.shutdown(Shutdown::Write).map_err(failed)?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    while !answer.ends_with(b"\n") {
        limit(&stream).map_err(failed)?;
        match stream.read(&mut chunk).map_err(failed)? {
            0 => break,
            length => answer.extend_from_slice(&chunk[..length]),
        }
        if answer.len() > MESSAGE_MAX {
            return Err(format!("it answered more than {MESSAGE_MAX} bytes"));
        }
    }
    if answer.is_empty() {
        return Err("it ended the connection without an answer".to_owned());
    }
    wire::decode(&answer)
}

/// Connects before a deadline, which the system does not offer for these sockets: where too many wait already, it would make
/// this one wait without end, or refuse it at once.
fn connect(path: &Path, until: Instant) -> io::Result<UnixStream> {
    let address = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    loop {
        match socket.connect(&address) {
            Ok(()) => break,
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Err(_) if Instant::now() < until => thread::sleep(FULL),
            Err(_) => return Err(io::Error::other("too many wait for it already")),
        }
    }
    socket.set_nonblocking(false)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use socket2::{Domain, SockAddr, Socket, Type};

    use super::{ask, run};
    use crate::cni::conf::Environment;
    use crate::cni::wire::{Command, Request};

    #[test]
    fn what_stands_on_standard_output_is_a_result_or_an_error() {
        let env = |command: &str| Environment { command: command.into(), ..Environment::default() };
        let long = "x".repeat((1 << 20) + 1);
        for (command, stdin, success, says) in [
            ("VERSION", "", true, r#""supportedVersions":["0.3.0","#),
            ("VERSION", "no JSON at all", true, "1.1.0"),
            ("ADD", "", false, r#""code":6"#),
            ("ADD", long.as_str(), false, "more than 1048576 bytes"),
            ("ADD", r#"{"cniVersion":"0.4.0","socket":"relative"}"#, false, r#""cniVersion":"0.4.0","code":7"#),
            ("add", r#"{"cniVersion":"1.0.0"}"#, false, r#""code":4"#),
        ] {
            let said = run(env(command), std::io::Cursor::new(stdin.to_owned()));
            assert!(said.success == success && said.stdout.contains(says), "{command}: {said:?}");
            assert!(said.stdout.ends_with('\n') && said.stdout.lines().count() == 1, "{said:?}");
        }
    }

    #[test]
    fn an_agent_that_takes_nobody_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cni.sock");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let request = Request::of(Command::Status);
        let why: Vec<_> =
            (0..4).map(|_| ask(&path, &request, Instant::now() + Duration::from_millis(100)).unwrap_err()).collect();
        assert!(why[0].contains("did not answer in time") && why[3].contains("too many"), "{why:?}");
    }
}
