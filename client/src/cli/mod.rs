//! `kmsctl`: its arguments, and what each command does with the library.
//!
//! Owns the definition of the command line, from which help comes. It prints nothing itself; that is the part of `ui`. Passphrases
//! and keys never come from arguments or the environment.

mod files;
mod interrupt;
mod secrets;
mod ui;

use std::{
    ffi::OsString,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Args, Parser, Subcommand};
use kms_envelope::{MESSAGE_MAX, message_len};
use nix::{
    sys::{
        prctl::set_dumpable,
        resource::{Resource, setrlimit},
    },
    unistd::User,
};

use self::{
    files::{Destination, open_input},
    secrets::PassphraseSource,
    ui::{Failure, Ui},
};
use crate::{
    Client, EncryptionContext, Error, Head, Input, KeyId, KeyName, KeyRef, NewKey, Options, Output,
    SecretVec, Status,
};

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
    let ui = Ui::new(arguments.global.json);
    match run(&arguments, &ui) {
        Ok(code) => code,
        Err(failure) => ui.failure(&failure),
    }
}

/// Talks to kms-agent, which keeps keys and uses them
#[derive(Parser)]
#[command(name = "kmsctl", version, propagate_version = true, disable_help_subcommand = true)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Global {
    /// The agent's socket; else KMS_AUTH_SOCK, the user's agent, the system's
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Trust an agent that runs as this user
    #[arg(long, global = true, value_name = "USER")]
    server_uid: Option<String>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Make a key in the agent
    Add(AddKey),
    /// List the keys
    List,
    /// Show a key and its versions
    Describe {
        /// The key
        name: String,
    },
    /// Take a key away
    Remove {
        /// The key
        name: String,
    },
    /// Encrypt a file or standard input
    Encrypt(Encrypt),
    /// Decrypt a file or standard input
    Decrypt(Decrypt),
    /// Take every key out of reach, under a passphrase
    Lock(PassphraseSource),
    /// End the lock
    Unlock(PassphraseSource),
    /// Ask whether the agent is there
    Ping,
    /// Show the state of the agent: exits with 0 unlocked, 3 locked, 2 none
    Status,
}

#[derive(Args)]
struct AddKey {
    /// The name of the new key
    name: String,
    /// Never write the key to disk
    #[arg(long)]
    memory: bool,
    /// Take the key's 32 bytes from FILE, or from standard input if it is `-`
    #[arg(long, value_name = "FILE")]
    import: Option<OsString>,
    /// The imported key is 64 hexadecimal digits
    #[arg(long, requires = "import")]
    hex: bool,
    /// A key of that name is as good as a new one
    #[arg(long)]
    if_missing: bool,
}

#[derive(Args)]
struct Encrypt {
    /// The key
    #[arg(short, long, visible_alias = "keyid", value_name = "NAME")]
    key: String,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Decrypt {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The key
    #[arg(short, long, visible_alias = "keyid", value_name = "NAME")]
    key: Option<String>,
    /// Take the key that the ciphertext names, and say which that is
    #[arg(long)]
    any_key: bool,
}

#[derive(Args)]
struct Common {
    /// What to read; else, or if it is `-`, standard input
    file: Option<OsString>,
    /// A pair of the encryption context
    #[arg(short = 'C', long = "context", value_name = "KEY=VALUE")]
    context: Vec<OsString>,
    /// Where to write; else, or if it is `-`, standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<OsString>,
    /// The data stays in this program
    #[arg(long, conflicts_with = "remote")]
    local: bool,
    /// The data goes through the agent
    #[arg(long)]
    remote: bool,
}

fn run(arguments: &Arguments, ui: &Ui) -> Result<ExitCode, Failure> {
    let global = &arguments.global;
    match &arguments.command {
        Command::Add(add) => add.run(global, ui)?,
        Command::List => {
            // All of it before any of it: half a listing looks like a whole one.
            let keys = connect(global)?.list().collect::<Result<Vec<_>, _>>()?;
            ui.keys(&keys)?;
        }
        Command::Describe { name } => {
            let key = key_name(name)?;
            let description = connect(global)?.describe(key).map_err(|error| Failure::of_key(name, error))?;
            ui.description(&description)?;
        }
        Command::Remove { name } => {
            let key = key_name(name)?;
            let removed = connect(global)?.remove(key).map_err(|error| Failure::of_key(name, error))?;
            ui.removed(name, removed)?;
        }
        Command::Encrypt(encrypt) => encrypt.run(global, ui)?,
        Command::Decrypt(decrypt) => decrypt.run(global, ui)?,
        Command::Lock(source) => {
            let mut client = connect(global)?;
            // Not after somebody has thought of a passphrase.
            if client.is_locked()? {
                ui.lock(true, false)?;
            } else {
                let changed = change_lock(global, client, &source.read(true)?, Client::lock)?;
                ui.lock(true, changed)?;
            }
        }
        Command::Unlock(source) => {
            let client = connect(global)?;
            ui.who_asks(client.socket(), client.server_uid());
            let changed = change_lock(global, client, &source.read(false)?, Client::unlock)?;
            ui.lock(false, changed)?;
        }
        Command::Ping => {
            let mut client = connect(global)?;
            client.ping()?;
            ui.pong(client.socket(), client.server_uid())?;
        }
        Command::Status => return status(global, ui),
    }
    Ok(ExitCode::SUCCESS)
}

fn status(global: &Global, ui: &Ui) -> Result<ExitCode, Failure> {
    let mut client = match connect(global) {
        Ok(client) => client,
        Err(failure) => {
            ui.no_status(&failure)?;
            return Err(failure);
        }
    };
    let status = client.status()?;
    Ok(ui.status(client.socket(), client.server_uid(), &status)?)
}

impl AddKey {
    fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let _ = key_name(&self.name)?;
        let import = self.import.as_deref().map(|name| secrets::import(name, self.hex)).transpose()?;
        let key = NewKey {
            name: &self.name,
            import: import.as_ref(),
            memory_only: self.memory,
            if_missing: self.if_missing,
            ..NewKey::new(&self.name)
        };
        let added = connect(global)?.add(&key).map_err(|error| Failure::of_key(&self.name, error))?;
        Ok(ui.added(&self.name, &added)?)
    }
}

