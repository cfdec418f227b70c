//! What each operation sends and what its reply must look like (`docs/protocol.md`, section 4): no I/O, so that every way
//! to the agent shares it.
//!
//! A reply is checked against its request: lengths, key ids, versions, headers, and what must not be there. Whatever the
//! agent sends, a caller gets what was asked for or an error. Secrets are moved into memory that is wiped.

use std::time::Duration;

use kms_envelope::{
    Body, ContextRef, DIGEST_LEN, HEADER_LEN, Header, INPUT_TAG_LEN, KEY_LEN, KeyId, MESSAGE_MAX, MessageKey,
    NONCE_LEN, Purpose, STREAM_HEAD_LEN, message_len, message_plaintext_len,
};
use kms_protocol::{
    Add, Added, Bind, Bound, Constraint, DATA_KEY_MAX, Describe, Description, Export, Exported,
    FRAME_HEAD_LEN, KeyAndContext, KeyName, KeyRef, KeyRow, List, Listed, Locking, Material, NewDataKey,
    NoFields, PASSPHRASE_MAX, RANDOM_MAX, Random, RemoteStream, Remove, RemoveAll, Removed, RemovedAll,
    Rename, Renamed, Request, Rewrap, Rewrapped, Rotate, Rotated, StatsReply, StatusReply, TOKEN_LEN,
    Verified, constraint, decode_fields,
};
use kms_secret_memory::{Secret, SecretVec, zeroize_stack};

use crate::{
    client::NewKey,
    error::{Error, ReplyError},
    stream::{LocalOpening, LocalSealing},
    wire::Accepted,
};

/// Stack that an operation on a message key may have used, in bytes.
const STACK_USED: usize = 8192;

/// Longest fields that the reply to an item of a batch can have: `verify`'s, with the longest name.
const FIELDS_MAX: usize = 16 + 8 + KeyName::LEN_MAX + 4 + 4;

/// A request, and how its reply is read.
pub(crate) struct Operation<'a, T> {
    pub(crate) request: Request<'a>,
    pub(crate) expect: Expect,
    pub(crate) read: Read<T>,
}

/// Takes what was asked for out of a reply.
pub(crate) type Read<T> = fn(Accepted<'_>, &Expect) -> Result<T, ReplyError>;

/// What of a reply the request decides.
#[derive(Clone, Copy, Default)]
pub(crate) struct Expect {
    /// Length of the payload, or of its plaintext.
    len: usize,
    /// The id that the request named its key by.
    id: Option<[u8; 16]>,
    /// The header of the ciphertext that was sent.
    header: Option<Header>,
    /// The version that was asked for.
    version: Option<u32>,
    /// A key of that name would do.
    if_missing: bool,
}

impl Expect {
    /// Of a reply to a request that names `key`.
    fn of(key: KeyRef<'_>) -> Self {
        let id = match key {
            KeyRef::Id(id) => Some(id),
            KeyRef::Name(_) | KeyRef::Bound(_) => None,
        };
        Self { id, ..Self::default() }
    }

    fn len(self, len: usize) -> Self {
        Self { len, ..self }
    }

    /// An agent that answers for another key than the one asked about is not believed.
    fn id(&self, id: &[u8; 16]) -> Result<(), ReplyError> {
        shape(self.id.is_none_or(|asked| asked == *id))
    }

    /// A ciphertext of this length that was made now.
    fn sealed(&self, purpose: Purpose, sealed: &[u8], len: usize) -> Result<(), ReplyError> {
        let header = Header::parse(sealed).map_err(|_| ReplyError::Shape)?;
        shape(sealed.len() == len && header.purpose == purpose)?;
        self.id(header.key_id.as_bytes())
    }
}

fn shape(good: bool) -> Result<(), ReplyError> {
    if good { Ok(()) } else { Err(ReplyError::Shape) }
}

impl<T> Operation<'_, T> {
    /// Most bytes that the frame of the reply can have, for an item of a batch.
    pub(crate) fn reply_max(&self) -> usize {
        FRAME_HEAD_LEN.saturating_add(FIELDS_MAX).saturating_add(self.expect.len)
    }
}

