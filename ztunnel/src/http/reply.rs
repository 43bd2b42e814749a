//! Answers that the proxy gives itself, in the form that the client understands: a status and a line of text, or for gRPC
//! status 200 with `grpc-status` and `grpc-message`.
//!
//! Texts that tools know are Envoy's. What names a policy goes to the log, not to the client.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};

use crate::http::Body;
use crate::route::grpc_of;

/// An answer of the proxy itself.
#[derive(Clone, Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: StatusCode,
    /// Text for the client, without particulars of the mesh.
    pub text: &'static str,
    /// `response_flags`, in Envoy's words.
    pub flag: &'static str,
    /// A limit was reached: the client should back off.
    pub overloaded: bool,
    /// Seconds after which it may be tried again.
    pub retry_after: Option<u64>,
    /// gRPC status, where it is not the one that stands for `status`.
    pub grpc: Option<u32>,
    /// The connection ends with it, if it is an HTTP/1 one: what comes behind may not be what it seems.
    pub close: bool,
}

impl Reply {
    /// An answer with `status`.
    pub const fn new(status: StatusCode, text: &'static str, flag: &'static str) -> Self {
        Self { status, text, flag, overloaded: false, retry_after: None, grpc: None, close: false }
    }

    /// A limit of the proxy or of a breaker was reached.
    pub const fn overflow(text: &'static str) -> Self {
        Self { overloaded: true, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, text, "UO") }
    }

    /// What a gRPC client is told.
    pub fn grpc_status(&self) -> u32 {
        self.grpc.unwrap_or_else(|| grpc_of(self.status.as_u16()))
    }

    /// The message for the client.
    pub fn response(&self, grpc: bool) -> Response<Body> {
        let mut response = if grpc {
            let mut response = Response::new(Body::empty());
            let headers = response.headers_mut();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(self.grpc_status()));
            headers.insert("grpc-message", HeaderValue::from_static(self.text));
            response
        } else {
            let mut response = Response::new(Body::full(Bytes::from_static(self.text.as_bytes())));
            *response.status_mut() = self.status;
            if !self.text.is_empty() {
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
            response
        };
        if self.overloaded {
            response.headers_mut().insert("x-envoy-overloaded", HeaderValue::from_static("true"));
        }
        if self.close {
            // hyper leaves it out of HTTP/2.
            response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(http::header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Nobody to send it to.
pub const NO_ENDPOINT: Reply = Reply::new(StatusCode::SERVICE_UNAVAILABLE, "no healthy upstream", "UH");
/// The endpoint could not be reached.
pub const CONNECT_FAILED: Reply = Reply::new(
    StatusCode::SERVICE_UNAVAILABLE,
    "upstream connect error or disconnect/reset before headers. reset reason: connection failure",
    "UF",
);
/// The endpoint hung up before it answered.
pub const RESET: Reply = Reply::new(
    StatusCode::SERVICE_UNAVAILABLE,
    "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
    "UC",
);
/// The endpoint's answer is one that two readers could read differently, or none.
pub const PROTOCOL: Reply = Reply::new(
    StatusCode::BAD_GATEWAY,
    "upstream connect error or disconnect/reset before headers. reset reason: protocol error",
    "UPE",
);
/// It took too long.
pub const TIMEOUT: Reply = Reply::new(StatusCode::GATEWAY_TIMEOUT, "upstream request timeout", "UT");
/// The pod has too many requests under way.
pub const OVER_BUDGET: Reply =
    Reply::overflow("upstream connect error or disconnect/reset before headers. reset reason: overflow");
/// A limit of the route was reached.
pub const RATE_LIMITED: Reply = Reply::new(StatusCode::TOO_MANY_REQUESTS, "local_rate_limited", "RL");
/// A policy forbids it.
pub const DENIED: Reply = Reply::new(StatusCode::FORBIDDEN, "RBAC: access denied", "-");
/// A policy that has not arrived.
pub const PENDING: Reply = Reply::new(StatusCode::SERVICE_UNAVAILABLE, "a policy has not arrived; retry", "-");
/// What HTTP alone forbids.
pub const BAD_REQUEST: Reply = Reply { close: true, ..Reply::new(StatusCode::BAD_REQUEST, "Bad Request", "DPE") };
/// A request to be a tunnel, which the mesh's HTTP routes are not for; or one for a WebSocket over HTTP/2, which the server does
/// not offer.
pub const NO_CONNECT: Reply = Reply::new(StatusCode::NOT_IMPLEMENTED, "CONNECT is not supported here", "DPE");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_client_gets_errors_in_its_own_form() {
        let answer = NO_ENDPOINT.response(true);
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["grpc-status"], "14");
        assert_eq!(answer.headers()["grpc-message"], "no healthy upstream");
        let answer = OVER_BUDGET.response(false);
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answer.headers()["x-envoy-overloaded"], "true");
    }
}
