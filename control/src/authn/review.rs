//! Tokens of Kubernetes service accounts: asked of the API server, with a memory of what it said.
//!
//! What is trusted: that the API server is the one of the kubeconfig, and that it checks signature, time, audience, and
//! that the pod which a token is bound to still is there with that uid. The node is the one that the server says the pod
//! runs on; where it does not say (before 1.32), that of the pod as control knows it, if it is the same pod. An answer is
//! kept for [`KEPT_S`] at most: so long after its pod went, a token is still believed. Without an answer nobody passes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::Deserialize;
use sha2::Digest;
use sha2::Sha256;
use tokio::sync::Semaphore;

use crate::authn::token::{Caller, MAX_TOKEN_BYTES, subject};
use crate::base::sources::Sources;
use crate::cluster::tokens::Review;

/// Longest that an answer is believed, seconds.
const KEPT_S: i64 = 60;
/// A refusal is kept this long, seconds: who repeats it costs the API server little, and a pod that it hears of a moment
/// later does not wait long.
const REFUSED_S: i64 = 3;
/// Questions at a time. A cluster of 1000 nodes that come back at once is asked about in some seconds.
pub const MAX_REVIEWS: usize = 32;
/// The same for one address: anybody in the cluster can send tokens that prove nothing, and must not take the turns of
/// nodes. A node asks about one token at a time.
const REVIEWS_OF_ONE: usize = 4;
/// How long one question may take, waiting for its turn included.
const TIME: Duration = Duration::from_secs(5);
/// Answers that are kept: a node has one token, and another one each hour.
const KEPT: usize = 8192;

/// Keys of what the API server says besides the name.
const EXTRA: [&str; 3] = [
    "authentication.kubernetes.io/pod-name",
    "authentication.kubernetes.io/pod-uid",
    "authentication.kubernetes.io/node-name",
];

/// Asks the API server about a token.
pub type Ask = Box<dyn Fn(String) -> BoxFuture<'static, Result<Review, String>> + Send + Sync>;
/// Where a pod (namespace, name) runs, as control knows it.
pub type FindPod = Box<dyn Fn(&str, &str) -> Option<PodPlace> + Send + Sync>;

/// Where a pod runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPlace {
    /// metadata.uid.
    pub uid: String,
    /// spec.nodeName.
    pub node: String,
}

/// Why nobody is proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The caller's fault.
    Refused(String),
    /// Not known now.
    Unavailable(String),
}

/// What a token says of itself; worth nothing before somebody has checked it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Claims {
    /// iss.
    #[serde(rename = "iss", default)]
    pub issuer: String,
    /// exp, Unix seconds.
    #[serde(rename = "exp", default)]
    pub expiry: Option<i64>,
}

/// Reads a JWT's claims without checking anything. `None`: it is none.
pub fn unverified(token: &str) -> Option<Claims> {
    if token.len() > MAX_TOKEN_BYTES {
        return None;
    }
    jsonwebtoken::dangerous::insecure_decode_claims(token).ok()
}

struct Kept {
    until: i64,
    verdict: Result<Caller, Refusal>,
}

/// Asks, and remembers.
pub struct Reviews {
    ask: Ask,
    pods: FindPod,
    audience: String,
    turns: Semaphore,
    // Addresses with questions under way.
    sources: Arc<Sources>,
    // By the SHA-256 of the token, so that no token lies in memory. Held for single map operations only.
    kept: Mutex<BTreeMap<[u8; 32], Kept>>,
}

impl Reviews {
    /// Tokens must be for `audience`.
    pub fn new(audience: String, ask: Ask, pods: FindPod) -> Arc<Self> {
        let (turns, kept) = (Semaphore::new(MAX_REVIEWS), Mutex::default());
        Arc::new(Self { ask, pods, audience, turns, sources: Sources::new(REVIEWS_OF_ONE), kept })
    }

    /// The caller at address `from` that a token proves at `now`, Unix seconds. `claims` are the token's own.
    pub async fn caller(
        &self,
        token: &str,
        claims: &Claims,
        from: Option<IpAddr>,
        now: i64,
    ) -> Result<Caller, Refusal> {
        let key: [u8; 32] = Sha256::digest(token).into();
        if let Some(verdict) = self.known(&key, now) {
            return verdict;
        }
        let asked = tokio::time::timeout(TIME, async {
            let source = self.sources.of(from);
            let _own = source.turns.acquire().await;
            let _turn = self.turns.acquire().await;
            match self.known(&key, now) {
                Some(verdict) => Ok(Err(verdict)),
                None => (self.ask)(token.to_owned()).await.map(Ok),
            }
        });
        let review = match asked.await {
            Err(_) => return Err(unavailable(format!("the API server did not answer within {TIME:?}"))),
            Ok(Err(error)) => return Err(unavailable(format!("the API server cannot be asked: {error}"))),
            Ok(Ok(Err(verdict))) => return verdict,
            Ok(Ok(Ok(review))) => review,
        };
        let verdict = proven(&review, &self.audience, &self.pods);
        let until = match &verdict {
            Ok(_) => claims.expiry.unwrap_or(i64::MAX).min(now.saturating_add(KEPT_S)),
            Err(Refusal::Refused(_)) => now.saturating_add(REFUSED_S),
            Err(Refusal::Unavailable(_)) => now,
        };
        self.keep(key, Kept { until, verdict: verdict.clone() }, now);
        verdict
    }

