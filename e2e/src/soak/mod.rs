//! `lab soak`: hours of mixed churn under load, and the proof that nothing is kept that should have gone.
//!
//! Segments of some twenty seconds. In each, three clients are under the oracle of [`crate::oracle`] while policy and
//! endpoints change every 100 ms, pods come and go, clients are killed in the middle of a transfer, and in some control
//! or a certificate is replaced. Then the world is put back as it was, and once no tunnel is left everything that could
//! grow is counted. After a warm-up, memory must not rise (by regression), and open files and rules must be as many as
//! after the first segment. Limits: what leaks only after more time than the run is not seen; under
//! [`JUDGED_FROM`] memory is reported and not judged.

mod measure;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::PoisonError;
use std::sync::RwLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rand::RngExt;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Serialize;
use serde_json::json;

use crate::bench;
use crate::eventually::eventually;
use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::lab::programs_dir;
use crate::oracle;
use crate::scenario;
use crate::soak::measure::Line;
use crate::soak::measure::Sample;

/// Churn of one segment; its reports stay in memory until it is judged.
const CHURN: Duration = Duration::from_secs(15);
/// Part of the run whose memory does not count.
const WARM_UP: f64 = 0.34;
/// Shorter runs have too few samples for a slope in MB per hour.
const JUDGED_FROM: Duration = Duration::from_secs(10 * 60);
/// Most that memory may rise, MB per hour.
const MOST_RISE: f64 = 1.0;
/// Descriptors that come and go by themselves (a stream to control, a file that is being read).
const DESCRIPTOR_SLACK: i64 = 8;
/// Guests alive at a time.
const GUESTS: usize = 4;
/// Every so many segments control is killed, and every so many the intermediate is replaced.
const KILL_EVERY: usize = 5;
const ROTATE_EVERY: usize = 7;

/// Arguments of `lab soak`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How long.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Repeats a run's choices [default: by chance].
    #[arg(long)]
    seed: Option<u64>,
    /// Where samples and verdict go.
    #[arg(long, default_value = "target/soak.json")]
    json: PathBuf,
}

/// What a run did, and whether it held.
#[derive(Debug, Default, Serialize)]
struct Totals {
    segments: usize,
    requests: usize,
    flips: usize,
    pods: usize,
    clients_killed: usize,
    control_killed: usize,
    rotations: usize,
    slowest_answer_ms: f64,
}

