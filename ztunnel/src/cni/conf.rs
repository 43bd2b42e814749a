//! What a runtime tells the plugin: the configuration on standard input, and the variables of one call.
//!
//! Read once, into values that are complete for the command; what is missing or wrong is a refusal with the code that the CNI
//! specification has for it. The result of the plugins before ours is kept as the text it was, because it is passed on and is
//! nobody's business here but for the addresses in it. Unknown fields are ignored, as other versions of the specification
//! have more of them. Reads nothing but its arguments.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::Deserialize;
use tulle_proto::names;

use crate::cni::json;
use crate::cni::wire::{
    Attachment, CANNOT_DECODE, Command, INCOMPATIBLE_VERSION, INVALID_CONFIG, INVALID_ENVIRONMENT, Refusal, Request,
    check_container, check_interface, check_path,
};

/// Name of the plugin: its `type` in configurations, and its file.
pub const PLUGIN: &str = "tulle-cni";
/// Versions of the specification that are spoken, the newest last. Older ones know no chains.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Longest configuration that is read: with the result of a whole chain it has some kilobytes.
pub const CONF_MAX: usize = 1 << 20;
/// Socket of the node's agent.
pub const SOCKET: &str = "/run/tulle/cni.sock";
/// Folder of what the plugin knows while the agent is away.
pub const STATE_DIR: &str = "/var/lib/tulle/cni";

/// The variables that a runtime sets.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// CNI_COMMAND.
    pub command: String,
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_NETNS.
    pub netns: String,
    /// CNI_IFNAME.
    pub if_name: String,
    /// CNI_ARGS.
    pub args: String,
}

/// Our part of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conf {
    /// Version of the specification that is spoken in this call.
    pub version: String,
    /// The agent's socket.
    pub socket: PathBuf,
    /// The state folder.
    pub state_dir: PathBuf,
    /// The mesh's root namespace, which decides where the agent has written nothing yet.
    pub root_namespace: String,
    /// The result of the plugins before ours, word for word.
    pub prev_result: Option<String>,
    /// Addresses of the pod in it.
    pub ips: Vec<IpAddr>,
    /// The attachments that there are (GC).
    pub valid: Option<Vec<Attachment>>,
}

/// A configuration as it comes.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawConf {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    socket: Option<String>,
    #[serde(default)]
    state_dir: Option<String>,
    #[serde(default)]
    root_namespace: Option<String>,
    #[serde(default)]
    prev_result: Option<PrevResult>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid: Option<Vec<RawAttachment>>,
    /// Its first spelling, which runtimes still send.
    #[serde(default, rename = "cni.dev/attachments")]
    valid_before: Option<Vec<RawAttachment>>,
}

#[derive(Deserialize)]
struct RawAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    #[serde(rename = "ifname")]
    if_name: String,
}

#[derive(Deserialize)]
struct PrevResult {
    #[serde(default)]
    interfaces: Option<Vec<Interface>>,
    #[serde(default)]
    ips: Option<Vec<Ip>>,
}

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    #[serde(default)]
    interface: Option<i64>,
}

/// The version that an answer names, as far as the configuration says it.
pub fn version_of(stdin: &str) -> String {
    #[derive(Deserialize)]
    struct Version {
        #[serde(rename = "cniVersion")]
        version: String,
    }
    let version = serde_json::from_str::<Version>(stdin).map(|conf| conf.version);
    version.ok().filter(|version| VERSIONS.contains(&version.as_str())).unwrap_or_else(|| VERSIONS[4].to_owned())
}

/// Reads the configuration.
///
/// # Errors
/// What is wrong with it, with the specification's code.
pub fn read(stdin: &str) -> Result<Conf, Refusal> {
    let raw: RawConf = serde_json::from_str(stdin).map_err(|error| {
        Refusal::new(CANNOT_DECODE, format!("the network configuration on standard input cannot be read: {error}"))
    })?;
    if !VERSIONS.contains(&raw.cni_version.as_str()) {
        let text = format!(
            "cniVersion {:?} is not supported; {} are. The version is that of the node's own CNI configuration",
            raw.cni_version,
            VERSIONS.join(", ")
        );
        return Err(Refusal::new(INCOMPATIBLE_VERSION, text));
    }
    let path = |field: &str, given: Option<String>, usual: &str| {
        let path = given.unwrap_or_else(|| usual.to_owned());
        check_path(field, &path).map_err(|why| Refusal::new(INVALID_CONFIG, why))?;
        Ok::<_, Refusal>(PathBuf::from(path))
    };
    let ips = raw.prev_result.as_ref().map(addresses).transpose()?.unwrap_or_default();
    let valid = raw.valid.or(raw.valid_before).map(|list| {
        list.into_iter().map(|it| Attachment { container_id: it.container_id, if_name: it.if_name }).collect()
    });
    Ok(Conf {
        version: raw.cni_version,
        socket: path("socket", raw.socket, SOCKET)?,
        state_dir: path("stateDir", raw.state_dir, STATE_DIR)?,
        root_namespace: raw.root_namespace.unwrap_or_else(|| names::DEFAULT_ROOT_NAMESPACE.to_owned()),
        prev_result: raw.prev_result.and_then(|_| json::raw(stdin, "prevResult")).map(str::to_owned),
        ips,
        valid,
    })
}

