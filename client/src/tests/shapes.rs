//! Replies of every new shape that are nearly right: each is an error, and ends the connection.

use kms_envelope::ContextRef;
use kms_protocol::{FRAME_HEAD_LEN, KeyRef, Opcode};

use super::{
    fake::{Fake, Fate, ID},
    options,
};
use crate::{Client, Error, NewKey};

const KEY: KeyRef<'_> = KeyRef::Id(ID);
const NO: ContextRef<'_> = ContextRef::EMPTY;

/// Fields and payload of a reply.
type Parts = (Vec<u8>, Vec<u8>);
type Ask = fn(&mut Client) -> Result<(), Error>;
type Change = fn(&mut Parts);

/// What a client makes of the reply to `ask`, changed.
fn outcome(opcode: Opcode, ask: Ask, change: Change) -> (Result<(), Error>, bool) {
    let fake = Fake::new(move |asked, reply| {
        if asked != opcode {
            return Fate::Send(reply);
        }
        let fields_len = u32::from_le_bytes(reply[12..16].try_into().unwrap()) as usize;
        let (fields, payload) = reply[FRAME_HEAD_LEN..].split_at(fields_len);
        let mut parts = (fields.to_vec(), payload.to_vec());
        change(&mut parts);
        let mut changed = reply[..FRAME_HEAD_LEN].to_vec();
        changed[..4].copy_from_slice(&u32::try_from(parts.0.len() + parts.1.len()).unwrap().to_le_bytes());
        changed[12..].copy_from_slice(&u32::try_from(parts.0.len()).unwrap().to_le_bytes());
        Fate::Send([changed, parts.0, parts.1].concat())
    });
    let mut client = Client::connect(&options(&fake)).unwrap();
    let done = ask(&mut client);
    let ended = matches!(client.status(), Err(Error::Broken));
    (done, ended)
}

/// Changes that no reply survives: bytes too many or too few.
const LENGTHS: &[Change] = &[
    |parts| parts.1.push(0),
    |parts| parts.0.push(0),
    |parts| {
        if parts.0.pop().is_none() {
            parts.1.pop();
        }
    },
    |parts| {
        if parts.1.pop().is_none() {
            parts.0.pop();
        }
    },
];

const OTHER_ID: Change = |parts| parts.0[3] ^= 1;

