//! Everything that `kmsctl` prints: results on standard output, `kmsctl: error: …` and `kmsctl: hint: …` on standard error.
//!
//! Owns the table of statuses with message, hint and exit status (`docs/protocol.md`, section 3). Results can be JSON, errors are
//! always text. Names, paths and whatever else others chose are printed so that they cannot steer a terminal. No secret
//! comes here.

use std::{
    error::Error as StdError,
    fmt::Write as _,
    io::{self, IsTerminal, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use clap::error::{ContextKind, ErrorKind};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::Timestamp;
use kms_envelope::{ContextError, HeaderError, KeyVersion};
use kms_protocol::{NameError, PASSPHRASE_MAX};
use serde::Serialize;
use thiserror::Error;

use super::files::Destination;
use crate::{
    Added, Description, Error, KeyId, KeyRow, KeyState, LockState, Opcode, Progress, Removed, Status,
    StatusReply,
};

/// Exit status for bad usage.
const USAGE: u8 = 64;

/// A shorter stream is done before a progress bar could be read, in bytes.
const PROGRESS_FROM: u64 = 64 << 20;

/// How to get an agent.
const START_HINT: &str =
    "start an agent with `eval \"$(kms-agent)\"`, or name its socket with KMS_AUTH_SOCK or --socket";

/// How to choose another agent, when the one that was found is not trusted.
const TRUST_HINT: &str = "if that user is to serve you, say so with --server-uid; else start an agent of your own with \
                          `eval \"$(kms-agent)\"`, or name another socket with KMS_AUTH_SOCK or --socket";

/// Why a command was not carried out.
#[derive(Debug, Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Client(#[from] Error),
    /// As [`Failure::Client`], about a key.
    #[error("{error}")]
    Key { name: String, error: Error },
    #[error("the key {name} has no version {version}, which the ciphertext names")]
    NoVersion { name: String, version: KeyVersion },
    #[error("the ciphertext is longer than the {max} bytes of the longest message")]
    LongMessage { max: usize },
    #[error(transparent)]
    Name(NameError),
    #[error(transparent)]
    Context(ContextError),
    #[error("a pair of the encryption context has the form KEY=VALUE")]
    NotAPair,
    #[error("there is no user {name}")]
    NoUser { name: String },
    #[error("a file name has at least one character")]
    EmptyName,
    #[error("binary data does not go to a terminal unasked")]
    Terminal,
    #[error("cannot open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot write {}", path.display())]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot print")]
    Print(#[from] io::Error),
    #[error("cannot read the passphrase")]
    ReadPassphrase(#[source] io::Error),
    #[error("cannot ask for the passphrase")]
    NoTerminal(#[source] io::Error),
    #[error("the passphrase is empty")]
    EmptyPassphrase,
    #[error("the passphrase is longer than {PASSPHRASE_MAX} bytes")]
    LongPassphrase,
    #[error("the passphrases differ")]
    PassphrasesDiffer,
    #[error("interrupted")]
    Interrupted,
    #[error("a key is exactly 32 bytes, and there are {}", Count(*got, *most))]
    KeyLength { got: usize, most: usize },
    #[error("a key is exactly 64 hexadecimal digits, and there are {} characters", Count(*got, *most))]
    KeyDigits { got: usize, most: usize },
    #[error("the key has a character that is not a hexadecimal digit")]
    NotADigit,
}

impl Failure {
    pub(super) fn of_key(name: &str, error: Error) -> Self {
        Self::Key { name: name.to_owned(), error }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Client(error) | Self::Key { error, .. } => error.exit_code(),
            Self::Name(_)
            | Self::Context(_)
            | Self::NotAPair
            | Self::NoUser { .. }
            | Self::EmptyName
            | Self::Terminal => USAGE,
            Self::NoVersion { .. }
            | Self::LongMessage { .. }
            | Self::Open { .. }
            | Self::Create { .. }
            | Self::Print(_)
            | Self::ReadPassphrase(_)
            | Self::NoTerminal(_)
            | Self::EmptyPassphrase
            | Self::LongPassphrase
            | Self::PassphrasesDiffer
            | Self::Interrupted
            | Self::KeyLength { .. }
            | Self::KeyDigits { .. }
            | Self::NotADigit => 1,
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Client(error) => client_message(error),
            Self::Key { name, error } => match error {
                Error::Refused { status: Status::NotFound, .. } => format!("there is no key {name}"),
                Error::Refused { status: Status::Exists, .. } => format!("there is a key {name} already"),
                error => client_message(error),
            },
            failure => with_sources(failure),
        }
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Client(error) | Self::Key { error, .. } => client_hint(error),
            Self::NoVersion { .. } => Some("`kmsctl describe NAME` shows the versions that there are"),
            Self::LongMessage { .. } => {
                Some("something else stands behind the message; take another copy of the file")
            }
            Self::Name(_) => Some("a name looks like backup, db/2025 or alice.mail"),
            Self::Context(_) | Self::NotAPair => {
                Some("give each pair once, as -C table=people; at most 64 pairs and 8,192 bytes")
            }
            Self::NoUser { .. } => Some("give the number of the uid, or a name that `getent passwd` knows"),
            Self::EmptyName => Some("is a variable in the command line unset?"),
            Self::Terminal => {
                Some("write to a file with -o FILE, to a pipe, or to the terminal all the same with -o -")
            }
            Self::NoTerminal(_) => Some("give the passphrase with --passphrase-file or --passphrase-fd"),
            Self::EmptyPassphrase | Self::LongPassphrase => Some("a passphrase has 1 to 1,024 bytes"),
            Self::PassphrasesDiffer => Some("nothing was locked; try again"),
            Self::KeyLength { .. } => {
                Some("for hexadecimal digits add --hex; a new key is written by `head -c 32 /dev/urandom`")
            }
            Self::KeyDigits { .. } | Self::NotADigit => {
                Some("without --hex the file holds the 32 bytes themselves")
            }
            Self::Open { source, .. } | Self::ReadPassphrase(source) => Some(reading_hint(source)),
            Self::Create { source, .. } => Some(writing_hint(source)),
            Self::Print(source) => Some(writing_hint(source)),
            Self::Interrupted => None,
        }
    }
}

/// A count that stops at a maximum.
struct Count(usize, usize);

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self(got, most) if got > most => write!(f, "more than {most}"),
            Self(got, _) => write!(f, "{got}"),
        }
    }
}

