//! The load generator as the measuring side sees it: a process in the client's pod that says, line by line, how far it
//! is.
//!
//! Limits: it ends by itself after its time, so reading from it ends too; who drops it kills it.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::process::ChildStdout;

use anyhow::Context;

use crate::bench::work::Line;
use crate::bench::work::Measured;
use crate::bench::work::Order;
use crate::bench::work::Totals;
use crate::lab::Lab;
use crate::lab::Running;

/// A generator under way.
pub(super) struct Generator {
    running: Running,
    lines: BufReader<ChildStdout>,
    /// Its process.
    pub(super) pid: u32,
}

impl Generator {
    pub(super) fn start(lab: &Lab, place: &str, order: &Order) -> anyhow::Result<Self> {
        let order = serde_json::to_string(order)?;
        let mut running = lab.spawn(place, &["lab", "bench-agent", "run", "--order", &order])?;
        let child = running.child().context("the generator has ended")?;
        let (pid, stdout) = (child.id(), child.stdout.take().context("no output of the generator")?);
        Ok(Self { running, lines: BufReader::new(stdout), pid })
    }

    /// The generator ends by itself after its time, so this ends too.
    fn next(&mut self) -> anyhow::Result<Line> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            let mut error = String::new();
            if let Some(stderr) = self.running.child().and_then(|child| child.stderr.take()) {
                let _ = std::io::Read::read_to_string(&mut std::io::Read::take(stderr, 4096), &mut error);
            }
            anyhow::bail!("the load generator ended early: {}", error.trim());
        }
        serde_json::from_str(&line).with_context(|| format!("the load generator said {:?}", line.trim()))
    }

    pub(super) fn expect_begin(&mut self) -> anyhow::Result<()> {
        match self.next()? {
            Line::Begin => Ok(()),
            other => anyhow::bail!("the load generator said {other:?} instead of beginning"),
        }
    }

    pub(super) fn expect_end(&mut self) -> anyhow::Result<Measured> {
        match self.next()? {
            Line::End(measured) => Ok(measured),
            other => anyhow::bail!("the load generator said {other:?} instead of ending"),
        }
    }

    pub(super) fn expect_gone(&mut self) -> anyhow::Result<Totals> {
        match self.next()? {
            Line::Gone(totals) => Ok(totals),
            other => anyhow::bail!("the load generator said {other:?} instead of its totals"),
        }
    }

    /// Tells it that the samples are taken.
    pub(super) fn go(&mut self) -> anyhow::Result<()> {
        let child = self.running.child().context("the generator has ended")?;
        child.stdin.as_mut().context("no input of the generator")?.write_all(b"go\n")?;
        Ok(())
    }

    /// Ends what goes on until its input ends.
    pub(super) fn close_input(&mut self) {
        if let Some(child) = self.running.child() {
            drop(child.stdin.take());
        }
    }
}
