//! How a key is restricted (`docs/protocol.md`, section 4.2, Constraint).
//!
//! Owns the one parser that every way of adding a key goes through, and its inverse. What a constraint does is the keyring's.

use std::{num::NonZeroU64, time::Duration};

use kms_protocol::{Constraint, Status, constraint};

/// The restrictions of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Constraints {
    /// Never written to disk.
    pub memory_only: bool,
    /// Gone after this time, in whole seconds.
    pub lifetime: Option<Duration>,
    /// A person is asked before each use.
    pub confirm: bool,
    /// So many uses and no more.
    pub max_uses: Option<NonZeroU64>,
    /// Its bytes can be had.
    pub exportable: bool,
}

impl Constraints {
    /// Reads what a request says; nothing of it is left out.
    ///
    /// # Errors
    /// [`Status::Unsupported`] for a kind that this release does not have, [`Status::Malformed`] for a kind that stands twice
    /// or a value that its kind does not have. The first one at fault counts.
    pub fn parse(told: &[Constraint]) -> Result<Self, Status> {
        //= docs/protocol.md#constraint
        //# A kind that the agent does not take (the reply to `hello` lists those that it takes) refuses the whole
        //# request with `unsupported`.
        if told.iter().any(|told| !constraint::ALL.contains(&told.kind)) {
            return Err(Status::Unsupported);
        }
        //= docs/protocol.md#constraint
        //# A kind that stands twice, or a value that its kind does not have, is `malformed`.
        let mut constraints = Self::default();
        for Constraint { kind, value } in told {
            let twice = match (*kind, *value) {
                (constraint::MEMORY_ONLY, 0) => std::mem::replace(&mut constraints.memory_only, true),
                (constraint::CONFIRM, 0) => std::mem::replace(&mut constraints.confirm, true),
                (constraint::EXPORTABLE, 0) => std::mem::replace(&mut constraints.exportable, true),
                (constraint::LIFETIME, 1..) => {
                    constraints.lifetime.replace(Duration::from_secs(*value)).is_some()
                }
                (constraint::MAX_USES, 1..) => {
                    std::mem::replace(&mut constraints.max_uses, NonZeroU64::new(*value)).is_some()
                }
                _ => true,
            };
            if twice {
                return Err(Status::Malformed);
            }
        }
        Ok(constraints)
    }

    /// The same as a list, in the order of the kinds.
    #[must_use]
    pub fn to_list(self) -> Vec<Constraint> {
        let flag = |set: bool| set.then_some(0);
        [
            (constraint::MEMORY_ONLY, flag(self.memory_only)),
            (constraint::LIFETIME, self.lifetime.map(|lifetime| lifetime.as_secs())),
            (constraint::CONFIRM, flag(self.confirm)),
            (constraint::MAX_USES, self.max_uses.map(NonZeroU64::get)),
            (constraint::EXPORTABLE, flag(self.exportable)),
        ]
        .into_iter()
        .filter_map(|(kind, value)| value.map(|value| Constraint { kind, value }))
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(list: &[(u32, u64)]) -> Vec<Constraint> {
        list.iter().map(|(kind, value)| Constraint { kind: *kind, value: *value }).collect()
    }

    #[test]
    fn what_is_read_comes_back_as_it_was_told() {
        for list in
            [&[][..], &[(1, 0)], &[(1, 0), (2, 1), (3, 0), (4, 1), (5, 0)], &[(2, u64::MAX), (4, u64::MAX)]]
        {
            assert_eq!(Constraints::parse(&told(list)).map(Constraints::to_list), Ok(told(list)));
        }
    }

    #[test]
    fn nothing_is_left_out_or_guessed() {
        for bad in [
            &[(1, 1)][..],
            &[(1, 0), (1, 0)],
            &[(2, 0)],
            &[(2, 5), (2, 5)],
            &[(3, 1)],
            &[(4, 0)],
            &[(4, 1), (4, 2)],
            &[(5, 7)],
        ] {
            assert_eq!(Constraints::parse(&told(bad)), Err(Status::Malformed), "{bad:?}");
        }
        for unknown in [&[(0, 0)][..], &[(6, 0)], &[(1, 0), (u32::MAX, 0)], &[(1, 0), (1, 0), (6, 0)]] {
            assert_eq!(Constraints::parse(&told(unknown)), Err(Status::Unsupported), "{unknown:?}");
        }
    }
}