/// What a refusal means, and what to do next.
struct Advice {
    message: &'static str,
    hint: &'static str,
}

/// The table of statuses; nothing for one that this program does not know, and for `ok`, which is no refusal.
fn advice(operation: Option<Opcode>, status: Status) -> Option<Advice> {
    let (message, hint) = match (operation, status) {
        (Some(Opcode::Unlock), Status::Denied) => (
            "wrong passphrase",
            "give the passphrase that the agent was locked with; each wrong one costs time",
        ),
        (Some(Opcode::Add), Status::StoreUnavailable) => {
            ("this agent keeps no keystore", "add --memory for a key that lives in memory only")
        }
        (_, Status::Ok) => return None,
        (_, Status::Malformed) => (
            "the request or the ciphertext does not have the form that it must have",
            "check that the file is whole, and that kmsctl and kms-agent are of the same release (--version)",
        ),
        (_, Status::Unsupported) => (
            "the agent does not have what was asked for",
            "check that kmsctl and kms-agent are of the same release (--version)",
        ),
        (_, Status::TooLarge) => {
            ("beyond a size limit of the agent", "the limits stand in the agent's config.toml, under limits")
        }
        (_, Status::Denied) => ("not permitted", "ask whoever runs the agent for the right to do this"),
        (_, Status::Locked) => ("the agent is locked", "end the lock with `kmsctl unlock`"),
        (
            Some(Opcode::RemoteStreamEncrypt | Opcode::RemoteStreamDecrypt | Opcode::RemoteStreamClose),
            Status::NotFound,
        ) => (
            "the agent has ended the stream",
            "a lock or the removal of the key ends it; see `kmsctl status`, then start anew",
        ),
        (_, Status::NotFound) => ("there is no such key", "`kmsctl list` shows the keys that there are"),
        (_, Status::Exists) => (
            "the name is taken",
            "choose another name, or add --if-missing to be content with the key that is there",
        ),
        (_, Status::WrongKey) => (
            "the ciphertext was made under another key",
            "name that key with -k, or take what the ciphertext names with --any-key",
        ),
        (_, Status::Disabled) => (
            "the version of the key that the ciphertext names cannot be used",
            "`kmsctl describe NAME` shows the versions and their states",
        ),
        (_, Status::InvalidCiphertext) => (INVALID_MESSAGE, INVALID_HINT),
        (_, Status::Limit) => {
            ("a limit of the agent is reached", "the limits stand in the agent's config.toml, under limits")
        }
        (_, Status::Declined) => {
            ("this use needs a person's yes, and there was none", "ask again when that person expects it")
        }
        (_, Status::Busy) => ("the agent is busy", "try again in a moment"),
        (_, Status::AuditUnavailable) => {
            ("the agent cannot write its audit log", "make room on that disk, then try again")
        }
        (_, Status::StoreUnavailable) => {
            ("the agent cannot read or write its keystore", "look at the agent's log, then try again")
        }
        (_, Status::Internal) => ("a fault of the agent or of its machine", "look at the agent's log"),
        // Never met: a test walks every status.
        (_, _) => return None,
    };
    Some(Advice { message, hint })
}

