//! Brings the roots of federated trust domains from the snapshot to where handshakes and open tunnels ask for them.
//! There is one task for it, because snapshots are what control says and know nothing of TLS.

use crate::state::Reader;
use crate::tls::Federated;

/// Takes over every change, until nothing writes snapshots any more.
pub async fn watch(reader: Reader, federated: Federated) {
    // Subscribed before the first look, so that no change falls between.
    let mut changes = reader.subscribe();
    loop {
        let bundles = reader.load().trust().clone();
        let domains: Vec<&str> = bundles.iter().map(|(domain, _)| domain).collect();
        let domains = domains.join(", ");
        if federated.replace(bundles) {
            tracing::info!(domains, "took over the roots of federated trust domains");
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}
