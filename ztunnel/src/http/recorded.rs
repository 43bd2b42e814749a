//! An answer whose end finishes its record. Both sides of the mesh end theirs here, so that a request counts once on each and
//! the words for how it ended are the same.

use http::Response;

use crate::http::{Body, End, grpc_status};
use crate::telemetry::HttpRecord;

/// The answer on its way to the client. The record is finished when its body is over, however it ends.
pub fn recorded(response: Response<Body>, mut record: HttpRecord) -> Response<Body> {
    record.answered(response.status().as_u16());
    if record.grpc_status.is_none() && record.grpc {
        record.grpc_status = grpc_status(response.headers());
    }
    response.map(|body| {
        body.then(move |ended| {
            record.response_bytes = ended.bytes;
            record.grpc_status = ended.grpc_status.clone().or_else(|| record.grpc_status.take());
            match &ended.end {
                End::Complete => {}
                End::Failed(text) => {
                    record.flag = "UC";
                    record.error = Some(text.as_str().into());
                }
                End::Dropped => record.flag = "DC",
            }
            record.finish();
        })
    })
}
