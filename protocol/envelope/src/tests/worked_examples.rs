//! Recomputes the worked examples of `docs/formats.md`, section 14, line by line.

use std::fmt::Write as _;

use sha2::{Digest, Sha512};

use crate::{
    Body, EncryptionContext, ExpandKey, Header, KeyId, KeyVersion, OpenError, Purpose, check_tag,
    cobblestone::{Derived, INFO_PREFIX},
    expand::{LABEL_BODY, LABEL_DEK, LABEL_MAC, LABEL_MESSAGE},
    make_tag, message_len, new_stream, open_message, open_stream, rewrap_stream, seal_message,
};

const PLAINTEXT: &[u8] = b"attack at dawn";

fn sequence<const N: usize>(start: u8) -> [u8; N] {
    std::array::from_fn(|i| start + u8::try_from(i).unwrap())
}

/// `name = hex`, 32 bytes a line.
fn line(block: &mut String, name: &str, bytes: &[u8]) {
    for (i, piece) in bytes.chunks(32).enumerate() {
        let hex: String = piece.iter().fold(String::new(), |mut hex, b| {
            write!(hex, "{b:02x}").unwrap();
            hex
        });
        let (name, sign) = if i == 0 { (name, "=") } else { ("", " ") };
        writeln!(block, "{name:<20}{sign} {hex}").unwrap();
    }
}

/// The lines of one derivation and of the single chunk sealed with it.
fn sealed_body(
    block: &mut String,
    prefix: &str,
    input_key: &[u8; 32],
    salt: &[u8; 24],
    parts: [&[u8]; 3],
    plaintext: &[u8],
) -> Vec<u8> {
    let key = ExpandKey::new(input_key);
    let name = |suffix: &str| format!("{prefix}{suffix}");
    let context = parts.concat();
    let info = [INFO_PREFIX, salt, &context].concat();
    line(block, &name("context string"), &context);
    line(block, &name("info"), &info);
    line(block, &name("T(1)"), &*key.expand::<64>(&[&info]));
    line(block, &name("T(2)"), &key.expand::<128>(&[&info])[64..]);
    line(block, &name("okm"), &*key.expand::<76>(&[&info]));
    let derived = Derived::new(&key, salt, parts);
    line(block, &name("message key"), &derived.key);
    line(block, &name("base nonce"), &derived.base_nonce);
    line(block, &name("commitment"), &derived.commitment);
    line(block, &name("nonce 0"), &derived.chunks().nonce(0));
    let mut chunk = vec![0; plaintext.len() + 16];
    derived.chunks().seal_into(plaintext, &mut chunk).unwrap();
    let (ciphertext, tag) = chunk.split_at(plaintext.len());
    line(block, &name("ciphertext"), ciphertext);
    line(block, &name("tag"), tag);
    chunk
}

