//! Streams of every kind against each other: what comes out is what went in, and what was changed does not come out.

use std::{
    cell::Cell,
    fs::{self, File},
    io::{self, Read, Write},
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use kms_envelope::{
    Body, CHUNK_LEN, ContextRef, EncryptionContext, HeaderError, SEALED_CHUNK_LEN, STREAM_HEAD_LEN, TAG_LEN,
};
use kms_protocol::{KeyRef, Opcode};

use super::{
    Numbers,
    fake::{self, Fake, Fate},
    options,
};
use crate::{Client, Error, Head, Input, LocalOpening, LocalSealing, Options, Output, pump::BLOCK_CHUNKS};

const KEY: KeyRef<'_> = KeyRef::Name("key");
const BLOCK: usize = BLOCK_CHUNKS * CHUNK_LEN;

fn lengths() -> Vec<usize> {
    let mib = 1 << 20;
    vec![0, 1, 16383, 16384, 16385, BLOCK - 1, BLOCK, BLOCK + 1, mib - 1, mib, mib + 1, 4 * BLOCK, 5 * mib]
}

/// Gives a few bytes at a time, never a whole chunk.
struct Pieces<'a> {
    bytes: &'a [u8],
    piece: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(self.piece);
        (&mut self.bytes).read(&mut buf[..len])
    }
}

