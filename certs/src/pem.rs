//! Writing DER as PEM. Reading is `rustls_pki_types::pem`; that crate has no writer, and one encoder of 64-character
//! lines is less than another dependency. Not for secrets: private keys are written by rcgen.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// A certificate as PEM.
pub fn certificate(der: &[u8]) -> String {
    encode("CERTIFICATE", der)
}

/// Base64 with padding (RFC 4648 §4).
pub fn base64(bytes: &[u8]) -> String {
    bytes.chunks(3).flat_map(quad).collect()
}

/// One PEM block with a final newline.
pub(crate) fn encode(label: &str, der: &[u8]) -> String {
    let mut out = format!("-----BEGIN {label}-----\n");
    let mut column = 0;
    for chunk in der.chunks(3) {
        for c in quad(chunk) {
            out.push(c);
        }
        column += 4;
        if column == 64 {
            out.push('\n');
            column = 0;
        }
    }
    if column != 0 {
        out.push('\n');
    }
    out.push_str(&format!("-----END {label}-----\n"));
    out
}

fn quad(chunk: &[u8]) -> [char; 4] {
    let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
    let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
    let letter = |shift: u32| char::from(ALPHABET[(bits >> shift & 63) as usize]);
    [
        letter(18),
        letter(12),
        if chunk.len() > 1 { letter(6) } else { '=' },
        if chunk.len() > 2 { letter(0) } else { '=' },
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;

    proptest! {
        #[test]
        fn what_is_written_can_be_read(der in proptest::collection::vec(any::<u8>(), 1..300)) {
            let text = super::encode("CERTIFICATE", &der);
            let read = CertificateDer::from_pem_slice(text.as_bytes()).expect("own PEM");
            prop_assert_eq!(read.as_ref(), &der[..]);
            prop_assert!(text.lines().all(|line| line.len() <= 64));
        }
    }
}
