//! What is installed in a pod's namespace, the redirect and the filter of datagrams, brought up to date.
//!
//! Each is installed only if it differs from what is there, and is unknown while it changes, so that a failure half way
//! leads to another try and a successor never believes it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::app::pods::serving::{Inherited, Serving};
use crate::app::pods::task::PodTask;
use crate::app::resolver::Names;
use crate::app::wanted::Wanted;
use crate::base::netns::Netns;
use crate::capture::rules::{Rules, fingerprint};
use crate::capture::{self, preexisting};
use crate::policy::datagrams::Filter;

fn filter_fingerprint(filter: Option<&Filter>) -> u64 {
    fingerprint(&filter.map_or_else(String::new, capture::datagrams::render))
}

impl PodTask {
    /// What the process before this one installed is not installed again.
    pub(super) async fn inherit(
        &self,
        inherited: Option<&Inherited>,
        rules: &Rules,
        wanted: Option<&Option<Arc<Filter>>>,
    ) {
        let Some(inherited) = inherited else { return };
        if inherited.rules == Some(fingerprint(&rules.render())) {
            *self.rules.lock().await = Some(rules.clone());
        }
        if let Some(wanted) = wanted.filter(|wanted| inherited.datagrams == Some(filter_fingerprint(wanted.as_deref())))
        {
            *self.datagrams.lock().await = Some(wanted.clone());
        }
        self.post(|entry| (entry.rules, entry.datagrams) = (inherited.rules, inherited.datagrams));
    }

    pub(super) fn rules(&self, wanted: &Wanted, old: &BTreeSet<preexisting::Pair>) -> Rules {
        Rules {
            v6: self.pod.ips.iter().any(IpAddr::is_ipv6),
            probe_ports: self.pod.probe_ports.clone(),
            reset: if wanted.reset { old.iter().copied().collect() } else { Vec::new() },
            dns: self.environment.names.as_ref().map(Names::port),
            tcp_only: wanted.tcp_only.unwrap_or(false),
            released: false,
            by_agent: self.is_by_agent(),
            kernel: self.environment.kernel,
        }
    }

    /// Brings the redirect up to date, and the filter of UDP and SCTP with it where `wanted` says what that is.
    pub(super) async fn install(
        &self,
        netns: &Netns,
        rules: Rules,
        wanted: Option<Option<Arc<Filter>>>,
    ) -> Result<(), String> {
        let mut installed = self.rules.lock().await;
        if installed.as_ref() == Some(&rules) {
            drop(installed);
            return self.filter(netns, wanted).await;
        }
        let mut filter = self.datagrams.lock().await;
        let wanted = wanted.filter(|wanted| filter.as_ref() != Some(wanted));
        *installed = None;
        self.post(|entry| entry.rules = None);
        if wanted.is_some() {
            *filter = None;
            self.post(|entry| entry.datagrams = None);
        }
        let text = wanted.as_ref().map(|wanted| capture::datagrams::text(wanted.as_deref()));
        if let Err(error) = capture::apply(netns, rules.clone(), text).await {
            if !rules.is_nothing() || wanted.is_some() {
                return Err(error.to_string());
            }
            tracing::debug!(pod = %self.name(), %error, "what an earlier proxy may have installed was not looked for");
        }
        self.post(|entry| entry.rules = Some(fingerprint(&rules.render())));
        *installed = Some(rules);
        if let Some(wanted) = wanted {
            self.post(|entry| entry.datagrams = Some(filter_fingerprint(wanted.as_deref())));
            *filter = Some(wanted);
        }
        Ok(())
    }

    /// Brings the filter of UDP and SCTP up to date. What an earlier proxy left stays until control has said.
    pub(super) async fn filter(&self, netns: &Netns, wanted: Option<Option<Arc<Filter>>>) -> Result<(), String> {
        let Some(wanted) = wanted else { return Ok(()) };
        let mut installed = self.datagrams.lock().await;
        if installed.as_ref() != Some(&wanted) {
            *installed = None;
            self.post(|entry| entry.datagrams = None);
            capture::datagrams::apply(netns, wanted.as_deref()).await.map_err(|error| error.to_string())?;
            self.post(|entry| entry.datagrams = Some(filter_fingerprint(wanted.as_deref())));
            *installed = Some(wanted);
        }
        Ok(())
    }

    /// Holds the pod in the node's network too if its egress is `closed`. One that cannot be held is reported, and served all the same:
    /// the proxy refuses what it may not do either way.
    pub(super) async fn fence(&self, netns: &Netns, closed: Option<bool>) {
        let fence = &self.environment.fence;
        let held = match closed {
            None => return,
            Some(false) => {
                fence.release(&self.pod.uid, &self.pod.ips, netns).await;
                None
            }
            Some(true) => Some(fence.hold(&self.pod.uid, &self.pod.ips, netns).await),
        };
        self.post(|entry| {
            if let Some(Err(reason)) = &held
                && entry.fence != held
            {
                tracing::error!(pod = %self.name(), %reason, "Unfenced: a privileged container of the pod can leave past the proxy");
            }
            entry.fence = held;
        });
    }

    /// Brings the rules of a served pod up to date.
    pub(super) async fn adjust(&self, serving: &mut Serving, wanted: &Wanted) -> Result<(), String> {
        let mut old = BTreeSet::new();
        self.post(|entry| old.clone_from(&entry.old));
        let mut rules = self.rules(wanted, &old);
        if wanted.tcp_only.is_none() {
            rules.tcp_only = self.rules.lock().await.as_ref().is_some_and(|installed| installed.tcp_only);
        }
        self.install(&serving.netns, rules, wanted.datagrams.clone()).await?;
        self.fence(&serving.netns, wanted.tcp_only).await;
        // One in a closed namespace does not begin before it is fenced; while nothing is known of the mesh, it waits.
        let told = wanted.tcp_only.is_some() || !self.pod.closed;
        self.post(|entry| entry.served |= told);
        match if serving.proven { Ok(()) } else { self.prove(serving).await } {
            Ok(()) => self.state("Captured", String::new()),
            Err(reason) => self.state("Pending", format!("it is served, but by the CNI agent's rules {reason}")),
        }
        Ok(())
    }
}
