//! What requests that change something answered, kept for a repeat of them (`docs/protocol.md`, section 4.2, Tokens).

use std::collections::{HashMap, VecDeque};

use kms_protocol::{Added, Removed, TOKEN_LEN};

/// Results that are kept for requests that are repeated.
const REPEATS_MAX: usize = 4096;

/// What a request that changes something answered, kept for a repeat of it.
#[derive(Clone, Copy)]
pub(super) enum Repeat {
    Added(Added),
    Removed(Removed),
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
