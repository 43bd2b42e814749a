//! How long after an object was written its effect is there, with a crowd known.
//!
//! Two kinds: a pod becomes unready or ready again, and a client on another node finds its Service refusing or
//! answering (the client's proxy balances); a policy begins or ceases to deny that client (the server's proxy refuses).
//! Time runs from before the file is put in place until the end of the client's first try with the new verdict: control
//! noticing, reading, translating and sending, the proxy applying, and a connection. Limits: late by at most one try.

use std::io::BufRead;
use std::io::BufReader;
use std::path::Path;
use std::path::PathBuf;
use std::process::ChildStdout;
use std::time::Duration;

use anyhow::Context;
use rand::RngExt;
use serde_json::Value;
use serde_json::json;

use crate::bench::Options;
use crate::bench::report::Report;
use crate::bench::scale::Place;
use crate::bench::scale::Size;
use crate::bench::scale::fail;
use crate::bench::scale::times;
use crate::bench::scale::watch;
use crate::bench::scale::watch::Verdict;
use crate::bench::work::PORT_ONCE;
use crate::bench::world::Mesh;
use crate::lab::Lab;
use crate::lab::Running;
use crate::scenario;
use crate::state::replace;

/// Between an effect and the next event; by chance, so that no period of control or of the client is met.
const REST_MS: std::ops::Range<u64> = 30..90;

/// A client on the first node, a server behind a Service on the second.
fn objects(mesh: Mesh) -> String {
    let namespace = mesh.namespace;
    let [near, far] = mesh.nodes;
    let mut text = scenario::namespace(namespace, true) + &scenario::client(namespace, "client", near);
    text += &crate::bench::world::server(namespace, "server", far, "x");
    text += &format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: server, namespace: {namespace}}}\n\
         spec: {{selector: {{app: server}}, ports: [{{port: {PORT_ONCE}}}]}}\n"
    );
    text
}

/// Both kinds for each mesh.
pub(super) fn run(options: &Options, bin_dir: &Path, size: &Size, report: &mut Report) -> anyhow::Result<()> {
    let place = Place::start(options, bin_dir, objects)?;
    let crowd = size.workloads[0];
    place.grow(0, crowd)?;
    let pods = format!("a pod becomes ready or unready, {crowd} workloads known");
    let policies = format!("a policy begins or ceases to deny, {crowd} workloads known");
    for (variant, mesh) in &place.meshes {
        let mut client = Client::start(&place.lab, mesh.namespace)?;
        for (test, kind) in [(&pods, Event::Pod), (&policies, Event::Policy)] {
            let events = Events::prepare(&place.lab, mesh.namespace, kind)?;
            match client.measure(&events, size.events) {
                Ok(found) => {
                    times(report, test, variant, &found);
                    report.proven.push(format!(
                        "{variant}: {test}: {} times, each followed by its effect and no other",
                        found.len()
                    ));
                }
                Err(error) => fail(report, test, variant, format!("{error:#}")),
            }
            events.end()?;
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Event {
    Pod,
    Policy,
}

/// A file and its two texts.
struct Events {
    path: PathBuf,
    /// With the first the server answers, with the second not.
    texts: [String; 2],
    /// The lab's own file stays.
    keep: bool,
}

impl Events {
    fn prepare(lab: &Lab, namespace: &str, kind: Event) -> anyhow::Result<Self> {
        let folder = lab.paths().objects().join(namespace);
        Ok(match kind {
            Event::Pod => {
                let path = folder.join("pod-server.yaml");
                let text =
                    std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
                let mut pod: Value = serde_saphyr::from_str(&text)?;
                pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
                // JSON is YAML.
                Self { path, texts: [text, pod.to_string()], keep: true }
            }
            Event::Policy => {
                let of = |account: &str| {
                    let rules = format!(
                        "[{{from: [{{source: {{principals: ['cluster.local/ns/{namespace}/sa/{account}']}}}}]}}]"
                    );
                    scenario::authorization(namespace, "event", "server", "DENY", &rules)
                };
                let this = Self { path: folder.join("event.yaml"), texts: [of("nobody"), of("client")], keep: false };
                this.put(true)?;
                this
            }
        })
    }

    fn put(&self, answers: bool) -> anyhow::Result<()> {
        Ok(replace(&self.path, &self.texts[usize::from(!answers)])?)
    }

    /// As it was.
    fn end(&self) -> anyhow::Result<()> {
        if self.keep { self.put(true) } else { Ok(std::fs::remove_file(&self.path)?) }
    }
}

/// The client that tries all the time.
struct Client {
    running: Running,
    lines: BufReader<ChildStdout>,
    verdict: bool,
}

impl Client {
    fn start(lab: &Lab, namespace: &str) -> anyhow::Result<Self> {
        let view = lab.view()?;
        let service = view.services.iter().find(|it| it.namespace == namespace && it.name == "server");
        let address = service.and_then(|service| service.addresses.first()).context("the Service has no address")?;
        let to = format!("{address}:{PORT_ONCE}");
        let mut running = lab.spawn(&format!("{namespace}/client"), &["lab", "bench-agent", "watch", "--to", &to])?;
        let child = running.child().context("the client has ended")?;
        let lines = BufReader::new(child.stdout.take().context("no output of the client")?);
        let mut this = Self { running, lines, verdict: true };
        // Its first try may come before everybody knows the Service.
        while !this.next()?.answered {}
        Ok(this)
    }

    /// The next change. The client ends itself when none comes for long, so this ends too.
    fn next(&mut self) -> anyhow::Result<Verdict> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        let verdict: Verdict = serde_json::from_str(&line).context("the client ended: no effect came in time")?;
        self.verdict = verdict.answered;
        Ok(verdict)
    }

    /// Milliseconds from each event to its effect.
    fn measure(&mut self, events: &Events, count: usize) -> anyhow::Result<Vec<f64>> {
        let mut found = Vec::with_capacity(count);
        for index in 0..count {
            std::thread::sleep(Duration::from_millis(rand::rng().random_range(REST_MS)));
            let wanted = !self.verdict;
            let began = watch::now_ns()?;
            events.put(wanted)?;
            let seen = self.next().with_context(|| format!("event {}", index + 1))?;
            // A verdict that changed before its event, or back again, is not an effect.
            anyhow::ensure!(
                seen.answered == wanted && seen.at_ns > began,
                "the verdict changed without an event after {index} events"
            );
            found.push((seen.at_ns - began) as f64 / 1e6);
        }
        Ok(found)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(child) = self.running.child() {
            drop(child.stdin.take());
        }
    }
}