fn operation<'a, T>(request: Request<'a>, expect: Expect, read: Read<T>) -> Operation<'a, T> {
    Operation { request, expect, read }
}

pub(crate) fn ping() -> Operation<'static, ()> {
    operation(Request::Ping, Expect::default(), nothing)
}

fn nothing(reply: Accepted<'_>, _: &Expect) -> Result<(), ReplyError> {
    let NoFields {} = reply.fields(decode_fields)?;
    Ok(())
}

pub(crate) fn status() -> Operation<'static, StatusReply> {
    operation(Request::Status, Expect::default(), |reply, _| reply.fields(decode_fields))
}

pub(crate) fn stats() -> Operation<'static, StatsReply> {
    operation(Request::Stats, Expect::default(), |reply, _| reply.fields(decode_fields))
}

pub(crate) fn add<'a>(key: &NewKey<'a>) -> Result<Operation<'a, Added>, Error> {
    // Rounded down, so that no key outlives what was asked for; a second is the least that there is.
    let seconds = |lifetime: Duration| lifetime.as_secs().max(1);
    let constraints = [
        key.memory_only.then_some((constraint::MEMORY_ONLY, 0)),
        key.lifetime.map(|lifetime| (constraint::LIFETIME, seconds(lifetime))),
        key.confirm.then_some((constraint::CONFIRM, 0)),
        key.max_uses.map(|uses| (constraint::MAX_USES, uses.get())),
        key.exportable.then_some((constraint::EXPORTABLE, 0)),
    ];
    let constraints =
        constraints.into_iter().flatten().map(|(kind, value)| Constraint { kind, value }).collect();
    let (material, bytes) = match key.import {
        Some(secret) => (Material::Import, secret.expose_secret().as_slice()),
        None => (Material::Generate, [].as_slice()),
    };
    let fields = Add { token: token()?, name: key.name, material, if_missing: key.if_missing, constraints };
    let expect = Expect { if_missing: key.if_missing, ..Expect::default() };
    Ok(operation(Request::Add { fields, material: bytes }, expect, |reply, expect| {
        let added: Added = reply.fields(decode_fields)?;
        shape(if added.created { added.version == 1 } else { expect.if_missing && added.version > 0 })?;
        Ok(added)
    }))
}

pub(crate) fn list(cursor: u64) -> Operation<'static, Listed> {
    operation(Request::List(List { cursor }), Expect::default(), |reply, _| {
        let listed: Listed = reply.fields(decode_fields)?;
        listed.keys.iter().try_for_each(row)?;
        Ok(listed)
    })
}

