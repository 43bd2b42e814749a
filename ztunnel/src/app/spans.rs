//! The task that sends spans to the collector that the settings name.
//!
//! It outlives the drain, so that the spans of the last requests are sent too; the process waits a moment for it.

use std::time::Duration;

use anyhow::Context;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::config::Node;
use crate::http::export::{self, Collector};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::ALL;

/// How long the end of the process waits for spans. A collector that is away must not hold an update up.
const LAST: Duration = Duration::from_secs(2);

/// The task, if there is one.
pub(super) struct Exporter(Option<(oneshot::Sender<()>, JoinHandle<()>)>);

impl Exporter {
    /// Starts it where a collector is named.
    ///
    /// # Errors
    /// What is wrong with the settings.
    pub(super) fn start(config: &Node, metrics: &Metrics) -> anyhow::Result<Self> {
        let percent = config.trace_sampling;
        anyhow::ensure!(
            (0.0..=100.0).contains(&percent),
            "TULLE_TRACE_SAMPLING is {percent}; give a percentage from 0 to 100"
        );
        if config.otlp_endpoint.is_empty() {
            return Ok(Self(None));
        }
        let collector = Collector::parse(&config.otlp_endpoint)
            .map_err(anyhow::Error::msg)
            .context("OTEL_EXPORTER_OTLP_ENDPOINT")?;
        let share = (percent / 100.0 * f64::from(ALL)).round() as u32;
        let queue = metrics.spans.start(share).context("spans are sent twice")?;
        let (end, ended) = oneshot::channel::<()>();
        let sending = export::run(collector, metrics.spans.clone(), queue, async { drop(ended.await) });
        Ok(Self(Some((end, tokio::spawn(sending)))))
    }

    /// Sends what waits, if that can be done soon.
    pub(super) async fn finish(self) {
        let Some((end, task)) = self.0 else { return };
        drop(end);
        let _ = timeout(LAST, task).await;
    }
}
