//! gRPC streams that last as long as a node does, without buffers that last as long.
//!
//! tonic keeps a buffer for encoding and one for decoding with each stream, each as large as the largest messages were:
//! some 64 KiB after a node was told of the mesh, and megabytes after it came back with the versions of all that it has.
//! Control has two streams for each node of the cluster. A gRPC message is five bytes and the encoded message, so here each
//! is a buffer of its own, which goes when it is sent or read. Limits: no compression, which is never offered; a message
//! may be as large as its caller says.

use std::collections::VecDeque;
use std::marker::PhantomData;

use futures_util::stream;
use http::HeaderMap;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use http_body_util::BodyExt;
use http_body_util::StreamBody;
use hyper::body::Frame;
use prost::Message;
use prost::bytes::Buf;
use prost::bytes::BufMut;
use prost::bytes::Bytes;
use prost::bytes::BytesMut;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::body::Body;

/// Compression flag and length before each message (gRPC over HTTP/2, "Length-Prefixed-Message").
const HEADER: usize = 5;

/// What a stream sends; ends with the status that comes instead of a message, or well.
pub type Outgoing<T> = mpsc::Receiver<Result<T, Status>>;

/// The messages that a peer sends.
pub struct Messages<T> {
    body: Body,
    limit: usize,
    /// Read and not taken yet: pieces as they came, and how long they are together.
    pieces: VecDeque<Bytes>,
    len: usize,
    message: PhantomData<fn() -> T>,
}

impl<T: Message + Default> Messages<T> {
    /// Of a request's body; messages of more bytes than `limit` are refused.
    pub fn new(body: Body, limit: usize) -> Self {
        Self { body, limit, pieces: VecDeque::new(), len: 0, message: PhantomData }
    }

    /// The next message; `None`: the peer has said all. May be given up and asked again: nothing is lost.
    pub async fn next(&mut self) -> Option<Result<T, Status>> {
        loop {
            match self.take() {
                Ok(Some(message)) => return Some(Ok(message)),
                Ok(None) => {}
                Err(status) => return Some(Err(status)),
            }
            match self.body.frame().await {
                None if self.len == 0 => return None,
                None => return Some(Err(Status::internal("the stream ended within a message"))),
                Some(Err(status)) => return Some(Err(status)),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.len += data.len();
                        self.pieces.extend(Some(data).filter(|data| !data.is_empty()));
                    }
                }
            }
        }
    }

    /// A message, if all of it is there.
    fn take(&mut self) -> Result<Option<T>, Status> {
        let mut header = self.pieces.iter().flat_map(|piece| piece.iter().copied());
        let (Some(flag), Some(a), Some(b), Some(c), Some(d)) =
            (header.next(), header.next(), header.next(), header.next(), header.next())
        else {
            return Ok(None);
        };
        if flag != 0 {
            return Err(Status::unimplemented("compressed messages are not read; send them plain"));
        }
        let size = u32::from_be_bytes([a, b, c, d]) as usize;
        if size > self.limit {
            return Err(Status::out_of_range(format!("a message has {size} bytes; at most {} are read", self.limit)));
        }
        if self.len < HEADER + size {
            return Ok(None);
        }
        self.split(HEADER);
        let bytes = self.split(size);
        T::decode(bytes).map(Some).map_err(|error| Status::internal(format!("a message cannot be read: {error}")))
    }

    /// Takes so many bytes, which are there, off the front.
    fn split(&mut self, size: usize) -> Bytes {
        self.len -= size;
        let whole = self.pieces.front_mut().filter(|piece| piece.len() >= size).map(|piece| piece.split_to(size));
        let taken = whole.unwrap_or_else(|| {
            let mut joined = BytesMut::with_capacity(size);
            while joined.len() < size
                && let Some(piece) = self.pieces.front_mut()
            {
                let more = piece.len().min(size - joined.len());
                joined.put_slice(&piece[..more]);
                piece.advance(more);
                if piece.is_empty() {
                    self.pieces.pop_front();
                }
            }
            joined.freeze()
        });
        if self.pieces.front().is_some_and(Bytes::is_empty) {
            self.pieces.pop_front();
        }
        if self.pieces.is_empty() {
            self.pieces = VecDeque::new();
        }
        taken
    }
}

