//! Streams that the agent itself encrypts or decrypts (`docs/protocol.md`, section 7).
//!
//! Owns their message keys and the number of the next chunk. An error ends a stream, and so do a lock and the removal of its
//! key.

use std::collections::HashMap;

use kms_envelope::{Body, CHUNK_LEN, KeyId, SEALED_CHUNK_LEN, TAG_LEN};
use kms_protocol::{NoFields, REMOTE_STREAMS_MAX, RemoteChunks, Status};

use super::{Session, refusal::Refused};
use crate::{
    authorize::Permit,
    crypto::apart,
    reply::{Replies, ReplyError},
};

/// The streams of all connections, held here so that a lock and the removal of a key end them.
#[derive(Default)]
pub(super) struct Streams(HashMap<(u64, u32), (KeyId, OpenStream)>);

/// A stream that the agent encrypts or decrypts.
pub(super) enum OpenStream {
    Encrypt { body: Box<Body>, next: u64 },
    Decrypt { body: Box<Body> },
}

impl Streams {
    /// Whether the connection may have one more. To be asked before the key is put to work.
    pub(super) fn check_room(&self, session: &Session) -> Result<(), Refused> {
        let held = self.0.keys().filter(|(number, _)| *number == session.number).count();
        if held >= REMOTE_STREAMS_MAX { Err(Status::Limit.into()) } else { Ok(()) }
    }

    pub(super) fn hold(
        &mut self,
        session: &mut Session,
        key: KeyId,
        stream: OpenStream,
    ) -> Result<u32, Refused> {
        self.check_room(session)?;
        let number = session.next_stream;
        session.next_stream = number.checked_add(1).ok_or(Status::Limit)?;
        self.0.insert((session.number, number), (key, stream));
        Ok(number)
    }

    /// A stream whose number the client never learns is not kept.
    pub(super) fn keep_if<T>(
        &mut self,
        session: &Session,
        stream: u32,
        pushed: Result<T, ReplyError>,
    ) -> Result<T, ReplyError> {
        if pushed.is_err() {
            self.0.remove(&(session.number, stream));
        }
        pushed
    }

    /// Ends one.
    pub(super) fn close(&mut self, _permit: &Permit, session: &Session, stream: u32) -> Result<(), Refused> {
        match self.0.remove(&(session.number, stream)) {
            Some(_) => Ok(()),
            None => Err(Status::NotFound.into()),
        }
    }

    /// Ends all of a connection.
    pub(super) fn end_session(&mut self, session: &Session) {
        self.0.retain(|(number, _), _| *number != session.number);
    }

    /// Ends all under a key.
    pub(super) fn end_key(&mut self, id: KeyId) {
        self.0.retain(|_, (key, _)| *key != id);
    }

    /// Ends all.
    pub(super) fn end_all(&mut self) {
        self.0.clear();
    }

    /// Seals the next chunks of a stream. A chunk is numbered here and sealed once; an error ends the stream.
    pub(super) fn encrypt(
        &mut self,
        _permit: &Permit,
        session: &Session,
        stream: u32,
        plaintext: &[u8],
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        // Taken out, and put back only when all went well: an error ends the stream.
        let place = (session.number, stream);
        let Some((key, OpenStream::Encrypt { body, next })) = self.0.remove(&place) else {
            return Err(Status::NotFound.into());
        };
        let whole = plaintext.len() / CHUNK_LEN;
        let rest = plaintext.len() % CHUNK_LEN;
        let ends = plaintext.is_empty() || rest != 0;
        let chunks = whole.saturating_add(usize::from(ends));
        let sealed_len = plaintext.len().saturating_add(chunks.saturating_mul(TAG_LEN));
        replies.push(request_id, &NoFields {}, sealed_len, |out| {
            for (to, from) in out.chunks_mut(SEALED_CHUNK_LEN).zip(plaintext.chunks(CHUNK_LEN)) {
                to.get_mut(..from.len()).ok_or(Status::Internal)?.copy_from_slice(from);
            }
            apart(|| body.seal_chunks(next, out)).map_err(Refused::from)
        })??;
        if !ends {
            let next = next.saturating_add(chunks as u64);
            self.0.insert(place, (key, OpenStream::Encrypt { body, next }));
        }
        Ok(())
    }

    /// Opens chunks of a stream, wherever they stand. An error ends the stream.
    pub(super) fn decrypt(
        &mut self,
        _permit: &Permit,
        session: &Session,
        fields: RemoteChunks,
        chunks: &[u8],
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let place = (session.number, fields.stream);
        let Some((key, OpenStream::Decrypt { body })) = self.0.remove(&place) else {
            return Err(Status::NotFound.into());
        };
        let whole = chunks.len() / SEALED_CHUNK_LEN;
        let rest = chunks.len() % SEALED_CHUNK_LEN;
        if chunks.is_empty() {
            return Err(Status::Malformed.into());
        }
        if rest != 0 && rest < TAG_LEN {
            return Err(Status::InvalidCiphertext.into());
        }
        let count = whole.saturating_add(usize::from(rest != 0));
        let plaintext_len = chunks.len().saturating_sub(count.saturating_mul(TAG_LEN));
        replies.push(request_id, &NoFields {}, plaintext_len, |out| {
            let mut first = fields.first;
            let mut chunk = zeroize::Zeroizing::new([0; SEALED_CHUNK_LEN]);
            // By the sealed chunks: an empty last one has no plaintext, and its tag is checked all the same.
            let mut rest = out;
            apart(|| {
                for from in chunks.chunks(SEALED_CHUNK_LEN) {
                    let chunk = chunk.get_mut(..from.len()).ok_or(Status::Internal)?;
                    chunk.copy_from_slice(from);
                    body.open_chunks(first, chunk)?;
                    let opened = chunk.get(..from.len().saturating_sub(TAG_LEN)).ok_or(Status::Internal)?;
                    let (to, behind) = rest.split_at_mut_checked(opened.len()).ok_or(Status::Internal)?;
                    to.copy_from_slice(opened);
                    rest = behind;
                    first = first.saturating_add(1);
                }
                Ok::<(), Refused>(())
            })
        })??;
        self.0.insert(place, (key, OpenStream::Decrypt { body }));
        Ok(())
    }
}
