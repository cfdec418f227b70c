//! Memory for frames that arrive or leave in pieces: one pool of locked, wiped buffers, counted by uid.
//!
//! Owns how much of it there is and who may have how much. A buffer grows with what has arrived, never beyond what was
//! granted, and nobody who waits for a grant holds another one that somebody else could be waiting for: see `Server::settle`.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
};

use kms_secret_memory::{LockedBuffer, Policy, RegionError};

use super::READ_LEN;

/// What all frame buffers take together, and what those of one uid take, in bytes.
const POOL_LEN: usize = 4 * 1024 * 1024;
const POOL_LEN_PER_UID: usize = POOL_LEN / 4;

/// Buffers of [`READ_LEN`] that are kept while the agent is busy: locking a page costs more than a small request.
const SPARE_BUFFERS: usize = 16;

/// The pool.
pub(super) struct FramePool {
    memory: Policy,
    used: Cell<usize>,
    by_uid: RefCell<HashMap<u32, usize>>,
    /// Something came back since [`take_freed`](Self::take_freed).
    freed: Cell<bool>,
    spare: RefCell<Vec<LockedBuffer>>,
    /// One that held a long frame: the next piece of the same stream is as long.
    spare_long: RefCell<Option<LockedBuffer>>,
}

impl FramePool {
    pub(super) fn new(memory: Policy) -> Rc<Self> {
        Rc::new(Self {
            memory,
            used: Cell::new(0),
            by_uid: RefCell::default(),
            freed: Cell::new(false),
            spare: RefCell::default(),
            spare_long: RefCell::default(),
        })
    }

    /// Bytes that are granted.
    pub(super) fn used(&self) -> usize {
        self.used.get()
    }

    fn used_by(&self, uid: u32) -> usize {
        if self.used.get() == 0 { 0 } else { self.by_uid.borrow().get(&uid).copied().unwrap_or(0) }
    }

    /// Whether there is memory for any frame of this uid, since it holds none.
    pub(super) fn is_free_for(&self, uid: u32) -> bool {
        self.used_by(uid) == 0 && self.used.get() <= POOL_LEN - POOL_LEN_PER_UID
    }

    /// The right to `len` bytes, if there are so many for this uid.
    pub(super) fn grant(self: &Rc<Self>, uid: u32, len: usize) -> Option<Grant> {
        let mut grant = Grant { pool: Rc::clone(self), uid, len: 0 };
        grant.resize(len).then_some(grant)
    }

    /// Whether something came back since this was asked last.
    pub(super) fn take_freed(&self) -> bool {
        self.freed.take()
    }

    /// Gives spare buffers back to the machine.
    pub(super) fn cool(&self) {
        self.spare.borrow_mut().clear();
        *self.spare_long.borrow_mut() = None;
    }

    /// At least `len` bytes, at most what was granted.
    fn buffer(&self, len: usize, granted: usize) -> Result<LockedBuffer, RegionError> {
        let len = len.max(READ_LEN);
        if granted > READ_LEN
            && let Some(long) =
                self.spare_long.borrow_mut().take_if(|long| (len..=granted).contains(&long.len()))
        {
            return Ok(long);
        }
        if len == READ_LEN
            && let Some(spare) = self.spare.borrow_mut().pop()
        {
            return Ok(spare);
        }
        LockedBuffer::new(len, self.memory).or_else(|_| {
            self.cool();
            LockedBuffer::new(len, self.memory)
        })
    }

    /// Keeps a buffer that was wiped.
    fn keep(&self, buffer: LockedBuffer) {
        if buffer.len() == READ_LEN {
            let mut spare = self.spare.borrow_mut();
            if spare.len() < SPARE_BUFFERS {
                spare.push(buffer);
            }
        } else {
            let mut long = self.spare_long.borrow_mut();
            if long.as_ref().is_none_or(|long| long.len() < buffer.len()) {
                *long = Some(buffer);
            }
        }
    }
}

/// The right to hold so many bytes of frames.
pub(super) struct Grant {
    pool: Rc<FramePool>,
    uid: u32,
    len: usize,
}

impl Grant {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Makes it one to `len` bytes; says whether that could be. It always can be when it becomes smaller.
    pub(super) fn resize(&mut self, len: usize) -> bool {
        let pool = &self.pool;
        let used = pool.used.get().saturating_sub(self.len).saturating_add(len);
        let mut by_uid = pool.by_uid.borrow_mut();
        let others = by_uid.get(&self.uid).map_or(0, |used| used.saturating_sub(self.len));
        let used_by_uid = others.saturating_add(len);
        if len > self.len && (used > POOL_LEN || used_by_uid > POOL_LEN_PER_UID) {
            return false;
        }
        pool.used.set(used);
        if used_by_uid == 0 {
            by_uid.remove(&self.uid);
        } else {
            by_uid.insert(self.uid, used_by_uid);
        }
        if len < self.len {
            pool.freed.set(true);
        }
        self.len = len;
        true
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.resize(0);
    }
}

/// Bytes in a locked buffer that were granted.
pub(super) struct Held {
    buffer: LockedBuffer,
    start: usize,
    end: usize,
    grant: Grant,
}

impl Held {
    /// A buffer with these bytes one after the other, which the grant covers.
    pub(super) fn new(parts: &[&[u8]], grant: Grant) -> Result<Self, RegionError> {
        let len = parts.iter().map(|part| part.len()).sum();
        let mut buffer = grant.pool.buffer(len, grant.len)?;
        for (to, from) in buffer.expose_secret_mut().iter_mut().zip(parts.iter().copied().flatten()) {
            *to = *from;
        }
        Ok(Self { buffer, start: 0, end: len, grant })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.expose_secret().get(self.start..self.end).unwrap_or_default()
    }

    pub(super) fn grant(&mut self) -> &mut Grant {
        &mut self.grant
    }

    /// Drops `count` bytes from the front.
    pub(super) fn consume(&mut self, count: usize) {
        let from = self.start.saturating_add(count).min(self.end);
        self.buffer.wipe_range(self.start..from);
        self.start = from;
    }

    /// Where more can be read to, so that there are at most `len` bytes: the buffer is doubled until it is as long, so that
    /// memory follows what has arrived.
    pub(super) fn room(&mut self, len: usize) -> Result<&mut [u8], RegionError> {
        if self.start > 0 {
            let left = self.end.saturating_sub(self.start);
            self.buffer.expose_secret_mut().copy_within(self.start..self.end, 0);
            self.buffer.wipe_range(left..self.end);
            (self.start, self.end) = (0, left);
        }
        let len = len.min(self.grant.len);
        if self.end >= self.buffer.len() && self.buffer.len() < len {
            let wanted = self.end.saturating_mul(2).clamp(READ_LEN, len);
            let mut longer = self.grant.pool.buffer(wanted, self.grant.len)?;
            if let Some(front) = longer.expose_secret_mut().get_mut(..self.end) {
                front.copy_from_slice(self.buffer.expose_secret().get(..self.end).unwrap_or_default());
            }
            self.buffer = longer;
        }
        let len = len.min(self.buffer.len());
        Ok(self.buffer.expose_secret_mut().get_mut(self.end..len).unwrap_or_default())
    }

    /// So many bytes were read to [`room`](Self::room).
    pub(super) fn filled(&mut self, count: usize) {
        self.end = self.end.saturating_add(count).min(self.buffer.len());
    }

    /// Wipes it, keeps the buffer for the next one, and gives the grant back.
    pub(super) fn release(mut self) -> Grant {
        self.buffer.wipe_range(self.start..self.end);
        self.grant.pool.keep(self.buffer);
        self.grant
    }
}