pub(crate) fn describe(key: KeyRef<'_>, versions_after: u32) -> Operation<'_, Description> {
    let expect = Expect { version: Some(versions_after), ..Expect::of(key) };
    operation(Request::Describe(Describe { key, versions_after }), expect, |reply, expect| {
        let description: Description = reply.fields(decode_fields)?;
        row(&description.key)?;
        expect.id(&description.key.id)?;
        let mut last = expect.version.unwrap_or(0);
        for version in &description.versions {
            if version.version <= last {
                return Err(ReplyError::Pages);
            }
            last = version.version;
        }
        // More of nothing would be asked for again and again.
        if description.more && description.versions.is_empty() {
            return Err(ReplyError::Pages);
        }
        Ok(description)
    })
}

/// A name goes to terminals and into further requests, so it has to be one.
fn row(row: &KeyRow) -> Result<(), ReplyError> {
    shape(KeyName::parse(&row.name).is_ok() && row.primary > 0)
}

pub(crate) fn remove(key: KeyRef<'_>) -> Result<Operation<'_, Removed>, Error> {
    let request = Request::Remove(Remove { token: token()?, key });
    Ok(operation(request, Expect::of(key), |reply, expect| {
        let removed: Removed = reply.fields(decode_fields)?;
        expect.id(&removed.id)?;
        Ok(removed)
    }))
}

pub(crate) fn remove_all() -> Result<Operation<'static, RemovedAll>, Error> {
    let request = Request::RemoveAll(RemoveAll { token: token()? });
    Ok(operation(request, Expect::default(), |reply, _| reply.fields(decode_fields)))
}

pub(crate) fn rotate(key: KeyRef<'_>) -> Result<Operation<'_, Rotated>, Error> {
    let request = Request::Rotate(Rotate { token: token()?, key });
    Ok(operation(request, Expect::of(key), |reply, expect| {
        let rotated: Rotated = reply.fields(decode_fields)?;
        expect.id(&rotated.id)?;
        // The first version is the one that the key was added with.
        shape(rotated.version > 1)?;
        Ok(rotated)
    }))
}

pub(crate) fn rename<'a>(key: KeyRef<'a>, name: &'a str) -> Result<Operation<'a, Renamed>, Error> {
    let request = Request::Rename(Rename { token: token()?, key, name });
    Ok(operation(request, Expect::of(key), |reply, expect| {
        let renamed: Renamed = reply.fields(decode_fields)?;
        expect.id(&renamed.id)?;
        Ok(renamed)
    }))
}

pub(crate) fn export<'a>(
    key: KeyRef<'a>,
    version: Option<u32>,
    passphrase: Option<&'a SecretVec>,
) -> Result<Operation<'a, (Exported, Secret<KEY_LEN>)>, Error> {
    let passphrase = passphrase.map_or(Ok([].as_slice()), checked)?;
    let fields = Export { key, version: version.unwrap_or(0) };
    let expect = Expect { version: version.filter(|version| *version > 0), ..Expect::of(key) };
    Ok(operation(Request::Export { fields, passphrase }, expect, |reply, expect| {
        let (exported, bytes): (Exported, _) = reply.parts(decode_fields)?;
        expect.id(&exported.id)?;
        shape(exported.version > 0 && expect.version.is_none_or(|asked| asked == exported.version))?;
        Ok((exported, Secret::from_slice(bytes).ok_or(ReplyError::Shape)?))
    }))
}

pub(crate) fn lock(passphrase: &SecretVec) -> Result<Operation<'_, bool>, Error> {
    Ok(operation(Request::Lock { passphrase: checked(passphrase)? }, Expect::default(), changed))
}

pub(crate) fn unlock(passphrase: &SecretVec) -> Result<Operation<'_, bool>, Error> {
    Ok(operation(Request::Unlock { passphrase: checked(passphrase)? }, Expect::default(), changed))
}

fn changed(reply: Accepted<'_>, _: &Expect) -> Result<bool, ReplyError> {
    let Locking { changed } = reply.fields(decode_fields)?;
    Ok(changed)
}

pub(crate) fn encrypt<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    plaintext: &'a [u8],
) -> Result<Operation<'a, Vec<u8>>, Error> {
    at_most("message", plaintext.len(), MESSAGE_MAX)?;
    let fields = KeyAndContext { key, context: context.as_bytes() };
    let expect = Expect::of(key).len(message_len(plaintext.len()));
    Ok(operation(Request::Encrypt { fields, plaintext }, expect, |reply, expect| {
        let sealed = reply.payload()?;
        expect.sealed(Purpose::Message, sealed, expect.len)?;
        Ok(sealed.to_owned())
    }))
}

pub(crate) fn decrypt<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    ciphertext: &'a [u8],
) -> Result<Operation<'a, SecretVec>, Error> {
    let len = message_plaintext_len(ciphertext.len()).ok_or(Error::InvalidCiphertext)?;
    let fields = KeyAndContext { key, context: context.as_bytes() };
    Ok(operation(Request::Decrypt { fields, ciphertext }, Expect::of(key).len(len), secret))
}

