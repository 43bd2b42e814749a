//! What the CNI plugin asks the node's agent, and what the agent answers.
//!
//! One request a connection on a unix socket: one JSON object on one line, then the answer in the same form, then the end.
//! JSON and lines rather than something denser, because the two ends may be of two versions during an upgrade and because
//! a person has to be able to read it with `socat`. Unknown fields are ignored for the same reason; [`VERSION`] changes only
//! when an old peer would do harm. Both sides take at most [`MESSAGE_MAX`] bytes. Nothing here does I/O.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::capture::pods::check_name;

/// Version of the protocol, in every request.
pub const VERSION: u32 = 1;
/// Longest message, its newline included: a GC names some 600 attachments in it, and a node has at most some hundreds.
pub const MESSAGE_MAX: usize = 64 << 10;
/// How long the agent may take for an answer. With [`PATIENCE`], and the 3 s in which the plugin finds out for itself what
/// the agent did not say, a runtime waits 20 s at most.
pub const DEADLINE: Duration = Duration::from_secs(16);
/// How much longer the plugin waits, so that the agent's own sentence arrives.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// Addresses of one pod that are looked at: Kubernetes gives one of each family, and a chain may add a few.
const IPS_MAX: usize = 16;
/// Longest path of a network namespace.
const PATH_MAX: usize = 4096;
/// Longest sentence in an answer.
const TEXT_MAX: usize = 4096;

/// CNI: the version of the configuration is not supported.
pub const INCOMPATIBLE_VERSION: u32 = 1;
/// CNI: an environment variable is wrong.
pub const INVALID_ENVIRONMENT: u32 = 4;
/// CNI: a read or write failed.
pub const IO_FAILURE: u32 = 5;
/// CNI: what came cannot be read.
pub const CANNOT_DECODE: u32 = 6;
/// CNI: the configuration is wrong.
pub const INVALID_CONFIG: u32 = 7;
/// CNI: the same call may work later.
pub const TRY_AGAIN_LATER: u32 = 11;
/// CNI: the plugin cannot take an ADD now (STATUS only).
pub const NOT_AVAILABLE: u32 = 50;
/// The network namespace is not this pod's. Ours: codes from 100 on belong to plugins.
pub const WRONG_NETNS: u32 = 100;
/// What CHECK was asked about is not as it has to be.
pub const CHECK_FAILED: u32 = 101;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Command {
    /// A pod begins: answered once its listeners serve and its traffic goes through them, or at once if it is not to be
    /// enrolled.
    Add,
    /// A pod's network ends.
    Del,
    /// Is it still as ADD left it?
    Check,
    /// Could an ADD succeed now?
    Status,
    /// Forget all attachments but those listed.
    Gc,
}

/// One attachment, as runtimes name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// CNI_CONTAINERID: the sandbox, not the pod's uid.
    pub container_id: String,
    /// CNI_IFNAME.
    pub if_name: String,
}

/// A request. STATUS and GC are about no container and leave its fields empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What is asked.
    pub command: Command,
    /// CNI_CONTAINERID.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container_id: String,
    /// CNI_NETNS as the runtime gave it, a path on the node. A DEL may have none: the namespace is gone.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub netns: String,
    /// CNI_IFNAME.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub if_name: String,
    /// metadata.namespace of the pod.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod_namespace: String,
    /// metadata.name of the pod.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod_name: String,
    /// metadata.uid of the pod; empty if the runtime does not say it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod_uid: String,
    /// Addresses that the plugins before ours gave the pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<IpAddr>,
    /// The attachments that there are (GC only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid: Option<Vec<Attachment>>,
}

/// It is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The pod is in the mesh.
    pub enrolled: bool,
}

/// It is not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// A code of the CNI specification, or from 100 on one of ours.
    pub code: u32,
    /// What happened, and what to do.
    pub message: String,
    /// More of it; may be empty.
    pub details: String,
}

impl Refusal {
    /// A refusal without details.
    pub fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }
}

/// What the agent answers.
pub type Answer = Result<Done, Refusal>;

/// An answer as it is on the wire.
#[derive(Serialize, Deserialize)]
struct RawAnswer {
    ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    enrolled: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    code: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    details: Option<String>,
}

impl Request {
    /// A request about no container.
    pub fn of(command: Command) -> Self {
        Self {
            version: VERSION,
            command,
            container_id: String::new(),
            netns: String::new(),
            if_name: String::new(),
            pod_namespace: String::new(),
            pod_name: String::new(),
            pod_uid: String::new(),
            ips: Vec::new(),
            valid: None,
        }
    }

