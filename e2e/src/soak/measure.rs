//! What could grow: memory, descriptors and threads of each process, lines of rules in each pod; and a line through
//! points.
//!
//! Resident memory and not the allocator's own count: it is what the machine has to give.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Context;
use serde::Serialize;

use crate::bench;
use crate::lab::Lab;

/// One process at one moment.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Process {
    pub(super) resident_mb: f64,
    pub(super) descriptors: i64,
    pub(super) threads: usize,
}

/// Everything at one moment, while nothing goes on.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Sample {
    /// Since the beginning.
    pub(super) seconds: f64,
    /// By component.
    pub(super) processes: BTreeMap<String, Process>,
    /// Lines of `nft list ruleset`, by pod.
    pub(super) rules: BTreeMap<String, usize>,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, process) in &self.processes {
            let Process { resident_mb, descriptors, threads } = process;
            write!(f, "{name} {resident_mb:.1} MB {descriptors} fds {threads} threads  ")?;
        }
        write!(f, "{} lines of rules", self.rules.values().sum::<usize>())
    }
}

/// Looks at every process and every pod of the lab.
pub(super) fn sample(lab: &Lab, seconds: f64) -> anyhow::Result<Sample> {
    let view = lab.view()?;
    let mut processes = BTreeMap::new();
    for component in view.nodes.iter().chain([&view.control]) {
        let pid = component.pid.with_context(|| format!("{} does not run", component.name))?;
        let count = |what: &str| -> anyhow::Result<usize> {
            let path = format!("/proc/{pid}/{what}");
            Ok(std::fs::read_dir(&path).with_context(|| path.clone())?.count())
        };
        let resident_mb = bench::resident_bytes(pid)? as f64 / 1e6;
        let descriptors = i64::try_from(count("fd")?)?;
        processes.insert(component.name.clone(), Process { resident_mb, descriptors, threads: count("task")? });
    }
    let mut rules = BTreeMap::new();
    for pod in &view.pods {
        let name = format!("{}/{}", pod.namespace, pod.name);
        let lines = lab.exec_ok(&name, &["nft", "list", "ruleset"])?.lines().count();
        rules.insert(name, lines);
    }
    Ok(Sample { seconds, processes, rules })
}

/// A fitted line.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Line {
    /// Rise of y for one of x.
    pub(super) slope: f64,
    /// Standard error of the slope.
    pub(super) error: f64,
}

/// Least squares; `None` for fewer than three points, or all of one x.
pub(super) fn line(points: &[(f64, f64)]) -> Option<Line> {
    let n = points.len() as f64;
    if points.len() < 3 {
        return None;
    }
    let (mean_x, mean_y) =
        (points.iter().map(|(x, _)| x).sum::<f64>() / n, points.iter().map(|(_, y)| y).sum::<f64>() / n);
    let spread: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    if spread == 0.0 {
        return None;
    }
    let slope = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>() / spread;
    let rest: f64 = points.iter().map(|(x, y)| (y - mean_y - slope * (x - mean_x)).powi(2)).sum();
    Some(Line { slope, error: (rest / (n - 2.0) / spread).sqrt() })
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn a_line_is_found_with_its_error() {
        let exact: Vec<(f64, f64)> = (0..10).map(|x| (f64::from(x), 3.0 + 2.0 * f64::from(x))).collect();
        let found = line(&exact).unwrap();
        assert!((found.slope - 2.0).abs() < 1e-9 && found.error < 1e-9, "{found:?}");
        let noisy: Vec<(f64, f64)> = (0..10).map(|x| (f64::from(x), f64::from(x % 2))).collect();
        let found = line(&noisy).unwrap();
        assert!(found.slope.abs() < 0.1 && found.error > 0.03, "{found:?}");
        assert_eq!(line(&exact[..2]), None);
        assert_eq!(line(&[(1.0, 1.0); 5]), None);
    }
}
