//! Steps of a demonstration, whatever they are shown on: run one after another, said, written down, and judged.
//!
//! A step names the parts that its claim rests on; with one of them broken on purpose exactly those steps must fail.
//! Limits: steps share what they are shown on, so they run in their order and none twice.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use serde::Serialize;

/// Result of a step, as in the list of results.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Name of the step.
    pub step: &'static str,
    /// Whether its claim held.
    pub held: bool,
    /// What was seen, or why it did not.
    pub detail: String,
    /// How long it took.
    pub seconds: f64,
}

/// One step.
#[derive(Debug)]
pub struct Step<Show> {
    /// Name, stable.
    pub name: &'static str,
    /// What is claimed.
    pub claim: &'static str,
    /// Parts of the mesh on which the claim rests: broken, they must turn the step red.
    pub rests_on: &'static [&'static str],
    /// Shows it: what was seen, or why the claim does not hold.
    pub show: Show,
}

/// Runs all steps; fails at once when the one called `first` does not hold.
pub fn run<Show>(
    steps: &[Step<Show>],
    first: &str,
    mut call: impl FnMut(&Show) -> anyhow::Result<String>,
) -> anyhow::Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for one in steps {
        let outcome = step(one.name, one.claim, || call(&one.show));
        let held = outcome.held;
        outcomes.push(outcome);
        anyhow::ensure!(held || one.name != first, "`{first}` failed");
    }
    Ok(outcomes)
}

/// Runs one and says how it went.
pub fn step(name: &'static str, claim: &str, show: impl FnOnce() -> anyhow::Result<String>) -> Outcome {
    println!("\n{claim}");
    let began = Instant::now();
    let (held, detail) = match show() {
        Ok(detail) => (true, detail),
        Err(error) => (false, format!("{error:#}")),
    };
    let (sign, seconds) = (if held { "✓" } else { "✗" }, began.elapsed().as_secs_f64());
    println!("  {sign} {detail}  ({seconds:.1} s)");
    Outcome { step: name, held, detail, seconds }
}

/// Writes the list of results.
pub fn write(outcomes: &[Outcome], path: &Path) -> anyhow::Result<()> {
    std::fs::write(path, serde_json::to_string_pretty(outcomes)?)
        .with_context(|| format!("{} cannot be written", path.display()))
}

/// Says how it went; true when every step ended as it should.
pub fn summary<Show>(steps: &[Step<Show>], outcomes: &[Outcome], broken: Option<&str>, began: Instant) -> bool {
    let held = outcomes.iter().filter(|outcome| outcome.held).count();
    println!("\n{held} of {} steps held after {:.0} s.", outcomes.len(), began.elapsed().as_secs_f64());
    let wrong = misjudged(steps, outcomes, broken);
    for (step, expected) in &wrong {
        let expected = if *expected { "hold" } else { "fail" };
        println!("  ✗ `{step}` should {expected}");
    }
    match (broken, wrong.is_empty()) {
        (Some(part), true) => println!("Exactly the steps that rest on `{part}` failed: the demonstration can fail."),
        (Some(part), false) => println!("With `{part}` broken other steps failed than those that rest on it."),
        (None, _) => {}
    }
    wrong.is_empty()
}

/// Steps that did not end as they should, and whether they should have held.
fn misjudged<Show>(steps: &[Step<Show>], outcomes: &[Outcome], broken: Option<&str>) -> Vec<(&'static str, bool)> {
    let should_hold = |name: &str| {
        let step = steps.iter().find(|step| step.name == name);
        !step.is_some_and(|step| broken.is_some_and(|part| step.rests_on.contains(&part)))
    };
    outcomes
        .iter()
        .map(|outcome| (outcome.step, outcome.held, should_hold(outcome.step)))
        .filter(|(_, held, should)| held != should)
        .map(|(step, _, should)| (step, should))
        .collect()
}

#[cfg(test)]
mod tests {
    use crate::demo::judge::Outcome;
    use crate::demo::judge::Step;
    use crate::demo::judge::misjudged;

    #[test]
    fn a_sabotaged_run_is_right_only_when_exactly_its_own_steps_fail() {
        let step = |name, rests_on| Step { name, claim: "", rests_on, show: () };
        let steps = [step("a", &[][..]), step("b", &["tls"][..]), step("c", &["tls", "rules"][..])];
        let run = |red: &dyn Fn(&Step<()>) -> bool| -> Vec<Outcome> {
            let outcome =
                |step: &Step<()>| Outcome { step: step.name, held: !red(step), detail: String::new(), seconds: 0.0 };
            steps.iter().map(outcome).collect()
        };
        assert!(misjudged(&steps, &run(&|_| false), None).is_empty());
        for part in ["tls", "rules"] {
            assert!(misjudged(&steps, &run(&|step| step.rests_on.contains(&part)), Some(part)).is_empty());
            let green = run(&|_| false);
            assert!(!misjudged(&steps, &green, Some(part)).is_empty(), "{part}: a run that stays green is wrong");
            assert!(!misjudged(&steps, &run(&|_| true), Some(part)).is_empty(), "{part}: so is one that is all red");
        }
    }
}
