//! The configuration file, and the limits that it sets.
//!
//! Owns the names and the bounds of every key of `config.toml` that this release uses. It reads the file once, and an
//! unknown key, a wrong type or a value out of bounds is an error that names the place; nothing is guessed.

use std::{
    fmt,
    fs::OpenOptions,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use kms_protocol::FRAME_MAX;
use kms_secret_memory::Policy;
use serde::Deserialize;
use thiserror::Error;
use tracing::level_filters::LevelFilter;

/// The shortest `limits.frame`: a message of 64 KiB with its context and a head fits.
const FRAME_MIN: usize = 128 * 1024;

/// The longest configuration, in bytes.
const LEN_MAX: u64 = 64 * 1024;

/// The keys that a configuration may have.
const KEYS: &[&str] = &["secret_memory", "sandbox", "idle_lock", "lock_on", "log", "limits"];
const LIMIT_KEYS: &[&str] = &["frame", "connections_per_uid", "connections", "keys"];

/// Counts and sizes that the agent does not go beyond.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest frame, head included, in bytes.
    pub frame: usize,
    /// Connections of one uid.
    pub connections_per_uid: usize,
    /// Connections in all.
    pub connections: usize,
    /// Keys.
    pub keys: usize,
    /// Every key is memory-only, said so or not: the agent was started with `--memory`.
    pub memory_only: bool,
    /// The lifetime of keys that are added without one: what the agent was started with.
    pub lifetime: Option<Duration>,
    /// Keys are forgotten after so long without use.
    pub idle_lock: Option<Duration>,
}

/// What happens where the kernel lacks a part of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// The agent does not start without seccomp, nor without Landlock of any level.
    Required,
    /// It starts with what there is.
    Preferred,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frame: FRAME_MAX,
            connections_per_uid: 1024,
            connections: 16_384,
            keys: 1_000_000,
            memory_only: false,
            lifetime: None,
            idle_lock: None,
        }
    }
}

/// What the keys do not outlive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockOn {
    /// The lock of a session of this user.
    pub session: bool,
    /// The sleep of the machine.
    pub sleep: bool,
}

impl LockOn {
    /// True when there is nothing to be watched.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

impl fmt::Display for LockOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.session, self.sleep) {
            (false, false) => "nothing",
            (true, false) => "session",
            (false, true) => "sleep",
            (true, true) => "session and sleep",
        })
    }
}

/// The configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// What memory keys are shielded by.
    pub secret_memory: Policy,
    /// What the agent does without a sandbox.
    pub sandbox: Sandbox,
    /// How much is logged; where nothing is said, it is up to who starts the agent.
    pub log: Option<LevelFilter>,
    /// What the keys do not outlive.
    pub lock_on: LockOn,
    /// Counts and sizes.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            secret_memory: Policy::Auto,
            sandbox: Sandbox::Required,
            log: None,
            lock_on: LockOn::default(),
            limits: Limits::default(),
        }
    }
}

/// Where the configuration is. Found once: later the agent cannot look for it.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    pub(crate) path: Option<PathBuf>,
    /// It was named, so that it must be there.
    pub(crate) named: bool,
}

impl ConfigFile {
    /// Reads it.
    pub(crate) fn read(&self) -> Result<Config, ConfigError> {
        match &self.path {
            Some(path) => Config::read(path, !self.named),
            None => Ok(Config::default()),
        }
    }

    /// The folders that it can be read again from: its own, and that of the file which a symlink there leads to.
    pub(crate) fn folders(&self) -> Vec<PathBuf> {
        let Some(path) = &self.path else { return Vec::new() };
        let leads_to = path.canonicalize().ok();
        [Some(path.clone()), leads_to]
            .into_iter()
            .flatten()
            .filter_map(|path| Some(path.parent()?.to_owned()))
            .collect()
    }
}