const INVALID_MESSAGE: &str = "wrong encryption context, or truncated or changed ciphertext";
const INVALID_HINT: &str =
    "give the same -C pairs as for encrypt; if they are right, take another copy of the file";

fn client_message(error: &Error) -> String {
    match error {
        Error::Refused { operation, status, retry_after } => {
            let message =
                advice(Some(*operation), *status).map_or_else(|| status.name(), |advice| advice.message);
            match retry_after.as_millis() {
                0 => message.to_owned(),
                millis => format!("{message}, and asks to wait {} s", millis.div_ceil(1000)),
            }
        }
        Error::Released { source } => format!(
            "{}; the output that was already written is incomplete and must not be trusted",
            client_message(source)
        ),
        error => with_sources(error),
    }
}

fn client_hint(error: &Error) -> Option<&'static str> {
    match error {
        Error::Refused { operation, status, .. } => {
            advice(Some(*operation), *status).map(|advice| advice.hint)
        }
        Error::Released { source } => client_hint(source),
        Error::NoAgent | Error::Connect { .. } | Error::NotASocket { .. } | Error::NotAnAgent { .. } => {
            Some(START_HINT)
        }
        Error::ClosedBeforeHello { .. } => Some(
            "that agent serves its own user only, not you; start an agent of your own with `eval \"$(kms-agent)\"`, or name \
             its socket with KMS_AUTH_SOCK or --socket",
        ),
        Error::WritableDirectory { .. } => Some(
            "--server-uid does not help there: take the right to write from the others with `chmod o-w`, or name another socket \
             with KMS_AUTH_SOCK or --socket",
        ),
        Error::UntrustedPlace { .. } | Error::UntrustedServer { .. } | Error::UnidentifiedServer { .. } => {
            Some(TRUST_HINT)
        }
        Error::InvalidCiphertext => Some(INVALID_HINT),
        Error::NotACiphertext(
            HeaderError::Format(_) | HeaderError::Suite(_) | HeaderError::Purpose(_) | HeaderError::Flags(_),
        ) => Some("a later release may have written it; `kmsctl --version` tells which one this is"),
        Error::NotACiphertext(_) | Error::NotData => Some("decrypt takes what `kmsctl encrypt` has written"),
        Error::Timeout { .. } | Error::Closed | Error::Broken | Error::Reply(_) | Error::Connection(_) => {
            Some("`kmsctl ping` tells whether the agent is there; its log may say more")
        }
        Error::Input(source) => Some(reading_hint(source)),
        Error::Output(source) => Some(writing_hint(source)),
        Error::InputChanged => Some("try again when nothing else writes to the file"),
        _ => None,
    }
}

fn reading_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "is the name right? `-` is standard input",
        io::ErrorKind::PermissionDenied => "ask the owner of the file for the right to read it",
        io::ErrorKind::IsADirectory => "name a file; of a directory, `tar` makes one",
        _ => "name a file that can be read, or an open descriptor",
    }
}

