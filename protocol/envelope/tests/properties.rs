//! Round trips, and that nothing which was changed opens.

#![expect(
    clippy::indexing_slicing,
    clippy::string_slice,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

use kms_envelope::{
    Body, CHUNK_LEN, COMMITMENT_LEN, ContextError, ContextRef, DIGEST_LEN, EncryptionContext, ExpandKey,
    HEADER_LEN, Header, HeaderError, INPUT_TAG_LEN, KeyId, KeyVersion, MESSAGE_MAX, MessageKey, OpenError,
    Purpose, REWRAP_LEN, SALT_LEN, SEALED_CHUNK_LEN, STREAM_HEAD_LEN, SealError, TAG_LEN, body_len,
    body_plaintext_len, check_tag, chunk, make_tag, message_len, message_plaintext_len, new_stream,
    open_message, open_stream, rewrap_stream, seal_message,
};
use proptest::prelude::*;

const KEK: [u8; 32] = [0x11; 32];
const SALT: [u8; SALT_LEN] = [0x22; SALT_LEN];

fn kek() -> ExpandKey {
    ExpandKey::new(&KEK)
}

fn header(purpose: Purpose) -> Header {
    Header { purpose, key_id: KeyId::from_bytes([0x33; 16]), key_version: KeyVersion::new(5).unwrap() }
}

fn context() -> EncryptionContext {
    EncryptionContext::from_pairs([("table", "accounts"), ("column", "iban")]).unwrap()
}

fn seal(purpose: Purpose, context: ContextRef<'_>, plaintext: &[u8]) -> Vec<u8> {
    let mut message = vec![0xee; message_len(plaintext.len())];
    seal_message(&kek(), &header(purpose), context, &SALT, plaintext, &mut message).unwrap();
    message
}

/// Opens into a buffer that was not zero, and checks that a failure wiped it.
fn open(message: &[u8], purpose: Purpose, context: ContextRef<'_>) -> Result<Vec<u8>, OpenError> {
    let mut out = vec![0xdd; MESSAGE_MAX + 1000];
    let opened = open_message(&kek(), message, purpose, context, &mut out);
    match opened {
        Ok(len) => {
            assert!(out[len..].iter().all(|&b| b == 0xdd));
            out.truncate(len);
            Ok(out)
        }
        Err(error) => {
            assert!(out.iter().all(|&b| b == 0));
            Err(error)
        }
    }
}

/// A whole stream in one buffer.
fn seal_stream(context: ContextRef<'_>, plaintext: &[u8]) -> Vec<u8> {
    let (head, key) =
        new_stream(&kek(), &header(Purpose::Stream), context, &[0x44; 32], &SALT, &[0x55; SALT_LEN]).unwrap();
    let mut body = Vec::new();
    for piece in plaintext.chunks(CHUNK_LEN) {
        body.extend_from_slice(piece);
        body.extend_from_slice(&[0; TAG_LEN]);
    }
    if plaintext.len().is_multiple_of(CHUNK_LEN) {
        body.extend_from_slice(&[0; TAG_LEN]);
    }
    assert_eq!(Some(body.len() as u64), body_len(plaintext.len() as u64));
    Body::new(key).seal_chunks(0, &mut body).unwrap();
    [&head[..], &body].concat()
}

fn unstride(body: &[u8]) -> Vec<u8> {
    body.chunks(SEALED_CHUNK_LEN).flat_map(|stride| &stride[..stride.len() - TAG_LEN]).copied().collect()
}

/// As a careful reader does it: length first, then the head, then all chunks.
fn open_whole_stream(stream: &[u8], context: ContextRef<'_>) -> Result<Vec<u8>, OpenError> {
    Header::parse(stream)?;
    let (head, body) = stream.split_first_chunk::<STREAM_HEAD_LEN>().ok_or(OpenError::Length)?;
    body_plaintext_len(body.len() as u64).ok_or(OpenError::Length)?;
    let key = open_stream(&kek(), head, context)?;
    let mut body = body.to_vec();
    let opened = Body::new(key).open_chunks(0, &mut body);
    if opened.is_err() {
        assert!(body.iter().all(|&b| b == 0), "a failed opening left bytes");
    }
    opened.map(|()| unstride(&body))
}