pub(crate) fn wrap<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    plaintext: &'a [u8],
) -> Result<Operation<'a, Vec<u8>>, Error> {
    at_most("key", plaintext.len(), MESSAGE_MAX)?;
    let fields = KeyAndContext { key, context: context.as_bytes() };
    let expect = Expect::of(key).len(message_len(plaintext.len()));
    Ok(operation(Request::Wrap { fields, plaintext }, expect, wrapped))
}

fn wrapped(reply: Accepted<'_>, expect: &Expect) -> Result<Vec<u8>, ReplyError> {
    let wrapped = reply.payload()?;
    expect.sealed(Purpose::WrappedKey, wrapped, expect.len)?;
    Ok(wrapped.to_owned())
}

pub(crate) fn unwrap<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    ciphertext: &'a [u8],
) -> Result<Operation<'a, SecretVec>, Error> {
    let len = message_plaintext_len(ciphertext.len()).ok_or(Error::InvalidCiphertext)?;
    let fields = KeyAndContext { key, context: context.as_bytes() };
    Ok(operation(Request::Unwrap { fields, ciphertext }, Expect::of(key).len(len), secret))
}

/// A payload of just the length that was to be expected.
fn secret(reply: Accepted<'_>, expect: &Expect) -> Result<SecretVec, ReplyError> {
    let bytes = reply.payload()?;
    shape(bytes.len() == expect.len)?;
    copied(bytes)
}

fn copied(bytes: &[u8]) -> Result<SecretVec, ReplyError> {
    let mut secret = SecretVec::with_capacity(bytes.len());
    secret.push_slice(bytes).map_err(|_| ReplyError::Shape)?;
    Ok(secret)
}

/// A new data key, in both forms.
pub struct DataKey {
    /// To be used now, and forgotten.
    pub plaintext: SecretVec,
    /// To be kept; [`Client::unwrap`](crate::Client::unwrap) opens it.
    pub wrapped: Vec<u8>,
}

pub(crate) fn data_key<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    length: u32,
) -> Result<Operation<'a, DataKey>, Error> {
    let (fields, len) = new_data_key(key, context, length)?;
    let expect = Expect::of(key).len(len.saturating_add(message_len(len)));
    Ok(operation(Request::DataKey(fields), expect, |reply, expect| {
        let payload = reply.payload()?;
        shape(payload.len() == expect.len)?;
        // Both lengths together are twice the key's and what a message adds.
        let len = expect.len.saturating_sub(message_len(0)) / 2;
        let (plaintext, wrapped) = payload.split_at_checked(len).ok_or(ReplyError::Shape)?;
        expect.sealed(Purpose::WrappedKey, wrapped, message_len(len))?;
        Ok(DataKey { plaintext: copied(plaintext)?, wrapped: wrapped.to_owned() })
    }))
}

pub(crate) fn data_key_wrapped<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    length: u32,
) -> Result<Operation<'a, Vec<u8>>, Error> {
    let (fields, len) = new_data_key(key, context, length)?;
    Ok(operation(Request::DataKeyWrapped(fields), Expect::of(key).len(message_len(len)), wrapped))
}

fn new_data_key<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    length: u32,
) -> Result<(NewDataKey<'a>, usize), Error> {
    let len = at_most("data key", usize::try_from(length).unwrap_or(usize::MAX), DATA_KEY_MAX)?;
    Ok((NewDataKey { key, context: context.as_bytes(), length }, len))
}

/// What became of a ciphertext that was to be moved to another key version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// What takes its place, as long as it was; nothing when it was under that version already.
    pub replacement: Option<Vec<u8>>,
    /// The id of the key that it is under now.
    pub id: [u8; 16],
    /// The version that it is under now.
    pub version: u32,
}

