//! The local pump: every core takes a block, seals or opens it in place, and puts it where it belongs.
//!
//! Reading, the cipher and writing of different blocks overlap without a queue: a worker keeps its block from the first read to the
//! last write, so memory is one block a worker, and plaintext is nowhere else. The first failure stops all workers.

use std::{
    io::{IoSlice, IoSliceMut},
    num::NonZero,
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use kms_envelope::{Body, CHUNK_LEN, SEALED_CHUNK_LEN, STREAM_HEAD_LEN, TAG_LEN};
use kms_secret_memory::{SecretVec, zeroize_stack};

use crate::{
    error::Error,
    stream::{Input, Output, Progress},
};

/// Chunks in a block: large enough that system calls do not matter, small enough that a block stays in a core's second cache
/// between read, cipher and write.
pub(crate) const BLOCK_CHUNKS: usize = 16;

/// Workers at most: with eight the memory, not the cipher, is the limit, and all buffers together stay below 4 MiB.
const WORKERS_MAX: usize = 8;

/// Input in one block, sealed side and plain side.
const SEALED_BLOCK_LEN: usize = BLOCK_CHUNKS * SEALED_CHUNK_LEN;
const PLAIN_BLOCK_LEN: usize = BLOCK_CHUNKS * CHUNK_LEN;

/// Stack that the cipher may have used, in bytes.
const STACK_USED: usize = 8192;

/// Which way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Seal,
    Open,
}

/// One stream on its way.
pub(crate) struct Pump<'a, 'i, 'o> {
    body: &'a Body,
    direction: Direction,
    input: &'a Input<'i>,
    output: &'a Output<'o>,
    progress: &'a dyn Progress,
    turn: Mutex<Turn>,
    turned: Condvar,
    done: AtomicU64,
}

struct Turn {
    /// The block that is written next, where order matters.
    next: u64,
    failed: Option<Error>,
    stopped: bool,
}

impl<'a, 'i, 'o> Pump<'a, 'i, 'o> {
    pub(crate) fn new(
        body: &'a Body,
        direction: Direction,
        input: &'a Input<'i>,
        output: &'a Output<'o>,
        progress: &'a dyn Progress,
    ) -> Self {
        Self {
            body,
            direction,
            input,
            output,
            progress,
            turn: Mutex::new(Turn { next: 0, failed: None, stopped: false }),
            turned: Condvar::new(),
            done: AtomicU64::new(0),
        }
    }

    /// Moves everything; returns the number of plaintext bytes.
    pub(crate) fn run(self) -> Result<u64, Error> {
        let workers = thread::available_parallelism().map_or(1, NonZero::get).min(WORKERS_MAX);
        thread::scope(|scope| {
            for _ in 1..workers {
                let spawned = thread::Builder::new().spawn_scoped(scope, || self.work());
                if let Err(error) = spawned {
                    self.stop(Error::Thread(error));
                }
            }
            self.work();
        });
        match self.turn.into_inner().unwrap_or_else(PoisonError::into_inner).failed {
            Some(error) => Err(error),
            None => Ok(self.done.into_inner()),
        }
    }

    fn work(&self) {
        let _guard = StopOnPanic(self);
        let mut buffer = SecretVec::with_capacity(SEALED_BLOCK_LEN);
        let moved = match self.direction {
            Direction::Seal => self.seal(buffer.as_mut_slice()),
            Direction::Open => self.open(buffer.as_mut_slice()),
        };
        zeroize_stack::<STACK_USED>();
        if let Err(error) = moved {
            self.stop(error);
        }
    }