fn writing_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "make room there, then try again",
        io::ErrorKind::BrokenPipe => "whatever was to read it has ended before",
        _ => "name a file in a directory that is there and that you may write to",
    }
}

/// The message of an error and of what it came from.
fn with_sources(error: &dyn StdError) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(message, ": {error}");
        source = error.source();
    }
    message
}

/// Prints what is wrong with a command line, or the help that it asks for.
pub(super) fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // The version is that of the program, whichever command it was asked of.
            let text = match error.kind() {
                ErrorKind::DisplayVersion => concat!("kmsctl ", env!("CARGO_PKG_VERSION"), "\n").to_owned(),
                _ => error.render().to_string(),
            };
            return match print(&text) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            complain("no command is given", Some("`kmsctl --help` lists the commands"));
        }
        _ => {
            let text = error.render().to_string();
            let paragraph = text.split("\n\n").next().unwrap_or_default();
            let paragraph = paragraph.strip_prefix("error: ").unwrap_or(paragraph);
            let words: Vec<_> = paragraph.split_whitespace().collect();
            let near =
                [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::SuggestedValue]
                    .into_iter()
                    .find_map(|kind| error.get(kind));
            let hint = match near {
                Some(near) => format!("did you mean {near}? --help says what there is"),
                None => "--help says what there is".to_owned(),
            };
            complain(&words.join(" "), Some(&hint));
        }
    }
    ExitCode::from(USAGE)
}

/// The one place where errors and hints are printed.
fn complain(message: &str, hint: Option<&str>) {
    let mut text = format!("kmsctl: error: {}\n", harmless(message));
    if let Some(hint) = hint {
        let _ = writeln!(text, "kmsctl: hint: {}", harmless(hint));
    }
    // Where not even this can be printed, the exit status has to do.
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

fn note(message: &str) {
    let _ = writeln!(io::stderr().lock(), "kmsctl: note: {}", harmless(message));
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// The text with every character escaped that a terminal would obey: controls, and those that change the direction of text.
fn harmless(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => {
                clean.extend(char.escape_unicode());
            }
            char if char.is_control() => clean.extend(char.escape_default()),
            char => clean.push(char),
        }
    }
    clean
}

/// Prints results, in one of two forms.
pub(super) struct Ui {
    json: bool,
}

impl Ui {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Prints a failure; returns the exit status that belongs to it.
    pub(super) fn failure(&self, failure: &Failure) -> ExitCode {
        complain(&failure.message(), failure.hint());
        ExitCode::from(failure.exit_code())
    }

    pub(super) fn added(&self, name: &str, added: &Added) -> io::Result<()> {
        let result = AddedKey {
            name,
            id: hex(&added.id),
            version: added.version,
            check_value: hex(&added.check_value),
            created: added.created,
        };
        if self.json {
            return print_json(&result);
        }
        if !added.created {
            note("the key was there already");
        }
        print(&pairs(&[
            ("name", name.to_owned()),
            ("id", result.id),
            ("version", result.version.to_string()),
            ("check value", result.check_value),
        ]))
    }

    pub(super) fn keys(&self, keys: &[KeyRow]) -> io::Result<()> {
        if self.json {
            return print_json(&keys.iter().map(Key::new).collect::<Vec<_>>());
        }
        if keys.is_empty() {
            note("the agent holds no key; `kmsctl add NAME` makes one");
            return Ok(());
        }
        let mut rows = vec![
            ["NAME", "ID", "STATE", "VERSION", "CHECK VALUE", "USES", "STORED", "CREATED"]
                .map(String::from)
                .to_vec(),
        ];
        rows.extend(keys.iter().map(|key| {
            let row = Key::new(key);
            vec![
                key.name.clone(),
                row.id,
                row.state.to_owned(),
                format!("{} of {}", key.primary, key.versions),
                row.check_value,
                key.uses.to_string(),
                if key.memory_only { "no".to_owned() } else { "yes".to_owned() },
                row.created,
            ]
        }));
        print(&table(&rows))
    }

