//! What puts a key to work (`docs/protocol.md`, sections 4.16 to 4.19 and 4.25 to 4.35).
//!
//! Owns which purposes an operation takes, and that the purpose is checked before any key is looked up. A plaintext that
//! does not leave lies in the locked memory behind its reply, and is wiped with it.

use kms_envelope::{
    ContextRef, DIGEST_LEN, Header, INPUT_TAG_LEN, KEY_LEN, KeyId, MESSAGE_MAX, MessageKey, Purpose,
    REWRAP_LEN, SALT_LEN, STREAM_HEAD_LEN, check_tag, make_tag, message_len, message_plaintext_len,
    new_stream, open_message, open_stream, rewrap_stream, seal_message,
};
use kms_protocol::{DATA_KEY_MAX, NoFields, RANDOM_MAX, Rewrapped, Status, Verified};
use zeroize::Zeroize;

use super::{Core, refusal::Refused};
use crate::{
    audit::Audit,
    authorize::Permit,
    crypto::{Random, random_bytes, random_secret},
    keyring::{Found, Selector},
    reply::Replies,
};

/// Bytes behind the head of a stream that the client encrypts or opens: message key and base nonce.
pub(super) const STREAM_KEY_LEN: usize = KEY_LEN + 12;

/// The key of a request that opens something: looked at only when the ciphertext may be what it says.
type Meant<'a> = Result<Selector<'a>, Refused>;

/// What every request comes with that puts a key to work, and where its reply goes.
pub(super) struct Use<'a> {
    permit: &'a Permit,
    context: &'a [u8],
    request_id: u32,
    replies: &'a mut Replies,
}

impl<'a> Use<'a> {
    pub(super) fn new(
        permit: &'a Permit,
        context: &'a [u8],
        request_id: u32,
        replies: &'a mut Replies,
    ) -> Self {
        Self { permit, context, request_id, replies }
    }
}

impl<R: Random, A: Audit> Core<R, A> {
    /// `encrypt` and `wrap`.
    pub(super) fn seal(
        &mut self,
        Use { permit, context, request_id, replies }: Use<'_>,
        key: Selector<'_>,
        purpose: Purpose,
        plaintext: &[u8],
    ) -> Result<(), Refused> {
        let context = ContextRef::parse(context)?;
        if plaintext.is_empty() && purpose == Purpose::WrappedKey {
            return Err(Status::Malformed.into());
        }
        if plaintext.len() > MESSAGE_MAX {
            return Err(Status::TooLarge.into());
        }
        let key = self.keyring.find(permit, key)?;
        let header = Header { purpose, key_id: key.id, key_version: key.primary };
        let salt = self.salts.next(&mut self.random)?;
        let keyring = &mut self.keyring;
        replies.push(request_id, &NoFields {}, message_len(plaintext.len()), |out| {
            keyring
                .with_key(permit, &key, key.primary, |key| {
                    seal_message(key, &header, context, &salt, plaintext, out)
                })?
                .map_err(Refused::from)
        })?
    }

    /// `decrypt` and `unwrap`.
    pub(super) fn open(
        &mut self,
        Use { permit, context, request_id, replies }: Use<'_>,
        key: Meant<'_>,
        purpose: Purpose,
        ciphertext: &[u8],
    ) -> Result<(), Refused> {
        let context = ContextRef::parse(context)?;
        let header = header_of(ciphertext, &[purpose])?;
        let plaintext_len = plaintext_len(ciphertext)?;
        let key = self.find(permit, key, &header)?;
        let keyring = &mut self.keyring;
        replies.push(request_id, &NoFields {}, plaintext_len, |out| {
            keyring
                .with_key(permit, &key, header.key_version, |key| {
                    open_message(key, ciphertext, purpose, context, out)
                })?
                .map_err(Refused::from)
                .map(|_| ())
        })?
    }

    /// The key of the request must exist and be the one that the ciphertext names.
    fn find(&mut self, permit: &Permit, key: Meant<'_>, header: &Header) -> Result<Found, Refused> {
        let found = self.keyring.find(permit, key?)?;
        if found.id == header.key_id { Ok(found) } else { Err(Status::WrongKey.into()) }
    }

    pub(super) fn new_stream(
        &mut self,
        permit: &Permit,
        key: Selector<'_>,
        context: &[u8],
    ) -> Result<([u8; STREAM_HEAD_LEN], MessageKey), Refused> {
        let context = ContextRef::parse(context)?;
        let key = self.keyring.find(permit, key)?;
        let header = Header { purpose: Purpose::Stream, key_id: key.id, key_version: key.primary };
        let dek = random_secret::<KEY_LEN>(&mut self.random)?;
        let dek_salt = random_bytes::<SALT_LEN>(&mut self.random)?;
        let body_salt = random_bytes::<SALT_LEN>(&mut self.random)?;
        self.keyring
            .with_key(permit, &key, key.primary, |key| {
                new_stream(key, &header, context, dek.expose_secret(), &dek_salt, &body_salt)
            })?
            .map_err(Refused::from)
    }

