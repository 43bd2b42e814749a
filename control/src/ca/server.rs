//! The certificate service: authenticate, read the request, decide, sign.
//!
//! Signing is a few hundred microseconds of CPU and happens on the worker; the concurrency limit of the gRPC stack
//! bounds it. Every refusal tells the caller what to change and is logged with the caller.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tulle_certs::ca::Authority;
use tulle_certs::parse_csr;
use tulle_proto::ca::istio_certificate_service_server::IstioCertificateService;
use tulle_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use tulle_proto::names;

use crate::authn;
use crate::base;
use crate::ca::grant;

/// Requests since start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Signed.
    pub signed: AtomicU64,
    /// Refused, for any reason.
    pub refused: AtomicU64,
}

/// The service.
pub struct Server {
    /// Knows callers.
    pub authn: Arc<authn::Authn>,
    /// Replaced when the intermediate is renewed.
    pub authority: Arc<ArcSwap<Authority>>,
    /// What runs where; `None` before the first description of the mesh.
    pub accounts: watch::Receiver<Option<Arc<grant::Accounts>>>,
    /// The mesh's trust domain.
    pub trust_domain: String,
    /// Namespace of the node account.
    pub root_namespace: String,
    /// Counted here, shown elsewhere.
    pub counters: Arc<Counters>,
}

#[tonic::async_trait]
impl IstioCertificateService for Server {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let result = self.create(&request).await;
        match &result {
            Ok(_) => self.counters.signed.fetch_add(1, Ordering::Relaxed),
            Err(_) => self.counters.refused.fetch_add(1, Ordering::Relaxed),
        };
        result.map(Response::new)
    }
}

/// How long a caller waits for the first description of the mesh. Nodes ask as soon as control listens, and a refusal would
/// fail their pods' connections until they ask again.
const FIRST: Duration = Duration::from_secs(5);

impl Server {
    async fn accounts(&self) -> Result<Arc<grant::Accounts>, Status> {
        let mut known = self.accounts.clone();
        let first = timeout(FIRST, known.wait_for(Option::is_some)).await;
        let accounts = first.ok().and_then(Result::ok).and_then(|accounts| accounts.clone());
        accounts.ok_or_else(|| {
            Status::unavailable(
                "control does not know yet which pods run where (/readyz says what it waits for); ask again",
            )
        })
    }

    async fn create(&self, request: &Request<IstioCertificateRequest>) -> Result<IstioCertificateResponse, Status> {
        let now = base::unix_now();
        let from = request.remote_addr().map(|address| address.ip());
        let caller = self.authn.caller(request.metadata().as_ref(), from, now).await.inspect_err(|status| {
            tracing::warn!(reason = status.message(), "certificate refused: caller unknown");
        })?;
        let message = request.get_ref();
        let csr = parse_csr(&message.csr).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let accounts = self.accounts().await?;
        let granted = grant::decide(&grant::Facts {
            caller: &caller,
            impersonated: impersonated(message)?,
            csr: &csr.identity,
            trust_domain: &self.trust_domain,
            root_namespace: &self.root_namespace,
            accounts: &accounts,
        });
        let identity = granted.map_err(|reason| {
            tracing::warn!(
                namespace = caller.namespace,
                account = caller.service_account,
                node = caller.node,
                reason,
                "certificate refused"
            );
            Status::permission_denied(reason)
        })?;
        let authority = self.authority.load();
        let cert_chain = authority.sign(&csr, &identity, message.validity_duration, now).map_err(|error| {
            tracing::error!(%identity, %error, "cannot sign");
            Status::internal(error.to_string())
        })?;
        tracing::debug!(%identity, node = caller.node, "certificate signed");
        Ok(IstioCertificateResponse { cert_chain })
    }
}

fn impersonated(message: &IstioCertificateRequest) -> Result<Option<&str>, Status> {
    let fields = message.metadata.as_ref().map(|metadata| &metadata.fields);
    let value = fields.and_then(|fields| fields.get(names::METADATA_IMPERSONATED));
    match value.map(|value| &value.kind) {
        None => Ok(None),
        Some(Some(prost_types::value::Kind::StringValue(text))) => Ok(Some(text)),
        Some(_) => Err(Status::invalid_argument("metadata ImpersonatedIdentity is not a string")),
    }
}
