//! `control probe`: asks the control plane of the same pod whether it works, as kubelet's probes do.
//!
//! Control's HTTP is for the inside of its pod, where kubelet's own requests do not reach; and the image has no other program
//! that could ask. The answer has less time than kubelet gives the command.

use std::time::Duration;

use anyhow::bail;

use crate::cli::fetch;
use crate::config::{Asked, Probe};

/// Less than the probes of the chart, which wait 5 s and 10 s.
const DEADLINE: Duration = Duration::from_secs(4);

/// Asks, and gives what control said.
///
/// # Errors
/// It does not answer, or says that it does not work; kubelet shows the words.
pub fn probe(options: &Probe) -> anyhow::Result<()> {
    let path = match options.what {
        Asked::Live => "/healthz",
        Asked::Ready => "/readyz",
    };
    let base = format!("http://{}", options.http_listen);
    let (status, text) = fetch::status(&base, path, DEADLINE).map_err(|failure| anyhow::anyhow!(failure.text))?;
    if status != 200 {
        bail!("{}", text.trim());
    }
    Ok(())
}
