//! Writes the vectors of `docs/formats.md`, section 15, that are not there yet.
//!
//!     cargo run -p kms-envelope --example make-vectors -- tests/vectors/formats
//!
//! A file that is there is never touched: what one release wrote, every later one opens, so a vector is changed by nobody and
//! replaced by hand. Each new file is run before it is written, and has to come out as it says.

#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "run by hand by who adds vectors; a panic is how it says what is wrong"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{fmt::Write as _, fs, io::Write as _, path::PathBuf, process::ExitCode};

use support::{Vector, hex};

type Fields = Vec<(&'static str, String)>;

const KEK: u8 = 0x01;
const OTHER_KEK: u8 = 0x51;
const TEXT: &[u8] = b"attack at dawn";

fn sequence(start: u8, len: u8) -> String {
    hex(&(0..len).map(|i| start.wrapping_add(i)).collect::<Vec<_>>())
}

fn set(mut fields: Fields, name: &'static str, value: impl Into<String>) -> Fields {
    let value = value.into();
    match fields.iter_mut().find(|(known, _)| *known == name) {
        Some(field) => field.1 = value,
        None => fields.push((name, value)),
    }
    fields
}

fn add(mut fields: Fields, name: &'static str, value: impl Into<String>) -> Fields {
    fields.push((name, value.into()));
    fields
}

fn without(fields: Fields, names: &[&str]) -> Fields {
    fields.into_iter().filter(|(name, _)| !names.contains(name)).collect()
}

fn common(operation: &str) -> Fields {
    vec![
        ("expect", "success".into()),
        ("operation", operation.into()),
        ("kek", sequence(KEK, 32)),
        ("key_id", sequence(0xa0, 16)),
        ("version", "7".into()),
        ("context", format!("{}={}", hex(b"table"), hex(b"accounts"))),
    ]
}

fn message(operation: &str) -> Fields {
    let fields = set(common(operation), "salt", sequence(0x40, 24));
    set(fields, "plaintext", hex(TEXT))
}

fn stream() -> Fields {
    let fields = set(common("open-stream"), "dek", sequence(0x60, 32));
    let fields = set(fields, "dek_salt", sequence(0x80, 24));
    let fields = set(fields, "body_salt", sequence(0xc0, 24));
    set(fields, "plaintext", hex(TEXT))
}

fn tag() -> Fields {
    set(common("check-tag"), "plaintext", hex(TEXT))
}

fn long(fields: Fields, len: usize) -> Fields {
    set(without(fields, &["plaintext"]), "plaintext_repeat", format!("77 {len}"))
}

fn text(fields: &Fields) -> String {
    fields.iter().fold(String::new(), |mut text, (name, value)| {
        writeln!(text, "{}", format!("{name}: {value}").trim_end()).unwrap();
        text
    })
}

fn sealed(fields: &Fields) -> Vec<u8> {
    Vector::parse(&text(fields)).unwrap().seal().unwrap()
}

struct Vectors(Vec<(String, Fields)>);

impl Vectors {
    fn push(&mut self, name: impl Into<String>, fields: Fields) {
        self.0.push((name.into(), fields));
    }

    /// A success with its ciphertext.
    fn success(&mut self, name: &str, fields: Fields) {
        let ciphertext = hex(&sealed(&fields));
        self.push(name, add(fields, "ciphertext", ciphertext));
    }

    /// A short ciphertext that was made from `fields` and changed. What it was made with is left out.
    fn failure(
        &mut self,
        name: &str,
        fields: &Fields,
        expect: &str,
        why: &str,
        change: impl FnOnce(&mut Vec<u8>),
    ) {
        let mut ciphertext = sealed(fields);
        change(&mut ciphertext);
        let mut made_with = vec!["salt", "dek", "dek_salt", "body_salt"];
        // A tag is checked against its input.
        if !fields.contains(&("operation", "check-tag".to_owned())) {
            made_with.push("plaintext");
        }
        let fields = without(fields.clone(), &made_with);
        let fields = expecting(fields, expect, why);
        self.push(name, add(fields, "ciphertext", hex(&ciphertext)));
    }

    /// A long ciphertext: how to make and change it, and its hash.
    fn edited(&mut self, name: &str, fields: Fields, expect: &str, why: &str, edits: &[&str]) {
        let mut fields = expecting(fields, expect, why);
        for edit in edits {
            fields = add(fields, "edit", *edit);
        }
        // The hash is found by asking for it: a file with a wrong one is answered with the right one.
        let asked = add(fields.clone(), "ciphertext_sha512", "");
        let answer = Vector::parse(&text(&asked)).unwrap().ciphertext().unwrap_err();
        let hash = answer.strip_prefix("ciphertext_sha512 is ").unwrap().to_owned();
        self.push(name, add(fields, "ciphertext_sha512", hash));
    }

    fn context(&mut self, name: &str, expect: &str, bytes: &str, repeat: Option<String>) {
        let fields = vec![
            ("expect", expect.to_owned()),
            ("operation", "parse-context".to_owned()),
            ("context_bytes", bytes.replace(' ', "")),
        ];
        self.push(name, repeat.into_iter().fold(fields, |fields, r| add(fields, "context_repeat", r)));
    }
}

fn expecting(fields: Fields, expect: &str, why: &str) -> Fields {
    let mut fields = set(fields, "expect", expect);
    if !why.is_empty() {
        fields.insert(1, ("why", why.to_owned()));
    }
    fields
}

const INVALID: &str = "invalid-ciphertext";

fn headers(v: &mut Vectors) {
    let m = message("open-message");
    for len in [0usize, 1, 3, 27] {
        v.failure(&format!("header-{len}-bytes"), &m, "malformed: header length", "", |c| c.truncate(len));
    }
    for i in 0..3 {
        v.failure(&format!("header-magic-{i}"), &m, "malformed: magic", "", |c| c[i] ^= 1);
    }
    for (name, expect, offset, value) in [
        ("format-0", "unsupported: format", 3, 0),
        ("format-2", "unsupported: format", 3, 2),
        ("suite-0", "unsupported: suite", 4, 0),
        ("suite-2", "unsupported: suite", 4, 2),
        ("purpose-0", "unsupported: purpose", 5, 0),
        ("purpose-6", "unsupported: purpose", 5, 6),
        ("purpose-255", "unsupported: purpose", 5, 255),
        ("flags-high", "unsupported: flags", 6, 0x80),
        ("flags-low", "unsupported: flags", 7, 1),
    ] {
        v.failure(&format!("header-{name}"), &m, expect, "", |c| c[offset] = value);
    }
    v.failure("header-version-0", &m, "malformed: key version", "", |c| c[24..28].fill(0));
    v.failure("header-order-magic-first", &m, "malformed: magic", "", |c| c[..8].fill(0xff));
    v.failure("header-order-format-before-flags", &m, "unsupported: format", "", |c| c[3..8].fill(0xff));
    v.failure("header-order-flags-before-version", &m, "unsupported: flags", "", |c| {
        c[7] = 1;
        c[24..28].fill(0);
    });
    v.failure("header-order-version-before-operation", &m, "malformed: key version", "", |c| {
        c[5] = 3;
        c[24..28].fill(0);
    });
    v.failure("message-key-id-changed", &m, INVALID, "header changed: key id", |c| c[8] ^= 1);
    v.failure("message-version-changed", &m, INVALID, "header changed: key version", |c| c[27] ^= 1);
    v.failure("message-opened-as-wrapped-key", &m, "malformed: purpose", "", |_| {});
    let last = v.0.last_mut().unwrap();
    last.1 = set(std::mem::take(&mut last.1), "operation", "open-wrapped-key");
    v.failure("message-opened-as-stream", &m, "malformed: purpose", "", |_| {});
    let last = v.0.last_mut().unwrap();
    last.1 = set(std::mem::take(&mut last.1), "operation", "open-stream");
    v.failure("message-relabelled-as-wrapped-key", &m, INVALID, "header changed: purpose", |c| c[5] = 2);
    let last = v.0.last_mut().unwrap();
    last.1 = set(std::mem::take(&mut last.1), "operation", "open-wrapped-key");
    v.failure("purpose-4-opened-as-message", &m, "malformed: purpose", "", |c| c[5] = 4);
    let w = message("open-wrapped-key");
    v.failure("wrapped-key-opened-as-message", &w, "malformed: purpose", "", |_| {});
    let last = v.0.last_mut().unwrap();
    last.1 = set(std::mem::take(&mut last.1), "operation", "open-message");
    v.failure("wrapped-key-relabelled-as-message", &w, INVALID, "header changed: purpose", |c| c[5] = 1);
    let last = v.0.last_mut().unwrap();
    last.1 = set(std::mem::take(&mut last.1), "operation", "open-message");
    v.failure("stream-opened-as-message", &stream(), "malformed: purpose", "", |_| {});
    let last = v.0.last_mut().unwrap();
    last.1 = set(std::mem::take(&mut last.1), "operation", "open-message");
    v.failure("purpose-4-opened-as-stream", &stream(), "malformed: purpose", "", |c| c[5] = 4);
}

fn messages(v: &mut Vectors) {
    let m = message("open-message");
    v.success("message-success", m.clone());
    v.success("message-empty", set(m.clone(), "plaintext", ""));
    v.success("message-one-byte", set(m.clone(), "plaintext", "00"));
    v.success("message-no-context", without(m.clone(), &["context"]));
    let two = add(m.clone(), "context", format!("{}={}", hex(b"column"), hex(b"iban")));
    v.success("message-context-pairs-are-sorted", two);
    v.success("message-highest-version", set(m.clone(), "version", u32::MAX.to_string()));
    v.success("message-version-1", set(m.clone(), "version", "1"));
    let w = set(message("open-wrapped-key"), "plaintext", sequence(0x20, 32));
    v.success("wrapped-key-success", w.clone());
    let many: Vec<u8> = (0..64u8).flat_map(|i| [0, 0, 0, 1, i + 1, 0, 0, 0, 0]).collect();
    let many = format!("00000040{}", hex(&many));
    let full = set(without(m.clone(), &["context"]), "context_bytes", many);
    v.success("message-context-of-64-pairs", full);
    let full = set(
        without(m.clone(), &["context"]),
        "context_bytes",
        "000000010000000161 00001ff3".replace(' ', ""),
    );
    v.success("message-context-of-8192-bytes", set(full, "context_repeat", "78 8179"));
    for len in [16383, 16384, 16385, 32768, 65535, 65536] {
        v.edited(&format!("message-{len}"), long(m.clone(), len), "success", "", &["none"]);
    }
    v.edited("wrapped-key-65536", long(w, 65536), "success", "", &["none"]);
    v.edited("message-too-large", long(m.clone(), 65536), "too-large", "", &["append 00"]);

    for len in [28usize, 52, 83, 84, 99, 113] {
        v.failure(&format!("message-cut-to-{len}"), &m, INVALID, "truncated", |c| c.truncate(len));
    }
    v.failure("message-byte-appended", &m, INVALID, "trailing byte", |c| c.push(0));
    for (name, offset) in
        [("salt", 28), ("commitment-first", 52), ("commitment-last", 83), ("data", 84), ("tag", 113)]
    {
        v.failure(&format!("message-flipped-{name}"), &m, INVALID, "one bit changed", |c| c[offset] ^= 1);
    }
    contexts_and_keys(v, &m, "message");

    let two_chunks = || long(m.clone(), 32768);
    let last = 84 + 2 * 16400;
    let cut = format!("truncate {last}");
    v.edited("message-final-chunk-missing", two_chunks(), INVALID, "final chunk missing", &[&cut]);
    let cut = format!("truncate {}", last + 15);
    v.edited("message-final-chunk-of-15-bytes", two_chunks(), INVALID, "impossible length", &[&cut]);
    v.edited("message-chunks-swapped", two_chunks(), INVALID, "chunks swapped", &["swap-chunks 0 1"]);
    v.edited("message-chunk-dropped", two_chunks(), INVALID, "chunk dropped", &["drop-chunk 0"]);
    v.edited(
        "message-chunk-repeated",
        two_chunks(),
        INVALID,
        "chunk 0 in place of chunk 1",
        &["copy-chunk 0 1"],
    );
    v.edited("message-last-chunk-flipped", two_chunks(), INVALID, "one bit changed", &["flip 32884 80"]);
}

/// Opened with another key or another encryption context.
fn contexts_and_keys(v: &mut Vectors, fields: &Fields, name: &str) {
    let table = |value: &[u8]| format!("{}={}", hex(b"table"), hex(value));
    for (change, why, context) in [
        ("context-value", "context mismatch", vec![table(b"account")]),
        ("context-key", "context mismatch", vec![format!("{}={}", hex(b"tables"), hex(b"accounts"))]),
        ("context-missing", "context mismatch", vec![]),
        ("context-pair-more", "context mismatch", vec![table(b"accounts"), format!("{}=", hex(b"column"))]),
        ("key", "wrong key", vec![table(b"accounts")]),
    ] {
        v.failure(&format!("{name}-wrong-{change}"), fields, INVALID, why, |_| {});
        let last = v.0.last_mut().unwrap();
        let ciphertext = last.1.pop().unwrap();
        let mut changed = without(std::mem::take(&mut last.1), &["context"]);
        if change == "key" {
            changed = set(changed, "kek", sequence(OTHER_KEK, 32));
        }
        for pair in context {
            changed = add(changed, "context", pair);
        }
        changed.push(ciphertext);
        last.1 = changed;
    }
}

fn streams(v: &mut Vectors) {
    let s = stream();
    v.success("stream-success", s.clone());
    v.success("stream-empty", set(s.clone(), "plaintext", ""));
    v.success("stream-no-context", without(s.clone(), &["context"]));
    for len in [16383, 16384, 16385, 32768, 65536, 200_000] {
        v.edited(&format!("stream-{len}"), long(s.clone(), len), "success", "", &["none"]);
    }
    for len in [28usize, 131, 132, 187, 188, 203, 217] {
        v.failure(&format!("stream-cut-to-{len}"), &s, INVALID, "truncated", |c| c.truncate(len));
    }
    v.failure("stream-byte-appended", &s, INVALID, "trailing byte", |c| c.push(0));
    for (name, offset) in [
        ("dek-salt", 28),
        ("dek-commitment", 83),
        ("dek-data", 84),
        ("dek-tag", 131),
        ("body-salt", 132),
        ("body-commitment", 187),
        ("data", 188),
        ("tag", 217),
    ] {
        v.failure(&format!("stream-flipped-{name}"), &s, INVALID, "one bit changed", |c| c[offset] ^= 1);
    }
    v.failure("stream-key-id-changed", &s, INVALID, "header changed: key id", |c| c[23] ^= 1);
    v.failure("stream-version-changed", &s, INVALID, "header changed: key version", |c| c[27] ^= 1);
    contexts_and_keys(v, &s, "stream");

    let other = set(set(s.clone(), "dek", sequence(0x10, 32)), "dek_salt", sequence(0x30, 24));
    let other = sealed(&set(other, "body_salt", sequence(0x50, 24)));
    v.failure("stream-foreign-head", &s, INVALID, "bytes 0..132 of another stream", |c| {
        c[..132].copy_from_slice(&other[..132])
    });
    v.failure("stream-foreign-wrapped-dek", &s, INVALID, "bytes 28..132 of another stream", |c| {
        c[28..132].copy_from_slice(&other[28..132]);
    });
    v.failure("stream-foreign-body-salt", &s, INVALID, "bytes 132..156 of another stream", |c| {
        c[132..156].copy_from_slice(&other[132..156]);
    });
    v.failure("stream-foreign-chunks", &s, INVALID, "chunks of another stream", |c| {
        c[188..].copy_from_slice(&other[188..])
    });
    let m = sealed(&set(message("open-message"), "plaintext", sequence(0x60, 32)));
    v.failure("stream-message-as-wrapped-dek", &s, INVALID, "a message with the DEK, relabelled", |c| {
        c[..132].copy_from_slice(&m);
        c[5] = 3;
    });

    let chunks = |len| long(s.clone(), len);
    v.edited("stream-final-chunk-missing", chunks(32768), INVALID, "final chunk missing", &["drop-chunk 2"]);
    v.edited(
        "stream-ends-after-full-chunk",
        chunks(20000),
        INVALID,
        "final chunk missing",
        &["drop-chunk 1"],
    );
    v.edited("stream-chunks-swapped", chunks(40000), INVALID, "chunks swapped", &["swap-chunks 0 1"]);
    v.edited("stream-chunk-dropped", chunks(40000), INVALID, "chunk dropped", &["drop-chunk 1"]);
    v.edited("stream-first-chunk-dropped", chunks(40000), INVALID, "chunk dropped", &["drop-chunk 0"]);
    v.edited(
        "stream-chunk-repeated",
        chunks(40000),
        INVALID,
        "chunk 0 in place of chunk 1",
        &["copy-chunk 0 1"],
    );
    v.edited("stream-chunk-appended", chunks(16384), INVALID, "chunk appended", &["append-chunk 1"]);
    v.edited(
        "stream-full-chunk-appended",
        chunks(32768),
        INVALID,
        "chunk appended",
        &["drop-chunk 2", "append-chunk 0", "append 00000000000000000000000000000000"],
    );
    v.edited("stream-second-chunk-flipped", chunks(40000), INVALID, "one bit changed", &["flip 16588 01"]);
    v.edited("stream-cut-within-chunk", chunks(40000), INVALID, "truncated", &["truncate 17000"]);
    v.edited(
        "stream-final-chunk-of-15-bytes",
        chunks(16384),
        INVALID,
        "impossible length",
        &["truncate 16603"],
    );
}

fn rewraps(v: &mut Vectors) {
    let s = stream();
    let stream_bytes = sealed(&s);
    let fields = without(s.clone(), &["dek", "dek_salt", "body_salt", "plaintext", "context"]);
    let fields = set(fields, "operation", "rewrap");
    let fields = set(fields, "new_kek", sequence(OTHER_KEK, 32));
    let fields = set(fields, "new_version", "8");
    let fields = set(fields, "new_dek_salt", sequence(0xe0, 24));
    let fields = add(fields, "ciphertext", hex(&stream_bytes));
    // Asked for, as the hash of a long ciphertext is.
    let asked = add(fields.clone(), "result", "");
    let moved = Vector::parse(&text(&asked)).unwrap().run().unwrap_err();
    v.push("rewrap-success", add(fields.clone(), "result", moved.clone()));
    let mut changed = stream_bytes.clone();
    changed[84] ^= 1;
    v.push(
        "rewrap-flipped",
        expecting(set(fields.clone(), "ciphertext", hex(&changed)), INVALID, "one bit changed"),
    );
    let wrong = set(fields.clone(), "kek", sequence(0x71, 32));
    v.push("rewrap-wrong-key", expecting(wrong, INVALID, "wrong key"));
    let cut = set(fields.clone(), "ciphertext", hex(&stream_bytes[..131]));
    v.push("rewrap-cut-to-131", expecting(cut, INVALID, "truncated"));
    let m = set(fields, "ciphertext", hex(&sealed(&message("open-message"))));
    v.push("rewrap-message", expecting(m, "malformed: purpose", ""));

    let opened = without(s, &["dek", "dek_salt", "body_salt"]);
    let opened = set(opened, "ciphertext", moved);
    let with_new = set(set(opened.clone(), "kek", sequence(OTHER_KEK, 32)), "version", "8");
    v.push("stream-rewrapped-success", with_new);
    let with_old = without(opened, &["plaintext"]);
    v.push(
        "stream-rewrapped-opened-with-old-key",
        expecting(set(with_old, "version", "8"), INVALID, "wrong key"),
    );
}

fn tags(v: &mut Vectors) {
    let t = tag();
    v.success("tag-success", t.clone());
    v.success("tag-no-context", without(t.clone(), &["context"]));
    v.success("tag-of-nothing", set(t.clone(), "plaintext", ""));
    for len in [28usize, 59] {
        v.failure(&format!("tag-cut-to-{len}"), &t, INVALID, "truncated", |c| c.truncate(len));
    }
    v.failure("tag-cut-to-27", &t, "malformed: header length", "", |c| c.truncate(27));
    v.failure("tag-byte-appended", &t, INVALID, "trailing byte", |c| c.push(0));
    for (name, offset) in [("first", 28), ("last", 59)] {
        v.failure(&format!("tag-flipped-{name}"), &t, INVALID, "one bit changed", |c| c[offset] ^= 1);
    }
    v.failure("tag-zero", &t, INVALID, "all of it zero", |c| c[28..].fill(0));
    v.failure("tag-key-id-changed", &t, INVALID, "header changed: key id", |c| c[8] ^= 1);
    v.failure("tag-version-changed", &t, INVALID, "header changed: key version", |c| c[27] ^= 1);
    v.failure("tag-version-0", &t, "malformed: key version", "", |c| c[24..28].fill(0));
    contexts_and_keys(v, &t, "tag");
    for (name, input) in [("another-input", &b"attack at dusk"[..]), ("less", b"attack at daw")] {
        v.failure(&format!("tag-of-{name}"), &t, INVALID, "another input", |_| {});
        let last = v.0.last_mut().unwrap();
        last.1 = set(std::mem::take(&mut last.1), "plaintext", hex(input));
    }
    v.failure("tag-opened-as-message", &t, "malformed: purpose", "", |_| {});
    let last = v.0.last_mut().unwrap();
    last.1 = set(without(std::mem::take(&mut last.1), &["plaintext"]), "operation", "open-message");
    v.failure("tag-relabelled-as-message", &t, INVALID, "a tag is too short for a message", |c| c[5] = 1);
    let last = v.0.last_mut().unwrap();
    last.1 = set(without(std::mem::take(&mut last.1), &["plaintext"]), "operation", "open-message");
    v.failure("tag-opened-as-stream", &t, "malformed: purpose", "", |_| {});
    let last = v.0.last_mut().unwrap();
    last.1 = set(without(std::mem::take(&mut last.1), &["plaintext"]), "operation", "open-stream");
    let checked = |c: Fields| set(set(c, "operation", "check-tag"), "plaintext", hex(TEXT));
    for (name, fields) in [
        ("message", message("open-message")),
        ("wrapped-key", message("open-wrapped-key")),
        ("stream", stream()),
    ] {
        v.failure(&format!("{name}-checked-as-tag"), &fields, "malformed: purpose", "", |_| {});
        let last = v.0.last_mut().unwrap();
        last.1 = checked(std::mem::take(&mut last.1));
    }
    v.failure(
        "message-relabelled-as-tag",
        &message("open-message"),
        INVALID,
        "header changed: purpose",
        |c| {
            c[5] = 5;
            c.truncate(60);
        },
    );
    let last = v.0.last_mut().unwrap();
    last.1 = checked(std::mem::take(&mut last.1));
}

fn contexts(v: &mut Vectors) {
    v.context("context-empty", "success", "00000000", None);
    v.context(
        "context-two-pairs",
        "success",
        "00000002 00000001 61 00000001 31 00000001 62 00000001 32",
        None,
    );
    v.context("context-empty-value", "success", "00000001 00000001 61 00000000", None);
    v.context(
        "context-prefix-is-smaller",
        "success",
        "00000002 00000001 61 00000000 00000002 6100 00000000",
        None,
    );
    v.context(
        "context-unsigned-order",
        "success",
        "00000002 00000001 7f 00000000 00000001 80 00000000",
        None,
    );
    v.context("context-64-pairs", "success", &pairs(64), None);
    v.context("context-8192-bytes", "success", "00000001 00000001 61 00001ff3", Some("78 8179".into()));
    v.context("context-0-bytes", "malformed: context truncated", "", None);
    v.context("context-3-bytes", "malformed: context truncated", "000000", None);
    v.context("context-cut-in-key", "malformed: context truncated", "00000001 00000002 61", None);
    v.context(
        "context-cut-in-value",
        "malformed: context truncated",
        "00000001 00000001 61 00000002 31",
        None,
    );
    v.context("context-cut-before-value", "malformed: context truncated", "00000001 00000001 61", None);
    v.context(
        "context-count-too-high",
        "malformed: context truncated",
        "00000002 00000001 61 00000000",
        None,
    );
    v.context("context-huge-length", "malformed: context truncated", "00000001 ffffffff 61 00000000", None);
    v.context(
        "context-trailing-byte",
        "malformed: context trailing bytes",
        "00000001 00000001 61 00000000 00",
        None,
    );
    v.context("context-trailing-after-empty", "malformed: context trailing bytes", "00000000 00", None);
    let expect = "malformed: context not sorted";
    v.context("context-not-sorted", expect, "00000002 00000001 62 00000000 00000001 61 00000000", None);
    v.context("context-prefix-last", expect, "00000002 00000002 6100 00000000 00000001 61 00000000", None);
    let expect = "malformed: context duplicate key";
    v.context(
        "context-duplicate-key",
        expect,
        "00000002 00000001 61 00000001 31 00000001 61 00000001 32",
        None,
    );
    v.context("context-empty-key", "malformed: context empty key", "00000001 00000000 00000001 31", None);
    v.context("context-65-pairs", "malformed: context too many pairs", &pairs(65), None);
    v.context(
        "context-8193-bytes",
        "malformed: context too long",
        "00000001 00000001 61 00001ff4",
        Some("78 8180".into()),
    );
}

fn pairs(count: u8) -> String {
    let pairs: Vec<u8> = (0..count).flat_map(|i| [0, 0, 0, 1, i + 1, 0, 0, 0, 0]).collect();
    format!("000000{}{}", hex(&[count]), hex(&pairs))
}

fn check_values(v: &mut Vectors) {
    for (name, kek) in [("check-value-zero", hex(&[0; 32])), ("check-value-sequence", sequence(KEK, 32))] {
        let fields =
            vec![("expect", "success".to_owned()), ("operation", "check-value".to_owned()), ("kek", kek)];
        let asked = add(fields.clone(), "check_value", "");
        let value = Vector::parse(&text(&asked)).unwrap().run().unwrap_err();
        v.push(name, add(fields, "check_value", value));
    }
}

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: make-vectors FOLDER");
        return ExitCode::from(64);
    };
    let mut v = Vectors(Vec::new());
    headers(&mut v);
    messages(&mut v);
    streams(&mut v);
    rewraps(&mut v);
    tags(&mut v);
    contexts(&mut v);
    check_values(&mut v);
    let (mut written, mut kept) = (0, 0);
    for (name, fields) in v.0 {
        let text = text(&fields);
        let vector = Vector::parse(&text).unwrap_or_else(|e| panic!("{name}: {e}\n{text}"));
        let outcome = vector.run().unwrap_or_else(|e| panic!("{name}: {e}\n{text}"));
        assert_eq!(outcome, vector.expected().unwrap(), "{name}");
        match fs::File::create_new(folder.join(format!("{name}.txt"))) {
            Ok(mut file) => {
                file.write_all(text.as_bytes()).unwrap();
                written += 1;
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => kept += 1,
            Err(error) => panic!("{name}: {error}"),
        }
    }
    println!("{written} written, {kept} were there and are as they were");
    ExitCode::SUCCESS
}
