//! Damages good input in the ways in which input is usually damaged: structured, so that most of it stays valid and the
//! damage reaches the inner checks.
//!
//! Chance is an argument: a list of edits is all there is, so that a failing case can be shrunk and repeated.

/// One edit: what to do, where (of the whole, in 65536ths), and a byte to do it with.
pub type Edit = (u8, u16, u8);

/// Characters that mean something somewhere.
const SIGNS: &[u8] = b"\0\n\r\t \"%&,-./0:;=@[]{}\x7f\x80\xff";

/// `seed` after `edits`. It never grows beyond twice its size and 64 bytes, so that edits cannot make a test slow.
pub fn mutate(seed: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    let limit = seed.len() * 2 + 64;
    for &(kind, place, byte) in edits {
        let at = usize::from(place) * bytes.len() / 65536;
        let end = (at + usize::from(byte)).min(bytes.len());
        match kind % 9 {
            0 if at < bytes.len() => bytes[at] = byte,
            1 if at < bytes.len() => bytes[at] ^= 1 << (byte % 8),
            2 if bytes.len() < limit => bytes.insert(at, byte),
            3 if at < bytes.len() => drop(bytes.remove(at)),
            4 => bytes.truncate(at),
            // A part twice.
            5 if bytes.len() + (end - at) <= limit => {
                let part = bytes[at..end].to_vec();
                bytes.splice(end..end, part);
            }
            // A part gone.
            6 => drop(bytes.drain(at..end)),
            7 if at < bytes.len() => bytes[at] = SIGNS[usize::from(byte) % SIGNS.len()],
            // A number at its edge.
            8 if at < bytes.len() && bytes[at].is_ascii_digit() => {
                let edge: &[u8] =
                    [&b"0"[..], b"-1", b"65536", b"4294967296", b"18446744073709551616"][usize::from(byte) % 5];
                bytes.splice(at..=at, edge.iter().copied());
            }
            _ => {}
        }
    }
    bytes
}
