//! Session affinity of one pod: which endpoint it got last for each service port that binds its clients.
//!
//! A pod stays with its endpoint until it has opened no connection for the service's timeout, or until the endpoint is no
//! candidate any more. The first choice is made by a hash of pod, service and port instead of chance, so that a proxy
//! which has just started, and a pod whose entry had to make room, come to the same endpoint as long as the endpoints are
//! the same. The table is bounded for each pod.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most service ports that a pod is bound to at once, some 100 KB. Few pods use more than a dozen such services.
const MOST: usize = 512;

#[derive(Debug)]
struct Entry {
    endpoint: Arc<str>,
    until: Instant,
}

/// See the module's header.
#[derive(Debug, Default)]
pub struct Bound {
    entries: HashMap<(String, u16), Entry>,
}

impl Bound {
    /// The uid of the endpoint that the pod is bound to.
    pub fn get(&self, service: &str, port: u16, now: Instant) -> Option<Arc<str>> {
        // One allocation, and only for services with affinity.
        let entry = self.entries.get(&(service.to_owned(), port))?;
        (now < entry.until).then(|| entry.endpoint.clone())
    }

    /// The pod has just got `endpoint`.
    pub fn bind(&mut self, service: &str, port: u16, endpoint: Arc<str>, timeout: Duration, now: Instant) {
        let key = (service.to_owned(), port);
        if self.entries.len() >= MOST && !self.entries.contains_key(&key) {
            self.entries.retain(|_, entry| now < entry.until);
            if self.entries.len() >= MOST
                && let Some(first) =
                    self.entries.iter().min_by_key(|(_, entry)| entry.until).map(|(key, _)| key.clone())
            {
                self.entries.remove(&first);
            }
        }
        self.entries.insert(key, Entry { endpoint, until: now + timeout });
    }

    /// 64 bits in the place of chance for a first choice: always the same for one pod, service and port.
    pub fn first(pod: &str, service: &str, port: u16) -> u64 {
        let mut hasher = DefaultHasher::new();
        (pod, service, port).hash(&mut hasher);
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Bound, MOST};

    #[test]
    fn a_pod_is_bound_until_it_was_quiet_for_the_timeout() {
        let (mut bound, now) = (Bound::default(), Instant::now());
        let timeout = Duration::from_secs(10);
        bound.bind("shop/cart", 80, "a".into(), timeout, now);
        let at = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(bound.get("shop/cart", 80, at(9)).as_deref(), Some("a"));
        assert_eq!(bound.get("shop/cart", 81, at(9)), None, "each port for itself");
        assert_eq!(bound.get("shop/other", 80, at(9)), None);
        bound.bind("shop/cart", 80, "a".into(), timeout, at(9));
        assert_eq!(bound.get("shop/cart", 80, at(18)).as_deref(), Some("a"), "each connection begins the time anew");
        assert_eq!(bound.get("shop/cart", 80, at(19)), None);
    }

    #[test]
    fn the_table_is_bounded_and_the_first_choice_needs_none() {
        let (mut bound, now) = (Bound::default(), Instant::now());
        for number in 0..MOST * 2 {
            let timeout = Duration::from_secs(10 + number as u64);
            bound.bind(&format!("shop/{number}"), 80, "a".into(), timeout, now);
        }
        assert_eq!(bound.entries.len(), MOST);
        assert_eq!(Bound::first("pod", "shop/cart", 80), Bound::first("pod", "shop/cart", 80));
        assert_ne!(Bound::first("pod", "shop/cart", 80), Bound::first("pod2", "shop/cart", 80));
    }
}
