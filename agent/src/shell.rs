//! The words that a shell evaluates: in sh, csh and fish.
//!
//! Owns the quoting. A path of a socket has no control character (`socket.rs`), so no shell needs to be told of line ends.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

/// A family of shells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shell {
    Sh,
    Csh,
    Fish,
}

impl Shell {
    /// The family of `$SHELL`: by the end of its name, as ssh-agent does.
    pub(crate) fn of_user() -> Self {
        match std::env::var_os("SHELL") {
            Some(shell) if shell.as_bytes().ends_with(b"csh") => Self::Csh,
            Some(shell) if shell.as_bytes().ends_with(b"fish") => Self::Fish,
            _ => Self::Sh,
        }
    }

    /// Sets the two variables that lead to the agent.
    pub(crate) fn set(self, socket: &Path, pid: u32) -> Vec<u8> {
        let mut words = self.set_one("KMS_AUTH_SOCK", socket.as_os_str());
        words.extend(self.set_one("KMS_AGENT_PID", pid.to_string().as_ref()));
        words
    }

    /// Unsets them.
    pub(crate) fn unset(self) -> Vec<u8> {
        let unset = match self {
            Self::Sh => "unset",
            Self::Csh => "unsetenv",
            Self::Fish => "set -e",
        };
        format!("{unset} KMS_AUTH_SOCK; {unset} KMS_AGENT_PID;\n").into_bytes()
    }

    fn set_one(self, name: &str, value: &OsStr) -> Vec<u8> {
        let (before, after) = match self {
            Self::Sh => (format!("{name}="), format!("; export {name};\n")),
            Self::Csh => (format!("setenv {name} "), ";\n".to_owned()),
            Self::Fish => (format!("set -gx {name} "), ";\n".to_owned()),
        };
        [before.as_bytes(), &self.quote(value.as_bytes()), after.as_bytes()].concat()
    }

    fn quote(self, value: &[u8]) -> Vec<u8> {
        if value.iter().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(byte)) {
            return value.to_owned();
        }
        let mut quoted = vec![b'\''];
        for byte in value {
            match (self, byte) {
                (Self::Sh | Self::Csh, b'\'') => quoted.extend(br"'\''"),
                // The history is looked up within quotes, too.
                (Self::Csh, b'!') => quoted.extend(br"\!"),
                (Self::Fish, b'\'' | b'\\') => quoted.extend([b'\\', *byte]),
                _ => quoted.push(*byte),
            }
        }
        quoted.push(b'\'');
        quoted
    }
}
