//! How `kmsctl` speaks: `kmsctl: error: …`, `kmsctl: hint: …` and notes on standard error, results on standard output.
//!
//! Owns the table of statuses with message, hint and exit status (`docs/protocol.md`, section 3), and the progress bars. Errors are
//! always text; results, which can be JSON, are put together in `results`. Names, paths and whatever else others chose are printed so that they cannot steer a terminal. No secret
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
use kms_envelope::{ContextError, HeaderError, KeyId};
use kms_protocol::{NameError, PASSPHRASE_MAX};
use nix::errno::Errno;
use thiserror::Error;

use super::{arguments::Global, files::Destination};
use crate::{Error, Opcode, Progress, Status};

/// Exit status for bad usage.
const USAGE: u8 = 64;

/// A shorter stream is done before a progress bar could be read, in bytes.
const PROGRESS_FROM: u64 = 64 << 20;

/// As [`PROGRESS_FROM`], of files.
const FILES_FROM: u64 = 500;

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
    #[error("{} is a folder", path.display())]
    IsFolder { path: PathBuf },
    #[error("{} is not a file", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} was changed by somebody else meanwhile", path.display())]
    Changing { path: PathBuf },
    #[error("somebody else holds a lock on {}", path.display())]
    InUse { path: PathBuf },
    #[error("{} belongs to another user", path.display())]
    ForeignSideFile { path: PathBuf },
    #[error("{} is to finish what was begun with {}, which is not there any more", side.display(), file.display())]
    LostFile { side: PathBuf, file: PathBuf },
    #[error("standard input can be the only one")]
    StandardInputAlone,
    #[error("--dry-run has nothing to prevent here")]
    NothingToPrevent,
    #[error("the key {name} was not made to be exported")]
    NotExportable { name: String },
    #[error("the export of {name} was not confirmed")]
    NotConfirmed { name: String },
    #[error("--confirm names another key than {name}")]
    OtherKeyConfirmed { name: String },
    #[error("cannot ask whether to go on")]
    NoYes(#[source] io::Error),
    #[error("a version is a number from 1 on")]
    NotAVersion,
    #[error("this is encrypted data or the tag of an input, not a wrapped key")]
    NotAKey,
    #[error("this is the tag of an input, not a ciphertext")]
    IsTag,
    #[error("there is nothing to wrap")]
    NothingToWrap,
    #[error("the wrapped key needs a file of its own")]
    NoPlaceForWrapped,
    #[error("the tag is not one line of base64 that `kmsctl mac` has printed")]
    NotATag,
    #[error("the input is not one line of base64")]
    NotText,
    #[error("one line of text holds {max} bytes at most")]
    LongText { max: usize },
    #[error("a secret does not go to a terminal")]
    SecretTerminal,
    #[error("standard input is closed")]
    ClosedInput,
    #[error("there is no manual page of that name")]
    NoPage,
    #[error("the key {name} has no version {version}")]
    NoSuchVersion { name: String, version: u32 },
    #[error("the key {name} has no version {version}, which the ciphertext names")]
    NoVersion { name: String, version: u32 },
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

    /// The answer of the agent, where it is what failed.
    pub(super) fn status(&self) -> Option<Status> {
        match self {
            Self::Client(error) | Self::Key { error, .. } => error.status(),
            _ => None,
        }
    }

    /// Whether this is not about one file of many, but about the agent, or the one key that all are under.
    pub(super) fn concerns_all(&self, any_key: bool) -> bool {
        let (Self::Client(error) | Self::Key { error, .. }) = self else { return false };
        match error {
            Error::Refused { status: Status::Denied | Status::Declined | Status::Limit, .. } => !any_key,
            Error::Refused { .. } => matches!(error.exit_code(), 3 | 75),
            Error::Timeout { .. }
            | Error::Closed
            | Error::Broken
            | Error::Reply(_)
            | Error::Connection(_) => true,
            _ => error.exit_code() == 2,
        }
    }

    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Client(error) | Self::Key { error, .. } => error.exit_code(),
            Self::Name(_)
            | Self::Context(_)
            | Self::NotAPair
            | Self::NoUser { .. }
            | Self::EmptyName
            | Self::Terminal
            | Self::SecretTerminal
            | Self::IsFolder { .. }
            | Self::StandardInputAlone
            | Self::NothingToPrevent
            | Self::OtherKeyConfirmed { .. }
            | Self::NotAVersion
            | Self::NoPlaceForWrapped
            | Self::NotATag
            | Self::ClosedInput
            | Self::NoPage => USAGE,
            Self::NoVersion { .. }
            | Self::NoSuchVersion { .. }
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
            | Self::NotADigit
            | Self::NotAFile { .. }
            | Self::Changing { .. }
            | Self::InUse { .. }
            | Self::ForeignSideFile { .. }
            | Self::LostFile { .. }
            | Self::NotExportable { .. }
            | Self::NotConfirmed { .. }
            | Self::NoYes(_)
            | Self::NotAKey
            | Self::IsTag
            | Self::NothingToWrap
            | Self::NotText
            | Self::LongText { .. } => 1,
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
            Self::NoVersion { .. } | Self::NoSuchVersion { .. } => {
                Some("`kmsctl describe NAME` shows the versions that there are")
            }
            Self::IsFolder { .. } => Some("add -r for every file below it"),
            Self::NotAFile { .. } => Some("rewrap changes files only"),
            Self::Changing { .. } | Self::InUse { .. } => Some("try again when nothing else works on it"),
            Self::ForeignSideFile { .. } => {
                Some("ask that user to run the same `kmsctl rewrap`, or remove it if it is none of kmsctl's")
            }
            Self::LostFile { .. } => Some(
                "move the file back and rewrap it again, since its head may be written in part; without the file, remove the \
                 other one",
            ),
            Self::StandardInputAlone => Some("without a name, standard input goes to standard output"),
            Self::NothingToPrevent => {
                Some("it is for add, rotate, rename, remove, rewrap of files, lock and unlock")
            }
            Self::NotExportable { .. } => Some("only `kmsctl add --exportable` makes a key that can leave"),
            Self::NotConfirmed { .. } | Self::OtherKeyConfirmed { .. } | Self::NoYes(_) => {
                Some("say yes on the terminal, or give the key's name once more with --confirm NAME")
            }
            Self::NotAVersion => {
                Some("as in backup@2; `kmsctl describe NAME` shows the versions that there are")
            }
            Self::NotAKey => Some("`kmsctl decrypt` opens data, `kmsctl mac --check` checks a tag"),
            Self::IsTag => Some("`kmsctl mac --check` checks it"),
            Self::NothingToWrap => Some("a key has at least one byte; `kmsctl datakey` makes one"),
            Self::NoPlaceForWrapped => Some(
                "name it with --wrapped FILE; or let both be printed with --json, or none but it with --wrapped-only",
            ),
            Self::NotATag => Some("a tag has 80 characters and begins with kmsc"),
            Self::NotText => Some("without --text the ciphertext itself is read"),
            Self::LongText { .. } => Some("without --text or --hex there is no such limit"),
            Self::SecretTerminal => Some("write to a file or to a pipe"),
            Self::ClosedInput => Some("name a file; for no input at all, `</dev/null` says so"),
            Self::NoPage => Some("`kmsctl --help` lists the commands"),
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
        (Some(Opcode::MacVerify), Status::WrongKey) => {
            ("the tag was made under another key", "name the key that it was made under with -k")
        }
        (Some(Opcode::Verify), Status::WrongKey) => (
            "the ciphertext was made under another key",
            "name that key with -k, or leave -k out to take what the ciphertext names",
        ),
        (Some(Opcode::MacVerify), Status::InvalidCiphertext) => (
            "the tag is not that of this input in this encryption context",
            "give the input and the -C pairs that the tag was made for",
        ),
        (Some(Opcode::Export), Status::Denied) => (
            "the key was not made to be exported, or the passphrase is wrong",
            "give the passphrase that the agent was last locked with; each wrong one costs time",
        ),
        (Some(Opcode::Export), Status::Malformed) => (
            "the agent was not locked since its start, so there is no passphrase to give",
            "leave --passphrase-file and --passphrase-fd out",
        ),
        (
            Some(
                Opcode::Encrypt
                | Opcode::Decrypt
                | Opcode::StreamNew
                | Opcode::StreamOpen
                | Opcode::RemoteStreamNew
                | Opcode::RemoteStreamOpen
                | Opcode::Wrap
                | Opcode::Unwrap
                | Opcode::DataKey
                | Opcode::DataKeyWrapped
                | Opcode::Rewrap
                | Opcode::Verify
                | Opcode::Mac
                | Opcode::MacVerify
                | Opcode::Export,
            ),
            Status::Limit,
        ) => (
            "the key was used as often as it may be",
            "`kmsctl describe NAME` shows how often that is; a rotation does not begin the count anew",
        ),
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
            "that agent serves its own user only, or does not come up, and its log says why; start an agent of your own with \
             `eval \"$(kms-agent)\"`, or name its socket with KMS_AUTH_SOCK or --socket",
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
        Error::NotACiphertext(_) => Some("name a file that `kmsctl` has written"),
        Error::NotData => {
            Some("`kmsctl unwrap` opens a wrapped key; decrypt takes what `kmsctl encrypt` has written")
        }
        Error::TooLong { .. } => Some("`kmsctl encrypt` takes any length"),
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
fn with_sources(error: &(dyn StdError + 'static)) -> String {
    let mut message = plain(error);
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(message, ": {}", plain(error));
        source = error.source();
    }
    message
}

/// What the kernel said without its number, which tells nobody anything.
fn plain(error: &(dyn StdError + 'static)) -> String {
    match error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
        Some(number) => Errno::from_raw(number).desc().to_owned(),
        None => error.to_string(),
    }
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

pub(super) fn print(text: &str) -> io::Result<()> {
    print_bytes(text.as_bytes())
}

pub(super) fn print_bytes(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// The text with every character escaped that a terminal would obey: controls, and those that change the direction of text.
pub(super) fn harmless(text: &str) -> String {
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

/// A ciphertext that was looked at.
pub(super) struct Verdict {
    pub(super) key: Option<String>,
    pub(super) id: KeyId,
    pub(super) version: u32,
    pub(super) primary: Option<u32>,
    /// All of it, or of a stream only the head; nothing when it does not open.
    pub(super) checked: Option<bool>,
}

/// Prints, as much and in the form that the user wants.
pub(super) struct Ui {
    pub(super) json: bool,
    quiet: bool,
    verbose: bool,
}

impl Ui {
    pub(super) fn new(global: &Global) -> Self {
        Self { json: global.json, quiet: global.quiet, verbose: global.verbose && !global.quiet }
    }

    pub(super) fn note(&self, message: &str) {
        if !self.quiet {
            let _ = writeln!(io::stderr().lock(), "kmsctl: note: {}", harmless(message));
        }
    }

    /// Which agent it is that answers.
    pub(super) fn connected(&self, socket: &Path, uid: u32) {
        if self.verbose {
            self.who_asks(socket, uid);
        }
    }

    /// Before a passphrase is typed: to whom it will go.
    pub(super) fn who_asks(&self, socket: &Path, uid: u32) {
        self.note(&format!("the agent is {}, uid {uid}", socket.display()));
    }

    /// Which key a ciphertext names.
    pub(super) fn key_used(&self, name: Option<&str>, id: KeyId) {
        match name {
            Some(name) => self.note(&format!("the key is {name}, id {id}")),
            None => self.note(&format!("the key has the id {id}")),
        }
    }

    /// That a file is there, or is another one now.
    pub(super) fn wrote(&self, path: &Path) {
        if self.verbose {
            self.note(&format!("wrote {}", path.display()));
        }
    }

    /// As [`failure`](Self::failure), of one file among many.
    pub(super) fn failure_at(&self, path: &Path, failure: &Failure) {
        let message = failure.message();
        // Many say it themselves.
        let path = path.display().to_string();
        match message.contains(&path) {
            true => complain(&message, failure.hint()),
            false => complain(&format!("{path}: {message}"), failure.hint()),
        }
    }

    /// Prints a failure; returns the exit status that belongs to it.
    pub(super) fn failure(&self, failure: &Failure) -> ExitCode {
        complain(&failure.message(), failure.hint());
        ExitCode::from(failure.exit_code())
    }

    /// A progress bar, if anybody sees one.
    pub(super) fn progress(&self, total: Option<u64>, destination: &Destination) -> Bar {
        let seen = !self.quiet && io::stderr().is_terminal() && !destination.is_terminal();
        Bar {
            total,
            from: PROGRESS_FROM,
            unit: Unit::Bytes,
            seen,
            done: AtomicU64::new(0),
            bar: OnceLock::new(),
        }
    }

    /// As [`progress`](Self::progress), of so many files.
    pub(super) fn count_files(&self, total: usize) -> Bar {
        let seen = !self.quiet && io::stderr().is_terminal();
        let total = u64::try_from(total).ok();
        Bar {
            total,
            from: FILES_FROM,
            unit: Unit::Files,
            seen,
            done: AtomicU64::new(0),
            bar: OnceLock::new(),
        }
    }
}

/// A progress bar that shows up once there is enough to show.
pub(super) struct Bar {
    total: Option<u64>,
    /// Less than this is done before it could be read.
    from: u64,
    unit: Unit,
    seen: bool,
    done: AtomicU64,
    bar: OnceLock<ProgressBar>,
}

/// What is counted.
#[derive(Clone, Copy)]
enum Unit {
    Bytes,
    Files,
}

impl Progress for Bar {
    fn advance(&self, more: u64) {
        if !self.seen || self.total.is_some_and(|total| total < self.from) {
            return;
        }
        let done = self.done.fetch_add(more, Ordering::Relaxed).saturating_add(more);
        // Of an input whose length is unknown only the past tells whether it is long.
        if self.total.is_some() || done >= self.from {
            self.bar.get_or_init(|| bar(self.total, self.unit)).set_position(done);
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

fn bar(total: Option<u64>, unit: Unit) -> ProgressBar {
    let template = match total {
        Some(_) if matches!(unit, Unit::Files) => "{wide_bar} {pos} of {len} files, {eta}",
        Some(_) => "{wide_bar} {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta}",
        None => "{spinner} {bytes}, {binary_bytes_per_sec}",
    };
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
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
    fn counts_of_what_was_too_long_to_count_say_so() {
        assert!(Failure::KeyLength { got: 31, most: 100 }.message().ends_with("there are 31"));
        assert!(Failure::KeyLength { got: 101, most: 100 }.message().ends_with("more than 100"));
    }
}
