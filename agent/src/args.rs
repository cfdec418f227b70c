//! The command line of `kms-agent`.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, error::ErrorKind};
use etcetera::BaseStrategy;

use crate::{config::ConfigFile, error::report, manual, shell::Shell};

/// Bad usage, as in sysexits(3).
const USAGE: u8 = 64;

/// Holds key-encryption keys in locked memory and serves encrypt and decrypt to the programs of this user.
///
/// Without COMMAND and -D it goes to the background and prints the commands that set KMS_AUTH_SOCK and KMS_AGENT_PID:
/// eval "$(kms-agent --memory)". Where an agent of this user answers on the socket already, the commands are about that one
/// and none is started. With COMMAND it runs that under a fresh agent and ends with it.
#[derive(Debug, Parser)]
#[command(name = "kms-agent", version)]
pub(crate) struct Args {
    /// Stay in the foreground
    #[arg(short = 'D', conflicts_with = "command")]
    pub(crate) foreground: bool,
    /// End the agent that KMS_AGENT_PID names, if it serves the socket (KMS_AUTH_SOCK, or -a), and print the commands that
    /// unset both
    #[arg(short = 'k', conflicts_with_all = ["foreground", "stdio", "command"])]
    pub(crate) end: bool,
    /// Serve one peer on standard input and output, and end with it
    #[arg(long, conflicts_with_all = ["foreground", "socket", "command"])]
    pub(crate) stdio: bool,
    /// The socket [default: $XDG_RUNTIME_DIR/kms-agent/agent.sock; a fresh folder with COMMAND; with -D, the one from systemd]
    #[arg(short = 'a', value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Keep no keystore: every key lives in memory alone
    #[arg(long)]
    pub(crate) memory: bool,
    /// Lifetime of keys that are added without one, such as 90, 15m, 8h, 7d
    #[arg(short = 't', value_name = "LIFE", value_parser = kms_protocol::parse_lifetime)]
    pub(crate) lifetime: Option<Duration>,
    /// The configuration [default: $XDG_CONFIG_HOME/kms-agent/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print commands for sh [default: by $SHELL]
    #[arg(short = 's', group = "shell")]
    sh: bool,
    /// Print commands for csh
    #[arg(short = 'c', group = "shell")]
    csh: bool,
    /// Print commands for fish
    #[arg(long, group = "shell")]
    fish: bool,
    /// Print the manual page
    #[arg(long, exclusive = true)]
    man: bool,
    /// The command to run, and its arguments
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

impl Args {
    /// Reads them; help, version, the manual page and bad usage end the program.
    pub(crate) fn read() -> Result<Self, ExitCode> {
        let args = Self::try_parse().map_err(|error| match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match error.print() {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            },
            _ => {
                let text = error.to_string();
                let first = text.lines().next().unwrap_or_default();
                report(first.trim_start_matches("error: "), Some("kms-agent --help lists what there is"));
                ExitCode::from(USAGE)
            }
        })?;
        if args.man {
            return Err(if manual::print().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Ok(args)
    }

    /// Whether somebody reads along on stderr, a person or a service manager.
    pub(crate) fn is_read_along(&self) -> bool {
        self.foreground || self.stdio
    }

    /// The shell that is spoken to.
    pub(crate) fn shell(&self) -> Shell {
        match (self.sh, self.csh, self.fish) {
            (true, ..) => Shell::Sh,
            (_, true, _) => Shell::Csh,
            (.., true) => Shell::Fish,
            _ => Shell::of_user(),
        }
    }

    /// The configuration file that they name, or the one of this user.
    pub(crate) fn config_file(&self) -> ConfigFile {
        match &self.config {
            Some(path) => ConfigFile { path: std::path::absolute(path).ok(), named: true },
            None => {
                // Without a home folder nothing is configured.
                let folders = etcetera::base_strategy::Xdg::new().ok();
                let path = folders.map(|folders| folders.config_dir().join("kms-agent/config.toml"));
                ConfigFile { path, named: false }
            }
        }
    }
}
