//! One certificate request to the CA (`istio.v1.auth`), and what can go wrong with it.
//!
//! The key is made here and goes into the certificate's TLS configuration at once. An answer is believed only as far as it fits: exactly the identity asked for.

use std::collections::BTreeMap;
use std::time::Duration;

use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::{Code, Request, Status};
use tulle_certs::{Issued, SpiffeId};
use tulle_proto::ca::IstioCertificateRequest;
use tulle_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use tulle_proto::names;

use crate::identity::control::chain;
use crate::identity::{Control, ControlError, breaks};
use crate::tls::{TlsError, Trust, WorkloadCert};

/// An answer that takes longer is an outage; a signature takes milliseconds.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a certificate was not issued.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Control could not be asked.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The key or the request could not be made.
    #[error(transparent)]
    Request(#[from] tulle_certs::RequestError),
    /// The CA refused, or is not there.
    #[error("the CA at {address} {}: {message}", refused(*code))]
    Refused {
        /// Of the CA.
        address: String,
        /// gRPC's word for it.
        code: Code,
        /// The CA's or the transport's words.
        message: String,
    },
    /// The answer cannot be used.
    #[error("the CA at {address} sent a certificate that cannot be used: {source}")]
    Answer {
        /// Of the CA.
        address: String,
        /// What is wrong.
        source: tulle_certs::IssuedError,
    },
    /// No TLS configuration can be made of it.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Whose fault, in the words that come after "the CA at …".
fn refused(code: Code) -> &'static str {
    match code {
        Code::Unauthenticated => "does not accept this node's token (check AUTH_TOKEN and its expiry)",
        Code::PermissionDenied => "does not give this node that identity (no unfinished pod of it runs here?)",
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => "does not answer; it is asked again",
        _ => "refused",
    }
}

/// Asks the CA for certificates of other identities than the caller's own.
pub struct Client {
    control: Control,
    /// Wanted life.
    ttl: Duration,
    trust: Trust,
}

impl Client {
    /// `ttl` is the wanted life of certificates; the CA may shorten it. `trust`: whom their holders believe.
    pub fn new(control: Control, ttl: Duration, trust: Trust) -> Self {
        Self { control, ttl, trust }
    }

    /// Requests a certificate.
    ///
    /// # Errors
    /// See [`FetchError`]; all of them may be tried again later.
    pub async fn fetch(&self, id: &SpiffeId) -> Result<WorkloadCert, FetchError> {
        let made = tulle_certs::request(id)?;
        let impersonated = Value { kind: Some(Kind::StringValue(id.to_string())) };
        let mut request = Request::new(IstioCertificateRequest {
            csr: made.csr_pem,
            validity_duration: i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct {
                fields: BTreeMap::from([(names::METADATA_IMPERSONATED.to_owned(), impersonated)]),
            }),
        });
        self.control.authorize(request.metadata_mut()).await?;
        let connected = self.control.connect().await?;
        let mut ca = IstioCertificateServiceClient::new(connected.channel.clone());
        let answer = tokio::time::timeout(REQUEST_TIMEOUT, ca.create_certificate(request)).await;
        let late = |_| Status::deadline_exceeded(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()));
        let address = || self.control.address.clone();
        let answer = match answer.map_err(late).flatten() {
            Ok(answer) => answer,
            Err(status) => {
                if breaks(status.code()) {
                    self.control.link.broken(&connected).await;
                }
                return Err(FetchError::Refused { address: address(), code: status.code(), message: text(&status) });
            }
        };
        let issued = Issued::parse(&answer.into_inner().cert_chain, id)
            .map_err(|source| FetchError::Answer { address: address(), source })?;
        Ok(WorkloadCert::new(issued, made.key, &self.trust)?)
    }
}

/// A status with the transport errors behind it.
pub(crate) fn text(status: &Status) -> String {
    let cause = std::error::Error::source(status).map(chain);
    match cause {
        Some(cause) if !status.message().contains(&cause) => format!("{}: {cause}", status.message()),
        _ => status.message().to_owned(),
    }
}
