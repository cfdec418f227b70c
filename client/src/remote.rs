//! Streams through the agent: one thread reads and sends, one receives, one writes, with a few frames under way.
//!
//! Three threads, because an agent that cannot get rid of its answers stops reading: whoever only sent would wait for ever, and an agent
//! gives up a peer that stops in the middle of a frame. The agent numbers the chunks that it seals; an error ends the stream.

use std::{
    io::{IoSlice, IoSliceMut},
    sync::mpsc::{Receiver as Queue, SyncSender, sync_channel},
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use kms_envelope::{CHUNK_LEN, SEALED_CHUNK_LEN, STREAM_HEAD_LEN, TAG_LEN};
use kms_protocol::{
    FRAME_HEAD_LEN, NoFields, Opcode, RemoteChunks, RemoteStream, Request, begin_frame, decode_fields,
    encoded_fields_len,
};
use kms_secret_memory::SecretVec;

use crate::{
    client::Client,
    connection::{Connection, Receiver, Sender},
    error::{Error, ReplyError},
    pump::Direction,
    stream::{Input, Output, Progress, last_chunk, opened_len, settle},
    wire::Reply,
};

/// Chunks in a frame at most: 256 KiB, about what the kernel keeps for a socket and what an agent reads at once.
const FRAME_CHUNKS: usize = 16;

/// Frames under way at most, from the first byte read to the last byte written: one in the agent, one in each of our threads.
const FRAMES: usize = 4;

/// A new stream that the agent seals.
pub struct RemoteSealing<'a> {
    client: &'a mut Client,
    stream: u32,
    head: [u8; STREAM_HEAD_LEN],
}

impl<'a> RemoteSealing<'a> {
    pub(crate) fn new(client: &'a mut Client, stream: u32, head: [u8; STREAM_HEAD_LEN]) -> Self {
        Self { client, stream, head }
    }

    /// As [`LocalSealing::run`](crate::LocalSealing::run).
    ///
    /// # Errors
    /// As there; [`Error::Refused`], or a failure of the connection.
    pub fn run(self, input: Input<'_>, output: Output<'_>, progress: &dyn Progress) -> Result<u64, Error> {
        output.write(0, &mut [IoSlice::new(&self.head)])?;
        let done = Run::new(self.client, self.stream, Direction::Seal, &input, &output, progress).run();
        // The last chunk has ended a whole stream; a broken one is forgotten with its number.
        if done.is_err() {
            close(self.client, self.stream);
        }
        let done = done?;
        output.finish()?;
        Ok(done)
    }
}

/// A stream that the agent opens.
pub struct RemoteOpening<'a> {
    client: &'a mut Client,
    stream: u32,
}

impl<'a> RemoteOpening<'a> {
    pub(crate) fn new(client: &'a mut Client, stream: u32) -> Self {
        Self { client, stream }
    }

    /// As [`LocalOpening::run`](crate::LocalOpening::run).
    ///
    /// # Errors
    /// As there; [`Error::Refused`], or a failure of the connection.
    pub fn run(
        mut self,
        input: Input<'_>,
        mut output: Output<'_>,
        progress: &dyn Progress,
    ) -> Result<u64, Error> {
        let done = self.open(&input, &mut output, progress);
        close(self.client, self.stream);
        settle(done, &output)
    }

    fn open(
        &mut self,
        input: &Input<'_>,
        output: &mut Output<'_>,
        progress: &dyn Progress,
    ) -> Result<u64, Error> {
        let expected = opened_len(input)?;
        if let Some((first, len)) = last_chunk(input) {
            let mut last = SecretVec::with_capacity(len);
            input.read_last(last.as_mut_slice())?;
            let fields = RemoteChunks { stream: self.stream, first };
            let request = Request::RemoteStreamDecrypt { fields, chunks: last.expose_secret() };
            let call = self.client.connection.call(&request, self.client.route.timeout)?;
            let opened = call.accept().and_then(|reply| Ok(reply.payload()?.len()));
            if !matches!(&opened, Ok(opened) if *opened == len.saturating_sub(TAG_LEN)) {
                let error = opened.map_or_else(|error| error, |_| ReplyError::Shape.into());
                if matches!(error, Error::Reply(_)) {
                    self.client.connection.break_off();
                }
                return Err(error);
            }
        }
        output.hold(expected);
        Run::new(self.client, self.stream, Direction::Open, input, output, progress).run()
    }
}

/// Lets the agent forget a stream. That it fails is no loss: a stream ends with its connection at the latest.
fn close(client: &mut Client, stream: u32) {
    let closed = client
        .connection
        .call(&Request::RemoteStreamClose(RemoteStream { stream }), client.route.timeout)
        .and_then(|call| Ok(call.accept()?.fields(decode_fields::<NoFields>)?));
    if matches!(closed, Err(Error::Reply(_))) {
        client.connection.break_off();
    }
}