/// What the specification says a stream of `plaintext` is, sealed in one piece.
fn expected(context: ContextRef<'_>, plaintext: &[u8]) -> Vec<u8> {
    let (head, key) = fake::stream(context);
    let mut strides = Vec::new();
    for chunk in plaintext.chunks(CHUNK_LEN) {
        strides.extend_from_slice(chunk);
        strides.extend_from_slice(&[0; TAG_LEN]);
    }
    if plaintext.len().is_multiple_of(CHUNK_LEN) {
        strides.extend_from_slice(&[0; TAG_LEN]);
    }
    Body::new(key).seal_chunks(0, &mut strides).unwrap();
    [&head[..], &strides].concat()
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Way {
    Local,
    Remote,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Shape {
    File,
    Pipe,
}

fn with_input<T>(shape: Shape, bytes: &[u8], run: impl FnOnce(Input<'_>) -> T) -> T {
    match shape {
        Shape::Pipe => run(Input::from_reader(Pieces { bytes, piece: 5003 })),
        Shape::File => {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(bytes).unwrap();
            run(Input::from_file(file.reopen().unwrap()).unwrap())
        }
    }
}

/// Runs with an output; gives back what arrived there, too. A failed file is thrown away by its owner, so it counts as nothing.
fn with_output<T>(
    shape: Shape,
    run: impl FnOnce(Output<'_>) -> Result<T, Error>,
) -> (Result<T, Error>, Vec<u8>) {
    match shape {
        Shape::Pipe => {
            let mut bytes = Vec::new();
            let done = run(Output::to_writer(&mut bytes));
            (done, bytes)
        }
        Shape::File => {
            let file = tempfile::NamedTempFile::new().unwrap();
            let done = run(Output::to_new_file(file.reopen().unwrap()));
            let bytes = if done.is_ok() { fs::read(file.path()).unwrap() } else { Vec::new() };
            (done, bytes)
        }
    }
}

struct Streams {
    fake: Fake,
    tried: Cell<usize>,
    context: EncryptionContext,
}

impl Streams {
    fn new() -> Self {
        Self {
            fake: Fake::honest(),
            tried: Cell::new(0),
            context: EncryptionContext::from_pairs([("table", "people"), ("row", "7")]).unwrap(),
        }
    }

    fn client(&self) -> Client {
        Client::connect(&options(&self.fake)).unwrap()
    }

    fn seal(&self, way: Way, input: Input<'_>, output: Output<'_>) -> Result<u64, Error> {
        let mut client = self.client();
        match way {
            Way::Local => client.stream_new(KEY, self.context.as_ref())?.run(input, output, &()),
            Way::Remote => client.remote_stream_new(KEY, self.context.as_ref())?.run(input, output, &()),
        }
    }

    fn open(&self, way: Way, mut input: Input<'_>, output: Output<'_>) -> Result<u64, Error> {
        let Head::Stream(_, head) = input.head()? else { panic!("not a stream") };
        let mut client = self.client();
        match way {
            Way::Local => client.stream_open(KEY, self.context.as_ref(), &head)?.run(input, output, &()),
            Way::Remote => {
                client.remote_stream_open(KEY, self.context.as_ref(), &head)?.run(input, output, &())
            }
        }
    }
}

#[test]
fn every_length_goes_round_every_way() {
    let streams = Streams::new();
    let mut numbers = Numbers(2);
    for len in lengths() {
        let plaintext = numbers.bytes(len);
        let sealed = expected(streams.context.as_ref(), &plaintext);
        for way in [Way::Local, Way::Remote] {
            for from in [Shape::File, Shape::Pipe] {
                for to in [Shape::File, Shape::Pipe] {
                    let case = format!("{len} bytes, {way:?}, {from:?} to {to:?}");
                    let (done, out) = with_output(to, |output| {
                        with_input(from, &plaintext, |input| streams.seal(way, input, output))
                    });
                    assert_eq!(done.unwrap(), len as u64, "{case}");
                    assert!(out == sealed, "sealed {case}");
                    let (done, out) = with_output(to, |output| {
                        with_input(from, &sealed, |input| streams.open(way, input, output))
                    });
                    assert_eq!(done.unwrap(), len as u64, "{case}");
                    assert!(out == plaintext, "opened {case}");
                }
            }
        }
    }
}

/// Opening `sealed` must fail, and give out nothing. Through the agent every fourth case is tried: there the chunks are the agent's
/// to judge, and what is ours is the same code.
fn refused(streams: &Streams, sealed: &[u8], case: &str) {
    let tried = streams.tried.replace(streams.tried.get() + 1);
    let remote = if tried.is_multiple_of(4) { 4 } else { 2 };
    let ways = [
        (Way::Local, Shape::File, Shape::Pipe),
        (Way::Local, Shape::Pipe, Shape::Pipe),
        (Way::Remote, Shape::File, Shape::Pipe),
        (Way::Remote, Shape::Pipe, Shape::File),
    ];
    for (way, from, to) in ways.into_iter().take(remote) {
        let (done, out) =
            with_output(to, |output| with_input(from, sealed, |input| streams.open(way, input, output)));
        let error = done.expect_err(case);
        let invalid = matches!(error, Error::InvalidCiphertext | Error::NotACiphertext(_))
            || error.status() == Some(kms_protocol::Status::InvalidCiphertext);
        assert!(invalid, "{case}, {way:?}, {from:?} to {to:?}: {error:?}");
        assert_eq!(error.exit_code(), 1);
        assert!(out.is_empty(), "{case}, {way:?}, {from:?} to {to:?}: {} bytes given out", out.len());
    }
}

#[test]
fn what_was_cut_extended_reordered_or_changed_is_refused_and_nothing_is_given_out() {
    let streams = Streams::new();
    let mut numbers = Numbers(3);
    // More than one block, and an input that is read at several places at once.
    let plaintext = numbers.bytes(4 * BLOCK + 100);
    let sealed = expected(streams.context.as_ref(), &plaintext);
    let chunk = |number: usize| STREAM_HEAD_LEN + number * SEALED_CHUNK_LEN;
    let last = chunk(plaintext.len() / CHUNK_LEN);

    for len in [
        0,
        1,
        27,
        28,
        29,
        131,
        187,
        188,
        189,
        203,
        204,
        last,
        last + 1,
        last + 15,
        last + 16,
        sealed.len() - 1,
    ] {
        refused(&streams, &sealed[..len], &format!("cut at {len}"));
    }
    for number in [1, BLOCK_CHUNKS, 3 * BLOCK_CHUNKS + 1] {
        refused(&streams, &sealed[..chunk(number)], &format!("cut at chunk {number}"));
    }
    for more in [1, 15, 16, 17, SEALED_CHUNK_LEN - 116, SEALED_CHUNK_LEN] {
        refused(&streams, &[&sealed[..], &vec![0; more]].concat(), &format!("{more} bytes more"));
    }
    refused(&streams, &[&sealed[..], &sealed[last..]].concat(), "the last chunk twice");
    for (one, other) in [(0, 1), (BLOCK_CHUNKS - 1, BLOCK_CHUNKS), (0, 3 * BLOCK_CHUNKS)] {
        let mut swapped = sealed.clone();
        swapped[chunk(one)..chunk(one + 1)].copy_from_slice(&sealed[chunk(other)..chunk(other + 1)]);
        swapped[chunk(other)..chunk(other + 1)].copy_from_slice(&sealed[chunk(one)..chunk(one + 1)]);
        refused(&streams, &swapped, "two chunks swapped");
    }
    let mut shorter = sealed[..chunk(2)].to_vec();
    shorter.extend_from_slice(&sealed[chunk(3)..]);
    refused(&streams, &shorter, "a chunk left out");
    for _ in 0..24 {
        let at = numbers.below(sealed.len());
        let mut changed = sealed.clone();
        changed[at] ^= 1 << numbers.below(8);
        // Key id and version are the agent's to judge.
        if !(8..28).contains(&at) {
            refused(&streams, &changed, &format!("byte {at} changed"));
        }
    }
    let other = Streams { context: EncryptionContext::from_pairs([("a", "b")]).unwrap(), ..Streams::new() };
    refused(&other, &sealed, "another context");
}

/// A stream that is longer than what is held back, with its last chunk broken.
fn long_and_broken(streams: &Streams) -> (Vec<u8>, Vec<u8>) {
    let plaintext = Numbers(4).bytes(crate::stream::HELD_MAX + 3 * BLOCK + 5);
    let mut sealed = expected(streams.context.as_ref(), &plaintext);
    *sealed.last_mut().unwrap() ^= 1;
    (plaintext, sealed)
}

#[test]
fn of_a_long_pipe_only_authentic_bytes_come_out_in_order_and_the_failure_says_so() {
    let streams = Streams::new();
    let (plaintext, sealed) = long_and_broken(&streams);
    for way in [Way::Local, Way::Remote] {
        let (done, out) = with_output(Shape::Pipe, |output| {
            with_input(Shape::Pipe, &sealed, |input| streams.open(way, input, output))
        });
        let error = done.unwrap_err();
        assert!(matches!(error, Error::Released { .. }), "{error:?}");
        assert!(error.to_string().ends_with("must not be trusted"));
        assert!(out.len() >= crate::stream::HELD_MAX && out.len() < plaintext.len());
        assert!(out == plaintext[..out.len()]);
    }
}

#[test]
fn of_a_long_file_the_last_chunk_is_looked_at_first() {
    let streams = Streams::new();
    let (_, sealed) = long_and_broken(&streams);
    for way in [Way::Local, Way::Remote] {
        let (done, out) = with_output(Shape::Pipe, |output| {
            with_input(Shape::File, &sealed, |input| streams.open(way, input, output))
        });
        assert!(!matches!(done.unwrap_err(), Error::Released { .. }));
        assert!(out.is_empty());
    }
}

/// Writes down that something was written, and what of the input had been read by then.
struct Witness {
    read: Arc<Mutex<usize>>,
    first_write_at: Arc<Mutex<Option<usize>>>,
}

impl Write for Witness {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.first_write_at.lock().unwrap().get_or_insert(*self.read.lock().unwrap());
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Counted<'a> {
    bytes: &'a [u8],
    read: Arc<Mutex<usize>>,
}

impl Read for Counted<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = (&mut self.bytes).read(buf)?;
        *self.read.lock().unwrap() += len;
        Ok(len)
    }
}

#[test]
fn a_short_stream_is_released_only_after_its_end_was_read() {
    let streams = Streams::new();
    for (len, held) in [(crate::stream::HELD_MAX, true), (crate::stream::HELD_MAX + 4 * BLOCK, false)] {
        let sealed = expected(streams.context.as_ref(), &Numbers(5).bytes(len));
        for way in [Way::Local, Way::Remote] {
            let (read, first_write_at) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(None)));
            let input = Input::from_reader(Counted { bytes: &sealed, read: Arc::clone(&read) });
            let output = Output::to_writer(Witness { read, first_write_at: Arc::clone(&first_write_at) });
            streams.open(way, input, output).unwrap();
            let first_write_at = first_write_at.lock().unwrap().unwrap();
            assert_eq!(first_write_at == sealed.len(), held, "{way:?}, {len} bytes");
            assert!(first_write_at > crate::stream::HELD_MAX);
        }
    }
}