    /// The request as a line.
    ///
    /// # Errors
    /// That it is longer than a message may be.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        line(self)
    }

    /// Reads a request; a newline at its end is no part of it.
    ///
    /// # Errors
    /// What is wrong with it, to be sent back as it is.
    pub fn decode(line: &[u8]) -> Result<Self, Refusal> {
        let unreadable = |why: String| Refusal::new(CANNOT_DECODE, why);
        if line.len() > MESSAGE_MAX {
            return Err(unreadable(format!("the request has more than {MESSAGE_MAX} bytes")));
        }
        let request: Self = serde_json::from_slice(line)
            .map_err(|error| unreadable(format!("the request is not what a CNI plugin of Tulle sends: {error}")))?;
        if request.version != VERSION {
            return Err(Refusal::new(
                TRY_AGAIN_LATER,
                format!(
                    "the plugin speaks version {} of the protocol and this agent version {VERSION}; the agent installs its own plugin when it starts, so look at `ztunnel cni install` in its log",
                    request.version
                ),
            ));
        }
        request.check().map_err(|why| Refusal::new(INVALID_ENVIRONMENT, why))?;
        Ok(request)
    }

    /// What the fields must be for the command.
    fn check(&self) -> Result<(), String> {
        if self.ips.len() > IPS_MAX {
            return Err(format!("{} addresses for one pod; at most {IPS_MAX} are taken", self.ips.len()));
        }
        for attachment in self.valid.iter().flatten() {
            check_container(&attachment.container_id)?;
            check_interface(&attachment.if_name)?;
        }
        if matches!(self.command, Command::Status | Command::Gc) {
            return Ok(());
        }
        check_container(&self.container_id)?;
        check_interface(&self.if_name)?;
        // Whoever names a pod names it whole; a DEL of a pod that is long gone may name none.
        let named = matches!(self.command, Command::Add | Command::Check);
        for (field, value) in [("K8S_POD_NAMESPACE", &self.pod_namespace), ("K8S_POD_NAME", &self.pod_name)] {
            if named || !value.is_empty() {
                check_name(field, value)?;
            }
        }
        if !self.pod_uid.is_empty() {
            check_name("K8S_POD_UID", &self.pod_uid)?;
        }
        match self.netns.as_str() {
            "" if named => Err("CNI_NETNS is empty; the runtime has to name the pod's network namespace".to_owned()),
            "" => Ok(()),
            path => check_path("CNI_NETNS", path),
        }
    }
}

/// An answer as a line. One that would be too long loses its details, then the end of its message.
pub fn encode(answer: &Answer) -> Vec<u8> {
    let raw = match answer {
        Ok(done) => RawAnswer { ok: true, enrolled: Some(done.enrolled), code: None, message: None, details: None },
        Err(refusal) => RawAnswer {
            ok: false,
            enrolled: None,
            code: Some(refusal.code),
            message: Some(shortened(&refusal.message)),
            details: Some(shortened(&refusal.details)).filter(|details| !details.is_empty()),
        },
    };
    // Strings, numbers and truth values: there is nothing in it that JSON lacks.
    line(&raw).unwrap_or_else(|_| b"{\"ok\":false,\"code\":5,\"message\":\"the answer is too long\"}\n".to_vec())
}

/// Reads an answer.
///
/// # Errors
/// What is wrong with it. Then nothing is known of what was asked.
pub fn decode(line: &[u8]) -> Result<Answer, String> {
    if line.len() > MESSAGE_MAX {
        return Err(format!("the answer has more than {MESSAGE_MAX} bytes"));
    }
    let raw: RawAnswer =
        serde_json::from_slice(line).map_err(|error| format!("the answer is not readable: {error}"))?;
    if raw.ok {
        return Ok(Ok(Done { enrolled: raw.enrolled.unwrap_or(false) }));
    }
    // A refusal without a code is one all the same.
    let code = raw.code.filter(|code| *code != 0).unwrap_or(TRY_AGAIN_LATER);
    let message = raw.message.filter(|message| !message.is_empty());
    let message = shortened(&message.unwrap_or_else(|| "the agent refused and did not say why".to_owned()));
    Ok(Err(Refusal { code, message, details: shortened(&raw.details.unwrap_or_default()) }))
}

fn line(value: &impl Serialize) -> Result<Vec<u8>, String> {
    let mut line = serde_json::to_vec(value).map_err(|error| error.to_string())?;
    line.push(b'\n');
    if line.len() > MESSAGE_MAX {
        return Err(format!("{} bytes; at most {MESSAGE_MAX} are taken", line.len()));
    }
    Ok(line)
}

fn shortened(text: &str) -> String {
    if text.len() <= TEXT_MAX {
        return text.to_owned();
    }
    let cut = (0..=TEXT_MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..cut].to_owned()
}

/// Whether a runtime may name a container so: the specification's letters, because it becomes a part of file names.
///
/// # Errors
/// That it may not.
pub fn check_container(id: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let begins = id.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !begins || id.len() > 253 || !id.chars().all(good) {
        return Err(format!("CNI_CONTAINERID {id:?} is not a container id"));
    }
    Ok(())
}

/// Whether an interface may have the name, as the kernel has it.
///
/// # Errors
/// That it may not.
pub fn check_interface(name: &str) -> Result<(), String> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':');
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || name.contains(bad) {
        return Err(format!("CNI_IFNAME {name:?} is not the name of an interface"));
    }
    Ok(())
}

