//! `control rotate`: one step of replacing the root, or the intermediate, in the CA directory.
//!
//! It works on the files, and the running control takes them over within seconds. Whether a step is safe is asked of
//! control, which asks the nodes; without an answer only time makes it safe (24 h, the life of a leaf).

use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::bail;
use serde_json::Value;
use tulle_certs::ca::Authority;
use tulle_certs::ca::rotate::{self, Rotation};

use crate::base;
use crate::cli::fetch;
use crate::cli::kept;
use crate::config::{Replaced, Rotate};

/// Between two questions to control while waiting.
const INTERVAL: Duration = Duration::from_millis(500);

/// Does the step and says what comes next.
///
/// # Errors
/// If the step is not safe yet, or the directory cannot be used.
pub fn rotate(options: &Rotate) -> anyhow::Result<String> {
    kept::change(&options.kept, &options.ca_dir, |dir| step(options, dir))
}

fn step(options: &Rotate, dir: &Path) -> anyhow::Result<String> {
    let now = base::unix_now();
    let authority = Authority::open(dir, now).context("cannot open the CA")?;
    if options.what == Replaced::Intermediate {
        let old = authority.intermediate_serial();
        rotate::renew_intermediate(dir)?;
        Authority::open(dir, now)?;
        return Ok(format!(
            "the intermediate is new; nodes renew their certificates within seconds\n\
             once they have, `control revoke --intermediate {old}` takes back what the old one signed"
        ));
    }
    if !options.force {
        until_safe(options, authority.rotation())?;
    }
    match authority.rotation() {
        Rotation::Settled => {
            rotate::announce(dir, now)?;
            Ok("step 1 of 3: a new root is announced, the old one signs on. Run this again once the nodes know it"
                .into())
        }
        Rotation::Announced { .. } => {
            rotate::switch(dir)?;
            // Makes the intermediate under the new root.
            Authority::open(dir, now)?;
            let text = "step 2 of 3: the new root signs, the old one is still trusted. Run this again once all \
                        certificates are signed under it";
            Ok(text.to_owned())
        }
        Rotation::Switched { .. } => {
            rotate::retire(dir, now)?;
            Ok("step 3 of 3: the old root is gone from root-cert.pem".into())
        }
    }
}

/// Asks once, or again and again until `--wait` is over.
fn until_safe(options: &Rotate, rotation: &Rotation) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        match safe(options, rotation, base::unix_now()) {
            Err(_) if options.wait.is_some_and(|wait| began.elapsed() + INTERVAL < wait) => {
                std::thread::sleep(INTERVAL)
            }
            answer => return answer,
        }
    }
}

fn safe(options: &Rotate, rotation: &Rotation, now: i64) -> anyhow::Result<()> {
    let Some(safe_after) = rotation.safe_after().filter(|safe| now < *safe) else { return Ok(()) };
    let or = format!(
        "The step is safe by itself at {}; --force does it now, at the price of connections",
        jiff::Timestamp::from_second(safe_after).map_or_else(|_| safe_after.to_string(), |at| at.to_string())
    );
    let answer = match fetch::get(&options.control, "/debug/ca") {
        Ok(answer) => answer,
        Err(failure) => bail!("cannot ask whether the nodes are ready: {}. {or}", failure.text),
    };
    // Control takes over the directory within seconds; before that it answers for another step.
    let step = match rotation {
        Rotation::Settled => "settled",
        Rotation::Announced { .. } => "announced",
        Rotation::Switched { .. } => "switched",
    };
    if answer["rotation"] != step {
        bail!(
            "control has not taken over the last step yet (it says {}); try again in a few seconds",
            answer["rotation"]
        );
    }
    let waits: Vec<&str> = answer["waitsFor"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if waits.is_empty() {
        return Ok(());
    }
    bail!("not yet:\n- {}\n{or}", waits.join("\n- "))
}
