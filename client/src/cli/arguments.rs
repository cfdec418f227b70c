//! The command line of `kmsctl`: every command with its arguments, from which help, completions and manual come.
//!
//! Owns the spelling of `NAME@V`. Passphrases and keys never come from arguments or the environment.

use std::{
    ffi::OsString,
    num::{NonZeroU32, NonZeroU64},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, value_parser};
use clap_complete::Shell;
use kms_protocol::parse_lifetime;

use super::{secrets::PassphraseSource, ui::Failure};
use crate::EncryptionContext;

/// Talks to kms-agent, which keeps keys and uses them
#[derive(Parser)]
#[command(name = "kmsctl", version, propagate_version = true, disable_help_subcommand = true)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Args)]
#[command(next_help_heading = "Everywhere")]
pub(super) struct Global {
    /// The agent's socket; else KMS_AUTH_SOCK, the user's agent, the system's
    #[arg(long, global = true, value_name = "PATH")]
    pub(super) socket: Option<PathBuf>,
    /// Trust an agent that runs as this user
    #[arg(long, global = true, value_name = "USER")]
    pub(super) server_uid: Option<String>,
    /// How long an answer may take, as 30s or 5m; 10 seconds if not given
    #[arg(long, global = true, value_name = "TIME", value_parser = parse_lifetime)]
    pub(super) timeout: Option<Duration>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Say what would be changed, and change nothing
    #[arg(long, global = true)]
    pub(super) dry_run: bool,
    /// No notes and no progress bar
    #[arg(short, long, global = true)]
    pub(super) quiet: bool,
    /// More notes
    #[arg(short, long, global = true)]
    pub(super) verbose: bool,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Make a key in the agent
    Add(AddKey),
    /// List the keys
    List,
    /// Show a key and its versions
    Describe {
        /// The key
        name: String,
    },
    /// Give a key a new primary version; the older ones go on opening what they sealed
    Rotate {
        /// The key
        name: String,
    },
    /// Give a key another name; what was made under it stays
    Rename {
        /// The key
        name: String,
        /// Its new name
        new: String,
    },
    /// Take a key away
    Remove(Remove),
    /// Write the raw bytes of a key that was added with --exportable
    Export(Export),
    /// Encrypt a file or standard input
    Encrypt(Encrypt),
    /// Decrypt a file or standard input
    Decrypt(Decrypt),
    /// Seal a key or another small secret
    Wrap(Wrap),
    /// Open what `wrap` or `datakey` sealed
    Unwrap(Unwrap),
    /// Make a data key, plain and wrapped
    Datakey(DataKey),
    /// Move ciphertexts to the primary version of their key, or to another key
    ///
    /// A stream of any size costs 132 bytes: its head is replaced in place, its body is not even read. Smaller ciphertexts are
    /// replaced as whole files. What is under the primary version already is not touched. A run that was interrupted, even by a power
    /// failure, is finished by the next one, and two runs at a time do not harm each other.
    ///
    /// Who once had the old key version and the old head of a stream can still open it: its data key stays the same.
    /// After a theft use --reencrypt, which decrypts and encrypts anew.
    Rewrap(Rewrap),
    /// Say which key and version a ciphertext names, and whether it opens
    Verify(Verify),
    /// Print a keyed hash, or check one
    Mac(Mac),
    /// Write random bytes
    Random(Random),
    /// Take every key out of reach, under a passphrase
    Lock(PassphraseSource),
    /// End the lock
    Unlock(PassphraseSource),
    /// Ask whether the agent is there
    Ping,
    /// Wait until the agent is there, at most --timeout if that is given
    Wait {
        /// And until it is not locked
        #[arg(long)]
        unlocked: bool,
    },
    /// Show the state of the agent: exits with 0 unlocked, 3 locked, 2 none
    Status,
    /// Show how often the agent did what since its start
    Stats {
        /// Print OpenMetrics text
        #[arg(long, conflicts_with = "json")]
        openmetrics: bool,
    },
    /// Print the line that makes a shell use this agent
    Env(Env),
    /// Print the completions of a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Print a manual page, or write all of them
    Man(Man),
}