/// Why a configuration is not taken.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not TOML, or a value has the wrong type.
    #[error("the configuration {path} cannot be understood: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What and where.
        message: String,
    },
    /// A key that this release does not have.
    #[error("the configuration {path} has the unknown key {key}; did you mean {nearest}?")]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The key that is most like it.
        nearest: String,
    },
    /// A value that needs what was not built in.
    #[error("the configuration {path} sets {key}, which this build lacks (cargo feature {feature})")]
    Lacking {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// The feature that has it.
        feature: &'static str,
    },
    /// A value that cannot be.
    #[error("the configuration {path} sets {key} to what it cannot be; allowed: {allowed}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is allowed.
        allowed: &'static str,
    },
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawConfig {
    secret_memory: Option<String>,
    sandbox: Option<String>,
    idle_lock: Option<String>,
    log: Option<String>,
    lock_on: Vec<String>,
    limits: RawLimits,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawLimits {
    frame: Option<usize>,
    connections_per_uid: Option<usize>,
    connections: Option<usize>,
    keys: Option<usize>,
}

impl Config {
    /// Reads `path`; where it may be absent, an absent file is the default configuration.
    ///
    /// # Errors
    /// [`ConfigError`]; nothing of a bad file is used.
    pub fn read(path: &Path, may_be_absent: bool) -> Result<Self, ConfigError> {
        match read_text(path) {
            Ok(text) => Self::parse(&text, path),
            Err(error) if may_be_absent && error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let syntax = |error: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            message: shown(&error.to_string()),
        };
        let table: toml::Table = text.parse().map_err(syntax)?;
        refuse_unknown(table.keys(), KEYS, "", path)?;
        if let Some(toml::Value::Table(limits)) = table.get("limits") {
            refuse_unknown(limits.keys(), LIMIT_KEYS, "limits.", path)?;
        }
        let raw: RawConfig = toml::from_str(text).map_err(syntax)?;
        let value = |key, allowed| ConfigError::Value { path: path.to_owned(), key, allowed };
        let mut config = Self::default();
        if let Some(text) = raw.secret_memory {
            config.secret_memory = match text.as_str() {
                "auto" => Policy::Auto,
                "secretmem" => Policy::SecretMem,
                "mlock" => Policy::Mlock,
                "preferred" => Policy::Preferred,
                _ => return Err(value("secret_memory", "\"auto\", \"secretmem\", \"mlock\", \"preferred\"")),
            };
        }
        if let Some(text) = raw.sandbox {
            config.sandbox = match text.as_str() {
                "required" => Sandbox::Required,
                "preferred" => Sandbox::Preferred,
                _ => return Err(value("sandbox", "\"required\", \"preferred\"")),
            };
        }
        if let Some(text) = raw.idle_lock {
            let parsed = kms_protocol::parse_lifetime(&text);
            let time = parsed.map_err(|_| value("idle_lock", "a time such as \"90\", \"15m\", \"8h\""))?;
            config.limits.idle_lock = Some(time);
        }
        if let Some(text) = raw.log {
            let allowed = "\"off\", \"error\", \"warn\", \"info\", \"debug\", \"trace\"";
            config.log = Some(text.parse().map_err(|_| value("log", allowed))?);
        }
        for event in &raw.lock_on {
            match event.as_str() {
                "session" => config.lock_on.session = true,
                "sleep" => config.lock_on.sleep = true,
                _ => return Err(value("lock_on", "a list of \"session\", \"sleep\"")),
            }
        }
        if !config.lock_on.is_empty() && !cfg!(feature = "logind") {
            return Err(ConfigError::Lacking { path: path.to_owned(), key: "lock_on", feature: "logind" });
        }
        let limits = &mut config.limits;
        if let Some(frame) = raw.limits.frame {
            if !(FRAME_MIN..=FRAME_MAX).contains(&frame) {
                return Err(value("limits.frame", "131072 to 1048576"));
            }
            limits.frame = frame;
        }
        let counts: [(&'static str, Option<usize>, &mut usize, usize, &'static str); 3] = [
            (
                "limits.connections_per_uid",
                raw.limits.connections_per_uid,
                &mut limits.connections_per_uid,
                1_000_000,
                "1 to 1000000",
            ),
            (
                "limits.connections",
                raw.limits.connections,
                &mut limits.connections,
                1_000_000,
                "1 to 1000000",
            ),
            ("limits.keys", raw.limits.keys, &mut limits.keys, 100_000_000, "1 to 100000000"),
        ];
        for (key, given, limit, most, allowed) in counts {
            if let Some(count) = given {
                if !(1..=most).contains(&count) {
                    return Err(value(key, allowed));
                }
                *limit = count;
            }
        }
        Ok(config)
    }
}

/// The words of an error that quotes the file, whose lines may be long, on a terminal that obeys some characters.
fn shown(error: &str) -> String {
    const CHARACTERS_MAX: usize = 1000;
    let harmless = |c: char| if c.is_control() && c != '\n' { '?' } else { c };
    error.trim_end().chars().take(CHARACTERS_MAX).map(harmless).collect()
}

/// A file of text that is not longer than a configuration may be; without asking for its length, which a file that grows makes
/// untrue and the sandbox denies.
fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    // A pipe in its place must not hold up an agent that reads it again, nor count as an empty file.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
    }
    file.take(LEN_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > LEN_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than 64 KiB"));
    }
    Ok(text)
}

