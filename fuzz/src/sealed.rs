//! Contexts and ciphertexts: only what a writer made, and nobody changed, opens.

use kms_envelope::{
    CONTEXT_LEN_MAX, CONTEXT_PAIRS_MAX, ContextError, ContextRef, EncryptionContext, ExpandKey, HEADER_LEN,
    Header, KeyId, KeyVersion, MESSAGE_MAX, OpenError, Purpose, REWRAP_LEN, STREAM_HEAD_LEN, check_tag,
    make_tag, message_len, message_plaintext_len, new_stream, open_message, open_stream, rewrap_stream,
    seal_message,
};

use crate::script::Script;

/// Canonical bytes, against pairs read from them as `docs/formats.md`, section 5, has it.
pub(crate) fn context(input: &[u8]) {
    let parsed = ContextRef::parse(input);
    match (parsed, read_pairs(input)) {
        (Ok(context), Some(pairs)) => {
            assert_eq!(context.as_bytes(), input);
            assert!(context.pairs().eq(pairs.iter().copied()));
            assert!(input.len() <= CONTEXT_LEN_MAX && pairs.len() <= CONTEXT_PAIRS_MAX);
            assert!(pairs.windows(2).all(|two| two[0].0 < two[1].0) && pairs.iter().all(|p| !p.0.is_empty()));
            let turned = EncryptionContext::from_pairs(pairs.into_iter().rev()).unwrap();
            assert_eq!(turned.as_ref().as_bytes(), input);
        }
        (Ok(_), None) => panic!("bytes that hold no pairs are taken"),
        (Err(error), Some(pairs)) => {
            // The form is right, so a rule is broken, and whoever makes a context of these pairs is told the same or mends the order.
            let made = EncryptionContext::from_pairs(pairs.iter().copied());
            match error {
                ContextError::NotSorted => assert!(!pairs.is_sorted()),
                ContextError::DuplicateKey => assert!(made.is_err()),
                ContextError::EmptyKey => assert!(made.is_err()),
                ContextError::TooManyPairs => assert!(pairs.len() > CONTEXT_PAIRS_MAX && made.is_err()),
                ContextError::TooLong => assert!(input.len() > CONTEXT_LEN_MAX),
                ContextError::Truncated | ContextError::TrailingBytes => panic!("{error}"),
            }
        }
        (Err(_), None) => {}
    }
}

type Pairs<'a> = Vec<(&'a [u8], &'a [u8])>;

/// Whatever pairs the bytes hold, in whatever order, when they hold so many and nothing else.
fn read_pairs(bytes: &[u8]) -> Option<Pairs<'_>> {
    fn part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
        let len = usize::try_from(u32::from_be_bytes(*rest.first_chunk()?)).ok()?;
        let part = rest.get(4..4usize.checked_add(len)?)?;
        *rest = &rest[4 + len..];
        Some(part)
    }
    let count = u32::from_be_bytes(*bytes.first_chunk()?);
    let (mut rest, mut pairs) = (&bytes[4..], Vec::new());
    for _ in 0..count {
        pairs.push((part(&mut rest)?, part(&mut rest)?));
    }
    rest.is_empty().then_some(pairs)
}

fn key(number: u8) -> ExpandKey {
    ExpandKey::new(&[number; 32])
}

fn header(purpose: Purpose, version: u32) -> Header {
    Header { purpose, key_id: KeyId::from_bytes([0xa0; 16]), key_version: KeyVersion::new(version).unwrap() }
}

/// What the writer of an input made, and what was sealed.
struct Made {
    bytes: Vec<u8>,
    plaintext: Vec<u8>,
}

const DEK: [u8; 32] = [0x60; 32];
const SALT: [u8; 24] = [0x40; 24];
const DIGEST: [u8; 64] = [0x80; 64];

fn make(purpose: Purpose, context: ContextRef<'_>, plaintext: &[u8]) -> Made {
    let header = header(purpose, 7);
    let bytes = match purpose {
        Purpose::Message | Purpose::WrappedKey => {
            let mut bytes = vec![0; message_len(plaintext.len())];
            seal_message(&key(1), &header, context, &SALT, plaintext, &mut bytes).unwrap();
            bytes
        }
        Purpose::Stream => {
            new_stream(&key(1), &header, context, &DEK, &SALT, &[0x50; 24]).unwrap().0.to_vec()
        }
        Purpose::Tag => make_tag(&key(1), &header, context, &DIGEST).unwrap().to_vec(),
        Purpose::SharedMessage => {
            let mut bytes = vec![0x5a; message_len(plaintext.len())];
            bytes[..HEADER_LEN].copy_from_slice(&header.to_bytes());
            bytes
        }
    };
    Made { bytes, plaintext: plaintext.to_vec() }
}

/// Edits of a ciphertext: a place and a mask, a new end, or bytes behind.
fn edit(bytes: &mut Vec<u8>, script: &mut Script<'_>) {
    for _ in 0..script.byte() % 8 {
        match script.byte() % 4 {
            0 | 1 if !bytes.is_empty() => {
                let at = usize::from(script.u16()) % bytes.len();
                bytes[at] ^= script.byte();
            }
            2 => bytes.truncate(usize::from(script.u16())),
            _ => {
                let len = usize::from(script.byte());
                bytes.extend_from_slice(script.bytes(len));
            }
        }
    }
}