    fn seal(&self, buffer: &mut [u8]) -> Result<(), Error> {
        while !self.stopped() {
            // Plaintext goes straight to its place between the tags.
            let mut slices: Vec<_> =
                buffer.chunks_mut(SEALED_CHUNK_LEN).filter_map(plain_mut).map(IoSliceMut::new).collect();
            let Some((number, len)) = self.input.next_block(PLAIN_BLOCK_LEN, &mut slices)? else { break };
            let sealed_len = sealed_len(len);
            let sealed = buffer.get_mut(..sealed_len).ok_or(Error::InputChanged)?;
            let first = number.saturating_mul(BLOCK_CHUNKS as u64);
            self.body
                .seal_chunks(first, sealed)
                .map_err(|_| Error::TooLong { what: "input", max: usize::MAX })?;
            let offset =
                number.saturating_mul(SEALED_BLOCK_LEN as u64).saturating_add(STREAM_HEAD_LEN as u64);
            self.write(number, offset, &mut [IoSlice::new(sealed)])?;
            self.count(len);
        }
        Ok(())
    }

    fn open(&self, buffer: &mut [u8]) -> Result<(), Error> {
        while !self.stopped() {
            let block = self.input.next_block(SEALED_BLOCK_LEN, &mut [IoSliceMut::new(buffer)])?;
            let Some((number, len)) = block else { break };
            let opened = buffer.get_mut(..len).ok_or(Error::InputChanged)?;
            // A last block that ends with a full chunk lacks the final one: the stream was cut between two chunks.
            if len < SEALED_BLOCK_LEN && len % SEALED_CHUNK_LEN < TAG_LEN {
                return Err(Error::InvalidCiphertext);
            }
            let first = number.saturating_mul(BLOCK_CHUNKS as u64);
            self.body.open_chunks(first, opened).map_err(|_| Error::InvalidCiphertext)?;
            let mut slices: Vec<_> =
                opened.chunks(SEALED_CHUNK_LEN).filter_map(plain).map(IoSlice::new).collect();
            let plain_len = slices.iter().map(|slice| slice.len()).sum();
            self.write(number, number.saturating_mul(PLAIN_BLOCK_LEN as u64), &mut slices)?;
            self.count(plain_len);
        }
        Ok(())
    }

    fn count(&self, bytes: usize) {
        self.done.fetch_add(bytes as u64, Ordering::Relaxed);
        self.progress.advance(bytes as u64);
    }

    fn write(&self, number: u64, offset: u64, slices: &mut [IoSlice<'_>]) -> Result<(), Error> {
        if !self.output.is_ordered() {
            return self.output.write(offset, slices);
        }
        let mut turn = self.lock();
        while turn.next != number && !turn.stopped {
            turn = self.turned.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        if turn.stopped {
            return Ok(());
        }
        drop(turn);
        // Nobody else has this turn, so nobody else writes.
        self.output.write(offset, slices)?;
        self.lock().next = number.saturating_add(1);
        self.turned.notify_all();
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.lock().stopped
    }

    /// The first failure is the one that is told.
    fn stop(&self, error: Error) {
        let mut turn = self.lock();
        turn.stopped = true;
        turn.failed.get_or_insert(error);
        drop(turn);
        self.turned.notify_all();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker that panics must not leave the others waiting for its turn.
struct StopOnPanic<'p, 'a, 'i, 'o>(&'p Pump<'a, 'i, 'o>);

impl Drop for StopOnPanic<'_, '_, '_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.lock().stopped = true;
            self.0.turned.notify_all();
        }
    }
}

/// Length of a block that holds `len` bytes of plaintext: one that is not full ends with the final chunk.
fn sealed_len(len: usize) -> usize {
    let full = (len / CHUNK_LEN).saturating_mul(SEALED_CHUNK_LEN);
    if len == PLAIN_BLOCK_LEN { full } else { full.saturating_add(len % CHUNK_LEN).saturating_add(TAG_LEN) }
}

fn plain_mut(stride: &mut [u8]) -> Option<&mut [u8]> {
    stride.split_last_chunk_mut::<TAG_LEN>().map(|(plain, _)| plain)
}

fn plain(stride: &[u8]) -> Option<&[u8]> {
    stride.split_last_chunk::<TAG_LEN>().map(|(plain, _)| plain)
}
