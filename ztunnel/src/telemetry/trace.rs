//! Traces: the W3C context that requests carry on, and the spans that this proxy adds, for a collector of OpenTelemetry.
//!
//! Off unless a collector is named; then headers pass untouched. When it is on, a request without a context begins a trace,
//! of which a share is sampled, and each side of the mesh that reads a sampled request adds one span and puts itself into
//! `traceparent` as the parent of what follows. Whether a trace is sampled was decided where it began and is kept. Spans wait
//! in a bounded queue; a full one drops them, counted, and makes nobody wait. A span has no query, which may hold a token.
//! Chance is an argument.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use http::{HeaderMap, HeaderName, HeaderValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;
use tulle_proto::otlp;

/// W3C Trace Context §3.2.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// W3C Trace Context §3.3.
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// Spans that wait to be sent. One has some 700 bytes, so this is 3 MB; a second of a busy node.
const WAITING: usize = 4096;
/// What shares of traces are parts of.
pub const ALL: u32 = 1_000_000;

/// A `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Never all zero.
    pub trace: [u8; 16],
    /// Of the span that sent it; never all zero.
    pub span: [u8; 8],
    /// The sampled flag.
    pub sampled: bool,
}

impl Context {
    /// Reads the value of a header. `None`: it is none, and the trace is begun anew. Of a later version that much is read
    /// that this one has (§4.3).
    pub fn parse(text: &[u8]) -> Option<Self> {
        if text.len() < 55 || text[2] != b'-' || text[35] != b'-' || text[52] != b'-' {
            return None;
        }
        let [version] = hex(&text[..2])?;
        let longer = text.len() > 55;
        if version == 0xff || (version == 0 && longer) || (longer && text[55] != b'-') {
            return None;
        }
        let (trace, span, [flags]) = (hex::<16>(&text[3..35])?, hex::<8>(&text[36..52])?, hex(&text[53..55])?);
        let good = trace != [0; 16] && span != [0; 8];
        good.then_some(Self { trace, span, sampled: flags & 1 == 1 })
    }

    /// The trace's name in logs.
    pub fn trace_id(&self) -> String {
        let mut text = String::with_capacity(32);
        push_hex(&mut text, &self.trace);
        text
    }

    /// The value of a header.
    pub fn header(&self) -> HeaderValue {
        let mut text = String::with_capacity(55);
        text.push_str("00-");
        push_hex(&mut text, &self.trace);
        text.push('-');
        push_hex(&mut text, &self.span);
        text.push_str(if self.sampled { "-01" } else { "-00" });
        HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
    }
}

/// Lower-case digits only, as the standard has it.
fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        let digit = |four: u8| char::from_digit(four.into(), 16).unwrap_or('0');
        text.push(digit(byte >> 4));
        text.push(digit(byte & 15));
    }
}

/// A span that is under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// What follows is told.
    pub context: Context,
    /// All zero: the trace begins here.
    pub parent: [u8; 8],
    /// `tracestate`, passed on.
    pub state: String,
}

/// What becomes of a request's context: its headers are changed, and a span may begin. `fresh`: random; `share`: of new traces
/// that are sampled, of [`ALL`].
pub fn begin(headers: &mut HeaderMap, share: u32, fresh: impl FnOnce() -> [u8; 28]) -> Option<Open> {
    let mut came = headers.get_all(&TRACEPARENT).iter();
    // Several are as good as none (§3.2.1).
    let given = came.next().filter(|_| came.next().is_none()).and_then(|value| Context::parse(value.as_bytes()));
    if given.is_some_and(|given| !given.sampled) {
        return None;
    }
    let random = fresh();
    let part = |from: usize| random.iter().skip(from).copied();
    let (mut trace, mut span) = ([0; 16], [0; 8]);
    trace.iter_mut().zip(part(0)).for_each(|(to, from)| *to = from);
    span.iter_mut().zip(part(16)).for_each(|(to, from)| *to = from);
    // All zero means none.
    (trace[15], span[7]) = (trace[15] | 1, span[7] | 1);
    let chance = part(24).fold(0u32, |all, byte| all << 8 | u32::from(byte));
    let context = match given {
        Some(given) => Context { span, ..given },
        None => {
            headers.remove(&TRACESTATE);
            let sampled = u64::from(chance) * u64::from(ALL) < u64::from(share) << 32;
            Context { trace, span, sampled }
        }
    };
    headers.insert(TRACEPARENT, context.header());
    let state = headers.get_all(&TRACESTATE).iter().filter_map(|value| value.to_str().ok());
    let state = state.collect::<Vec<_>>().join(",");
    context.sampled.then(|| Open { context, parent: given.map_or([0; 8], |given| given.span), state })
}

