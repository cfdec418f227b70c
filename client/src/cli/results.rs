//! What commands print when all is well: tables for people, JSON for programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    process::ExitCode,
};

use jiff::Timestamp;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};
use serde::Serialize;

use super::{
    arguments::Env,
    rewrap::Tally,
    ui::{Failure, Ui, Verdict, harmless, print, print_bytes},
};
use crate::{
    Added, Constraint, Description, KeyRow, KeyState, LockState, Opcode, Removed, Renamed, Rotated,
    StatsReply, Status, StatusReply, constraint,
};

impl Ui {
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
            self.note("the key was there already");
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
            self.note("the agent holds no key; `kmsctl add NAME` makes one");
            return Ok(());
        }
        let mut rows = vec![
            ["NAME", "ID", "STATE", "VERSION", "CHECK VALUE", "USES", "EXPIRES", "STORED", "CREATED"]
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
                expiry(key.expires_in),
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
            let constraints = Constraints::new(&description.constraints);
            return print_json(&Described { key, versions, constraints });
        }
        let mut text = pairs(&[
            ("name", key.name.to_owned()),
            ("id", key.id),
            ("state", key.state.to_owned()),
            ("primary", key.primary.to_string()),
            ("minimum", key.minimum.to_string()),
            ("stored", if key.memory_only { "no, memory only".to_owned() } else { "yes".to_owned() }),
            ("created", key.created),
            ("expires", expiry(key.expires_in)),
            ("uses", key.uses.to_string()),
            ("constraints", constraints(&description.constraints)),
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

    /// What `--dry-run` has kept from being done.
    pub(super) fn would(&self, what: &'static str, key: &str) -> io::Result<()> {
        match self.json {
            true => print_json(&Would { would: what, key: Some(key) }),
            false => print(&format!("would {what} {}\n", harmless(key))),
        }
    }

    pub(super) fn would_lock(&self, locked: bool) -> io::Result<()> {
        let would = if locked { "lock" } else { "unlock" };
        match self.json {
            true => print_json(&Would { would, key: None }),
            false => print(&format!("would {would}\n")),
        }
    }

    pub(super) fn rotated(&self, name: &str, rotated: &Rotated) -> io::Result<()> {
        let (id, version, check_value) = (hex(&rotated.id), rotated.version, hex(&rotated.check_value));
        match self.json {
            true => print_json(&RotatedKey { name, id, version, check_value }),
            false => print(&pairs(&[
                ("name", name.to_owned()),
                ("id", id),
                ("version", version.to_string()),
                ("check value", check_value),
            ])),
        }
    }

    pub(super) fn renamed(&self, old: &str, new: &str, renamed: Renamed) -> io::Result<()> {
        let id = hex(&renamed.id);
        match self.json {
            true => print_json(&RenamedKey { old, name: new, id }),
            false => print(&pairs(&[("name", new.to_owned()), ("was", old.to_owned()), ("id", id)])),
        }
    }

    pub(super) fn removed_all(&self, keys: u64, dry_run: bool) -> io::Result<()> {
        match self.json {
            true => print_json(&RemovedKeys { keys, would: dry_run }),
            false if dry_run => print(&format!("would remove {}\n", many(keys, "key"))),
            false => print(&pairs(&[("removed", many(keys, "key"))])),
        }
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

    /// As JSON; the other form is the ciphertext itself.
    pub(super) fn wrapped_data_key(key: &str, version: u32, wrapped: &str) -> io::Result<()> {
        print_json(&WrappedDataKey { key, version, wrapped })
    }

    /// A ciphertext that opens, or does not: then an error says why.
    pub(super) fn verdict(&self, verdict: &Verdict) -> io::Result<()> {
        let Verdict { key, id, version, primary, checked } = verdict;
        let checked = checked.map(|all| if all { "all" } else { "head" });
        if self.json {
            let (key, id, opens) = (key.as_deref(), id.to_string(), checked.is_some());
            return print_json(&Verification {
                key,
                id,
                version: *version,
                primary: *primary,
                opens,
                checked,
            });
        }
        let unknown = || "unknown".to_owned();
        print(&pairs(&[
            ("key", key.clone().unwrap_or_else(unknown)),
            ("id", id.to_string()),
            ("version", version.to_string()),
            ("primary", primary.map_or_else(unknown, |primary| primary.to_string())),
            (
                "opens",
                match checked {
                    None => "no".to_owned(),
                    Some("head") => "yes, as far as its head tells".to_owned(),
                    Some(_) => "yes".to_owned(),
                },
            ),
        ]))
    }

    pub(super) fn tag(&self, key: &str, version: u32, tag: &str) -> io::Result<()> {
        match self.json {
            true => print_json(&Tag { key, version, tag }),
            false => print(&format!("{tag}\n")),
        }
    }

    pub(super) fn right_tag(&self, key: &str, version: u32) -> io::Result<()> {
        match self.json {
            true => print_json(&RightTag { key, version, valid: true }),
            false => print(&pairs(&[
                ("key", key.to_owned()),
                ("version", version.to_string()),
                ("tag", "right".to_owned()),
            ])),
        }
    }

    /// What became of many files.
    pub(super) fn tally(&self, tally: &Tally, dry_run: bool) -> io::Result<()> {
        let Tally { rewrapped, current, skipped, failures } = tally;
        let failed = u64::try_from(failures.len()).unwrap_or(u64::MAX);
        if self.json {
            let (rewrapped, current, skipped) = (*rewrapped, *current, *skipped);
            return print_json(&Rewrapped { rewrapped, current, skipped, failed, would: dry_run });
        }
        print(&pairs(&[
            (if dry_run { "would rewrap" } else { "rewrapped" }, rewrapped.to_string()),
            ("current", current.to_string()),
            ("skipped", skipped.to_string()),
            ("failed", failed.to_string()),
        ]))
    }

    pub(super) fn stats(&self, stats: &StatsReply, openmetrics: bool) -> io::Result<()> {
        if openmetrics {
            return print(&metrics(stats)?);
        }
        let values = stats.values.iter().map(|value| (value.name.as_str(), value.value));
        if self.json {
            let operations = stats.operations.iter().map(|row| Operation {
                operation: operation_name(row.opcode),
                status: status_name(row.status),
                count: row.count,
            });
            let (values, operations) = (values.collect(), operations.collect());
            return print_json(&Stats { uptime_ms: stats.uptime_ms, values, operations });
        }
        let mut lines = vec![("uptime-ms", stats.uptime_ms.to_string())];
        lines.extend(values.map(|(name, value)| (name, value.to_string())));
        let mut rows = vec![["OPERATION", "STATUS", "COUNT"].map(String::from).to_vec()];
        rows.extend(
            stats
                .operations
                .iter()
                .map(|row| vec![operation_name(row.opcode), status_name(row.status), row.count.to_string()]),
        );
        print(&format!("{}\n{}", pairs(&lines), table(&rows)))
    }

    /// What a shell evaluates.
    pub(super) fn environment(&self, shell: &Env, socket: &Path) -> io::Result<()> {
        let socket = std::path::absolute(socket)?;
        if self.json {
            let socket = socket.to_str().ok_or(io::ErrorKind::InvalidFilename)?;
            return print_json(&BTreeMap::from([("KMS_AUTH_SOCK", socket)]));
        }
        /// What stands for a byte within quotation marks.
        type Escape = fn(u8) -> Option<&'static [u8]>;
        let (before, behind, escaped): (_, _, Escape) = match (shell.csh, shell.fish) {
            (true, _) => ("setenv KMS_AUTH_SOCK ", ";\n", |byte| match byte {
                b'\'' => Some(br"'\''"),
                // The history is looked for in quotation marks as well.
                b'!' => Some(br"\!"),
                b'\n' => Some(b"\\\n"),
                _ => None,
            }),
            (_, true) => ("set -gx KMS_AUTH_SOCK ", ";\n", |byte| match byte {
                b'\'' => Some(br"\'"),
                b'\\' => Some(br"\\"),
                _ => None,
            }),
            _ => ("KMS_AUTH_SOCK=", "; export KMS_AUTH_SOCK;\n", |byte| match byte {
                b'\'' => Some(br"'\''"),
                _ => None,
            }),
        };
        let path = socket.as_os_str().as_bytes();
        let plain = path.iter().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(byte));
        let quote: &[u8] = if plain { b"" } else { b"'" };
        let mut line = [before.as_bytes(), quote].concat();
        for byte in path {
            match escaped(*byte) {
                Some(escaped) => line.extend_from_slice(escaped),
                None => line.push(*byte),
            }
        }
        line.extend_from_slice(quote);
        line.extend_from_slice(behind.as_bytes());
        print_bytes(&line)
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
    constraints: Constraints,
}

/// What a key was added with.
#[derive(Default, Serialize)]
struct Constraints {
    memory_only: bool,
    lifetime: Option<u64>,
    confirm: bool,
    max_uses: Option<u64>,
    exportable: bool,
}

impl Constraints {
    fn new(constraints: &[Constraint]) -> Self {
        let mut all = Self::default();
        for Constraint { kind, value } in constraints {
            match *kind {
                constraint::MEMORY_ONLY => all.memory_only = true,
                constraint::LIFETIME => all.lifetime = Some(*value),
                constraint::CONFIRM => all.confirm = true,
                constraint::MAX_USES => all.max_uses = Some(*value),
                constraint::EXPORTABLE => all.exportable = true,
                // Of a later release.
                _ => {}
            }
        }
        all
    }
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
struct Would<'a> {
    would: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
}

#[derive(Serialize)]
struct RotatedKey<'a> {
    name: &'a str,
    id: String,
    version: u32,
    check_value: String,
}

#[derive(Serialize)]
struct RenamedKey<'a> {
    name: &'a str,
    old: &'a str,
    id: String,
}