impl Command {
    /// Whether `--dry-run` has something to prevent, and knows how.
    pub(super) fn changes_something(&self) -> bool {
        matches!(
            self,
            Self::Add(_)
                | Self::Rotate { .. }
                | Self::Rename { .. }
                | Self::Remove(_)
                | Self::Rewrap(_)
                | Self::Lock(_)
                | Self::Unlock(_)
        )
    }
}

#[derive(Args)]
pub(super) struct AddKey {
    /// The name of the new key
    pub(super) name: String,
    /// Never write the key to disk
    #[arg(long)]
    pub(super) memory: bool,
    /// Take the key's 32 bytes from FILE, or from standard input if it is `-`
    #[arg(long, value_name = "FILE")]
    pub(super) import: Option<OsString>,
    /// The imported key is 64 hexadecimal digits
    #[arg(long, requires = "import")]
    pub(super) hex: bool,
    /// The key is gone after this time, as 90, 30s, 15m, 8h, 7d or 2w
    #[arg(short = 't', long = "lifetime", value_name = "LIFE", value_parser = parse_lifetime)]
    pub(super) lifetime: Option<Duration>,
    /// Ask a person before each use
    #[arg(short, long)]
    pub(super) confirm: bool,
    /// The key can be used so often and no more
    #[arg(long, value_name = "N")]
    pub(super) max_uses: Option<NonZeroU64>,
    /// `export` may write the key's bytes
    #[arg(long)]
    pub(super) exportable: bool,
    /// A key of that name is as good as a new one
    #[arg(long)]
    pub(super) if_missing: bool,
}

#[derive(Args)]
#[group(id = "removed", required = true, multiple = false)]
pub(super) struct Remove {
    /// The key
    #[arg(group = "removed")]
    pub(super) name: Option<String>,
    /// Every key that lives in memory only
    #[arg(long, group = "removed")]
    pub(super) all: bool,
}

#[derive(Args)]
pub(super) struct Export {
    /// The key, or one version of it
    #[arg(value_name = "NAME[@V]")]
    pub(super) name: String,
    /// Where to write; else, or if it is `-`, standard output; never a terminal
    #[arg(short, long, value_name = "FILE")]
    pub(super) output: Option<OsString>,
    /// The key's name once more, instead of a yes on the terminal
    #[arg(long, value_name = "NAME")]
    pub(super) confirm: Option<String>,
    #[command(flatten)]
    pub(super) passphrase: PassphraseSource,
}

#[derive(Args)]
pub(super) struct Key {
    /// The key
    #[arg(short, long, visible_alias = "keyid", value_name = "NAME")]
    pub(super) key: String,
}

#[derive(Args)]
#[group(id = "which", required = true, multiple = false)]
pub(super) struct Which {
    /// The key
    #[arg(short, long, visible_alias = "keyid", value_name = "NAME")]
    pub(super) key: Option<String>,
    /// Take the key that the ciphertext names, and say which that is
    #[arg(long)]
    pub(super) any_key: bool,
}

#[derive(Args)]
pub(super) struct Context {
    /// A pair of the encryption context
    #[arg(short = 'C', long = "context", value_name = "KEY=VALUE")]
    pairs: Vec<OsString>,
}

impl Context {
    pub(super) fn read(&self) -> Result<EncryptionContext, Failure> {
        let mut pairs = Vec::new();
        for pair in &self.pairs {
            let bytes = pair.as_bytes();
            let at = bytes.iter().position(|byte| *byte == b'=').ok_or(Failure::NotAPair)?;
            let (key, value) = bytes.split_at_checked(at).ok_or(Failure::NotAPair)?;
            pairs.push((key, value.strip_prefix(b"=").unwrap_or_default()));
        }
        EncryptionContext::from_pairs(pairs).map_err(Failure::Context)
    }
}

#[derive(Args)]
pub(super) struct Files {
    /// What to read; else, or if it is `-`, standard input
    pub(super) file: Option<OsString>,
    /// Where to write; else, or if it is `-`, standard output
    #[arg(short, long, value_name = "FILE")]
    pub(super) output: Option<OsString>,
}

