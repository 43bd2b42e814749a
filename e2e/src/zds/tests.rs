//! The agent against a proxy's side made of bare packets.

use std::collections::BTreeMap;
use std::io;
use std::io::IoSliceMut;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::AddressFamily;
use nix::sys::socket::ControlMessageOwned;
use nix::sys::socket::MsgFlags;
use nix::sys::socket::SockFlag;
use nix::sys::socket::SockType;
use nix::sys::socket::UnixAddr;
use prost::Message;
use tulle_proto::workload::zds;
use tulle_proto::workload::zds::workload_request::Payload;

use crate::eventually::eventually;
use crate::zds::Agent;
use crate::zds::Handed;
use crate::zds::Pod;
use crate::zds::Redirect;
use crate::zds::Step;
use crate::zds::Told;
use crate::zds::next;

const PATIENCE: Duration = Duration::from_secs(10);
const NOTHING: Redirect = Redirect { install: |_| Ok(()), remove: |_| Ok(()) };
/// Hello with version 1, as it is on the wire.
const HELLO: [u8; 2] = [0x08, 0x01];
/// An acknowledgement without an error.
const ACK: [u8; 2] = [0x0a, 0x00];

/// A proxy's end of the socket.
struct Proxy(UnixStream);

impl Proxy {
    fn connect(path: &Path, hello: &[u8]) -> anyhow::Result<Self> {
        let socket = nix::sys::socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        nix::sys::socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        let mut stream = UnixStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(hello)?;
        Ok(Self(stream))
    }

    /// The next message, with device and inode of the descriptor that came with it.
    fn receive(&self) -> anyhow::Result<(Payload, Option<(u64, u64)>)> {
        let mut bytes = [0; 1024];
        let mut control = nix::cmsg_space!([i32; 2]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = nix::sys::socket::recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
        let mut descriptors = Vec::new();
        for item in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(rights) = item {
                descriptors.extend(rights);
            }
        }
        anyhow::ensure!(descriptors.len() <= 1, "{} descriptors came", descriptors.len());
        let length = message.bytes;
        // They stay open: the test process is short.
        let file = descriptors.first().map(|fd| std::fs::metadata(format!("/proc/self/fd/{fd}"))).transpose()?;
        let request = zds::WorkloadRequest::decode(&bytes[..length])?;
        let payload = request.payload.ok_or_else(|| io::Error::other(format!("{length} bytes without content")))?;
        Ok((payload, file.map(|file| (file.dev(), file.ino()))))
    }

    fn answer(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// The next message, acknowledged.
    fn take(&mut self) -> anyhow::Result<Payload> {
        let (payload, _) = self.receive()?;
        self.answer(&ACK)?;
        Ok(payload)
    }
}

fn pod(dir: &Path, name: &str) -> anyhow::Result<(String, Pod)> {
    let netns = dir.join(name);
    std::fs::write(&netns, "")?;
    Ok((format!("uid-{name}"), Pod { name: name.into(), namespace: "n".into(), account: "a".into(), netns }))
}

fn agent(dir: &Path) -> anyhow::Result<(Agent, std::path::PathBuf)> {
    let path = dir.join("agent.sock");
    Ok((Agent::start_with(&path, NOTHING)?, path))
}

fn becomes(agent: &Agent, uid: &str, wanted: &Handed) -> Result<(), anyhow::Error> {
    eventually(&format!("{uid} is {wanted:?}"), PATIENCE, || {
        let now = agent.handed().remove(uid);
        if now.as_ref() == Some(wanted) { Ok(()) } else { Err(anyhow::anyhow!("it is {now:?}")) }
    })
    .map(drop)
    .map_err(|error| anyhow::anyhow!("{error}"))
}

fn added(uid: &str, pod: &Pod) -> Payload {
    let info = zds::WorkloadInfo {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.account.clone(),
    };
    Payload::Add(zds::AddWorkload { uid: uid.into(), workload_info: Some(info) })
}

fn removed(uid: &str) -> Payload {
    Payload::Del(zds::DelWorkload { uid: uid.into() })
}

#[test]
fn pods_come_with_their_namespace_then_the_end_of_the_snapshot_then_changes() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let (agent, path) = agent(dir.path())?;
    let (a, b, c) = (pod(dir.path(), "a")?, pod(dir.path(), "b")?, pod(dir.path(), "c")?);
    agent.set([a.clone(), b.clone()].into());
    let mut proxy = Proxy::connect(&path, &HELLO)?;
    for (uid, pod) in [&a, &b] {
        let (payload, file) = proxy.receive()?;
        let expected = std::fs::metadata(&pod.netns)?;
        assert_eq!((payload, file), (added(uid, pod), Some((expected.dev(), expected.ino()))));
        assert_eq!(agent.handed()[uid], Handed::Pending, "nothing was answered yet");
        proxy.answer(&ACK)?;
        becomes(&agent, uid, &Handed::Captured)?;
    }
    assert_eq!(proxy.receive()?, (Payload::SnapshotSent(zds::SnapshotSent {}), None));
    proxy.answer(&ACK)?;
    agent.set([a, c.clone()].into());
    assert_eq!(proxy.take()?, removed(&b.0));
    assert_eq!(proxy.take()?, added(&c.0, &c.1));
    becomes(&agent, &c.0, &Handed::Captured)?;
    Ok(())
}

