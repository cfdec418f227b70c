//! Many operations in one frame (`docs/protocol.md`, section 4.34).
//!
//! Owns the batch as its caller puts it together and how it is cut into frames: none is longer than the agent takes, and none asks
//! for more than one reply can hold, so that every item is carried out.

use kms_envelope::{ContextRef, DIGEST_LEN, INPUT_TAG_LEN, STREAM_HEAD_LEN};
use kms_protocol::{BATCH_ITEMS_MAX, FRAME_HEAD_LEN, Frame, KeyRef, Request};
use kms_secret_memory::SecretVec;

use crate::{
    client::Client,
    error::{Error, ReplyError},
    items::{Item, Prepared, item_methods},
    operations,
    wire::{self, Accepted},
};

/// Operations that go to the agent together; see [`Client::batch`].
///
/// Each has its own key and context. The methods say at which place, from 0, the result will stand.
///
/// ```no_run
/// use kms_client::{Batch, Client, ContextRef, EncryptionContext, Item, KeyRef, Options};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut client = Client::connect(&Options::default())?;
/// let mut batch = Batch::new();
/// for (row, secret) in ["first", "second"].iter().enumerate() {
///     let context = EncryptionContext::from_pairs([("row", row.to_string())])?;
///     batch.encrypt(KeyRef::Name("backup"), context.as_ref(), secret.as_bytes());
/// }
/// for result in client.batch(&batch)? {
///     match result {
///         Ok(Item::Sealed(sealed)) => println!("{} bytes", sealed.len()),
///         Ok(_) => {}
///         Err(error) => println!("not this one: {error}"),
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Default)]
pub struct Batch {
    items: Vec<Result<Prepared, Error>>,
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of operations.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    item_methods!();

    fn push(&mut self, mut item: Result<Prepared, Error>) -> usize {
        let place = self.items.len();
        if let Ok(item) = &mut item {
            // So that answers in another order are noticed; to the agent it means nothing.
            item.request.set_id(id(place));
        }
        self.items.push(item);
        place
    }
}

fn id(place: usize) -> u32 {
    u32::try_from(place & 0xffff_ffff).unwrap_or(0)
}

impl Client {
    /// Carries out all of a batch and brings the results in order, each with its own error. A long batch takes several frames.
    ///
    /// # Errors
    /// As [`ping`](Self::ping): the agent could not be asked. Of some items it may then have been.
    pub fn batch(&mut self, batch: &Batch) -> Result<Vec<Result<Item, Error>>, Error> {
        let room = self.connection.sender.frame_max.saturating_sub(FRAME_HEAD_LEN);
        let mut results = Vec::with_capacity(batch.len());
        while results.len() < batch.len() {
            let rest = batch.items.get(results.len()..).unwrap_or_default();
            let rest = rest.get(..group(rest, room)).unwrap_or(rest);
            self.batch_frame(rest, &mut results)?;
        }
        Ok(results)
    }

    fn batch_frame(
        &mut self,
        items: &[Result<Prepared, Error>],
        results: &mut Vec<Result<Item, Error>>,
    ) -> Result<(), Error> {
        let asked = || items.iter().flatten();
        let len = asked().map(|item| item.request.bytes().len()).fold(0_usize, usize::saturating_add);
        let mut frames = SecretVec::with_capacity(len);
        for item in asked() {
            let max = self.connection.sender.frame_max;
            frames.push_slice(item.request.bytes()).map_err(|_| Error::TooLong { what: "batch", max })?;
        }
        let first = results.len();
        if frames.is_empty() {
            results.extend(items.iter().filter_map(|item| Some(Err(item.as_ref().err()?.again()))));
            return Ok(());
        }
        let bound: Vec<_> = asked().flat_map(|item| item.request.bound).collect();
        let request = Request::Batch { frames: frames.expose_secret() };
        let call = self.answer(&request, &bound)?;
        let read = call.accept().and_then(|reply| Ok(read(items, first, reply)?));
        match read {
            Ok(read) => results.extend(read),
            Err(Error::Reply(error)) => return Err(self.disbelieve(error)),
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// How many of these items go into one frame. An item that cannot be sent takes no room; one that is too long for any frame goes
/// alone, for the agent to refuse.
fn group(items: &[Result<Prepared, Error>], room: usize) -> usize {
    let (mut sent, mut answered, mut count) = (0_usize, 0_usize, 0_usize);
    let fits = |item: &&Result<Prepared, Error>| {
        let Ok(item) = item else { return true };
        sent = sent.saturating_add(item.request.bytes().len());
        answered = answered.saturating_add(item.reply_max);
        count = count.saturating_add(1);
        sent <= room && answered <= room && count <= BATCH_ITEMS_MAX
    };
    items.iter().take_while(fits).count().max(1)
}

/// Every answer, or none: a reply of which one part makes no sense is not used at all.
fn read(
    items: &[Result<Prepared, Error>],
    first: usize,
    reply: Accepted<'_>,
) -> Result<Vec<Result<Item, Error>>, ReplyError> {
    let mut rest = reply.payload()?;
    let mut results = Vec::with_capacity(items.len());
    for (place, item) in (first..).zip(items) {
        let item = match item {
            Ok(item) => item,
            Err(error) => {
                results.push(Err(error.again()));
                continue;
            }
        };
        let frame = Frame::parse(rest, rest.len())?.ok_or(ReplyError::Shape)?;
        rest = rest.get(frame.frame_len()..).unwrap_or_default();
        results.push(match wire::accept(&frame, item.request.operation, id(place)) {
            Ok(accepted) => Ok((item.read)(accepted)?),
            Err(Error::Reply(error)) => return Err(error),
            Err(error) => Err(error),
        });
    }
    if rest.is_empty() { Ok(results) } else { Err(ReplyError::Shape) }
}
