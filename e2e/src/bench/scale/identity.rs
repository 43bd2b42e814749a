//! The first connection of a pod that has just come: of an account that its node has already, and of one that is new to
//! it, so that the difference is what the first use of an identity costs (a key, a request, control's signature).
//!
//! Each pod connects as soon as its container starts, which is when it is captured, and says how long its first request
//! took; processor time runs from before the pods are made until all have said so, and so includes capturing them, the
//! same in both. Limits: pods come as fast as the lab makes them, so their certificates may be there before they ask.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::bench::Options;
use crate::bench::machine;
use crate::bench::note;
use crate::bench::report::Report;
use crate::bench::rows;
use crate::bench::scale::Place;
use crate::bench::scale::Size;
use crate::bench::scale::fail;
use crate::bench::scale::times;
use crate::bench::work::PORT_ONCE;
use crate::bench::world;
use crate::bench::world::Mesh;
use crate::eventually::eventually;
use crate::scenario;

/// The account of clients that the node has already.
const KNOWN: &str = "known";
/// For the pods to have connected, once they run.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a client's line begins with.
pub(in crate::bench) const SAID: &str = "first request, us: ";

/// A server, and a client whose account is known from then on.
fn objects(mesh: Mesh) -> String {
    let [near, far] = mesh.nodes;
    scenario::namespace(mesh.namespace, true)
        + &world::client(mesh.namespace, "resident", KNOWN, near)
        + &world::server(mesh.namespace, "server", far, "x")
}

/// Both kinds for each mesh.
pub(super) fn run(options: &Options, bin_dir: &Path, size: &Size, report: &mut Report) -> anyhow::Result<()> {
    let place = Place::start(options, bin_dir, objects)?;
    for (variant, mesh) in &place.meshes {
        // The first pods of all find cold code, whatever their account.
        batch(&place, *mesh, "warm", 2, false)?;
        for (test, name, new) in [
            ("a new pod connects, its account is known", "old", false),
            ("a new pod connects, its account is new (first use)", "new", true),
        ] {
            match batch(&place, *mesh, name, size.pods, new) {
                Ok((found, cpu)) => {
                    times(report, test, variant, &found);
                    for (metric, seconds) in rows::CPU_POD.into_iter().zip(cpu) {
                        note(report, test, metric, variant, seconds * 1e3 / found.len() as f64);
                    }
                    let records = scenario::log_lines(
                        &place.lab,
                        &format!("node-{}", mesh.nodes[1]),
                        &[&format!("/ns/{}/sa/{}", mesh.namespace, if new { "new-" } else { KNOWN }), ":9004"],
                    );
                    report.proven.push(format!(
                        "{variant}: {test}: {} pods were answered; the server's proxy has {} records of such accounts",
                        found.len(),
                        records.len()
                    ));
                    if records.len() < found.len() {
                        fail(
                            report,
                            test,
                            variant,
                            format!("{} pods connected, {} records name them", found.len(), records.len()),
                        );
                    }
                }
                Err(error) => fail(report, test, variant, format!("{error:#}")),
            }
        }
    }
    Ok(())
}

/// Makes pods at once; milliseconds of each first request, and seconds of CPU of both proxies and control.
fn batch(place: &Place, mesh: Mesh, name: &str, count: usize, new: bool) -> anyhow::Result<(Vec<f64>, [f64; 3])> {
    let (lab, namespace, [near, far]) = (&place.lab, mesh.namespace, mesh.nodes);
    let to = lab.pod_ip(namespace, "server")?;
    let mut text = String::new();
    for index in 0..count {
        let account = if new { format!("{name}-{index}") } else { KNOWN.to_owned() };
        text += &format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}-{index}, namespace: {namespace}}}\n\
             spec:\n  nodeName: node-{near}\n  serviceAccountName: {account}\n  containers:\n  - name: main\n    image: none\n\
             \x20   command: [lab, bench-agent, first, --to, '{to}:{PORT_ONCE}']\n"
        );
    }
    let pids = [place.proxy(near)?, place.proxy(far)?, place.control()?];
    let sample = || -> anyhow::Result<Vec<f64>> { pids.iter().map(|pid| machine::cpu_seconds(*pid)).collect() };
    let before = sample()?;
    lab.apply_yaml(&text)?;
    let found = eventually("each new pod has said how long its first request took", PATIENCE, || {
        (0..count).map(|index| said(place, namespace, &format!("{name}-{index}"))).collect::<anyhow::Result<Vec<f64>>>()
    })?;
    let after = sample()?;
    Ok((found, [0, 1, 2].map(|index| after[index] - before[index])))
}

/// Milliseconds that a pod's first request took, by its log.
fn said(place: &Place, namespace: &str, pod: &str) -> anyhow::Result<f64> {
    let logs = place.lab.paths().logs();
    let log = std::fs::read_to_string(logs.join(format!("{namespace}_{pod}.log"))).unwrap_or_default();
    let line = log.lines().find_map(|line| line.strip_prefix(SAID));
    let microseconds = line.with_context(|| format!("{pod} said {:?}", log.trim()))?;
    Ok(microseconds.trim().parse::<f64>()? / 1e3)
}
