//! How an Istio CNI agent hands this node's pods over (ZDS): the messages, and what they add up to.
//!
//! One protobuf message a packet (`zds.proto`), at most [`PACKET_MAX`] bytes because that is what either side reads, the
//! pod's network namespace beside it as the one descriptor. Every request is answered by exactly one acknowledgement and
//! nothing else is ever said, since the agent tells answers apart only by their order. A request that makes no sense is
//! refused in its acknowledgement and changes nothing: packets keep their boundaries, so the next one is whole again.
//! Reading a packet ([`request`]) and keeping the list ([`Handed`]) are pure; `app::agent` has the socket.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use tulle_proto::workload::zds::workload_request::Payload;
use tulle_proto::workload::zds::workload_response;
use tulle_proto::workload::zds::{Ack, AddWorkload, Version, WorkloadRequest, WorkloadResponse, ZdsHello};

use crate::capture::pods::{Pod, Pods, check_name};

/// Longest packet of the protocol.
pub const PACKET_MAX: usize = 1024;
/// Longest reason in an acknowledgement, so that it fits a packet.
const REASON_MAX: usize = 900;

/// What the agent asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Serve this pod; its network namespace came along.
    Add(Added),
    /// Go on serving this pod: the agent has lost its descriptor.
    Keep(String),
    /// Serve it no longer.
    Del(String),
    /// That were all pods there are.
    SnapshotSent,
}

/// A pod to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    /// metadata.uid.
    pub uid: String,
    /// metadata.name.
    pub name: String,
    /// metadata.namespace.
    pub namespace: String,
    /// spec.serviceAccountName; `default` if empty.
    pub service_account: String,
}

/// The first packet, ours.
pub fn hello() -> Vec<u8> {
    ZdsHello { version: Version::V1.into() }.encode_to_vec()
}

/// The answer to a request.
pub fn answer(done: Result<(), String>) -> Vec<u8> {
    let mut error = done.err().unwrap_or_default();
    if error.len() > REASON_MAX {
        let cut = (0..=REASON_MAX).rev().find(|at| error.is_char_boundary(*at)).unwrap_or(0);
        error.truncate(cut);
    }
    let payload = Some(workload_response::Payload::Ack(Ack { error }));
    WorkloadResponse { payload }.encode_to_vec()
}

/// Reads a packet that came with `fds` descriptors; `cut`: it was longer than one may be.
///
/// # Errors
/// What is wrong with it, for the agent and the log.
pub fn request(packet: &[u8], fds: usize, cut: bool) -> Result<Request, String> {
    if cut {
        return Err(format!(
            "a packet has more than {PACKET_MAX} bytes, or more descriptors than one; nothing of it was used"
        ));
    }
    let decoded = WorkloadRequest::decode(packet);
    let payload = decoded.map_err(|error| format!("a packet is no WorkloadRequest: {error}"))?.payload;
    let request = match payload {
        Some(Payload::Add(add)) => Request::Add(added(add)?),
        Some(Payload::Keep(keep)) => Request::Keep(uid(keep.uid)?),
        Some(Payload::Del(del)) => Request::Del(uid(del.uid)?),
        Some(Payload::SnapshotSent(_)) => Request::SnapshotSent,
        None => return Err("a WorkloadRequest asks for nothing that this proxy knows; is the agent newer?".to_owned()),
    };
    match (&request, fds) {
        (Request::Add(_), 1) | (Request::Keep(_) | Request::Del(_) | Request::SnapshotSent, 0) => Ok(request),
        (Request::Add(add), count) => Err(format!(
            "pod {}/{} came with {count} descriptors; exactly one is wanted, of its network namespace",
            add.namespace, add.name
        )),
        (_, count) => Err(format!("{count} descriptors came with a request that takes none")),
    }
}

fn added(add: AddWorkload) -> Result<Added, String> {
    let uid = uid(add.uid)?;
    let info = add.workload_info.ok_or_else(|| format!("pod {uid} came without workload_info"))?;
    check_name("name", &info.name)?;
    check_name("namespace", &info.namespace)?;
    let account = if info.service_account.is_empty() { "default".to_owned() } else { info.service_account };
    check_name("service_account", &account)?;
    Ok(Added { uid, name: info.name, namespace: info.namespace, service_account: account })
}

fn uid(uid: String) -> Result<String, String> {
    check_name("uid", &uid).map(|()| uid)
}

/// The pods that were handed over. It outlives connections: what runs goes on while the agent is away, and the next
/// connection's snapshot says which of them are still there.
#[derive(Debug, Default)]
pub struct Handed {
    pods: BTreeMap<String, Pod>,
    /// Named since the connection began; `None`: its snapshot is complete.
    named: Option<BTreeSet<String>>,
    /// Some connection's snapshot was complete.
    complete: bool,
}

impl Handed {
    /// A connection begins.
    pub fn connected(&mut self) {
        self.named = Some(BTreeSet::new());
    }

    /// A pod is to be served. The same one again is no change; another namespace under its uid is another pod.
    pub fn add(&mut self, pod: Pod) {
        self.name(&pod.uid);
        self.pods.insert(pod.uid.clone(), pod);
    }

    /// A pod goes on as it is.
    ///
    /// # Errors
    /// If it is not served here, or the snapshot is over.
    pub fn keep(&mut self, uid: &str) -> Result<(), String> {
        if self.named.is_none() {
            return Err(format!("pod {uid} is to be kept, which is said before the end of a snapshot only"));
        }
        if !self.pods.contains_key(uid) {
            return Err(format!("pod {uid} is not served here; send it with its network namespace"));
        }
        self.name(uid);
        Ok(())
    }

    /// A pod is gone. One that was not there is as good.
    pub fn del(&mut self, uid: &str) {
        self.pods.remove(uid);
    }