#[derive(Args)]
pub(super) struct Way {
    /// The data stays in this program
    #[arg(long, conflicts_with = "remote")]
    pub(super) local: bool,
    /// The data goes through the agent
    #[arg(long)]
    pub(super) remote: bool,
}

#[derive(Args)]
pub(super) struct Encrypt {
    #[command(flatten)]
    pub(super) key: Key,
    #[command(flatten)]
    pub(super) context: Context,
    #[command(flatten)]
    pub(super) files: Files,
    /// Write one line of base64; for up to 64 KiB
    #[arg(long)]
    pub(super) text: bool,
    #[command(flatten)]
    pub(super) way: Way,
}

#[derive(Args)]
pub(super) struct Decrypt {
    #[command(flatten)]
    pub(super) which: Which,
    #[command(flatten)]
    pub(super) context: Context,
    #[command(flatten)]
    pub(super) files: Files,
    /// Read one line of base64
    #[arg(long)]
    pub(super) text: bool,
    #[command(flatten)]
    pub(super) way: Way,
}

#[derive(Args)]
pub(super) struct Wrap {
    #[command(flatten)]
    pub(super) key: Key,
    #[command(flatten)]
    pub(super) context: Context,
    #[command(flatten)]
    pub(super) files: Files,
    /// Write one line of base64
    #[arg(long)]
    pub(super) text: bool,
}

#[derive(Args)]
pub(super) struct Unwrap {
    #[command(flatten)]
    pub(super) which: Which,
    #[command(flatten)]
    pub(super) context: Context,
    #[command(flatten)]
    pub(super) files: Files,
    /// Read one line of base64
    #[arg(long)]
    pub(super) text: bool,
    /// Write hexadecimal digits
    #[arg(long)]
    pub(super) hex: bool,
}

#[derive(Args)]
pub(super) struct DataKey {
    #[command(flatten)]
    pub(super) key: Key,
    #[command(flatten)]
    pub(super) context: Context,
    /// Bytes of the data key
    #[arg(long, value_name = "N", default_value = "32", value_parser = value_parser!(u32).range(1..=1024))]
    pub(super) length: u32,
    /// Where to write the wrapped key; the plain one goes to standard output, which must not be a terminal
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub(super) wrapped: Option<OsString>,
    /// Only the wrapped key leaves the agent
    #[arg(long)]
    pub(super) wrapped_only: bool,
    /// Write the wrapped key as one line of base64
    #[arg(long, conflicts_with = "json")]
    pub(super) text: bool,
    /// Write the plain key as hexadecimal digits
    #[arg(long, conflicts_with_all = ["json", "wrapped_only"])]
    pub(super) hex: bool,
}

#[derive(Args)]
pub(super) struct Rewrap {
    #[command(flatten)]
    pub(super) which: Which,
    #[command(flatten)]
    pub(super) context: Context,
    /// The key to move to; else the primary version of the same key
    #[arg(long, value_name = "NAME")]
    pub(super) to: Option<String>,
    /// Decrypt and encrypt anew, with a new data key
    #[arg(long)]
    pub(super) reencrypt: bool,
    /// Every file below these directories; what is not a ciphertext, or is under another key, is skipped
    #[arg(short, long, requires = "paths", conflicts_with = "text")]
    pub(super) recursive: bool,
    /// Read and write one line of base64
    #[arg(long)]
    pub(super) text: bool,
    /// What to change in place; else standard input is written to standard output
    #[arg(value_name = "PATH")]
    pub(super) paths: Vec<OsString>,
}

#[derive(Args)]
pub(super) struct Verify {
    /// The key that it must be; else the one that the ciphertext names
    #[arg(short, long, visible_alias = "keyid", value_name = "NAME")]
    pub(super) key: Option<String>,
    #[command(flatten)]
    pub(super) context: Context,
    /// What to read; else, or if it is `-`, standard input
    pub(super) file: Option<OsString>,
    /// Only the head of a stream, not all that follows
    #[arg(long)]
    pub(super) prefix: bool,
    /// Read one line of base64
    #[arg(long)]
    pub(super) text: bool,
}