/// Answers a request for the stream at `path`: `open` says what is sent, given what the caller says, with headers that the
/// response has besides.
pub fn answer<In: Message + Default, Out: Message + 'static>(
    request: http::Request<Body>,
    path: &str,
    limit: usize,
    open: impl FnOnce(Messages<In>) -> Result<(HeaderMap, Outgoing<Out>), Status>,
) -> http::Response<Body> {
    let (head, body) = request.into_parts();
    if head.uri.path() != path {
        return Status::unimplemented("there is no such call").into_http();
    }
    let (headers, outgoing) = match open(Messages::new(body, limit)) {
        Ok(opened) => opened,
        Err(status) => return status.into_http(),
    };
    let frames = stream::unfold(Some(outgoing), |outgoing| async move {
        let mut outgoing = outgoing?;
        Some(match outgoing.recv().await {
            Some(Ok(message)) => (Ok::<_, Status>(Frame::data(framed(&message))), Some(outgoing)),
            Some(Err(status)) => (Ok(Frame::trailers(trailers(&status))), None),
            None => (Ok(Frame::trailers(trailers(&Status::ok("")))), None),
        })
    });
    let mut response = http::Response::new(Body::new(StreamBody::new(frames)));
    *response.headers_mut() = headers;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

fn framed(message: &impl Message) -> Bytes {
    let size = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(HEADER + size);
    bytes.put_u8(0);
    // Responses are cut long before this could not hold.
    bytes.put_u32(u32::try_from(size).unwrap_or(u32::MAX));
    // There is room: that was its length a moment ago.
    let _ = message.encode(&mut bytes);
    bytes.freeze()
}

fn trailers(status: &Status) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if status.add_header(&mut headers).is_err() {
        headers.insert(Status::GRPC_STATUS, HeaderValue::from_static("2"));
    }
    headers
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use prost::bytes::Bytes;
    use tokio::sync::mpsc;
    use tonic::Status;
    use tonic::body::Body;
    use tulle_proto::discovery::DeltaDiscoveryRequest;

    use super::{Messages, answer, framed};

    fn body(pieces: Vec<Vec<u8>>) -> Body {
        let frames = pieces.into_iter().map(|piece| Ok::<_, Status>(Frame::data(Bytes::from(piece))));
        Body::new(StreamBody::new(futures_util::stream::iter(frames)))
    }

    fn named(name: &str) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest { type_url: name.to_owned(), ..DeltaDiscoveryRequest::default() }
    }

    #[tokio::test]
    async fn messages_are_the_same_however_their_bytes_are_cut() {
        let wanted = [named("one"), named(""), named(&"x".repeat(1000)), named("last")];
        let bytes: Vec<u8> = wanted.iter().flat_map(|message| framed(message).to_vec()).collect();
        for size in [1, 2, 3, 5, 7, 100, 1003, 10_000] {
            let mut messages = Messages::new(body(bytes.chunks(size).map(<[u8]>::to_vec).collect()), 2000);
            for message in &wanted {
                let found: DeltaDiscoveryRequest = messages.next().await.expect("there is one").expect("it is good");
                assert_eq!(found, *message, "in pieces of {size}");
            }
            assert!(messages.next().await.is_none());
            assert_eq!(messages.pieces.capacity(), 0, "nothing is kept");
        }
    }

    #[tokio::test]
    async fn what_is_no_message_ends_the_stream_with_a_reason() {
        let cases: &[(&[u8], &str)] = &[
            (&[1, 0, 0, 0, 0], "compressed"),
            (&[0, 0, 0, 1, 0], "at most 100"),
            (&[0, 0, 0, 0, 3, 1], "ended within"),
            (&[0, 0], "ended within"),
            (&[0, 0, 0, 0, 1, 255], "cannot be read"),
        ];
        for (bytes, why) in cases {
            let mut messages = Messages::<DeltaDiscoveryRequest>::new(body(vec![bytes.to_vec()]), 100);
            let status = messages.next().await.expect("an end").expect_err("a bad one");
            assert!(status.message().contains(why), "{bytes:?}: {status}");
        }
    }

    #[tokio::test]
    async fn a_stream_ends_with_its_status_or_well() {
        for (end, code) in [(None, "0"), (Some(Status::unavailable("gone")), "14")] {
            let (sender, outgoing) = mpsc::channel(2);
            sender.send(Ok(named("one"))).await.expect("room");
            if let Some(status) = end {
                sender.send(Err(status)).await.expect("room");
            }
            drop(sender);
            let request = http::Request::builder().uri("http://c/s/M").body(Body::empty()).expect("request");
            let response = answer(request, "/s/M", 100, |_: Messages<DeltaDiscoveryRequest>| {
                Ok((http::HeaderMap::new(), outgoing))
            });
            let whole = response.into_body().collect().await.expect("all of it");
            assert_eq!(whole.trailers().expect("trailers")["grpc-status"], code);
            assert_eq!(whole.to_bytes(), framed(&named("one")));
        }
    }
}