impl Encrypt {
    fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let key = key_name(&self.key)?;
        let context = self.common.context()?;
        let destination = Destination::new(self.common.output.as_deref())?;
        let input = open_input(self.common.file.as_deref())?;
        let mut client = connect(global)?;
        let failed = |error| Failure::of_key(&self.key, error);
        if !self.common.remote {
            match client.stream_new(key, context.as_ref()) {
                Err(error) if self.common.may_go_remote(&error) => {}
                stream => {
                    let stream = stream.map_err(failed)?;
                    let progress = ui.progress(input.remaining(), &destination);
                    destination.fill(|output| stream.run(input, output, &progress))?;
                    return Ok(());
                }
            }
        }
        let stream = client.remote_stream_new(key, context.as_ref()).map_err(failed)?;
        let progress = ui.progress(input.remaining(), &destination);
        destination.fill(|output| stream.run(input, output, &progress))?;
        Ok(())
    }
}

impl Decrypt {
    fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let name = self.which.key.as_deref();
        if let Some(name) = name {
            let _ = key_name(name)?;
        }
        let context = self.common.context()?;
        let destination = Destination::new(self.common.output.as_deref())?;
        let mut input = open_input(self.common.file.as_deref())?;
        let head = input.head()?;
        let (Head::Message(header) | Head::Stream(header, _)) = &head;
        let version = header.key_version;
        let mut client = connect(global)?;
        let (key, subject) = match name {
            Some(name) => (KeyRef::Name(name), name.to_owned()),
            None => (KeyRef::Id(*header.key_id.as_bytes()), named_key(&mut client, ui, header.key_id)?),
        };
        let failed = |client: &mut Client, error: Error| {
            // The agent says the same of a key and of a version that it does not have.
            let is_version = error.status() == Some(Status::NotFound) && client.describe(key).is_ok();
            match is_version {
                true => Failure::NoVersion { name: subject.clone(), version },
                false => Failure::of_key(&subject, error),
            }
        };
        let stream = match head {
            Head::Stream(_, stream) => stream,
            Head::Message(header) => {
                let ciphertext = message(&header.to_bytes(), &mut input)?;
                let opened = client.decrypt(key, context.as_ref(), ciphertext.expose_secret());
                let plaintext = opened.map_err(|error| failed(&mut client, error))?;
                return destination.fill(|output: Output<'_>| output.put(plaintext.expose_secret()));
            }
        };
        if !self.common.remote {
            match client.stream_open(key, context.as_ref(), &stream) {
                Err(error) if self.common.may_go_remote(&error) => {}
                stream => {
                    let stream = stream.map_err(|error| failed(&mut client, error))?;
                    let progress = ui.progress(input.remaining(), &destination);
                    destination.fill(|output| stream.run(input, output, &progress))?;
                    return Ok(());
                }
            }
        }
        let stream = match client.remote_stream_open(key, context.as_ref(), &stream) {
            Ok(stream) => stream,
            Err(error) => return Err(failed(&mut client, error)),
        };
        let progress = ui.progress(input.remaining(), &destination);
        destination.fill(|output| stream.run(input, output, &progress))?;
        Ok(())
    }
}

