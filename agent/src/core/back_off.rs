//! How long a uid waits after a wrong passphrase: twice as long each time, and nobody else waits (`docs/protocol.md`, section
//! 4.7).

use std::{collections::HashMap, time::Duration};

/// The first wait; it doubles with each wrong passphrase, up to the last.
const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(10);

/// The wrong passphrases of each uid since its last right one. Times are since boot.
#[derive(Default)]
pub(super) struct BackOff(HashMap<u32, (u32, Duration)>);

impl BackOff {
    /// What is left of the wait; zero when there is none.
    pub(super) fn wait(&self, uid: u32, now: Duration) -> Duration {
        self.0.get(&uid).map_or(Duration::ZERO, |(_, until)| until.saturating_sub(now))
    }

    /// One more wrong passphrase; gives their number.
    pub(super) fn wrong(&mut self, uid: u32, now: Duration) -> u32 {
        let (failures, until) = self.0.entry(uid).or_default();
        let doubled = 1u32.checked_shl(*failures).unwrap_or(u32::MAX);
        *until = now.saturating_add(FIRST.saturating_mul(doubled).min(LAST));
        *failures = failures.saturating_add(1);
        *failures
    }

    /// The right one.
    pub(super) fn right(&mut self, uid: u32) {
        self.0.remove(&uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_the_last_and_a_right_passphrase_ends_it() {
        let mut back_off = BackOff::default();
        let now = Duration::from_secs(5);
        let waits: Vec<_> = (0..40)
            .map(|_| {
                back_off.wrong(7, now);
                back_off.wait(7, now).as_millis()
            })
            .collect();
        assert_eq!(waits[..4], [100, 200, 400, 800]);
        assert!(waits[7..].iter().all(|wait| *wait == LAST.as_millis()), "{waits:?}");
        assert!(back_off.wait(8, now).is_zero());
        assert!(back_off.wait(7, now + LAST).is_zero());
        back_off.right(7);
        assert!(back_off.wait(7, now).is_zero());
    }
}
