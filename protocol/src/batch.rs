//! The frames in the payload of a `batch` and of its reply (`docs/protocol.md`, section 4.34).
//!
//! Looks at heads and lengths alone, all of them before the first item is given out. What the items ask for is not looked at.

use thiserror::Error;

use crate::{BATCH_ITEMS_MAX, FRAME_MAX, frame::Frame};

//= docs/protocol.md#434-batch
//# The frames of all items are looked at before the first is carried out
/// The items of a batch, every one a whole frame. Iterates over them in order.
#[derive(Clone)]
pub struct Items<'a> {
    rest: &'a [u8],
    left: usize,
}

/// Why a payload is not a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BatchError {
    /// No item, an item that is cut short, or a head that no frame has.
    #[error("the payload is not a row of whole frames")]
    Malformed,
    /// More than [`BATCH_ITEMS_MAX`].
    #[error("a batch has at most {BATCH_ITEMS_MAX} items")]
    TooMany,
}

impl<'a> Items<'a> {
    /// Checks that the payload is 1 to [`BATCH_ITEMS_MAX`] whole frames and nothing else. Allocates nothing.
    ///
    /// # Errors
    /// [`BatchError`].
    pub fn parse(payload: &'a [u8]) -> Result<Self, BatchError> {
        let (mut rest, mut left) = (payload, 0_usize);
        while !rest.is_empty() {
            let frame = Frame::parse(rest, FRAME_MAX).ok().flatten().ok_or(BatchError::Malformed)?;
            rest = rest.get(frame.frame_len()..).ok_or(BatchError::Malformed)?;
            left = left.saturating_add(1);
        }
        match left {
            0 => Err(BatchError::Malformed),
            1..=BATCH_ITEMS_MAX => Ok(Self { rest: payload, left }),
            _ => Err(BatchError::TooMany),
        }
    }
}

impl<'a> Iterator for Items<'a> {
    type Item = Frame<'a>;

    fn next(&mut self) -> Option<Frame<'a>> {
        let frame = Frame::parse(self.rest, FRAME_MAX).ok().flatten()?;
        self.rest = self.rest.get(frame.frame_len()..)?;
        self.left = self.left.saturating_sub(1);
        Some(frame)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Items<'_> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{NoFields, push_frame};

    fn row(count: usize) -> Vec<u8> {
        let mut row = Vec::new();
        for id in 0..count {
            push_frame(&mut row, 0x30, u32::try_from(id).unwrap(), &NoFields {}, &[7; 3][..id % 4]).unwrap();
        }
        row
    }

    #[test]
    fn items_come_out_in_order_and_whole() {
        for count in [1, 2, BATCH_ITEMS_MAX] {
            let row = row(count);
            let items = Items::parse(&row).unwrap();
            assert_eq!(items.len(), count);
            let ids: Vec<_> = items.map(|item| (item.head.request_id as usize, item.payload.len())).collect();
            assert_eq!(ids, (0..count).map(|id| (id, id % 4)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_is_no_row_of_whole_frames_is_refused_at_once() {
        let row = row(4);
        let refused = |bytes: &[u8]| Items::parse(bytes).err();
        assert_eq!(refused(&[]), Some(BatchError::Malformed));
        let ends: Vec<_> = [16, 33, 51, 70].to_vec();
        for cut in 1..row.len() {
            let whole = ends.contains(&cut);
            assert_eq!(refused(&row[..cut]), (!whole).then_some(BatchError::Malformed), "{cut}");
        }
        assert_eq!(refused(&[&row[..], &[0]].concat()), Some(BatchError::Malformed));
        for (at, byte) in [(4, 2), (5, 1), (3, 0xff), (15, 0xff)] {
            let mut bad = row.clone();
            bad[51 + at] = byte;
            assert_eq!(refused(&bad), Some(BatchError::Malformed), "{at}");
        }
        let mut many = self::row(BATCH_ITEMS_MAX + 1);
        assert_eq!(refused(&many), Some(BatchError::TooMany));
        many.push(0);
        assert_eq!(refused(&many), Some(BatchError::Malformed));
    }
}
