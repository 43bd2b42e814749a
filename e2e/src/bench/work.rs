//! What the bench asks of its load generator, and what comes back: plain data, exchanged as JSON lines between the
//! process that measures and the one in the client's pod.
//!
//! The generator says when the measured part begins and ends, so that the other side samples the proxies' CPU over
//! exactly that part; totals come last, when every connection is closed, because the proofs count whole connections.
//! Limits: one client pod, one server pod or one name of several; raw TCP, or HTTP/1.1.

use std::collections::BTreeMap;
use std::net::IpAddr;

use hdrhistogram::Histogram;
use serde::Deserialize;
use serde::Serialize;

/// Requests are this long, in bytes.
pub(super) const REQUEST: usize = 100;
/// Responses are this long, in bytes.
pub(super) const RESPONSE: usize = 1024;
/// This many first bytes of a request come back at the front of its response, so that a mix-up is noticed.
pub(super) const ECHO: usize = 16;
/// Answers requests until the client closes.
pub(super) const PORT_REQUESTS: u16 = 9001;
/// Swallows everything; at the end says how much, as 8 bytes, big endian.
pub(super) const PORT_SINK: u16 = 9002;
/// Sends until the client closes.
pub(super) const PORT_SOURCE: u16 = 9003;
/// Answers one request and closes.
pub(super) const PORT_ONCE: u16 = 9004;
/// Answers requests of HTTP/1.1 until the client closes.
pub(super) const PORT_HTTP: u16 = 9005;
/// Every port of the server of raw TCP.
pub(super) const PORTS: [u16; 4] = [PORT_REQUESTS, PORT_SINK, PORT_SOURCE, PORT_ONCE];

/// Histograms cover up to a minute.
pub(super) const HIGHEST_NS: u64 = 60_000_000_000;

/// One kind of load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Work {
    /// As many bytes as possible to the server; units are bytes.
    Upload { streams: usize },
    /// As many bytes as possible from the server; units are bytes.
    Download { streams: usize },
    /// Requests one after the other on each of some lasting connections; units are requests.
    Requests { connections: usize },
    /// Requests at fixed times, whatever the answers do; units are requests.
    Paced { connections: usize, per_second: u32, beside_upload: bool },
    /// A connection for each request, as many as possible; units are connections.
    Connects { at_once: usize },
    /// A connection for each request, at fixed times; units are connections.
    PacedConnects { per_second: u32 },
    /// One connection with one request to each of several servers, so many at a time; units are connections.
    Cold { at_once: usize },
    /// Connections that do nothing after their first request, until standard input ends; units are connections.
    Hold { connections: usize },
}

impl Work {
    /// Whether it is work between two pods only, which can be done without a mesh as well.
    pub(super) fn is_of_pods(&self) -> bool {
        !matches!(self, Self::Cold { .. })
    }
}

/// One run of the generator.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// The server.
    pub(super) to: IpAddr,
    /// The servers of [`Work::Cold`].
    #[serde(default)]
    pub(super) others: Vec<IpAddr>,
    /// What to do.
    pub(super) work: Work,
    /// Load before the measured part, milliseconds.
    pub(super) warm_ms: u64,
    /// The measured part, milliseconds.
    pub(super) run_ms: u64,
    /// Ends the measured part early: bytes of bulk load, requests or connections.
    pub(super) limit: Option<u64>,
    /// Text of which the payload is made.
    pub(super) marker: String,
    /// Requests are of HTTP.
    #[serde(default)]
    pub(super) http: Option<Http>,
}

impl Order {
    /// Raw bytes to one server; `times` are the warm-up and the measured part, milliseconds.
    pub(super) fn to(to: IpAddr, work: &Work, times: (u64, u64), limit: Option<u64>, marker: &str) -> Self {
        let (warm_ms, run_ms) = times;
        Self {
            to,
            others: Vec::new(),
            work: work.clone(),
            warm_ms,
            run_ms,
            limit,
            marker: marker.to_owned(),
            http: None,
        }
    }
}

/// What every request of HTTP is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Http {
    /// Where to.
    pub(super) port: u16,
    /// Its first lines.
    pub(super) head: String,
}

/// The measured part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// What was done: see [`Work`].
    pub(super) units: u64,
    /// Its length in seconds.
    pub(super) seconds: f64,
    /// From the intended time of sending to the end of the response, microseconds; only of paced work, and of
    /// [`Work::Cold`], where it counts from the start of connecting.
    pub(super) latency: Option<Latency>,
    /// Bytes of the upload beside paced requests.
    pub(super) beside_bytes: u64,
}

/// Exact percentiles (to three digits), microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Latency {
    /// Median.
    pub p50: f64,
    /// 90 of 100 are below.
    pub p90: f64,
    /// 99 of 100 are below.
    pub p99: f64,
    /// The worst.
    pub(super) max: f64,
}

impl Latency {
    /// Of a histogram of nanoseconds.
    pub(super) fn of(histogram: &Histogram<u64>) -> Self {
        let us = |ns: u64| ns as f64 / 1000.0;
        Self {
            p50: us(histogram.value_at_quantile(0.5)),
            p90: us(histogram.value_at_quantile(0.9)),
            p99: us(histogram.value_at_quantile(0.99)),
            max: us(histogram.max()),
        }
    }
}

/// Everything from the first connection to the last close, warming included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Totals {
    /// Payload bytes, both ways.
    pub(super) payload: u64,
    /// Connections opened.
    pub(super) connections: u64,
    /// Connections or requests that went wrong.
    pub(super) failed: u64,
    /// The first thing that went wrong.
    pub(super) error: Option<String>,
    /// Answers of HTTP by the server that gave them.
    #[serde(default)]
    pub(super) answered: BTreeMap<String, u64>,
}

/// A line from the generator.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Line {
    /// The measured part begins.
    Begin,
    /// It has ended.
    End(Measured),
    /// Every connection is closed.
    Gone(Totals),
}

/// What the denied client saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Probed {
    /// Connections tried.
    pub(super) attempts: u64,
    /// Of them, those on which the server answered.
    pub(super) passed: u64,
}

/// What came of requests that were asked one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asked {
    /// Requests.
    pub(super) attempts: u64,
    /// By status, or why there is none.
    pub(super) statuses: BTreeMap<String, u64>,
    /// By the server that answered; empty: a proxy.
    pub(super) servers: BTreeMap<String, u64>,
}
