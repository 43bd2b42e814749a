//! Looking at a node's link: which bytes crossed it, whether a marker was among them, and whether the rest was TLS 1.3.
//!
//! It runs as a process of its own inside the node's namespace and ends with its standard input, so that a test starts
//! and stops it without privilege. A capture that lost packets proves nothing, so losses are counted. Segments come out
//! of order when two processors feed one link, so each direction is put in order first (`order`). Limit: a marker split
//! over two segments is found, over three of tiny size it may not.

mod order;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use anyhow::Context;
use nix::sys::socket::AddressFamily;
use nix::sys::socket::LinkAddr;
use nix::sys::socket::SockFlag;
use nix::sys::socket::SockProtocol;
use nix::sys::socket::SockType;
use serde::Deserialize;
use serde::Serialize;
use tulle_proto::names;

use crate::sniff::order::Order;

/// Offloaded segments are up to 64 KiB and a header.
const FRAME_MAX: usize = (64 << 10) + 256;
/// Room for bursts while the process is not running.
const BUFFER_BYTES: usize = 64 << 20;

/// Arguments of `lab sniff`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Interface.
    #[arg(long, default_value = "eth0")]
    interface: String,
    /// Text to search for.
    #[arg(long)]
    marker: Vec<String>,
}

/// What crossed the link.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sniffed {
    /// Frames seen.
    pub frames: u64,
    /// Frames lost before they could be looked at, and gaps in streams.
    pub lost: u64,
    /// Payload bytes of TCP.
    pub tcp_bytes: u64,
    /// Payload bytes of TCP by the lower port of the connection.
    pub tcp_ports: BTreeMap<u16, u64>,
    /// Packets in which each marker was found.
    pub markers: BTreeMap<String, u64>,
    /// On the mesh's port.
    pub tls: Tls,
}

/// TLS on the mesh's port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tls {
    /// ClientHello records.
    pub client_hellos: u64,
    /// ServerHello records that choose TLS 1.3.
    pub server_hellos_13: u64,
    /// ServerHello records that choose anything else.
    pub server_hellos_other: u64,
    /// Cipher suites that servers chose, with how often.
    #[serde(default)]
    pub suites: BTreeMap<String, u64>,
    /// Key exchanges that servers chose.
    #[serde(default)]
    pub groups: BTreeMap<String, u64>,
    /// Encrypted records.
    pub encrypted_records: u64,
    /// Their bytes.
    pub encrypted_bytes: u64,
    /// Records that are neither handshake nor encrypted, but legal (change cipher spec, alerts before encryption).
    pub other_records: u64,
    /// Directions of connections whose bytes are not TLS records.
    pub not_tls: u64,
}

/// Captures until standard input ends, then prints a [`Sniffed`].
pub fn main(options: &Options) -> anyhow::Result<()> {
    let socket =
        nix::sys::socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
            .context("no packet socket; capturing takes CAP_NET_RAW in the namespace")?;
    let index = nix::net::if_::if_nametoindex(options.interface.as_str())
        .with_context(|| format!("there is no interface {}", options.interface))?;
    // The forced size needs privilege over the machine; the plain one is capped but better than the default.
    if nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
        let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBuf, &BUFFER_BYTES);
    }
    let tick = nix::sys::time::TimeVal::new(0, 20_000);
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::ReceiveTimeout, &tick)?;
    println!("{{\"capturing\":true}}");
    std::io::stdout().flush()?;
    let ended = AtomicBool::new(false);
    let mut analysis = Analysis::new(&options.marker);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            ended.store(true, Ordering::SeqCst);
        });
        let mut frame = vec![0_u8; FRAME_MAX];
        let mut ending = false;
        loop {
            if !ending && ended.load(Ordering::SeqCst) {
                // Nothing new comes in from here on; what came before is still read to the last.
                close(&socket);
                ending = true;
            }
            match nix::sys::socket::recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame) {
                Ok((length, Some(from))) if from.ifindex() == index as usize => analysis.frame(&frame[..length]),
                Ok(_) => {}
                Err(_) if ending => return,
                Err(_) => {}
            }
        }
    });
    let mut sniffed = analysis.finish();
    sniffed.lost += lost(&socket)?;
    println!("{}", serde_json::to_string(&sniffed)?);
    Ok(())
}