/// Whether it is a path that means the same to both ends.
///
/// # Errors
/// That it is not.
pub fn check_path(variable: &str, path: &str) -> Result<(), String> {
    if !path.starts_with('/') || path.len() > PATH_MAX || path.contains('\0') {
        return Err(format!("{variable} is {path:?}; give an absolute path"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Answer, Attachment, Command, Done, MESSAGE_MAX, Refusal, Request, decode, encode};

    fn add() -> Request {
        Request {
            container_id: "c1".into(),
            netns: "/run/netns/c1".into(),
            if_name: "eth0".into(),
            pod_namespace: "shop".into(),
            pod_name: "cart-0".into(),
            pod_uid: "u-1".into(),
            ips: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            ..Request::of(Command::Add)
        }
    }

    #[test]
    fn a_request_reads_as_it_is_documented() {
        let text = r#"{"version":1,"command":"ADD","containerId":"c1","netns":"/run/netns/c1","ifName":"eth0","podNamespace":"shop","podName":"cart-0","podUid":"u-1","ips":["10.0.0.1","fd00::1"]}"#;
        assert_eq!(add().encode().unwrap(), format!("{text}\n").into_bytes());
        assert_eq!(Request::decode(text.as_bytes()), Ok(add()));
        assert_eq!(Request::decode(&add().encode().unwrap()), Ok(add()));
        let valid = Some(vec![Attachment { container_id: "c1".into(), if_name: "eth0".into() }]);
        let gc = Request { valid, ..Request::of(Command::Gc) };
        assert_eq!(
            gc.encode().unwrap(),
            b"{\"version\":1,\"command\":\"GC\",\"valid\":[{\"containerId\":\"c1\",\"ifName\":\"eth0\"}]}\n"
        );
        let newer = r#"{"version":1,"command":"STATUS","somethingNew":{"a":1}}"#;
        assert_eq!(Request::decode(newer.as_bytes()), Ok(Request::of(Command::Status)));
    }

    #[test]
    fn a_request_that_makes_no_sense_is_refused_with_the_reason() {
        let change = |change: fn(&mut Request)| {
            let mut request = add();
            change(&mut request);
            serde_json::to_vec(&request).unwrap()
        };
        for (line, code, says) in [
            (b"{".to_vec(), 6, "not what a CNI plugin"),
            (b"{\"version\":1,\"command\":\"EXPLODE\"}".to_vec(), 6, "EXPLODE"),
            (vec![b' '; MESSAGE_MAX + 1], 6, "more than 65536"),
            (change(|r| r.version = 2), 11, "version 2"),
            (change(|r| r.container_id = "../x".into()), 4, "CNI_CONTAINERID"),
            (change(|r| r.container_id.clear()), 4, "CNI_CONTAINERID"),
            (change(|r| r.if_name = "e/0".into()), 4, "CNI_IFNAME"),
            (change(|r| r.if_name = "longer-than-fifteen".into()), 4, "CNI_IFNAME"),
            (change(|r| r.netns.clear()), 4, "CNI_NETNS"),
            (change(|r| r.netns = "run/netns/x".into()), 4, "absolute"),
            (change(|r| r.pod_name.clear()), 4, "K8S_POD_NAME"),
            (change(|r| r.pod_namespace = "a b".into()), 4, "K8S_POD_NAMESPACE"),
            (change(|r| r.ips = vec!["10.0.0.1".parse().unwrap(); 17]), 4, "17 addresses"),
        ] {
            let refusal = Request::decode(&line).unwrap_err();
            assert!(refusal.code == code && refusal.message.contains(says), "{says}: {refusal:?}");
        }
    }

    #[test]
    fn a_del_may_know_nothing_but_the_container() {
        let del = Request { container_id: "c1".into(), if_name: "eth0".into(), ..Request::of(Command::Del) };
        assert_eq!(Request::decode(&del.encode().unwrap()), Ok(del));
    }

    #[test]
    fn answers_are_read_as_they_were_meant() {
        let refusal = Refusal { code: 11, message: "wait".into(), details: "a".into() };
        let cases: [(Answer, &str); 3] = [
            (Ok(Done { enrolled: true }), r#"{"ok":true,"enrolled":true}"#),
            (Err(refusal), r#"{"ok":false,"code":11,"message":"wait","details":"a"}"#),
            (Err(Refusal::new(7, "no")), r#"{"ok":false,"code":7,"message":"no"}"#),
        ];
        for (answer, text) in cases {
            assert_eq!(encode(&answer), format!("{text}\n").into_bytes());
            assert_eq!(decode(text.as_bytes()), Ok(answer));
        }
        let silent = decode(br#"{"ok":false}"#).unwrap().unwrap_err();
        assert!(silent.code == 11 && silent.message.contains("did not say why"));
        for text in ["", "{}", "[]", "{\"ok\":1}"] {
            assert!(decode(text.as_bytes()).is_err(), "{text}");
        }
        let long = encode(&Err(Refusal { code: 5, message: "ö".repeat(90_000), details: "\u{1}".repeat(90_000) }));
        assert!(long.len() < MESSAGE_MAX && decode(&long).is_ok());
    }
}
