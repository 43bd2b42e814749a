//! Policy routing that brings marked packets to local sockets, asked of the kernel directly.
//!
//! A rule (`fwmark <mark>/<mask> lookup <table>`) and one route in that table (`local default dev lo`), in the current
//! network namespace. Doing it again changes nothing, and so does taking back what is not there. Needs CAP_NET_ADMIN.

use std::io;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::base::netlink::{ACK, REQUEST, attribute, message, verdict};

// linux/rtnetlink.h and linux/fib_rules.h.
const NETLINK_ROUTE: i32 = 0;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const NEW_RULE: u16 = 32;
const DELETE_RULE: u16 = 33;
const REPLACE: u16 = 0x100;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const TO_TABLE: u8 = 1;
const RULE_PRIORITY: u16 = 6;
const RULE_MARK: u16 = 10;
const RULE_TABLE: u16 = 15;
const RULE_MASK: u16 = 16;
const ROUTE_DEVICE: u16 = 4;
const ROUTE_TABLE: u16 = 15;
/// "By whoever started the system", as `ip` says it.
const BOOT: u8 = 3;
const SCOPE_HOST: u8 = 254;
const SCOPE_ANY: u8 = 255;
const LOCAL: u8 = 2;
/// `lo` is the first interface of every network namespace.
const LOOPBACK: u32 = 1;

/// The kernel answers within the call; what is longer is a kernel that does not answer at all.
const PATIENCE: Duration = Duration::from_secs(2);

/// Packets with a mark, and the table that has their route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marked {
    /// The mark.
    pub mark: u32,
    /// The bits of it that count.
    pub mask: u32,
    /// The rule's place among others; lower ones come first.
    pub priority: u32,
    /// The table.
    pub table: u8,
}

impl Marked {
    /// Delivers them locally from now on, in one family.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn deliver(self, v6: bool) -> io::Result<()> {
        let socket = open()?;
        ask(&socket, &self.route(NEW_ROUTE, CREATE | REPLACE, SCOPE_HOST, v6))?;
        match ask(&socket, &self.rule(NEW_RULE, CREATE | EXCLUSIVE, v6)) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Takes that back.
    ///
    /// # Errors
    /// What the kernel says. What is not there is fine.
    pub fn release(self, v6: bool) -> io::Result<()> {
        let socket = open()?;
        for request in [self.rule(DELETE_RULE, 0, v6), self.route(DELETE_ROUTE, 0, SCOPE_ANY, v6)] {
            match ask(&socket, &request) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn rule(self, kind: u16, flags: u16, v6: bool) -> Vec<u8> {
        // Family, lengths of destination and source, TOS, table, reserved twice, action; flags.
        let fixed = [family(v6), 0, 0, 0, self.table, 0, 0, TO_TABLE, 0, 0, 0, 0];
        let attributes = [
            (RULE_PRIORITY, self.priority),
            (RULE_MARK, self.mark),
            (RULE_MASK, self.mask),
            (RULE_TABLE, self.table.into()),
        ];
        message(kind, REQUEST | ACK | flags, &fixed, &words(&attributes))
    }

    fn route(self, kind: u16, flags: u16, scope: u8, v6: bool) -> Vec<u8> {
        // Family, lengths of destination and source, TOS, table, protocol, scope, type; flags.
        let fixed = [family(v6), 0, 0, 0, self.table, BOOT, scope, LOCAL, 0, 0, 0, 0];
        let attributes = [(ROUTE_DEVICE, LOOPBACK), (ROUTE_TABLE, self.table.into())];
        message(kind, REQUEST | ACK | flags, &fixed, &words(&attributes))
    }
}

fn family(v6: bool) -> u8 {
    u8::try_from(if v6 { libc::AF_INET6 } else { libc::AF_INET }).unwrap_or_default()
}

fn words(attributes: &[(u16, u32)]) -> Vec<u8> {
    attributes.iter().flat_map(|(kind, value)| attribute(*kind, &value.to_ne_bytes())).collect()
}

fn open() -> io::Result<Socket> {
    let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(NETLINK_ROUTE)))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn ask(mut socket: &Socket, request: &[u8]) -> io::Result<()> {
    socket.send(request)?;
    // An error has the request behind it.
    let mut answer = [0; 1024];
    let length = io::Read::read(&mut socket, &mut answer)?;
    verdict(&answer[..length.min(answer.len())])
        .unwrap_or_else(|| Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel answered something else")))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    use super::Marked;

    fn shown(arguments: &[&str]) -> String {
        String::from_utf8(Command::new("ip").args(arguments).output().unwrap().stdout).unwrap()
    }

    #[test]
    fn packets_with_a_mark_are_delivered_here_until_that_is_taken_back() {
        // A thread with a namespace of its own. Without the privilege for it there is nothing to see.
        let seen = std::thread::spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                eprintln!("skipped: no privilege to make a network namespace");
                return;
            }
            Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            let marked = Marked { mark: 0x111, mask: 0xfff, priority: 32_764, table: 100 };
            for (v6, flag, default) in [(false, "-4", "local default dev lo"), (true, "-6", "local default dev lo")] {
                let rule = "32764:\tfrom all fwmark 0x111/0xfff lookup 100";
                for _ in 0..2 {
                    marked.deliver(v6).unwrap();
                    let (rules, routes) = (shown(&[flag, "rule"]), shown(&[flag, "route", "show", "table", "100"]));
                    assert_eq!(rules.matches(rule).count(), 1, "{rules}");
                    assert_eq!(routes.matches(default).count(), 1, "{routes}");
                }
                for _ in 0..2 {
                    marked.release(v6).unwrap();
                    let (rules, routes) = (shown(&[flag, "rule"]), shown(&[flag, "route", "show", "table", "100"]));
                    assert!(!rules.contains("0x111") && routes.is_empty(), "{rules}{routes}");
                }
            }
        });
        seen.join().unwrap();
    }
}
