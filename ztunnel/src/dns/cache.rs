//! Answers of name servers, kept for as long as they hold, and one question for all who wait for the same answer.
//!
//! One store for the node, bounded in bytes, but an answer is shared only among pods of one service account that ask the
//! same server with the same flags. Questions are asked from inside the pod, where a program with raw sockets can forge
//! the answer: what one pod was told must not reach a pod that is somebody else. Each such group has a share of the
//! bytes, so that it cannot push the others out either.
//!
//! Times to live are honoured, with a ceiling. An answer that is over is kept a while longer for when its server does not
//! answer (RFC 8767).

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::dns::wire::{Body, OwnEdns};

/// Bytes of the node's cache: some 20,000 usual answers.
const BYTES: usize = 8 << 20;
/// Bytes of one group of pods.
const GROUP_BYTES: usize = 1 << 20;
/// What an entry costs besides its bytes: key, walked records, places in maps.
const OVERHEAD: usize = 256;
/// Nothing holds longer, seconds: a mistake in a zone must end some day.
pub const LONGEST: u32 = 3600;
/// Absence holds no longer, seconds (RFC 2308 §5 advises a ceiling).
pub const LONGEST_ABSENCE: u32 = 300;
/// Names of the cluster change with every deployment; what the mesh does not know itself is asked again soon, seconds.
pub const LONGEST_IN_CLUSTER: u32 = 5;
/// How long an answer is of use when its server is dead.
const STALE: Duration = Duration::from_secs(3600);

/// How long a dead server is left alone while there is an old answer.
const RECHECK: Duration = Duration::from_secs(5);

/// What makes two questions the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// `<namespace>/<service account>` of the pods that share.
    pub group: Arc<str>,
    /// Who is asked.
    pub upstream: SocketAddr,
    /// The question in lower case, with type and class.
    pub question: Box<[u8]>,
    /// RD, AD, CD.
    pub flags: u16,
    /// With EDNS: the largest datagram, and whether DNSSEC records are wanted.
    pub edns: Option<(u16, bool)>,
}

/// An answer as it was given.
#[derive(Debug)]
pub struct Given {
    /// The message.
    pub body: Body,
    /// What its EDNS said that clients must know.
    pub edns: OwnEdns,
}

/// An answer from the cache.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The answer.
    pub given: Arc<Given>,
    /// Seconds since it was given.
    pub age: u32,
    /// It does not hold any more, and its server does not answer.
    pub stale: bool,
}

#[derive(Debug)]
struct Entry {
    given: Arc<Given>,
    since: Instant,
    lifetime: Duration,
    size: usize,
    /// Its server failed lately: until then it is not asked again.
    failed_until: Option<Instant>,
    /// It was used since it was last looked at for removal.
    used: bool,
}

#[derive(Debug, Default)]
struct Group {
    entries: HashMap<Key, Entry>,
    /// In the order of their arrival.
    order: VecDeque<Key>,
    bytes: usize,
}

/// How a question ended that was being asked.
#[derive(Clone, Debug)]
pub enum Ended {
    /// With an answer.
    Given(Arc<Given>),
    /// Without one.
    Failed,
    /// With one that is only for who asked.
    Unshared,
}

#[derive(Debug, Default)]
struct Inner {
    groups: HashMap<Arc<str>, Group>,
    bytes: usize,
    asking: HashMap<(Key, bool), watch::Receiver<Option<Ended>>>,
}

/// See the module's header. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Cache(Arc<Mutex<Inner>>);

/// What to do about a question.
#[derive(Debug)]
pub enum Turn {
    /// Ask, and tell the others.
    Ask(Asking),
    /// Somebody asks already.
    Wait(watch::Receiver<Option<Ended>>),
}

/// The right to ask; dropped without an answer, those who wait are told that there is none.
#[derive(Debug)]
pub struct Asking {
    cache: Cache,
    key: (Key, bool),
    tell: watch::Sender<Option<Ended>>,
}

impl Asking {
    /// Tells everybody who waits.
    pub fn ended(self, ended: Ended) {
        self.tell.send_replace(Some(ended));
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.cache.lock().asking.remove(&self.key);
    }
}

impl Cache {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer, if it holds at `now`, or if it does not and its server failed a moment ago.
    pub fn fresh(&self, key: &Key, now: Instant) -> Option<Kept> {
        let kept = self.stale(key, now)?;
        let failed = || {
            let inner = self.lock();
            let entry = inner.groups.get(&key.group).and_then(|group| group.entries.get(key));
            entry.and_then(|entry| entry.failed_until).is_some_and(|until| now < until)
        };
        (!kept.stale || failed()).then_some(kept)
    }

    /// The answer, although it may not hold any more.
    pub fn stale(&self, key: &Key, now: Instant) -> Option<Kept> {
        let mut inner = self.lock();
        let entry = inner.groups.get_mut(&key.group)?.entries.get_mut(key)?;
        let age = now.saturating_duration_since(entry.since);
        if age >= entry.lifetime + STALE {
            return None;
        }
        entry.used = true;
        let seconds = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        Some(Kept { given: entry.given.clone(), age: seconds, stale: age >= entry.lifetime })
    }

    /// The server did not answer: what it said before serves for a while without asking again.
    pub fn failed(&self, key: &Key, now: Instant) {
        let mut inner = self.lock();
        if let Some(entry) = inner.groups.get_mut(&key.group).and_then(|group| group.entries.get_mut(key)) {
            entry.failed_until = Some(now + RECHECK);
        }
    }