#[derive(Args)]
pub(super) struct Mac {
    #[command(flatten)]
    pub(super) key: Key,
    #[command(flatten)]
    pub(super) context: Context,
    /// What to read; else, or if it is `-`, standard input
    pub(super) file: Option<OsString>,
    /// Say whether TAG is that of the input: exits with 0 or 1
    #[arg(long, value_name = "TAG")]
    pub(super) check: Option<String>,
}

#[derive(Args)]
pub(super) struct Random {
    /// How many bytes
    #[arg(value_name = "N")]
    pub(super) length: NonZeroU64,
    /// Write hexadecimal digits
    #[arg(long, conflicts_with = "text")]
    pub(super) hex: bool,
    /// Write one line of base64
    #[arg(long)]
    pub(super) text: bool,
    /// Where to write; else, or if it is `-`, standard output
    #[arg(short, long, value_name = "FILE")]
    pub(super) output: Option<OsString>,
}

/// For which shell `env` writes.
#[derive(Args)]
#[group(id = "syntax", multiple = false)]
pub(super) struct Env {
    /// For sh, bash, zsh; also without a flag
    #[arg(short, long)]
    pub(super) sh: bool,
    /// For csh, tcsh
    #[arg(short, long)]
    pub(super) csh: bool,
    /// For fish
    #[arg(long)]
    pub(super) fish: bool,
}

#[derive(Args)]
pub(super) struct Man {
    /// The page of this command; else that of kmsctl
    #[arg(conflicts_with = "folder")]
    pub(super) command: Option<String>,
    /// Write every page to this folder
    #[arg(long, value_name = "FOLDER")]
    pub(super) folder: Option<PathBuf>,
}

/// A key, or one version of it.
pub(super) fn name_and_version(text: &str) -> Result<(&str, Option<u32>), Failure> {
    match text.split_once('@') {
        None => Ok((text, None)),
        Some((name, version)) => {
            let version: NonZeroU32 = version.parse().map_err(|_| Failure::NotAVersion)?;
            Ok((name, Some(version.get())))
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parses(line: &str) -> bool {
        Arguments::try_parse_from(["kmsctl"].into_iter().chain(line.split(' '))).is_ok()
    }

    #[test]
    fn the_command_line_is_consistent_and_global_arguments_stand_anywhere() {
        Arguments::command().debug_assert();
        for line in [["kmsctl", "--json", "list"], ["kmsctl", "list", "--json"]] {
            assert!(Arguments::try_parse_from(line).unwrap().global.json);
        }
        for line in [
            "encrypt",
            "decrypt",
            "unwrap",
            "rewrap file",
            "decrypt -k a --any-key",
            "encrypt -k a --local --remote",
            "add a --hex",
            "add a --max-uses 0",
            "add a -t 0",
            "remove",
            "remove a --all",
            "rewrap -k a -r",
            "rewrap -k a -r --text folder",
            "random",
            "random -1",
            "random 0",
            "stats --json --openmetrics",
            "env -s -c",
        ] {
            assert!(!parses(line), "{line}");
        }
        for line in [
            "encrypt --keyid a",
            "encrypt --key a -",
            "decrypt --any-key -C a=b -C c=d",
            "add a -t 8h -c --max-uses 3 --exportable",
            "remove --all",
            "rewrap -k a -r folder other",
            "verify file",
            "random 16 --hex",
            "-q --timeout 5s rotate a -v",
        ] {
            assert!(parses(line), "{line}");
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
            assert!(!parses(line), "{line}");
        }
    }

    #[test]
    fn a_version_stands_behind_an_at_sign() {
        assert!(matches!(name_and_version("a"), Ok(("a", None))));
        assert!(matches!(name_and_version("a@2"), Ok(("a", Some(2)))));
        for bad in ["a@", "a@0", "a@x", "a@1@2", "a@4294967296"] {
            assert!(matches!(name_and_version(bad), Err(Failure::NotAVersion)), "{bad}");
        }
    }
}