/// A frame whose answer is awaited, with the memory that the answer goes to.
struct Pending {
    id: u32,
    offset: u64,
    plain_len: usize,
    answer_len: usize,
    buffer: SecretVec,
}

/// What is sent in one frame.
struct Block {
    /// Number of its first chunk.
    first: u64,
    /// Where its answer belongs, counted from the first chunk's.
    offset: u64,
    len: usize,
    /// For the answer.
    buffer: SecretVec,
}

/// An answer that is to be written.
struct Answer {
    offset: u64,
    plain_len: usize,
    operation: Opcode,
    id: u32,
    reply: Reply,
}

/// One stream on its way.
struct Run<'a, 'i, 'o> {
    client: &'a mut Client,
    stream: u32,
    direction: Direction,
    input: &'a Input<'i>,
    output: &'a Output<'o>,
    progress: &'a dyn Progress,
    chunks: usize,
}

impl<'a, 'i, 'o> Run<'a, 'i, 'o> {
    fn new(
        client: &'a mut Client,
        stream: u32,
        direction: Direction,
        input: &'a Input<'i>,
        output: &'a Output<'o>,
        progress: &'a dyn Progress,
    ) -> Self {
        // The smallest frame that a connection is kept with holds several chunks; head and fields take less than one.
        let room = client.connection.sender.frame_max.saturating_sub(SEALED_CHUNK_LEN);
        let chunks = (room / SEALED_CHUNK_LEN).clamp(1, FRAME_CHUNKS);
        Self { client, stream, direction, input, output, progress, chunks }
    }

    fn run(self) -> Result<u64, Error> {
        self.client.connection.usable()?;
        let limit = self.client.route.timeout;
        let Self { client, stream, direction, input, output, progress, chunks } = self;
        let Connection { sender, receiver, .. } = &mut client.connection;
        let stream = Stream { number: stream, direction, chunks };
        let ending = sender.ending();
        let (free, buffers) = sync_channel(FRAMES);
        for _ in 0..FRAMES {
            let _ = free.try_send(SecretVec::with_capacity(0));
        }
        let (pending, awaited) = sync_channel(FRAMES);
        let (arrived, answers) = sync_channel(FRAMES);
        let (sent, received, written) = thread::scope(|scope| {
            let sending = thread::Builder::new()
                .spawn_scoped(scope, move || stream.send(sender, input, &buffers, &pending))
                .map_err(Error::Thread);
            let receiving = thread::Builder::new()
                .spawn_scoped(scope, move || {
                    let received = stream.receive(receiver, awaited, &arrived, limit);
                    if !matches!(received, Ok(true)) {
                        // The sending thread may be waiting for an agent that waits for us.
                        ending.shut();
                    }
                    received
                })
                .map_err(Error::Thread);
            let written = stream.write(output, progress, answers, &free);
            drop(free);
            (join(sending), join(receiving), written)
        });
        let sound =
            matches!(sent, Ok(()) | Err(Error::Input(_) | Error::InputChanged | Error::InvalidCiphertext));
        if !(sound && matches!(received, Ok(true)) && written.is_ok()) {
            // Answers may be under way that nobody waits for any more.
            client.connection.break_off();
        }
        let done = written?;
        received?;
        sent.map(|()| done)
    }
}

