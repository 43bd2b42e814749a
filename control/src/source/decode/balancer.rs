//! `loadBalancer` of a DestinationRule: which endpoint is next, what is hashed, and how new endpoints begin.
//!
//! What has no effect is noted by name (`traffic`). A table size that no table can have is one of those: the default is used.

use crate::model::{Balancer, HashCookie, HashKey, Layout, Warmup};
use crate::source::decode::route::is_header_name;
use crate::source::decode::traffic::{count, duration, unknown};
use crate::source::tree::{Cursor, Read};

/// Fields of `consistentHash` that nodes carry out.
const HASH: [&str; 7] =
    ["httpHeaderName", "httpQueryParameterName", "httpCookie", "useSourceIp", "minimumRingSize", "ringHash", "maglev"];

/// The largest table. Envoy takes up to 5,000,011 rows, which would hold a worker of the node up for most of a second each
/// time that an endpoint comes or goes.
const MOST_ROWS: u32 = 655_373;

/// The largest ring that may be asked for: 4 MB on a node.
const MOST_POINTS: u32 = 262_144;

pub(super) fn balancer(at: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<Balancer> {
    unknown(at, &["simple", "consistentHash", "warmup", "warmupDurationSecs", "localityLbSetting"], ignored)?;
    let (simple, hash) = (at.get("simple"), at.get("consistentHash"));
    if !hash.is_absent() {
        unknown(&hash, &HASH, ignored)?;
        return Ok(Balancer::Hash(hash_key(&hash, ignored)?, layout(&hash, ignored)?));
    }
    Ok(match simple.text()? {
        None | Some("UNSPECIFIED") => Balancer::Default,
        Some("ROUND_ROBIN") => Balancer::RoundRobin,
        Some("RANDOM") => Balancer::Random,
        Some("LEAST_REQUEST" | "LEAST_CONN") => Balancer::LeastRequest,
        Some("PASSTHROUGH") => {
            ignore(&simple, "PASSTHROUGH would leave the mesh's tunnels", ignored);
            Balancer::Passthrough
        }
        Some(other) => return Err(simple.error(format!("`{other}` is no way of balancing"))),
    })
}

/// Notes that a field has no effect, and why.
pub(super) fn ignore(at: &Cursor<'_>, why: &str, ignored: &mut Vec<String>) {
    ignored.push(format!("{} ({why})", at.error("").field));
}

fn hash_key(at: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<HashKey> {
    let header = at.get("httpHeaderName");
    if let Some(name) = header.text()? {
        return match is_header_name(name) {
            true => Ok(HashKey::Header(name.to_ascii_lowercase())),
            false => Err(header.error(format!("`{name}` is no name of a header"))),
        };
    }
    if let Some(name) = at.get("httpQueryParameterName").text()? {
        return Ok(HashKey::Query(name.to_owned()));
    }
    let cookie = at.get("httpCookie");
    if !cookie.is_absent() {
        unknown(&cookie, &["name", "path", "ttl", "attributes"], ignored)?;
        let ttl = cookie.get("ttl");
        cookie.get("name").required_text()?;
        return Ok(HashKey::Cookie(HashCookie {
            name: cookie_text(&cookie.get("name"))?,
            path: cookie_text(&cookie.get("path"))?,
            seconds: if ttl.is_absent() { None } else { Some(duration(&ttl)? / 1_000) },
            attributes: cookie.get("attributes").list()?.iter().map(attribute).collect::<Read<_>>()?,
        }));
    }
    match at.get("useSourceIp").boolean()? {
        Some(true) => Ok(HashKey::SourceIp),
        _ => Err(at.error("says nothing of what is hashed")),
    }
}

fn attribute(at: &Cursor<'_>) -> Read<String> {
    let (name, value) = (cookie_text(&at.get("name"))?, cookie_text(&at.get("value"))?);
    Ok(if value.is_empty() { name } else { format!("{name}={value}") })
}

/// A part of a Set-Cookie line, which must not end where another begins. Empty if absent.
fn cookie_text(at: &Cursor<'_>) -> Read<String> {
    let text = at.text_or_empty()?;
    let plain = |c: char| c.is_ascii_graphic() && !";,\"\\".contains(c);
    if !text.chars().all(plain) {
        return Err(at.error(format!("`{text}` cannot be a part of a cookie")));
    }
    Ok(text)
}

fn layout(at: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<Layout> {
    let (ring, maglev, old) = (at.get("ringHash"), at.get("maglev"), at.get("minimumRingSize"));
    if !maglev.is_absent() {
        unknown(&maglev, &["tableSize"], ignored)?;
        let size = maglev.get("tableSize");
        let rows = count(&size)?;
        if rows == 0 || (rows <= MOST_ROWS && is_prime(rows)) {
            return Ok(Layout::Maglev(rows));
        }
        ignore(&size, "it is no prime up to 655373, so 65537 is used", ignored);
        return Ok(Layout::Maglev(0));
    }
    unknown(&ring, &["minimumRingSize"], ignored)?;
    let size = if ring.get("minimumRingSize").is_absent() { old } else { ring.get("minimumRingSize") };
    let points = count(&size)?;
    if points > MOST_POINTS {
        ignore(&size, "no ring has more than 262144 points", ignored);
    }
    Ok(Layout::Ring(points.min(MOST_POINTS)))
}

fn is_prime(number: u32) -> bool {
    number > 1 && (2..).take_while(|factor| factor * factor <= number).all(|factor| !number.is_multiple_of(factor))
}

/// `warmup`, or `warmupDurationSecs` as it was before.
pub(super) fn warmup(at: &Cursor<'_>, ignored: &mut Vec<String>) -> Read<Option<Warmup>> {
    let (warmup, old) = (at.get("warmup"), at.get("warmupDurationSecs"));
    unknown(&warmup, &["duration", "minimumPercent", "aggression"], ignored)?;
    let duration_ms =
        duration(&if warmup.is_absent() { at.get("warmupDurationSecs") } else { warmup.get("duration") })?;
    if duration_ms == 0 {
        return Ok(None);
    }
    let hash = at.get("consistentHash");
    if !hash.is_absent() || at.get("simple").text()? == Some("RANDOM") {
        let at = if warmup.is_absent() { &old } else { &warmup };
        ignore(at, "a hash or chance alone chooses, whatever an endpoint's age", ignored);
        return Ok(None);
    }
    let (percent, aggression) = (warmup.get("minimumPercent"), warmup.get("aggression"));
    let least = percent.number()?.unwrap_or(10.0);
    let steep = aggression.number()?.unwrap_or(1.0);
    if !(0.0..=100.0).contains(&least) {
        return Err(percent.error(format!("{least} is not from 0 to 100")));
    }
    if !(0.001..=1_000.0).contains(&steep) {
        return Err(aggression.error(format!("{steep} is not from 0.001 to 1000")));
    }
    // Who gets nothing at all would not be known to work.
    let least_percent = (least.round() as u32).max(1);
    Ok(Some(Warmup { duration_ms, least_percent, aggression: (steep * 1_000.0).round() as u32 }))
}

#[cfg(test)]
mod tests {
    use super::is_prime;

    #[test]
    fn table_sizes_are_primes() {
        let primes: Vec<u32> = (0..30).filter(|number| is_prime(*number)).collect();
        assert_eq!(primes, [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]);
        assert!(is_prime(65_537) && is_prime(655_373) && !is_prime(65_536));
    }
}