/// Fails after so many bytes.
struct Failing(usize);

impl Read for Failing {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(self.0);
        self.0 -= len;
        if len == 0 { Err(io::ErrorKind::TimedOut.into()) } else { Ok(len) }
    }
}

impl Write for Failing {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let len = buf.len().min(self.0);
        self.0 -= len;
        if len == 0 { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(len) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn failures_of_input_and_output_stop_everything() {
    let streams = Streams::new();
    let plaintext = Numbers(6).bytes(10 * BLOCK);
    for way in [Way::Local, Way::Remote] {
        for len in [0, 1, 3 * BLOCK + 7] {
            let (done, _) = with_output(Shape::Pipe, |output| {
                streams.seal(way, Input::from_reader(Failing(len)), output)
            });
            assert!(matches!(done, Err(Error::Input(_))), "{way:?}");
            let done = with_input(Shape::File, &plaintext, |input| {
                streams.seal(way, input, Output::to_writer(Failing(len)))
            });
            assert!(matches!(done, Err(Error::Output(_))), "{way:?} {done:?}");
        }
    }
    // The connection survives what was not its fault.
    let mut client = streams.client();
    let stream = client.remote_stream_new(KEY, ContextRef::EMPTY).unwrap();
    assert!(stream.run(Input::from_reader(Failing(3 * BLOCK)), Output::to_writer(io::sink()), &()).is_err());
    client.ping().unwrap();
}

#[test]
fn a_file_that_becomes_shorter_is_noticed() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![0; 4 << 20]).unwrap();
    let input = Input::from_file(file.reopen().unwrap()).unwrap();
    file.as_file().set_len(3 << 20).unwrap();
    let (head, key) = fake::stream(ContextRef::EMPTY);
    let (done, _) =
        with_output(Shape::Pipe, |output| LocalSealing::new(head, Body::new(key)).run(input, output, &()));
    assert!(matches!(done, Err(Error::InputChanged)));
}

