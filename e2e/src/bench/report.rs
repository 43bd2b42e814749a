//! The outcome: a table for people, in Markdown so that it can go into the documentation as it is, and a JSON file for
//! everything else.
//!
//! Every value of every round is in the file, failed proofs are in both, and a row that failed carries no figure in the
//! table, since a number that is not proven is worse than none. Limits: no judgement of noise but the share of the
//! processor that others took.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value;
use serde_json::json;

use crate::bench::machine::Machine;
use crate::bench::rows::Better;
use crate::bench::rows::Values;
use crate::bench::rows::in_table;
use crate::bench::rows::median;
use crate::bench::rows::shape;

/// Whom the rows of a load compare ours with.
fn other(load: &str) -> &'static str {
    if load.starts_with(super::l7::NAMED) { super::ENVOY } else { super::PEER }
}

/// A failed proof.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Failure {
    /// Load; empty: of the whole run.
    pub(super) test: String,
    /// Variant.
    pub(super) variant: &'static str,
    /// What is wrong.
    pub(super) wrong: String,
}

/// Everything there is to tell.
#[derive(Debug)]
pub(super) struct Report {
    /// Where.
    pub(super) machine: Machine,
    /// The code that the programs were built from.
    pub(super) built_from: String,
    /// How.
    pub(super) settings: Value,
    /// Those that were run.
    pub(super) variants: Vec<&'static str>,
    /// Which peer, or why none.
    pub(super) peer: String,
    /// Which Envoy, or why none.
    pub(super) envoy: String,
    /// Figures in the order of each load's.
    pub(super) order: Vec<(String, &'static str)>,
    /// Values.
    pub(super) values: Values,
    /// Failed proofs.
    pub(super) failures: BTreeSet<Failure>,
    /// Share of the processors that other processes used during each load and variant, 0 to 1.
    pub(super) others: BTreeMap<(String, &'static str), Vec<f64>>,
    /// What was proven, in words.
    pub(super) proven: Vec<String>,
}

impl Report {
    /// The median of a figure, unless its proof failed.
    fn figure(&self, row: &(String, &'static str), variant: &'static str) -> Option<f64> {
        median(self.values.get(row)?.get(variant)?)
    }

    fn failed(&self, test: &str, variant: &str) -> bool {
        self.failures
            .iter()
            .any(|failure| failure.variant == variant && (failure.test.is_empty() || failure.test == test))
    }

    fn cell(&self, row: &(String, &'static str), variant: &'static str) -> String {
        if self.failed(&row.0, variant) {
            return "FAILED".to_owned();
        }
        if !self.variants.contains(&variant) {
            return "no binary".to_owned();
        }
        let (digits, _) = shape(row.1);
        self.figure(row, variant).map_or_else(|| "–".to_owned(), |value| thousands(value, digits))
    }

    /// Our median by the other's; the word says when that is worse.
    fn ratio(&self, row: &(String, &'static str), other: &'static str) -> String {
        let failed = [super::TULLE, other].iter().any(|variant| self.failed(&row.0, variant));
        let (Some(ours), Some(theirs)) = (self.figure(row, super::TULLE), self.figure(row, other)) else {
            return "–".to_owned();
        };
        if failed || theirs == 0.0 {
            return "–".to_owned();
        }
        let ratio = ours / theirs;
        let (_, better) = shape(row.1);
        let worse = (better == Better::Higher && ratio < 1.0) || (better == Better::Lower && ratio > 1.0);
        format!("{ratio:.2} ×{}", if worse && other != super::DIRECT { " (worse)" } else { "" })
    }

    /// The table of what compares with `against`; empty when nothing of it ran.
    pub(super) fn table(&self, against: &'static str) -> String {
        // Columns, whether or not there is another one; and what ours is divided by.
        let (columns, ratios) = ([super::DIRECT, super::TULLE, against], [super::DIRECT, against]);
        if !self.order.iter().any(|row| other(&row.0) == against) {
            return String::new();
        }
        let mut rows: Vec<Vec<String>> = vec![vec!["load".into(), "figure".into()]];
        rows[0].extend(columns.map(str::to_owned));
        rows[0].extend(ratios.map(|against| format!("{} : {against}", super::TULLE)));
        let mut last = "";
        for row in self.order.iter().filter(|row| in_table(row.1) && other(&row.0) == against) {
            let name = if row.0 == last { String::new() } else { row.0.clone() };
            last = &row.0;
            let mut cells = vec![name, row.1.to_owned()];
            cells.extend(columns.map(|variant| self.cell(row, variant)));
            cells.extend(ratios.map(|against| self.ratio(row, against)));
            rows.push(cells);
        }
        let count = rows[0].len();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
        let widths: Vec<usize> = (0..count).map(width).collect();
        let mut text = String::new();
        for (index, row) in rows.iter().enumerate() {
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let pad = " ".repeat(width - cell.chars().count());
                // Numbers to the right.
                text += &if column < 2 { format!("| {cell}{pad} ") } else { format!("| {pad}{cell} ") };
            }
            text += "|\n";
            if index == 0 {
                for (column, width) in widths.iter().enumerate() {
                    text += &format!("|{}{}", "-".repeat(width + 1), if column < 2 { "-" } else { ":" });
                }
                text += "|\n";
            }
        }
        text
    }

    /// What is to be said below the table.
    pub(super) fn notes(&self) -> String {
        let machine = &self.machine;
        let mut text = format!(
            "machine: {} × {}, {} MiB, Linux {}, load before {:.1}, nice {}\nbuilt from: {}\nsettings: {}\n",
            machine.cpus,
            machine.cpu,
            machine.memory_mib,
            machine.kernel,
            machine.load_before,
            machine.nice,
            self.built_from,
            self.settings
        );
        text += &format!("peer: {}\nenvoy: {}\n", self.peer, self.envoy);
        let others: Vec<f64> = self.others.values().flatten().copied().collect();
        let worst = others.iter().copied().fold(0.0, f64::max);
        text += &format!(
            "other processes used {:.0} % of the processors (median; at most {:.0} % in one part)\n",
            median(&others).unwrap_or_default() * 100.0,
            worst * 100.0
        );
        self.proven.iter().for_each(|line| text += &format!("proven: {line}\n"));
        for Failure { test, variant, wrong } in &self.failures {
            let test = if test.is_empty() { "the whole run" } else { test };
            text += &format!("FAILED: {variant}, {test}: {wrong}\n");
        }
        text
    }

    /// Everything, for programs.
    pub(super) fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .order
            .iter()
            .map(|row| {
                let variants: serde_json::Map<String, Value> = self
                    .variants
                    .iter()
                    .filter_map(|variant| {
                        let values = self.values.get(row)?.get(variant)?;
                        let held = !self.failed(&row.0, variant);
                        let others = self.others.get(&(row.0.clone(), *variant));
                        let value = json!({"median": median(values), "values": values, "proven": held, "others": others});
                        Some(((*variant).to_owned(), value))
                    })
                    .collect();
                json!({"load": row.0, "figure": row.1, "better": format!("{:?}", shape(row.1).1).to_lowercase(), "variants": variants})
            })
            .collect();
        json!({
            "machine": self.machine,
            "built_from": self.built_from,
            "settings": self.settings,
            "peer": self.peer,
            "envoy": self.envoy,
            "rows": rows,
            "proven": self.proven,
            "failures": self.failures,
        })
    }
}

/// A number with commas, as people read it.
fn thousands(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.find('.').map_or((text.as_str(), ""), |at| text.split_at(at));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 && digit.is_ascii_digit() {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::collections::BTreeSet;

    use crate::bench::machine;
    use crate::bench::report::Failure;
    use crate::bench::report::Report;
    use crate::bench::report::thousands;

    fn report() -> Report {
        let row = ("upload, 1 stream".to_owned(), "Gbit/s");
        let values = BTreeMap::from([("direct", vec![20.0, 30.0, 25.0]), ("tulle", vec![5.0])]);
        Report {
            machine: machine::describe(),
            built_from: "abc".to_owned(),
            settings: serde_json::json!({}),
            variants: vec!["direct", "tulle"],
            peer: "no peer binary".to_owned(),
            envoy: "no Envoy".to_owned(),
            order: vec![row.clone()],
            values: BTreeMap::from([(row, values)]),
            failures: BTreeSet::new(),
            others: BTreeMap::new(),
            proven: vec![],
        }
    }

    #[test]
    fn the_table_shows_medians_and_the_ratio() {
        let table = report().table("peer");
        assert!(table.lines().nth(2).is_some_and(|line| line.contains("25.00") && line.contains("0.20 ×")), "{table}");
    }

    #[test]
    fn without_a_peer_each_row_says_so() {
        assert!(report().table("peer").lines().nth(2).is_some_and(|line| line.contains("no binary")));
        let mut report = report();
        report.variants.push("peer");
        let values = report.values.values_mut().next();
        values.map(|values| values.insert("peer", vec![10.0]));
        assert!(report.table("peer").contains("0.50 × (worse)"), "{}", report.table("peer"));
    }

    #[test]
    fn requests_are_in_a_table_of_their_own() {
        let mut report = report();
        assert_eq!(report.table("envoy"), "");
        let row = ("HTTP, 1 connection".to_owned(), "requests/s");
        report.values.insert(row.clone(), BTreeMap::from([("tulle", vec![5.0]), ("envoy", vec![10.0])]));
        report.order.push(row);
        report.variants.push("envoy");
        let table = report.table("envoy");
        assert!(table.contains("0.50 × (worse)") && !table.contains("upload"), "{table}");
        assert!(!report.table("peer").contains("HTTP"));
    }

    #[test]
    fn a_row_whose_proof_failed_has_no_figure() {
        let mut report = report();
        let wrong = "payload was found".to_owned();
        report.failures.insert(Failure { test: "upload, 1 stream".to_owned(), variant: "tulle", wrong });
        assert!(report.table("peer").contains("FAILED") && !report.table("peer").contains(" 5.00 "));
        assert!(report.notes().contains("payload was found"));
        assert_eq!(report.json()["rows"][0]["variants"]["tulle"]["proven"], false);
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(thousands(1234567.891, 1), "1,234,567.9");
        assert_eq!(thousands(999.0, 0), "999");
        assert_eq!(thousands(-1000.0, 0), "-1,000");
    }
}