#[derive(Serialize)]
struct RemovedKeys {
    keys: u64,
    #[serde(skip_serializing_if = "is_false")]
    would: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(value: &bool) -> bool {
    !value
}

#[derive(Serialize)]
struct WrappedDataKey<'a> {
    key: &'a str,
    version: u32,
    wrapped: &'a str,
}

#[derive(Serialize)]
struct Verification<'a> {
    key: Option<&'a str>,
    id: String,
    version: u32,
    primary: Option<u32>,
    opens: bool,
    checked: Option<&'static str>,
}

#[derive(Serialize)]
struct Tag<'a> {
    key: &'a str,
    version: u32,
    tag: &'a str,
}

#[derive(Serialize)]
struct RightTag<'a> {
    key: &'a str,
    version: u32,
    valid: bool,
}

#[derive(Serialize)]
struct Rewrapped {
    rewrapped: u64,
    current: u64,
    skipped: u64,
    failed: u64,
    #[serde(skip_serializing_if = "is_false")]
    would: bool,
}

#[derive(Serialize)]
struct Stats<'a> {
    uptime_ms: u64,
    values: BTreeMap<&'a str, u64>,
    operations: Vec<Operation>,
}

#[derive(Serialize)]
struct Operation {
    operation: String,
    status: String,
    count: u64,
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
    facts: Option<BTreeMap<&'a str, &'a str>>,
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

/// A number and what it counts.
fn many(number: u64, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        _ => format!("{number} {what}s"),
    }
}