impl Common {
    fn context(&self) -> Result<EncryptionContext, Failure> {
        let mut pairs = Vec::new();
        for pair in &self.context {
            let bytes = pair.as_bytes();
            let at = bytes.iter().position(|byte| *byte == b'=').ok_or(Failure::NotAPair)?;
            let (key, value) = bytes.split_at_checked(at).ok_or(Failure::NotAPair)?;
            pairs.push((key, value.strip_prefix(b"=").unwrap_or_default()));
        }
        EncryptionContext::from_pairs(pairs).map_err(Failure::Context)
    }

    /// Whoever may not have a message key may still use it in the agent, unless the user has said which way.
    fn may_go_remote(&self, error: &Error) -> bool {
        !self.local && error.status() == Some(Status::Denied)
    }
}

/// The whole of a message whose header was read.
fn message(header: &[u8], input: &mut Input<'_>) -> Result<SecretVec, Failure> {
    let max = message_len(MESSAGE_MAX);
    let body = input.rest("message", max.saturating_sub(header.len())).map_err(|error| match error {
        Error::TooLong { .. } => Failure::LongMessage { max },
        error => Failure::Client(error),
    })?;
    let mut whole = SecretVec::with_capacity(max);
    let parts = [header, body.expose_secret()];
    parts.iter().try_for_each(|part| whole.push_slice(part)).map_err(|_| Error::InvalidCiphertext)?;
    Ok(whole)
}

/// Says which key a ciphertext names, by the name that the agent knows it by.
fn named_key(client: &mut Client, ui: &Ui, id: KeyId) -> Result<String, Failure> {
    match client.describe(KeyRef::Id(*id.as_bytes())) {
        Ok(description) => {
            ui.key_used(Some(&description.key.name), id);
            Ok(description.key.name)
        }
        // To use a key and to see its name are two rights.
        Err(Error::Refused { status: Status::Denied | Status::NotFound, .. }) => {
            ui.key_used(None, id);
            Ok(id.to_string())
        }
        Err(error) => Err(error.into()),
    }
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

fn connect(global: &Global) -> Result<Client, Failure> {
    Ok(Client::connect(&options(global)?)?)
}

fn options(global: &Global) -> Result<Options, Failure> {
    let server_uid = global.server_uid.as_deref().map(user_id).transpose()?;
    if global.socket.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
        return Err(Failure::EmptyName);
    }
    Ok(Options { socket: global.socket.clone(), server_uid, ..Options::default() })
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
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_global_arguments_stand_anywhere() {
        Arguments::command().debug_assert();
        for line in [["kmsctl", "--json", "list"], ["kmsctl", "list", "--json"]] {
            assert!(Arguments::try_parse_from(line).unwrap().global.json);
        }
        for line in
            ["encrypt", "decrypt", "decrypt -k a --any-key", "encrypt -k a --local --remote", "add a --hex"]
        {
            assert!(
                Arguments::try_parse_from(["kmsctl"].into_iter().chain(line.split(' '))).is_err(),
                "{line}"
            );
        }
        for line in ["encrypt --keyid a", "encrypt --key a -", "decrypt --any-key -C a=b -C c=d"] {
            assert!(
                Arguments::try_parse_from(["kmsctl"].into_iter().chain(line.split(' '))).is_ok(),
                "{line}"
            );
        }
    }

    #[test]
    fn passphrases_are_not_taken_from_arguments() {
        for line in [
            "unlock --pass x",
            "unlock x",
            "lock --passphrase x",
            "unlock --passphrase-file a --passphrase-fd 3",
        ] {
            assert!(
                Arguments::try_parse_from(["kmsctl"].into_iter().chain(line.split(' '))).is_err(),
                "{line}"
            );
        }
    }

    #[test]
    fn users_are_named_or_numbered() {
        assert_eq!(user_id("1234").ok(), Some(1234));
        assert_eq!(user_id("root").ok(), Some(0));
        for bad in ["", "no such user", "-1", "4294967296"] {
            assert!(matches!(user_id(bad), Err(Failure::NoUser { .. })), "{bad}");
        }
    }
}