/// Lets no further frame in: a filter that takes none.
fn close(socket: &impl AsFd) {
    // BPF_RET with 0 bytes to keep.
    let nothing = socket2::SockFilter::new(6, 0, 0, 0);
    // Without the filter the end is reached at the next pause of the traffic.
    let _ = socket2::SockRef::from(socket).attach_filter(&[nothing]);
}

#[allow(unsafe_code)]
fn lost(socket: &impl AsRawFd) -> anyhow::Result<u64> {
    let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of the plain structure that `stats` is.
    let code = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut stats).cast(),
            &raw mut length,
        )
    };
    anyhow::ensure!(code == 0, "no statistics of the capture: {}", std::io::Error::last_os_error());
    Ok(u64::from(stats.tp_drops))
}

/// One direction of a connection: addresses as on the wire, and ports.
type Flow = (Vec<u8>, u16, u16);

struct Analysis {
    markers: Vec<String>,
    tails: BTreeMap<Flow, Vec<u8>>,
    streams: BTreeMap<Flow, Records>,
    orders: BTreeMap<Flow, Order>,
    sniffed: Sniffed,
}

impl Analysis {
    fn new(markers: &[String]) -> Self {
        let counts = markers.iter().map(|marker| (marker.clone(), 0)).collect();
        Self {
            markers: markers.to_vec(),
            tails: BTreeMap::new(),
            streams: BTreeMap::new(),
            orders: BTreeMap::new(),
            sniffed: Sniffed { markers: counts, ..Sniffed::default() },
        }
    }

    fn frame(&mut self, frame: &[u8]) {
        self.sniffed.frames += 1;
        let Some((flow, sequence, syn, payload)) = tcp(frame) else {
            // Not TCP: searched whole, since a leak is a leak in any protocol.
            self.search(None, frame);
            return;
        };
        if syn {
            // A new connection on old ports.
            self.drain(&flow);
            self.streams.remove(&flow);
            self.orders.remove(&flow);
            self.tails.remove(&flow);
        }
        if payload.is_empty() {
            return;
        }
        let mut order = self.orders.remove(&flow).unwrap_or_else(|| Order::starting(sequence));
        for piece in order.insert(sequence, payload) {
            self.piece(&flow, &piece);
        }
        self.sniffed.lost += order.gaps();
        self.orders.insert(flow, order);
    }

    /// What is still waiting for bytes before it, in every direction; then the result.
    fn finish(mut self) -> Sniffed {
        for flow in self.orders.keys().cloned().collect::<Vec<_>>() {
            self.drain(&flow);
        }
        self.sniffed
    }

    fn drain(&mut self, flow: &Flow) {
        let Some(mut order) = self.orders.remove(flow) else { return };
        for piece in order.drain() {
            self.piece(flow, &piece);
        }
        self.sniffed.lost += order.gaps();
    }

    /// The next bytes of a direction.
    fn piece(&mut self, flow: &Flow, bytes: &[u8]) {
        self.sniffed.tcp_bytes += bytes.len() as u64;
        *self.sniffed.tcp_ports.entry(flow.1.min(flow.2)).or_default() += bytes.len() as u64;
        self.search(Some(flow), bytes);
        if flow.1 == names::PORT_HBONE || flow.2 == names::PORT_HBONE {
            self.streams.entry(flow.clone()).or_default().feed(bytes, &mut self.sniffed.tls);
        }
    }

    fn search(&mut self, flow: Option<&Flow>, payload: &[u8]) {
        let longest = self.markers.iter().map(String::len).max().unwrap_or(0);
        if longest == 0 {
            return;
        }
        let mut text = flow.and_then(|flow| self.tails.remove(flow)).unwrap_or_default();
        text.extend_from_slice(payload);
        for marker in &self.markers {
            let found = text.windows(marker.len()).any(|window| window == marker.as_bytes());
            *self.sniffed.markers.entry(marker.clone()).or_default() += u64::from(found);
        }
        if let Some(flow) = flow {
            let keep = text.len().min(longest - 1);
            self.tails.insert(flow.clone(), text.split_off(text.len() - keep));
        }
    }
}