fn invalid(error: OpenError) -> bool {
    matches!(error, OpenError::Invalid | OpenError::Length)
}

fn pairs() -> impl Strategy<Value = std::collections::BTreeMap<Vec<u8>, Vec<u8>>> {
    let key = prop::collection::vec(any::<u8>(), 1..20);
    prop::collection::btree_map(key, prop::collection::vec(any::<u8>(), 0..40), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn messages_round_trip(plaintext in prop::collection::vec(any::<u8>(), 0..40_000), pairs in pairs(), wrapped: bool) {
        let context = EncryptionContext::from_pairs(pairs).unwrap();
        let purpose = if wrapped { Purpose::WrappedKey } else { Purpose::Message };
        let message = seal(purpose, context.as_ref(), &plaintext);
        prop_assert_eq!(Header::parse(&message), Ok(header(purpose)));
        prop_assert_eq!(message_plaintext_len(message.len()), Some(plaintext.len()));
        prop_assert!(open(&message, purpose, context.as_ref()) == Ok(plaintext));
    }

    #[test]
    fn streams_round_trip_in_any_pieces(
        plaintext in prop::collection::vec(any::<u8>(), 0..100_000),
        pairs in pairs(),
        step in 1usize..4,
    ) {
        let context = EncryptionContext::from_pairs(pairs).unwrap();
        let stream = seal_stream(context.as_ref(), &plaintext);
        prop_assert!(open_whole_stream(&stream, context.as_ref()) == Ok(plaintext.clone()));
        let (head, body) = stream.split_first_chunk::<STREAM_HEAD_LEN>().unwrap();
        let key = Body::new(open_stream(&kek(), head, context.as_ref()).unwrap());
        let mut opened = Vec::new();
        for (i, piece) in body.chunks(step * SEALED_CHUNK_LEN).enumerate() {
            let mut piece = piece.to_vec();
            let sealed = piece.clone();
            key.open_chunks((i * step) as u64, &mut piece).unwrap();
            opened.extend(unstride(&piece));
            key.seal_chunks((i * step) as u64, &mut piece).unwrap();
            prop_assert!(piece == sealed);
        }
        prop_assert!(opened == plaintext);
    }

    #[test]
    fn contexts_are_canonical(pairs in pairs()) {
        let context = EncryptionContext::from_pairs(pairs.iter().rev()).unwrap();
        let parsed = ContextRef::parse(context.as_ref().as_bytes()).unwrap();
        prop_assert!(parsed.pairs().eq(pairs.iter().map(|(k, v)| (&k[..], &v[..]))));
        let len = context.as_ref().as_bytes().len();
        for cut in 0..len {
            prop_assert_eq!(ContextRef::parse(&context.as_ref().as_bytes()[..cut]), Err(ContextError::Truncated));
        }
    }

    #[test]
    fn whatever_parses_as_a_context_is_what_its_pairs_give(bytes in prop::collection::vec(0u8..4, 0..60)) {
        if let Ok(context) = ContextRef::parse(&bytes) {
            let again = EncryptionContext::from_pairs(context.pairs()).unwrap();
            prop_assert_eq!(again.as_ref().as_bytes(), &bytes[..]);
        }
    }

    #[test]
    fn whatever_parses_as_a_header_is_what_it_writes(mut bytes: [u8; HEADER_LEN], keep in 0usize..8) {
        bytes[..keep].copy_from_slice(&header(Purpose::Stream).to_bytes()[..keep]);
        if let Ok(header) = Header::parse(&bytes) {
            prop_assert_eq!(header.to_bytes(), bytes);
        }
    }

    #[test]
    fn lengths_are_each_others_inverse(n in 0u64..=chunk::PLAINTEXT_MAX) {
        prop_assert_eq!(body_plaintext_len(body_len(n).unwrap()), Some(n));
        let (number, position) = chunk::locate(n).unwrap();
        prop_assert_eq!(number * CHUNK_LEN as u64 + position, n);
        prop_assert!(chunk::offset(number).unwrap() + position < body_len(n).unwrap());
        prop_assert_eq!(number + 1, chunk::count(n).unwrap());
    }
}

#[test]
fn every_length_of_a_body_is_possible_or_not_as_the_document_says() {
    let mut possible = 0;
    for c in 0..4 * SEALED_CHUNK_LEN as u64 {
        if let Some(n) = body_plaintext_len(c) {
            assert_eq!(body_len(n), Some(c));
            possible += 1;
        }
        let message = usize::try_from(c).unwrap() + 84;
        assert_eq!(message_plaintext_len(message).map(|n| n as u64), body_plaintext_len(c));
    }
    assert_eq!(possible, 4 * CHUNK_LEN);
    assert_eq!((body_plaintext_len(u64::MAX), body_len(u64::MAX)), (None, None));
    assert_eq!(body_len(chunk::PLAINTEXT_MAX + 1), None);
    let longest = body_len(chunk::PLAINTEXT_MAX).unwrap();
    assert_eq!(body_plaintext_len(longest + 1), None);
    assert_eq!(body_plaintext_len(longest + 17), None);
    assert_eq!((chunk::count(chunk::PLAINTEXT_MAX), chunk::count(u64::MAX)), (Some(1 << 38), None));
    assert_eq!((chunk::offset(1 << 38), chunk::locate(1 << 52)), (None, None));
    assert_eq!(message_len(usize::MAX), usize::MAX);
    assert_eq!((message_plaintext_len(0), message_plaintext_len(99)), (None, None));
}

#[test]
fn no_byte_of_a_message_can_be_changed() {
    let context = context();
    let message = seal(Purpose::Message, context.as_ref(), b"fourteen bytes");
    for i in 0..message.len() {
        for bit in 0..8 {
            let mut changed = message.clone();
            changed[i] ^= 1 << bit;
            let error = open(&changed, Purpose::Message, context.as_ref()).unwrap_err();
            // Up to the flags a change is seen in the clear; a key version may become 0 only by luck that 5 does not have.
            if i >= 8 {
                assert_eq!(error, OpenError::Invalid, "byte {i}");
            } else {
                assert!(!invalid(error), "byte {i}: {error}");
            }
        }
    }
}

#[test]
fn no_byte_of_a_stream_can_be_changed() {
    let context = context();
    let stream = seal_stream(context.as_ref(), &[0x77; 2 * CHUNK_LEN + 5000]);
    let body = stream.len() - STREAM_HEAD_LEN;
    let places = (0..STREAM_HEAD_LEN).chain((0..812).map(|i| STREAM_HEAD_LEN + i * body / 812));
    let mut count = 0;
    for place in places {
        let mut changed = stream.clone();
        changed[place] ^= 0x80;
        let error = open_whole_stream(&changed, context.as_ref()).unwrap_err();
        assert_eq!(error == OpenError::Invalid, place >= 8, "byte {place}: {error}");
        count += 1;
    }
    assert_eq!(count, 1000);
}

#[test]
fn no_truncation_and_no_extension_opens() {
    let context = context();
    let message = seal(Purpose::WrappedKey, context.as_ref(), &[0x77; 32]);
    for len in 0..message.len() {
        let error = open(&message[..len], Purpose::WrappedKey, context.as_ref()).unwrap_err();
        assert_eq!(error == OpenError::Header(HeaderError::Truncated), len < HEADER_LEN, "{len}");
        assert_eq!(invalid(error), len >= HEADER_LEN, "{len}");
    }
    let stream = seal_stream(context.as_ref(), &[0x77; 300]);
    for len in 0..stream.len() {
        open_whole_stream(&stream[..len], context.as_ref()).unwrap_err();
    }
    // At and around the ends of chunks, where a cut leaves whole chunks behind.
    for plaintext_len in [CHUNK_LEN, CHUNK_LEN + 1, 2 * CHUNK_LEN] {
        let stream = seal_stream(context.as_ref(), &vec![0x77; plaintext_len]);
        let message = seal(Purpose::Message, context.as_ref(), &vec![0x77; plaintext_len]);
        for chunks in 0..=2 {
            for near in -20i64..=20 {
                let cut = |start: usize| {
                    usize::try_from((start + chunks * SEALED_CHUNK_LEN) as i64 + near).unwrap()
                };
                if let Some(short) = stream.get(..cut(STREAM_HEAD_LEN)).filter(|s| s.len() < stream.len()) {
                    assert!(invalid(open_whole_stream(short, context.as_ref()).unwrap_err()));
                }
                if let Some(short) = message.get(..cut(84)).filter(|s| s.len() < message.len()) {
                    assert!(invalid(open(short, Purpose::Message, context.as_ref()).unwrap_err()));
                }
            }
        }
        for more in [1, 16, 17, 200] {
            let long = [&stream[..], &vec![0; more]].concat();
            assert!(invalid(open_whole_stream(&long, context.as_ref()).unwrap_err()));
            let long = [&message[..], &vec![0; more]].concat();
            assert!(invalid(open(&long, Purpose::Message, context.as_ref()).unwrap_err()));
        }
    }
}

#[test]
fn a_purpose_opens_only_as_itself() {
    let context = context();
    let purposes =
        [Purpose::Message, Purpose::WrappedKey, Purpose::Stream, Purpose::SharedMessage, Purpose::Tag];
    for made in [Purpose::Message, Purpose::WrappedKey] {
        let message = seal(made, context.as_ref(), b"x");
        for asked in purposes {
            let opened = open(&message, asked, context.as_ref());
            assert_eq!(opened, if asked == made { Ok(b"x".to_vec()) } else { Err(OpenError::Purpose) });
        }
        // Relabelled, it gets past the purpose and fails in the derivation.
        for other in [Purpose::Message, Purpose::WrappedKey].into_iter().filter(|&p| p != made) {
            let mut relabelled = message.clone();
            relabelled[5] = other.number();
            assert_eq!(open(&relabelled, other, context.as_ref()), Err(OpenError::Invalid));
        }
        let head: [u8; STREAM_HEAD_LEN] = std::array::from_fn(|i| message.get(i).copied().unwrap_or(0));
        assert_eq!(open_stream(&kek(), &head, context.as_ref()).err(), Some(OpenError::Purpose));
    }
    let stream = seal_stream(context.as_ref(), b"x");
    for asked in purposes {
        assert_eq!(open(&stream, asked, context.as_ref()), Err(OpenError::Purpose));
    }
    for purpose in [Purpose::Stream, Purpose::SharedMessage, Purpose::Tag] {
        let mut out = [0xee; 101];
        let sealed = seal_message(&kek(), &header(purpose), context.as_ref(), &SALT, b"x", &mut out);
        assert_eq!((sealed, out), (Err(SealError::Purpose), [0xee; 101]));
    }
    for purpose in [Purpose::Message, Purpose::WrappedKey, Purpose::SharedMessage, Purpose::Tag] {
        let made = new_stream(&kek(), &header(purpose), context.as_ref(), &[1; 32], &SALT, &SALT);
        assert_eq!(made.err(), Some(SealError::Purpose));
        let prefix = stream.first_chunk::<REWRAP_LEN>().unwrap();
        let rewrapped = rewrap_stream(&kek(), prefix, &kek(), &header(purpose), &SALT);
        assert_eq!(rewrapped.err(), Some(OpenError::Purpose));
    }
}

#[test]
fn a_tag_is_right_for_one_input_one_context_and_one_key() {
    let (context, digest) = (context(), [0x66; DIGEST_LEN]);
    let tag = make_tag(&kek(), &header(Purpose::Tag), context.as_ref(), &digest).unwrap();
    assert_eq!(Header::parse(&tag), Ok(header(Purpose::Tag)));
    assert_eq!(make_tag(&kek(), &header(Purpose::Tag), context.as_ref(), &digest), Ok(tag));
    let check = |tag: &[u8]| check_tag(&kek(), tag, context.as_ref(), &digest);
    assert_eq!(check(&tag), Ok(()));
    for i in 0..tag.len() {
        for bit in 0..8 {
            let mut changed = tag;
            changed[i] ^= 1 << bit;
            let error = check(&changed).unwrap_err();
            // What is in the clear is seen without the key, but id and version enter the hash.
            assert_eq!(error == OpenError::Invalid, i >= 8, "byte {i}: {error}");
        }
    }
    for i in 0..DIGEST_LEN {
        let mut changed = digest;
        changed[i] ^= 1;
        assert_eq!(check_tag(&kek(), &tag, context.as_ref(), &changed), Err(OpenError::Invalid));
    }
    assert_eq!(check_tag(&kek(), &tag, ContextRef::EMPTY, &digest), Err(OpenError::Invalid));
    let other = ExpandKey::new(&[0x12; 32]);
    assert_eq!(check_tag(&other, &tag, context.as_ref(), &digest), Err(OpenError::Invalid));
    for len in 0..INPUT_TAG_LEN {
        let short = if len < HEADER_LEN { HeaderError::Truncated.into() } else { OpenError::Length };
        assert_eq!(check(&tag[..len]), Err(short));
    }
    assert_eq!(check(&[&tag[..], &[0]].concat()), Err(OpenError::Length));
    for purpose in [Purpose::Message, Purpose::WrappedKey, Purpose::Stream, Purpose::SharedMessage] {
        let made = make_tag(&kek(), &header(purpose), context.as_ref(), &digest);
        assert_eq!(made, Err(SealError::Purpose));
        let mut relabelled = tag;
        relabelled[5] = purpose.number();
        assert_eq!(check(&relabelled), Err(OpenError::Purpose));
    }
}

#[test]
fn lengths_are_checked_before_anything_is_written() {
    let context = context();
    for (plaintext_len, out_len) in [
        (0, 99),
        (0, 101),
        (5, 104),
        (MESSAGE_MAX, message_len(MESSAGE_MAX) - 1),
        (MESSAGE_MAX + 1, message_len(MESSAGE_MAX + 1)),
    ] {
        let mut out = vec![0xee; out_len];
        let plaintext = vec![1; plaintext_len];
        let sealed =
            seal_message(&kek(), &header(Purpose::Message), context.as_ref(), &SALT, &plaintext, &mut out);
        assert_eq!(sealed, Err(SealError::Length));
        assert!(out.iter().all(|&b| b == 0xee));
    }
    let message = seal(Purpose::Message, context.as_ref(), b"five!");
    let mut short = [0xdd; 4];
    let opened = open_message(&kek(), &message, Purpose::Message, context.as_ref(), &mut short);
    assert_eq!((opened, short), (Err(OpenError::Length), [0; 4]));
    let mut exact = [0xdd; 5];
    assert_eq!(open_message(&kek(), &message, Purpose::Message, context.as_ref(), &mut exact), Ok(5));
    let long = [&message[..], &vec![0; MESSAGE_MAX + 100]].concat();
    assert_eq!(open(&long, Purpose::Message, context.as_ref()), Err(OpenError::Length));
}

#[test]
fn chunk_numbers_end_at_2_to_the_38() {
    const LAST: u64 = (1 << 38) - 1;
    let body = || Body::new(MessageKey::from_parts(&[1; 32], &[2; 12]));
    for (first, len, expected) in [
        (0, 0, Err(SealError::Length)),
        (0, 15, Err(SealError::Length)),
        (0, 16, Ok(())),
        (0, SEALED_CHUNK_LEN, Ok(())),
        (0, SEALED_CHUNK_LEN + 1, Err(SealError::Length)),
        (0, SEALED_CHUNK_LEN + 15, Err(SealError::Length)),
        (0, SEALED_CHUNK_LEN + 16, Ok(())),
        (LAST, 16, Ok(())),
        (LAST, SEALED_CHUNK_LEN - 1, Ok(())),
        (LAST, SEALED_CHUNK_LEN, Err(SealError::ChunkNumber)),
        (LAST - 1, SEALED_CHUNK_LEN, Ok(())),
        (LAST - 1, SEALED_CHUNK_LEN + 16, Ok(())),
        (LAST, SEALED_CHUNK_LEN + 16, Err(SealError::ChunkNumber)),
        (LAST + 1, 16, Err(SealError::ChunkNumber)),
        (u64::MAX, 16, Err(SealError::ChunkNumber)),
        (u64::MAX, SEALED_CHUNK_LEN, Err(SealError::ChunkNumber)),
    ] {
        let mut buf = vec![0xee; len];
        assert_eq!(body().seal_chunks(first, &mut buf), expected, "{first} {len}");
        if expected.is_ok() {
            body().open_chunks(first, &mut buf).unwrap();
            assert!(unstride(&buf).iter().all(|&b| b == 0xee));
        } else {
            assert!(buf.iter().all(|&b| b == 0xee), "a refused buffer was touched");
            assert_eq!(body().open_chunks(first, &mut buf), Err(OpenError::Length), "{first} {len}");
            assert!(buf.iter().all(|&b| b == 0), "a refused buffer was not wiped");
        }
    }
}

#[test]
fn a_failed_chunk_wipes_the_chunks_before_it() {
    let key = || Body::new(MessageKey::from_parts(&[1; 32], &[2; 12]));
    let mut buf = vec![0xee; 2 * SEALED_CHUNK_LEN + 100];
    key().seal_chunks(7, &mut buf).unwrap();
    let sealed = buf.clone();
    for place in [0, SEALED_CHUNK_LEN - 1, SEALED_CHUNK_LEN, 2 * SEALED_CHUNK_LEN, buf.len() - 1] {
        let mut buf = sealed.clone();
        buf[place] ^= 1;
        assert_eq!(key().open_chunks(7, &mut buf), Err(OpenError::Invalid));
        assert!(buf.iter().all(|&b| b == 0), "{place}");
    }
    for wrong in [6, 8, 7 + (1 << 32)] {
        assert_eq!(key().open_chunks(wrong, &mut sealed.clone()), Err(OpenError::Invalid));
    }
    key().open_chunks(7, &mut sealed.clone()).unwrap();
    // A message of several chunks whose last one fails leaves none of the first in `out`: `open` asserts it.
    let mut message = seal(Purpose::Message, ContextRef::EMPTY, &vec![0x77; 2 * CHUNK_LEN]);
    *message.last_mut().unwrap() ^= 1;
    assert_eq!(open(&message, Purpose::Message, ContextRef::EMPTY), Err(OpenError::Invalid));
}

#[test]
fn a_rewrap_changes_the_first_132_bytes_only() {
    let context = context();
    let stream = seal_stream(context.as_ref(), b"the same body");
    let prefix = stream.first_chunk::<REWRAP_LEN>().unwrap();
    let new_kek = ExpandKey::new(&[0x99; 32]);
    let new_header = Header { key_version: KeyVersion::new(6).unwrap(), ..header(Purpose::Stream) };
    let moved = rewrap_stream(&kek(), prefix, &new_kek, &new_header, &[0x66; SALT_LEN]).unwrap();
    let head: [u8; STREAM_HEAD_LEN] =
        [&moved[..], &stream[REWRAP_LEN..STREAM_HEAD_LEN]].concat().try_into().unwrap();
    let mut body = stream[STREAM_HEAD_LEN..].to_vec();
    Body::new(open_stream(&new_kek, &head, context.as_ref()).unwrap()).open_chunks(0, &mut body).unwrap();
    assert_eq!(unstride(&body), b"the same body");
    assert_eq!(Header::parse(&moved), Ok(new_header));
    assert_eq!(open_stream(&kek(), &head, context.as_ref()).err(), Some(OpenError::Invalid));
    assert_eq!(open_stream(&new_kek, &head, ContextRef::EMPTY).err(), Some(OpenError::Invalid));
    assert_eq!(rewrap_stream(&new_kek, prefix, &kek(), &new_header, &SALT).err(), Some(OpenError::Invalid));
    // To the same version with the same salt it is what was there.
    assert_eq!(&rewrap_stream(&kek(), prefix, &kek(), &header(Purpose::Stream), &SALT).unwrap(), prefix);
}

#[test]
fn headers_fail_in_the_order_of_the_document() {
    // Everything wrong at once, then put right from the front.
    let mut bytes = [0xff; HEADER_LEN];
    bytes[24..].fill(0);
    assert_eq!(Header::parse(&bytes[..27]), Err(HeaderError::Truncated));
    assert_eq!(Header::parse(&[]), Err(HeaderError::Truncated));
    let good = header(Purpose::Stream).to_bytes();
    for (end, error) in [
        (3, HeaderError::NotOurs),
        (4, HeaderError::Format(0xff)),
        (5, HeaderError::Suite(0xff)),
        (6, HeaderError::Purpose(0xff)),
        (8, HeaderError::Flags(0xffff)),
        (28, HeaderError::Version),
    ] {
        assert_eq!(Header::parse(&bytes), Err(error));
        bytes[..end].copy_from_slice(&good[..end]);
    }
    assert_eq!(Header::parse(&bytes), Ok(header(Purpose::Stream)));
}

#[test]
fn limits_of_the_encryption_context() {
    let many = |n: usize| EncryptionContext::from_pairs((0..n).map(|i| (format!("k{i:03}"), "")));
    many(64).unwrap();
    assert_eq!(many(65).unwrap_err(), ContextError::TooManyPairs);
    let endless = std::iter::repeat_with(|| ("k", "v"));
    assert_eq!(EncryptionContext::from_pairs(endless).unwrap_err(), ContextError::TooManyPairs);
    // 4 for the count, 4 and 1 for the key, 4 for the value's length.
    let long = |n: usize| EncryptionContext::from_pairs([("k", vec![0; n])]);
    assert_eq!(long(8192 - 13).unwrap().as_ref().as_bytes().len(), 8192);
    assert_eq!(long(8192 - 12).unwrap_err(), ContextError::TooLong);
    assert_eq!(EncryptionContext::from_pairs([("", "v")]).unwrap_err(), ContextError::EmptyKey);
    assert_eq!(
        EncryptionContext::from_pairs([("k", "1"), ("k", "2")]).unwrap_err(),
        ContextError::DuplicateKey
    );
    assert_eq!(EncryptionContext::default().as_ref(), ContextRef::EMPTY);
    assert_eq!(EncryptionContext::from_pairs::<&str, &str>([]).unwrap().as_ref(), ContextRef::EMPTY);
    assert_eq!(ContextRef::parse(&[0xff; 4]).unwrap_err(), ContextError::TooManyPairs);
}

#[test]
fn key_ids_have_one_spelling() {
    let id = KeyId::from_bytes([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
    let text = "000102030405060708090a0b0c0d0eff";
    assert_eq!((id.to_string().as_str(), text.parse()), (text, Ok(id)));
    for wrong in ["", &text[1..], &text.to_uppercase(), &format!("+{}", &text[1..]), &format!("{text}0")] {
        wrong.parse::<KeyId>().unwrap_err();
    }
    assert_eq!((KeyVersion::new(0), KeyVersion::FIRST.value()), (None, 1));
}

#[test]
fn contexts_do_not_show_themselves() {
    let shown = format!("{:?} {:?}", context(), context().as_ref());
    assert!(!shown.contains("iban") && !shown.contains("105, 98"), "{shown}");
}

#[test]
fn bodies_can_be_shared_by_threads() {
    fn check<T: Send + Sync>() {}
    check::<Body>();
    check::<ExpandKey>();
    assert_eq!(HEADER_LEN + SALT_LEN + COMMITMENT_LEN + TAG_LEN, message_len(0));
}
