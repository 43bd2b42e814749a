//! Virtual addresses that a pod was given for names outside the cluster: what binds a connection to the name it is meant for.
//!
//! A pod whose egress is closed gets no real address of an allowed name but one of 240.240.0.0/16 or 2001:2::/48, each for one name
//! and for this pod alone. So two names on one server are told apart, whatever is spoken, and it does not matter how an answer
//! rotates or how long a client keeps it. The number is made of the name, and the next free one if two names meet; after a restart
//! of the proxy, [`first`] finds a name again by its number where the pod's rules spell it out. Bounded: [`MOST`] names a pod, of which
//! those that were not used for [`IDLE`] make room.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Names of one pod: some 100 bytes each. Wildcards let a pod ask for any number.
const MOST: usize = 4096;
/// Clients that keep an address for longer than this without using it have to look up again.
const IDLE: Duration = Duration::from_secs(3600);
/// Numbers tried for a name whose own is taken.
const PROBES: u16 = 64;

/// See the module's header.
#[derive(Debug, Default)]
pub struct Names {
    given: HashMap<u16, (Arc<str>, Instant)>,
}

impl Names {
    /// The number of `name`, its first one or the one that it has. `None`: there is no room.
    pub fn give(&mut self, name: &str, now: Instant) -> Option<u16> {
        let begin = first(name);
        let mut free = None;
        for number in (0..PROBES).map(|step| wrapped(begin, step)) {
            match self.given.get_mut(&number) {
                Some((own, used)) if **own == *name => {
                    *used = now;
                    return Some(number);
                }
                Some(_) => {}
                None => free = free.or(Some(number)),
            }
        }
        if self.given.len() >= MOST {
            self.given.retain(|_, (_, used)| now.saturating_duration_since(*used) < IDLE);
        }
        let number = free.filter(|_| self.given.len() < MOST)?;
        self.given.insert(number, (name.into(), now));
        Some(number)
    }

    /// The name of a number, which is used now.
    pub fn name(&mut self, number: u16, now: Instant) -> Option<Arc<str>> {
        let (name, used) = self.given.get_mut(&number)?;
        *used = now;
        Some(name.clone())
    }
}

/// The number that a name is given if no other has it: FNV-1a of its bytes, folded, which every process computes alike.
pub fn first(name: &str) -> u16 {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let folded = u16::try_from((hash >> 16) ^ (hash & 0xffff)).unwrap_or_default();
    wrapped(folded, 0)
}

/// `steps` further, without the first and the last address of the block, which some systems do not dial.
fn wrapped(begin: u16, steps: u16) -> u16 {
    begin.wrapping_add(steps).clamp(1, u16::MAX - 1)
}

/// The address of a number.
pub fn address(number: u16, v6: bool) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    if v6 {
        IpAddr::V6(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, number))
    } else {
        IpAddr::V4(Ipv4Addr::new(240, 240, high, low))
    }
}

/// The number of a virtual address; `None`: it is another one.
pub fn number(address: IpAddr) -> Option<u16> {
    match address.to_canonical() {
        IpAddr::V4(v4) => match v4.octets() {
            [240, 240, high, low] => Some(u16::from_be_bytes([high, low])),
            _ => None,
        },
        IpAddr::V6(v6) => match v6.segments() {
            [0x2001, 2, 0, 0, 0, 0, 0, number] => Some(number),
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{IDLE, MOST, Names, address, first, number};

    #[test]
    fn each_name_has_an_address_of_its_own_that_stays() {
        let (mut names, now) = (Names::default(), Instant::now());
        let mut all = std::collections::HashSet::new();
        for index in 0..1000 {
            let name = format!("host-{index}.example");
            let given = names.give(&name, now).expect("room");
            assert!(all.insert(given), "{name} shares its number");
            assert_eq!(names.give(&name, now), Some(given));
            assert_eq!(names.name(given, now).as_deref(), Some(name.as_str()));
            for v6 in [false, true] {
                assert_eq!(number(address(given, v6)), Some(given));
            }
        }
        assert_eq!(Names::default().give("api.example", now), Some(first("api.example")), "another process, the same");
        assert_eq!(number("203.0.113.1".parse().expect("an address")), None);
    }

    #[test]
    fn names_stay_within_their_room_and_idle_ones_make_some() {
        let (mut names, now) = (Names::default(), Instant::now());
        let given = (0..MOST * 2).filter(|index| names.give(&format!("h{index}"), now).is_some()).count();
        assert_eq!(given, MOST);
        assert!(names.give("late", now + Duration::from_secs(1)).is_none());
        assert!(names.give("late", now + IDLE).is_some());
    }
}
