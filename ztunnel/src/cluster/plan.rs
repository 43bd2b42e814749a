//! What follows for one pod from what is wanted and what is so. Pure: time is an argument.
//!
//! Into the mesh: captured first, published then, so that nobody sends a tunnel to a pod that does not take any. Out of
//! it: published first, and released only once control has taken it back, so that nobody still sends one. While the pod is
//! captured and a restart of the proxy changes nothing, nothing is written.

use std::time::{Duration, Instant};

/// How long a release waits for control. 15008 stays open for half a minute after it, which covers who learns later still.
const TAKEN_BACK: Duration = Duration::from_secs(5);
/// Value of the annotation: captured.
pub const ENABLED: &str = "enabled";
/// Value of the annotation: in the mesh by its labels, and not captured yet.
pub const PENDING: &str = "pending";

/// How far capture has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capture {
    /// Nothing is known, or it is on its way.
    Pending,
    /// It is proven.
    Captured,
    /// It failed, and is tried again.
    Failed,
}

/// What is known of a pod.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Labels want it in the mesh.
    pub enrols: bool,
    /// The annotation's value.
    pub redirection: Option<&'a str>,
    /// How far its capture has come.
    pub capture: Capture,
    /// Control still tells others to send tunnels to it.
    pub in_use: bool,
}

/// What is kept of a pod between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// The proxy was told to capture it.
    pub told: bool,
    /// It is leaving the mesh, and nothing says otherwise since then.
    leaving: Option<Instant>,
}

/// What is to be written into the annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Nothing.
    Nothing,
    /// A value; `None`: it is taken away.
    Value(Option<&'static str>),
}

/// The next step: what the proxy is told (in [`Way::told`]), and what is written.
pub fn step(facts: Facts<'_>, way: Way, now: Instant) -> (Way, Write) {
    if facts.enrols {
        let value = match facts.capture {
            Capture::Captured => ENABLED,
            // The rules of the process before this one are still there.
            Capture::Pending if facts.redirection == Some(ENABLED) => ENABLED,
            Capture::Pending | Capture::Failed => PENDING,
        };
        let write = if facts.redirection == Some(value) { Write::Nothing } else { Write::Value(Some(value)) };
        return (Way { told: true, leaving: None }, write);
    }
    if facts.redirection.is_some() {
        return (Way { told: way.told, leaving: None }, Write::Value(None));
    }
    if !way.told {
        return (Way::default(), Write::Nothing);
    }
    let since = way.leaving.unwrap_or(now);
    let stays = facts.in_use && now.saturating_duration_since(since) < TAKEN_BACK;
    (Way { told: stays, leaving: stays.then_some(since) }, Write::Nothing)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Capture, ENABLED, Facts, PENDING, TAKEN_BACK, Way, Write, step};

    #[test]
    fn what_is_written_is_what_is_so() {
        use Capture::{Captured, Failed, Pending};
        let now = Instant::now();
        for (enrols, redirection, capture, write) in [
            (true, None, Pending, Write::Value(Some(PENDING))),
            (true, None, Captured, Write::Value(Some(ENABLED))),
            (true, Some(PENDING), Pending, Write::Nothing),
            (true, Some(PENDING), Captured, Write::Value(Some(ENABLED))),
            (true, Some(ENABLED), Captured, Write::Nothing),
            // After a restart: captured all the time.
            (true, Some(ENABLED), Pending, Write::Nothing),
            (true, Some(ENABLED), Failed, Write::Value(Some(PENDING))),
            (true, Some(PENDING), Failed, Write::Nothing),
            (true, Some("disabled"), Captured, Write::Value(Some(ENABLED))),
            (false, Some(ENABLED), Captured, Write::Value(None)),
            (false, Some(PENDING), Failed, Write::Value(None)),
            (false, None, Pending, Write::Nothing),
        ] {
            let facts = Facts { enrols, redirection, capture, in_use: false };
            assert_eq!(step(facts, Way::default(), now).1, write, "{facts:?}");
        }
    }

    #[test]
    fn a_pod_is_released_only_after_it_was_unpublished_and_control_knows() {
        let now = Instant::now();
        let at = |seconds: u64| now + Duration::from_secs(seconds);
        let facts = Facts { enrols: false, redirection: Some(ENABLED), capture: Capture::Captured, in_use: true };
        let told = Way { told: true, leaving: None };
        let (way, write) = step(facts, told, at(0));
        assert_eq!((way.told, write), (true, Write::Value(None)));
        // As long as that could not be written, nothing changes.
        let (way, _) = step(facts, way, at(1000));
        assert!(way.told);
        let unpublished = Facts { redirection: None, ..facts };
        let (way, write) = step(unpublished, way, at(1000));
        assert_eq!((way.told, write), (true, Write::Nothing), "control still sends peers here");
        let (waits, _) = step(unpublished, way, at(1004));
        assert!(waits.told);
        let (gone, _) = step(Facts { in_use: false, ..unpublished }, waits, at(1004));
        assert_eq!(gone, Way::default());
        let (gone, _) = step(unpublished, waits, at(1000) + TAKEN_BACK);
        assert_eq!(gone, Way::default(), "control is away, and cannot hold a pod for ever");
        // Labelled again half way.
        let (back, write) = step(Facts { enrols: true, ..unpublished }, waits, at(1004));
        assert_eq!((back, write), (told, Write::Value(Some(ENABLED))));
        // A pod that this process never captured has nothing to be released from.
        assert!(!step(facts, Way::default(), at(0)).0.told);
    }
}
