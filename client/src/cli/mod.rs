//! `kmsctl`: which command does what with the library.
//!
//! It prints nothing itself; that is the part of `ui` and `results`. Passphrases and keys never come from arguments or the
//! environment.

mod arguments;
mod data;
mod files;
mod forms;
mod interrupt;
mod keys;
mod manual;
mod results;
mod rewrap;
mod secrets;
mod ui;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use nix::{
    poll::{PollTimeout, poll},
    sys::{
        prctl::set_dumpable,
        resource::{Resource, setrlimit},
    },
    unistd::User,
};

use self::{
    arguments::{Arguments, Command, Global},
    secrets::PassphraseSource,
    ui::{Failure, Ui},
};
use crate::{Client, Error, KeyName, KeyRef, Options, SecretVec, Status};

/// How often `wait` looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The whole program: arguments, work, message, exit status.
#[must_use]
pub fn main() -> ExitCode {
    // Plaintext, passphrases and message keys are in this memory: no core dump, no debugger of the same uid.
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let _ = set_dumpable(false);
    interrupt::watch();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return ui::usage(&error),
    };
    let ui = Ui::new(&arguments.global);
    match run(&arguments, &ui) {
        Ok(code) => code,
        Err(failure) => ui.failure(&failure),
    }
}

fn run(arguments: &Arguments, ui: &Ui) -> Result<ExitCode, Failure> {
    let global = &arguments.global;
    if global.dry_run && !arguments.command.changes_something() {
        return Err(Failure::NothingToPrevent);
    }
    match &arguments.command {
        Command::Add(add) => add.run(global, ui)?,
        Command::List => keys::list(global, ui)?,
        Command::Describe { name } => keys::describe(name, global, ui)?,
        Command::Rotate { name } => keys::rotate(name, global, ui)?,
        Command::Rename { name, new } => keys::rename(name, new, global, ui)?,
        Command::Remove(remove) => remove.run(global, ui)?,
        Command::Export(export) => export.run(global, ui)?,
        Command::Encrypt(encrypt) => encrypt.run(global, ui)?,
        Command::Decrypt(decrypt) => decrypt.run(global, ui)?,
        Command::Wrap(wrap) => wrap.run(global, ui)?,
        Command::Unwrap(unwrap) => unwrap.run(global, ui)?,
        Command::Datakey(data_key) => data_key.run(global, ui)?,
        Command::Rewrap(rewrap) => return rewrap.run(global, ui),
        Command::Verify(verify) => verify.run(global, ui)?,
        Command::Mac(mac) => mac.run(global, ui)?,
        Command::Random(random) => random.run(global, ui)?,
        Command::Lock(source) => lock(source, global, ui)?,
        Command::Unlock(source) => unlock(source, global, ui)?,
        Command::Ping => {
            let mut client = connect(global, ui)?;
            client.ping()?;
            ui.pong(client.socket(), client.server_uid())?;
        }
        Command::Wait { unlocked } => {
            let client = wait(*unlocked, global, ui)?;
            ui.pong(client.socket(), client.server_uid())?;
        }
        Command::Status => return status(global, ui),
        Command::Stats { openmetrics } => {
            let stats = connect(global, ui)?.stats()?;
            ui.stats(&stats, *openmetrics)?;
        }
        Command::Env(env) => {
            let client = connect(global, ui)?;
            ui.environment(env, client.socket())?;
        }
        Command::Completions { shell } => manual::completions(*shell)?,
        Command::Man(man) => man.run(ui)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn lock(source: &PassphraseSource, global: &Global, ui: &Ui) -> Result<(), Failure> {
    let mut client = connect(global, ui)?;
    // Not after somebody has thought of a passphrase.
    if client.is_locked()? {
        return Ok(ui.lock(true, false)?);
    }
    if global.dry_run {
        return Ok(ui.would_lock(true)?);
    }
    let changed = change_lock(global, client, &source.read(true)?, Client::lock)?;
    Ok(ui.lock(true, changed)?)
}

fn unlock(source: &PassphraseSource, global: &Global, ui: &Ui) -> Result<(), Failure> {
    let mut client = connect(global, ui)?;
    if global.dry_run {
        return match client.is_locked()? {
            true => Ok(ui.would_lock(false)?),
            false => Ok(ui.lock(false, false)?),
        };
    }
    ui.who_asks(client.socket(), client.server_uid());
    let changed = change_lock(global, client, &source.read(false)?, Client::unlock)?;
    Ok(ui.lock(false, changed)?)
}

/// Waits until the agent is there, and if that is wanted until it is unlocked.
fn wait(unlocked: bool, global: &Global, ui: &Ui) -> Result<Client, Failure> {
    let start = Instant::now();
    let is_over = || global.timeout.is_some_and(|limit| start.elapsed() >= limit);
    loop {
        match connect(global, ui) {
            Ok(mut client) => loop {
                if !unlocked {
                    return Ok(client);
                }
                match client.is_locked() {
                    Ok(false) => return Ok(client),
                    Ok(true) if is_over() => {
                        let (operation, status) = (crate::Opcode::Status, Status::Locked);
                        let retry_after = Duration::ZERO;
                        return Err(Error::Refused { operation, status, retry_after }.into());
                    }
                    Ok(true) => nap(),
                    // It has ended; another one may come, however long that takes.
                    Err(Error::Closed | Error::NoAgent | Error::Connect { .. }) => break,
                    Err(error) => return Err(error.into()),
                }
            },
            // What is there and not to be trusted will not become better.
            Err(Failure::Client(Error::NoAgent | Error::Connect { .. })) if !is_over() => nap(),
            Err(failure) => return Err(failure),
        }
    }
}

fn nap() {
    let _ = poll(&mut [], PollTimeout::try_from(LOOK_AGAIN).unwrap_or(PollTimeout::ZERO));
}

fn status(global: &Global, ui: &Ui) -> Result<ExitCode, Failure> {
    let mut client = match connect(global, ui) {
        Ok(client) => client,
        Err(failure) => {
            ui.no_status(&failure)?;
            return Err(failure);
        }
    };
    let status = client.status()?;
    Ok(ui.status(client.socket(), client.server_uid(), &status)?)
}

/// Locks or unlocks, and waits out the time that the agent asks for after wrong passphrases, as long as an answer may take.
fn change_lock(
    global: &Global,
    mut client: Client,
    passphrase: &SecretVec,
    change: fn(&mut Client, &SecretVec) -> Result<bool, Error>,
) -> Result<bool, Failure> {
    let limit = options(global)?.timeout;
    let start = Instant::now();
    loop {
        match change(&mut client, passphrase) {
            Err(Error::Refused { status: Status::Busy, retry_after, .. })
                if start.elapsed().saturating_add(retry_after) < limit =>
            {
                client.wait(retry_after.max(Duration::from_millis(1)))?;
            }
            changed => return Ok(changed?),
        }
    }
}

fn connect(global: &Global, ui: &Ui) -> Result<Client, Failure> {
    let client = Client::connect(&options(global)?)?;
    ui.connected(client.socket(), client.server_uid());
    Ok(client)
}

fn options(global: &Global) -> Result<Options, Failure> {
    let server_uid = global.server_uid.as_deref().map(user_id).transpose()?;
    if global.socket.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
        return Err(Failure::EmptyName);
    }
    let usual = Options::default();
    let timeout = global.timeout.unwrap_or(usual.timeout);
    Ok(Options { socket: global.socket.clone(), server_uid, timeout, retry: usual.retry.min(timeout) })
}

fn user_id(text: &str) -> Result<u32, Failure> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    match User::from_name(text) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) | Err(_) => Err(Failure::NoUser { name: text.to_owned() }),
    }
}

fn key_name(name: &str) -> Result<KeyRef<'_>, Failure> {
    let name = KeyName::parse(name).map_err(Failure::Name)?;
    Ok(KeyRef::Name(name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_named_or_numbered() {
        assert_eq!(user_id("1234").ok(), Some(1234));
        assert_eq!(user_id("root").ok(), Some(0));
        for bad in ["", "no such user", "-1", "4294967296"] {
            assert!(matches!(user_id(bad), Err(Failure::NoUser { .. })), "{bad}");
        }
    }
}