#[test]
fn a_refused_pod_is_said_to_be_refused_and_the_others_go_on() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let (agent, path) = agent(dir.path())?;
    let (a, b) = (pod(dir.path(), "a")?, pod(dir.path(), "b")?);
    agent.set([a.clone(), b.clone()].into());
    let mut proxy = Proxy::connect(&path, &HELLO)?;
    proxy.receive()?;
    // Ack{error: "no"}.
    proxy.answer(&[0x0a, 0x04, 0x0a, 0x02, b'n', b'o'])?;
    assert_eq!(proxy.take()?, added(&b.0, &b.1));
    becomes(&agent, &a.0, &Handed::Failed("no".into()))?;
    becomes(&agent, &b.0, &Handed::Captured)
}

#[test]
fn rules_that_cannot_be_installed_keep_the_pod_from_the_proxy() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("agent.sock");
    let refuse = Redirect { install: |_| anyhow::bail!("no rules"), ..NOTHING };
    let agent = Agent::start_with(&path, refuse)?;
    let a = pod(dir.path(), "a")?;
    agent.set([a.clone()].into());
    let mut proxy = Proxy::connect(&path, &HELLO)?;
    assert_eq!(proxy.take()?, Payload::SnapshotSent(zds::SnapshotSent {}));
    becomes(&agent, &a.0, &Handed::Failed("no rules".into()))
}

#[test]
fn a_successor_gets_every_pod_and_its_predecessor_only_removals() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let (agent, path) = agent(dir.path())?;
    let (a, b) = (pod(dir.path(), "a")?, pod(dir.path(), "b")?);
    agent.set([a.clone()].into());
    let mut old = Proxy::connect(&path, &HELLO)?;
    old.take()?;
    old.take()?;
    let mut new = Proxy::connect(&path, &HELLO)?;
    assert_eq!(new.take()?, added(&a.0, &a.1));
    assert_eq!(new.take()?, Payload::SnapshotSent(zds::SnapshotSent {}));
    agent.set([b.clone()].into());
    assert_eq!(new.take()?, removed(&a.0));
    assert_eq!(new.take()?, added(&b.0, &b.1));
    assert_eq!(old.take()?, removed(&a.0), "it must not be given the new pod");
    Ok(())
}

#[test]
fn whoever_breaks_the_protocol_is_hung_up_on_and_the_next_is_served() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let (agent, path) = agent(dir.path())?;
    let a = pod(dir.path(), "a")?;
    // No version, an unknown one, garbage; then a good hello followed by words out of turn.
    let cases: [(&[u8], bool); 4] =
        [(&[0x08, 0x00], false), (&[0x08, 0x09], false), (&[0xff; 9], false), (&HELLO, true)];
    for (hello, answers) in cases {
        let mut proxy = Proxy::connect(&path, hello)?;
        if answers {
            assert_eq!(proxy.take()?, Payload::SnapshotSent(zds::SnapshotSent {}));
            proxy.answer(&ACK)?;
        }
        let mut end = [0; 8];
        assert_eq!(io::Read::read(&mut proxy.0, &mut end)?, 0, "{hello:?} must be hung up on");
    }
    agent.set([a.clone()].into());
    let mut proxy = Proxy::connect(&path, &HELLO)?;
    assert_eq!(proxy.take()?, added(&a.0, &a.1));
    becomes(&agent, &a.0, &Handed::Captured)
}

#[test]
fn what_is_next_follows_from_what_is_wanted_and_told() {
    let pod = |name: &str, netns: &str| Pod {
        name: name.into(),
        namespace: "n".into(),
        account: "a".into(),
        netns: netns.into(),
    };
    let one: BTreeMap<String, Pod> = [("1".to_owned(), pod("p", "/a"))].into();
    let told = |netns: &str, snapshot| Told { pods: [("1".to_owned(), netns.into())].into(), snapshot };
    let none = BTreeMap::new();
    for (what, wanted, told, newest, step) in [
        ("an empty snapshot ends at once", &none, Told::default(), true, Step::SnapshotSent),
        ("pods come first", &one, Told::default(), true, Step::Add("1".into(), pod("p", "/a"))),
        ("then the end", &one, told("/a", false), true, Step::SnapshotSent),
        ("then nothing", &one, told("/a", true), true, Step::Wait),
        ("removals wait for the end", &none, told("/a", false), true, Step::SnapshotSent),
        ("and then come", &none, told("/a", true), true, Step::Del("1".into())),
        ("another namespace is another pod", &one, told("/b", true), true, Step::Del("1".into())),
        ("an old connection gets nothing new", &one, Told { snapshot: true, ..Told::default() }, false, Step::Wait),
        ("but loses what goes", &none, told("/a", true), false, Step::Del("1".into())),
    ] {
        assert_eq!(next(wanted, &told, newest), step, "{what}");
    }
}