#[test]
fn a_reply_that_is_nearly_right_is_an_error_and_ends_the_connection() {
    let asks: &[(Opcode, Ask, &[Change])] = &[
        (
            Opcode::Add,
            |client| client.add(&NewKey::new("new")).map(drop),
            // Another version than the first; a key that was there, which nobody asked for.
            &[|parts| parts.0[16] = 2, |parts| parts.0[28] = 0, |parts| parts.0[28] = 2],
        ),
        (
            Opcode::Rotate,
            |client| client.rotate(KEY).map(drop),
            &[OTHER_ID, |parts| parts.0[16] = 1, |parts| parts.0[16] = 0],
        ),
        (Opcode::Rename, |client| client.rename(KEY, "other").map(drop), &[OTHER_ID]),
        (Opcode::Remove, |client| client.remove(KEY).map(drop), &[OTHER_ID]),
        (Opcode::RemoveAll, |client| client.remove_all().map(drop), &[]),
        (
            Opcode::Describe,
            |client| client.describe(KEY).map(drop),
            // A name that is none, for a terminal; another id; versions that do not ascend.
            &[
                |parts| parts.0[8] = 0x1b,
                |parts| parts.0[8 + 3] ^= 1,
                |parts| {
                    let at = 8 + 3 + 16 + 1 + 4 + 4 + 4 + 4 + 8 + 8 + 1 + 8 + 8;
                    parts.0[at] = 0;
                },
            ],
        ),
        (
            Opcode::Export,
            |client| client.export(KEY, Some(3), None).map(drop),
            // Another version than was asked for.
            &[OTHER_ID, |parts| parts.0[16] = 4, |parts| parts.1.clear()],
        ),
        (
            Opcode::Encrypt,
            |client| client.encrypt(KEY, NO, b"text").map(drop),
            // Another purpose, another key, no header.
            &[|parts| parts.1[5] = 2, |parts| parts.1[8] ^= 1, |parts| parts.1[0] ^= 1],
        ),
        (
            Opcode::Wrap,
            |client| client.wrap(KEY, NO, b"key").map(drop),
            &[|parts| parts.1[5] = 1, |parts| parts.1[8] ^= 1],
        ),
        (
            Opcode::Unwrap,
            |client| {
                let wrapped = client.wrap(KEY, NO, b"key")?;
                client.unwrap(KEY, NO, &wrapped).map(drop)
            },
            &[],
        ),
        (
            Opcode::DataKey,
            |client| client.data_key(KEY, NO, 32).map(drop),
            // The length of another data key; a message instead of a wrapped key; the wrapped key alone.
            &[|parts| parts.1.extend([0; 2]), |parts| parts.1[32 + 5] = 1, |parts| drop(parts.1.drain(..32))],
        ),
        (
            Opcode::DataKeyWrapped,
            |client| client.data_key_wrapped(KEY, NO, 32).map(drop),
            &[|parts| parts.1[5] = 1, |parts| parts.1.extend([0; 16])],
        ),
        (
            Opcode::Rewrap,
            |client| {
                let sealed = client.encrypt(KEY, NO, b"text")?;
                client.rewrap(KEY, NO, &sealed, None).map(drop)
            },
            // Unchanged with a payload, changed without one; not what the fields say; another purpose.
            &[
                |parts| parts.0[0] = 0,
                |parts| parts.1.clear(),
                |parts| parts.0[1] ^= 1,
                |parts| parts.0[17] = 3,
                |parts| parts.1[27] = 3,
                |parts| parts.1[5] = 2,
                // Unchanged, but under another version than it was.
                |parts| {
                    parts.0[0] = 0;
                    parts.1.clear();
                },
            ],
        ),
        (
            Opcode::Verify,
            |client| {
                let sealed = client.encrypt(KEY, NO, b"text")?;
                client.verify(KEY, NO, &sealed).map(drop)
            },
            // Another key, a name that is none, another version than the header names, no primary one.
            &[OTHER_ID, |parts| parts.0[24] = b'\n', |parts| parts.0[27] = 2, |parts| parts.0[31] = 0],
        ),
        (
            Opcode::Mac,
            |client| client.mac(KEY, NO, &[0; 64]).map(drop),
            &[|parts| parts.1[5] = 1, |parts| parts.1[8] ^= 1],
        ),
        (
            Opcode::MacVerify,
            |client| {
                let tag = client.mac(KEY, NO, &[0; 64])?;
                client.mac_verify(KEY, NO, &tag, &[0; 64])
            },
            &[],
        ),
        (Opcode::Random, |client| client.random(32).map(drop), &[|parts| parts.1.clear()]),
        (Opcode::Bind, |client| client.bind(7, KEY).map(drop), &[OTHER_ID]),
        (Opcode::Stats, |client| client.stats().map(drop), &[]),
        (
            Opcode::StreamNew,
            |client| client.stream_new(KEY, NO).map(drop),
            &[|parts| parts.1[5] = 1, |parts| parts.1[8] ^= 1],
        ),
        (
            Opcode::RemoteStreamNew,
            |client| client.remote_stream_new(KEY, NO).map(drop),
            &[|parts| parts.1[5] = 1],
        ),
        (
            Opcode::Lock,
            |client| client.lock(&crate::SecretVec::with_capacity(0)).map(drop),
            &[|parts| parts.0[0] = 2],
        ),
    ];
    for (opcode, ask, changes) in asks {
        let (done, ended) = outcome(*opcode, *ask, |_| ());
        assert!(done.is_ok() && !ended, "{}: {done:?}", opcode.name());
        // From an empty reply nothing can be taken away.
        let lengths = if *opcode == Opcode::MacVerify { &LENGTHS[..2] } else { LENGTHS };
        for (number, change) in lengths.iter().chain(*changes).enumerate() {
            let (done, ended) = outcome(*opcode, *ask, *change);
            assert!(matches!(done, Err(Error::Reply(_))), "{} {number}: {done:?}", opcode.name());
            assert!(ended, "{} {number}", opcode.name());
        }
    }
}