/// What a thread came to.
fn join<T>(thread: Result<ScopedJoinHandle<'_, Result<T, Error>>, Error>) -> Result<T, Error> {
    thread?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What every thread knows of a stream.
#[derive(Clone, Copy)]
struct Stream {
    number: u32,
    direction: Direction,
    chunks: usize,
}

impl Stream {
    /// Bytes of a full block before and after the agent has had it.
    fn block_lens(self) -> (usize, usize) {
        let plain = self.chunks.saturating_mul(CHUNK_LEN);
        let sealed = self.chunks.saturating_mul(SEALED_CHUNK_LEN);
        match self.direction {
            Direction::Seal => (plain, sealed),
            Direction::Open => (sealed, plain),
        }
    }

    fn send(
        self,
        sender: &mut Sender,
        input: &Input<'_>,
        buffers: &Queue<SecretVec>,
        pending: &SyncSender<Pending>,
    ) -> Result<(), Error> {
        let (block_len, answer_len) = self.block_lens();
        let fields_len = match self.direction {
            Direction::Seal => encoded_fields_len(&RemoteStream { stream: self.number }),
            Direction::Open => encoded_fields_len(&RemoteChunks { stream: self.number, first: 0 }),
        };
        let payload_at = FRAME_HEAD_LEN.saturating_add(fields_len.map_err(|_| ReplyError::Limits)?);
        let mut buffer = SecretVec::with_capacity(payload_at.saturating_add(block_len));
        let buffer = buffer.as_mut_slice();
        // Only what its answer has room for is asked for. So the agent can always get rid of its answers, however slow whoever reads
        // our output is, and never sees half a frame.
        while let Ok(free) = buffers.recv() {
            // Straight to its place in the frame, behind a head that is written when the length is known.
            let room = buffer.get_mut(payload_at..).unwrap_or_default();
            let block = input.next_block(block_len, &mut [IoSliceMut::new(room)])?;
            let Some((number, len)) = block else { break };
            let first = number.saturating_mul(self.chunks as u64);
            let offset = number.saturating_mul(answer_len as u64);
            if self.direction == Direction::Open && len < block_len && len % SEALED_CHUNK_LEN < TAG_LEN {
                return Err(Error::InvalidCiphertext);
            }
            let sent =
                self.send_frame(sender, pending, buffer, Block { first, offset, len, buffer: free })?;
            //= docs/formats.md#63-chunks
            //# a plaintext of
            //# 16,384 bytes is a full chunk and an empty one.
            let lacks_final = len < block_len && len > 0 && len.is_multiple_of(CHUNK_LEN);
            if sent && self.direction == Direction::Seal && lacks_final {
                let Ok(free) = buffers.recv() else { break };
                let offset = offset.saturating_add(self.answer_len(len) as u64);
                self.send_frame(sender, pending, buffer, Block { first, offset, len: 0, buffer: free })?;
            }
            if !sent {
                break;
            }
        }
        // Another thread has failed, and says why.
        Ok(())
    }

    /// Sends the block that stands behind the room for its head. False: nobody waits for the answer any more.
    fn send_frame(
        self,
        sender: &mut Sender,
        pending: &SyncSender<Pending>,
        frame: &mut [u8],
        block: Block,
    ) -> Result<bool, Error> {
        let Block { first, offset, len, buffer } = block;
        let id = sender.next_id();
        let stream = self.number;
        let slot = match self.direction {
            Direction::Seal => {
                begin_frame(frame, Opcode::RemoteStreamEncrypt.code(), id, &RemoteStream { stream }, len)
            }
            Direction::Open => begin_frame(
                frame,
                Opcode::RemoteStreamDecrypt.code(),
                id,
                &RemoteChunks { stream, first },
                len,
            ),
        };
        let frame = slot.ok().and_then(|slot| frame.get(..slot.frame_len)).ok_or(ReplyError::Limits)?;
        let answer_len = self.answer_len(len);
        let plain_len = match self.direction {
            Direction::Seal => len,
            Direction::Open => answer_len,
        };
        if pending.send(Pending { id, offset, plain_len, answer_len, buffer }).is_err() {
            return Ok(false);
        }
        sender.send_bytes(frame)?;
        Ok(true)
    }

    /// Length of the answer to a payload of `len` bytes.
    fn answer_len(self, len: usize) -> usize {
        match self.direction {
            // A payload of whole chunks is answered with whole chunks; nothing at all, with the empty final one.
            Direction::Seal => {
                let chunks = len.div_ceil(CHUNK_LEN).max(1);
                len.saturating_add(chunks.saturating_mul(TAG_LEN))
            }
            Direction::Open => len.saturating_sub(len.div_ceil(SEALED_CHUNK_LEN).saturating_mul(TAG_LEN)),
        }
    }

    /// True: every answer arrived and was taken.
    fn receive(
        self,
        receiver: &mut Receiver,
        awaited: Queue<Pending>,
        arrived: &SyncSender<Answer>,
        limit: Duration,
    ) -> Result<bool, Error> {
        let operation = match self.direction {
            Direction::Seal => Opcode::RemoteStreamEncrypt,
            Direction::Open => Opcode::RemoteStreamDecrypt,
        };
        for Pending { id, offset, plain_len, answer_len, buffer } in awaited {
            let reply = receiver.receive(buffer, limit)?;
            if reply.accept(operation, id)?.payload()?.len() != answer_len {
                return Err(ReplyError::Shape.into());
            }
            if arrived.send(Answer { offset, plain_len, operation, id, reply }).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn write(
        self,
        output: &Output<'_>,
        progress: &dyn Progress,
        answers: Queue<Answer>,
        free: &SyncSender<SecretVec>,
    ) -> Result<u64, Error> {
        let start = match self.direction {
            Direction::Seal => STREAM_HEAD_LEN as u64,
            Direction::Open => 0,
        };
        let mut done = 0_u64;
        for Answer { offset, plain_len, operation, id, reply } in answers {
            let payload = reply.accept(operation, id)?.payload()?;
            output.write(offset.saturating_add(start), &mut [IoSlice::new(payload)])?;
            done = done.saturating_add(plain_len as u64);
            progress.advance(plain_len as u64);
            let _ = free.send(reply.into_buffer());
        }
        Ok(done)
    }
}