#[test]
fn worked_examples_stand_in_the_document() {
    let kek: [u8; 32] = sequence(0x00);
    let key = ExpandKey::new(&kek);
    let header = Header {
        purpose: Purpose::Message,
        key_id: KeyId::from_bytes(sequence(0xa0)),
        key_version: KeyVersion::new(7).unwrap(),
    };
    let context = EncryptionContext::from_pairs([("table", "accounts")]).unwrap();
    let ec = context.as_ref().as_bytes();

    let mut inputs = String::new();
    line(&mut inputs, "key version 7", &kek);
    line(&mut inputs, "key id", header.key_id.as_bytes());
    line(&mut inputs, "plaintext", PLAINTEXT);
    line(&mut inputs, "EC", ec);
    line(&mut inputs, "check value", &key.check_value());

    let mut message = String::new();
    let salt = sequence(0x40);
    line(&mut message, "header", &header.to_bytes());
    line(&mut message, "salt", &salt);
    sealed_body(&mut message, "", &kek, &salt, [LABEL_MESSAGE, &header.to_bytes(), ec], PLAINTEXT);
    let mut sealed = vec![0; message_len(PLAINTEXT.len())];
    seal_message(&key, &header, context.as_ref(), &salt, PLAINTEXT, &mut sealed).unwrap();
    line(&mut message, "message", &sealed);
    let mut out = [0; 14];
    assert_eq!(open_message(&key, &sealed, Purpose::Message, context.as_ref(), &mut out), Ok(14));
    assert_eq!(out, PLAINTEXT);

    let mut stream = String::new();
    let header = Header { purpose: Purpose::Stream, ..header };
    let (dek, dek_salt, body_salt) = (sequence(0x60), sequence(0x80), sequence(0xc0));
    line(&mut stream, "header", &header.to_bytes());
    line(&mut stream, "DEK", &dek);
    line(&mut stream, "DEK salt", &dek_salt);
    sealed_body(&mut stream, "DEK ", &kek, &dek_salt, [LABEL_DEK, &header.to_bytes(), &[]], &dek);
    line(&mut stream, "body salt", &body_salt);
    let chunk = sealed_body(&mut stream, "body ", &dek, &body_salt, [LABEL_BODY, &[3], ec], PLAINTEXT);
    let (head, message_key) =
        new_stream(&key, &header, context.as_ref(), &dek, &dek_salt, &body_salt).unwrap();
    let mut body = [PLAINTEXT, &[0; 16]].concat();
    Body::new(message_key).seal_chunks(0, &mut body).unwrap();
    assert_eq!(body, chunk);
    let sealed = [&head[..], &body].concat();
    line(&mut stream, "stream", &sealed);

    let mut rewrap = String::new();
    let new_kek: [u8; 32] = sequence(0x20);
    let new_header = Header { key_version: KeyVersion::new(8).unwrap(), ..header };
    let new_salt = sequence(0xe0);
    line(&mut rewrap, "key version 8", &new_kek);
    line(&mut rewrap, "new header", &new_header.to_bytes());
    line(&mut rewrap, "new DEK salt", &new_salt);
    let new_key = ExpandKey::new(&new_kek);
    let prefix = rewrap_stream(&key, head.first_chunk().unwrap(), &new_key, &new_header, &new_salt).unwrap();
    line(&mut rewrap, "bytes 0..132", &prefix);
    let head: [u8; 188] = [&prefix[..], &head[132..]].concat().try_into().unwrap();
    assert!(open_stream(&key, &head, context.as_ref()).is_err_and(|e| e == OpenError::Invalid));
    Body::new(open_stream(&new_key, &head, context.as_ref()).unwrap()).open_chunks(0, &mut body).unwrap();
    assert_eq!(&body[..14], PLAINTEXT);

    let mut tag = String::new();
    let header = Header { purpose: Purpose::Tag, ..header };
    let digest: [u8; 64] = Sha512::digest(PLAINTEXT).into();
    let info = [LABEL_MAC, &header.to_bytes(), ec, &digest].concat();
    line(&mut tag, "header", &header.to_bytes());
    line(&mut tag, "digest", &digest);
    line(&mut tag, "info", &info);
    line(&mut tag, "T(1)", &*key.expand::<64>(&[&info]));
    let made = make_tag(&key, &header, context.as_ref(), &digest).unwrap();
    line(&mut tag, "tag", &made);
    assert_eq!(check_tag(&key, &made, context.as_ref(), &digest), Ok(()));

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/formats.md");
    let document = std::fs::read_to_string(path).unwrap();
    let blocks =
        [("inputs", inputs), ("message", message), ("stream", stream), ("rewrap", rewrap), ("tag", tag)];
    let missing: String = blocks
        .into_iter()
        .map(|(name, lines)| format!("```example {name}\n{lines}```\n"))
        .filter(|block| !document.contains(block))
        .collect();
    assert!(missing.is_empty(), "docs/formats.md should have:\n{missing}");
}