pub(crate) fn rewrap<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    ciphertext: &'a [u8],
    to: Option<KeyRef<'a>>,
) -> Operation<'a, Moved> {
    let fields = Rewrap { key, context: context.as_bytes(), to };
    let header = Header::parse(ciphertext).ok();
    // Without another key, the ciphertext stays under the one that it names.
    let own = header.filter(|_| to.is_none()).map(|header| *header.key_id.as_bytes());
    let of = Expect::of(to.unwrap_or(key)).len(ciphertext.len());
    let expect = Expect { header, id: of.id.or(own), ..of };
    operation(Request::Rewrap { fields, ciphertext }, expect, |reply, expect| {
        let (Rewrapped { changed, id, version }, payload) = reply.parts(decode_fields)?;
        expect.id(&id)?;
        let under =
            |header: &Header| *header.key_id.as_bytes() == id && header.key_version.value() == version;
        let before = expect.header.ok_or(ReplyError::Shape)?;
        if !changed {
            shape(payload.is_empty() && under(&before))?;
            return Ok(Moved { replacement: None, id, version });
        }
        expect.sealed(before.purpose, payload, expect.len)?;
        shape(Header::parse(payload).is_ok_and(|header| under(&header)))?;
        Ok(Moved { replacement: Some(payload.to_owned()), id, version })
    })
}

pub(crate) fn verify<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    ciphertext: &'a [u8],
) -> Operation<'a, Verified> {
    let fields = KeyAndContext { key, context: context.as_bytes() };
    let expect = Expect { header: Header::parse(ciphertext).ok(), ..Expect::of(key) };
    operation(Request::Verify { fields, ciphertext }, expect, |reply, expect| {
        let verified: Verified = reply.fields(decode_fields)?;
        expect.id(&verified.id)?;
        let header = expect.header.ok_or(ReplyError::Shape)?;
        shape(
            KeyId::from_bytes(verified.id) == header.key_id
                && verified.version == header.key_version.value()
                && verified.primary > 0
                && KeyName::parse(&verified.name).is_ok(),
        )?;
        Ok(verified)
    })
}

pub(crate) fn mac<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    digest: &'a [u8; DIGEST_LEN],
) -> Operation<'a, [u8; INPUT_TAG_LEN]> {
    let fields = KeyAndContext { key, context: context.as_bytes() };
    operation(Request::Mac { fields, digest }, Expect::of(key).len(INPUT_TAG_LEN), |reply, expect| {
        let tag = reply.payload()?;
        expect.sealed(Purpose::Tag, tag, INPUT_TAG_LEN)?;
        tag.try_into().map_err(|_| ReplyError::Shape)
    })
}

/// `tag_and_digest`: see [`tagged`].
pub(crate) fn mac_verify<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    tag_and_digest: &'a [u8; INPUT_TAG_LEN + DIGEST_LEN],
) -> Operation<'a, ()> {
    let fields = KeyAndContext { key, context: context.as_bytes() };
    operation(Request::MacVerify { fields, tag_and_digest }, Expect::of(key), nothing)
}

/// The payload of `mac-verify`.
pub(crate) fn tagged(
    tag: &[u8; INPUT_TAG_LEN],
    digest: &[u8; DIGEST_LEN],
) -> [u8; INPUT_TAG_LEN + DIGEST_LEN] {
    let mut both = [0; INPUT_TAG_LEN + DIGEST_LEN];
    let (first, second) = both.split_at_mut(INPUT_TAG_LEN);
    first.copy_from_slice(tag);
    second.copy_from_slice(digest);
    both
}

pub(crate) fn random(length: u32) -> Result<Operation<'static, SecretVec>, Error> {
    let len = at_most("random bytes", usize::try_from(length).unwrap_or(usize::MAX), RANDOM_MAX)?;
    Ok(operation(Request::Random(Random { length }), Expect::default().len(len), secret))
}

