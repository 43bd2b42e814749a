//! `sessionPersistence` of a rule of a route (Gateway API, experimental channel).
//! What cannot be honoured is noted at its field, since a session that is silently another one sends users to strangers.

use crate::model::RouteSession;
use crate::source::decode::route::{Problem, duration, is_header_name, note};
use crate::source::tree::{Cursor, Read};

/// Reads it. Without a `sessionName` its name is empty.
pub(super) fn session(at: &Cursor<'_>, problem: &mut Problem) -> Read<Option<RouteSession>> {
    if at.is_absent() {
        return Ok(None);
    }
    at.only(&["sessionName", "absoluteTimeout", "idleTimeout", "type", "cookieConfig"])?;
    let (name_at, kind, cookie) = (at.get("sessionName"), at.get("type"), at.get("cookieConfig"));
    cookie.only(&["lifetimeType"])?;
    let name = name_at.text_or_empty()?;
    // Names of cookies are tokens as names of headers are (RFC 6265, section 4.1.1).
    if !name.is_empty() && (!is_header_name(&name) || name.len() > 128) {
        note(problem, &name_at, "is no name of a cookie or header of up to 128 characters");
    }
    let header = match kind.text()? {
        None | Some("Cookie") => false,
        Some("Header") => true,
        Some(other) => {
            note(problem, &kind, &format!("`{other}` is neither Cookie nor Header"));
            false
        }
    };
    let lifetime = cookie.get("lifetimeType");
    let permanent = match lifetime.text()? {
        None | Some("Session") => false,
        Some("Permanent") => true,
        Some(other) => {
            note(problem, &lifetime, &format!("`{other}` is neither Permanent nor Session"));
            false
        }
    };
    let absolute_ms = duration(&at.get("absoluteTimeout"), problem)?;
    let idle_ms = duration(&at.get("idleTimeout"), problem)?;
    if permanent && absolute_ms == 0 {
        note(problem, &lifetime, "Permanent needs an absoluteTimeout");
    }
    if header && !cookie.is_absent() {
        note(problem, &cookie, "is of sessions of type Cookie alone");
    }
    Ok(Some(RouteSession { name, header, permanent, absolute_ms, idle_ms }))
}