/// The addresses of the pod itself: those of an interface in a sandbox, or of no particular one.
fn addresses(result: &PrevResult) -> Result<Vec<IpAddr>, Refusal> {
    let interfaces = result.interfaces.as_deref().unwrap_or_default();
    let mut found = Vec::new();
    for ip in result.ips.as_deref().unwrap_or_default() {
        let interface = ip.interface.and_then(|index| interfaces.get(usize::try_from(index).ok()?));
        if interface.is_some_and(|interface| interface.sandbox.as_deref().unwrap_or_default().is_empty()) {
            continue;
        }
        let text = ip.address.split('/').next().unwrap_or_default();
        let address: IpAddr = text.parse().map_err(|_| {
            Refusal::new(INVALID_CONFIG, format!("prevResult has the address {:?}, which is none", ip.address))
        })?;
        found.push(address.to_canonical());
    }
    Ok(found)
}

/// The pod that CNI_ARGS names; `None`: the container is no pod of Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodName {
    /// K8S_POD_NAMESPACE.
    pub namespace: String,
    /// K8S_POD_NAME.
    pub name: String,
    /// K8S_POD_UID; empty where the runtime does not say it.
    pub uid: String,
}

/// Reads CNI_ARGS, `KEY=value;KEY=value`. What is not known is ignored: runtimes send IgnoreUnknown, and an older one that
/// does not means no harm by it.
///
/// # Errors
/// That a part is no pair, or that only half of a pod is named.
pub fn pod_name(args: &str) -> Result<Option<PodName>, Refusal> {
    let mut pairs = BTreeMap::new();
    for part in args.split(';').filter(|part| !part.is_empty()) {
        let Some((key, value)) = part.split_once('=') else {
            let text = format!("CNI_ARGS has the part {part:?}, which is not KEY=value");
            return Err(Refusal::new(INVALID_ENVIRONMENT, text));
        };
        pairs.insert(key, value);
    }
    let part = |key: &str| pairs.get(key).copied().unwrap_or_default().to_owned();
    let pod = PodName { namespace: part("K8S_POD_NAMESPACE"), name: part("K8S_POD_NAME"), uid: part("K8S_POD_UID") };
    match (pod.namespace.is_empty(), pod.name.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Ok(Some(pod)),
        _ => {
            let text = "CNI_ARGS names one of K8S_POD_NAMESPACE and K8S_POD_NAME; the runtime has to name both or none";
            Err(Refusal::new(INVALID_ENVIRONMENT, text))
        }
    }
}

/// The request to the agent; `None`: the container is no pod, so there is nothing to ask.
///
/// # Errors
/// What is wrong with the variables or the configuration, for this command.
pub fn request(command: Command, env: &Environment, conf: &Conf) -> Result<Option<Request>, Refusal> {
    let wrong = |why: String| Refusal::new(INVALID_ENVIRONMENT, why);
    let mut request = Request::of(command);
    match command {
        Command::Status => return Ok(Some(request)),
        Command::Gc => {
            // Without a list every attachment would be forgotten.
            let missing = || Refusal::new(INVALID_CONFIG, "GC came without cni.dev/valid-attachments");
            request.valid = Some(conf.valid.clone().ok_or_else(missing)?);
            return Ok(Some(request));
        }
        Command::Add | Command::Check | Command::Del => {}
    }
    check_container(&env.container_id).map_err(wrong)?;
    check_interface(&env.if_name).map_err(wrong)?;
    if command != Command::Del {
        check_path("CNI_NETNS", &env.netns).map_err(wrong)?;
        if conf.prev_result.is_none() {
            let text = "there is no prevResult: tulle-cni comes after the plugin that makes the pod's network, and never alone; put it at the end of a list";
            return Err(Refusal::new(INVALID_CONFIG, text));
        }
    }
    let Some(pod) = pod_name(&env.args)? else { return Ok(None) };
    request.container_id.clone_from(&env.container_id);
    request.if_name.clone_from(&env.if_name);
    // A DEL may come with a path that means nothing any more.
    if check_path("CNI_NETNS", &env.netns).is_ok() {
        request.netns.clone_from(&env.netns);
    }
    (request.pod_namespace, request.pod_name, request.pod_uid) = (pod.namespace, pod.name, pod.uid);
    request.ips.clone_from(&conf.ips);
    Ok(Some(request))
}

#[cfg(test)]
mod tests {
    use super::{Environment, PodName, pod_name, read, request, version_of};
    use crate::cni::wire::{Attachment, Command};