    pub(super) fn description(&self, description: &Description) -> io::Result<()> {
        let key = Key::new(&description.key);
        let versions: Vec<_> = description.versions.iter().map(Version::new).collect();
        if self.json {
            return print_json(&Described { key, versions });
        }
        let mut text = pairs(&[
            ("name", key.name.to_owned()),
            ("id", key.id),
            ("state", key.state.to_owned()),
            ("primary", key.primary.to_string()),
            ("minimum", key.minimum.to_string()),
            ("stored", if key.memory_only { "no, memory only".to_owned() } else { "yes".to_owned() }),
            ("created", key.created),
            ("expires", key.expires_in.map_or_else(|| "never".to_owned(), |time| format!("in {time} s"))),
            ("uses", key.uses.to_string()),
        ]);
        let mut rows =
            vec![["VERSION", "STATE", "CHECK VALUE", "USES", "CREATED"].map(String::from).to_vec()];
        rows.extend(versions.into_iter().map(|row| {
            vec![
                row.version.to_string(),
                row.state.to_owned(),
                row.check_value,
                row.uses.to_string(),
                row.created,
            ]
        }));
        text.push('\n');
        text.push_str(&table(&rows));
        print(&text)
    }

    pub(super) fn removed(&self, name: &str, removed: Removed) -> io::Result<()> {
        let id = hex(&removed.id);
        match self.json {
            true => print_json(&RemovedKey { name, id }),
            false => print(&pairs(&[("removed", name.to_owned()), ("id", id)])),
        }
    }

    pub(super) fn lock(&self, locked: bool, changed: bool) -> io::Result<()> {
        let state = state_name(if locked { LockState::Locked } else { LockState::Unlocked });
        match self.json {
            true => print_json(&Lock { state, changed }),
            false if changed => print(&format!("{state}\n")),
            false => print(&format!("{state} already\n")),
        }
    }

    /// Before a passphrase is typed: to whom it will go.
    pub(super) fn who_asks(&self, socket: &Path, uid: u32) {
        note(&format!("the agent is {}, uid {uid}", socket.display()));
    }

    /// Which key a ciphertext names.
    pub(super) fn key_used(&self, name: Option<&str>, id: KeyId) {
        match name {
            Some(name) => note(&format!("the key is {name}, id {id}")),
            None => note(&format!("the key has the id {id}")),
        }
    }

    pub(super) fn pong(&self, socket: &Path, uid: u32) -> io::Result<()> {
        let socket = socket.display().to_string();
        match self.json {
            true => print_json(&Server { socket, uid }),
            false => print(&format!("the agent at {}, uid {uid}, is there\n", harmless(&socket))),
        }
    }

    /// The state, and the exit status that says the same.
    pub(super) fn status(&self, socket: &Path, uid: u32, status: &StatusReply) -> io::Result<ExitCode> {
        let state = state_name(status.state);
        let socket = socket.display().to_string();
        if self.json {
            let facts = status.facts.iter().map(|fact| (fact.name.as_str(), fact.value.as_str())).collect();
            print_json(&State { state, socket: Some(socket), uid: Some(uid), facts: Some(facts) })?;
        } else {
            let mut lines =
                vec![("state", state.to_owned()), ("socket", socket), ("server uid", uid.to_string())];
            lines.extend(status.facts.iter().map(|fact| (fact.name.as_str(), fact.value.clone())));
            print(&pairs(&lines))?;
        }
        Ok(match status.state {
            LockState::Unlocked => ExitCode::SUCCESS,
            LockState::Locked => ExitCode::from(Status::Locked.exit_code()),
        })
    }

    /// That there is no agent is a state as well.
    pub(super) fn no_status(&self, failure: &Failure) -> io::Result<()> {
        match self.json && failure.exit_code() == 2 {
            true => print_json(&State { state: "none", socket: None, uid: None, facts: None }),
            false => Ok(()),
        }
    }

    /// A progress bar, if anybody sees one.
    pub(super) fn progress(&self, total: Option<u64>, destination: &Destination) -> Bar {
        let seen = io::stderr().is_terminal() && !destination.is_terminal();
        Bar { total, seen, done: AtomicU64::new(0), bar: OnceLock::new() }
    }
}

/// A progress bar that shows up once there is enough to show.
pub(super) struct Bar {
    total: Option<u64>,
    seen: bool,
    done: AtomicU64,
    bar: OnceLock<ProgressBar>,
}

