//! What the address of a waypoint or gateway stands for: a Service with endpoints, or one workload.
//!
//! Limit: one that is named by the host name of a single workload, and not of a Service, is not found.

use std::sync::Arc;

use crate::state::{GatewayAddress, GatewayTarget, Service, Snapshot, Workload};

/// See the module's header.
#[derive(Clone, Copy, Debug)]
pub enum Gateway<'a> {
    /// A Service.
    Service(&'a Arc<Service>),
    /// A workload.
    Workload(&'a Arc<Workload>),
}

impl Gateway<'_> {
    /// Whether `workload` is it, or one of its endpoints.
    pub fn is(&self, workload: &Workload) -> bool {
        match self {
            Self::Service(service) => workload.services.contains_key(&service.key()),
            Self::Workload(own) => own.uid == workload.uid,
        }
    }
}

impl Snapshot {
    /// What `address` means to a client of `namespace`.
    pub fn gateway(&self, address: &GatewayAddress, namespace: &str) -> Option<Gateway<'_>> {
        match &address.target {
            GatewayTarget::Hostname { namespace, hostname } => self.service(namespace, hostname).map(Gateway::Service),
            GatewayTarget::Address { network, ip } => match self.service_by_vip(network, *ip, namespace) {
                Some(service) => Some(Gateway::Service(service)),
                None => self.workload_by_ip(network, *ip).map(Gateway::Workload),
            },
        }
    }
}