    /// Keeps an answer for `lifetime` seconds.
    pub fn keep(&self, key: Key, given: Arc<Given>, lifetime: u32, now: Instant) {
        let size = OVERHEAD + key.question.len() * 2 + given.body.bytes.len() + given.body.message.records.len() * 64;
        if size > GROUP_BYTES / 4 || lifetime == 0 {
            return;
        }
        let lifetime = Duration::from_secs(lifetime.into());
        let mut inner = self.lock();
        let inner = &mut *inner;
        let group = inner.groups.entry(key.group.clone()).or_default();
        let entry = Entry { given, since: now, lifetime, size, failed_until: None, used: false };
        match group.entries.insert(key.clone(), entry) {
            Some(old) => {
                group.bytes -= old.size;
                inner.bytes -= old.size;
            }
            None => group.order.push_back(key.clone()),
        }
        group.bytes += size;
        inner.bytes += size;
        while group.bytes > GROUP_BYTES {
            inner.bytes -= group.evict();
        }
        while inner.bytes > BYTES {
            let largest = inner.groups.values_mut().max_by_key(|group| group.bytes);
            let freed = largest.map_or(0, Group::evict);
            inner.bytes -= freed;
            if freed == 0 {
                return;
            }
        }
        inner.groups.retain(|_, group| !group.entries.is_empty());
    }

    /// Whether to ask or to wait. Answers by datagram and by stream differ in what fits.
    pub fn turn(&self, key: &Key, stream: bool) -> Turn {
        let key = (key.clone(), stream);
        let mut inner = self.lock();
        if let Some(asking) = inner.asking.get(&key) {
            return Turn::Wait(asking.clone());
        }
        let (tell, told) = watch::channel(None);
        inner.asking.insert(key.clone(), told);
        Turn::Ask(Asking { cache: self.clone(), key, tell })
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }
}

impl Group {
    /// Removes the oldest entry that was not used lately; the bytes that became free.
    fn evict(&mut self) -> usize {
        // Each entry is passed over once at most, because passing over clears its mark.
        while let Some(key) = self.order.pop_front() {
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            if entry.used {
                entry.used = false;
                self.order.push_back(key);
                continue;
            }
            let size = entry.size;
            self.entries.remove(&key);
            self.bytes -= size;
            return size;
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::{BYTES, Cache, Ended, GROUP_BYTES, Given, Key, Turn};
    use crate::dns::wire::{self, Body, OwnEdns};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    fn key(group: &str, number: u32) -> Key {
        Key {
            group: group.into(),
            upstream: "10.0.0.10:53".parse().unwrap(),
            question: number.to_be_bytes().into(),
            flags: 0,
            edns: None,
        }
    }

    fn given(size: usize) -> Arc<Given> {
        let mut bytes = vec![0; 12];
        bytes[5] = 1;
        bytes.extend([0, 0, 1, 0, 1]);
        let message = wire::parse(&bytes).unwrap();
        bytes.resize(size.max(bytes.len()), 0);
        Arc::new(Given { body: Body { bytes, message }, edns: OwnEdns::default() })
    }

    #[test]
    fn an_answer_holds_for_its_time_and_serves_stale_for_a_while_longer() {
        let (cache, start) = (Cache::default(), Instant::now());
        cache.keep(key("a", 1), given(100), 10, start);
        for (after, fresh, stale) in
            [(0, true, true), (9, true, true), (10, false, true), (3609, false, true), (3611, false, false)]
        {
            let now = start + Duration::from_secs(after);
            assert_eq!(cache.fresh(&key("a", 1), now).is_some(), fresh, "after {after} s");
            assert_eq!(cache.stale(&key("a", 1), now).is_some(), stale, "after {after} s");
        }
        cache.keep(key("a", 2), given(100), 0, start);
        assert!(cache.fresh(&key("a", 2), start).is_none(), "a lifetime of nothing is not kept");
        let mut other = key("a", 1);
        other.upstream = "10.0.0.11:53".parse().unwrap();
        assert!(cache.fresh(&other, start).is_none(), "another server's answer is another answer");
        assert!(cache.fresh(&key("b", 1), start).is_none(), "another account's answer is another answer");
    }

    #[test]
    fn bytes_are_bounded_and_no_group_pushes_another_out() {
        let (cache, now) = (Cache::default(), Instant::now());
        cache.keep(key("quiet", 0), given(500), 60, now);
        for number in 0..20_000 {
            cache.keep(key("loud", number), given(500), 60, now);
        }
        assert!(cache.bytes() <= GROUP_BYTES + 1000, "{}", cache.bytes());
        assert!(cache.fresh(&key("quiet", 0), now).is_some());
        for group in 0..20 {
            for number in 0..2000 {
                cache.keep(key(&format!("g{group}"), number), given(500), 60, now);
            }
        }
        assert!(cache.bytes() <= BYTES, "{}", cache.bytes());
        assert!(cache.fresh(&key("quiet", 0), now).is_some());
    }

    #[tokio::test]
    async fn one_asks_and_the_others_are_told() {
        let cache = Cache::default();
        let Turn::Ask(asking) = cache.turn(&key("a", 1), false) else { panic!("the first one asks") };
        let Turn::Wait(mut told) = cache.turn(&key("a", 1), false) else { panic!("the second one waits") };
        assert!(matches!(cache.turn(&key("a", 1), true), Turn::Ask(_)), "a stream is another question");
        asking.ended(Ended::Given(given(50)));
        assert!(matches!(*told.wait_for(Option::is_some).await.unwrap(), Some(Ended::Given(_))));
        let Turn::Ask(lost) = cache.turn(&key("a", 1), false) else { panic!("it is asked anew") };
        let Turn::Wait(mut told) = cache.turn(&key("a", 1), false) else { panic!("the second one waits") };
        drop(lost);
        assert!(told.wait_for(Option::is_some).await.is_err(), "those who wait learn that nobody asks any more");
    }
}
