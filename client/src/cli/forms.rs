//! The forms that bytes have outside: as they are, one line of base64, hexadecimal digits.
//!
//! Coding takes the same time whatever the bytes are, since they may be keys; and what may be one is in memory that is wiped.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Cursor, Read},
};

use base64ct::{Base64, Encoding};
use kms_envelope::{CHUNK_LEN, MESSAGE_MAX, STREAM_HEAD_LEN, TAG_LEN};
use kms_secret_memory::SecretVec;

use super::{files, ui::Failure};
use crate::{Error, Input};

/// Longest ciphertext in one line, in bytes: that of a stream of as many bytes as a message can hold.
const TEXT_MAX: usize = STREAM_HEAD_LEN + MESSAGE_MAX + TAG_LEN * (MESSAGE_MAX / CHUNK_LEN + 1);

/// Where a ciphertext is read from.
pub(super) enum Source {
    File(File),
    Text(Cursor<Vec<u8>>),
}

impl Source {
    /// A file, or the one line of base64 in it.
    pub(super) fn open(name: Option<&OsStr>, text: bool) -> Result<Self, Failure> {
        Self::new(files::open(name)?, text)
    }

    /// As [`Source::open`], from where the file is at.
    pub(super) fn new(file: File, text: bool) -> Result<Self, Failure> {
        Ok(if text { Self::Text(Cursor::new(from_text(file)?)) } else { Self::File(file) })
    }

    /// Reads until `buf` is full or the end is there.
    pub(super) fn take(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        let mut got = 0_usize;
        while let Some(room) = buf.get_mut(got..).filter(|room| !room.is_empty()) {
            let read = match self {
                Self::File(file) => file.read(room),
                Self::Text(bytes) => bytes.read(room),
            };
            match read {
                Ok(0) => break,
                Ok(read) => got = got.saturating_add(read),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Input(error)),
            }
        }
        Ok(got)
    }

    /// Everything from here on behind `front`, `max` bytes at most.
    pub(super) fn rest(&mut self, front: &[u8], max: usize) -> Result<SecretVec, Failure> {
        let mut whole = SecretVec::with_capacity(max.saturating_add(1));
        let buf = whole.as_mut_slice();
        let (head, room) = buf.split_at_mut_checked(front.len()).ok_or(Failure::LongMessage { max })?;
        head.copy_from_slice(front);
        let len = front.len().saturating_add(self.take(room)?);
        if len > max {
            return Err(Failure::LongMessage { max });
        }
        whole.truncate(len);
        Ok(whole)
    }

    /// What is left, for a stream.
    pub(super) fn into_input(self) -> Result<Input<'static>, Error> {
        match self {
            Self::File(file) => Input::from_file(file),
            Self::Text(bytes) => Ok(Input::from_reader(bytes)),
        }
    }
}

/// The bytes of one line of base64; white space around it is not part of it.
fn from_text(mut file: File) -> Result<Vec<u8>, Failure> {
    // Room to tell a longer one, and for the line's end.
    let most = TEXT_MAX.div_ceil(3).saturating_mul(4).saturating_add(3);
    let mut line = Vec::new();
    let limit = u64::try_from(most).unwrap_or(u64::MAX);
    let _ = file.by_ref().take(limit).read_to_end(&mut line).map_err(Error::Input)?;
    if line.len() >= most {
        return Err(Failure::LongText { max: MESSAGE_MAX });
    }
    decode(line.trim_ascii()).ok_or(Failure::NotText)
}

/// The bytes of a line of base64 without its end.
pub(super) fn decode(line: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = vec![0; line.len()];
    let len = Base64::decode(line, &mut bytes).ok()?.len();
    bytes.truncate(len);
    Some(bytes)
}

/// A line of base64 without its end. Of what is no secret.
pub(super) fn encode(bytes: &[u8]) -> String {
    let mut text = vec![0; base64_len(bytes.len())];
    Base64::encode(bytes, &mut text).unwrap_or_default().to_owned()
}

/// A line of base64, with its end.
pub(super) fn line(bytes: &[u8]) -> Vec<u8> {
    format!("{}\n", encode(bytes)).into_bytes()
}

fn base64_len(len: usize) -> usize {
    len.div_ceil(3).saturating_mul(4)
}

/// Text around a secret, and the secret in base64 in between.
pub(super) fn secret_text(before: &str, secret: &[u8], behind: &str) -> SecretVec {
    around(before, base64_len(secret.len()), behind, |room| Base64::encode(secret, room).is_ok())
}

/// A secret in hexadecimal digits, with the line's end.
pub(super) fn secret_digits(secret: &[u8]) -> SecretVec {
    around("", secret.len().saturating_mul(2), "\n", |room| base16ct::lower::encode(secret, room).is_ok())
}

fn around(before: &str, len: usize, behind: &str, encode: impl FnOnce(&mut [u8]) -> bool) -> SecretVec {
    let mut text = SecretVec::with_capacity(before.len().saturating_add(len).saturating_add(behind.len()));
    let buf = text.as_mut_slice();
    // The lengths fit by construction; were they wrong, nothing at all would come out.
    let whole = buf.split_at_mut_checked(before.len()).and_then(|(front, rest)| {
        let (middle, back) = rest.split_at_mut_checked(len)?;
        front.copy_from_slice(before.as_bytes());
        back.copy_from_slice(behind.as_bytes());
        encode(middle).then_some(())
    });
    if whole.is_none() {
        text.truncate(0);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    fn text(bytes: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        from_text(file)
    }

    #[test]
    fn a_line_has_one_spelling() {
        assert_eq!(line(b"kms"), b"a21z\n");
        assert_eq!(text(b"a21z\n").unwrap(), b"kms");
        assert_eq!(text(b" a21zYQ==\r\n").unwrap(), b"kmsa");
        for bad in [&b"a21zYQ"[..], b"a21zYR==", b"a2 1z", b"a21z\na21z\n", b"a21-", b"\x92\x6b\x1c"] {
            assert!(matches!(text(bad), Err(Failure::NotText)), "{bad:?}");
        }
        let longest = line(&[7; TEXT_MAX]);
        assert_eq!(text(&longest).unwrap(), [7; TEXT_MAX]);
        assert!(matches!(text(&line(&[7; TEXT_MAX + 6])), Err(Failure::LongText { .. })));
    }

    #[test]
    fn secrets_are_spelled_as_everything_else() {
        assert_eq!(secret_text("<", b"kmsa", ">\n").expose_secret(), b"<a21zYQ==>\n");
        assert_eq!(secret_digits(b"\x00\xff\x1a").expose_secret(), b"00ff1a\n");
    }

    #[test]
    fn what_is_longer_than_a_message_is_not_read_whole() {
        let mut source = Source::Text(Cursor::new(vec![1; 10]));
        assert_eq!(source.rest(&[2; 3], 13).unwrap().expose_secret().len(), 13);
        let mut source = Source::Text(Cursor::new(vec![1; 11]));
        assert!(matches!(source.rest(&[2; 3], 13), Err(Failure::LongMessage { max: 13 })));
    }
}
