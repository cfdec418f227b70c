//! How often which operation ended how (`docs/protocol.md`, sections 4.36 and 5.4).

use kms_protocol::{Opcode, OperationCount, StatsReply, Status, Value};

use super::{Core, Now, Surroundings, push, refusal::Refused};
use crate::{audit::Audit, authorize::Permit, crypto::Random, reply::Replies};

/// One more than the highest opcode, and than the highest status.
const OPCODES: usize = 0x51;
const STATUSES: usize = 17;

/// Counters since the start.
pub(super) struct Counts {
    ended: Box<[[u64; STATUSES]; OPCODES]>,
    requests: u64,
    bytes_in: u64,
    bytes_out: u64,
}

impl Default for Counts {
    fn default() -> Self {
        Self { ended: Box::new([[0; STATUSES]; OPCODES]), requests: 0, bytes_in: 0, bytes_out: 0 }
    }
}

impl Counts {
    /// A request was taken up.
    pub(super) fn taken_up(&mut self) {
        self.requests = self.requests.saturating_add(1);
    }

    /// A request, or an item of a batch, was answered; without an opcode it was none that this release has.
    pub(super) fn ended(&mut self, opcode: Option<Opcode>, status: Status) {
        let row = self.ended.get_mut(usize::from(opcode.map_or(0, Opcode::code)));
        if let Some(count) = row.and_then(|row| row.get_mut(usize::from(status.code()))) {
            *count = count.saturating_add(1);
        }
    }

    /// So many bytes came in and went out.
    pub(super) fn moved(&mut self, bytes_in: usize, bytes_out: usize) {
        self.bytes_in = self.bytes_in.saturating_add(bytes_in as u64);
        self.bytes_out = self.bytes_out.saturating_add(bytes_out as u64);
    }

    /// Requests that came; the items of a batch are one.
    pub(super) fn requests(&self) -> u64 {
        self.requests
    }

    fn rows(&self) -> Vec<OperationCount> {
        let rows = (0u16..).zip(self.ended.iter());
        let cells = rows
            .flat_map(|(opcode, row)| (0u16..).zip(row).map(move |(status, count)| (opcode, status, *count)));
        cells
            .filter(|(_, _, count)| *count > 0)
            .map(|(opcode, status, count)| OperationCount { opcode, status, count })
            .collect()
    }
}

impl<R: Random, A: Audit> Core<R, A> {
    pub(super) fn stats(
        &self,
        _permit: &Permit,
        now: Now,
        around: Surroundings,
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let value = |name: &str, value: u64| Value { name: name.to_owned(), value };
        let stats = StatsReply {
            uptime_ms: u64::try_from(now.boot.saturating_sub(self.started).as_millis()).unwrap_or(u64::MAX),
            operations: self.counts.rows(),
            values: vec![
                value("keys", self.keyring.len() as u64),
                value("versions", self.keyring.versions() as u64),
                value("key-uses", self.keyring.uses()),
                value("bytes-in", self.counts.bytes_in),
                value("bytes-out", self.counts.bytes_out),
                value("connections", around.connections as u64),
                value("panics", around.panics),
            ],
        };
        push(replies, request_id, &stats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_opcode_and_status_has_a_place() {
        let mut counts = Counts::default();
        for opcode in Opcode::ALL {
            // The first and the last.
            for status in [Status::Ok, Status::Internal] {
                counts.ended(Some(*opcode), status);
            }
        }
        counts.ended(None, Status::Malformed);
        assert_eq!(counts.rows().len(), Opcode::ALL.len() * 2 + 1);
        assert!(counts.rows().iter().all(|row| row.count == 1));
    }
}