    const ARGS: &str =
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u-1";
    const RESULT: &str = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"cni0"},{"name":"eth0","sandbox":"/run/netns/c1"}],"ips":[{"address":"10.1.2.3/24","interface":1,"gateway":"10.1.2.1"},{"address":"10.1.2.1/24","interface":0},{"address":"fd00::3/64"}],"mtu":1.50e3,"dns":{}}"#;

    fn conf(more: &str) -> String {
        format!(r#"{{"cniVersion":"1.0.0","name":"net","type":"tulle-cni"{more}}}"#)
    }

    fn env() -> Environment {
        let [container_id, netns, if_name] = ["c1", "/run/netns/c1", "eth0"].map(str::to_owned);
        Environment { command: "ADD".into(), container_id, netns, if_name, args: ARGS.into() }
    }

    #[test]
    fn the_addresses_of_the_pod_are_those_of_its_sandbox() {
        let text = conf(&format!(r#","prevResult":{RESULT}"#));
        let conf = read(&text).unwrap();
        assert_eq!(conf.ips, ["10.1.2.3".parse::<std::net::IpAddr>().unwrap(), "fd00::3".parse().unwrap()]);
        assert_eq!(conf.prev_result.as_deref(), Some(RESULT), "word for word");
        assert_eq!(conf.socket.to_str(), Some("/run/tulle/cni.sock"));
        let request = request(Command::Add, &env(), &conf).unwrap().unwrap();
        assert_eq!((request.pod_namespace.as_str(), request.pod_uid.as_str()), ("shop", "u-1"));
        assert_eq!(request.ips, conf.ips);
    }

    #[test]
    fn what_is_wrong_is_said_with_the_specification_s_code() {
        let result = format!(r#","prevResult":{RESULT}"#);
        let good = conf(&result);
        let bad_ip = conf(r#","prevResult":{"ips":[{"address":"10.1.2/24"}]}"#);
        let old = good.replace(r#"{"cniVersion":"1.0.0","name""#, r#"{"cniVersion":"0.2.0","name""#);
        type Change = fn(&mut Environment);
        let cases: [(&str, Change, u32, &str); 9] = [
            ("{", |_| {}, 6, "cannot be read"),
            (&old, |_| {}, 1, "0.2.0"),
            (&bad_ip, |_| {}, 7, "10.1.2/24"),
            (&conf(""), |_| {}, 7, "no prevResult"),
            (&conf(r#","prevResult":null"#), |_| {}, 7, "no prevResult"),
            (&good, |env| env.container_id = "../c".into(), 4, "CNI_CONTAINERID"),
            (&good, |env| env.netns.clear(), 4, "CNI_NETNS"),
            (&good, |env| env.if_name.clear(), 4, "CNI_IFNAME"),
            (&good, |env| env.args = "K8S_POD_NAME=a".into(), 4, "names one of"),
        ];
        for (text, change, code, says) in cases {
            let mut env = env();
            change(&mut env);
            let refusal = read(text).and_then(|conf| request(Command::Add, &env, &conf)).unwrap_err();
            assert!(refusal.code == code && refusal.message.contains(says), "{says}: {refusal:?}");
        }
    }

    #[test]
    fn a_container_that_is_no_pod_is_asked_about_nobody() {
        let conf = read(&conf(&format!(r#","prevResult":{RESULT}"#))).unwrap();
        let env = Environment { args: "IgnoreUnknown=1".into(), ..env() };
        assert_eq!(request(Command::Add, &env, &conf), Ok(None));
        assert_eq!(pod_name(""), Ok(None));
        assert!(pod_name("a;b").unwrap_err().message.contains("\"a\""));
        let named = PodName { namespace: "shop".into(), name: "cart-0".into(), uid: "u-1".into() };
        assert_eq!(pod_name(ARGS), Ok(Some(named)));
    }

    #[test]
    fn a_del_needs_neither_netns_nor_result() {
        let conf = read(&conf("")).unwrap();
        let env = Environment { netns: String::new(), ..env() };
        let request = request(Command::Del, &env, &conf).unwrap().unwrap();
        assert!(request.netns.is_empty() && request.container_id == "c1");
    }

    #[test]
    fn a_gc_takes_both_spellings_of_its_list_and_is_nothing_without() {
        for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
            let text = conf(&format!(r#","{key}":[{{"containerID":"c1","ifname":"eth0"}}]"#));
            let request = request(Command::Gc, &Environment::default(), &read(&text).unwrap()).unwrap().unwrap();
            let valid = vec![Attachment { container_id: "c1".into(), if_name: "eth0".into() }];
            assert_eq!(request.valid, Some(valid));
        }
        assert!(request(Command::Gc, &Environment::default(), &read(&conf("")).unwrap()).is_err());
    }

    #[test]
    fn an_answer_names_the_version_that_was_asked_for() {
        assert_eq!(version_of(r#"{"cniVersion":"0.4.0"}"#), "0.4.0");
        for text in ["", "{", r#"{"cniVersion":"9.0.0"}"#] {
            assert_eq!(version_of(text), "1.1.0", "{text}");
        }
    }
}