pub(crate) fn bind(number: u32, key: KeyRef<'_>) -> Operation<'_, Bound> {
    operation(Request::Bind(Bind { number, key }), Expect::of(key), |reply, expect| {
        let bound: Bound = reply.fields(decode_fields)?;
        expect.id(&bound.id)?;
        Ok(bound)
    })
}

pub(crate) fn stream_new<'a>(key: KeyRef<'a>, context: ContextRef<'a>) -> Operation<'a, LocalSealing> {
    let fields = KeyAndContext { key, context: context.as_bytes() };
    let expect = Expect::of(key).len(STREAM_HEAD_LEN + KEY_LEN + NONCE_LEN);
    operation(Request::StreamNew(fields), expect, |reply, expect| {
        let payload = reply.payload()?;
        let (head, secrets) = payload.split_first_chunk::<STREAM_HEAD_LEN>().ok_or(ReplyError::Shape)?;
        expect.sealed(Purpose::Stream, head, STREAM_HEAD_LEN)?;
        let sealing = LocalSealing::new(*head, body(secrets)?);
        zeroize_stack::<STACK_USED>();
        Ok(sealing)
    })
}

pub(crate) fn stream_open<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    head: &'a [u8; STREAM_HEAD_LEN],
) -> Operation<'a, LocalOpening> {
    let fields = KeyAndContext { key, context: context.as_bytes() };
    let expect = Expect::of(key).len(KEY_LEN + NONCE_LEN);
    operation(Request::StreamOpen { fields, head }, expect, |reply, _| {
        let opening = LocalOpening::new(body(reply.payload()?)?);
        zeroize_stack::<STACK_USED>();
        Ok(opening)
    })
}

/// Key and base nonce of a stream, moved to where they are used.
fn body(secrets: &[u8]) -> Result<Body, ReplyError> {
    let (key, nonce) = secrets.split_first_chunk::<KEY_LEN>().ok_or(ReplyError::Shape)?;
    let nonce: &[u8; NONCE_LEN] = nonce.try_into().map_err(|_| ReplyError::Shape)?;
    Ok(Body::new(MessageKey::from_parts(key, nonce)))
}

pub(crate) fn remote_stream_new<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
) -> Operation<'a, (u32, [u8; STREAM_HEAD_LEN])> {
    let fields = KeyAndContext { key, context: context.as_bytes() };
    operation(Request::RemoteStreamNew(fields), Expect::of(key), |reply, expect| {
        let (RemoteStream { stream }, head) = reply.parts(decode_fields)?;
        expect.sealed(Purpose::Stream, head, STREAM_HEAD_LEN)?;
        Ok((stream, head.try_into().map_err(|_| ReplyError::Shape)?))
    })
}

pub(crate) fn remote_stream_open<'a>(
    key: KeyRef<'a>,
    context: ContextRef<'a>,
    head: &'a [u8; STREAM_HEAD_LEN],
) -> Operation<'a, u32> {
    let fields = KeyAndContext { key, context: context.as_bytes() };
    operation(Request::RemoteStreamOpen { fields, head }, Expect::of(key), |reply, _| {
        let RemoteStream { stream } = reply.fields(decode_fields)?;
        Ok(stream)
    })
}

fn checked(passphrase: &SecretVec) -> Result<&[u8], Error> {
    at_most("passphrase", passphrase.len(), PASSPHRASE_MAX)?;
    Ok(passphrase.expose_secret())
}

fn at_most(what: &'static str, len: usize, max: usize) -> Result<usize, Error> {
    if len > max { Err(Error::TooLong { what, max }) } else { Ok(len) }
}

/// Random, so that a repeat of the request is known as one.
fn token() -> Result<[u8; TOKEN_LEN], Error> {
    let mut token = [0; TOKEN_LEN];
    getrandom::fill(&mut token).map_err(|_| Error::Random)?;
    Ok(token)
}

// Sizes that `data_key` takes apart again.
const _: () = assert!(HEADER_LEN < STREAM_HEAD_LEN && message_len(32) == message_len(0) + 32);
