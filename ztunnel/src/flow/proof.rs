//! Whether an address outside proves to be the host that a rule names, where TLS passes through and the proxy cannot see the
//! server's certificate in it: the proxy makes a handshake of its own with that address, for that server name, and goes no further.
//!
//! What was found counts for [`GOOD`] or [`BAD`], for everybody who goes to the same address by the same name and roots; who comes
//! meanwhile waits for one handshake. Everything is bounded: how many are kept, how many are under way, how long one takes. Limits: it
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
/// The same with the wait for whoever looks already.
const LONGEST: Duration = Duration::from_secs(5);
/// Pairs of address and name that are kept; some 200 bytes each.
const MOST: usize = 4096;
/// Handshakes under way. A thousand hosts a second could be proven, at 60 ms each.
const AT_ONCE: usize = 64;

/// Address, name and roots.
type Key = (SocketAddr, Box<str>, Vec<Arc<[u8]>>);
/// What was found, and until when it counts.
type Found = (Instant, Result<(), (Code, Arc<str>)>);
/// Held by who looks.
type Entry = Arc<tokio::sync::Mutex<Option<Found>>>;

/// See the module's header.
pub struct Proofs {
    roots: HostRoots,
    known: Mutex<HashMap<Key, Entry>>,
    places: Semaphore,
}

impl Proofs {
    /// Believes `system` where a rule has no roots of its own.
    pub fn new(system: RootCa) -> Self {
        Self { roots: HostRoots::new(system), known: Mutex::default(), places: Semaphore::new(AT_ONCE) }
    }

    /// Whether the server at `at`, which `connect` reaches, proves what the rule of `grant` wants proven of a client that speaks as
    /// `spoken` says.
    ///
    /// # Errors
    /// `EgressDenied` if it does not, or how it could not be reached.
    pub async fn check(
        &self,
        grant: &Grant,
        spoken: &Spoken<'_>,
        at: SocketAddr,
        connect: impl Future<Output = io::Result<TcpStream>>,
    ) -> Result<(), Outcome> {
        let Some(roots) = &grant.rule().proof else { return Ok(()) };
        let Spoken::Tls(Some(name)) = spoken else {
            return Err(Outcome::new(Code::Internal, "a host is to prove a name, and none was said"));
        };
        self.prove(at, name, roots, connect).await.map_err(|outcome| {
            let (policy, rule) = (Some(grant.policy.id.clone()), Some(grant.rule));
            Outcome { policy, rule, ..outcome }
        })
    }

    /// Whether the server at `at` has a certificate for `name` that one of `roots` signed (DER; none: the system's).
    async fn prove(
        &self,
        at: SocketAddr,
        name: &str,
        roots: &[Arc<[u8]>],
        connect: impl Future<Output = io::Result<TcpStream>>,
    ) -> Result<(), Outcome> {
        let entry = self.entry((at, name.into(), roots.to_vec()), Instant::now());
        let late = || (Code::ConnectTimeout, "the handshake that was to prove it was not finished in time".into());
        let looked = timeout(LONGEST, async {
            let mut found = entry.lock().await;
            if let Some((until, result)) = &*found
                && Instant::now() < *until
            {
                return result.clone();
            }
            let looked = timeout(PATIENCE, self.look(at, name, roots, connect)).await;
            let result = looked.unwrap_or_else(|_| Err(late()));
            let lasts = if result.is_ok() { GOOD } else { BAD };
            *found = Some((Instant::now() + lasts, result.clone()));
            result
        });
        let result = looked.await.unwrap_or_else(|_| Err(late()));
        result.map_err(|(code, why)| Outcome::new(code, format!("{at} is not proven to be {name}: {why}")))
    }

    /// The place for what is found. When there are too many, those that nobody looks at and that no longer count go first.
    fn entry(&self, key: Key, now: Instant) -> Entry {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST && !known.contains_key(&key) {
            let counts = |entry: &Entry| match entry.try_lock() {
                Ok(found) => found.as_ref().is_some_and(|(until, _)| now < *until),
                Err(_) => true,
            };
            known.retain(|_, entry| counts(entry));
            if known.len() >= MOST {
                known.clear();
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
        let _place = self.places.acquire().await.map_err(|error| failed(error.to_string()))?;
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

    use super::{BAD, GOOD, MOST, Proofs};
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
            let found = proofs.prove(at, name, roots, TcpStream::connect(at)).await;
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
        let gone = proofs.prove(nobody, "api.example", &roots, TcpStream::connect(nobody)).await;
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
    fn what_is_kept_is_bounded_and_what_counts_stays_longest() {
        let proofs = Proofs::new(RootCa::Pem(String::new()));
        let (at, now) = ("192.0.2.1:443".parse().unwrap(), Instant::now());
        let entry = |name: String| proofs.entry((at, name.into(), Vec::new()), now);
        for number in 0..MOST {
            let lasts = if number == 7 { GOOD } else { BAD };
            *entry(format!("{number}.example")).try_lock().unwrap() = Some((now + lasts, Ok(())));
        }
        let later = now + BAD;
        proofs.entry((at, "one.example".into(), Vec::new()), later);
        assert_eq!(proofs.known.lock().unwrap().len(), 2);
        let kept = entry("7.example".to_owned());
        assert!(kept.try_lock().unwrap().is_some());
    }
}