/// Flow, sequence number, SYN, payload.
fn tcp(frame: &[u8]) -> Option<(Flow, u32, bool, &[u8])> {
    let u16_at = |bytes: &[u8], at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let kind = u16_at(frame, 12)?;
    let packet = frame.get(14..)?;
    let (addresses, segment) = match kind {
        0x0800 => {
            let header = usize::from(packet.first()? & 0xf) * 4;
            let total = usize::from(u16_at(packet, 2)?);
            // Offloaded packets above 64 KiB carry 0.
            let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
            (*packet.get(9)? == 6).then_some(())?;
            (packet.get(12..20)?, packet.get(header..end)?)
        }
        0x86dd => {
            (*packet.get(6)? == 6).then_some(())?;
            let length = usize::from(u16_at(packet, 4)?);
            let end = if length == 0 { packet.len() } else { (40 + length).min(packet.len()) };
            (packet.get(8..40)?, packet.get(40..end)?)
        }
        _ => return None,
    };
    let flow = (addresses.to_vec(), u16_at(segment, 0)?, u16_at(segment, 2)?);
    let sequence = u32::from_be_bytes(segment.get(4..8)?.try_into().ok()?);
    let data = usize::from(segment.get(12)? >> 4) * 4;
    let syn = segment.get(13)? & 2 != 0;
    Some((flow, sequence, syn, segment.get(data..)?))
}

/// TLS records of one direction.
#[derive(Default)]
struct Records {
    pending: Vec<u8>,
    broken: bool,
}

impl Records {
    fn feed(&mut self, bytes: &[u8], tls: &mut Tls) {
        if self.broken {
            return;
        }
        self.pending.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(header) = self.pending.get(at..at + 5) {
            let (kind, length) = (header[0], usize::from(u16::from_be_bytes([header[3], header[4]])));
            // RFC 8446 §5.1: record types 20 to 23, legacy version 3.x, at most 2^14 + 256 bytes.
            if !(20..=23).contains(&kind) || header[1] != 3 || length > (16 << 10) + 256 {
                self.broken = true;
                self.pending.clear();
                tls.not_tls += 1;
                return;
            }
            let Some(body) = self.pending.get(at + 5..at + 5 + length) else { break };
            count(kind, body, tls);
            at += 5 + length;
        }
        self.pending.drain(..at);
    }
}

fn count(kind: u8, body: &[u8], tls: &mut Tls) {
    match (kind, body.first()) {
        (23, _) => {
            tls.encrypted_records += 1;
            tls.encrypted_bytes += body.len() as u64;
        }
        (22, Some(1)) => tls.client_hellos += 1,
        (22, Some(2)) => {
            if chooses_13(body) {
                tls.server_hellos_13 += 1;
            } else {
                tls.server_hellos_other += 1;
            }
            if let Some((suite, group)) = choices(body) {
                *tls.suites.entry(suite).or_default() += 1;
                *tls.groups.entry(group).or_default() += 1;
            }
        }
        _ => tls.other_records += 1,
    }
}

/// Whether a ServerHello carries supported_versions (43) with 0x0304.
fn chooses_13(hello: &[u8]) -> bool {
    hello.windows(6).any(|window| window == [0, 43, 0, 2, 3, 4])
}