/// A purpose, a context, a plaintext and edits; or bytes that nobody made.
pub(crate) fn ciphertext(input: &[u8]) {
    let mut script = Script(input);
    let kind = script.byte();
    let wrong_key = kind & 0x40 != 0;
    let context = if kind & 0x20 == 0 {
        EncryptionContext::default()
    } else {
        EncryptionContext::from_pairs([("table", "accounts")]).unwrap()
    };
    let context = context.as_ref();
    if kind & 0x80 != 0 {
        let bytes = script.rest();
        return everything(bytes, &key(u8::from(wrong_key)), context, None);
    }
    let purpose = Purpose::from_number(1 + kind % 5).unwrap();
    let len = usize::from(script.byte());
    // Lengths around the ends of chunks, and the greatest.
    let len = [len, 16384 - 128 + len, 32768 - 128 + len, MESSAGE_MAX - len][usize::from(kind >> 3) % 4];
    let made = make(purpose, context, &vec![0x77; len]);
    let mut bytes = made.bytes.clone();
    edit(&mut bytes, &mut script);
    let as_made = (bytes == made.bytes && !wrong_key && purpose != Purpose::SharedMessage).then_some(&made);
    everything(&bytes, &key(if wrong_key { 2 } else { 1 }), context, as_made);
    if as_made.is_some() {
        let other = EncryptionContext::from_pairs([("table", "account")]).unwrap();
        everything(&bytes, &key(1), other.as_ref(), None);
        if let Some(head) = bytes.first_chunk() {
            assert!(open_stream(&key(1), head, other.as_ref()).is_err(), "another context opens");
        }
    }
}

/// Opens `bytes` in every way that there is. `made` is what has to come out in the one way that is right, and in no other.
fn everything(bytes: &[u8], key: &ExpandKey, context: ContextRef<'_>, made: Option<&Made>) {
    let parsed = Header::parse(bytes);
    if let Ok(header) = &parsed {
        assert_eq!(header.to_bytes(), bytes[..HEADER_LEN]);
    }
    let is = |purpose: Purpose| made.is_some() && parsed.is_ok_and(|header| header.purpose == purpose);
    let same_failure = |error: OpenError| match (error, parsed) {
        (OpenError::Header(error), Err(told)) => assert_eq!(error, told),
        (OpenError::Purpose | OpenError::Length | OpenError::Invalid, Ok(_)) => {}
        (error, _) => panic!("{error} is told of {parsed:?}"),
    };
    for purpose in
        [Purpose::Message, Purpose::WrappedKey, Purpose::Stream, Purpose::SharedMessage, Purpose::Tag]
    {
        let mut out = vec![0xdd; MESSAGE_MAX];
        match open_message(key, bytes, purpose, context, &mut out) {
            Ok(len) => {
                let made = made.filter(|_| is(purpose)).expect("what nobody made opens");
                assert_eq!(out[..len], made.plaintext);
                assert_eq!(message_plaintext_len(bytes.len()), Some(len));
                assert!(out[len..].iter().all(|byte| *byte == 0xdd));
            }
            Err(error) => {
                let direct = matches!(purpose, Purpose::Message | Purpose::WrappedKey);
                assert!(!direct || !is(purpose), "what was made does not open: {error}");
                same_failure(error);
                assert!(out.iter().all(|byte| *byte == 0), "a failure left bytes");
            }
        }
    }
    if let Some(head) = bytes.first_chunk::<STREAM_HEAD_LEN>() {
        match open_stream(key, head, context) {
            // Chunks would stand behind the head: what was appended to it is not looked at.
            Ok(_) => assert!(made.is_some() || head_is_made(head, context), "what nobody made opens"),
            Err(error) => {
                assert!(!is(Purpose::Stream), "what was made does not open: {error}");
                same_failure(error);
            }
        }
    }
    if let Some(prefix) = bytes.first_chunk::<REWRAP_LEN>() {
        match rewrap_stream(key, prefix, &self::key(3), &header(Purpose::Stream, 8), &SALT) {
            Ok(moved) => {
                let honest = make(Purpose::Stream, context, &[]).bytes;
                assert_eq!(*prefix, honest[..REWRAP_LEN]);
                let head = [&moved[..], &honest[REWRAP_LEN..]].concat();
                open_stream(&self::key(3), head.first_chunk().unwrap(), context).unwrap();
            }
            Err(error) => {
                assert!(!is(Purpose::Stream));
                same_failure(error);
            }
        }
    }
    match check_tag(key, bytes, context, &DIGEST) {
        Ok(()) => assert!(is(Purpose::Tag), "what nobody made is a tag"),
        Err(error) => {
            assert!(!is(Purpose::Tag), "what was made is no tag: {error}");
            same_failure(error);
        }
    }
}

fn head_is_made(head: &[u8; STREAM_HEAD_LEN], context: ContextRef<'_>) -> bool {
    make(Purpose::Stream, context, &[]).bytes == head
}