    pub(super) fn open_stream(
        &mut self,
        permit: &Permit,
        key: Meant<'_>,
        context: &[u8],
        head: &[u8],
    ) -> Result<(MessageKey, KeyId), Refused> {
        let context = ContextRef::parse(context)?;
        let header = header_of(head, &[Purpose::Stream])?;
        let head: &[u8; STREAM_HEAD_LEN] = head.try_into().map_err(|_| Status::InvalidCiphertext)?;
        let key = self.find(permit, key, &header)?;
        let opened = self
            .keyring
            .with_key(permit, &key, header.key_version, |key| open_stream(key, head, context))?
            .map_err(Refused::from)?;
        Ok((opened, key.id))
    }

    /// `datakey`, and without `plain` `datakey-wrapped`.
    pub(super) fn data_key(
        &mut self,
        Use { permit, context, request_id, replies }: Use<'_>,
        key: Selector<'_>,
        length: u32,
        plain: bool,
    ) -> Result<(), Refused> {
        let context = ContextRef::parse(context)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        match length {
            0 => return Err(Status::Malformed.into()),
            1..=DATA_KEY_MAX => {}
            _ => return Err(Status::TooLarge.into()),
        }
        let key = self.keyring.find(permit, key)?;
        let header = Header { purpose: Purpose::WrappedKey, key_id: key.id, key_version: key.primary };
        let salt = self.salts.next(&mut self.random)?;
        let (inside, beside) = if plain { (length, 0) } else { (0, length) };
        let payload_len = inside.saturating_add(message_len(length));
        let (keyring, random) = (&mut self.keyring, &mut self.random);
        replies.push_beside(request_id, &NoFields {}, payload_len, beside, |payload, beside| {
            let (data_key, wrapped) = payload.split_at_mut_checked(inside).ok_or(Status::Internal)?;
            let data_key = if plain { data_key } else { beside };
            random.fill(data_key)?;
            keyring
                .with_key(permit, &key, key.primary, |key| {
                    seal_message(key, &header, context, &salt, data_key, wrapped)
                })?
                .map_err(Refused::from)
        })?
    }

    pub(super) fn rewrap(
        &mut self,
        Use { permit, context, request_id, replies }: Use<'_>,
        key: Meant<'_>,
        to: Option<Meant<'_>>,
        ciphertext: &[u8],
    ) -> Result<(), Refused> {
        let context = ContextRef::parse(context)?;
        let header = header_of(ciphertext, &[Purpose::Message, Purpose::WrappedKey, Purpose::Stream])?;
        let is_stream = header.purpose == Purpose::Stream;
        //= docs/protocol.md#429-rewrap
        //# another context than none with a stream is `malformed`.
        if is_stream && context.as_bytes() != ContextRef::EMPTY.as_bytes() {
            return Err(Status::Malformed.into());
        }
        let prefix = ciphertext.first_chunk::<REWRAP_LEN>().filter(|_| ciphertext.len() == REWRAP_LEN);
        let plaintext_len = match (is_stream, prefix) {
            (true, Some(_)) => 0,
            (true, None) => return Err(Status::InvalidCiphertext.into()),
            (false, _) => plaintext_len(ciphertext)?,
        };
        let key = self.find(permit, key, &header)?;
        let to = match to {
            Some(to) => self.keyring.find(permit, to?)?,
            None => key,
        };
        let new_header = Header { key_id: to.id, key_version: to.primary, ..header };
        let changed = new_header != header;
        let reply = Rewrapped { changed, id: *to.id.as_bytes(), version: to.primary.value() };
        let salt = self.salts.next(&mut self.random)?;
        let payload_len = if changed { ciphertext.len() } else { 0 };
        let keyring = &mut self.keyring;
        let (from, into) = ((&key, header.key_version), (&to, to.primary));
        //= docs/protocol.md#429-rewrap
        //# The agent MUST open the ciphertext in any case, also when there is nothing to change.
        replies.push_beside(request_id, &reply, payload_len, plaintext_len, |out, plaintext| {
            keyring.with_keys(permit, from, into, |key, new_key| {
                if let (true, Some(prefix)) = (is_stream, prefix) {
                    let moved = rewrap_stream(key, prefix, new_key, &new_header, &salt)?;
                    if changed {
                        out.copy_from_slice(&moved);
                    }
                    return Ok(());
                }
                open_message(key, ciphertext, header.purpose, context, plaintext)?;
                if changed {
                    seal_message(new_key, &new_header, context, &salt, plaintext, out)?;
                }
                Ok(())
            })?
        })?
    }