fn refuse_unknown<'a>(
    keys: impl Iterator<Item = &'a String>,
    known: &[&str],
    prefix: &str,
    path: &Path,
) -> Result<(), ConfigError> {
    for key in keys {
        if !known.contains(&key.as_str()) {
            let nearest =
                known.iter().min_by_key(|name| strsim::damerau_levenshtein(name, key)).unwrap_or(&"");
            return Err(ConfigError::UnknownKey {
                path: path.to_owned(),
                key: format!("{prefix}{}", key.escape_debug()),
                nearest: format!("{prefix}{nearest}"),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("c.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_is_read() {
        let config = parse(
            "secret_memory = 'mlock'\nsandbox = 'preferred'\nidle_lock = '15m'\nlog = 'trace'\n[limits]\nframe = 131072\nconnections = 3\nconnections_per_uid = 2\nkeys = 4",
        )
        .unwrap();
        assert_eq!((config.secret_memory, config.log), (Policy::Mlock, Some(LevelFilter::TRACE)));
        assert_eq!(config.sandbox, Sandbox::Preferred);
        let expected = Limits {
            frame: 131_072,
            connections: 3,
            connections_per_uid: 2,
            keys: 4,
            idle_lock: Some(Duration::from_secs(900)),
            ..Limits::default()
        };
        assert_eq!(config.limits, expected);
    }

    #[test]
    fn a_bad_file_is_refused_with_its_place() {
        for (text, message) in [
            ("secret_memry = 'auto'", "unknown key secret_memry; did you mean secret_memory?"),
            ("[limits]\nframes = 1", "unknown key limits.frames; did you mean limits.frame?"),
            ("secret_memory = 'swap'", "sets secret_memory to what it cannot be"),
            ("sandbox = 'none'", "sets sandbox to what it cannot be"),
            ("idle_lock = 'soon'", "sets idle_lock to what it cannot be"),
            ("idle_lock = '0'", "sets idle_lock to what it cannot be"),
            ("log = 'loud'", "sets log to what it cannot be"),
            ("[limits]\nframe = 1048577", "sets limits.frame"),
            ("[limits]\nkeys = 0", "sets limits.keys"),
            ("[limits]\nkeys = -1", "cannot be understood"),
            ("lock_on = ['session', 'lid']", "sets lock_on to what it cannot be; allowed: a list of"),
            ("lock_on = 'session'", "cannot be understood"),
            ("limits = 3", "cannot be understood"),
            ("log = ", "cannot be understood"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    #[cfg(feature = "logind")]
    fn lock_on_is_a_list() {
        let lock_on = |text| parse(text).unwrap().lock_on;
        assert!(lock_on("").is_empty() && lock_on("lock_on = []").is_empty());
        assert_eq!(lock_on("lock_on = ['session']"), LockOn { session: true, sleep: false });
        assert_eq!(lock_on("lock_on = ['sleep', 'session', 'sleep']"), LockOn { session: true, sleep: true });
    }

    #[test]
    #[cfg(not(feature = "logind"))]
    fn lock_on_needs_the_feature_that_watches() {
        assert!(parse("lock_on = []").is_ok());
        let error = parse("lock_on = ['sleep']").unwrap_err();
        assert!(error.contains("sets lock_on, which this build lacks (cargo feature logind)"), "{error}");
    }

    #[test]
    fn an_absent_file_is_the_default_only_where_none_was_named() {
        let absent = Path::new("/nonexistent/config.toml");
        assert_eq!(Config::read(absent, true).unwrap().limits, Limits::default());
        assert!(matches!(Config::read(absent, false), Err(ConfigError::Read { .. })));
    }
}
