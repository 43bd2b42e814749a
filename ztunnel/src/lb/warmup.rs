//! Slow start: an endpoint that is new to a Service gets its share little by little. Pure; the times are arguments.
//!
//! New is who was not there when the node looked last: those that are there when it looks first are as old as the Service. An
//! endpoint that was gone, or not ready, for a while is new again. It is passed over by chance, so that its part of the
//! requests grows; where there are only new ones, nobody is.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::state::{Endpoints, Warmup};

/// Who came when.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// What was looked at last. A new list of endpoints is another allocation.
    of: Option<Weak<Endpoints>>,
    known: HashSet<SocketAddr>,
    young: HashMap<SocketAddr, Instant>,
}

impl Arrivals {
    /// Looks at who is there, if that has changed since the last time.
    pub(super) fn look(&mut self, of: &Arc<Endpoints>, all: impl FnOnce() -> Vec<SocketAddr>, now: Instant) {
        let last = self.of.replace(Arc::downgrade(of));
        if last.as_ref().is_some_and(|last| std::ptr::eq(last.as_ptr(), Arc::as_ptr(of))) {
            return;
        }
        let all: HashSet<SocketAddr> = all().into_iter().collect();
        self.young.retain(|endpoint, _| all.contains(endpoint));
        if last.is_some() {
            let new = all.iter().filter(|endpoint| !self.known.contains(endpoint));
            self.young.extend(new.map(|endpoint| (*endpoint, now)));
        }
        self.known = all;
    }

    /// Whether an endpoint is passed over. `random`: uniform bits of this choice.
    pub(super) fn is_held_back(&self, endpoint: SocketAddr, warmup: &Warmup, random: u64, now: Instant) -> bool {
        let Some(since) = self.young.get(&endpoint) else { return false };
        let share = share(warmup, now.saturating_duration_since(*since));
        // Each endpoint has bits of its own in each choice.
        let own = crate::lb::hash(endpoint.to_string().as_bytes()) ^ random;
        let bits = crate::lb::hash(&own.to_le_bytes()) >> 11;
        bits as f64 / (1_u64 << 53) as f64 >= share
    }
}

/// Which part of its share an endpoint of that age gets: as Envoy's, `max(least, (age / duration) ^ (1 / aggression))`.
fn share(warmup: &Warmup, age: Duration) -> f64 {
    let part = age.as_secs_f64() / warmup.duration.as_secs_f64().max(f64::MIN_POSITIVE);
    if part >= 1.0 { 1.0 } else { part.powf(1.0 / warmup.aggression).max(warmup.least) }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::{Arrivals, share};
    use crate::state::{Endpoints, Warmup};

    const MINUTE: Warmup = Warmup { duration: Duration::from_secs(60), least: 0.1, aggression: 1.0 };

    #[test]
    fn the_share_grows_from_the_least_to_the_whole() {
        let of = |aggression, seconds| {
            (share(&Warmup { aggression, ..MINUTE }, Duration::from_secs(seconds)) * 100.0).round() as u32
        };
        assert_eq!([0, 3, 15, 30, 60, 90].map(|age| of(1.0, age)), [10, 10, 25, 50, 100, 100]);
        assert_eq!([15, 30].map(|age| of(2.0, age)), [50, 71], "faster at first");
    }

    #[test]
    fn only_who_comes_later_is_new_and_new_again_after_having_been_away() {
        let [a, b] = [1, 2].map(|number| SocketAddr::from(([10, 0, 0, number], 80)));
        let (began, mut arrivals) = (Instant::now(), Arrivals::default());
        let at = |seconds| began + Duration::from_secs(seconds);
        let held = |arrivals: &Arrivals, endpoint, now| {
            (0..1_000).filter(|random| arrivals.is_held_back(endpoint, &MINUTE, *random, now)).count()
        };
        let (first, second, third) = (Arc::<Endpoints>::default(), Arc::default(), Arc::default());
        arrivals.look(&first, || vec![a], at(0));
        assert_eq!(held(&arrivals, a, at(0)), 0, "it was there before");
        arrivals.look(&first, || vec![a, b], at(5));
        assert_eq!(held(&arrivals, b, at(5)), 0, "the list has not changed");
        arrivals.look(&second, || vec![a, b], at(10));
        assert_eq!(held(&arrivals, a, at(10)), 0);
        assert!((860..940).contains(&held(&arrivals, b, at(10))), "{}", held(&arrivals, b, at(10)));
        assert!((450..550).contains(&held(&arrivals, b, at(40))));
        assert_eq!(held(&arrivals, b, at(70)), 0);
        arrivals.look(&third, || vec![b], at(80));
        arrivals.look(&first, || vec![a, b], at(90));
        assert!(held(&arrivals, a, at(90)) > 0, "it was away");
        assert_eq!(held(&arrivals, b, at(90)), 0, "it was not");
    }
}
