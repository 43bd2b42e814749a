//! Turns by source address, so that one caller who asks for everything leaves something for the others.
//!
//! An address is remembered only while something of it is under way, so the memory is bounded by what is under way at all,
//! which whoever hands out turns has to bound.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Semaphore;

/// Addresses with something under way or waiting.
pub struct Sources {
    each: usize,
    // With how many hold it. Locked for single map operations only.
    all: Mutex<HashMap<IpAddr, (usize, Arc<Semaphore>)>>,
}

impl Sources {
    /// Each address has `each` turns.
    pub fn new(each: usize) -> Arc<Self> {
        Arc::new(Self { each, all: Mutex::default() })
    }

    /// An address. Callers without a known one count as one.
    pub fn of(self: &Arc<Self>, from: Option<IpAddr>) -> Source {
        let from = from.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)).to_canonical();
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let (held, turns) = all.entry(from).or_insert_with(|| (0, Arc::new(Semaphore::new(self.each))));
        *held += 1;
        Source { turns: Arc::clone(turns), from, sources: Arc::clone(self) }
    }
}

/// An address with something under way or waiting; forgotten with its last one.
pub struct Source {
    /// What it has left.
    pub turns: Arc<Semaphore>,
    from: IpAddr,
    sources: Arc<Sources>,
}

impl Drop for Source {
    fn drop(&mut self) {
        let mut all = self.sources.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((held, _)) = all.get_mut(&self.from) {
            *held -= 1;
            if *held == 0 {
                all.remove(&self.from);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Sources;
    use std::net::IpAddr;

    #[test]
    fn each_address_has_its_own_turns_and_is_forgotten_with_the_last() {
        let sources = Sources::new(2);
        let ip = |text: &str| -> Option<IpAddr> { text.parse().ok() };
        let of = |text: &str| sources.of(ip(text));
        let (one, two, three) = (of("192.0.2.1"), of("::ffff:192.0.2.1"), of("192.0.2.1"));
        let (first, second) = (one.turns.try_acquire(), two.turns.try_acquire());
        assert!(first.is_ok() && second.is_ok() && three.turns.try_acquire().is_err(), "one address, two turns");
        assert!(of("192.0.2.2").turns.try_acquire().is_ok());
        let unknown = (sources.of(None), sources.of(None));
        assert!(unknown.0.turns.try_acquire_many(2).is_ok_and(|_held| unknown.1.turns.try_acquire().is_err()));
        drop(first);
        assert!(three.turns.try_acquire().is_ok());
        drop(unknown);
        drop(second);
        drop((one, two));
        assert_eq!(sources.all.lock().unwrap().len(), 1);
        drop(three);
        assert!(sources.all.lock().unwrap().is_empty());
    }
}