/// Cipher suite and key exchange of a ServerHello, by their usual names (RFC 8446 §4.1.3 and appendix B).
fn choices(hello: &[u8]) -> Option<(String, String)> {
    let word = |at: usize| Some(u16::from_be_bytes([*hello.get(at)?, *hello.get(at + 1)?]));
    // Type and length, version, random; then the session id.
    let at = 39 + usize::from(*hello.get(38)?);
    let suite = match word(at)? {
        0x1301 => "TLS13_AES_128_GCM_SHA256".to_owned(),
        0x1302 => "TLS13_AES_256_GCM_SHA384".to_owned(),
        0x1303 => "TLS13_CHACHA20_POLY1305_SHA256".to_owned(),
        other => format!("{other:#06x}"),
    };
    let mut group = "none".to_owned();
    // The suite, the compression method, the length of all extensions.
    let mut extension = at + 5;
    while let (Some(kind), Some(length)) = (word(extension), word(extension + 2)) {
        if kind == 51 {
            group = match word(extension + 4)? {
                0x0017 => "P-256".to_owned(),
                0x001d => "X25519".to_owned(),
                0x11ec => "X25519MLKEM768".to_owned(),
                other => format!("{other:#06x}"),
            };
        }
        extension += 4 + usize::from(length);
    }
    Some((suite, group))
}

#[cfg(test)]
mod tests {
    use crate::sniff::Analysis;
    use crate::sniff::choices;

    fn frame(sequence: u32, port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00]);
        let total = (40 + payload.len()) as u16;
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(40000_u16.to_be_bytes());
        frame.extend(port.to_be_bytes());
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn a_marker_is_found_within_and_across_packets_but_not_twice_when_repeated() {
        let mut analysis = Analysis::new(&["SECRET".to_owned()]);
        analysis.frame(&frame(0, 80, b"..SECRET.."));
        analysis.frame(&frame(0, 80, b"..SECRET.."));
        analysis.frame(&frame(10, 80, b"SEC"));
        analysis.frame(&frame(13, 80, b"RET"));
        assert_eq!(analysis.sniffed.markers["SECRET"], 2);
        assert_eq!(analysis.sniffed.tcp_bytes, 16);
    }

    #[test]
    fn segments_out_of_order_are_one_stream_and_a_gap_that_stays_is_a_loss() {
        let mut analysis = Analysis::new(&["SECRET".to_owned()]);
        let hello = [22, 3, 3, 0, 7, 2, 0, 43, 0, 2, 3, 4];
        analysis.frame(&frame(0, 15008, &hello));
        analysis.frame(&frame(18, 15008, &[9]));
        analysis.frame(&frame(12, 15008, &[23, 3, 3, 0, 2, 9]));
        assert_eq!((analysis.sniffed.tls.encrypted_bytes, analysis.sniffed.tls.not_tls), (2, 0));
        analysis.frame(&frame(119, 80, b"RET"));
        analysis.frame(&frame(130, 80, b"SECRET"));
        let seen = analysis.finish();
        assert_eq!((seen.markers["SECRET"], seen.lost), (1, 1));
    }

    #[test]
    fn what_a_server_chose_is_read_from_its_hello() {
        let mut hello = vec![2, 0, 0, 0, 3, 3];
        hello.extend([7; 32]);
        hello.extend([2, 9, 9, 0x13, 0x02, 0, 0, 12]);
        hello.extend([0, 43, 0, 2, 3, 4]);
        hello.extend([0, 51, 0, 2, 0x11, 0xec]);
        let names = |hello: &[u8]| choices(hello).map(|(suite, group)| format!("{suite} {group}"));
        assert_eq!(names(&hello).as_deref(), Some("TLS13_AES_256_GCM_SHA384 X25519MLKEM768"));
        for length in 0..hello.len() {
            // Cut off anywhere: no panic.
            let _ = names(&hello[..length]);
        }
    }

    #[test]
    fn records_are_told_from_plain_bytes() {
        let mut analysis = Analysis::new(&[]);
        let mut hello = vec![22, 3, 3, 0, 7, 2];
        hello.extend([0, 43, 0, 2, 3, 4]);
        analysis.frame(&frame(0, 15008, &hello));
        analysis.frame(&frame(12, 15008, &[23, 3, 3, 0, 2, 9]));
        analysis.frame(&frame(18, 15008, &[9]));
        assert_eq!((analysis.sniffed.tls.server_hellos_13, analysis.sniffed.tls.encrypted_records), (1, 1));
        analysis.frame(&frame(19, 15008, b"GET / HTTP/1.1"));
        assert_eq!(analysis.sniffed.tls.not_tls, 1);
        analysis.frame(b"short");
    }
}
