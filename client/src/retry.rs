//! How long a request goes on when its connection breaks or the agent is busy (`docs/protocol.md`, sections 4.2, Tokens, and 5.2).
//!
//! Owns the patience and the pauses, for the blocking and the async client alike. Never a clock: the time is passed in.

use std::{
    io::ErrorKind,
    time::{Duration, Instant},
};

use crate::error::Error;

/// The second pause between two attempts to connect; there is none before the first attempt. Each is twice the one before.
const PAUSE_FIRST: Duration = Duration::from_millis(10);

/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// The pauses between attempts to connect: none before the first, then each twice as long as the one before. Otherwise a request
/// that breaks every connection would be sent as fast as the agent can fail.
#[derive(Default)]
pub(crate) struct Pauses {
    losses: u32,
}

impl Pauses {
    /// The connection broke: how long to wait before it is made anew.
    pub(crate) fn next(&mut self) -> Duration {
        let pause = match self.losses {
            0 => Duration::ZERO,
            losses => PAUSE_FIRST.saturating_mul(1 << (losses - 1).min(16)).min(PAUSE_MAX),
        };
        self.losses = self.losses.saturating_add(1);
        pause
    }

    /// The agent has answered something.
    pub(crate) fn begin_anew(&mut self) {
        self.losses = 0;
    }
}

/// What one request has been through.
#[derive(Clone, Copy)]
pub(crate) struct Trouble {
    patience: Duration,
    since: Option<Instant>,
}

impl Trouble {
    /// A request that may go on for `patience` after its first failure.
    pub(crate) fn new(patience: Duration) -> Self {
        Self { patience, since: None }
    }

    /// The connection broke, and is made anew after `pause`. Nothing when patience will be at its end by then.
    pub(crate) fn lost(&mut self, now: Instant, pause: Duration) -> Option<Duration> {
        self.wait(now, pause)
    }

    //= docs/protocol.md#52-refusal
    //# A client that gets `busy` SHOULD wait that long, and no longer than its user allows, and send the same again, with the same
    //# token where there is one.
    /// The agent asked for time: what to wait. Nothing when it is longer than our patience.
    pub(crate) fn busy(&mut self, now: Instant, retry_after: Duration) -> Option<Duration> {
        self.wait(now, retry_after.max(Duration::from_millis(1)))
    }

    fn wait(&mut self, now: Instant, pause: Duration) -> Option<Duration> {
        let since = *self.since.get_or_insert(now);
        let end = now.saturating_duration_since(since).saturating_add(pause);
        (!self.patience.is_zero() && end <= self.patience).then_some(pause)
    }
}

/// Whether connecting anew may help. A server that is not trusted, or answers nonsense, is not asked a second time.
pub(crate) fn is_passing(error: &Error) -> bool {
    match error {
        Error::Closed | Error::Connection(_) | Error::ClosedBeforeHello { .. } => true,
        // No socket or nobody behind it, as while the agent is started anew; or too many before us.
        Error::Connect { source, .. } => matches!(
            source.kind(),
            ErrorKind::NotFound
                | ErrorKind::ConnectionRefused
                | ErrorKind::ConnectionReset
                | ErrorKind::WouldBlock
                | ErrorKind::Interrupted
        ),
        Error::NotAnAgent { source, .. } => matches!(**source, Error::Connection(_)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end_with_patience() {
        let start = Instant::now();
        let (mut trouble, mut pauses) = (Trouble::new(Duration::from_secs(2)), Pauses::default());
        let mut now = start;
        let mut lasted = Vec::new();
        while let Some(pause) = trouble.lost(now, pauses.next()) {
            now += pause;
            lasted.push(pause.as_millis());
        }
        assert_eq!(lasted, [0, 10, 20, 40, 80, 160, 320, 500, 500]);
        pauses.begin_anew();
        assert_eq!(pauses.next(), Duration::ZERO);
        assert_eq!(Trouble::new(Duration::ZERO).lost(start, Duration::ZERO), None);
    }

    #[test]
    fn a_busy_agent_is_waited_for_as_long_as_it_says_and_no_longer_than_allowed() {
        let now = Instant::now();
        let mut trouble = Trouble::new(Duration::from_secs(1));
        assert_eq!(trouble.busy(now, Duration::from_millis(600)), Some(Duration::from_millis(600)));
        assert_eq!(trouble.busy(now + Duration::from_millis(600), Duration::from_millis(600)), None);
        assert_eq!(Trouble::new(Duration::ZERO).busy(now, Duration::from_millis(1)), None);
    }
}