    /// All pods were named; whoever was not is gone.
    ///
    /// # Errors
    /// If that was said already on this connection.
    pub fn snapshot_sent(&mut self) -> Result<(), String> {
        let named = self.named.take().ok_or("the end of the snapshot was said twice")?;
        self.pods.retain(|uid, _| named.contains(uid));
        self.complete = true;
        Ok(())
    }

    /// The pods to serve.
    pub fn list(&self) -> Pods {
        Pods { pods: self.pods.values().cloned().collect(), errors: Vec::new(), complete: self.complete }
    }

    fn name(&mut self, uid: &str) {
        if let Some(named) = &mut self.named {
            named.insert(uid.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use prost::Message as _;
    use tulle_proto::workload::zds::WorkloadResponse;
    use tulle_proto::workload::zds::workload_response::Payload;

    use super::{Added, Handed, PACKET_MAX, Request, answer, hello, request};
    use crate::base::netns::Netns;
    use crate::capture::pods::Pod;

    /// Field 1 of a request, AddWorkload{uid "u-1", workload_info{"web", "shop", "web"}}, as it is on the wire.
    const ADD: &[u8] = b"\x0a\x18\x0a\x03u-1\x12\x11\x0a\x03web\x12\x04shop\x1a\x04cart";

    /// Name, packet, descriptors that come with it, and what it means.
    type Case = (&'static str, &'static [u8], usize, Result<Request, &'static str>);

    #[test]
    fn packets_mean_what_istio_s_agent_means() {
        let add = |account: &str| {
            let (uid, name, namespace) = ("u-1".into(), "web".into(), "shop".into());
            Ok(Request::Add(Added { uid, name, namespace, service_account: account.into() }))
        };
        let no_account = b"\x0a\x12\x0a\x03u-1\x12\x0b\x0a\x03web\x12\x04shop";
        let cases: [Case; 14] = [
            ("add", ADD, 1, add("cart")),
            ("add without account", no_account, 1, add("default")),
            ("del, whose uid is field 2", b"\x12\x05\x12\x03u-1", 0, Ok(Request::Del("u-1".into()))),
            ("snapshot sent", b"\x1a\x00", 0, Ok(Request::SnapshotSent)),
            ("keep", b"\x2a\x05\x0a\x03u-1", 0, Ok(Request::Keep("u-1".into()))),
            ("add without descriptor", ADD, 0, Err("0 descriptors")),
            ("add with two", ADD, 2, Err("2 descriptors")),
            ("del with one", b"\x12\x05\x12\x03u-1", 1, Err("takes none")),
            ("add without info", b"\x0a\x05\x0a\x03u-1", 1, Err("without workload_info")),
            ("add without uid", b"\x0a\x0d\x12\x0b\x0a\x03web\x12\x04shop", 1, Err("uid")),
            ("a name that is none", b"\x0a\x12\x0a\x03u-1\x12\x0b\x0a\x03w b\x12\x04shop", 1, Err("name")),
            ("nothing known", b"\x32\x00", 0, Err("newer")),
            ("an empty packet", b"", 0, Err("newer")),
            ("no protobuf", b"\x0f\xff", 0, Err("no WorkloadRequest")),
        ];
        for (name, bytes, fds, expected) in cases {
            match (request(bytes, fds, false), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{name}"),
                (Err(found), Err(expected)) => assert!(found.contains(expected), "{name}: {found}"),
                (found, expected) => panic!("{name}: {found:?} instead of {expected:?}"),
            }
        }
        assert!(request(ADD, 1, true).is_err_and(|error| error.contains("1024")));
    }

    #[test]
    fn what_we_say_fits_and_is_what_the_agent_expects() {
        assert_eq!(hello(), b"\x08\x01");
        assert_eq!(answer(Ok(())), b"\x0a\x00");
        for reason in ["cannot listen".to_owned(), "ö".repeat(1000), "x".repeat(5000)] {
            let bytes = answer(Err(reason.clone()));
            assert!(bytes.len() <= PACKET_MAX);
            let Some(Payload::Ack(ack)) = WorkloadResponse::decode(&*bytes).unwrap().payload else { panic!("no ack") };
            assert!(!ack.error.is_empty() && reason.starts_with(&ack.error));
        }
    }

    fn pod(uid: &str, handle: &Netns) -> Pod {
        Pod::handed(
            Added { uid: uid.into(), name: "a".into(), namespace: "ns".into(), service_account: "a".into() },
            handle.clone(),
            vec!["10.0.0.1".parse().unwrap()],
        )
    }

    #[test]
    fn a_new_connection_s_snapshot_says_who_is_still_there() {
        let own = Netns::of(File::open("/proc/self/ns/net").unwrap().into()).unwrap();
        let uids = |handed: &Handed| handed.list().pods.into_iter().map(|pod| pod.uid).collect::<Vec<_>>();
        let mut handed = Handed::default();
        handed.connected();
        ["a", "b", "c"].into_iter().for_each(|uid| handed.add(pod(uid, &own)));
        assert!(!handed.list().complete, "the snapshot is not over");
        handed.snapshot_sent().unwrap();
        handed.del("c");
        handed.del("nobody");
        assert_eq!((uids(&handed), handed.list().complete), (vec!["a".into(), "b".into()], true));
        assert!(handed.snapshot_sent().is_err());
        assert!(handed.keep("a").is_err(), "too late on this connection");
        handed.connected();
        assert_eq!(uids(&handed).len(), 2, "what runs goes on");
        handed.keep("b").unwrap();
        assert!(handed.keep("c").is_err_and(|why| why.contains("not served here")));
        handed.add(pod("d", &own));
        handed.snapshot_sent().unwrap();
        assert_eq!(uids(&handed), ["b", "d"]);
    }
}