impl Progress for Bar {
    fn advance(&self, bytes: u64) {
        if !self.seen || self.total.is_some_and(|total| total < PROGRESS_FROM) {
            return;
        }
        let done = self.done.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        // Of an input whose length is unknown only the past tells whether it is long.
        if self.total.is_some() || done >= PROGRESS_FROM {
            self.bar.get_or_init(|| bar(self.total)).set_position(done);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }
}

fn bar(total: Option<u64>) -> ProgressBar {
    let template = match total {
        Some(_) => "{wide_bar} {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta}",
        None => "{spinner} {bytes}, {binary_bytes_per_sec}",
    };
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[derive(Serialize)]
struct AddedKey<'a> {
    name: &'a str,
    id: String,
    version: u32,
    check_value: String,
    created: bool,
}

#[derive(Serialize)]
struct Key<'a> {
    name: &'a str,
    id: String,
    state: &'static str,
    memory_only: bool,
    primary: u32,
    minimum: u32,
    versions: u32,
    check_value: String,
    created: String,
    expires_in: Option<u64>,
    uses: u64,
}

impl<'a> Key<'a> {
    fn new(row: &'a KeyRow) -> Self {
        Self {
            name: &row.name,
            id: hex(&row.id),
            state: key_state(row.state),
            memory_only: row.memory_only,
            primary: row.primary,
            minimum: row.minimum,
            versions: row.versions,
            check_value: hex(&row.check_value),
            created: time(row.created),
            expires_in: row.expires_in,
            uses: row.uses,
        }
    }
}

#[derive(Serialize)]
struct Described<'a> {
    key: Key<'a>,
    versions: Vec<Version>,
}

#[derive(Serialize)]
struct Version {
    version: u32,
    state: &'static str,
    check_value: String,
    created: String,
    uses: u64,
}

impl Version {
    fn new(row: &crate::VersionRow) -> Self {
        Self {
            version: row.version,
            state: key_state(row.state),
            check_value: hex(&row.check_value),
            created: time(row.created),
            uses: row.uses,
        }
    }
}

#[derive(Serialize)]
struct RemovedKey<'a> {
    name: &'a str,
    id: String,
}

#[derive(Serialize)]
struct Lock {
    state: &'static str,
    changed: bool,
}

#[derive(Serialize)]
struct Server {
    socket: String,
    uid: u32,
}

#[derive(Serialize)]
struct State<'a> {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    facts: Option<std::collections::BTreeMap<&'a str, &'a str>>,
}

fn print_json(value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_string(value).map_err(io::Error::other)?;
    print(&format!("{text}\n"))
}

fn state_name(state: LockState) -> &'static str {
    match state {
        LockState::Unlocked => "unlocked",
        LockState::Locked => "locked",
    }
}

fn key_state(state: KeyState) -> &'static str {
    match state {
        KeyState::Enabled => "enabled",
        KeyState::Staged => "staged",
        KeyState::Disabled => "disabled",
        KeyState::Removed => "removed",
        KeyState::Destroyed => "destroyed",
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len().saturating_mul(2)), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn time(seconds: u64) -> String {
    match i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok()) {
        Some(time) => time.to_string(),
        None => format!("{seconds} s after 1970"),
    }
}

/// Name and value, one pair a line.
fn pairs(pairs: &[(&str, String)]) -> String {
    let rows: Vec<_> = pairs.iter().map(|(name, value)| vec![(*name).to_owned(), value.clone()]).collect();
    table(&rows)
}

