//! Streams: where they come from, where they go, and the rule by which decrypted bytes are released
//! (`docs/formats.md`, section 8; "Keys" in the manual).
//!
//! Owns [`Input`] and [`Output`] and the local streams. A sealed or opened stream is one value that is used up: a message key
//! seals one stream and is wiped.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read, Seek, Write},
    os::unix::fs::{FileExt, MetadataExt},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use kms_envelope::{
    Body, CHUNK_LEN, HEADER_LEN, Header, HeaderError, Purpose, SEALED_CHUNK_LEN, STREAM_HEAD_LEN, TAG_LEN,
};
use kms_secret_memory::SecretVec;
use nix::{
    fcntl::{FcntlArg, PosixFadviseAdvice, fcntl, posix_fadvise},
    sys::uio::{preadv, pwritev},
};

use crate::{
    error::Error,
    pump::{Direction, Pump},
};

/// A pipe of this many bytes takes a whole block, and so fewer turns between two processes; the kernel's default is 64 KiB.
const PIPE_LEN: i32 = 1 << 20;

/// Plaintext of a stream that is held back until all of it was found authentic, in bytes; a longer stream is released chunk by chunk.
pub(crate) const HELD_MAX: usize = 8 << 20;

/// Files up to this length are read from front to back; longer ones at several places at once. Below it nothing is won, and
/// files whose size is only a promise, as those of sysfs, are that short.
const SEQUENTIAL_MAX: u64 = 1 << 20;

/// Bytes of a new file that go to the disk together.
const WRITE_BEHIND: u64 = 8 << 20;

/// Is told how many bytes of plaintext have been done, from whichever thread did them.
pub trait Progress: Sync {
    /// `bytes` more.
    fn advance(&self, bytes: u64);
}

impl Progress for () {
    fn advance(&self, _bytes: u64) {}
}

/// Where a stream comes from.
pub struct Input<'a> {
    source: Source<'a>,
}

impl<'a> Input<'a> {
    /// From a file's present position on. A regular file is read at several places at once, up to the length that it has now;
    /// anything else from front to back.
    ///
    /// # Errors
    /// [`Error::Input`], also for a directory.
    pub fn from_file(mut file: File) -> Result<Self, Error> {
        let meta = file.metadata().map_err(Error::Input)?;
        if meta.is_dir() {
            return Err(Error::Input(io::ErrorKind::IsADirectory.into()));
        }
        if meta.is_file() {
            let start = file.stream_position().map_err(Error::Input)?;
            let len = meta.size().saturating_sub(start);
            if len > SEQUENTIAL_MAX {
                return Ok(Self { source: Source::Positional { file, start, len, next: AtomicU64::new(0) } });
            }
        } else {
            // Only time is lost where the kernel does not let us.
            let _ = fcntl(&file, FcntlArg::F_SETPIPE_SZ(PIPE_LEN));
        }
        Ok(Self::from_reader(file))
    }

    /// From anything, from front to back.
    pub fn from_reader(reader: impl Read + Send + 'a) -> Self {
        let state = Sequential { reader: Box::new(reader), next: 0, ended: false };
        Self { source: Source::Sequential(Mutex::new(state)) }
    }

    /// Bytes from here to the end, where that can be known.
    #[must_use]
    pub fn remaining(&self) -> Option<u64> {
        match &self.source {
            Source::Sequential(_) => None,
            Source::Positional { len, .. } => Some(*len),
        }
    }

    /// Reads the head of a ciphertext.
    ///
    /// # Errors
    /// [`Error::NotACiphertext`], [`Error::NotData`], [`Error::Input`]; [`Error::InvalidCiphertext`] when a stream ends within its
    /// head.
    pub fn head(&mut self) -> Result<Head, Error> {
        let mut bytes = [0; STREAM_HEAD_LEN];
        let (front, rest) = bytes.split_at_mut(HEADER_LEN);
        let got = self.take(front)?;
        let header = Header::parse(front.get(..got).unwrap_or_default())?;
        match header.purpose {
            Purpose::Message => Ok(Head::Message(header)),
            Purpose::Stream => {
                if self.take(rest)? < rest.len() {
                    return Err(Error::InvalidCiphertext);
                }
                Ok(Head::Stream(header, Box::new(bytes)))
            }
            Purpose::WrappedKey | Purpose::Tag => Err(Error::NotData),
            // Reserved: this release does not read it.
            Purpose::SharedMessage => Err(HeaderError::Purpose(Purpose::SharedMessage as u8).into()),
        }
    }

