//! Starts of the agent that are not the usual one of [`Agent`](crate::Agent): by hand, with an environment of nothing but what is
//! needed, in the foreground and to fail.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use nix::sys::signal::Signal;

use crate::{
    process::{run, send_signal, wait_for},
    programs::program,
};

/// A command with an environment of nothing but what it needs, all of it in `folder`.
///
/// # Panics
/// Without a `PATH`.
#[must_use]
pub fn clean(mut command: Command, folder: &Path) -> Command {
    command
        .env_clear()
        .env("PATH", env::var_os("PATH").unwrap())
        .env("HOME", folder)
        .env("TMPDIR", folder)
        .current_dir(folder)
        .stdin(Stdio::null());
    command
}

/// The agent with these arguments and nothing else.
#[must_use]
pub fn agent_command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = clean(Command::new(program("kms-agent")), folder);
    command.args(arguments);
    command
}

/// As [`output`](crate::process::output), with the stdin that the command has.
///
/// # Panics
/// When it cannot be run, or does not end.
pub fn output_of(command: &mut Command) -> (ExitStatus, String, String) {
    let ran = run(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    (ran.status, String::from_utf8_lossy(&ran.stdout).into_owned(), ran.stderr)
}

/// A start that must fail: its stderr, after a look at status and stdout.
///
/// # Panics
/// When it does not fail in this way.
pub fn fails(command: &mut Command, code: i32) -> String {
    let (status, stdout, stderr) = output_of(command);
    assert_eq!(status.code(), Some(code), "{stdout}{stderr}");
    assert_eq!(stdout, "", "nothing that a shell would evaluate");
    assert!(stderr.starts_with("kms-agent: error: "), "{stderr}");
    stderr
}

/// Whether there is nothing in it.
///
/// # Panics
/// When it cannot be read.
#[must_use]
pub fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}

/// The values of the two variables in what a POSIX shell would evaluate; the path must be one that needs no quotes.
#[must_use]
pub fn variables(words: &str) -> Option<(PathBuf, i32)> {
    let value = |name: &str| Some(words.split_once(name)?.1.split_once(';')?.0);
    Some((value("KMS_AUTH_SOCK=")?.into(), value("KMS_AGENT_PID=")?.parse().ok()?))
}

/// An agent that was started with `-D` and prints for a POSIX shell. Killed when dropped before its stop.
pub struct Foreground {
    child: Child,
    /// Where it says that it listens.
    pub socket: PathBuf,
    /// The process of the agent.
    pub pid: i32,
}

impl Foreground {
    /// Starts it and waits until it is ready or has given up.
    ///
    /// # Errors
    /// What it wrote to stderr before its exit with status 1.
    ///
    /// # Panics
    /// When it ends in any other way.
    pub fn start(command: &mut Command) -> Result<Self, String> {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut words = String::new();
        while stdout.read_line(&mut words).unwrap() > 0 {
            if let Some((socket, pid)) = variables(&words) {
                // What it prints later is read by nobody, and is nothing.
                return Ok(Self { child, socket, pid });
            }
        }
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!(wait_for(&mut child).code(), Some(1), "{stderr}");
        assert!(stderr.starts_with("kms-agent: error: "), "{stderr}");
        Err(stderr)
    }

    /// Ends it with SIGTERM; gives what it wrote to stderr.
    ///
    /// # Panics
    /// When it does not end with status 0.
    pub fn stop(mut self) -> String {
        send_signal(self.pid, Signal::SIGTERM);
        self.ends()
    }

    /// Waits for its end; gives what it wrote to stderr.
    ///
    /// # Panics
    /// When it does not end with status 0.
    pub fn ends(&mut self) -> String {
        let status = wait_for(&mut self.child);
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!(status.code(), Some(0), "{stderr}");
        stderr
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        // One that was waited for is not signalled.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