#[test]
fn a_file_is_read_from_its_present_position() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let plaintext = Numbers(7).bytes(3 << 20);
    file.write_all(&plaintext).unwrap();
    let mut reader = file.reopen().unwrap();
    reader.read_exact(&mut [0; 1000]).unwrap();
    let (head, key) = fake::stream(ContextRef::EMPTY);
    let input = Input::from_file(reader).unwrap();
    let (done, out) =
        with_output(Shape::Pipe, |output| LocalSealing::new(head, Body::new(key)).run(input, output, &()));
    done.unwrap();
    assert!(out == expected(ContextRef::EMPTY, &plaintext[1000..]));
}

#[test]
fn what_says_it_has_no_length_is_read_to_its_end() {
    // A regular file, as far as anybody can tell, with a length of 0.
    let input = Input::from_file(File::open("/proc/self/status").unwrap()).unwrap();
    let (head, key) = fake::stream(ContextRef::EMPTY);
    let (done, _) =
        with_output(Shape::Pipe, |output| LocalSealing::new(head, Body::new(key)).run(input, output, &()));
    assert!(done.unwrap() > 100);
    assert!(matches!(Input::from_file(File::open("/").unwrap()), Err(Error::Input(_))));
}

#[test]
fn a_remote_answer_of_another_length_or_order_is_not_taken() {
    for change in [0, 1] {
        let fake = Fake::new(move |opcode, mut reply| {
            if opcode == Opcode::RemoteStreamEncrypt {
                match change {
                    // The id of another request.
                    0 => reply[8] ^= 1,
                    // A byte less, and the length in the head to match.
                    _ => {
                        reply.pop();
                        let len = u32::try_from(reply.len() - 16).unwrap();
                        reply[..4].copy_from_slice(&len.to_le_bytes());
                    }
                }
            }
            Fate::Send(reply)
        });
        let mut client = Client::connect(&options(&fake)).unwrap();
        let stream = client.remote_stream_new(KEY, ContextRef::EMPTY).unwrap();
        let plaintext = vec![0; 10 * BLOCK];
        let input = Input::from_reader(&plaintext[..]);
        let done = stream.run(input, Output::to_writer(io::sink()), &());
        assert!(matches!(done, Err(Error::Reply(_))), "{done:?}");
        assert!(matches!(client.ping(), Err(Error::Broken)));
    }
}