    pub(super) fn verify(
        &mut self,
        Use { permit, context, request_id, replies }: Use<'_>,
        key: Meant<'_>,
        ciphertext: &[u8],
    ) -> Result<(), Refused> {
        let context = ContextRef::parse(context)?;
        let header = header_of(ciphertext, &[Purpose::Message, Purpose::WrappedKey, Purpose::Stream])?;
        let is_stream = header.purpose == Purpose::Stream;
        let head =
            ciphertext.first_chunk::<STREAM_HEAD_LEN>().filter(|_| ciphertext.len() == STREAM_HEAD_LEN);
        let plaintext_len = match (is_stream, head) {
            (true, Some(_)) => 0,
            (true, None) => return Err(Status::InvalidCiphertext.into()),
            (false, _) => plaintext_len(ciphertext)?,
        };
        let key = self.find(permit, key, &header)?;
        let mut name = self.keyring.name(permit, &key)?;
        let mut reply = Verified {
            id: *key.id.as_bytes(),
            name: name.as_str().to_owned(),
            version: header.key_version.value(),
            primary: key.primary.value(),
        };
        name.zeroize();
        let keyring = &mut self.keyring;
        let pushed = replies.push_beside(request_id, &reply, 0, plaintext_len, |_, plaintext| {
            keyring
                .with_key(permit, &key, header.key_version, |key| match (is_stream, head) {
                    (true, Some(head)) => open_stream(key, head, context).map(|_| ()),
                    _ => open_message(key, ciphertext, header.purpose, context, plaintext).map(|_| ()),
                })?
                .map_err(Refused::from)
        });
        reply.name.zeroize();
        pushed?
    }

    pub(super) fn mac(
        &mut self,
        Use { permit, context, request_id, replies }: Use<'_>,
        key: Selector<'_>,
        digest: &[u8],
    ) -> Result<(), Refused> {
        let context = ContextRef::parse(context)?;
        let digest: &[u8; DIGEST_LEN] = digest.try_into().map_err(|_| Status::Malformed)?;
        let key = self.keyring.find(permit, key)?;
        let header = Header { purpose: Purpose::Tag, key_id: key.id, key_version: key.primary };
        let keyring = &mut self.keyring;
        replies.push(request_id, &NoFields {}, INPUT_TAG_LEN, |out| {
            let tag = keyring
                .with_key(permit, &key, key.primary, |key| make_tag(key, &header, context, digest))?
                .map_err(Refused::from)?;
            out.copy_from_slice(&tag);
            Ok(())
        })?
    }

    pub(super) fn verify_mac(
        &mut self,
        Use { permit, context, request_id, replies }: Use<'_>,
        key: Meant<'_>,
        tag_and_digest: &[u8],
    ) -> Result<(), Refused> {
        let context = ContextRef::parse(context)?;
        let header = header_of(tag_and_digest, &[Purpose::Tag])?;
        let parts = tag_and_digest.split_first_chunk::<INPUT_TAG_LEN>();
        let (tag, digest) = parts.ok_or(Status::Malformed)?;
        let digest: &[u8; DIGEST_LEN] = digest.try_into().map_err(|_| Status::Malformed)?;
        let key = self.find(permit, key, &header)?;
        replies.check_room(&NoFields {}, 0)?;
        self.keyring
            .with_key(permit, &key, header.key_version, |key| check_tag(key, tag, context, digest))?
            .map_err(Refused::from)?;
        Ok(replies.push_done(request_id)?)
    }

    pub(super) fn random(
        &mut self,
        _permit: &Permit,
        length: u32,
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        match length {
            0 => return Err(Status::Malformed.into()),
            1..=RANDOM_MAX => {}
            _ => return Err(Status::TooLarge.into()),
        }
        let random = &mut self.random;
        replies.push(request_id, &NoFields {}, length, |out| random.fill(out).map_err(Refused::from))?
    }
}

/// The header of a ciphertext that has one of these purposes.
fn header_of(ciphertext: &[u8], purposes: &[Purpose]) -> Result<Header, Refused> {
    //= docs/protocol.md#ciphertexts
    //# The purpose MUST be checked before any key is looked up.
    let header = Header::parse(ciphertext)?;
    if purposes.contains(&header.purpose) { Ok(header) } else { Err(Status::Malformed.into()) }
}

/// Length of the plaintext of a message or wrapped key.
fn plaintext_len(ciphertext: &[u8]) -> Result<usize, Refused> {
    if ciphertext.len() > message_len(MESSAGE_MAX) {
        return Err(Status::TooLarge.into());
    }
    message_plaintext_len(ciphertext.len()).ok_or(Status::InvalidCiphertext.into())
}

pub(super) fn write_stream_key(out: &mut [u8], key: &MessageKey) -> Result<(), Status> {
    let (message_key, base_nonce) = key.expose_secret();
    let (key_part, nonce_part) = out.split_at_mut_checked(KEY_LEN).ok_or(Status::Internal)?;
    key_part.copy_from_slice(message_key);
    nonce_part.get_mut(..base_nonce.len()).ok_or(Status::Internal)?.copy_from_slice(base_nonce);
    Ok(())
}
