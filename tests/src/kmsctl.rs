//! The shipped `kmsctl` under test: how it is called, and what every refusal of it must look like.

use std::{
    env,
    ffi::OsStr,
    path::Path,
    process::{Command, Stdio},
};

use crate::{process::Ran, programs};

/// The two ways of a stream: its data stays in `kmsctl`, or goes through the agent.
pub const WAYS: [&str; 2] = ["--local", "--remote"];

/// `kmsctl` with these arguments and the agent of this socket. Nothing is its stdin, and what it says is kept.
#[must_use]
pub fn kmsctl<W: AsRef<OsStr>>(socket: &Path, words: impl IntoIterator<Item = W>) -> Command {
    let mut command = Command::new(programs::program("kmsctl"));
    prepare(&mut command, socket, words);
    command
}

/// Makes a command that runs `kmsctl` one as [`kmsctl`] gives.
pub fn prepare<W: AsRef<OsStr>>(command: &mut Command, socket: &Path, words: impl IntoIterator<Item = W>) {
    command
        .arg("--socket")
        .arg(socket)
        .args(words)
        .env_clear()
        .env("PATH", env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
}

impl Ran {
    /// What a `kmsctl` that did as it was told wrote to stdout.
    ///
    /// # Panics
    /// When it did not, or says more.
    #[must_use]
    pub fn done(self) -> Vec<u8> {
        assert_eq!(self.status.code(), Some(0), "{}", self.stderr);
        assert_eq!(self.stderr, "");
        self.stdout
    }

    /// The message of a `kmsctl` that refused or failed with this exit status: an error, and hints or nothing.
    ///
    /// # Panics
    /// When it ended otherwise, or says anything else.
    pub fn message(&self, code: i32) -> &str {
        assert_eq!(self.status.code(), Some(code), "{}", self.stderr);
        let mut lines = self.stderr.lines();
        let message = lines.next().and_then(|line| line.strip_prefix("kmsctl: error: "));
        assert!(lines.all(|line| line.starts_with("kmsctl: hint: ")), "{}", self.stderr);
        message.unwrap_or_else(|| panic!("no message of kmsctl: {}", self.stderr))
    }

    /// As [`Ran::message`], of one that printed nothing.
    ///
    /// # Panics
    /// As there, and when it printed anything.
    pub fn refusal(&self, code: i32) -> &str {
        assert_eq!(self.stdout.len(), 0, "something was printed: {}", self.stderr);
        self.message(code)
    }
}