/// Blocks its first write until it is told to go on.
struct Gate {
    open: Option<mpsc::Receiver<()>>,
    written: usize,
}

impl Write for Gate {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.written > 0
            && let Some(open) = self.open.take()
        {
            // Longer than an answer may take.
            let _ = open.recv_timeout(Duration::from_secs(4));
        }
        self.written += buf.len();
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_slow_reader_of_our_output_is_not_a_slow_agent() {
    let fake = Fake::honest();
    let timeout = Duration::from_secs(3);
    let mut client = Client::connect(&Options { timeout, ..options(&fake) }).unwrap();
    let stream = client.remote_stream_new(KEY, ContextRef::EMPTY).unwrap();
    let (_keep, open) = mpsc::channel();
    let plaintext = vec![0; 20 * BLOCK];
    let output = Output::to_writer(Gate { open: Some(open), written: 0 });
    assert_eq!(stream.run(Input::from_reader(&plaintext[..]), output, &()).unwrap(), plaintext.len() as u64);
}

#[test]
fn a_head_says_what_follows() {
    let (mut head, _) = fake::stream(ContextRef::EMPTY);
    let kind = |bytes: &[u8]| Input::from_reader(bytes).head();
    assert!(matches!(kind(&head), Ok(Head::Stream(..))));
    assert!(matches!(kind(&head[..100]), Err(Error::InvalidCiphertext)));
    assert!(matches!(kind(b"plain text that is long enough"), Err(Error::NotACiphertext(_))));
    head[5] = 1;
    assert!(matches!(kind(&head), Ok(Head::Message(_))));
    for not_data in [2, 5] {
        head[5] = not_data;
        assert!(matches!(kind(&head), Err(Error::NotData)));
    }
    head[5] = 4;
    assert!(matches!(kind(&head), Err(Error::NotACiphertext(HeaderError::Purpose(4)))));
    let mut input = Input::from_reader(&head[..]);
    assert!(matches!(input.rest("message", 187), Err(Error::TooLong { max: 187, .. })));
    let mut input = Input::from_reader(&head[..]);
    assert_eq!(input.rest("message", 188).unwrap().len(), 188);
}

#[test]
fn an_opened_stream_needs_its_own_key() {
    let plaintext = Numbers(8).bytes(1000);
    let sealed = expected(ContextRef::EMPTY, &plaintext);
    let mut input = Input::from_reader(&sealed[..]);
    let _ = input.head().unwrap();
    let other = EncryptionContext::from_pairs([("a", "b")]).unwrap();
    let opening = LocalOpening::new(Body::new(fake::stream(other.as_ref()).1));
    let (done, out) = with_output(Shape::Pipe, |output| opening.run(input, output, &()));
    assert!(matches!(done, Err(Error::InvalidCiphertext)));
    assert!(out.is_empty());
}
