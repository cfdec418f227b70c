//! Secrets that a test made itself, and the search for them, in whatever form they may have leaked.

use std::collections::HashMap;

/// A secret in every spelling that a log, an error or a dump might give it.
#[derive(Default)]
pub struct Canaries {
    needles: Vec<(String, Vec<u8>)>,
    /// The first eight bytes of a needle, and which needles begin so.
    index: HashMap<[u8; 8], Vec<usize>>,
}

impl Canaries {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Searches for these bytes as they are, and for nothing like them.
    ///
    /// # Panics
    /// When they are fewer than eight.
    pub fn add_bytes(&mut self, name: &str, bytes: &[u8]) {
        let first = *bytes.first_chunk().expect("a canary has at least eight bytes");
        self.index.entry(first).or_default().push(self.needles.len());
        self.needles.push((name.to_owned(), bytes.to_vec()));
    }

    /// Searches for the secret raw, and for each half of it.
    pub fn add_raw(&mut self, name: &str, secret: &[u8]) {
        let (front, back) = secret.split_at(secret.len() / 2);
        self.add_bytes(&format!("{name}, first half"), front);
        self.add_bytes(&format!("{name}, second half"), back);
    }

    /// Searches for each half raw, in hexadecimal, base64 (both alphabets, each alignment) and as a list of numbers.
    ///
    /// # Panics
    /// When it has fewer than 16 bytes.
    pub fn add(&mut self, name: &str, secret: &[u8]) {
        self.add_raw(name, secret);
        let (front, back) = secret.split_at(secret.len() / 2);
        for (half, bytes) in [("first", front), ("second", back)] {
            for (form, text) in spellings(bytes) {
                self.add_bytes(&format!("{name}, {half} half, {form}"), text.as_bytes());
            }
        }
    }

    /// What was found in `haystack`, each with its place.
    #[must_use]
    pub fn find(&self, haystack: &[u8]) -> Vec<(String, usize)> {
        let mut found = Vec::new();
        for (at, window) in haystack.windows(8).enumerate() {
            // Most memory is zeros.
            if window[0] == 0 && window[7] == 0 {
                continue;
            }
            for needle in self.index.get(window).into_iter().flatten() {
                let (name, bytes) = &self.needles[*needle];
                if haystack[at..].starts_with(bytes) {
                    found.push((name.clone(), at));
                }
            }
        }
        found
    }

    /// # Panics
    /// When one of them is in `haystack`; `place` says what that is.
    pub fn assert_absent(&self, place: &str, haystack: &[u8]) {
        let found = self.find(haystack);
        assert!(found.is_empty(), "{place} holds {found:?}");
    }
}

/// A page full of a secret, as a process without protection would hold one. Made from the secret while the program runs, so that it is
/// in no program file.
#[must_use]
pub fn page(secret: &str) -> Vec<u8> {
    secret.bytes().cycle().take(4096).collect()
}

fn spellings(bytes: &[u8]) -> Vec<(&'static str, String)> {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let numbers: Vec<String> = bytes.iter().map(u8::to_string).collect();
    let hex_numbers: Vec<String> = bytes.iter().map(|byte| format!("{byte:#04x}")).collect();
    let mut spellings = vec![
        ("upper hex", hex.to_uppercase()),
        ("hex", hex),
        ("numbers", numbers.join(", ")),
        ("numbers without spaces", numbers.join(",")),
        ("hex numbers", hex_numbers.join(", ")),
    ];
    for skip in 0..3 {
        let text = base64(&bytes[skip..]);
        spellings.push(("base64", text.clone()));
        spellings.push(("base64url", text.replace('+', "-").replace('/', "_")));
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        spellings.push(("escaped", text.escape_default().collect()));
    }
    spellings
}

/// Whole groups of three bytes only: what is before and behind them in a longer text does not change these characters.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks_exact(3) {
        let bits = u32::from(group[0]) << 16 | u32::from(group[1]) << 8 | u32::from(group[2]);
        for shift in [18, 12, 6, 0] {
            text.push(char::from(DIGITS[(bits >> shift & 63) as usize]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canary_is_found_in_every_form_and_nowhere_else() {
        let secret: Vec<u8> = (0..32).map(|n| 251 ^ (n * 7)).collect();
        let mut canaries = Canaries::new();
        canaries.add("key", &secret);
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        for shift in 0..3 {
            let mut shifted = vec![9; shift];
            shifted.extend_from_slice(&secret);
            shifted.extend_from_slice(&[1; 3]);
            let text = base64(&shifted);
            assert!(!canaries.find(text.as_bytes()).is_empty(), "base64 behind {shift} bytes");
        }
        for leak in [
            secret.clone(),
            secret[16..].to_vec(),
            hex.clone().into_bytes(),
            hex.to_uppercase().into_bytes(),
            format!("{secret:?}").into_bytes(),
            format!("{secret:#04x?}").replace(",\n   ", ",").into_bytes(),
        ] {
            let around = [b"before ".to_vec(), leak, b" after".to_vec()].concat();
            assert!(!canaries.find(&around).is_empty(), "{}", String::from_utf8_lossy(&around));
        }
        canaries.assert_absent("another text", b"the quick brown fox jumps over the lazy dog");
    }
}