    /// Everything from here on, `max` bytes at most.
    ///
    /// # Errors
    /// [`Error::TooLong`], [`Error::Input`].
    pub fn rest(&mut self, what: &'static str, max: usize) -> Result<SecretVec, Error> {
        let mut bytes = SecretVec::with_capacity(max.saturating_add(1));
        let got = self.take(bytes.as_mut_slice())?;
        if got > max {
            return Err(Error::TooLong { what, max });
        }
        bytes.truncate(got);
        Ok(bytes)
    }

    /// Reads until `buf` is full or the end is there.
    fn take(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        let mut slices = [IoSliceMut::new(buf)];
        match &mut self.source {
            Source::Sequential(state) => {
                fill(&mut state.get_mut().unwrap_or_else(PoisonError::into_inner).reader, &mut slices)
            }
            Source::Positional { file, start, len, .. } => {
                let got = fill_at(file, *start, &mut slices)?;
                *start = start.saturating_add(got as u64);
                *len = len.saturating_sub(got as u64);
                Ok(got)
            }
        }
    }

    /// Fills `buf` from the last bytes of the input; only where its length is known.
    pub(crate) fn read_last(&self, buf: &mut [u8]) -> Result<(), Error> {
        let Source::Positional { file, start, len, .. } = &self.source else {
            return Err(Error::InputChanged);
        };
        let offset = start.saturating_add(len.saturating_sub(buf.len() as u64));
        let want = buf.len();
        match fill_at(file, offset, &mut [IoSliceMut::new(buf)])? {
            got if got == want => Ok(()),
            _ => Err(Error::InputChanged),
        }
    }

    /// Reads the next block of `block_len` bytes into `slices`, which hold exactly that many, and says which block it is and
    /// how long. Only the last block is shorter, and may be empty; after it there is none.
    pub(crate) fn next_block(
        &self,
        block_len: usize,
        slices: &mut [IoSliceMut<'_>],
    ) -> Result<Option<(u64, usize)>, Error> {
        match &self.source {
            Source::Sequential(state) => {
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.ended {
                    return Ok(None);
                }
                let got = fill(&mut state.reader, slices)?;
                let number = state.next;
                state.next = number.saturating_add(1);
                state.ended = got < block_len;
                Ok(Some((number, got)))
            }
            Source::Positional { file, start, len, next } => {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(begin) = number.checked_mul(block_len as u64).filter(|begin| begin <= len) else {
                    return Ok(None);
                };
                let left = usize::try_from(len.saturating_sub(begin)).unwrap_or(usize::MAX);
                let want = left.min(block_len);
                let got = fill_at(file, start.saturating_add(begin), slices)?;
                // What a file has grown by since is not part of the input.
                if got < want { Err(Error::InputChanged) } else { Ok(Some((number, want))) }
            }
        }
    }
}

enum Source<'a> {
    Sequential(Mutex<Sequential<'a>>),
    Positional { file: File, start: u64, len: u64, next: AtomicU64 },
}

struct Sequential<'a> {
    reader: Box<dyn Read + Send + 'a>,
    next: u64,
    ended: bool,
}

/// What a ciphertext begins with.
pub enum Head {
    /// A message; what follows is its body.
    Message(Header),
    /// A stream, with the whole of its head; what follows is chunks.
    Stream(Header, Box<[u8; STREAM_HEAD_LEN]>),
}

/// Where a stream goes.
pub struct Output<'a> {
    sink: Sink<'a>,
}

impl<'a> Output<'a> {
    /// To a new, empty regular file, at several places at once. After a failure its contents are to be thrown away by the caller.
    #[must_use]
    pub fn to_new_file(file: File) -> Self {
        Self { sink: Sink::File(file) }
    }

    /// To a pipe, terminal, device or anything else, in order.
    pub fn to_writer(writer: impl Write + Send + 'a) -> Self {
        let state = Ordered { writer: Box::new(writer), held: None, released: false };
        Self { sink: Sink::Ordered(Mutex::new(state)) }
    }

    /// To an open file, in order.
    #[must_use]
    pub fn to_file_in_order(file: File) -> Self {
        let _ = fcntl(&file, FcntlArg::F_SETPIPE_SZ(PIPE_LEN));
        Self::to_writer(file)
    }