fn expiry(seconds: Option<u64>) -> String {
    seconds.map_or_else(|| "never".to_owned(), |seconds| format!("in {seconds} s"))
}

/// What a key was added with, in the words of the command line.
fn constraints(constraints: &[Constraint]) -> String {
    let words: Vec<_> = constraints
        .iter()
        .map(|Constraint { kind, value }| match *kind {
            constraint::MEMORY_ONLY => "memory only".to_owned(),
            constraint::LIFETIME => format!("lifetime {value} s"),
            constraint::CONFIRM => "a person's yes to each use".to_owned(),
            constraint::MAX_USES => format!("at most {}", many(*value, "use")),
            constraint::EXPORTABLE => "exportable".to_owned(),
            kind => format!("kind {kind}, value {value}"),
        })
        .collect();
    if words.is_empty() { "none".to_owned() } else { words.join(", ") }
}

fn operation_name(opcode: u16) -> String {
    match Opcode::from_code(opcode) {
        Some(opcode) => opcode.name().to_owned(),
        None if opcode == 0 => "none".to_owned(),
        None => opcode.to_string(),
    }
}

fn status_name(status: u16) -> String {
    Status::from_code(status).map_or_else(|| status.to_string(), |status| status.name().to_owned())
}

/// Counters as OpenMetrics text.
fn metrics(stats: &StatsReply) -> io::Result<String> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Metrics(stats.clone())));
    let mut text = String::new();
    encode(&mut text, &registry).map_err(io::Error::other)?;
    Ok(text)
}

