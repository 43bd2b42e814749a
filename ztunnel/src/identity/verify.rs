//! Whether who answers at control's address is control: its name, its chain, and the revocation lists.
//!
//! Everything but the lists is webpki's. A list that comes later cuts the connection at which the certificate was shown,
//! so that nobody who has control's key goes on describing the mesh. Limits: lists are those of `CRL_PATH`; a node without
//! them hears of nothing.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tulle_certs::VerifyError;

use crate::identity::ControlError;
use crate::tls::{self, Revoked};

/// Who may vouch for control.
pub(super) type Anchors = Arc<[TrustAnchor<'static>]>;

/// Accepts the host of the address, or the alternative, unless a list names a certificate of the chain.
#[derive(Debug)]
pub(super) struct ControlVerifier {
    inner: Arc<WebPkiServerVerifier>,
    anchors: Anchors,
    alternative: Option<ServerName<'static>>,
    revoked: Revoked,
}

impl ControlVerifier {
    /// `alternative`: a second name that is accepted.
    pub(super) fn new(
        store: RootCertStore,
        alternative: Option<ServerName<'static>>,
        revoked: Revoked,
    ) -> Result<Self, ControlError> {
        let anchors = store.roots.clone().into();
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(store), tls::provider())
            .build()
            .map_err(|error| ControlError::Roots(error.to_string()))?;
        Ok(Self { inner, anchors, alternative, revoked })
    }
}

impl ServerCertVerifier for ControlVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let first = self.inner.verify_server_cert(leaf, intermediates, name, ocsp, now);
        let verified = match (first, &self.alternative) {
            (Err(error), Some(name)) => {
                self.inner.verify_server_cert(leaf, intermediates, name, ocsp, now).map_err(|_| error)?
            }
            (first, _) => first?,
        };
        let shown: Vec<CertificateDer<'_>> = std::iter::once(leaf).chain(intermediates).cloned().collect();
        match tulle_certs::server_not_revoked(&shown, &self.anchors, &self.revoked.lists(), now) {
            Ok(()) => Ok(verified),
            Err(error) => Err(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

type End = Pin<Box<dyn Future<Output = VerifyError> + Send>>;

/// A connection that fails once its peer's certificate is taken back.
pub(super) struct Watched<S> {
    inner: S,
    /// `None`: it has come to that.
    end: Option<End>,
}

impl<S> Watched<S> {
    /// `end` completes when the connection has to.
    pub(super) fn new(inner: S, end: impl Future<Output = VerifyError> + Send + 'static) -> Self {
        Self { inner, end: Some(Box::pin(end)) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // HTTP/2 reads as long as the connection is there, so nobody has to ask when writing.
        match self.end.as_mut().map(|end| end.as_mut().poll(cx)) {
            Some(Poll::Pending) => Pin::new(&mut self.inner).poll_read(cx, buffer),
            Some(Poll::Ready(error)) => {
                tracing::warn!(%error, "the connection to control is cut");
                self.end = None;
                Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, error)))
            }
            None => Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