/// Columns as wide as their widest cell; the last one is not padded.
fn table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| harmless(cell)).collect()).collect();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let _ = write!(line, "{cell:<width$}  ", width = width(column));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn refused(operation: Opcode, status: Status) -> Failure {
        Failure::Client(Error::Refused { operation, status, retry_after: Duration::ZERO })
    }

    #[test]
    fn every_refusal_has_a_message_a_hint_and_an_exit_code() {
        let mut messages = Vec::new();
        for status in Status::ALL.iter().filter(|status| **status != Status::Ok) {
            let failure = refused(Opcode::Encrypt, *status);
            assert_ne!(failure.message(), status.name(), "no message for {status:?}");
            assert!(failure.hint().is_some(), "no hint for {status:?}");
            assert!([1, 3, 75].contains(&failure.exit_code()));
            messages.push(failure.message());
        }
        messages.sort();
        let all = messages.len();
        messages.dedup();
        assert_eq!(messages.len(), all, "two statuses have the same message");
        assert!(advice(None, Status::Ok).is_none());
    }

    #[test]
    fn what_a_refusal_means_can_depend_on_the_operation() {
        assert_eq!(refused(Opcode::Unlock, Status::Denied).message(), "wrong passphrase");
        let store = refused(Opcode::Add, Status::StoreUnavailable);
        assert_eq!(store.message(), "this agent keeps no keystore");
        assert!(store.hint().unwrap().contains("--memory"));
        assert_eq!(store.exit_code(), 75);
        let error =
            Error::Refused { operation: Opcode::Add, status: Status::Exists, retry_after: Duration::ZERO };
        assert_eq!(Failure::of_key("backup", error).message(), "there is a key backup already");
        let busy = Error::Refused {
            operation: Opcode::Unlock,
            status: Status::Busy,
            retry_after: Duration::from_millis(1500),
        };
        assert_eq!(Failure::Client(busy).message(), "the agent is busy, and asks to wait 2 s");
        assert_eq!(refused(Opcode::List, Status::Locked).exit_code(), 3);
        let stream = refused(Opcode::RemoteStreamDecrypt, Status::NotFound);
        assert_eq!(stream.message(), "the agent has ended the stream");
        assert_eq!(refused(Opcode::RemoteStreamOpen, Status::NotFound).message(), "there is no such key");
    }

    #[test]
    fn what_cannot_be_reached_says_how_to_reach_it() {
        let hint = Failure::Client(Error::NoAgent).hint().unwrap();
        assert!(hint.contains("KMS_AUTH_SOCK") && hint.contains("eval \"$(kms-agent)\""));
        let socket = PathBuf::from("/s");
        for error in [
            Error::ClosedBeforeHello { socket: socket.clone() },
            Error::UntrustedServer { socket: socket.clone(), uid: 7 },
            Error::NotAnAgent { socket, source: Box::new(Error::Closed) },
        ] {
            let failure = Failure::Client(error);
            assert_eq!(failure.exit_code(), 2);
            assert!(failure.hint().unwrap().contains("KMS_AUTH_SOCK"));
        }
    }

    #[test]
    fn what_was_released_is_said_not_to_be_trusted() {
        let failure = Failure::Client(Error::Released { source: Box::new(Error::InvalidCiphertext) });
        assert!(failure.message().ends_with("must not be trusted"));
        assert_eq!(failure.exit_code(), 1);
        let failure = Failure::Client(Error::Released {
            source: Box::new(Error::Input(io::ErrorKind::BrokenPipe.into())),
        });
        assert_eq!(failure.message().matches("broken pipe").count(), 1);
    }

    #[test]
    fn nothing_printed_can_steer_a_terminal() {
        assert_eq!(harmless("a\x1b[2Jb\n\u{202e}c\u{9b}\u{7f}é"), "a\\u{1b}[2Jb\\n\\u{202e}c\\u{9b}\\u{7f}é");
        let mut row = KeyRow {
            name: "evil\x1b]0;".into(),
            id: [0; 16],
            memory_only: true,
            state: KeyState::Enabled,
            primary: 1,
            minimum: 1,
            versions: 1,
            check_value: [0; 8],
            created: u64::MAX,
            expires_in: None,
            uses: 0,
        };
        assert!(!table(&[vec![row.name.clone()]]).contains('\x1b'));
        // JSON escapes them by itself.
        let json = serde_json::to_string(&Key::new(&row)).unwrap();
        assert!(!json.contains('\x1b') && json.contains("\\u001b"));
        row.created = 0;
        assert_eq!(Key::new(&row).created, "1970-01-01T00:00:00Z");
    }

    #[test]
    fn counts_of_what_was_too_long_to_count_say_so() {
        assert!(Failure::KeyLength { got: 31, most: 100 }.message().ends_with("there are 31"));
        assert!(Failure::KeyLength { got: 101, most: 100 }.message().ends_with("more than 100"));
    }
}
