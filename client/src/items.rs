//! Operations on data that can be asked for many at a time, in a batch or a pipeline.

use kms_envelope::INPUT_TAG_LEN;
use kms_protocol::Verified;
use kms_secret_memory::SecretVec;

use crate::{
    error::{Error, ReplyError},
    operations::{DataKey, Moved, Operation},
    stream::{LocalOpening, LocalSealing},
    wire::{Accepted, Outgoing},
};

/// What an operation on data brought.
pub enum Item {
    /// Of `encrypt`, `wrap` and `data_key_wrapped`.
    Sealed(Vec<u8>),
    /// Of `decrypt`, `unwrap` and `random`.
    Secret(SecretVec),
    /// Of `data_key`.
    DataKey(DataKey),
    /// Of `rewrap`.
    Moved(Moved),
    /// Of `verify`.
    Verified(Verified),
    /// Of `mac`.
    Tag([u8; INPUT_TAG_LEN]),
    /// Of `mac_verify`: the tag is the input's.
    TagVerified,
    /// Of `stream_new`.
    Sealing(LocalSealing),
    /// Of `stream_open`.
    Opening(LocalOpening),
}

macro_rules! from {
    ($($variant:ident($type:ty);)*) => {
        $(impl From<$type> for Item {
            fn from(brought: $type) -> Self {
                Self::$variant(brought)
            }
        })*
    };
}

from! {
    Sealed(Vec<u8>);
    Secret(SecretVec);
    DataKey(DataKey);
    Moved(Moved);
    Verified(Verified);
    Tag([u8; INPUT_TAG_LEN]);
    Sealing(LocalSealing);
    Opening(LocalOpening);
}

impl From<()> for Item {
    fn from((): ()) -> Self {
        Self::TagVerified
    }
}

/// Takes the item out of its reply.
pub(crate) type ReadItem = Box<dyn Fn(Accepted<'_>) -> Result<Item, ReplyError> + Send + Sync>;

/// An operation as bytes, with nothing borrowed any more.
pub(crate) struct Prepared {
    pub(crate) request: Outgoing,
    /// Most bytes that its reply can have.
    pub(crate) reply_max: usize,
    pub(crate) read: ReadItem,
}

impl Prepared {
    pub(crate) fn new<T: Into<Item> + 'static>(
        operation: Result<Operation<'_, T>, Error>,
    ) -> Result<Self, Error> {
        let operation = operation?;
        let (expect, read) = (operation.expect, operation.read);
        Ok(Self {
            request: Outgoing::new(&operation.request)?,
            reply_max: operation.reply_max(),
            read: Box::new(move |reply| read(reply, &expect).map(Into::into)),
        })
    }
}

/// The operations on data as methods that hand what they ask for to `self.push`, and say at which place it stands.
macro_rules! item_methods {
    () => {
        /// As [`Client::encrypt`](crate::Client::encrypt).
        pub fn encrypt(&mut self, key: KeyRef<'_>, context: ContextRef<'_>, plaintext: &[u8]) -> usize {
            self.push(Prepared::new(operations::encrypt(key, context, plaintext)))
        }

        /// As [`Client::decrypt`](crate::Client::decrypt).
        pub fn decrypt(&mut self, key: KeyRef<'_>, context: ContextRef<'_>, ciphertext: &[u8]) -> usize {
            self.push(Prepared::new(operations::decrypt(key, context, ciphertext)))
        }

        /// As [`Client::wrap`](crate::Client::wrap).
        pub fn wrap(&mut self, key: KeyRef<'_>, context: ContextRef<'_>, plaintext: &[u8]) -> usize {
            self.push(Prepared::new(operations::wrap(key, context, plaintext)))
        }

        /// As [`Client::unwrap`](crate::Client::unwrap).
        pub fn unwrap(&mut self, key: KeyRef<'_>, context: ContextRef<'_>, ciphertext: &[u8]) -> usize {
            self.push(Prepared::new(operations::unwrap(key, context, ciphertext)))
        }

        /// As [`Client::data_key`](crate::Client::data_key).
        pub fn data_key(&mut self, key: KeyRef<'_>, context: ContextRef<'_>, length: u32) -> usize {
            self.push(Prepared::new(operations::data_key(key, context, length)))
        }

        /// As [`Client::data_key_wrapped`](crate::Client::data_key_wrapped).
        pub fn data_key_wrapped(&mut self, key: KeyRef<'_>, context: ContextRef<'_>, length: u32) -> usize {
            self.push(Prepared::new(operations::data_key_wrapped(key, context, length)))
        }

        /// As [`Client::rewrap`](crate::Client::rewrap).
        pub fn rewrap(
            &mut self,
            key: KeyRef<'_>,
            context: ContextRef<'_>,
            ciphertext: &[u8],
            to: Option<KeyRef<'_>>,
        ) -> usize {
            self.push(Prepared::new(Ok(operations::rewrap(key, context, ciphertext, to))))
        }

        /// As [`Client::verify`](crate::Client::verify).
        pub fn verify(&mut self, key: KeyRef<'_>, context: ContextRef<'_>, ciphertext: &[u8]) -> usize {
            self.push(Prepared::new(Ok(operations::verify(key, context, ciphertext))))
        }

        /// As [`Client::mac`](crate::Client::mac).
        pub fn mac(&mut self, key: KeyRef<'_>, context: ContextRef<'_>, digest: &[u8; DIGEST_LEN]) -> usize {
            self.push(Prepared::new(Ok(operations::mac(key, context, digest))))
        }

        /// As [`Client::mac_verify`](crate::Client::mac_verify).
        pub fn mac_verify(
            &mut self,
            key: KeyRef<'_>,
            context: ContextRef<'_>,
            tag: &[u8; INPUT_TAG_LEN],
            digest: &[u8; DIGEST_LEN],
        ) -> usize {
            let both = operations::tagged(tag, digest);
            self.push(Prepared::new(Ok(operations::mac_verify(key, context, &both))))
        }

        /// As [`Client::random`](crate::Client::random).
        pub fn random(&mut self, length: u32) -> usize {
            self.push(Prepared::new(operations::random(length)))
        }

        /// As [`Client::stream_new`](crate::Client::stream_new).
        pub fn stream_new(&mut self, key: KeyRef<'_>, context: ContextRef<'_>) -> usize {
            self.push(Prepared::new(Ok(operations::stream_new(key, context))))
        }

        /// As [`Client::stream_open`](crate::Client::stream_open).
        pub fn stream_open(
            &mut self,
            key: KeyRef<'_>,
            context: ContextRef<'_>,
            head: &[u8; STREAM_HEAD_LEN],
        ) -> usize {
            self.push(Prepared::new(Ok(operations::stream_open(key, context, head))))
        }
    };
}
pub(crate) use item_methods;