    fn known(&self, key: &[u8; 32], now: i64) -> Option<Result<Caller, Refusal>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(key).filter(|kept| now < kept.until).map(|kept| kept.verdict.clone())
    }

    fn keep(&self, key: [u8; 32], verdict: Kept, now: i64) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.retain(|_, kept| now < kept.until);
            if kept.len() >= KEPT {
                // As many callers at once are no cluster; any of them can be asked about again.
                kept.clear();
            }
        }
        kept.insert(key, verdict);
    }
}

fn unavailable(reason: String) -> Refusal {
    Refusal::Unavailable(reason)
}

/// What an answer proves. Pure.
fn proven(review: &Review, audience: &str, pods: &FindPod) -> Result<Caller, Refusal> {
    let refused = |reason: String| Err(Refusal::Refused(reason));
    if !review.authenticated {
        let why = if review.error.is_empty() { "it does not say why" } else { &review.error };
        return refused(format!(
            "the API server does not accept it: {why}; it must be a service account's token for the audience \
             {audience}, as a projected volume gives it, of a pod that is still there"
        ));
    }
    if !review.audiences.iter().any(|one| one == audience) {
        return refused(format!(
            "it is not for the audience {audience}; set `audience: {audience}` in the projected volume (or \
             --token-audience of control)"
        ));
    }
    let Some((namespace, service_account)) = subject(&review.username) else {
        return refused(format!("it is of `{}`, which is no service account", review.username));
    };
    let [pod, uid, node] = EXTRA.map(|key| review.extra.get(key).and_then(|values| values.first()));
    let found = pod.and_then(|pod| pods(&namespace, pod));
    let same = found.filter(|found| uid.is_some_and(|uid| *uid == found.uid) && !found.node.is_empty());
    let node = match (node, same, pod) {
        // Not bound to a pod: an account without a node.
        (None, _, None) => None,
        (Some(said), Some(known), _) if *said != known.node => {
            return refused(format!("it is for node {said}, but its pod runs on {}", known.node));
        }
        (Some(said), _, _) => Some(said.clone()),
        (None, Some(known), _) => Some(known.node),
        (None, None, Some(pod)) => {
            let reason = format!("control does not know pod {namespace}/{pod} with that uid (yet)");
            return Err(unavailable(reason));
        }
    };
    Ok(Caller { namespace, service_account, node })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering;

    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn good() -> Review {
        let extra = [("pod-name", "zt-1"), ("pod-uid", "u-1"), ("node-name", "node-1")];
        let extra = extra.map(|(key, value)| (format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]));
        Review {
            authenticated: true,
            error: String::new(),
            audiences: vec!["istio-ca".into()],
            username: "system:serviceaccount:tulle-system:ztunnel".into(),
            extra: extra.into(),
        }
    }

    fn pods() -> FindPod {
        Box::new(|namespace, name| {
            let known = (namespace, name) == ("tulle-system", "zt-1");
            known.then(|| PodPlace { uid: "u-1".into(), node: "node-1".into() })
        })
    }

    #[test]
    fn only_a_whole_answer_proves_anything() {
        let caller = |node: Option<&str>| Caller {
            namespace: "tulle-system".into(),
            service_account: "ztunnel".into(),
            node: node.map(str::to_owned),
        };
        let without = |keys: &[&str]| {
            let mut review = good();
            review.extra.retain(|key, _| !keys.iter().any(|gone| key.ends_with(gone)));
            review
        };
        let with = |key: &str, value: &str| {
            let mut review = good();
            review.extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]);
            review
        };
        let cases: Vec<(&str, Review, Result<Caller, &str>)> = vec![
            ("whole", good(), Ok(caller(Some("node-1")))),
            ("an older server", without(&["node-name"]), Ok(caller(Some("node-1")))),
            ("no pod", without(&["node-name", "pod-name", "pod-uid"]), Ok(caller(None))),
            (
                "refused by the server",
                Review { authenticated: false, error: "token expired".into(), ..good() },
                Err("token expired"),
            ),
            ("refused without a word", Review { authenticated: false, ..good() }, Err("does not say why")),
            ("wrong audience", Review { audiences: vec!["kubernetes".into()], ..good() }, Err("audience istio-ca")),
            ("audiences unknown to the server", Review { audiences: vec![], ..good() }, Err("audience istio-ca")),
            ("a user", Review { username: "system:node:node-1".into(), ..good() }, Err("no service account")),
            ("another node", with("node-name", "node-2"), Err("its pod runs on node-1")),
        ];
        for (name, review, expected) in cases {
            match (proven(&review, "istio-ca", &pods()), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{name}"),
                (Err(Refusal::Refused(reason)), Err(expected)) => {
                    assert!(reason.contains(expected), "{name}: {reason}");
                }
                (found, _) => panic!("{name}: {found:?}"),
            }
        }
        // Of another pod of the name, or of one that is not known here, the server's word counts, and without it none.
        let mut other = without(&["node-name"]);
        other.extra.insert("authentication.kubernetes.io/pod-uid".into(), vec!["u-2".into()]);
        assert!(matches!(proven(&other, "istio-ca", &pods()), Err(Refusal::Unavailable(_))));
        assert_eq!(proven(&with("pod-name", "zt-9"), "istio-ca", &pods()), Ok(caller(Some("node-1"))));
    }

    #[tokio::test]
    async fn an_answer_is_kept_until_it_or_the_token_ends_and_no_answer_passes_nobody() {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let ask: Ask = Box::new(move |token| {
            counted.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                match token.as_str() {
                    "down" => Err("connection refused".into()),
                    "bad" => Ok(Review::default()),
                    _ => Ok(good()),
                }
            })
        });
        let reviews = Reviews::new("istio-ca".into(), ask, pods());
        let claims = |life| Claims { issuer: "kube".into(), expiry: Some(NOW + life) };
        let count = || asked.swap(0, Ordering::Relaxed);
        for (at, wanted) in [(0, 1), (1, 0), (59, 0), (60, 1), (61, 0)] {
            reviews.caller("long", &claims(3600), None, NOW + at).await.expect("passes");
            assert_eq!(count(), wanted, "after {at} s");
        }
        for (at, wanted) in [(0, 1), (19, 0), (20, 1)] {
            reviews.caller("short", &claims(20), None, NOW + at).await.expect("passes");
            assert_eq!(count(), wanted, "after {at} s of a short one");
        }
        for (at, wanted) in [(0, 1), (2, 0), (3, 1)] {
            let refusal = reviews.caller("bad", &claims(3600), None, NOW + at).await.expect_err("refused");
            assert!(matches!(refusal, Refusal::Refused(_)), "{refusal:?}");
            assert_eq!(count(), wanted, "after {at} s of a bad one");
        }
        for token in ["down", "down"] {
            let refusal = reviews.caller(token, &claims(3600), None, NOW).await.expect_err("nobody knows");
            assert!(matches!(refusal, Refusal::Unavailable(_)), "{refusal:?}");
            assert_eq!(count(), 1, "{token}: asked again");
        }
        for at in 0..KEPT + 10 {
            reviews.caller(&at.to_string(), &claims(3600), None, NOW).await.expect("passes");
        }
        assert!(reviews.kept.lock().expect("not poisoned").len() <= KEPT, "bounded");
    }

    #[tokio::test]
    async fn a_flood_from_one_address_leaves_turns_to_others() {
        let ask: Ask = Box::new(|token| {
            Box::pin(async move {
                if token.starts_with("slow") {
                    std::future::pending::<()>().await;
                }
                Ok(good())
            })
        });
        let reviews = Reviews::new("istio-ca".into(), ask, pods());
        let claims = Claims::default();
        let address = |text: &str| text.parse::<IpAddr>().ok();
        let (flooding, node) = (address("10.0.0.66"), address("10.0.0.1"));
        let tokens: Vec<String> = (0..2 * MAX_REVIEWS).map(|n| format!("slow-{n}")).collect();
        let flood = futures_util::future::join_all(tokens.iter().map(|t| reviews.caller(t, &claims, flooding, NOW)));
        let other = reviews.caller("node", &claims, node, NOW);
        tokio::select! {
            biased;
            _ = flood => panic!("nobody answers the flood"),
            passed = other => { passed.expect("another address has its turn"); }
        }
    }

    #[test]
    fn claims_are_read_of_tokens_only() {
        // {"iss":"https://kube","exp":7,"sub":"x"}
        let token = "e30.eyJpc3MiOiJodHRwczovL2t1YmUiLCJleHAiOjcsInN1YiI6IngifQ.c2ln";
        assert_eq!(unverified(token), Some(Claims { issuer: "https://kube".into(), expiry: Some(7) }));
        assert_eq!(unverified("e30.e30.c2ln"), Some(Claims::default()));
        for none in ["", "a", "a.b", "a.b.c", "a.e30.c.d", "..", "e30.x.e30"] {
            assert_eq!(unverified(none), None, "{none}");
        }
        assert_eq!(unverified(&format!("e30.{}.x", "A".repeat(9000))), None, "too long");
    }
}
