//! What requests that change something answered, kept for a repeat of them (`docs/protocol.md`, section 4.2, Tokens).

use std::collections::{HashMap, VecDeque};

use kms_protocol::{Added, Removed, RemovedAll, Renamed, Rotated, Status, TOKEN_LEN};

use super::{Core, refusal::Refused};

/// Results that are kept for requests that are repeated.
const REPEATS_MAX: usize = 4096;

macro_rules! repeatable {
    ($($reply:ident,)*) => {
        /// What a request that changes something answered, kept for a repeat of it.
        #[derive(Clone, Copy)]
        pub(super) enum Repeat { $($reply($reply),)* }

        $(impl Repeatable for $reply {
            fn keep(self) -> Repeat { Repeat::$reply(self) }

            fn again(kept: Repeat) -> Option<Self> {
                match kept { Repeat::$reply(reply) => Some(reply), _ => None }
            }
        })*
    };
}

repeatable! { Added, Removed, Rotated, Renamed, RemovedAll, }

/// A reply that is given again to a repeat of its request.
pub(super) trait Repeatable: Copy {
    /// To be kept.
    fn keep(self) -> Repeat;
    /// As it was, unless it belongs to another operation.
    fn again(kept: Repeat) -> Option<Self>;
}

/// The latest of them.
#[derive(Default)]
pub(super) struct Repeats {
    results: HashMap<(u32, [u8; TOKEN_LEN]), Repeat>,
    order: VecDeque<(u32, [u8; TOKEN_LEN])>,
}

impl Repeats {
    pub(super) fn remember(&mut self, uid: u32, token: [u8; TOKEN_LEN], result: Repeat) {
        if self.order.len() >= REPEATS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.results.remove(&oldest);
        }
        if self.results.insert((uid, token), result).is_none() {
            self.order.push_back((uid, token));
        }
    }

    pub(super) fn find(&self, uid: u32, token: [u8; TOKEN_LEN]) -> Option<Repeat> {
        self.results.get(&(uid, token)).copied()
    }
}

impl<R, A> Core<R, A> {
    /// Does something once for each token, and gives the first result to a repeat.
    pub(super) fn once<T: Repeatable>(
        &mut self,
        uid: u32,
        token: [u8; TOKEN_LEN],
        change: impl FnOnce(&mut Self) -> Result<T, Refused>,
    ) -> Result<T, Refused> {
        //= docs/protocol.md#tokens
        //# A client MUST NOT
        //# use a token for two different requests; a token of another opcode is `malformed`.
        if let Some(kept) = self.repeats.find(uid, token) {
            return T::again(kept).ok_or(Status::Malformed.into());
        }
        let result = change(self)?;
        self.repeats.remember(uid, token, result.keep());
        Ok(result)
    }
}