    /// Writes something short and whole.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn put(self, bytes: &[u8]) -> Result<(), Error> {
        self.write(0, &mut [IoSlice::new(bytes)])?;
        self.finish()
    }

    /// Holds plaintext back until [`finish`](Self::finish), or until there is more than fits.
    pub(crate) fn hold(&mut self, expected: Option<u64>) {
        if let Sink::Ordered(state) = &mut self.sink {
            let len = expected.and_then(|len| usize::try_from(len).ok()).unwrap_or(HELD_MAX);
            // A stream that is known to be longer is released chunk by chunk from the start.
            state.get_mut().unwrap_or_else(PoisonError::into_inner).held =
                (len <= HELD_MAX).then(Held::default);
        }
    }

    /// Whether blocks have to be written in their order.
    pub(crate) fn is_ordered(&self) -> bool {
        matches!(self.sink, Sink::Ordered(_))
    }

    /// Writes the pieces of a block at `offset`; in order, if [`is_ordered`](Self::is_ordered).
    pub(crate) fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> Result<(), Error> {
        match &self.sink {
            Sink::File(file) => {
                let len = slices.iter().fold(0_u64, |sum, slice| sum.saturating_add(slice.len() as u64));
                let written = write_all_at(file, offset, slices);
                write_behind(file, offset, len);
                written
            }
            Sink::Ordered(state) => state.lock().unwrap_or_else(PoisonError::into_inner).write(slices),
        }
        .map_err(Error::Output)
    }

    /// Lets go of what was held, when all of it is known to be authentic.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        if let Sink::Ordered(state) = &self.sink {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.let_go().and_then(|()| state.writer.flush()).map_err(Error::Output)?;
        }
        Ok(())
    }

    /// Whether somebody may already have read what was written.
    pub(crate) fn released(&self) -> bool {
        match &self.sink {
            Sink::File(_) => false,
            Sink::Ordered(state) => state.lock().unwrap_or_else(PoisonError::into_inner).released,
        }
    }
}

enum Sink<'a> {
    File(File),
    Ordered(Mutex<Ordered<'a>>),
}

struct Ordered<'a> {
    writer: Box<dyn Write + Send + 'a>,
    held: Option<Held>,
    released: bool,
}

/// Plaintext that waits for the rest of its stream.
#[derive(Default)]
struct Held {
    pieces: Vec<SecretVec>,
    len: usize,
}

impl Ordered<'_> {
    fn write(&mut self, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        if let Some(held) = &mut self.held {
            let len = slices.iter().fold(0_usize, |sum, slice| sum.saturating_add(slice.len()));
            if held.len.saturating_add(len) <= HELD_MAX {
                let mut piece = SecretVec::with_capacity(len);
                slices.iter().try_for_each(|slice| piece.push_slice(slice)).map_err(io::Error::other)?;
                held.pieces.push(piece);
                held.len = held.len.saturating_add(len);
                return Ok(());
            }
            self.let_go()?;
        }
        self.released = self.released || slices.iter().any(|slice| !slice.is_empty());
        write_all_in_order(&mut self.writer, slices)
    }

    fn let_go(&mut self) -> io::Result<()> {
        for piece in self.held.take().unwrap_or_default().pieces {
            self.released = self.released || !piece.is_empty();
            self.writer.write_all(piece.expose_secret())?;
        }
        Ok(())
    }
}

/// A new stream that is sealed in this process, on all cores.
pub struct LocalSealing {
    head: [u8; STREAM_HEAD_LEN],
    body: Body,
}

impl LocalSealing {
    pub(crate) fn new(head: [u8; STREAM_HEAD_LEN], body: Body) -> Self {
        Self { head, body }
    }

    /// Writes the head and everything that `input` holds, sealed; returns the number of plaintext bytes.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::InputChanged`], [`Error::Output`]. What was written is then not a stream.
    pub fn run(self, input: Input<'_>, output: Output<'_>, progress: &dyn Progress) -> Result<u64, Error> {
        output.write(0, &mut [IoSlice::new(&self.head)])?;
        let done = Pump::new(&self.body, Direction::Seal, &input, &output, progress).run()?;
        output.finish()?;
        Ok(done)
    }
}

/// A stream that is opened in this process, on all cores.
pub struct LocalOpening {
    body: Body,
}

impl LocalOpening {
    pub(crate) fn new(body: Body) -> Self {
        Self { body }
    }

