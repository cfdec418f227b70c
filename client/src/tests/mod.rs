//! The library against an agent in the same process, which answers as it should or as it should not.

#[cfg(feature = "async")]
mod asynchronous;
mod fake;
mod hostile;
mod many;
mod retry;
mod shapes;
mod streams;

use std::time::Duration;

use crate::Options;

/// The options that reach a fake agent, once.
fn options(fake: &fake::Fake) -> Options {
    Options { socket: Some(fake.socket.clone()), retry: Duration::ZERO, ..Options::default() }
}

/// Numbers without a pattern, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next()).unwrap() % limit
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for piece in bytes.chunks_mut(4) {
            piece.copy_from_slice(&self.next().to_le_bytes()[..piece.len()]);
        }
        bytes
    }
}