/// A span that is over, and whose it is.
#[derive(Debug)]
pub struct Span {
    /// `service.name`: of the pod whose side it is.
    pub service: Arc<str>,
    /// The rest.
    pub span: otlp::Span,
}

/// Where spans go. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Spans(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    queue: OnceLock<(mpsc::Sender<Span>, u32)>,
    sent: Counter<u64, AtomicU64>,
    dropped: Counter<u64, AtomicU64>,
}

impl Spans {
    /// Goes nowhere until it is started.
    pub fn new(registry: &mut Registry) -> Self {
        let inner = Inner { queue: OnceLock::new(), sent: Counter::default(), dropped: Counter::default() };
        registry.register("tulle_spans_sent", "Spans that the collector took", inner.sent.clone());
        registry.register("tulle_spans_dropped", "Spans that were lost on the way to it", inner.dropped.clone());
        Self(Arc::new(inner))
    }

    /// Spans are made from now on, with a `share` (of [`ALL`]) of the traces that begin here. `None`: they are already.
    pub fn start(&self, share: u32) -> Option<mpsc::Receiver<Span>> {
        let (sender, receiver) = mpsc::channel(WAITING);
        self.0.queue.set((sender, share)).ok().map(|()| receiver)
    }

    /// [`begin`], if spans are made.
    pub fn begin(&self, headers: &mut HeaderMap) -> Option<Open> {
        let (_, share) = self.0.queue.get()?;
        begin(headers, *share, rand::random)
    }

    /// Queues a span.
    pub fn put(&self, span: Span) {
        if self.0.queue.get().is_none_or(|(queue, _)| queue.try_send(span).is_err()) {
            self.dropped(1);
        }
    }

    /// So many were taken.
    pub fn sent(&self, count: usize) {
        self.0.sent.inc_by(count as u64);
    }

    /// So many were lost.
    pub fn dropped(&self, count: usize) {
        self.0.dropped.inc_by(count as u64);
    }
}

/// One attribute; empty ones say nothing.
pub fn attribute(key: &str, value: &str) -> Option<otlp::KeyValue> {
    let text = otlp::any_value::Value::StringValue(value.to_owned());
    (!value.is_empty()).then(|| otlp::KeyValue { key: key.into(), value: Some(otlp::AnyValue { value: Some(text) }) })
}

/// A number.
pub(super) fn number(key: &str, value: i64) -> Option<otlp::KeyValue> {
    let number = otlp::any_value::Value::IntValue(value);
    Some(otlp::KeyValue { key: key.into(), value: Some(otlp::AnyValue { value: Some(number) }) })
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};

    use super::{ALL, Context, begin};

    const GIVEN: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_context_is_read_as_the_standard_says() {
        let given = Context::parse(GIVEN.as_bytes()).unwrap();
        assert!(given.sampled && given.trace[0] == 0x0a && given.span[7] == 0x31);
        assert_eq!(given.header(), GIVEN);
        for (text, good) in [
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", true),
            ("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-later", true),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-later", false),
            ("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01later", false),
            ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", false),
            ("00-00000000000000000000000000000000-b7ad6b7169203331-01", false),
            ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", false),
            ("00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", false),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331", false),
            ("", false),
        ] {
            assert_eq!(Context::parse(text.as_bytes()).is_some(), good, "{text}");
        }
    }

    fn headers(parents: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("tracestate", HeaderValue::from_static("a=b"));
        for parent in parents {
            headers.append("traceparent", HeaderValue::from_str(parent).unwrap());
        }
        headers
    }

    #[test]
    fn a_trace_goes_on_as_it_began() {
        let not_sampled = GIVEN.replace("-01", "-00");
        // what came, the share of new traces → a span, of the trace that came, and what is passed on
        for (parents, share, span, same, state) in [
            (&[GIVEN][..], 0, true, true, true),
            (&[&not_sampled], ALL, false, true, true),
            (&[], ALL, true, false, false),
            (&[], 0, false, false, false),
            (&["nonsense"], ALL, true, false, false),
            (&[GIVEN, GIVEN], ALL, true, false, false),
        ] {
            let mut headers = headers(parents);
            let open = begin(&mut headers, share, || [7; 28]);
            assert_eq!(open.is_some(), span, "{parents:?}");
            let passed: Vec<_> = headers.get_all("traceparent").iter().collect();
            assert_eq!(passed.len(), 1, "{parents:?}");
            let passed = Context::parse(passed[0].as_bytes()).unwrap();
            assert_eq!(passed.trace == Context::parse(GIVEN.as_bytes()).unwrap().trace, same, "{parents:?}");
            assert_eq!(headers.contains_key("tracestate"), state, "{parents:?}");
            if let Some(open) = open {
                assert_eq!(open.context, passed, "what follows has this span as its parent");
                assert_eq!(open.parent != [0; 8], same, "{parents:?}");
            }
        }
    }
}