    /// Writes what `input`, whose head was read, holds; returns the number of plaintext bytes.
    ///
    /// Of an input whose length is known the last chunk is opened first. Into anything but a new file, up to 8 MiB are written only
    /// after all of it was found authentic; of more, each chunk once it and all before it were.
    ///
    /// # Errors
    /// [`Error::InvalidCiphertext`], [`Error::Input`], [`Error::InputChanged`], [`Error::Output`]; each within
    /// [`Error::Released`] when something was written before.
    pub fn run(
        self,
        input: Input<'_>,
        mut output: Output<'_>,
        progress: &dyn Progress,
    ) -> Result<u64, Error> {
        let expected = opened_len(&input)?;
        if let Some((first, len)) = last_chunk(&input) {
            let mut last = SecretVec::with_capacity(len);
            input.read_last(last.as_mut_slice())?;
            self.body.open_chunks(first, last.as_mut_slice()).map_err(|_| Error::InvalidCiphertext)?;
        }
        output.hold(expected);
        let done = Pump::new(&self.body, Direction::Open, &input, &output, progress).run();
        settle(done, &output)
    }
}

/// Ends a decryption: lets go of what was held, or says that what was given out must not be trusted.
pub(crate) fn settle(done: Result<u64, Error>, output: &Output<'_>) -> Result<u64, Error> {
    done.and_then(|done| output.finish().map(|()| done)).map_err(|source| match output.released() {
        true => Error::Released { source: Box::new(source) },
        false => source,
    })
}

/// The length of the plaintext, where that of the chunks is known.
pub(crate) fn opened_len(input: &Input<'_>) -> Result<Option<u64>, Error> {
    let Some(len) = input.remaining() else { return Ok(None) };
    //= docs/formats.md#65-lengths
    //# If r < 16 the length is impossible: r = 0 means that the final chunk is missing, and 1 to
    //# 15 bytes cannot hold a tag.
    let full = len / SEALED_CHUNK_LEN as u64;
    let rest = len % SEALED_CHUNK_LEN as u64;
    let rest = rest.checked_sub(TAG_LEN as u64).ok_or(Error::InvalidCiphertext)?;
    Ok(Some(full.saturating_mul(CHUNK_LEN as u64).saturating_add(rest)))
}

/// Number and length of the last chunk, where the length of them all is known.
pub(crate) fn last_chunk(input: &Input<'_>) -> Option<(u64, usize)> {
    let len = input.remaining()?;
    let last = usize::try_from(len % SEALED_CHUNK_LEN as u64).ok()?;
    Some((len / SEALED_CHUNK_LEN as u64, last))
}

/// Fills `slices` as far as the input reaches: a pipe gives a piece at a time, and a chunk is sealed whole or not at all.
fn fill(reader: &mut dyn Read, mut slices: &mut [IoSliceMut<'_>]) -> Result<usize, Error> {
    let mut total = 0_usize;
    IoSliceMut::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match reader.read_vectored(slices) {
            Ok(0) => break,
            Ok(got) => {
                total = total.saturating_add(got);
                IoSliceMut::advance_slices(&mut slices, got);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Input(error)),
        }
    }
    Ok(total)
}

fn fill_at(file: &File, offset: u64, mut slices: &mut [IoSliceMut<'_>]) -> Result<usize, Error> {
    let mut total = 0_usize;
    IoSliceMut::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match preadv(file, slices, position(offset, total).map_err(Error::Input)?) {
            Ok(0) => break,
            Ok(got) => {
                total = total.saturating_add(got);
                IoSliceMut::advance_slices(&mut slices, got);
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(Error::Input(errno.into())),
        }
    }
    Ok(total)
}

fn write_all_in_order(writer: &mut dyn Write, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match writer.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(put) => IoSlice::advance_slices(&mut slices, put),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_all_at(file: &File, offset: u64, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    let mut total = 0_usize;
    IoSlice::advance_slices(&mut slices, 0);
    if let [only] = slices {
        return file.write_all_at(only, offset);
    }
    while !slices.is_empty() {
        match pwritev(file, slices, position(offset, total)?) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(put) => {
                total = total.saturating_add(put);
                IoSlice::advance_slices(&mut slices, put);
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Lets the kernel start on what was written a while ago: a file is synced when it is whole, and would otherwise only begin then
/// to go to the disk.
fn write_behind(file: &File, offset: u64, len: u64) {
    let window = offset / WRITE_BEHIND;
    if offset.saturating_add(len) / WRITE_BEHIND > window {
        let start = i64::try_from(window.saturating_mul(WRITE_BEHIND));
        let len = i64::try_from(WRITE_BEHIND);
        if let (Ok(start), Ok(len)) = (start, len) {
            // Not yet on disk, so nothing of it leaves the cache; the advice is what starts the writing.
            let _ = posix_fadvise(file, start, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }
}

fn position(offset: u64, done: usize) -> io::Result<i64> {
    let position = offset.checked_add(done as u64).and_then(|position| i64::try_from(position).ok());
    position.ok_or_else(|| io::ErrorKind::FileTooLarge.into())
}
