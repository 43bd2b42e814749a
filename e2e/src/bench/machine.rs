//! What the kernel knows: CPU and memory of processes, bytes of links, and the machine itself, all read from `/proc`.
//!
//! CPU of a process is its CPU clock: what the scheduler measured, in nanoseconds, of all its threads, ended ones too.
//! Softirq work that the kernel does while a process runs is charged to that process, so a proxy's figure holds part of
//! the network stack's work. Limits: Linux only; a process that has gone cannot be read.

use std::time::Instant;

use anyhow::Context;
use nix::time::ClockId;
use nix::unistd::Pid;
use serde::Serialize;

/// Ticks a second of `/proc/stat`; fixed in the kernel's ABI for all architectures Linux runs containers on.
const TICKS: f64 = 100.0;

/// Seconds of CPU that a process has used, children excluded.
pub(super) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(i32::try_from(pid)?));
    let now = clock.and_then(nix::time::clock_gettime);
    let now = now.with_context(|| format!("the CPU clock of process {pid}: has it ended?"))?;
    Ok(now.tv_sec() as f64 + now.tv_nsec() as f64 / 1e9)
}

/// Resident memory of a process, bytes.
pub fn resident(pid: u32) -> anyhow::Result<u64> {
    status_bytes(pid, "VmRSS:")
}

/// The most that it was, bytes.
pub fn peak(pid: u32) -> anyhow::Result<u64> {
    status_bytes(pid, "VmHWM:")
}

fn status_bytes(pid: u32, key: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("{path}: has the process ended?"))?;
    parse_kib(&text, key).map(|kib| kib * 1024).with_context(|| format!("{path} has no {key}"))
}

fn parse_kib(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

/// Bytes received and sent on `interface` in the network namespace of a process, headers included.
pub(super) fn link_bytes(pid: u32, interface: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/net/dev");
    let text = std::fs::read_to_string(&path).with_context(|| format!("{path}: has the process ended?"))?;
    parse_link(&text, interface).with_context(|| format!("{path} has no {interface}"))
}

fn parse_link(text: &str, interface: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    let mut fields = line.split_whitespace();
    let received: u64 = fields.next()?.parse().ok()?;
    let sent: u64 = fields.nth(7)?.parse().ok()?;
    Some(received + sent)
}

/// Seconds of CPU that the whole machine has used since it started, idle and stolen time excluded.
fn busy_seconds() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/stat").context("/proc/stat cannot be read")?;
    parse_busy(&text).context("/proc/stat is not as expected")
}

fn parse_busy(text: &str) -> Option<f64> {
    let fields: Vec<f64> =
        text.lines().next()?.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guests are in user already.
    Some((fields.get(..3)?.iter().sum::<f64>() + fields.get(5..7)?.iter().sum::<f64>()) / TICKS)
}

/// CPU that was used up to a moment, seconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    at: Instant,
    proxies: [f64; 2],
    own: f64,
    busy: f64,
}

impl Sample {
    /// Of the proxies on both sides, of the bench's own processes, and of the machine.
    pub(super) fn take(proxies: [&[u32]; 2], own: &[u32]) -> anyhow::Result<Self> {
        let sum = |pids: &[u32]| pids.iter().map(|pid| cpu_seconds(*pid)).sum::<anyhow::Result<f64>>();
        let proxies = [sum(proxies[0])?, sum(proxies[1])?];
        Ok(Self { at: Instant::now(), proxies, own: sum(own)?, busy: busy_seconds()? })
    }

    /// From here to a later one: what the proxies on both sides used, and which share of the processors others took.
    pub(super) fn until(&self, later: &Self) -> ([f64; 2], f64) {
        let used = [0, 1].map(|proxy| later.proxies[proxy] - self.proxies[proxy]);
        let ours = used.iter().sum::<f64>() + later.own - self.own;
        (used, self.share(later, later.busy - self.busy - ours))
    }

    /// From here to a later one: which share of the processors was used, by whomever.
    pub(super) fn load(&self, later: &Self) -> f64 {
        self.share(later, later.busy - self.busy)
    }

    fn share(&self, later: &Self, seconds: f64) -> f64 {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        (seconds / ((later.at - self.at).as_secs_f64() * cpus)).clamp(0.0, 1.0)
    }
}

/// The machine, for the report.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    /// Model name of the first processor.
    pub(super) cpu: String,
    /// Processors that this process may use.
    pub(super) cpus: usize,
    /// Memory in MiB.
    pub(super) memory_mib: u64,
    /// Kernel release.
    pub(super) kernel: String,
    /// Load average of the last minute, at the start.
    pub(super) load_before: f64,
    /// Niceness of the bench and of everything it starts.
    pub(super) nice: i32,
    /// Highest number of open files.
    pub(super) descriptors: u64,
}

/// Describes the machine; what cannot be read is empty or 0.
pub(super) fn describe() -> Machine {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let stat = read("/proc/self/stat");
    let nice = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(16)?.parse().ok());
    Machine {
        cpu: model.map(|(_, name)| name.trim().to_owned()).unwrap_or_default(),
        cpus: std::thread::available_parallelism().map_or(0, usize::from),
        memory_mib: parse_kib(&read("/proc/meminfo"), "MemTotal:").unwrap_or_default() / 1024,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        load_before: read("/proc/loadavg").split_whitespace().next().and_then(|it| it.parse().ok()).unwrap_or_default(),
        nice: nice.unwrap_or_default(),
        descriptors: nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .map_or(0, |(_, hard)| hard),
    }
}

#[cfg(test)]
mod tests {
    use crate::bench::machine::cpu_seconds;
    use crate::bench::machine::parse_busy;
    use crate::bench::machine::parse_kib;
    use crate::bench::machine::parse_link;

    #[test]
    fn files_of_proc_are_read_by_their_fields() {
        assert_eq!(parse_kib("VmPeak:\t 9 kB\nVmRSS:\t  2048 kB\n", "VmRSS:"), Some(2048));
        let dev =
            "Inter-| Receive | Transmit\n    lo: 1 0 0 0 0 0 0 0 1 0\n  eth0: 1000 1 0 0 0 0 0 0 234 5 0 0 0 0 0 0\n";
        assert_eq!(parse_link(dev, "eth0"), Some(1234));
        assert_eq!(parse_link(dev, "eth1"), None);
        assert_eq!(parse_busy("cpu  100 100 100 9999 9999 50 50 777 0 0\ncpu0 1"), Some(4.0));
    }
    #[test]
    fn the_cpu_clock_of_a_process_goes_on_while_it_works() -> anyhow::Result<()> {
        let before = cpu_seconds(std::process::id())?;
        let mut sum = 0_u64;
        while cpu_seconds(std::process::id())? <= before {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(cpu_seconds(u32::MAX).is_err());
        Ok(())
    }
}
