//! Whether an address outside proves to be the host that a rule names, where TLS passes through and the proxy cannot see the
//! server's certificate in it: the proxy makes a handshake of its own with that address, for that server name, and goes no further.
//!
//! What was found counts for [`GOOD`] or [`BAD`], for every pod of a namespace that goes to the same address by the same name and roots;
//! who comes meanwhile waits for one handshake. Namespaces share neither what was found nor their handshakes under way, so that a
//! slow host of one keeps nobody else's from being proven. Everything is bounded: how many are kept, how many are under way, how long
//! one takes. Limits: it
//! is another connection than the client's, so a server that tells them apart can show each another certificate; and one that speaks
//! TLS 1.2 and asks for a client certificate ends the handshake before it is proven.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::flow::hosts::HostRoots;
use crate::identity::RootCa;
use crate::outcome::{Code, Outcome, chain};
use crate::policy::egress::{Grant, Spoken};

/// How long a proof counts. Addresses of a name change hands more slowly than their records end.
const GOOD: Duration = Duration::from_secs(60);
/// How long a failure counts: clients that try again at once cost no handshake each.
const BAD: Duration = Duration::from_secs(5);
/// How long one may take.
const PATIENCE: Duration = Duration::from_secs(4);
/// The same with the wait for a place, and for whoever looks already.
const LONGEST: Duration = Duration::from_secs(5);
/// Pairs of address and name that are kept; some 200 bytes each.
const MOST: usize = 4096;
/// Handshakes under way. A thousand hosts a second could be proven, at 60 ms each.
const AT_ONCE: usize = 64;
/// Those for pods of one namespace.
const AT_ONCE_OF_ONE: usize = 8;

/// Namespace of who goes there, address, name and roots.
type Key = (Box<str>, SocketAddr, Box<str>, Vec<Arc<[u8]>>);
/// What was found, and until when it counts.
type Found = (Instant, Result<(), (Code, Arc<str>)>);
/// Held by who looks.
type Entry = Arc<tokio::sync::Mutex<Option<Found>>>;

/// See the module's header.
pub struct Proofs {
    roots: HostRoots,
    known: Mutex<HashMap<Key, Entry>>,
    places: Semaphore,
    /// By namespace, while somebody there waits or looks.
    own_places: Mutex<HashMap<Box<str>, Arc<Semaphore>>>,
}

impl Proofs {
    /// Believes `system` where a rule has no roots of its own.
    pub fn new(system: RootCa) -> Self {
        let places = Semaphore::new(AT_ONCE);
        Self { roots: HostRoots::new(system), known: Mutex::default(), places, own_places: Mutex::default() }
    }

