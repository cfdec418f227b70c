//! Many requests in one frame (`docs/protocol.md`, section 4.34).
//!
//! Owns what may stand in a batch and the room of its replies. Each item goes the way that it would go alone, through
//! `authorize` too.

use kms_protocol::{BatchError, FRAME_HEAD_LEN, Frame, Items, Opcode, Request, Status};

use super::{
    Core, Now, Outcome, Session, Surroundings,
    refusal::{AGAIN, Refused, refuse},
};
use crate::{audit::Audit, authorize::Permit, crypto::Random, reply::Replies};

/// Length of a refusal: a head and the time to wait.
pub(super) const REFUSAL_LEN: usize = FRAME_HEAD_LEN + 4;

/// What uses keys and leaves everything else as it is.
fn may_stand_in_a_batch(opcode: Opcode) -> bool {
    match opcode {
        Opcode::Encrypt
        | Opcode::Decrypt
        | Opcode::StreamNew
        | Opcode::StreamOpen
        | Opcode::Wrap
        | Opcode::Unwrap
        | Opcode::DataKey
        | Opcode::DataKeyWrapped
        | Opcode::Rewrap
        | Opcode::Verify
        | Opcode::Mac
        | Opcode::MacVerify
        | Opcode::Random => true,
        Opcode::Hello
        | Opcode::Ping
        | Opcode::Status
        | Opcode::Lock
        | Opcode::Unlock
        | Opcode::Add
        | Opcode::List
        | Opcode::Describe
        | Opcode::Remove
        | Opcode::Rotate
        | Opcode::Rename
        | Opcode::Export
        | Opcode::RemoveAll
        | Opcode::RemoteStreamNew
        | Opcode::RemoteStreamOpen
        | Opcode::RemoteStreamEncrypt
        | Opcode::RemoteStreamDecrypt
        | Opcode::RemoteStreamClose
        | Opcode::Bind
        | Opcode::Batch
        | Opcode::Stats => false,
    }
}

impl<R: Random, A: Audit> Core<R, A> {
    #[expect(clippy::too_many_arguments, reason = "what every request comes with")]
    pub(super) fn batch(
        &mut self,
        session: &mut Session,
        _permit: &Permit,
        frames: &[u8],
        request_id: u32,
        now: Now,
        around: Surroundings,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let items = Items::parse(frames).map_err(|error| match error {
            BatchError::Malformed => Status::Malformed,
            BatchError::TooMany => Status::TooLarge,
        })?;
        //= docs/protocol.md#434-batch
        //# room for the refusals of the items behind it is kept.
        let mut behind = items.len().saturating_mul(REFUSAL_LEN);
        let batch = replies.begin_batch(behind)?;
        for item in items {
            behind = behind.saturating_sub(REFUSAL_LEN);
            replies.keep_free(&batch, behind);
            let opcode = Opcode::from_code(item.head.code);
            let status = match self.item(session, opcode, &item, now, around, replies) {
                Ok(()) => Status::Ok,
                Err(refused) => {
                    let written = refuse(item.head.request_id, &refused, replies);
                    if !matches!(written, Outcome::Continue) {
                        // No memory even for that: an answer with a gap would be read as another item's.
                        replies.cancel_batch(batch);
                        return Err(Refused::busy(AGAIN));
                    }
                    refused.status
                }
            };
            self.counts.ended(opcode, status);
        }
        replies.end_batch(batch, request_id)?;
        Ok(())
    }

    fn item(
        &mut self,
        session: &mut Session,
        opcode: Option<Opcode>,
        item: &Frame<'_>,
        now: Now,
        around: Surroundings,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let opcode = opcode.filter(|opcode| may_stand_in_a_batch(*opcode)).ok_or(Status::Unsupported)?;
        let request = Request::decode(opcode, item).map_err(|_| Status::Malformed)?;
        self.carry_out(session, request, item.head.request_id, now, around, replies).map(|_| ())
    }
}
