//! Passphrases and imported keys: from a terminal, a file or a descriptor, never from arguments or the environment.
//!
//! What is read stays in memory that is wiped; errors say how much was read, never what.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
};

use kms_envelope::KEY_LEN;
use kms_protocol::PASSPHRASE_MAX;
use zeroize::Zeroizing;

use super::{files, interrupt, ui::Failure};
use crate::{Secret, SecretVec, sys};

/// Bytes of a key file that are looked at; digits may have white space behind them.
const KEY_FILE_MAX: usize = 4096;

/// Bytes of an answer to a question that are looked at.
const ANSWER_MAX: u64 = 64;

/// Where a passphrase comes from.
#[derive(clap::Args)]
#[group(multiple = false)]
pub(super) struct PassphraseSource {
    /// Read the passphrase from FILE, or from standard input if it is `-`
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<OsString>,
    /// Read the passphrase from the open descriptor N
    #[arg(long, value_name = "N")]
    passphrase_fd: Option<i32>,
}

impl PassphraseSource {
    /// Whether the user has said where it comes from.
    pub(super) fn is_named(&self) -> bool {
        self.passphrase_file.is_some() || self.passphrase_fd.is_some()
    }

    /// The passphrase; a new one is asked for twice.
    pub(super) fn read(&self, new: bool) -> Result<SecretVec, Failure> {
        let file = match (&self.passphrase_file, self.passphrase_fd) {
            (Some(name), _) => files::open(Some(name))?,
            (None, Some(number)) => sys::duplicate(number)
                .map_err(|source| Failure::Open { path: format!("descriptor {number}").into(), source })?,
            (None, None) => return ask(new),
        };
        from_file(file)
    }
}

fn from_file(file: File) -> Result<SecretVec, Failure> {
    // One more than allowed tells a longer one, one more is the line's end.
    let mut passphrase = read_at_most(file, PASSPHRASE_MAX + 2).map_err(Failure::ReadPassphrase)?;
    if let Some(rest) = passphrase.expose_secret().strip_suffix(b"\n") {
        let len = rest.len();
        passphrase.truncate(len);
    }
    check(passphrase)
}

fn check(passphrase: SecretVec) -> Result<SecretVec, Failure> {
    match passphrase.len() {
        0 => Err(Failure::EmptyPassphrase),
        1..=PASSPHRASE_MAX => Ok(passphrase),
        _ => Err(Failure::LongPassphrase),
    }
}

fn ask(new: bool) -> Result<SecretVec, Failure> {
    let first = ask_once(if new { "New passphrase: " } else { "Passphrase: " })?;
    if new && ask_once("The same again: ")?.expose_secret() != first.expose_secret() {
        return Err(Failure::PassphrasesDiffer);
    }
    Ok(first)
}

/// Whether somebody at the terminal types `yes`.
pub(super) fn confirm(prompt: &str) -> Result<bool, Failure> {
    let mut terminal = File::options().read(true).write(true).open("/dev/tty").map_err(Failure::NoYes)?;
    terminal.write_all(prompt.as_bytes()).map_err(Failure::NoYes)?;
    let mut answer = String::new();
    let _ = BufReader::new(terminal).take(ANSWER_MAX).read_line(&mut answer).map_err(Failure::NoYes)?;
    Ok(answer.trim() == "yes")
}

fn ask_once(prompt: &str) -> Result<SecretVec, Failure> {
    let answer = interrupt::with_terminal(|| rpassword::prompt_password(prompt));
    let answer = Zeroizing::new(answer.map_err(|error| match error.kind() {
        // The terminal is as it was again.
        io::ErrorKind::Interrupted => {
            interrupt::give_way();
            Failure::Interrupted
        }
        _ => Failure::NoTerminal(error),
    })?);
    let mut passphrase = SecretVec::with_capacity(answer.len());
    passphrase.push_slice(answer.as_bytes()).map_err(|_| Failure::LongPassphrase)?;
    check(passphrase)
}

/// A key of exactly 32 bytes, or of 64 hexadecimal digits.
pub(super) fn import(name: &OsStr, hex: bool) -> Result<Secret<KEY_LEN>, Failure> {
    let file = files::open(Some(name))?;
    let bytes =
        read_at_most(file, KEY_FILE_MAX + 1).map_err(|source| Failure::Open { path: name.into(), source })?;
    parse_key(bytes.expose_secret(), hex)
}

fn parse_key(bytes: &[u8], hex: bool) -> Result<Secret<KEY_LEN>, Failure> {
    if !hex {
        return Secret::from_slice(bytes).ok_or(Failure::KeyLength { got: bytes.len(), most: KEY_FILE_MAX });
    }
    let digits = bytes.trim_ascii_end();
    if bytes.len() > KEY_FILE_MAX || digits.len() != 2 * KEY_LEN {
        return Err(Failure::KeyDigits { got: digits.len(), most: KEY_FILE_MAX });
    }
    let mut key = Secret::zeroed();
    base16ct::mixed::decode(digits, key.expose_secret_mut()).map_err(|_| Failure::NotADigit)?;
    Ok(key)
}

fn read_at_most(mut file: File, max: usize) -> io::Result<SecretVec> {
    let mut bytes = SecretVec::with_capacity(max);
    let mut room = bytes.as_mut_slice();
    let mut total = 0_usize;
    while !room.is_empty() {
        match file.read(room) {
            Ok(0) => break,
            Ok(got) => {
                total = total.saturating_add(got);
                room = room.get_mut(got..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(total);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn passphrase(bytes: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        from_file(file.reopen().unwrap()).map(|passphrase| passphrase.expose_secret().to_vec())
    }

    #[test]
    fn one_line_end_is_not_part_of_a_passphrase_and_lengths_are_checked() {
        assert_eq!(passphrase(b"pass word\n").unwrap(), b"pass word");
        assert_eq!(passphrase(b"pass\n\n").unwrap(), b"pass\n");
        assert_eq!(passphrase(b" \r\xff").unwrap(), b" \r\xff");
        assert!(matches!(passphrase(b""), Err(Failure::EmptyPassphrase)));
        assert!(matches!(passphrase(b"\n"), Err(Failure::EmptyPassphrase)));
        let longest = [b'x'; PASSPHRASE_MAX];
        assert_eq!(passphrase(&longest).unwrap().len(), PASSPHRASE_MAX);
        assert_eq!(passphrase(&[&longest[..], b"\n"].concat()).unwrap().len(), PASSPHRASE_MAX);
        assert!(matches!(passphrase(&[&longest[..], b"x\n"].concat()), Err(Failure::LongPassphrase)));
        assert!(matches!(passphrase(&[b'x'; 5000]), Err(Failure::LongPassphrase)));
    }

    #[test]
    fn a_key_has_exactly_32_bytes_or_64_digits() {
        assert_eq!(parse_key(&[7; 32], false).unwrap().expose_secret(), &[7; 32]);
        for len in [0, 31, 33, 64] {
            assert!(
                matches!(parse_key(&vec![7; len], false), Err(Failure::KeyLength { got, .. }) if got == len)
            );
        }
        let digits = "00ff".repeat(16) + " \n";
        assert_eq!(parse_key(digits.as_bytes(), true).unwrap().expose_secret()[..4], [0, 255, 0, 255]);
        assert!(matches!(parse_key(&digits.as_bytes()[1..], true), Err(Failure::KeyDigits { got: 63, .. })));
        assert!(matches!(parse_key(digits.replace('f', "g").as_bytes(), true), Err(Failure::NotADigit)));
        assert!(matches!(parse_key(digits.replace('f', "+").as_bytes(), true), Err(Failure::NotADigit)));
    }
}