/// Runs it; exit code 0 if everything held.
pub fn main(options: &Options) -> anyhow::Result<ExitCode> {
    let seed = options.seed.unwrap_or_else(rand::random::<u64>);
    let built_from = bench::built_from(&programs_dir()?);
    println!("soak of {} minutes, seed {seed}, built from {built_from}", options.minutes);
    let config = LabConfig::of(&oracle::world()).env("ztunnel", "SECRET_TTL", "60s").env(
        "ztunnel",
        "POOL_UNUSED_RELEASE_TIMEOUT",
        "2s",
    );
    let lab = Lab::up(config)?;
    let mut run = Run {
        random: StdRng::seed_from_u64(seed),
        length: Duration::from_secs_f64(options.minutes * 60.0),
        began: Instant::now(),
        totals: Totals::default(),
        samples: Vec::new(),
        lab,
    };
    let mut broken = match run.segments() {
        Ok(()) => Vec::new(),
        Err(error) => vec![format!("segment {}: {error:#}", run.totals.segments + 1)],
    };
    let slopes = run.slopes();
    broken.extend(run.judge(&slopes));
    let report = json!({
        "seed": seed, "built_from": built_from, "minutes": run.began.elapsed().as_secs_f64() / 60.0,
        "totals": run.totals, "held": broken.is_empty(), "broken": broken,
        "memory_mb_per_hour": slopes, "samples": run.samples,
    });
    if let Some(folder) = options.json.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&options.json, serde_json::to_string_pretty(&report)?)?;
    println!("{}", serde_json::to_string(&run.totals)?);
    for (component, line) in &slopes {
        println!("{component}: memory rises by {:.2} ± {:.2} MB/h", line.slope, line.error);
    }
    for one in &broken {
        println!("NOT HELD: {one}");
    }
    println!("{}; samples are in {}", if broken.is_empty() { "held" } else { "not held" }, options.json.display());
    Ok(if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Run {
    lab: Lab,
    random: StdRng,
    length: Duration,
    began: Instant,
    totals: Totals,
    samples: Vec<Sample>,
}

impl Run {
    fn segments(&mut self) -> anyhow::Result<()> {
        let (addresses, denying) = oracle::begin(&self.lab)?;
        while self.samples.is_empty() || self.began.elapsed() < self.length {
            self.segment(&addresses, &denying)?;
            self.totals.segments += 1;
        }
        Ok(())
    }

    fn segment(&mut self, addresses: &[(String, String)], denying: &str) -> anyhow::Result<()> {
        let number = self.totals.segments + 1;
        let kill = number.is_multiple_of(KILL_EVERY);
        if number.is_multiple_of(ROTATE_EVERY) {
            self.lab.exec_ok("control", &["control", "rotate", "intermediate"])?;
            self.totals.rotations += 1;
        }
        let url = ["http://flux.shop/"];
        let loads = [("shop/web", 40.0), ("shop/other", 20.0), ("shop/flip", 40.0)];
        let mut running = Vec::new();
        for (client, rate) in loads {
            running.push(self.lab.load(client, &url, rate, &oracle::PATIENT)?);
        }
        let (seed, random) = (self.random.random(), &mut self.random);
        let (lab, stop, calm) = (&self.lab, AtomicBool::new(false), RwLock::new(()));
        let (pods, killed, flips) = std::thread::scope(|scope| {
            let guests = scope.spawn(|| guests(lab, seed, &stop, &calm));
            let rude = scope.spawn(|| rude(lab, &stop));
            let churned = churn(lab, random, addresses, kill.then_some(&calm));
            stop.store(true, Ordering::Relaxed);
            let panicked = |_| anyhow::anyhow!("a part of the churn panicked");
            let guests = guests.join().map_err(panicked)?;
            let rude = rude.join().map_err(panicked)?;
            anyhow::Ok((guests?, rude?, churned?))
        })?;
        let mut reports = Vec::new();
        for load in running {
            reports.push(load.finish()?);
        }
        let changes = oracle::versions(&self.lab)?;
        oracle::judge(&reports[0], &reports[1], &reports[2], &changes, denying)?;
        let slowest = oracle::slowest_ms(reports.iter().flatten());
        self.totals.slowest_answer_ms = self.totals.slowest_answer_ms.max(slowest);
        self.totals.requests += reports.iter().map(Vec::len).sum::<usize>();
        self.totals.flips += flips;
        self.totals.control_killed += usize::from(kill);
        self.totals.pods += pods;
        self.totals.clients_killed += killed;
        // As it was at the beginning; the version that allows is in force.
        oracle::flip(&self.lab, false)?;
        oracle::endpoints(&self.lab, addresses, &[true; 3])?;
        let sample = self.quiet()?;
        let minutes = self.began.elapsed().as_secs_f64() / 60.0;
        println!("{number:>4}  {minutes:>5.1} min  {sample}  slowest answer {slowest:.0} ms");
        self.samples.push(sample);
        Ok(())
    }

    /// Waits until no connection and no tunnel is left, and counts.
    fn quiet(&self) -> anyhow::Result<Sample> {
        eventually("connections and tunnels end", Duration::from_secs(60), || {
            for node in ["node-1", "node-2"] {
                let status = self.lab.node_admin(node, "/status").map_err(|error| error.to_string())?;
                for what in ["inboundConnections", "outboundConnections", "tunnels"] {
                    if status[what] != 0 {
                        return Err(format!("{node} has {} {what}", status[what]));
                    }
                }
            }
            Ok(())
        })?;
        measure::sample(&self.lab, self.began.elapsed().as_secs_f64())
    }

    /// Rise of memory of each process after the warm-up.
    fn slopes(&self) -> Vec<(String, Line)> {
        let from = self.samples.last().map_or(0.0, |last| last.seconds * WARM_UP);
        let components = self.samples.first().map(|first| first.processes.keys()).into_iter().flatten();
        components
            .filter_map(|component| {
                let points: Vec<(f64, f64)> = self
                    .samples
                    .iter()
                    .filter(|sample| sample.seconds >= from)
                    .filter_map(|sample| Some((sample.seconds / 3600.0, sample.processes.get(component)?.resident_mb)))
                    .collect();
                Some((component.clone(), measure::line(&points)?))
            })
            // Control is a new process whenever it was killed.
            .filter(|(component, _)| component != "control" || self.totals.control_killed == 0)
            .collect()
    }

    fn judge(&self, slopes: &[(String, Line)]) -> Vec<String> {
        let mut broken = Vec::new();
        let (Some(first), Some(last)) = (self.samples.first(), self.samples.last()) else {
            return vec!["no segment was completed".to_owned()];
        };
        for (pod, rules) in &first.rules {
            let now = last.rules.get(pod).copied().unwrap_or_default();
            if now != *rules {
                broken.push(format!("{pod} has {now} lines of rules, {rules} at the beginning"));
            }
        }
        for (component, before) in &first.processes {
            let now = last.processes.get(component).map_or(0, |it| it.descriptors);
            if now > before.descriptors + DESCRIPTOR_SLACK {
                broken.push(format!("{component} has {now} open files, {} at the beginning", before.descriptors));
            }
        }
        if self.began.elapsed() < JUDGED_FROM {
            println!("memory is not judged: a run of less than {} minutes", JUDGED_FROM.as_secs() / 60);
            return broken;
        }
        let rising = |(_, line): &&(String, Line)| line.slope - 2.0 * line.error > 0.0 && line.slope > MOST_RISE;
        broken.extend(slopes.iter().filter(rising).map(|(component, line)| {
            format!(
                "memory of {component} rises by {:.2} ± {:.2} MB/h, at most {MOST_RISE} is allowed",
                line.slope, line.error
            )
        }));
        broken
    }
}

/// Policy and endpoints, every 100 ms; with `kill` control is killed and started again in the middle, while nobody waits
/// for it to publish something.
fn churn(
    lab: &Lab,
    random: &mut StdRng,
    addresses: &[(String, String)],
    mut kill: Option<&RwLock<()>>,
) -> anyhow::Result<usize> {
    let (began, mut flips) = (Instant::now(), 0);
    while began.elapsed() < CHURN {
        oracle::flip(lab, flips % 2 == 0)?;
        flips += 1;
        let mut present = [random.random::<bool>(), random.random(), random.random()];
        present[random.random_range(0..3)] = true;
        oracle::endpoints(lab, addresses, &present)?;
        if let Some(calm) = kill.filter(|_| began.elapsed() > CHURN / 2) {
            kill = None;
            // A waiting writer comes before new readers, so this is not put off for ever.
            let _calm = calm.write().unwrap_or_else(PoisonError::into_inner);
            lab.kill("control", "KILL")?;
            lab.restart("control")?;
        }
        let next = began + oracle::CHANGE_EVERY * u32::try_from(flips)?;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(flips)
}

/// Pods of the mesh come and go; in the end none is left. Gives their number. Each change holds `calm`: without control
/// it could not be waited for.
fn guests(lab: &Lab, seed: u64, stop: &AtomicBool, calm: &RwLock<()>) -> anyhow::Result<usize> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut alive: Vec<String> = Vec::new();
    let mut made = 0;
    while !stop.load(Ordering::Relaxed) {
        let _calm = calm.read().unwrap_or_else(PoisonError::into_inner);
        if alive.len() < GUESTS {
            // Names come again: a new pod with an old name is the hard case.
            let free = (made..made + 7).map(|n| format!("guest-{}", n % 7)).find(|name| !alive.contains(name));
            let Some(name) = free else { continue };
            lab.apply_yaml(&scenario::client("shop", &name, random.random_range(1..=2)))?;
            alive.push(name);
            made += 1;
        } else {
            let gone = alive.remove(random.random_range(0..alive.len()));
            lab.delete("pod", &format!("shop/{gone}"))?;
        }
    }
    for name in alive {
        lab.delete("pod", &format!("shop/{name}"))?;
    }
    Ok(made)
}

/// Clients that are killed while they wait or read. Gives their number.
fn rude(lab: &Lab, stop: &AtomicBool) -> anyhow::Result<usize> {
    let mut killed = 0;
    while !stop.load(Ordering::Relaxed) {
        let argv = ["shop", "call", "http://flux.shop/", "--count", "1000", "--json"];
        let running = lab.spawn("shop/web", &argv)?;
        std::thread::sleep(Duration::from_millis(150));
        drop(running);
        killed += 1;
    }
    Ok(killed)
}
