//! Istio's variables that are no settings of ours: what two of them mean here, which keep the proxy from starting because
//! it would not do what they promise, and which are told to have no effect. Pure.

use std::time::Duration;

use crate::config::{Node, duration};

/// A variable of Istio's ztunnel that is not followed.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Values that say what this proxy does anyway. The empty one always does.
    pub usual: &'static [&'static str],
    /// The proxy does not start with another value: whoever set it relies on it.
    pub refused: bool,
    /// What holds instead.
    pub instead: &'static str,
}

const fn told(name: &'static str, usual: &'static [&'static str], instead: &'static str) -> Variable {
    Variable { name, usual, refused: false, instead }
}

const fn refused(name: &'static str, usual: &'static [&'static str], instead: &'static str) -> Variable {
    Variable { name, usual, refused: true, instead }
}

/// All of them.
pub const NOT_FOLLOWED: &[Variable] = &[
    refused("PROXY_MODE", &["shared"], "one proxy serves all pods of its node"),
    refused("PROXY_WORKLOAD_INFO", &[], "the pods come from INPOD_UDS or TULLE_PODS"),
    refused("ENABLE_PROXY", &["true"], "a proxy that does not proxy is not started at all"),
    refused("FAKE_CA", &["false"], "certificates come from CA_ADDRESS; the lab has an authority for trying"),
    refused("LOCAL_XDS", &[], "a file: LOCAL_XDS_PATH"),
    refused(
        "COMPLIANCE_POLICY",
        &[],
        "TLS 1.3 with X25519MLKEM768 first and X25519 as well; other sets are not built in",
    ),
    refused("UNSTABLE_ENABLE_SOCKS5", &["false"], "there is no SOCKS5 listener; pods are redirected"),
    refused("ENABLE_ORIG_SRC", &["true"], "the application always sees the client's address"),
    told("TLS12_ENABLED", &["false"], "TLS 1.3 only"),
    told("PROXY_CONFIG", &[], "each setting has a variable of its own"),
    told("IPV6_ENABLED", &["true"], "both families, as each pod has them"),
    told("ENABLE_RESPONSE_BAGGAGE", &["true"], "the answer to CONNECT always describes the destination"),
    told(
        "LOCALHOST_APP_TUNNEL",
        &["true"],
        "an application that takes PROXY headers is reached at its pod's loopback, where nobody else can write one",
    ),
    told("PREFERED_SERVICE_NAMESPACE", &[], "the client's own namespace, then canonical services"),
    told("AUTHZ_POLICY_INFO_LOGGING", &["false"], "refusals are always in the access log with policy and rule"),
    told("ZTUNNEL_CPU_LIMIT", &[], "ZTUNNEL_WORKER_THREADS"),
    told("ZTUNNEL_RESOURCE_CPU_LIMIT", &[], "ZTUNNEL_WORKER_THREADS"),
    told("ZTUNNEL_RESOURCE_CPU_REQUEST", &[], "ZTUNNEL_WORKER_THREADS"),
];

/// Kept of the pod's grace period for the last records.
const LEFT_OVER: Duration = Duration::from_secs(5);

impl Node {
    /// [`Self::with_istio`] with the variables of this process.
    ///
    /// # Errors
    /// Which variable asks for something that would not be done.
    pub fn with_environment(self) -> Result<(Self, Vec<String>), String> {
        self.with_istio(|name| std::env::var(name).ok())
    }

    /// The settings with what Istio's variables add to them, and a sentence for each that has no effect. `get` gives a
    /// variable.
    ///
    /// # Errors
    /// Which variable asks for something that would not be done.
    pub fn with_istio(mut self, get: impl Fn(&str) -> Option<String>) -> Result<(Self, Vec<String>), String> {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let mut told = Vec::new();
        for Variable { name, usual, refused, instead } in NOT_FOLLOWED {
            match get(name).filter(|value| !usual.contains(&value.as_str())) {
                Some(value) if *refused => {
                    return Err(format!("{name} is {value:?}, which this proxy does not do ({instead}); unset it"));
                }
                Some(value) => told.push(format!("{name}={value} has no effect here: {instead}")),
                None => {}
            }
        }
        if let (None, Some(cluster)) = (get("CLUSTER_ID"), get("ISTIO_META_CLUSTER_ID")) {
            self.cluster_id = cluster;
        }
        if let (None, Some(grace)) = (get("CONNECTION_TERMINATION_DEADLINE"), get("TERMINATION_GRACE_PERIOD_SECONDS")) {
            let grace = duration(&grace).map_err(|error| format!("TERMINATION_GRACE_PERIOD_SECONDS: {error}"))?;
            let kept = if grace > LEFT_OVER * 2 { LEFT_OVER } else { Duration::from_secs(1) };
            self.termination_deadline = grace.saturating_sub(kept);
        }
        Ok((self, told))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;

    use crate::config::Node;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        node: Node,
    }

    fn with(variables: &[(&str, &str)]) -> Result<(Node, Vec<String>), String> {
        let get = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Program::parse_from(["ztunnel"]).node.with_istio(get)
    }

    #[test]
    fn what_istio_s_chart_sets_starts_and_says_nothing() {
        let chart = [
            ("PROXY_MODE", "shared"),
            ("ENABLE_PROXY", "true"),
            ("IPV6_ENABLED", "true"),
            ("FAKE_CA", ""),
            ("ISTIO_META_CLUSTER_ID", "c1"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ];
        let (node, told) = with(&chart).unwrap();
        assert_eq!(told, Vec::<String>::new());
        assert_eq!((node.cluster_id.as_str(), node.termination_deadline), ("c1", Duration::from_secs(25)));
        let (node, _) = with(&[("CLUSTER_ID", "c2"), ("ISTIO_META_CLUSTER_ID", "c1")]).unwrap();
        assert_ne!(node.cluster_id, "c1", "CLUSTER_ID is said");
        let (node, _) = with(&[("TERMINATION_GRACE_PERIOD_SECONDS", "8")]).unwrap();
        assert_eq!(node.termination_deadline, Duration::from_secs(7));
    }

    #[test]
    fn a_promise_that_would_not_be_kept_keeps_it_from_starting_and_a_preference_is_told() {
        for (name, value) in [
            ("PROXY_MODE", "dedicated"),
            ("PROXY_WORKLOAD_INFO", "ns/a/b"),
            ("FAKE_CA", "true"),
            ("COMPLIANCE_POLICY", "pqc"),
            ("ENABLE_ORIG_SRC", "false"),
            ("LOCAL_XDS", "workloads: []"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "soon"),
        ] {
            assert!(with(&[(name, value)]).is_err_and(|error| error.contains(name)), "{name}");
        }
        for (name, value) in [("TLS12_ENABLED", "true"), ("PROXY_CONFIG", "concurrency: 3"), ("IPV6_ENABLED", "false")]
        {
            let (_, told) = with(&[(name, value)]).unwrap();
            assert!(told.len() == 1 && told[0].contains(name), "{told:?}");
        }
    }
}