    /// Whether the server at `at`, which `connect` reaches, proves what the rule of `grant` wants proven of a client in `namespace`
    /// that speaks as `spoken` says.
    ///
    /// # Errors
    /// `EgressDenied` if it does not, `Overflow` if too many are being asked, or how it could not be reached.
    pub async fn check(
        &self,
        namespace: &str,
        (grant, spoken): (&Grant, &Spoken<'_>),
        at: SocketAddr,
        connect: impl Future<Output = io::Result<TcpStream>>,
    ) -> Result<(), Outcome> {
        let Some(roots) = &grant.rule().proof else { return Ok(()) };
        let Spoken::Tls(Some(name)) = spoken else {
            return Err(Outcome::new(Code::Internal, "a host is to prove a name, and none was said"));
        };
        self.prove(namespace, (at, name), roots, connect).await.map_err(|outcome| {
            let (policy, rule) = (Some(grant.policy.id.clone()), Some(grant.rule));
            Outcome { policy, rule, ..outcome }
        })
    }

    /// Whether the server at `at` has a certificate for `name` that one of `roots` signed (DER; none: the system's).
    async fn prove(
        &self,
        namespace: &str,
        (at, name): (SocketAddr, &str),
        roots: &[Arc<[u8]>],
        connect: impl Future<Output = io::Result<TcpStream>>,
    ) -> Result<(), Outcome> {
        let entry = self.entry((namespace.into(), at, name.into(), roots.to_vec()));
        let own = self.own_places(namespace);
        let unproven = |code: Code, why: &str| Outcome::new(code, format!("{at} is not proven to be {name}: {why}"));
        let looked = timeout(LONGEST, async {
            let mut found = entry.lock().await;
            if let Some((until, result)) = &*found
                && Instant::now() < *until
            {
                return result.clone();
            }
            // The wait for a place says nothing of the host, so it is no part of what is found.
            let _places = (own.acquire().await, self.places.acquire().await);
            let late = || (Code::ConnectTimeout, "the handshake that was to prove it was not finished in time".into());
            let looked = timeout(PATIENCE, self.look(at, name, roots, connect)).await;
            let result = looked.unwrap_or_else(|_| Err(late()));
            let lasts = if result.is_ok() { GOOD } else { BAD };
            *found = Some((Instant::now() + lasts, result.clone()));
            result
        });
        match looked.await {
            Ok(result) => result.map_err(|(code, why)| unproven(code, &why)),
            Err(_) => Err(unproven(
                Code::Overflow,
                "too many hosts of its namespace, or of the node, are being proven; try again",
            )),
        }
    }

    /// The places of a namespace. Those of namespaces that wait for nothing are forgotten.
    fn own_places(&self, namespace: &str) -> Arc<Semaphore> {
        let mut all = self.own_places.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.contains_key(namespace) {
            all.retain(|_, places| Arc::strong_count(places) > 1);
        }
        all.entry(namespace.into()).or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE_OF_ONE))).clone()
    }

    /// The place for what is found. When there are too many, those that nobody looks at and that no longer count go first, then
    /// those of the namespace with most.
    fn entry(&self, key: Key) -> Entry {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST && !known.contains_key(&key) {
            let now = Instant::now();
            let counts = |entry: &Entry| match entry.try_lock() {
                Ok(found) => found.as_ref().is_some_and(|(until, _)| now < *until),
                Err(_) => true,
            };
            known.retain(|_, entry| counts(entry));
            if known.len() >= MOST {
                let mut held: HashMap<&str, usize> = HashMap::new();
                known.keys().for_each(|(namespace, ..)| *held.entry(namespace).or_default() += 1);
                let most = held.into_iter().max_by_key(|(_, count)| *count).map(|(namespace, _)| namespace.to_owned());
                known.retain(|(namespace, ..), _| Some(&**namespace) != most.as_deref());
            }
        }
        known.entry(key).or_default().clone()
    }

    async fn look(
        &self,
        at: SocketAddr,
        name: &str,
        roots: &[Arc<[u8]>],
        connect: impl Future<Output = io::Result<TcpStream>>,
    ) -> Result<(), (Code, Arc<str>)> {
        let denied = |why: String| (Code::EgressDenied, Arc::from(why));
        let failed = |why: String| (Code::ConnectFailed, Arc::from(why));
        let server = ServerName::try_from(name.to_owned()).map_err(|error| denied(error.to_string()))?;
        let config = self.roots.config(roots).await.map_err(denied)?;
        let mut config = config.with_no_client_auth();
        config.resumption = Resumption::disabled();
        let tcp = connect.await.map_err(|error| failed(format!("{at}: {error}")))?;
        match TlsConnector::from(Arc::new(config)).connect(server, tcp).await {
            Ok(_) => Ok(()),
            Err(error) => Err(denied(chain(&error))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use rustls::ServerConfig;
    use rustls::pki_types::PrivatePkcs8KeyDer;
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::TlsAcceptor;

    use super::{GOOD, MOST, Proofs};
    use crate::identity::RootCa;
    use crate::outcome::Code;

    /// A server with a certificate for `name`, what signed that, and how many connections it has seen.
    async fn server(name: &str) -> (SocketAddr, Vec<Arc<[u8]>>, Arc<AtomicUsize>) {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let config = ServerConfig::builder_with_provider(crate::tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.into())
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (at, seen) = (listener.local_addr().unwrap(), Arc::<AtomicUsize>::default());
        let (acceptor, counted) = (TlsAcceptor::from(Arc::new(config)), seen.clone());
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                let acceptor = acceptor.clone();
                tokio::spawn(async move { drop(acceptor.accept(tcp).await) });
            }
        });
        (at, vec![made.cert.der().to_vec().into()], seen)
    }

    #[tokio::test]
    async fn an_address_is_proven_by_name_and_root_and_not_asked_again_while_that_counts() {
        let (at, roots, seen) = server("api.example").await;
        let (_, others, _) = server("api.example").await;
        let proofs = Proofs::new(RootCa::Pem(String::new()));
        let ask = async |name: &str, roots: &[Arc<[u8]>]| {
            let found = proofs.prove("shop", (at, name), roots, TcpStream::connect(at)).await;
            found.map_err(|outcome| (outcome.code, outcome.detail.to_string()))
        };
        let (one, two) = tokio::join!(ask("api.example", &roots), ask("api.example", &roots));
        assert_eq!((one, two), (Ok(()), Ok(())));
        assert_eq!(seen.load(Ordering::Relaxed), 1, "who came meanwhile did not wait");
        for (name, roots) in [("evil.example", &roots), ("api.example", &others), ("api.example", &Vec::new())] {
            let before = seen.load(Ordering::Relaxed);
            let (code, why) = ask(name, roots).await.unwrap_err();
            assert!(code == Code::EgressDenied && why.contains(&format!("not proven to be {name}")), "{why}");
            assert_eq!(ask(name, roots).await.unwrap_err().1, why, "a failure counts for a while");
            assert!(seen.load(Ordering::Relaxed) <= before + 1);
        }
        // Nobody listens there; and what was found counts no longer.
        let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let gone = proofs.prove("shop", (nobody, "api.example"), &roots, TcpStream::connect(nobody)).await;
        assert_eq!(gone.unwrap_err().code, Code::ConnectFailed);
        for entry in proofs.known.lock().unwrap().values() {
            if let Some((until, _)) = &mut *entry.try_lock().unwrap() {
                *until = Instant::now().checked_sub(Duration::from_millis(1)).unwrap();
            }
        }
        let before = seen.load(Ordering::Relaxed);
        assert_eq!(ask("api.example", &roots).await, Ok(()));
        assert_eq!(seen.load(Ordering::Relaxed), before + 1);
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_namespace_with_most_goes_first() {
        let proofs = Proofs::new(RootCa::Pem(String::new()));
        let at = "192.0.2.1:443".parse().unwrap();
        let entry = |namespace: &str, name: String| proofs.entry((namespace.into(), at, name.into(), Vec::new()));
        let count = || proofs.known.lock().unwrap().len();
        let now = Instant::now();
        // All but two are over.
        for number in 0..MOST {
            let until = if number < 2 { now + GOOD } else { now };
            *entry("shop", format!("{number}.example")).try_lock().unwrap() = Some((until, Ok(())));
        }
        entry("shop", "one.example".to_owned());
        assert_eq!(count(), 3);
        // All count, most of them those of one namespace.
        for number in 3..MOST {
            *entry("flood", format!("{number}.example")).try_lock().unwrap() = Some((now + GOOD, Ok(())));
        }
        *entry("shop", "one.example".to_owned()).try_lock().unwrap() = Some((now + GOOD, Ok(())));
        assert_eq!(count(), MOST);
        entry("other", "api.example".to_owned());
        assert_eq!(count(), 4);
        let kept = entry("shop", "1.example".to_owned());
        assert!(kept.try_lock().unwrap().is_some());
    }

    #[tokio::test]
    async fn a_namespace_whose_hosts_are_silent_keeps_nobody_elses_from_being_proven() {
        let (at, roots, _) = server("api.example").await;
        // It takes connections, and says nothing.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let evil = silent.local_addr().unwrap();
        let proofs = Proofs::new(RootCa::Pem(String::new()));
        let (flood_roots, proofs) = (&roots, &proofs);
        let flood = (0..200).map(|number| async move {
            let name = format!("{number}.evil.example");
            proofs.prove("evil", (evil, &name), flood_roots, TcpStream::connect(evil)).await.unwrap_err().code
        });
        let other = async {
            let found = proofs.prove("shop", (at, "api.example"), &roots, TcpStream::connect(at)).await;
            found.map_err(|outcome| outcome.detail.to_string())
        };
        let (codes, other) = futures_util::future::join(futures_util::future::join_all(flood), other).await;
        assert_eq!(other, Ok(()));
        assert!(codes.contains(&Code::ConnectTimeout) && codes.contains(&Code::Overflow), "{codes:?}");
        assert!(proofs.known.lock().unwrap().len() > 1);
    }
}