#[derive(Debug)]
struct Metrics(StatsReply);

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let mut rows = encoder.encode_descriptor(
            "kms_agent_operations",
            "Operations since the start",
            None,
            MetricType::Counter,
        )?;
        for row in &self.0.operations {
            let labels = [("operation", operation_name(row.opcode)), ("status", status_name(row.status))];
            ConstCounter::new(row.count).encode(rows.encode_family(&labels)?)?;
        }
        let uptime = std::time::Duration::from_millis(self.0.uptime_ms).as_secs_f64();
        let gauge = ConstGauge::new(uptime);
        let (name, help) = ("kms_agent_uptime_seconds", "Time since the start, suspend included");
        gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        let mut seen = BTreeSet::new();
        for value in &self.0.values {
            // A later agent has values that are not known here, and a name must be one of a metric.
            let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
            let name = format!("kms_agent_{}", value.name.chars().map(plain).collect::<String>());
            if !seen.insert(name.clone()) {
                continue;
            }
            let (help, is_counter) = match value.name.as_str() {
                "keys" => ("Keys", false),
                "versions" => ("Versions of all keys", false),
                "connections" => ("Connections that are open", false),
                "key-uses" => ("Uses of keys, also of keys that are gone", true),
                "bytes-in" => ("Bytes of the frames that were taken up", true),
                "bytes-out" => ("Bytes of the frames that were answered", true),
                "panics" => ("Faults that ended a connection", true),
                _ => ("Not known to this kmsctl", false),
            };
            match is_counter {
                true => {
                    let counter = ConstCounter::new(value.value);
                    counter.encode(encoder.encode_descriptor(&name, help, None, counter.metric_type())?)?;
                }
                false => {
                    let gauge = ConstGauge::new(value.value);
                    gauge.encode(encoder.encode_descriptor(&name, help, None, gauge.metric_type())?)?;
                }
            }
        }
        Ok(())
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
    use super::*;

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
    fn counters_have_names_that_a_scraper_takes() {
        let value = |name: &str, value| crate::Value { name: name.into(), value };
        let stats = StatsReply {
            uptime_ms: 1500,
            operations: vec![
                crate::OperationCount { opcode: 0x20, status: 0, count: 7 },
                crate::OperationCount { opcode: 0, status: 1, count: 2 },
                crate::OperationCount { opcode: 0x7fff, status: 99, count: 1 },
            ],
            values: vec![
                value("keys", 3),
                value("key-uses", 9),
                value("new\nthing", 1),
                value("new thing", 2),
            ],
        };
        let expected = "\
            # HELP kms_agent_operations Operations since the start\n\
            # TYPE kms_agent_operations counter\n\
            kms_agent_operations_total{operation=\"encrypt\",status=\"ok\"} 7\n\
            kms_agent_operations_total{operation=\"none\",status=\"malformed\"} 2\n\
            kms_agent_operations_total{operation=\"32767\",status=\"99\"} 1\n\
            # HELP kms_agent_uptime_seconds Time since the start, suspend included\n\
            # TYPE kms_agent_uptime_seconds gauge\n\
            kms_agent_uptime_seconds 1.5\n\
            # HELP kms_agent_keys Keys\n\
            # TYPE kms_agent_keys gauge\n\
            kms_agent_keys 3\n\
            # HELP kms_agent_key_uses Uses of keys, also of keys that are gone\n\
            # TYPE kms_agent_key_uses counter\n\
            kms_agent_key_uses_total 9\n\
            # HELP kms_agent_new_thing Not known to this kmsctl\n\
            # TYPE kms_agent_new_thing gauge\n\
            kms_agent_new_thing 1\n\
            # EOF\n";
        assert_eq!(metrics(&stats).unwrap(), expected);
    }
}
