//! Copies of requests for `RequestMirror`: sent beside the request, read and forgotten.
//!
//! A copy waits for its body to have passed, and nobody waits for a copy: a mirror that is slow or dead loses copies and
//! nothing else. Their number and their time are bounded.

use std::rc::Rc;
use std::time::Duration;

use http::request::Parts;
use tokio::time::Instant;

use crate::http::Original;
use crate::http::server::Switches;
use crate::outbound::ask::Known;
use crate::outbound::forward::{Job, Target};
use crate::outbound::requests::Client;
use crate::route::Forward;

/// Copies of requests of one client connection that are under way: a mirror that is slow loses copies and nothing else.
const MIRRORED: usize = 16;

/// How long a copy may take altogether.
const MIRROR_TIME: Duration = Duration::from_secs(15);

impl Client {
    /// Sends copies, as soon as the body has passed if there is one. Nobody waits for them.
    pub(super) fn mirror(self: &Rc<Self>, known: &Known, forward: &Forward, parts: &Parts, original: &Original) {
        for mirror in forward.mirrors() {
            if self.copies.get() >= MIRRORED {
                tracing::debug!(service = %mirror.service.hostname, "a mirror is too slow; a copy is left out");
                continue;
            }
            self.copies.set(self.copies.get() + 1);
            let (client, snapshot, source) = (self.clone(), known.snapshot.clone(), known.source.clone());
            let (mirror, parts, original) = (mirror.clone(), parts.clone(), original.clone());
            crate::base::workers::spawn(async move {
                let copy = async {
                    // Asked for here, so that the request itself does not wait for it.
                    let Ok(to) = client.target(&snapshot, &source, &mirror.service, mirror.port).await else { return };
                    client.copy(to, parts, original).await;
                };
                let _ = tokio::time::timeout(MIRROR_TIME, copy).await;
                client.copies.set(client.copies.get() - 1);
            });
        }
    }

    async fn copy(&self, to: Target, parts: Parts, original: Original) {
        let Some(body) = original.passed().await else { return };
        let mut record = self.empty_record(&to.known.snapshot);
        record.attempts = 1;
        let job = Job {
            client: self,
            to,
            parts,
            original: Original::of(body),
            switch: false,
            keep: false,
            retry: None,
            deadline: Some(Instant::now() + MIRROR_TIME),
            attempt: None,
            hash: None,
            session: None,
        };
        let Ok(response) = job.run(Switches::default(), &mut record).await else { return };
        record.answered(response.status().as_u16());
        // Read and forgotten, so that the connection can be used again.
        let mut body = response.into_body();
        while let Some(Ok(_)) = http_body_util::BodyExt::frame(&mut body).await {}
    }
}
